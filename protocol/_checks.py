# SPDX-License-Identifier: Apache-2.0
"""Field checks shared by the dataclasses of this package; each raises the caller's error class.

Objects and lists from JSON come out as `Any`: the dataclass that they are put into checks every
value again, whoever makes it.
"""

from __future__ import annotations

import math
import re
from collections.abc import Collection
from numbers import Integral, Real
from typing import Any

from protocol.errors import ProtocolError
from protocol.limits import MAX_PEM_LENGTH

_HEX = re.compile(r"[0-9a-f]*")


def integer(field: str, value: object, low: int, high: int, error: type[ProtocolError]) -> int:
    if isinstance(value, bool) or not isinstance(value, Integral):
        raise error(f"{field}: expected an integer, found {shown(value)}")
    number = int(value)
    if not low <= number <= high:
        raise error(f"{field}: expected {low} to {high}, found {shown(number)}")
    return number


def boolean(field: str, value: object, error: type[ProtocolError]) -> bool:
    if not isinstance(value, bool):
        raise error(f"{field}: expected true or false, found {shown(value)}")
    return value


def real(
    field: str,
    value: object,
    error: type[ProtocolError],
    *,
    not_finite: type[ProtocolError] | None = None,
    low: float = -math.inf,
) -> float:
    """A finite float of at least `low`; `not_finite` is raised in place of `error` for NaN, inf."""
    if isinstance(value, bool) or not isinstance(value, Real):
        raise error(f"{field}: expected a number, found {shown(value)}")
    try:
        number = float(value)
    except OverflowError:
        number = math.inf
    if not math.isfinite(number):
        raise (not_finite or error)(f"{field}: expected a finite number, found {number}")
    if number < low:
        raise error(f"{field}: expected at least {low:g}, found {number:g}")
    return number


def text(field: str, value: object, limit: int, error: type[ProtocolError]) -> str:
    if not isinstance(value, str):
        raise error(f"{field}: expected text, found {shown(value)}")
    if not 1 <= len(value) <= limit:
        raise error(f"{field}: expected 1 to {limit} characters, found {len(value)}")
    if not value.isprintable():
        raise error(f"{field}: expected printable characters, found {shown(value)}")
    return value


def hexadecimal(field: str, value: object, low: int, high: int, error: type[ProtocolError]) -> str:
    if not isinstance(value, str) or not _HEX.fullmatch(value):
        raise error(f"{field}: expected lower-case hex digits, found {shown(value)}")
    if not low <= len(value) <= high or len(value) % 2:
        span = f"{low}" if low == high else f"{low} to {high}"
        raise error(f"{field}: expected {span} hex digits in pairs, found {len(value)}")
    return value


def pem(field: str, value: object, *labels: str, error: type[ProtocolError]) -> str:
    """One PEM block of one of these labels by its looks; whether it holds what it says, its reader
    finds out."""
    if not isinstance(value, str) or not value.isascii():
        raise error(f"{field}: expected PEM, found {shown(value)}")
    if len(value) > MAX_PEM_LENGTH:
        raise error(f"{field}: expected at most {MAX_PEM_LENGTH} characters, found {len(value)}")
    for label in labels:
        begin, end = f"-----BEGIN {label}-----\n", f"-----END {label}-----\n"
        body = value.removeprefix(begin).removesuffix(end)
        if len(value) - len(body) == len(begin) + len(end) and "-" not in body:
            return value
    names = " or ".join(labels)
    raise error(f"{field}: expected one PEM block of {names}, found {shown(value)}")


def one_of(field: str, value: object, allowed: Collection[str], error: type[ProtocolError]) -> str:
    if not isinstance(value, str) or value not in allowed:
        raise error(f"{field}: expected one of {', '.join(allowed)}, found {shown(value)}")
    return value


def mapping(field: str, value: object, error: type[ProtocolError]) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise error(f"{field}: expected an object, found {shown(value)}")
    return value


def sequence(field: str, value: object, limit: int, error: type[ProtocolError]) -> list[Any]:
    if not isinstance(value, list | tuple):
        raise error(f"{field}: expected a list, found {shown(value)}")
    if len(value) > limit:
        raise error(f"{field}: expected at most {limit} entries, found {len(value)}")
    return list(value)


def keys(
    field: str, value: object, expected: Collection[str], error: type[ProtocolError]
) -> dict[str, Any]:
    """An object with exactly the expected keys."""
    found = mapping(field, value, error)
    unknown = sorted(set(found) - set(expected))
    missing = sorted(set(expected) - set(found))
    if unknown:
        known = ", ".join(sorted(expected))
        raise error(f"{field}: unknown key {shown(unknown[0])}; known keys are {known}")
    if missing:
        raise error(f"{field}: key {missing[0]!r} is missing")
    return found


def shown(value: object) -> str:
    """A value for an error message, of bounded length whatever came."""
    if isinstance(value, int) and value.bit_length() > 64:
        return f"an integer of {value.bit_length()} bits"  # str() of a huge int raises or is slow
    if isinstance(value, str | bytes):
        return repr(value[:60]) + ("…" if len(value) > 60 else "")
    if isinstance(value, int | float | None):
        return repr(value)
    return f"a {type(value).__name__}"
