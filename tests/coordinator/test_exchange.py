# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

from typing import Any

from hypothesis import given
from hypothesis import strategies as st

from coordinator.exchange import in_order, until_quorum
from coordinator.link import Failure
from protocol.rejection import RejectionCode


@given(order=st.permutations(range(6)), silent=st.sets(st.integers(0, 5)))
def test_in_order_gives_every_client_once_and_waits_no_longer_than_needed(
    order: list[int], silent: set[int]
) -> None:
    names = list("abcdef")
    given_: list[str] = []
    strays: list[str] = []

    def answers() -> Any:
        for index in order:
            if index not in silent:
                given_.append(names[index])
                yield names[index], names[index].encode()

    out = []
    silence = Failure(code=RejectionCode.NO_REPLY, reason="no answer came")

    def stray(client: str, failure: Failure) -> None:
        strays.append(client)

    for client, answer in in_order(names, answers(), stray, lambda: silence):
        out.append(client)
        expected_silent = names.index(client) in silent
        assert isinstance(answer, Failure) is expected_silent
        if not expected_silent and not any(i in silent for i in range(names.index(client))):
            waited_for = max(given_.index(name) for name in out)
            assert len(given_) == waited_for + 1
    assert out == names and not strays


@given(
    answers=st.lists(st.tuples(st.sampled_from("abcdef"), st.sampled_from([b"good", b"bad"]))),
    quorum=st.integers(1, 6),
)
def test_a_round_ends_with_the_answer_that_makes_its_quorum(
    answers: list[tuple[str, bytes]], quorum: int
) -> None:
    closed: list[bool] = []

    def arriving() -> Any:
        try:
            yield from answers
        finally:
            closed.append(True)

    found = list(until_quorum(arriving(), quorum, lambda client, answer: answer == b"good"))
    assert found == answers[: len(found)]
    good = [
        len({c for c, blob in answers[:end] if blob == b"good"}) for end in range(len(answers) + 1)
    ]
    assert len(found) == (good.index(quorum) if quorum in good else len(answers))
    assert closed == [True]
