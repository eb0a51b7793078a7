# SPDX-License-Identifier: Apache-2.0
"""Measure a pre-trained vision backbone by what its users do with it: LoRA, central and federated.

    python -m simulations.pretraining.evaluate --weights tuning/backbones/vit_small_28

On the digits (20 clients, Dirichlet 0.3) and on the private half of Fashion-MNIST under domain
shift (50 clients, every one with all shifts), three models are trained with the same rounds,
passes and batches: the backbone with LoRA, the same network with random frozen weights with LoRA,
and logistic regression on the raw pixels. Each takes, for central and for federated training
apart, the learning rate that does best on a tenth of the training images in half the rounds.
Federated averaging is written out here,
without compiler, codec or transport, so that the figures judge the weights and nothing else.
"""

import argparse
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from peft import LoraConfig, get_peft_model
from sklearn.linear_model import LogisticRegression
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, interpolate
from transformers import AutoConfig, AutoModelForImageClassification
from transformers.utils import logging

from simulations.datasets.dataset import stratified_split
from simulations.datasets.domains import DOMAINS, mixed_domains, shift_each
from simulations.datasets.loading import load_dataset
from simulations.partitions import Dirichlet, Iid, Partitioner

LORA_RANK = 4
BATCH = 16
WEIGHT_DECAY = 0.01
LORA_RATES = (1e-3, 3e-3, 1e-2)
LOGISTIC_RATES = (1e-3, 1e-2, 3e-2, 1e-1, 3e-1)
SELECTION_FRACTION = 0.1
N_CLASSES = 10


@dataclass(frozen=True, slots=True, kw_only=True)
class Task:
    """Images uint8 `[n, h, w]` and labels int64 `[n]`, and how they fall to clients."""

    name: str
    images: np.ndarray
    labels: np.ndarray
    test_images: np.ndarray
    test_labels: np.ndarray
    test_domains: np.ndarray | None  # int64 [n_test], an index into DOMAINS
    partition: Partitioner
    n_clients: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Learner:
    """How a kind of model is made and fed; `make` takes a seed."""

    make: Callable[[int], nn.Module]
    prepare: Callable[[np.ndarray], Tensor]
    rates: tuple[float, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Schedule:
    """How a model is trained; a round is one pass over all examples."""

    federated: bool
    rounds: int
    rate: float
    seed: int


def digits_task() -> Task:
    """A stratified quarter of the digits is the test set."""
    data = load_dataset("digits", seed=0)
    return Task(
        name="digits",
        images=data.train["images"],
        labels=data.train["labels"],
        test_images=data.test["images"],
        test_labels=data.test["labels"],
        test_domains=None,
        partition=Dirichlet(alpha=0.3),
        n_clients=20,
    )


def fashion_task(n_train: int, n_test: int) -> Task:
    """Each image, of the private half and of the test set, is moved to one of the domains."""
    data = load_dataset("fashion-mnist", seed=0, max_train=n_train, max_test=n_test)
    rng = np.random.default_rng(0)
    domains = mixed_domains(len(data.train["labels"]), rng)
    test_domains = mixed_domains(len(data.test["labels"]), rng)
    return Task(
        name="fashion-mnist, shifted",
        images=shift_each(data.train["images"], domains, rng),
        labels=data.train["labels"],
        test_images=shift_each(data.test["images"], test_domains, rng),
        test_labels=data.test["labels"],
        test_domains=test_domains,
        partition=Iid(),
        n_clients=50,
    )


def for_network(images: np.ndarray) -> Tensor:
    """Float32 `[n, 1, 28, 28]` in -1..1."""
    x = torch.from_numpy(images).unsqueeze(1).float() / 127.5 - 1
    return interpolate(x, size=(28, 28), mode="bilinear", align_corners=False)


def for_regression(images: np.ndarray) -> Tensor:
    """Float32 `[n, h w]` in 0..1, at the size the images came in."""
    return torch.from_numpy(images).flatten(1).float() / 255


class _Scores(nn.Module):
    """A classifier that gives its logits as they are."""

    def __init__(self, model: nn.Module):
        super().__init__()
        self.model = model

    def forward(self, x: Tensor) -> Tensor:
        return self.model(pixel_values=x).logits


def lora_network(weights: Path, seed: int, pretrained: bool) -> nn.Module:
    """The backbone, or its random twin, frozen, with LoRA and a new classifier."""
    torch.manual_seed(seed)
    if pretrained:
        model = AutoModelForImageClassification.from_pretrained(weights, num_labels=N_CLASSES)
    else:
        config = AutoConfig.from_pretrained(weights, num_labels=N_CLASSES)
        model = AutoModelForImageClassification.from_config(config)
    lora = LoraConfig(
        r=LORA_RANK,
        lora_alpha=2 * LORA_RANK,
        target_modules=["q_proj", "v_proj"],
        modules_to_save=["classifier"],
    )
    return _Scores(get_peft_model(model, lora))


def learners_for(task: Task, weights: Path) -> dict[str, Learner]:
    """The three models that are compared."""
    n_pixels = task.images[0].size

    def regression(seed: int) -> nn.Module:
        torch.manual_seed(seed)
        return nn.Linear(n_pixels, N_CLASSES)

    return {
        "pretrained": Learner(
            make=lambda seed: lora_network(weights, seed, True),
            prepare=for_network,
            rates=LORA_RATES,
        ),
        "random": Learner(
            make=lambda seed: lora_network(weights, seed, False),
            prepare=for_network,
            rates=LORA_RATES,
        ),
        "logistic": Learner(make=regression, prepare=for_regression, rates=LOGISTIC_RATES),
    }


def train_pass(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    x: Tensor,
    y: Tensor,
    rng: np.random.Generator,
) -> None:
    """One pass over the examples in random order."""
    model.train()
    for rows in np.array_split(rng.permutation(len(y)), -(-len(y) // BATCH)):
        loss = cross_entropy(model(x[rows]), y[rows])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()


def trainable(model: nn.Module) -> list[nn.Parameter]:
    """What is trained, and in a federation sent."""
    return [p for p in model.parameters() if p.requires_grad]


def new_optimizer(model: nn.Module, rate: float) -> torch.optim.Optimizer:
    """AdamW over what is trained."""
    return torch.optim.AdamW(trainable(model), lr=rate, weight_decay=WEIGHT_DECAY)


def train_central(model: nn.Module, x: Tensor, y: Tensor, how: Schedule) -> None:
    """As many passes over all examples as the federation has rounds."""
    rng = np.random.default_rng([how.seed, 1])
    optimizer = new_optimizer(model, how.rate)
    for _ in range(how.rounds):
        train_pass(model, optimizer, x, y, rng)


def train_federated(
    model: nn.Module,
    x: Tensor,
    y: Tensor,
    clients: Sequence[np.ndarray],
    how: Schedule,
) -> None:
    """Federated averaging: every client in every round, one local pass, mean by examples.

    *Source*: McMahan et al. 2017 (arXiv:1602.05629), algorithm 1, with AdamW as local optimizer,
    its moments forgotten after each round.
    """
    rng = np.random.default_rng([how.seed, 2])
    held = [rows for rows in clients if len(rows)]
    n_examples = sum(len(rows) for rows in held)
    parameters = trainable(model)
    for _ in range(how.rounds):
        start = [p.detach().clone() for p in parameters]
        total = [torch.zeros_like(p) for p in parameters]
        for rows in held:
            with torch.no_grad():
                for p, value in zip(parameters, start, strict=True):
                    p.copy_(value)
            train_pass(model, new_optimizer(model, how.rate), x[rows], y[rows], rng)
            for p, value in zip(parameters, total, strict=True):
                value.add_(p.detach(), alpha=len(rows) / n_examples)
        with torch.no_grad():
            for p, value in zip(parameters, total, strict=True):
                p.copy_(value)


@torch.no_grad()
def hits(model: nn.Module, x: Tensor, y: Tensor) -> np.ndarray:
    """Which examples are named rightly, bool `[n]`."""
    model.eval()
    predicted = torch.cat([model(part).argmax(1) for part in x.split(512)])
    return (predicted == y).numpy()


def train(task: Task, model: nn.Module, x: Tensor, rows: np.ndarray, how: Schedule) -> None:
    """Train on the examples `rows` of the task, prepared as `x`."""
    x, y = x[rows], torch.from_numpy(task.labels[rows])
    if how.federated:
        rng = np.random.default_rng([how.seed, 3])
        clients = task.partition.split(task.labels[rows], task.n_clients, rng)
        train_federated(model, x, y, clients, how)
    else:
        train_central(model, x, y, how)


def choose_rate(task: Task, learner: Learner, *, federated: bool, rounds: int) -> float:
    """The learning rate that does best on a tenth of the training images, held out."""
    kept, held = stratified_split(task.labels, SELECTION_FRACTION, np.random.default_rng(7))
    x, y = learner.prepare(task.images), torch.from_numpy(task.labels)
    found = {}
    for rate in learner.rates:
        model = learner.make(0)
        how = Schedule(federated=federated, rounds=rounds, rate=rate, seed=0)
        train(task, model, x, kept, how)
        found[rate] = hits(model, x[held], y[held]).mean()
    return max(found, key=lambda rate: found[rate])


def measure(task: Task, weights: Path, *, rounds: int, seeds: int) -> dict[str, object]:
    """All accuracies of one task, as fractions of 1."""
    test_y = torch.from_numpy(task.test_labels)
    everything = np.arange(len(task.labels))
    result: dict[str, object] = {
        "clients": task.n_clients,
        "training_images": len(task.labels),
        "test_images": len(test_y),
        "rounds": rounds,
        "seeds": seeds,
    }
    mean: dict[tuple[str, str], float] = {}
    for name, learner in learners_for(task, weights).items():
        x, test_x = learner.prepare(task.images), learner.prepare(task.test_images)
        found: dict[str, object] = {}
        for way, federated in (("central", False), ("federated", True)):
            rate = choose_rate(task, learner, federated=federated, rounds=-(-rounds // 2))
            right = []
            for seed in range(seeds):
                model = learner.make(seed)
                how = Schedule(federated=federated, rounds=rounds, rate=rate, seed=seed)
                train(task, model, x, everything, how)
                right.append(hits(model, test_x, test_y))
            mean[way, name] = float(np.mean(right))
            found[way] = {
                "accuracy": _rounded(np.mean(right)),
                "by_seed": [_rounded(part.mean()) for part in right],
                "learning_rate": rate,
            }
            if task.test_domains is not None:
                found[way]["by_domain"] = {
                    domain: _rounded(np.mean(right, axis=0)[task.test_domains == row].mean())
                    for row, domain in enumerate(DOMAINS)
                }
        result[name] = found
    result["logistic_sklearn_central"] = _rounded(_sklearn_accuracy(task))
    result["margins_points"] = {
        f"{way}, pre-trained over {other}": _points(mean[way, "pretrained"] - mean[way, other])
        for way in ("federated", "central")
        for other in ("random", "logistic")
    }
    return result


def _sklearn_accuracy(task: Task) -> float:
    model = LogisticRegression(max_iter=2000, C=0.1)
    model.fit(for_regression(task.images).numpy(), task.labels)
    return model.score(for_regression(task.test_images).numpy(), task.test_labels)


def _rounded(accuracy: float) -> float:
    return round(float(accuracy), 4)


def _points(difference: float) -> float:
    return round(100 * float(difference), 2)


def as_table(results: dict[str, dict[str, object]]) -> str:
    """What a person wants to see of `measure`."""
    lines = []
    for name, result in results.items():
        lines.append(
            f"{name}: {result['clients']} clients, {result['training_images']} images, "
            f"{result['rounds']} rounds, {result['seeds']} seeds"
        )
        lines.append(f"  {'':24}{'central':>9}{'federated':>11}")
        for row, label in (
            ("pretrained", "pre-trained + LoRA"),
            ("random", "random + LoRA"),
            ("logistic", "logistic regression"),
        ):
            found = result[row]
            central, federated = (found[way]["accuracy"] for way in ("central", "federated"))
            lines.append(f"  {label:24}{central:9.4f}{federated:11.4f}")
        lines.append(f"  {'the same, scikit-learn':24}{result['logistic_sklearn_central']:9.4f}")
        lines += [
            f"  {key}: {value:+.2f} points" for key, value in result["margins_points"].items()
        ]
    return "\n".join(lines)


def main() -> None:
    """Read the command line, measure, print."""
    parser = argparse.ArgumentParser(description="measure a pre-trained vision backbone")
    parser.add_argument("--weights", type=Path, required=True, help="Hugging Face folder")
    parser.add_argument("--task", choices=("digits", "fashion"), help="default: both")
    parser.add_argument("--rounds", type=int, default=10, help="rounds, and central passes")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--fashion-images", type=int, default=4000, help="of the private half")
    parser.add_argument("--test-images", type=int, default=2000, help="of Fashion-MNIST's test set")
    parser.add_argument("--threads", type=int, default=1, help="CPU threads")
    parser.add_argument("--json", action="store_true", help="print JSON instead of a table")
    args = parser.parse_args()
    if min(args.rounds, args.seeds, args.fashion_images, args.test_images, args.threads) < 1:
        parser.error("--rounds, --seeds, --*-images and --threads must be at least 1")
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    torch.set_num_threads(args.threads)
    tasks = []
    if args.task != "fashion":
        tasks.append(digits_task())
    if args.task != "digits":
        tasks.append(fashion_task(args.fashion_images, args.test_images))
    results = {
        task.name: measure(task, args.weights, rounds=args.rounds, seeds=args.seeds)
        for task in tasks
    }
    print(json.dumps(results, indent=2) if args.json else as_table(results))


if __name__ == "__main__":
    main()
