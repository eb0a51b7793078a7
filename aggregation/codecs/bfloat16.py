# SPDX-License-Identifier: Apache-2.0
"""The upper half of a float32: 2 bytes a value, the whole range of magnitudes.

Rounds to nearest, ties to even: relative error at most 2⁻⁸ for magnitudes from 1.2e-38 on, eight
times that of float16, which in turn knows nothing beyond 65,504. What would round to infinity is
an error, never an infinity.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Final

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
from aggregation.errors import PayloadNotFiniteError
from protocol.tensors import ParamSpec, Tensors


@dataclass(frozen=True, slots=True)
class BFloat16:
    """Half the bytes of float32, without its limits of magnitude."""

    name: ClassVar[str] = "bfloat16"

    def encode(self, tensors: Tensors, *, seeds: Seeds = NO_SEEDS) -> bytes:
        """2 bytes a value, in name order."""
        spec = float32_spec(tensors)
        vector = spec.flatten(tensors)
        require_finite(vector, spec)
        bits = vector.view(np.uint32)
        # Half of the last place that is kept, less the least part of it where that place is even.
        # The largest finite value, sign and all, is far enough from 2**32 that nothing wraps.
        halves = (bits + (np.uint32(0x7FFF) + (bits >> _DROPPED & np.uint32(1)))) >> _DROPPED
        if (halves & _EXPONENT == _EXPONENT).any():
            for name, tensor in split(vector, spec).items():
                largest = float(np.abs(tensor).max())
                if largest >= _ROUNDS_TO_INFINITY:
                    raise PayloadNotFiniteError(
                        f'tensor "{name}": expected magnitudes up to 3.3895e38, found {largest:g}; '
                        "use codec float32 or a smaller learning rate"
                    )
        return halves.astype("<u2").tobytes()

    def decode(
        self, payload: Payload, spec: ParamSpec, limit: int, *, seeds: Seeds = NO_SEEDS
    ) -> dict[str, np.ndarray]:
        """The rounded tensors, as float32."""
        require_float32(spec)
        require_memory(spec, limit)
        view = memoryview(payload).cast("B")
        require_length(view, self.payload_bytes(spec))
        bits = np.frombuffer(view, "<u2").astype(np.uint32)
        bits <<= _DROPPED
        vector = bits.view(np.float32)
        require_finite(vector, spec)
        return split(vector, spec)

    def payload_bytes(self, spec: ParamSpec) -> int:
        """Exact."""
        return 2 * spec.size


_DROPPED: Final = np.uint32(16)  # bits
_EXPONENT: Final = np.uint32(0x7F80)
_ROUNDS_TO_INFINITY: Final = float.fromhex("0x1.ffp127")  # half-way from the largest to 2**128
