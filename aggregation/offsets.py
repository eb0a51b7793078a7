# SPDX-License-Identifier: Apache-2.0
"""How far frozen weights have moved from what a bundle holds, and how a plan says it.

Some mergers change frozen weights (`BaseChange`). Changes add up, in the order of the rounds, on
the server and on every client; both add with the functions here, so that they hold the same.
Everything goes by the `down` factor of the pair that stands beside the weight. A plan holds one
number a pair, as `Plan.offset_ranks` says, and the matrices behind its tensors in float32.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Final

import numpy as np

from aggregation.codecs import codec_named
from aggregation.errors import CodecError
from aggregation.mergers import BaseChange
from protocol.container import Blob
from protocol.factors import FactorPair
from protocol.plan import DENSE
from protocol.tensors import ParamSpec, Tensors, TensorSpec

_CODEC: Final = codec_named("float32")
_LEFT, _RIGHT = "/left", "/right"


def moved(offsets: Tensors, changes: Mapping[str, BaseChange]) -> dict[str, np.ndarray]:
    """Offsets float32 [d, k] with changes added; a weight that has not moved has none."""
    after = dict(offsets)
    for name, change in changes.items():
        product = change.product()
        after[name] = after[name] + product if name in after else product
    return after


def whole(offsets: Tensors) -> dict[str, BaseChange]:
    """Offsets as one change from the bundle's weights."""
    return {name: BaseChange(left=offset, right=None) for name, offset in offsets.items()}


def pack_changes(
    changes: Mapping[str, BaseChange], pairs: Sequence[FactorPair]
) -> tuple[tuple[int, ...], bytes]:
    """`offset_ranks` and the matrices that follow; `()` and nothing for no change."""
    if not changes:
        return (), b""
    return tuple(_rank(changes.get(pair.down)) for pair in pairs), _CODEC.encode(arrays_of(changes))


def unpack_changes(
    payload: Blob, ranks: Sequence[int], pairs: Sequence[FactorPair], spec: ParamSpec
) -> dict[str, BaseChange]:
    """The inverse, for pairs among the tensors of `spec`. Raises: CodecError."""
    expected = changes_spec(ranks, pairs, spec)
    return changes_of(_CODEC.decode(payload, expected, expected.nbytes))


def changes_bytes(ranks: Sequence[int], pairs: Sequence[FactorPair], spec: ParamSpec) -> int:
    """The length of such a payload. Raises: CodecError for ranks that do not fit the pairs."""
    return _CODEC.payload_bytes(changes_spec(ranks, pairs, spec))


def most_bytes(pairs: Sequence[FactorPair], spec: ParamSpec) -> int:
    """The length of the longest one."""
    return changes_bytes([DENSE] * len(pairs), pairs, spec)


def changes_spec(ranks: Sequence[int], pairs: Sequence[FactorPair], spec: ParamSpec) -> ParamSpec:
    """The matrices that follow. Raises: CodecError."""
    if ranks and len(ranks) != len(pairs):
        raise _malformed(f"expected one rank a pair ({len(pairs)}), found {len(ranks)}")
    entries = []
    for rank, pair in zip(ranks, pairs, strict=False):
        d, k = spec[pair.up].shape[0], spec[pair.down].shape[1]
        if rank == DENSE:
            entries.append((pair.down + _LEFT, TensorSpec((d, k), "float32")))
        elif rank:
            if rank * (d + k) > d * k:
                raise _malformed(
                    f'"{pair.down}": expected factors that are smaller than their product '
                    f"[{d}, {k}], found rank {rank}"
                )
            entries.append((pair.down + _LEFT, TensorSpec((d, rank), "float32")))
            entries.append((pair.down + _RIGHT, TensorSpec((rank, k), "float32")))
    return ParamSpec(tuple(sorted(entries)))


def arrays_of(changes: Mapping[str, BaseChange]) -> dict[str, np.ndarray]:
    """Changes as named arrays, for a codec or a journal."""
    arrays = {}
    for name, change in changes.items():
        arrays[name + _LEFT] = change.left
        if change.right is not None:
            arrays[name + _RIGHT] = change.right
    return arrays


def changes_of(arrays: Tensors) -> dict[str, BaseChange]:
    """The inverse of `arrays_of`."""
    return {
        name.removesuffix(_LEFT): BaseChange(
            left=left, right=arrays.get(name.removesuffix(_LEFT) + _RIGHT)
        )
        for name, left in arrays.items()
        if name.endswith(_LEFT)
    }


def _rank(change: BaseChange | None) -> int:
    if change is None:
        return 0
    return DENSE if change.right is None else len(change.right)


def _malformed(reason: str) -> CodecError:
    return CodecError(f"offset_ranks: {reason}")
