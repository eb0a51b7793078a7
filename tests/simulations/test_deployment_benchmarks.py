# SPDX-License-Identifier: Apache-2.0
"""`fedloom bench deployment`: its figures, over a real gateway with few devices."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from simulations.benchmarks import deployment
from simulations.benchmarks.figure import figure
from simulations.benchmarks.gateway_load import POLL_S, gateway_bytes, gateway_requests
from simulations.benchmarks.journal_load import journal_commits
from simulations.progress import SilentProgress

QUIET = SilentProgress()
NAMES = [
    "gateway_requests_per_s",
    "gateway_cpu_ms",
    "gateway_p99_ms",
    "gateway_devices",
    "gateway_up_mb_per_s",
    "gateway_down_mb_per_s",
    "journal_answers_per_s",
    "journal_round_ms",
]


def test_requests_of_real_members_are_counted() -> None:
    rate, cpu, latest, devices = gateway_requests(QUIET, devices=2, requests=4)
    assert rate.value > 0 and cpu.value > 0 and latest.value > 0
    assert devices.value == pytest.approx(rate.value * POLL_S)
    assert rate.note.startswith("2 devices at once, 8 requests")


def test_bytes_go_both_ways() -> None:
    up, down = gateway_bytes(QUIET, devices=1, requests=2, body=100_000)
    assert up.value > 0 and down.value > 0 and up.unit == "MB/s"
    assert [up.name, down.name] == NAMES[4:6]


def test_answers_and_rounds_are_committed() -> None:
    answers, rounds = journal_commits(QUIET, rounds=2, clients=3, answer_bytes=1_000)
    assert answers.value > 0 and rounds.value > 0
    assert "3 updates" in rounds.note


def test_names_of_the_figures_stay(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, of_it in (
        ("gateway_requests", NAMES[:4]), ("gateway_bytes", NAMES[4:6]),
        ("journal_commits", NAMES[6:]),
    ):  # fmt: skip
        made = [figure(each, 1.0) for each in of_it]
        monkeypatch.setattr(deployment, name, lambda *_, made=made, **__: made)
    assert [each.name for each in deployment.figures(QUIET)] == NAMES
    assert all(each.note == "QUICK RUN" for each in deployment.figures(QUIET, quick=True))


def test_the_page_tells_every_figure() -> None:
    page = (Path(__file__).parents[2] / "docs" / "scale.md").read_text(encoding="utf-8")
    assert re.findall(r"^\| `(\w+)` \|", page, flags=re.MULTILINE) == NAMES
