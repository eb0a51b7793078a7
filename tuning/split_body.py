# SPDX-License-Identifier: Apache-2.0
"""The body of a split network in torch, on a CPU or a GPU, for many devices at once.

Several devices' hidden states go through in one pass; what the pass needs for its way back is kept
until all of them have come back with their gradients, or given it up.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch

from tuning.split_step import body_forward, frozen_of, parts_of

if TYPE_CHECKING:
    from tuning.methods import Tuned

_MASK = "attention_mask"


class _Pass:
    """Hidden states that entered together, and what came of them, with the way back."""

    def __init__(self, hidden: torch.Tensor, left: torch.Tensor, members: int) -> None:
        self.hidden = hidden
        self.left = left
        self.members = members


@dataclass(frozen=True, slots=True)
class Kept:
    """One device's rows of a pass."""

    of: _Pass
    rows: slice


class TorchBody:
    """Forward and backward through the frozen body."""

    def __init__(self, tuned: Tuned, *, device: str = "cpu") -> None:
        self._tuned = tuned
        self._device = device
        frozen = frozen_of(tuned, parts_of(tuned).body)
        self._frozen = {name: value.to(device) for name, value in frozen.items()}

    def forward(
        self,
        entering: Sequence[np.ndarray],
        masks: Sequence[np.ndarray] | None,
        *,
        keep: bool,
    ) -> list[tuple[np.ndarray, Kept | None]]:
        """Of each device's float32 [B, T, D] (and mask [B, 1, 1, T]): what left, and what is kept.

        All have the same T and D; B may differ.
        """
        hidden = self._joined(entering)
        given: Mapping[str, torch.Tensor] = {} if masks is None else {_MASK: self._joined(masks)}
        with torch.set_grad_enabled(keep):
            hidden.requires_grad_(keep)
            left = body_forward(self._tuned, self._frozen, hidden, given)
        together = _Pass(hidden, left, len(entering)) if keep else None
        answers = []
        values = left.detach().cpu().numpy()
        for rows in _stretches(entering):
            answers.append((values[rows], Kept(together, rows) if together else None))
        return answers

    def backward(self, returning: Sequence[tuple[Kept, np.ndarray]]) -> list[np.ndarray]:
        """Of each device's gradient at what left: that at what entered, in its shape.

        Devices of one pass are best given together: each call goes back through a whole pass.
        """
        answers: list[np.ndarray | None] = [None] * len(returning)
        passes: dict[int, list[int]] = {}
        for place, (kept, _) in enumerate(returning):
            passes.setdefault(id(kept.of), []).append(place)
        for places in passes.values():
            together = returning[places[0]][0].of
            gradient = torch.zeros_like(together.left)
            for place in places:
                kept, given = returning[place]
                gradient[kept.rows] = torch.from_numpy(given).to(self._device)
            others = together.members - len(places)
            (entered,) = torch.autograd.grad(
                together.left, together.hidden, gradient, retain_graph=others > 0
            )
            together.members = others
            values = entered.cpu().numpy()
            for place in places:
                answers[place] = values[returning[place][0].rows]
        return [answer for answer in answers if answer is not None]

    def _joined(self, arrays: Sequence[np.ndarray]) -> torch.Tensor:
        whole = arrays[0] if len(arrays) == 1 else np.concatenate(arrays)
        return torch.tensor(whole, device=self._device)


def _stretches(arrays: Sequence[np.ndarray]) -> list[slice]:
    ends = np.cumsum([len(array) for array in arrays]).tolist()
    return [slice(end - len(array), end) for array, end in zip(arrays, ends, strict=True)]
