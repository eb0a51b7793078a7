# SPDX-License-Identifier: Apache-2.0
"""The plans of one round, one a client, and what the answer to each must be.

A plan's bytes depend on the job, on what the journal holds of earlier rounds and on the nonce
alone. A round that is played again with the same nonces sends the same bytes, and a client that
kept its answer gives it again; a nonce that came with other bytes it would refuse.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Final, Literal

from aggregation.codecs import round_seeds
from aggregation.mergers import Roles
from coordinator.admission import Expected
from coordinator.clients import client_seed
from coordinator.downlink import Broadcast
from coordinator.privacy import PrivateRound
from coordinator.run import Run
from protocol.factors import at_rank
from protocol.plan import Plan, pack_plan
from protocol.summing import plan_digest
from protocol.tensors import ParamSpec
from protocol.update import MAX_UPDATE_OVERHEAD

Task = Literal["fit", "evaluate"]

_ANYBODY: Final = "anybody"


@dataclass(slots=True, kw_only=True)
class Plans:
    """What clients are asked that start from one state of the tensors."""

    run: Run
    number: int
    """Of the round."""
    task: Task
    roles: Roles
    sent: Broadcast
    private: PrivateRound | None = None
    _specs: dict[int, ParamSpec | None] = field(init=False)
    _budgets: dict[int, int] = field(init=False)

    def __post_init__(self) -> None:
        shared = self.run.part(self.roles.shares)
        self._specs = {
            rank: at_rank(rank, shared, self.run.pairs) if self._brings_tensors else None
            for rank in self.sent.whole
        }
        uplink = self.run.uplink
        self._budgets = {
            rank: (uplink.payload_bytes(spec) if spec else 0) + MAX_UPDATE_OVERHEAD
            for rank, spec in self._specs.items()
        }

    @property
    def _brings_tensors(self) -> bool:
        """Whether answers do: in a secure sum they follow, masked."""
        return self.task == "fit" and self.run.sums is None

    def plan(self, client: str, nonce: str, *, draw: int | None = None) -> bytes:
        """The container for a client. `draw`: number of the client's random choices, where it is
        not the round's."""
        return pack_plan(
            self._plan(client, nonce, self.number if draw is None else draw),
            self.sent.for_client(client).payload,
        )

    def digest(self) -> bytes:
        """What clients that are asked alike agree on: see `protocol.summing.plan_digest`."""
        return plan_digest(self._plan(_ANYBODY, "0" * 16, self.number), self.sent.seen)

    def _plan(self, client: str, nonce: str, draw: int) -> Plan:
        run, parcel = self.run, self.sent.for_client(client)
        terms = run.sums if self.task == "fit" else None
        return Plan(
            job=run.hash,
            round=self.number,
            nonce=nonce,
            client=client,
            downlink_codec=parcel.codec,
            uplink_codec=run.uplink.name,
            task=self.task,
            learning_rate=run.job.training.learning_rate,
            local_epochs=run.job.training.local_epochs,
            local_steps=run.job.training.local_steps,
            error_feedback=run.job.update.error_feedback,
            base_round=parcel.base_round,
            keep=self.sent.keep,
            sends=self.roles.sends,
            trains=self.roles.trains,
            shares=self.roles.shares,
            tells=(*run.job.update.told, *(self.private.tells if self.private else ())),
            clip=self.private.charge.clip if self.private else 0.0,
            noise=self.private.privacy.share if self.private else 0.0,
            mix=run.job.personal.mix if run.job.personal.report else None,
            rank=parcel.rank,
            offset_round=parcel.offset_round,
            offset_ranks=parcel.offset_ranks,
            seed=client_seed(run.seed, draw, client),
            max_update_bytes=self._budgets[parcel.rank],
            min_survivors=terms.min_survivors if terms else 0,
            corrupt=terms.corrupt if terms else 0.0,
            dropouts=terms.dropouts if terms else 0.0,
            full_weight_samples=run.full_weight_samples if terms else 0,
            smoothing=run.smoothing if terms else 0.0,
        )

    def expected(self, client: str, nonce: str) -> Expected:
        """What the answer to that plan must be."""
        rank = self.sent.rank_of(client)
        return Expected(
            job=self.run.hash,
            round=self.number,
            nonce=nonce,
            client=client,
            codec=self.run.uplink.name,
            spec=self._specs[rank],
            max_bytes=self._budgets[rank],
            max_samples=self.run.job.aggregation.max_client_samples,
            seeds=round_seeds(self.run.hash, self.number),
        )
