# SPDX-License-Identifier: Apache-2.0
"""Four devices without torch train one network against a split server, each in its own process.

    python examples/split_over_loopback.py [BACKBONE]

The server holds the body and listens on loopback; TLS names both sides. Then the same job is
simulated in one process, and the largest difference of a trained value is printed: below 1e-4.
BACKBONE is a Hugging Face folder of a vision transformer; without it the shipped one is taken.
"""

from __future__ import annotations

import sys
import tempfile
from contextlib import ExitStack
from pathlib import Path

import numpy as np

from coordinator.job import Job, load_job
from protocol.manifest import Manifest
from simulations.backends.processes import ClientProcesses
from simulations.benchmarks.runs import run_job
from simulations.grid import Serve
from simulations.progress import SilentProgress
from simulations.setup import set_up

DEVICE = Path(__file__).with_name("split_device.py")


def make_job(backbone: list[str]) -> Job:
    """The shipped SFPrompt job, for four clients with digits."""
    chosen = [
        "data.dataset=digits",
        "data.clients=4",
        "rounds.clients_per_round=0",
        "rounds.count=2",
    ]
    if backbone:
        chosen += ["backbone.name=", f"backbone.path={backbone[0]}", "method.cut=1+0"]
    return load_job(DEVICE.with_name("fashion-sfprompt.toml"), [*chosen, "split.lanes=2"])


def main(backbone: list[str]) -> int:
    """Train in processes, train in a simulation, compare."""
    setup = set_up(make_job(backbone), SilentProgress())
    with ExitStack() as stack:
        run = Path(stack.enter_context(tempfile.TemporaryDirectory())) / "run"

        def in_processes(_: Serve, manifest: Manifest) -> Serve:
            return stack.enter_context(ClientProcesses(setup, run, DEVICE)).serve

        trained = run_job(setup, run, wrap=in_processes)
        simulated = run_job(setup, run.with_name("simulated"))
    far = 0.0
    for name, value in simulated.tensors.items():
        far = max(far, float(np.abs(trained.tensors[name] - value).max()))
    print(f"accuracy {trained.accuracy:.4f}, simulated {simulated.accuracy:.4f}")
    print(f"largest difference of a trained value {far:.1e}")
    return 0 if far <= 1e-4 else 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
