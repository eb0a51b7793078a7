# SPDX-License-Identifier: Apache-2.0
"""A device's part of a round: the process that SuperNode starts for a plan, from start to end."""

from __future__ import annotations

import secrets
import tempfile
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Final

import numpy as np

from aggregation.codecs import codec_named
from client_sdk.device import Device
from client_sdk.gateway import Address
from client_sdk.home import Home
from client_sdk.identity import Identity
from client_sdk.outbox import Outbox
from client_sdk.pinned_app import COMMAND
from client_sdk.supernode import SuperNode
from coordinator.deployment import Deployment, Settings
from coordinator.job import Job
from coordinator.sections import (
    BackboneSection,
    DataSection,
    JobSection,
    MethodSpec,
    TrainingSection,
)
from edge_runtime.bundle import Bundle, open_bundle
from protocol import envelope
from protocol.plan import Plan, pack_plan
from protocol.update import unpack_update
from simulations.benchmarks.figure import Figure, figure
from simulations.benchmarks.processes import run_command
from simulations.errors import SimulationError
from simulations.progress import ProgressListener
from simulations.run import build_bundle

CLASSES: Final = 10
RANK: Final = 4
RATE: Final = 1e-3
_MOST_BYTES: Final = 16 << 20


@dataclass(frozen=True, slots=True, kw_only=True)
class Work:
    """What a round asks of the device."""

    batch: int = 32
    steps: int = 5
    side: int = 28  # pixels of an image
    backbone: Path | None = None  # a model's folder; None: the shipped ViT


def device_round_seconds(
    progress: ProgressListener, *, repetitions: int = 7, work: Work | None = None
) -> Figure:
    """`device_round_seconds`: what a plan takes, but for Flower's waiting.

    The command, its arguments and its environment are those that SuperNode gives it. It loads
    Flower, fetches the plan from SuperNode's port, opens the signed bundle and the device's data,
    trains, keeps the update in the outbox and hands it to SuperNode: wall time of the whole
    process, the median after one that fills the file cache.
    """
    from simulations.benchmarks.node_runtime import node_runtime

    work = work or Work()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        progress.stage("device: enrolling one and building its bundle")
        device, bundle = _prepared(folder, work)
        supernode = SuperNode(device.home, Identity(device.home.folder), Address("127.0.0.1", 1))
        environment = supernode.environment()
        program = str(Path(environment["PATH"]) / COMMAND)
        taken: list[float] = []
        sizes: list[int] = []
        with node_runtime() as runtime:
            for number in range(repetitions + 1):
                progress.stage(f"device: round {number}/{repetitions}")
                plan = _plan(device, bundle, number + 1)
                token = runtime.ask(envelope.MESSAGE_TYPES["fit"], plan)
                words = ["--runtime-api-address", runtime.address, "--token", token, "--insecure"]
                ran = run_command([program, *words], environment=environment)
                header, payload = unpack_update(runtime.answer(), max_bytes=_MOST_BYTES)
                kept = Outbox(device.home.outbox).entries()
                if header.round != number + 1 or [e.attempt.round for e in kept] != [number + 1]:
                    raise SimulationError("the device answered another plan, or kept no update")
                sizes.append(len(payload))
                if number:
                    taken.append(ran.seconds)
    return figure(
        "device_round_seconds",
        median(taken),
        unit="s",
        target="<= 2",
        note=f"{work.steps} steps of {work.batch} images, LoRA r={RANK}, an update of "
        f"{sizes[-1]:,} bytes; {min(taken):.2f} to {max(taken):.2f} s over {len(taken)} processes",
    )


def _prepared(folder: Path, work: Work) -> tuple[Device, Bundle]:
    """A member that has fetched its bundle, of a deployment that is not asked any more."""
    rng = np.random.default_rng(0)
    rows = work.batch * work.steps
    images = rng.integers(0, 256, (rows, work.side, work.side), dtype=np.uint8)
    np.savez(folder / "own.npz", images=images, labels=np.arange(rows) % CLASSES)
    job = Job(
        job=JobSection(name="device-round"),
        backbone=BackboneSection(name="", path=str(work.backbone))
        if work.backbone
        else BackboneSection(),
        data=DataSection(dataset="digits", clients=1),
        method=MethodSpec(name="lora", settings={"rank": RANK, "alpha": 2.0 * RANK}),
        training=TrainingSection(optimizer="adamw", learning_rate=RATE, batch_size=work.batch),
    )
    settings = Settings(name="bench", addresses=("127.0.0.1",))
    home = Home(folder / "device")
    with Deployment.create(folder / "deployment", settings) as deployment:
        identity = Identity(home.folder)
        request = identity.enrol_request(deployment.enrolment.create_token("bench"))
        answer = deployment.enrolment.enrol(request)
        identity.join(answer, fingerprint=deployment.authority.fingerprint)
        home.set_coordinator(Address("127.0.0.1", deployment.settings.port))
        key = deployment.signing_key
        place = build_bundle(job, home.bundles / job.hash(), key)
    device = Device(home.folder)
    device.configure(data=folder / "own.npz", held_out=0.0)
    return device, open_bundle(place, public_key=None)


def _plan(device: Device, bundle: Bundle, round: int) -> bytes:
    assert device.membership is not None, "it was enrolled above"
    plan = Plan(
        job=bundle.manifest.job,
        round=round,
        nonce=secrets.token_hex(16),
        client=device.membership.device,
        task="fit",
        downlink_codec="float32",
        uplink_codec="float32",
        learning_rate=RATE,
        local_epochs=1,
        seed=round,
        max_update_bytes=_MOST_BYTES,
    )
    return pack_plan(plan, codec_named("float32").encode(bundle.initial()))
