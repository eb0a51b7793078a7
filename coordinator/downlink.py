# SPDX-License-Identifier: Apache-2.0
"""What a round's plans carry: the tensors themselves, or how they have changed.

Changes compress far better than tensors. The server keeps a copy of what the clients hold, sends
each round the encoded difference between its own tensors and that copy, and moves the copy by what
the encoding says: what a lossy codec leaves behind stays in the difference, and is sent later. The
first round's changes are those since the bundle, which every client has.

*Source* the server's half of Tang et al., "DoubleSqueeze", ICML 2019 (arXiv 1905.05957). A client
that does not hold the copy of the round before gets the new one whole.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache, partial
from typing import Final

import numpy as np

from aggregation.codecs import codec_named, round_seeds
from coordinator.clients import client_rank
from coordinator.offsets import AT_REST, OffsetParcel, Offsets
from coordinator.sections import UpdateSection
from protocol.factors import FactorPair, cut
from protocol.tensors import ParamSpec, Tensors

_WHOLE: Final = "float32"  # bit for bit, so that both sides' copies stay equal


@dataclass(frozen=True, slots=True, kw_only=True)
class Parcel:
    """The downlink half of one client's plan."""

    codec: str
    payload: bytes
    base_round: int | None
    rank: int = 0
    offset_round: int = 0
    offset_ranks: tuple[int, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class Broadcast:
    """One round's tensors, as its clients get them and as they will see them."""

    seen: Mapping[str, np.ndarray]
    """What every client starts from, bit for bit."""
    keep: bool
    """Whether clients keep it as the next round's base."""
    whole: Mapping[int, Parcel]
    """By the rank of a client's factors."""
    change: Parcel | None
    holders: frozenset[str]
    """Clients that hold what changes build on; before the first round all of them do."""
    rank_of: Callable[[str], int]
    offset_for: Callable[[bool], OffsetParcel]
    """For a client that holds what changes build on, or does not."""

    def for_client(self, client: str) -> Parcel:
        """What that client's plan carries."""
        holds = client in self.holders
        parcel = self.whole[self.rank_of(client)]
        if self.change is not None and (holds or self.change.base_round == 0):
            parcel = self.change
        offset = self.offset_for(holds)
        return replace(
            parcel,
            payload=parcel.payload + offset.payload if offset.payload else parcel.payload,
            offset_round=offset.base_round,
            offset_ranks=offset.ranks,
        )


def broadcast(
    update: UpdateSection,
    spec: ParamSpec,
    tensors: Tensors,
    *,
    job: str,
    round: int,
    copy: Tensors,
    holders: Collection[str],
    offsets: Offsets = AT_REST,
    held_round: int = 0,
    pairs: tuple[FactorPair, ...] = (),
    ranks: Sequence[int] = (),
) -> Broadcast:
    """A round's plans' payloads.

    Args:
        spec: of what is sent.
        tensors: the server's own, these and others.
        copy: what clients that took part in the round before hold; in the first, the bundle's.
        holders: those clients.
        offsets: of frozen weights, and `held_round` in which `holders` kept theirs.
        ranks: that clients' factors may have; () for the spec's own. Not with changes.
    """
    codec = codec_named(update.downlink_codec)
    seeds = round_seeds(job, round)
    offset_for = cache(partial(offsets.parcel, pairs, held_round))
    if update.downlink == "tensors":
        sent = {name: tensors[name] for name in spec.names}
        payloads = {rank: codec.encode(cut(sent, rank, pairs), seeds=seeds) for rank in (0, *ranks)}
        return Broadcast(
            # Codecs of whole tensors code value by value: a part is seen as in the whole.
            seen=codec.decode(payloads[0], spec, spec.nbytes, seeds=seeds),
            keep=False,
            whole={
                rank: Parcel(codec=codec.name, payload=payload, base_round=None, rank=rank)
                for rank, payload in payloads.items()
            },
            change=None,
            holders=frozenset(holders),
            rank_of=partial(client_rank, ranks),
            offset_for=offset_for,
        )
    difference = {name: tensors[name] - copy[name] for name in spec.names}
    payload = codec.encode(difference, seeds=seeds)
    decoded = codec.decode(payload, spec, spec.nbytes, seeds=seeds)
    seen = {name: copy[name] + decoded[name] for name in spec.names}
    return Broadcast(
        seen=seen,
        keep=True,
        whole={0: Parcel(codec=_WHOLE, payload=codec_named(_WHOLE).encode(seen), base_round=None)},
        change=Parcel(codec=codec.name, payload=payload, base_round=round - 1),
        holders=frozenset(holders),
        rank_of=partial(client_rank, ()),
        offset_for=offset_for,
    )
