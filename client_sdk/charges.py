# SPDX-License-Identifier: Apache-2.0
"""What a job has cost a client of what it may cost it at most, counted durably on the device.

A plan is known by its nonce. One that comes again after a crash is charged once: an outbox answers
it with what was answered before, and if nothing was, nothing has left the device.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

import numpy as np

from client_sdk.work import needed

if TYPE_CHECKING:
    from client_sdk.memory import ClientMemory

# One record a job, whatever rounds a coordinator says there are.
_RECORD: Final = 0


def charge_once(
    memory: ClientMemory | None, kind: str, nonce: str, *, cost: int, most: int
) -> bool:
    """Charge a plan, by its nonce, before it is worked on; False, and nothing is charged, where
    that would be above `most` in all.

    Raises: PlanError without a memory; MemoryFileError.
    """
    kept = needed(memory)
    record = kept.of_round(kind, _RECORD)
    last = np.frombuffer(bytes.fromhex(nonce), np.uint8)
    if record and np.array_equal(record["nonce"], last):
        return True
    total = cost + (int(record["spent"]) if record else 0)
    if total > most:
        return False
    kept.save(kind, _RECORD, {"spent": np.array(total, np.int64), "nonce": last})
    return True
