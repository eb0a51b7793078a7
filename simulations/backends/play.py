# SPDX-License-Identifier: Apache-2.0
"""Play a job's rounds on one of the three ways to run clients."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import Any

from client_sdk.memory import FolderMemory
from client_sdk.split import respond_split
from client_sdk.updates import sample_count
from coordinator.flower_link import FlowerLink
from coordinator.job import Job
from coordinator.journal import Journal
from coordinator.reports import RoundReport
from coordinator.rounds import Result, run_rounds
from coordinator.run import Credentials
from edge_runtime import PrivateBatches, batch_plan, preprocess, private_batches
from edge_runtime.bundle import Bundle
from edge_runtime.keystream import repeatable_keystream
from edge_runtime.trainer import OnnxTrainer
from edge_runtime.training_loop import TrainingLoop
from protocol.manifest import Manifest, TrainingSpec
from protocol.tensors import Tensors
from simulations.backends.cohort import CohortClients, CohortLoop
from simulations.backends.cohort_size import cohort_size
from simulations.backends.prepared import (
    MEMORY_FOLDER,
    PreparedClient,
    prepare,
    readiness_of,
)
from simulations.backends.sequential import SequentialClients
from simulations.backends.split import LocalBodies
from simulations.backends.summing import SummingClients
from simulations.grid import InProcessGrid, Serve
from simulations.server_app import make_server_app
from simulations.setup import Setup
from tuning.compiler import cohort_graph

# Plans that wait in memory at once, at most: the Grid keeps each message whole.
_MAX_WAITING_BYTES = 512 * 2**20


# What stands between the coordinator and the clients of this process, given the bundle's manifest.
Wrap = Callable[[Serve, Manifest], Serve]


def as_they_are(serve: Serve, manifest: Manifest) -> Serve:
    """The clients themselves."""
    return serve


def simulated_seed(job: Job, number: int) -> bytes:
    """The seed of a private round, so that a simulation can be repeated.

    Whoever knows the job computes it: what such a run gives is like what secret seeds would give,
    and protects nobody.
    """
    return hashlib.sha256(f"fedloom/simulated/{job.hash()}/{number}".encode()).digest()


def play(
    setup: Setup,
    bundle: Bundle,
    run_folder: Path,
    journal: Journal,
    on_round: Callable[[RoundReport], None],
    *,
    wrap: Wrap = as_they_are,
) -> Result:
    """Run all rounds of the job that the journal does not hold yet; what they come to.

    `wrap` may change what clients answer; clients on Ray are beyond its reach.
    """
    with ExitStack() as stack:
        bodies = stack.enter_context(LocalBodies(setup, bundle)) if setup.split else None
        return _play(setup, bundle, run_folder, journal, on_round, wrap, bodies)


def _play(
    setup: Setup,
    bundle: Bundle,
    run_folder: Path,
    journal: Journal,
    on_round: Callable[[RoundReport], None],
    wrap: Wrap,
    bodies: LocalBodies | None,
) -> Result:
    trainer: Any = (
        bodies.tester() if bodies else OnnxTrainer(bundle, keystream=repeatable_keystream)
    )
    federation, preprocessing = setup.federation, bundle.manifest.preprocessing
    test = preprocess(preprocessing, federation.test)
    results: list[Result] = []

    # Of tensors that clients keep, the coordinator has what the bundle holds.
    first = bundle.initial()

    def evaluate(tensors: Tensors, offset: Tensors) -> Mapping[str, float]:
        return trainer.evaluate({**first, **tensors}, test, offset=offset)

    choose_by = None
    if sample_count(federation.validation):
        validation = preprocess(preprocessing, federation.validation)

        def choose_by(tensors: Tensors) -> float:
            return trainer.evaluate({**first, **tensors}, validation)["accuracy"]

    def rounds(link: FlowerLink, credentials: Credentials = lambda clients: {}) -> None:
        spec = bundle.manifest.shared
        initial = {name: first[name] for name in spec.names}
        result = run_rounds(
            setup.job,
            spec,
            initial,
            link,
            journal,
            on_round,
            evaluate,
            pairs=bundle.manifest.pairs,
            choose_by=choose_by,
            streamed=bodies.streamed if bodies else lambda: (0, 0),
            credentials=credentials,
            seeds=partial(simulated_seed, setup.job),
        )
        results.append(result)

    if setup.job.simulation.backend == "ray":
        _play_on_ray(setup, bundle, run_folder, rounds)
    else:
        clients = [
            prepare(
                client,
                bundle.manifest.preprocessing,
                FolderMemory.of(run_folder / MEMORY_FOLDER, client.id),
            )
            for client in setup.federation.clients
        ]
        if bodies:
            answer = partial(respond_split, connect=bodies.connect)
            serve = SequentialClients(
                bundle.manifest, first, bodies.trainer(), clients, answer=answer
            ).serve
            together = 1
        else:
            serve, together = _local_clients(setup, bundle, trainer, clients)
        names = [client.id for client in clients]
        memories = {client.id: client.memory for client in clients if client.memory is not None}
        summing = SummingClients(wrap(serve, bundle.manifest), memories)
        said = {
            client.id: readiness_of(bundle.manifest, client.fit, client.held_out)
            for client in clients
        }
        grid = InProcessGrid(names, summing.serve, said)
        most = max(_MAX_WAITING_BYTES // max(bundle.manifest.trainable.nbytes, 1), 1)
        window = 0 if len(clients) <= most else max(most // together, 1) * together
        rounds(FlowerLink(grid, clients=len(clients), window=window), summing.credentials)
    return results[0]._replace(tensors={**first, **results[0].tensors})


def _local_clients(
    setup: Setup, bundle: Bundle, trainer: OnnxTrainer, clients: list[PreparedClient]
) -> tuple[Serve, int]:
    """The clients of this process, and how many of them work together."""
    simulation, manifest = setup.job.simulation, bundle.manifest
    training = setup.recipe.training
    if simulation.backend == "sequential":
        if simulation.engine == "onnx":
            return SequentialClients(manifest, bundle.initial(), trainer, clients).serve, 1
        from tuning.torch_trainer import TorchTrainer

        _, tuned = setup.recipe.build()
        torch_trainer = TorchTrainer(
            tuned,
            training,
            batch_plan=batch_plan,
            private_plan=_private_plan,
            device=simulation.device,
        )
        return SequentialClients(manifest, bundle.initial(), torch_trainer, clients).serve, 1

    samples = sum(len(client.fit["labels"]) for client in clients)
    size = cohort_size(setup.job, setup.compiled, setup.recipe, len(clients), samples)
    evaluate = trainer.evaluate_samples
    loop: CohortLoop
    if simulation.engine == "onnx":
        loop = TrainingLoop(cohort_graph(setup.compiled, setup.recipe, size))
    else:
        from tuning.torch_cohort import TorchCohort
        from tuning.torch_trainer import TorchTrainer

        _, tuned = setup.recipe.build()
        loop = TorchCohort(tuned, training, device=simulation.device)
        _, second = setup.recipe.build()
        torch_trainer = TorchTrainer(
            second, training, batch_plan=batch_plan, device=simulation.device
        )
        evaluate = torch_trainer.evaluate_samples
    return CohortClients(manifest, bundle.initial(), loop, size, evaluate, clients).serve, size


def _private_plan(samples: int, training: TrainingSpec, seed: int) -> PrivateBatches:
    return private_batches(samples, training, repeatable_keystream(seed))


def _play_on_ray(
    setup: Setup, bundle: Bundle, run_folder: Path, rounds: Callable[[FlowerLink], None]
) -> None:
    from simulations.backends import ray

    clients = setup.federation.clients
    for number, client in enumerate(clients):
        ray.write_client(run_folder, number, client.id, client.fit, client.held_out)
    ray.run_on_ray(
        make_server_app(rounds, clients=len(clients)),
        ray.client_app(run_folder, bundle.folder),
        clients=len(clients),
    )
