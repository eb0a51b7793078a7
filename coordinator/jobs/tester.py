# SPDX-License-Identifier: Apache-2.0
"""How the coordinator tests a job's tensors on its own samples: as a device would, from the bundle.

Of a split network it has the body beside it, so that nothing crosses a network.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np

from coordinator.jobs.folder import JobFolder
from edge_runtime.bundle import Bundle
from edge_runtime.split_trainer import SplitTrainer
from edge_runtime.trainer import OnnxTrainer
from protocol.tensors import NOTHING, Tensors

if TYPE_CHECKING:
    from coordinator.split_session import Engine


class Tester(Protocol):
    """What tests."""

    def evaluate(
        self, tensors: Tensors, data: Mapping[str, np.ndarray], *, offset: Tensors = NOTHING
    ) -> Mapping[str, float]:
        """{"loss", "accuracy"}, each over all samples."""
        ...


def open_tester(folder: JobFolder, bundle: Bundle) -> Tester:
    """For a job's bundle; graphs are loaded when they are first needed."""
    if bundle.manifest.split is None:
        return OnnxTrainer(bundle)
    from coordinator.onnx_body import OnnxBody

    return SplitTrainer(bundle, BesideBody(OnnxBody(folder.body)))


class BesideBody:
    """A body in this process; see `edge_runtime.split_trainer.Body`."""

    def __init__(self, engine: Engine) -> None:
        self._engine = engine
        self._kept: Any = None

    def forward(self, hidden: np.ndarray, mask: np.ndarray | None, *, keep: bool) -> np.ndarray:
        """See `Body.forward`."""
        ((left, self._kept),) = self._engine.forward(
            [hidden], None if mask is None else [mask], keep=keep
        )
        return left

    def backward(self, gradient: np.ndarray) -> np.ndarray:
        """See `Body.backward`."""
        (entered,) = self._engine.backward([(self._kept, gradient)])
        return entered
