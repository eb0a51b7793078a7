# SPDX-License-Identifier: Apache-2.0
"""What a job promises about single samples: example-level differential privacy of every client.

A device refuses work that goes beyond it: a round of more steps, more rounds in all, or fewer
samples than the promise was accounted for. What the promise is worth, epsilon at a delta, is the
coordinator's to compute and to show (`coordinator.example_accounting`).
"""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Any

from protocol import _checks
from protocol.errors import ManifestError
from protocol.limits import MAX_ROUND, MAX_SAMPLES, MAX_STEPS


@dataclass(frozen=True, slots=True, kw_only=True)
class ExamplePrivacy:
    """Settings of DP-SGD. One step draws each sample with probability batch size / samples."""

    noise_multiplier: float
    """z: the noise on a step's sum has the standard deviation z times `clip`; above 0."""
    clip: float
    """C: largest L2 norm of what a sample adds to a step's sum, over all trained tensors; above
    0."""
    fewest_samples: int
    """A client with fewer takes no part; at least the batch size."""
    steps: int
    """Steps of every client in every round, exactly."""
    rounds: int
    """Rounds in which a client takes part at most."""

    def __post_init__(self) -> None:
        error = ManifestError
        for name in ("noise_multiplier", "clip"):
            value = _checks.real(f"privacy.{name}", getattr(self, name), error, low=0.0)
            if value == 0:
                raise error(f"privacy.{name}: expected above 0, found 0")
            object.__setattr__(self, name, value)
        _checks.integer("privacy.fewest_samples", self.fewest_samples, 1, MAX_SAMPLES, error)
        _checks.integer("privacy.steps", self.steps, 1, MAX_STEPS, error)
        _checks.integer("privacy.rounds", self.rounds, 1, MAX_ROUND, error)

    @property
    def most_steps(self) -> int:
        """Steps of one client in the whole job, at most."""
        return self.steps * self.rounds

    def to_json(self) -> dict[str, Any]:
        """By field."""
        return {name: getattr(self, name) for name in _FIELDS}

    @classmethod
    def from_json(cls, value: object) -> ExamplePrivacy:
        """The inverse of `to_json`. Raises: ManifestError for anything else."""
        return cls(**_checks.keys("training.privacy", value, _FIELDS, ManifestError))


_FIELDS = tuple(item.name for item in fields(ExamplePrivacy))
