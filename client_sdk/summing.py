# SPDX-License-Identifier: Apache-2.0
"""A client's part in a secure sum: its update stays here, and only masked does it leave.

A plan that asks for a secure sum is trained for as any other. What the codec made of the update is
kept with this client's memory, its answer to the plan is without it, and the messages of
`aggregation.secure_aggregation` follow. A process may end between any two of them: the state of the
one attempt that a job is in is stored before an answer leaves.

A round may be attempted again, with fresh keys, by clients that have opened nothing of it: two sums
of the same update over different clients would differ by what single clients sent. What a server
can still do is to open one attempt with the help of some clients and another of the rest: two sums
over different clients, each of as many as the job and the threshold ask for.

Where clients add noise, a round's share of it is drawn once, and is accounted for in one sum: a
client whose masked vector is out takes part in no other attempt, opened or not.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import Final, Protocol

import numpy as np

from aggregation.codecs import SumCodec, codec_named
from aggregation.codecs.common_grid import sum_bits
from aggregation.errors import SecureSumError
from aggregation.packing import unpack, word_type
from aggregation.privacy.distributed_gaussian import noise_reach
from aggregation.secure_aggregation import (
    ClientState,
    Context,
    Device,
    Refusal,
    Signer,
    Task,
    Terms,
    Verifier,
    advance,
    from_bytes,
    to_bytes,
    wants_values,
)
from aggregation.secure_aggregation.client_states import Advertised, Ended, Revealed, Shared
from aggregation.secure_aggregation.messages import Announcement, Message, decode
from aggregation.summed_weights import digit_count, digits
from client_sdk.durable import make_folder
from client_sdk.errors import PlanError, SumError
from client_sdk.memory import ClientMemory
from client_sdk.noise import NoiseShare
from protocol.errors import ContainerError
from protocol.owned_files import write_whole
from protocol.plan import Plan
from protocol.summing import MAX_SUM_REQUEST_BYTES, SumRequest, pack_sum_request, unpack_sum_request
from protocol.tensors import ParamSpec, Tensors

SUMMAND: Final = "summand"
"""Kind of what a client's memory keeps for it."""

Trust = Callable[[Mapping[str, str]], Verifier]
"""Who signs as whom, by the participants' credentials as the coordinator gave them."""


class SumStore(Protocol):
    """Where the state of a job's latest attempt is kept, secrets included."""

    def load(self, job: str) -> bytes | None:
        """What was saved last; None before."""
        ...

    def save(self, job: str, state: bytes) -> None:
        """Replace it; durable when it returns."""
        ...


class FolderSums:
    """A device's, in a folder for its owner alone."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    def load(self, job: str) -> bytes | None:
        """Raises: SumError for a file that cannot be read."""
        path = self._folder / job
        try:
            return path.read_bytes() if path.exists() else None
        except OSError as error:
            raise SumError(f"{path}: cannot be read ({error.strerror or error})") from error

    def save(self, job: str, state: bytes) -> None:
        """Raises: SumError where it cannot be written; nothing may leave then."""
        path = self._folder / job
        try:
            make_folder(self._folder)
            write_whole(path, state)
        except OSError as error:
            raise SumError(f"{path}: cannot be written ({error.strerror or error})") from error


class HeldSums:
    """A simulated client's, in this process's memory."""

    def __init__(self) -> None:
        self._states: dict[str, bytes] = {}

    def load(self, job: str) -> bytes | None:
        """See `SumStore.load`."""
        return self._states.get(job)

    def save(self, job: str, state: bytes) -> None:
        """See `SumStore.save`."""
        self._states[job] = state


@dataclass(frozen=True, slots=True, kw_only=True)
class Summand:
    """What a client has made for a round's sum."""

    codec: str
    plan: bytes  # its digest, see `protocol.summing.plan_digest`
    terms: Terms
    values: int  # integers of the payload
    payload: bytes
    weight: int = 0
    """As `aggregation.summed_weights` has it; 0: all clients weigh the same."""
    noise: NoiseShare | None = None
    """This client's share of the sum's noise."""

    def sum_codec(self) -> SumCodec:
        """Raises: SumError for a codec whose payloads cannot be summed."""
        codec = codec_named(self.codec)
        if not isinstance(codec, SumCodec):
            raise SumError(f"expected a codec whose payloads can be summed, found {self.codec}")
        return codec

    def integers(self, bits: int) -> np.ndarray:
        """For a sum modulo 2^bits: [values], and behind them the digits of the weight."""
        levels = self.sum_codec().levels
        own = unpack(self.payload, self.values, levels.bit_length())
        if self.noise is not None:
            own = (own + self.noise.drawn) % (1 << bits)
        if self.weight:
            own = np.concatenate([own, digits(self.weight, levels)])
        return own.astype(word_type(bits), copy=False)

    def task(self, job: str, round: int, context: Context) -> Task:
        """What this client knows of the sum by itself, for an attempt that was announced."""
        levels = self.sum_codec().levels
        return Task(
            job=bytes.fromhex(job),
            round=round,
            nonce=context.task.nonce,
            plan=self.plan,
            values=self.values + (digit_count(levels) if self.weight else 0),
            bits=sum_bits(levels, len(context.names), noise=self._reach(len(context.names))),
        )

    def _reach(self, clients: int) -> int:
        return noise_reach(self.noise.variance, clients) if self.noise else 0


def hold(
    memory: ClientMemory,
    plan: Plan,
    delta: Tensors,
    payload: bytes,
    digest: bytes,
    *,
    weight: int = 0,
    seed: bytes = b"",
) -> None:
    """Keep the payload of an update, and its weight, for the sum that a plan announces, and this
    client's share of the noise where it asks for some.

    `seed` is secret, and of this round alone; noise needs one.

    Raises: PlanError for a codec whose payloads cannot be summed; PrivacyError for noise that does
        not cover the update; MemoryFileError.
    """
    codec = codec_named(plan.uplink_codec)
    if not isinstance(codec, SumCodec):
        raise PlanError(
            f"plan: expected a codec whose payloads can be summed, found {plan.uplink_codec}"
        )
    spec = ParamSpec.of(delta)
    noise = NoiseShare.of(plan, codec, spec, seed) if plan.noise else None
    about = {
        "codec": codec.name,
        "plan": digest.hex(),
        "corrupt": plan.corrupt,
        "dropouts": plan.dropouts,
        "min_survivors": plan.min_survivors,
        "values": codec.length(spec),
        "weight": weight,
        "variance": str(noise.variance) if noise else "",
    }
    kept = {
        "about": np.frombuffer(json.dumps(about).encode(), np.uint8),
        "payload": np.frombuffer(payload, np.uint8),
    }
    if noise is not None:
        kept["noise"] = noise.drawn
    memory.save(SUMMAND, plan.round, kept)


def held(memory: ClientMemory, round: int) -> Summand:
    """What was kept for a round's sum. Raises: SumError where there is none."""
    found = memory.of_round(SUMMAND, round)
    if not found:
        raise SumError(f"nothing was trained here for a sum of round {round}")
    about = json.loads(found["about"].tobytes())
    noise = None
    if variance := about["variance"]:
        noise = NoiseShare(variance=Fraction(variance), drawn=found["noise"])
    return Summand(
        codec=about["codec"],
        plan=bytes.fromhex(about["plan"]),
        terms=Terms(
            corrupt=about["corrupt"],
            dropouts=about["dropouts"],
            min_survivors=about["min_survivors"],
        ),
        values=about["values"],
        payload=found["payload"].tobytes(),
        weight=about["weight"],
        noise=noise,
    )


def answer_sum(
    blob: bytes,
    *,
    client: str,
    memory: Callable[[str], ClientMemory],
    store: SumStore,
    sign: Signer,
    trust: Trust,
) -> bytes:
    """The answer to one message of a secure sum; the state is stored before it is given.

    `memory` is of a job, by its hash.

    Raises: PlanError for what cannot be read or is for another client; SumError for what this
    client refuses, or cannot keep: nothing leaves then.
    """
    try:
        request = unpack_sum_request(blob)
        message = decode(request.message, max_bytes=MAX_SUM_REQUEST_BYTES)
    except (ContainerError, SecureSumError) as error:
        raise PlanError(f"message of a sum: {error}") from error
    if request.client != client:
        raise PlanError(f"message of a sum: expected one for {client}, found {request.client}")
    summand = held(memory(request.job), request.round)
    state, credentials = _latest(store, request, message, noisy=summand.noise is not None)
    context = _context(state, message)
    device = Device(
        name=client,
        task=summand.task(request.job, request.round, context) if context else _NO_TASK,
        terms=summand.terms,
        sign=sign,
        verify=trust(credentials),
    )
    values = None
    if context is not None and wants_values(state, request.message):
        values = summand.integers(context.task.bits)
    after, reply = advance(state, request.message, device, values)
    if after is not None and after is not state:
        kept = SumRequest(
            job=request.job,
            round=request.round,
            client=client,
            credentials=credentials,
            message=to_bytes(after),
        )
        store.save(request.job, pack_sum_request(kept))
    if isinstance(reply, Refusal):
        raise SumError(f"{reply.reason}: {reply.detail}")
    return reply


_NO_TASK: Final = Task(job=bytes(32), round=0, nonce=bytes(8), plan=bytes(32), values=1, bits=1)
"""Of a client that has left the attempt, or has given its answer: it is not looked at."""


def _latest(
    store: SumStore, request: SumRequest, message: Message, *, noisy: bool
) -> tuple[ClientState | None, Mapping[str, str]]:
    """The state of the attempt that a message is of, and the credentials that it began with.

    None for an attempt that is new. Raises: SumError for one that may not begin any more.
    """
    kept = store.load(request.job)
    if kept is not None:
        record = unpack_sum_request(kept)
        state = from_bytes(record.message)
        if _attempt(state) == message.attempt and record.round == request.round:
            return state, record.credentials
        if record.round > request.round:
            raise SumError(f"round {request.round} is over here, round {record.round} has begun")
        if record.round == request.round and isinstance(state, Revealed):
            raise SumError(
                f"a sum of round {request.round} was opened already; another one of the same "
                "update could show what single clients sent"
            )
        if record.round == request.round and noisy and not isinstance(state, Advertised | Shared):
            raise SumError(
                f"an update with the noise of round {request.round} has left already, and that "
                "noise is accounted for once"
            )
    if not isinstance(message, Announcement):
        raise SumError("a message of an attempt that was not announced, or is over")
    return None, request.credentials


def _attempt(state: ClientState) -> bytes:
    return state.attempt if isinstance(state, Revealed | Ended) else state.context.digest()


def _context(state: ClientState | None, message: Message) -> Context | None:
    if isinstance(message, Announcement) and state is None:
        return message.context
    return None if state is None or isinstance(state, Revealed | Ended) else state.context
