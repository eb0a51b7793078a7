# SPDX-License-Identifier: Apache-2.0
"""One client after another, through the very function that a device runs: the reference."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

from client_sdk.noise import repeatable_seed
from client_sdk.updates import Trainer, respond
from protocol.manifest import Manifest
from protocol.tensors import Tensors
from simulations.backends.prepared import PreparedClient


class SequentialClients:
    """Clients that share one trainer and take turns.

    `answer` turns a plan into an update: a function that takes what `respond` takes.
    """

    def __init__(
        self,
        manifest: Manifest,
        initial: Tensors,
        trainer: Trainer,
        clients: Sequence[PreparedClient],
        *,
        answer: Callable[..., bytes] = respond,
    ) -> None:
        self._manifest = manifest
        self._initial = initial
        self._trainer = trainer
        self._answer = answer
        self._clients = {client.id: client for client in clients}

    def serve(self, work: list[tuple[str, str, bytes]]) -> Iterator[tuple[str, bytes | Exception]]:
        """Answer (client, kind, plan) one by one; what a client raises is its answer."""
        for name, _, plan in work:
            client = self._clients[name]
            try:
                yield (
                    name,
                    self._answer(
                        plan,
                        bundle_manifest=self._manifest,
                        initial=self._initial,
                        trainer=self._trainer,
                        data_fit=client.fit,
                        data_held_out=client.held_out,
                        client=name,
                        memory=client.memory,
                        noise=repeatable_seed,
                    ),
                )
            except Exception as fault:
                # As on a device: the coordinator hears of it, and the round goes on.
                yield name, fault
