# SPDX-License-Identifier: Apache-2.0
"""Which samples go into which step of private training, and the noise on each step.

Every step draws each sample with probability q = batch size / samples, independently of all others
and of earlier steps: Poisson sampling, exactly what is accounted for (Abadi et al. 2016, CCS, arXiv
1607.00133, whose batches are "lots" of this kind). A draw has any size from 0 to all samples, and a
compiled step one batch shape; so the draw is cut into as many calls as it fills, one at least. All
add to one sum, to which the last adds the noise (`tuning.private_step`). Nothing is truncated, and
nothing of it has to be added to delta.

q is rounded down to a multiple of 2^-64. An epoch has no meaning here: some samples of n are drawn
more often than others in n / batch steps.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from edge_runtime.errors import DataError
from edge_runtime.keystream import Keystream
from edge_runtime.training_loop import batch_of

if TYPE_CHECKING:
    from collections.abc import Sequence

    from protocol.manifest import TrainingSpec


@dataclass(frozen=True, slots=True, kw_only=True)
class PrivateBatches:
    """The calls of one client's round. Noise is drawn as it is asked for, call after call."""

    indices: np.ndarray
    """int64 [calls, batch]; sample 0 fills up."""
    weights: np.ndarray
    """float32 [calls, batch]: 1 for a sample that was drawn, 0 for one that fills up."""
    applies: np.ndarray
    """float32 [calls]: 1 for the last call of a step."""
    stream: Keystream

    def noise(self, call: int, values: int) -> np.ndarray:
        """Standard normal values for a call that applies, zeros for another, float32 [values].

        To be asked for once a call, in their order.
        """
        if self.applies[call]:
            return self.stream.normals(values)
        return np.zeros(values, np.float32)

    def calls(
        self, data: Mapping[str, np.ndarray], names: Sequence[str], values: int
    ) -> Iterator[dict[str, np.ndarray]]:
        """What a training graph of so many trainable values reads at each call, by port names."""
        for call, rows in enumerate(self.indices):
            yield {
                **batch_of(data, names, rows),
                "weight": self.weights[call],
                "applies": self.applies[call],
                "noise": self.noise(call, values),
            }


def private_batches(samples: int, training: TrainingSpec, stream: Keystream) -> PrivateBatches:
    """The draws of one round of the steps that `training.privacy` says.

    Raises: DataError for fewer samples than were accounted for.
    """
    privacy, batch = training.privacy, training.batch_size
    if privacy is None:
        raise ValueError("training: expected one with a privacy setting")
    if samples < privacy.fewest_samples:
        raise DataError(
            f"expected at least {privacy.fewest_samples} samples, as the privacy of this job was "
            f"accounted for, found {samples}: each would be drawn too often"
        )
    rows, weights, applies = [], [], []
    for drawn in poisson_draws(samples, batch, privacy.steps, stream):
        calls = max(-(-len(drawn) // batch), 1)
        filled = np.zeros(calls * batch, np.int64)
        filled[: len(drawn)] = drawn
        rows.append(filled.reshape(calls, batch))
        counts = np.arange(calls * batch) < len(drawn)
        weights.append(counts.reshape(calls, batch).astype(np.float32))
        applies.append((np.arange(calls) == calls - 1).astype(np.float32))
    return PrivateBatches(
        indices=np.concatenate(rows),
        weights=np.concatenate(weights),
        applies=np.concatenate(applies),
        stream=stream,
    )


def poisson_draws(
    samples: int, expected: int, steps: int, stream: Keystream
) -> Iterator[np.ndarray]:
    """For each step the numbers of the samples drawn, each with probability `expected` /
    `samples`."""
    if not 0 < expected <= samples:
        raise ValueError(f"expected: expected 1 to {samples} samples a step, found {expected}")
    below = (expected << 64) // samples
    for _ in range(steps):
        words = stream.words(samples)
        # 2^64 is no word: all are below it.
        yield np.flatnonzero(words < np.uint64(below)) if below < 2**64 else np.arange(samples)
