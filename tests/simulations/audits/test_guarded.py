# SPDX-License-Identifier: Apache-2.0
"""Adapters that are trained privately: what the promise allows, and that the noise is on them."""

from __future__ import annotations

import math
from collections.abc import Callable
from statistics import NormalDist
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from aggregation.privacy.accountant import PoissonRound, epsilon_of
from aggregation.privacy.clipping import l2_norm
from coordinator.example_accounting import example_epsilon
from protocol.tensors import ParamSpec
from simulations.audits.guarded import (
    CLIENT_CLIP,
    DELTA,
    EPSILON,
    Guarded,
    guarded_clients,
    guarded_samples,
    most_hits,
    noised,
)
from simulations.audits.shadows import Trained, averaged

TRAINED = Trained(name="usual", pool=400, clients=10, rounds=3, local_epochs=2)
SHARED = ParamSpec.of({"w": np.zeros(4000, np.float32)})


@given(st.floats(0, 1), st.floats(0, 5), st.floats(1e-9, 0.5))
def test_hits_are_bounded_by_both_sides_of_the_definition(
    rate: float, epsilon: float, delta: float
) -> None:
    bound = most_hits(rate, [(epsilon, delta)])
    assert bound <= min(1.0, math.exp(epsilon) * rate + delta)
    # Whoever is not taken for a member: the definition with the two worlds exchanged.
    assert 1 - rate <= math.exp(epsilon) * (1 - bound) + delta + 1e-9
    assert bound >= min(rate, 1.0) - 1e-12, "guessing at random is always allowed"


def test_a_bound_at_one_delta_is_the_literal_one() -> None:
    assert most_hits(0.01, [(2.0, 1e-5)]) == pytest.approx(math.exp(2) * 0.01 + 1e-5)
    assert most_hits(0.01, [(8.0, 1e-5)]) == pytest.approx(1 - math.exp(-8) * (0.99 - 1e-5))


@pytest.mark.parametrize("multiplier", [1.0, 3.0])
def test_of_gaussians_no_more_is_allowed_than_their_own_curve_by_little(
    tiny_job: Callable[..., Any], multiplier: float
) -> None:
    guard = Guarded(
        name="clients",
        words="",
        job=tiny_job("lora"),
        mechanism=PoissonRound(rate=1.0, multiplier=multiplier),
        releases=4,
    )
    # One client for another moves the sum by two norms: a Gaussian of twice the distance.
    exact = NormalDist().cdf(NormalDist().inv_cdf(0.01) + 2 * math.sqrt(4) / multiplier)
    assert exact <= guard.allowed_hits(0.01) <= exact * 1.15


def test_the_promise_is_that_of_the_job(tiny_job: Callable[..., Any]) -> None:
    clients = guarded_clients(tiny_job("lora"), TRAINED)
    assert clients.job.privacy.epsilon == EPSILON
    assert 0.99 * EPSILON < epsilon_of(clients.mechanism, clients.releases, DELTA) <= EPSILON
    assert clients.releases == clients.job.rounds.count == 3
    samples = guarded_samples(tiny_job("lora"), TRAINED)
    assert samples.job.rounds.min_samples == 20 and samples.job.training.batch_size == 10
    assert samples.releases == 3 * samples.job.training.local_steps == 3 * 2 * (20 // 4)
    assert 0.98 * EPSILON < example_epsilon(samples.job) <= EPSILON * 1.001
    assert not samples.job.privacy.is_private and not clients.job.example_privacy.is_private


def test_a_round_is_the_mean_of_clipped_updates_and_noise(tiny_job: Callable[..., Any]) -> None:
    guard = guarded_clients(tiny_job("lora"), TRAINED)
    combine = noised(guard.job, SHARED)
    start = {"w": np.zeros(4000, np.float32)}
    updates = [{"w": np.full(4000, size, np.float32)} for size in (5.0, 1e-6, 3.0)]
    counts = [20] * 3
    after = combine(start, updates, counts, "0/0")
    again, other = combine(start, updates, counts, "0/0"), combine(start, updates, counts, "0/1")
    assert after["w"].tobytes() == again["w"].tobytes() != other["w"].tobytes()
    deviation = guard.mechanism.multiplier * CLIENT_CLIP / TRAINED.clients
    assert float(after["w"].std()) == pytest.approx(deviation, rel=0.1)
    # Two updates were cut to the norm, which the mean of ten counts them by.
    mean = (2 * CLIENT_CLIP / math.sqrt(4000) + 1e-6) / TRAINED.clients
    assert float(after["w"].mean()) == pytest.approx(mean, abs=4 * deviation / math.sqrt(4000))
    assert l2_norm(averaged(start, updates, counts, "")) > 100, "which nothing has cut"
    assert not start["w"].any()
