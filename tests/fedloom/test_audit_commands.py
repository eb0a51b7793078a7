# SPDX-License-Identifier: Apache-2.0
"""`fedloom audit`: what it prints, what it leaves behind, and what it does not load."""

from __future__ import annotations

import json
import sys
import types
from pathlib import Path
from typing import Any

import pytest

from fedloom.cli import main
from fedloom.errors import BAD_INPUT, DONE
from simulations.audits.audited import Audited
from simulations.benchmarks.figure import figure

AUDITS = ("canary", "inversion", "membership", "accuracy")


@pytest.fixture(params=AUDITS)
def audit(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> str:
    """The name of an audit that attacks nothing and says whether it was quick."""
    name: str = request.param
    monkeypatch.chdir(tmp_path)

    def attack(progress: Any, *, quick: bool, **options: Any) -> Audited:
        progress.stage("attacking")
        found = figure(f"{name}_found", 1.5, target="<= 2", note="quick" if quick else "whole")
        return Audited(figures=(found,), draw=lambda path: path.write_bytes(b"plot") and None)

    stand_in = types.ModuleType(f"simulations.audits.{name}")
    setattr(stand_in, f"{name}_audit", attack)
    monkeypatch.setitem(sys.modules, f"simulations.audits.{name}", stand_in)
    return name


def test_figures_are_printed_as_a_table_or_as_json(
    audit: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["audit", audit]) == DONE
    printed = capsys.readouterr()
    assert f"{audit}_found" in printed.out and "whole" in printed.out
    assert "attacking" in printed.err
    assert main(["audit", audit, "--json", "--quick"]) == DONE
    (only,) = json.loads(capsys.readouterr().out)["figures"]
    assert (only["name"], only["holds"], only["note"]) == (f"{audit}_found", True, "quick")


def test_a_folder_gets_figures_and_plot(audit: str, tmp_path: Path) -> None:
    out = tmp_path / "not" / "yet"
    assert main(["audit", audit, "--out", str(out)]) == DONE
    document = json.loads((out / "figures.json").read_text())
    assert document["figures"][0]["value"] == 1.5 and "versions" in document
    assert (out / "plot.png").read_bytes() == b"plot"


def test_a_folder_that_cannot_be_is_refused_before_anything_is_attacked(
    audit: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "file").write_text("")
    assert main(["audit", audit, "--out", str(tmp_path / "file" / "folder")]) == BAD_INPUT
    assert "attacking" not in capsys.readouterr().err


def test_accuracy_is_given_its_job_seeds_and_folder(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    given: dict[str, Any] = {}

    def attack(progress: Any, **options: Any) -> Audited:
        given.update(options)
        return Audited(figures=(), draw=lambda path: path.write_bytes(b"plot") and None)

    stand_in = types.ModuleType("simulations.audits.accuracy")
    monkeypatch.setattr(stand_in, "accuracy_audit", attack, raising=False)
    monkeypatch.setitem(sys.modules, "simulations.audits.accuracy", stand_in)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "job.toml").write_text('[method]\nname = "head"\n')
    assert main(["audit", "accuracy", "--job", "job.toml", "--seeds", "5"]) == DONE
    assert given["job"].method.name == "head" and given["seeds"] == 5
    assert given["out"] == Path("runs/audit-accuracy")
    assert (tmp_path / "runs" / "audit-accuracy" / "figures.json").is_file()
    assert main(["audit", "accuracy", "--quick"]) == DONE
    assert given["out"] == Path("runs/audit-accuracy-quick") and given["job"] is None
    capsys.readouterr()
    assert main(["audit", "accuracy", "--job", "none.toml"]) == BAD_INPUT
    assert "none.toml" in capsys.readouterr().err


def test_help_names_every_audit(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["audit", "--help"]) == DONE
    printed = capsys.readouterr().out
    assert all(name in printed for name in AUDITS)
