# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import numpy as np

from coordinator.server_memory import ServerMemory


def test_parts_come_apart_as_they_were_joined() -> None:
    memory = ServerMemory(
        optimizer={"first/layers.0/w": np.ones(2), "steps": np.zeros(())},
        merger={"client/ada": np.zeros(3)},
    )
    joined = memory.joined()
    assert set(joined) == {"optimizer/first/layers.0/w", "optimizer/steps", "merger/client/ada"}
    again = ServerMemory.parted(joined)
    assert again.optimizer.keys() == memory.optimizer.keys() and again.downlink == {}
    assert again.merger["client/ada"] is memory.merger["client/ada"]
    assert ServerMemory().joined() == {}
