# SPDX-License-Identifier: Apache-2.0
"""Membership inference beside slow oracles, on drawn adapters and on tiny ones that train."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from statistics import NormalDist, mean
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as npst

from simulations.audits.guarded import guarded_clients
from simulations.audits.membership import (
    area_under_curve,
    curve,
    halves,
    hits_at,
    leak,
    likelihood_ratios,
    logit_confidence,
    membership_audit,
    membership_figures,
    null_areas,
    shuffled,
)
from simulations.audits.shadows import Trained
from simulations.errors import DataError
from simulations.progress import SilentProgress

TIED = npst.arrays(np.float64, st.integers(4, 12), elements=st.sampled_from([0.0, 0.5, 1.0, 2.0]))


def drawn(gap: float, *, adapters: int = 8, pool: int = 400) -> tuple[np.ndarray, np.ndarray]:
    """φ of images of all difficulties, of which members have `gap` more, in units of its noise."""
    rng = np.random.default_rng(0)
    members = halves(adapters, pool, rng)
    phi = rng.normal(0, 5, pool) + gap * members + rng.standard_normal(members.shape)
    return phi, members


def test_every_adapter_is_trained_on_a_half_of_its_own() -> None:
    members = halves(6, 101, np.random.default_rng(0))
    assert members.sum(axis=1).tolist() == [50] * 6
    assert len({row.tobytes() for row in members}) == 6


@given(st.floats(1e-3, 15))
def test_confidence_is_the_logit_of_the_probability(entropy: float) -> None:
    p = math.exp(-entropy)
    assert logit_confidence(np.array([entropy]))[0] == pytest.approx(
        math.log(p / (1 - p)), rel=1e-6
    )


def test_confidence_is_finite_where_a_network_is_sure() -> None:
    values = logit_confidence(np.array([0.0, 1e-12, 1e-6, 1.0, 60.0], np.float32))
    assert np.isfinite(values).all()
    assert values[0] == values[1] == pytest.approx(16.1, abs=0.1)
    assert (np.diff(values[1:]) < 0).all()


def test_scores_are_those_of_the_slow_oracle() -> None:
    phi, members = drawn(1.0, adapters=5, pool=12)
    found = likelihood_ratios(phi, members)
    for target in range(5):
        others = [i for i in range(5) if i != target]
        middle = [mean(phi[i, x] for i in others) for x in range(12)]
        normals = []
        for wanted in (True, False):
            cells = [(i, x) for i in others for x in range(12) if members[i, x] == wanted]
            lean = mean(phi[i, x] - middle[x] for i, x in cells)
            means = []
            for x in range(12):
                own = [phi[i, x] for i in others if members[i, x] == wanted]
                means.append((sum(own) + middle[x] + lean) / (len(own) + 1))
            variance = mean((phi[i, x] - means[x]) ** 2 for i, x in cells)
            normals.append([NormalDist(m, math.sqrt(variance)) for m in means])
        for x in range(12):
            ratio = math.log(normals[0][x].pdf(phi[target, x]))
            ratio -= math.log(normals[1][x].pdf(phi[target, x]))
            assert found[target, x] == pytest.approx(ratio)


@given(TIED, st.data())
def test_area_and_curve_are_those_of_all_pairs(scores: np.ndarray, data: st.DataObject) -> None:
    members = np.array(data.draw(st.permutations([True, False] * len(scores)))[: len(scores)])
    members[:2] = True, False
    pairs = [(a > b) + 0.5 * (a == b) for a in scores[members] for b in scores[~members]]
    assert area_under_curve(scores, members) == pytest.approx(mean(pairs))
    false, hits = curve(scores, members)
    for at, threshold in enumerate(sorted(set(scores), reverse=True)):
        assert hits[at] == pytest.approx(np.mean(scores[members] >= threshold))
        assert false[at] == pytest.approx(np.mean(scores[~members] >= threshold))
    area = np.trapezoid(np.concatenate([[0], hits]), np.concatenate([[0], false]))
    assert area == pytest.approx(mean(pairs))


def test_hits_are_counted_at_a_rate_of_false_alarms() -> None:
    members = np.arange(200) < 100
    scores = np.concatenate([np.full(40, 5.0), np.zeros(60), [6.0], np.zeros(99)])
    assert hits_at(scores, members) == 0.4, "one non-member of a hundred may be above"
    scores[101] = 6.0
    assert hits_at(scores, members) == 0.0


def test_the_attack_finds_what_one_threshold_cannot() -> None:
    phi, members = drawn(2.0)
    found = leak(likelihood_ratios(phi, members), members)
    best = NormalDist().cdf(2 / math.sqrt(2))  # of who knows each image's own means
    assert best - 0.06 < found.auc < best + 0.03
    assert found.hits > 0.15
    assert leak(phi, members).auc < 0.65


def test_nothing_is_found_where_nothing_is() -> None:
    phi, members = drawn(0.0)
    found = leak(likelihood_ratios(phi, members), members, least_error=0.02)
    assert abs(found.auc - 0.5) < 3 * found.auc_error
    phi, members = drawn(3.0)
    areas = null_areas(phi, members, np.random.default_rng(1))
    assert abs(areas.mean() - 0.5) < 3 * areas.std(ddof=1) / math.sqrt(len(areas))
    assert areas.std() > 0


def test_shuffling_keeps_the_number_of_members() -> None:
    _, members = drawn(0.0, adapters=4)
    mixed = shuffled(members, np.random.default_rng(2))
    assert mixed.sum(axis=1).tolist() == members.sum(axis=1).tolist()
    assert abs((mixed == members).mean() - 0.5) < 0.05


def test_figures_hold_as_the_controls_say() -> None:
    phi, members = drawn(3.0)
    strong = leak(likelihood_ratios(phi, members), members)
    none = leak(-np.abs(phi), members)
    words = {"usual": "", "overfitted": ""}
    found = {"usual": none, "threshold": none, "shuffled": none, "overfitted": strong}
    coins = np.array([0.49, 0.5, 0.51, 0.505])
    holds = [made.holds for made in membership_figures(found, coins, words)]
    assert holds == [None, None, True, True]
    found["overfitted"] = none
    holds = [made.holds for made in membership_figures(found, coins + 0.1, words)]
    assert holds == [None, None, False, False]


def test_few_adapters_are_refused() -> None:
    phi, members = drawn(0.0, adapters=3)
    with pytest.raises(ValueError, match="expected 4 adapters or more, found 3"):
        likelihood_ratios(phi, members)


def test_a_tiny_overfitted_adapter_leaks_and_the_audit_is_drawn(
    tiny_job: Callable[..., Any], tmp_path: Path
) -> None:
    usual = Trained(name="usual", pool=60, clients=2, rounds=1, local_epochs=1)
    overfitted = Trained(name="overfitted", pool=40, clients=1, rounds=1, local_epochs=25)
    audited = membership_audit(
        SilentProgress(), quick=True, job=tiny_job("lora"),
        usual=usual, overfitted=overfitted, adapters=5, guards=[guarded_clients],
    )  # fmt: skip
    figures = {made.name: made for made in audited.figures}
    assert figures["membership_auc_overfitted"].value > 0.7
    assert figures["membership_auc_shuffled"].holds is True
    assert 0.3 < figures["membership_auc"].value < 0.75
    assert "30 of 60 images of digits each over 2 clients" in figures["membership_auc"].note
    assert "on the sum of 2 clients" in figures["membership_auc_private_clients"].note
    assert 0.3 < figures["membership_auc_private_clients"].value < 0.7
    assert figures["membership_tpr_at_fpr_1e2_private_clients"].holds is True
    audited.draw(tmp_path / "plot.png")
    assert (tmp_path / "plot.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.long
def test_tiny_adapters_of_private_samples_are_attacked_too(tiny_job: Callable[..., Any]) -> None:
    usual = Trained(name="usual", pool=60, clients=2, rounds=2, local_epochs=1)
    overfitted = Trained(name="overfitted", pool=40, clients=1, rounds=1, local_epochs=1)
    audited = membership_audit(
        SilentProgress(), job=tiny_job("lora"), usual=usual, overfitted=overfitted, adapters=4
    )
    figures = {made.name: made for made in audited.figures}
    for name, noise in (("clients", "on the sum of 2 clients"), ("samples", "on each of 6 steps")):
        assert noise in figures[f"membership_auc_private_{name}"].note
        assert 0.3 < figures[f"membership_auc_private_{name}"].value < 0.7
        assert figures[f"membership_tpr_at_fpr_1e2_private_{name}"].holds is True


def test_a_pool_larger_than_the_data_is_refused(tiny_job: Callable[..., Any]) -> None:
    many = Trained(name="usual", pool=500, clients=1, rounds=1, local_epochs=1)
    job = tiny_job("lora")
    with pytest.raises(DataError, match="digits: expected 500 images to train on, found 90"):
        membership_audit(SilentProgress(), job=job, usual=many, adapters=4)
