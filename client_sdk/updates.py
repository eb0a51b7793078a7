# SPDX-License-Identifier: Apache-2.0
"""From a plan to an update: decode the tensors, train or evaluate, encode the difference.

`respond` is the whole of it for one client. A simulator that trains many clients at once calls the
two halves around its own training: `open_plan`, and `close_update` or `close_evaluation`.

A client without a memory takes part in jobs that need none. With one it may be sent changes in
place of whole tensors, and adds to each update what the codec left behind in earlier ones.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Final, Protocol

import numpy as np

from aggregation.codecs import codec_named, round_seeds
from aggregation.codecs.error_feedback import encode_with_feedback
from aggregation.errors import CodecError
from client_sdk.errors import PlanError, TrainingError
from client_sdk.memory import ClientMemory
from protocol.errors import ContainerError
from protocol.factors import chosen
from protocol.manifest import Manifest
from protocol.plan import MAX_PLAN_OVERHEAD, Plan, unpack_plan
from protocol.tensors import ParamSpec, Tensors
from protocol.update import UpdateHeader, pack_update

# Kinds of what a client keeps.
_RESIDUAL: Final = "residual"
_BROADCAST: Final = "broadcast"
_PERSONAL: Final = "personal"


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
        frozen: Collection[str],
    ) -> tuple[Tensors, Mapping[str, float]]:
        """Trained tensors, and metrics ("loss"); those named in `frozen` as they were."""
        ...

    def evaluate(self, tensors: Tensors, data: Tensors) -> Mapping[str, float]:
        """Metrics ("loss", "accuracy")."""
        ...


def respond(
    plan_blob: bytes,
    *,
    bundle_manifest: Manifest,
    initial: Tensors,
    trainer: Trainer,
    data_fit: Tensors,
    data_held_out: Tensors,
    client: str,
    memory: ClientMemory | None = None,
) -> bytes:
    """Do what a plan asks with this client's data, and give the update container.

    `initial` are the bundle's tensors, for those that the plan does not send.

    Raises: PlanError, TrainingError; whatever the trainer raises.
    """
    plan, start = open_plan(plan_blob, bundle_manifest, initial, memory)
    if plan.client != client:
        raise PlanError(f"plan: expected one for client {client}, found one for {plan.client}")
    if plan.task == "evaluate":
        samples = sample_count(data_held_out)
        metrics = trainer.evaluate(start, data_held_out) if samples else {}
        return close_evaluation(plan, metrics, samples)
    trained, metrics = trainer.fit(
        start,
        data_fit,
        learning_rate=plan.learning_rate,
        epochs=plan.local_epochs,
        most_steps=plan.local_steps,
        seed=plan.seed,
        frozen=frozen_names(plan, bundle_manifest),
    )
    samples = sample_count(data_fit)
    return close_update(plan, bundle_manifest, start, trained, metrics, samples, memory)


def frozen_names(plan: Plan, manifest: Manifest) -> frozenset[str]:
    """The tensors that a plan leaves as they are."""
    trained = chosen(plan.trains, manifest.trainable, manifest.pairs)
    return frozenset(manifest.trainable.names) - frozenset(trained.names)


def open_plan(
    blob: bytes, manifest: Manifest, initial: Tensors, memory: ClientMemory | None = None
) -> tuple[Plan, dict[str, np.ndarray]]:
    """The plan, and the tensors that this client starts from.

    What the plan does not send is what the client kept for itself when it last trained it, or what
    the bundle holds.

    Raises: PlanError for a plan of another job, one that cannot be read, or one that builds on what
    this client does not hold.
    """
    whole = manifest.trainable
    try:
        plan, payload = unpack_plan(blob, max_bytes=whole.nbytes + MAX_PLAN_OVERHEAD)
        if plan.job != manifest.job:
            raise PlanError(
                f"plan: expected job {manifest.job[:12]}, found {plan.job[:12]}; fetch its bundle"
            )
        spec = chosen(plan.sends, whole, manifest.pairs)
        seeds = round_seeds(plan.job, plan.round)
        codec = codec_named(plan.downlink_codec)
        tensors = codec.decode(payload, spec, spec.nbytes, seeds=seeds)
    except (ContainerError, CodecError) as error:
        raise PlanError(f"plan: {error}") from error
    if plan.base_round == 0:
        tensors = {name: initial[name] + value for name, value in tensors.items()}
    elif plan.base_round is not None:
        tensors = _on_base(plan, plan.base_round, tensors, _memory(memory))
    if plan.keep:
        _memory(memory).save(_BROADCAST, plan.round, tensors)
    if plan.sends == "all":
        return plan, tensors
    # A round's own training is what its evaluation is about.
    before = plan.round + (plan.task == "evaluate")
    own = memory.latest(_PERSONAL, before=before) if memory is not None else {}
    return plan, {name: tensors.get(name, own.get(name, initial[name])) for name in whole.names}


def _on_base(
    plan: Plan, base_round: int, change: Tensors, memory: ClientMemory
) -> dict[str, np.ndarray]:
    """The tensors of the plan's base, changed as the server changed its own copy of them."""
    base = memory.of_round(_BROADCAST, base_round)
    if problem := ParamSpec.of(change).mismatch(base):
        raise PlanError(f"plan: expected to hold the tensors of round {base_round}: {problem}")
    return {name: base[name] + value for name, value in change.items()}


def _memory(memory: ClientMemory | None) -> ClientMemory:
    if memory is None:
        raise PlanError(
            "plan: it needs a client that keeps tensors between rounds, this one cannot"
        )
    return memory


def close_update(
    plan: Plan,
    manifest: Manifest,
    start: Tensors,
    trained: Tensors,
    metrics: Mapping[str, float],
    samples: int,
    memory: ClientMemory | None = None,
) -> bytes:
    """The update container of what training changed: trained - start, encoded.

    Tensors that were trained and are not shared stay here, for the next plan.

    Raises: TrainingError when `trained` has other tensors than `start` or is not finite.
    """
    if problem := ParamSpec.of(start).mismatch(trained):
        raise TrainingError(f"trained tensors: {problem}")
    change = {name: trained[name] - before for name, before in start.items()}
    for name, value in change.items():
        if not np.isfinite(value).all():
            raise TrainingError(
                f'trained tensor "{name}" is not finite; '
                f"the learning rate {plan.learning_rate:g} may be too high"
            )
    spec, pairs = manifest.trainable, manifest.pairs
    delta = {name: change[name] for name in chosen(plan.shares, spec, pairs).names}
    own = {
        name: trained[name] for name in chosen(plan.trains, spec, pairs).names if name not in delta
    }
    blob = _encoded(plan, delta, metrics, samples, memory)
    if own:
        _memory(memory).save(_PERSONAL, plan.round, own)
    return blob


def _encoded(
    plan: Plan,
    delta: Tensors,
    metrics: Mapping[str, float],
    samples: int,
    memory: ClientMemory | None,
) -> bytes:
    codec = codec_named(plan.uplink_codec)
    seeds = round_seeds(plan.job, plan.round, client_seed=plan.seed)
    if not plan.error_feedback:
        return _pack(plan, metrics, samples, codec.encode(delta, seeds=seeds))
    kept = _memory(memory)
    residual = kept.latest(_RESIDUAL, before=plan.round)
    payload, left = encode_with_feedback(codec, delta, residual, seeds=seeds)
    blob = _pack(plan, metrics, samples, payload)
    kept.save(_RESIDUAL, plan.round, left)
    return blob


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
