# SPDX-License-Identifier: Apache-2.0
"""Jobs on a deployment of three devices without torch: from `init` to a prediction, and the very
tensors that a simulation of the same clients gives, though the coordinator is killed meanwhile."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]
DEVICES, SAMPLES, ROUNDS = 3, 40, 2
TOLERANCE = 1e-4


def jobs(tiny_job: Callable[..., Any]) -> dict[str, Any]:
    from coordinator.sections import SimulationSection, SplitSection

    pool = {"elements": 4, "selected": 2}
    cut = {"cut": "1+0", "length": 2}
    made = {
        "lora": tiny_job("lora"),
        "fedins": tiny_job("fedins", settings=pool),
        "sfprompt": tiny_job(
            "sfprompt",
            settings=cut,
            split=SplitSection(keep=0.5, local_epochs=1, lanes=2),
            simulation=SimulationSection(backend="sequential"),
        ),
    }
    return {
        name: replace(
            job, rounds=replace(job.rounds, count=ROUNDS, min_clients=DEVICES, deadline_s=60.0)
        )
        for name, job in made.items()
    }


def is_training(folder: Any) -> bool:
    return bool(folder.state().doing == "training")


def leaves_nothing_behind(ward: Any, number: int, running: subprocess.Popen[bytes]) -> None:
    """SIGTERM ends a device with all that it started; `leave` removes what it made."""
    home = ward.home(number)
    status = json.loads(ward.said("device", "status", "--dir", home, "--json"))
    assert status["running"] == running.pid
    assert "stop it first" in ward.said("device", "leave", "--dir", home, code=2)
    started = processes_of(home)
    assert len(started) >= 3, "it, its SuperNode, and what starts clients"
    running.send_signal(signal.SIGTERM)
    assert running.wait(30) == 0
    assert not processes_of(home)
    ward.said("device", "leave", "--dir", home)
    assert not home.exists()


def processes_of(home: Path) -> list[int]:
    """Whoever has the folder in its command or environment."""
    found = []
    for entry in Path("/proc").iterdir():
        if entry.name.isdecimal() and int(entry.name) != os.getpid():
            with contextlib.suppress(OSError):
                words = (entry / "cmdline").read_bytes() + (entry / "environ").read_bytes()
                if str(home).encode() in words:
                    found.append(int(entry.name))
    return found


def test_three_jobs_over_three_devices(
    ward: Any,
    digits: Callable[..., Path],
    tiny_job: Callable[..., Any],
    simulated: Callable[..., Mapping[str, np.ndarray]],
    soon: Callable[..., bool],
    record_property: Callable[[str, object], None],
) -> None:
    from safetensors.numpy import load_file

    from coordinator.jobs.folder import JobFolder

    ward.init()
    with ExitStack() as stack:
        coordinator = ExitStack()
        stack.callback(lambda: coordinator.close())
        process = coordinator.enter_context(ward.up())
        told = ward.token(quota=DEVICES)
        devices = {}
        for number in range(DEVICES):
            data = digits(number, SAMPLES)
            devices[ward.enroll(number, told)] = data
            running = stack.enter_context(ward.running(number, data))
        known = jobs(tiny_job)
        for name, job in known.items():
            ward.submit(job, name)
            if name == "lora":
                folder = JobFolder(ward.folder / "jobs" / name)
                assert soon(partial(is_training, folder), 120), ward.logs()
                # The longer list of kills is in test_kills.py.
                process.kill()
                process.wait()
                coordinator.close()
                coordinator.enter_context(ward.up())
        for name, job in known.items():
            folder = ward.finish(name)
            found = load_file(folder / "adapter" / "adapter_model.safetensors")
            found = {key.removeprefix("base_model.model."): v for key, v in found.items()}
            expected = simulated(job, folder, devices)
            worst = max(float(np.abs(found[key] - v).max()) for key, v in expected.items())
            record_property(f"deployment_parity_{name}", worst)
            assert worst <= TOLERANCE, name
            start = load_file(folder / "bundle" / "initial.safetensors")
            moved = max(float(np.abs(start[key] - v).max()) for key, v in expected.items())
            assert moved > 100 * TOLERANCE, f"{name}: training moved nothing"
            summary = json.loads((folder / "summary.json").read_text())
            assert (summary["rounds"], summary["clients"]) == (ROUNDS, DEVICES)
            assert summary["rejections"] == 0, summary["notes"]
            assert summary["client_flops"] > 0
            assert (summary["stream_up_bytes"] > 0) == (name == "sfprompt")
            assert 0 <= summary["accuracy"] <= 1
            assert "<svg" in (folder / "report.html").read_text()

        job = ward.job("lora")["hash"]
        words = ["device", "fetch", "--job", job, "--dir", ward.home(0)]
        predicting = ward.said(*words, device=True).strip()
        assert Path(predicting).is_relative_to(ward.home(0))
        words[3] = ward.job("sfprompt")["hash"]
        assert "if it is finished" in ward.said(*words, device=True, code=2)
        status = json.loads(ward.said("device", "status", "--dir", ward.home(0), "--json"))
        words = ["device", "predict", predicting, digits(0, SAMPLES), "--json"]
        answer = json.loads(ward.said(*words, "--signer", status["signer"], device=True))
        assert len(answer["predictions"]) == SAMPLES
        assert status["last_work"]["refused"] == "" and status["outbox"]
        leaves_nothing_behind(ward, DEVICES - 1, running)
        rounds = {
            each["name"]: each["rounds"]
            for each in json.loads(ward.said("coordinator", "devices", ward.folder, "--json"))
        }
        assert rounds == dict.fromkeys(devices, ROUNDS * len(known))
    events = json.loads(ward.said("coordinator", "audit", ward.folder, "--json"))
    assert events["broken"] is None
    assert [entry["event"] for entry in events["entries"]].count("finished") == len(known)
