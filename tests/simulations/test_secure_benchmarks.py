# SPDX-License-Identifier: Apache-2.0
"""Figures of secure sums, from a few draws and short vectors."""

from __future__ import annotations

from pathlib import Path

import pytest

from aggregation.secure_aggregation import Aborted, Reason
from simulations.benchmarks import secure_aggregation as bench
from simulations.benchmarks.flower_masks import mask_vs_flower
from simulations.benchmarks.secure_job import secure_job_gap
from simulations.progress import SilentProgress


@pytest.fixture
def few(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bench, "COUNTS", (5, 6, 24))


def test_sums_are_compared_bit_by_bit(few: None) -> None:
    made = bench.secure_sum_exact(SilentProgress(), draws=15)
    assert made.value == 1 and made.holds and made.note.startswith("15 of 15 draws; 5, 6, 24")
    assert "10 complete graphs, 5 rings" in made.note


def test_a_wrong_sum_is_counted(few: None, monkeypatch: pytest.MonkeyPatch) -> None:
    right = bench.plain_sum
    monkeypatch.setattr(bench, "plain_sum", lambda *asked: right(*asked) + 1)
    made = bench.secure_sum_exact(SilentProgress(), draws=3)
    assert made.value == 0 and made.holds is False


def test_too_many_lost_are_aborts(few: None) -> None:
    made = bench.secure_abort_exact(SilentProgress(), draws=15)
    assert made.value == 1 and made.holds and made.note.startswith("15 of 15")


def test_an_abort_is_no_sum() -> None:
    aborted = Aborted(reason=Reason.TOO_FEW_PEERS, detail="")
    assert not bench._is_exact(None, None, {}, aborted)  # type: ignore[arg-type]


def test_a_server_that_gets_something_is_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    scripts = dict(list(bench.SCRIPTS.items())[:2])
    monkeypatch.setattr(bench, "SCRIPTS", dict.fromkeys(scripts, Reason.WRONG_TASK))
    made = bench.malicious_server_aborts()
    assert made.value == 0 and made.holds is False
    assert "not held off: both_secrets_of_one_peer, " in made.note


def test_a_round_is_measured_in_bytes_and_seconds() -> None:
    measured = bench.measure_round(values=3000, clients=24)
    assert measured.exact and measured.lost == 2
    assert measured.vector_upload == 3000 * 15 // 8 + 46
    assert measured.vector_upload < measured.upload
    made = bench.upload_figure(measured)
    assert made.value == measured.upload / 3000 and made.holds is (made.value <= 2)
    assert bench.unmask_figure(measured).value == measured.unmask_seconds > 0


def test_votes_are_measured_in_bits() -> None:
    measured = bench.measure_round(values=3000, bits=bench.VOTE_BITS, clients=24)
    made = bench.vote_figure(measured)
    assert measured.exact and made.value == 8 * measured.upload / 3000 > 7


def test_masks_are_timed_beside_flowers() -> None:
    asked, wide = mask_vs_flower(values=2000, bits=15, repetitions=1)
    assert (asked.name, wide.name) == ("mask_vs_flower", "mask_vs_flower_32")
    assert asked.value > 0 and asked.target == ">= 4" and not wide.target


@pytest.mark.long
def test_jobs_of_sums_are_beside_their_own_updates_in_the_clear(
    tiny_vit: Path, cache_of_the_session: Path
) -> None:
    made = secure_job_gap(SilentProgress(), backbone=tiny_vit)
    assert made.holds and 0 <= made.value < 0.01, made
    assert "fedins" in made.note and "one-bit-adapter" in made.note
