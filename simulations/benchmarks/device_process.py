# SPDX-License-Identifier: Apache-2.0
"""One process, from its start to its first training step: on a device, or with torch.

Run as `python -m simulations.benchmarks.device_process onnx BUNDLE` or `... torch MODEL_FOLDER`. It
prints the bytes of its peak memory, as the kernel counted them, right after the step. Each half
imports only what such a process needs; the packages above this module import nothing.
"""

from __future__ import annotations

import sys
from typing import Final

BATCH: Final = 8
CLASSES: Final = 10
RANK: Final = 4
RATE: Final = 1e-3


def step_by_graph(bundle_folder: str) -> float:
    """Open the signed bundle, preprocess eight images, train one step; its loss."""
    import numpy as np

    from edge_runtime import open_bundle, preprocess
    from edge_runtime.trainer import OnnxTrainer

    bundle = open_bundle(bundle_folder, public_key=None)
    rng = np.random.default_rng(0)
    raw = {
        "images": rng.integers(0, 256, (BATCH, 28, 28), dtype=np.uint8),
        "labels": np.arange(BATCH, dtype=np.int64),
    }
    data = preprocess(bundle.manifest.preprocessing, raw)
    trainer = OnnxTrainer(bundle)
    _, metrics = trainer.fit(bundle.initial(), data, learning_rate=RATE, epochs=1, seed=0)
    return metrics["loss"]


def step_by_torch(model_folder: str) -> float:
    """The same model with transformers and peft, one step of AdamW; its loss."""
    import torch
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForImageClassification

    torch.manual_seed(0)
    base = AutoModelForImageClassification.from_pretrained(
        model_folder, num_labels=CLASSES, local_files_only=True, ignore_mismatched_sizes=True
    )
    settings = LoraConfig(
        r=RANK,
        lora_alpha=2 * RANK,
        target_modules=["q_proj", "v_proj", "query", "value"],
        modules_to_save=["classifier"],
    )
    model = get_peft_model(base, settings).train()
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=RATE)
    side = base.config.image_size
    images = torch.randn(BATCH, base.config.num_channels, side, side)
    loss = torch.nn.functional.cross_entropy(model(pixel_values=images).logits, torch.arange(BATCH))
    loss.backward()
    optimizer.step()
    return loss.item()


def peak_bytes() -> int:
    """This process's largest resident set.

    Read from /proc: what getrusage gives may be the parent's, from before exec.
    """
    with open("/proc/self/status", encoding="ascii", errors="replace") as file:
        for line in file:
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024
    raise OSError("/proc/self/status has no VmHWM: peak memory can be read on Linux only")


def main(arguments: list[str]) -> None:
    """One step, then the peak memory on a line of its own."""
    way, folder = arguments
    loss = step_by_graph(folder) if way == "onnx" else step_by_torch(folder)
    if not loss > 0:
        raise ValueError(f"expected a loss above 0 from the first step, found {loss}")
    print(peak_bytes(), flush=True)


if __name__ == "__main__":
    main(sys.argv[1:])
