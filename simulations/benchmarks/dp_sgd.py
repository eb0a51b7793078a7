# SPDX-License-Identifier: Apache-2.0
"""Whether a compiled private step is DP-SGD to the letter, and what it costs beside a plain one.

The other side of the comparison knows neither vmap nor a trace nor calls of one batch shape: a
forward and a backward pass for every drawn sample alone, its gradient clipped in a loop over the
tensors, the sum, the same noise, torch.optim.
"""

from __future__ import annotations

import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any, Final

import numpy as np

from edge_runtime.keystream import repeatable_keystream
from edge_runtime.private_batches import private_batches
from edge_runtime.training_loop import TrainingLoop
from protocol.example_privacy import ExamplePrivacy
from protocol.files import INITIAL_FILE
from protocol.manifest import ANCHOR, TrainingSpec
from protocol.tensors import Tensors
from simulations.benchmarks.figure import Figure, figure
from tuning.compiler import Compiled, compile_recipe
from tuning.recipe import Recipe

if TYPE_CHECKING:
    from tuning.methods import Tuned

Calls = Sequence[Mapping[str, np.ndarray]]
Cases = Mapping[str, tuple[str, Mapping[str, Any], TrainingSpec]]
"""Words, and the method, its settings and the private training that they are for."""

_BATCH: Final = 8
_SAMPLES: Final = 24  # a third of them is drawn for a step, so that some draws take two calls
_STEPS: Final = 4
_CLASSES: Final = 10
_RATE: Final = 0.05
_PRIVACY: Final = ExamplePrivacy(
    noise_multiplier=1.0, clip=0.5, fewest_samples=_BATCH, steps=_STEPS, rounds=1
)
SGD: Final = TrainingSpec(
    batch_size=_BATCH, optimizer="sgd", learning_rate=_RATE, momentum=0.9, privacy=_PRIVACY
)
_ADAMW: Final = TrainingSpec(
    batch_size=_BATCH,
    optimizer="adamw",
    learning_rate=0.002,
    weight_decay=0.01,
    privacy=_PRIVACY,
)
CASES: Final[Cases] = {
    "LoRA, SGD": ("lora", {"rank": 4}, SGD),
    "SSF, AdamW": ("ssf", {}, _ADAMW),
}


def literal_steps(tuned: Tuned, spec: TrainingSpec, start: Tensors, calls: Calls) -> dict[str, Any]:
    """DP-SGD over `calls` from `start`, one sample at a time; the tensors then, as numpy arrays.

    Differs from a textbook only in that a step's samples may stand in several calls.
    """
    import torch
    from torch.nn.functional import cross_entropy

    privacy = spec.privacy
    assert privacy is not None, "the comparison is of private steps"
    inside = dict(tuned.module.named_parameters())
    for parameter in inside.values():
        parameter.requires_grad_(False)
    trained = {name: inside[tuned.trainable[name]] for name in sorted(start)}
    for name, parameter in trained.items():
        parameter.data = torch.from_numpy(np.array(start[name]))
        parameter.requires_grad_(True)
    optimizer = _optimizer(spec, trained)
    total = {name: torch.zeros_like(parameter) for name, parameter in trained.items()}
    for call in calls:
        batch = {n.removeprefix("batch/"): v for n, v in call.items() if n.startswith("batch/")}
        for row in np.flatnonzero(call["weight"]):
            alone = {name: torch.from_numpy(value[row : row + 1]) for name, value in batch.items()}
            label = torch.from_numpy(call["labels"][row : row + 1])
            optimizer.zero_grad()
            found = tuned.module(**tuned.prepare(alone))
            entropy = cross_entropy(found.logits, label, reduction="none")
            tuned.sample_loss(entropy, found).sum().backward()
            gradients = {name: _gradient(parameter) for name, parameter in trained.items()}
            norm = sum(float(value.double().square().sum()) for value in gradients.values()) ** 0.5
            for name, value in gradients.items():
                total[name] += value * min(1.0, privacy.clip / norm) if norm else value
        if not call["applies"]:
            continue
        left = torch.from_numpy(call["noise"])
        for name, parameter in trained.items():
            noise, left = left[: parameter.numel()], left[parameter.numel() :]
            noise = noise.reshape(parameter.shape)
            noisy = total[name] + privacy.noise_multiplier * privacy.clip * noise
            parameter.grad = noisy / spec.batch_size
            if spec.proximal:
                away = parameter.detach() - torch.from_numpy(np.array(start[name]))
                parameter.grad += spec.proximal * away
            total[name] = torch.zeros_like(parameter)
        optimizer.step()
    return {name: parameter.detach().numpy().copy() for name, parameter in trained.items()}


def compiled_steps(
    loop: TrainingLoop, compiled: Compiled, spec: TrainingSpec, start: Tensors, calls: Calls
) -> dict[str, np.ndarray]:
    """The same by a compiled graph."""
    state = {
        name: np.array(start[name.removeprefix(ANCHOR)])
        if name.startswith(ANCHOR)
        else np.zeros(entry.shape, entry.dtype)
        for name, entry in compiled.state.entries
    }
    trained, _, _ = loop.run(start, state, calls, spec.learning_rate)
    return trained


def dp_sgd_parity(cases: Cases = CASES) -> Figure:
    """Largest difference of any value after some private steps of the shipped ViT, compiled and
    literal.

    *Cost* a minute or two where the cases are not compiled yet, else seconds.
    """
    worst, notes = 0.0, []
    for name, (method, settings, spec) in cases.items():
        recipe = _recipe(method, settings, spec)
        compiled = compile_recipe(recipe)
        start, calls = _start(compiled), _calls(compiled, spec)
        loop = TrainingLoop(compiled.folder / "train.onnx")
        found = compiled_steps(loop, compiled, spec, start, calls)
        _, tuned = recipe.build()
        expected = literal_steps(tuned, spec, start, calls)
        difference = max(float(np.abs(found[n] - expected[n]).max()) for n in expected)
        moved = max(float(np.abs(found[n] - start[n]).max()) for n in expected)
        worst = max(worst, difference)
        notes.append(f"{name}: {difference:.1e} of {moved:.1e} moved")
    note = f"{_STEPS} steps, Poisson draws of {_BATCH} of {_SAMPLES}; " + ", ".join(notes)
    return figure("dp_sgd_parity", worst, target="<= 1e-5", note=note)


def dp_sgd_cost(cases: Cases = CASES) -> list[Figure]:
    """A private step beside a plain one of the same batch, one client: time, the fastest of some,
    in turns. Drawing the noise is counted in."""
    figures = []
    for name, (method, settings, spec) in cases.items():
        seconds: dict[bool, list[float]] = {False: [], True: []}
        ready = {}
        for private in seconds:
            own = spec if private else replace(spec, privacy=None)
            compiled = compile_recipe(_recipe(method, settings, own))
            ready[private] = (compiled, TrainingLoop(compiled.folder / "train.onnx", threads=1))
        for _ in range(10):
            for private, (compiled, loop) in ready.items():
                calls = [call | {"weight": np.ones(_BATCH, np.float32)} for call in _full(compiled)]
                stream = repeatable_keystream(1)
                began = time.perf_counter()
                if private:
                    calls = [call | _drawn(compiled, stream) for call in calls]
                compiled_steps(loop, compiled, spec, _start(compiled), calls)
                seconds[private].append((time.perf_counter() - began) / len(calls))
        ratio = min(seconds[True]) / min(seconds[False])
        note = f"{min(seconds[True]) * 1e3:.1f} ms, plain {min(seconds[False]) * 1e3:.1f} ms a step"
        word = method.replace("-", "_")
        figures.append(figure(f"dp_sgd_step_ratio_{word}", ratio, unit="x", note=f"{name}: {note}"))
    return figures


def _recipe(method: str, settings: Mapping[str, Any], spec: TrainingSpec) -> Recipe:
    return Recipe(
        backbone="vit-small-28",
        classes=_CLASSES,
        seed=0,
        method=method,
        settings=settings,
        training=spec,
    )


def _start(compiled: Compiled) -> dict[str, np.ndarray]:
    """The first tensors, stirred: where a factor is zero, half of the gradients would be."""
    from safetensors.numpy import load_file

    rng = np.random.default_rng(5)
    initial = load_file(compiled.folder / INITIAL_FILE)
    return {
        name: value + np.float32(0.1) * rng.standard_normal(value.shape, np.float32)
        for name, value in sorted(initial.items())
    }


def _data(compiled: Compiled, samples: int) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(3)
    inputs = {
        name: rng.standard_normal((samples, *spec.shape)).astype(spec.dtype)
        for name, spec in compiled.inputs
    }
    return {**inputs, "labels": rng.integers(0, _CLASSES, samples)}


def _calls(compiled: Compiled, spec: TrainingSpec) -> Calls:
    drawn = private_batches(_SAMPLES, spec, repeatable_keystream(0))
    names = [name for name, _ in compiled.inputs]
    return list(drawn.calls(_data(compiled, _SAMPLES), names, compiled.trainable.size))


def _full(compiled: Compiled) -> Iterable[dict[str, np.ndarray]]:
    """Calls of a whole batch."""
    data = _data(compiled, _BATCH)
    batch = {f"batch/{name}": data[name] for name, _ in compiled.inputs}
    return [{**batch, "labels": data["labels"]} for _ in range(3)]


def _drawn(compiled: Compiled, stream: Any) -> dict[str, np.ndarray]:
    return {"applies": np.ones((), np.float32), "noise": stream.normals(compiled.trainable.size)}


def _gradient(parameter: Any) -> Any:
    """A copy; zeros where a sample does not reach a tensor."""
    import torch

    return torch.zeros_like(parameter) if parameter.grad is None else parameter.grad.clone()


def _optimizer(spec: TrainingSpec, trained: Mapping[str, Any]) -> Any:
    import torch

    from tuning.optimizers import BETA_1, BETA_2, EPSILON

    if spec.optimizer == "adamw":
        return torch.optim.AdamW(
            trained.values(),
            lr=spec.learning_rate,
            betas=(BETA_1, BETA_2),
            eps=EPSILON,
            weight_decay=spec.weight_decay,
        )
    return torch.optim.SGD(
        trained.values(),
        lr=spec.learning_rate,
        momentum=spec.momentum,
        weight_decay=spec.weight_decay,
    )
