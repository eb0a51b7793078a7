# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn

from protocol.manifest import TrainingSpec
from tuning.backbones import load_backbone
from tuning.flop_formulas import ViTShape
from tuning.flops import device_flops, step_flops
from tuning.methods import Tuned, method_named


class TwoLayers(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Linear(6, 5, bias=False)
        self.classifier = nn.Linear(5, 3)

    def forward(self, x: torch.Tensor) -> SimpleNamespace:
        return SimpleNamespace(logits=self.classifier(torch.tanh(self.body(x))))


def flops_of(*trained: str) -> int:
    module = TwoLayers()
    for name, parameter in module.named_parameters():
        parameter.requires_grad_(name in trained)
    tuned = Tuned(module=module, trainable={name: name for name in trained})
    examples = {f"trainable/{name}": value for name, value in tuned.parameters().items()}
    batch = {"batch/x": torch.zeros(4, 6), "labels": torch.zeros(4, dtype=torch.int64)}
    return step_flops(tuned, examples | batch)


def test_head_alone_has_one_product_backward() -> None:
    forward = 2 * 4 * (6 * 5 + 5 * 3)
    assert flops_of("classifier.weight", "classifier.bias") == forward + 2 * 4 * 5 * 3


def test_whole_network_has_the_gradient_of_the_hidden_layer_too() -> None:
    forward = 2 * 4 * (6 * 5 + 5 * 3)
    backward = 2 * 4 * (5 * 3 + 5 * 3 + 6 * 5)
    assert flops_of("body.weight", "classifier.weight") == forward + backward


TINY = ViTShape(blocks=2, width=16, inner=32, patches=4, patch_values=16, classes=3, prompts=2)
SPEC = TrainingSpec(batch_size=1, optimizer="sgd", learning_rate=0.1)
PIXELS = {"pixel_values": torch.randn(1, 1, 8, 8, generator=torch.Generator().manual_seed(0))}
LABEL = torch.tensor([1])


def test_formula_of_full_fine_tuning_is_what_torch_counts(tiny_vit: Path) -> None:
    tuned = method_named("full", {}).attach(load_backbone(tiny_vit, classes=3, seed=0), seed=0)
    examples = {f"trainable/{name}": value for name, value in tuned.parameters().items()}
    examples |= {f"batch/{name}": value for name, value in PIXELS.items()}
    found = step_flops(tuned, {**examples, "labels": LABEL})
    bare = ViTShape(blocks=2, width=16, inner=32, patches=4, patch_values=16, classes=3)
    assert found == bare.full_step()


@pytest.mark.parametrize(("cut", "head", "tail"), [("faithful-minimal", 0, 0), ("1+0", 1, 0)])
def test_formulas_of_the_device_are_what_torch_counts(
    tiny_vit: Path, cut: str, head: int, tail: int
) -> None:
    backbone = load_backbone(tiny_vit, classes=3, seed=0)
    tuned = method_named("sfprompt", {"cut": cut, "length": 2}).attach(backbone, seed=0)
    examples = {f"trainable/{name}": value for name, value in tuned.parameters().items()}
    examples |= {f"batch/{name}": value for name, value in PIXELS.items()}
    examples |= {"labels": LABEL, "weight": torch.ones(1), "learning_rate": torch.tensor(0.1)}
    found = device_flops(tuned, SPEC, examples)
    assert found.through == TINY.split_step(head, tail)
    assert found.local == TINY.local_step(head, tail)
    assert found.scores == TINY.score(head, tail)


def test_the_graph_of_the_prompt_alone_has_no_product(make_split: Callable[..., Any]) -> None:
    import onnx

    made = make_split("faithful-minimal", optimizer="adamw")
    graph = onnx.load(made.bundle.path("prompt"), load_external_data=False).graph
    assert not {"MatMul", "Gemm"} & {node.op_type for node in graph.node}
