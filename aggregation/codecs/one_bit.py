# SPDX-License-Identifier: Apache-2.0
"""One bit a value, and two scalars a tensor.

*Source* Jie, Wang, Deng, "Revisiting the Parameter Efficiency of Adapters from the Perspective of
Precision Redundancy", ICCV 2023 (arXiv 2307.16867), the quantiser at b = 1: for mean μ and unbiased
standard deviation σ of a tensor, a value becomes μ ± Φ⁻¹(3/4)·σ, the two 1-bit k-medians of a
normal distribution, by the side of μ on which it lies; the boundary itself counts as above.

A tensor of n ≥ 32 values is written as

    4 bytes    μ, float32
    4 bytes    σ, float32
    ⌈n/8⌉      bits, lowest first, 1 for a value not below μ; unused bits are 0

and a smaller one as n float32 values: its two scalars would outweigh what the bits save.

*Differs from source*: μ and σ are taken in float64 and then rounded; there is no 1e-5 beside σ,
since the side of μ does not depend on it.
"""

from __future__ import annotations

import math
import struct
from dataclasses import dataclass
from typing import ClassVar, Final

import numpy as np

from aggregation.codecs.codec import (
    NO_SEEDS,
    Payload,
    Seeds,
    count_not_finite,
    float32_spec,
    require_float32,
    require_length,
    require_memory,
)
from aggregation.errors import PayloadMalformedError, PayloadNotFiniteError
from protocol.tensors import ParamSpec, Tensors

CODE: Final = 0.6744897501960817  # Φ⁻¹(3/4)
MIN_VALUES: Final = 32  # of a tensor that is quantised

_SCALARS: Final = struct.Struct("<ff")  # mean, deviation
_LARGEST: Final = float(np.finfo(np.float32).max)
_BITS: Final = np.unpackbits(
    np.arange(256, dtype=np.uint8)[:, None], axis=1, bitorder="little"
).astype(bool)  # [byte, bit]


@dataclass(frozen=True, slots=True)
class OneBit:
    """About 1/32 of the bytes of float32, for tensors that are large."""

    name: ClassVar[str] = "one-bit"

    def encode(self, tensors: Tensors, *, seeds: Seeds = NO_SEEDS) -> bytes:
        """In name order. *Cost* two passes over each tensor, 12 bytes a value of its largest."""
        spec = float32_spec(tensors)
        return b"".join(_encode(name, tensors[name].reshape(-1)) for name in spec.names)

    def decode(
        self, payload: Payload, spec: ParamSpec, limit: int, *, seeds: Seeds = NO_SEEDS
    ) -> dict[str, np.ndarray]:
        """Tensors of the two codes each; what was small, bit for bit."""
        require_float32(spec)
        require_memory(spec, limit)
        view = memoryview(payload).cast("B")
        require_length(view, self.payload_bytes(spec))
        tensors: dict[str, np.ndarray] = {}
        start = 0
        for name, entry in spec.entries:
            end = start + _bytes(entry.size)
            tensors[name] = _decode(name, view[start:end], entry.size).reshape(entry.shape)
            start = end
        return tensors

    def payload_bytes(self, spec: ParamSpec) -> int:
        """Exact."""
        return sum(_bytes(entry.size) for _, entry in spec.entries)


def _bytes(size: int) -> int:
    return 4 * size if size < MIN_VALUES else _SCALARS.size + (size + 7) // 8


def _encode(name: str, values: np.ndarray) -> bytes:
    if not np.isfinite(values).all():
        raise PayloadNotFiniteError(
            f'tensor "{name}": expected finite values, found {count_not_finite(values)} NaN or '
            "infinite ones"
        )
    if values.size < MIN_VALUES:
        return values.astype("<f4", copy=False).tobytes()
    centred = values.astype(np.float64)
    exact_mean = float(centred.sum()) / values.size
    centred -= exact_mean
    centred *= centred
    std = math.sqrt(float(centred.sum()) / (values.size - 1))
    _codes(name, exact_mean, std)
    scalars = _SCALARS.pack(exact_mean, std)
    bits = np.packbits(values >= np.float32(exact_mean), bitorder="little")
    return scalars + bits.tobytes()


def _decode(name: str, payload: memoryview, size: int) -> np.ndarray:
    if size < MIN_VALUES:
        values = np.frombuffer(payload, "<f4").astype(np.float32)
        if count := count_not_finite(values):
            raise PayloadNotFiniteError(
                f'tensor "{name}": expected finite values, found {count} NaN or infinite ones'
            )
        return values
    low, high = _codes(name, *_SCALARS.unpack_from(payload))
    packed = np.frombuffer(payload, np.uint8, offset=_SCALARS.size)
    if size % 8 and packed[-1] >> (size % 8):
        raise PayloadMalformedError(f'tensor "{name}": expected unused bits to be 0, found others')
    # eight values a look-up: several times faster than unpacking single bits
    return np.where(_BITS, high, low).take(packed, axis=0).reshape(-1)[:size]


def _codes(name: str, mean: float, std: float) -> tuple[np.float32, np.float32]:
    """The values of bit 0 and bit 1."""
    if not (math.isfinite(mean) and math.isfinite(std)):
        raise PayloadNotFiniteError(
            f'tensor "{name}": expected finite mean and deviation, found {mean} and {std}'
        )
    if math.copysign(1, std) < 0:
        raise PayloadMalformedError(
            f'tensor "{name}": expected a deviation of 0 or more, found {std:g}'
        )
    low, high = mean - CODE * std, mean + CODE * std
    if max(-low, high, std) > _LARGEST:
        raise PayloadNotFiniteError(
            f'tensor "{name}": mean {mean:g} and deviation {std:g} decode beyond float32'
        )
    return np.float32(low), np.float32(high)
