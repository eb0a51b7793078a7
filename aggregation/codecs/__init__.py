# SPDX-License-Identifier: Apache-2.0
"""How tensors become bytes: one file a codec, all behind the `Codec` protocol. A codec is told the
ParamSpec and so writes values only; it refuses, with a CodecError, every payload that its own
encoder could not have written, in time and memory that the spec bounds. `codec_named` is the one
place where the names of job files and plans meet the classes."""

from __future__ import annotations

from typing import Final

from aggregation.codecs.codec import Codec, Seeds
from aggregation.codecs.float16 import Float16
from aggregation.codecs.float32 import Float32
from aggregation.codecs.one_bit import OneBit
from aggregation.errors import UnknownCodecError

CODEC_NAMES: Final = ("float32", "float16", "one-bit")

__all__ = ["CODEC_NAMES", "Codec", "Float16", "Float32", "OneBit", "Seeds", "codec_named"]


def codec_named(name: str) -> Codec:
    """The codec that a job file, plan or update names. Raises: UnknownCodecError."""
    match name:
        case "float32":
            return Float32()
        case "float16":
            return Float16()
        case "one-bit":
            return OneBit()
        case _:
            raise UnknownCodecError(
                f"codec: expected one of {', '.join(CODEC_NAMES)}, found {name!r}"
            )
