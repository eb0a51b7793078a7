# SPDX-License-Identifier: Apache-2.0
"""Surveys and readiness: what comes out is what went in, and nothing else comes out."""

from __future__ import annotations

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from protocol.errors import MalformedError, ProtocolError, TooLongError, VersionError
from protocol.readiness import (
    MAX_READINESS_BYTES,
    Readiness,
    Survey,
    pack_readiness,
    pack_survey,
    unpack_readiness,
    unpack_survey,
)

JOB = "ab" * 32
COUNTS = st.none() | st.integers(0, 1 << 30)


@given(st.integers(0, 65_535))
def test_a_survey_comes_back(port: int) -> None:
    survey = Survey(job=JOB, split_port=port)
    assert unpack_survey(pack_survey(survey)) == survey


@given(
    st.builds(
        Readiness,
        ready=st.booleans(),
        reason=st.text(max_size=2_000),
        samples=COUNTS,
        held_out=COUNTS,
        free_memory_mb=COUNTS,
        clock=st.none() | st.floats(0, 1e11),
        working=st.none() | st.booleans(),
    )
)
def test_readiness_comes_back(readiness: Readiness) -> None:
    assert unpack_readiness(pack_readiness(readiness)) == readiness


def test_an_empty_answer_may_be_asked() -> None:
    assert unpack_readiness(b"") == Readiness(ready=True)


def test_a_reason_cannot_steer_a_terminal() -> None:
    assert "\x1b" not in Readiness(ready=False, reason="\x1b[2J gone").reason


@pytest.mark.parametrize(
    ("change", "error"),
    [
        ({"version": 2}, VersionError),
        ({"version": True}, VersionError),
        ({"ready": 1}, MalformedError),
        ({"samples": -1}, MalformedError),
        ({"samples": 1.5}, MalformedError),
        ({"clock": -1.0}, MalformedError),
        ({"clock": 1e300}, MalformedError),
        ({"reason": None}, MalformedError),
        ({"working": 0}, MalformedError),
        ({"extra": 1}, MalformedError),
    ],
)
def test_other_readiness_is_refused(change: dict[str, object], error: type[Exception]) -> None:
    fields = {**json.loads(pack_readiness(Readiness())), **change}
    raw = json.dumps(fields, sort_keys=True, separators=(",", ":")).encode()
    with pytest.raises(error):
        unpack_readiness(raw)


@pytest.mark.parametrize("change", [{"job": "ab"}, {"split_port": 65_536}, {"split_port": "1"}])
def test_other_surveys_are_refused(change: dict[str, object]) -> None:
    fields = {**json.loads(pack_survey(Survey(job=JOB))), **change}
    raw = json.dumps(fields, sort_keys=True, separators=(",", ":")).encode()
    with pytest.raises(MalformedError):
        unpack_survey(raw)


def test_one_value_has_one_spelling() -> None:
    spaced = pack_survey(Survey(job=JOB)).replace(b":", b": ")
    with pytest.raises(MalformedError):
        unpack_survey(spaced)


def test_a_long_message_is_not_parsed() -> None:
    with pytest.raises(TooLongError):
        unpack_readiness(b" " * (MAX_READINESS_BYTES + 1))


@given(st.binary(max_size=300))
def test_noise_is_an_error_of_ours(raw: bytes) -> None:
    for unpack in (unpack_survey, unpack_readiness):
        try:
            unpack(raw)
        except ProtocolError:
            continue
        assert raw == b""
