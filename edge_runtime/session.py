# SPDX-License-Identifier: Apache-2.0
"""A graph in onnxruntime, with its frozen weights as the file beside it has them, or moved."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Final

import numpy as np

from edge_runtime.errors import TrainingError
from protocol.files import BACKBONE_FILE
from protocol.tensors import NOTHING, Tensors

if TYPE_CHECKING:
    from onnxruntime import InferenceSession

SPIN_MICROSECONDS: Final = "20"

_FROZEN: Final = "frozen/"  # before a weight's name in a graph


class MovableGraph:
    """A graph whose frozen weights may move between runs; the session is kept while they do not.

    `offset` is what is added to frozen weights, by their names: float32, each of its weight's
    shape. One thread a core where `threads` is 0.
    """

    def __init__(self, path: Path, *, threads: int = 0) -> None:
        self._path = path
        self._threads = threads
        self._offset: Mapping[str, np.ndarray] = NOTHING
        self._session: InferenceSession | None = None

    def at(self, offset: Tensors) -> InferenceSession:
        """The session with weights moved so. Raises: TrainingError."""
        if self._session is None or not same(offset, self._offset):
            self._session = open_session(self._path, self._threads, offset)
            self._offset = dict(offset)
        return self._session


def open_session(path: Path, threads: int, offset: Tensors = NOTHING) -> InferenceSession:
    """An onnxruntime session on the CPU; `threads` and `offset` as in `MovableGraph`.

    Raises:
        TrainingError: the graph cannot be loaded by the installed onnxruntime, or the offset is of
            weights that it does not have.
    """
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    options.inter_op_num_threads = 1
    # Waiting threads spin for as long as the gaps between operations are, and then sleep. On two
    # cores a step of the small ViT took 6.1 ms so, 7.9 where they sleep at once; with one core
    # taken by other work 8.6, and 10.8 where they spin without end. A battery lasts longer, too.
    options.add_session_config_entry("session.intra_op.spin_duration_us", SPIN_MICROSECONDS)
    # Warnings about weights that a graph does not fuse are nothing a device can act on.
    options.log_severity_level = 3
    if offset:
        # Put in before the graph is optimised, so that nothing is made of the weights in the file.
        weights = _moved_weights(path.parent / BACKBONE_FILE, offset)
        values = [onnxruntime.OrtValue.ortvalue_from_numpy(value) for value in weights.values()]
        options.add_external_initializers([_FROZEN + name for name in weights], values)
    try:
        return onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    except Exception as fault:
        # onnxruntime's own exceptions have no common base that it exports.
        raise TrainingError(
            f"{path.name}: onnxruntime {onnxruntime.__version__} cannot load the graph: {fault}"
        ) from fault


def _moved_weights(path: Path, offset: Tensors) -> dict[str, np.ndarray]:
    from safetensors import SafetensorError, safe_open

    weights = {}
    try:
        with safe_open(path, framework="numpy") as file:
            for name in offset:
                weights[name] = file.get_tensor(name)
    except (OSError, SafetensorError) as error:
        raise TrainingError(
            f"offset of frozen weights: {path.name} does not have them: {error}"
        ) from error
    for name, change in offset.items():
        if change.shape != weights[name].shape or change.dtype != weights[name].dtype:
            raise TrainingError(
                f'offset of frozen weight "{name}": expected {weights[name].dtype} '
                f"{list(weights[name].shape)}, found {change.dtype} {list(change.shape)}"
            )
    return {name: weight + offset[name] for name, weight in weights.items()}


def same(some: Tensors, other: Tensors) -> bool:
    """The same names and values."""
    return some.keys() == other.keys() and all(
        value is other[name] or np.array_equal(value, other[name]) for name, value in some.items()
    )
