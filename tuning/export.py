# SPDX-License-Identifier: Apache-2.0
"""What a run leaves behind for others: the adapter in peft's layout, and the folded weights."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Final

import numpy as np

from protocol.tensors import NOTHING, Tensors
from tuning.compiler import save_predict_weights
from tuning.recipe import Recipe

# The prefix that peft puts before every name it saves.
_PEFT_PREFIX = "base_model.model."


OFFSET_FILE: Final = "base_offset.safetensors"


def export_result(
    recipe: Recipe,
    tensors: Tensors,
    adapter: Path,
    bundle: Path,
    *,
    offset: Tensors = NOTHING,
) -> None:
    """Save trained tensors as an adapter, and fold them into the bundle's `predict.onnx`.

    `adapter/` holds adapter_config.json and adapter_model.safetensors as peft writes them, where
    peft has the method; elsewhere the same files with the names of this library. Where frozen
    weights have moved, `offset` by their names, base_offset.safetensors says how far: the adapter
    is of the moved backbone. The bundle must be signed again afterwards.
    """
    from safetensors.numpy import save_file

    backbone, tuned = recipe.build()
    save_predict_weights(tuned, tensors, bundle, offset=offset)
    adapter.mkdir(parents=True, exist_ok=True)
    prefix = ""
    if tuned.peft_config is not None:
        prefix = _PEFT_PREFIX
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
        adapter / "adapter_model.safetensors",
        metadata={"format": "pt"},
    )
    if offset:
        save_file(
            {name: np.ascontiguousarray(value) for name, value in offset.items()},
            adapter / OFFSET_FILE,
        )
