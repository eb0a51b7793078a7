# SPDX-License-Identifier: Apache-2.0
"""Golden bytes: another program, or an older release, reads what this one writes."""

from __future__ import annotations

import json
import struct
import zlib

from protocol import Plan, UpdateHeader, pack_plan, pack_update, unpack_plan, unpack_update

UPDATE = UpdateHeader(
    job="00" * 32,
    round=7,
    nonce="0123456789abcdef",
    client="Zoë",
    codec="float32",
    samples=40,
    metrics={"loss": 0.5, "accuracy": 1.0},
)
UPDATE_BYTES = (
    b"FLUP\x01\x00\xc8\x00\x00\x00"
    b'{"client":"Zo\\u00eb","codec":"float32","job":"'
    b"0000000000000000000000000000000000000000000000000000000000000000"
    b'","metrics":{"accuracy":1.0,"loss":0.5},"nonce":"0123456789abcdef","round":7,"samples":40}'
    b"\x04\x00\x00\x00\x00\x00\x00\x00\x00\x00\x80?"
)
PLAN = Plan(
    job="00" * 32,
    round=7,
    nonce="0123456789abcdef",
    client="a",
    downlink_codec="float32",
    uplink_codec="one-bit",
    task="fit",
    learning_rate=0.05,
    local_epochs=1,
    seed=9,
    max_update_bytes=1000,
)


def test_an_update_has_these_bytes():
    payload = struct.pack("<f", 1.0)
    blob = pack_update(UPDATE, payload)
    assert blob[:-4] == UPDATE_BYTES
    assert blob[-4:].hex() == "d70d7957"
    assert unpack_update(blob, max_bytes=len(blob)) == (UPDATE, payload)


def test_a_plan_is_what_the_format_says_field_by_field():
    blob = pack_plan(PLAN, b"xyz")
    magic, version, header_bytes = struct.unpack_from("<4sHI", blob)
    assert (magic, version) == (b"FLPL", 1)
    assert json.loads(blob[10 : 10 + header_bytes]) == {
        "base_round": None,
        "client": "a",
        "clip": 0.0,
        "noise": 0.0,
        "corrupt": 0.0,
        "downlink_codec": "float32",
        "dropouts": 0.0,
        "error_feedback": False,
        "full_weight_samples": 0,
        "job": "00" * 32,
        "keep": False,
        "learning_rate": 0.05,
        "local_epochs": 1,
        "local_steps": 0,
        "max_update_bytes": 1000,
        "min_survivors": 0,
        "mix": None,
        "nonce": "0123456789abcdef",
        "offset_ranks": [],
        "offset_round": 0,
        "rank": 0,
        "round": 7,
        "seed": 9,
        "sends": "all",
        "shares": "all",
        "smoothing": 0.0,
        "task": "fit",
        "tells": ["loss"],
        "trains": "all",
        "uplink_codec": "one-bit",
    }
    assert blob[10 + header_bytes : -4] == struct.pack("<Q", 3) + b"xyz"
    assert struct.unpack("<I", blob[-4:]) == (zlib.crc32(blob[:-4]),)
    assert unpack_plan(blob, max_bytes=len(blob)) == (PLAN, b"xyz")
