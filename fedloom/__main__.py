# SPDX-License-Identifier: Apache-2.0
"""`python -m fedloom` is the command `fedloom`."""

from __future__ import annotations

import sys

from fedloom.cli import main

sys.exit(main())
