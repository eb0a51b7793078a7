# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoModelForSequenceClassification

from coordinator.sections import BackboneSection
from edge_runtime.adapter import Adapter
from edge_runtime.predictor import Predictor
from edge_runtime.preprocessing import MASKED
from tuning import graphs
from tuning.backbones import load_backbone
from tuning.backbones.decoder import DecoderClassifier, PlainSiLU


def test_scores_are_those_of_the_model_with_its_own_masks(tiny_llama: Path) -> None:
    backbone = load_backbone(tiny_llama, classes=3, seed=0, max_length=6)
    assert isinstance(backbone.model, DecoderClassifier)
    whole = AutoModelForSequenceClassification.from_pretrained(
        tiny_llama, num_labels=3, ignore_mismatched_sizes=True, attn_implementation="eager"
    ).eval()
    whole.score = backbone.model.score
    ids = torch.randint(4, 14, (3, 6), generator=torch.Generator().manual_seed(0))
    kept = torch.tensor([[1] * 6, [1, 1, 1, 1, 0, 0], [1, 0, 0, 0, 0, 0]])
    ids = ids * kept  # the model's own forward finds padding by its token, 0
    with torch.no_grad():
        expected = whole(input_ids=ids, attention_mask=kept).logits
        found = backbone.model(ids, (1.0 - kept[:, None, None].float()) * MASKED).logits
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-6)


def test_no_token_sees_those_behind_it(tiny_llama: Path) -> None:
    model = load_backbone(tiny_llama, classes=3, seed=0, max_length=6).model
    ids = torch.tensor([[5, 6, 7, 8]])
    mask = torch.tensor([0.0, 0.0, MASKED, MASKED]).reshape(1, 1, 1, 4)
    hidden = []
    model.get_submodule("model.norm").register_forward_hook(
        lambda module, inputs, out: hidden.append(out)
    )
    with torch.no_grad():
        model(ids, torch.zeros(1, 1, 1, 4))
        model(torch.tensor([[5, 6, 9, 9]]), torch.zeros(1, 1, 1, 4))
        padded, short = model(ids, mask).logits, model(ids[:, :2], mask[..., :2]).logits
    assert torch.equal(hidden[0][:, :2], hidden[1][:, :2])
    assert not torch.equal(hidden[0][:, 2:], hidden[1][:, 2:])
    torch.testing.assert_close(padded, short, rtol=0, atol=1e-6)


def test_the_gradient_of_gated_activations_has_a_plain_form() -> None:
    def gradient(named: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        (found,) = torch.func.vjp(PlainSiLU(), named["hidden"])[1](named["given"])
        return {"gradient": found}

    inputs = {"hidden": torch.randn(2, 3), "given": torch.ones(2, 3)}
    model = graphs.compile_graph(gradient, inputs, ("gradient",), has_gradients=True)
    assert {node.op_type for node in model.graph} <= {"Sigmoid", "Mul", "Add", "Sub"}
    hidden = inputs["hidden"].requires_grad_()
    expected = torch.autograd.grad(torch.nn.functional.silu(hidden).sum(), hidden)[0]
    torch.testing.assert_close(gradient(inputs)["gradient"], expected, rtol=0, atol=1e-6)


@pytest.mark.long
def test_a_compiled_decoder_answers_as_torch_does(
    make_bundle: Callable[..., Any],
    logits_of: Callable[..., np.ndarray],
    tiny_llama: Path,
) -> None:
    made = make_bundle("lora", kind="text", backbone=BackboneSection(name="", path=str(tiny_llama)))
    data, start = made.data(5), made.start()
    found = Predictor(made.bundle)
    found.use(Adapter(tensors=start))
    inputs = {name: value for name, value in data.items() if name != "labels"}
    expected = logits_of(made.recipe, start, data)
    np.testing.assert_allclose(found.predict(inputs).logits, expected, rtol=0, atol=1e-5)
