# SPDX-License-Identifier: Apache-2.0
"""Differential privacy of clients' updates: clipping, noise from secret seeds, and accounting. The
noise is the server's on a sum (`gaussian`), the clients' in shares (`distributed_gaussian`) or each
client's own (`local_gaussian`), always discrete, on a grid; `accountant` says what a series of
releases costs and refuses what a budget does not cover. Everything raises PrivacyError rather than
do less than it was asked for."""

from __future__ import annotations

from aggregation.privacy.accountant import (
    FixedRound,
    Ledger,
    Mechanism,
    PoissonRound,
    Spent,
    calibrated,
    epsilon_of,
    rounds_within,
    spent,
)
from aggregation.privacy.clipping import Clipped, clip, l2_norm
from aggregation.privacy.gaussian import Noise, in_steps, noised_mean
from aggregation.privacy.keystream import Keystream, new_seed

__all__ = [
    "Clipped",
    "FixedRound",
    "Keystream",
    "Ledger",
    "Mechanism",
    "Noise",
    "PoissonRound",
    "Spent",
    "calibrated",
    "clip",
    "epsilon_of",
    "in_steps",
    "l2_norm",
    "new_seed",
    "noised_mean",
    "rounds_within",
    "spent",
]
