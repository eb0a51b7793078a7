# SPDX-License-Identifier: Apache-2.0
"""What training costs a single sample of a client: epsilon at the job's delta.

Every step draws each of a client's n samples with probability q = batch / n and adds Gaussian
noise of z clipping norms to the sum of what they give, each at most one: the subsampled Gaussian
mechanism with Poisson sampling (Abadi et al. 2016, CCS, arXiv 1607.00133). T = rounds * local_steps
of them compose. Every client takes the same steps and a larger one draws a sample less often, so
that the smallest client that may take part costs most: q = batch_size / rounds.min_samples, and the
figure holds for all. It does not count on clients being drawn for rounds: who takes part in every
one pays so much.

Neighbours are data sets in which one sample counts or gives nothing; how many samples a client
holds is taken as known, since it travels with every update and decides q. dp_accounting has the
same epsilon where it is not (ADD_OR_REMOVE_ONE and REPLACE_SPECIAL agree for this mechanism).

*Source* dp_accounting (Google): privacy loss distributions, discretised pessimistically (Doroshenko
et al., PoPETs 2022, arXiv 2207.04380), so that the figure is an upper bound.
*Cost* a second or two; a job whose samples are not private costs nothing.
"""

from __future__ import annotations

import math
from functools import lru_cache
from typing import Any

from coordinator.errors import Fault, JobError
from coordinator.job import Job


def example_epsilon(job: Job, rounds: int | None = None) -> float:
    """Of so many rounds, None for all of the job, with private samples."""
    section = job.example_privacy
    played = job.rounds.count if rounds is None else rounds
    return sampled_gaussian_epsilon(
        rate=job.training.batch_size / job.rounds.min_samples,
        noise_multiplier=section.noise_multiplier,
        steps=played * job.training.local_steps,
        delta=section.delta,
    )


@lru_cache(maxsize=64)
def sampled_gaussian_epsilon(
    *, rate: float, noise_multiplier: float, steps: int, delta: float
) -> float:
    """Of so many steps that draw each sample with probability `rate`, by loss distributions."""
    if not steps:
        return 0.0
    import dp_accounting
    from dp_accounting.pld import PLDAccountant

    gaussian = dp_accounting.GaussianDpEvent(noise_multiplier)
    event = gaussian if rate == 1 else dp_accounting.PoissonSampledDpEvent(rate, gaussian)
    accountant = PLDAccountant(dp_accounting.NeighboringRelation.ADD_OR_REMOVE_ONE)
    accountant.compose(event, steps)
    return float(accountant.get_epsilon(delta))


def require_example_budget(job: Job) -> None:
    """Nothing, where all rounds of the job cost a sample no more than it allows.

    Raises: JobError.
    """
    section = job.example_privacy
    if not section.is_private or not section.max_epsilon:
        return
    epsilon = example_epsilon(job)
    # Not "above": a figure that is no number is no promise either.
    if not epsilon <= section.max_epsilon:
        least = math.ceil(epsilon * 1000) / 1000
        allowed = (
            f"expected at least {least:.3f}, what {job.rounds.count} rounds of "
            f"{job.training.local_steps} steps cost at delta = {section.delta:g}; or more noise, "
            "fewer steps, a smaller batch_size, a larger rounds.min_samples"
        )
        key, value = "example_privacy.max_epsilon", section.max_epsilon
        raise JobError([Fault(key=key, value=value, allowed=allowed)])


def example_summary(job: Job, rounds: int) -> dict[str, Any]:
    """What a job with private samples promises after so many rounds; {} for others."""
    section = job.example_privacy
    if not section.is_private:
        return {}
    return {
        "epsilon": example_epsilon(job, rounds),
        "delta": section.delta,
        "noise_multiplier": section.noise_multiplier,
        "clip": section.clip,
        "sampling": "poisson",
        "sampling_rate": job.training.batch_size / job.rounds.min_samples,
        "steps": rounds * job.training.local_steps,
        "fewest_samples": job.rounds.min_samples,
        "neighbours": "one sample of one client present or absent, its count of samples known",
    }


def example_words(job: Job, rounds: int) -> list[str]:
    """The same in a sentence; none for other jobs."""
    found = example_summary(job, rounds)
    if not found:
        return []
    return [
        f"privacy of samples: epsilon {found['epsilon']:.3f} at delta {found['delta']:g} after "
        f"{found['steps']} steps of the smallest client that may take part"
    ]
