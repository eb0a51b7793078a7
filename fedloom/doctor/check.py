# SPDX-License-Identifier: Apache-2.0
"""One line of `fedloom doctor`."""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum


class State(StrEnum):
    """How a check ended."""

    OK = "ok"
    WARN = "warn"
    FAIL = "fail"


@dataclass(frozen=True, slots=True, kw_only=True)
class Check:
    """One line: what was looked at, how it is, what was found and the mend ("" if none needed)."""

    name: str
    state: State
    found: str
    mend: str = ""
