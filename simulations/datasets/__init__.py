# SPDX-License-Identifier: Apache-2.0
"""Data sets as named raw arrays: those that need no network (digits, Fashion-MNIST, Debian's
package descriptions), any folder of IDX files, images or jsonl, and the domain shifts of images.
A model's own preprocessing comes later, in `edge_runtime.preprocessing`."""

from __future__ import annotations

from simulations.datasets.dataset import Dataset
from simulations.datasets.loading import DATASET_NAMES, load_dataset
from simulations.datasets.text import tokenise

__all__ = ["DATASET_NAMES", "Dataset", "load_dataset", "tokenise"]
