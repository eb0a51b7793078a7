# SPDX-License-Identifier: Apache-2.0
"""SCAFFOLD on the client: how its control variate moves with a round's training.

*Source* Karimireddy et al., "SCAFFOLD: Stochastic Controlled Averaging for Federated Learning",
ICML 2020 (arXiv 1910.06378), algorithm 1, option II: c_i+ = c_i - c + (x - y) / (K eta), with x the
tensors that the round began with, y those after K steps at the rate eta. c_i is zero before a
client's first round.
"""

from __future__ import annotations

import numpy as np

from protocol.tensors import Tensors


def next_control(
    own: Tensors,
    control: Tensors,
    start: Tensors,
    trained: Tensors,
    *,
    steps: int,
    learning_rate: float,
) -> dict[str, np.ndarray]:
    """c_i+ for every tensor that has a control variate, in its type.

    `steps` is at least 1, `learning_rate` above 0.
    """
    scale = np.float32(1.0 / (steps * learning_rate))
    return {
        name: own[name] - value + scale * (start[name] - trained[name])
        for name, value in control.items()
    }
