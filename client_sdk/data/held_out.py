# SPDX-License-Identifier: Apache-2.0
"""Which of a device's samples are tested on and never trained on."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence

import numpy as np


def held_out_count(samples: int, share: float) -> int:
    """So many of `samples`: one at least if there are two, never the last; 0 for the share 0."""
    if share <= 0:
        return 0
    return min(max(1, round(samples * share)), samples - 1)


def held_out_rows(blocks: Sequence[Mapping[str, np.ndarray]], share: float) -> list[np.ndarray]:
    """For every block, which of its samples are held out: bool [n].

    A sample's contents decide, not its place: as a device's data grow, what was held out stays so
    but for a few samples, and nothing has to be remembered. Labels have no part in it.
    """
    digests = [
        (digest, block, row)
        for block, arrays in enumerate(blocks)
        for row, digest in enumerate(_digests(arrays))
    ]
    held = [np.zeros(len(arrays["labels"]), bool) for arrays in blocks]
    for _, block, row in sorted(digests)[: held_out_count(len(digests), share)]:
        held[block][row] = True
    return held


def _digests(arrays: Mapping[str, np.ndarray]) -> list[bytes]:
    names = sorted(name for name in arrays if name != "labels")
    tokens = {"input_ids", "attention_mask"} <= set(names)
    found = []
    for row in range(len(arrays["labels"])):
        digest = hashlib.blake2b(digest_size=16)
        for name in names:
            value = arrays[name][row]
            if tokens and name == "input_ids":
                # Padding depends on the longest sample beside this one.
                value = value[arrays["attention_mask"][row].astype(bool)]
            elif tokens and name == "attention_mask":
                continue
            digest.update(value.tobytes())
        found.append(digest.digest())
    return found
