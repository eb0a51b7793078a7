# SPDX-License-Identifier: Apache-2.0
"""The second engine: the same method, data order and optimizer, run by torch itself.

An ordinary training loop on the tuned module, for workstations with a GPU, for comparison, and as
the other side of the parity test. It is what a torch user would write, not the traced step; private
training alone runs that step, as gradients of single samples need `torch.func`.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from typing import TYPE_CHECKING, Any, Final

import numpy as np
import torch

from protocol.tensors import NOTHING
from tuning import optimizers
from tuning.step import cross_entropies
from tuning.torch_private import PrivatePlan, fit_privately

if TYPE_CHECKING:
    from protocol.manifest import TrainingSpec
    from protocol.tensors import Tensors
    from tuning.methods import Tuned

EVALUATION_ROWS: Final = 256

# (samples, batch size, epochs, generator, most_steps=...) -> indices and weights, [steps, batch].
BatchPlan = Callable[..., tuple[np.ndarray, np.ndarray]]


class TorchTrainer:
    """Trains a tuned module in place, from given tensors to new ones.

    `batch_plan` is `edge_runtime.batch_plan`, handed in by whoever runs clients, and so is
    `private_plan`, which private training needs.
    """

    def __init__(
        self,
        tuned: Tuned,
        spec: TrainingSpec,
        *,
        batch_plan: BatchPlan,
        private_plan: PrivatePlan | None = None,
        device: str = "cpu",
    ) -> None:
        self._tuned = tuned
        self._spec = spec
        self._device = torch.device(device)
        # Fused attention has no gradients of single samples.
        module = tuned.module if spec.privacy else _with_fused_attention(tuned.module)
        self._module = module.to(self._device)
        self._batch_plan = batch_plan
        self._private_plan = private_plan
        parameters = dict(self._module.named_parameters())
        for parameter in parameters.values():
            parameter.requires_grad_(False)
        self._weights = parameters
        # Frozen weights that are moved at present, as they were before.
        self._moved: dict[str, torch.Tensor] = {}
        self._trained = {
            name: parameters[inside].requires_grad_(True)
            for name, inside in sorted(tuned.trainable.items())
        }

    def fit(
        self,
        tensors: Tensors,
        data: Mapping[str, np.ndarray],
        *,
        learning_rate: float,
        epochs: int,
        seed: int,
        most_steps: int = 0,
        frozen: Collection[str] = (),
        correction: Tensors = NOTHING,
        offset: Tensors = NOTHING,
    ) -> tuple[dict[str, np.ndarray], dict[str, float]]:
        """As `edge_runtime.OnnxTrainer.fit`."""
        self._load(tensors, offset)
        if self._spec.privacy is not None:
            return self._fit_privately(data, learning_rate, seed, frozen)
        held = {name: torch.from_numpy(value).to(self._device) for name, value in data.items()}
        labels = held.pop("labels")
        rng = np.random.default_rng(seed)
        plan = self._batch_plan(
            len(labels), self._spec.batch_size, epochs, rng, most_steps=most_steps
        )
        indices, weights = (torch.from_numpy(part).to(self._device) for part in plan)
        for name, parameter in self._trained.items():
            parameter.requires_grad_(name not in frozen)
        optimizer = self._optimizer(learning_rate)
        anchors = {name: value.detach().clone() for name, value in self._trained.items()}
        corrections = {n: torch.from_numpy(v).to(self._device) for n, v in correction.items()}
        total = torch.zeros((), device=self._device)
        tallies = {
            name: torch.zeros(size, device=self._device)
            for name, size in self._tuned.tallies.items()
        }
        for rows, weight in zip(indices, weights, strict=True):
            # A ragged batch needs no padding here: nothing fixes the shape.
            rows = rows[weight > 0]
            optimizer.zero_grad(set_to_none=True)
            answer = self._answer({n: v[rows] for n, v in held.items()})
            loss = self._losses(answer, labels[rows]).mean()
            (loss + self._proximal_term(anchors)).backward()
            for name, value in corrections.items():
                if (gradient := self._trained[name].grad) is not None:
                    gradient += value
            optimizer.step()
            total += loss.detach() * len(rows)
            for name, counts in tallies.items():
                counts += getattr(answer, name).detach().sum(dim=0)
        trained = {
            name: value.detach().cpu().numpy().copy() for name, value in self._trained.items()
        }
        counted = {
            f"{name}/{place}": float(f"{float(count):.6g}")
            for name, counts in tallies.items()
            for place, count in enumerate(counts)
        }
        return trained, {"loss": float(f"{float(total / weights.sum()):.6g}"), **counted}

    def _fit_privately(
        self,
        data: Mapping[str, np.ndarray],
        learning_rate: float,
        seed: int,
        frozen: Collection[str],
    ) -> tuple[dict[str, np.ndarray], dict[str, float]]:
        """From the tensors that are loaded."""
        if self._private_plan is None:
            raise ValueError("private_plan: expected one, as the training is private; found None")
        drawn = self._private_plan(len(data["labels"]), self._spec, seed)
        names = [name for name in data if name != "labels"]
        values = sum(value.numel() for value in self._trained.values())
        trained, losses = fit_privately(
            self._tuned,
            self._spec,
            self._trained,
            drawn.calls(data, names, values),
            learning_rate=learning_rate,
            left=frozen,
            device=self._device,
        )
        tensors = {name: value.cpu().numpy().copy() for name, value in trained.items()}
        samples = drawn.weights.sum(axis=1)
        if not samples.any():
            return tensors, {}
        return tensors, {"loss": float(f"{float(losses @ samples / samples.sum()):.6g}")}

    def evaluate(
        self, tensors: Tensors, data: Mapping[str, np.ndarray], *, offset: Tensors = NOTHING
    ) -> dict[str, float]:
        """As `edge_runtime.OnnxTrainer.evaluate`."""
        losses, correct = self.evaluate_samples(tensors, data, offset=offset)
        return {
            "loss": float(f"{float(losses.mean()):.6g}"),
            "accuracy": float(f"{float(correct.mean()):.6g}"),
        }

    def evaluate_samples(
        self, tensors: Tensors, data: Mapping[str, np.ndarray], *, offset: Tensors = NOTHING
    ) -> tuple[np.ndarray, np.ndarray]:
        """As `edge_runtime.OnnxTrainer.evaluate_samples`."""
        self._load(tensors, offset)
        losses, correct = [], []
        with torch.no_grad():
            for start in range(0, len(data["labels"]), EVALUATION_ROWS):
                rows = slice(start, start + EVALUATION_ROWS)
                part = {n: torch.from_numpy(v[rows]).to(self._device) for n, v in data.items()}
                labels = part.pop("labels")
                scores = self._answer(part).logits
                losses.append(cross_entropies(scores, labels).cpu().numpy())
                correct.append((scores.argmax(-1) == labels).float().cpu().numpy())
        return np.concatenate(losses), np.concatenate(correct)

    def _load(self, tensors: Tensors, offset: Tensors) -> None:
        with torch.no_grad():
            for name in self._moved.keys() - offset.keys():
                self._weights[name].copy_(self._moved.pop(name))
            for name, change in offset.items():
                weight = self._weights[name]
                before = self._moved.setdefault(name, weight.detach().clone())
                weight.copy_(before + torch.from_numpy(change).to(self._device))
            for name, parameter in self._trained.items():
                parameter.copy_(torch.from_numpy(np.ascontiguousarray(tensors[name])))

    def _answer(self, batch: Mapping[str, torch.Tensor]) -> Any:
        return self._module(**self._tuned.prepare(batch))

    def _losses(self, answer: Any, labels: torch.Tensor) -> torch.Tensor:
        entropies = torch.nn.functional.cross_entropy(answer.logits, labels, reduction="none")
        return self._tuned.sample_loss(entropies, answer)

    def _proximal_term(self, anchors: Mapping[str, torch.Tensor]) -> torch.Tensor | float:
        """FedProx: mu / 2 * the squared distance from where the round began."""
        if not self._spec.proximal:
            return 0.0
        squares = ((value - anchors[name]).square().sum() for name, value in self._trained.items())
        return self._spec.proximal / 2 * torch.stack(list(squares)).sum()

    def _optimizer(self, learning_rate: float) -> torch.optim.Optimizer:
        parameters = [value for value in self._trained.values() if value.requires_grad]
        spec = self._spec
        if spec.optimizer == "adamw":
            return torch.optim.AdamW(
                parameters,
                lr=learning_rate,
                betas=(optimizers.BETA_1, optimizers.BETA_2),
                eps=optimizers.EPSILON,
                weight_decay=spec.weight_decay,
            )
        return torch.optim.SGD(
            parameters,
            lr=learning_rate,
            momentum=spec.momentum,
            weight_decay=spec.weight_decay,
        )


def _with_fused_attention(module: torch.nn.Module) -> torch.nn.Module:
    """The same module with the attention that transformers itself would have chosen.

    Compiling needs the plain one, which is the slower of the two here.
    """
    from transformers import PreTrainedModel

    for part in module.modules():
        if isinstance(part, PreTrainedModel) and part._supports_sdpa:
            part.set_attn_implementation("sdpa")
    return module
