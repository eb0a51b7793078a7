# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import dataclasses

import pytest
from hypothesis import given
from hypothesis import strategies as st

from protocol import (
    MAX_PLAN_OVERHEAD,
    ContainerError,
    MalformedError,
    Plan,
    UpdateHeader,
    pack_plan,
    pack_update,
    unpack_plan,
)

PLAN = Plan(
    job="5c" * 32,
    round=3,
    nonce="0f" * 16,
    client="client-07",
    downlink_codec="float32",
    uplink_codec="one-bit",
    task="fit",
    learning_rate=0.05,
    local_epochs=1,
    seed=12345,
    max_update_bytes=100_000,
)


@given(
    st.binary(max_size=100),
    st.sampled_from(["fit", "evaluate"]),
    st.floats(0, 1e6),
    st.integers(0, 2**63 - 1),
)
def test_unpack_gives_back_what_was_packed(payload, task, learning_rate, seed):
    plan = dataclasses.replace(PLAN, task=task, learning_rate=learning_rate, seed=seed)
    blob = pack_plan(plan, payload)
    found, view = unpack_plan(blob, max_bytes=len(payload) + MAX_PLAN_OVERHEAD)
    assert (found, bytes(view)) == (plan, payload)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("job", "x" * 64),
        ("round", -1),
        ("nonce", "0f"),
        ("client", ""),
        ("downlink_codec", ""),
        ("uplink_codec", None),
        ("task", "train"),
        ("task", ["fit"]),
        ("learning_rate", float("nan")),
        ("learning_rate", -0.1),
        ("learning_rate", "0.1"),
        ("local_epochs", 0),
        ("local_epochs", 10**9),
        ("seed", -1),
        ("seed", 2**63),
        ("max_update_bytes", 0),
        ("max_update_bytes", 2**60),
        ("full_weight_samples", -1),
        ("full_weight_samples", 1),  # of a plan without a secure sum
        ("smoothing", 0.5),
        ("smoothing", -1.0),
        ("smoothing", float("inf")),
    ],
)
def test_plan_refuses_when_a_value_is_out_of_range(field, value):
    with pytest.raises(MalformedError, match=field):
        dataclasses.replace(PLAN, **{field: value})


@pytest.mark.parametrize(
    ("fields", "words"),
    [({"base_round": 1}, "beside changes of tensors"), ({"full_weight_samples": 9}, "one weight")],
)
def test_a_centre_goes_with_whole_tensors_and_no_other_weights(fields, words):
    plan = dataclasses.replace(PLAN, min_survivors=3, smoothing=0.5)
    with pytest.raises(MalformedError, match=words):
        dataclasses.replace(plan, **fields)


def test_evaluation_needs_no_epochs():
    assert dataclasses.replace(PLAN, task="evaluate", local_epochs=0).local_epochs == 0


def test_an_update_is_not_a_plan():
    header = UpdateHeader(
        job="5c" * 32,
        round=3,
        nonce="0f" * 16,
        client="a",
        codec="float32",
        samples=1,
        metrics={},
    )
    with pytest.raises(MalformedError, match="FLPL"):
        unpack_plan(pack_update(header, b""), max_bytes=1000)


@given(st.integers(0, 1000), st.integers(1, 255))
def test_one_changed_byte_is_always_found(position, flip):
    blob = bytearray(pack_plan(PLAN, b"payload"))
    blob[position % len(blob)] ^= flip
    with pytest.raises(ContainerError):
        unpack_plan(blob, max_bytes=1000)
