# SPDX-License-Identifier: Apache-2.0
"""From a plan to an update where a server holds the body: a session is opened for the plan."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager

from client_sdk.errors import PlanError
from client_sdk.memory import ClientMemory
from client_sdk.updates import respond
from client_sdk.work import longest_plan
from edge_runtime.split_trainer import Body, SplitTrainer
from protocol.errors import ContainerError
from protocol.manifest import Manifest
from protocol.plan import Plan, unpack_plan
from protocol.split import SplitSpec
from protocol.stream import Open
from protocol.tensors import Tensors

Connect = Callable[[Plan], AbstractContextManager[Sequence[Body]]]
"""Opens a plan's sessions with the body, one a lane, and closes them."""


def respond_split(
    plan_blob: bytes,
    *,
    bundle_manifest: Manifest,
    initial: Tensors,
    trainer: SplitTrainer,
    connect: Connect,
    data_fit: Tensors,
    data_held_out: Tensors,
    client: str,
    memory: ClientMemory | None = None,
) -> bytes:
    """As `client_sdk.updates.respond`, with the trainer's body behind sessions of this plan.

    Raises: as `respond`; SplitError where the server refuses or cannot be reached.
    """
    # `respond` checks the plan itself; here it only says which session is meant.
    try:
        plan, _ = unpack_plan(plan_blob, max_bytes=longest_plan(bundle_manifest))
    except ContainerError as error:
        raise PlanError(f"plan: {error}") from None
    with connect(plan) as lanes:
        return respond(
            plan_blob,
            bundle_manifest=bundle_manifest,
            initial=initial,
            trainer=trainer.through(*lanes),
            data_fit=data_fit,
            data_held_out=data_held_out,
            client=client,
            memory=memory,
        )


def sessions_of(plan: Plan, spec: SplitSpec) -> list[Open]:
    """The sessions that a plan is worked on in, one a lane."""
    return [
        Open(job=plan.job, round=plan.round, client=plan.client, nonce=plan.nonce, lane=lane)
        for lane in range(spec.lanes)
    ]
