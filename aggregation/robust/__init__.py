# SPDX-License-Identifier: Apache-2.0
"""Merging rules for federations in which some clients may lie: medians, trimmed means, norm bounds
and rules that compare updates with one another. They stand behind the `Merger` protocol, weigh all
clients alike (an attacker chooses the sample count that it claims) and say of themselves that sums
are not all they need, which keeps them apart from secure aggregation; but for
`masked_geometric_median`, which sums what clients make of their updates themselves.

On LoRA they see A and B side by side, as one vector. That is robust in the factors, not in their
product: two updates that lie close in A and in B may lie far apart in B·A. Freeze A
(`aggregation.factors = "up"`) and the product is linear in what is merged."""

from __future__ import annotations

from aggregation.robust.bulyan import Bulyan
from aggregation.robust.centred_clipping import CentredClipping
from aggregation.robust.coordinate_median import CoordinateMedian
from aggregation.robust.foolsgold import FoolsGold
from aggregation.robust.geometric_median import GeometricMedian
from aggregation.robust.krum import Krum
from aggregation.robust.masked_geometric_median import MaskedGeometricMedian
from aggregation.robust.multi_krum import MultiKrum
from aggregation.robust.norm_bound import NormBound
from aggregation.robust.trimmed_mean import TrimmedMean

__all__ = [
    "Bulyan",
    "CentredClipping",
    "CoordinateMedian",
    "FoolsGold",
    "GeometricMedian",
    "Krum",
    "MaskedGeometricMedian",
    "MultiKrum",
    "NormBound",
    "TrimmedMean",
]
