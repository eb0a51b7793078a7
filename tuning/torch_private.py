# SPDX-License-Identifier: Apache-2.0
"""Private training on torch: the very step that is compiled, run as it is, for one client."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Mapping
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from tuning.private_step import private_step
from tuning.step import initial_state

if TYPE_CHECKING:
    from protocol.manifest import TrainingSpec
    from tuning.methods import Tuned

# (samples, training, seed) -> `edge_runtime.PrivateBatches` of the seed's keystream.
PrivatePlan = Callable[..., Any]


def fit_privately(
    tuned: Tuned,
    spec: TrainingSpec,
    trained: Mapping[str, torch.Tensor],
    calls: Iterable[Mapping[str, np.ndarray]],
    *,
    learning_rate: float,
    left: Collection[str],
    device: torch.device,
) -> tuple[dict[str, torch.Tensor], np.ndarray]:
    """The tensors after all calls, from `trained`, and the losses [calls].

    Frozen weights are those of the module as it stands; tensors named in `left` stay as they are.
    """
    step = private_step(tuned, spec)
    tensors = {name: value.detach() for name, value in trained.items()}
    # The sums and moments start at zero, FedProx's anchors where the tensors start.
    state = {name: value.to(device) for name, value in initial_state(tuned, spec).items()}
    frozen = tuned.frozen()
    counted = torch.tensor([float(name not in left) for name in sorted(tensors)], device=device)
    rate = torch.tensor(learning_rate, device=device)
    losses = []
    for call in calls:
        held = {name: torch.from_numpy(np.array(value)).to(device) for name, value in call.items()}
        batch, noise = (
            {name.removeprefix(part): v for name, v in held.items() if name.startswith(part)}
            for part in ("batch/", "noise/")
        )
        with torch.no_grad():
            moved, state, loss = step(
                tensors, state, frozen, batch, held["labels"], held["weight"],
                noise, held["applies"], counted, rate,
            )  # fmt: skip
        tensors = {name: tensors[name] if name in left else new for name, new in moved.items()}
        losses.append(float(loss))
    return tensors, np.array(losses, np.float32)
