# SPDX-License-Identifier: Apache-2.0
"""`fedloom bench deployment`: what one gateway and one journal carry on this machine."""

from __future__ import annotations

from simulations.benchmarks.figure import Figure
from simulations.benchmarks.gateway_load import gateway_bytes, gateway_requests
from simulations.benchmarks.journal_load import journal_commits
from simulations.benchmarks.runs import labelled
from simulations.progress import ProgressListener


def figures(progress: ProgressListener, *, quick: bool = False) -> list[Figure]:
    """All of them. `quick` asks less often, and says so."""
    found = [
        *gateway_requests(progress, devices=10 if quick else 50, requests=20 if quick else 100),
        *gateway_bytes(progress, requests=3 if quick else 12),
        *journal_commits(progress, rounds=3 if quick else 10),
    ]
    return labelled(found) if quick else found
