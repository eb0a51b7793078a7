# SPDX-License-Identifier: Apache-2.0
"""Which samples go into which step.

A compiled step has one fixed batch shape, so a ragged last batch is filled up with sample 0 at
weight 0: a loss weighted by these weights is exact.
"""

from __future__ import annotations

import numpy as np

from edge_runtime.errors import DataError


def batch_plan(
    samples: int, batch_size: int, epochs: int, rng: np.random.Generator, *, most_steps: int = 0
) -> tuple[np.ndarray, np.ndarray]:
    """Training order: every epoch is a fresh permutation of all samples.

    *Shapes* indices int64 `[steps, batch]`, weights float32 `[steps, batch]` of 1 and 0, with
    `steps = epochs · ⌈samples / batch⌉`, cut to `most_steps` where that is above 0. No step mixes
    two epochs.
    """
    _require_positive("epochs", epochs)
    indices, weights = evaluation_plan(samples, batch_size)
    steps = len(indices)
    order = np.zeros((epochs, steps * batch_size), np.int64)
    for epoch in range(epochs):
        order[epoch, :samples] = rng.permutation(samples)
    kept = slice(most_steps or None)
    return order.reshape(epochs * steps, batch_size)[kept], np.tile(weights, (epochs, 1))[kept]


def step_count(samples: int, batch_size: int, epochs: int, *, most_steps: int = 0) -> int:
    """How many steps `batch_plan` has for the same arguments."""
    steps = epochs * -(-samples // batch_size)
    return min(steps, most_steps) if most_steps else steps


def evaluation_plan(samples: int, batch_size: int) -> tuple[np.ndarray, np.ndarray]:
    """All samples once, in their order. *Shapes* as those of `batch_plan`, for one epoch."""
    _require_positive("samples", samples)
    _require_positive("batch_size", batch_size)
    steps = -(-samples // batch_size)
    indices = np.arange(steps * batch_size, dtype=np.int64)
    weights = (indices < samples).astype(np.float32)
    indices[samples:] = 0
    return indices.reshape(steps, batch_size), weights.reshape(steps, batch_size)


def _require_positive(field: str, value: int) -> None:
    if value < 1:
        raise DataError(f"{field}: expected 1 or more, found {value}")
