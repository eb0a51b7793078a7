# SPDX-License-Identifier: Apache-2.0
"""A message's content is read by its attributes, and nothing else than ours is accepted."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from protocol import envelope
from protocol.errors import MalformedError


def content_of(**changes: Any) -> dict[str, Any]:
    array = {"dtype": "uint8", "stype": envelope.ARRAY_TYPE, "data": b"blob"}
    client = changes.pop("client", "c1")
    return {
        "payload": {"blob": SimpleNamespace(**{**array, **changes})},
        "header": {"client": client},
    }


def test_name_and_bytes_are_read() -> None:
    assert envelope.read_content(content_of()) == ("c1", b"blob")


@pytest.mark.parametrize(
    "content",
    [
        {},
        {"payload": {}, "header": {}},
        {"payload": {"blob": b"blob"}, "header": {"client": "c1"}},
        {"payload": None, "header": {"client": "c1"}},
        content_of(dtype="float32"),
        content_of(stype="numpy.ndarray"),
        content_of(data="blob"),
        content_of(client=""),
        content_of(client="x" * 10_000),
        content_of(client=7),
        content_of(client="a\nb"),
    ],
)
def test_other_contents_are_malformed(content: dict[str, Any]) -> None:
    with pytest.raises(MalformedError):
        envelope.read_content(content)
