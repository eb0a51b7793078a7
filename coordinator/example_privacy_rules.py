# SPDX-License-Identifier: Apache-2.0
"""What the rest of a job must be where samples are private."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

from coordinator.errors import Fault
from coordinator.toml_text import toml_value

if TYPE_CHECKING:
    from coordinator.job import Job


def example_privacy_faults(job: Job) -> list[Fault]:
    """What private samples do not go with; none where they are not private."""
    if not job.example_privacy.is_private:
        return []
    return [*_step_faults(job), *_released_faults(job), *_delta_faults(job)]


def _step_faults(job: Job) -> Iterator[Fault]:
    training, rounds = job.training, job.rounds
    if job.is_split:
        words = "expected another method: a split network sends features and gradients of samples"
        yield _fault("method.name", job.method.name, words)
    if training.scaffold:
        words = "false: how control variates and noise go together is not looked into"
        yield _fault("training.scaffold", training.scaffold, f"expected {words}")
    if not training.local_steps:
        words = (
            "expected the steps of a round, each of samples drawn anew: private training knows no "
            "passes over the samples"
        )
        yield _fault("training.local_steps", training.local_steps, words)
    if training.local_epochs != 1:
        words = "expected 1: private training knows no passes, see training.local_steps"
        yield _fault("training.local_epochs", training.local_epochs, words)
    if rounds.min_samples < training.batch_size:
        words = (
            "expected the samples of the smallest client that takes part, at least "
            f"training.batch_size = {training.batch_size}: its samples are drawn most often, and "
            "it is what is accounted for"
        )
        yield _fault("rounds.min_samples", rounds.min_samples, words)
    if rounds.mode == "async":
        words = 'expected "sync": how often a client takes part has to be known beforehand'
        yield _fault("rounds.mode", rounds.mode, words)


def _released_faults(job: Job) -> Iterator[Fault]:
    """What would leave a client beside its update, and is of its samples as they are."""
    if job.update.metrics:
        words = "expected an empty text: losses and counts are of the samples, without noise"
        yield _fault("update.metrics", job.update.metrics, words)
    if job.data.held_out:
        words = "expected 0: a client's test is of its samples, without noise"
        yield _fault("data.held_out", job.data.held_out, words)


def _delta_faults(job: Job) -> Iterator[Fault]:
    delta, fewest = job.example_privacy.delta, job.rounds.min_samples
    if fewest and delta * fewest >= 1:
        words = (
            f"expected less than {toml_value(1 / fewest)}, one in rounds.min_samples = {fewest}: "
            "delta is a chance that nothing is promised about, and would cover publishing a sample"
        )
        yield _fault("example_privacy.delta", delta, words)


def _fault(key: str, value: object, allowed: str) -> Fault:
    return Fault(key=key, value=value, allowed=allowed)
