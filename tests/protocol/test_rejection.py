# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import pytest

from protocol import Rejection, RejectionCode, errors
from protocol.limits import MAX_REASON_LENGTH


def test_str_says_who_why_and_that_the_round_goes_on():
    reason = 'tensor "lora_A" is float64 [8, 512], spec says float32 [8, 768]'
    rejection = Rejection(client="7f3a", round=12, code=RejectionCode.WRONG_SPEC, reason=reason)
    assert str(rejection) == (
        'client 7f3a: tensor "lora_A" is float64 [8, 512], spec says float32 [8, 768]; '
        "update rejected, round 12 continues (E203)"
    )


def test_hostile_text_is_made_displayable():
    rejection = Rejection(
        client="a\x1b[2J", round=1, code=RejectionCode.MALFORMED, reason="x\n" * MAX_REASON_LENGTH
    )
    assert rejection.client == "a\ufffd[2J"
    assert len(rejection.reason) == MAX_REASON_LENGTH
    assert str(rejection).isprintable()


def test_codes_are_unique_and_keep_their_numbers():
    numbers = [int(code.removeprefix("E")) for code in RejectionCode]
    assert numbers == list(range(201, 201 + len(numbers)))
    assert RejectionCode("E204") is RejectionCode.NOT_FINITE
    with pytest.raises(ValueError, match="E999"):
        Rejection(client="a", round=1, code="E999", reason="b")


def test_every_container_error_has_the_code_that_its_tree_says():
    for kind in errors.ContainerError.__subclasses__():
        (line,) = [line for line in errors.__doc__.splitlines() if f"─ {kind.__name__} " in line]
        assert kind.code.value in line
