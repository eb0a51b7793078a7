# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from edge_runtime import TrainingError
from edge_runtime.session import open_session
from edge_runtime.trainer import initial_state
from edge_runtime.training_loop import TrainingLoop, batch_of


def steps_of(made: Any, count: int) -> list[dict[str, np.ndarray]]:
    names = [name for name, _ in made.bundle.manifest.inputs]
    data = made.data(4 * count)
    weight = np.ones(4, np.float32)
    return [
        {**batch_of(data, names, np.arange(4 * n, 4 * n + 4)), "weight": weight}
        for n in range(count)
    ]


def test_loop_carries_tensors_and_momentum_from_step_to_step(
    make_bundle: Callable[..., Any],
) -> None:
    made = make_bundle("head")
    loop = TrainingLoop(made.bundle.path("train"), threads=1)
    state = initial_state(made.bundle.manifest, made.start())
    start, steps = made.start(), steps_of(made, 3)
    together, losses, _ = loop.run(start, state, steps, 0.1)
    assert losses.shape == (3,) and losses.dtype == np.float32
    # The oracle: velocity = 0.9 velocity + gradient, by three runs of one step from zero momentum,
    # each of which shows its gradient.
    tensors = start
    velocity = {name: np.zeros_like(value) for name, value in start.items()}
    for step in steps:
        alone, _, _ = loop.run(tensors, state, [step], 1.0)
        gradient = {name: tensors[name] - alone[name] for name in tensors}
        velocity = {name: 0.9 * velocity[name] + gradient[name] for name in tensors}
        tensors = {name: tensors[name] - np.float32(0.1) * velocity[name] for name in tensors}
    for name, value in together.items():
        np.testing.assert_allclose(value, tensors[name], rtol=0, atol=1e-6)


def test_run_changes_no_argument_and_gives_arrays_of_its_own(
    make_bundle: Callable[..., Any],
) -> None:
    made = make_bundle("head")
    loop = TrainingLoop(made.bundle.path("train"), threads=1)
    start, steps = made.start(), steps_of(made, 2)
    state = initial_state(made.bundle.manifest, made.start())
    before = {name: value.copy() for name, value in (start | state | steps[0]).items()}
    first, _, _ = loop.run(start, state, steps, 0.1)
    kept = {name: value.copy() for name, value in first.items()}
    loop.run(start, state, steps_of(made, 3), 0.3)
    for name, value in (start | state | steps[0]).items():
        assert value.tobytes() == before[name].tobytes()
    for name, value in first.items():
        assert value.tobytes() == kept[name].tobytes(), "a later run wrote into an earlier result"
        assert value.flags.writeable


def test_no_steps_give_the_tensors_back(make_bundle: Callable[..., Any]) -> None:
    made = make_bundle("head")
    trained, losses, _ = TrainingLoop(made.bundle.path("train"), threads=1).run(
        made.start(), initial_state(made.bundle.manifest, made.start()), [], 0.1
    )
    assert losses.shape == (0,)
    for name, value in made.start().items():
        assert trained[name].tobytes() == value.tobytes()


def test_arrays_that_are_not_contiguous_count_by_their_values(
    make_bundle: Callable[..., Any],
) -> None:
    made = make_bundle("head")
    loop = TrainingLoop(made.bundle.path("train"), threads=1)
    state, (step,) = initial_state(made.bundle.manifest, made.start()), steps_of(made, 1)
    start = made.start()
    strided = {name: np.asfortranarray(value) for name, value in start.items()}
    flipped = {name: np.ascontiguousarray(value[::-1])[::-1] for name, value in step.items()}
    expected, _, _ = loop.run(start, state, [step], 0.1)
    found, _, _ = loop.run(strided, state, [flipped], 0.1)
    for name, value in expected.items():
        assert found[name].tobytes() == value.tobytes()


def test_graph_that_does_not_train_is_refused(make_bundle: Callable[..., Any]) -> None:
    made = make_bundle("head")
    with pytest.raises(TrainingError, match=r"evaluate\.onnx: expected a training graph"):
        TrainingLoop(made.bundle.path("evaluate"), threads=1)


def test_graph_that_is_cut_off_is_refused_by_name(
    make_bundle: Callable[..., Any], tmp_path: Path
) -> None:
    made = make_bundle("head")
    shutil.copytree(made.bundle.folder, tmp_path / "b")
    path = tmp_path / "b" / "train.onnx"
    path.write_bytes(path.read_bytes()[:-200])
    with pytest.raises(TrainingError, match=r"train\.onnx: onnxruntime .* cannot load the graph"):
        open_session(path, 1)


def test_batch_has_the_chosen_rows_by_port_name() -> None:
    data = {"x": np.arange(6).reshape(3, 2), "y": np.arange(3), "labels": np.array([5, 6, 7])}
    batch = batch_of(data, ["x"], np.array([2, 0, 0]))
    assert set(batch) == {"batch/x", "labels"}
    assert batch["batch/x"].tolist() == [[4, 5], [0, 1], [0, 1]]
    assert batch["labels"].tolist() == [7, 5, 5]
