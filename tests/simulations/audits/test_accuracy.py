# SPDX-License-Identifier: Apache-2.0
"""The cost of privacy in accuracy: the rule that names a method, and tiny runs that are gone on
with."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from statistics import mean
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats

from coordinator.errors import JobError
from coordinator.job import Job, load_job
from coordinator.privacy_section import PrivacySection
from coordinator.sections import AggregationSection, RoundsSection, SimulationSection, UpdateSection
from simulations.audits import accuracy
from simulations.audits.accuracy import (
    ARMS,
    Runs,
    accuracy_audit,
    accuracy_figures,
    chosen,
    leads,
    private_job,
    variant,
)
from simulations.errors import RunFolderError, SimulationError
from simulations.progress import SilentProgress

ROOT = Path(__file__).parents[3]
NAMES = [f"{arm.key}-{side}-0" for arm in ARMS for side in ("private", "plain")]


def runs(accuracies: tuple[float, ...], sent: int = 1000) -> Runs:
    return Runs(
        accuracies=accuracies,
        uplink_bytes=(sent,) * len(accuracies),
        curves=tuple(((1, value),) for value in accuracies),
        epsilons=(1.5,) * len(accuracies),
    )


@pytest.fixture(scope="module")
def job(tiny_job: Callable[..., Any]) -> Job:
    """Five clients, one round, noise that a budget of 20 covers."""
    made: Job = tiny_job(
        "ssf",
        update=UpdateSection(metrics=""),
        aggregation=AggregationSection(weighting="uniform"),
        rounds=RoundsSection(count=1),
        simulation=SimulationSection(backend="sequential"),
    )
    section = PrivacySection(mode="central", sampling="all", epsilon=20.0)
    return replace(made, data=replace(made.data, held_out=0.0), privacy=section)


def test_the_job_is_that_of_the_example() -> None:
    example = load_job(ROOT / "examples" / "fashion-private-ssf.toml")
    assert private_job().hash() == example.hash()
    assert private_job(quick=True).privacy == example.privacy


def test_arms_differ_in_method_factors_and_privacy_alone() -> None:
    base = private_job()
    (ssf, lora, frozen) = (variant(base, arm, private=True, seed=2) for arm in ARMS)
    assert (ssf.method.name, lora.method.name, frozen.method.name) == ("ssf", "lora", "lora")
    assert replace(frozen, aggregation=lora.aggregation) == lora
    assert frozen.aggregation.factors == "up"
    assert replace(lora, method=ssf.method) == ssf
    plain = variant(base, ARMS[1], private=False, seed=2)
    assert not plain.privacy.is_private
    assert replace(plain, privacy=base.privacy) == lora


@given(
    st.lists(st.tuples(st.floats(0, 1), st.floats(0, 1)), min_size=2, max_size=6).filter(
        lambda pairs: np.std([a - b for a, b in pairs]) > 1e-6
    )
)
def test_a_lead_is_decided_where_the_paired_interval_is_above_zero(
    pairs: list[tuple[float, float]],
) -> None:
    first, second = zip(*pairs, strict=True)
    interval = stats.ttest_rel(first, second).confidence_interval(0.95)
    if abs(interval.low) > 1e-9:
        assert leads(first, second) == (interval.low > 0)


def test_one_seed_and_equal_seeds_decide_nothing() -> None:
    assert not leads((0.9,), (0.1,))
    assert not leads((0.9, 0.8), (0.9, 0.8))
    assert leads((0.9, 0.8, 0.7), (0.8, 0.7, 0.6))


def test_the_highest_is_named_where_the_seeds_tell() -> None:
    found = chosen(
        {
            "a": runs((0.80, 0.81, 0.82), sent=1),
            "b": runs((0.86, 0.87, 0.88), sent=3),
            "c": runs((0.83, 0.84, 0.85), sent=2),
        }
    )
    assert (found.named, found.highest, found.decided) == ("b", "b", True)


def test_of_those_that_the_seeds_do_not_tell_apart_the_one_that_sends_least_is_named() -> None:
    found = chosen(
        {
            "a": runs((0.80, 0.81, 0.82), sent=1),
            "b": runs((0.86, 0.87, 0.88), sent=3),
            "c": runs((0.88, 0.86, 0.85), sent=2),
        }
    )
    assert (found.named, found.highest, found.decided) == ("c", "b", False)
    assert found.level == ("b", "c"), "a sends less and is behind at every seed"


def test_figures_say_what_was_chosen_and_hold_the_budget() -> None:
    found = {(arm.key, private): runs((0.8, 0.9)) for arm in ARMS for private in (True, False)}
    figures = {made.name: made for made in accuracy_figures(found, private_job())}
    assert "SSF ± 0.0707 over 2 seeds, sends least" in figures["private_accuracy"].note
    assert "LoRA and LoRA, A frozen" in figures["private_accuracy"].note
    assert figures["private_epsilon"].holds is True
    found["lora", True] = replace(runs((0.8, 0.9)), epsilons=(1.5, 8.01))
    figures = {made.name: made for made in accuracy_figures(found, private_job())}
    assert figures["private_epsilon"].holds is False


def test_a_tiny_audit_is_played_once_and_gone_on_with(
    job: Job, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    played: list[str] = []
    simulate = accuracy.simulate

    def watched(job: Job, folder: Path, **options: Any) -> Any:
        played.append(folder.name)
        return simulate(job, folder, **options)

    monkeypatch.setattr(accuracy, "simulate", watched)

    def audit() -> Any:
        return accuracy_audit(SilentProgress(), out=tmp_path, job=job, seeds=1, quick=True)

    audited = audit()
    assert played == NAMES
    figures = {made.name: made for made in audited.figures}
    values = {name: made.value for name, made in figures.items()}
    for arm in ARMS:
        summary = json.loads((tmp_path / "runs" / f"{arm.key}-private-0/summary.json").read_text())
        assert values[f"private_accuracy_{arm.key}"] == summary["accuracy"]
        assert values[f"private_uplink_{arm.key}"] == pytest.approx(summary["uplink_bytes"] / 1e6)
    named = min(ARMS, key=lambda arm: values[f"private_uplink_{arm.key}"])
    assert values["private_accuracy"] == values[f"private_accuracy_{named.key}"]
    assert 0 < values["private_uplink_lora_up"] < values["private_uplink_lora"]
    assert figures["private_epsilon"].holds is True
    assert "one seed" in figures["private_accuracy"].note
    assert all(made.note.startswith("QUICK RUN; ") for made in audited.figures)
    audited.draw(tmp_path / "plot.png")
    assert (tmp_path / "plot.png").read_bytes().startswith(b"\x89PNG")

    # As if it had been killed before that run was written down.
    (tmp_path / "runs" / "lora-private-0" / "summary.json").unlink()
    played.clear()
    assert [made.value for made in audit().figures] == list(values.values())
    assert played == ["lora-private-0"]

    other = replace(job, training=replace(job.training, learning_rate=0.02))
    with pytest.raises(RunFolderError, match="ssf-private-0 holds a run of another job"):
        accuracy_audit(SilentProgress(), out=tmp_path, job=other, quick=True)


def test_a_job_without_privacy_is_refused_before_anything_is_played(
    tiny_job: Callable[..., Any], tmp_path: Path
) -> None:
    with pytest.raises(JobError, match=r'privacy\.mode = "none"'):
        accuracy_audit(SilentProgress(), out=tmp_path / "no", job=tiny_job("ssf"))
    assert not (tmp_path / "no").exists()


def test_a_run_whose_last_test_gave_nothing_is_named(tmp_path: Path) -> None:
    from reports.run_record import RunRecord

    record = RunRecord(
        folder=tmp_path / "ssf-plain-0", job_text="", rounds=(), summary={"accuracy": None}
    )
    with pytest.raises(SimulationError, match="ssf-plain-0: expected an accuracy"):
        accuracy.gathered([record])


def test_means_are_over_seeds() -> None:
    assert runs((0.5, 0.7)).accuracy == pytest.approx(mean((0.5, 0.7)))
    assert replace(runs((0.5, 0.7)), uplink_bytes=(10, 30)).sent == 20
