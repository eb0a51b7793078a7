# SPDX-License-Identifier: Apache-2.0
"""A folder of trained tensors: its files, and the stamp that says what they belong to.

`adapter_model.safetensors` holds the tensors in peft's layout where peft has the method,
`base_offset.safetensors` how far frozen weights have moved, where a merger has moved them. The
stamp is safetensors metadata, which other readers of the files pass over.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Final

from protocol.files import BACKBONE_FILE
from protocol.manifest import Manifest

ADAPTER_FILE: Final = "adapter_model.safetensors"
OFFSET_FILE: Final = "base_offset.safetensors"

PEFT_PREFIX: Final = "base_model.model."
"""What peft puts before every name that it saves."""

_STAMPED: Final = ("fedloom_backbone", "fedloom_method", "fedloom_classes")


def stamp(manifest: Manifest) -> dict[str, str]:
    """The metadata of tensors trained with a bundle: its backbone's SHA-256, method, classes, job.

    Whether tensors fit another bundle is `stamp_mismatch`'s to say: other jobs may share all but
    the job's own hash.
    """
    return {
        "format": "pt",  # transformers and peft refuse files without it
        "fedloom_backbone": manifest.files[BACKBONE_FILE].sha256,
        "fedloom_method": manifest.method,
        "fedloom_classes": json.dumps(list(manifest.class_names)),
        "fedloom_job": manifest.job,
    }


def stamp_mismatch(manifest: Manifest, found: Mapping[str, str]) -> str | None:
    """Why stamped tensors do not belong to a bundle, in words, or None if they do."""
    expected = stamp(manifest)
    if missing := [name for name in _STAMPED if name not in found]:
        return f"the file does not say what it belongs to ({missing[0]} is missing)"
    what = {
        "fedloom_backbone": "a backbone with SHA-256",
        "fedloom_method": "the method",
        "fedloom_classes": "the classes",
    }
    for name in _STAMPED:
        if found[name] != expected[name]:
            return (
                f"expected tensors for {what[name]} {_short(expected[name])}, found some for "
                f"{_short(found[name])}"
            )
    return None


def _short(text: str) -> str:
    return text if len(text) <= 80 else text[:77] + "..."
