# SPDX-License-Identifier: Apache-2.0
"""When devices are asked whether they are at work, and when they are given up."""

from __future__ import annotations

from coordinator.liveness import Liveness


def asked_at(liveness: Liveness, until: int) -> list[int]:
    return [now for now in range(until) if liveness.due(["a"], float(now))]


def test_questions_come_at_growing_intervals_up_to_a_limit() -> None:
    found = asked_at(Liveness(first_s=10, growth=2, longest_s=40), 200)
    assert found == [10, 30, 70, 110, 150, 190]


def test_who_is_at_work_is_never_lost() -> None:
    liveness = Liveness(grace_s=5)
    liveness.due(["a"], 0.0)
    for now in range(0, 100, 2):
        liveness.told("a", True if now % 4 else None, float(now))
        assert not liveness.lost(float(now))


def test_who_is_at_work_on_nothing_has_some_seconds_for_its_answer() -> None:
    liveness = Liveness(grace_s=5)
    liveness.due(["a", "b"], 0.0)
    liveness.told("a", False, 10.0)
    liveness.told("a", False, 14.0)
    assert liveness.lost(15.0) == []
    assert liveness.lost(15.1) == ["a"], "from the first time that it said so"
    liveness.told("a", True, 15.2)
    assert liveness.lost(99.0) == []


def test_what_has_been_answered_is_forgotten() -> None:
    liveness = Liveness(grace_s=5)
    liveness.due(["a"], 0.0)
    liveness.told("a", False, 1.0)
    liveness.due([], 2.0)
    liveness.told("a", False, 3.0)
    assert liveness.lost(99.0) == []
