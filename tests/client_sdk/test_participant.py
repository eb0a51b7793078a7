# SPDX-License-Identifier: Apache-2.0
"""A device's answers, with a real bundle from the real gateway and data of its own."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from aggregation.codecs import codec_named
from client_sdk import participant as module
from client_sdk.conditions import Conditions
from client_sdk.errors import DataError, NotNowError, PlanError, SettingsError
from client_sdk.home import Home
from client_sdk.participant import Participant
from edge_runtime.trainer import EVALUATION_ROWS
from protocol.plan import Plan, pack_plan
from protocol.readiness import Readiness, Survey, pack_survey, unpack_readiness
from protocol.update import unpack_update

RAW = np.random.default_rng(0)


@pytest.fixture
def source(tmp_path: Path) -> Path:
    path = tmp_path / "own.npz"
    images = RAW.integers(0, 256, (30, 8, 8), dtype=np.uint8)
    np.savez(path, images=images, labels=RAW.integers(0, 10, 30))
    return path


@pytest.fixture
def device(served: Any, tmp_path: Path, source: Path) -> Any:
    made = served.enrolled(tmp_path / "device")
    made.configure(data=source, held_out=0.2)
    return made


@pytest.fixture
def job(served: Any, make_bundle: Any) -> str:
    return str(served.offer(make_bundle("lora")))


def participant(device: Any) -> Participant:
    return Participant(Home(device.home.folder))


def asked(device: Any, job: str, **survey: Any) -> Readiness:
    return unpack_readiness(participant(device).survey(pack_survey(Survey(job=job, **survey))))


def plan_of(made: Any, name: str, **fields: Any) -> bytes:
    given: dict[str, Any] = {
        "job": made.bundle.manifest.job, "round": 1, "nonce": "cd" * 16, "client": name,
        "downlink_codec": "float32", "uplink_codec": "float32", "task": "fit",
        "learning_rate": 0.05, "local_epochs": 1, "seed": 9, "max_update_bytes": 1_000_000,
    }  # fmt: skip
    plan = Plan(**(given | fields))
    return pack_plan(plan, codec_named("float32").encode(made.bundle.initial()))


def test_device_that_fits_says_what_it_has(device: Any, job: str) -> None:
    found = asked(device, job)
    assert (found.ready, found.reason, found.samples, found.held_out) == (True, "", 24, 6)
    assert found.free_memory_mb and found.clock
    last = device.home.last()["survey"]
    assert last["job"] == job and last["refused"] == "" and last["seconds"] >= 0


def test_empty_hello_is_answered_with_nothing(device: Any) -> None:
    assert participant(device).survey(b"") == b""
    assert device.home.last() == {}


def test_plan_is_trained_on_the_devices_own_data_and_kept(
    device: Any, job: str, make_bundle: Any
) -> None:
    made = make_bundle("lora")
    name = device.membership.device
    plan = plan_of(made, name)
    update = participant(device).answer(plan)  # it fetches the bundle where no survey came
    header, payload = unpack_update(update, max_bytes=1_000_000)
    assert (header.client, header.samples, header.job) == (name, 24, job)
    delta = codec_named("float32").decode(
        payload, made.bundle.manifest.trainable, 1_000_000, seeds=None
    )
    assert any(np.abs(value).max() > 0 for value in delta.values())
    assert participant(device).answer(plan) == update
    (waiting,) = device.status()["outbox"]
    assert (waiting["job"], waiting["round"]) == (job, 1)
    told = device.home.last()["work"]
    assert (told["round"], told["task"], told["refused"]) == (1, "fit", "")


def test_held_out_samples_are_tested_on(device: Any, job: str, make_bundle: Any) -> None:
    plan = plan_of(make_bundle("lora"), device.membership.device, task="evaluate", local_epochs=0)
    header, _ = unpack_update(participant(device).answer(plan), max_bytes=1_000_000)
    assert header.samples == 6 and 0 <= header.metrics["accuracy"] <= 1


def test_conditions_that_do_not_hold_are_told_and_nothing_is_fetched(
    device: Any, job: str, make_bundle: Any
) -> None:
    device.configure(conditions=Conditions(command="sh -c 'echo the ward is busy; exit 1'"))
    found = asked(device, job)
    assert not found.ready and "the ward is busy" in found.reason and found.free_memory_mb
    with pytest.raises(NotNowError, match="the ward is busy"):
        participant(device).answer(plan_of(make_bundle("lora"), device.membership.device))
    assert device.status()["bundles"] == []
    assert "the ward is busy" in device.home.last()["work"]["refused"]


def test_data_that_do_not_fit_are_told_here_and_not_there(
    device: Any, job: str, make_bundle: Any, tmp_path: Path
) -> None:
    path = tmp_path / "secret.npz"
    np.savez(path, images=np.zeros((4, 8, 8), np.uint8), labels=np.array(["rare disease"] * 4))
    device.configure(data=path)
    found = asked(device, job)
    assert not found.ready and "fedloom device status" in found.reason
    with pytest.raises(DataError) as raised:
        participant(device).answer(plan_of(make_bundle("lora"), device.membership.device))
    for said in (found.reason, str(raised.value)):
        assert "rare disease" not in said and "secret" not in said
    assert "rare disease" in device.home.last()["survey"]["refused"]
    status = device.status()["data"]
    assert status["checked_for"] == job and "rare disease" in " ".join(status["faults"])


def test_whatever_is_wrong_is_a_reason(device: Any, job: str, served: Any, source: Path) -> None:
    assert "404: no bundle abab" in asked(device, "ab" * 32).reason
    reply = unpack_readiness(participant(device).survey(b"nonsense"))
    assert not reply.ready and "message" in reply.reason
    source.unlink()
    assert "data cannot be read" in asked(device, job).reason
    served.deployment.enrolment.revoke(device.membership.device)
    assert "revoked" in asked(device, "cd" * 32).reason


def test_what_nobody_foresaw_is_a_reason_without_its_words(
    device: Any, job: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(*given: Any, **options: Any) -> Any:
        raise ValueError("rare disease")

    monkeypatch.setattr(module, "prepare", broken)
    found = asked(device, job)
    assert not found.ready and found.reason.startswith("ValueError; its own status")
    assert "rare disease" in device.home.last()["survey"]["refused"]


def test_plan_that_is_none_or_anothers_is_refused(device: Any, job: str, make_bundle: Any) -> None:
    with pytest.raises(PlanError, match="plan:"):
        participant(device).answer(b"nonsense")
    with pytest.raises(PlanError, match="expected one for client bed-"):
        participant(device).answer(plan_of(make_bundle("lora"), "somebody"))


def test_device_without_data_says_so(served: Any, tmp_path: Path) -> None:
    device = served.enrolled(tmp_path / "device")
    with pytest.raises(SettingsError, match="fedloom device run --data"):
        participant(device)


def test_split_job_is_trained_through_the_coordinators_body(
    served: Any, device: Any, make_split: Any
) -> None:
    made = make_split()
    job = served.offer(made)
    assert "names no port" in asked(device, job).reason
    plan = plan_of(made, device.membership.device)
    with pytest.raises(PlanError, match="no survey has told"):
        participant(device).answer(plan)
    with split_server(served, made) as port:
        assert asked(device, job, split_port=port).ready
        header, _ = unpack_update(participant(device).answer(plan), max_bytes=1_000_000)
    assert header.samples == 24 and header.metrics["loss"] > 0


@contextmanager
def split_server(served: Any, made: Any) -> Iterator[int]:
    """A split server that lets in whom the deployment's authority certified."""
    import grpc

    from coordinator.onnx_body import OnnxBody
    from coordinator.split_server import Limits, SplitServer

    authority = served.deployment.authority
    issued = authority.server(("127.0.0.1",))
    credentials = grpc.ssl_server_credentials(
        [(issued.key, issued.certificate)],
        root_certificates=authority.pem.encode(),
        require_client_auth=True,
    )
    up, found, down = threading.Event(), [], threading.Event()

    async def main() -> None:
        spec = made.bundle.manifest.split
        engine = OnnxBody(made.split.server)
        limits = Limits(rows=EVALUATION_ROWS)
        async with SplitServer(
            engine, spec, lambda opened: "", limits, credentials=credentials
        ) as server:
            found.append(server.port)
            up.set()
            await asyncio.to_thread(down.wait)

    thread = threading.Thread(target=lambda: asyncio.run(main()))
    thread.start()
    try:
        assert up.wait(30)
        yield found[0]
    finally:
        down.set()
        thread.join(20)
