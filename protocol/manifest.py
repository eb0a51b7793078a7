# SPDX-License-Identifier: Apache-2.0
"""What a bundle says about itself: tensors, inputs, preprocessing, training settings, files.

`manifest.json` is the canonical JSON of a `Manifest`, and the bytes that the coordinator signs.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Final, Literal

from protocol import _checks, _json
from protocol.client_noise import ClientNoise
from protocol.controls import with_controls
from protocol.errors import ManifestError, SpecError
from protocol.example_privacy import ExamplePrivacy
from protocol.factors import FactorPair, check_pairs
from protocol.files import ENVELOPE, FileEntry, hash_files, plain_path
from protocol.limits import (
    MAX_BATCH_SIZE,
    MAX_CHANNELS,
    MAX_CLASSES,
    MAX_EPOCHS,
    MAX_FILES,
    MAX_GRAPHS,
    MAX_IMAGE_SIDE,
    MAX_INPUTS,
    MAX_MANIFEST_BYTES,
    MAX_NAME_LENGTH,
    MAX_SAMPLES,
    MAX_TENSORS,
    MAX_TEXT_LENGTH,
    MAX_TOKENS,
)
from protocol.split import SplitSpec
from protocol.tensors import ParamSpec, TensorSpec, named_spec_from_json

__all__ = [
    "MANIFEST_VERSION",
    "FileEntry",
    "Manifest",
    "Preprocessing",
    "TrainingSpec",
    "hash_files",
]

MANIFEST_VERSION: Final = 1
ANCHOR: Final = "anchor/"
"""State under this prefix starts as the trainable tensor of that name."""
CORRECTION: Final = "correction/"
"""State under this prefix is given with the round, and added to every gradient of the tensor of
that name. All other state starts as zeros."""
SUMMED: Final = "summed"
"""State of this name is what the drawn samples add to a private step, until it is taken: all
trainable values in a row, by the sorted names of their tensors."""
TALLY: Final = "tally/"
"""State under this prefix adds up over the steps of a round, and is told when it ends."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Preprocessing:
    """How a device turns its data into model inputs; a kind's other settings stay at their 0."""

    kind: Literal["image", "tokens", "array"]
    size: int = 0  # image: side in pixels
    channels: int = 0  # image
    mean: tuple[float, ...] = ()  # image: per channel, of values scaled to 0..1
    std: tuple[float, ...] = ()
    max_length: int = 0  # tokens: length that every sample is padded or cut to

    def __post_init__(self) -> None:
        error = ManifestError
        _checks.one_of("preprocessing.kind", self.kind, ("image", "tokens", "array"), error)
        image, tokens = self.kind == "image", self.kind == "tokens"
        side, channels = MAX_IMAGE_SIDE * image, MAX_CHANNELS * image
        _checks.integer("preprocessing.size", self.size, int(image), side, error)
        _checks.integer("preprocessing.channels", self.channels, int(image), channels, error)
        length = MAX_TOKENS * tokens
        _checks.integer("preprocessing.max_length", self.max_length, int(tokens), length, error)
        for name in ("mean", "std"):
            values = _checks.sequence(name, getattr(self, name), MAX_CHANNELS, error)
            if len(values) != self.channels:
                raise error(
                    f"preprocessing.{name}: expected {self.channels} values (one a channel), "
                    f"found {len(values)}"
                )
            checked = tuple(_checks.real(f"preprocessing.{name}", v, error) for v in values)
            object.__setattr__(self, name, checked)
        if any(value <= 0 for value in self.std):
            raise error(f"preprocessing.std: expected values above 0, found {min(self.std):g}")


@dataclass(frozen=True, slots=True, kw_only=True)
class TrainingSpec:
    """Settings that the compiled step was made for, or that it takes by default."""

    batch_size: int
    optimizer: Literal["sgd", "adamw"]
    learning_rate: float
    weight_decay: float = 0.0
    momentum: float = 0.0  # below 1; sgd only
    proximal: float = 0.0  # FedProx's pull towards the round's first tensors; 0: none
    scaffold: bool = False  # every step is corrected by control variates; plain sgd only
    local_epochs: int = 1
    privacy: ExamplePrivacy | None = None  # of single samples; batch_size is then an expectation

    def __post_init__(self) -> None:
        error = ManifestError
        _checks.integer("training.batch_size", self.batch_size, 1, MAX_BATCH_SIZE, error)
        _checks.one_of("training.optimizer", self.optimizer, ("sgd", "adamw"), error)
        for name in ("learning_rate", "weight_decay", "momentum", "proximal"):
            value = _checks.real(f"training.{name}", getattr(self, name), error, low=0.0)
            object.__setattr__(self, name, value)
        if self.momentum >= 1:
            raise error(f"training.momentum: expected below 1, found {self.momentum:g}")
        _checks.boolean("training.scaffold", self.scaffold, error)
        if self.scaffold and (self.optimizer != "sgd" or self.momentum):
            raise error("training.scaffold: expected sgd without momentum beside it")
        _checks.integer("training.local_epochs", self.local_epochs, 1, MAX_EPOCHS, error)
        if self.privacy is None:
            return
        if not isinstance(self.privacy, ExamplePrivacy):
            raise error("training.privacy: expected an ExamplePrivacy or None")
        if self.scaffold:
            raise error("training.privacy: expected no control variates (scaffold) beside it")
        if self.privacy.fewest_samples < self.batch_size:
            raise error(
                f"privacy.fewest_samples: expected at least batch_size = {self.batch_size}, found "
                f"{self.privacy.fewest_samples}"
            )


@dataclass(frozen=True, slots=True, kw_only=True)
class Manifest:
    """A bundle's contents. `files` may be left empty while a bundle is being written."""

    job: str  # SHA-256 of the job, 64 hex digits
    backbone: str
    method: str
    task: str
    class_names: tuple[str, ...]
    trainable: ParamSpec
    state: ParamSpec  # of the optimizer
    inputs: tuple[tuple[str, TensorSpec], ...]  # without the batch dimension
    preprocessing: Preprocessing
    training: TrainingSpec
    pairs: tuple[FactorPair, ...] = ()  # of low-rank factors among the trainable tensors
    personal: tuple[str, ...] = ()  # trainable tensors that never leave a client
    split: SplitSpec | None = None  # where a server holds the network's body
    noise: ClientNoise | None = None  # that clients add themselves
    fewest_samples: int | None = None
    """A device with fewer takes no part, and none says how many it has; None: devices say so."""
    graphs: Mapping[str, str]  # role ("train", "evaluate", "predict") to file
    files: Mapping[str, FileEntry] = field(default_factory=dict)
    format_version: int = MANIFEST_VERSION

    def __post_init__(self) -> None:
        error = ManifestError
        version = self.format_version
        if isinstance(version, bool) or version != MANIFEST_VERSION:
            raise error(
                f"format_version: expected {MANIFEST_VERSION}, found {_checks.shown(version)}; "
                "use a release of the coordinator's version"
            )
        _checks.hexadecimal("job", self.job, 64, 64, error)
        for name in ("backbone", "method", "task"):
            _checks.text(name, getattr(self, name), MAX_TEXT_LENGTH, error)
        classes = _checks.sequence("class_names", self.class_names, MAX_CLASSES, error)
        checked = tuple(_checks.text("class_names", n, MAX_TEXT_LENGTH, error) for n in classes)
        object.__setattr__(self, "class_names", checked)
        for name, kind in (
            ("trainable", ParamSpec),
            ("state", ParamSpec),
            ("preprocessing", Preprocessing),
            ("training", TrainingSpec),
        ):
            if not isinstance(getattr(self, name), kind):
                raise error(f"{name}: expected a {kind.__name__}")
        object.__setattr__(self, "pairs", _pairs(self.pairs, self.trainable))
        object.__setattr__(self, "personal", _personal(self.personal, self.trainable))
        if self.split is not None and not isinstance(self.split, SplitSpec):
            raise error("split: expected a SplitSpec or None")
        if self.split is not None and self.training.privacy is not None:
            raise error("training.privacy: expected none of a split network, which sends features")
        if self.noise is not None and not isinstance(self.noise, ClientNoise):
            raise error("noise: expected a ClientNoise or None")
        if self.noise is not None and (self.split is not None or self.training.scaffold):
            raise error("noise: expected none where more than an update leaves a client")
        if self.fewest_samples is not None:
            _checks.integer("fewest_samples", self.fewest_samples, 0, MAX_SAMPLES, error)
        object.__setattr__(self, "inputs", _inputs(self.inputs))
        object.__setattr__(self, "files", _files(self.files))
        object.__setattr__(self, "graphs", _graphs(self.graphs, self.files))

    @property
    def shared(self) -> ParamSpec:
        """The trainable tensors that travel."""
        kept = set(self.personal)
        return ParamSpec(tuple(entry for entry in self.trainable.entries if entry[0] not in kept))

    @property
    def exchanged(self) -> ParamSpec:
        """What travels: `shared`, and SCAFFOLD's control variates where it is on."""
        return with_controls(self.shared) if self.training.scaffold else self.shared

    def to_json(self) -> bytes:
        """Canonical bytes: sorted keys, no spaces. The same manifest always gives the same."""
        pre, train = self.preprocessing, self.training
        return _json.canonical(
            {
                "format_version": self.format_version,
                "job": self.job,
                "backbone": self.backbone,
                "method": self.method,
                "task": self.task,
                "class_names": self.class_names,
                "trainable": self.trainable.to_json(),
                "state": self.state.to_json(),
                "inputs": [[name, spec.dtype, spec.shape] for name, spec in self.inputs],
                "preprocessing": {name: getattr(pre, name) for name in _PREPROCESSING},
                "training": {name: getattr(train, name) for name in _TRAINING}
                | {"privacy": None if train.privacy is None else train.privacy.to_json()},
                "personal": self.personal,
                "split": None if self.split is None else self.split.to_json(),
                "noise": None if self.noise is None else self.noise.to_json(),
                "fewest_samples": self.fewest_samples,
                "pairs": [[pair.down, pair.up, pair.scale, pair.base] for pair in self.pairs],
                "graphs": dict(self.graphs),
                "files": {
                    name: {"sha256": entry.sha256, "size": entry.size}
                    for name, entry in self.files.items()
                },
            }
        )

    @classmethod
    def from_json(cls, raw: bytes) -> Manifest:
        """The inverse of `to_json`. Raises: ManifestError for anything else."""
        if len(raw) > MAX_MANIFEST_BYTES:
            raise ManifestError(
                f"manifest: expected at most {MAX_MANIFEST_BYTES} bytes, found {len(raw)}"
            )
        try:
            manifest = _manifest(_json.parse(raw))
        except SpecError as error:
            raise ManifestError(f"manifest: {error}") from None
        except ManifestError:
            raise
        except ValueError as error:
            raise ManifestError(f"manifest: {error}") from None
        if manifest.to_json() != raw:
            raise ManifestError(
                "manifest: expected canonical JSON (sorted keys, no spaces), found another spelling"
            )
        return manifest


_PREPROCESSING: Final = ("kind", "size", "channels", "mean", "std", "max_length")
_TRAINING: Final = (
    "batch_size",
    "optimizer",
    "learning_rate",
    "weight_decay",
    "momentum",
    "proximal",
    "scaffold",
    "local_epochs",
)
_FIELDS: Final = tuple(Manifest.__dataclass_fields__)


def _manifest(value: object) -> Manifest:
    error = ManifestError
    fields = dict(_checks.keys("manifest", value, _FIELDS, error))
    pre = _checks.keys("preprocessing", fields["preprocessing"], _PREPROCESSING, error)
    names = (*_TRAINING, "privacy")
    training = dict(_checks.keys("training", fields["training"], names, error))
    inputs = _checks.sequence("inputs", fields["inputs"], MAX_INPUTS, error)
    files = _checks.mapping("files", fields["files"], error)
    fields["trainable"] = ParamSpec.from_json(fields["trainable"])
    fields["state"] = ParamSpec.from_json(fields["state"])
    fields["inputs"] = tuple(named_spec_from_json(row) for row in inputs)
    fields["preprocessing"] = Preprocessing(**pre)
    if training["privacy"] is not None:
        training["privacy"] = ExamplePrivacy.from_json(training["privacy"])
    fields["training"] = TrainingSpec(**training)
    if fields["split"] is not None:
        fields["split"] = SplitSpec.from_json(fields["split"])
    if fields["noise"] is not None:
        fields["noise"] = ClientNoise.from_json(fields["noise"])
    pairs = _checks.sequence("pairs", fields["pairs"], MAX_TENSORS, error)
    fields["pairs"] = tuple(_pair(row) for row in pairs)
    fields["files"] = {name: _file_entry(name, entry) for name, entry in files.items()}
    return Manifest(**fields)


def _file_entry(name: str, value: object) -> FileEntry:
    entry = _checks.keys(f"files: {_checks.shown(name)}", value, ("sha256", "size"), ManifestError)
    return FileEntry(**entry)


def _inputs(value: object) -> tuple[tuple[str, TensorSpec], ...]:
    rows = _checks.sequence("inputs", value, MAX_INPUTS, ManifestError)
    names: set[str] = set()
    for row in rows:
        if not isinstance(row, tuple) or len(row) != 2 or not isinstance(row[1], TensorSpec):
            raise ManifestError("inputs: expected pairs of name and TensorSpec")
        name = _checks.text("inputs", row[0], MAX_NAME_LENGTH, ManifestError)
        if name in names:
            raise ManifestError(f"inputs: {name!r} is given twice")
        names.add(name)
    return tuple(rows)


def _personal(value: object, spec: ParamSpec) -> tuple[str, ...]:
    names = _checks.sequence("personal", value, MAX_TENSORS, ManifestError)
    for name in names:
        if not isinstance(name, str) or name not in spec:
            raise ManifestError(f"personal: {_checks.shown(name)} is not a trainable tensor")
    if sorted(set(names)) != names:
        raise ManifestError("personal: expected sorted names, each once")
    if names and len(names) == len(spec.names):
        raise ManifestError("personal: expected a tensor that is shared, found none")
    return tuple(names)


def _pair(row: object) -> FactorPair:
    names = _checks.sequence("pairs", row, 4, ManifestError)
    if len(names) != 4:
        raise ManifestError(f"pairs: expected [down, up, scale, base], found {len(names)} entries")
    return FactorPair(down=names[0], up=names[1], scale=names[2], base=names[3])


def _pairs(value: object, spec: ParamSpec) -> tuple[FactorPair, ...]:
    rows = _checks.sequence("pairs", value, MAX_TENSORS, ManifestError)
    if not all(isinstance(row, FactorPair) for row in rows):
        raise ManifestError("pairs: expected FactorPairs")
    try:
        check_pairs(rows, spec)
    except SpecError as error:
        raise ManifestError(f"pairs: {error}") from None
    return tuple(rows)


def _files(value: object) -> dict[str, FileEntry]:
    if not isinstance(value, Mapping) or len(value) > MAX_FILES:
        raise ManifestError(f"files: expected a mapping of at most {MAX_FILES} files")
    folded: set[str] = set()
    for name, entry in value.items():
        plain_path("files", name)
        if not isinstance(entry, FileEntry):
            raise ManifestError(f"files: {name}: expected a FileEntry")
        if name.lower() in folded or name.lower() in ENVELOPE:
            raise ManifestError(
                f"files: {name}: the name is taken (upper and lower case count as equal)"
            )
        folded.add(name.lower())
    return dict(value)


def _graphs(value: object, files: Mapping[str, FileEntry]) -> dict[str, str]:
    if not isinstance(value, Mapping) or len(value) > MAX_GRAPHS:
        raise ManifestError(f"graphs: expected a mapping of at most {MAX_GRAPHS} roles")
    for role, name in value.items():
        _checks.text("graphs", role, MAX_NAME_LENGTH, ManifestError)
        plain_path(f"graphs: {role}", name)
        if files and name not in files:
            raise ManifestError(f"graphs: {role}: {name} is not among the files")
    return dict(value)
