# SPDX-License-Identifier: Apache-2.0
"""From a plan to an update: decode the tensors, train or evaluate, encode the difference.

`respond` is the whole of it for one client. A simulator that trains many clients at once calls the
two halves around its own training: `open_plan`, and `close_update` or `close_evaluation`.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Protocol

import numpy as np

from aggregation.codecs import codec_named
from aggregation.errors import CodecError
from client_sdk.errors import PlanError, TrainingError
from protocol.errors import ContainerError
from protocol.manifest import Manifest
from protocol.plan import MAX_PLAN_OVERHEAD, Plan, unpack_plan
from protocol.tensors import ParamSpec, Tensors
from protocol.update import UpdateHeader, pack_update


class Trainer(Protocol):
    """What trains. `data` holds preprocessed model inputs and "labels", first axis: samples."""

    def fit(
        self,
        tensors: Tensors,
        data: Tensors,
        *,
        learning_rate: float,
        epochs: int,
        most_steps: int,
        seed: int,
    ) -> tuple[Tensors, Mapping[str, float]]:
        """Trained tensors, and metrics ("loss")."""
        ...

    def evaluate(self, tensors: Tensors, data: Tensors) -> Mapping[str, float]:
        """Metrics ("loss", "accuracy")."""
        ...


def respond(
    plan_blob: bytes,
    *,
    bundle_manifest: Manifest,
    trainer: Trainer,
    data_fit: Tensors,
    data_held_out: Tensors,
    client: str,
) -> bytes:
    """Do what a plan asks with this client's data, and give the update container.

    Raises: PlanError, TrainingError; whatever the trainer raises.
    """
    plan, broadcast = open_plan(plan_blob, bundle_manifest)
    if plan.client != client:
        raise PlanError(f"plan: expected one for client {client}, found one for {plan.client}")
    if plan.task == "evaluate":
        samples = sample_count(data_held_out)
        metrics = trainer.evaluate(broadcast, data_held_out) if samples else {}
        return close_evaluation(plan, metrics, samples)
    trained, metrics = trainer.fit(
        broadcast,
        data_fit,
        learning_rate=plan.learning_rate,
        epochs=plan.local_epochs,
        most_steps=plan.local_steps,
        seed=plan.seed,
    )
    return close_update(plan, broadcast, trained, metrics, sample_count(data_fit))


def open_plan(blob: bytes, manifest: Manifest) -> tuple[Plan, dict[str, np.ndarray]]:
    """The plan, and the global tensors as this client sees them.

    Raises: PlanError for a plan of another job, or one that cannot be read.
    """
    spec = manifest.trainable
    try:
        plan, payload = unpack_plan(blob, max_bytes=spec.nbytes + MAX_PLAN_OVERHEAD)
        if plan.job != manifest.job:
            raise PlanError(
                f"plan: expected job {manifest.job[:12]}, found {plan.job[:12]}; fetch its bundle"
            )
        return plan, codec_named(plan.downlink_codec).decode(payload, spec, spec.nbytes)
    except (ContainerError, CodecError) as error:
        raise PlanError(f"plan: {error}") from error


def close_update(
    plan: Plan, broadcast: Tensors, trained: Tensors, metrics: Mapping[str, float], samples: int
) -> bytes:
    """The update container of what training changed: trained - broadcast, encoded.

    Raises: TrainingError when `trained` has other tensors than `broadcast` or is not finite.
    """
    if problem := ParamSpec.of(broadcast).mismatch(trained):
        raise TrainingError(f"trained tensors: {problem}")
    delta = {}
    for name, before in broadcast.items():
        delta[name] = trained[name] - before
        if not np.isfinite(delta[name]).all():
            raise TrainingError(
                f'trained tensor "{name}" is not finite; '
                f"the learning rate {plan.learning_rate:g} may be too high"
            )
    return _pack(plan, metrics, samples, codec_named(plan.uplink_codec).encode(delta))


def close_evaluation(plan: Plan, metrics: Mapping[str, float], samples: int) -> bytes:
    """The answer to an "evaluate" plan: metrics and no tensors."""
    # A header's sample count is at least 1; a client that holds nothing back sends no metrics,
    # and is known by that.
    return _pack(plan, metrics, max(samples, 1), b"")


def sample_count(data: Tensors) -> int:
    """Samples in a client's data."""
    return len(data["labels"]) if "labels" in data else 0


def _pack(plan: Plan, metrics: Mapping[str, float], samples: int, payload: bytes) -> bytes:
    header = UpdateHeader(
        job=plan.job,
        round=plan.round,
        nonce=plan.nonce,
        client=plan.client,
        codec=plan.uplink_codec,
        samples=samples,
        metrics={name: float(value) for name, value in metrics.items()},
    )
    blob = pack_update(header, payload)
    if len(blob) > plan.max_update_bytes:
        raise TrainingError(
            f"update: expected at most {plan.max_update_bytes} bytes, it has {len(blob)}; "
            f"codec {plan.uplink_codec} does not fit this plan's budget"
        )
    return blob
