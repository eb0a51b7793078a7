# SPDX-License-Identifier: Apache-2.0
"""How updates travel, combine and stay private, in numpy alone: codecs turn named tensors into
bytes, mergers turn many clients' tensors into one set, server optimizers turn the merged change
into the next round's tensors. Everything is a pure function over explicit state: arguments are
never written to, and the same updates in the same order give the same bits."""

from __future__ import annotations

from aggregation.codecs import CODEC_NAMES, Codec, Float16, Float32, OneBit, Seeds, codec_named
from aggregation.errors import (
    AggregationError,
    CodecError,
    MergeError,
    PayloadMalformedError,
    PayloadNotFiniteError,
    PayloadTooLongError,
    PayloadTruncatedError,
    SpecMismatchError,
    UnknownCodecError,
)
from aggregation.mergers import MeanState, Merged, Merger, WeightedMean
from aggregation.server_optimizers import Averaging, FedAdam, ServerOptimizer, ServerState

__all__ = [
    "CODEC_NAMES",
    "AggregationError",
    "Averaging",
    "Codec",
    "CodecError",
    "FedAdam",
    "Float16",
    "Float32",
    "MeanState",
    "MergeError",
    "Merged",
    "Merger",
    "OneBit",
    "PayloadMalformedError",
    "PayloadNotFiniteError",
    "PayloadTooLongError",
    "PayloadTruncatedError",
    "Seeds",
    "ServerOptimizer",
    "ServerState",
    "SpecMismatchError",
    "UnknownCodecError",
    "WeightedMean",
    "codec_named",
]
