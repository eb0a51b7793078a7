# SPDX-License-Identifier: Apache-2.0
"""A split server under load: many devices at once, and connections that never go on."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from pathlib import Path
from statistics import median
from typing import Final

import numpy as np

from client_sdk.split_body import RemoteBody
from simulations.benchmarks.figure import Figure, figure
from simulations.benchmarks.half_open import KINDS, Held, Kind, half_open
from simulations.benchmarks.split_exact import split_job
from simulations.benchmarks.split_serving import THREADS, Served, made, serving
from simulations.progress import ProgressListener

GONE_S: Final = 30.0


def split_batching_ratio(
    progress: ProgressListener,
    *,
    backbone: Path | None = None,
    clients: int = 16,
    rounds: int = 6,
    rows: int = 4,
    repetitions: int = 5,
) -> Figure:
    """`split_batching_ratio`: messages a second of many clients at once, of one after another."""
    taken: dict[str, list[float]] = {"together": [], "in turns": []}
    with (
        made(split_job(backbone, cut="private" if backbone is None else "1+0")) as job,
        ExitStack() as stack,
    ):
        spec = job.spec
        served = stack.enter_context(serving(job, engine="torch"))
        bodies = [stack.enter_context(served.body(spec, f"c{i}")) for i in range(clients)]
        rng = np.random.default_rng(0)
        hidden = rng.standard_normal((rows, *spec.entering.shape), dtype=np.float32)
        gradient = rng.standard_normal((rows, *spec.leaving.shape), dtype=np.float32)

        def steps(body: RemoteBody) -> None:
            for _ in range(rounds):
                body.forward(hidden, None, keep=True)
                body.backward(gradient)

        def together() -> None:
            with ThreadPoolExecutor(clients) as pool:
                list(pool.map(steps, bodies))

        def in_turns() -> None:
            for body in bodies:
                steps(body)

        for number in range(repetitions + 1):
            progress.stage(f"split: batching {number}/{repetitions}")
            for way, run in (("together", together), ("in turns", in_turns)):
                began = time.perf_counter()
                run()
                if number:
                    taken[way].append(time.perf_counter() - began)
    ratio = median(
        turns / at_once for turns, at_once in zip(taken["in turns"], taken["together"], strict=True)
    )
    rate = clients * rounds / median(taken["together"])
    return figure(
        "split_batching_ratio",
        ratio,
        target=">= 2",
        note=f"{clients} clients, {rows} samples a message, torch body, {THREADS} threads: "
        f"{rate:.0f} steps/s at once",
    )


def slow_loris_p99_ms(
    progress: ProgressListener,
    *,
    backbone: Path | None = None,
    uploads: int = 1_000,
    steps: int = 200,
) -> Figure:
    """`slow_loris_p99_ms`: how much longer the 99th percentile of an honest client's steps takes
    while uploads hang that were begun and never ended."""
    with _honest(backbone, steps) as (served, percentile):
        progress.stage("split: an honest client alone")
        percentile()
        idle = percentile()
        progress.stage(f"split: {uploads} half-open uploads")
        with _hanging(served, uploads, ("upload",)) as held:
            hanging, beside = held.left, percentile()
    return figure(
        "slow_loris_p99_ms",
        beside - idle,
        unit="ms",
        target="<= 50",
        note=f"{idle:.1f} ms alone, {beside:.1f} ms beside {hanging} half-open uploads under TLS",
    )


def half_open_p99_ms(
    progress: ProgressListener,
    *,
    backbone: Path | None = None,
    connections: int = 1_000,
    steps: int = 200,
) -> Figure:
    """`half_open_p99_ms`: as `slow_loris_p99_ms`, beside connections that stop before their first
    message; it holds only where the server has ended all of them within half a minute."""
    with _honest(backbone, steps) as (served, percentile):
        progress.stage("split: an honest client alone")
        percentile()
        idle = percentile()
        progress.stage(f"split: {connections} half-open connections")
        with _hanging(served, connections, KINDS) as held:
            begun, beside = held.left, percentile()
            after = held.left
            gone = held.wait(2 * GONE_S)
    longest = max(map(held.longest, held.opened))
    made = figure(
        "half_open_p99_ms",
        beside - idle,
        unit="ms",
        target="<= 50",
        note=f"{idle:.1f} ms alone, {beside:.1f} ms beside {after} to {begun} connections "
        f"({', '.join(f'{many} {kind}' for kind, many in held.opened.items())}); "
        + (
            f"each gone within {longest:.1f} s, at most {GONE_S:.0f}"
            if gone
            else f"{held.left} are still there after {2 * GONE_S:.0f} s"
        ),
    )
    return made if gone and longest <= GONE_S else replace(made, holds=False)


@contextmanager
def _honest(backbone: Path | None, steps: int) -> Iterator[tuple[Served, Callable[[], float]]]:
    """A server, and what measures an honest client's steps: their 99th percentile in ms."""
    with (
        made(split_job(backbone, cut="private" if backbone is None else "1+0")) as job,
        serving(job, engine="torch") as served,
        served.body(job.spec, "honest") as body,
    ):
        rng = np.random.default_rng(0)
        hidden = rng.standard_normal((4, *job.spec.entering.shape), dtype=np.float32)

        def percentile() -> float:
            seconds = []
            for _ in range(steps):
                began = time.perf_counter()
                left = body.forward(hidden, None, keep=True)
                body.backward(left)
                seconds.append(time.perf_counter() - began)
            return 1000 * float(np.percentile(seconds, 99))

        yield served, percentile


@contextmanager
def _hanging(served: Served, count: int, kinds: Sequence[Kind]) -> Iterator[Held]:
    """Connections of a member's that stop halfway."""
    pair = served.authority.device("mallory")
    root = served.authority.certificate
    with half_open(served.port, root, pair.key, pair.certificate, count=count, kinds=kinds) as held:
        yield held
