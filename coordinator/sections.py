# SPDX-License-Identifier: Apache-2.0
"""The sections of a job file, a frozen dataclass each.

Every key is declared once, with `keys.key`: its default, its range or its choices, and one line of
help. Type checks, error messages, `describe_job` and the command line's help all come from there.
`[privacy]` stands in `privacy_section.py`; rules that concern several sections in `job.py`.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

from aggregation.codecs import CODEC_FORMS, codec_named
from aggregation.errors import AggregationError
from aggregation.selection import (
    MERGER_FORMS,
    SERVER_FORMS,
    described_merger,
    server_optimizer_named,
)
from coordinator.errors import Fault, JobError
from coordinator.keys import MAX_INT, Scalar
from coordinator.keys import check as _check
from coordinator.keys import key as _key
from protocol.activations import FORMS
from protocol.limits import MAX_LANES

IMAGE_DATASETS = ("digits", "fashion-mnist")
TEXT_DATASETS = ("debian-descriptions",)
IMAGE_BACKBONES = ("vit-small-28",)
TEXT_BACKBONES = ("all-minilm-l6-v2",)

_MAX_ADAPTIVE_RATE = 0.5
_ANY = re.compile(r"(?s).+")
_RANKS = re.compile(r"([1-9][0-9]{0,4}( *, *[1-9][0-9]{0,4})*)?")
_TOLD = "(loss|selected|samples|accuracy)"
_WHOLE_CODECS = ("float32", "float16", "bfloat16")
_SPLIT = r"(iid|natural|shards:[0-9]{1,9}|dirichlet:([0-9]+(\.[0-9]*)?|\.[0-9]+)(e-?[0-9]{1,3})?)"
_PARTITION = re.compile(rf"{_SPLIT}|domains(:mixed|:one-per-client|:[1-5])?(,{_SPLIT})?")
_PARTITIONS = (
    'expected "iid", "natural", "dirichlet:0.3" (alpha > 0), "shards:2" (shards a client >= 1), '
    '"domains:mixed", "domains:one-per-client" or "domains:2" (1 to 5 of the five a client), these '
    'three also as "domains:mixed,dirichlet:0.3"'
)


def _forms(forms: Iterable[str]) -> str:
    return "expected one of " + ", ".join(forms)


@dataclass(frozen=True, slots=True, kw_only=True)
class JobSection:
    """`[job]`"""

    name: str = _key("job", "name of the run, shown in reports; does not change the result")
    seed: int = _key(0, "seed of every random choice", low=0)

    def __post_init__(self) -> None:
        _check(self, "job")


@dataclass(frozen=True, slots=True, kw_only=True)
class BackboneSection:
    """`[backbone]`: a backbone by name, or a folder."""

    name: str = _key(
        "vit-small-28",
        "backbone that is fine-tuned, by name; empty where `path` is given",
        choices=(*IMAGE_BACKBONES, *TEXT_BACKBONES, ""),
    )
    path: str = _key("", "backbone as a Hugging Face folder, relative to the job file")
    random_weights: bool = _key(False, "forget the pre-trained weights (a control experiment)")

    def __post_init__(self) -> None:
        _check(self, "backbone")
        if bool(self.name) == bool(self.path):
            allowed = 'expected either a name, or name = "" and a path'
            raise JobError([Fault(key="backbone.path", value=self.path, allowed=allowed)])


@dataclass(frozen=True, slots=True, kw_only=True)
class DataSection:
    """`[data]`"""

    dataset: str = _key(
        "digits",
        "digits, fashion-mnist, debian-descriptions, or a folder relative to the job file",
        pattern=_ANY,
        allowed="expected "
        + ", ".join(f'"{name}"' for name in (*IMAGE_DATASETS, *TEXT_DATASETS))
        + " or a folder",
    )
    clients: int = _key(20, "number of clients", low=1, high=100_000)
    partition: str = _key(
        "iid", "how samples are dealt to clients", pattern=_PARTITION, allowed=_PARTITIONS
    )
    held_out: float = _key(
        0.2, "share of each client's samples kept for its own test", low=0, below=1
    )
    samples_per_client: int = _key(0, "most samples a client holds; 0: all dealt to it", low=0)
    max_train_samples: int = _key(0, "training samples used of the data set; 0: all", low=0)
    max_test_samples: int = _key(0, "test samples used of the data set; 0: all", low=0)
    validation: float = _key(
        0.0,
        "share of the test samples that the coordinator chooses by (greedy-soup) and does not test",
        low=0,
        below=1,
    )
    max_length: int = _key(24, "tokens a text is cut to", low=2, high=512)
    classes: str = _key(
        "",
        'class names with commas between, such as "cat,dog", for a deployment whose coordinator '
        "has no samples of its own; `dataset` is then not looked at",
    )

    @property
    def class_names(self) -> tuple[str, ...]:
        """Of `classes`; () where the data set says them."""
        return tuple(name.strip() for name in self.classes.split(",")) if self.classes else ()

    def __post_init__(self) -> None:
        _check(self, "data")
        names = self.class_names
        if names and (len(names) < 2 or len(set(names)) < len(names) or not all(names)):
            allowed = "expected at least two different names with commas between"
            raise JobError([Fault(key="data.classes", value=self.classes, allowed=allowed)])
        split = self.partition.rpartition(",")[2]
        setting = split.partition(":")[2]
        if split.startswith(("dirichlet", "shards")) and not 0 < float(setting) < math.inf:
            raise JobError([Fault(key="data.partition", value=self.partition, allowed=_PARTITIONS)])


@dataclass(frozen=True, slots=True, kw_only=True)
class MethodSpec:
    """`[method]`: a name, and settings that the method's own dataclass checks."""

    name: str = "lora"
    settings: Mapping[str, Scalar | tuple[Scalar, ...]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        faults = []
        if not isinstance(self.name, str) or not self.name:
            allowed = 'expected the name of a method, e.g. "lora"'
            faults.append(Fault(key="method.name", value=self.name, allowed=allowed))
        settings: dict[str, Scalar | tuple[Scalar, ...]] = {}
        for key, value in self.settings.items():
            # TOML gives lists; a tuple cannot be changed behind the job's back.
            settings[key] = tuple(value) if isinstance(value, list | tuple) else value
            items = value if isinstance(value, list | tuple) else (value,)
            if not all(_is_scalar(item) for item in items):
                allowed = "expected a finite number, a text, true or false, or a list of those"
                faults.append(Fault(key=f"method.{key}", value=value, allowed=allowed))
        if faults:
            raise JobError(faults)
        object.__setattr__(self, "settings", settings)


def _is_scalar(value: object) -> bool:
    if isinstance(value, int | float) and not isinstance(value, bool):
        return math.isfinite(value) and abs(value) <= MAX_INT
    return isinstance(value, str | bool)


@dataclass(frozen=True, slots=True, kw_only=True)
class TrainingSection:
    """`[training]`: what a client does in a round."""

    optimizer: str = _key("sgd", "the client's optimizer", choices=("sgd", "adamw"))
    learning_rate: float = _key(0.05, "the client's learning rate", above=0, high=100)
    weight_decay: float = _key(0.0, "decoupled weight decay a step", low=0, high=1)
    momentum: float = _key(0.0, "momentum of sgd; 0: none", low=0, below=1)
    proximal: float = _key(
        0.0,
        "FedProx: pull towards the tensors that the round began with (mu); 0: none",
        low=0,
        high=100,
    )
    scaffold: bool = _key(
        False,
        "SCAFFOLD: correct every step by how a client's gradients differ from the others'; doubles "
        "the traffic; plain sgd, uniform weights",
    )
    batch_size: int = _key(8, "samples a step", low=1, high=65_536)
    local_epochs: int = _key(1, "passes over the client's samples a round", low=1, high=1000)
    local_steps: int = _key(
        0, "most steps a round, of those that the passes would take; 0: no limit", low=0
    )

    def __post_init__(self) -> None:
        _check(self, "training")
        if self.optimizer == "adamw" and self.momentum:
            allowed = 'expected 0 with optimizer = "adamw", which has none'
            raise JobError([Fault(key="training.momentum", value=self.momentum, allowed=allowed)])
        if self.scaffold and (self.optimizer != "sgd" or self.momentum or self.proximal):
            allowed = 'expected false, or optimizer = "sgd" with momentum and proximal 0 beside it'
            raise JobError([Fault(key="training.scaffold", value=self.scaffold, allowed=allowed)])


@dataclass(frozen=True, slots=True, kw_only=True)
class UpdateSection:
    """`[update]`: how tensors travel."""

    codec: str = _key(
        "float32", "encoding of updates (uplink)", pattern=_ANY, allowed=_forms(CODEC_FORMS)
    )
    error_feedback: bool = _key(
        False, "clients keep what the codec left behind, and add it to their next update"
    )
    metrics: str = _key(
        "loss",
        "what clients tell beside the update: loss, of their training; for pools selected, how "
        "often each element was; and what they tell of themselves even so, but where sums are "
        "secure: samples, how many they have, and accuracy, of their own tests",
        pattern=re.compile(rf"({_TOLD}(,{_TOLD})*)?"),
        allowed="expected words of loss, selected, samples, accuracy with commas between, each "
        "once, or an empty text",
    )
    downlink: str = _key(
        "tensors",
        "what is sent to clients: the global tensors, or their change since the round before to "
        "clients that took part in it",
        choices=("tensors", "changes"),
    )
    downlink_codec: str = _key(
        "float32",
        "encoding of what is sent to clients (downlink)",
        pattern=_ANY,
        allowed=_forms(CODEC_FORMS),
    )

    @property
    def told(self) -> tuple[str, ...]:
        """`metrics` as words."""
        return tuple(self.metrics.split(",")) if self.metrics else ()

    def __post_init__(self) -> None:
        _check(self, "update")
        faults = []
        if len(set(self.told)) < len(self.told):
            words = "expected each word once"
            faults.append(Fault(key="update.metrics", value=self.metrics, allowed=words))
        for key in ("codec", "downlink_codec"):
            value = getattr(self, key)
            try:
                # The canonical spelling, so that one job has one hash.
                object.__setattr__(self, key, codec_named(value).name)
            except AggregationError as error:
                allowed = str(error).removeprefix("codec: ")
                faults.append(Fault(key=f"update.{key}", value=value, allowed=allowed))
        if not faults and self.downlink == "tensors" and self.downlink_codec not in _WHOLE_CODECS:
            allowed = (
                f'expected one of {", ".join(_WHOLE_CODECS)} with downlink = "tensors": the others '
                'describe only a change (downlink = "changes")'
            )
            value = self.downlink_codec
            faults.append(Fault(key="update.downlink_codec", value=value, allowed=allowed))
        if faults:
            raise JobError(faults)


@dataclass(frozen=True, slots=True, kw_only=True)
class AggregationSection:
    """`[aggregation]`"""

    merger: str = _key(
        "weighted-mean",
        "how updates are combined",
        pattern=_ANY,
        allowed=_forms(MERGER_FORMS),
    )
    factors: str = _key(
        "both",
        "LoRA: train both factors, or only up (B), with down (A) as the bundle has it",
        choices=("both", "up"),
    )
    ranks: str = _key(
        "",
        "LoRA: ranks that clients' factors have, each client one of them by its name; empty: all "
        "that of the method",
        pattern=_RANKS,
        allowed='expected a list of ranks such as "4,8,16", or an empty text',
    )
    weighting: str = _key("samples", "weight of an update", choices=("samples", "uniform"))
    full_weight_samples: int = _key(
        0,
        "samples from which a client's update weighs no more; 0: however many it has. Needed where "
        "weighted updates are summed securely, about as many as the larger clients have",
        low=0,
        high=1_000_000_000,
    )
    server_optimizer: str = _key(
        "averaging",
        "what the server does with the merged update: add it, or take it for a gradient",
        pattern=_ANY,
        allowed=_forms(SERVER_FORMS),
    )
    server_learning_rate: float = _key(
        1.0,
        "the server's learning rate; with averaging, the share that is added",
        above=0,
        high=100,
    )
    server_adaptivity: float = _key(
        1e-3,
        "adam, yogi, adagrad: merged updates well below this are damped (tau)",
        above=0,
        high=100,
    )
    max_client_samples: int = _key(
        1_000_000, "largest sample count that is believed; an update above is rejected", low=1
    )

    @property
    def client_ranks(self) -> tuple[int, ...]:
        """`ranks` as numbers."""
        return tuple(int(rank) for rank in self.ranks.split(",")) if self.ranks else ()

    def __post_init__(self) -> None:
        _check(self, "aggregation")
        faults = []
        for key, check in (
            ("merger", described_merger),
            ("server_optimizer", server_optimizer_named),
        ):
            value = getattr(self, key)
            try:
                check(value)
            except AggregationError as error:
                faults.append(Fault(key=f"aggregation.{key}", value=value, allowed=str(error)))
        if faults:
            raise JobError(faults)
        rate = self.server_learning_rate
        adaptive = self.server_optimizer.partition(":")[0] not in ("averaging", "momentum")
        if adaptive and rate > _MAX_ADAPTIVE_RATE:
            allowed = (
                f"expected at most {_MAX_ADAPTIVE_RATE} with server_optimizer = "
                f'"{self.server_optimizer}", whose steps have about that size a value and round; '
                "0.001 to 0.01 is usual"
            )
            raise JobError(
                [Fault(key="aggregation.server_learning_rate", value=rate, allowed=allowed)]
            )


@dataclass(frozen=True, slots=True, kw_only=True)
class RoundsSection:
    """`[rounds]`"""

    count: int = _key(10, "number of rounds", low=1, high=1_000_000)
    mode: str = _key(
        "sync",
        "sync: a round asks its clients together. async (FedBuff): clients are asked one by one, "
        "and a round is a step of the server after so many updates as its buffer holds",
        choices=("sync", "async"),
    )
    buffer: int = _key(10, "async: valid updates a step", low=1, high=100_000)
    concurrency: int = _key(
        0, "async: clients at work at a time, at most; 0: all that can take part", low=0
    )
    staleness_exponent: float = _key(
        0.5,
        "async: an update from tensors of t steps ago weighs (1 + t) to the minus this",
        low=0,
        high=1,
    )
    max_staleness: int = _key(
        0, "async: steps after which an update is too old to be used; 0: none is", low=0
    )
    clients_per_round: int = _key(0, "clients drawn for a round; 0: all", low=0)
    evaluate_every: int = _key(
        1, "rounds between tests of the global tensors (the last is always tested)", low=1
    )
    evaluate_clients_every: int = _key(
        0, "rounds between tests on the clients' held-out samples; 0: after the last only", low=0
    )
    min_updates: int = _key(1, "valid updates without which a round changes nothing", low=1)
    quorum: int = _key(
        0, "valid updates after which a round waits for no more; 0: it waits for all", low=0
    )
    over_selection: float = _key(
        1.0,
        "clients asked for each one that is drawn: 1.3 asks 13 for 10, and the round ends with 10 "
        "valid updates, or with its quorum",
        low=1,
        high=10,
    )
    min_clients: int = _key(
        1,
        "clients that can take part, without which a round does not begin but waits; async: only "
        "while nobody is at work",
        low=1,
    )
    min_samples: int = _key(
        0, "training samples below which a client is not asked; 0: whatever it has", low=0
    )
    min_memory_mb: int = _key(
        0, "MiB of free memory below which a client is not asked; 0: whatever it has", low=0
    )
    timeout_s: float = _key(0.0, "seconds waited for a client's answer; 0: no limit", low=0)
    deadline_s: float = _key(
        0.0,
        "seconds after which a round goes on with the updates that it has, counted anew when it is "
        "played again after a crash; the clients' tests are closed likewise; 0: no limit",
        low=0,
    )

    @property
    def asked(self) -> int:
        """Clients that are asked in a round; 0: all."""
        # Decimal factors are not exact in binary: 10 times 1.1 is 11 and not 12.
        return math.ceil(round(self.clients_per_round * self.over_selection, 6))

    @property
    def enough(self) -> int:
        """Valid updates after which a round waits for no more; 0: for all."""
        return self.quorum or (self.clients_per_round if self.over_selection > 1 else 0)

    def __post_init__(self) -> None:
        _check(self, "rounds")
        if self.over_selection > 1 and not self.clients_per_round:
            allowed = "expected 1, or rounds.clients_per_round above 0: all are asked already"
            value = self.over_selection
            raise JobError([Fault(key="rounds.over_selection", value=value, allowed=allowed)])


@dataclass(frozen=True, slots=True, kw_only=True)
class PersonalSection:
    """`[personal]`: what is each client's own."""

    tensors: str = _key(
        "",
        "trainable tensors that never leave a client, by names or patterns: `classifier.*`, `keys`",
        pattern=re.compile(r"[^\s,]*( *, *[^\s,]+)*"),
        allowed="expected names or patterns with commas between them, or an empty text",
    )
    report: bool = _key(
        False,
        "clients' tests compare the adapter that they trained last (local), the merged one "
        "(global) and a mixture",
    )
    mix: float = _key(0.5, "share of the local adapter in the mixture", low=0, high=1)

    @property
    def patterns(self) -> tuple[str, ...]:
        """`tensors` one by one."""
        return tuple(word.strip() for word in self.tensors.split(",") if word.strip())

    def __post_init__(self) -> None:
        _check(self, "personal")


@dataclass(frozen=True, slots=True, kw_only=True)
class SplitSection:
    """`[split]`: a round of SFPrompt, whose network a device and a server share."""

    keep: float = _key(
        0.5, "share of a client's samples that it trains on, of highest EL2N", above=0, high=1
    )
    drop: float = _key(
        0.0, "share left out before, of highest EL2N: their labels may be wrong", low=0, below=1
    )
    scoring_epochs: int = _key(
        2,
        "passes of a copy with the body skipped, before it scores the samples: a tail that knows "
        "only what leaves the body judges badly what comes from the head",
        low=0,
        high=1_000,
    )
    local_epochs: int = _key(
        0, "passes with the body skipped, before those through it", low=0, high=1_000
    )
    noise: float = _key(
        0.0,
        "Gaussian noise on the hidden states that leave a device, of each token's root mean square",
        low=0,
        high=100,
    )
    form: str = _key("float32", "of hidden states and gradients that travel", choices=FORMS)
    lanes: int = _key(
        1,
        "pieces of a batch that go side by side: one travels while the server works on another",
        low=1,
        high=MAX_LANES,
    )

    def __post_init__(self) -> None:
        _check(self, "split")

    @property
    def prunes(self) -> bool:
        """Whether samples are left out."""
        return self.keep < 1 or self.drop > 0


@dataclass(frozen=True, slots=True, kw_only=True)
class SimulationSection:
    """`[simulation]`: how clients are run; the one section that is not part of the job's hash."""

    backend: str = _key("cohort", "how clients are run", choices=("cohort", "sequential", "ray"))
    engine: str = _key("onnx", "what runs the training step", choices=("onnx", "torch"))
    cohort_size: int = _key(0, "clients in one cohort; 0: chosen by measurement", low=0)
    device: str = _key("cpu", "where torch runs", choices=("cpu", "cuda"))
    stream: str = _key(
        "memory",
        "what carries split sessions: this process's memory, or a server on loopback under TLS",
        choices=("memory", "loopback"),
    )

    def __post_init__(self) -> None:
        _check(self, "simulation")
        if self.device == "cuda" and self.engine != "torch":
            allowed = 'expected "cpu", or engine = "torch" beside it'
            raise JobError([Fault(key="simulation.device", value=self.device, allowed=allowed)])
