# SPDX-License-Identifier: Apache-2.0
"""The slow and literal side of the parity tests: what a torch user would write."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import pytest

Arrays = Mapping[str, np.ndarray]
PEFT_SETTINGS: Mapping[str, Mapping[str, Any]] = {
    "LOHA": {"r": 2, "alpha": 4},
    "LOKR": {"r": 2, "alpha": 4},
    "IA3": {"feedforward_modules": []},
    "OFT": {"r": 0, "oft_block_size": 4},
    "FOURIERFT": {"n_frequency": 10},
}


def options_of(method: str) -> dict[str, Any]:
    """ "peft:LOHA" as the arguments of `make_bundle`."""
    name, _, peft_type = method.partition(":")
    settings = {"type": peft_type, **PEFT_SETTINGS[peft_type]} if peft_type else {}
    return {"method": name, "settings": settings}


@pytest.fixture(scope="session")
def make_tuned(make_bundle: Callable[..., Any]) -> Callable[..., Any]:
    """As `make_bundle`, by "lora" or "peft:LOHA"."""
    return lambda method, **options: make_bundle(**options_of(method), **options)


@pytest.fixture(scope="session")
def train_plainly() -> Callable[..., tuple[dict[str, np.ndarray], list[float]]]:
    """torch.optim, autograd, and batches as long as they are: no step, no trace, no weights."""

    def train(
        recipe: Any, start: Arrays, data: Arrays, batches: Sequence[np.ndarray], rate: float
    ) -> tuple[dict[str, np.ndarray], list[float]]:
        import torch

        _, tuned = recipe.build()
        inside = dict(tuned.module.named_parameters())
        for parameter in inside.values():
            parameter.requires_grad_(False)
        trained = {name: inside[tuned.trainable[name]] for name in start}
        for name, parameter in trained.items():
            parameter.data = torch.from_numpy(start[name].copy())
            parameter.requires_grad_(True)
        spec = recipe.training
        optimizer: torch.optim.Optimizer
        if spec.optimizer == "adamw":
            optimizer = torch.optim.AdamW(
                trained.values(), lr=rate, weight_decay=spec.weight_decay, eps=1e-6
            )
        else:
            optimizer = torch.optim.SGD(
                trained.values(), lr=rate, momentum=spec.momentum, weight_decay=spec.weight_decay
            )
        losses = []
        for rows in batches:
            batch = {n: torch.from_numpy(v[rows]) for n, v in data.items() if n != "labels"}
            optimizer.zero_grad()
            scores = tuned.module(**tuned.prepare(batch)).logits
            loss = torch.nn.functional.cross_entropy(scores, torch.from_numpy(data["labels"][rows]))
            loss.backward()
            optimizer.step()
            losses.append(float(loss.detach()))
        return {n: p.detach().numpy().copy() for n, p in trained.items()}, losses

    return train


@pytest.fixture(scope="session")
def logits_of() -> Callable[..., np.ndarray]:
    """The tuned module, unfolded and untraced, with the given tensors in it."""

    def logits(recipe: Any, tensors: Arrays, data: Arrays) -> np.ndarray:
        import torch

        _, tuned = recipe.build()
        inside = dict(tuned.module.named_parameters())
        with torch.no_grad():
            for name, value in tensors.items():
                inside[tuned.trainable[name]].copy_(torch.from_numpy(value))
            batch = {n: torch.from_numpy(v) for n, v in data.items() if n != "labels"}
            return tuned.module(**tuned.prepare(batch)).logits.numpy()

    return logits
