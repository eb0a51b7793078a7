# SPDX-License-Identifier: Apache-2.0
"""`fedloom bench secure-aggregation`: what secure sums get right, what they cost, what a cheating
server gets."""

from __future__ import annotations

import time
from collections import Counter
from dataclasses import dataclass, replace
from statistics import median
from typing import Final

import numpy as np

from aggregation.secure_aggregation import server
from aggregation.secure_aggregation.context import Context, Terms
from aggregation.secure_aggregation.graph import COMPLETE_UP_TO
from aggregation.secure_aggregation.outcomes import Aborted
from aggregation.secure_aggregation.server_state import SecureSum, Stage
from simulations.benchmarks.dp_sgd import dp_sgd_parity
from simulations.benchmarks.figure import Figure, figure
from simulations.benchmarks.flower_masks import mask_vs_flower
from simulations.benchmarks.privacy_accounting import epsilon_error
from simulations.benchmarks.runs import labelled
from simulations.benchmarks.secure_job import secure_job_gap
from simulations.progress import ProgressListener
from simulations.secure_attacks import SCRIPTS, judge
from simulations.secure_rounds import (
    Room,
    attempt_with,
    below_threshold,
    learned,
    plain_sum,
    play,
)

COUNTS: Final = (5, 20, 100)
MOST_LOST: Final = 0.33
VALUES: Final = 1_000_000
# The modulus in which 100 clients' updates of 8 bits, and votes of 0 and 1, cannot wrap around.
UPDATE_BITS: Final = 15
VOTE_BITS: Final = 7
# Where a client falls silent; the last means at one of the others, drawn for each client.
POINTS: Final = (Stage.SHARES, Stage.VECTORS, Stage.CONSENTS, Stage.REVEALS, None)


def figures(progress: ProgressListener, *, quick: bool = False) -> list[Figure]:
    """All of them. `quick` takes fewer draws and shorter vectors, and says so."""
    draws, values = (12, 100_000) if quick else (200, VALUES)
    found = [
        secure_sum_exact(progress, draws=draws),
        secure_abort_exact(progress, draws=draws),
    ]
    progress.stage("secure sums: cheating servers")
    found.append(malicious_server_aborts())
    progress.stage("secure sums: a round of 100 clients")
    measured = measure_round(values=values)
    found.append(upload_figure(measured))
    found.append(vote_figure(measure_round(values=values, bits=VOTE_BITS)))
    found.append(unmask_figure(measured))
    progress.stage("secure sums: masks")
    found += mask_vs_flower(values=values, bits=UPDATE_BITS)
    found.append(secure_job_gap(progress))
    found.append(epsilon_error(progress))
    progress.stage("private steps beside a loop over samples")
    found.append(dp_sgd_parity())
    return labelled(found) if quick else found


def secure_sum_exact(progress: ProgressListener, *, draws: int = 200) -> Figure:
    """`secure_sum_exact`: the share of draws in which the secure sum is the plain one, bit by bit.

    A draw takes a number of clients, a modulus, up to 33 % of the clients to lose and the stage to
    lose them at, all in turn or at random, and checks what the server could have learned besides.
    """
    progress.stage(f"secure sums: {draws} draws with dropouts")
    exact, lost_in_all, kinds = 0, 0, Counter[str]()
    for draw in range(draws):
        rng = np.random.default_rng([1, draw])
        count, point = COUNTS[draw % 3], POINTS[draw // 3 % len(POINTS)]
        bits = int(rng.integers(4, 33))
        room, context = attempt_with(count, values=200, bits=bits, terms=Terms(), rng=rng)
        number = int(rng.integers(0, int(MOST_LOST * count) + 1))
        lost = _lost(context, number, point, rng)
        played = play(room, context, lost=lost)
        lost_in_all += len(lost)
        kinds["ring" if context.degree < count - 1 else "complete"] += 1
        exact += _is_exact(room, context, lost, played.outcome)
    return figure(
        "secure_sum_exact",
        exact / draws,
        target="== 1",
        note=f"{exact} of {draws} draws; {', '.join(map(str, COUNTS))} clients in turn, "
        f"{lost_in_all} lost in all, at most {MOST_LOST:.0%} of a draw, before they send shares, "
        f"vectors, consents or reveals, or mixed; {kinds['complete']} complete graphs, "
        f"{kinds['ring']} rings above {COMPLETE_UP_TO} clients",
    )


def _lost(
    context: Context, number: int, point: Stage | None, rng: np.random.Generator
) -> dict[str, Stage]:
    gone = rng.choice(len(context.names), number, replace=False)
    stages = [stage for stage in POINTS if stage is not None]
    return {
        context.names[place]: stages[rng.integers(len(stages))] if point is None else point
        for place in gone.tolist()
    }


def _is_exact(
    room: Room, context: Context, lost: dict[str, Stage], outcome: SecureSum | Aborted
) -> bool:
    """The sum of exactly those whose vectors came, and nothing else to be worked out."""
    if not isinstance(outcome, SecureSum):
        return False
    present = tuple(n for n in context.names if lost.get(n, Stage.OVER) > Stage.VECTORS)
    expected = plain_sum(room.vectors, present, context.task.bits)
    knows = learned(room, context)
    return (
        outcome.members == present
        and np.array_equal(outcome.values, expected)
        and knows.sums == (frozenset(present),)
        and not knows.both
    )


def secure_abort_exact(progress: ProgressListener, *, draws: int = 200) -> Figure:
    """`secure_abort_exact`: the share of draws below the threshold that end without a sum."""
    progress.stage(f"secure sums: {draws} draws below the threshold")
    aborted = 0
    for draw in range(draws):
        rng = np.random.default_rng([2, draw])
        count, point = COUNTS[draw % 3], POINTS[draw // 3 % len(POINTS)]
        room, context = attempt_with(count, values=20, bits=15, terms=Terms(), rng=rng)
        # one more than any secret can do without, the client itself counted
        fewest = below_threshold(context) + 1 + (count - 1 - context.degree)
        number = int(rng.integers(fewest, count))
        played = play(room, context, lost=_lost(context, number, point, rng))
        knows = learned(room, context)
        aborted += isinstance(played.outcome, Aborted) and not knows.sums and not knows.both
    return figure(
        "secure_abort_exact",
        aborted / draws,
        target="== 1",
        note=f"{aborted} of {draws} draws with more clients lost than the threshold allows end "
        "without a sum, and with nothing that gives one",
    )


def malicious_server_aborts() -> Figure:
    """`malicious_server_aborts`: scripts whose every lie ends in the refusal that it should."""
    judged = {script.__name__: judge(script, reason) for script, reason in SCRIPTS.items()}
    missed = [name for name, found in judged.items() if not found.held_off]
    return figure(
        "malicious_server_aborts",
        len(judged) - len(missed),
        unit="scripts",
        target=f"== {len(SCRIPTS)}",
        note=f"of {len(SCRIPTS)}; in all their transcripts no client's vector and no client's two "
        "secrets" + (f"; not held off: {', '.join(missed)}" if missed else ""),
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class MeasuredRound:
    """One round of 100 clients with 10 % lost before their vectors."""

    values: int
    upload: int  # bytes, of the client that sent most
    vector_upload: int  # of which the masked vector
    unmask_seconds: float
    client_seconds: float  # median time of masking and packing
    degree: int
    threshold: int
    lost: int
    exact: bool


def measure_round(
    *, values: int = VALUES, bits: int = UPDATE_BITS, clients: int = 100, lost: float = 0.1
) -> MeasuredRound:
    """Plays the round with whole vectors; the server's last step is timed by itself."""
    rng = np.random.default_rng(3)
    room, context = attempt_with(clients, values=values, bits=bits, terms=Terms(), rng=rng)
    if bits == VOTE_BITS:
        room.vectors = {name: vector & 1 for name, vector in room.vectors.items()}
    gone = _lost(context, int(lost * clients), Stage.VECTORS, rng)
    state, out = server.open_attempt(context)
    sent: Counter[str] = Counter()
    masking: list[float] = []
    largest = 0
    while True:
        for name, message in out.items():
            if gone.get(name, Stage.OVER) <= state.stage:
                continue
            started = time.perf_counter()
            answer = room.tell(name, message)
            taken = time.perf_counter() - started
            assert isinstance(answer, bytes), answer
            sent[name] += len(answer)
            if state.stage is Stage.VECTORS:
                masking.append(taken)
                largest = max(largest, len(answer))
                room.heard.clear()  # a server keeps the running sum and not the vectors
            state, fault = server.receive(state, name, answer, room.members.verify)
            assert fault is None, fault
        started = time.perf_counter()
        state, result = server.close_stage(state)
        taken = time.perf_counter() - started
        if isinstance(result, Aborted):
            raise AssertionError(result.detail)
        if isinstance(result, SecureSum):
            break
        out = result
    expected = plain_sum(room.vectors, result.members, bits)
    return MeasuredRound(
        values=values,
        upload=max(sent.values()),
        vector_upload=largest,
        unmask_seconds=taken,
        client_seconds=median(masking),
        degree=context.degree,
        threshold=context.threshold,
        lost=len(gone),
        exact=np.array_equal(result.values, expected),
    )


def upload_figure(measured: MeasuredRound) -> Figure:
    """`secure_upload_ratio`: all that a client sends, over its update in plain 8 bits a value."""
    return figure(
        "secure_upload_ratio",
        measured.upload / measured.values,
        target="<= 2",
        note=f"{measured.upload} bytes from the client that sends most, {measured.vector_upload} "
        f"of them the masked vector at {UPDATE_BITS} bits a value, for {measured.values} values; "
        f"{measured.degree} neighbours",
    )


def vote_figure(measured: MeasuredRound) -> Figure:
    """`secure_vote_bits`: bits a value of all that a client sends when updates are 1-bit votes."""
    made = figure(
        "secure_vote_bits",
        8 * measured.upload / measured.values,
        unit="bits a value",
        target="<= 8",
        note=f"votes of 0 and 1 of 100 clients modulo 2**{VOTE_BITS}, {measured.values} values, "
        f"{measured.upload} bytes in all",
    )
    return made if measured.exact else replace(made, holds=False)


def unmask_figure(measured: MeasuredRound) -> Figure:
    """`unmask_seconds`: secrets put together and all masks removed, one core."""
    made = figure(
        "unmask_seconds",
        measured.unmask_seconds,
        unit="s",
        target="<= 3",
        note=f"100 clients, {measured.lost} lost, {measured.values} values, {measured.degree} "
        f"neighbours, threshold {measured.threshold}; one core; the sum is "
        f"{'exact' if measured.exact else 'WRONG'}; a client masks and packs in "
        f"{measured.client_seconds:.2f} s",
    )
    return made if measured.exact else replace(made, holds=False)
