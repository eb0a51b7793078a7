# SPDX-License-Identifier: Apache-2.0
"""Hostile payloads: whatever arrives, a codec raises a CodecError or gives finite tensors of the
spec, in time and memory that the spec bounds. A new codec is one more entry of CODECS."""

from __future__ import annotations

import tracemalloc
from collections.abc import Iterator
from typing import Final

import numpy as np
import pytest

from aggregation.codecs.bfloat16 import BFloat16
from aggregation.codecs.codec import Codec, Seeds
from aggregation.codecs.float16 import Float16
from aggregation.codecs.float32 import Float32
from aggregation.codecs.grid import Grid
from aggregation.codecs.int4 import Int4
from aggregation.codecs.int8 import Int8
from aggregation.codecs.low_rank import LowRank
from aggregation.codecs.one_bit import OneBit
from aggregation.codecs.random_k import RandomK
from aggregation.codecs.seed_scalars import SeedScalars
from aggregation.codecs.ternary import Ternary
from aggregation.codecs.top_k import TopK
from aggregation.codecs.votes import Votes
from aggregation.errors import CodecError
from protocol.tensors import ParamSpec

CODECS: Final[list[Codec]] = [
    Float32(),
    Float16(),
    OneBit(),
    Ternary(density=0.05),
    Ternary(density=0.2, scale="mean"),
    Ternary(density=0.5),
    TopK(density=0.05),
    TopK(density=0.6),
    BFloat16(),
    Grid(bits=5, norm=1.0, density=0.3),
    Votes(norm=1.0, ternary=True),
    Int8(),
    Int8(per_channel=True),
    Int4(per_channel=True),
    LowRank(rank=3),
    RandomK(density=0.2),
    SeedScalars(count=20),
]
ANY_CODEC = pytest.mark.parametrize("codec", CODECS, ids=lambda codec: codec.name)
SEEDS: Final = Seeds(own=3, shared=4)
BESIDE: Final = 16 * 1024 * 1024  # bytes that decoding may take beside tensors and payload

SHAPES: Final[list[dict[str, tuple[int, ...]]]] = [
    {"a": (3,)},
    {"a": (), "b": (7, 5)},
    {"layer.0.A": (16, 8), "layer.0.B": (8, 31), "scale": ()},
    {"a": (40, 30)},
]
SPECIAL: Final = [
    np.array([value], "<f4").tobytes()
    for value in (np.nan, np.inf, -np.inf, -0.0, -1.0, 3.4e38, 1e-45)
]


def example(number: int, *, seed: int = 0) -> dict[str, np.ndarray]:
    rng = np.random.default_rng([seed, number])
    return {
        name: rng.standard_normal(shape).astype(np.float32)
        for name, shape in SHAPES[number].items()
    }


def accepts(codec: Codec, payload: bytes, spec: ParamSpec) -> bool:
    """The fuzz target. Any exception but a CodecError is one that the suite sees."""
    try:
        decoded = codec.decode(payload, spec, spec.nbytes, seeds=SEEDS)
    except CodecError as error:
        assert error.code
        assert str(error)
        return False
    assert spec.mismatch(decoded) is None
    assert all(np.isfinite(array).all() for array in decoded.values())
    return True


def mutated(rng: np.random.Generator, payload: bytes, other: bytes) -> bytes:
    """A few changes of the kinds that broken and hostile senders make."""
    data = bytearray(payload)
    for _ in range(int(rng.integers(1, 5))):
        at = int(rng.integers(0, len(data) + 1))
        length = int(rng.integers(1, 9))
        match int(rng.integers(0, 9)):
            case 0 if data:
                at %= len(data)
                data[at] ^= 1 << int(rng.integers(0, 8))
            case 1 if data:
                data[at % len(data)] = int(rng.integers(0, 256))
            case 2:
                del data[at : at + length]
            case 3:
                data[at:at] = rng.bytes(length)
            case 4:
                data[at : at + length] = bytes(length)
            case 5:
                data[at : at + length] = b"\xff" * length
            case 6:
                data[at : at + 4] = SPECIAL[int(rng.integers(0, len(SPECIAL)))]
            case 7:
                data[at:] = other[at:]
            case _:
                data[at:at] = data[at : at + length]
    return bytes(data)


def hostile(codec: Codec, number: int, cases: int) -> Iterator[bytes]:
    rng = np.random.default_rng([cases, number])
    tensors = example(number)
    valid = codec.encode(tensors, seeds=SEEDS)
    other = codec.encode(example(number, seed=1), seeds=SEEDS)
    most = codec.payload_bytes(ParamSpec.of(tensors))
    for _ in range(cases):
        if rng.random() < 0.25:
            yield rng.bytes(int(rng.integers(0, most + 4)))
        else:
            yield mutated(rng, valid, other)


def fuzz(codec: Codec, cases: int) -> None:
    for number in range(len(SHAPES)):
        spec = ParamSpec.of(example(number))
        for payload in hostile(codec, number, cases):
            accepts(codec, payload, spec)


@ANY_CODEC
def test_random_and_mutated_payloads_are_decoded_or_refused(codec):
    fuzz(codec, 250)


@pytest.mark.long
@ANY_CODEC
def test_many_random_and_mutated_payloads_are_decoded_or_refused(codec):
    fuzz(codec, 50_000)


@ANY_CODEC
@pytest.mark.parametrize("number", [0, 1, 2])
def test_every_flipped_bit_is_decoded_or_refused(codec, number):
    spec = ParamSpec.of(example(number))
    payload = bytearray(codec.encode(example(number), seeds=SEEDS))
    # every bit of short payloads; of long ones the ends, and a part of what lies between
    bits = np.arange(8 * len(payload))
    if len(bits) > 2000:
        between = np.random.default_rng(0).choice(bits[400:-400], 1000, replace=False)
        bits = np.concatenate([bits[:400], between, bits[-400:]])
    for bit in bits.tolist():
        payload[bit // 8] ^= 1 << (bit % 8)
        accepts(codec, bytes(payload), spec)
        payload[bit // 8] ^= 1 << (bit % 8)
    assert accepts(codec, bytes(payload), spec)


@ANY_CODEC
@pytest.mark.parametrize("number", [0, 1, 2])
def test_every_cut_and_every_addition_is_refused(codec, number):
    spec = ParamSpec.of(example(number))
    payload = codec.encode(example(number), seeds=SEEDS)
    for end in range(len(payload)):
        assert not accepts(codec, payload[:end], spec)
    for more in (b"\0", b"\xff", bytes(5), payload, bytes(10_000)):
        assert not accepts(codec, payload + more, spec)


@ANY_CODEC
def test_payloads_of_other_specs_are_decoded_or_refused(codec):
    payloads = [codec.encode(example(number), seeds=SEEDS) for number in range(len(SHAPES))]
    for number in range(len(SHAPES)):
        spec = ParamSpec.of(example(number))
        for other, payload in enumerate(payloads):
            assert accepts(codec, payload, spec) or other != number


@ANY_CODEC
def test_payloads_of_other_codecs_are_decoded_or_refused(codec):
    for number in range(len(SHAPES)):
        spec = ParamSpec.of(example(number))
        for other in CODECS:
            accepts(codec, other.encode(example(number), seeds=SEEDS), spec)


@ANY_CODEC
def test_no_payload_takes_more_memory_than_tensors_and_16_mib(codec):
    rng = np.random.default_rng(0)
    tensors = {"a": rng.standard_normal((4, 1_000_000), np.float32)}
    spec = ParamSpec.of(tensors)
    valid = codec.encode(tensors, seeds=SEEDS)
    most = codec.payload_bytes(spec)
    bombs = [
        valid,
        valid[:-1],
        mutated(rng, valid, valid),
        bytes(most),
        b"\xff" * most,
        valid[: len(valid) // 2] + b"\xff" * (most - len(valid) // 2),
        valid[: len(valid) // 2] + bytes(most - len(valid) // 2),
        rng.bytes(most),
        bytes(4) + rng.bytes(most - 4),
        bytes(40_000_000),
    ]
    for payload in bombs:
        tracemalloc.start()
        try:
            accepts(codec, payload, spec)
            # the target's own check of the tensors takes a byte for each value
            peak = tracemalloc.get_traced_memory()[1] - spec.size
        finally:
            tracemalloc.stop()
        assert peak <= spec.nbytes + BESIDE


@ANY_CODEC
def test_tensors_beyond_the_limit_are_refused_before_memory_is_taken(codec):
    spec = ParamSpec.of({"a": np.zeros(1_000_000, np.float32)})
    payload = codec.encode({"a": np.ones(1_000_000, np.float32)}, seeds=SEEDS)
    tracemalloc.start()
    try:
        with pytest.raises(CodecError, match="bytes in memory"):
            codec.decode(payload, spec, spec.nbytes - 1, seeds=SEEDS)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak < 100_000
