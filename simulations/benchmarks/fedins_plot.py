# SPDX-License-Identifier: Apache-2.0
"""`python -m simulations.benchmarks.fedins_plot docs/fedins.png`: what `fedins_margin` measures,
drawn: accuracy of each method where clients have one domain, and where each has all of them."""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import mean

from simulations.benchmarks.fedins import ALONE, ARMS, MIXED, fedins_job, margin_figure, measured
from simulations.benchmarks.figure import to_table
from simulations.progress import SilentProgress

SEEDS = (0, 1, 2)


def draw(found: Mapping[tuple[str, str], Sequence[float]], path: Path) -> None:
    """A group a partition, a stroke at each method's mean, a dot a seed."""
    from matplotlib.figure import Figure as Canvas

    canvas = Canvas(figsize=(7.2, 3.6), layout="constrained")
    axes = canvas.add_subplot()
    names = list(ARMS)
    width = 0.8 / len(names)
    for place, name in enumerate(names):
        for group, partition in enumerate((ALONE, MIXED)):
            values = [100 * value for value in found[partition, name]]
            x = group + (place - (len(names) - 1) / 2) * width
            label = name if group == 0 else None
            half = 0.4 * width
            height = mean(values)
            axes.hlines(height, x - half, x + half, color=f"C{place}", linewidth=4, label=label)
            axes.plot([x] * len(values), values, "o", color="black", markersize=3)
    axes.set_xticks([0, 1], ["one domain a client", "all domains in every client"])
    axes.margins(y=0.2)
    axes.set_ylabel("test accuracy, %")
    axes.legend(ncols=len(names), loc="upper center", bbox_to_anchor=(0.5, 1.15), frameon=False)
    canvas.savefig(path, dpi=150)


def main(path: Path) -> None:
    """Measure, print the figure, draw."""
    found = measured(SilentProgress(), seeds=SEEDS)
    job = fedins_job(ARMS["fedins"], MIXED, 0)
    print(to_table([margin_figure(found, job, seeds=len(SEEDS))]))
    draw(found, path)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
