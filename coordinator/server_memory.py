# SPDX-License-Identifier: Apache-2.0
"""What the server remembers between rounds beside the tensors, as named arrays for the journal."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, fields, replace

import numpy as np

from aggregation.mergers import BaseChange
from aggregation.offsets import arrays_of, changes_of
from coordinator.offsets import Offsets


@dataclass(frozen=True, slots=True, kw_only=True)
class ServerMemory:
    """Each part by the names that its owner gives."""

    optimizer: Mapping[str, np.ndarray] = field(default_factory=dict)
    merger: Mapping[str, np.ndarray] = field(default_factory=dict)
    downlink: Mapping[str, np.ndarray] = field(default_factory=dict)
    """What clients hold that took part in the last round; {} where plans hold whole tensors."""
    offset: Mapping[str, np.ndarray] = field(default_factory=dict)
    """How far frozen weights had moved for those clients."""
    privacy: Mapping[str, np.ndarray] = field(default_factory=dict)
    """The clipping norm of the next round, where it is steered."""
    change: Mapping[str, np.ndarray] = field(default_factory=dict)
    """How they moved since, as `aggregation.offsets.arrays_of` writes it."""

    @property
    def offsets(self) -> Offsets:
        """The last two together."""
        return Offsets(held=self.offset, change=changes_of(self.change))

    def moved(self, change: Mapping[str, BaseChange]) -> ServerMemory:
        """After plans have gone out, and `change` of frozen weights came of them."""
        after = self.offsets.after(change)
        return replace(self, offset=after.held, change=arrays_of(after.change))

    def joined(self) -> dict[str, np.ndarray]:
        """All of it under `part/name`."""
        return {
            f"{part.name}/{name}": array
            for part in fields(self)
            for name, array in getattr(self, part.name).items()
        }

    @classmethod
    def parted(cls, arrays: Mapping[str, np.ndarray]) -> ServerMemory:
        """The inverse of `joined`."""
        parts: dict[str, dict[str, np.ndarray]] = {part.name: {} for part in fields(cls)}
        for key, array in arrays.items():
            part, _, name = key.partition("/")
            parts[part][name] = array
        return cls(**parts)
