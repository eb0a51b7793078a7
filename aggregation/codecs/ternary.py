# SPDX-License-Identifier: Apache-2.0
"""The signs of the largest values, and one magnitude for all of them.

*Source* Yadav et al., "ComPEFT: Compression for Communicating Parameter Efficient Updates via
Sparsification and Quantization", 2023 (arXiv 2311.13171), scale "std": of the values of all tensors
together, in name order, the share `density` of largest magnitude become ±α·σ, the others 0; σ is
the standard deviation (over n) of the values *before* the others are dropped. Sattler et al.,
"Robust and Communication-Efficient Federated Learning from Non-IID Data", 2019 (arXiv 1903.02891),
scale "mean": ±μ with μ the mean *magnitude* of the survivors (their signed mean would be about 0).

With k = ⌈density · n⌉ of n values, a payload is

    4 bytes    magnitude, float32
    the rest   bits, lowest first: k signs in the order of the positions, 1 for 0 or above; then
               the bits of the positions (`sparse_positions`)

At 5, 10, 20 and 50 % that is within 2 % of the entropy n·H(k/n) + k bits from 10⁴ values on.

*Differs from source* Exactly k values survive, of equal magnitudes the earlier ones; the code of
ComPEFT keeps one more, and all ties. Gaps have a general Golomb code, not a Rice code; the
magnitude has 32 bits, not 16.

What is encoded has to be a *change*, trained tensors less those that were sent: for LoRA that of A
and of B (A starts at random, not at 0), for (IA)³ that from its ones. One magnitude stands for all
tensors, so that a tensor with small changes may lose all of them, and "std" sees no spread in equal
values: their survivors become 0. What does not survive is lost. The paper sends one update and can
bear it; many rounds need `error_feedback`, and that needs clients that keep state. Every client
chooses positions of its own: payloads cannot be summed under a mask.

*Cost* linear both ways. Beside the tensors, encoding takes 12 bytes a value at 5 % and about 30 at
50 %, decoding 4 MiB or less.
"""

from __future__ import annotations

import math
import struct
from dataclasses import dataclass
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
from aggregation.codecs.sparse_positions import (
    decode_positions,
    encode_positions,
    most_bits,
    read_bits,
)
from aggregation.codecs.top_k import checked_density, largest, survivors
from aggregation.errors import (
    CodecError,
    PayloadMalformedError,
    PayloadNotFiniteError,
    PayloadTruncatedError,
)
from protocol.tensors import ParamSpec, Tensors

SCALES: Final = ("std", "mean")

_SCALE: Final = struct.Struct("<f")
_LARGEST: Final = float(np.finfo(np.float32).max)


@dataclass(frozen=True, slots=True, kw_only=True)
class Ternary:
    """About 0.34 bits a value at 5 %, 0.57 at 10 %: 1/95 and 1/56 of float32."""

    density: float  # share of values that survive, above 0 up to 1
    scale: str = "std"  # "std": α · σ of all values; "mean": mean magnitude of the survivors
    alpha: float = 1.0  # α, above 0; for "mean" always 1

    def __post_init__(self) -> None:
        object.__setattr__(self, "density", checked_density(self.density))
        if self.scale not in SCALES:
            raise CodecError(f"scale: expected one of {', '.join(SCALES)}, found {self.scale!r}")
        alpha: object = self.alpha
        if (
            isinstance(alpha, bool)
            or not isinstance(alpha, int | float)
            or not 0 < alpha <= _LARGEST
        ):
            raise CodecError(f"alpha: expected a float32 above 0, found {alpha!r}")
        if self.scale == "mean" and alpha != 1:
            raise CodecError(f'alpha: expected 1 with scale "mean", found {alpha!r}')
        object.__setattr__(self, "alpha", float(alpha))

    @property
    def name(self) -> str:
        """`ternary:DENSITY[,mean|,std,ALPHA]`, numbers as Python prints floats, defaults left out:
        "ternary:0.1", "ternary:0.1,mean", "ternary:0.1,std,2.0"."""
        name = f"ternary:{self.density!r}"
        if self.scale != "std":
            return f"{name},{self.scale}"
        return name if self.alpha == 1 else f"{name},std,{self.alpha!r}"

    def encode(self, tensors: Tensors, *, seeds: Seeds = NO_SEEDS) -> bytes:
        """In name order."""
        spec = float32_spec(tensors)
        vector = spec.flatten(tensors)
        require_finite(vector, spec)
        if not vector.size:
            return b""
        positions = largest(vector, survivors(self.density, vector.size))
        magnitude = self._magnitude(vector, positions)
        bits, order = encode_positions(positions, vector.size)
        signs = (vector[order] >= 0).view(np.uint8)
        packed = np.packbits(np.concatenate([signs, bits]), bitorder="little")
        return _SCALE.pack(magnitude) + packed.tobytes()

    def decode(
        self, payload: Payload, spec: ParamSpec, limit: int, *, seeds: Seeds = NO_SEEDS
    ) -> dict[str, np.ndarray]:
        """Tensors of three values."""
        require_float32(spec)
        require_memory(spec, limit)
        view = memoryview(payload).cast("B")
        if not spec.size:
            require_length(view, 0)
            return {}
        if len(view) <= _SCALE.size:
            raise PayloadTruncatedError(
                f"payload: expected more than {_SCALE.size} bytes, found {len(view)}"
            )
        (magnitude,) = _SCALE.unpack_from(view)
        if not math.isfinite(magnitude):
            raise PayloadNotFiniteError(f"scale: expected a finite number, found {magnitude}")
        if math.copysign(1, magnitude) < 0:
            raise PayloadMalformedError(f"scale: expected 0 or more, found {magnitude:g}")
        codes = np.array([-magnitude, magnitude], np.float32)
        count = survivors(self.density, spec.size)
        data = np.frombuffer(view, np.uint8, offset=_SCALE.size)
        vector = np.zeros(spec.size, np.float32)
        for first, positions in decode_positions(data, count, spec.size, count):
            vector[positions] = codes[read_bits(data, first, positions.size)]
        return split(vector, spec)

    def payload_bytes(self, spec: ParamSpec) -> int:
        """An upper bound, reached by sets of positions that are regular in the worst way."""
        if not spec.size:
            return 0
        count = survivors(self.density, spec.size)
        return _SCALE.size + (count + most_bits(spec.size, count) + 7) // 8

    def _magnitude(self, vector: np.ndarray, positions: np.ndarray) -> float:
        if self.scale == "mean":
            exact = float(np.abs(vector[positions]).mean(dtype=np.float64))
        else:
            exact = self.alpha * float(vector.std(dtype=np.float64))
        with np.errstate(over="ignore"):  # refused by name, just below
            magnitude = np.float32(exact)
        if not np.isfinite(magnitude):
            raise PayloadNotFiniteError(
                f"scale: expected a finite float32, found {self.alpha:g} times the standard "
                f"deviation, {exact:g}"
            )
        return float(magnitude)
