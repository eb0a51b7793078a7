# SPDX-License-Identifier: Apache-2.0
"""How far updates lie from one another, for rules that compare them in pairs.

*Cost* n² products of `size` values, as matrix products over blocks of columns in float64; memory
n² values and one block.
"""

from __future__ import annotations

import numpy as np

from aggregation.stack import Stack


def inner_products(rows: Stack) -> np.ndarray:
    """⟨xᵢ, xⱼ⟩ of all rows, float64 [n, n]."""
    products = np.zeros((len(rows), len(rows)))
    for _, block in rows.column_blocks():
        wide = block.astype(np.float64)
        products += wide @ wide.T
    return products


def squared_distances(rows: Stack) -> np.ndarray:
    """‖xᵢ - xⱼ‖² of all rows, float64 [n, n], never below 0, and 0 on the diagonal.

    From inner products, so that rows closer than 10⁻⁸ of their norms have no reliable distance.
    """
    products = inner_products(rows)
    squares = np.diag(products)
    distances = np.maximum(squares[:, None] + squares[None, :] - 2 * products, 0)
    np.fill_diagonal(distances, 0)
    return distances


def squared_norm(vector: np.ndarray) -> float:
    """‖x‖², in float64."""
    wide = vector.astype(np.float64, copy=False)
    return float(wide @ wide)
