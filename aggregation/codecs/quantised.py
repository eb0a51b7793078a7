# SPDX-License-Identifier: Apache-2.0
"""What the integer codecs share: symmetric scales, stochastic rounding, packing.

For b bits and L = 2ᵇ⁻¹ - 1 levels on either side, a tensor (or channel) of values x has the scale
s = max|x| / L and is written as integers c from -L to L with E[c·s] = x, to 2⁻³² of s: x/s is
rounded up with the probability of its fraction, so that the errors of many clients and rounds
cancel. Each single error is below s.

*Source* the scheme of QSGD, Alistarh et al., NeurIPS 2017 (arXiv 1610.02132).
*Differs from source*: scaled by the largest magnitude, not by the norm, and written as integers of
one width, not by an entropy code; the scale is rounded up to float32, so that no value lies beyond
L·s and none is cut off.

A tensor of n values in g channels (1, or the length of its first axis) is written as

    4·g bytes     scales, float32, 0 or more; 0 for a channel of zeros
    ⌈n·b/8⌉       integers, two's complement; of 4 bits: two a byte, lower half first, an unused
                  half is 0

and one for which that is no fewer bytes than its float32 values, as those.
"""

from __future__ import annotations

from typing import Final, Literal

import numpy as np

from aggregation.codecs.codec import (
    Payload,
    count_not_finite,
    float32_spec,
    require_finite,
    require_float32,
    require_length,
    require_memory,
    split,
)
from aggregation.errors import CodecError, PayloadMalformedError, PayloadNotFiniteError
from protocol.tensors import ParamSpec, Tensors, TensorSpec

Bits = Literal[4, 8]

_BLOCK: Final = 1 << 16  # values rounded or unpacked at once


def require_flag(field: str, value: object) -> None:
    """Raises: CodecError unless it is a bool."""
    if not isinstance(value, bool):
        raise CodecError(f"{field}: expected true or false, found {value!r}")


def encode(tensors: Tensors, *, bits: Bits, per_channel: bool, seed: int) -> bytes:
    """Tensors in name order. *Cost* 1 byte a value beside a copy of all, and 2 MiB."""
    spec = float32_spec(tensors)
    vector = spec.flatten(tensors)
    require_finite(vector, spec)
    # The decoder does not need these: any generator does that is quick, and the same on each run.
    noise = np.random.PCG64(seed)
    parts: list[bytes] = []
    for name, tensor in split(vector, spec).items():
        channels = _channels(spec[name], bits, per_channel)
        if channels:
            parts += _quantised(name, tensor.reshape(channels, -1), bits, noise)
        else:
            parts.append(tensor.astype("<f4", copy=False).tobytes())
    return b"".join(parts)


def decode(
    payload: Payload, spec: ParamSpec, limit: int, *, bits: Bits, per_channel: bool
) -> dict[str, np.ndarray]:
    """Integers times scales. *Cost* three passes, 1 MiB beside the tensors and one byte a value
    of the check that they are finite."""
    require_float32(spec)
    require_memory(spec, limit)
    view = memoryview(payload).cast("B")
    require_length(view, payload_bytes(spec, bits=bits, per_channel=per_channel))
    vector = np.empty(spec.size, np.float32)
    start = 0
    for name, tensor in split(vector, spec).items():
        end = start + _bytes(spec[name], bits, per_channel)
        channels = _channels(spec[name], bits, per_channel)
        if channels:
            _dequantise(name, view[start:end], tensor.reshape(channels, -1), bits)
        else:
            tensor.reshape(-1)[:] = np.frombuffer(view[start:end], "<f4")
        start = end
    require_finite(vector, spec)
    return split(vector, spec)


def payload_bytes(spec: ParamSpec, *, bits: Bits, per_channel: bool) -> int:
    """Exact."""
    return sum(_bytes(entry, bits, per_channel) for _, entry in spec.entries)


def _levels(bits: Bits) -> int:
    return (1 << bits - 1) - 1


def _channels(entry: TensorSpec, bits: Bits, per_channel: bool) -> int:
    """Scales of a tensor; 0 for one that is not quantised."""
    channels = entry.shape[0] if per_channel and len(entry.shape) >= 2 else 1
    return channels if 4 * channels + (entry.size * bits + 7) // 8 < 4 * entry.size else 0


def _bytes(entry: TensorSpec, bits: Bits, per_channel: bool) -> int:
    if channels := _channels(entry, bits, per_channel):
        return 4 * channels + (entry.size * bits + 7) // 8
    return 4 * entry.size


def _quantised(name: str, values: np.ndarray, bits: Bits, noise: np.random.PCG64) -> list[bytes]:
    """Scales and integers of finite values [channels, width]."""
    levels = _levels(bits)
    # abs: of 0 and -0 the greater is either
    largest = np.abs(np.maximum(values.max(axis=1), -values.min(axis=1))).astype(np.float64)
    scales = (largest / levels).astype(np.float32)
    low = levels * scales.astype(np.float64) < largest
    scales[low] = np.nextafter(scales[low], np.float32(np.inf))
    with np.errstate(over="ignore"):  # refused by name, just below
        reach = np.float32(levels) * scales
    if not np.isfinite(reach).all():
        raise PayloadNotFiniteError(
            f'tensor "{name}": expected magnitudes below 3.4028e38, found {largest.max():g}, which '
            "decodes beyond float32"
        )
    # A channel of zeros is divided by 1: 0/0 would be NaN.
    divisors = np.where(scales > 0, scales, 1).astype(np.float64)
    flat = values.reshape(-1)
    integers = np.empty(flat.size, np.int8)
    for start in range(0, flat.size, _BLOCK):
        end = min(start + _BLOCK, flat.size)
        steps = flat[start:end] / divisors[np.arange(start, end) // values.shape[1]]
        fractions = noise.random_raw((end - start + 1) // 2).view(np.uint32)[: end - start]
        # Below 1, and |steps| is at most L: no sum is rounded beyond the levels.
        steps += fractions * 2.0**-32
        integers[start:end] = np.floor(steps)
    packed = integers if bits == 8 else _pairs(integers)
    return [scales.astype("<f4", copy=False).tobytes(), packed.tobytes()]


def _dequantise(name: str, payload: memoryview, values: np.ndarray, bits: Bits) -> None:
    """Fills `values`, a view [channels, width] of a flat vector."""
    scales = np.frombuffer(payload, "<f4", count=len(values)).astype(np.float32)
    if count := count_not_finite(scales):
        raise PayloadNotFiniteError(
            f'tensor "{name}": expected finite scales, found {count} NaN or infinite ones'
        )
    if np.signbit(scales).any():
        raise PayloadMalformedError(
            f'tensor "{name}": expected scales of 0 or more, found {scales.min():g}'
        )
    flat = values.reshape(-1)
    if bits == 8:
        flat[:] = np.frombuffer(payload, np.int8, offset=4 * len(values))
    else:
        _unpack(name, np.frombuffer(payload, np.uint8, offset=4 * len(values)), flat)
    levels = _levels(bits)
    if flat.min() < -levels:
        raise PayloadMalformedError(
            f'tensor "{name}": expected integers from {-levels} to {levels}, found {-levels - 1}'
        )
    empty = scales == 0
    if empty.any() and (values.max(axis=1)[empty].any() or values.min(axis=1)[empty].any()):
        raise PayloadMalformedError(
            f'tensor "{name}": expected zeros in a channel of scale 0, found others'
        )
    with np.errstate(over="ignore"):  # the caller refuses what is not finite, by name
        values *= scales[:, None]


def _pairs(integers: np.ndarray) -> np.ndarray:
    """Integers of 4 bits, two a byte."""
    packed = np.zeros((integers.size + 1) // 2, np.uint8)
    packed[:] = integers[0::2].view(np.uint8) & np.uint8(15)
    packed[: integers.size // 2] |= integers[1::2].view(np.uint8) << np.uint8(4)
    return packed


def _unpack(name: str, packed: np.ndarray, integers: np.ndarray) -> None:
    """The inverse of `_pairs`, into float32 [n]."""
    if integers.size % 2 and packed[-1] >> 4:
        raise PayloadMalformedError(f'tensor "{name}": expected unused bits to be 0, found others')
    for start in range(0, integers.size, _BLOCK):
        pairs = packed[start // 2 : (start + _BLOCK) // 2]
        part = integers[start : start + _BLOCK]
        # shifted left as unsigned and back as signed: the sign bit fills the upper half
        part[0::2] = (pairs << np.uint8(4)).view(np.int8) >> 4
        part[1::2] = pairs[: part.size // 2].view(np.int8) >> 4
