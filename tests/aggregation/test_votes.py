# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import math

import numpy as np
import pytest

from aggregation import Seeds
from aggregation.codecs import encode_with_feedback
from aggregation.codecs.votes import BOUND, THREE, TWO, Votes
from protocol import ParamSpec


def test_votes_are_sides_of_zero() -> None:
    values = np.array([-2, -0.1, 0, 0.1, 2], np.float32)
    votes = Votes(norm=1.0)
    integers = votes.to_grid(values, Seeds())
    assert integers.tolist() == [0, 0, 1, 1, 1]
    worth = np.float32(TWO)
    np.testing.assert_allclose(
        votes.from_grid(integers.astype("f4")), [-worth, -worth] + [worth] * 3
    )


def test_of_three_the_middle_is_zero() -> None:
    values = np.array([-2, -0.62, -0.61, 0, 0.61, 0.62], np.float32)
    votes = Votes(norm=1.0, ternary=True)
    integers = votes.to_grid(values, Seeds())
    assert integers.tolist() == [0, 0, 1, 1, 1, 2]
    decoded = votes.from_grid(integers.astype("f4"))
    np.testing.assert_allclose(decoded, np.array([-1, -1, 0, 0, 0, 1]) * THREE, rtol=1e-6)


@pytest.mark.parametrize(("ternary", "lost"), [(False, 1 - 2 / math.pi), (True, 0.1902)])
def test_what_a_vote_loses_of_a_normal_variable_is_what_the_table_says(
    ternary: bool, lost: float
) -> None:
    """Max (1960), table I: a mean square of 0.3634 with two levels, 0.1902 with three."""
    values = np.random.default_rng(0).standard_normal(400_000).astype("f4")
    votes = Votes(norm=1.0, ternary=ternary)
    decoded = votes.from_grid(votes.to_grid(values, Seeds()).astype("f4"))
    assert float(np.square(values - decoded).mean()) == pytest.approx(lost, abs=0.003)
    if ternary:
        assert pytest.approx(THREE / 2) == BOUND


def test_feedback_delivers_what_votes_leave_behind() -> None:
    """Over many rounds the mean of what was decoded is what was to be sent."""
    rng = np.random.default_rng(1)
    update = {"a": (rng.standard_normal(300) ** 3).astype("f4")}
    update["a"] *= np.float32(0.5 / np.linalg.norm(update["a"]))
    spec, votes = ParamSpec.of(update), Votes(norm=1.0)
    residual: dict[str, np.ndarray] = {}
    total = np.zeros(300)
    rounds = 60
    for number in range(rounds):
        seeds = Seeds(shared=number)
        payload, residual = encode_with_feedback(votes, update, residual, seeds=seeds)
        total += votes.decode(payload, spec, spec.nbytes, seeds=seeds)["a"]
    assert np.linalg.norm(total / rounds - update["a"]) < 0.1 * 0.5
