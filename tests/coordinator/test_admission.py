# SPDX-License-Identifier: Apache-2.0
"""Admission never raises, and admits what fits its plan to the bit. (Each code: test_rounds.)"""

from __future__ import annotations

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from aggregation.codecs import codec_named
from coordinator.admission import Admitted, Expected, admit
from protocol.rejection import Rejection
from protocol.tensors import ParamSpec
from protocol.update import UpdateHeader, pack_update

TENSORS = {"a": np.arange(6, dtype=np.float32).reshape(2, 3), "b": np.ones(4, np.float32)}
EXPECTED = Expected(
    job="ab" * 32,
    round=3,
    nonce="cd" * 16,
    client="c7",
    codec="float32",
    spec=ParamSpec.of(TENSORS),
    max_bytes=10_000,
    max_samples=100,
)
HEADER = UpdateHeader(
    job=EXPECTED.job,
    round=3,
    nonce=EXPECTED.nonce,
    client="c7",
    codec="float32",
    samples=100,
    metrics={"loss": 0.5},
)
VALID = pack_update(HEADER, codec_named("float32").encode(TENSORS))


def test_update_is_admitted_when_it_fits() -> None:
    admitted = admit(VALID, expected=EXPECTED)
    assert isinstance(admitted, Admitted)
    assert admitted.header == HEADER
    assert all(np.array_equal(admitted.delta[name], TENSORS[name]) for name in TENSORS)


def test_rejection_reads_as_a_sentence() -> None:
    rejection = admit(VALID[:-5], expected=EXPECTED)
    assert isinstance(rejection, Rejection)
    assert str(rejection) == (
        f"client c7: container: expected {len(VALID)} bytes, found {len(VALID) - 5}; "
        "update rejected, round 3 continues (E201)"
    )


@given(blob=st.binary(max_size=400))
def test_any_bytes_are_rejected_without_an_exception(blob: bytes) -> None:
    assert isinstance(admit(blob, expected=EXPECTED), Rejection)


@given(position=st.integers(0, len(VALID) - 1), value=st.integers(1, 255))
def test_any_changed_byte_is_rejected(position: int, value: int) -> None:
    blob = bytearray(VALID)
    blob[position] ^= value
    assert isinstance(admit(bytes(blob), expected=EXPECTED), Rejection)


@given(payload=st.binary(max_size=80))
def test_any_payload_in_a_valid_container_is_finite_or_rejected(payload: bytes) -> None:
    verdict = admit(pack_update(HEADER, payload), expected=EXPECTED)
    if isinstance(verdict, Admitted):
        assert all(np.isfinite(tensor).all() for tensor in verdict.delta.values())
    else:
        assert verdict.reason
