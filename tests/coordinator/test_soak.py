# SPDX-License-Identifier: Apache-2.0
"""`soak_growth_mb`: a process that plays many rounds is as large after them as before."""

from __future__ import annotations

import gc
import itertools
import os
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytest.importorskip("flwr")

from client_sdk.outbox import Outbox, answer_once
from coordinator.flower_link import FlowerLink
from coordinator.job import Job
from coordinator.journal import Journal
from coordinator.rounds import run_rounds
from coordinator.sections import DataSection, RoundsSection, UpdateSection
from protocol.tensors import ParamSpec
from simulations.grid import InProcessGrid

CLIENTS = tuple(f"c{number}" for number in range(10))
MIB = 1 << 20


@dataclass(frozen=True)
class Size:
    """Of this process."""

    mib: float
    descriptors: int
    threads: int

    @classmethod
    def now(cls) -> Size:
        gc.collect()
        pages = int(Path("/proc/self/statm").read_text().split()[1])
        return cls(
            mib=pages * os.sysconf("SC_PAGE_SIZE") / MIB,
            descriptors=len(os.listdir("/proc/self/fd")),
            threads=len(os.listdir("/proc/self/task")),
        )


def soaked(folder: Path, make_link: Callable[..., Any], *, marks: tuple[int, ...]) -> list[Size]:
    """The process at each of some rounds, the last of which ends the job."""
    job = Job(
        data=DataSection(clients=len(CLIENTS), held_out=0.25),
        rounds=RoundsSection(count=marks[-1], clients_per_round=8, evaluate_every=10),
        update=UpdateSection(codec="one-bit", error_feedback=True),
    )
    # An update that leaks is to be seen: 8 a round of 16 KiB and more of tensors are 13 MiB in 100.
    initial = {"w": np.linspace(-1, 1, 4096, dtype=np.float32).reshape(64, 64)}
    clients = make_link(job, CLIENTS, memory=folder / "memory", initial=initial)

    def serve(asked: list[tuple[str, str, bytes]]) -> Iterable[tuple[str, bytes | Exception]]:
        for client, _, plan in asked:
            outbox = Outbox(folder / "outboxes" / client)
            answer = lambda blob, client=client: clients._answer(client, blob)  # noqa: E731
            yield client, answer_once(plan, outbox, answer)

    sizes: list[Size] = []

    def look(report: Any) -> None:
        assert report.updates == 8 and not report.rejections
        if report.round in marks:
            sizes.append(Size.now())

    link = FlowerLink(InProcessGrid(CLIENTS, serve), clients=len(CLIENTS))
    with Journal(folder / "journal", keep_answers=True) as journal:
        run_rounds(
            job, ParamSpec.of(initial), initial, link, journal, look,
            lambda tensors, offset: {"loss": 0.0},
        )  # fmt: skip
    return sizes


def require_flat(
    sizes: list[Size], marks: tuple[int, ...], say: Callable[[str, object], None]
) -> None:
    rounds = marks[-1] - marks[0]
    growth = (sizes[-1].mib - sizes[0].mib) * 100 / rounds
    say("soak_growth_mb", growth)
    print(f"soak_growth_mb: {growth:.2f} MiB in 100 rounds, of {sizes}")
    assert len({(size.descriptors, size.threads) for size in sizes}) == 1, sizes
    # Whatever is the allocator's own is there after the first rounds.
    assert sizes[-1].mib - sizes[0].mib <= max(1.0, rounds / 100), sizes


def test_a_coordinator_is_as_large_after_many_rounds(
    tmp_path: Path, make_link: Any, record_property: Callable[[str, object], None]
) -> None:
    marks = (20, 40, 60)
    require_flat(soaked(tmp_path, make_link, marks=marks), marks, record_property)


@pytest.mark.long
def test_a_coordinator_is_as_large_after_three_hundred_rounds(
    tmp_path: Path, make_link: Any, record_property: Callable[[str, object], None]
) -> None:
    marks = (100, 200, 300)
    sizes = soaked(tmp_path, make_link, marks=marks)
    require_flat(sizes, marks, record_property)
    for before, after in itertools.pairwise(sizes):
        assert after.mib - before.mib <= 1.0, sizes
