# SPDX-License-Identifier: Apache-2.0
"""How tensors become bytes: one file a codec, all behind the `Codec` protocol. A codec is told the
ParamSpec and so writes values only; it refuses, with a CodecError, every payload that its own
encoder could not have written, in time and memory that the spec bounds. `codec_named` is the one
place where the names of job files and plans meet the classes; `error_feedback.py` keeps what a
lossy codec leaves behind for the next update."""

from __future__ import annotations

from typing import Final

from aggregation.codecs.bfloat16 import BFloat16
from aggregation.codecs.codec import NO_SEEDS, Codec, Seeds, round_seeds
from aggregation.codecs.common_grid import SumCodec
from aggregation.codecs.error_feedback import encode_with_feedback
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
from aggregation.errors import UnknownCodecError
from aggregation.naming import build, form

_CODECS: Final[dict[str, type[Codec]]] = {
    "float32": Float32,
    "float16": Float16,
    "bfloat16": BFloat16,
    "int8": Int8,
    "int4": Int4,
    "one-bit": OneBit,
    "ternary": Ternary,
    "top-k": TopK,
    "random-k": RandomK,
    "low-rank": LowRank,
    "seed-scalars": SeedScalars,
    "grid": Grid,
    "votes": Votes,
}

CODEC_NAMES: Final = tuple(_CODECS)
CODEC_FORMS: Final = tuple(form(name, kind) for name, kind in _CODECS.items())
"""How each is written in a job file, settings included."""

__all__ = [
    "CODEC_FORMS",
    "CODEC_NAMES",
    "NO_SEEDS",
    "BFloat16",
    "Codec",
    "Float16",
    "Float32",
    "Grid",
    "Int4",
    "Int8",
    "LowRank",
    "OneBit",
    "RandomK",
    "SeedScalars",
    "Seeds",
    "SumCodec",
    "Ternary",
    "TopK",
    "Votes",
    "codec_named",
    "encode_with_feedback",
    "round_seeds",
]


def codec_named(text: str) -> Codec:
    """The codec that a job file, plan or update names.

    Raises: UnknownCodecError for a name or a setting that there is not; CodecError for a setting
    that the codec cannot have.
    """
    return build("codec", _CODECS, text, UnknownCodecError)
