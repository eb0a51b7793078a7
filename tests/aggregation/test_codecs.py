# SPDX-License-Identifier: Apache-2.0
"""The contract suite: what every codec must do."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as npst

from aggregation import (
    CODEC_NAMES,
    CodecError,
    PayloadNotFiniteError,
    PayloadTooLongError,
    PayloadTruncatedError,
    SpecMismatchError,
    UnknownCodecError,
    codec_named,
)
from protocol import ParamSpec

FINITE = st.floats(-60_000, 60_000, width=32)
SHAPES = npst.array_shapes(min_dims=0, max_dims=3, max_side=7)
TENSORS = st.dictionaries(
    st.text("ab.0", min_size=1, max_size=4),
    SHAPES.flatmap(lambda shape: npst.arrays(np.float32, shape, elements=FINITE)),
    min_size=1,
    max_size=4,
)
# Those without settings, whose payloads have one length; test_more_codecs.py has the others.
PLAIN = ("float32", "float16", "bfloat16", "one-bit")
ANY_CODEC = pytest.mark.parametrize("codec", [codec_named(name) for name in PLAIN])
LIMIT = 1 << 20


def example() -> dict[str, np.ndarray]:
    rng = np.random.default_rng(0)
    return {
        "b": rng.standard_normal((5, 9)).astype(np.float32),
        "a": rng.standard_normal(3).astype(np.float32),
    }


@ANY_CODEC
@given(TENSORS)
def test_decode_fits_the_spec_and_is_a_fixed_length(codec, tensors):
    spec = ParamSpec.of(tensors)
    before = {name: array.tobytes() for name, array in tensors.items()}
    payload = codec.encode(tensors)
    decoded = codec.decode(payload, spec, spec.nbytes)
    assert len(payload) == codec.payload_bytes(spec)
    assert spec.mismatch(decoded) is None
    assert all(np.isfinite(array).all() for array in decoded.values())
    assert {name: array.tobytes() for name, array in tensors.items()} == before
    assert codec.encode(dict(reversed(tensors.items()))) == payload, "order of the mapping matters"


@ANY_CODEC
@given(st.data())
def test_any_bytes_decode_to_finite_tensors_or_raise_codec_errors(codec, data):
    spec = ParamSpec.of(example())
    payload = data.draw(st.binary(min_size=0, max_size=codec.payload_bytes(spec) + 3))
    padded = payload + bytes(data.draw(st.integers(0, codec.payload_bytes(spec))))
    for hostile in (payload, padded, padded[: codec.payload_bytes(spec)]):
        try:
            decoded = codec.decode(hostile, spec, LIMIT)
        except CodecError as error:
            assert error.code
        else:
            assert spec.mismatch(decoded) is None
            assert all(np.isfinite(array).all() for array in decoded.values())


@ANY_CODEC
def test_decoded_tensors_are_own_aligned_and_writable(codec):
    spec = ParamSpec.of(example())
    payload = bytearray(b"\0" + codec.encode(example()))
    decoded = codec.decode(memoryview(payload)[1:], spec, LIMIT)
    copies = {name: array.copy() for name, array in decoded.items()}
    payload[:] = bytes(len(payload))
    for name, array in decoded.items():
        assert array.flags.aligned and array.flags.writeable and array.flags.c_contiguous
        np.testing.assert_array_equal(array, copies[name])


@ANY_CODEC
def test_layout_and_byte_order_in_memory_do_not_matter(codec):
    plain = example()
    odd = {name: np.asfortranarray(array).astype(">f4") for name, array in plain.items()}
    assert codec.encode(odd) == codec.encode(plain)


@ANY_CODEC
def test_decode_refuses_when_the_length_is_not_exact(codec):
    spec = ParamSpec.of(example())
    payload = codec.encode(example())
    for end in range(len(payload)):
        with pytest.raises(PayloadTruncatedError, match=f"expected {len(payload)} bytes"):
            codec.decode(payload[:end], spec, LIMIT)
    with pytest.raises(PayloadTooLongError):
        codec.decode(payload + b"\0", spec, LIMIT)


@ANY_CODEC
def test_decode_refuses_when_the_tensors_would_not_fit_the_limit(codec):
    spec = ParamSpec.of(example())
    with pytest.raises(PayloadTooLongError, match=f"at most {spec.nbytes - 1} bytes in memory"):
        codec.decode(codec.encode(example()), spec, spec.nbytes - 1)


@ANY_CODEC
@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("name", ["a", "b"])
def test_encode_refuses_when_a_value_is_not_finite(codec, value, name):
    tensors = example()
    tensors[name].flat[2] = value
    with pytest.raises(PayloadNotFiniteError, match=f'tensor "{name}"'):
        codec.encode(tensors)


@ANY_CODEC
@pytest.mark.parametrize("dtype", ["float64", "float16", "int64", "bool"])
def test_other_types_are_refused_both_ways(codec, dtype):
    tensors = {"a": np.zeros(2, dtype)}
    with pytest.raises(SpecMismatchError, match=f'"a" is {dtype}'):
        codec.encode(tensors)
    with pytest.raises(SpecMismatchError, match=f'"a" is {dtype}'):
        codec.decode(bytes(8), ParamSpec.of(tensors), LIMIT)


@ANY_CODEC
def test_what_is_no_tensor_is_refused(codec):
    with pytest.raises(SpecMismatchError, match="numpy array"):
        codec.encode({"a": [1.0]})
    with pytest.raises(SpecMismatchError, match="complex64"):
        codec.encode({"a": np.zeros(2, np.complex64)})


NAMES = (
    *PLAIN, "int8", "int8:channel", "int4", "int4:channel", "ternary:0.1", "ternary:0.05,mean",
    "ternary:0.1,std,2.0", "top-k:0.05", "random-k:0.05", "random-k:0.05,unbiased", "low-rank:2",
    "seed-scalars:64", "grid:8,2.0", "grid:4,0.5,0.1", "votes:1.0", "votes:1.0,ternary",
    "votes:1.0,ternary,0.1",
)  # fmt: skip


def test_names_map_to_codecs_and_back():
    assert [codec_named(name).name for name in NAMES] == list(NAMES)
    assert {name.partition(":")[0] for name in NAMES} == set(CODEC_NAMES)
    assert codec_named("ternary: 5e-2, scale=mean").name == "ternary:0.05,mean"


@pytest.mark.parametrize("name", ["ternary:0", "top-k:1.5", "low-rank:0", "ternary:0.1,most"])
def test_a_setting_that_cannot_be_is_refused(name):
    with pytest.raises(CodecError):
        codec_named(name)


@pytest.mark.parametrize("name", ["", "float64", "one_bit", "Float32", None])
def test_codec_named_lists_the_known_when_a_name_is_unknown(name):
    with pytest.raises(UnknownCodecError, match="float32, float16, bfloat16"):
        codec_named(name)
