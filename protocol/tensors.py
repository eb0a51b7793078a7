# SPDX-License-Identifier: Apache-2.0
"""Named tensors and their specification, which both sides of the network know beforehand."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import lru_cache
from types import MappingProxyType
from typing import Final

import numpy as np

from protocol import _checks
from protocol.errors import SpecError
from protocol.limits import MAX_NAME_LENGTH, MAX_RANK, MAX_TENSORS, MAX_VALUES

TYPE_NAMES: Final = ("bool", "float16", "float32", "float64", "int32", "int64", "uint8")

_DTYPE_NAMES: Final = {np.dtype(name): name for name in TYPE_NAMES}

Tensors = Mapping[str, np.ndarray]

NOTHING: Final[Tensors] = MappingProxyType({})


@dataclass(frozen=True, slots=True)
class TensorSpec:
    """Shape and numpy dtype name of one tensor. `()` is a scalar; empty tensors are refused."""

    shape: tuple[int, ...]
    dtype: str

    def __post_init__(self) -> None:
        dims = _checks.sequence("shape", self.shape, MAX_RANK, SpecError)
        shape = tuple(_checks.integer("shape", dim, 1, MAX_VALUES, SpecError) for dim in dims)
        object.__setattr__(self, "shape", shape)
        _checks.one_of("dtype", self.dtype, TYPE_NAMES, SpecError)
        if self.size > MAX_VALUES:
            raise SpecError(f"shape {list(shape)}: expected at most {MAX_VALUES} values")

    @property
    def size(self) -> int:
        """Number of values."""
        return math.prod(self.shape)

    @property
    def nbytes(self) -> int:
        """Bytes in memory."""
        return self.size * np.dtype(self.dtype).itemsize

    def __str__(self) -> str:
        return f"{self.dtype} {list(self.shape)}"


@dataclass(frozen=True, slots=True)
class ParamSpec:
    """Name, shape and dtype of every tensor, sorted by name. May be empty (no optimizer state)."""

    entries: tuple[tuple[str, TensorSpec], ...]
    _by_name: dict[str, TensorSpec] = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        entries = _checks.sequence("tensors", self.entries, MAX_TENSORS, SpecError)
        by_name: dict[str, TensorSpec] = {}
        for entry in entries:
            if not isinstance(entry, tuple) or len(entry) != 2:
                raise SpecError(f"expected (name, TensorSpec), found {_checks.shown(entry)}")
            name = _checks.text("tensor name", entry[0], MAX_NAME_LENGTH, SpecError)
            if not isinstance(entry[1], TensorSpec):
                raise SpecError(f"tensor {name!r}: expected a TensorSpec")
            if name in by_name:
                raise SpecError(f"tensor {name!r} is given twice")
            by_name[name] = entry[1]
        if list(by_name) != sorted(by_name):
            raise SpecError("expected tensors sorted by name; sort them, or use ParamSpec.of")
        object.__setattr__(self, "entries", tuple(by_name.items()))
        object.__setattr__(self, "_by_name", by_name)
        if self.size > MAX_VALUES:
            raise SpecError(f"expected at most {MAX_VALUES} values, found {self.size}")

    @classmethod
    def of(cls, tensors: Tensors) -> ParamSpec:
        """The spec that these tensors fit."""
        for name, array in tensors.items():
            if not isinstance(array, np.ndarray):
                raise SpecError(f"tensor {name!r}: expected a numpy array, found {_kind(array)}")
        return cls(
            tuple((name, _spec_of(a.shape, _dtype_name(a))) for name, a in sorted(tensors.items()))
        )

    @property
    def names(self) -> tuple[str, ...]:
        """All names, sorted."""
        return tuple(self._by_name)

    @property
    def size(self) -> int:
        """Number of values of all tensors."""
        return sum(spec.size for _, spec in self.entries)

    @property
    def nbytes(self) -> int:
        """Bytes in memory of all tensors."""
        return sum(spec.nbytes for _, spec in self.entries)

    def __getitem__(self, name: str) -> TensorSpec:
        return self._by_name[name]

    def __contains__(self, name: object) -> bool:
        return name in self._by_name

    def __len__(self) -> int:
        return len(self.entries)

    def to_json(self) -> list[list[object]]:
        """`[[name, dtype, [dim, ...]], ...]`."""
        return [[name, spec.dtype, list(spec.shape)] for name, spec in self.entries]

    @classmethod
    def from_json(cls, value: object) -> ParamSpec:
        """The inverse of `to_json`. Raises SpecError for anything else; bounded by limits.py."""
        rows = _checks.sequence("tensors", value, MAX_TENSORS, SpecError)
        return cls(tuple(named_spec_from_json(row) for row in rows))

    def mismatch(self, tensors: Tensors) -> str | None:
        """The first disagreement in words, or None if the tensors fit."""
        for name in self.names:
            if name not in tensors:
                return f'tensor "{name}" is missing, spec says {self[name]}'
        for name in tensors:
            if name not in self:
                return f"tensor {_checks.shown(name)} is not in the spec"
        for name, spec in self.entries:
            array: object = tensors[name]
            if not isinstance(array, np.ndarray):
                return f'tensor "{name}" is {_kind(array)}, spec says {spec}'
            if array.shape != spec.shape or _dtype_name(array) != spec.dtype:
                return f'tensor "{name}" is {array.dtype} {list(array.shape)}, spec says {spec}'
        return None

    def flatten(self, tensors: Tensors) -> np.ndarray:
        """One float32 vector `[size]` in name order. Raises SpecError unless all are float32."""
        self._require_float32()
        if problem := self.mismatch(tensors):
            raise SpecError(f"cannot flatten: {problem}")
        if not self.entries:
            return np.empty(0, np.float32)
        return np.concatenate([tensors[name].reshape(-1) for name in self.names], dtype=np.float32)

    def unflatten(self, vector: np.ndarray) -> dict[str, np.ndarray]:
        """The inverse of `flatten`; the tensors are views of one copy of `vector`."""
        self._require_float32()
        if vector.shape != (self.size,) or vector.dtype != np.float32:
            raise SpecError(
                f"cannot unflatten: expected float32 [{self.size}], "
                f"found {vector.dtype} {list(vector.shape)}"
            )
        copy = np.array(vector, np.float32)
        tensors: dict[str, np.ndarray] = {}
        start = 0
        for name, spec in self.entries:
            tensors[name] = copy[start : start + spec.size].reshape(spec.shape)
            start += spec.size
        return tensors

    def _require_float32(self) -> None:
        for name, spec in self.entries:
            if spec.dtype != "float32":
                raise SpecError(f'tensor "{name}" is {spec}; only float32 tensors form a vector')


def named_spec_from_json(row: object) -> tuple[str, TensorSpec]:
    """`[name, dtype, [dim, ...]]` as a name and its spec."""
    if not isinstance(row, list) or len(row) != 3:
        raise SpecError(f"expected [name, dtype, shape], found {_checks.shown(row)}")
    name, dtype, shape = row
    _checks.text("tensor name", name, MAX_NAME_LENGTH, SpecError)
    try:
        return name, TensorSpec(shape, dtype)
    except SpecError as error:
        raise SpecError(f"tensor {_checks.shown(name)}: {error}") from None


@lru_cache(maxsize=4096)
def _spec_of(shape: tuple[int, ...], dtype: str) -> TensorSpec:
    return TensorSpec(shape, dtype)


def _dtype_name(array: np.ndarray) -> str:
    # the same as dtype.name, which numpy composes anew each time it is asked
    return _DTYPE_NAMES.get(array.dtype) or array.dtype.name


def _kind(value: object) -> str:
    return f"a {type(value).__name__}"
