# SPDX-License-Identifier: Apache-2.0
"""Noise that a client adds itself, and what it holds a coordinator to before it does.

Alone (`local`) a client noises its own update, and nobody sees it without; in a secure sum
(`distributed`) it adds its share of the noise that the sum has. The signed bundle says how much,
for updates of which norm, and in how many rounds: that is what epsilon was accounted for. A plan
that asks for less noise, for another norm or for more rounds is refused before the data are
touched, and every round is charged, durably, before it is trained for.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from dataclasses import dataclass, field
from fractions import Fraction
from typing import TYPE_CHECKING, Final

import numpy as np

from aggregation.codecs import SumCodec
from aggregation.errors import PrivacyError
from aggregation.privacy.discrete_gaussian import discrete_gaussian
from aggregation.privacy.distributed_gaussian import share_variance, sum_sensitivity
from aggregation.privacy.keystream import Keystream, new_seed
from client_sdk.charges import charge_once
from client_sdk.errors import PlanError

if TYPE_CHECKING:
    from client_sdk.memory import ClientMemory
    from protocol.manifest import Manifest
    from protocol.plan import Plan
    from protocol.tensors import ParamSpec

RELEASES: Final = "releases"

NoiseSeed = Callable[["Plan"], bytes]
"""The seed of the noise on what a plan asks for."""


def secret_seed(plan: Plan) -> bytes:
    """One that nobody knows; nothing that the coordinator chose has a part in it."""
    del plan
    return new_seed()


def repeatable_seed(plan: Plan) -> bytes:
    """That of a plan, for simulations and tests: who knows the plan can take its noise off."""
    text = f"fedloom/repeatable noise/v1/{plan.job}/{plan.round}/{plan.client}/{plan.seed}"
    return hashlib.sha256(text.encode()).digest()


def charge_release(plan: Plan, manifest: Manifest, memory: ClientMemory | None) -> None:
    """Take a plan off the releases that the job may still ask of this client; nothing where its
    clients add no noise.

    Raises: PlanError for a plan that the job's promise does not cover, or without a memory;
        MemoryFileError.
    """
    promised = manifest.noise
    if promised is None:
        if plan.noise:
            raise PlanError("plan: expected no noise of clients, of which the bundle has no word")
        return
    if plan.task != "fit":
        raise PlanError(
            "plan: expected training alone, found a test on this client's samples, whose result "
            "the job's privacy does not cover"
        )
    for name, found, expected in (
        ("clip", plan.clip, promised.clip),
        ("noise", plan.noise, promised.multiplier),
        ("tells", plan.tells, ()),
        ("error_feedback", plan.error_feedback, False),
        # Weights would be in a sum without noise.
        ("full_weight_samples", plan.full_weight_samples, 0),
        ("smoothing", plan.smoothing, 0.0),
    ):
        if found != expected:
            raise PlanError(
                f"plan: expected {name} = {expected}, which the job's privacy was accounted for, "
                f"found {found}"
            )
    if plan.min_survivors < promised.fewest or (plan.min_survivors and not promised.fewest):
        how = f"a sum of {promised.fewest} or more" if promised.fewest else "no secure sum"
        raise PlanError(
            f"plan: expected {how}, which the job's privacy was accounted for, found "
            f"min_survivors = {plan.min_survivors}"
        )
    if not charge_once(memory, RELEASES, plan.nonce, cost=1, most=promised.rounds):
        raise PlanError(
            f"plan: expected at most {promised.rounds} noised updates, which this client has given"
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class NoiseShare:
    """A client's share of the noise of a sum."""

    variance: Fraction  # in steps²
    drawn: np.ndarray = field(repr=False)
    """int64 [values], in steps."""

    @classmethod
    def of(cls, plan: Plan, codec: SumCodec, spec: ParamSpec, seed: bytes) -> NoiseShare:
        """Raises: PrivacyError for a plan whose noise does not cover what an update can be."""
        step, values = codec.step(spec), codec.length(spec)
        norm = sum_sensitivity(codec.reach(spec), step, values)
        if norm > plan.clip:
            raise PrivacyError(
                f"plan: expected noise for a norm of {norm:.6g}, which {codec.name} may make of "
                f"an update, found it for {plan.clip:g}"
            )
        variance = share_variance(plan.noise, plan.clip, step)
        drawn = discrete_gaussian(variance, values, Keystream(seed, "share of a sum's noise"))
        return cls(variance=variance, drawn=drawn)
