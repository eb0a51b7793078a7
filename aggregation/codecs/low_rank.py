# SPDX-License-Identifier: Apache-2.0
"""Matrices as the product of two thin ones: the truncated singular value decomposition.

*Source* Eckart, Young, "The approximation of one matrix by another of lower rank", Psychometrika
1936: of all matrices of rank r, U_r S_r V_rᵀ is the nearest to U S Vᵀ, by the Frobenius norm; what
is left out is the root of the sum of the smaller S².

A matrix [m, n] with r·(m + n) < m·n is written as

    4·m·r bytes    U_r √S_r, float32, row by row
    4·r·n bytes    √S_r V_rᵀ, float32, row by row

and every other tensor as float32 values. Both factors carry √S, so that both are rounded alike;
of each pair of singular vectors the one of U has a positive entry where it is largest (the first
of several), since a decomposition fixes signs in pairs only.

*Cost* encoding m·n·min(m, n), in float64; decoding r·m·n, of which r is a setting.
"""

from __future__ import annotations

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
from aggregation.errors import CodecError, PayloadNotFiniteError
from protocol.tensors import ParamSpec, Tensors, TensorSpec

_BLOCK: Final = 1 << 16  # values of a product worked out at once
_LARGEST: Final = 3.4e38  # singular value: bounds every value of the product, below float32's own


@dataclass(frozen=True, slots=True, kw_only=True)
class LowRank:
    """r·(m + n) values for a matrix of m·n; the nearest of that rank."""

    rank: int  # r, 1 or more

    def __post_init__(self) -> None:
        if isinstance(self.rank, bool) or not isinstance(self.rank, int) or self.rank < 1:
            raise CodecError(f"low-rank, rank: expected an integer of 1 or more, got {self.rank!r}")

    @property
    def name(self) -> str:
        """`low-rank:RANK`."""
        return f"low-rank:{self.rank}"

    def encode(self, tensors: Tensors, *, seeds: Seeds = NO_SEEDS) -> bytes:
        """In name order. *Cost* some 40 bytes a value of the largest matrix, beside a copy of all.
        Raises: CodecError also for a singular value beyond 3.4e38."""
        spec = float32_spec(tensors)
        vector = spec.flatten(tensors)
        require_finite(vector, spec)
        parts: list[bytes] = []
        for name, tensor in split(vector, spec).items():
            factors = self._factors(name, tensor) if self._is_split(spec[name]) else (tensor,)
            parts += [factor.astype("<f4", copy=False).tobytes() for factor in factors]
        return b"".join(parts)

    def decode(
        self, payload: Payload, spec: ParamSpec, limit: int, *, seeds: Seeds = NO_SEEDS
    ) -> dict[str, np.ndarray]:
        """Products of the factors, whatever finite factors they are. The same bits on every
        machine: sums over the rank are float64, one after the other."""
        require_float32(spec)
        require_memory(spec, limit)
        view = memoryview(payload).cast("B")
        require_length(view, self.payload_bytes(spec))
        values = np.frombuffer(view, "<f4")
        vector = np.empty(spec.size, np.float32)
        start = 0
        for name, tensor in split(vector, spec).items():
            end = start + self._values(spec[name])
            if self._is_split(spec[name]):
                rows, columns = tensor.shape
                between = start + rows * self.rank
                left = values[start:between].reshape(rows, self.rank)
                _multiply(left, values[between:end].reshape(self.rank, columns), tensor)
            else:
                tensor.reshape(-1)[:] = values[start:end]
            start = end
        # An infinite or NaN factor leaves a product that is one of the two.
        require_finite(vector, spec)
        return split(vector, spec)

    def payload_bytes(self, spec: ParamSpec) -> int:
        """Exact."""
        return 4 * sum(self._values(entry) for _, entry in spec.entries)

    def _is_split(self, entry: TensorSpec) -> bool:
        return len(entry.shape) == 2 and self.rank * sum(entry.shape) < entry.size

    def _values(self, entry: TensorSpec) -> int:
        return self.rank * sum(entry.shape) if self._is_split(entry) else entry.size

    def _factors(self, name: str, matrix: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """[m, r] and [r, n], float32."""
        U, S, Vt = np.linalg.svd(matrix.astype(np.float64), full_matrices=False)
        if S[0] > _LARGEST:
            raise PayloadNotFiniteError(
                f'tensor "{name}": expected singular values up to {_LARGEST:g}, found {S[0]:g}'
            )
        roots = np.sqrt(S[: self.rank])
        left, right = U[:, : self.rank] * roots, roots[:, None] * Vt[: self.rank]
        largest = np.abs(left).argmax(axis=0)
        signs = np.where(left[largest, np.arange(self.rank)] < 0, -1.0, 1.0)
        return (left * signs).astype(np.float32), (signs[:, None] * right).astype(np.float32)


def _multiply(left: np.ndarray, right: np.ndarray, product: np.ndarray) -> None:
    """Fills `product` with left @ right. Not by BLAS: its order of summation differs between
    machines, and copies of one model on two of them must stay equal. A product of two float32 is
    exact in float64."""
    rows, columns = product.shape
    width = min(columns, _BLOCK)
    height = max(1, _BLOCK // width)
    with np.errstate(over="ignore", invalid="ignore"):  # the caller refuses what is not finite
        for top in range(0, rows, height):
            for start in range(0, columns, width):
                part = product[top : top + height, start : start + width]
                total = np.zeros(part.shape)
                for a, b in zip(left[top : top + height].T, right, strict=True):
                    total += np.outer(a.astype(np.float64), b[start : start + width])
                part[:] = total
