# SPDX-License-Identifier: Apache-2.0
"""What mergers of LoRA factors share: layers as pairs of factors, and sums of their products.

A layer's weight is W0 + s·B·A, with B [d, r] ("up"), A [r, k] ("down") and s = alpha / r. The mean
of the clients' weights is W0 + s·Σ p_i B_i A_i with p_i = weight_i / Σ weight: by samples or
uniform, as the weights given to `add` are. B_i and A_i are the current factors plus client i's
update. Every tensor that is in no pair, such as a classifier, is averaged by weight.

*Mixed ranks* Where a merger allows them, a client of rank q below r trains A[:q] and B[:, :q] of
the current factors, drops the rest of them, and sends updates [q, k] and [d, q]. Its model is
W0 + s·B_i·A_i, with the layer's one s whatever its rank. Each of its layers may have a rank of its
own.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Final, NamedTuple

import numpy as np

from aggregation.errors import MergeError
from aggregation.mergers.merger import BaseChange
from aggregation.mergers.weighted_mean import MeanState, WeightedMean
from aggregation.settings import require_number
from aggregation.vectors import checked_vector, named
from protocol.factors import FactorPair
from protocol.tensors import ParamSpec, Tensors

MEAN: Final = WeightedMean()

_LARGEST: Final = float(np.finfo(np.float32).max)


class Factors(NamedTuple):
    """A matrix [d, k] as left @ right, or as `left` alone."""

    left: np.ndarray  # float64 [d, q]; [d, k] without `right`
    right: np.ndarray | None  # float64 [q, k]

    def product(self) -> np.ndarray:
        """The matrix [d, k]."""
        return self.left if self.right is None else self.left @ self.right

    def times(self, matrix: np.ndarray) -> np.ndarray:
        """This matrix times another, [k, m] -> [d, m]."""
        return self.left @ (matrix if self.right is None else self.right @ matrix)


@dataclass(frozen=True, slots=True, kw_only=True)
class ProductSum:
    """Σ weight · B A of one layer: the factors side by side while they are smaller than their
    product, then the product. Never more than d·k values, however many terms."""

    shape: tuple[int, int]  # d, k
    terms: tuple[tuple[float, np.ndarray, np.ndarray], ...] = ()  # weight, B [d, q], A [q, k]
    dense: np.ndarray | None = None  # float64 [d, k]

    def plus(self, up: np.ndarray, down: np.ndarray, weight: float) -> ProductSum:
        """The sum with one term more, whose arrays it keeps. Raises: MergeError if infinite."""
        terms = (*self.terms, (weight, up, down))
        rank = sum(term[1].shape[1] for term in terms)
        if self.dense is None and not dense_is_smaller(self.shape, rank):
            return ProductSum(shape=self.shape, terms=terms)
        dense = np.zeros(self.shape) if self.dense is None else self.dense.copy()
        with np.errstate(over="ignore", invalid="ignore"):  # refused just below
            for factor, left, right in terms:
                dense += factor * (left @ right)
        if not np.isfinite(dense).all():
            raise MergeError(
                f"weight: expected a finite weighted sum of products, {weight:g} is too large"
            )
        return ProductSum(shape=self.shape, dense=dense)

    def mean(self, weight: float) -> Factors:
        """The sum over the sum of weights; factors [d, Σq] and [Σq, k] as long as they are kept."""
        if self.dense is not None:
            return Factors(self.dense / weight, None)
        return Factors(
            np.concatenate([up for _, up, _ in self.terms], axis=1),
            np.concatenate([factor / weight * down for factor, _, down in self.terms]),
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class ProductState:
    """What has been added: the plain mean of all tensors, and each pair's products."""

    mean: MeanState  # of updates padded to the spec's ranks
    current: Mapping[str, np.ndarray]  # the pairs' tensors, float64
    products: tuple[ProductSum, ...]  # one a pair


class Truncated(NamedTuple):
    """The best approximation of a given rank."""

    up: np.ndarray  # float64 [d, rank]
    down: np.ndarray  # float64 [rank, k]
    kept: int  # leading columns of `up` and rows of `down` that are not there for shape alone
    error: float  # what is lost, of the matrix's Frobenius norm, from 0 to 1


def require_positive(what: str, value: object) -> None:
    """Raises: MergeError unless it is a finite number above 0."""
    require_number(what, value, "a finite number above 0", lambda number: number > 0)


def require_pairs(pairs: tuple[FactorPair, ...]) -> None:
    """Raises: MergeError for no pair, or a tensor in two of them."""
    if not pairs:
        raise MergeError("pairs: expected one pair of factors or more, found none")
    require_distinct(name for pair in pairs for name in (pair.down, pair.up))


def require_distinct(names: Iterable[str]) -> None:
    """Raises: MergeError for a tensor that is named twice."""
    seen: set[str] = set()
    for name in names:
        if name in seen:
            raise MergeError(f'pairs: expected every tensor once, found "{name}" twice')
        seen.add(name)


def require_factors(spec: ParamSpec, pairs: tuple[FactorPair, ...]) -> None:
    """Raises: MergeError unless every pair's tensors are matrices [r, k] and [d, r]."""
    for pair in pairs:
        for name in (pair.down, pair.up):
            if name not in spec:
                raise MergeError(f'pair: tensor "{name}" is not in the spec')
        down, up = spec[pair.down], spec[pair.up]
        if len(down.shape) != 2 or len(up.shape) != 2 or down.shape[0] != up.shape[1]:
            raise MergeError(
                f'pair "{pair.down}", "{pair.up}": expected shapes [r, k] and [d, r], '
                f"found {list(down.shape)} and {list(up.shape)}"
            )


def require_unchanged(update: Tensors, names: Iterable[str], reason: str) -> None:
    """Raises: MergeError if an update changes a tensor that no client may train."""
    for name in names:
        if update[name].any():
            largest = float(np.abs(update[name]).max())
            raise MergeError(
                f'tensor "{name}": expected no change, found one of up to {largest:g}; {reason}'
            )


def current_factors(
    spec: ParamSpec, pairs: tuple[FactorPair, ...], current: Tensors
) -> dict[str, np.ndarray]:
    """The pairs' current tensors, new float64 arrays. Raises: MergeError."""
    require_factors(spec, pairs)
    if problem := spec.mismatch(current):
        raise MergeError(f"current tensors: {problem}")
    parts = dict(named(spec, checked_vector(spec, current)))
    return {
        name: parts[name].reshape(spec[name].shape)
        for pair in pairs
        for name in (pair.down, pair.up)
    }


def padded(
    spec: ParamSpec,
    pairs: tuple[FactorPair, ...],
    current: Mapping[str, np.ndarray],
    update: Tensors,
) -> dict[str, np.ndarray]:
    """An update of any ranks as one of the spec's: the rows of A and columns of B that the client
    does not have are zero in its model, so its change there is minus the current values.

    Raises: MergeError for ranks that do not agree or are above the spec's. What is wrong with an
    update otherwise is left to be found by who takes it next.
    """
    whole = dict(update)
    for pair in pairs:
        given = [update.get(name) for name in (pair.down, pair.up)]
        types = [spec[name].dtype for name in (pair.down, pair.up)]
        if not all(
            isinstance(array, np.ndarray) and array.ndim == 2 and array.dtype == dtype
            for array, dtype in zip(given, types, strict=True)
        ):
            continue
        down, up = update[pair.down], update[pair.up]
        (rank, k), (d, _), sent = spec[pair.down].shape, spec[pair.up].shape, down.shape[0]
        if not 1 <= sent <= rank or down.shape != (sent, k) or up.shape != (d, sent):
            raise MergeError(
                f'pair "{pair.down}", "{pair.up}": expected shapes [r, {k}] and [{d}, r] with one '
                f"r from 1 to {rank}, found {list(down.shape)} and {list(up.shape)}"
            )
        if sent < rank:
            rows, columns = 0.0 - current[pair.down], 0.0 - current[pair.up]
            rows[:sent], columns[:, :sent] = down, up
            # Exact: each value comes from a tensor of this very type.
            whole[pair.down], whole[pair.up] = rows.astype(down.dtype), columns.astype(up.dtype)
    return whole


def client_factors(
    pair: FactorPair, current: Mapping[str, np.ndarray], update: Tensors
) -> tuple[np.ndarray, np.ndarray]:
    """A client's own B [d, q] and A [q, k], new float64 arrays, from an update of its own rank."""
    rank = update[pair.down].shape[0]
    up = current[pair.up][:, :rank] + update[pair.up]
    return up, current[pair.down][:rank] + update[pair.down]


def init_products(spec: ParamSpec, pairs: tuple[FactorPair, ...], current: Tensors) -> ProductState:
    """Empty sums. Raises: MergeError if pairs or current tensors do not fit the spec."""
    mean = MEAN.init(spec)
    factors = current_factors(spec, pairs, current)
    shapes = [(spec[pair.up].shape[0], spec[pair.down].shape[1]) for pair in pairs]
    return ProductState(
        mean=mean, current=factors, products=tuple(ProductSum(shape=shape) for shape in shapes)
    )


def add_products(
    pairs: tuple[FactorPair, ...],
    state: ProductState,
    update: Tensors,
    weight: float,
    *,
    mixed_ranks: bool,
) -> ProductState:
    """The state with one update more. Raises: MergeError."""
    whole = update
    if mixed_ranks:
        whole = padded(state.mean.spec, pairs, state.current, update)
    mean = MEAN.add(state.mean, whole, weight)
    sums = []
    for pair, before in zip(pairs, state.products, strict=True):
        up, down = client_factors(pair, state.current, update)
        require_product(pair, up, down)
        sums.append(before.plus(up, down, float(weight)))
    return ProductState(mean=mean, current=state.current, products=tuple(sums))


def mean_delta(state: MeanState) -> dict[str, np.ndarray]:
    """The plain mean of the updates. Raises: MergeError if nothing was added."""
    return dict(MEAN.finish(state).delta)


def product_norm(up: np.ndarray, down: np.ndarray) -> float:
    """‖B A‖_F from the Gram matrices of both, in O((d + k) q²): ‖BA‖² = Σ (BᵀB) ∘ (A Aᵀ)."""
    return math.sqrt(max(0.0, float(np.sum((up.T @ up) * (down @ down.T)))))


def require_product(pair: FactorPair, up: np.ndarray, down: np.ndarray) -> None:
    """Raises: MergeError for a product s·B·A beyond float32, of which no mean could be sent: so it
    is the one client's that is refused, not the round."""
    norm = pair.scale * product_norm(up, down)
    if not norm <= _LARGEST:
        raise MergeError(
            f'pair "{pair.down}", "{pair.up}": expected a product within float32, '
            f"found one of norm {norm:g}"
        )


def truncated(
    left: np.ndarray, right: np.ndarray | None, rank: int, *, balanced: bool = False
) -> Truncated:
    """The best factors of `rank` for left @ right, from a QR of either and an SVD of the small
    core R_left R_rightᵀ; the product [d, k] is not formed. Without `right`, an SVD of `left`.

    `up` is U S and `down` Vᵀ; U √S and √S Vᵀ if `balanced`. In each column of U the value that is
    largest in size is positive, so that signs do not depend on the library. Singular values that
    are rounding errors count as zero. Raises: MergeError if the decomposition fails.
    """
    try:
        if right is None:
            U, S, Vt = np.linalg.svd(left, full_matrices=False)
        else:
            Q_left, R_left = np.linalg.qr(left)
            Q_right, R_right = np.linalg.qr(right.T)
            U, S, Vt = np.linalg.svd(R_left @ R_right.T, full_matrices=False)
            U, Vt = Q_left @ U, Vt @ Q_right.T
    except np.linalg.LinAlgError as failure:
        raise MergeError(f"expected a product that can be decomposed: {failure}") from None
    d, k = U.shape[0], Vt.shape[1]
    signs = np.copysign(1.0, U[np.abs(U).argmax(axis=0), np.arange(U.shape[1])])
    kept = int(np.sum(S[:rank] > S[0] * max(d, k) * np.finfo(np.float64).eps))
    up, down = np.zeros((d, rank)), np.zeros((rank, k))
    root = np.sqrt(S[:kept]) if balanced else S[:kept]
    up[:, :kept] = U[:, :kept] * (signs[:kept] * root)
    down[:kept] = (signs[:kept] * (root if balanced else 1.0))[:, None] * Vt[:kept]
    norm = float(np.linalg.norm(S))
    error = float(np.linalg.norm(S[rank:])) / norm if norm > 0 else 0.0
    return Truncated(up, down, kept, error)


def dense_is_smaller(shape: tuple[int, int], rank: int) -> bool:
    """A matrix [d, k] takes fewer values than its factors of this rank."""
    return rank * sum(shape) > math.prod(shape)


def base_change(pair: FactorPair, factors: Factors) -> BaseChange:
    """s · left @ right in the smaller of its forms. Raises: MergeError beyond float32's range."""
    left, right = factors
    if right is not None and dense_is_smaller((left.shape[0], right.shape[1]), left.shape[1]):
        left, right = factors.product(), None
    if right is None:
        return BaseChange(left=rounded(pair.down, pair.scale * left, "float32"), right=None)
    return BaseChange(
        left=rounded(pair.down, left, "float32"),
        right=rounded(pair.down, pair.scale * right, "float32"),
    )


def rounded(name: str, values: np.ndarray, dtype: str) -> np.ndarray:
    """In another float type. Raises: MergeError where that cannot hold a value."""
    with np.errstate(over="ignore"):  # refused by name, just below
        array = values.astype(dtype)
    if not np.isfinite(array).all():
        raise MergeError(f'tensor "{name}": expected a finite merged change, found none')
    return array
