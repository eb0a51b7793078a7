# SPDX-License-Identifier: Apache-2.0
"""What runs on a device, in numpy and onnxruntime alone: open a signed bundle, turn the device's
own data into model inputs, plan the batches, and train, evaluate and predict with the bundle's
compiled graphs. No code comes with a bundle; what differs by one byte from what the coordinator
signed is refused before any of it is loaded. onnxruntime is imported with the first graph."""

from __future__ import annotations

from edge_runtime.adapter import Adapter, mixed, read_adapter, write_adapter
from edge_runtime.batches import batch_plan, evaluation_plan
from edge_runtime.bundle import Bundle, open_bundle
from edge_runtime.errors import (
    AdapterError,
    BundleContentError,
    BundleError,
    BundleFormatError,
    BundleMissingError,
    BundlePathError,
    BundleSignatureError,
    DataError,
    EdgeError,
    PredictionError,
    TrainingError,
)
from edge_runtime.predictor import Prediction, Predictor
from edge_runtime.preprocessing import apply as preprocess
from edge_runtime.private_batches import PrivateBatches, private_batches

__all__ = [
    "Adapter",
    "AdapterError",
    "Bundle",
    "BundleContentError",
    "BundleError",
    "BundleFormatError",
    "BundleMissingError",
    "BundlePathError",
    "BundleSignatureError",
    "DataError",
    "EdgeError",
    "Prediction",
    "PredictionError",
    "Predictor",
    "PrivateBatches",
    "TrainingError",
    "batch_plan",
    "evaluation_plan",
    "mixed",
    "open_bundle",
    "preprocess",
    "private_batches",
    "read_adapter",
    "write_adapter",
]
