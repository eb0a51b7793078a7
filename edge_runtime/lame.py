# SPDX-License-Identifier: Apache-2.0
"""LAME: correct a batch's probabilities by its own likenesses, without a gradient.

Source: Boudiaf et al., CVPR 2022, arXiv 2201.05718, "Parameter-free online test-time adaptation":
Laplacian adjusted maximum-likelihood estimation. Of the model's probabilities q_i and affinities
w_ij it minimises, over distributions z_i,

    sum_i KL(z_i || q_i) - sum_ij w_ij z_i^T z_j

by repeating z_i <- softmax(log q_i + sum_j w_ij z_j), all i at once, until z stays; the sum counts
each pair once. w_ij is 1 where j is one of the nearest neighbours of i by the cosine of their
features, else 0.

Differs from source: w is made symmetric by (w + w^T) / 2, which the source offers and which leaves
the objective as it is; steps end by the change of z instead of the change of the objective.
"""

from __future__ import annotations

from typing import Final

import numpy as np

from edge_runtime.errors import DataError

NEIGHBOURS: Final = 5
MOST_STEPS: Final = 100
CHANGE: Final = 1e-6
"""Steps end where no value of z moves by more."""
SMALLEST: Final = 1e-10  # added to probabilities before their logarithm, as the source does
_BLOCK: Final = 1 << 22  # similarities held at once, about 32 MiB


def corrected(
    probabilities: np.ndarray, features: np.ndarray, *, neighbours: int = NEIGHBOURS
) -> np.ndarray:
    """The z of the module's docstring. *Shapes* q [n, classes], features [n, d] -> [n, classes].

    A batch of one stays as it is: it has no neighbours.

    *Returns* float32, rows add up to 1. *Raises* DataError for shapes that do not fit, or values
    that are not finite. *Cost* n^2 d for the neighbours, n * (neighbours + classes) a step.
    """
    if probabilities.ndim != 2 or features.ndim != 2 or len(probabilities) != len(features):
        raise DataError(
            "LAME: expected probabilities [n, classes] and features [n, values] of the same "
            f"samples, found {list(probabilities.shape)} and {list(features.shape)}"
        )
    if neighbours < 1:
        raise DataError(f"LAME: expected 1 neighbour or more, found {neighbours}")
    if not (np.isfinite(probabilities).all() and np.isfinite(features).all()):
        raise DataError("LAME: expected finite values, found NaN or infinity")
    near = nearest(features.astype(np.float64), min(neighbours, len(features) - 1))
    unary = np.log(probabilities.astype(np.float64) + SMALLEST)
    z = softmax(unary)
    for _ in range(MOST_STEPS):
        new = softmax(unary + _affine(z, near))
        change = np.abs(new - z).max()
        z = new
        if change <= CHANGE:
            break
    return z.astype(np.float32)


def nearest(features: np.ndarray, count: int) -> np.ndarray:
    """Of every row the `count` others with the largest cosine, int64 [n, count].

    Of equal ones the first count.
    """
    norms = np.linalg.norm(features, axis=1, keepdims=True)
    unit = features / np.maximum(norms, 1e-12)
    found = np.empty((len(unit), count), np.int64)
    rows = max(1, _BLOCK // len(unit))
    for start in range(0, len(unit), rows):
        cosines = unit[start : start + rows] @ unit.T
        own = np.arange(len(cosines))
        cosines[own, start + own] = -np.inf
        found[start : start + rows] = np.argsort(-cosines, axis=1, kind="stable")[:, :count]
    return found


def _affine(z: np.ndarray, near: np.ndarray) -> np.ndarray:
    """sum_j w_ij z_j with the symmetric w of `near`."""
    total = z[near].sum(axis=1)
    for column in near.T:
        np.add.at(total, column, z)
    return total / 2


def softmax(values: np.ndarray) -> np.ndarray:
    """Of every row: [n, classes] -> [n, classes], in the type of `values`."""
    powers = np.exp(values - values.max(axis=1, keepdims=True))
    normal: np.ndarray = powers / powers.sum(axis=1, keepdims=True)
    return normal
