# SPDX-License-Identifier: Apache-2.0
"""What a job promises about a client's updates, where clients add the noise themselves.

A device refuses plans that go beyond it: another norm, less noise, more rounds. What the promise is
worth, epsilon at a delta, follows from these numbers and is the coordinator's to say.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass, fields
from typing import Any

from protocol import _checks
from protocol.errors import ManifestError
from protocol.limits import MAX_ROUND


@dataclass(frozen=True, slots=True, kw_only=True)
class ClientNoise:
    """Of each update, or of each client's part in a sum."""

    multiplier: float  # deviation of the noise on each value, in `clip`s
    clip: float  # l2 norm that an update is cut to
    rounds: int  # most updates of one client
    fewest: int = 0  # survivors of a secure sum; 0: updates are sent one by one

    def __post_init__(self) -> None:
        for name in ("multiplier", "clip"):
            value = _checks.real(f"noise.{name}", getattr(self, name), ManifestError, low=0.0)
            if not value:
                raise ManifestError(f"noise.{name}: expected a number above 0, found 0")
            object.__setattr__(self, name, value)
        _checks.integer("noise.rounds", self.rounds, 1, MAX_ROUND, ManifestError)
        _checks.integer("noise.fewest", self.fewest, 0, MAX_ROUND, ManifestError)

    def to_json(self) -> dict[str, Any]:
        """By field."""
        return asdict(self)

    @classmethod
    def from_json(cls, value: object) -> ClientNoise:
        """The inverse of `to_json`. Raises: ManifestError for anything else."""
        return cls(**_checks.keys("noise", value, _FIELDS, ManifestError))


_FIELDS = tuple(item.name for item in fields(ClientNoise))
