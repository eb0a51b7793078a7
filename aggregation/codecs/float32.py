# SPDX-License-Identifier: Apache-2.0
"""Every value as it is: 4 bytes."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

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
from protocol.tensors import ParamSpec, Tensors


@dataclass(frozen=True, slots=True)
class Float32:
    """The lossless codec, and the measure of the others."""

    name: ClassVar[str] = "float32"

    def encode(self, tensors: Tensors, *, seeds: Seeds = NO_SEEDS) -> bytes:
        """4 bytes a value, in name order."""
        spec = float32_spec(tensors)
        vector = spec.flatten(tensors)
        require_finite(vector, spec)
        return vector.astype("<f4", copy=False).tobytes()

    def decode(
        self, payload: Payload, spec: ParamSpec, limit: int, *, seeds: Seeds = NO_SEEDS
    ) -> dict[str, np.ndarray]:
        """The tensors, bit for bit."""
        require_float32(spec)
        require_memory(spec, limit)
        view = memoryview(payload).cast("B")
        require_length(view, self.payload_bytes(spec))
        # a container's payload starts anywhere: the copy is also what aligns it
        vector = np.frombuffer(view, "<f4").astype(np.float32)
        require_finite(vector, spec)
        return split(vector, spec)

    def payload_bytes(self, spec: ParamSpec) -> int:
        """Exact."""
        return 4 * spec.size
