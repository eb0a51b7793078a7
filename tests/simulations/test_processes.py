# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from coordinator.sections import SimulationSection, SplitSection
from simulations.backends.processes import ClientProcesses
from simulations.progress import SilentProgress
from simulations.setup import set_up

SCRIPTS = {
    "ends before its answer": "import sys; sys.stdin.buffer.read(8); sys.exit(3)",
    "ends at once": "raise SystemExit(3)",
}


@pytest.mark.parametrize("script", SCRIPTS.values(), ids=SCRIPTS)
def test_a_process_that_ends_is_its_own_clients_fault(
    tiny_job: Callable[..., Any], tmp_path: Path, cache_of_the_session: Path, script: str
) -> None:
    job = tiny_job(
        "sfprompt",
        settings={"cut": "1+0", "length": 2},
        split=SplitSection(keep=1.0, local_epochs=0),
        simulation=SimulationSection(backend="sequential"),
    )
    setup = set_up(replace(job, data=replace(job.data, clients=2)), SilentProgress())
    device = tmp_path / "device.py"
    device.write_text(script)
    with ClientProcesses(setup, tmp_path, device) as clients:
        work = [(client.id, "fit", b"plan") for client in setup.federation.clients]
        answers = list(clients.serve(work))
    assert [name for name, _ in answers] == [name for name, _, _ in work]
    assert all("ended with 3" in str(answer) for _, answer in answers)
