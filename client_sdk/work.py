# SPDX-License-Identifier: Apache-2.0
"""From a plan's bytes to what a client starts from.

A client without a memory takes part in jobs that need none. With one it may be sent changes in
place of whole tensors and weights, and keep tensors and control variates of its own.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Final

import numpy as np

from aggregation.codecs import codec_named, round_seeds
from aggregation.errors import CodecError
from aggregation.offsets import changes_bytes, most_bytes, moved, unpack_changes
from client_sdk.errors import PlanError
from client_sdk.memory import ClientMemory
from protocol.container import Blob
from protocol.controls import joined, parted, with_controls
from protocol.errors import ContainerError
from protocol.factors import at_rank, chosen, cut, filled
from protocol.manifest import Manifest
from protocol.plan import MAX_PLAN_OVERHEAD, Plan, unpack_plan
from protocol.tensors import ParamSpec, Tensors

# Kinds of what a client keeps.
RESIDUAL: Final = "residual"
PERSONAL: Final = "personal"
CONTROL: Final = "control"
TRAINED: Final = "trained"
_BROADCAST: Final = "broadcast"
_OFFSET: Final = "offset"


@dataclass(frozen=True, slots=True, kw_only=True)
class Work:
    """A plan, and the tensors that this client has for it."""

    plan: Plan
    start: Mapping[str, np.ndarray]
    """Every trainable tensor, in the bundle's shapes: zeros fill up factors of a smaller rank."""
    offset: Mapping[str, np.ndarray] = field(default_factory=dict)
    """What is added to frozen weights, by their names."""
    control: Mapping[str, np.ndarray] = field(default_factory=dict)
    """SCAFFOLD: the server's control variate c of every trainable tensor."""
    own_control: Mapping[str, np.ndarray] = field(default_factory=dict)
    """SCAFFOLD: this client's, c_i."""
    centre: Mapping[str, np.ndarray] = field(default_factory=dict)
    """Around which the plan's `smoothing` is, of every tensor that the plan sends; else {}."""

    @property
    def correction(self) -> dict[str, np.ndarray]:
        """c - c_i, which every gradient has added to it; {} where the job is not SCAFFOLD."""
        return {name: value - self.own_control[name] for name, value in self.control.items()}


def longest_plan(manifest: Manifest) -> int:
    """Bytes that a plan of a bundle's job has at most."""
    offsets = most_bytes(manifest.pairs, manifest.trainable)
    # Control variates, or a centre, stand beside tensors in some plans.
    return with_controls(manifest.shared).nbytes + offsets + MAX_PLAN_OVERHEAD


def open_plan(
    blob: bytes, manifest: Manifest, initial: Tensors, memory: ClientMemory | None = None
) -> Work:
    """The plan, and what this client starts from.

    What the plan does not send is what the client kept for itself when it last trained it, or what
    the bundle holds.

    Raises: PlanError for a plan of another job, one that cannot be read, or one that builds on what
    this client does not hold.
    """
    pairs, whole = manifest.pairs, manifest.exchanged
    try:
        plan, payload = unpack_plan(blob, max_bytes=longest_plan(manifest))
        if plan.job != manifest.job:
            raise PlanError(
                f"plan: expected job {manifest.job[:12]}, found {plan.job[:12]}; fetch its bundle"
            )
        if plan.task == "evaluate" or plan.smoothing:
            whole = manifest.shared
        spec = at_rank(plan.rank, chosen(plan.sends, whole, pairs), pairs)
        if plan.smoothing:
            spec, whole = with_controls(spec), with_controls(whole)
        seeds = round_seeds(plan.job, plan.round)
        behind = changes_bytes(plan.offset_ranks, pairs, manifest.trainable)
        split = max(len(payload) - behind, 0)
        codec = codec_named(plan.downlink_codec)
        tensors = codec.decode(payload[:split], spec, spec.nbytes, seeds=seeds)
        offset = _offset(plan, payload[split:], manifest, memory)
    except (ContainerError, CodecError) as error:
        raise PlanError(f"plan: {error}") from error
    if plan.base_round == 0:
        base = cut(_first(manifest, initial), plan.rank, pairs)
        tensors = {name: base[name] + value for name, value in tensors.items()}
    elif plan.base_round is not None:
        tensors = _on_base(plan, plan.base_round, tensors, needed(memory))
    if plan.keep:
        needed(memory).save(_BROADCAST, plan.round, tensors)
    start, control = parted(filled(tensors, whole))
    centre: dict[str, np.ndarray] = {}
    if plan.smoothing:
        centre, control = control, {}
    if start.keys() != initial.keys():
        # A round's own training is what its evaluation is about.
        before = plan.round + (plan.task == "evaluate")
        own = memory.latest(PERSONAL, before=before) if memory is not None else {}
        start = {name: start.get(name, own.get(name, value)) for name, value in initial.items()}
    own_control: dict[str, np.ndarray] = {}
    if control:
        zeros = {name: np.zeros_like(value) for name, value in control.items()}
        own_control = needed(memory).latest(CONTROL, before=plan.round) or zeros
    return Work(
        plan=plan,
        start=start,
        offset=offset,
        control=control,
        own_control=own_control,
        centre=centre,
    )


def needed(memory: ClientMemory | None) -> ClientMemory:
    """Raises: PlanError without one."""
    if memory is None:
        raise PlanError(
            "plan: it needs a client that keeps tensors between rounds, this one cannot"
        )
    return memory


def _first(manifest: Manifest, initial: Tensors) -> dict[str, np.ndarray]:
    """Everything that travels, before the first round: control variates start at zero."""
    shared = {name: initial[name] for name in manifest.shared.names}
    if not manifest.training.scaffold:
        return shared
    return joined(shared, {name: np.zeros_like(value) for name, value in shared.items()})


def _on_base(
    plan: Plan, base_round: int, change: Tensors, memory: ClientMemory
) -> dict[str, np.ndarray]:
    """The tensors of the plan's base, changed as the server changed its own copy of them."""
    base = memory.of_round(_BROADCAST, base_round)
    if problem := ParamSpec.of(change).mismatch(base):
        raise PlanError(f"plan: expected to hold the tensors of round {base_round}: {problem}")
    return {name: base[name] + value for name, value in change.items()}


def _offset(
    plan: Plan, payload: Blob, manifest: Manifest, memory: ClientMemory | None
) -> dict[str, np.ndarray]:
    """How far frozen weights have moved, by their names. Raises: PlanError, CodecError."""
    changes = unpack_changes(payload, plan.offset_ranks, manifest.pairs, manifest.trainable)
    held: dict[str, np.ndarray] = {}
    if plan.offset_round:
        held = needed(memory).of_round(_OFFSET, plan.offset_round)
        if not held:
            raise PlanError(
                f"plan: expected to hold the frozen weights of round {plan.offset_round}, "
                "found none"
            )
    after = moved(held, changes)
    if after and plan.task == "fit":
        needed(memory).save(_OFFSET, plan.round, after)
    bases = {pair.down: pair.base for pair in manifest.pairs}
    if nameless := [down for down in after if not bases[down]]:
        raise PlanError(f'plan: the bundle does not name the frozen weight beside "{nameless[0]}"')
    return {bases[down]: value for down, value in after.items()}
