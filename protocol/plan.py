# SPDX-License-Identifier: Apache-2.0
"""What the coordinator asks of one client in one round: settings, and the current tensors encoded.

Magic `FLPL`; the form is that of container.py.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final, Literal

from protocol import _checks
from protocol.container import FIXED_BYTES, Blob, pack, require_canonical, unpack
from protocol.errors import MalformedError
from protocol.factors import CHOICES
from protocol.limits import (
    MAX_CLIENT_LENGTH,
    MAX_CODEC_LENGTH,
    MAX_EPOCHS,
    MAX_FACTOR_RANK,
    MAX_HEADER_BYTES,
    MAX_METRICS,
    MAX_NONCE_LENGTH,
    MAX_PAYLOAD_BYTES,
    MAX_ROUND,
    MAX_SAMPLES,
    MAX_SEED,
    MAX_STEPS,
    MAX_TENSORS,
    MIN_NONCE_LENGTH,
)
from protocol.update import MAX_UPDATE_OVERHEAD

PLAN_MAGIC: Final = b"FLPL"
MAX_PLAN_OVERHEAD: Final = FIXED_BYTES + MAX_HEADER_BYTES
"""What a plan may be longer than its payload."""

DENSE: Final = -1
UNCLIPPED: Final = "unclipped"
"""The metric that says whether `Plan.clip` left an update as it was."""

_TASKS: Final = ("fit", "evaluate")


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """One client's work. An answer repeats `job`, `round`, `nonce` and `client`."""

    job: str  # SHA-256 of the job, 64 hex digits
    round: int
    nonce: str  # hex; one attempt of one round
    client: str
    downlink_codec: str  # of this plan's payload
    uplink_codec: str  # of the update that is asked for
    task: Literal["fit", "evaluate"]
    learning_rate: float  # at least 0
    local_epochs: int  # at least 1 to fit; evaluation does not read it
    seed: int
    max_update_bytes: int  # a longer answer is rejected; headers included
    local_steps: int = 0  # most steps of those that the epochs would take; 0: no limit
    error_feedback: bool = False  # the client adds what its codec left behind in earlier rounds
    base_round: int | None = None
    """None: the payload holds the tensors. Else their change since this client's plan of that
    round; 0: since the bundle's own tensors."""
    keep: bool = False  # the client keeps the tensors, as a later plan's base
    sends: str = "all"
    """Which tensors the payload holds, a word of `factors.CHOICES`. The client has the others from
    its bundle, or kept them when it trained and did not share them."""
    trains: str = "all"  # which tensors it trains; the others stay as they are
    shares: str = "all"  # which tensors its update holds
    tells: tuple[str, ...] = ("loss",)
    """Which metrics of its training the client tells; "selected" means "selected/0" and on."""
    mix: float | None = None
    """To fit: the client keeps what it trains, if this is set. To evaluate: it also tests what it
    kept, and this share of it mixed into the tensors of the plan."""
    clip: float = 0.0
    """l2 norm that the update is cut to before it is encoded; 0: it is not. Told "unclipped", as a
    word of `tells`, means 1 where that changed nothing, and else 0."""
    noise: float = 0.0
    """Deviation of the noise that the client itself adds to each value of its update, or of its
    part in a secure sum, in `clip`s; 0: none."""
    rank: int = 0  # of this client's factors, as in `factors.at_rank`; 0: as the bundle has it
    offset_round: int = 0
    """Frozen weights are those of this client's plan of that round (0: the bundle's), moved by what
    follows the tensors in the payload."""
    offset_ranks: tuple[int, ...] = ()
    """What follows, one number a pair of the manifest: n for factors [d, n] and [n, k] of the
    change, DENSE for the change [d, k], 0 for none; () for none at all."""

    min_survivors: int = 0
    """The update is for a secure sum of at least so many; 0: it is sent as it is. In a secure sum
    the answer is without it, and messages of the sum follow."""
    corrupt: float = 0.0  # of clients in a secure sum, the largest share that may help the server
    dropouts: float = 0.0  # and the largest share that may be lost on the way
    full_weight_samples: int = 0
    """In a secure sum, the samples from which a client has the full weight; others weigh as large a
    share of it as they have of these. 0: all weigh the same."""
    smoothing: float = 0.0
    """In a secure sum, within which distance of a centre an update has the full weight; others
    weigh less in proportion, and what is summed is the update less the centre. It travels beside
    the tensors, as in controls.py. 0: there is none."""

    def __post_init__(self) -> None:
        error = MalformedError
        _checks.hexadecimal("job", self.job, 64, 64, error)
        self._set_integer("round", 0, MAX_ROUND)
        _checks.hexadecimal("nonce", self.nonce, MIN_NONCE_LENGTH, MAX_NONCE_LENGTH, error)
        _checks.text("client", self.client, MAX_CLIENT_LENGTH, error)
        _checks.text("downlink_codec", self.downlink_codec, MAX_CODEC_LENGTH, error)
        _checks.text("uplink_codec", self.uplink_codec, MAX_CODEC_LENGTH, error)
        _checks.one_of("task", self.task, _TASKS, error)
        rate = _checks.real("learning_rate", self.learning_rate, error, low=0.0)
        object.__setattr__(self, "learning_rate", rate)
        self._set_integer("local_epochs", 1 if self.task == "fit" else 0, MAX_EPOCHS)
        self._set_integer("seed", 0, MAX_SEED)
        self._set_integer("local_steps", 0, MAX_STEPS)
        _checks.boolean("error_feedback", self.error_feedback, error)
        if self.base_round is not None:
            self._set_integer("base_round", 0, max(self.round - 1, 0))
        _checks.boolean("keep", self.keep, error)
        for name in ("sends", "trains", "shares"):
            _checks.one_of(name, getattr(self, name), CHOICES, error)
        if self.mix is not None:
            mix = _checks.real("mix", self.mix, error, low=0.0)
            if mix > 1:
                raise error(f"mix: expected at most 1, found {mix:g}")
            object.__setattr__(self, "mix", mix)
        words = _checks.sequence("tells", self.tells, MAX_METRICS, error)
        told = tuple(_checks.text("tells", word, MAX_CLIENT_LENGTH, error) for word in words)
        object.__setattr__(self, "tells", told)
        clip = _checks.real("clip", self.clip, error, low=0.0)
        object.__setattr__(self, "clip", clip)
        noise = _checks.real("noise", self.noise, error, low=0.0)
        object.__setattr__(self, "noise", noise)
        if noise and not clip:
            raise error("clip: expected a norm above 0 with noise, found 0")
        self._set_integer("rank", 0, MAX_FACTOR_RANK)
        self._set_integer("offset_round", 0, self.round)
        self._set_integer("min_survivors", 0, MAX_ROUND)
        most = MAX_SAMPLES if self.min_survivors else 0
        self._set_integer("full_weight_samples", 0, most)
        smoothing = _checks.real("smoothing", self.smoothing, error, low=0.0)
        if smoothing and not (self.min_survivors and self.base_round is None):
            raise error("smoothing: expected 0 without a secure sum, or beside changes of tensors")
        if smoothing and self.full_weight_samples:
            raise error("smoothing: expected 0 with full_weight_samples: an update has one weight")
        object.__setattr__(self, "smoothing", smoothing)
        for name in ("corrupt", "dropouts"):
            share = _checks.real(name, getattr(self, name), error, low=0.0)
            if share >= 1:
                raise error(f"{name}: expected a share below 1, found {share:g}")
            object.__setattr__(self, name, share)
        ranks = _checks.sequence("offset_ranks", self.offset_ranks, MAX_TENSORS, error)
        checked = (
            _checks.integer("offset_ranks", rank, DENSE, MAX_FACTOR_RANK, error) for rank in ranks
        )
        object.__setattr__(self, "offset_ranks", tuple(checked))
        self._set_integer("max_update_bytes", 1, MAX_PAYLOAD_BYTES + MAX_UPDATE_OVERHEAD)

    def _set_integer(self, field: str, low: int, high: int) -> None:
        checked = _checks.integer(field, getattr(self, field), low, high, MalformedError)
        object.__setattr__(self, field, checked)


def pack_plan(plan: Plan, payload: Blob) -> bytes:
    """The bytes that travel."""
    return pack(PLAN_MAGIC, plan_fields(plan), payload)


def unpack_plan(blob: Blob, *, max_bytes: int) -> tuple[Plan, memoryview]:
    """Plan and payload; the payload is a read-only view of `blob`. Raises: ContainerError."""
    value, text, payload = unpack(PLAN_MAGIC, blob, max_bytes=max_bytes)
    fields = _checks.keys("header", value, _FIELDS, MalformedError)
    plan = Plan(**fields)
    require_canonical(plan_fields(plan), text)
    return plan, payload


_FIELDS: Final = (
    "job",
    "round",
    "nonce",
    "client",
    "downlink_codec",
    "uplink_codec",
    "task",
    "learning_rate",
    "local_epochs",
    "seed",
    "local_steps",
    "error_feedback",
    "base_round",
    "keep",
    "sends",
    "trains",
    "shares",
    "tells",
    "mix",
    "clip",
    "noise",
    "rank",
    "offset_round",
    "offset_ranks",
    "min_survivors",
    "corrupt",
    "dropouts",
    "full_weight_samples",
    "smoothing",
    "max_update_bytes",
)


def plan_fields(plan: Plan) -> dict[str, object]:
    """The header, ready for JSON."""
    return {name: getattr(plan, name) for name in _FIELDS}
