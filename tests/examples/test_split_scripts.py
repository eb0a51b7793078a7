# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

EXAMPLES = Path(__file__).resolve().parents[2] / "examples"


def test_processes_without_torch_train_what_the_simulation_does(
    tiny_vit: Path, cache_of_the_session: Path
) -> None:
    command = [sys.executable, str(EXAMPLES / "split_over_loopback.py"), str(tiny_vit)]
    found = subprocess.run(
        command, capture_output=True, text=True, timeout=250, env={**os.environ}, check=False
    )
    assert found.returncode == 0, found.stderr
    (far,) = re.findall(r"largest difference of a trained value (\S+)", found.stdout)
    assert float(far) <= 1e-4
