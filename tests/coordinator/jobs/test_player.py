# SPDX-License-Identifier: Apache-2.0
"""A job from its submission to its results, over clients in this process."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from client_sdk.memory import FolderMemory
from coordinator.deployment import Deployment, Settings
from coordinator.errors import DeploymentError
from coordinator.flower_link import FlowerLink
from coordinator.jobs import player
from coordinator.jobs.folder import JobFolder
from coordinator.jobs.player import play_job
from coordinator.jobs.registry import Outcome
from coordinator.jobs.submit import OwnData, read_costs, submit
from coordinator.journal import Journal
from coordinator.privacy_section import PrivacySection
from coordinator.sections import AggregationSection, DataSection, RoundsSection, UpdateSection
from edge_runtime.bundle import open_bundle
from edge_runtime.trainer import OnnxTrainer
from simulations.backends.prepared import PreparedClient
from simulations.backends.sequential import SequentialClients
from simulations.grid import InProcessGrid

CLIENTS = ("ada", "ben")
CLASSES = tuple(f"c{number}" for number in range(10))


@pytest.fixture
def deployment(tmp_path: Path, cache_of_the_session: Path) -> Iterator[Deployment]:
    settings = Settings(name="ward", addresses=("localhost",))
    with Deployment.create(tmp_path / "deployment", settings) as made:
        yield made


def own_data(samples: int = 30) -> OwnData:
    rng = np.random.default_rng(3)
    images = rng.integers(0, 256, (samples, 8, 8), dtype=np.uint8)
    test = {"images": images, "labels": rng.integers(0, 10, samples)} if samples else {}
    return OwnData(name="digits", class_names=CLASSES, test=test)


def short(job: Any, rounds: int = 2) -> Any:
    return replace(job, rounds=replace(job.rounds, count=rounds))


class Clients:
    """Opens the link to clients of this process; may do something at each round's plans."""

    def __init__(self, deployment: Deployment, made: Any, tmp_path: Path) -> None:
        self._deployment = deployment
        self._made = made
        self._memory = tmp_path / "memory"
        self.before_answering: Callable[[str], None] = lambda client: None

    def __call__(
        self, job: Any, names: Callable[[], Mapping[int, str]], tick: Callable[[], None]
    ) -> FlowerLink:
        entry = self._deployment.jobs.by_hash(job.hash())
        assert entry is not None
        bundle = open_bundle(self._deployment.jobs_folder / entry.name / "bundle", public_key=None)
        clients = [
            PreparedClient(
                id=name, fit=self._made.data(12, seed=number),
                held_out=self._made.data(4, seed=9 + number),
                memory=FolderMemory.of(self._memory, name),
            )
            for number, name in enumerate(CLIENTS)
        ]  # fmt: skip
        serve = SequentialClients(
            bundle.manifest, bundle.initial(), OnnxTrainer(bundle, threads=1), clients
        ).serve

        def disturbed(work: Any) -> Iterator[tuple[str, Any]]:
            for name, answer in serve(work):
                tick()
                self.before_answering(name)
                yield name, answer

        return FlowerLink(InProcessGrid(CLIENTS, disturbed), clients=len(CLIENTS), tick=tick)


@pytest.fixture
def clients(deployment: Deployment, make_bundle: Any, tmp_path: Path) -> Clients:
    return Clients(deployment, make_bundle("lora"), tmp_path)


def test_a_job_leaves_what_a_simulation_leaves(
    deployment: Deployment, clients: Clients, tiny_job: Any
) -> None:
    job = short(tiny_job("lora"))
    entry = submit(deployment, job, own_data(), name="wards")
    assert deployment.jobs.named("wards") == entry
    play_job(deployment, "wards", clients)
    folder = JobFolder(deployment.jobs_folder / "wards")
    assert deployment.jobs.named("wards").outcome is Outcome.FINISHED
    assert (folder.state().doing, folder.state().round) == ("finished", 2)
    summary = json.loads((folder.path / "summary.json").read_text())
    assert (summary["clients"], summary["rounds"], summary["dataset"]) == (2, 2, "digits")
    assert [each["samples"] for each in summary["per_client"]] == [12, 12]
    assert summary["client_flops"] == 2 * 2 * 12 * read_costs(folder).flops_per_sample
    assert len((folder.path / "metrics.jsonl").read_text().splitlines()) == 2
    assert "<svg" in (folder.path / "report.html").read_text()
    predicting = open_bundle(folder.path / "predict", public_key=None)
    assert set(predicting.manifest.graphs) == {"predict"}
    before = [path.read_bytes() for path in sorted(folder.bundle.iterdir())]
    play_job(deployment, "wards", clients)
    assert deployment.jobs.named("wards").starts == 1, "it is over"
    assert before == [path.read_bytes() for path in sorted(folder.bundle.iterdir())]


def test_a_stopped_job_goes_on_where_it_was_to_the_same_bits(
    deployment: Deployment, clients: Clients, tiny_job: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(player, "_LOOK_S", 0.0)
    from safetensors.numpy import load_file

    answers: list[str] = []

    def stop_at_the_third(client: str) -> None:
        answers.append(client)
        if len(answers) == 3:
            deployment.jobs.stop("stopped")

    found = {}
    for name, patience in (("calm", 0.0), ("stopped", 1_000.0)):
        job = short(tiny_job("lora"), 3)
        # Another job by its hash, of which nothing is computed otherwise.
        job = replace(job, rounds=replace(job.rounds, timeout_s=patience))
        submit(deployment, job, own_data(), name=name)
        folder = JobFolder(deployment.jobs_folder / name)
        if name == "stopped":
            clients.before_answering = stop_at_the_third
            play_job(deployment, name, clients)
            assert (folder.state().doing, folder.state().round) == ("stopped", 2)
            assert not (folder.path / "summary.json").exists()
            assert deployment.jobs.resume(name)
        play_job(deployment, name, clients)
        assert folder.state().doing == "finished"
        found[name] = load_file(folder.path / "adapter" / "adapter_model.safetensors")
    for key, value in found["calm"].items():
        np.testing.assert_array_equal(found["stopped"][key], value)


def test_what_a_private_job_has_spent_is_shown_after_a_crash_as_well(
    deployment: Deployment, clients: Clients, tiny_job: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    job = tiny_job(
        "lora",
        data=DataSection(dataset="digits", clients=2, held_out=0.0),
        update=UpdateSection(metrics=""),
        aggregation=AggregationSection(weighting="uniform"),
        rounds=RoundsSection(count=2),
        privacy=PrivacySection(mode="central", noise_multiplier=1.0, delta=1e-3, sampling="all"),
    )
    submit(deployment, job, own_data(), name="private")
    folder = JobFolder(deployment.jobs_folder / "private")

    def crash(*_: object) -> None:
        raise OSError("the machine is off")

    # A round is in the journal, and nobody has said so; then a start that does not come far.
    for cause, committed in (("_count", 1), ("open_tester", 1), ("_count", 2)):
        with monkeypatch.context() as patch, pytest.raises(OSError, match="machine is off"):
            patch.setattr(player, cause, crash)
            play_job(deployment, "private", clients)
        with Journal(folder.journal) as journal:
            reports = journal.reports(job.hash())
        assert len(reports) == committed
        said = folder.state().privacy
        assert said == reports[0]["privacy"] or cause == "_count"
    play_job(deployment, "private", clients)
    assert folder.state().doing == "finished"
    assert folder.state().privacy == reports[-1]["privacy"] != reports[0]["privacy"]


def test_what_another_start_cannot_mend_ends_the_job(
    deployment: Deployment, clients: Clients, tiny_job: Any
) -> None:
    submit(deployment, short(tiny_job("lora")), own_data(), name="broken")
    folder = JobFolder(deployment.jobs_folder / "broken")
    weights = folder.bundle / "initial.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1] + b"x")
    play_job(deployment, "broken", clients)
    entry = deployment.jobs.named("broken")
    assert entry.outcome is Outcome.FAILED and "initial.safetensors" in entry.reason
    assert folder.state().doing == "failed"


def test_what_another_start_may_mend_is_raised_and_said(
    deployment: Deployment, clients: Clients, tiny_job: Any
) -> None:
    submit(deployment, short(tiny_job("lora")), own_data(0), name="unlucky")

    def full(client: str) -> None:
        raise OSError(28, "No space left on device")

    clients.before_answering = full
    with pytest.raises(OSError, match="No space left"):
        play_job(deployment, "unlucky", clients)
    folder = JobFolder(deployment.jobs_folder / "unlucky")
    assert deployment.jobs.named("unlucky").due
    assert folder.state().doing == "waiting" and "No space left" in folder.state().why
    clients.before_answering = lambda client: None
    play_job(deployment, "unlucky", clients)
    summary = json.loads((folder.path / "summary.json").read_text())
    assert summary["accuracy"] is None, "the coordinator has no samples of its own"


def test_one_process_plays_a_job(
    deployment: Deployment, clients: Clients, tiny_job: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(player, "_PATIENCE_S", 0.1)
    submit(deployment, short(tiny_job("lora")), own_data(), name="one")
    with JobFolder(deployment.jobs_folder / "one").playing() as mine:
        assert mine
        play_job(deployment, "one", clients)
    assert deployment.jobs.named("one").starts == 0


def test_submitting_again_is_refused_and_a_crash_in_it_is_made_good(
    deployment: Deployment, tiny_job: Any
) -> None:
    job = short(tiny_job("lora"))
    left = deployment.jobs_folder / "wards"
    left.mkdir(parents=True)
    (left / "half").write_text("what a crash left")
    submit(deployment, job, own_data(), name="wards")
    assert not (left / "half").exists()
    assert [path.name for path in deployment.jobs_folder.iterdir()] == ["wards"]
    with pytest.raises(DeploymentError, match="was submitted before, as wards"):
        submit(deployment, job, own_data(), name="other")
    other = replace(job, job=replace(job.job, seed=5))
    with pytest.raises(DeploymentError, match="is there already"):
        submit(deployment, other, own_data(), name="wards")
    for name in ("../etc", ".hidden", "a b", "x" * 65):
        with pytest.raises(DeploymentError, match="expected up to 64 letters"):
            submit(deployment, other, own_data(), name=name)
