# SPDX-License-Identifier: Apache-2.0
"""What is known about a round when it is over."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields
from typing import Any, Self

from protocol.rejection import Rejection, RejectionCode


@dataclass(frozen=True, slots=True, kw_only=True)
class RoundReport:
    """One round: a line of metrics.jsonl, a row of the journal, a step of the progress bar."""

    round: int
    accuracy: float | None
    """On the coordinator's test data, a fraction of 1; None in rounds without a test."""
    loss: float | None
    train_loss: float | None
    """Mean of what clients told, weighted by samples; None when none did."""
    uplink_bytes: int
    """Updates as they came, headers included; those that were rejected too; and what split
    sessions took."""
    downlink_bytes: int
    evaluation_bytes: int
    """Both ways, for tests on the clients' held-out samples; not part of the other two."""
    clients: int
    """Asked to train; in asynchronous rounds, heard of."""
    updates: int
    """Merged."""
    samples: int
    """Of the merged updates, one pass counted."""
    rejections: tuple[Rejection, ...]
    seconds: float
    fit_seconds: float
    """The part of `seconds` from the plans to the last update; tests are not in it."""
    per_client_accuracy: Mapping[str, float]
    """Of the merged tensors, on each client's held-out samples."""
    per_client_local: Mapping[str, float] = field(default_factory=dict)
    """Of what the client itself trained last; {} unless the job asks for it."""
    per_client_mixed: Mapping[str, float] = field(default_factory=dict)
    """Of a mixture of both."""
    selected: Mapping[str, Sequence[float]] = field(default_factory=dict)
    """How often each client's samples selected each element of a pool, where clients tell it."""
    stream_up_bytes: int = 0
    """Of `uplink_bytes`, what went up in split sessions."""
    stream_down_bytes: int = 0
    staleness_mean: float | None = None
    """In asynchronous rounds: how many steps ago the tensors were current that the merged updates
    started from."""
    staleness_max: int | None = None
    privacy: Mapping[str, Any] = field(default_factory=dict)
    """Of a private job, up to this round: "epsilon" at "delta" ("epsilon_rdp" is the cross-check),
    the "budget" and what is "left" of it (None without one), "neighbours", "noise_multiplier"; this
    round's "clip", and the noised share "unclipped" where one is released."""
    note: str
    """What else the operator should know; empty for a usual round."""

    def to_json(self) -> dict[str, Any]:
        """Ready for `json.dumps`."""
        content: dict[str, Any] = {item.name: getattr(self, item.name) for item in fields(self)}
        for name in ("per_client_accuracy", "per_client_local", "per_client_mixed"):
            content[name] = dict(content[name])
        content["privacy"] = dict(self.privacy)
        content["selected"] = {client: list(row) for client, row in self.selected.items()}
        content["rejections"] = [
            {"client": r.client, "code": str(r.code), "reason": r.reason} for r in self.rejections
        ]
        return content

    @classmethod
    def from_json(cls, content: Mapping[str, Any]) -> Self:
        """The inverse of `to_json`."""
        rejections = tuple(
            Rejection(
                client=row["client"],
                round=content["round"],
                code=RejectionCode(row["code"]),
                reason=row["reason"],
            )
            for row in content["rejections"]
        )
        return cls(**{**content, "rejections": rejections})
