# SPDX-License-Identifier: Apache-2.0
"""Pairs of low-rank factors among a job's tensors, and which tensors a round is about.

Federated LoRA methods differ in what a client trains, what it sends and what it is sent: only one
factor, each in turn, or all of them. A plan says it in one word for each; what the word means is
said here, once for both sides.

A client may also have a rank q of its own, below the factors' rank r: it holds A[:q] and B[:, :q].
Where both sides of a product are zero neither has a gradient, so that in a graph that was compiled
for rank r, factors that are filled up with zeros train exactly as factors of rank q would.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Final

import numpy as np

from protocol import _checks
from protocol.errors import SpecError
from protocol.limits import MAX_NAME_LENGTH
from protocol.tensors import ParamSpec, Tensors, TensorSpec

CHOICES: Final = ("all", "up", "down", "down-only")
"""all: every tensor. up, down: without the other factor of each pair. down-only: nothing but the
pairs' down factors."""


@dataclass(frozen=True, slots=True, kw_only=True)
class FactorPair:
    """One layer's factors by name: its weight is W0 + scale * up @ down, [d, r] @ [r, k]."""

    down: str  # A [r, k]
    up: str  # B [d, r]
    scale: float  # s, above 0
    base: str = ""  # the frozen weight W0 [d, k] by its name in the bundle; "" if it has none

    def __post_init__(self) -> None:
        _checks.text("pair: down", self.down, MAX_NAME_LENGTH, SpecError)
        _checks.text("pair: up", self.up, MAX_NAME_LENGTH, SpecError)
        if self.down == self.up:
            raise SpecError(f'pair: expected two names, found "{self.down}" twice')
        scale = _checks.real("pair: scale", self.scale, SpecError)
        if scale <= 0:
            raise SpecError(f"pair: scale: expected above 0, found {scale:g}")
        object.__setattr__(self, "scale", scale)
        if self.base != "":
            _checks.text("pair: base", self.base, MAX_NAME_LENGTH, SpecError)


def chosen(choice: str, spec: ParamSpec, pairs: Iterable[FactorPair]) -> ParamSpec:
    """The part of a spec that a word of `CHOICES` means."""
    if choice == "all":
        return spec
    downs, ups = {pair.down for pair in pairs}, {pair.up for pair in pairs}
    kept = {
        "up": set(spec.names) - downs,
        "down": set(spec.names) - ups,
        "down-only": set(spec.names) & downs,
    }[choice]
    return ParamSpec(tuple((name, entry) for name, entry in spec.entries if name in kept))


def at_rank(rank: int, spec: ParamSpec, pairs: Iterable[FactorPair]) -> ParamSpec:
    """The spec of a client whose factors have at most that rank; 0: that of the spec."""
    if rank == 0:
        return spec
    axes = _rank_axes(pairs)
    entries = []
    for name, entry in spec.entries:
        shape = tuple(
            min(size, rank) if axis == axes.get(name) else size
            for axis, size in enumerate(entry.shape)
        )
        entries.append((name, TensorSpec(shape, entry.dtype)))
    return ParamSpec(tuple(entries))


def cut(tensors: Tensors, rank: int, pairs: Iterable[FactorPair]) -> Mapping[str, np.ndarray]:
    """The tensors of such a client: the first rows of A and columns of B."""
    if rank == 0:
        return tensors
    axes = _rank_axes(pairs)
    return {
        name: np.ascontiguousarray(value[:rank] if axes[name] == 0 else value[:, :rank])
        if name in axes
        else value
        for name, value in tensors.items()
    }


def filled(tensors: Tensors, spec: ParamSpec) -> dict[str, np.ndarray]:
    """The inverse: tensors of a smaller rank in the shapes of `spec`, with zeros behind them."""
    whole = {}
    for name, value in tensors.items():
        shape = spec[name].shape
        if value.shape != shape:
            zeros = np.zeros(shape, value.dtype)
            zeros[tuple(slice(size) for size in value.shape)] = value
            value = zeros
        whole[name] = value
    return whole


def _rank_axes(pairs: Iterable[FactorPair]) -> dict[str, int]:
    """Which axis of a factor is its rank."""
    return {name: axis for pair in pairs for axis, name in enumerate((pair.down, pair.up))}


def check_pairs(pairs: Iterable[FactorPair], spec: ParamSpec) -> None:
    """Raises: SpecError unless every pair's tensors are in the spec, once, as matrices that fit."""
    seen: set[str] = set()
    for pair in pairs:
        for name in (pair.down, pair.up):
            if name not in spec:
                raise SpecError(f'pair: tensor "{name}" is not in the spec')
            if name in seen:
                raise SpecError(f'pair: tensor "{name}" is in two pairs')
            seen.add(name)
        down, up = spec[pair.down].shape, spec[pair.up].shape
        if len(down) != 2 or len(up) != 2 or down[0] != up[1]:
            raise SpecError(
                f'pair "{pair.down}", "{pair.up}": expected shapes [r, k] and [d, r], found '
                f"{list(down)} and {list(up)}"
            )
