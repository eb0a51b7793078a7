# SPDX-License-Identifier: Apache-2.0
"""What the codecs share whose payloads can be summed: one grid for every client of a round.

An update is clipped to the norm C, rotated (rotation.py, by `seeds.shared`), and of its values, or
of a random part of them that all clients of the round choose alike, each becomes one of the
integers 0 to L on a grid that all know. So the integers of many clients can be added before anyone
reads them, under a mask too; m clients need ⌈log₂(m·L + 1)⌉ bits a value, and what the sum decodes
to is the mean of what the payloads do.

After the rotation a value of an update of norm C is about normal with the deviation σ = C/√p, for
p the largest power of two up to the number of values d. Grids are given in units of σ: that is all
that the integers are worth, and no client has a scale of its own.

*Source* rotation, clipping, common grid: Bonawitz et al., "Federated Learning with Autotuned
Communication-Efficient Secure Aggregation", Asilomar 2019 (arXiv 1912.00131).

The payload is the integers in order, packed at bit_length(L) bits each (packing.py).

*Cost* that of the rotation, and about 60 ns a value; 8 bytes a value beside the tensors.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Final, Protocol, runtime_checkable

import numpy as np

from aggregation.codecs.codec import (
    NO_SEEDS,
    Codec,
    Payload,
    Seeds,
    float32_spec,
    require_finite,
    require_float32,
    require_length,
    require_memory,
    split,
)
from aggregation.codecs.random_k import positions
from aggregation.codecs.top_k import survivors
from aggregation.errors import CodecError, PayloadMalformedError
from aggregation.packing import pack, packed_bytes, unpack, word_type
from aggregation.rotation import power_below, rotate, rotate_back
from protocol.tensors import ParamSpec, Tensors

ROUNDING: Final = 1e-5
"""What a norm may have gained in float32 on the way, as a share of it."""

_BLOCK: Final = 1 << 16  # integers decoded at once; a multiple of 8, so that bytes are whole


@runtime_checkable
class SumCodec(Codec, Protocol):
    """A codec whose integers may be added over clients before they are decoded."""

    @property
    def levels(self) -> int:
        """L: a client's integers are from 0 to L."""
        ...

    def length(self, spec: ParamSpec) -> int:
        """Integers of an update of this spec."""
        ...

    def step(self, spec: ParamSpec) -> float:
        """Between two neighbours on the grid, in what is decoded."""
        ...

    def reach(self, spec: ParamSpec) -> float:
        """The largest norm that what `encode` wrote may decode to: above the codec's own, since
        values are rounded. A client's influence on a sum is that."""
        ...

    def quantise(self, tensors: Tensors, *, seeds: Seeds = NO_SEEDS) -> np.ndarray:
        """A client's integers, uint32 [length]. Raises: CodecError, as `encode`."""
        ...

    def mean(
        self,
        sums: np.ndarray,
        count: int,
        spec: ParamSpec,
        *,
        seeds: Seeds = NO_SEEDS,
        noise: int = 0,
    ) -> dict[str, np.ndarray]:
        """The mean update of `count` clients of whose integers `sums`, [length], is the sum.

        `noise`: how far beyond what so many clients can have noise may have taken it.
        Raises: CodecError for sums further off.
        """
        ...


def sum_bits(levels: int, clients: int, *, noise: int = 0) -> int:
    """Bits that a sum over so many clients needs, with noise of ±`noise` on it."""
    return (clients * levels + 2 * noise).bit_length()


def signed_sums(sums: np.ndarray, bits: int, *, noise: int) -> np.ndarray:
    """Sums modulo 2^bits as int64: from -noise on, where noise may have taken them below 0."""
    wide = sums.astype(np.int64)
    return np.where(wide < (1 << bits) - noise, wide, wide - (1 << bits))


def checked_norm(name: str, norm: object) -> float:
    """Raises: CodecError unless it is a finite number above 0."""
    is_number = isinstance(norm, int | float) and not isinstance(norm, bool)
    if not (is_number and 0 < norm < math.inf):  # type: ignore[operator]
        raise CodecError(f"{name}, norm: expected a finite number above 0, found {norm!r}")
    return float(norm)  # type: ignore[arg-type]


class CommonGrid:
    """The whole of such a codec but for its grid: how values become integers, and back."""

    __slots__ = ()

    norm: float
    density: float

    @property
    def levels(self) -> int:
        """L."""
        raise NotImplementedError

    def to_grid(self, values: np.ndarray, seeds: Seeds) -> np.ndarray:
        """Integers 0 to L, uint32 [n], for rotated values in units of σ, float32 [n]."""
        raise NotImplementedError

    def from_grid(self, means: np.ndarray) -> np.ndarray:
        """Values in units of σ, float32 [n], for the means of integers, float32 [n]."""
        raise NotImplementedError

    def length(self, spec: ParamSpec) -> int:
        """See `SumCodec.length`."""
        return survivors(self.density, spec.size)

    def step(self, spec: ParamSpec) -> float:
        """See `SumCodec.step`."""
        ends = self.from_grid(np.array([0, 1], np.float32))
        return float(ends[1] - ends[0]) * self.unit(spec)

    def reach(self, spec: ParamSpec) -> float:
        """See `SumCodec.reach`."""
        raise NotImplementedError

    def quantise(self, tensors: Tensors, *, seeds: Seeds = NO_SEEDS) -> np.ndarray:
        """See `SumCodec.quantise`."""
        spec = float32_spec(tensors)
        vector = spec.flatten(tensors)
        require_finite(vector, spec)
        norm = math.sqrt(float(np.square(vector, dtype=np.float64).sum()))
        vector *= np.float32(min(1.0, self.norm / norm) / self.unit(spec) if norm else 0.0)
        rotate(vector, seeds.shared)
        return self.to_grid(self._part(vector, seeds), seeds)

    def mean(
        self,
        sums: np.ndarray,
        count: int,
        spec: ParamSpec,
        *,
        seeds: Seeds = NO_SEEDS,
        noise: int = 0,
    ) -> dict[str, np.ndarray]:
        """See `SumCodec.mean`."""
        require_float32(spec)
        if sums.shape != (self.length(spec),):
            raise CodecError(f"sums: expected shape ({self.length(spec)},), found {sums.shape}")
        parts = (sums[start : start + _BLOCK] for start in range(0, sums.size, _BLOCK))
        return self._mean(parts, count, spec, seeds, noise=noise)

    def encode(self, tensors: Tensors, *, seeds: Seeds = NO_SEEDS) -> bytes:
        """See `Codec.encode`: what is longer than the norm is shortened to it."""
        bits = self.levels.bit_length()
        return pack(self.quantise(tensors, seeds=seeds).astype(word_type(bits)), bits)

    def decode(
        self, payload: Payload, spec: ParamSpec, limit: int, *, seeds: Seeds = NO_SEEDS
    ) -> dict[str, np.ndarray]:
        """See `Codec.decode`; `seeds.shared` is that of `encode`."""
        require_float32(spec)
        require_memory(spec, limit)
        view = memoryview(payload).cast("B")
        require_length(view, self.payload_bytes(spec))
        return self._mean(self._unpacked(view, self.length(spec)), 1, spec, seeds)

    def payload_bytes(self, spec: ParamSpec) -> int:
        """Exact."""
        return packed_bytes(self.length(spec), self.levels.bit_length())

    def _unpacked(self, view: memoryview, length: int) -> Iterator[np.ndarray]:
        bits = self.levels.bit_length()
        for start in range(0, length, _BLOCK):
            count = min(_BLOCK, length - start)
            first = start * bits // 8
            yield unpack(view[first : first + packed_bytes(count, bits)], count, bits)

    def _mean(
        self,
        sums: Iterator[np.ndarray],
        count: int,
        spec: ParamSpec,
        seeds: Seeds,
        *,
        noise: int = 0,
    ) -> dict[str, np.ndarray]:
        """As `mean`, of sums in blocks: only what is decoded is whole in memory."""
        most, start = count * self.levels, 0
        values = np.empty(self.length(spec), np.float32)
        for part in sums:
            low, high = int(part.min(initial=0)), int(part.max(initial=0))
            if low < -noise or high > most + noise:
                wrong = low if low < -noise else high
                raise PayloadMalformedError(
                    f"sums: expected {-noise} to {most + noise} of {count} clients, found {wrong}"
                )
            means = (part / np.float64(count)).astype(np.float32)
            values[start : start + len(part)] = self.from_grid(means)
            start += len(part)
        values *= np.float32(self.unit(spec))
        vector = values
        if len(values) < spec.size:
            vector, start = np.zeros(spec.size, np.float32), 0
            for chosen in positions(seeds.shared, spec.size, len(values)):
                vector[chosen] = values[start : start + len(chosen)]
                start += len(chosen)
        rotate_back(vector, seeds.shared)
        return split(vector, spec)

    def unit(self, spec: ParamSpec) -> float:
        """σ of an update of the full norm."""
        return self.norm / math.sqrt(power_below(spec.size))

    def _part(self, vector: np.ndarray, seeds: Seeds) -> np.ndarray:
        count = survivors(self.density, vector.size)
        if count == vector.size:
            return vector
        return np.concatenate(
            [vector[chosen] for chosen in positions(seeds.shared, vector.size, count)]
        )
