# SPDX-License-Identifier: Apache-2.0
"""IEEE half precision: 2 bytes a value.

Rounds to nearest even: relative error at most 2⁻¹¹ for magnitudes from 6.1e-5 to 65,504, absolute
error at most 3e-8 below. What would round to infinity is an error, never an infinity.
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
class Float16:
    """Half the bytes of float32."""

    name: ClassVar[str] = "float16"

    def encode(self, tensors: Tensors, *, seeds: Seeds = NO_SEEDS) -> bytes:
        """2 bytes a value, in name order."""
        spec = float32_spec(tensors)
        vector = spec.flatten(tensors)
        require_finite(vector, spec)
        with np.errstate(over="ignore"):  # overflow is looked for below, and named
            half = vector.astype("<f2")
        if not np.isfinite(half).all():
            for name, tensor in split(vector, spec).items():
                largest = float(np.abs(tensor).max())
                if largest >= _ROUNDS_TO_INFINITY:
                    raise PayloadNotFiniteError(
                        f'tensor "{name}": expected magnitudes up to 65504, found {largest:g}; '
                        "use codec float32 or a smaller learning rate"
                    )
        return half.tobytes()

    def decode(
        self, payload: Payload, spec: ParamSpec, limit: int, *, seeds: Seeds = NO_SEEDS
    ) -> dict[str, np.ndarray]:
        """The rounded tensors, as float32."""
        require_float32(spec)
        require_memory(spec, limit)
        view = memoryview(payload).cast("B")
        require_length(view, self.payload_bytes(spec))
        vector = np.frombuffer(view, "<f2").astype(np.float32)
        require_finite(vector, spec)
        return split(vector, spec)

    def payload_bytes(self, spec: ParamSpec) -> int:
        """Exact."""
        return 2 * spec.size


_ROUNDS_TO_INFINITY: Final = 65_520.0  # half-way between the largest half, 65504, and 2**16
