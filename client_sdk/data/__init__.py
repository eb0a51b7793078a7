# SPDX-License-Identifier: Apache-2.0
"""What a device trains on: its own data by one address, checked against a bundle's manifest.

`open_source` reads a folder, a file or a function of the device's own code; `prepare` finds all
that does not fit the bundle before the first round, and makes model inputs of the rest. Nothing
here leaves the device.
"""

from __future__ import annotations

from client_sdk.data.schema import ModelData, prepare
from client_sdk.data.source import OwnData, open_source

__all__ = ["ModelData", "OwnData", "open_source", "prepare"]
