# SPDX-License-Identifier: Apache-2.0
"""What a device holds a coordinator to, where the training it asks for is private.

The bundle says how many steps a round has, in how many rounds, and how many samples a client has at
least: that is what epsilon was accounted for. A plan that goes beyond it is refused before the data
are touched, and every round's steps are charged, durably, before the first of them is taken.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

from client_sdk.charges import charge_once
from client_sdk.errors import PlanError

if TYPE_CHECKING:
    from client_sdk.memory import ClientMemory
    from protocol.manifest import Manifest
    from protocol.plan import Plan

CHARGED: Final = "charged"


def charge(plan: Plan, manifest: Manifest, samples: int, memory: ClientMemory | None) -> None:
    """Take the steps of a plan off what the job may still cost this client; nothing where the
    job's training is not private.

    Raises: PlanError for a plan that the job's promise does not cover, or without a memory;
        MemoryFileError.
    """
    privacy = manifest.training.privacy
    if privacy is None:
        return
    if plan.task != "fit":
        raise PlanError(
            "plan: expected training alone, found a test on this client's samples, whose result "
            "the job's privacy does not cover"
        )
    if plan.local_steps != privacy.steps:
        raise PlanError(
            f"plan: expected local_steps = {privacy.steps}, which the job's privacy was accounted "
            f"for, found {plan.local_steps}"
        )
    if samples < privacy.fewest_samples:
        raise PlanError(
            f"plan: its privacy was accounted for clients of at least {privacy.fewest_samples} "
            "samples, this one has fewer"
        )
    steps, most = privacy.steps, privacy.most_steps
    if not charge_once(memory, CHARGED, plan.nonce, cost=steps, most=most):
        raise PlanError(
            f"plan: expected at most {privacy.rounds} rounds of {privacy.steps} private steps, "
            "which this client has taken"
        )
