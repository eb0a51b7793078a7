# SPDX-License-Identifier: Apache-2.0
"""Trained tensors on a device: read from a run's `adapter/`, mixed, and kept as the device's own.

Tensors of another backbone, method or list of classes are refused by what their file was stamped
with, before any of them is used.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from edge_runtime.bundle import Bundle
from edge_runtime.errors import AdapterError
from edge_runtime.session import same
from protocol.adapter import ADAPTER_FILE, OFFSET_FILE, PEFT_PREFIX, stamp, stamp_mismatch
from protocol.manifest import Manifest
from protocol.tensors import NOTHING, Tensors


@dataclass(frozen=True, slots=True, kw_only=True)
class Adapter:
    """Trainable tensors by name, and by how much frozen weights are moved beneath them."""

    tensors: Tensors
    offset: Tensors = field(default_factory=lambda: NOTHING)


def read_adapter(folder: Path | str, bundle: Bundle) -> Adapter:
    """The adapter of a run, or a device's own, in `folder`.

    Raises: AdapterError where there is none, or it is not of this bundle.
    """
    folder = Path(folder)
    tensors = _read(folder / ADAPTER_FILE, bundle.manifest)
    adapter = Adapter(
        tensors={name.removeprefix(PEFT_PREFIX): value for name, value in tensors.items()},
        offset=_read(folder / OFFSET_FILE, bundle.manifest)
        if (folder / OFFSET_FILE).is_file()
        else NOTHING,
    )
    try:
        check_adapter(bundle.manifest, adapter)
    except AdapterError as error:
        raise AdapterError(f"{folder}: {error}") from None
    return adapter


def write_adapter(adapter: Adapter, bundle: Bundle, folder: Path | str) -> None:
    """Keep a device's own adapter in `folder`, stamped for this bundle; `read_adapter` reads it.

    Raises: AdapterError as `check_adapter`.
    """
    check_adapter(bundle.manifest, adapter)
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    for name, tensors in ((ADAPTER_FILE, adapter.tensors), (OFFSET_FILE, adapter.offset)):
        if tensors:
            owned = {key: np.ascontiguousarray(value) for key, value in tensors.items()}
            save_file(owned, folder / name, metadata=stamp(bundle.manifest))
        else:
            (folder / name).unlink(missing_ok=True)


def check_adapter(manifest: Manifest, adapter: Adapter) -> None:
    """Nothing, where the tensors are those that the bundle trains.

    Raises: AdapterError for the first that is missing, too much, of another shape or type, or that
    holds NaN or infinity. Offsets are checked against their weights when a graph is loaded.
    """
    if problem := manifest.trainable.mismatch(adapter.tensors):
        raise AdapterError(f"adapter: {problem}; take one that was trained with this bundle")
    for tensors in (adapter.tensors, adapter.offset):
        for name, value in tensors.items():
            if not np.isfinite(value).all():
                raise AdapterError(f'adapter: tensor "{name}" holds NaN or infinity; train it anew')


def mixed(own: Adapter, shared: Adapter, weight: float) -> Adapter:
    """weight * own + (1 - weight) * shared, tensor by tensor.

    Raises: AdapterError for a weight outside of [0, 1], or for adapters that do not have the same
    tensors or rest on weights that moved differently: their mean would be of no network.
    """
    if not 0 <= weight <= 1:
        raise AdapterError(f"mix: expected a weight from 0 to 1, found {weight:g}")
    shapes = [{n: v.shape for n, v in one.tensors.items()} for one in (own, shared)]
    if shapes[0] != shapes[1]:
        raise AdapterError("mix: expected two adapters of the same names and shapes")
    if not same(own.offset, shared.offset):
        raise AdapterError(
            f"mix: the two adapters rest on different backbones ({OFFSET_FILE} differs, or one "
            "folder has none); train the own one from the shared one first"
        )
    return Adapter(tensors=mixed_tensors(own.tensors, shared.tensors, weight), offset=shared.offset)


def mixed_tensors(own: Tensors, shared: Tensors, weight: float) -> dict[str, np.ndarray]:
    """weight * own + (1 - weight) * shared, of the same names and shapes, in their types."""
    return {
        name: (weight * value + (1 - weight) * shared[name]).astype(value.dtype)
        for name, value in own.items()
    }


def _read(path: Path, manifest: Manifest) -> dict[str, np.ndarray]:
    if not path.is_file():
        raise AdapterError(f"{path}: no such file; give the folder adapter/ of a run")
    try:
        with safe_open(path, framework="numpy") as file:
            found: Mapping[str, str] = file.metadata() or {}
            if problem := stamp_mismatch(manifest, found):
                raise AdapterError(f"{path}: {problem}; take an adapter trained with this bundle")
            return {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except (SafetensorError, OSError, KeyError, TypeError, AttributeError) as error:
        raise AdapterError(f"{path}: expected safetensors that numpy can read: {error}") from error
