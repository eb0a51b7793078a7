# SPDX-License-Identifier: Apache-2.0
"""Integers of 4 bits with one scale a tensor, or one a channel; see quantised.py for the format,
its source and what is random in it."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from aggregation.codecs import quantised
from aggregation.codecs.codec import NO_SEEDS, Payload, Seeds
from protocol.tensors import ParamSpec, Tensors


@dataclass(frozen=True, slots=True, kw_only=True)
class Int4:
    """About a eighth of the bytes of float32; unbiased, each error below max|x| / 7."""

    per_channel: bool = False
    """A scale for each index of the first axis, in tensors of two axes or more."""

    def __post_init__(self) -> None:
        quantised.require_flag("int4, per_channel", self.per_channel)

    @property
    def name(self) -> str:
        """`int4` or `int4:channel`."""
        return "int4:channel" if self.per_channel else "int4"

    def encode(self, tensors: Tensors, *, seeds: Seeds = NO_SEEDS) -> bytes:
        """In name order, rounded up or down by `seeds.own`."""
        return quantised.encode(tensors, bits=4, per_channel=self.per_channel, seed=seeds.own)

    def decode(
        self, payload: Payload, spec: ParamSpec, limit: int, *, seeds: Seeds = NO_SEEDS
    ) -> dict[str, np.ndarray]:
        """Integers times scales; needs no seed. The same bits on every machine."""
        return quantised.decode(payload, spec, limit, bits=4, per_channel=self.per_channel)

    def payload_bytes(self, spec: ParamSpec) -> int:
        """Exact."""
        return quantised.payload_bytes(spec, bits=4, per_channel=self.per_channel)
