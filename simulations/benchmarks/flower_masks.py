# SPDX-License-Identifier: Apache-2.0
"""Masks beside those of Flower's SecAgg+, which have 32 bits of seed and come from MT19937."""

from __future__ import annotations

import secrets
import time
from dataclasses import dataclass
from statistics import median
from typing import Final

import numpy as np

from aggregation.packing import word_type
from aggregation.secure_aggregation.masks import add_mask
from simulations.benchmarks.figure import Figure, figure

FLOWER_BITS: Final = 32  # of the modulus that Flower's workflow has when it is told nothing else


def mask_vs_flower(*, values: int, bits: int, repetitions: int = 15) -> list[Figure]:
    """`mask_vs_flower`: seconds of Flower's generator over ours, for a vector modulo 2^`bits`.

    Ours is drawn and added to a vector that lies in memory; Flower's is only drawn. Beside it,
    without a target, `mask_vs_flower_32` is the same modulo 2³², and its note says what Flower
    takes with its own addition.
    """
    asked, wide = (_measured(values, each, repetitions) for each in (bits, FLOWER_BITS))
    return [
        figure(
            "mask_vs_flower",
            asked.flower / asked.ours,
            target=">= 4",
            note=f"{values} values modulo 2**{bits}: {asked}",
        ),
        figure(
            "mask_vs_flower_32",
            wide.flower / wide.ours,
            note=f"{values} values modulo 2**{FLOWER_BITS}, as Flower's workflow comes: {wide}",
        ),
    ]


@dataclass(frozen=True, slots=True)
class _Seconds:
    ours: float  # drawn and added
    flower: float  # drawn
    flower_added: float  # drawn and added

    def __str__(self) -> str:
        return (
            f"{1e3 * self.ours:.2f} ms drawn and added, Flower's {1e3 * self.flower:.2f} ms drawn, "
            f"{1e3 * self.flower_added:.2f} ms drawn and added"
        )


def _measured(values: int, bits: int, repetitions: int) -> _Seconds:
    from flwr.common.secure_aggregation.ndarrays_arithmetic import parameters_addition
    from flwr.common.secure_aggregation.secaggplus_utils import pseudo_rand_gen

    vector, flowers = np.ones(values, word_type(bits)), [np.ones(values, np.int64)]
    taken: list[tuple[float, float, float]] = []
    for _ in range(repetitions):
        key = secrets.token_bytes(32)
        times = [time.perf_counter()]
        add_mask(vector, key)
        times.append(time.perf_counter())
        drawn = pseudo_rand_gen(key, 1 << bits, [(values,)])
        times.append(time.perf_counter())
        parameters_addition(flowers, drawn)
        times.append(time.perf_counter())
        taken.append((times[1] - times[0], times[2] - times[1], times[3] - times[1]))
    return _Seconds(*(median(column) for column in zip(*taken, strict=True)))
