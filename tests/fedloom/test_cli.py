# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import json
import subprocess
import sys
import time
import types
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from fedloom.cli import app, main
from fedloom.errors import BAD_INPUT, DONE, FAILED
from simulations.benchmarks.figure import figure

JOB = '[job]\nname = "tiny run"\n[data]\ndataset = "digits"\n'
SUMMARY: dict[str, Any] = {
    "accuracy": 0.95, "uplink_bytes": 6_144_000, "downlink_bytes": 6_177_920,
    "trainable_parameters": 9_610, "samples_per_second": 1043.7, "wall_seconds": 11.4,
    "rejections": 0, "skipped_clients": [],
}  # fmt: skip


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[tuple[Any, Path]]]:
    """A simulation that only notes what it was asked for."""
    noted: list[tuple[Any, Path]] = []

    def simulate(job: Any, out: Path, *, progress: Any) -> dict[str, Any]:
        noted.append((job, out))
        out.mkdir(parents=True, exist_ok=True)
        (out / "job.toml").write_text(JOB)
        progress.stage("compiling")
        return SUMMARY

    stand_in = types.ModuleType("simulations.run")
    stand_in.simulate = simulate  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "simulations.run", stand_in)
    yield noted


@pytest.fixture
def job_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    path = tmp_path / "tiny.toml"
    path.write_text(JOB)
    return path


def test_help_lists_every_command() -> None:
    result = CliRunner().invoke(app, ["--help"])
    assert result.exit_code == DONE
    for command in ("simulate", "compare", "bundle", "device", "bench", "audit", "doctor"):
        assert command in result.output


def test_help_of_a_command_explains_its_arguments() -> None:
    result = CliRunner().invoke(app, ["bundle", "build", "--help"])
    assert "The job file.  [required]" in result.output
    assert "\\" not in result.output


def test_simulate_passes_options_on_as_overrides(
    calls: list[tuple[Any, Path]], job_file: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ["simulate", str(job_file), "--clients", "7", "--partition", "shards:2"]
    arguments += ["--backend", "sequential", "--seed", "3", "--set", "rounds.count=2"]
    assert main(arguments) == DONE
    ((job, out),) = calls
    assert (job.data.clients, job.data.partition) == (7, "shards:2")
    assert (job.simulation.backend, job.job.seed, job.rounds.count) == ("sequential", 3, 2)
    assert out == Path("runs/tiny-run")
    printed = capsys.readouterr()
    assert "0.9500" in printed.out and "report.html" in printed.out
    assert "compiling" in printed.err


def test_simulate_takes_the_next_free_folder_without_out(
    calls: list[tuple[Any, Path]], job_file: Path
) -> None:
    assert main(["simulate", str(job_file)]) == main(["simulate", str(job_file)]) == DONE
    assert [out.name for _, out in calls] == ["tiny-run", "tiny-run-2"]


def test_simulate_prints_json_alone_when_asked(
    calls: list[tuple[Any, Path]], job_file: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["simulate", str(job_file), "--json"]) == DONE
    assert json.loads(capsys.readouterr().out) == SUMMARY


def test_simulate_replaces_a_run_only_by_force(
    calls: list[tuple[Any, Path]], job_file: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ["simulate", str(job_file), "--out", "here"]
    assert main(arguments) == DONE
    assert main(arguments) == BAD_INPUT
    assert "--force" in capsys.readouterr().err
    assert main([*arguments, "--force"]) == DONE
    assert len(calls) == 2


def test_simulate_goes_on_in_the_folder_of_the_run_when_asked(
    calls: list[tuple[Any, Path]], job_file: Path
) -> None:
    for place in ([], ["--out", "here"]):
        assert main(["simulate", str(job_file), *place]) == DONE
        (calls.pop()[1] / "journal.sqlite").touch()
        assert main(["simulate", str(job_file), *place, "--resume"]) == DONE
    assert [out for _, out in calls] == [Path("runs/tiny-run"), Path("here")]


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["--resume"], "holds no run to go on with"),
        (["--resume", "--out", "nowhere"], "nowhere holds no run to go on with"),
        (["--resume", "--force"], "give one of them"),
    ],
)
def test_simulate_refuses_to_go_on_where_it_cannot(
    calls: list[tuple[Any, Path]],
    job_file: Path,
    capsys: pytest.CaptureFixture[str],
    arguments: list[str],
    expected: str,
) -> None:
    assert main(["simulate", str(job_file), *arguments]) == BAD_INPUT
    assert expected in capsys.readouterr().err
    assert calls == []


def test_simulate_never_removes_a_folder_that_is_not_a_run(
    calls: list[tuple[Any, Path]], job_file: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    precious = job_file.parent / "thesis" / "chapter.txt"
    precious.parent.mkdir()
    precious.write_text("words")
    assert main(["simulate", str(job_file), "--out", "thesis", "--force"]) == BAD_INPUT
    assert precious.read_text() == "words"
    assert "was not made by fedloom" in capsys.readouterr().err


def test_bad_job_ends_with_2_and_names_key_value_line(
    calls: list[tuple[Any, Path]], job_file: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    job_file.write_text(JOB + "clients = 0\n")
    assert main(["simulate", str(job_file)]) == BAD_INPUT
    error = capsys.readouterr().err
    assert "line 5" in error and "data.clients = 0" in error
    assert "Traceback" not in error
    assert calls == []


@pytest.mark.parametrize(
    ("error", "code", "expected"),
    [
        (FileNotFoundError(2, "No such file or directory", "x.npz"), BAD_INPUT, "x.npz"),
        (OSError(28, "No space left on device"), FAILED, "No space left"),
        (ModuleNotFoundError("No module named 'torch'", name="torch"), FAILED, "[simulation]"),
        (KeyboardInterrupt(), FAILED, "interrupted"),
    ],
)
def test_errors_of_the_surroundings_are_one_line(
    error: BaseException,
    code: int,
    expected: str,
    job_file: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    def simulate(job: Any, out: Path, *, progress: Any) -> dict[str, Any]:
        raise error

    stand_in = types.ModuleType("simulations.run")
    stand_in.simulate = simulate  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "simulations.run", stand_in)
    assert main(["simulate", str(job_file)]) == code
    message = capsys.readouterr().err
    assert expected in message
    assert len(message.strip().splitlines()) == 1


def test_fault_of_ours_ends_with_1_and_a_traceback(
    job_file: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    stand_in = types.ModuleType("simulations.run")
    stand_in.simulate = lambda job, out, *, progress: [][1]  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "simulations.run", stand_in)
    assert main(["simulate", str(job_file)]) == FAILED
    assert "Traceback" in capsys.readouterr().err


@pytest.mark.parametrize(
    "arguments", [["nonsense"], ["simulate"], ["simulate", "a.toml", "--clients", "many"]]
)
def test_wrong_arguments_end_with_2(
    arguments: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(arguments) == BAD_INPUT
    assert "Usage" in capsys.readouterr().err


def test_compare_reads_all_jobs_before_running_any(
    calls: list[tuple[Any, Path]], job_file: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    broken = job_file.with_name("broken.toml")
    broken.write_text("[rounds]\ncount = -1\n")
    assert main(["compare", str(job_file), str(broken)]) == BAD_INPUT
    assert "rounds.count" in capsys.readouterr().err
    assert calls == []


def test_bench_prints_a_table_or_json(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    stand_in = types.ModuleType("simulations.benchmarks.wire")
    stand_in.figures = lambda progress, quick: [  # type: ignore[attr-defined]
        figure("one_bit_size_ratio", 0.034, target="<= 0.0357", note="QUICK" if quick else ""),
        figure("one_bit_accuracy_gap", 2.0, unit="points", target="<= 1.5"),
    ]
    monkeypatch.setitem(sys.modules, "simulations.benchmarks.wire", stand_in)
    out = tmp_path / "deep" / "wire.json"
    assert main(["bench", "wire", "--out", str(out)]) == DONE
    table = capsys.readouterr().out
    assert "one_bit_size_ratio" in table and "NO" in table
    assert main(["bench", "wire", "--json"]) == DONE
    document = json.loads(capsys.readouterr().out)
    assert document["figures"][0] == {
        "name": "one_bit_size_ratio", "value": 0.034, "unit": "", "target": "<= 0.0357",
        "holds": True, "note": "",
    }  # fmt: skip
    assert document["figures"][1]["holds"] is False
    assert set(document) == {"figures", "machine", "versions"}
    assert json.loads(out.read_text())["figures"] == document["figures"]
    assert main(["bench", "wire", "--quick"]) == DONE
    assert "QUICK" in capsys.readouterr().out


def test_command_ends_with_2_in_a_process_of_its_own(tmp_path: Path) -> None:
    done = _run("simulate", str(tmp_path / "absent.toml"))
    assert done.returncode == BAD_INPUT
    assert "absent.toml" in done.stderr
    assert "Traceback" not in done.stderr
    assert done.stdout == ""


def test_help_is_quick() -> None:
    # The promise is 0.4 s; a loaded machine is forgiven, a heavy import (torch: 2 s) is not.
    bare = min(_seconds("-c", "pass") for _ in range(3))
    helped = min(_seconds("-m", "fedloom", "--help") for _ in range(3))
    assert helped - bare < 1.0


def test_help_imports_nothing_heavy() -> None:
    code = (
        "import sys; from fedloom.cli import main; main(['--help']); "
        "print(sorted({'torch', 'numpy', 'flwr', 'onnxruntime', 'rich'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert done.stdout.strip().splitlines()[-1] == "[]"


def _run(*arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "fedloom", *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=120)


def _seconds(*arguments: str) -> float:
    began = time.perf_counter()
    subprocess.run([sys.executable, *arguments], capture_output=True, check=True, timeout=60)
    return time.perf_counter() - began
