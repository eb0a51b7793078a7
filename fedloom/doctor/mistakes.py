# SPDX-License-Identifier: Apache-2.0
"""The twelve likeliest mistakes of a deployment, by number, and the lines that tell of them."""

from __future__ import annotations

from typing import Final, Literal

from fedloom.doctor.check import Check, State

Side = Literal["coordinator", "device"]

MISTAKES: Final = {
    1: "setup",
    2: "files",
    3: "disk",
    4: "versions",
    5: "running",
    6: "ports",
    7: "address",
    8: "clock",
    9: "certificate",
    10: "membership",
    11: "data",
    12: "conditions",
}


def name_of(side: Side, number: int) -> str:
    """As the check is called."""
    return f"{side} {number}: {MISTAKES[number]}"


def well(side: Side, number: int, found: str) -> Check:
    """The mistake was not made."""
    return Check(name=name_of(side, number), state=State.OK, found=found)


def warn(side: Side, number: int, found: str, mend: str) -> Check:
    """It works for now."""
    return Check(name=name_of(side, number), state=State.WARN, found=found, mend=mend)


def fail(side: Side, number: int, found: str, mend: str) -> Check:
    """It cannot work."""
    return Check(name=name_of(side, number), state=State.FAIL, found=found, mend=mend)
