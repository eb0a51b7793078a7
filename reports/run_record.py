# SPDX-License-Identifier: Apache-2.0
"""A finished run, read back from its directory, for reports and comparisons."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from reports.errors import RunRecordError

# Keys that any report or comparison relies on (design, section 8).
SUMMARY_KEYS = (
    "method",
    "dataset",
    "clients",
    "rounds",
    "seed",
    "accuracy",
    "loss",
    "uplink_bytes",
    "downlink_bytes",
    "trainable_parameters",
    "client_flops",
    "samples_per_second",
    "wall_seconds",
    "rejections",
    "versions",
)


@dataclass(frozen=True, slots=True, kw_only=True)
class RoundLine:
    """One line of metrics.jsonl; accuracy and losses are None where nothing was measured."""

    round: int
    accuracy: float | None
    loss: float | None
    train_loss: float | None
    uplink_bytes: int
    downlink_bytes: int
    clients: int  # asked to train
    updates: int  # merged
    samples: int
    rejections: int
    seconds: float
    epsilon: float | None = None  # spent so far, of a private run
    clip: float | None = None  # the round's clipping norm
    unclipped: float | None = None  # noised share of updates that were not clipped


@dataclass(frozen=True, slots=True, kw_only=True)
class RunRecord:
    """What a run left behind."""

    folder: Path
    job_text: str
    rounds: tuple[RoundLine, ...]
    summary: Mapping[str, Any]

    @property
    def name(self) -> str:
        """The job's name, or the folder's."""
        return str(self.summary.get("name") or self.folder.name)

    @property
    def rejections(self) -> int:
        """How many updates were refused."""
        return count_of(self.summary["rejections"])

    def evaluated(self) -> list[tuple[RoundLine, int]]:
        """The rounds with an accuracy, each with all bytes sent both ways up to it."""
        total, found = 0, []
        for line in self.rounds:
            total += line.uplink_bytes + line.downlink_bytes
            if line.accuracy is not None:
                found.append((line, total))
        return found


def is_run(folder: Path) -> bool:
    """Whether a folder looks like a finished run."""
    return (folder / "summary.json").is_file()


def read_run(folder: Path) -> RunRecord:
    """Read `job.toml`, `metrics.jsonl` and `summary.json`.

    Raises: RunRecordError for a missing or damaged file.
    """
    summary = _json(folder / "summary.json", _text(folder / "summary.json"))
    missing = [key for key in SUMMARY_KEYS if key not in summary]
    if missing:
        raise RunRecordError(
            f"{folder / 'summary.json'}: expected the keys {', '.join(missing)} too; "
            "is it of another version of fedloom?"
        )
    metrics = folder / "metrics.jsonl"
    lines = [line for line in _text(metrics).splitlines() if line.strip()]
    return RunRecord(
        folder=folder,
        job_text=_text(folder / "job.toml"),
        rounds=tuple(_round_line(metrics, i, line) for i, line in enumerate(lines, start=1)),
        summary=summary,
    )


def count_of(items: Any) -> int:
    """A count that may be stored as a number or as the things counted."""
    return items if isinstance(items, int) else len(items)


def _round_line(path: Path, number: int, text: str) -> RoundLine:
    values = _json(path, text, line=number)
    try:
        privacy = dict(values.get("privacy") or {})
        return RoundLine(
            round=int(values["round"]),
            accuracy=_optional(values.get("accuracy")),
            loss=_optional(values.get("loss")),
            train_loss=_optional(values.get("train_loss")),
            uplink_bytes=int(values["uplink_bytes"]),
            downlink_bytes=int(values["downlink_bytes"]),
            clients=int(values["clients"]),
            updates=int(values["updates"]),
            samples=int(values["samples"]),
            rejections=count_of(values["rejections"]),
            seconds=float(values["seconds"]),
            epsilon=_optional(privacy.get("epsilon")),
            clip=_optional(privacy.get("clip")),
            unclipped=_optional(privacy.get("unclipped")),
        )
    except (KeyError, TypeError, ValueError) as error:
        raise RunRecordError(
            f"{path}, line {number}: expected one round's figures, got {error!r}"
        ) from error


def _optional(value: Any) -> float | None:
    return None if value is None else float(value)


def _text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise RunRecordError(
            f"{path.parent} is not a finished run: expected the file {path.name} ({error})"
        ) from error


def _json(path: Path, text: str, *, line: int | None = None) -> dict[str, Any]:
    where = path if line is None else f"{path}, line {line}"
    try:
        value = json.loads(text)
    except json.JSONDecodeError as error:
        raise RunRecordError(f"{where}: expected JSON, found {error}") from error
    if not isinstance(value, dict):
        raise RunRecordError(f"{where}: expected a JSON object, found {type(value).__name__}")
    return value
