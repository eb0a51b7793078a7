# SPDX-License-Identifier: Apache-2.0
"""The process of one message: whose device it is, and what it never loads."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from aggregation.codecs import codec_named
from client_sdk import device_app
from client_sdk.home import FOLDER_VARIABLE, PATH_VARIABLE
from protocol.plan import Plan, pack_plan
from protocol.readiness import Survey, pack_survey, unpack_readiness
from protocol.update import unpack_update

ANSWERS = """
import sys
from pathlib import Path
for name in ("torch", "transformers", "peft", "onnx"):
    sys.modules[name] = None  # to import it raises
from client_sdk.device_app import open_device
folder = Path(sys.argv[1])
client = open_device({})
(folder / "readiness").write_bytes(client.survey((folder / "survey").read_bytes()))
(folder / "update").write_bytes(client.answer((folder / "plan").read_bytes()))
print(client.name)
"""


def test_a_message_is_answered_without_a_training_framework(
    served: Any, make_bundle: Any, tmp_path: Path
) -> None:
    made = make_bundle("lora")
    job = served.offer(made)
    images = np.random.default_rng(0).integers(0, 256, (20, 8, 8), dtype=np.uint8)
    np.savez(tmp_path / "own.npz", images=images, labels=np.arange(20) % 10)
    device = served.enrolled(tmp_path / "device")
    device.configure(data=tmp_path / "own.npz")
    plan = Plan(
        job=job, round=1, nonce="cd" * 16, client=device.membership.device, task="fit",
        downlink_codec="float32", uplink_codec="float32", learning_rate=0.05, local_epochs=1,
        seed=9, max_update_bytes=1_000_000,
    )  # fmt: skip
    payload = codec_named("float32").encode(made.bundle.initial())
    (tmp_path / "plan").write_bytes(pack_plan(plan, payload))
    (tmp_path / "survey").write_bytes(pack_survey(Survey(job=job)))
    done = subprocess.run(
        [sys.executable, "-c", ANSWERS, tmp_path],
        env=os.environ | {FOLDER_VARIABLE: str(tmp_path / "device")},
        capture_output=True, text=True, check=False, timeout=120,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == device.membership.device
    assert unpack_readiness((tmp_path / "readiness").read_bytes()).samples == 18
    header, _ = unpack_update((tmp_path / "update").read_bytes(), max_bytes=1_000_000)
    assert header.samples == 18


def test_the_owners_own_code_finds_the_owners_programs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "/only/our/commands")
    monkeypatch.setenv(PATH_VARIABLE, "/usr/bin:/bin")
    ran: list[Any] = []
    monkeypatch.setattr(device_app, "run_pinned", ran.append)
    device_app.main()
    assert os.environ["PATH"] == "/usr/bin:/bin" and PATH_VARIABLE not in os.environ
    assert len(ran) == 1
