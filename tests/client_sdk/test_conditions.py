# SPDX-License-Identifier: Apache-2.0
"""Whether a device takes work now, and what it says where it does not."""

from __future__ import annotations

import os
import time
from dataclasses import dataclass, field
from datetime import datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from client_sdk import conditions as module
from client_sdk.conditions import Conditions, Verdict, look, threads_of
from client_sdk.errors import ConditionsError
from client_sdk.machine import Fact, Machine

DAY = datetime(2025, 3, 30)  # clocks change in Europe; hours are those that the clock shows


@dataclass(frozen=True, slots=True, kw_only=True)
class Known(Machine):
    """A machine of which the facts are given."""

    facts: dict[str, int | None] = field(default_factory=dict)

    def on_mains(self) -> Fact:
        return Fact(self.facts.get("mains"), "seen so")

    def battery_percent(self) -> Fact:
        return Fact(self.facts.get("battery"), "seen so")

    def metered(self) -> Fact:
        return Fact(self.facts.get("metered"), "seen so")

    def free_memory_mb(self) -> Fact:
        return Fact(self.facts.get("memory"), "seen so")


def at(minutes: int) -> Machine:
    return Known(now=lambda: DAY + timedelta(minutes=minutes))


def test_nothing_asked_for_is_always_ready() -> None:
    assert look(Conditions(), Known()) == Verdict(ready=True)
    assert str(look(Conditions(), Known())) == "ready"
    assert look(Conditions()).ready


# Hours


@pytest.mark.parametrize(
    ("hours", "clock", "ready"),
    [
        ("22:00-06:00", "21:59", False),
        ("22:00-06:00", "22:00", True),
        ("22:00-06:00", "00:00", True),
        ("22:00-06:00", "05:59", True),
        ("22:00-06:00", "06:00", False),
        ("08:30-12:00", "08:30", True),
        ("08:30-12:00", "12:00", False),
        ("01:00-02:00, 03:00-04:00", "03:30", True),
        ("01:00-02:00,03:00-04:00", "02:30", False),
        ("20:00-24:00", "23:59", True),
        ("20:00-24:00", "00:00", False),
        ("20:00-00:00", "23:59", True),
    ],
)
def test_hours_are_kept_by_the_clock(hours: str, clock: str, ready: bool) -> None:
    minutes = 60 * int(clock[:2]) + int(clock[3:])
    verdict = look(Conditions(hours=hours), at(minutes))
    assert verdict.ready is ready
    if not ready:
        assert verdict.reasons == (f"hours: it is {clock}, expected {hours}",)


@given(start=st.integers(0, 1439), length=st.integers(1, 1439), now=st.integers(0, 1439))
def test_window_holds_its_length_from_its_start_on(start: int, length: int, now: int) -> None:
    end = (start + length) % 1440
    hours = f"{start // 60:02}:{start % 60:02}-{end // 60:02}:{end % 60:02}"
    assert look(Conditions(hours=hours), at(now)).ready is ((now - start) % 1440 < length)


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"hours": "22-6"}, 'expected "HH:MM-HH:MM", such as "22:00-06:00", found \'22-6\''),
        ({"hours": "25:00-06:00"}, "HH:MM"),
        ({"hours": "22:60-06:00"}, "HH:MM"),
        ({"hours": "24:00-06:00"}, "HH:MM"),
        ({"hours": "22:00-24:01"}, "HH:MM"),
        ({"hours": "22:00-06:00,"}, "HH:MM"),
        ({"hours": "06:00-06:00"}, "differ.*leave hours out"),
        ({"power": "solar"}, "power: expected any or mains, found 'solar'"),
        ({"metered": True}, "metered: expected allowed or refused, found True"),
        ({"unknown": ""}, "unknown: expected wait or work"),
        ({"least_battery_percent": 101}, "integer of 0 to 100, found 101"),
        ({"least_free_memory_mb": -1}, "found -1"),
        ({"threads": 1.5}, "threads: expected an integer"),
        ({"threads": True}, "found True"),
        ({"command": "echo 'half"}, "command: No closing quotation"),
        ({"command": "  "}, "command: expected a program"),
    ],
)
def test_settings_that_cannot_be_meant_are_refused(settings: dict[str, Any], words: str) -> None:
    with pytest.raises(ConditionsError, match=words):
        Conditions(**settings)


# Facts


@pytest.mark.parametrize(
    ("asked", "facts", "holds"),
    [
        ({"power": "mains"}, {"mains": True}, True),
        ({"power": "mains"}, {"mains": False}, False),
        ({"power": "mains"}, {}, None),
        ({"least_battery_percent": 40}, {"mains": True, "battery": 5}, True),
        ({"least_battery_percent": 40}, {"mains": False, "battery": 40}, True),
        ({"least_battery_percent": 40}, {"mains": False, "battery": 39}, False),
        ({"least_battery_percent": 40}, {"battery": 39}, False),
        ({"least_battery_percent": 40}, {"mains": False}, None),
        ({"metered": "refused"}, {"metered": False}, True),
        ({"metered": "refused"}, {"metered": True}, False),
        ({"metered": "refused"}, {}, None),
        ({"least_free_memory_mb": 300}, {"memory": 300}, True),
        ({"least_free_memory_mb": 300}, {"memory": 299}, False),
        ({"least_free_memory_mb": 300}, {}, None),
    ],
)
def test_what_is_asked_for_holds_fails_or_is_unknown(
    asked: dict[str, Any], facts: dict[str, int | None], holds: bool | None
) -> None:
    machine = Known(facts=facts)
    verdict = look(Conditions(**asked), machine)
    assert verdict.ready is (holds is True)
    assert len(verdict.reasons) == (holds is False) and len(verdict.unknown) == (holds is None)
    relaxed = look(Conditions(**asked, unknown="work"), machine)
    assert relaxed.ready is (holds is not False)
    assert relaxed.unknown == verdict.unknown, "what is unknown is said in either case"


def test_all_reasons_are_told_at_once() -> None:
    asked = Conditions(
        hours="01:00-02:00", power="mains", metered="refused", least_free_memory_mb=100
    )
    verdict = look(asked, Known(now=lambda: DAY, facts={"mains": False, "memory": 10}))
    assert [reason.partition(":")[0] for reason in verdict.reasons] == ["hours", "power", "memory"]
    assert str(verdict) == (
        "waits (hours: it is 00:00, expected 01:00-02:00; power: expected mains, seen so; "
        "memory: expected 100 MiB free, found 10 by seen so; "
        "unknown: link: expected one that is not metered, seen so)"
    )


def test_threads_are_never_more_than_the_cores() -> None:
    cores = len(os.sched_getaffinity(0))
    assert threads_of(Conditions()) == cores
    assert threads_of(Conditions(threads=1)) == 1
    assert threads_of(Conditions(threads=4096)) == cores


# The owner's own word


@pytest.mark.parametrize(
    ("script", "ready", "words"),
    [
        ("exit 0", True, ""),
        ("exit 1", False, "it says not now"),
        ("echo the printer is warm; echo more; exit 1", False, "the printer is warm"),
        ("exit 2", None, "expected exit code 0 or 1, found 2"),
        ("kill -9 $$", None, "found -9"),
    ],
)
def test_command_decides_by_its_exit_code(script: str, ready: bool | None, words: str) -> None:
    verdict = look(Conditions(command=f"sh -c '{script}'"), Known())
    assert verdict.ready is (ready is True)
    told = verdict.unknown if ready is None else verdict.reasons
    assert all(words in text for text in told) and bool(told) is (ready is not True)


def test_command_that_is_not_there_is_unknown() -> None:
    verdict = look(Conditions(command="/no/such/program now"), Known())
    assert not verdict.ready
    assert "cannot be started (No such file or directory)" in verdict.unknown[0]


def test_command_that_hangs_is_ended_with_its_children(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(module, "COMMAND_TIMEOUT_S", 0.2)
    started = time.monotonic()
    # The child holds the pipe after its parent is gone.
    script = f"sleep 60 & echo $! > {tmp_path}/pid; wait"
    verdict = look(Conditions(command=f'sh -c "{script.replace("$", chr(92) + "$")}"'), Known())
    assert "no answer within 0.2 s" in verdict.unknown[0]
    assert time.monotonic() - started < 10
    state = Path("/proc", (tmp_path / "pid").read_text().strip(), "stat")
    deadline = time.monotonic() + 10
    while state.exists() and state.read_text().rpartition(")")[2].split()[0] != "Z":
        assert time.monotonic() < deadline, "the child still runs"
        time.sleep(0.01)


@pytest.mark.parametrize(
    ("body", "ready", "words"),
    [
        ("return True", True, ""),
        ("return False", False, "it says not now"),
        ("return 'a patient is in the room'", False, "a patient is in the room"),
        ("return None", None, "expected True, False or a sentence, found None"),
        ("return ''", None, "expected True, False or a sentence"),
        ("return 1", None, "found 1"),
        ("raise OSError('no bus')", None, "it raised OSError: no bus"),
    ],
)
def test_own_function_decides(tmp_path: Path, body: str, ready: bool | None, words: str) -> None:
    (tmp_path / "own.py").write_text(f"def now():\n    {body}\n")
    verdict = look(Conditions(function=f"{tmp_path / 'own.py'}:now"), Known())
    assert verdict.ready is (ready is True)
    told = verdict.unknown if ready is None else verdict.reasons
    assert all(words in text for text in told) and bool(told) is (ready is not True)


def test_own_function_that_cannot_be_found_is_unknown() -> None:
    verdict = look(Conditions(function="no_such_module:now"), Known())
    assert not verdict.ready and "cannot be loaded" in verdict.unknown[0]
