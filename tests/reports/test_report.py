# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import json
import re
import sys
import types
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from reports.errors import RunRecordError
from reports.report import write_report
from reports.run_record import read_run
from simulations.compare import Entry, compare, differing, prepare, to_document, to_table
from simulations.progress import SilentProgress


def fake_run(
    folder: Path,
    *,
    name: str = "digits-lora",
    method: str = "lora",
    clients: int = 20,
    rounds: int = 8,
    final: float = 0.952,
    update_bytes: int = 38_400,
    domains: tuple[str, ...] = (),
    rejected: int = 0,
    seed: int = 0,
    codec: str = "float32",
    merger: str = "weighted-mean",
) -> Path:
    """A run directory as the round loop leaves it, with figures of a plausible shape."""
    rng = np.random.default_rng(seed)
    folder.mkdir(parents=True)
    shares = rng.dirichlet([0.3] * clients, size=10).T
    labels = np.floor(shares * 144).astype(int)
    per_client: list[dict[str, Any]] = []
    for index, counts in enumerate(labels):
        samples = int(counts.sum())
        accuracy = float(np.clip(rng.normal(final - 0.02, 0.06), 0, 1)) if samples else None
        per_client.append(
            {
                "id": f"client-{index:03}",
                "samples": samples,
                "held_out": samples // 5,
                "accuracy": accuracy,
                "domain": domains[index % len(domains)] if domains else None,
                "labels": counts.tolist(),
            }
        )
    lines = []
    for number in range(1, rounds + 1):
        accuracy = final - 0.75 * float(np.exp(-number / 2.2)) + float(rng.normal(0, 0.004))
        evaluated = number % 2 == 0 or rounds <= 12
        line = {
            "round": number,
            "accuracy": accuracy if evaluated else None,
            "loss": 1.9 * float(np.exp(-number / 3)) + 0.15 if evaluated else None,
            "train_loss": 2.1 * float(np.exp(-number / 3)) + 0.12,
            "uplink_bytes": update_bytes * clients,
            "downlink_bytes": (38_400 + 212) * clients,
            "clients": clients,
            "updates": clients - (rejected if number == 3 else 0),
            "samples": int(labels.sum()),
            "rejections": rejected if number == 3 else 0,
            "seconds": 1.31 + float(rng.normal(0, 0.05)),
        }
        lines.append(json.dumps(line))
    (folder / "metrics.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")
    last = json.loads(lines[-1])
    summary = {
        "name": name,
        "method": method,
        "codec": codec,
        "merger": merger,
        "backbone": "vit-small-28",
        "dataset": "digits",
        "partition": "dirichlet:0.3",
        "clients": clients,
        "rounds": rounds,
        "seed": seed,
        "accuracy": last["accuracy"],
        "loss": last["loss"],
        "uplink_bytes": update_bytes * clients * rounds,
        "downlink_bytes": (38_400 + 212) * clients * rounds,
        "trainable_parameters": 9_610,
        "client_flops": 8.12e12,
        "samples_per_second": 1043.7,
        "wall_seconds": 11.4,
        "rejections": rejected,
        "rejection_reasons": {"E204 not finite": rejected} if rejected else {},
        "versions": {"python": "3.11.7", "fedloom": "0.1.0", "numpy": "2.4.6", "torch": "2.13.0"},
        "per_client": per_client,
        "skipped_clients": [["client-020", "no samples: 20 of 20 went to others"]]
        if domains
        else [],
        "class_names": [str(digit) for digit in range(10)],
    }
    (folder / "summary.json").write_text(json.dumps(summary, indent=2), encoding="utf-8")
    job = '[job]\nname = "digits-lora"\nseed = 0\n\n[method]\nname = "lora"\nrank = 4\n'
    (folder / "job.toml").write_text(job, encoding="utf-8")
    return folder


class Balance(HTMLParser):
    """Counts tags and notes whatever would load something from elsewhere."""

    VOID = frozenset({"meta", "link", "br", "img", "input", "hr"})

    def __init__(self) -> None:
        super().__init__()
        self.stack: list[str] = []
        self.outside: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.outside += [f"{tag} {key}" for key, value in attrs if key in ("src", "href") and value]
        self.outside += [tag] if tag in ("script", "link", "iframe") else []
        if tag not in self.VOID:
            self.stack.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        return

    def handle_endtag(self, tag: str) -> None:
        assert self.stack.pop() == tag


def checked(path: Path) -> str:
    """The page's text, after seeing that tags nest and that nothing comes from elsewhere."""
    text = path.read_text(encoding="utf-8")
    parser = Balance()
    parser.feed(text)
    parser.close()
    assert parser.stack == []
    assert parser.outside == []
    assert "http" not in text and "url(" not in text and "@import" not in text
    return text


def test_report_is_self_contained_and_names_the_key_figures(tmp_path: Path) -> None:
    folder = fake_run(tmp_path / "run", rejected=2)
    text = checked(write_report(folder))
    summary = json.loads((folder / "summary.json").read_text())
    assert f"{100 * summary['accuracy']:.1f} %" in text
    assert "6.14 MB" in text  # 38,400 bytes × 20 clients × 8 rounds
    assert "E204 not finite" in text
    assert "rank = 4" in text
    assert "2.13.0" in text
    for title in ("Accuracy over rounds", "Accuracy over bytes", "Accuracy of each client"):
        assert title in text
    # Every client is a dot, and a column of ten cells.
    measured = [c for c in summary["per_client"] if c["accuracy"] is not None]
    assert text.count('class="blob') == len(measured)
    assert text.count('class="cell"') == 20 * 10


def test_report_lists_domains_and_skipped_clients_when_there_are_some(tmp_path: Path) -> None:
    folder = fake_run(tmp_path / "run", domains=("rotation", "inversion", "blur", "noise"))
    text = checked(write_report(folder))
    assert "Accuracy by domain" in text
    assert "inversion" in text
    assert "client-020" in text


def test_report_says_where_only_sums_were_seen(tmp_path: Path) -> None:
    folder = fake_run(tmp_path / "run")
    assert "Secure aggregation" not in checked(write_report(folder))
    path = folder / "summary.json"
    summary = json.loads(path.read_text(encoding="utf-8")) | {"secure_aggregation": True}
    path.write_text(json.dumps(summary), encoding="utf-8")
    assert "has seen the sum, and no single one" in checked(write_report(folder))


def test_report_of_many_clients_draws_a_sample_of_columns(tmp_path: Path) -> None:
    text = checked(write_report(fake_run(tmp_path / "run", clients=800, rounds=40)))
    columns = text.count('class="bar"')
    assert 200 <= columns <= 350
    assert f"{columns} of 800 clients" in text


def test_report_is_written_when_nothing_was_evaluated(tmp_path: Path) -> None:
    folder = fake_run(tmp_path / "run", rounds=1)
    line = json.loads((folder / "metrics.jsonl").read_text())
    line["accuracy"] = line["loss"] = None
    (folder / "metrics.jsonl").write_text(json.dumps(line) + "\n")
    summary = json.loads((folder / "summary.json").read_text())
    summary["accuracy"] = summary["loss"] = None
    summary["per_client"] = []
    (folder / "summary.json").write_text(json.dumps(summary))
    text = checked(write_report(folder))
    assert "not evaluated" in text
    assert "<svg" not in text


def test_report_escapes_what_users_write(tmp_path: Path) -> None:
    folder = fake_run(tmp_path / "run", name="<script>alert(1)</script>")
    (folder / "job.toml").write_text('name = "</pre><script>"\n')
    text = checked(write_report(folder))
    assert "&lt;script&gt;alert(1)" in text


@pytest.mark.parametrize(
    ("file", "content", "expected"),
    [
        ("summary.json", None, "summary.json"),
        ("summary.json", "{", "expected JSON"),
        ("summary.json", "[]", "expected a JSON object"),
        ("summary.json", '{"method": "lora"}', "dataset"),
        ("metrics.jsonl", '{"round": 1}\n', "line 1"),
        ("metrics.jsonl", None, "metrics.jsonl"),
        ("job.toml", None, "job.toml"),
    ],
)
def test_report_is_refused_when_a_file_is_damaged(
    tmp_path: Path, file: str, content: str | None, expected: str
) -> None:
    folder = fake_run(tmp_path / "run")
    if content is None:
        (folder / file).unlink()
    else:
        (folder / file).write_text(content)
    with pytest.raises(RunRecordError, match=re.escape(expected)):
        write_report(folder)


def test_comparison_holds_every_run_in_table_plot_and_json(tmp_path: Path) -> None:
    methods = (
        "lora",
        "lora-sb",
        "head",
        "full",
        "ssf",
        "adapter",
        "one-bit-adapter",
        "prompt",
        "one-bit-lora",
    )
    folders = [
        fake_run(
            tmp_path / method,
            name=f"digits-{method}",
            method=method,
            final=0.9 + 0.008 * index,
            update_bytes=2_000 * (1 + index) ** 2,
        )
        for index, method in enumerate(methods)
    ]
    out = tmp_path / "out"
    records = compare(prepare(folders), out, progress=SilentProgress())
    assert [record.summary["method"] for record in records] == list(methods)
    text = checked(out / "compare.html")
    document = json.loads((out / "compare.json").read_text())
    assert [run["name"] for run in document["runs"]] == [f"digits-{m}" for m in methods]
    assert document["differing"] == []
    for record in records:
        assert text.count(f">{record.name}<") >= 2  # legend and table
    assert text.count("<polyline") == 2 * len(methods)
    assert document["runs"][0]["curve"][-1]["bytes"] == (2_000 + 38_612) * 20 * 8


def test_comparison_runs_jobs_and_reads_finished_runs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def simulate(job: Any, out: Path, *, progress: Any) -> None:
        fake_run(out, name=job.job.name, method=job.method.name)

    stand_in = types.ModuleType("simulations.run")
    stand_in.simulate = simulate  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "simulations.run", stand_in)
    job = tmp_path / "digits-head.toml"
    job.write_text('[job]\nname = "digits-head"\n[method]\nname = "head"\n')
    finished = fake_run(tmp_path / "finished")
    out = tmp_path / "out"
    records = compare(prepare([job, finished]), out, progress=SilentProgress())
    assert [record.folder for record in records] == [out / "digits-head", finished]
    assert records[0].summary["method"] == "head"


def test_comparison_says_what_differs(tmp_path: Path) -> None:
    a = read_run(fake_run(tmp_path / "a", clients=20))
    b = read_run(fake_run(tmp_path / "b", clients=10, seed=1))
    assert differing([a, b]) == ["clients", "seed"]
    assert "compare with care" in to_table([a, b])
    assert to_document([a, b])["differing"] == ["clients", "seed"]


def test_comparison_shows_codec_and_merger_where_they_differ(tmp_path: Path) -> None:
    a = read_run(fake_run(tmp_path / "a", codec="float32", merger="weighted-mean"))
    b = read_run(fake_run(tmp_path / "b", codec="one-bit", merger="weighted-mean"))
    header, _, first, second = to_table([a, b]).splitlines()[:4]
    assert header.split()[:3] == ["run", "method", "codec"] and "merger" not in header
    assert "float32" in first and "one-bit" in second
    assert "codec" not in to_table([a, a])
    assert [run["codec"] for run in to_document([a, b])["runs"]] == ["float32", "one-bit"]


def test_prepare_makes_names_unique_and_refuses_a_folder_without_a_run(tmp_path: Path) -> None:
    folder = fake_run(tmp_path / "a")
    names = [entry.name for entry in prepare([folder, folder])]
    assert names == ["digits-lora", "digits-lora-2"]
    with pytest.raises(RunRecordError, match="expected a job file, or the directory"):
        prepare([tmp_path])


def test_entry_is_refused_when_it_is_neither_job_nor_run() -> None:
    with pytest.raises(ValueError, match="either a job or a finished run"):
        Entry(name="nothing")


def test_byte_axis_is_logarithmic_when_runs_cost_very_different_amounts(tmp_path: Path) -> None:
    cheap = fake_run(tmp_path / "cheap", name="cheap", update_bytes=1_500)
    dear = fake_run(tmp_path / "dear", name="dear", update_bytes=4_000_000)
    out = tmp_path / "out"
    compare(prepare([cheap, dear]), out, progress=SilentProgress())
    assert "(logarithmic)" in checked(out / "compare.html")
    compare(prepare([cheap]), out, progress=SilentProgress())
    assert "(logarithmic)" not in checked(out / "compare.html")


def test_pools_and_personal_adapters_have_a_chart_and_a_table(tmp_path: Path) -> None:
    folder = fake_run(tmp_path / "run", clients=6)
    plain = write_report(folder).read_text(encoding="utf-8")
    assert "Adapters of clients" not in plain and "Who selects which elements" not in plain
    path = folder / "summary.json"
    summary = json.loads(path.read_text(encoding="utf-8"))
    for number, client in enumerate(summary["per_client"]):
        client["selected"] = [3 * number, 7.0, 0]
        client["local_accuracy"] = 0.75 + number / 100
        client["mixed_accuracy"] = 0.5
    path.write_text(json.dumps(summary), encoding="utf-8")
    text = checked(write_report(folder))
    assert "Who selects which elements" in text and "elements that each client selects" in text
    assert "client-005: 22 selections" in text and "client-005: 15 of 22 are 0" in text
    rows = re.findall(r"<tr>(.*?)</tr>", text[text.index("Adapters of clients") :], re.DOTALL)
    assert "77.5 %" in rows[1] and "local" in rows[1], "0.75 to 0.80, their mean"
    assert "50.0 %" in rows[3] and "mixed" in rows[3]
