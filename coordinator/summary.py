# SPDX-License-Identifier: Apache-2.0
"""A run in figures, when its rounds are over: `metrics.jsonl` and `summary.json`."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from coordinator.example_accounting import example_summary, example_words
from coordinator.job import Job
from coordinator.reports import RoundReport
from reports.machine import versions


@dataclass(frozen=True, slots=True, kw_only=True)
class Played:
    """What of a run its job and its rounds do not say."""

    dataset: str
    class_names: Sequence[str]
    backbone: str
    trainable_parameters: int
    total_parameters: int
    clients: int
    client_flops: int  # of all clients in all rounds
    passed_samples: int  # of merged updates, each as often as it was trained on
    per_client: Sequence[Mapping[str, Any]]
    notes: Sequence[str] = ()


def write_metrics(path: Path, reports: Sequence[RoundReport]) -> None:
    """A line a round."""
    lines = [json.dumps(report.to_json(), allow_nan=False) for report in reports]
    path.write_text("".join(line + "\n" for line in lines), encoding="utf-8")


def summary_of(
    job: Job, reports: Sequence[RoundReport], played: Played, *, wall_seconds: float
) -> dict[str, Any]:
    """The content of `summary.json`."""
    tested = [report for report in reports if report.accuracy is not None]
    fit_seconds = sum(report.fit_seconds for report in reports)
    rejections = [rejection for report in reports for rejection in report.rejections]
    return {
        "name": job.job.name,
        "method": job.method.name,
        "codec": transport_words(job),
        "merger": merging_words(job),
        "backbone": played.backbone,
        "dataset": played.dataset,
        "clients": played.clients,
        "rounds": len(reports),
        "seed": job.job.seed,
        "accuracy": tested[-1].accuracy if tested else None,
        "loss": tested[-1].loss if tested else None,
        "uplink_bytes": sum(report.uplink_bytes for report in reports),
        "downlink_bytes": sum(report.downlink_bytes for report in reports),
        "stream_up_bytes": sum(report.stream_up_bytes for report in reports),
        "stream_down_bytes": sum(report.stream_down_bytes for report in reports),
        "evaluation_bytes": sum(report.evaluation_bytes for report in reports),
        "trainable_parameters": played.trainable_parameters,
        "total_parameters": played.total_parameters,
        "client_flops": played.client_flops,
        "samples_per_second": played.passed_samples / fit_seconds if fit_seconds else 0.0,
        "wall_seconds": wall_seconds,
        "privacy": _privacy_of(job, reports),
        "secure_aggregation": job.privacy.secure_aggregation,
        "example_privacy": example_summary(job, len(reports)),
        "rejections": len(rejections),
        "rejection_reasons": dict(Counter(str(rejection.code) for rejection in rejections)),
        "notes": [
            *played.notes,
            *example_words(job, len(reports)),
            *(f"round {report.round}: {report.note}" for report in reports if report.note),
        ],
        "class_names": list(played.class_names),
        "per_client": [dict(client) for client in played.per_client],
        "job": job.hash(),
        "versions": versions(),
    }


def _privacy_of(job: Job, reports: Sequence[RoundReport]) -> dict[str, Any]:
    """What a private job promises after its last round; {} for others."""
    if not job.privacy.is_private:
        return {}
    last = reports[-1].privacy if reports else {}
    central = job.privacy.is_central
    drawn = {
        "sampling": job.privacy.sampling,
        "clients_per_round": job.rounds.clients_per_round or job.data.clients,
        "population": job.privacy.population or job.data.clients,
    }
    return {
        "mode": job.privacy.mode,
        **(drawn if central else {}),
        "rounds": len(reports),
        "rounds_wanted": job.rounds.count,
        **last,
    }


def merging_words(job: Job) -> str:
    """How updates are merged, in a few words."""
    aggregation = job.aggregation
    words = [aggregation.merger]
    if aggregation.factors == "up":
        words.append("B only")
    if aggregation.ranks:
        words.append(f"ranks {aggregation.ranks}")
    if job.training.scaffold:
        words.append("SCAFFOLD")
    return ", ".join(words)


def transport_words(job: Job) -> str:
    """How updates travel, in a few words."""
    update = job.update
    up = update.codec + (" with feedback" if update.error_feedback else "")
    if update.downlink == "changes":
        return up + (
            ", both ways"
            if update.codec == update.downlink_codec
            else f", {update.downlink_codec} down"
        )
    return up
