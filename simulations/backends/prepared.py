# SPDX-License-Identifier: Apache-2.0
"""A simulated client's data as model inputs, preprocessed once for all rounds."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from client_sdk.updates import sample_count
from edge_runtime import preprocess
from protocol.manifest import Preprocessing
from simulations.clients import ClientData


@dataclass(frozen=True, slots=True, kw_only=True)
class PreparedClient:
    """Model inputs and labels to train on, and those held back ({} where there are none)."""

    id: str
    fit: Mapping[str, np.ndarray]
    held_out: Mapping[str, np.ndarray]


def prepare(client: ClientData, preprocessing: Preprocessing) -> PreparedClient:
    """What the client's device would make of its raw arrays."""
    held_out = preprocess(preprocessing, client.held_out) if sample_count(client.held_out) else {}
    return PreparedClient(
        id=client.id, fit=preprocess(preprocessing, client.fit), held_out=held_out
    )
