# SPDX-License-Identifier: Apache-2.0
"""How the keys of a job file are declared: a dataclass field each, which says its default, what it
may hold and one line of help."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import field, fields
from typing import Any, Final

from coordinator.errors import Fault, JobError

Scalar = str | int | float | bool

# The largest integer that TOML, JSON and SQLite all carry exactly.
MAX_INT: Final = 2**53 - 1


def key(
    default: Scalar,
    help: str,
    *,
    low: float | None = None,
    high: float | None = None,
    above: float | None = None,
    below: float | None = None,
    choices: tuple[str, ...] = (),
    pattern: re.Pattern[str] | None = None,
    allowed: str = "",
) -> Any:
    """A key's default, its help, and what it may hold (`above` and `below` are exclusive)."""
    rules = {
        "help": help,
        "low": low,
        "high": high,
        "above": above,
        "below": below,
        "choices": choices,
        "pattern": pattern,
        "allowed": allowed,
    }
    return field(default=default, metadata=rules)


def allowed_values(type_name: str, rules: Mapping[str, Any]) -> str:
    """What a key may hold, in words."""
    if rules["allowed"]:
        return str(rules["allowed"])
    if rules["choices"]:
        return "expected one of " + ", ".join(f'"{choice}"' for choice in rules["choices"])
    kind = {
        "bool": "true or false",
        "int": "a whole number",
        "float": "a number",
        "str": "a text",
    }[type_name]
    words = {"low": ">=", "above": ">", "high": "<=", "below": "<"}
    bounds = [f"{sign} {rules[name]:g}" for name, sign in words.items() if rules[name] is not None]
    return "expected " + " ".join([kind, " and ".join(bounds)]).strip()


def value_fault(key: str, type_name: str, rules: Mapping[str, Any], value: object) -> Fault | None:
    """What is wrong with one value, None if nothing is."""
    fault = Fault(key=key, value=value, allowed=allowed_values(type_name, rules))
    if type_name == "bool":
        return None if isinstance(value, bool) else fault
    if type_name == "str":
        if not isinstance(value, str):
            return fault
        pattern = rules["pattern"]
        fits = (not rules["choices"] or value in rules["choices"]) and (
            pattern is None or pattern.fullmatch(value) is not None
        )
        return None if fits else fault
    numeric = (int,) if type_name == "int" else (int, float)
    if isinstance(value, bool) or not isinstance(value, numeric):
        return fault
    if not math.isfinite(value) or abs(value) > MAX_INT:
        return fault
    fits = (
        (rules["low"] is None or value >= rules["low"])
        and (rules["high"] is None or value <= rules["high"])
        and (rules["above"] is None or value > rules["above"])
        and (rules["below"] is None or value < rules["below"])
    )
    return None if fits else fault


def check(section: object, name: str) -> None:
    """Check every key of a section, and turn whole numbers into floats where floats belong.

    Raises: JobError with every fault.
    """
    faults = []
    for item in fields(section):  # type: ignore[arg-type]
        value = getattr(section, item.name)
        fault = value_fault(f"{name}.{item.name}", str(item.type), item.metadata, value)
        if fault is not None:
            faults.append(fault)
        elif item.type == "float" and isinstance(value, int):
            # `learning_rate = 1` and `= 1.0` are the same job and must hash alike.
            object.__setattr__(section, item.name, float(value))
    if faults:
        raise JobError(faults)
