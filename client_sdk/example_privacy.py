# SPDX-License-Identifier: Apache-2.0
"""What a device holds a coordinator to, where the training it asks for is private.

The bundle says how many steps a round has, in how many rounds, and how many samples a client has at
least: that is what epsilon was accounted for. A plan that goes beyond it is refused before the data
are touched, and every round's steps are charged, durably, before the first of them is taken.

A plan is known by its nonce. One that comes again after a crash is charged once: an outbox answers
it with what was answered before, and if nothing was, nothing has left the device.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

import numpy as np

from client_sdk.errors import PlanError
from client_sdk.work import needed

if TYPE_CHECKING:
    from client_sdk.memory import ClientMemory
    from protocol.manifest import Manifest
    from protocol.plan import Plan

CHARGED: Final = "charged"
# One record a job, whatever rounds a coordinator says there are.
_RECORD: Final = 0


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
    kept = needed(memory)
    record = kept.of_round(CHARGED, _RECORD)
    nonce = np.frombuffer(bytes.fromhex(plan.nonce), np.uint8)
    if record and np.array_equal(record["nonce"], nonce):
        return
    total = privacy.steps + (int(record["steps"]) if record else 0)
    if total > privacy.most_steps:
        raise PlanError(
            f"plan: expected at most {privacy.rounds} rounds of {privacy.steps} private steps, "
            "which this client has taken"
        )
    kept.save(CHARGED, _RECORD, {"steps": np.array(total, np.int64), "nonce": nonce})
