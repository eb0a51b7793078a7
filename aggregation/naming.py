# SPDX-License-Identifier: Apache-2.0
"""Names with settings, as job files and plans write them: `ternary:0.1`, `krum:byzantine=4`.

After the colon stand a class's settings, separated by commas: in the order of its fields, or by
name. A setting that is true or false is set by its word alone (`int8:channel`).
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Container, Mapping
from types import MappingProxyType
from typing import Final, TypeVar

from aggregation.errors import AggregationError

Kind = TypeVar("Kind")

_SETTING_TYPES: Final = ("int", "float", "float | None", "str", "bool")


def build(
    what: str,
    kinds: Mapping[str, type[Kind]],
    text: str,
    error: type[AggregationError],
    *,
    context: Mapping[str, object] = MappingProxyType({}),
) -> Kind:
    """The object that `text` names; `context` gives fields that the text cannot set, where a class
    has them. Raises: `error`; what the class itself raises."""
    given_text: object = text
    name, colon, rest = text.partition(":") if isinstance(given_text, str) else ("", "", "")
    if name not in kinds:
        known = ", ".join(form(kind_name, kind, context) for kind_name, kind in kinds.items())
        raise error(f"{what}: expected one of {known}, found {text!r}")
    kind = kinds[name]
    fields = settings(kind, context)
    words = [word.strip() for word in rest.split(",")] if colon else []
    given: dict[str, object] = {}
    for word in words:
        field, value = _assigned(word, fields, given)
        if field is None or field.name in given:
            allowed = form(name, kind, context)
            raise error(f"{what}: expected {allowed}, found {text!r} ({word!r} has no place)")
        given[field.name] = _value(what, text, field, value, error)
    missing = [field.name for field in fields if field.name not in given and _is_needed(field)]
    if missing:
        allowed = form(name, kind, context)
        raise error(f"{what}: expected {allowed}, found {text!r} without {missing[0]}")
    fitting = {field.name for field in dataclasses.fields(kind)} & context.keys()  # type: ignore[arg-type]
    return kind(**given, **{field_name: context[field_name] for field_name in fitting})


def settings(kind: type, reserved: Container[str] = ()) -> list[dataclasses.Field[object]]:
    """The fields that a text may set: plain values, but for those in `reserved`."""
    return [
        field
        for field in dataclasses.fields(kind)
        if field.type in _SETTING_TYPES and field.name not in reserved
    ]


def form(name: str, kind: type, reserved: Container[str] = ()) -> str:
    """How the name is written: `ternary:DENSITY[,SCALE]`."""
    fields = settings(kind, reserved)
    needed = [field.name.upper() for field in fields if _is_needed(field)]
    optional = [_word(field) for field in fields if not _is_needed(field)]
    tail = ",".join(needed) + "".join(f"[,{word}]" for word in optional)
    tail = tail if needed else tail.replace("[,", "[:", 1)
    return f"{name}:{tail}" if needed else f"{name}{tail}"


def _is_needed(field: dataclasses.Field[object]) -> bool:
    return field.default is dataclasses.MISSING


def _word(field: dataclasses.Field[object]) -> str:
    return field.name.removeprefix("per_") if field.type == "bool" else field.name.upper()


def _assigned(
    word: str, fields: list[dataclasses.Field[object]], given: Mapping[str, object]
) -> tuple[dataclasses.Field[object] | None, str]:
    """The field that one word sets, None if there is none, and the value's text."""
    key, equals, value = word.partition("=")
    if equals:
        return next((field for field in fields if field.name == key.strip()), None), value.strip()
    for field in fields:
        if field.type == "bool" and word == _word(field):
            return field, "true"
    free = (field for field in fields if field.type != "bool" and field.name not in given)
    return next(free, None), word


def _value(
    what: str,
    text: str,
    field: dataclasses.Field[object],
    value: str,
    error: type[AggregationError],
) -> object:
    try:
        match field.type:
            case "int":
                return int(value)
            case "float" | "float | None":
                number = float(value)
                if not math.isfinite(number):
                    raise ValueError
                return number
            case "bool":
                return {"true": True, "false": False}[value]
            case _:
                return value
    except (ValueError, KeyError):
        kind = {"int": "a whole number", "bool": "true or false"}
        expected = kind.get(str(field.type), "a number")
        raise error(
            f"{what}: {field.name}: expected {expected}, found {value!r} ({text})"
        ) from None
