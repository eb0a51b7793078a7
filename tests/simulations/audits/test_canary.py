# SPDX-License-Identifier: Apache-2.0
"""The canary's bounds beside slow ones, and mechanisms that are and are not what they claim."""

from __future__ import annotations

import math
from pathlib import Path
from statistics import NormalDist

import numpy as np
import pytest
from scipy.optimize import brentq
from scipy.stats import binomtest

from simulations.audits.canary import (
    DELTA,
    Mechanism,
    Scores,
    canary_figures,
    canary_scores,
    draw,
    epsilon_lower_bound,
    mu_lower_bound,
    rates,
    shipped_gaussian,
)

NORMAL = NormalDist()


def gaussian_epsilon(mu: float) -> float:
    """ε at δ of two Gaussians μ deviations apart (Balle, Wang 2018, theorem 8)."""
    return brentq(
        lambda e: NORMAL.cdf(mu / 2 - e / mu) - math.exp(e) * NORMAL.cdf(-mu / 2 - e / mu) - DELTA,
        1e-9,
        200,
    )


CLAIMED = gaussian_epsilon(1.0)


def gaussian(
    multiplier: float, *, clip: float = 1.0, claimed_clip: float = 1.0, copies: bool = False
) -> Mechanism:
    """Clips to `clip`, and noises as `claimed_clip` asks for; `copies`: one draw for all values."""
    rng = np.random.default_rng(3)

    def added(update: np.ndarray) -> np.ndarray:
        norm = float(np.linalg.norm(update))
        return update * (min(1.0, clip / norm) if norm else 1.0)

    def release(sums: np.ndarray, seed: bytes) -> np.ndarray:
        drawn = rng.standard_normal(1 if copies else len(sums))
        return sums + multiplier * claimed_clip * drawn

    return Mechanism(added=added, release=release)


def drawn(mu: float, trials: int, seed: int = 0) -> Scores:
    rng = np.random.default_rng(seed)
    return Scores(present=mu + rng.standard_normal(trials), absent=rng.standard_normal(trials))


def scores_of(mechanism: Mechanism, trials: int = 200_000) -> Scores:
    return canary_scores(mechanism, trials=trials, seed=lambda: b"")


@pytest.fixture(scope="module")
def right() -> Scores:
    return scores_of(gaussian(1.0))


def test_right_noise_stays_below_its_claim_and_close_to_it(right: Scores) -> None:
    assert 2.0 < epsilon_lower_bound(right).value <= CLAIMED
    mu = mu_lower_bound(right).value
    assert 0.95 < mu <= 1.0, "what is known to be Gaussian is found to a few hundredths"


@pytest.mark.parametrize(
    ("wrong", "trials"),
    [
        (gaussian(0.5), 200_000),
        (gaussian(1.0, clip=2.0), 200_000),
        (gaussian(0.0), 20_000),
        (gaussian(1.0, clip=math.inf), 20_000),
    ],
    ids=["half the noise", "clipped to twice the norm", "no noise", "not clipped"],
)
def test_a_mechanism_that_is_not_as_it_claims_is_found(wrong: Mechanism, trials: int) -> None:
    scores = scores_of(wrong, trials)
    assert epsilon_lower_bound(scores).value > CLAIMED
    assert gaussian_epsilon(mu_lower_bound(scores).value) > CLAIMED


def test_missing_noise_of_a_tenth_is_found_by_the_gaussian_bound_alone() -> None:
    scores = drawn(1 / 0.9, 100_000)
    assert gaussian_epsilon(mu_lower_bound(scores).value) > CLAIMED
    assert epsilon_lower_bound(scores).value < CLAIMED


def test_one_draw_for_all_values_hides_nothing() -> None:
    scores = scores_of(gaussian(1.0, copies=True), 20_000)
    assert epsilon_lower_bound(scores).value > CLAIMED


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("above", [True, False])
def test_the_bound_is_that_of_the_slow_oracle(seed: int, above: bool) -> None:
    near = drawn(0.0, 4_000, seed)
    # Half of the present lie far above, so that the guess "present" tells much and "absent" little.
    scores = Scores(
        present=near.present + np.where(np.arange(4_000) % 2, 0.0, 3.0), absent=near.absent
    )
    if not above:
        scores = Scores(present=-scores.absent, absent=-scores.present)
    guess = epsilon_lower_bound(scores)
    assert guess.above is above
    present, absent = (part[2_000:].tolist() for part in (scores.present, scores.absent))
    if above:
        hits = sum(score > guess.threshold for score in present)
        false = sum(score > guess.threshold for score in absent)
    else:
        hits = sum(score < guess.threshold for score in absent)
        false = sum(score < guess.threshold for score in present)
    assert (guess.hits, guess.false, guess.trials) == (hits, false, 2_000)
    low = binomtest(hits, 2_000).proportion_ci(0.95).low
    high = binomtest(false, 2_000).proportion_ci(0.95).high
    assert guess.value == pytest.approx(max(math.log((low - DELTA) / high), 0.0), rel=1e-6)


def test_the_threshold_is_chosen_on_the_first_half_alone() -> None:
    scores, other = drawn(1.0, 4_000), drawn(3.0, 4_000, seed=1)
    mixed = Scores(
        present=np.concatenate([scores.present[:2_000], other.present[2_000:]]),
        absent=np.concatenate([scores.absent[:2_000], other.absent[2_000:]]),
    )
    assert epsilon_lower_bound(mixed).threshold == epsilon_lower_bound(scores).threshold
    assert epsilon_lower_bound(mixed).hits != epsilon_lower_bound(scores).hits


def test_bounds_of_right_noise_are_above_the_truth_as_seldom_as_they_say() -> None:
    found = [mu_lower_bound(drawn(1.0, 1_000, seed)).value for seed in range(300)]
    assert sum(mu > 1.0 for mu in found) <= 0.05 * 300


def test_scores_of_nobody_show_nothing() -> None:
    assert epsilon_lower_bound(drawn(0.0, 20_000)).value < 0.2
    assert mu_lower_bound(drawn(0.0, 20_000)).value < 0.02


def test_half_of_a_few_trials_shows_no_more_than_it_can() -> None:
    apart = Scores(present=np.full(100, 5.0), absent=np.zeros(100))
    value = epsilon_lower_bound(apart).value
    assert value == pytest.approx(math.log((0.025 ** (1 / 50) - DELTA) / (1 - 0.025 ** (1 / 50))))


def test_rates_rise_from_few_to_all(right: Scores) -> None:
    false, hits = rates(right)
    assert (np.diff(false) >= 0).all() and (np.diff(hits) >= 0).all()
    assert hits[-1] == pytest.approx(1.0, abs=1e-4) and false[0] <= 1e-5
    middle = np.searchsorted(false, 0.1)
    assert hits[middle] == pytest.approx(NORMAL.cdf(NORMAL.inv_cdf(0.1) + 1), abs=0.01)


@pytest.mark.parametrize(("multiplier", "holds"), [(1.0, True), (0.5, False), (2.0, False)])
def test_the_figure_holds_for_the_right_noise_alone(
    multiplier: float, holds: bool, right: Scores
) -> None:
    """Too little noise is above the claim; too much hides that half of it would be too little."""
    scores = [right if z == 1.0 else drawn(1 / z, 100_000) for z in (multiplier, multiplier / 2)]
    audit, alarm, gauss = canary_figures(*scores, claimed=CLAIMED, epsilon_of_mu=gaussian_epsilon)
    assert audit.holds is holds
    assert (alarm.holds, gauss.holds) == (multiplier < 2, multiplier >= 1)
    assert ("NO ALARM" in audit.note) == (multiplier == 2)


@pytest.mark.parametrize("trials", [0, 2, 5])
def test_a_number_of_trials_that_cannot_be_halved_is_refused(trials: int) -> None:
    with pytest.raises(ValueError, match="trials: expected an even number of 4 or more"):
        canary_scores(gaussian(1.0), trials=trials)


def test_the_canary_is_clipped_and_every_release_has_a_seed_of_its_own() -> None:
    seen: list[bytes] = []
    sums: list[np.ndarray] = []

    def release(total: np.ndarray, seed: bytes) -> np.ndarray:
        seen.append(seed)
        sums.append(total)
        return total

    scores = canary_scores(Mechanism(added=gaussian(0.0).added, release=release), trials=20)
    assert len(set(seen)) == 20 and {len(seed) for seed in seen} == {32}
    np.testing.assert_allclose(scores.present, 1.0, rtol=1e-6)
    np.testing.assert_array_equal(scores.absent, 0.0)


def test_it_is_drawn(right: Scores, tmp_path: Path) -> None:
    few = Scores(present=right.present[:2_000], absent=right.absent[:2_000])
    draw({"right noise": few}, CLAIMED, tmp_path / "canary.png")
    assert (tmp_path / "canary.png").read_bytes().startswith(b"\x89PNG")


def test_the_shipped_release_is_audited() -> None:
    pytest.importorskip("aggregation.privacy.gaussian")
    right, half = (
        mu_lower_bound(canary_scores(shipped_gaussian(1.0, z), trials=4_000)) for z in (1.0, 0.5)
    )
    assert 0.7 < right.value < 1.1
    assert 1.5 < half.value < 2.1
