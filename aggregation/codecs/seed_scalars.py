# SPDX-License-Identifier: Apache-2.0
"""A change as a sum of random directions that both sides draw: one scalar a direction is sent.

*Source* Qin et al., "Federated Full-Parameter Tuning of Billion-Sized Language Models with
Communication Cost under 18 Kilobytes" (FedKSeed), ICML 2024 (arXiv 2312.06353): K directions z_j
are fixed by seeds, and a model is w₀ + Σ_j a_j z_j. Since that is linear in a, the mean of clients'
scalars is the mean of their models: `expand` of the one is the other.

*Differs from source* FedKSeed trains along the z_j, and its scalars are what training gave. As a
codec, this one also sends a change that any training made: a_j = c·<z_j, x>.
Directions are not Gaussian. A value of z is the number of ones in a random word of 32 bits, less
16, times 0.35355...: integers from -16 to 16, of mean 0 and variance 8, brought to variance 1. All
that estimates by random directions ask of z is independent values of mean 0 and variance 1, so
that E[z zᵀ] is the identity. This needs no logarithm, no cosine, and so gives the same bits on
every machine, which a Gaussian in floats does not. What differs: 33 values instead of a continuum,
none beyond 5.66, a fourth moment of 2.9375 instead of 3 (estimates vary a little less), and a sum
over values that is normal only in the limit.

The factor c. For x of d values and K directions, (1/K)·Σ z_j <z_j, x> has the expectation x, but
for K well below d it is far longer than x: the mean of its square is (K + d + 15/16)/K · ‖x‖²
(15/16 is the fourth moment less 2). Error feedback would add up what it overshoots. Of all c the
mean of ‖x - c·Σ z_j <z_j, x>‖² is least for c = 1/(K + d + 15/16), where it is
(1 - K/(K + d + 15/16))·‖x‖²: a contraction, and the one that is used. Times (K + d + 15/16)/K it
is the unbiased estimate. The least-norm one would be nearer for K about d, at the cost of solving K
equations; for K well below d the two are the same.

*Cost* K·d words of counter_rng.py each way, about 13 ns a word: a minute for 4,096 directions of
10⁶ values; directions of scalar 0 cost nothing in `expand`. Memory about 2 MiB and 8·K bytes.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Final

import numpy as np

from aggregation.codecs.codec import (
    NO_SEEDS,
    Payload,
    Seeds,
    count_not_finite,
    float32_spec,
    require_finite,
    require_float32,
    require_length,
    require_memory,
    split,
)
from aggregation.counter_rng import SEED_SCALARS, words
from aggregation.errors import CodecError, PayloadNotFiniteError
from protocol.tensors import ParamSpec, Tensors

UNIT: Final = 741_455 / 2**21
"""1/√8 to 20 bits, so that its product with an integer up to 16 is exact in float32; the variance
of a direction's values is 1 - 5e-7."""
MAX_COUNT: Final = 1 << 20  # directions: 8 MiB of float64 scalars

_FOURTH_MOMENT: Final = 3 - 2 / 32
_VALUES: Final = 1 << 13  # of a direction, drawn at once; a multiple of 4
_WORDS: Final = 1 << 15  # of several directions, drawn at once


@dataclass(frozen=True, slots=True, kw_only=True)
class SeedScalars:
    """4 · count bytes, however large the tensors are. Linear: payloads' sums decode to sums."""

    count: int  # K, 1 to 2**20

    def __post_init__(self) -> None:
        _require_count(self.count)

    @property
    def name(self) -> str:
        """`seed-scalars:COUNT`."""
        return f"seed-scalars:{self.count}"

    def encode(self, tensors: Tensors, *, seeds: Seeds = NO_SEEDS) -> bytes:
        """`project` as float32. Raises: CodecError also where tensors near the end of float32 would
        decode beyond it."""
        scalars = project(tensors, self.count, seed=seeds.shared)
        if (reach := float(np.abs(scalars).sum()) * _LARGEST_VALUE) > _LARGEST:
            raise PayloadNotFiniteError(
                f"seed scalars: expected tensors that decode within float32, found up to {reach:g}"
            )
        return scalars.astype("<f4").tobytes()

    def decode(
        self, payload: Payload, spec: ParamSpec, limit: int, *, seeds: Seeds = NO_SEEDS
    ) -> dict[str, np.ndarray]:
        """`expand`; `seeds.shared` is that of `encode`."""
        require_float32(spec)
        require_memory(spec, limit)
        view = memoryview(payload).cast("B")
        require_length(view, self.payload_bytes(spec))
        return expand(np.frombuffer(view, "<f4"), spec, seed=seeds.shared)

    def payload_bytes(self, spec: ParamSpec) -> int:
        """Exact, and the same for every spec."""
        return 4 * self.count


def directions(spec: ParamSpec, *, seed: int, first: int = 0, count: int = 1) -> np.ndarray:
    """z_first and the `count - 1` after it, float32 [count, size] in name order; exact."""
    numbers = np.arange(first, first + count)
    rows = np.empty((count, spec.size), np.float32)
    for start in range(0, spec.size, _VALUES):
        for part, steps in _steps(seed, numbers, start, min(start + _VALUES, spec.size)):
            rows[part, start : start + steps.shape[1]] = steps * UNIT
    return rows


def expand(scalars: np.ndarray, spec: ParamSpec, *, seed: int) -> dict[str, np.ndarray]:
    """Σ_j scalars[j] · z_j as float32 tensors, the same bits on every machine.

    *Shapes* scalars are floats [count]. Each value is summed in float64, j ascending, and rounded
    once. Raises: CodecError for scalars or sums that are not finite.
    """
    if scalars.ndim != 1 or not 1 <= scalars.size <= MAX_COUNT:
        raise CodecError(
            f"seed scalars: expected shape [1 to {MAX_COUNT}], found {list(scalars.shape)}"
        )
    if count := count_not_finite(scalars):
        raise PayloadNotFiniteError(
            f"seed scalars: expected finite ones, found {count} NaN or infinite ones"
        )
    amounts = scalars.astype(np.float64)  # not before: numpy warns of some NaN
    used = np.flatnonzero(amounts)  # adding 0 changes no bit
    vector = np.empty(spec.size, np.float32)
    with np.errstate(over="ignore", invalid="ignore"):  # refused by name, below
        for start in range(0, spec.size, _VALUES):
            end = min(start + _VALUES, spec.size)
            total = np.zeros(end - start)
            for part, steps in _steps(seed, used, start, end):
                # Row by row: a reduction by numpy or BLAS has an order of its own.
                for amount, row in zip(amounts[used[part]], steps, strict=True):
                    total += amount * row
            vector[start:end] = total * UNIT
    require_finite(vector, spec)
    return split(vector, spec)


def project(tensors: Tensors, count: int, *, seed: int) -> np.ndarray:
    """The scalars [count], float64, whose `expand` is nearest to the tensors on average:
    <z_j, x> / (count + size + 15/16). Raises: CodecError.

    Sums run in the order of the machine's BLAS: what others compute never depends on their bits.
    """
    _require_count(count)
    spec = float32_spec(tensors)
    vector = spec.flatten(tensors)
    require_finite(vector, spec)
    numbers = np.arange(count)
    products = np.zeros(count)
    for start in range(0, spec.size, _VALUES):
        block = vector[start : start + _VALUES].astype(np.float64)
        for part, steps in _steps(seed, numbers, start, start + len(block)):
            products[part] += steps @ block
    scalars: np.ndarray = products * (UNIT / (count + spec.size + _FOURTH_MOMENT - 2))
    return scalars


def _steps(
    seed: int, numbers: np.ndarray, start: int, end: int
) -> Iterator[tuple[slice, np.ndarray]]:
    """Values `start` to `end` of several directions before they are multiplied by UNIT, as
    (which of `numbers`, float64 [directions, values])."""
    height = max(1, _WORDS // (end - start))
    for top in range(0, len(numbers), height):
        part = slice(top, min(top + height, len(numbers)))
        drawn = words(seed, SEED_SCALARS, numbers[part], start, end - start)
        yield part, ones(drawn).astype(np.float64) - 16


def ones(values: np.ndarray) -> np.ndarray:
    """Number of bits that are 1 in each uint32; numpy's own came with numpy 2."""
    counts = values - (values >> np.uint32(1) & np.uint32(0x55555555))
    counts = (counts & np.uint32(0x33333333)) + (counts >> np.uint32(2) & np.uint32(0x33333333))
    counts = counts + (counts >> np.uint32(4)) & np.uint32(0x0F0F0F0F)
    return counts * np.uint32(0x01010101) >> np.uint32(24)


def _require_count(count: object) -> None:
    if isinstance(count, bool) or not isinstance(count, int) or not 1 <= count <= MAX_COUNT:
        raise CodecError(f"seed-scalars, count: expected 1 to {MAX_COUNT}, found {count!r}")


_LARGEST: Final = float(np.finfo(np.float32).max)
_LARGEST_VALUE: Final = 16 * UNIT  # of a direction
