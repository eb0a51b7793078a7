# SPDX-License-Identifier: Apache-2.0
"""What tomllib leaves out: where a key stands in a text, and how a value is written."""

from __future__ import annotations

import json
import re

_HEADER = re.compile(r"\s*\[\s*(?P<name>[^\[\]]+?)\s*\]\s*(#.*)?$")
_ASSIGNMENT = re.compile(r"\s*(?P<key>[\w\-.\"' ]+?)\s*=")


def key_lines(text: str) -> dict[str, int]:
    """Where each section and each key stands: "training.momentum" -> 14.

    A scan of the text, for messages only: tomllib does not say where a key came from.
    """
    lines: dict[str, int] = {}
    section = ""
    for number, line in enumerate(text.split("\n"), start=1):
        if header := _HEADER.match(line):
            section = _plain_key(header["name"])
            lines.setdefault(section, number)
        elif assignment := _ASSIGNMENT.match(line):
            key = _plain_key(assignment["key"])
            lines.setdefault(f"{section}.{key}" if section else key, number)
    return lines


def _plain_key(text: str) -> str:
    return ".".join(part.strip().strip("\"'") for part in text.split("."))


def toml_key(key: str) -> str:
    """A key, quoted where TOML wants it quoted."""
    return key if re.fullmatch(r"[A-Za-z0-9_-]+", key) else toml_value(key)


def toml_value(value: object) -> str:
    """A text, a number, a truth value, or a tuple of those."""
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, str):
        # JSON's escapes are TOML's, but for the one control character that JSON leaves alone.
        return json.dumps(value, ensure_ascii=False).replace("\x7f", "\\u007f")
    if isinstance(value, tuple):
        return "[" + ", ".join(toml_value(item) for item in value) + "]"
    return repr(value)
