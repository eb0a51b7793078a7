# SPDX-License-Identifier: Apache-2.0
"""What an update weighs in a secure sum."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from aggregation.privacy.clipping import l2_norm
from aggregation.summed_weights import FULL
from client_sdk.errors import PlanError
from client_sdk.weights import weighed
from client_sdk.work import Work
from protocol.plan import Plan
from protocol.tensors import NOTHING, Tensors

PLAN = Plan(
    job="ab" * 32,
    round=1,
    nonce="00" * 8,
    client="lathe",
    downlink_codec="float32",
    uplink_codec="grid:8,2.0",
    task="fit",
    learning_rate=0.1,
    local_epochs=1,
    seed=1,
    max_update_bytes=100,
    min_survivors=3,
    full_weight_samples=100,
)


def update(norm: float) -> dict[str, np.ndarray]:
    values = np.random.default_rng(0).standard_normal(30)
    return {"a": (values * norm / np.linalg.norm(values)).astype("f4")}


def work_of(plan: Plan, centre: Tensors = NOTHING) -> Work:
    return Work(plan=plan, start=update(0.0), centre=centre)


@given(st.integers(0, 10**6), st.floats(1e-3, 1e6))
def test_no_update_is_longer_than_its_weight_times_the_norm(samples: int, norm: float) -> None:
    delta, weight = weighed(work_of(PLAN), update(norm), samples)
    assert 1 <= weight <= FULL
    assert l2_norm(delta) <= 2.0 * weight / FULL * (1 + 1e-6)
    np.testing.assert_allclose(
        l2_norm(delta) / min(norm, 2.0), weight / FULL, rtol=1e-5
    )  # cut first, and only then made less of


def test_half_of_the_samples_is_half_of_the_weight() -> None:
    delta, weight = weighed(work_of(PLAN), update(1.0), 50)
    assert weight == FULL // 2
    np.testing.assert_allclose(delta["a"], update(1.0)["a"] / 2, rtol=2e-5)


def test_without_weights_an_update_stays_as_it_is() -> None:
    given_ = update(5.0)
    delta, weight = weighed(work_of(replace(PLAN, full_weight_samples=0)), given_, 50)
    assert delta is given_ and weight == 0


@pytest.mark.parametrize("codec", ["votes:2.0", "float32"])
def test_a_codec_that_keeps_no_lengths_is_refused(codec: str) -> None:
    with pytest.raises(PlanError, match=f"for updates with weights, found {codec}"):
        weighed(work_of(replace(PLAN, uplink_codec=codec)), update(1.0), 50)


AROUND = replace(PLAN, full_weight_samples=0, smoothing=0.5)


@given(st.floats(1e-3, 1e6), st.floats(0, 10))
def test_around_a_centre_the_difference_is_cut_to_the_smoothing_and_says_by_how_much(
    norm: float, away: float
) -> None:
    x, z = update(norm), {"a": np.full(30, away, "f4")}
    delta, weight = weighed(work_of(AROUND, z), x, 50)
    difference = x["a"].astype("f8") - z["a"]
    distance = float(np.linalg.norm(difference))
    assert weight == max(1, int(FULL * min(1.0, 0.5 / distance if distance else 1.0)))
    np.testing.assert_allclose(delta["a"], difference * weight / FULL, rtol=1e-6, atol=1e-30)
    assert l2_norm(delta) <= 0.5 * (1 + 1e-6) or weight == 1


@pytest.mark.parametrize("centre", [{}, {"a": np.zeros(29, "f4")}, {"b": np.zeros(30, "f4")}])
def test_a_centre_of_other_tensors_is_refused(centre: Tensors) -> None:
    with pytest.raises(PlanError, match="expected a centre like the update"):
        weighed(work_of(AROUND, centre), update(1.0), 50)
