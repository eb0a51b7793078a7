# SPDX-License-Identifier: Apache-2.0
"""`fedloom bench aggregation`: what mergers get right, how fast they are, and under attack."""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import dataclass
from statistics import median
from typing import Any, Final

import numpy as np

from aggregation.mergers import (
    CoreTriple,
    FedExLoRA,
    FFALoRA,
    FlexLoRA,
    FLoRA,
    LoRASB,
    Merged,
    Merger,
    RoLoRA,
)
from aggregation.selection import merger_named
from protocol.factors import FactorPair
from protocol.tensors import ParamSpec, Tensors
from simulations.benchmarks.attacks import attack_worst_accuracy
from simulations.benchmarks.figure import Figure, figure
from simulations.benchmarks.runs import labelled
from simulations.progress import ProgressListener

OUT, IN, RANK, SCALE = 192, 128, 16, 2.0
CLIENTS: Final = 20
RANKS: Final = (4, 8, 16)
PAIR: Final = FactorPair(down="q.down", up="q.up", scale=SCALE)
SHOWN: Final = ("weighted-mean", "flexlora", "median", "krum", "geometric-median", "ties")


def figures(progress: ProgressListener, *, quick: bool = False) -> list[Figure]:
    """All of them. `quick` takes fewer updates, seeds and attacks, and says so."""
    progress.stage("aggregation: exact mergers")
    found = [exact_merge_error()]
    progress.stage("aggregation: throughput")
    found.append(merge_vs_copy(progress, updates=50 if quick else 1000))
    found.append(attack_worst_accuracy(progress, quick=quick))
    return labelled(found) if quick else found


def exact_merge_error() -> Figure:
    """`exact_merge_error`: the largest relative error of ΔW over all mergers that say exact."""
    pairs = (PAIR,)
    cases: dict[str, tuple[Merger[Any], tuple[int, ...], bool, bool]] = {
        # merger, ranks of clients in turn, whether A moves, whether B moves
        "ffa-lora": (FFALoRA(pairs=pairs), (RANK,), False, True),
        "rolora": (RoLoRA(pairs=pairs), (RANK,), False, True),
        "flora": (FLoRA(pairs=pairs), (RANK,), True, True),
        "flora, mixed ranks": (FLoRA(pairs=pairs), RANKS, True, True),
        "fedex-lora": (FedExLoRA(pairs=pairs), (RANK,), True, True),
        "fedex-lora, mixed ranks": (FedExLoRA(pairs=pairs), RANKS, True, True),
    }
    errors = {
        name: _relative_error(merger, _clients(ranks, down, up))[0]
        for name, (merger, ranks, down, up) in cases.items()
    }
    errors["lora-sb"] = _core_error()
    lost = {
        name: _relative_error(FlexLoRA(pairs=pairs), _clients(ranks, True, True))[0]
        for name, ranks in (("", (RANK,)), (" mixed ranks", RANKS))
    }
    worst = max(errors, key=lambda name: errors[name])
    truncated = ", ".join(f"flexlora{name} {error:.3f}" for name, error in lost.items())
    return figure(
        "exact_merge_error",
        errors[worst],
        target="<= 1e-5",
        note=f"largest: {worst}, of {len(errors)}; {CLIENTS} clients, ΔW [{OUT}, {IN}] at rank "
        f"{RANK}; lost by truncation to that rank: {truncated}",
    )


@dataclass(frozen=True, slots=True)
class _Client:
    rank: int
    weight: float
    down: np.ndarray  # what training added, [rank, IN]
    up: np.ndarray  # [OUT, rank]


def _current() -> dict[str, np.ndarray]:
    rng = np.random.default_rng(0)
    return {
        PAIR.down: rng.standard_normal((RANK, IN)).astype(np.float32) / IN**0.5,
        PAIR.up: rng.standard_normal((OUT, RANK)).astype(np.float32) / 10,
    }


def _clients(ranks: tuple[int, ...], down: bool, up: bool) -> list[_Client]:
    rng = np.random.default_rng(1)
    made = []
    for number in range(CLIENTS):
        rank = ranks[number % len(ranks)]
        moves = [
            moving * rng.standard_normal(shape).astype(np.float32) / 10
            for moving, shape in ((down, (rank, IN)), (up, (OUT, rank)))
        ]
        made.append(_Client(rank, float(rng.integers(10, 500)), *moves))
    return made


def _relative_error(merger: Merger[Any], clients: list[_Client]) -> tuple[float, Merged]:
    """Frobenius norm of what is off, over that of the clients' dense mean; both in float64."""
    current = _current()
    state = merger.init(ParamSpec.of(current), current=current)
    total = sum(client.weight for client in clients)
    target = np.zeros((OUT, IN))
    for client in clients:
        update = {PAIR.down: client.down, PAIR.up: client.up}
        state = merger.add(state, update, client.weight)
        down = current[PAIR.down][: client.rank].astype(np.float64) + client.down
        up = current[PAIR.up][:, : client.rank].astype(np.float64) + client.up
        target += client.weight / total * SCALE * up @ down
    merged = merger.finish(state)
    after = {name: current[name].astype(np.float64) + merged.delta[name] for name in current}
    found = SCALE * after[PAIR.up] @ after[PAIR.down]
    if PAIR.down in merged.base:
        found = found + merged.base[PAIR.down].product()
    return float(np.linalg.norm(found - target) / np.linalg.norm(target)), merged


def _core_error() -> float:
    """LoRA-SB: B and A are frozen and alike, so that the mean of the cores is exact."""
    rng = np.random.default_rng(2)
    current = _current() | {"q.core": np.zeros((RANK, RANK), np.float32)}
    merger = LoRASB(triples=(CoreTriple(down=PAIR.down, core="q.core", up=PAIR.up, scale=SCALE),))
    state = merger.init(ParamSpec.of(current), current=current)
    total, target = 0.0, np.zeros((OUT, IN))
    up, down = (current[name].astype(np.float64) for name in (PAIR.up, PAIR.down))
    for _ in range(CLIENTS):
        core = rng.standard_normal((RANK, RANK)).astype(np.float32)
        weight = float(rng.integers(10, 500))
        still = {name: np.zeros_like(current[name]) for name in (PAIR.down, PAIR.up)}
        state = merger.add(state, {"q.core": core, **still}, weight)
        target += weight * SCALE * up @ core @ down
        total += weight
    found = SCALE * up @ merger.finish(state).delta["q.core"].astype(np.float64) @ down
    return float(np.linalg.norm(found - target / total) / np.linalg.norm(target / total))


def merge_vs_copy(
    progress: ProgressListener, *, updates: int = 1000, values: int = 1_000_000
) -> Figure:
    """`merge_vs_copy`: bytes of updates merged a second, over bytes copied a second.

    The copy is of one update's bytes, out of and into memory larger than any cache.
    """
    spec, pairs = _large_spec(values)
    held = [_large_update(spec, seed) for seed in range(8)]
    copied = _copy_rate(spec.nbytes)
    rates: dict[str, float] = {}
    for name in SHOWN:
        progress.stage(f"aggregation: {name}")
        # Rules that see all updates at once take a round of 50; the mean takes all of them.
        count = updates if name == "weighted-mean" else min(updates, 50)
        merger = merger_named(name, pairs)
        rates[name] = count * spec.nbytes / _merge_seconds(merger, spec, held, count)
    others = ", ".join(f"{name} {rates[name] / copied:.3f}" for name in SHOWN[1:])
    return figure(
        "merge_vs_copy",
        rates["weighted-mean"] / copied,
        target=">= 0.5",
        note=f"weighted mean of {updates} updates of {spec.size} values at "
        f"{rates['weighted-mean'] / 1e9:.1f} GB/s, copying at {copied / 1e9:.1f} GB/s; of 50 "
        f"updates: {others}",
    )


def _large_spec(values: int) -> tuple[ParamSpec, tuple[FactorPair, ...]]:
    side, rank = 1024, 8
    layers = max(1, values // (2 * side * rank))
    tensors = {}
    for number in range(layers):
        tensors[f"layers.{number:03d}.down"] = np.zeros((rank, side), np.float32)
        tensors[f"layers.{number:03d}.up"] = np.zeros((side, rank), np.float32)
    pairs = tuple(
        FactorPair(down=f"layers.{n:03d}.down", up=f"layers.{n:03d}.up", scale=2.0)
        for n in range(layers)
    )
    return ParamSpec.of(tensors), pairs


def _large_update(spec: ParamSpec, seed: int) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(seed)
    return {
        name: rng.standard_normal(entry.shape, np.float32) / 100 for name, entry in spec.entries
    }


def _merge_seconds(merger: Merger[Any], spec: ParamSpec, held: list[Tensors], count: int) -> float:
    started = time.perf_counter()
    state = merger.init(spec, current=held[0])
    for number in range(count):
        state = merger.add(state, held[number % len(held)], 1.0 + number % 7, client=str(number))
    merger.finish(state)
    return time.perf_counter() - started


def _copy_rate(nbytes: int, *, repetitions: int = 7) -> float:
    """Bytes a second, the median over passes through 256 MB."""
    many = max(2, 256 * 2**20 // nbytes)
    source = np.ones((many, nbytes), np.uint8)
    target = np.zeros_like(source)

    def passes() -> Iterator[float]:
        for _ in range(repetitions):
            started = time.perf_counter()
            for row in range(many):
                np.copyto(target[row], source[row])
            yield time.perf_counter() - started

    return many * nbytes / median(passes())
