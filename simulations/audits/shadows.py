# SPDX-License-Identifier: Apache-2.0
"""Adapters trained on known images, for an attacker to learn from: federated averaging by hand.

Clients, rounds and passes are few enough to train many adapters; each starts from the same tensors,
and its images, their order and its noise are decided by its seed.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from edge_runtime import preprocess
from edge_runtime.trainer import OnnxTrainer
from protocol.tensors import Tensors
from simulations.datasets import Dataset
from simulations.errors import DataError


@dataclass(frozen=True, slots=True, kw_only=True)
class Trained:
    """How an adapter comes to be: federated averaging over some clients."""

    name: str
    pool: int  # images; half of them are trained on
    clients: int
    rounds: int
    local_epochs: int

    @property
    def fewest(self) -> int:
        """Images of the smallest client."""
        return self.pool // 2 // self.clients


Combine = Callable[[Tensors, Sequence[Tensors], Sequence[int], str], Mapping[str, np.ndarray]]
"""From a round's start, what clients made of it, their numbers of samples and a name of the round
that no other has: the start of the next."""


def averaged(
    start: Tensors, results: Sequence[Tensors], samples: Sequence[int], use: str
) -> Mapping[str, np.ndarray]:
    """The mean, weighted by samples."""
    return {
        name: np.average([one[name] for one in results], axis=0, weights=samples).astype(np.float32)
        for name in start
    }


class Shadow:
    """Trains adapters from the same start by the compiled step, and asks them about the pool."""

    def __init__(
        self,
        trainer: OnnxTrainer,
        dataset: Dataset,
        trained: Trained,
        *,
        learning_rate: float,
        combine: Combine = averaged,
    ) -> None:
        available = len(dataset.train["labels"])
        if available < trained.pool:
            raise DataError(
                f"{dataset.name}: expected {trained.pool} images to train on, found {available}"
            )
        preprocessing = trainer.bundle.manifest.preprocessing
        self._trainer = trainer
        self._trained = trained
        self._rate = learning_rate
        self._combine = combine
        self._start = dict(trainer.bundle.initial())
        pool = {name: array[: trained.pool] for name, array in dataset.train.items()}
        self._data = preprocess(preprocessing, pool)
        self._test = preprocess(preprocessing, dict(dataset.test))

    def accuracy(self, tensors: Tensors) -> float:
        """Of an adapter, on the test part."""
        return float(self._trainer.evaluate(tensors, self._test)["accuracy"])

    def entropies(self, tensors: Tensors) -> np.ndarray:
        """Cross-entropies of all images of the pool [pool]."""
        return self._trainer.evaluate_samples(tensors, self._data)[0]

    def train(self, members: np.ndarray, *, seed: int) -> Mapping[str, np.ndarray]:
        """An adapter of the images that bool [pool] `members` names."""
        rng = np.random.default_rng(seed)
        parts = np.array_split(rng.permutation(np.flatnonzero(members)), self._trained.clients)
        tensors: Mapping[str, np.ndarray] = self._start
        for number in range(self._trained.rounds):
            results = [
                self._trainer.fit(
                    tensors,
                    {name: array[part] for name, array in self._data.items()},
                    learning_rate=self._rate,
                    epochs=self._trained.local_epochs,
                    seed=int(rng.integers(2**31)),
                )[0]
                for part in parts
            ]
            counts = [len(part) for part in parts]
            tensors = self._combine(tensors, results, counts, f"{seed}/{number}")
        return tensors
