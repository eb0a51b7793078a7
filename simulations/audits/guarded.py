# SPDX-License-Identifier: Apache-2.0
"""Adapters trained with differential privacy, and how many members that lets an attacker find.

Two promises to the membership audit, each by the code that keeps it in a job:

clients   `[privacy] mode = "central"`: updates clipped and summed, noise on the sum. A whole client
          is hidden, and with it each of its samples.
samples   `[example_privacy]`: gradients of single samples clipped, noise on every step of every
          client. A sample is hidden, which is what the attack asks about.

An attacker who says "member" to a share α of non-members can say so to no more members than

    B(α) = min over δ of min(e^ε(δ)·α + δ,  1 - e^-ε(δ)·(1 - α - δ))

with ε(δ) the cost of all releases together: both sides of the definition, at every δ and not only
at the job's. That is for a client or a sample that is there or not. An adapter of the audit has an
image or has *another one instead*, which is one gone and one come: the bound is B(B(α)). It holds
for one image with all else known to the attacker, and so for this attacker, who knows less.

*Source* Dwork and Roth 2014, definition 2.4; hits and false alarms: Wasserman and Zhou, JASA 2010
(arXiv 0811.2501); Kairouz, Oh, Viswanath, ICML 2015 (arXiv 1311.0776).
*Differs from source* B is taken over a grid of δ, which can only make it larger.
*Cost* B: an accounting for each δ of the grid, a second or two.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Final

import numpy as np

from aggregation.privacy.accountant import Mechanism, PoissonRound, calibrated, epsilon_of
from coordinator.example_privacy_section import ExamplePrivacySection
from coordinator.job import Job
from coordinator.privacy import Privacy, PrivateRound
from coordinator.privacy_section import PrivacySection
from coordinator.sections import RoundsSection
from protocol.tensors import ParamSpec, Tensors
from simulations.audits.shadows import Combine, Trained

EPSILON: Final = 8.0
DELTA: Final = 1e-5
# Of 0.03, 0.1, 0.3 and 1 the one with which a first adapter was most often right.
CLIENT_CLIP: Final = 0.3
SAMPLE_CLIP: Final = 1.0
_DELTAS: Final = np.logspace(-9, -0.05, 30)


@dataclass(frozen=True, slots=True, kw_only=True)
class Guarded:
    """A way to train privately: the job, and what it releases."""

    name: str  # in names of figures
    words: str
    job: Job
    mechanism: Mechanism
    releases: int

    def allowed_hits(self, rate: float) -> float:
        """The most members that can be told from others at a rate of false alarms: B(B(rate))."""
        costs = [
            (epsilon_of(self.mechanism, self.releases, float(delta)), float(delta))
            for delta in _DELTAS
        ]
        return most_hits(most_hits(rate, costs), costs)


def most_hits(rate: float, costs: Sequence[tuple[float, float]]) -> float:
    """B of the module's text, for pairs of ε and δ that all hold."""
    bounds = [1.0]
    for epsilon, delta in costs:
        bounds.append(math.exp(min(epsilon, 700.0)) * rate + delta)
        bounds.append(1 - math.exp(-epsilon) * (1 - rate - delta))
    return min(bounds)


def guarded_clients(job: Job, trained: Trained) -> Guarded:
    """The job with `[privacy]`, over clients that all take part in every round."""
    private = replace(
        job,
        data=replace(job.data, clients=trained.clients, held_out=0.0),
        update=replace(job.update, metrics=""),
        aggregation=replace(job.aggregation, weighting="uniform"),
        rounds=RoundsSection(count=trained.rounds),
        privacy=PrivacySection(
            mode="central", sampling="all", epsilon=EPSILON, delta=DELTA, clip=CLIENT_CLIP
        ),
    )
    privacy = _privacy(private)
    return Guarded(
        name="clients",
        words=f"noise of {privacy.mechanism.multiplier:g} clipping norms on the sum of "
        f"{trained.clients} clients",
        job=private,
        mechanism=privacy.mechanism,
        releases=trained.rounds,
    )


def guarded_samples(job: Job, trained: Trained) -> Guarded:
    """The job with `[example_privacy]`: as many steps as without, each of half of a client's
    images on average, since larger draws have less noise for the same ε."""
    batch = max(trained.fewest // 2, 1)
    steps = trained.local_epochs * max(trained.fewest // job.training.batch_size, 1)
    releases = trained.rounds * steps
    mechanism = PoissonRound(rate=batch / trained.fewest, multiplier=1.0)
    multiplier = calibrated(mechanism, releases, epsilon=EPSILON, delta=DELTA)
    private = replace(
        job,
        data=replace(job.data, held_out=0.0),
        training=replace(job.training, batch_size=batch, local_steps=steps, local_epochs=1),
        update=replace(job.update, metrics=""),
        rounds=RoundsSection(count=trained.rounds, min_samples=trained.fewest),
        example_privacy=ExamplePrivacySection(
            noise_multiplier=multiplier, clip=SAMPLE_CLIP, delta=DELTA
        ),
    )
    return Guarded(
        name="samples",
        words=f"noise of {multiplier:g} clipping norms on each of {releases} steps of a client",
        job=private,
        mechanism=replace(mechanism, multiplier=multiplier),
        releases=releases,
    )


Guard = Callable[[Job, Trained], Guarded]
"""From a job and how it is trained to the same, trained privately."""

GUARDS: Final[tuple[Guard, ...]] = (guarded_clients, guarded_samples)


def noised(job: Job, shared: ParamSpec) -> Combine:
    """The private mean of a job's updates, in place of the plain one; seeds are those of names."""
    privacy = _privacy(job)

    def combine(
        start: Tensors, results: Sequence[Tensors], samples: Sequence[int], use: str
    ) -> Mapping[str, np.ndarray]:
        seed = hashlib.sha256(f"fedloom/audit/{use}".encode()).digest()
        private = PrivateRound(privacy=privacy, charge=privacy.charge(1, {}, seed))
        merger = private.merger(shared)
        state = merger.init(shared)
        for one in results:
            state = merger.add(state, {name: one[name] - start[name] for name in start}, 1.0)
        delta = merger.finish(state).delta
        return {name: start[name] + delta[name] for name in start}

    return combine


def _privacy(job: Job) -> Privacy:
    found = Privacy.of(job)
    if found is None:
        raise ValueError("job: expected one with [privacy]")
    return found
