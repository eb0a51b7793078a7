# SPDX-License-Identifier: Apache-2.0
"""Whole runs of a split network, its server in memory and on loopback."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from client_sdk.errors import SplitError
from client_sdk.split_stream import SplitStream
from coordinator.errors import JobError
from coordinator.sections import SimulationSection, SplitSection
from edge_runtime import open_bundle, preprocess
from edge_runtime.split_trainer import SplitTrainer, chosen
from protocol.manifest import Manifest
from protocol.rejection import RejectionCode
from simulations.benchmarks.runs import run_job
from simulations.grid import Serve
from simulations.progress import SilentProgress
from simulations.run import simulate
from simulations.setup import client_flops, set_up

SETTINGS = {"cut": "1+0", "length": 2}


def split_job(tiny_job: Callable[..., Any], **sections: Any) -> Any:
    given = {
        "split": SplitSection(keep=1.0, local_epochs=0),
        "simulation": SimulationSection(backend="sequential"),
        **sections,
    }
    return tiny_job("sfprompt", settings=SETTINGS, **given)


def test_memory_loopback_and_both_engines_give_the_same_round(
    tiny_job: Callable[..., Any], tmp_path: Path, cache_of_the_session: Path
) -> None:
    job = split_job(tiny_job, split=SplitSection(keep=1.0, local_epochs=0, lanes=2))
    job = replace(job, rounds=replace(job.rounds, count=2))
    ways = {
        "memory": SimulationSection(backend="sequential"),
        "loopback": SimulationSection(backend="sequential", stream="loopback"),
        "torch": SimulationSection(backend="sequential", engine="torch", stream="loopback"),
    }
    found = {}
    for name, simulation in ways.items():
        setup = set_up(replace(job, simulation=simulation), SilentProgress())
        found[name] = run_job(setup, tmp_path / name)
    memory = found["memory"]
    for name, other in found.items():
        for tensor, value in memory.tensors.items():
            np.testing.assert_allclose(other.tensors[tensor], value, rtol=0, atol=1e-5)
        assert [r.stream_up_bytes for r in other.reports] == [
            r.stream_up_bytes for r in memory.reports
        ], f"{name}: the same bytes, whatever carries them"
    for report in memory.reports:
        assert 0 < report.stream_up_bytes < report.uplink_bytes
        assert 0 < report.stream_down_bytes < report.downlink_bytes
        assert not report.rejections


def test_neither_images_nor_labels_travel(
    tiny_job: Callable[..., Any],
    tmp_path: Path,
    cache_of_the_session: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    heard: list[bytes] = []
    exchange = SplitStream.__call__

    def listening(self: SplitStream, blob: bytes) -> bytes:
        answer = exchange(self, blob)
        heard.extend((blob, answer))
        return answer

    def between(serve: Serve, manifest: Manifest) -> Serve:
        def listened(work: list[tuple[str, str, bytes]]) -> Any:
            heard.extend(plan for _, _, plan in work)
            for name, answer in serve(work):
                assert isinstance(answer, bytes), answer
                heard.append(answer)
                yield name, answer

        return listened

    monkeypatch.setattr(SplitStream, "__call__", listening)
    simulation = SimulationSection(backend="sequential", stream="loopback")
    job = split_job(tiny_job, simulation=simulation)
    job = replace(job, data=replace(job.data, partition="iid"))
    setup = set_up(replace(job, rounds=replace(job.rounds, count=1)), SilentProgress())
    run_job(setup, tmp_path / "run", wrap=between)
    traffic = b"".join(heard)
    manifest = open_bundle(tmp_path / "run" / "bundle", public_key=None).manifest
    secrets = 0
    for client in setup.federation.clients:
        for part in (client.fit, client.held_out):
            for secret in written_out(part, manifest):
                assert secret not in traffic
                assert secret in traffic + secret, "and it would have been found"
                secrets += 1
    assert secrets > 100 and len(heard) > 4 * len(setup.federation.clients)


def written_out(part: dict[str, np.ndarray], manifest: Manifest) -> list[bytes]:
    """The bytes of every image, raw and as the network takes it, in whole and by rows that are not
    of one colour; and of all labels, in every width in which they are not found by chance."""
    ready = preprocess(manifest.preprocessing, part)
    found = []
    for images in (part["images"], ready["pixel_values"]):
        for image in images:
            found.append(image.tobytes())
            found += [row.tobytes() for row in image.reshape(-1, 8) if len(set(row.tolist())) > 5]
    labels = part["labels"]
    found += [labels.astype(kind).tobytes() for kind in ("u1", "i2", "i4", "i8", "f2", "f4", "f8")]
    return [secret for secret in found if len(secret) >= 8]


def test_a_run_leaves_its_summary_adapter_and_report(
    tiny_job: Callable[..., Any], tmp_path: Path, cache_of_the_session: Path
) -> None:
    job = split_job(tiny_job, split=SplitSection(keep=0.5, local_epochs=1, form="int8"))
    job = replace(job, rounds=replace(job.rounds, count=1))
    summary = simulate(job, tmp_path / "run")
    assert summary["stream_up_bytes"] > 0
    assert summary["uplink_bytes"] > summary["stream_up_bytes"]
    assert summary["accuracy"] is not None
    held = [row["accuracy"] for row in summary["per_client"]]
    assert all(value is not None for value in held), "clients test through the body, too"
    for name in ("report.html", "adapter/adapter_model.safetensors", "bundle/head.onnx"):
        assert (tmp_path / "run" / name).is_file()
    assert not (tmp_path / "run" / "bundle" / "predict.onnx").exists()


def test_a_client_whose_session_is_refused_does_not_end_the_round(
    tiny_job: Callable[..., Any],
    tmp_path: Path,
    cache_of_the_session: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    fit = SplitTrainer.fit
    calls: list[int] = []

    def broken(self: SplitTrainer, *arguments: Any, **options: Any) -> Any:
        calls.append(1)
        if len(calls) == 2:
            raise SplitError("the server could not be reached")
        return fit(self, *arguments, **options)

    monkeypatch.setattr(SplitTrainer, "fit", broken)
    job = split_job(tiny_job)
    job = replace(job, rounds=replace(job.rounds, count=1))
    (report,) = run_job(set_up(job, SilentProgress()), tmp_path / "run").reports
    assert report.updates == report.clients - 1
    (rejection,) = report.rejections
    assert rejection.code is RejectionCode.CLIENT_FAILED
    assert "could not be reached" in rejection.reason


@pytest.mark.parametrize("backend", ["cohort", "ray"])
def test_split_clients_are_run_one_by_one(tiny_job: Callable[..., Any], backend: str) -> None:
    job = split_job(tiny_job)
    with pytest.raises(JobError, match='expected "sequential"'):
        replace(job, simulation=SimulationSection(backend=backend))


def test_control_variates_do_not_go_with_a_split_network(tiny_job: Callable[..., Any]) -> None:
    job = split_job(tiny_job)
    with pytest.raises(JobError, match="a step of a split network is not corrected"):
        replace(job, training=replace(job.training, momentum=0.0, scaffold=True))


def test_compute_is_that_of_the_devices_in_all_phases(
    tiny_job: Callable[..., Any], cache_of_the_session: Path
) -> None:
    section = SplitSection(keep=0.5, drop=0.1, scoring_epochs=2, local_epochs=3)
    job = split_job(tiny_job, split=section)
    setup = set_up(job, SilentProgress())
    assert setup.split is not None
    flops, batch = setup.split.flops, job.training.batch_size
    held = [len(client.fit["labels"]) for client in setup.federation.clients]
    kept = [len(chosen(np.zeros(count), 0.5, 0.1)) for count in held]
    expected = sum(
        count * (2 * flops.local + flops.scores) + few * (3 * flops.local + flops.through)
        for count, few in zip(held, kept, strict=True)
    )
    assert client_flops(setup, sum(held)) == pytest.approx(expected / batch, abs=1)
    assert 0 < flops.scores < flops.local < flops.through
