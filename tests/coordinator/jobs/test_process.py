# SPDX-License-Identifier: Apache-2.0
"""Flower's own runner of server apps, handed an app bundle that must not run."""

from __future__ import annotations

import importlib
import os
import stat
from hashlib import sha256
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from coordinator.errors import DeploymentError
from coordinator.jobs.process import pin, play_named
from coordinator.jobs.program import COMMAND, write_program

RUNNER = "flwr.superlink.runtime.run_serverapp"


@pytest.mark.filterwarnings("ignore:GitWildMatchPattern:DeprecationWarning")  # Flower's own use
def test_what_was_submitted_is_not_loaded(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """The real runner, with SuperLink's side of the conversation played here."""
    from flwr.app import Context, RecordDict
    from flwr.cli.build import build_fab_from_disk
    from flwr.supercore.fab import Fab
    from flwr.supercore.run import Run

    runner = importlib.import_module(RUNNER)
    monkeypatch.setenv("FLWR_HOME", str(tmp_path / "flwr"))
    monkeypatch.setattr(runner, "run_", runner.run_)
    app = tmp_path / "app"
    app.mkdir()
    (app / "evil.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')\napp = 1\n")
    (app / "pyproject.toml").write_text(
        "[project]\nname = 'evil'\nversion = '1.0.0'\ndependencies = []\n[tool.flwr.app]\n"
        "publisher = 'eve'\n[tool.flwr.app.components]\nserverapp = 'evil:app'\n"
        "clientapp = 'evil:app'\n[tool.flwr.app.config]\njob = 'lora'\n"
    )
    content = build_fab_from_disk(app)
    run = Run.create_empty(1)
    run.fab_id, run.fab_version = "eve/evil", "1.0.0"
    context = Context(run_id=1, node_id=1, node_config={}, state=RecordDict(), run_config={})
    played: list[tuple[Any, Any]] = []
    ended: list[Any] = []
    grid = _Grid()
    monkeypatch.setattr(runner, "HttpGrid", lambda **_: grid)
    monkeypatch.setattr(runner, "context_from_proto", lambda _: context)
    monkeypatch.setattr(runner, "run_from_proto", lambda _: run)
    monkeypatch.setattr(
        runner, "fab_from_proto", lambda _: Fab(sha256(content).hexdigest(), content, {})
    )
    monkeypatch.setattr(runner, "register_signal_handlers", lambda **_: None)
    monkeypatch.setattr(runner, "flwr_exit", lambda **given: ended.append(given["code"]))
    monkeypatch.setattr(runner, "HeartbeatSender", lambda beat: _Quiet())
    monkeypatch.setattr(runner, "make_task_heartbeat_fn_http", lambda client: None)
    monkeypatch.setattr(runner, "start_log_uploader", lambda **_: None)
    monkeypatch.setattr(runner, "event", lambda *_, **__: None)

    pin(runner, lambda grid, context: played.append((grid, context.run_config["job"])))
    runner.run_serverapp("127.0.0.1:1", None, "token", insecure=True)
    assert played == [(grid, "lora")] and ended == [0]
    assert not (tmp_path / "ran").exists()


def test_another_version_of_flower_runs_nothing() -> None:
    with pytest.raises(RuntimeError, match="install flwr>=1"):
        pin(ModuleType("runner"), lambda grid, context: None)


def test_superlink_finds_our_program_before_flowers(tmp_path: Path) -> None:
    write_program(tmp_path / "bin")
    write_program(tmp_path / "bin")
    command = tmp_path / "bin" / COMMAND
    assert command.stat().st_mode & stat.S_IXUSR
    assert "-m coordinator.jobs.process" in command.read_text()


def test_a_run_of_no_job_of_ours_is_refused(tmp_path: Path) -> None:
    from flwr.app import Context, RecordDict

    from coordinator.deployment import Deployment, Settings

    Deployment.create(tmp_path / "d", Settings(name="ward", addresses=("localhost",))).close()
    config: dict[str, Any] = {"job": f"..{os.sep}..{os.sep}etc"}
    context = Context(run_id=1, node_id=1, node_config={}, state=RecordDict(), run_config=config)
    with pytest.raises(DeploymentError, match="expected one of no job yet"):
        play_named(tmp_path / "d", _Grid(), context)  # type: ignore[arg-type]


class _Grid:
    """What the runner asks of Flower's grid, but for messages."""

    def __init__(self) -> None:
        self._runtime_client = self

    def PullTaskInput(self, _: Any) -> Any:  # noqa: N802
        from types import SimpleNamespace

        node = SimpleNamespace(node_id=1)
        return SimpleNamespace(task_id=1, run=SimpleNamespace(run_id=1), context=node, fab=None)

    def set_run(self, run: Any) -> None:
        assert run.fab_id == "eve/evil"


class _Quiet:
    is_running = False

    def start(self) -> None:
        pass
