# SPDX-License-Identifier: Apache-2.0
"""The body of a split network on onnxruntime: a server that needs no torch.

Going back computes the way there once more, so that nothing but the hidden states is kept.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

SPIN = "20"
_MASK = "mask/attention_mask"


@dataclass(frozen=True, slots=True)
class Kept:
    """What one device sent."""

    hidden: np.ndarray
    mask: np.ndarray | None


class OnnxBody:
    """As `tuning.split_body.TorchBody`, from the folder of a body's graphs."""

    def __init__(self, folder: Path, *, threads: int = 0) -> None:
        import onnxruntime

        def session(name: str) -> Any:
            options = onnxruntime.SessionOptions()
            options.intra_op_num_threads = threads
            options.inter_op_num_threads = 1
            options.log_severity_level = 3
            # Both graphs have threads of their own, and so has a device on the same machine:
            # whoever waits must not keep a core busy meanwhile.
            options.add_session_config_entry("session.intra_op.spin_duration_us", SPIN)
            path = str(folder / name)
            return onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])

        self._forward = session("forward.onnx")
        self._backward = session("backward.onnx")
        (gradient,) = (p for p in self._backward.get_inputs() if p.name == "gradient")
        self._rows = int(gradient.shape[0])

    def forward(
        self,
        entering: Sequence[np.ndarray],
        masks: Sequence[np.ndarray] | None,
        *,
        keep: bool,
    ) -> list[tuple[np.ndarray, Kept | None]]:
        """See `TorchBody.forward`."""
        feeds = {"hidden": np.concatenate(entering)}
        if masks is not None:
            feeds[_MASK] = np.concatenate(masks)
        (left,) = self._forward.run(["left"], feeds)
        answers = []
        start = 0
        for place, hidden in enumerate(entering):
            end = start + len(hidden)
            kept = Kept(hidden, None if masks is None else masks[place]) if keep else None
            answers.append((left[start:end], kept))
            start = end
        return answers

    def backward(self, returning: Sequence[tuple[Kept, np.ndarray]]) -> list[np.ndarray]:
        """See `TorchBody.backward`; a pass a device, as the graph has one batch size."""
        answers = []
        for kept, gradient in returning:
            feeds = {"hidden": kept.hidden, "gradient": gradient}
            if kept.mask is not None:
                feeds[_MASK] = kept.mask
            # Zeros behind a ragged batch: no gradient comes of them.
            missing = self._rows - len(gradient)
            widths = [(0, missing)]
            given = {n: np.pad(v, widths + [(0, 0)] * (v.ndim - 1)) for n, v in feeds.items()}
            (entered,) = self._backward.run(["entered"], given)
            answers.append(entered[: len(gradient)])
        return answers
