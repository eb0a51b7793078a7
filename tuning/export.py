# SPDX-License-Identifier: Apache-2.0
"""What a run leaves behind for others: the adapter in peft's layout, and the folded weights."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from protocol.adapter import ADAPTER_FILE, OFFSET_FILE, PEFT_PREFIX, stamp
from protocol.files import BACKBONE_FILE, MANIFEST_NAME, read_small
from protocol.limits import MAX_MANIFEST_BYTES
from protocol.manifest import Manifest
from protocol.tensors import NOTHING, Tensors
from tuning.errors import BackboneError, MethodError
from tuning.inference import save_predict_weights, save_prediction
from tuning.methods import Tuned
from tuning.recipe import Recipe

if TYPE_CHECKING:
    from tuning.backbones import Backbone


def export_result(
    recipe: Recipe,
    tensors: Tensors,
    adapter: Path,
    bundle: Path,
    *,
    offset: Tensors = NOTHING,
) -> None:
    """Save trained tensors as an adapter, and fold them into the bundle's `predict.onnx`.

    A bundle without `predict.onnx`, of a split network, stays as it is. The bundle must be signed
    again afterwards.
    """
    backbone, tuned = recipe.build()
    manifest = Manifest.from_json(read_small(bundle / MANIFEST_NAME, MAX_MANIFEST_BYTES))
    if "predict" in manifest.graphs:
        save_predict_weights(tuned, tensors, bundle, offset=offset)
    _save_adapter(backbone, tuned, recipe, tensors, adapter, manifest, offset)


def export_adapter(
    recipe: Recipe,
    tensors: Tensors,
    adapter: Path,
    manifest: Manifest,
    *,
    offset: Tensors = NOTHING,
) -> None:
    """Save trained tensors as an adapter to the bundle with this manifest.

    `adapter/` holds adapter_config.json and adapter_model.safetensors as peft writes them, where
    peft has the method; elsewhere the same files with the names of this library. Where frozen
    weights have moved, `offset` by their names, base_offset.safetensors says how far: the adapter
    is of the moved backbone. Both files are stamped with what they belong to.
    """
    backbone, tuned = recipe.build()
    _save_adapter(backbone, tuned, recipe, tensors, adapter, manifest, offset)


def _save_adapter(
    backbone: Backbone,
    tuned: Tuned,
    recipe: Recipe,
    tensors: Tensors,
    adapter: Path,
    manifest: Manifest,
    offset: Tensors,
) -> None:
    from safetensors.numpy import save_file

    adapter.mkdir(parents=True, exist_ok=True)
    prefix = ""
    if tuned.peft_config is not None:
        prefix = PEFT_PREFIX
        tuned.peft_config.inference_mode = True
        tuned.peft_config.save_pretrained(str(adapter))
    else:
        config = {
            "fedloom_method": recipe.method,
            "settings": dict(recipe.settings),
            "base_model_name_or_path": backbone.name,
            "seed": recipe.seed,
        }
        text = json.dumps(config, indent=2, sort_keys=True, default=list)
        (adapter / "adapter_config.json").write_text(text + "\n", encoding="utf-8")
    save_file(
        {prefix + name: np.ascontiguousarray(value) for name, value in tensors.items()},
        adapter / ADAPTER_FILE,
        metadata=stamp(manifest),
    )
    if offset:
        save_file(
            {name: np.ascontiguousarray(value) for name, value in offset.items()},
            adapter / OFFSET_FILE,
            metadata=stamp(manifest),
        )


def export_prediction(
    recipe: Recipe,
    tensors: Tensors,
    bundle: Path,
    folder: Path,
    *,
    offset: Tensors = NOTHING,
    element: int | None = None,
) -> None:
    """Write what is needed to predict with tensors trained in a bundle, and no more, to `folder`.

    `element` merges that one of the elements a method chooses from, which leaves the backbone's own
    graph; without it the method's own inference form is taken. The folder must then be described
    and signed.

    Raises:
        MethodError: the method has no elements, or not that one.
        BackboneError: the backbone is no longer the one that the bundle was made from.
    """
    backbone, tuned = recipe.build()
    _require_weights_of(bundle, tuned)
    if element is not None:
        fold = tuned.fold_element
        if fold is None:
            raise MethodError(
                f"method {recipe.method} has no elements to take one of; leave element {element} "
                "away"
            )
        tuned = dataclasses.replace(tuned, fold=lambda module: fold(module, element))
    save_prediction(tuned, backbone, tensors, folder, offset=offset)


def _require_weights_of(bundle: Path, tuned: Tuned) -> None:
    """The frozen weights are those that the tensors were trained on."""
    import torch
    from safetensors.torch import load_file

    trained_on = load_file(bundle / BACKBONE_FILE)
    for name, value in tuned.frozen().items():
        if name in trained_on and not torch.equal(trained_on[name], value):
            raise BackboneError(
                f'the weight "{name}" is not that of the bundle in {bundle}: the backbone was '
                "changed after the job ran; put the old one back, or run the job again"
            )
