# SPDX-License-Identifier: Apache-2.0
"""Many clients in one graph: the training step with a client axis on every tensor.

Clients are grouped by how many steps they have, the longest first, so that few of them wait; one
that has none left, or a place that no client fills, takes part with weight 0 and changes nothing.
Each client's batches, in their order, are those that it would train on alone.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Protocol

import numpy as np

from client_sdk.noise import repeatable_seed
from client_sdk.updates import (
    charge_plan,
    close_evaluation,
    close_update,
    frozen_names,
    sample_count,
    variants_of,
)
from client_sdk.work import Work, open_plan
from edge_runtime import PrivateBatches, batch_plan, private_batches
from edge_runtime.keystream import repeatable_keystream
from edge_runtime.session import same
from edge_runtime.trainer import initial_state, metrics_of, rounded
from edge_runtime.training_loop import batch_of
from protocol.manifest import Manifest
from protocol.tensors import NOTHING, Tensors
from simulations.backends.prepared import PreparedClient

Steps = Iterator[Mapping[str, np.ndarray]]


class CohortLoop(Protocol):
    """What runs the steps: `edge_runtime.training_loop.TrainingLoop`, or torch's counterpart."""

    def run(
        self,
        trainable: Tensors,
        state: Tensors,
        steps: Steps,
        learning_rate: float,
        *,
        frozen: Collection[str],
        offset: Tensors,
    ) -> tuple[dict[str, np.ndarray], np.ndarray, dict[str, np.ndarray]]:
        """Tensors [clients, ...] in and out; losses [steps, clients]; counts [clients, ...]."""
        ...


class EvaluateSamples(Protocol):
    """As `edge_runtime.trainer.OnnxTrainer.evaluate_samples`."""

    def __call__(
        self, tensors: Tensors, data: Mapping[str, np.ndarray], *, offset: Tensors
    ) -> tuple[np.ndarray, np.ndarray]:
        """Cross-entropy and correctness of every sample: two float32 [samples]."""
        ...


@dataclass(frozen=True, slots=True)
class _Fit:
    """One client's part of a round."""

    client: PreparedClient
    work: Work
    indices: np.ndarray  # [steps, batch]; of private training a step is a call
    weights: np.ndarray  # [steps, batch]
    drawn: PrivateBatches | None = None


_Evaluation = tuple[PreparedClient, Work]


class CohortClients:
    """Clients that train `size` at a time."""

    def __init__(
        self,
        manifest: Manifest,
        initial: Tensors,
        loop: CohortLoop,
        size: int,
        evaluate_samples: EvaluateSamples,
        clients: Sequence[PreparedClient],
    ) -> None:
        self._manifest = manifest
        self._initial = initial
        self._loop = loop
        self._size = size
        self._evaluate_samples = evaluate_samples
        self._clients = {client.id: client for client in clients}
        self._names = [name for name, _ in manifest.inputs]
        self._offset: Mapping[str, np.ndarray] = NOTHING

    def serve(self, work: list[tuple[str, str, bytes]]) -> Iterator[tuple[str, bytes | Exception]]:
        """Answer (client, kind, plan) for all of them; what goes wrong for one is its answer."""
        fits: list[_Fit] = []
        evaluations: list[_Evaluation] = []
        for name, _, blob in work:
            client = self._clients[name]
            try:
                opened = open_plan(blob, self._manifest, self._initial, client.memory)
                charge_plan(opened.plan, self._manifest, sample_count(client.fit), client.memory)
            except Exception as fault:
                # As on a device: the coordinator hears of it, and the round goes on.
                yield name, fault
                continue
            # All clients have the same frozen weights: they are in memory once.
            self._offset = opened.offset if not same(opened.offset, self._offset) else self._offset
            opened = replace(opened, offset=self._offset)
            plan = opened.plan
            if plan.task == "evaluate":
                evaluations.append((client, opened))
                continue
            fits.append(self._planned(client, opened))
        # Longest first, then by name: the grouping depends on nothing but the work itself.
        fits.sort(key=lambda item: (-len(item.indices), item.client.id))
        for first in range(0, len(fits), self._size):
            yield from self._fit(fits[first : first + self._size])
        yield from self._evaluate(evaluations)

    def _planned(self, client: PreparedClient, work: Work) -> _Fit:
        plan, training, samples = work.plan, self._manifest.training, sample_count(client.fit)
        if training.privacy is not None:
            drawn = private_batches(samples, training, repeatable_keystream(plan.seed))
            return _Fit(client, work, drawn.indices, drawn.weights, drawn)
        indices, weights = batch_plan(
            samples,
            training.batch_size,
            plan.local_epochs,
            np.random.default_rng(plan.seed),
            most_steps=plan.local_steps,
        )
        return _Fit(client, work, indices, weights)

    def _fit(self, group: Sequence[_Fit]) -> Iterator[tuple[str, bytes | Exception]]:
        # Places without a client repeat the first one's data at weight 0.
        places = [*group, *[group[0]] * (self._size - len(group))]
        first = group[0].work
        starts = [item.work.start for item in places]
        states = [
            initial_state(self._manifest, item.work.start, item.work.correction) for item in places
        ]
        trained, losses, tallies = self._loop.run(
            _stacked(starts),
            _stacked(states),
            self._steps(places, len(group)),
            first.plan.learning_rate,
            frozen=frozen_names(first.plan, self._manifest),
            offset=first.offset,
        )
        for place, item in enumerate(group):
            steps = len(item.indices)
            try:
                counts = {name: value[place] for name, value in tallies.items()}
                metrics = metrics_of(losses[:steps, place], item.weights, counts)
                own = {name: value[place] for name, value in trained.items()}
                samples = sample_count(item.client.fit)
                memory = item.client.memory
                blob = close_update(
                    item.work, self._manifest, own, metrics, samples, memory,
                    noise_seed=repeatable_seed(item.work.plan),
                )  # fmt: skip
                yield item.client.id, blob
            except Exception as fault:
                yield item.client.id, fault

    def _steps(self, places: Sequence[_Fit], filled: int) -> Steps:
        batch = places[0].indices.shape[1]
        for number in range(len(places[0].indices)):
            rows = []
            weight = np.zeros((len(places), batch), np.float32)
            for place, item in enumerate(places):
                active = place < filled and number < len(item.indices)
                step = item.indices[number] if active else np.zeros(batch, np.int64)
                rows.append(batch_of(item.client.fit, self._names, step))
                if active:
                    weight[place] = item.weights[number]
            yield {
                **{name: np.stack([row[name] for row in rows]) for name in rows[0]},
                "weight": weight,
                **self._noise(places[:filled], number),
            }

    def _noise(self, group: Sequence[_Fit], number: int) -> dict[str, np.ndarray]:
        """What private calls read beside their samples; a client that has none left is at rest."""
        if self._manifest.training.privacy is None:
            return {}
        values = self._manifest.trainable.size
        applies = np.zeros(self._size, np.float32)
        noise = np.zeros((self._size, values), np.float32)
        for place, item in enumerate(group):
            if item.drawn is not None and number < len(item.indices) and item.drawn.applies[number]:
                applies[place] = 1
                noise[place] = item.drawn.noise(number, values)
        return {"applies": applies, "noise": noise}

    def _evaluate(self, group: Sequence[_Evaluation]) -> Iterator[tuple[str, bytes | Exception]]:
        """All held-out samples in one go, where the tensors are the same for every client."""
        alike: dict[int, list[_Evaluation]] = {}
        for client, work in group:
            if not sample_count(client.held_out):
                yield client.id, close_evaluation(work.plan, {}, 0)
            elif work.plan.sends != "all" or self._manifest.personal or work.plan.mix is not None:
                yield client.id, self._evaluated_alone(client, work)
            else:
                alike.setdefault(work.plan.rank, []).append((client, work))
        for some in alike.values():
            yield from self._evaluated(some)

    def _evaluated_alone(self, client: PreparedClient, work: Work) -> bytes | Exception:
        """A client that tests tensors of its own."""
        try:
            metrics = {}
            for suffix, tensors in variants_of(work, client.memory).items():
                losses, correct = self._evaluate_samples(
                    tensors, client.held_out, offset=work.offset
                )
                metrics["loss" + suffix] = rounded(float(losses.mean()))
                metrics["accuracy" + suffix] = rounded(float(correct.mean()))
            return close_evaluation(work.plan, metrics, sample_count(client.held_out))
        except Exception as fault:
            return fault

    def _evaluated(self, full: Sequence[_Evaluation]) -> Iterator[tuple[str, bytes | Exception]]:
        together = {
            name: np.concatenate([client.held_out[name] for client, _ in full])
            for name in (*self._names, "labels")
        }
        work = full[0][1]
        losses, correct = self._evaluate_samples(work.start, together, offset=work.offset)
        start = 0
        for client, own in full:
            part = slice(start, start + sample_count(client.held_out))
            start = part.stop
            metrics = {
                "loss": rounded(float(losses[part].mean())),
                "accuracy": rounded(float(correct[part].mean())),
            }
            yield client.id, close_evaluation(own.plan, metrics, part.stop - part.start)


def _stacked(parts: Sequence[Tensors]) -> dict[str, np.ndarray]:
    """One tensor a name, with an axis before its own: [parts, ...]."""
    return {name: np.stack([part[name] for part in parts]) for name in parts[0]}
