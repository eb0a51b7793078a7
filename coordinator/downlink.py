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

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Final

import numpy as np

from aggregation.codecs import codec_named, round_seeds
from coordinator.sections import UpdateSection
from protocol.tensors import ParamSpec, Tensors

_WHOLE: Final = "float32"  # bit for bit, so that both sides' copies stay equal


@dataclass(frozen=True, slots=True, kw_only=True)
class Parcel:
    """The downlink half of one client's plan."""

    codec: str
    payload: bytes
    base_round: int | None


@dataclass(frozen=True, slots=True, kw_only=True)
class Broadcast:
    """One round's tensors, as its clients get them and as they will see them."""

    seen: Mapping[str, np.ndarray]
    """What every client starts from, bit for bit."""
    keep: bool
    """Whether clients keep it as the next round's base."""
    whole: Parcel
    change: Parcel | None
    holders: frozenset[str]
    """Clients that hold the base of `change`; before the first round all of them do."""

    def for_client(self, client: str) -> Parcel:
        """What that client's plan carries."""
        if self.change is None:
            return self.whole
        held = self.change.base_round == 0 or client in self.holders
        return self.change if held else self.whole


def broadcast(
    update: UpdateSection,
    spec: ParamSpec,
    tensors: Tensors,
    *,
    job: str,
    round: int,
    copy: Tensors,
    holders: Collection[str],
) -> Broadcast:
    """A round's plans' payloads.

    Args:
        spec: of what is sent.
        tensors: the server's own, these and others.
        copy: what clients that took part in the round before hold; in the first, the bundle's.
        holders: those clients.
    """
    codec = codec_named(update.downlink_codec)
    seeds = round_seeds(job, round)
    if update.downlink == "tensors":
        payload = codec.encode({name: tensors[name] for name in spec.names}, seeds=seeds)
        return Broadcast(
            seen=codec.decode(payload, spec, spec.nbytes, seeds=seeds),
            keep=False,
            whole=Parcel(codec=codec.name, payload=payload, base_round=None),
            change=None,
            holders=frozenset(),
        )
    difference = {name: tensors[name] - copy[name] for name in spec.names}
    payload = codec.encode(difference, seeds=seeds)
    decoded = codec.decode(payload, spec, spec.nbytes, seeds=seeds)
    seen = {name: copy[name] + decoded[name] for name in spec.names}
    return Broadcast(
        seen=seen,
        keep=True,
        whole=Parcel(codec=_WHOLE, payload=codec_named(_WHOLE).encode(seen), base_round=None),
        change=Parcel(codec=codec.name, payload=payload, base_round=round - 1),
        holders=frozenset(holders),
    )
