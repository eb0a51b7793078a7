# SPDX-License-Identifier: Apache-2.0
"""report.html of a run: what it reached, what it cost, how clients fared, and how to repeat it."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from html import escape
from pathlib import Path
from typing import Any

from reports.charts import Series, colour_of, line_chart
from reports.client_charts import (
    accuracy_spread,
    domains_of,
    label_map,
    quantile,
    selection_map,
)
from reports.page import folded, legend, page, section, table, tile
from reports.privacy_charts import SUMS, guarantee, privacy_charts
from reports.run_record import RoundLine, RunRecord, read_run
from reports.units import axis_percent, bytes_text, count_text, duration_text


def write_report(run_dir: Path) -> Path:
    """Write `report.html` from the run's `job.toml`, `metrics.jsonl` and `summary.json`.

    Returns: the file, self-contained and without scripts. Raises: RunRecordError.
    """
    run = read_run(Path(run_dir))
    path = run.folder / "report.html"
    path.write_text(page(f"{run.name} – fedloom", _body(run)), encoding="utf-8")
    return path


def _body(run: RunRecord) -> str:
    summary = run.summary
    clients: list[Mapping[str, Any]] = list(summary.get("per_client") or ())
    measured = [client for client in clients if client.get("accuracy") is not None]
    charts = [_over_rounds(run), _over_bytes(run)] if run.evaluated() else []
    charts += privacy_charts(run.rounds, run.summary.get("privacy") or {})
    if measured:
        charts.append(_spread(measured))
    if any(sum(client.get("labels") or ()) for client in clients):
        charts.append(_labels(clients, summary.get("class_names") or ()))
    if any(sum(client.get("selected") or ()) for client in clients):
        charts.append(_selections(clients))
    parts = [
        f"<h1>{escape(run.name)}</h1>",
        f'<p class="lead">{escape(_lead(run))}</p>',
        _tiles(run),
        _guarantee(run),
        f'<div class="grid2">{"".join(charts)}</div>' if charts else "",
        _personal(measured),
        _domains(measured),
        f'<div class="grid2">{_rejections(run)}{_skipped(summary)}</div>'
        if "skipped_clients" in summary
        else _rejections(run),
        folded("Rounds", _rounds(run.rounds)),
        folded("Job file, complete", f"<pre>{escape(run.job_text.strip())}</pre>"),
        folded("Versions", table(["", "version"], sorted(summary["versions"].items()), words=2)),
        "<footer>Made by fedloom. Bytes are counted as handed to the transport, headers "
        "included. Everything in this file is local: it needs no network.</footer>",
    ]
    return "\n".join(part for part in parts if part)


def _lead(run: RunRecord) -> str:
    s = run.summary
    backbone = f" on {s['backbone']}" if s.get("backbone") else ""
    partition = f", {s['partition']}" if s.get("partition") else ""
    return (
        f"{s['method']}{backbone}, {s['dataset']} over {s['clients']} clients{partition}, "
        f"{s['rounds']} rounds, seed {s['seed']}"
    )


def _tiles(run: RunRecord) -> str:
    s = run.summary
    best = max((line for line, _ in run.evaluated()), key=lambda r: r.accuracy or 0, default=None)
    beside = (
        "not evaluated" if best is None else f"best {_percent(best.accuracy)}, round {best.round}"
    )
    loss = "" if s["loss"] is None else f"loss {s['loss']:.3f}; "
    asked = max(sum(line.clients for line in run.rounds), 1)
    sent = max(sum(line.updates + line.rejections for line in run.rounds), 1)
    tiles = [
        tile("test accuracy", _percent(s["accuracy"]), loss + beside, main=True),
        tile(
            "sent by clients",
            bytes_text(s["uplink_bytes"]),
            f"{bytes_text(s['uplink_bytes'] / sent)} an update",
        ),
        tile(
            "sent to clients",
            bytes_text(s["downlink_bytes"]),
            f"{bytes_text(s['downlink_bytes'] / asked)} a plan",
        ),
        tile("trained parameters", count_text(s["trainable_parameters"]), _share(s)),
        tile(
            "client compute",
            f"{count_text(s['client_flops'])}FLOP",
            f"{count_text(s['client_flops'] / asked)}FLOP a client and round",
        ),
        tile(
            "simulation" if s.get("partition") else "from begin to end",
            duration_text(s["wall_seconds"]),
            f"{count_text(s['samples_per_second'])} samples/s",
        ),
    ]
    return f'<div class="tiles">{"".join(tiles)}</div>'


def _guarantee(run: RunRecord) -> str:
    privacy: Mapping[str, Any] = run.summary.get("privacy") or {}
    words = [guarantee(privacy)] if "epsilon" in privacy else []
    if run.summary.get("secure_aggregation"):
        words.insert(0, SUMS)
    return "".join(f'<p class="lead">{escape(text)}</p>' for text in words)


def _share(summary: Mapping[str, Any]) -> str:
    whole = summary.get("total_parameters")
    return (
        f"{summary['trainable_parameters'] / whole:.1%} of the model" if whole else "on each client"
    )


def _over_rounds(run: RunRecord) -> str:
    lines = [line for line, _ in run.evaluated()]
    one = Series(
        name="accuracy",
        points=tuple((float(line.round), line.accuracy or 0.0) for line in lines),
        tips=tuple(f"{_percent(line.accuracy)} after round {line.round}" for line in lines),
    )
    chart = line_chart(
        [one],
        title="accuracy over rounds",
        x_label="round",
        y_label="test accuracy",
        x_text=lambda value: f"{value:g}",
        y_text=axis_percent,
        whole_x=True,
        y_ceiling=1.0,
    )
    return section(
        "Accuracy over rounds", "Global model on the test set, which no client has.", chart
    )


def _over_bytes(run: RunRecord) -> str:
    lines = run.evaluated()
    one = Series(
        name="accuracy",
        points=tuple((float(total), line.accuracy or 0.0) for line, total in lines),
        tips=tuple(f"{_percent(line.accuracy)} after {bytes_text(total)}" for line, total in lines),
    )
    chart = line_chart(
        [one],
        title="accuracy over bytes",
        x_label="bytes sent, both ways, all clients",
        y_label="test accuracy",
        x_text=bytes_text,
        y_text=axis_percent,
        y_ceiling=1.0,
    )
    return section("Accuracy over bytes", "What the same accuracy costs in traffic.", chart)


def _spread(clients: Sequence[Mapping[str, Any]]) -> str:
    domains = domains_of(clients)
    classes = [colour_of(index) for index in range(len(domains))]
    chart = (legend(domains, classes) if domains else "") + accuracy_spread(clients, domains)
    note = "Global model on each client's own held-out samples; larger dots have more of them."
    return section("Accuracy of each client", note, chart)


def _labels(clients: Sequence[Mapping[str, Any]], class_names: Sequence[str]) -> str:
    widest = max(len(client.get("labels") or ()) for client in clients)
    names = [str(n) for n in class_names] or [str(n) for n in range(widest)]
    note = "Share of each class in a client's samples, and above it how many it has."
    return section("Who holds which labels", note, label_map(clients, names))


def _selections(clients: Sequence[Mapping[str, Any]]) -> str:
    note = "Share of each element in what a client's samples selected in the last round."
    return section("Who selects which elements", note, selection_map(clients))


def _personal(clients: Sequence[Mapping[str, Any]]) -> str:
    tested = [client for client in clients if client.get("local_accuracy") is not None]
    if not tested:
        return ""
    rows = []
    for key, name in (
        ("local_accuracy", "local: what the client itself trained last"),
        ("accuracy", "global: the merged one"),
        ("mixed_accuracy", "mixed"),
    ):
        values = sorted(client[key] for client in tested)
        figures = [sum(values) / len(values), *(quantile(values, s) for s in (0.1, 0.5, 0.9))]
        rows.append([name, *(_percent(value) for value in figures)])
    header = ["adapter", "mean of clients", "worst tenth", "median", "best tenth"]
    note = f"{len(tested)} clients, each on its own held-out samples and counted alike."
    return section("Adapters of clients", note, table(header, rows), wide=True)


def _domains(clients: Sequence[Mapping[str, Any]]) -> str:
    if not domains_of(clients):
        return ""
    groups: dict[str, list[Mapping[str, Any]]] = defaultdict(list)
    for client in clients:
        groups[str(client.get("domain") or "none")].append(client)
    rows = []
    for domain, members in sorted(groups.items()):
        held_out = sum(member["held_out"] for member in members)
        right = sum(member["accuracy"] * member["held_out"] for member in members)
        mean = _percent(right / held_out) if held_out else "–"
        rows.append([domain, str(len(members)), str(held_out), mean])
    content = table(["domain", "clients", "held-out samples", "accuracy"], rows)
    return section("Accuracy by domain", "Weighted by held-out samples.", content, wide=True)


def _rejections(run: RunRecord) -> str:
    reasons: Mapping[str, int] = run.summary.get("rejection_reasons") or {}
    if not run.rejections:
        merged = sum(line.updates for line in run.rounds)
        return section("Rejected updates", f"None: all {merged:,} updates were merged.", "")
    rows = [[code, f"{n:,}"] for code, n in sorted(reasons.items(), key=lambda item: -item[1])]
    note = f"{run.rejections:,} updates were refused; their rounds went on without them."
    return section("Rejected updates", note, table(["reason", "updates"], rows))


def _skipped(summary: Mapping[str, Any]) -> str:
    skipped: Sequence[Sequence[Any]] = summary.get("skipped_clients") or ()
    if not skipped:
        return section("Skipped clients", "None: every client had samples to train on.", "")
    rows = [[str(name), str(reason)] for name, reason in skipped]
    note = f"{len(skipped)} of the clients asked for took no part."
    return section("Skipped clients", note, table(["client", "reason"], rows, words=2))


def _rounds(lines: Sequence[RoundLine]) -> str:
    header = [
        "round",
        "accuracy",
        "loss",
        "training loss",
        "clients",
        "merged",
        "samples",
        "rejected",
    ]
    rows = [
        [
            str(r.round),
            _percent(r.accuracy),
            "–" if r.loss is None else f"{r.loss:.4f}",
            "–" if r.train_loss is None else f"{r.train_loss:.4f}",
            f"{r.clients:,}",
            f"{r.updates:,}",
            f"{r.samples:,}",
            f"{r.rejections:,}",
            bytes_text(r.uplink_bytes),
            bytes_text(r.downlink_bytes),
            duration_text(r.seconds),
        ]
        for r in lines
    ]
    return table([*header, "up", "down", "time"], rows)


def _percent(value: float | None) -> str:
    return "–" if value is None else f"{100 * value:.1f} %"
