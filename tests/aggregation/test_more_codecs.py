# SPDX-License-Identifier: Apache-2.0
"""What every codec must do, for those that have settings or seeds: test_codecs.py in short, at
small settings, with other seeds than zeros."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as npst

from aggregation import (
    CodecError,
    PayloadNotFiniteError,
    PayloadTooLongError,
    PayloadTruncatedError,
    Seeds,
    SpecMismatchError,
)
from aggregation.codecs.bfloat16 import BFloat16
from aggregation.codecs.int4 import Int4
from aggregation.codecs.int8 import Int8
from aggregation.codecs.low_rank import LowRank
from aggregation.codecs.random_k import RandomK
from aggregation.codecs.seed_scalars import SeedScalars
from protocol import ParamSpec

CODECS = [
    BFloat16(),
    Int8(),
    Int8(per_channel=True),
    Int4(),
    Int4(per_channel=True),
    LowRank(rank=3),
    RandomK(density=0.2),
    RandomK(density=0.2, unbiased=True),
    SeedScalars(count=5),
    SeedScalars(count=70),
]
ANY = pytest.mark.parametrize("codec", CODECS, ids=lambda codec: codec.name)
FINITE = st.floats(-60_000, 60_000, width=32)
SHAPES = npst.array_shapes(min_dims=0, max_dims=3, max_side=7)
TENSORS = st.dictionaries(
    st.text("ab.0", min_size=1, max_size=4),
    SHAPES.flatmap(lambda shape: npst.arrays(np.float32, shape, elements=FINITE)),
    min_size=0,
    max_size=4,
)
SEEDS = Seeds(own=2**63 + 5, shared=2**64 - 7)
LIMIT = 1 << 20


def example() -> dict[str, np.ndarray]:
    rng = np.random.default_rng(0)
    return {
        "b": rng.standard_normal((5, 9)).astype(np.float32),
        "a": rng.standard_normal(3).astype(np.float32),
    }


@ANY
@given(tensors=TENSORS)
def test_decode_fits_the_spec_and_is_a_fixed_length(codec, tensors):
    spec = ParamSpec.of(tensors)
    before = {name: array.tobytes() for name, array in tensors.items()}
    payload = codec.encode(tensors, seeds=SEEDS)
    decoded = codec.decode(payload, spec, spec.nbytes, seeds=SEEDS)
    assert len(payload) == codec.payload_bytes(spec)
    assert spec.mismatch(decoded) is None
    assert all(np.isfinite(array).all() for array in decoded.values())
    assert {name: array.tobytes() for name, array in tensors.items()} == before
    assert codec.encode(dict(reversed(tensors.items())), seeds=SEEDS) == payload


def decoded_or_refused(codec, payload: bytes, spec: ParamSpec) -> None:
    try:
        decoded = codec.decode(payload, spec, LIMIT, seeds=SEEDS)
    except CodecError as error:
        assert error.code
    else:
        assert spec.mismatch(decoded) is None
        assert all(np.isfinite(array).all() for array in decoded.values())


@ANY
@given(data=st.data())
def test_any_bytes_decode_to_finite_tensors_or_raise_codec_errors(codec, data):
    spec = ParamSpec.of(example())
    size = codec.payload_bytes(spec)
    payload = data.draw(st.binary(min_size=0, max_size=size + 3))
    for hostile in (payload, payload.ljust(size, b"\0"), payload.ljust(size, b"\xff")[:size]):
        decoded_or_refused(codec, hostile, spec)


@ANY
def test_flipped_bits_decode_to_finite_tensors_or_raise_codec_errors(codec):
    spec = ParamSpec.of(example())
    payload = bytearray(codec.encode(example(), seeds=SEEDS))
    for bit in range(8 * len(payload)):
        payload[bit // 8] ^= 1 << bit % 8
        decoded_or_refused(codec, bytes(payload), spec)
        payload[bit // 8] ^= 1 << bit % 8


@ANY
def test_decoded_tensors_are_own_aligned_and_writable(codec):
    spec = ParamSpec.of(example())
    payload = bytearray(b"\0" + codec.encode(example(), seeds=SEEDS))
    decoded = codec.decode(memoryview(payload)[1:], spec, LIMIT, seeds=SEEDS)
    copies = {name: array.copy() for name, array in decoded.items()}
    payload[:] = bytes(len(payload))
    for name, array in decoded.items():
        assert array.flags.aligned and array.flags.writeable and array.flags.c_contiguous
        np.testing.assert_array_equal(array, copies[name])


@ANY
def test_layout_and_byte_order_in_memory_do_not_matter(codec):
    plain = example()
    odd = {name: np.asfortranarray(array).astype(">f4") for name, array in plain.items()}
    assert codec.encode(odd, seeds=SEEDS) == codec.encode(plain, seeds=SEEDS)


@ANY
def test_decode_refuses_when_the_length_is_not_exact(codec):
    spec = ParamSpec.of(example())
    payload = codec.encode(example(), seeds=SEEDS)
    for end in range(len(payload)):
        with pytest.raises(PayloadTruncatedError, match=f"expected {len(payload)} bytes"):
            codec.decode(payload[:end], spec, LIMIT, seeds=SEEDS)
    with pytest.raises(PayloadTooLongError):
        codec.decode(payload + b"\0", spec, LIMIT, seeds=SEEDS)


@pytest.mark.parametrize(
    "codec", [c for c in CODECS if not isinstance(c, SeedScalars)], ids=lambda codec: codec.name
)
def test_decode_refuses_when_the_spec_is_another(codec):
    # seed scalars have the same length for every spec, and can be expanded to any
    payload = codec.encode(example(), seeds=SEEDS)
    smaller = {name: array[:-1] for name, array in example().items()}
    larger = example() | {"c": np.zeros((3, 3), "f4")}
    for tensors, error in ((smaller, PayloadTooLongError), (larger, PayloadTruncatedError)):
        with pytest.raises(error):
            codec.decode(payload, ParamSpec.of(tensors), LIMIT, seeds=SEEDS)


@ANY
def test_decode_refuses_when_the_tensors_would_not_fit_the_limit(codec):
    spec = ParamSpec.of(example())
    payload = codec.encode(example(), seeds=SEEDS)
    with pytest.raises(PayloadTooLongError, match=f"at most {spec.nbytes - 1} bytes in memory"):
        codec.decode(payload, spec, spec.nbytes - 1, seeds=SEEDS)


@ANY
@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("name", ["a", "b"])
def test_encode_refuses_when_a_value_is_not_finite(codec, value, name):
    tensors = example()
    tensors[name].flat[2] = value
    with pytest.raises(PayloadNotFiniteError, match=f'tensor "{name}"'):
        codec.encode(tensors, seeds=SEEDS)


@ANY
@pytest.mark.parametrize("dtype", ["float64", "float16", "int64", "bool"])
def test_other_types_are_refused_both_ways(codec, dtype):
    tensors = {"a": np.zeros(2, dtype)}
    with pytest.raises(SpecMismatchError, match=f'"a" is {dtype}'):
        codec.encode(tensors)
    with pytest.raises(SpecMismatchError, match=f'"a" is {dtype}'):
        codec.decode(bytes(8), ParamSpec.of(tensors), LIMIT)


@ANY
def test_what_is_no_tensor_is_refused(codec):
    with pytest.raises(SpecMismatchError, match="numpy array"):
        codec.encode({"a": [1.0]})
    with pytest.raises(SpecMismatchError, match="complex64"):
        codec.encode({"a": np.zeros(2, np.complex64)})
