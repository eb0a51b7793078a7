# SPDX-License-Identifier: Apache-2.0
"""Fine-tuning methods, one file each: what is trained, how it enters the network, how it leaves.

A method attaches freshly drawn tensors to a backbone and names them. `method_named` is the one
place where a job's words become an object.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import fields
from typing import Any

from tuning.errors import MethodError
from tuning.methods.method import Method, Tuned

METHOD_NAMES = (
    "full",
    "head",
    "lora",
    "lora-sb",
    "ssf",
    "fedins",
    "adapter",
    "one-bit-adapter",
    "one-bit-lora",
    "prompt",
    "sfprompt",
    "peft",
)

__all__ = ["METHOD_NAMES", "Method", "Tuned", "method_class", "method_named"]


def method_named(name: str, settings: Mapping[str, Any]) -> Method:
    """The method that a job file names, with its settings checked.

    Raises:
        MethodError: an unknown name or setting (the known ones are listed), or a wrong value.
    """
    kind = method_class(name)
    values = dict(settings)
    if name == "peft":
        # What peft's configuration classes take is theirs to know.
        own = {"type", "targets"}
        values = {key: values[key] for key in own if key in values}
        values["settings"] = {key: value for key, value in settings.items() if key not in own}
        if "type" not in values:
            raise MethodError('method "peft" needs method.type, e.g. type = "LOHA"')
    defaults = {entry.name: entry.default for entry in fields(kind)}
    for key, value in values.items():
        if key not in defaults:
            known = ", ".join(sorted(defaults)) or "none"
            raise MethodError(f'method "{name}" has no setting "{key}"; known: {known}')
        values[key] = _typed(key, value, defaults[key])
    return kind(**values)


def _typed(key: str, value: Any, default: Any) -> Any:
    """A TOML value as the setting's own type, or an error that says what was expected."""
    if key == "targets":
        if not isinstance(value, list | tuple) or not all(isinstance(item, str) for item in value):
            raise MethodError(f"method.targets is {value!r}; expected a list of layer names")
        return tuple(value)
    if isinstance(default, bool):
        if not isinstance(value, bool):
            raise MethodError(f"method.{key} is {value!r}; expected true or false")
        return value
    if isinstance(default, float):
        if isinstance(value, bool) or not isinstance(value, int | float):
            raise MethodError(f"method.{key} is {value!r}; expected a number")
        return float(value)
    if isinstance(default, int) and (isinstance(value, bool) or not isinstance(value, int)):
        raise MethodError(f"method.{key} is {value!r}; expected a whole number")
    if isinstance(default, str) and not isinstance(value, str):
        raise MethodError(f"method.{key} is {value!r}; expected a text")
    if key == "type" and not isinstance(value, str):
        raise MethodError(f"method.type is {value!r}; expected the name of a peft method")
    return value


def method_class(name: str) -> Any:
    """The class of a method by its name. Raises: MethodError for an unknown one."""
    # One import a case: torch and peft are loaded only for the method that needs them.
    match name:
        case "full":
            from tuning.methods.full import Full

            return Full
        case "head":
            from tuning.methods.head import Head

            return Head
        case "lora":
            from tuning.methods.lora import LoRA

            return LoRA
        case "lora-sb":
            from tuning.methods.lora_sb import LoRASB

            return LoRASB
        case "ssf":
            from tuning.methods.ssf import SSF

            return SSF
        case "fedins":
            from tuning.methods.fedins import FedIns

            return FedIns
        case "adapter":
            from tuning.methods.adapter import Adapter

            return Adapter
        case "one-bit-adapter":
            from tuning.methods.one_bit_adapter import OneBitAdapter

            return OneBitAdapter
        case "one-bit-lora":
            from tuning.methods.one_bit_lora import OneBitLoRA

            return OneBitLoRA
        case "prompt":
            from tuning.methods.prompt import Prompt

            return Prompt
        case "sfprompt":
            from tuning.methods.sfprompt import SFPrompt

            return SFPrompt
        case "peft":
            from tuning.methods.peft_method import PeftMethod

            return PeftMethod
    raise MethodError(f'no method is called "{name}"; known: {", ".join(METHOD_NAMES)}')
