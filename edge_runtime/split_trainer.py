# SPDX-License-Identifier: Apache-2.0
"""Train the two ends of a network whose body a server holds, on onnxruntime alone.

Source: SFPrompt (Cao, Zhu and Gong 2024, arXiv 2407.17533), a client's round: score the samples
with the body skipped and keep those that are learned worst, train prompt and tail for some passes
with the body still skipped, then train both through the body, which is behind a `Body`: a server's
stream, or the server's own code in the same process. Ours is that a copy of the tail may learn what
the head gives before it scores (`scoring_epochs`): the tail that came has learned what leaves the
body, and its mistakes without it are the wrong ones.

Samples and labels stay here: what is handed to the body are hidden states, a mask of texts, and
gradients. The optimizer's state lives from the first local step to the last of a round.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Collection, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np

from edge_runtime.batches import batch_plan
from edge_runtime.bundle import Bundle
from edge_runtime.errors import TrainingError
from edge_runtime.session import open_session
from edge_runtime.trainer import (
    EVALUATION_ROWS,
    check_data,
    initial_state,
    mean_loss,
    rounded,
)
from edge_runtime.training_loop import batch_of
from protocol.limits import MAX_LANES
from protocol.split import SplitSpec
from protocol.tensors import NOTHING, Tensors

if TYPE_CHECKING:
    from onnxruntime import OrtValue

_MASK = "attention_mask"


class Body(Protocol):
    """The middle of the network, wherever it is. Calls come in turns: a `forward` that keeps is
    followed by its `backward`."""

    def forward(self, hidden: np.ndarray, mask: np.ndarray | None, *, keep: bool) -> np.ndarray:
        """What comes out, float32 [B, T, D] or [B, 1, D], of float32 [B, T, D] and [B, 1, 1, T]."""
        ...

    def backward(self, gradient: np.ndarray) -> np.ndarray:
        """The loss's gradient at what went in last, of that at what came out."""
        ...


class SplitTrainer:
    """A split bundle's device graphs around a body; takes the place of `OnnxTrainer`.

    With several lanes to the body a batch goes in as many pieces, each on a thread of its own:
    while one is computed behind a lane, another is made ready, travels, or is read. What comes of
    it is the same. Graphs are loaded when they are first needed. One thread a core where `threads`
    is 0.
    """

    def __init__(self, bundle: Bundle, *lanes: Body, threads: int = 0) -> None:
        self.bundle = bundle
        self._given = lanes
        self._beside = ThreadPoolExecutor(MAX_LANES, thread_name_prefix="lane")
        self._graphs: dict[str, _Graph] = {}
        self._threads = threads
        self._names = [name for name, _ in bundle.manifest.inputs]
        if bundle.manifest.split is None:
            raise TrainingError(
                f"bundle {bundle.folder}: expected one of a split network, found a whole one"
            )
        self._spec: SplitSpec = bundle.manifest.split

    def through(self, *lanes: Body) -> SplitTrainer:
        """The same graphs around another body."""
        other = copy.copy(self)
        other._given = lanes
        return other

    @property
    def _lanes(self) -> Sequence[Body]:
        if not self._given:
            raise TrainingError("expected a body to train through; see SplitTrainer.through")
        return self._given

    def fit(
        self,
        tensors: Tensors,
        data: Mapping[str, np.ndarray],
        *,
        learning_rate: float,
        epochs: int,
        seed: int,
        most_steps: int = 0,
        frozen: Collection[str] = (),
        correction: Tensors = NOTHING,
        offset: Tensors = NOTHING,
    ) -> tuple[dict[str, np.ndarray], dict[str, float]]:
        """One round; arguments as of `OnnxTrainer.fit`, `epochs` being those through the body.

        Returns:
            The trained tensors, and {"loss": mean over the steps through the body, "kept": samples
            that were trained on}.

        Raises:
            DataError, TrainingError: as `OnnxTrainer.fit`; a correction or an offset is refused.
            Whatever the body raises.
        """
        manifest = self.bundle.manifest
        samples = check_data(manifest, data)
        if correction or offset:
            raise TrainingError("a split network is trained without corrections and offsets")
        kept = np.arange(samples)
        rng = np.random.default_rng(seed)
        held = _owned("trainable/", tensors) | _owned(
            "state/", initial_state(manifest, tensors, correction)
        )
        held |= _owned("", {"learning_rate": np.array(learning_rate, np.float32)})
        fixed = {f"trainable/{name}" for name in frozen}
        if self._spec.prunes:
            before, (own,) = self._spec.scoring_epochs, rng.spawn(1)
            judge = self._past_the_body(held, fixed, data, kept, before, own)
            kept = chosen(self._scores(judge, data), self._spec.keep, self._spec.drop)
        held = self._past_the_body(held, fixed, data, kept, self._spec.local_epochs, rng)
        batch_size = manifest.training.batch_size
        order, weights = batch_plan(len(kept), batch_size, epochs, rng, most_steps=most_steps)
        losses = [
            self._split_step(held, fixed, data, rows, weight, rng)
            for rows, weight in zip(kept[order], weights, strict=True)
        ]
        trained = {name: np.array(held[f"trainable/{name}"].numpy()) for name in tensors}
        loss = mean_loss(np.asarray(losses, np.float32), weights)
        return trained, {"loss": loss, "kept": float(len(kept))}

    def scores(self, tensors: Tensors, data: Mapping[str, np.ndarray]) -> np.ndarray:
        """EL2N of every sample, float32 [samples], from 0 to sqrt(2); the body is not asked."""
        check_data(self.bundle.manifest, data)
        return self._scores(_owned("trainable/", tensors), data)

    def _scores(self, held: Mapping[str, OrtValue], data: Mapping[str, np.ndarray]) -> np.ndarray:
        found = []
        for rows in _stretches(len(data["labels"])):
            feeds = {**held, **_owned("", batch_of(data, self._names, rows))}
            found.append(self._graph("scores").run(feeds)["scores"].numpy())
        return np.concatenate(found)

    def evaluate(
        self, tensors: Tensors, data: Mapping[str, np.ndarray], *, offset: Tensors = NOTHING
    ) -> dict[str, float]:
        """As `OnnxTrainer.evaluate`, through the body; an offset is refused."""
        if offset:
            raise TrainingError("a split network is evaluated without an offset")
        samples = check_data(self.bundle.manifest, data)
        held = _owned("trainable/", tensors)
        losses, correct = [], []
        for rows in _stretches(samples):
            came = self._left(held, data, rows, keep=False)
            feeds = held | _owned("", batch_of(data, self._names, rows)) | _owned("", came)
            found = self._graph("test").run(feeds)
            losses.append(found["loss"].numpy())
            correct.append(found["correct"].numpy())
        return {
            "loss": rounded(float(np.concatenate(losses).mean())),
            "accuracy": rounded(float(np.concatenate(correct).mean())),
        }

    def _past_the_body(
        self,
        held: dict[str, OrtValue],
        fixed: set[str],
        data: Mapping[str, np.ndarray],
        rows: np.ndarray,
        epochs: int,
        rng: np.random.Generator,
    ) -> dict[str, OrtValue]:
        """What is held after so many passes over some samples with the body skipped."""
        held = dict(held)
        if epochs:
            size = self.bundle.manifest.training.batch_size
            order, weights = batch_plan(len(rows), size, epochs, rng)
            for batch, weight in zip(rows[order], weights, strict=True):
                feeds = held | self._batch(data, batch, weight)
                _take(held, fixed, self._graph("local").run(feeds))
        return held

    def _split_step(
        self,
        held: dict[str, OrtValue],
        fixed: set[str],
        data: Mapping[str, np.ndarray],
        rows: np.ndarray,
        weight: np.ndarray,
        rng: np.random.Generator,
    ) -> float:
        # What only fills up a batch does not travel: it stands at the end.
        real = int(np.count_nonzero(weight))
        feeds = held | self._batch(data, rows, weight)
        noise = self._noise(real, rng)
        came = self._left(held, data, rows[:real], noise, keep=True)
        filled = {name: _filled(value, len(rows)) for name, value in came.items()}
        tail = self._graph("tail").run(feeds | _owned("", filled))
        entered = _filled(self._entered(tail["gradient"].numpy()[:real]), len(rows))
        prompt = self._graph("prompt").run(feeds | _owned("", {"gradient": entered}))
        _take(held, fixed, tail | prompt)
        return float(tail["loss"].numpy())

    def _noise(self, rows: int, rng: np.random.Generator) -> np.ndarray | None:
        if not self._spec.noise:
            return None
        return rng.standard_normal((rows, *self._spec.entering.shape), dtype=np.float32)

    def _left(
        self,
        held: dict[str, OrtValue],
        data: Mapping[str, np.ndarray],
        rows: np.ndarray,
        noise: np.ndarray | None = None,
        *,
        keep: bool,
    ) -> dict[str, np.ndarray]:
        """What left the body of some samples, by the tail's ports."""
        mask = None
        if self._spec.masked:
            mask = widened(data[_MASK][rows], self._spec.entering_tokens)

        head = self._graph("head")

        def one(lane: Body, piece: slice) -> np.ndarray:
            batch = batch_of(data, self._names, rows[piece])
            hidden = head.run(held | _owned("", batch))["hidden"].numpy()
            if noise is not None:
                hidden = noised(hidden, self._spec.noise, noise[piece])
            return lane.forward(hidden, None if mask is None else mask[piece], keep=keep)

        left = {"hidden": self._side_by_side(one, len(rows))}
        return left if mask is None else left | {f"mask/{_MASK}": mask}

    def _entered(self, gradient: np.ndarray) -> np.ndarray:
        """The gradient at what entered the body, of that at what left it last."""
        return self._side_by_side(lambda lane, piece: lane.backward(gradient[piece]), len(gradient))

    def _side_by_side(self, one: Callable[[Body, slice], np.ndarray], rows: int) -> np.ndarray:
        """A piece of the rows on each lane, together; the same pieces whenever asked."""
        lanes = self._lanes[:rows]
        ends = [rows * (place + 1) // len(lanes) for place in range(len(lanes))]
        pieces = [slice(start, end) for start, end in zip([0, *ends], ends, strict=False)]
        if len(lanes) == 1:
            return one(lanes[0], pieces[0])
        return np.concatenate(list(self._beside.map(one, lanes, pieces)))

    def _batch(
        self, data: Mapping[str, np.ndarray], rows: np.ndarray, weight: np.ndarray
    ) -> dict[str, OrtValue]:
        return _owned("", {**batch_of(data, self._names, rows), "weight": weight})

    def _graph(self, role: str) -> _Graph:
        if role not in self._graphs:
            self._graphs[role] = _Graph(open_session(self.bundle.path(role), self._threads))
        return self._graphs[role]


class _Graph:
    """A session that takes of what it is given the ports that it has."""

    def __init__(self, session: Any) -> None:
        self._session = session
        self._inputs = {port.name for port in session.get_inputs()}
        self._outputs = [port.name for port in session.get_outputs()]

    def run(self, feeds: Mapping[str, OrtValue]) -> dict[str, OrtValue]:
        own = {name: value for name, value in feeds.items() if name in self._inputs}
        found = self._session.run_with_ort_values(self._outputs, own)
        return dict(zip(self._outputs, found, strict=True))


def chosen(scores: np.ndarray, keep: float, drop: float) -> np.ndarray:
    """The samples to train on, by their scores: positions, ascending, int64.

    The floor(drop * n) highest are left out, then the ceil(keep * rest) highest are kept; of equal
    scores the earlier sample counts as higher.
    """
    order = np.argsort(-scores, kind="stable")
    first = _dropped(len(order), drop)
    return np.sort(order[first : first + kept_count(len(order), keep, drop)])


def kept_count(samples: int, keep: float, drop: float) -> int:
    """How many `chosen` gives of so many."""
    return math.ceil(keep * (samples - _dropped(samples, drop)))


def _dropped(samples: int, drop: float) -> int:
    return math.floor(drop * samples)


def noised(hidden: np.ndarray, share: float, noise: np.ndarray) -> np.ndarray:
    """Hidden states [B, T, D] with `share` of each token's root mean square of the noise given.

    With Gaussian noise of unit variance no guarantee comes with it: how much harder it makes images
    to reconstruct is measured by `fedloom bench split`. Gradients pass as if it were not there.
    """
    size = np.sqrt((hidden * hidden).mean(axis=-1, keepdims=True))
    return hidden + np.float32(share) * size * noise


def _filled(values: np.ndarray, rows: int) -> np.ndarray:
    """Zeros behind, up to so many rows."""
    empty = np.zeros((rows - len(values), *values.shape[1:]), values.dtype)
    return np.concatenate((values, empty)) if len(empty) else values


def widened(mask: np.ndarray, tokens: int) -> np.ndarray:
    """[B, 1, 1, T] with zeros after its first column, up to `tokens` columns: prompts are seen."""
    seen = np.zeros((*mask.shape[:-1], tokens - mask.shape[-1]), mask.dtype)
    return np.concatenate((mask[..., :1], seen, mask[..., 1:]), axis=-1)


def _take(held: dict[str, OrtValue], fixed: set[str], answers: Mapping[str, OrtValue]) -> None:
    """Puts what a step gave back in the place of what it was given."""
    for port, value in answers.items():
        name = port.removeprefix("new/")
        if name != port and name not in fixed:
            held[name] = value


def _owned(prefix: str, arrays: Mapping[str, np.ndarray]) -> dict[str, OrtValue]:
    from onnxruntime import OrtValue

    return {
        prefix + name: OrtValue.ortvalue_from_numpy(np.ascontiguousarray(value))
        for name, value in arrays.items()
    }


def _stretches(samples: int) -> Sequence[np.ndarray]:
    return [
        np.arange(start, min(start + EVALUATION_ROWS, samples))
        for start in range(0, samples, EVALUATION_ROWS)
    ]
