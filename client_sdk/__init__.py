# SPDX-License-Identifier: Apache-2.0
"""A device's side of the federation.

    from client_sdk import Device

    device = Device.enroll(coordinator="https://host:8443", token="...", fingerprint="...")
    device.run(data="~/images")

`device.py` is that: it keeps Flower's SuperNode running, and the membership valid. For each message
SuperNode starts a process, `device_app.py`, in which `participant.py` answers: with the job's
bundle (`bundle_cache.py`), the device's own data (`data/`) and, where they hold, under its owner's
conditions. `updates.py` turns a plan into an update, with whatever trains; `outbox.py` keeps
updates until the coordinator is done with them, `memory.py` what the device keeps for itself;
`client_app.py` answers plans inside of Flower. `home.py` says what lies where. Nothing here imports
`coordinator` or torch.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from client_sdk.conditions import Conditions
    from client_sdk.device import Device

__all__ = ["Conditions", "Device"]


def __getattr__(name: str) -> Any:
    # Loaded when asked for: whoever wants one module of this package gets no more than that.
    if name == "Device":
        from client_sdk.device import Device

        return Device
    if name == "Conditions":
        from client_sdk.conditions import Conditions

        return Conditions
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
