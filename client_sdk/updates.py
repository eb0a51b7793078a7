# SPDX-License-Identifier: Apache-2.0
"""From a plan to an update: decode the tensors, train or evaluate, clip and encode the difference.

`respond` is the whole of it for one client. A simulator that trains many clients at once calls the
two halves around its own training: `open_plan`, and `close_update` or `close_evaluation`.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Protocol

import numpy as np

from aggregation.codecs import codec_named, round_seeds
from aggregation.codecs.error_feedback import encode_with_feedback
from aggregation.privacy.clipping import clip
from aggregation.privacy.gaussian import Noise
from aggregation.privacy.local_gaussian import privatised
from client_sdk.errors import PlanError, TrainingError
from client_sdk.example_privacy import charge
from client_sdk.memory import ClientMemory
from client_sdk.noise import NoiseSeed, charge_release, secret_seed
from client_sdk.scaffold import next_control
from client_sdk.summing import hold
from client_sdk.weights import weighed
from client_sdk.work import CONTROL, PERSONAL, RESIDUAL, TRAINED, Work, needed, open_plan
from edge_runtime.adapter import mixed_tensors
from edge_runtime.batches import step_count
from protocol.controls import joined
from protocol.factors import chosen, cut
from protocol.manifest import Manifest
from protocol.plan import UNCLIPPED, Plan
from protocol.summing import plan_digest
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
        frozen: Collection[str],
        correction: Tensors,
        offset: Tensors,
    ) -> tuple[Tensors, Mapping[str, float]]:
        """Trained tensors, and metrics ("loss"); those named in `frozen` as they were.

        `correction` and `offset` as in `Work`.
        """
        ...

    def evaluate(self, tensors: Tensors, data: Tensors, *, offset: Tensors) -> Mapping[str, float]:
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
    noise: NoiseSeed = secret_seed,
) -> bytes:
    """Do what a plan asks with this client's data, and give the update container.

    `initial` are the bundle's tensors, for those that the plan does not send; `noise` gives the
    seed of what a client adds itself.

    Raises: PlanError, TrainingError; whatever the trainer raises.
    """
    work = open_plan(plan_blob, bundle_manifest, initial, memory)
    plan = work.plan
    if plan.client != client:
        raise PlanError(f"plan: expected one for client {client}, found one for {plan.client}")
    charge_plan(plan, bundle_manifest, sample_count(data_fit), memory)
    if plan.task == "evaluate":
        samples = sample_count(data_held_out)
        told: dict[str, float] = {}
        for suffix, tensors in variants_of(work, memory).items() if samples else ():
            values = trainer.evaluate(tensors, data_held_out, offset=work.offset)
            told |= {name + suffix: value for name, value in values.items()}
        return close_evaluation(plan, told, samples)
    trained, metrics = trainer.fit(
        work.start,
        data_fit,
        learning_rate=plan.learning_rate,
        epochs=plan.local_epochs,
        most_steps=plan.local_steps,
        seed=plan.seed,
        frozen=frozen_names(plan, bundle_manifest),
        correction=work.correction,
        offset=work.offset,
    )
    samples = sample_count(data_fit)
    return close_update(
        work, bundle_manifest, trained, metrics, samples, memory, noise_seed=noise(plan)
    )


def charge_plan(plan: Plan, manifest: Manifest, samples: int, memory: ClientMemory | None) -> None:
    """Hold a plan to what its job promises, of single samples and of a client's updates.

    Raises: as `example_privacy.charge` and `noise.charge_release`.
    """
    charge(plan, manifest, samples, memory)
    charge_release(plan, manifest, memory)


def variants_of(work: Work, memory: ClientMemory | None) -> dict[str, Tensors]:
    """The tensors that an "evaluate" plan asks to be tested, by what their metrics' names end in.

    "" for those of the plan; where it asks for a mixture "/local" for what this client trained last
    and "/mixed". A client that has trained nothing yet has only the first.
    """
    plan = work.plan
    variants: dict[str, Tensors] = {"": work.start}
    if plan.mix is not None and memory is not None:
        own = memory.latest(TRAINED, before=plan.round + 1)
        if own and ParamSpec.of(work.start).mismatch(own) is None:
            variants["/local"] = own
            variants["/mixed"] = mixed_tensors(own, work.start, plan.mix)
    return variants


def frozen_names(plan: Plan, manifest: Manifest) -> frozenset[str]:
    """The tensors that a plan leaves as they are."""
    trained = chosen(plan.trains, manifest.trainable, manifest.pairs)
    return frozenset(manifest.trainable.names) - frozenset(trained.names)


def close_update(
    work: Work,
    manifest: Manifest,
    trained: Tensors,
    metrics: Mapping[str, float],
    samples: int,
    memory: ClientMemory | None = None,
    *,
    noise_seed: bytes = b"",
) -> bytes:
    """The update container of what training changed: trained - start, clipped and encoded.

    `noise_seed` is secret and of this plan alone, for one that asks the client for noise.
    Tensors that were trained and are not shared stay here, for the next plan, and so does the
    client's control variate; so do metrics that the plan does not ask for.

    Raises: TrainingError when `trained` has other tensors than the start or is not finite;
        PrivacyError for a change that cannot be clipped or noised.
    """
    plan, spec, pairs = work.plan, manifest.trainable, manifest.pairs
    if problem := ParamSpec.of(work.start).mismatch(trained):
        raise TrainingError(f"trained tensors: {problem}")
    change = {name: trained[name] - before for name, before in work.start.items()}
    for name, value in change.items():
        if not np.isfinite(value).all():
            raise TrainingError(
                f'trained tensor "{name}" is not finite; '
                f"the learning rate {plan.learning_rate:g} may be too high"
            )
    delta = {name: change[name] for name in chosen(plan.shares, manifest.shared, pairs).names}
    own = {
        name: trained[name] for name in chosen(plan.trains, spec, pairs).names if name not in delta
    }
    control = _next_control(work, manifest, trained, samples)
    if control:
        delta = joined(delta, {name: control[name] - work.own_control[name] for name in delta})
    sent: Tensors = cut(delta, plan.rank, pairs)
    if plan.clip:
        clipped = clip(sent, plan.clip)
        sent = clipped.delta
        metrics = {**metrics, UNCLIPPED: float(clipped.unclipped)}
    if plan.noise and not plan.min_survivors:
        sent = privatised(sent, Noise(clip=plan.clip, multiplier=plan.noise), seed=noise_seed)
    # Metrics are of the samples as they are: where training is private, none leaves the client but
    # what follows from the private update.
    tells = tuple(word for word in plan.tells if word == UNCLIPPED or not manifest.training.privacy)
    told = {name: x for name, x in metrics.items() if name.partition("/")[0] in tells}
    blob = _encoded(work, manifest, sent, told, samples, memory, noise_seed)
    if plan.mix is not None:
        needed(memory).save(TRAINED, plan.round, trained)
    if own:
        needed(memory).save(PERSONAL, plan.round, own)
    if control:
        needed(memory).save(CONTROL, plan.round, control)
    return blob


def _next_control(
    work: Work, manifest: Manifest, trained: Tensors, samples: int
) -> Mapping[str, np.ndarray]:
    """SCAFFOLD's c_i after this training; {} where the job is not SCAFFOLD."""
    plan = work.plan
    if not work.control:
        return {}
    if plan.learning_rate == 0:
        raise PlanError("plan: expected a learning rate above 0 with SCAFFOLD, found 0")
    steps = step_count(
        samples, manifest.training.batch_size, plan.local_epochs, most_steps=plan.local_steps
    )
    control = next_control(
        work.own_control, work.control, work.start, trained,
        steps=steps, learning_rate=plan.learning_rate,
    )  # fmt: skip
    for name, value in control.items():
        if not np.isfinite(value).all():
            raise TrainingError(f'control variate of "{name}" is not finite')
    return control


def _encoded(
    work: Work,
    manifest: Manifest,
    delta: Tensors,
    metrics: Mapping[str, float],
    samples: int,
    memory: ClientMemory | None,
    noise_seed: bytes,
) -> bytes:
    plan = work.plan
    codec = codec_named(plan.uplink_codec)
    seeds = round_seeds(plan.job, plan.round, client_seed=plan.seed)
    delta, weight = weighed(work, delta, samples)
    left: dict[str, np.ndarray] = {}
    if plan.error_feedback:
        residual = needed(memory).latest(RESIDUAL, before=plan.round)
        payload, left = encode_with_feedback(codec, delta, residual, seeds=seeds)
    else:
        payload = codec.encode(delta, seeds=seeds)
    if plan.min_survivors:
        names = chosen(plan.sends, manifest.shared, manifest.pairs).names
        start = {name: work.start[name] for name in names}
        digest = plan_digest(plan, joined(start, work.centre))
        hold(needed(memory), plan, delta, payload, digest, weight=weight, seed=noise_seed)
        payload = b""
    if "samples" not in plan.tells and (plan.min_survivors or plan.noise):
        samples = 1  # how many there are stays here
    blob = _pack(plan, metrics, samples, payload)
    if plan.error_feedback:
        needed(memory).save(RESIDUAL, plan.round, left)
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
