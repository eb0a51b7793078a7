# SPDX-License-Identifier: Apache-2.0
"""The memory that an idle device keeps: of the process that watches, and of Flower's own."""

from __future__ import annotations

import tempfile
import time
from pathlib import Path
from statistics import median
from typing import Final

import numpy as np

from simulations.benchmarks.command import fedloom
from simulations.benchmarks.deployed import deployed, enrolled, running, wait_until
from simulations.benchmarks.figure import Figure, figure
from simulations.benchmarks.processes import pss_bytes, tree_of
from simulations.progress import ProgressListener

_MIB: Final = 2**20
_UP_S: Final = 60.0
# SuperNode asks for messages every three seconds: it has asked by then, and heard of none.
_SETTLED_S: Final = 8.0
_EVERY_S: Final = 1.0


def device_idle_mb(progress: ProgressListener, *, samples: int = 7) -> Figure:
    """`device_idle_mb`: what `fedloom device run` takes beside the SuperNode that it watches.

    Memory is the proportional set size of the kernel's `smaps_rollup`, the median over `samples`
    looks: the interpreter's pages count in parts where other Pythons run, as Flower's own do.
    """
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        np.savez(folder / "own.npz", images=np.zeros((4, 28, 28), np.uint8), labels=np.arange(4))
        progress.stage("device: a deployment on loopback")
        with deployed(folder) as deployment:
            home, log = folder / "device", folder / "device.log"
            enrolled(deployment, home)
            words = ["device", "run", "--data", str(folder / "own.npz"), "--dir", str(home)]
            with running([*fedloom(), *words], log) as process:
                progress.stage("device: an idle one")
                # The process that watches, SuperNode, and what would start its clients.
                wait_until(lambda: len(tree_of(process.pid)) >= 3, process, log, _UP_S)
                time.sleep(_SETTLED_S)
                ours, flowers = [], []
                for _ in range(samples):
                    others = tree_of(process.pid) - {process.pid}
                    ours.append(pss_bytes(process.pid))
                    flowers.append(sorted(map(pss_bytes, others), reverse=True))
                    time.sleep(_EVERY_S)
    parts = [median(sizes) / _MIB for sizes in zip(*flowers, strict=True)]
    own = median(ours) / _MIB
    return figure(
        "device_idle_mb",
        own,
        unit="MiB",
        target="<= 80",
        note=f"beside Flower's SuperNode and its starter of clients, "
        f"{' + '.join(f'{part:.0f}' for part in parts)} MiB; {own + sum(parts):.0f} MiB in all",
    )
