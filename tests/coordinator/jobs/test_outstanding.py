# SPDX-License-Identifier: Apache-2.0
"""Sessions are opened for plans that are out, and for no others."""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterable, Mapping
from pathlib import Path

import pytest

from coordinator.jobs.outstanding import ExpectingLink, Outstanding
from coordinator.link import Failure, Outgoing, never
from protocol.plan import Plan, pack_plan
from protocol.readiness import Readiness
from protocol.rejection import RejectionCode
from protocol.stream import Open

JOB, NONCE = "ab" * 32, "cd" * 16


def opened(**changes: object) -> Open:
    given = {"job": JOB, "round": 3, "client": "ada", "nonce": NONCE, "lane": 0, **changes}
    return Open(**given)  # type: ignore[arg-type]


def plan_of(client: str) -> bytes:
    plan = Plan(
        job=JOB, round=3, nonce=NONCE, client=client, downlink_codec="float32",
        uplink_codec="float32", task="fit", learning_rate=0.1, local_epochs=1, seed=1,
        max_update_bytes=100,
    )  # fmt: skip
    return pack_plan(plan, b"")


class Answering:
    """Answers each message with its client's name."""

    def survey(self, job: str) -> Mapping[str, Readiness]:
        return {"ada": Readiness(samples=3)}

    def refused(self, client: str) -> Failure | None:
        return Failure(code=RejectionCode.REVOKED, reason="out") if client == "eve" else None

    def exchange(
        self, outgoing: Iterable[Outgoing | None], *, closed: Callable[[], bool] = never
    ) -> Generator[tuple[str, bytes | Failure]]:
        for message in outgoing:
            if message is not None:
                yield message.client, message.client.encode()


@pytest.mark.parametrize("change", [{"round": 2}, {"client": "ben"}, {"nonce": "ef" * 16}])
def test_a_plan_that_is_not_out_opens_nothing(tmp_path: Path, change: dict[str, object]) -> None:
    with Outstanding(tmp_path / "o") as players, Outstanding(tmp_path / "o") as servers:
        assert "no plan is out" in servers.reason_against(opened())
        players.expect("ada", 3, NONCE)
        assert servers.reason_against(opened()) == ""
        assert servers.reason_against(opened(lane=1)) == ""
        assert "no plan is out" in servers.reason_against(opened(**change))
        players.expect("ada", 4, "01" * 16)
        assert "no plan is out" in servers.reason_against(opened()), "the one before is over"


def test_bytes_are_told_once_and_outlive_a_process(tmp_path: Path) -> None:
    with Outstanding(tmp_path / "o") as players:
        for _ in range(2):
            with Outstanding(tmp_path / "o") as servers:
                servers.count(10, 1)
                servers.count(5, 2)
        assert players.streamed() == (30, 6)
        assert players.streamed() == (0, 0)
    with Outstanding(tmp_path / "o") as again:
        assert again.streamed() == (0, 0), "of this opening"


def test_plans_are_written_down_before_they_go_out(tmp_path: Path) -> None:
    with Outstanding(tmp_path / "o") as outstanding:
        link = ExpectingLink(Answering(), outstanding)
        messages = [
            Outgoing("ada", "fit", plan_of("ada")),
            None,
            Outgoing("ben", "fit", plan_of("ben")),
        ]
        for client, answer in link.exchange(messages):
            assert answer == client.encode()
            assert outstanding.reason_against(opened(client=client)) == ""
        assert link.survey(JOB)["ada"].samples == 3
        assert link.refused("ada") is None and link.refused("eve") is not None
