# SPDX-License-Identifier: Apache-2.0
"""Flower's simulation as its users run it: torch clients in Ray workers."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Final

from coordinator.bundles import recipe_of
from coordinator.flower_link import FlowerLink
from coordinator.job import dump_job, load_job
from coordinator.journal import Journal
from coordinator.reports import RoundReport
from coordinator.rounds import Result, run_rounds
from edge_runtime import batch_plan, open_bundle, preprocess
from edge_runtime.trainer import OnnxTrainer
from simulations.backends import ray
from simulations.benchmarks.runs import Outcome, signed_bundle
from simulations.server_app import make_server_app
from simulations.setup import Setup

_JOB_FILE: Final = "job.toml"


@dataclass(frozen=True, slots=True)
class TorchEngine:
    """Opens the job's module for torch in a worker. Equal ones share a worker's cache."""

    threads: int

    def __call__(self, bundle_folder: str) -> ray.Engine:
        """The manifest of the bundle, and a trainer of the job that lies beside its folder."""
        import torch

        from tuning.torch_trainer import TorchTrainer

        torch.set_num_threads(self.threads)
        bundle = open_bundle(bundle_folder, public_key=None)
        job = load_job(Path(bundle_folder).parent / _JOB_FILE)
        recipe = recipe_of(job, len(bundle.manifest.class_names))
        _, tuned = recipe.build()
        trainer = TorchTrainer(tuned, recipe.training, batch_plan=batch_plan)
        return ray.Engine(bundle.manifest, bundle.initial(), trainer)


def run_on_flower(
    setup: Setup, folder: Path, engine: ray.OpenEngine, *, cpus_per_client: int = 1
) -> Outcome:
    """All rounds of a job on Flower's engine, in a fresh `folder`.

    Raises: SimulationError without Ray.
    """
    folder.mkdir(parents=True)
    bundle = signed_bundle(setup, folder)
    (folder / _JOB_FILE).write_text(dump_job(setup.job), encoding="utf-8")
    clients = setup.federation.clients
    for number, client in enumerate(clients):
        ray.write_client(folder, number, client.id, client.fit, client.held_out)
    test = preprocess(bundle.manifest.preprocessing, setup.federation.test)
    trainer = OnnxTrainer(bundle)
    reports: list[RoundReport] = []
    results: list[Result] = []

    with Journal(folder / "journal.sqlite") as journal:

        def rounds(link: FlowerLink) -> None:
            result = run_rounds(
                setup.job,
                bundle.manifest.trainable,
                bundle.initial(),
                link,
                journal,
                reports.append,
                lambda tensors, offset: trainer.evaluate(tensors, test, offset=offset),
                pairs=bundle.manifest.pairs,
            )
            results.append(result)

        ray.run_on_ray(
            make_server_app(rounds, clients=len(clients)),
            ray.client_app(folder, bundle.folder, engine),
            clients=len(clients),
            cpus_per_client=cpus_per_client,
        )
    return Outcome(tensors=results[0].tensors, reports=tuple(reports))
