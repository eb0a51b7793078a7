# SPDX-License-Identifier: Apache-2.0
"""A function and its way back as two graphs, beside torch's own gradients."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.func import vjp

from tuning import graphs
from tuning.graph_pair import KEPT, compile_pair

DRAWN = 0.5 * torch.randn(7, 3, generator=torch.Generator().manual_seed(0))
WEIGHT, HIDDEN, GRADIENT = DRAWN[:3], DRAWN[3:5], DRAWN[5:]


def two_layers(weight: torch.Tensor, entering: torch.Tensor) -> torch.Tensor:
    return torch.tanh(torch.exp(entering @ weight) @ weight.T)


def there_and_back(named: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    left, backward = vjp(lambda x: two_layers(named["frozen/weight"], x), named["hidden"])
    (entered,) = backward(named["gradient"])
    return {"left": left, "entered": entered}


def session(model: Any, path: Path) -> Any:
    import onnxruntime

    graphs.save_model(model, path)
    return onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])


def test_the_way_back_starts_from_what_the_way_there_kept(tmp_path: Path) -> None:
    keeping, backward = compile_pair(
        there_and_back,
        {"frozen/weight": WEIGHT, "hidden": torch.zeros(2, 3)},
        {"gradient": torch.zeros(2, 3)},
        there=("left",),
        back=("entered",),
    )
    first, second = session(keeping, tmp_path / "1.onnx"), session(backward, tmp_path / "2.onnx")
    given = {"frozen/weight": WEIGHT.numpy(), "hidden": HIDDEN.numpy()}
    names = [port.name for port in first.get_outputs()]
    found = dict(zip(names, first.run(names, given), strict=True))
    # The exponential and the tangent, from which their derivatives are made; neither the product
    # nor the weight's transpose.
    assert sorted(found) == ["kept/0", "kept/1", "left"]

    values = {**given, **found, "gradient": GRADIENT.numpy()}
    taken = {port.name: values[port.name] for port in second.get_inputs()}
    assert "hidden" not in taken and {n for n in taken if n.startswith(KEPT)} == {
        "kept/0",
        "kept/1",
    }
    (entered,) = second.run(["entered"], taken)

    hidden = HIDDEN.clone().requires_grad_()
    left = two_layers(WEIGHT, hidden)
    (expected,) = torch.autograd.grad(left, hidden, GRADIENT)
    np.testing.assert_allclose(found["left"], left.detach().numpy(), rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(entered, expected.numpy(), rtol=1e-5, atol=1e-6)
