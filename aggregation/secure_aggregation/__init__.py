# SPDX-License-Identifier: Apache-2.0
"""Summing vectors that the server cannot read one by one: pairwise masks over integers that cancel
in the sum, and the shares that repair it when clients drop out. Pure and without a transport:
`client.advance` and `server.receive`, `server.close_stage` turn states and messages into states and
messages. What is put into the vectors, and what the sum means, is decided elsewhere; only mergers
that say `sum_only` of themselves can work from it. docs/secure-aggregation.md tells the rest."""

from __future__ import annotations

from aggregation.packing import MAX_BITS, word_type
from aggregation.secure_aggregation.client import advance, wants_values
from aggregation.secure_aggregation.client_bytes import from_bytes, to_bytes
from aggregation.secure_aggregation.client_states import ClientState, Device
from aggregation.secure_aggregation.context import Context, Task, Terms, new_context
from aggregation.secure_aggregation.graph import MIN_CLIENTS, Shape, shape
from aggregation.secure_aggregation.keys import Signer, Verifier
from aggregation.secure_aggregation.outcomes import Aborted, Fault, Reason, Refusal
from aggregation.secure_aggregation.server import close_stage, open_attempt, receive
from aggregation.secure_aggregation.server_state import SecureSum, ServerState, Stage

__all__ = [
    "MAX_BITS",
    "MIN_CLIENTS",
    "Aborted",
    "ClientState",
    "Context",
    "Device",
    "Fault",
    "Reason",
    "Refusal",
    "SecureSum",
    "ServerState",
    "Shape",
    "Signer",
    "Stage",
    "Task",
    "Terms",
    "Verifier",
    "advance",
    "close_stage",
    "from_bytes",
    "new_context",
    "open_attempt",
    "receive",
    "shape",
    "to_bytes",
    "wants_values",
    "word_type",
]
