# SPDX-License-Identifier: Apache-2.0
"""The 1,797 handwritten 8×8 digits that ship inside scikit-learn."""

from __future__ import annotations

import numpy as np

from simulations.datasets.dataset import Dataset, stratified_split, take
from simulations.errors import DataError

TEST_FRACTION = 0.25
# Not the run's seed: accuracies of different runs are measured on the same test images.
SPLIT_SEED = 1797


def load_digits_dataset() -> Dataset:
    """Digits with a fixed stratified quarter as the test set; grey levels 0..16 become 0..255."""
    try:
        from sklearn.datasets import load_digits
    except ImportError as error:
        raise DataError(
            "digits: expected scikit-learn, whose package holds the images; "
            "install it with: pip install scikit-learn"
        ) from error
    raw, labels = load_digits(return_X_y=True)
    every = {
        "images": np.rint(raw.reshape(-1, 8, 8) * (255 / 16)).astype(np.uint8),
        "labels": labels.astype(np.int64),
    }
    train, test = stratified_split(
        every["labels"], TEST_FRACTION, np.random.default_rng(SPLIT_SEED)
    )
    return Dataset(
        name="digits",
        kind="image",
        train=take(every, train),
        test=take(every, test),
        class_names=tuple(str(digit) for digit in range(10)),
    )
