# SPDX-License-Identifier: Apache-2.0
"""Checks of the settings that job files give to merging rules and server optimizers."""

from __future__ import annotations

import math
from collections.abc import Callable

from aggregation.errors import MergeError


def require_number(
    what: str, value: object, allowed: str, holds: Callable[[float], bool] = lambda _: True
) -> None:
    """Raises: MergeError unless `value` is a finite number for which `holds`; `allowed` is said."""
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    if not (is_number and -math.inf < value < math.inf and holds(value)):  # type: ignore[operator, arg-type]
        raise MergeError(f"{what}: expected {allowed}, found {value!r}")


def require_integer(what: str, value: object, low: int) -> None:
    """Raises: MergeError unless `value` is an integer, `low` or above."""
    if isinstance(value, bool) or not isinstance(value, int) or value < low:
        raise MergeError(f"{what}: expected an integer of {low} or above, found {value!r}")
