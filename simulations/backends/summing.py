# SPDX-License-Identifier: Apache-2.0
"""Simulated clients in a secure sum: each with a key of its own, and the very code of a device."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial

from client_sdk.memory import ClientMemory
from client_sdk.summing import HeldSums, answer_sum
from protocol.keys import new_key, public_pem, sign, verifier
from simulations.grid import Serve


class SummingClients:
    """Clients that answer the messages of secure sums beside what `serve` answers.

    Keys are drawn anew for each run: nothing that is summed depends on them.
    """

    def __init__(self, serve: Serve, memories: Mapping[str, ClientMemory]) -> None:
        self._serve = serve
        self._memories = memories
        self._keys = {name: new_key() for name in memories}
        self._public = {name: public_pem(key.public_key()) for name, key in self._keys.items()}
        self._stores = {name: HeldSums() for name in memories}

    def credentials(self, clients: Sequence[str]) -> dict[str, str]:
        """See `coordinator.run.Credentials`."""
        return {client: self._public[client] for client in clients}

    def serve(self, work: list[tuple[str, str, bytes]]) -> Iterator[tuple[str, bytes | Exception]]:
        """Answer (client, kind, blob): sums one by one, the rest as `serve` does."""
        for name, kind, blob in work:
            if kind == "sum":
                try:
                    yield name, self._answer(name)(blob)
                except Exception as fault:
                    # As on a device: the coordinator hears of it, and the round goes on.
                    yield name, fault
        if others := [one for one in work if one[1] != "sum"]:
            yield from self._serve(others)

    def _answer(self, name: str) -> Callable[[bytes], bytes]:
        key = self._keys[name]
        return partial(
            answer_sum,
            client=name,
            memory=lambda job: self._memories[name],
            store=self._stores[name],
            sign=lambda message: sign(message, key),
            trust=verifier,
        )
