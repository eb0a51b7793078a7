# SPDX-License-Identifier: Apache-2.0
"""A random part of the values, the same part for all clients of a round.

k = ⌈density · size⌉ positions of the flat vector follow from `seeds.shared`, so that none is sent,
and the payloads of many clients can be summed value by value, under a mask too. The rest decodes
to 0.

*Source* "random mask" of Konečný et al., "Federated Learning: Strategies for Improving
Communication Efficiency" (arXiv 1610.05492); as a contraction, Stich, Cordonnier, Jaggi,
"Sparsified SGD with Memory", NeurIPS 2018 (arXiv 1809.07599).
*Differs from source*: one mask for all clients of a round.

Unscaled, E‖x - decoded‖² = (1 - k/size)·‖x‖²: a contraction, which error feedback needs. Scaled by
size/k, the expectation over seeds is x itself, but a single error is (size/k - 1)·‖x‖².

The positions: value i has a key of 64 bits, pair i of a stream of counter_rng.py; those of the k
smallest keys are sent, the lower index first where keys are equal, in ascending order.

*Cost* two passes over the keys, about 40 ns a value each way. Memory of the choice is about 2 MiB
and 100·√size bytes: below 12 MiB for 10¹⁰ values. Decoding takes one byte a value besides, in the
check that all are finite.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Final

import numpy as np

from aggregation.codecs.codec import (
    NO_SEEDS,
    Payload,
    Seeds,
    float32_spec,
    require_finite,
    require_float32,
    require_length,
    require_memory,
    split,
)
from aggregation.codecs.top_k import checked_density, survivors
from aggregation.counter_rng import RANDOM_K, double_words
from aggregation.errors import CodecError
from protocol.tensors import ParamSpec, Tensors

Keys = Callable[[int, int], np.ndarray]  # start, count -> uint64 [count]

_BLOCK: Final = 1 << 15  # keys drawn at once


@dataclass(frozen=True, slots=True, kw_only=True)
class RandomK:
    """4 · density bytes a value of the float32 tensors, no positions."""

    density: float
    """Part of the values that is sent, above 0 and at most 1; counted as its decimal digits say."""
    unbiased: bool = False
    """Scale what is sent by size/k. Not for error feedback, which would then diverge."""

    def __post_init__(self) -> None:
        object.__setattr__(self, "density", checked_density(self.density))
        if not isinstance(self.unbiased, bool):
            raise CodecError(f"random-k, unbiased: expected true or false, got {self.unbiased!r}")

    @property
    def name(self) -> str:
        """`random-k:DENSITY` or `random-k:DENSITY,unbiased`, the density as Python prints it."""
        return f"random-k:{self.density!r}" + (",unbiased" if self.unbiased else "")

    def encode(self, tensors: Tensors, *, seeds: Seeds = NO_SEEDS) -> bytes:
        """float32 values of ascending positions. Raises: CodecError also for what the scale takes
        beyond float32."""
        spec = float32_spec(tensors)
        vector = spec.flatten(tensors)
        require_finite(vector, spec)
        k = survivors(self.density, spec.size)
        if self.unbiased and k:
            with np.errstate(over="ignore"):  # refused by name, just below
                np.multiply(
                    vector, spec.size / k, out=vector, dtype=np.float64, casting="same_kind"
                )
            require_finite(vector, spec)
        blocks = positions(seeds.shared, spec.size, k)
        return b"".join(vector[chosen].astype("<f4", copy=False).tobytes() for chosen in blocks)

    def decode(
        self, payload: Payload, spec: ParamSpec, limit: int, *, seeds: Seeds = NO_SEEDS
    ) -> dict[str, np.ndarray]:
        """The values at their positions, 0 elsewhere; `seeds.shared` is that of `encode`."""
        require_float32(spec)
        require_memory(spec, limit)
        view = memoryview(payload).cast("B")
        require_length(view, self.payload_bytes(spec))
        values = np.frombuffer(view, "<f4")
        vector = np.zeros(spec.size, np.float32)
        start = 0
        for chosen in positions(seeds.shared, spec.size, len(values)):
            vector[chosen] = values[start : start + len(chosen)]
            start += len(chosen)
        require_finite(vector, spec)
        return split(vector, spec)

    def payload_bytes(self, spec: ParamSpec) -> int:
        """Exact."""
        return 4 * survivors(self.density, spec.size)


def positions(seed: int, size: int, k: int) -> Iterator[np.ndarray]:
    """The k positions of `seed` among `size`, ascending, in blocks of int64."""
    return smallest(partial(double_words, seed, RANDOM_K), size, k)


def smallest(keys: Keys, size: int, k: int) -> Iterator[np.ndarray]:
    """Ascending positions, in blocks, of the k smallest of `size` keys; ties by index."""
    if k == 0:
        return
    cut, ties = _cut(keys, size, k)
    for start in range(0, size, _BLOCK):
        block = keys(start, min(_BLOCK, size - start))
        chosen = block < cut
        equal = np.flatnonzero(block == cut)[:ties]
        chosen[equal] = True
        ties -= len(equal)
        yield start + np.flatnonzero(chosen)


def _cut(keys: Keys, size: int, k: int) -> tuple[np.uint64, int]:
    """The k-th smallest key, and how many keys equal to it are among the k smallest.

    The k-th smallest of uniform keys is known beforehand to about 1/(2√size): only the keys six
    times as near are kept, and all of them again from a wider range where that was not enough.
    """
    reach = 3 / math.sqrt(size)
    while True:
        low, high = (_key(k / size + side * reach) for side in (-1, 1))
        below = 0
        kept: list[np.ndarray] = []
        for start in range(0, size, _BLOCK):
            block = keys(start, min(_BLOCK, size - start))
            below += int(np.count_nonzero(block < low))
            kept.append(block[(block >= low) & (block <= high)])
        near = np.concatenate(kept)
        if below < k <= below + len(near):
            near.sort()
            cut = near[k - below - 1]
            return cut, k - below - int(np.searchsorted(near, cut))
        reach *= 4


def _key(part: float) -> np.uint64:
    """The key that this part of all keys is below."""
    return np.uint64(min(max(int(part * 2.0**64), 0), (1 << 64) - 1))
