# SPDX-License-Identifier: Apache-2.0
"""Flower's own engine: the same job, the same apps, the same bits as clients in turn."""

from __future__ import annotations

import os
import sys
from collections.abc import Collection, Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytest.importorskip("flwr")
pytest.importorskip("ray", reason="needs fedloom[ray]")

import ray

from client_sdk.updates import respond
from coordinator.flower_link import FlowerLink
from coordinator.job import Job
from coordinator.journal import Journal
from coordinator.link import Link
from coordinator.reports import RoundReport
from coordinator.rounds import run_rounds
from coordinator.sections import DataSection, RoundsSection
from protocol.manifest import Manifest, Preprocessing, TrainingSpec
from protocol.rejection import RejectionCode
from protocol.tensors import NOTHING, ParamSpec, Tensors
from simulations.backends.ray import Engine, client_app, run_on_ray, write_client
from simulations.grid import InProcessGrid
from simulations.server_app import make_server_app

# The test's own module cannot be imported by a worker; what an application brings can.
ray.cloudpickle.register_pickle_by_value(sys.modules[__name__])
pytestmark = [
    pytest.mark.ray,
    pytest.mark.slow,
    pytest.mark.filterwarnings("default::DeprecationWarning"),
    pytest.mark.filterwarnings("default::FutureWarning"),
    pytest.mark.filterwarnings("ignore::ResourceWarning"),
]

JOB = Job(data=DataSection(clients=4), rounds=RoundsSection(count=2))
INITIAL = {"w": np.linspace(0, 1, 50, dtype=np.float32)}


class DriftTrainer:
    """Moves towards the client's mean, with noise by the plan's seed; client c2 always fails."""

    def fit(
        self,
        tensors: Tensors,
        data: Tensors,
        *,
        learning_rate: float,
        epochs: int,
        seed: int,
        most_steps: int = 0,
        frozen: Collection[str] = (),
        correction: Tensors = NOTHING,
        offset: Tensors = NOTHING,
    ) -> tuple[Tensors, Mapping[str, float]]:
        goal = np.float32(data["x"].mean())
        if goal == 2:
            raise ValueError("no room for training")
        noise = np.random.default_rng(seed).standard_normal(50, np.float32)
        step = np.float32(learning_rate)
        return {"w": tensors["w"] + step * (goal - tensors["w"] + noise)}, {"loss": float(goal)}

    def evaluate(
        self, tensors: Tensors, data: Tensors, *, offset: Tensors = NOTHING
    ) -> Mapping[str, float]:
        return {"accuracy": float(data["x"].mean()) / 4}


def fake_engine(bundle_folder: str) -> Engine:
    manifest = Manifest(
        job=Path(bundle_folder, "job").read_text(),
        backbone="none",
        method="none",
        task="classification",
        class_names=("a", "b"),
        trainable=ParamSpec.of(INITIAL),
        state=ParamSpec(()),
        inputs=(),
        preprocessing=Preprocessing(kind="array"),
        training=TrainingSpec(batch_size=8, optimizer="sgd", learning_rate=0.1),
        graphs={},
    )
    return Engine(manifest, INITIAL, DriftTrainer())


def data_of(number: int, samples: int) -> dict[str, np.ndarray]:
    x = np.full((samples, 2), number, np.float32)
    return {"x": x, "labels": np.zeros(samples, np.int64)}


@pytest.fixture
def bundle(tmp_path: Path) -> Path:
    folder = tmp_path / "bundle"
    folder.mkdir()
    (folder / "job").write_text(JOB.hash())
    return folder


def play(link: Link, path: Path) -> tuple[Tensors, list[RoundReport]]:
    reports: list[RoundReport] = []
    with Journal(path) as journal:
        result = run_rounds(
            JOB,
            ParamSpec.of(INITIAL),
            INITIAL,
            link,
            journal,
            reports.append,
            lambda tensors, offset: {"accuracy": 0.0},
        )
    return result.tensors, reports


def in_process(bundle: Path, path: Path) -> tuple[Tensors, list[RoundReport]]:
    engine = fake_engine(str(bundle))

    def serve(asked: Any) -> Iterator[tuple[str, bytes | Exception]]:
        for client, _, blob in asked:
            number = int(client[1:])
            try:
                yield (
                    client,
                    respond(
                        blob,
                        bundle_manifest=engine.manifest,
                        initial=engine.initial,
                        trainer=engine.trainer,
                        data_fit=data_of(number, 5 + number),
                        data_held_out=data_of(number, number),
                        client=client,
                    ),
                )
            except Exception as error:
                yield client, error

    return play(FlowerLink(InProcessGrid(("c0", "c1", "c2", "c3"), serve), clients=4), path)


def test_ray_gives_the_same_bits_as_clients_in_turn(
    tmp_path: Path, bundle: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FLWR_HOME", str(tmp_path / "flwr"))
    environment = dict(os.environ)
    for number in range(4):
        fit, held_out = data_of(number, 5 + number), data_of(number, number)
        write_client(tmp_path, number, f"c{number}", fit, held_out)
    results: list[tuple[Tensors, list[RoundReport]]] = []

    def server(link: FlowerLink) -> None:
        results.append(play(link, tmp_path / "ray.sqlite"))

    app = client_app(tmp_path, bundle, fake_engine)
    run_on_ray(make_server_app(server, clients=4), app, clients=4)

    ((tensors, reports),) = results
    expected, expected_reports = in_process(bundle, tmp_path / "turn.sqlite")
    assert tensors["w"].tobytes() == expected["w"].tobytes()
    strip = {"seconds": 0.0, "fit_seconds": 0.0}
    assert [replace(r, **strip) for r in reports] == [replace(r, **strip) for r in expected_reports]
    assert [(r.client, r.code) for r in reports[0].rejections] == [
        ("c2", RejectionCode.CLIENT_FAILED)
    ]
    assert reports[-1].per_client_accuracy == {"c1": 0.25, "c2": 0.5, "c3": 0.75}
    assert dict(os.environ) == environment
    assert not (tmp_path / "flwr").exists(), "telemetry or an update check has written its files"
    assert not ray.is_initialized()


def test_error_of_the_server_app_ends_the_run(tmp_path: Path, bundle: Path) -> None:
    def server(link: FlowerLink) -> None:
        raise ArithmeticError("the operator's own fault")

    write_client(tmp_path, 0, "c0", data_of(0, 5), {})
    app = client_app(tmp_path, bundle, fake_engine)
    with pytest.raises(ArithmeticError, match="the operator's own fault"):
        run_on_ray(make_server_app(server, clients=1), app, clients=1)
