# SPDX-License-Identifier: Apache-2.0
"""How many clients' tensors become one set: one file a rule, all behind the `Merger` protocol. A
merger takes updates one by one and keeps no update, so its memory does not grow with the number of
clients; it says of itself whether sums are all that it needs, whether its mean is exact and whether
the order of updates matters, and the coordinator refuses combinations that these rule out."""

from __future__ import annotations

from aggregation.mergers.merger import Merged, Merger
from aggregation.mergers.weighted_mean import MeanState, WeightedMean

__all__ = ["MeanState", "Merged", "Merger", "WeightedMean"]
