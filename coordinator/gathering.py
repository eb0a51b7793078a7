# SPDX-License-Identifier: Apache-2.0
"""Before a round: who could take part, and waiting until they are enough."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from typing import Final

import numpy as np

from coordinator.clients import eligible
from coordinator.run import Run
from protocol.readiness import Readiness

_FIRST_PAUSE_S: Final = 1.0
_LONGEST_PAUSE_S: Final = 60.0
_GROWTH: Final = 1.6


def gather(run: Run, number: int) -> tuple[list[str], list[str]]:
    """Wait for `rounds.min_clients` that may be asked; their names, and those of all clients that
    there are, whether they may. A private job may need so many of these as well."""
    rounds = run.job.rounds
    members = run.privacy.needs if run.privacy else 0
    for pause in pauses(np.random.default_rng()):
        said = run.link.survey(run.hash)
        able, why = able_clients(run, said)
        if len(able) >= rounds.min_clients and len(said) >= members:
            return able, list(said)
        if len(said) < members:
            run.watch.waits(number, len(said), members, why)
        else:
            run.watch.waits(number, len(able), rounds.min_clients, why)
        run.pause(pause)
    raise AssertionError("pauses do not end")


def able_clients(run: Run, said: Mapping[str, Readiness]) -> tuple[list[str], dict[str, str]]:
    """As `clients.eligible`, by what the job asks for."""
    rounds = run.job.rounds
    # Clients that do not tell how many they have compare it themselves.
    least = rounds.min_samples if run.job.tells_samples else 0
    return eligible(said, min_samples=least, min_memory_mb=rounds.min_memory_mb)


def rejoin(run: Run, number: int, asked: Collection[str], kept: int) -> None:
    """Before a round is played again: wait for the clients that were asked and are still needed.

    They come back one by one after the coordinator did. All are waited for for `rejoin_s`; so many
    that `rounds.min_clients` have answered or can, as long as it takes. Clients whose answers would
    be refused are not waited for. `kept` is the number of the others: their answers are there.
    """
    patient_until = run.clock() + run.rejoin_s
    for pause in pauses(np.random.default_rng()):
        said = run.link.survey(run.hash)
        awaited = [client for client in asked if run.link.refused(client) is None]
        why = {
            client: said[client].reason if client in said else "it is not connected"
            for client in awaited
            if client not in said or not said[client].ready
        }
        have, most = kept + len(awaited) - len(why), kept + len(awaited)
        least = min(run.job.rounds.min_clients, most)
        patient = run.clock() < patient_until
        if have >= (most if patient else least):
            return
        run.watch.waits(number, have, most if patient else least, why)
        run.pause(pause)


def pauses(rng: np.random.Generator) -> Iterator[float]:
    """Seconds to wait between two looks: longer each time up to a limit, and never quite the same,
    so that several jobs that wait do not ask in step."""
    length = _FIRST_PAUSE_S
    while True:
        yield length * rng.uniform(0.5, 1.0)
        length = min(length * _GROWTH, _LONGEST_PAUSE_S)
