# SPDX-License-Identifier: Apache-2.0
"""One canonical JSON text for one value, so that hashes and signatures mean something."""

from __future__ import annotations

import json


def canonical(value: object) -> bytes:
    """ASCII, sorted keys, no spaces, no NaN."""
    text = json.dumps(value, sort_keys=True, separators=(",", ":"), allow_nan=False)
    return text.encode("ascii")


def parse(raw: bytes) -> object:
    """The value of a JSON text.

    Raises: ValueError in words for anything that is not strict ASCII JSON: duplicate keys, NaN,
    numbers with thousands of digits, nesting too deep for the reader.
    """
    try:
        return json.loads(
            raw.decode("ascii"), object_pairs_hook=_unique, parse_constant=_no_constant
        )
    except UnicodeDecodeError as error:
        raise ValueError(f"expected ASCII JSON, byte {error.start} is not ASCII") from None
    except RecursionError:
        raise ValueError("expected JSON of a few levels, it is nested too deeply") from None


def _unique(pairs: list[tuple[str, object]]) -> dict[str, object]:
    mapping = dict(pairs)
    if len(mapping) != len(pairs):
        raise ValueError("expected every key once, a key is given twice")
    return mapping


def _no_constant(name: str) -> object:
    raise ValueError(f"expected finite numbers, found {name}")
