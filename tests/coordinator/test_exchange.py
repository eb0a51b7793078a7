# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

from typing import Any

from hypothesis import given
from hypothesis import strategies as st

from coordinator.exchange import in_order
from coordinator.link import Failure


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
    for client, answer in in_order(names, answers(), lambda client, failure: strays.append(client)):
        out.append(client)
        expected_silent = names.index(client) in silent
        assert isinstance(answer, Failure) is expected_silent
        if not expected_silent and not any(i in silent for i in range(names.index(client))):
            waited_for = max(given_.index(name) for name in out)
            assert len(given_) == waited_for + 1
    assert out == names and not strays
