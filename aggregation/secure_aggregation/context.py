# SPDX-License-Identifier: Apache-2.0
"""What one attempt at a secure sum is about. Clients sign its digest, and every key is bound to it.

A `Task` is what a device knows by itself, from the plan that it was sent; `Terms` are what the job
promises; a `Context` is the server's word on both, with the participants and their graph. A client
compares the three, and through the digest in its peers' signatures with what they were told.
"""

from __future__ import annotations

import hashlib
import secrets
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Final

from aggregation.errors import SecureMessageError, SecureSumError
from aggregation.packing import MAX_BITS
from aggregation.secure_aggregation._bytes import Reader, Writer
from aggregation.secure_aggregation.graph import MAX_CLIENTS, MIN_CLIENTS, shape
from aggregation.secure_aggregation.masks import MAX_VALUES
from protocol.limits import MAX_CLIENT_LENGTH, MAX_ROUND

HASH_BYTES: Final = 32
MIN_NONCE_BYTES: Final = 8
MAX_NONCE_BYTES: Final = 32
_MAX_NAME_BYTES: Final = 4 * MAX_CLIENT_LENGTH
MAX_CONTEXT_BYTES: Final = 256 + MAX_CLIENTS * (2 + _MAX_NAME_BYTES)


@dataclass(frozen=True, slots=True, kw_only=True)
class Terms:
    """What a job asks of its secure sums.

    `corrupt` and `dropouts` are the largest shares of clients that may help the server, and that
    may be lost on the way, for the bounds of `graph.py` to hold; below `min_survivors` vectors no
    sum is opened.
    """

    corrupt: float = 0.1
    dropouts: float = 0.33
    min_survivors: int = MIN_CLIENTS

    def __post_init__(self) -> None:
        for field in ("corrupt", "dropouts"):
            share = getattr(self, field)
            if not isinstance(share, int | float) or not 0 <= share < 1:
                raise SecureSumError(f"{field}: expected a share from 0 to below 1, found {share}")
        _integer("min_survivors", self.min_survivors, 2, MAX_CLIENTS, SecureSumError)


@dataclass(frozen=True, slots=True, kw_only=True)
class Task:
    """What is summed: vectors of `values` integers modulo 2^`bits`."""

    job: bytes  # SHA-256 of the job, 32 bytes
    round: int
    nonce: bytes  # of this attempt at the round, 8 to 32 bytes
    plan: bytes  # SHA-256 of the plan and the model that came with it, 32 bytes
    values: int
    bits: int

    def __post_init__(self) -> None:
        error = SecureMessageError
        _bytes("job", self.job, HASH_BYTES, HASH_BYTES)
        _integer("round", self.round, 0, MAX_ROUND, error)
        _bytes("nonce", self.nonce, MIN_NONCE_BYTES, MAX_NONCE_BYTES)
        _bytes("plan", self.plan, HASH_BYTES, HASH_BYTES)
        _integer("values", self.values, 1, MAX_VALUES, error)
        _integer("bits", self.bits, 1, MAX_BITS, error)


@dataclass(frozen=True, slots=True, kw_only=True)
class Context:
    """The server's announcement of an attempt.

    Anything that has this form can be announced; whether it is acceptable is for each client to
    say. Raises: SecureMessageError for what cannot be written.
    """

    task: Task
    names: tuple[str, ...]  # of the participants, ascending
    degree: int
    threshold: int
    min_survivors: int
    seed: bytes  # of the graph, 32 bytes

    def __post_init__(self) -> None:
        error = SecureMessageError
        if not MIN_CLIENTS <= len(self.names) <= MAX_CLIENTS:
            raise error(
                f"names: expected {MIN_CLIENTS} to {MAX_CLIENTS} clients, found {len(self.names)}"
            )
        for name in self.names:
            if not isinstance(name, str) or not 1 <= len(name) <= MAX_CLIENT_LENGTH:
                raise error(f"names: expected 1 to {MAX_CLIENT_LENGTH} characters each")
            if not name.isprintable():
                raise error("names: expected printable characters")
        if any(a >= b for a, b in zip(self.names, self.names[1:], strict=False)):
            raise error("names: expected them in ascending order, each once")
        _integer("degree", self.degree, 1, len(self.names) - 1, error)
        _integer("threshold", self.threshold, 1, self.degree, error)
        _integer("min_survivors", self.min_survivors, 1, len(self.names), error)
        _bytes("seed", self.seed, HASH_BYTES, HASH_BYTES)

    def to_bytes(self) -> bytes:
        """One encoding for one context."""
        task, out = self.task, Writer()
        out.raw(task.job).u32(task.round).short(task.nonce).raw(task.plan)
        out.u64(task.values).u8(task.bits)
        out.u32(self.degree).u32(self.threshold).u32(self.min_survivors).raw(self.seed)
        out.u32(len(self.names))
        for name in self.names:
            out.short(name.encode())
        return out.done()

    @classmethod
    def from_bytes(cls, blob: bytes | memoryview) -> Context:
        """The inverse of `to_bytes`. Raises: SecureMessageError."""
        reader = Reader(blob)
        task = Task(
            job=reader.raw(HASH_BYTES),
            round=reader.u32(),
            nonce=reader.short(MAX_NONCE_BYTES),
            plan=reader.raw(HASH_BYTES),
            values=reader.u64(),
            bits=reader.u8(),
        )
        degree, threshold, survivors = reader.u32(), reader.u32(), reader.u32()
        seed = reader.raw(HASH_BYTES)
        names = tuple(
            reader.text(_MAX_NAME_BYTES) for _ in range(reader.count(MAX_CLIENTS, each=3))
        )
        reader.end()
        return cls(
            task=task,
            names=names,
            degree=degree,
            threshold=threshold,
            min_survivors=survivors,
            seed=seed,
        )

    def digest(self) -> bytes:
        """SHA-256 of the context: the attempt's name in every message, key and signature."""
        return hashlib.sha256(b"fedloom secure sum\0" + self.to_bytes()).digest()


def new_context(task: Task, names: Iterable[str], terms: Terms) -> Context:
    """What an honest server announces: the graph that the terms ask for, a fresh seed.

    Raises: SecureSumError where the terms cannot be met with so many clients.
    """
    ordered = tuple(sorted(names))
    found = shape(len(ordered), corrupt=terms.corrupt, dropouts=terms.dropouts)
    if terms.min_survivors > len(ordered):
        raise SecureSumError(
            f"min_survivors: {terms.min_survivors} are asked for and only {len(ordered)} clients "
            "take part; ask more clients or fewer survivors"
        )
    return Context(
        task=task,
        names=ordered,
        degree=found.degree,
        threshold=found.threshold,
        min_survivors=terms.min_survivors,
        seed=secrets.token_bytes(HASH_BYTES),
    )


def _integer(field: str, value: object, low: int, high: int, error: type[SecureSumError]) -> None:
    if isinstance(value, bool) or not isinstance(value, int) or not low <= value <= high:
        raise error(f"{field}: expected an integer from {low} to {high}, found {value!r}")


def _bytes(field: str, value: object, low: int, high: int) -> None:
    if not isinstance(value, bytes) or not low <= len(value) <= high:
        span = f"{low}" if low == high else f"{low} to {high}"
        raise SecureMessageError(f"{field}: expected {span} bytes")
