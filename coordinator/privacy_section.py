# SPDX-License-Identifier: Apache-2.0
"""`[privacy]` of a job file."""

from __future__ import annotations

from dataclasses import dataclass

from aggregation.secure_aggregation.context import Terms
from coordinator.sections import _check, _key


@dataclass(frozen=True, slots=True, kw_only=True)
class PrivacySection:
    """`[privacy]`"""

    secure_aggregation: bool = _key(
        False, "the server sees only the sum of a round's updates, never a single one"
    )
    min_survivors: int = _key(
        3, "secure sums: clients below which nothing is opened", low=3, high=65_536
    )
    corrupt: float = _key(
        0.1, "secure sums: largest share of clients that may help the server", low=0, below=1
    )
    dropouts: float = _key(
        0.3, "secure sums: largest share of clients that may be lost on the way", low=0, below=1
    )

    @property
    def terms(self) -> Terms | None:
        """Of secure sums; None where there are none."""
        if not self.secure_aggregation:
            return None
        return Terms(corrupt=self.corrupt, dropouts=self.dropouts, min_survivors=self.min_survivors)

    def __post_init__(self) -> None:
        _check(self, "privacy")
