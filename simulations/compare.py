# SPDX-License-Identifier: Apache-2.0
"""Several runs side by side: one table, one plot, `compare.html` and `compare.json`."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape
from pathlib import Path
from typing import TYPE_CHECKING, Any

from reports.charts import Series, colour_of, line_chart
from reports.errors import RunRecordError
from reports.machine import machine, versions
from reports.page import legend, page, section, table
from reports.run_record import RoundLine, RunRecord, is_run, read_run
from reports.units import axis_percent, bytes_text, count_text, duration_text
from simulations.progress import ProgressListener

if TYPE_CHECKING:
    from coordinator.job import Job

# A straight byte axis shows no more than this between the cheapest and the dearest run.
WIDE_RATIO = 15

# What must be alike for accuracies to be comparable.
_CONDITIONS = ("dataset", "partition", "clients", "rounds", "seed", "backbone")
_FIGURES = (
    "accuracy",
    "loss",
    "uplink_bytes",
    "downlink_bytes",
    "client_flops",
    "samples_per_second",
    "wall_seconds",
    "trainable_parameters",
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Entry:
    """One thing to compare: a job that is still to run, or a finished run."""

    name: str
    job: Job | None = None
    record: RunRecord | None = None

    def __post_init__(self) -> None:
        if (self.job is None) == (self.record is None):
            raise ValueError(f"entry {self.name}: expected either a job or a finished run")


def prepare(paths: Sequence[Path], *, overrides: Sequence[str] = ()) -> list[Entry]:
    """Read all job files (with `overrides`) and finished runs; names are made unique.

    Raises: JobError or RunRecordError for the first one that is wrong, before anything has run.
    """
    from coordinator.job import load_job

    entries: list[Entry] = []
    taken: set[str] = set()
    for path in paths:
        if path.is_dir():
            if not is_run(path):
                raise RunRecordError(
                    f"{path}: expected a job file, or the directory of a finished run "
                    "(with summary.json)"
                )
            record = read_run(path)
            entries.append(Entry(name=_unique(record.name, taken), record=record))
        else:
            job = load_job(path, overrides)
            entries.append(Entry(name=_unique(path.stem, taken), job=job))
    return entries


def compare(entries: Sequence[Entry], out: Path, *, progress: ProgressListener) -> list[RunRecord]:
    """Run what has not run, each into `out/<name>`, then write `compare.html` and `compare.json`.

    Returns: all runs, in the order of `entries`.
    """
    out.mkdir(parents=True, exist_ok=True)
    records = []
    for number, entry in enumerate(entries, start=1):
        if entry.record is not None:
            records.append(entry.record)
            continue
        if entry.job is None:
            raise ValueError(f"entry {entry.name} has nothing to compare")
        progress.stage(f"job {number} of {len(entries)}: {entry.name}")
        from simulations.run import simulate

        simulate(entry.job, out / entry.name, progress=progress)
        records.append(read_run(out / entry.name))
    write_comparison([(e.name, r) for e, r in zip(entries, records, strict=True)], out)
    return records


def write_comparison(runs: Sequence[tuple[str, RunRecord]], out: Path) -> Path:
    """Write both files into `out`. Returns: compare.html."""
    document = json.dumps(to_document([record for _, record in runs]), indent=2) + "\n"
    (out / "compare.json").write_text(document, encoding="utf-8")
    path = out / "compare.html"
    path.write_text(page("Comparison – fedloom", _body(runs)), encoding="utf-8")
    return path


def to_document(records: Sequence[RunRecord]) -> dict[str, Any]:
    """The JSON object: figures of each run by the names of summary.json, and their curves."""
    return {
        "runs": [
            {
                "name": record.name,
                "folder": str(record.folder),
                "method": record.summary["method"],
                **{key: record.summary.get(key) for key in _TRANSPORT.values()},
                **{key: record.summary.get(key) for key in (*_CONDITIONS, *_FIGURES)},
                "rejections": record.rejections,
                "curve": [
                    {"round": line.round, "bytes": total, "accuracy": line.accuracy}
                    for line, total in record.evaluated()
                ],
            }
            for record in records
        ],
        "differing": differing(records),
        "machine": machine(),
        "versions": versions(),
    }


def differing(records: Sequence[RunRecord]) -> list[str]:
    """Conditions that are not the same in all runs, so that accuracies compare with care."""
    return [
        key
        for key in _CONDITIONS
        if len({json.dumps(record.summary.get(key)) for record in records}) > 1
    ]


_FIRST = ("run", "method")
# How updates travel and are merged: shown where runs differ in it.
_TRANSPORT = {"codec": "codec", "merger": "merger"}
_CELLS = ("accuracy", "bytes up", "bytes down", "client compute", "samples/s", "time", "trained")


def header_of(records: Sequence[RunRecord]) -> tuple[str, ...]:
    """The names of the table's columns."""
    return (*_FIRST, *_shown(records), *_CELLS)


def rows_of(records: Sequence[RunRecord]) -> list[tuple[str, ...]]:
    """The cells of the table, as text."""
    shown = _shown(records)
    return [
        (
            record.name,
            str(s["method"]),
            *(str(s.get(_TRANSPORT[key], "")) for key in shown),
            "–" if s["accuracy"] is None else f"{100 * s['accuracy']:.1f} %",
            bytes_text(s["uplink_bytes"]),
            bytes_text(s["downlink_bytes"]),
            f"{count_text(s['client_flops'])}FLOP",
            f"{s['samples_per_second']:,.0f}",
            duration_text(s["wall_seconds"]),
            count_text(s["trainable_parameters"]),
        )
        for record in records
        for s in [record.summary]
    ]


def _shown(records: Sequence[RunRecord]) -> list[str]:
    return [
        name
        for name, key in _TRANSPORT.items()
        if len({str(record.summary.get(key, "")) for record in records}) > 1
    ]


def to_table(records: Sequence[RunRecord]) -> str:
    """The table for a terminal or a log."""
    header = header_of(records)
    rows = [header, *rows_of(records)]
    widths = [max(len(row[i]) for row in rows) for i in range(len(header))]
    words = len(header) - len(_CELLS)
    aligned = [[str.ljust, str.rjust][i >= words] for i in range(len(header))]
    lines = [
        "  ".join(
            align(cell, width) for align, cell, width in zip(aligned, row, widths, strict=True)
        )
        for row in rows
    ]
    lines.insert(1, "  ".join("-" * width for width in widths))
    if different := differing(records):
        lines.append(f"\nthese runs differ in {', '.join(different)}: compare with care")
    return "\n".join(line.rstrip() for line in lines)


def _body(runs: Sequence[tuple[str, RunRecord]]) -> str:
    records = [record for _, record in runs]
    names = [name for name, _ in runs]
    keys = legend(names, [colour_of(index) for index in range(len(names))])
    rows = [(name, *row[1:]) for name, row in zip(names, rows_of(records), strict=True)]
    different = differing(records)
    note = f"These runs differ in {', '.join(different)}: compare with care." if different else ""
    charts = ""
    if any(record.evaluated() for record in records):
        charts = keys + f'<div class="grid2">{_over_rounds(runs)}{_over_bytes(runs)}</div>'
    return "\n".join(
        [
            f"<h1>{len(runs)} runs compared</h1>",
            f'<p class="lead">{escape(_conditions(records))}</p>',
            section(
                "Figures",
                note,
                table(header_of(records), rows, words=len(header_of(records)) - len(_CELLS)),
            ),
            section("Accuracy", "Global model on the test set.", charts, wide=True)
            if charts
            else "",
            "<footer>Made by fedloom. Bytes and compute are sums over all clients and rounds, "
            "headers included. Everything in this file is local: it needs no network.</footer>",
        ]
    )


def _conditions(records: Sequence[RunRecord]) -> str:
    if not records:
        return "nothing to compare"
    s, different = records[0].summary, differing(records)
    words = {
        "dataset": str(s["dataset"]),
        "clients": f"{s['clients']} clients",
        "partition": str(s.get("partition") or ""),
        "rounds": f"{s['rounds']} rounds",
        "seed": f"seed {s['seed']}",
    }
    return ", ".join(text for key, text in words.items() if text and key not in different)


def _over_rounds(runs: Sequence[tuple[str, RunRecord]]) -> str:
    series = [
        _curve(
            name, [(float(line.round), line, f"round {line.round}") for line, _ in run.evaluated()]
        )
        for name, run in runs
    ]
    chart = line_chart(
        series,
        title="accuracy over rounds",
        x_label="round",
        y_label="test accuracy",
        x_text=lambda value: f"{value:g}",
        y_text=axis_percent,
        whole_x=True,
        y_ceiling=1.0,
    )
    return f"<div>{chart}</div>"


def _over_bytes(runs: Sequence[tuple[str, RunRecord]]) -> str:
    totals = [total for _, run in runs for _, total in run.evaluated()]
    ends = [run.evaluated()[-1][1] for _, run in runs if run.evaluated()]
    # One-bit updates beside full fine-tuning: on a straight axis all but one would be a wall.
    powers = min(totals) > 0 and max(ends) > WIDE_RATIO * min(ends)
    series = [
        _curve(
            name,
            [
                (math.log10(total) if powers else float(total), line, bytes_text(total))
                for line, total in run.evaluated()
            ],
        )
        for name, run in runs
    ]
    chart = line_chart(
        series,
        title="accuracy over bytes",
        x_label="bytes sent, both ways, all clients" + (" (logarithmic)" if powers else ""),
        y_label="test accuracy",
        x_text=(lambda value: bytes_text(10.0**value)) if powers else bytes_text,
        y_text=axis_percent,
        whole_x=powers,
        y_ceiling=1.0,
    )
    return f"<div>{chart}</div>"


def _curve(name: str, points: Sequence[tuple[float, RoundLine, str]]) -> Series:
    return Series(
        name=name,
        points=tuple((x, line.accuracy or 0.0) for x, line, _ in points),
        tips=tuple(f"{_percent(line.accuracy)}, {where}" for _, line, where in points),
    )


def _percent(value: float | None) -> str:
    return "–" if value is None else f"{100 * value:.1f} %"


def _unique(name: str, taken: set[str]) -> str:
    candidate, number = name, 2
    while candidate in taken:
        candidate, number = f"{name}-{number}", number + 1
    taken.add(candidate)
    return candidate
