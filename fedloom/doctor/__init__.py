# SPDX-License-Identifier: Apache-2.0
"""What `fedloom doctor` looks at: this machine, a deployment's folder, a device's folder.

check        one line of its answer
machine      what every use of fedloom needs
mistakes     the twelve likeliest mistakes of a deployment, by number; docs/doctor.md lists them
files        modes, owners and disk of a folder
coordinator  those that show on the coordinator's side
device       those that show on a device's
"""

from __future__ import annotations

from pathlib import Path

from fedloom.doctor.check import Check, State
from fedloom.doctor.machine import examine_machine, within
from fedloom.doctor.mistakes import MISTAKES

__all__ = ["MISTAKES", "Check", "State", "examine", "within"]


def examine(*, coordinator: Path | None = None, device: Path | None = None) -> list[Check]:
    """All checks of this machine, and of the folders that are given."""
    checks = examine_machine()
    if coordinator is not None:
        from fedloom.doctor.coordinator import examine_coordinator

        checks += examine_coordinator(coordinator)
    if device is not None:
        from fedloom.doctor.device import examine_device

        checks += examine_device(device)
    return checks
