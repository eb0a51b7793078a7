# SPDX-License-Identifier: Apache-2.0
"""One device's session with the body: what it may say next, and what was answered last.

No network and no model in here: a message becomes a `Task` for an engine, and the engine's result
becomes the answer. So the same session serves a stream and a simulation in one process.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Final, Protocol

import numpy as np

from protocol.activations import decode_mask, decode_states, encode_states
from protocol.errors import MalformedError, ProtocolError
from protocol.split import SplitSpec, largest_message
from protocol.stream import States, pack_message, unpack_message

MASKED: Final = -10_000.0  # what hides a token of a text, added to attention scores


class Engine(Protocol):
    """What computes the body: `TorchBody` or `OnnxBody`."""

    def forward(
        self, entering: Sequence[np.ndarray], masks: Sequence[np.ndarray] | None, *, keep: bool
    ) -> list[tuple[np.ndarray, Any]]:
        """What left the body of each device's states, and what has to be kept for the way back."""
        ...

    def backward(self, returning: Sequence[tuple[Any, np.ndarray]]) -> list[np.ndarray]:
        """The gradients at what entered, of what was kept and the gradients at what left."""
        ...


@dataclass(frozen=True, slots=True, kw_only=True)
class Task:
    """A message whose answer takes the engine."""

    message: States
    states: np.ndarray  # hidden states [B, T, D], or the gradient at what left
    mask: np.ndarray | None = None
    kept: Any = None  # of a backward: what its forward left with the engine


class Session:
    """Takes messages and gives answers in turns; remembers the last answer and one pass."""

    def __init__(self, spec: SplitSpec, *, most_rows: int) -> None:
        self.spec = spec
        self.answered = 0
        self.sound = True
        """False once the engine failed on it: it cannot go on."""
        self._most_rows = most_rows
        self._last = b""
        self._kept: Any = None
        self._rows = 0

    def read(self, blob: bytes) -> Task | bytes:
        """The task that a message asks for, or the answer itself where it was answered before.

        Raises: ProtocolError for a message that cannot come now.
        """
        message, payload = unpack_message(
            blob, max_bytes=largest_message(self.spec, self._most_rows)
        )
        if not isinstance(message, States) or message.kind not in ("forward", "backward"):
            raise MalformedError(f"expected forward or backward, found {message.kind}")
        if message.number == self.answered and self._last:
            return self._last
        if message.number != self.answered + 1:
            raise MalformedError(
                f"number: expected {self.answered + 1}, or {self.answered} once more, found "
                f"{message.number}"
            )
        if message.rows > self._most_rows:
            raise MalformedError(f"rows: expected at most {self._most_rows}, found {message.rows}")
        if message.kind == "forward":
            return self._forward(message, payload)
        if self._kept is None:
            raise MalformedError("backward: expected a forward that keeps before it")
        if message.rows != self._rows:
            raise MalformedError(
                f"rows: expected {self._rows} as of the forward before, found {message.rows}"
            )
        gradient = decode_states(payload, self.spec.leaving, message.rows, self.spec.form)
        return Task(message=message, states=gradient, kept=self._kept)

    def _forward(self, message: States, payload: memoryview) -> Task:
        mask, size = None, 0
        if self.spec.masked:
            size = min(message.rows * self.spec.mask.size, len(payload))
            mask = decode_mask(payload[:size], self.spec.mask, message.rows, MASKED)
        hidden = decode_states(payload[size:], self.spec.entering, message.rows, self.spec.form)
        return Task(message=message, states=hidden, mask=mask)

    def answer(self, task: Task, states: np.ndarray, kept: Any = None) -> bytes:
        """The answer to a task, of the engine's result. Raises: ProtocolError."""
        came = task.message
        kind = "left" if came.kind == "forward" else "entered"
        try:
            payload = encode_states(states, self.spec.form)
        except ValueError as error:
            raise ProtocolError(f"{kind}: {error}") from None
        self._kept, self._rows = (kept, came.rows) if came.kind == "forward" else (None, 0)
        made = States(kind=kind, number=came.number, rows=came.rows)  # type: ignore[arg-type]
        self._last = pack_message(made, payload)
        self.answered = came.number
        return self._last


def run_tasks(engine: Engine, tasks: Sequence[Task]) -> list[tuple[np.ndarray, Any]]:
    """The engine's results of tasks of one kind, `alike` to one another, in their order."""
    first = tasks[0]
    states = [task.states for task in tasks]
    if first.message.kind == "backward":
        returned = engine.backward([(task.kept, task.states) for task in tasks])
        return [(gradient, None) for gradient in returned]
    masks = [task.mask for task in tasks if task.mask is not None]
    return engine.forward(states, masks or None, keep=first.message.keep)


def alike(one: Task, other: Task) -> bool:
    """Whether two tasks can be done in one pass."""
    return (one.message.kind, one.message.keep) == (other.message.kind, other.message.keep)
