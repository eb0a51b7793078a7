# SPDX-License-Identifier: Apache-2.0
"""A job: everything that decides the result of a run, and how it is read from TOML and written.

The sections and their keys are in `sections.py`. `load_job` collects every fault with its line
before it raises, so that a job file is mended in one go.
"""

from __future__ import annotations

import difflib
import hashlib
import json
import re
import tomllib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any

from aggregation.mergers import Merger
from aggregation.selection import (
    LOW_RANK,
    described_merger,
    fewest_updates,
    mixes_ranks,
    moves_base,
    needs_accuracy,
    needs_counts,
)
from coordinator.errors import Fault, JobError
from coordinator.example_privacy_rules import example_privacy_faults
from coordinator.example_privacy_section import ExamplePrivacySection
from coordinator.keys import allowed_values, value_fault
from coordinator.privacy_rules import privacy_faults
from coordinator.privacy_section import PrivacySection
from coordinator.sections import (
    IMAGE_BACKBONES,
    IMAGE_DATASETS,
    TEXT_BACKBONES,
    TEXT_DATASETS,
    AggregationSection,
    BackboneSection,
    DataSection,
    JobSection,
    MethodSpec,
    PersonalSection,
    RoundsSection,
    SimulationSection,
    SplitSection,
    TrainingSection,
    UpdateSection,
)
from coordinator.summing_rules import summing_faults
from coordinator.toml_text import key_lines, toml_key, toml_value


@dataclass(frozen=True, slots=True, kw_only=True)
class Job:
    """A complete job. Every field has a default, so `Job()` is the smallest one that runs."""

    job: JobSection = field(default_factory=JobSection)
    backbone: BackboneSection = field(default_factory=BackboneSection)
    data: DataSection = field(default_factory=DataSection)
    method: MethodSpec = field(default_factory=MethodSpec)
    training: TrainingSection = field(default_factory=TrainingSection)
    update: UpdateSection = field(default_factory=UpdateSection)
    aggregation: AggregationSection = field(default_factory=AggregationSection)
    rounds: RoundsSection = field(default_factory=RoundsSection)
    personal: PersonalSection = field(default_factory=PersonalSection)
    split: SplitSection = field(default_factory=SplitSection)
    privacy: PrivacySection = field(default_factory=PrivacySection)
    example_privacy: ExamplePrivacySection = field(default_factory=ExamplePrivacySection)
    simulation: SimulationSection = field(default_factory=SimulationSection)

    def __post_init__(self) -> None:
        if faults := _combination_faults(self):
            raise JobError(faults)

    @property
    def is_split(self) -> bool:
        """Whether a server holds the body of the network that is trained."""
        return self.method.name == "sfprompt"

    @property
    def tells_samples(self) -> bool:
        """Whether a client says how many samples it has."""
        return not self.privacy.is_told_little or "samples" in self.update.told

    def hash(self) -> str:
        """SHA-256 (hex) of all that decides the result: not the name, not `[simulation]`."""
        content = _as_tables(self)
        del content["simulation"]
        del content["job"]["name"]
        text = json.dumps(content, sort_keys=True, separators=(",", ":"), allow_nan=False)
        return hashlib.sha256(text.encode()).hexdigest()


@dataclass(frozen=True, slots=True, kw_only=True)
class KeyDoc:
    """One key of a job file, described."""

    section: str
    key: str
    type: str
    default: object
    allowed: str
    help: str


_SECTIONS: dict[str, Any] = {
    "job": JobSection,
    "backbone": BackboneSection,
    "data": DataSection,
    "method": MethodSpec,
    "training": TrainingSection,
    "update": UpdateSection,
    "aggregation": AggregationSection,
    "rounds": RoundsSection,
    "personal": PersonalSection,
    "split": SplitSection,
    "privacy": PrivacySection,
    "example_privacy": ExamplePrivacySection,
    "simulation": SimulationSection,
}


def describe_job() -> tuple[KeyDoc, ...]:
    """Every key that a job file may hold, in order; a method's settings are the method's own."""
    docs = []
    for section, kind in _SECTIONS.items():
        if kind is MethodSpec:
            words = "expected the name of a method"
            text = "how the backbone is fine-tuned; its settings stand beside the name"
            default = MethodSpec().name
            doc = KeyDoc(
                section=section, key="name", type="str", default=default, allowed=words, help=text
            )
            docs.append(doc)
            continue
        for item in fields(kind):
            type_name = str(item.type)
            docs.append(
                KeyDoc(
                    section=section,
                    key=item.name,
                    type=type_name,
                    default=item.default,
                    allowed=allowed_values(type_name, item.metadata),
                    help=item.metadata["help"],
                )
            )
    return tuple(docs)


def load_job(path: str | Path, overrides: Sequence[str] = ()) -> Job:
    """Read a job file; `overrides` are "section.key=value", as the command line gives them.

    Relative folders are taken from the job file's folder.

    Raises: JobError, with every fault found and the line that each stands on.
    """
    path = Path(path)
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        allowed = f"expected a job file in TOML ({error})"
        raise JobError([Fault(key="job file", value=str(path), allowed=allowed)]) from error
    return parse_job(text, overrides, folder=path.parent, source=str(path))


def parse_job(
    text: str, overrides: Sequence[str] = (), *, folder: Path, source: str = "job"
) -> Job:
    """Like `load_job`, from text; relative folders are taken from `folder`."""
    try:
        tables: dict[str, Any] = tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        found = re.search(r"line (\d+)", str(error))
        line = int(found[1]) if found else None
        fault = Fault(key="job file", value=source, allowed=f"no valid TOML: {error}", line=line)
        raise JobError([fault], source=source) from error
    lines = key_lines(text)
    faults: list[Fault] = []
    for override in overrides:
        _apply_override(tables, override, lines, faults)
    sections: dict[str, Any] = {}
    for name, table in tables.items():
        if name not in _SECTIONS:
            faults.append(_unknown(name, table, _SECTIONS, "section"))
        elif not isinstance(table, dict):
            faults.append(Fault(key=name, value=table, allowed=f"expected a section [{name}]"))
        else:
            try:
                sections[name] = _section(name, table, folder)
            except JobError as error:
                faults.extend(error.faults)
    if not faults:
        try:
            return Job(**sections)
        except JobError as error:
            faults.extend(error.faults)
    located = [
        replace(fault, line=lines.get(fault.key)) if fault.line is None else fault
        for fault in faults
    ]
    raise JobError(sorted(located, key=lambda fault: fault.line or 0), source=source)


def dump_job(job: Job) -> str:
    """A job as complete TOML, every default written out; `parse_job` gives the same job back."""
    blocks = []
    for section, table in _as_tables(job).items():
        lines = [f"{toml_key(key)} = {toml_value(value)}" for key, value in table.items()]
        blocks.append("\n".join([f"[{section}]", *lines]))
    return "\n\n".join(blocks) + "\n"


def _section(name: str, table: Mapping[str, Any], folder: Path) -> Any:
    """One section from its table, or a JobError with all of its faults."""
    kind = _SECTIONS[name]
    if kind is MethodSpec:
        settings = {key: value for key, value in table.items() if key != "name"}
        return MethodSpec(name=table.get("name", MethodSpec().name), settings=settings)
    known = {item.name: item for item in fields(kind)}
    faults = []
    for key, value in table.items():
        if key not in known:
            faults.append(_unknown(f"{name}.{key}", value, known, "key"))
            continue
        item = known[key]
        fault = value_fault(f"{name}.{key}", str(item.type), item.metadata, value)
        if fault is not None:
            faults.append(fault)
    values = dict(table)
    if not faults:
        _resolve_folders(name, values, folder, faults)
    if faults:
        raise JobError(faults)
    return kind(**values)


def _resolve_folders(
    section: str, values: dict[str, Any], folder: Path, faults: list[Fault]
) -> None:
    """Make the folders that a section names absolute, and see that they are there."""
    key = {"backbone": "path", "data": "dataset"}.get(section, "")
    value = values.get(key, "")
    if not value or value in (*IMAGE_DATASETS, *TEXT_DATASETS):
        return
    place = (folder / value).resolve()
    if not place.is_dir():
        names = ", ".join(f'"{name}"' for name in (*IMAGE_DATASETS, *TEXT_DATASETS))
        known = f"one of {names} or " if section == "data" else ""
        allowed = f"expected {known}a folder; there is none at {place}"
        faults.append(Fault(key=f"{section}.{key}", value=value, allowed=allowed))
    values[key] = str(place)
    if section == "backbone":
        # A path alone is enough: the default name steps aside for it.
        values.setdefault("name", "")


def _combination_faults(job: Job) -> list[Fault]:
    """What is wrong between keys that are each right."""
    faults = []

    def fault(key: str, value: object, allowed: str) -> None:
        faults.append(Fault(key=key, value=value, allowed=allowed))

    data, rounds = job.data, job.rounds
    per_round = rounds.clients_per_round or data.clients
    if rounds.clients_per_round > data.clients:
        words = f"expected at most data.clients = {data.clients}"
        fault("rounds.clients_per_round", rounds.clients_per_round, words)
    elif rounds.min_updates > per_round:
        words = f"expected at most the {per_round} clients of a round"
        fault("rounds.min_updates", rounds.min_updates, words)
    asked = min(rounds.asked or data.clients, data.clients)
    if rounds.quorum and not rounds.min_updates <= rounds.quorum <= asked:
        words = (
            f"expected 0, or rounds.min_updates = {rounds.min_updates} up to the {asked} "
            "clients of a round"
        )
        fault("rounds.quorum", rounds.quorum, words)
    if rounds.mode == "async":
        faults.extend(_async_faults(job))
    faults.extend(privacy_faults(job))
    faults.extend(summing_faults(job))
    faults.extend(example_privacy_faults(job))
    aggregation, method = job.aggregation, job.method
    low_rank = method.name == "lora" or (
        method.name == "peft" and str(method.settings.get("type", "")).upper() == "LORA"
    )
    rule = aggregation.merger.partition(":")[0]
    if rule in LOW_RANK and not low_rank:
        words = f'expected another merger: "{rule}" is of LoRA factors, which "{method.name}" lacks'
        fault("aggregation.merger", aggregation.merger, words)
    if aggregation.factors != "both" and (rule in LOW_RANK or not low_rank):
        words = 'expected "both": ' + (
            f'"{rule}" says itself what is trained'
            if rule in LOW_RANK
            else f'method "{method.name}" has no pairs of factors'
        )
        fault("aggregation.factors", aggregation.factors, words)
    merger = described_merger(aggregation.merger)
    if needs_accuracy(merger) and not data.validation:
        words = "expected a share of the test samples for the merger to choose by, e.g. 0.2"
        fault("data.validation", data.validation, words)
    if needs_counts(merger) and ("selected" not in job.update.told or method.name != "fedins"):
        words = 'expected another merger, or method "fedins" with update.metrics = "loss,selected"'
        fault("aggregation.merger", aggregation.merger, words)
    if moves_base(merger) and (
        aggregation.server_optimizer != "averaging" or aggregation.server_learning_rate != 1
    ):
        words = (
            f'expected "averaging" with server_learning_rate = 1: "{rule}" changes frozen weights, '
            "which is right only with the whole of its merged update"
        )
        fault("aggregation.server_optimizer", aggregation.server_optimizer, words)
    if aggregation.ranks:
        faults.extend(_rank_faults(job, merger))
    if job.personal.tensors and (rule in LOW_RANK or aggregation.ranks):
        words = f'expected an empty text: "{rule}" needs both factors of every pair from everybody'
        fault("personal.tensors", job.personal.tensors, words)
    if job.personal.report and not data.held_out:
        words = "expected false, or data.held_out above 0: clients test on what they hold back"
        fault("personal.report", job.personal.report, words)
    if job.personal.report and moves_base(merger):
        words = (
            f'expected false: "{rule}" moves frozen weights, so that what a client trained last '
            "rests on others than the merged adapter"
        )
        fault("personal.report", job.personal.report, words)
    if job.training.scaffold:
        faults.extend(_scaffold_faults(job))
    if job.is_split and job.simulation.backend != "sequential":
        words = 'expected "sequential": clients of a split network take turns with its server'
        fault("simulation.backend", job.simulation.backend, words)
    if job.is_split and job.training.scaffold:
        words = "expected false: a step of a split network is not corrected"
        fault("training.scaffold", job.training.scaffold, words)
    least = fewest_updates(merger)
    if per_round < least:
        words = f"expected a rule for the {per_round} clients of a round, this one needs {least}"
        fault("aggregation.merger", aggregation.merger, words)
    if data.dataset in TEXT_DATASETS and job.backbone.name in IMAGE_BACKBONES:
        words = f'expected a text backbone for data.dataset = "{data.dataset}", e.g. '
        fault("backbone.name", job.backbone.name, words + f'"{TEXT_BACKBONES[0]}"')
    if data.dataset in IMAGE_DATASETS and job.backbone.name in TEXT_BACKBONES:
        words = f'expected an image backbone for data.dataset = "{data.dataset}", e.g. '
        fault("backbone.name", job.backbone.name, words + f'"{IMAGE_BACKBONES[0]}"')
    if data.dataset in IMAGE_DATASETS and data.partition.endswith("natural"):
        words = f'expected another partition: "{data.dataset}" does not say who made a sample'
        fault("data.partition", data.partition, words)
    if data.dataset in TEXT_DATASETS and data.partition.startswith("domains"):
        fault("data.partition", data.partition, "expected another partition: domains are of images")
    return faults


def _rank_faults(job: Job, merger: Merger[Any]) -> list[Fault]:
    """What clients of several ranks do not go with."""
    aggregation = job.aggregation
    key, value = "aggregation.ranks", aggregation.ranks
    faults = []
    if not mixes_ranks(merger):
        known = ", ".join(name for name in LOW_RANK if mixes_ranks(described_merger(name)))
        allowed = f"expected an empty text, or one of the mergers {known} that mix ranks"
        faults.append(Fault(key=key, value=value, allowed=allowed))
    if job.update.downlink != "tensors":
        allowed = 'expected an empty text, or update.downlink = "tensors"'
        faults.append(Fault(key=key, value=value, allowed=allowed))
    of_method = job.method.settings.get("r" if job.method.name == "peft" else "rank", 8)
    if isinstance(of_method, int) and max(aggregation.client_ranks) > of_method:
        allowed = f"expected ranks of at most the method's, {of_method}"
        faults.append(Fault(key=key, value=value, allowed=allowed))
    return faults


def _scaffold_faults(job: Job) -> list[Fault]:
    """What control variates do not go with: each would make them another thing."""
    aggregation = job.aggregation
    wanted = {
        "merger": "weighted-mean",
        "factors": "both",
        "weighting": "uniform",
        "server_optimizer": "averaging",
        "server_learning_rate": 1.0,
    }
    return [
        Fault(
            key=f"aggregation.{key}",
            value=getattr(aggregation, key),
            allowed=f"expected {toml_value(value)} with training.scaffold",
        )
        for key, value in wanted.items()
        if getattr(aggregation, key) != value
    ]


def _async_faults(job: Job) -> list[Fault]:
    """What updates from tensors of several ages do not go with."""
    rounds = job.rounds
    wanted: dict[str, tuple[object, object, str]] = {
        "rounds.clients_per_round": (
            rounds.clients_per_round, 0, "nobody is drawn for a round; see rounds.concurrency"
        ),
        "rounds.quorum": (rounds.quorum, 0, "a step takes rounds.buffer updates"),
        "rounds.deadline_s": (
            rounds.deadline_s, 0.0, "a step takes rounds.buffer updates; see rounds.timeout_s"
        ),
        "update.downlink": (
            job.update.downlink, "tensors",
            "changes build on the round before, which clients of another age do not hold",
        ),
        "update.error_feedback": (
            job.update.error_feedback, False,
            "what a codec left behind belongs to one update a round, and to none that is too old",
        ),
        "training.scaffold": (
            job.training.scaffold, False, "control variates are of one round's clients together"
        ),
        "personal.tensors": (
            job.personal.tensors, "", "a client may be asked twice in a round, and keeps one state"
        ),
        "aggregation.merger": (
            job.aggregation.merger, "weighted-mean",
            "a step is the mean of its updates, weighted by their age",
        ),
    }  # fmt: skip
    faults = [
        Fault(
            key=key, value=found, allowed=f'expected {toml_value(value)} with mode "async": {why}'
        )
        for key, (found, value, why) in wanted.items()
        if found != value
    ]
    if job.is_split:
        words = 'expected another method with rounds.mode = "async": a body is of one round'
        faults.append(Fault(key="method.name", value=job.method.name, allowed=words))
    if rounds.min_updates > rounds.buffer:
        words = f"expected at most rounds.buffer = {rounds.buffer}"
        faults.append(Fault(key="rounds.min_updates", value=rounds.min_updates, allowed=words))
    return faults


def _unknown(key: str, value: object, known: Mapping[str, Any], what: str) -> Fault:
    near = difflib.get_close_matches(key.rpartition(".")[2], list(known), n=1)
    hint = f' (did you mean "{near[0]}"?)' if near else ""
    allowed = f"unknown {what}{hint}; known: {', '.join(known)}"
    return Fault(key=key, value=value, allowed=allowed)


def _apply_override(
    tables: dict[str, Any], override: str, lines: dict[str, int], faults: list[Fault]
) -> None:
    """Set one "section.key=value"; a value that is no TOML is taken as a text."""
    target, separator, value_text = override.partition("=")
    section, dot, key = target.strip().partition(".")
    if not separator or not dot or not section or not key:
        allowed = "expected section.key=value, e.g. training.learning_rate=0.01"
        faults.append(Fault(key="override", value=override, allowed=allowed))
        return
    value: object = value_text.strip()
    try:
        parsed = tomllib.loads(f"value = {value_text}")
    except tomllib.TOMLDecodeError:
        parsed = {}
    known = {item.name: str(item.type) for item in fields(_SECTIONS.get(section, Job))}
    # A text may look like a number: `job.name=2024`.
    text = known.get(key) == "str" and not isinstance(parsed.get("value"), str)
    if parsed.keys() == {"value"} and not text:
        value = parsed["value"]
    table = tables.setdefault(section, {})
    if isinstance(table, dict):
        table[key] = value
        # The file's line does not hold this value any more.
        lines.pop(f"{section}.{key}", None)


def _as_tables(job: Job) -> dict[str, dict[str, Any]]:
    tables: dict[str, dict[str, Any]] = {}
    for section in _SECTIONS:
        value = getattr(job, section)
        if isinstance(value, MethodSpec):
            tables[section] = {"name": value.name, **value.settings}
        else:
            tables[section] = {item.name: getattr(value, item.name) for item in fields(value)}
    return tables
