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


def counted_values(sizes: Mapping[str, int], left: Collection[str]) -> torch.Tensor:
    """`trained` of a private step: 1 for the values of tensors that are not in `left`, else 0."""
    return torch.cat(
        [torch.full((size,), float(name not in left)) for name, size in sorted(sizes.items())]
    )


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
    counted = counted_values({n: v.numel() for n, v in tensors.items()}, left).to(device)
    rate = torch.tensor(learning_rate, device=device)
    losses = []
    for call in calls:
        held = {name: torch.from_numpy(np.array(value)).to(device) for name, value in call.items()}
        batch = {n.removeprefix("batch/"): v for n, v in held.items() if n.startswith("batch/")}
        with torch.no_grad():
            moved, state, loss = step(
                tensors, state, frozen, batch, held["labels"], held["weight"],
                held["noise"], held["applies"], counted, rate,
            )  # fmt: skip
        tensors = {name: tensors[name] if name in left else new for name, new in moved.items()}
        losses.append(float(loss))
    return tensors, np.array(losses, np.float32)
