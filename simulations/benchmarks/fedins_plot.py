# SPDX-License-Identifier: Apache-2.0
"""`python -m simulations.benchmarks.fedins_plot docs/fedins.png`: what `fedins_margin` measures,
drawn: how far FedIns is ahead of each other method, by the domains that a client has."""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import mean
from typing import Final

from simulations.benchmarks.fedins import (
    ALONE,
    ARMS,
    MIXED,
    OWN,
    fedins_job,
    margin_figure,
    measured,
)
from simulations.benchmarks.figure import to_table
from simulations.progress import SilentProgress

SEEDS: Final = (0, 1, 2)
DOMAINS_OF: Final = {1: ALONE, 2: "domains:2,dirichlet:0.2", 5: MIXED}


def draw(found: Mapping[tuple[str, str], Sequence[float]], path: Path) -> None:
    """A line a method: its mean over the seeds, and a dot each."""
    from matplotlib.figure import Figure as Canvas

    canvas = Canvas(figsize=(7.2, 3.6), layout="constrained")
    axes = canvas.add_subplot()
    axes.axhline(0.0, color="black", linewidth=0.8)
    for place, name in enumerate(name for name in ARMS if name != OWN):
        colour = f"C{place}"
        gains = {
            domains: [
                100 * (own - other)
                for own, other in zip(found[partition, OWN], found[partition, name], strict=True)
            ]
            for domains, partition in DOMAINS_OF.items()
        }
        axes.plot(
            list(gains), [mean(gain) for gain in gains.values()], color=colour, label=f"over {name}"
        )
        for domains, gain in gains.items():
            # Side by side, so that no dot hides another.
            x = domains + 0.06 * (place - (len(ARMS) - 2) / 2)
            axes.plot([x] * len(gain), gain, "o", color=colour, markersize=4, alpha=0.7)
    axes.set_xticks(list(DOMAINS_OF))
    axes.set_xlabel("domains that a client has, of five")
    axes.set_ylabel(f"points that {OWN} is ahead")
    axes.legend(ncols=len(ARMS) - 1, loc="upper center", bbox_to_anchor=(0.5, 1.15), frameon=False)
    canvas.savefig(path, dpi=150)


def main(path: Path) -> None:
    """Measure, print the figure, draw."""
    found = measured(SilentProgress(), seeds=SEEDS, partitions=tuple(DOMAINS_OF.values()))
    job = fedins_job(ARMS[OWN], MIXED, 0)
    print(to_table([margin_figure(found, job, seeds=len(SEEDS))]))
    draw(found, path)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
