# SPDX-License-Identifier: Apache-2.0
"""Small functions as graphs: names, batches of any size, weights in other files."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from edge_runtime.session import open_session
from tuning import graphs
from tuning.errors import CompileError

Named = dict[str, torch.Tensor]


def test_weights_stay_in_their_file_and_names_on_the_ports(tmp_path: Path) -> None:
    weight = torch.randn(3, 2)
    save_file({"w": weight, "unused": torch.zeros(9)}, tmp_path / "weights.safetensors")
    model = graphs.compile_graph(
        lambda named: {"out": named["x"] @ named["frozen/w"]},
        {"x": torch.zeros(2, 3), "frozen/w": weight, "frozen/unused": torch.zeros(9)},
        ("out",),
        has_gradients=False,
        any_batch=("x",),
    )
    assert graphs.frozen_inputs(model) == ["w"], "what has no effect is no input"
    graphs.refer_to_weights(model, graphs.stored_tensors(tmp_path / "weights.safetensors"))
    graphs.save_model(model, tmp_path / "g.onnx")
    session = open_session(tmp_path / "g.onnx", 1)
    assert [port.name for port in session.get_inputs()] == ["x"]
    for rows in (1, 2, 5):
        x = np.random.default_rng(rows).standard_normal((rows, 3), np.float32)
        (found,) = session.run(["out"], {"x": x})
        np.testing.assert_allclose(found, x @ weight.numpy(), rtol=0, atol=1e-6)
    # Another weight in the file is another weight of the graph.
    save_file({"w": 2 * weight, "unused": torch.zeros(9)}, tmp_path / "weights.safetensors")
    (doubled,) = open_session(tmp_path / "g.onnx", 1).run(["out"], {"x": x})
    np.testing.assert_allclose(doubled, 2 * found, rtol=0, atol=1e-5)


def test_outputs_that_are_inputs_or_twice_the_same_keep_their_names(tmp_path: Path) -> None:
    def function(named: Named) -> Named:
        total = named["a"] + named["b"]
        return {"same": named["a"], "one": total, "two": total}

    model = graphs.compile_graph(
        function,
        {"a": torch.zeros(3), "b": torch.zeros(3)},
        ("same", "one", "two"),
        has_gradients=False,
    )
    graphs.save_model(model, tmp_path / "g.onnx")
    session = open_session(tmp_path / "g.onnx", 1)
    assert [port.name for port in session.get_outputs()] == ["same", "one", "two"]
    a, b = np.arange(3, dtype=np.float32), np.ones(3, np.float32)
    same, one, two = session.run(["same", "one", "two"], {"a": a, "b": b})
    assert same.tolist() == [0, 1, 2] and one.tolist() == two.tolist() == [1, 2, 3]


def test_gradient_is_part_of_the_graph(tmp_path: Path) -> None:
    def function(named: Named) -> Named:
        gradient = torch.func.grad(lambda x: (x**3).sum() * named["k"])(named["x"])
        return {"gradient": gradient}

    model = graphs.compile_graph(
        function, {"x": torch.zeros(4), "k": torch.tensor(1.0)}, ("gradient",), has_gradients=True
    )
    graphs.save_model(model, tmp_path / "g.onnx")
    x = np.array([1, 2, -3, 0.5], np.float32)
    (found,) = open_session(tmp_path / "g.onnx", 1).run(
        ["gradient"], {"x": x, "k": np.array(2.0, np.float32)}
    )
    np.testing.assert_allclose(found, 6 * x**2, rtol=1e-6)


def test_operation_without_a_plain_form_is_an_error_in_one_line() -> None:
    with pytest.raises(CompileError, match="cannot be written as a plain ONNX graph") as caught:
        graphs.compile_graph(
            lambda named: {"out": torch.linalg.eigvals(named["x"]).real},
            {"x": torch.eye(3)},
            ("out",),
            has_gradients=False,
        )
    assert "\n" not in str(caught.value)


def test_places_of_stored_tensors_are_those_of_their_bytes(tmp_path: Path) -> None:
    path = tmp_path / "w.safetensors"
    save_file({"a": torch.arange(3.0), "b": torch.ones(2, 2, dtype=torch.int64)}, path)
    raw = path.read_bytes()
    for name, place in graphs.stored_tensors(path).items():
        tensor = load_file(path)[name]
        assert raw[place.offset : place.offset + place.length] == tensor.numpy().tobytes()
        assert (place.file, place.shape) == ("w.safetensors", tuple(tensor.shape))
