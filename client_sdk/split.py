# SPDX-License-Identifier: Apache-2.0
"""From a plan to an update where a server holds the body: a session is opened for the plan."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING

from client_sdk.errors import PlanError
from client_sdk.memory import ClientMemory
from client_sdk.noise import NoiseSeed, secret_seed
from client_sdk.split_body import RemoteBody
from client_sdk.updates import respond
from client_sdk.work import longest_plan
from edge_runtime.split_trainer import Body, SplitTrainer
from protocol.errors import ContainerError
from protocol.manifest import Manifest
from protocol.plan import Plan, unpack_plan
from protocol.split import SplitSpec, largest_message
from protocol.stream import Open
from protocol.tensors import Tensors

if TYPE_CHECKING:
    import grpc

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
    noise: NoiseSeed = secret_seed,
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
            noise=noise,
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class SplitAddress:
    """Where a device finds the server that holds the body, and how it says who it is."""

    address: str  # host:port
    credentials: grpc.ChannelCredentials
    server_name: str = ""
    """In the server's certificate, where it is not the host."""


@contextmanager
def connect(
    plan: Plan, where: SplitAddress, spec: SplitSpec, *, most_rows: int
) -> Iterator[list[RemoteBody]]:
    """A `Connect` but for its settings: a plan's sessions over gRPC, opened when first used.

    `most_rows` bounds the samples of a message. Raises: SplitError, as the bodies do.
    """
    from client_sdk.split_stream import SplitStream

    most = largest_message(spec, most_rows)
    with ExitStack() as stack:
        streams = [
            SplitStream(
                where.address,
                opened,
                max_bytes=most,
                credentials=where.credentials,
                server_name=where.server_name,
            )
            for opened in sessions_of(plan, spec)
        ]
        yield [RemoteBody(spec, stack.enter_context(stream), max_bytes=most) for stream in streams]


def sessions_of(plan: Plan, spec: SplitSpec) -> list[Open]:
    """The sessions that a plan is worked on in, one a lane."""
    return [
        Open(job=plan.job, round=plan.round, client=plan.client, nonce=plan.nonce, lane=lane)
        for lane in range(spec.lanes)
    ]
