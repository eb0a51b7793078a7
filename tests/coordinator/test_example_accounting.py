# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import math
from pathlib import Path

import pytest

from coordinator.errors import JobError
from coordinator.example_accounting import (
    example_epsilon,
    example_summary,
    example_words,
    require_example_budget,
    sampled_gaussian_epsilon,
)
from coordinator.job import Job, parse_job

HERE = Path(__file__).parent
PRIVATE = """\
data.held_out = 0.0
training = { batch_size = 8, local_steps = 5 }
update.metrics = ""
rounds = { count = 4, min_samples = 40 }
example_privacy = { noise_multiplier = 1.5, clip = 0.7, delta = 1e-4 }
"""


def job_of(*overrides: str) -> Job:
    return parse_job(PRIVATE, overrides, folder=HERE)


def delta_of_gaussian(z: float, steps: int, epsilon: float) -> float:
    """Balle and Wang 2018 (arXiv 1805.06530), theorem 8, of composed steps without sampling."""
    mu = steps**0.5 / z

    def below(x: float) -> float:
        return math.erfc(-x / 2**0.5) / 2

    return below(mu / 2 - epsilon / mu) - math.exp(epsilon) * below(-mu / 2 - epsilon / mu)


def test_epsilon_without_sampling_is_the_gaussians_own() -> None:
    found = sampled_gaussian_epsilon(rate=1.0, noise_multiplier=5.0, steps=50, delta=1e-5)
    assert delta_of_gaussian(5.0, 50, found) <= 1e-5
    assert delta_of_gaussian(5.0, 50, found - 1e-2) > 1e-5


def test_epsilon_is_below_renyi_accounting_of_the_same_steps() -> None:
    import dp_accounting
    from dp_accounting.rdp import RdpAccountant

    event = dp_accounting.PoissonSampledDpEvent(0.1, dp_accounting.GaussianDpEvent(1.0))
    accountant = RdpAccountant()
    accountant.compose(event, 100)
    renyi = accountant.get_epsilon(1e-5)
    found = sampled_gaussian_epsilon(rate=0.1, noise_multiplier=1.0, steps=100, delta=1e-5)
    assert 0.8 * renyi < found <= renyi
    assert found == pytest.approx(7.0466, abs=1e-3)


def test_larger_clients_and_fewer_rounds_cost_less() -> None:
    job = job_of()
    whole = example_epsilon(job)
    assert example_epsilon(job, 0) == 0
    assert example_epsilon(job, 2) < whole
    assert example_epsilon(job_of("rounds.min_samples=80")) < whole
    assert example_epsilon(job_of("example_privacy.noise_multiplier=3")) < whole
    assert example_epsilon(job_of("rounds.clients_per_round=5")) == whole


def test_budget_refuses_a_job_that_costs_more() -> None:
    cost = example_epsilon(job_of())
    require_example_budget(job_of())
    require_example_budget(job_of(f"example_privacy.max_epsilon={cost + 1e-3}"))
    with pytest.raises(JobError, match=r"example_privacy\.max_epsilon") as caught:
        require_example_budget(job_of(f"example_privacy.max_epsilon={cost - 1e-3}"))
    # What it says would do does.
    least = str(caught.value).partition("at least ")[2].partition(",")[0]
    require_example_budget(job_of(f"example_privacy.max_epsilon={least}"))


def test_summary_has_what_the_figure_rests_on() -> None:
    job = job_of()
    found = example_summary(job, 3)
    assert found["epsilon"] == example_epsilon(job, 3)
    assert {key: found[key] for key in ("delta", "clip", "steps", "fewest_samples")} == {
        "delta": 1e-4, "clip": 0.7, "steps": 15, "fewest_samples": 40
    }  # fmt: skip
    assert (found["sampling"], found["sampling_rate"]) == ("poisson", 0.2)
    assert f"epsilon {found['epsilon']:.3f}" in example_words(job, 3)[0]
    plain = job_of("example_privacy.noise_multiplier=0")
    assert (example_summary(plain, 3), example_words(plain, 3)) == ({}, [])
    require_example_budget(plain)
