# SPDX-License-Identifier: Apache-2.0
"""Environment variables in which a device finds what its operator told it.

`fedloom coordinator token create --env` writes them, and `fedloom device enroll` reads them. They
keep a token out of the list of processes, and are what env files of systemd and compose hold.
"""

from __future__ import annotations

from typing import Final

COORDINATOR_VARIABLE: Final = "FEDLOOM_COORDINATOR"
TOKEN_VARIABLE: Final = "FEDLOOM_TOKEN"
FINGERPRINT_VARIABLE: Final = "FEDLOOM_FINGERPRINT"
