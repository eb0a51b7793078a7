# SPDX-License-Identifier: Apache-2.0
"""The body of a split network on onnxruntime: a server that needs no torch.

Three graphs of one network: where nobody comes back, states go forward in a batch of any size;
where somebody does, forward keeps what its way back reads, and backward takes it. The last two
have one batch size: messages are cut to it, and rows that are missing filled up with zeros.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from onnxruntime import OrtValue

SPIN = "20"
_MASK = "mask/attention_mask"


@dataclass(frozen=True, slots=True)
class Kept:
    """Of each part of what one device sent: the values that its way back starts from."""

    parts: Sequence[Mapping[str, OrtValue]]


class OnnxBody:
    """As `tuning.split_body.TorchBody`, from the folder of a body's graphs."""

    def __init__(self, folder: Path, *, threads: int = 0) -> None:
        import onnxruntime

        def session(name: str) -> Any:
            options = onnxruntime.SessionOptions()
            options.intra_op_num_threads = threads
            options.inter_op_num_threads = 1
            options.log_severity_level = 3
            # The graphs have threads of their own, and so has a device on the same machine:
            # whoever waits must not keep a core busy meanwhile.
            options.add_session_config_entry("session.intra_op.spin_duration_us", SPIN)
            path = str(folder / name)
            return onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])

        self._forward = session("forward.onnx")
        self._keeping = session("keeping.onnx")
        self._backward = session("backward.onnx")
        (hidden,) = (port for port in self._keeping.get_inputs() if port.name == "hidden")
        self._rows = int(hidden.shape[0])
        self._given = [port.name for port in self._keeping.get_outputs()]
        self._taken = [port.name for port in self._backward.get_inputs()]

    def forward(
        self,
        entering: Sequence[np.ndarray],
        masks: Sequence[np.ndarray] | None,
        *,
        keep: bool,
    ) -> list[tuple[np.ndarray, Kept | None]]:
        """See `TorchBody.forward`; where it keeps, a pass a device."""
        if keep:
            return [
                self._kept(hidden, None if masks is None else masks[place])
                for place, hidden in enumerate(entering)
            ]
        feeds = {"hidden": np.concatenate(entering)}
        if masks is not None:
            feeds[_MASK] = np.concatenate(masks)
        (left,) = self._forward.run(["left"], feeds)
        ends = np.cumsum([len(hidden) for hidden in entering])
        return [(rows, None) for rows in np.split(left, ends[:-1])]

    def backward(self, returning: Sequence[tuple[Kept, np.ndarray]]) -> list[np.ndarray]:
        """See `TorchBody.backward`; a pass a device."""
        answers = []
        for kept, gradient in returning:
            parts = []
            for values, part in zip(kept.parts, self._parts(gradient), strict=True):
                feeds = {**values, "gradient": _value(self._filled(part))}
                own = {name: feeds[name] for name in self._taken}
                (entered,) = self._backward.run_with_ort_values(["entered"], own)
                parts.append(entered.numpy()[: len(part)])
            answers.append(np.concatenate(parts))
        return answers

    def _kept(self, hidden: np.ndarray, mask: np.ndarray | None) -> tuple[np.ndarray, Kept]:
        left, kept = [], []
        given = {"hidden": hidden} if mask is None else {"hidden": hidden, _MASK: mask}
        for pieces in zip(*map(self._parts, given.values()), strict=True):
            named = dict(zip(given, pieces, strict=True))
            feeds = {name: _value(self._filled(piece)) for name, piece in named.items()}
            found = self._keeping.run_with_ort_values(self._given, feeds)
            values = feeds | dict(zip(self._given, found, strict=True))
            left.append(values.pop("left").numpy()[: len(named["hidden"])])
            kept.append({name: values[name] for name in self._taken if name in values})
        return np.concatenate(left), Kept(kept)

    def _parts(self, rows: np.ndarray) -> list[np.ndarray]:
        """In pieces of at most the graphs' batch size."""
        return np.split(rows, range(self._rows, len(rows), self._rows))

    def _filled(self, rows: np.ndarray) -> np.ndarray:
        widths = [(0, self._rows - len(rows)), *[(0, 0)] * (rows.ndim - 1)]
        return np.pad(rows, widths) if len(rows) < self._rows else rows


def _value(array: np.ndarray) -> OrtValue:
    from onnxruntime import OrtValue

    return OrtValue.ortvalue_from_numpy(np.ascontiguousarray(array))
