# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

from types import SimpleNamespace

import torch
from torch import nn

from tuning.flops import step_flops
from tuning.methods import Tuned


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
