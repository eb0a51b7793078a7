# SPDX-License-Identifier: Apache-2.0
"""How fast a deployment's journal takes answers and rounds, each on the disk before it counts."""

from __future__ import annotations

import secrets
import tempfile
import time
from pathlib import Path
from statistics import median

import numpy as np

from coordinator.journal import Journal, UpdateEntry
from simulations.benchmarks.figure import Figure, figure
from simulations.progress import ProgressListener


def journal_commits(
    progress: ProgressListener,
    *,
    rounds: int = 10,
    clients: int = 20,
    answer_bytes: int = 100_000,
) -> list[Figure]:
    """`journal_answers_per_s` and `journal_round_ms`, of rounds with so many answers."""
    progress.stage("journal: answers and rounds")
    rng = np.random.default_rng(0)
    tensors = {"w": rng.standard_normal(answer_bytes // 4).astype(np.float32)}
    answer = rng.bytes(answer_bytes)
    job = "0" * 64
    keeping, committing = [], []
    with (
        tempfile.TemporaryDirectory() as folder,
        Journal(Path(folder) / "journal.sqlite", keep_answers=True) as journal,
    ):
        journal.open_run(job, "", tensors)
        for number in range(1, rounds + 1):
            nonces = {f"device-{client}": secrets.token_hex(16) for client in range(clients)}
            journal.begin_round(job, number, nonces, clients)
            begun = time.perf_counter()
            for client, nonce in nonces.items():
                journal.keep_answer(job, number, client, nonce, answer)
            keeping.append((time.perf_counter() - begun) / clients)
            begun = time.perf_counter()
            journal.commit_round(
                job,
                number,
                tensors=tensors,
                moments={},
                report={"round": number},
                updates=[
                    UpdateEntry(nonce=nonce, client=client, samples=1, bytes=answer_bytes)
                    for client, nonce in nonces.items()
                ],
                rejections=[],
                settled=nonces.values(),
            )
            committing.append(time.perf_counter() - begun)
    size = f"{answer_bytes / 1e3:.0f} kB each"
    return [
        figure(
            "journal_answers_per_s",
            1 / median(keeping),
            unit="1/s",
            note=f"{size}, each on the disk when it is kept",
        ),
        figure(
            "journal_round_ms",
            1000 * median(committing),
            unit="ms",
            note=f"tensors, report and {clients} updates; as many kept answers let go",
        ),
    ]
