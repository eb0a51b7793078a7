# SPDX-License-Identifier: Apache-2.0
"""Flower's own runner of client processes, handed an app bundle that must not run."""

from __future__ import annotations

import os
import subprocess
import zipfile
from io import BytesIO
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from client_sdk.client_app import Client, make_client_app
from client_sdk.pinned_app import COMMAND, STARTER, command_folder, pin


def test_the_bundle_is_neither_unpacked_nor_loaded(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """The real runner, with the SuperNode's side of the conversation played here."""
    from flwr.app import Context, RecordDict
    from flwr.supercore.fab import Fab
    from flwr.supercore.run import Run
    from flwr.supercore.task_identity import TaskIdentity
    from flwr.supernode.runtime import run_clientapp as runner

    from coordinator.flower_messages import wrapped

    monkeypatch.setenv("FLWR_HOME", str(tmp_path / "flwr"))
    for name in ("install_from_fab", "get_load_client_app_fn"):
        monkeypatch.setattr(runner, name, getattr(runner, name))
    content = BytesIO()
    with zipfile.ZipFile(content, "w") as archive:
        archive.writestr("evil.py", f"open({str(tmp_path / 'ran')!r}, 'w')")
        archive.writestr("pyproject.toml", "[project]\nname = 'evil'\nversion = '1.0.0'\n")
    fab = Fab("0" * 64, content.getvalue(), {})
    for name in ("_task_id", "_run_id", "_node_id"):
        monkeypatch.setattr(TaskIdentity, name, 1)
    asked = wrapped(1, "?", "query.hello", b"")
    context = Context(run_id=1, node_id=1, node_config={}, state=RecordDict(), run_config={})
    run = Run.create_empty(1)
    run.fab_id, run.fab_version = "evil/evil", "1.0.0"
    replies: list[Any] = []
    ended: list[Any] = []
    monkeypatch.setattr(runner, "pull_task_input", lambda client: (asked, context, run, fab))
    monkeypatch.setattr(runner, "push_message", lambda client, reply, _: replies.append(reply))
    monkeypatch.setattr(runner, "push_task_output", lambda **given: None)
    monkeypatch.setattr(runner, "register_signal_handlers", lambda **given: None)
    monkeypatch.setattr(runner, "flwr_exit", lambda **given: ended.append(given["code"]))
    monkeypatch.setattr(runner, "HeartbeatSender", lambda beat: _Quiet())
    monkeypatch.setattr(runner, "event", lambda *given: None)

    pin(runner, lambda: make_client_app(lambda config: Client(name="ada", answer=lambda b: b)))
    runner.run_clientapp("127.0.0.1:1", "token", insecure=True)
    (reply,) = replies
    assert not reply.has_error(), reply.error
    assert ended == [0]
    assert not (tmp_path / "ran").exists() and not (tmp_path / "flwr").exists()


class _Quiet:
    is_running = False

    def start(self) -> None:
        """No SuperNode is there to hear a heartbeat."""


def test_another_flower_runs_nothing() -> None:
    with pytest.raises(RuntimeError, match="expected get_load_client_app_fn in strange"):
        runner = ModuleType("strange")
        runner.install_from_fab = print  # type: ignore[attr-defined]
        pin(runner, lambda: None)  # type: ignore[arg-type, return-value]


def test_the_folder_has_the_module_as_the_client_and_nothing_of_the_folder_it_runs_in(
    tmp_path: Path,
) -> None:
    package = tmp_path / "module"
    package.mkdir()
    (package / "said.py").write_text("import sys; print(sys.argv[1:])")
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    (elsewhere / "said.py").write_text("print('shipped')")
    folder = command_folder(tmp_path / "a folder", "said")
    assert sorted(os.listdir(folder)) == [STARTER, COMMAND]
    found = subprocess.run(
        [COMMAND, "--token", "a b"],
        env={"PATH": str(folder), "PYTHONPATH": str(package)},
        cwd=elsewhere,
        capture_output=True,
        text=True,
        check=True,
    )
    assert found.stdout.strip() == "['--token', 'a b']"


def test_the_folder_has_flowers_own_starter_of_clients(tmp_path: Path) -> None:
    folder = command_folder(tmp_path / "commands", "said")
    found = subprocess.run(
        [STARTER, "--help"],
        env={"PATH": str(folder), "FLWR_HOME": str(tmp_path), "FLWR_DISABLE_UPDATE_CHECK": "1"},
        capture_output=True,
        text=True,
        check=True,
    )
    assert "--runtime-api-address" in found.stdout and "--parent-pid" in found.stdout
