# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from protocol.errors import ContainerError, MalformedError
from protocol.keys import new_key, public_pem
from protocol.plan import Plan
from protocol.summing import SumRequest, pack_sum_request, plan_digest, unpack_sum_request

PEM = public_pem(new_key().public_key())
REQUEST = SumRequest(
    job="ab" * 32, round=3, client="press", credentials={"press": PEM, "lathe": PEM}, message=b"m"
)
PLAN = Plan(
    job="ab" * 32,
    round=3,
    nonce="00" * 8,
    client="press",
    downlink_codec="float32",
    uplink_codec="grid:8,1.0",
    task="fit",
    learning_rate=0.1,
    local_epochs=1,
    seed=1,
    max_update_bytes=100,
    min_survivors=3,
)
TENSORS = {"a": np.ones((2, 3), "f4"), "b": np.zeros(1, "f4")}


@pytest.mark.parametrize("request_", [REQUEST, replace(REQUEST, credentials={}, message=b"")])
def test_a_request_comes_back(request_: SumRequest) -> None:
    assert unpack_sum_request(pack_sum_request(request_)) == request_


def test_bytes_that_no_packer_writes_are_refused() -> None:
    blob = pack_sum_request(REQUEST)
    for wrong in (b"", blob[:-1], blob + b"\0", blob[:30] + b"x" + blob[31:]):
        with pytest.raises(ContainerError):
            unpack_sum_request(wrong)


@pytest.mark.parametrize(
    "fields",
    [
        {"job": "x"},
        {"round": -1},
        {"client": ""},
        {"credentials": {"press": "no PEM"}},
        {"credentials": {"": PEM}},
    ],
)
def test_fields_are_checked(fields: dict[str, object]) -> None:
    with pytest.raises(MalformedError):
        replace(REQUEST, **fields)


def test_the_digest_is_of_what_clients_are_asked_alike() -> None:
    digest = plan_digest(PLAN, TENSORS)
    assert len(digest) == 32
    own = replace(PLAN, client="lathe", nonce="11" * 8, seed=2, max_update_bytes=7, keep=True)
    assert plan_digest(own, TENSORS) == digest
    for other in (
        {"round": 4},
        {"learning_rate": 0.2},
        {"min_survivors": 4},
        {"trains": "up"},
        {"full_weight_samples": 9},
        {"smoothing": 0.5},
    ):
        assert plan_digest(replace(PLAN, **other), TENSORS) != digest


def test_the_digest_is_of_every_bit_of_the_tensors() -> None:
    digest = plan_digest(PLAN, TENSORS)
    bit = {**TENSORS, "b": np.full(1, 1e-45, "f4")}
    shape = {**TENSORS, "a": np.ones((3, 2), "f4")}
    name = {"a": TENSORS["a"], "c": TENSORS["b"]}
    kind = {**TENSORS, "b": np.zeros(1, "i4")}
    digests = {plan_digest(PLAN, each) for each in (bit, shape, name, kind)}
    assert len(digests | {digest}) == 5
    assert plan_digest(PLAN, dict(reversed(TENSORS.items()))) == digest
