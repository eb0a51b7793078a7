# SPDX-License-Identifier: Apache-2.0
"""Whether a device takes work now, and why not: hours, power, link, memory, and its owner's word.

What is asked for and cannot be known is said to be unknown, and by default waited for: a limit that
is not kept is worse than a late round.
"""

from __future__ import annotations

import os
import re
import shlex
import signal
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import time
from typing import Final, Literal

from client_sdk.errors import ConditionsError, FunctionError
from client_sdk.functions import load_function
from client_sdk.machine import Fact, Machine

COMMAND_TIMEOUT_S: Final = 10.0

_WINDOW: Final = re.compile(r"(\d\d):(\d\d)-(\d\d):(\d\d)")
_DAY_MINUTES: Final = 24 * 60
_REASON: Final = 200  # characters of what own code says


@dataclass(frozen=True, slots=True, kw_only=True)
class Conditions:
    """What a device's owner asks for; the defaults ask for nothing."""

    hours: str = ""
    """Local time, "22:00-06:00" or several with commas between; "" for all day. The end is not in
    it, and it may go over midnight."""
    power: Literal["any", "mains"] = "any"
    least_battery_percent: int = 0  # not asked for while on mains power
    metered: Literal["allowed", "refused"] = "allowed"
    least_free_memory_mb: int = 0  # MiB that programs may still take
    threads: int = 0  # most threads of the training; 0: one for each core that it may use
    command: str = ""
    """Split as a shell does and run without one. Exit code 0: work, 1: not now, with the first line
    that it prints as the reason. Anything else is unknown."""
    function: str = ""
    """"module:function" or "file.py:function", called without arguments: True to work, False or a
    sentence for not now."""
    unknown: Literal["wait", "work"] = "wait"  # where something that is asked for cannot be known

    def __post_init__(self) -> None:
        windows(self.hours)
        for name, allowed in (
            ("power", ("any", "mains")),
            ("metered", ("allowed", "refused")),
            ("unknown", ("wait", "work")),
        ):
            if getattr(self, name) not in allowed:
                raise ConditionsError(
                    f"{name}: expected {' or '.join(allowed)}, found {getattr(self, name)!r}"
                )
        for name, most in (
            ("least_battery_percent", 100),
            ("least_free_memory_mb", 1 << 30),
            ("threads", 1 << 12),
        ):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int) or not 0 <= value <= most:
                raise ConditionsError(
                    f"{name}: expected an integer of 0 to {most}, found {value!r}"
                )
        try:
            words = shlex.split(self.command)
        except ValueError as error:
            raise ConditionsError(f"command: {error}, found {self.command!r}") from None
        if self.command and not words:
            raise ConditionsError(f"command: expected a program, found {self.command!r}")


@dataclass(frozen=True, slots=True, kw_only=True)
class Verdict:
    """Whether to work now. `reasons` say why not, `unknown` what was asked for and is not known."""

    ready: bool
    reasons: tuple[str, ...] = ()
    unknown: tuple[str, ...] = ()

    def __str__(self) -> str:
        parts = [*self.reasons, *(f"unknown: {fact}" for fact in self.unknown)]
        return ("ready" if self.ready else "waits") + (f" ({'; '.join(parts)})" if parts else "")


def look(conditions: Conditions, machine: Machine | None = None) -> Verdict:
    """Whether the conditions hold now; every one that does not is told."""
    answers = list(_answers(conditions, machine or Machine()))
    reasons = tuple(text for holds, text in answers if holds is False)
    unknown = tuple(text for holds, text in answers if holds is None)
    waits = bool(reasons) or (bool(unknown) and conditions.unknown == "wait")
    return Verdict(ready=not waits, reasons=reasons, unknown=unknown)


def threads_of(conditions: Conditions) -> int:
    """Threads to train with: those allowed, and no more than the cores of this process."""
    cores = len(os.sched_getaffinity(0))
    return min(conditions.threads, cores) if conditions.threads else cores


def windows(hours: str) -> list[tuple[time, time]]:
    """The windows of `Conditions.hours`; an end of 00:00 is midnight. Raises: ConditionsError."""
    found = []
    for text in hours.split(",") if hours.strip() else ():
        match = _WINDOW.fullmatch(text.strip())
        minutes = [60 * int(match[i]) + int(match[i + 1]) for i in (1, 3)] if match else [0, 0]
        sound = match and int(match[2]) < 60 and int(match[4]) < 60
        if not sound or minutes[0] >= _DAY_MINUTES or minutes[1] > _DAY_MINUTES:
            raise ConditionsError(
                f'hours: expected "HH:MM-HH:MM", such as "22:00-06:00", found {text.strip()!r}'
            )
        start, end = (value % _DAY_MINUTES for value in minutes)
        if start == end:
            raise ConditionsError(
                f"hours: expected a start and an end that differ, found {text.strip()!r}; leave "
                "hours out for all day"
            )
        found.append((time(start // 60, start % 60), time(end // 60, end % 60)))
    return found


def _answers(conditions: Conditions, machine: Machine) -> Iterator[tuple[bool | None, str]]:
    """For everything that is asked for: whether it holds, or None, and a sentence."""
    if open_hours := windows(conditions.hours):
        now = machine.now().time()
        inside = any(
            start <= now < end if start < end else now >= start or now < end
            for start, end in open_hours
        )
        yield inside, f"hours: it is {now:%H:%M}, expected {conditions.hours}"
    if conditions.power == "mains":
        mains = machine.on_mains()
        yield _truth(mains), f"power: expected mains, {mains.seen}"
    if least := conditions.least_battery_percent:
        mains, charge = machine.on_mains(), machine.battery_percent()
        said = charge.seen if charge.value is None else f"found {charge.value} %"
        enough = None if charge.value is None else charge.value >= least
        yield bool(mains.value) or enough, f"battery: expected {least} % or mains power, {said}"
    if conditions.metered == "refused":
        link = machine.metered()
        free = None if link.value is None else not link.value
        yield free, f"link: expected one that is not metered, {link.seen}"
    if least := conditions.least_free_memory_mb:
        memory = machine.free_memory_mb()
        said = memory.seen if memory.value is None else f"found {memory.value} by {memory.seen}"
        enough = None if memory.value is None else memory.value >= least
        yield enough, f"memory: expected {least} MiB free, {said}"
    if conditions.command:
        yield _run(conditions.command)
    if conditions.function:
        yield _call(conditions.function)


def _run(command: str) -> tuple[bool | None, str]:
    try:
        process = subprocess.Popen(
            shlex.split(command),
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            start_new_session=True,
        )
    except OSError as error:
        return None, f"command {command}: it cannot be started ({error.strerror})"
    with process:
        try:
            out, _ = process.communicate(timeout=COMMAND_TIMEOUT_S)
        except subprocess.TimeoutExpired:
            # With its own children, which would keep the pipe open.
            os.killpg(process.pid, signal.SIGKILL)
            process.communicate()
            return None, f"command {command}: no answer within {COMMAND_TIMEOUT_S:g} s"
    said = (out.decode("utf-8", "replace").splitlines() or [""])[0].strip()[:_REASON]
    match process.returncode:
        case 0:
            return True, ""
        case 1:
            return False, f"command {command}: {said or 'it says not now'}"
        case code:
            return None, f"command {command}: expected exit code 0 or 1, found {code}"


def _call(address: str) -> tuple[bool | None, str]:
    try:
        answer = load_function(address)()
    except FunctionError as error:
        return None, f"function {error}"
    except Exception as error:  # it is the device's own code
        return None, f"function {address}: it raised {type(error).__name__}: {error}"
    match answer:
        case True:
            return True, ""
        case False:
            return False, f"function {address}: it says not now"
        case str() if answer.strip():
            return False, f"function {address}: {answer.strip()[:_REASON]}"
    return None, f"function {address}: expected True, False or a sentence, found {answer!r:.80}"


def _truth(fact: Fact) -> bool | None:
    return None if fact.value is None else bool(fact.value)
