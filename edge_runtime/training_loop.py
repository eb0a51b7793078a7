# SPDX-License-Identifier: Apache-2.0
"""Run a compiled training step again and again, with every tensor kept in the runtime.

The same loop trains one client on a device and, with a leading client axis on every tensor, a
whole cohort in the simulator: the graph decides which.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Final

import numpy as np

from edge_runtime.errors import TrainingError
from edge_runtime.session import MovableGraph
from protocol.manifest import TALLY
from protocol.tensors import NOTHING, Tensors

_TALLY: Final = f"state/{TALLY}"


class TrainingLoop:
    """A training graph and the names of its ports.

    Inputs `trainable/...`, `state/...`, `batch/...`, `labels`, `weight`, `learning_rate`, and of a
    private step `noise`, `applies` and `trained`; outputs `new/trainable/...`, `new/state/...`,
    `loss`.
    """

    def __init__(self, path: Path, *, threads: int = 0) -> None:
        self._graph = MovableGraph(path, threads=threads)
        session = self._graph.at(NOTHING)
        ports = {port.name: port.shape for port in session.get_inputs()}
        self._inputs = set(ports)
        # Trainable values of one client; 0 where steps are not private and do not ask.
        (self._values,) = ports.get("trained", (0,))
        self._outputs = [port.name for port in session.get_outputs()]
        self._carried = [name.removeprefix("new/") for name in self._outputs[:-1]]
        if self._outputs[-1:] != ["loss"]:
            raise TrainingError(
                f"{path.name}: expected a training graph, whose last output is loss"
            )

    def run(
        self,
        trainable: Tensors,
        state: Tensors,
        steps: Iterable[Mapping[str, np.ndarray]],
        learning_rate: float,
        *,
        frozen: Collection[str] = (),
        offset: Tensors = NOTHING,
    ) -> tuple[dict[str, np.ndarray], np.ndarray, dict[str, np.ndarray]]:
        """Train over `steps`, each a mapping of `batch/...`, `labels` and `weight`, and where they
        are private of `noise` and `applies`.

        Tensors named in `frozen` stay as they are: each step starts from them again. `offset` moves
        the weights that are never trained, as in `MovableGraph`.

        Returns:
            The trained tensors; the losses before each step, float32 [steps], or [steps, clients]
            for a cohort; and what the steps counted, by name.
        """
        from onnxruntime import OrtValue

        def owned(array: np.ndarray) -> Any:
            return OrtValue.ortvalue_from_numpy(np.ascontiguousarray(array))

        feeds = {f"trainable/{name}": owned(value) for name, value in trainable.items()}
        feeds |= {f"state/{name}": owned(value) for name, value in state.items()}
        if "learning_rate" in self._inputs:
            feeds["learning_rate"] = owned(np.array(learning_rate, np.float32))
        if self._values:
            feeds["trained"] = owned(_counted(trainable, frozen, self._values))
        held = {f"trainable/{name}" for name in frozen}
        session = self._graph.at(offset)
        losses = []
        for step in steps:
            feeds |= {name: owned(value) for name, value in step.items() if name in self._inputs}
            answers = session.run_with_ort_values(self._outputs, feeds)
            carried = zip(self._carried, answers, strict=False)
            feeds |= {name: answer for name, answer in carried if name not in held}
            losses.append(answers[-1].numpy())
        trained = {name: np.array(feeds[f"trainable/{name}"].numpy()) for name in trainable}
        tallies = {
            name.removeprefix(_TALLY): np.array(feeds[name].numpy())
            for name in feeds
            if name.startswith(_TALLY)
        }
        return trained, np.asarray(losses, dtype=np.float32), tallies


def _counted(trainable: Tensors, frozen: Collection[str], values: int) -> np.ndarray:
    """1 for the values of tensors that count in the norm of a sample's gradient, else 0: float32
    [values], by the tensors' sorted names."""
    clients = sum(value.size for value in trainable.values()) // values
    return np.concatenate(
        [
            np.full(trainable[name].size // clients, name not in frozen, np.float32)
            for name in sorted(trainable)
        ]
    )


def batch_of(
    data: Mapping[str, np.ndarray], names: Sequence[str], indices: np.ndarray
) -> dict[str, np.ndarray]:
    """The rows `indices` of the model inputs and labels, by their port names."""
    batch = {f"batch/{name}": data[name][indices] for name in names}
    return {**batch, "labels": data["labels"][indices]}
