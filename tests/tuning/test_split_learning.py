# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch

from tuning.backbones import Backbone, load_backbone
from tuning.cuts import Cut, cut_network
from tuning.split_learning import Batches, Outcome, Tensors, split_round

RATE, MOMENTUM = 0.05, 0.9
SIZES = (3, 1, 2)  # batches of each client


def clients() -> list[Batches]:
    generator = torch.Generator().manual_seed(0)
    return [
        [
            (
                {"pixel_values": torch.randn(4, 1, 8, 8, generator=generator)},
                torch.randint(0, 3, (4,), generator=generator),
            )
            for _ in range(count)
        ]
        for count in SIZES
    ]


def trained_plainly(model: Any, batches: Batches, *, rate: float = RATE) -> Tensors:
    """torch.optim over the whole network, in a copy."""
    model = copy.deepcopy(model)
    optimizer = torch.optim.SGD(model.parameters(), lr=rate, momentum=MOMENTUM)
    for batch, labels in batches:
        optimizer.zero_grad()
        torch.nn.functional.cross_entropy(model(**batch).logits, labels).backward()
        optimizer.step()
    return {name: value.detach() for name, value in model.named_parameters()}


def outcome(folder: Path, variant: Any, cut: Cut, **options: Any) -> tuple[Backbone, Outcome]:
    backbone = load_backbone(folder, classes=3, seed=0)
    model = backbone.model
    assert backbone.family is not None
    parts = cut_network(model, backbone.family, backbone.classifier, cut)
    weights = {name: value.detach() for name, value in model.named_parameters()}
    found = split_round(parts, weights, clients(), variant, rate=RATE, momentum=MOMENTUM, **options)
    return backbone, found


def close(found: Tensors, expected: Tensors) -> None:
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value, rtol=0, atol=1e-5, msg=name)


@pytest.mark.parametrize("cut", [Cut(head=0, tail=0), Cut(head=1, tail=0)], ids=str)
def test_splitfed_v1_is_federated_averaging(tiny_vit: Path, cut: Cut) -> None:
    backbone, found = outcome(tiny_vit, "splitfed-v1", cut)
    trained = [trained_plainly(backbone.model, batches) for batches in clients()]
    mean = {
        name: sum(
            count / sum(SIZES) * each[name] for count, each in zip(SIZES, trained, strict=True)
        )
        for name in trained[0]
    }
    close(found.weights, mean)


def test_splitfed_v2_has_one_server_part_and_averages_the_heads(tiny_vit: Path) -> None:
    order = (2, 0, 1)
    backbone, found = outcome(tiny_vit, "splitfed-v2", Cut(head=1, tail=0), order=order)
    whole = copy.deepcopy(backbone.model)
    first = {name: value.detach().clone() for name, value in whole.named_parameters()}
    heads = []
    front = {name for name in first if name.startswith(("vit.embeddings", "vit.layers.0."))}
    for number in order:
        # The literal form: the first head before the server's part as the one before left it.
        for name, parameter in whole.named_parameters():
            if name in front:
                parameter.data = first[name].clone()
        trained = trained_plainly(whole, clients()[number])
        heads.append((SIZES[number], {name: trained[name] for name in front}))
        whole.load_state_dict({**whole.state_dict(), **trained})
    expected = {
        name: sum(count / sum(SIZES) * head[name] for count, head in heads) for name in front
    }
    rest = {name: value for name, value in whole.named_parameters() if name not in front}
    close(found.weights, {**{name: v.detach() for name, v in rest.items()}, **expected})


def test_u_shaped_clients_take_turns_on_one_network(tiny_vit: Path) -> None:
    order = (1, 2, 0)
    backbone, found = outcome(tiny_vit, "u-shaped", Cut(head=0, tail=1), order=order)
    whole = copy.deepcopy(backbone.model)
    for number in order:
        whole.load_state_dict({**whole.state_dict(), **trained_plainly(whole, clients()[number])})
    close(found.weights, {name: v.detach() for name, v in whole.named_parameters()})


def test_values_that_cross_are_counted(tiny_vit: Path) -> None:
    # 24 samples of 5 tokens of 16 values, up and down; and the head, to and from three clients.
    backbone, found = outcome(tiny_vit, "splitfed-v1", Cut(head=1, tail=0))
    named = dict(backbone.model.named_parameters())
    head = sum(v.numel() for n, v in named.items() if n.startswith(("vit.emb", "vit.layers.0.")))
    assert found.values == 2 * 24 * 5 * 16 + 3 * 2 * head
    backbone, found = outcome(tiny_vit, "u-shaped", Cut(head=1, tail=0))
    inside = ("vit.embeddings", "vit.layers.")
    tail = sum(value.numel() for name, value in named.items() if not name.startswith(inside))
    assert found.values == 4 * 24 * 5 * 16 + 3 * 2 * (head + tail)
