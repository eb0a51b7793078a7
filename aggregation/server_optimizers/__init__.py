# SPDX-License-Identifier: Apache-2.0
"""What the server does with a merged change: one file an optimizer, all behind the
`ServerOptimizer` protocol. An optimizer sees the current tensors and the mean change of a round and
gives the next tensors; what it remembers between rounds is a state that the journal can keep."""

from __future__ import annotations

from aggregation.server_optimizers.adagrad import FedAdagrad
from aggregation.server_optimizers.adam import FedAdam
from aggregation.server_optimizers.averaging import Averaging
from aggregation.server_optimizers.avg_momentum import FedAvgM
from aggregation.server_optimizers.server_optimizer import ServerOptimizer, ServerState
from aggregation.server_optimizers.yogi import FedYogi

__all__ = [
    "Averaging",
    "FedAdagrad",
    "FedAdam",
    "FedAvgM",
    "FedYogi",
    "ServerOptimizer",
    "ServerState",
]
