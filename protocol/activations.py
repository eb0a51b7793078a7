# SPDX-License-Identifier: Apache-2.0
"""Hidden states and their gradients as bytes: what crosses the cut of a split network.

Three forms, little-endian, samples and tokens in order:

    float32  4 bytes a value, as it is: the faithful run
    float16  2 bytes a value; the largest magnitude is 65,504
    int8     a float32 scale a token, its largest magnitude / 127, all scales first; then a byte
             a value: value / scale, rounded

Masks of texts travel as a byte a token, 1 where there is one.
"""

from __future__ import annotations

import math
from typing import Final

import numpy as np

from protocol.errors import MalformedError, NotFiniteError, TooLongError, TruncatedError
from protocol.tensors import TensorSpec

FORMS: Final = ("float32", "float16", "int8")

_LEVELS: Final = 127.0


def encode_states(states: np.ndarray, form: str) -> bytes:
    """float32 [B, ..., D] as bytes.

    Raises: ValueError for a value that is not finite, or too large for float16.
    """
    if not np.isfinite(states).all():
        raise ValueError("hidden states: expected finite values; lower the learning rate")
    if form == "float32":
        return np.ascontiguousarray(states, "<f4").tobytes()
    if form == "float16":
        with np.errstate(over="ignore"):
            small = np.ascontiguousarray(states, "<f2")
        if not np.isfinite(small).all():
            raise ValueError(
                f"hidden states: expected magnitudes up to 65504 for float16, found "
                f"{np.abs(states).max():g}; take float32 or int8"
            )
        return small.tobytes()
    scales = np.abs(states).max(axis=-1, keepdims=True) / np.float32(_LEVELS)
    # A scale so small that it is no normal number is of values that are as good as zero.
    steps = np.where(scales > np.finfo(np.float32).tiny, scales, np.float32(math.inf))
    levels = np.rint(states / steps).astype(np.int8)
    return scales.astype("<f4").tobytes() + levels.tobytes()


def decode_states(raw: bytes | memoryview, spec: TensorSpec, rows: int, form: str) -> np.ndarray:
    """The inverse of `encode_states`: float32 [rows, *spec.shape].

    Raises: TruncatedError, TooLongError, NotFiniteError.
    """
    shape = (rows, *spec.shape)
    size = encoded_bytes(spec, rows, form)
    if len(raw) != size:
        wrong = TruncatedError if len(raw) < size else TooLongError
        raise wrong(f"hidden states: expected {size} bytes of {form}, found {len(raw)}")
    values: np.ndarray
    if form == "int8":
        tokens = math.prod(shape[:-1])
        scales = np.frombuffer(raw, "<f4", tokens).reshape(*shape[:-1], 1)
        levels = np.frombuffer(raw, np.int8, offset=4 * tokens).reshape(shape)
        with np.errstate(over="ignore", invalid="ignore"):
            values = levels * scales.astype(np.float32)
    else:
        kind = "<f4" if form == "float32" else "<f2"
        values = np.frombuffer(raw, kind).reshape(shape).astype(np.float32)
    if not np.isfinite(values).all():
        raise NotFiniteError("hidden states: expected finite values")
    return values


def encoded_bytes(spec: TensorSpec, rows: int, form: str) -> int:
    """Bytes of so many samples."""
    values = rows * spec.size
    if form == "int8":
        return values + 4 * (values // spec.shape[-1])
    return values * (4 if form == "float32" else 2)


def encode_mask(mask: np.ndarray) -> bytes:
    """An additive mask [B, 1, 1, T], 0 to keep, as a byte a token."""
    return (mask == 0).astype(np.uint8).tobytes()


def decode_mask(raw: bytes | memoryview, spec: TensorSpec, rows: int, masked: float) -> np.ndarray:
    """The inverse: float32 [rows, *spec.shape] of 0 and `masked`.

    Raises: TruncatedError, TooLongError, MalformedError.
    """
    size = rows * spec.size
    if len(raw) != size:
        wrong = TruncatedError if len(raw) < size else TooLongError
        raise wrong(f"mask: expected {size} bytes, found {len(raw)}")
    kept = np.frombuffer(raw, np.uint8)
    if kept.max(initial=0) > 1:
        raise MalformedError(f"mask: expected 0 and 1, found {kept.max()}")
    return np.where(kept == 1, np.float32(0), np.float32(masked)).reshape(rows, *spec.shape)
