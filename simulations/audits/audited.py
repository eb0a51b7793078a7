# SPDX-License-Identifier: Apache-2.0
"""What an audit hands back: figures, and how to draw them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from simulations.benchmarks.figure import Figure


@dataclass(frozen=True, slots=True, kw_only=True)
class Audited:
    """One audit's figures, and its plot."""

    figures: tuple[Figure, ...]
    draw: Callable[[Path], None]
    """Writes the plot to a file; matplotlib is loaded by then and not before."""
