# SPDX-License-Identifier: Apache-2.0
"""Fine-tune on a device that has no training framework: onnxruntime runs the coordinator's step.

    fedloom bundle build examples/digits-lora.toml --out b      on the coordinator, with torch
    pip install 'fedloom[device]' scikit-learn                  on the device, without
    python examples/train_from_bundle.py b [PUBLIC_KEY]

Trains LoRA on 1,348 handwritten digits and tests on the other 449: accuracy at least 0.95, from
about 0.1 before, in well under a minute. scikit-learn is here only for the digits inside it.
"""

from __future__ import annotations

import sys

import numpy as np
from sklearn.datasets import load_digits

from edge_runtime import Bundle, BundleError, open_bundle, preprocess
from edge_runtime.trainer import OnnxTrainer

EPOCHS = 2
SEED = 0


def digits(bundle: Bundle) -> tuple[dict[str, np.ndarray], dict[str, np.ndarray]]:
    """The device's own data as model inputs: three quarters to train on, the rest to test."""
    values, labels = load_digits(return_X_y=True)
    raw = {
        "images": np.rint(values.reshape(-1, 8, 8) * (255 / 16)).astype(np.uint8),
        "labels": labels.astype(np.int64),
    }
    data = preprocess(bundle.manifest.preprocessing, raw)  # resized and scaled as the job says
    order = np.random.default_rng(SEED).permutation(len(labels))
    train, test = order[: len(order) * 3 // 4 + 1], order[len(order) * 3 // 4 + 1 :]
    return (
        {name: array[train] for name, array in data.items()},
        {name: array[test] for name, array in data.items()},
    )


def main(folder: str, public_key: str | None) -> int:
    """Verify, train, test."""
    try:
        # Every byte against the signed manifest; with a key, only that signer's.
        bundle = open_bundle(folder, public_key=public_key)
    except BundleError as error:
        print(f"refused: {error}", file=sys.stderr)
        return 2
    job = bundle.manifest
    print(f"verified {job.method} on {job.backbone}, signed by {bundle.public_key[:16]}")

    train, test = digits(bundle)
    trainer = OnnxTrainer(bundle)
    tensors = bundle.initial()
    print(f"accuracy before {trainer.evaluate(tensors, test)['accuracy']:.4f}")
    tensors, metrics = trainer.fit(
        tensors, train, learning_rate=job.training.learning_rate, epochs=EPOCHS, seed=SEED
    )
    print(f"trained {job.trainable.size} values, loss {metrics['loss']:.4f}")
    print(f"accuracy {trainer.evaluate(tensors, test)['accuracy']:.4f}")
    return 0


if __name__ == "__main__":
    if len(sys.argv) not in (2, 3):
        sys.exit("usage: python train_from_bundle.py BUNDLE [PUBLIC_KEY]")
    sys.exit(main(sys.argv[1], sys.argv[2] if len(sys.argv) == 3 else None))
