# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import dataclasses

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from protocol import (
    MAX_UPDATE_OVERHEAD,
    ContainerError,
    MalformedError,
    NotFiniteError,
    TooLongError,
    UpdateHeader,
    WeightError,
    pack_update,
    unpack_update,
)

HEADER = UpdateHeader(
    job="5c" * 32,
    round=3,
    nonce="0f" * 16,
    client="client-07",
    codec="float32",
    samples=40,
    metrics={"loss": 0.25, "accuracy": 1.0},
)
PRINTABLE = st.text(min_size=1, max_size=20).filter(str.isprintable)
FINITE = st.floats(allow_nan=False, allow_infinity=False)
HEADERS = st.builds(
    UpdateHeader,
    job=st.binary(min_size=32, max_size=32).map(bytes.hex),
    round=st.integers(0, 2**31 - 1),
    nonce=st.binary(min_size=8, max_size=32).map(bytes.hex),
    client=PRINTABLE,
    codec=PRINTABLE,
    samples=st.integers(1, 2**31 - 1),
    metrics=st.dictionaries(PRINTABLE, FINITE, max_size=5),
)


@given(HEADERS, st.binary(max_size=200))
def test_unpack_gives_back_what_was_packed(header, payload):
    blob = pack_update(header, payload)
    found, view = unpack_update(blob, max_bytes=len(blob))
    assert (found, bytes(view)) == (header, payload)
    assert len(blob) <= MAX_UPDATE_OVERHEAD + len(payload)


@given(st.data())
def test_no_bytes_make_unpack_raise_anything_but_container_errors(data):
    blob = bytearray(pack_update(HEADER, b"payload"))
    for _ in range(data.draw(st.integers(1, 4))):
        blob[data.draw(st.integers(0, len(blob) - 1))] = data.draw(st.integers(0, 255))
    cut = data.draw(st.integers(0, len(blob)))
    for hostile in (bytes(blob), bytes(blob[:cut]), bytes(blob) + bytes(cut)):
        try:
            unpack_update(hostile, max_bytes=1000)
        except ContainerError as error:
            assert error.code


def test_payload_is_a_read_only_view_without_a_copy():
    blob = bytearray(pack_update(HEADER, b"payload"))
    _, view = unpack_update(blob, max_bytes=1000)
    assert view.readonly
    assert view.obj is blob


def test_numpy_scalars_are_taken_as_numbers():
    header = dataclasses.replace(
        HEADER, samples=np.int64(40), round=np.int32(3), metrics={"loss": np.float32(0.25)}
    )
    assert type(header.samples) is int
    assert unpack_update(pack_update(header, b""), max_bytes=1000)[0].metrics == {"loss": 0.25}


def test_the_header_does_not_follow_later_changes_of_the_metrics_it_was_given():
    metrics = {"loss": 1.0}
    header = dataclasses.replace(HEADER, metrics=metrics)
    metrics["loss"] = float("nan")
    assert header.metrics == {"loss": 1.0}


@pytest.mark.parametrize(
    ("field", "value", "error"),
    [
        ("job", "5C" * 32, MalformedError),
        ("job", "5c" * 31, MalformedError),
        ("job", None, MalformedError),
        ("round", -1, MalformedError),
        ("round", 2**31, MalformedError),
        ("round", 1.0, MalformedError),
        ("round", True, MalformedError),
        ("nonce", "", MalformedError),
        ("nonce", "0" * 15, MalformedError),
        ("nonce", "0" * 17, MalformedError),
        ("nonce", "0" * 66, MalformedError),
        ("client", "", MalformedError),
        ("client", "a\x00b", MalformedError),
        ("client", "\ud800", MalformedError),
        ("client", "a" * 129, MalformedError),
        ("codec", 1, MalformedError),
        ("samples", 0, WeightError),
        ("samples", -5, WeightError),
        ("samples", 10**18, WeightError),
        pytest.param("samples", 10**5000, WeightError, id="samples-5001-digits"),
        ("samples", 1.5, WeightError),
        ("metrics", {"loss": float("nan")}, NotFiniteError),
        ("metrics", {"loss": float("inf")}, NotFiniteError),
        ("metrics", {"loss": 10**400}, NotFiniteError),
        ("metrics", {"loss": "0"}, MalformedError),
        ("metrics", {"": 0.0}, MalformedError),
        ("metrics", [], MalformedError),
        ("metrics", {str(i): 0.0 for i in range(1025)}, MalformedError),
    ],
)
def test_header_refuses_when_a_value_is_out_of_range(field, value, error):
    with pytest.raises(error) as caught:
        dataclasses.replace(HEADER, **{field: value})
    assert type(caught.value) is error
    assert len(str(caught.value)) < 300


def test_pack_refuses_a_header_that_no_reader_would_take():
    metrics = {f"{i:02}" + "ä" * 126: 0.1 for i in range(64)}
    assert pack_update(dataclasses.replace(HEADER, metrics=metrics), b"")
    metrics = {f"{i:02}" + "\U0001f600" * 126: 0.1 for i in range(64)}
    with pytest.raises(TooLongError, match="fewer metrics"):
        pack_update(dataclasses.replace(HEADER, metrics=metrics), b"")
