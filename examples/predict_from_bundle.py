# SPDX-License-Identifier: Apache-2.0
"""Predict on a device, and switch adapters without loading the backbone again.

    fedloom simulate examples/digits-lora.toml --out runs/a     somewhere with torch
    pip install 'fedloom[device]' scikit-learn                  on the device, without
    python examples/predict_from_bundle.py runs/a

Predicts 449 handwritten digits before and after the run's training: accuracy at least 0.90 with the
run's adapter, about 0.1 without. scikit-learn is here only for the digits inside it.
"""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
from sklearn.datasets import load_digits

from edge_runtime import Adapter, Predictor, open_bundle, read_adapter


def main(run: Path) -> None:
    """The initial adapter, then the run's, on one loaded backbone."""
    bundle = open_bundle(run / "bundle", public_key=None)  # or the key that must have signed it
    predictor = Predictor(bundle)
    values, labels = load_digits(return_X_y=True)
    images = np.rint(values[-449:].reshape(-1, 8, 8) * (255 / 16)).astype(np.uint8)

    adapters = {
        "before": Adapter(tensors=bundle.initial()),
        "after": read_adapter(run / "adapter", bundle),  # refused if of another backbone
    }
    for name, adapter in adapters.items():
        predictor.use(adapter)
        found = predictor.predict(images)
        print(f"accuracy {name} {np.mean(found.classes == labels[-449:]):.4f}")
    print(f"the last one is {found.names[-1]}, at {found.probabilities[-1].max():.2f}")


if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit("usage: python predict_from_bundle.py RUN")
    main(Path(sys.argv[1]))
