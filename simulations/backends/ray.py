# SPDX-License-Identifier: Apache-2.0
"""Clients on Flower's own simulation engine, which is Ray: many cores, and many machines.

The ServerApp and the ClientApp are those of every other way to run a job. Workers share nothing
with the coordinator's process: a client's samples lie in `clients/NNNN.npz` of the run's folder,
NNNN being the node's partition-id, and the trainer is made in the worker, from the bundle's folder.

Flower's engine pickles messages and functions between its own processes on one cluster; nothing
that came from a device is ever unpickled.
"""

from __future__ import annotations

import functools
import importlib.util
import logging
import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Final, NamedTuple

import numpy as np
from flwr.clientapp import ClientApp
from flwr.serverapp import ServerApp
from flwr.simulation import run_simulation
from flwr.supercore import telemetry

from client_sdk.client_app import Client, NodeConfig, make_client_app
from client_sdk.memory import FolderMemory
from client_sdk.noise import repeatable_seed
from client_sdk.updates import Trainer, respond, sample_count
from edge_runtime.preprocessing import apply
from protocol.manifest import Manifest
from protocol.tensors import Tensors
from simulations.backends.prepared import MEMORY_FOLDER, readiness_of
from simulations.errors import SimulationError

_ENVIRONMENT: Final = {
    "FLWR_TELEMETRY_ENABLED": "0",
    "FLWR_DISABLE_UPDATE_CHECK": "1",
    "RAY_USAGE_STATS_ENABLED": "0",
    # Ray would hide GPUs from workers that ask for none, and warns that it will stop doing so.
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
    "OMP_NUM_THREADS": "1",
}


class Engine(NamedTuple):
    """What a worker needs of a bundle."""

    manifest: Manifest
    initial: Tensors
    trainer: Trainer


OpenEngine = Callable[[str], Engine]
"""Makes the engine from a bundle's folder; a function of a module, since it is sent to workers."""


def onnx_engine(bundle_folder: str) -> Engine:
    """The signed bundle, run by onnxruntime on one thread a worker."""
    from edge_runtime.bundle import open_bundle
    from edge_runtime.keystream import repeatable_keystream
    from edge_runtime.trainer import OnnxTrainer

    bundle = open_bundle(Path(bundle_folder), public_key=None)
    trainer = OnnxTrainer(bundle, threads=1, keystream=repeatable_keystream)
    return Engine(bundle.manifest, bundle.initial(), trainer)


def write_client(run_folder: Path, number: int, name: str, fit: Tensors, held_out: Tensors) -> Path:
    """Write one client's raw arrays where its worker looks for them."""
    path = _client_path(run_folder, number)
    path.parent.mkdir(parents=True, exist_ok=True)
    arrays = {f"fit/{key}": value for key, value in fit.items()}
    arrays |= {f"held_out/{key}": value for key, value in held_out.items()}
    with path.open("wb") as file:
        np.savez(file, allow_pickle=False, name=np.array(name), **arrays)
    return path


def client_app(
    run_folder: Path, bundle_folder: Path, open_engine: OpenEngine = onnx_engine
) -> ClientApp:
    """The ClientApp of a run whose clients were written by `write_client`."""
    places = (str(run_folder.resolve()), str(bundle_folder.resolve()))
    return make_client_app(functools.partial(_open_client, *places, open_engine))


def run_on_ray(
    server_app: ServerApp, app: ClientApp, *, clients: int, cpus_per_client: float = 1.0
) -> None:
    """Play a ServerApp against `clients` nodes on Ray, started for it and stopped after.

    Raises: what the ServerApp raises; SimulationError without Ray; RuntimeError when the engine
    itself fails.
    """
    if importlib.util.find_spec("ray") is None:
        # Flower would end the process.
        raise SimulationError(
            'simulation.backend = "ray": expected Ray, it is not installed; '
            "pip install 'fedloom[ray]', or use the backend \"cohort\""
        )
    config = {
        "client_resources": {"num_cpus": cpus_per_client, "num_gpus": 0.0},
        "init_args": {"include_dashboard": False, "log_to_driver": False, "logging_level": 40},
    }
    with _quiet_environment():
        run_simulation(server_app, app, num_supernodes=clients, backend_config=config)


def _open_client(
    run_folder: str, bundle_folder: str, open_engine: OpenEngine, node: NodeConfig
) -> Client:
    name, fit, held_out = _read_client(_client_path(Path(run_folder), int(node["partition-id"])))

    def answer(plan: bytes) -> bytes:
        engine = _engine(open_engine, bundle_folder)
        preprocessing = engine.manifest.preprocessing
        return respond(
            plan,
            bundle_manifest=engine.manifest,
            initial=engine.initial,
            trainer=engine.trainer,
            data_fit=apply(preprocessing, fit),
            # A client may hold nothing back; preprocessing refuses arrays without a row.
            data_held_out=apply(preprocessing, held_out) if sample_count(held_out) else {},
            client=name,
            memory=FolderMemory.of(Path(run_folder) / MEMORY_FOLDER, name),
            noise=repeatable_seed,
        )

    def survey(asked: bytes) -> bytes:
        return readiness_of(_engine(open_engine, bundle_folder).manifest, fit, held_out)

    return Client(name=name, answer=answer, survey=survey)


@functools.lru_cache(maxsize=1)
def _engine(open_engine: OpenEngine, bundle_folder: str) -> Engine:
    """One engine a worker: sessions are costly to make, and hold no client's data."""
    return open_engine(bundle_folder)


def _client_path(run_folder: Path, number: int) -> Path:
    return run_folder / "clients" / f"{number:04d}.npz"


def _read_client(path: Path) -> tuple[str, dict[str, np.ndarray], dict[str, np.ndarray]]:
    fit: dict[str, np.ndarray] = {}
    held_out: dict[str, np.ndarray] = {}
    with np.load(path, allow_pickle=False) as arrays:
        for key in arrays.files:
            part, _, name = key.partition("/")
            if name:
                (fit if part == "fit" else held_out)[name] = arrays[key]
        return str(arrays["name"]), fit, held_out


@contextmanager
def _quiet_environment() -> Iterator[None]:
    """No telemetry, no update check, no chatter; the environment is put back afterwards."""
    before: Mapping[str, str] = dict(os.environ)
    for name, value in _ENVIRONMENT.items():
        os.environ.setdefault(name, value)
    # Flower read the variable when it was imported, which may be long ago. This stays: its last
    # event is sent by a thread that may outlive the run. It would also write an identity into the
    # home folder before it looks whether to send anything.
    telemetry.FLWR_TELEMETRY_ENABLED = os.environ["FLWR_TELEMETRY_ENABLED"]
    if telemetry.FLWR_TELEMETRY_ENABLED != "1":
        telemetry.state["source"] = "unavailable"
    logger = logging.getLogger("flwr")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(level)
        # Flower adds to PYTHONPATH for its workers.
        for name in set(os.environ) - set(before):
            del os.environ[name]
        os.environ.update(before)
