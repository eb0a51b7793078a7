# SPDX-License-Identifier: Apache-2.0
"""The cohort on torch: the vmapped step without a graph, for a GPU."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from protocol.manifest import TALLY
from protocol.tensors import NOTHING
from tuning.private_step import private_cohort_step
from tuning.step import cohort_step
from tuning.torch_private import counted_values

if TYPE_CHECKING:
    from protocol.manifest import TrainingSpec
    from protocol.tensors import Tensors
    from tuning.methods import Tuned


class TorchCohort:
    """As `edge_runtime.training_loop.TrainingLoop` with a cohort graph, on a torch device."""

    def __init__(self, tuned: Tuned, spec: TrainingSpec, *, device: str) -> None:
        self._device = torch.device(device)
        make: Any = cohort_step if spec.privacy is None else private_cohort_step
        self._step = make(tuned, spec)
        # Buffers that are not saved (position numbers) are reached through the module itself.
        tuned.module.to(self._device)
        self._frozen = {name: value.to(self._device) for name, value in tuned.frozen().items()}

    def run(
        self,
        trainable: Tensors,
        state: Tensors,
        steps: Iterable[Mapping[str, np.ndarray]],
        learning_rate: float,
        *,
        frozen: Collection[str] = (),
        offset: Tensors = NOTHING,
    ) -> tuple[dict[str, np.ndarray], np.ndarray, dict[str, np.ndarray]]:
        """Tensors [clients, ...] in and out; losses [steps, clients]; counts [clients, ...]."""
        tensors = {name: self._held(value) for name, value in trainable.items()}
        kept = {name: self._held(value) for name, value in state.items()}
        rate = torch.tensor(learning_rate, device=self._device)
        weights = self._frozen | {
            name: self._frozen[name] + self._held(change) for name, change in offset.items()
        }
        sizes = {name: value[0].numel() for name, value in tensors.items()}
        trained = counted_values(sizes, frozen).to(self._device)
        losses = []
        with torch.no_grad():
            for step in steps:
                held = {name: self._held(value) for name, value in step.items()}
                batch = {
                    name.removeprefix("batch/"): value
                    for name, value in held.items()
                    if name.startswith("batch/")
                }
                private = (held["noise"], held["applies"], trained) if "noise" in held else ()
                moved, kept, loss = self._step(
                    tensors, kept, weights, batch, held["labels"], held["weight"], *private, rate
                )
                tensors = {n: tensors[n] if n in frozen else new for n, new in moved.items()}
                losses.append(loss)
        return (
            {name: value.cpu().numpy() for name, value in tensors.items()},
            torch.stack(losses).cpu().numpy(),
            {
                name.removeprefix(TALLY): value.cpu().numpy()
                for name, value in kept.items()
                if name.startswith(TALLY)
            },
        )

    def _held(self, array: np.ndarray) -> torch.Tensor:
        return torch.from_numpy(np.array(array)).to(self._device)
