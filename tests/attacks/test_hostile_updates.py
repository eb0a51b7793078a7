# SPDX-License-Identifier: Apache-2.0
"""Updates that a broken or hostile client may send; each is refused for its own reason."""

from __future__ import annotations

import json
import struct
import time
import tracemalloc
import zlib

import numpy as np
import pytest

from aggregation import AggregationError, WeightedMean, codec_named
from protocol import (
    ContainerError,
    ParamSpec,
    RejectionCode,
    UpdateHeader,
    pack_update,
    unpack_update,
)
from protocol.limits import MAX_HEADER_BYTES

CODECS = (
    "float32", "float16", "bfloat16", "int8", "int8:channel", "int4", "one-bit", "ternary:0.2",
    "top-k:0.2", "random-k:0.2", "low-rank:1", "seed-scalars:9",
)  # fmt: skip
DELTA = {
    "head": np.linspace(-1, 1, 50, dtype=np.float32).reshape(5, 10),
    "bias": np.zeros(5, np.float32),
}
SPEC = ParamSpec.of(DELTA)
BUDGET = 4096
FIELDS = {
    "client": "a",
    "codec": "float32",
    "job": "5c" * 32,
    "metrics": {"loss": 0.5},
    "nonce": "0f" * 16,
    "round": 3,
    "samples": 40,
}


def honest(codec: str = "float32") -> bytes:
    return pack_update(UpdateHeader(**FIELDS | {"codec": codec}), codec_named(codec).encode(DELTA))


def forged(header: bytes, payload: bytes = b"", magic: bytes = b"FLUP", version: int = 1) -> bytes:
    """A container with a right checksum around whatever header bytes."""
    start = struct.pack("<4sHI", magic, version, len(header)) + header
    body = start + struct.pack("<Q", len(payload)) + payload
    return body + struct.pack("<I", zlib.crc32(body))


def canonical(**changes) -> bytes:
    return json.dumps(FIELDS | changes, sort_keys=True, separators=(",", ":")).encode()


def code_of(blob: bytes, spec: ParamSpec = SPEC) -> RejectionCode:
    """Reads an update as a coordinator does; the code with which it is refused."""
    with pytest.raises((ContainerError, AggregationError)) as caught:
        header, payload = unpack_update(blob, max_bytes=BUDGET)
        codec_named(header.codec).decode(payload, spec, BUDGET)
    message = str(caught.value)
    assert len(message) < 400
    assert message.isprintable()
    return caught.value.code


def test_the_honest_update_is_read():
    for name in CODECS:
        header, payload = unpack_update(honest(name), max_bytes=BUDGET)
        assert header.samples == 40
        assert SPEC.mismatch(codec_named(name).decode(payload, SPEC, BUDGET)) is None
    assert forged(canonical(), codec_named("float32").encode(DELTA)) == honest()


@pytest.mark.parametrize("codec", CODECS)
def test_an_update_is_refused_when_truncated_anywhere(codec):
    blob = honest(codec)
    assert {code_of(blob[:end]) for end in range(len(blob))} == {RejectionCode.TRUNCATED}


@pytest.mark.parametrize("extra", [1, 1000])
def test_an_update_is_refused_when_bytes_follow_it(extra):
    assert code_of(honest() + bytes(extra)) is RejectionCode.TOO_LONG


def test_an_update_is_refused_when_longer_than_the_budget():
    assert code_of(honest() + bytes(BUDGET)) is RejectionCode.TOO_LONG


@pytest.mark.parametrize("codec", CODECS)
def test_an_update_is_refused_when_its_payload_is_longer_than_its_spec_allows(codec):
    payload = codec_named(codec).encode(DELTA) + bytes(4)
    assert code_of(forged(canonical(codec=codec), payload)) is RejectionCode.TOO_LONG


@pytest.mark.parametrize("codec", CODECS)
def test_an_update_is_refused_when_its_payload_is_shorter_than_its_spec_says(codec):
    payload = codec_named(codec).encode(DELTA)[:-1]
    assert code_of(forged(canonical(codec=codec), payload)) is RejectionCode.TRUNCATED


@pytest.mark.parametrize(
    ("tensors", "code"),
    [
        ({"head": DELTA["head"]}, RejectionCode.TRUNCATED),
        (DELTA | {"more": np.zeros(3, "f4")}, RejectionCode.TOO_LONG),
        (DELTA | {"head": np.zeros((5, 11), "f4")}, RejectionCode.TOO_LONG),
    ],
)
def test_an_update_is_refused_when_it_holds_other_tensors(tensors, code):
    payload = codec_named("float32").encode(tensors)
    assert code_of(forged(canonical(), payload)) is code


@pytest.mark.parametrize(
    "tensors",
    [
        {"head": DELTA["head"], "biaS": DELTA["bias"]},
        {"head": DELTA["head"].T, "bias": DELTA["bias"]},
        {"head": DELTA["head"].astype("f8"), "bias": DELTA["bias"]},
    ],
    ids=["name", "shape", "dtype"],
)
def test_tensors_are_refused_by_the_merger_when_name_shape_or_type_is_wrong(tensors):
    assert SPEC.mismatch(tensors) is not None
    merger = WeightedMean()
    with pytest.raises(AggregationError, match="cannot merge: tensor"):
        merger.add(merger.init(SPEC), tensors, 1)


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize(("codec", "dtype"), [("float32", "<f4"), ("float16", "<f2")])
def test_an_update_is_refused_when_a_value_is_not_finite(value, codec, dtype):
    values = np.zeros(SPEC.size, dtype)
    values[17] = value
    blob = forged(canonical(codec=codec), values.tobytes())
    assert code_of(blob) is RejectionCode.NOT_FINITE


@pytest.mark.parametrize("scalars", [(np.nan, 1), (0, np.inf), (3e38, 3e38)])
def test_a_one_bit_update_is_refused_when_its_scalars_decode_to_infinity(scalars):
    payload = bytes(20) + np.array(scalars, "<f4").tobytes() + bytes(7)
    assert code_of(forged(canonical(codec="one-bit"), payload)) is RejectionCode.NOT_FINITE


def test_an_update_is_refused_when_a_byte_changed_on_the_way():
    blob = honest()
    codes = set()
    for position in range(len(blob)):
        changed = bytearray(blob)
        changed[position] ^= 0x01
        codes.add(code_of(bytes(changed)))
    assert RejectionCode.CORRUPTED in codes
    assert codes <= {
        RejectionCode.CORRUPTED,
        RejectionCode.MALFORMED,  # the magic
        RejectionCode.WRONG_VERSION,
        RejectionCode.TRUNCATED,  # the lengths
        RejectionCode.TOO_LONG,
    }


@pytest.mark.parametrize("magic", [b"FLPL", b"\x80\x04\x95.", b"PK\x03\x04"])
def test_a_file_of_another_kind_is_refused(magic):
    assert code_of(forged(canonical(), magic=magic)) is RejectionCode.MALFORMED


@pytest.mark.parametrize("version", [0, 2, 65_535])
def test_another_version_is_refused(version):
    assert code_of(forged(canonical(), version=version)) is RejectionCode.WRONG_VERSION


@pytest.mark.parametrize("samples", [0, -1, 10**18, 1e18, True, "40", None])
def test_a_claimed_weight_is_refused_when_it_could_take_the_model_over(samples):
    assert code_of(forged(canonical(samples=samples))) is RejectionCode.BAD_WEIGHT


@pytest.mark.parametrize("loss", ["1e999", "-1e999"])
def test_a_metric_is_refused_when_it_overflows(loss):
    header = canonical(metrics={"loss": 0.5}).replace(b"0.5", loss.encode())
    assert code_of(forged(header)) is RejectionCode.NOT_FINITE


@pytest.mark.parametrize(
    "header",
    [
        b"",
        b"{}",
        b"[]",
        b"7",
        b"\xff\xfe{\x00}\x00",
        b'{"client":"\xc3\xa9"}',
        canonical() + b" ",
        canonical().replace(b":", b": ", 1),
        canonical().replace(b'"round":3', b'"round":3.0'),
        canonical().replace(b"0.5", b"0.50"),
        canonical().replace(b"0.5", b"NaN"),
        canonical().replace(b'"round":3', b'"round":3,"round":3'),
        canonical().replace(b'"a"', b'"\\u0061"'),
        canonical(extra=1),
        canonical(client=""),
        canonical(client="\ud800"),
        canonical(client="\x1b[2J"),
        canonical(client={"$gt": ""}),
        canonical(job="5C" * 32),
        canonical(round=-1),
        canonical(nonce="../.."),
        canonical(metrics=[]),
        canonical(metrics={"loss": [0.5]}),
        canonical(metrics={str(i): 0.0 for i in range(1025)}),
        b"[" * 60_000,
        b"9" * 60_000,
        canonical().replace(b'"round":3', b'"round":' + b"9" * 5_000),
        canonical().replace(b"0.5", b"9" * 5_000),
    ],
    ids=lambda header: repr(header[:14]),
)
def test_a_header_is_refused_when_it_is_not_the_one_canonical_spelling(header):
    blob = forged(header)
    with pytest.raises(ContainerError) as caught:
        unpack_update(blob, max_bytes=1 << 20)
    assert caught.value.code is RejectionCode.MALFORMED
    assert len(str(caught.value)) < 400


def test_a_header_is_refused_before_it_is_read_when_it_is_huge():
    blob = forged(b" " * (MAX_HEADER_BYTES + 1))
    with pytest.raises(ContainerError, match="header: expected at most"):
        unpack_update(blob, max_bytes=1 << 20)


def test_an_unknown_codec_is_refused():
    assert code_of(forged(canonical(codec="pickle"))) is RejectionCode.WRONG_CODEC


@pytest.mark.parametrize("at", ["header", "payload"])
def test_a_claimed_length_takes_no_memory_and_no_time(at):
    header = canonical()
    if at == "header":
        blob = struct.pack("<4sHI", b"FLUP", 1, 2**32 - 1) + header
    else:
        start = struct.pack("<4sHI", b"FLUP", 1, len(header)) + header
        blob = start + struct.pack("<Q", 2**64 - 1) + bytes(100)
    tracemalloc.start()
    started = time.perf_counter()
    with pytest.raises(ContainerError):
        unpack_update(blob, max_bytes=BUDGET)
    seconds = time.perf_counter() - started
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 1 << 20
    assert seconds < 1


@pytest.mark.parametrize("codec", CODECS)
def test_a_small_payload_cannot_be_decoded_into_more_memory_than_the_limit(codec):
    spec = ParamSpec.from_json([["a", "float32", [1 << 30]]])
    with pytest.raises(AggregationError) as caught:
        codec_named(codec).decode(b"", spec, 1 << 20)
    assert caught.value.code is RejectionCode.TOO_LONG
