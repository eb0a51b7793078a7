# SPDX-License-Identifier: Apache-2.0
"""From the labels of a device's data to a bundle's class numbers.

Names are looked up among the bundle's class names, never numbered in the order in which they are
met. Integers are class numbers; where the classes are themselves named by numbers ("9", "10"),
integers are those names.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from typing import Final

import numpy as np

SHOWN: Final = 10  # names in an error message


def label_faults(labels: np.ndarray, class_names: Sequence[str]) -> Iterator[str]:
    """All that keeps `class_numbers` from taking the labels, a sentence each."""
    expected = "integers or class names, one a sample"
    if labels.ndim != 1:
        yield f"labels: expected {expected}, found an array {labels.dtype} {list(labels.shape)}"
        return
    names = _as_names(labels, class_names)
    if names is not None:
        known = Counter(class_names)
        counts = Counter(names)
        unknown = {name: count for name, count in counts.items() if name not in known}
        if unknown:
            yield (
                f"labels: expected class names of the bundle ({_listed(class_names)}), found "
                f"{_listed([f'{name!r:.80} ({count})' for name, count in unknown.items()])}; "
                "rename these classes, or leave their samples out"
            )
        for name in sorted(name for name in counts if known[name] > 1):
            yield (
                f"labels: the bundle has {known[name]} classes named {name!r}; give class numbers "
                "in place of names"
            )
    elif labels.dtype.kind not in "iu":
        what = "other objects than text" if labels.dtype.kind == "O" else str(labels.dtype)
        yield f"labels: expected {expected}, found {what}; convert them"
    elif labels.size and (labels.min() < 0 or labels.max() >= len(class_names)):
        beyond = np.flatnonzero((labels < 0) | (labels >= len(class_names)))
        yield (
            f"labels: expected 0 to {len(class_names) - 1} ({len(class_names)} classes), found "
            f"{labels.min()} to {labels.max()}, beyond that in {len(beyond)} samples, sample "
            f"{beyond[0]} first; the bundle's classes are {_listed(class_names)}"
        )


def class_numbers(labels: np.ndarray, class_names: Sequence[str]) -> np.ndarray:
    """int64 [n]; of labels without a fault."""
    names = _as_names(labels, class_names)
    if names is None:
        return labels.astype(np.int64)
    number = {name: place for place, name in enumerate(class_names)}
    return np.array([number[name] for name in names], np.int64)


def _as_names(labels: np.ndarray, class_names: Sequence[str]) -> list[str] | None:
    """The labels as text; None where they are no names."""
    if labels.dtype.kind == "U":
        return [str(label) for label in labels]
    if labels.dtype.kind == "O":
        found = [label for label in labels if isinstance(label, str)]
        return found if len(found) == len(labels) else None
    if labels.dtype.kind in "iu" and all(map(_is_number, class_names)):
        return [str(label) for label in labels]
    return None


def _is_number(name: str) -> bool:
    return name.removeprefix("-").isdecimal() and name == str(int(name))


def _listed(names: Sequence[str]) -> str:
    more = len(names) - SHOWN
    return ", ".join(names[:SHOWN]) + (f" and {more} more" if more > 0 else "")
