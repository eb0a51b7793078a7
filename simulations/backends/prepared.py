# SPDX-License-Identifier: Apache-2.0
"""A simulated client's data as model inputs, preprocessed once for all rounds."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Final

import numpy as np

from client_sdk.memory import ClientMemory
from client_sdk.readiness import readiness
from client_sdk.updates import sample_count
from edge_runtime import preprocess
from protocol.manifest import Manifest, Preprocessing
from protocol.readiness import pack_readiness
from protocol.tensors import Tensors
from simulations.clients import ClientData

MEMORY_FOLDER: Final = "memory"
"""Of a run's folder, where clients keep what they keep; not there if the job asks for nothing."""


@dataclass(frozen=True, slots=True, kw_only=True)
class PreparedClient:
    """Model inputs and labels to train on, those held back ({} where there are none), and what the
    client keeps between rounds."""

    id: str
    fit: Mapping[str, np.ndarray]
    held_out: Mapping[str, np.ndarray]
    memory: ClientMemory | None = None


def prepare(
    client: ClientData, preprocessing: Preprocessing, memory: ClientMemory | None = None
) -> PreparedClient:
    """What the client's device would make of its raw arrays."""
    held_out = preprocess(preprocessing, client.held_out) if sample_count(client.held_out) else {}
    fit = preprocess(preprocessing, client.fit)
    return PreparedClient(id=client.id, fit=fit, held_out=held_out, memory=memory)


def readiness_of(manifest: Manifest, fit: Tensors, held_out: Tensors) -> bytes:
    """What a client with such data says when it is asked what it is: `rounds.min_samples` goes by
    it."""
    return pack_readiness(readiness(manifest, sample_count(fit), sample_count(held_out)))
