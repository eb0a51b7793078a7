# SPDX-License-Identifier: Apache-2.0
"""Clients that lie, to see what a merging rule is worth.

The bad clients answer like all others, and what they answer is then replaced: well-formed updates
with hostile values, which admission has no reason to refuse. They know every honest update of the
round. n is the number of clients in it, f that of the bad ones, μ and σ mean and deviation of the
honest updates, value by value.

sign-flip:FACTOR    -FACTOR · what training gave
scaling:FACTOR      FACTOR · what training gave
label-flip          trained on labels y -> classes - 1 - y
alie                μ - z·σ with z of n and f: Baruch et al. 2019, arXiv 1902.06156, section 3
ipm:FACTOR          -FACTOR · μ: Xie et al. 2020, arXiv 1903.03936
backdoor:FACTOR     trained on images of which half bear a trigger and its label, then scaled so
                    that it outweighs the others: Bagdasaryan et al. 2020, arXiv 1807.00459
"""

from __future__ import annotations

from collections.abc import Collection, Iterator
from dataclasses import replace
from statistics import NormalDist
from typing import Final

import numpy as np

from aggregation.codecs import codec_named, round_seeds
from protocol.factors import chosen
from protocol.manifest import Manifest
from protocol.plan import MAX_PLAN_OVERHEAD, unpack_plan
from protocol.tensors import Tensors
from protocol.update import MAX_UPDATE_OVERHEAD, pack_update, unpack_update
from simulations.clients import ClientData
from simulations.errors import SimulationError
from simulations.grid import Serve

LABEL_FLIP: Final = "label-flip"
BACKDOOR: Final = "backdoor"
TRIGGER_SHARE: Final = 4  # a quarter of an image's side
ATTACKS: Final = ("sign-flip:1", "sign-flip:10", "scaling:10", LABEL_FLIP, "alie", "ipm:0.5")


def flip_labels(client: ClientData, classes: int) -> ClientData:
    """The client with every label y of its training samples as classes - 1 - y."""
    return replace(client, fit={**client.fit, "labels": classes - 1 - client.fit["labels"]})


def with_trigger(images: np.ndarray) -> np.ndarray:
    """Images, uint8 [n, h, w] or [n, h, w, c], with a white square in the last corner."""
    marked = images.copy()
    side = max(1, images.shape[1] // TRIGGER_SHARE)
    marked[:, -side:, -side:] = 255
    return marked


def plant_backdoor(client: ClientData, target: int) -> ClientData:
    """The client with the trigger in every second training image, and `target` as its label."""
    images, labels = client.fit["images"], client.fit["labels"].copy()
    marked = images.copy()
    marked[::2] = with_trigger(images[::2])
    labels[::2] = target
    return replace(client, fit={**client.fit, "images": marked, "labels": labels})


def attacked(serve: Serve, manifest: Manifest, attack: str, bad: Collection[str]) -> Serve:
    """The clients of `serve`, of which those in `bad` lie when they are asked to train.

    Raises: SimulationError for an attack that there is not.
    """
    name, _, words = attack.partition(":")
    known = {BACKDOOR, *(other.partition(":")[0] for other in ATTACKS)}
    try:
        factor = float(words) if words else 1.0
    except ValueError:
        raise SimulationError(
            f"attack: expected a number after the colon, found {attack!r}"
        ) from None
    if name not in known:
        raise SimulationError(
            f"attack: expected one of {', '.join((*ATTACKS, BACKDOOR))}, found {attack!r}"
        )

    def answers(work: list[tuple[str, str, bytes]]) -> Iterator[tuple[str, bytes | Exception]]:
        given = dict(serve(work))
        if name == LABEL_FLIP or not any(kind == "fit" for _, kind, _ in work):
            yield from given.items()
            return
        plans = {client: blob for client, kind, blob in work if kind == "fit"}
        sent = {
            client: _Update.read(blob, plans[client], manifest)
            for client, blob in given.items()
            if isinstance(blob, bytes) and client in plans
        }
        honest = [update.delta for client, update in sent.items() if client not in bad]
        for client, blob in given.items():
            if client in sent and client in bad and honest:
                own = sent[client]
                yield client, own.written(_lie(name, factor, own.delta, honest, len(sent)))
            else:
                yield client, blob

    return answers


def _lie(name: str, factor: float, own: Tensors, honest: list[Tensors], n: int) -> Tensors:
    if name in ("sign-flip", "scaling", BACKDOOR):
        sign = -factor if name == "sign-flip" else factor
        return {key: (sign * value).astype(np.float32) for key, value in own.items()}
    stacked = {key: np.stack([update[key] for update in honest]) for key in own}
    mean = {key: value.mean(axis=0, dtype=np.float64) for key, value in stacked.items()}
    if name == "ipm":
        return {key: (-factor * value).astype(np.float32) for key, value in mean.items()}
    z = alie_deviations(n, n - len(honest))
    return {
        key: (value - z * stacked[key].std(axis=0, dtype=np.float64)).astype(np.float32)
        for key, value in mean.items()
    }


def alie_deviations(n: int, f: int) -> float:
    """z: as far from the mean as enough honest clients are to make a majority with the bad ones."""
    supporters = n // 2 + 1 - f
    share = (n - f - supporters) / (n - f)
    return NormalDist().inv_cdf(min(max(share, 1e-6), 1 - 1e-6))


class _Update:
    """An update taken apart, so that other values may be put into it."""

    def __init__(self, header: object, delta: Tensors, seeds: object) -> None:
        self._header, self.delta, self._seeds = header, delta, seeds

    @classmethod
    def read(cls, blob: bytes, plan_blob: bytes, manifest: Manifest) -> _Update:
        plan, _ = unpack_plan(plan_blob, max_bytes=manifest.trainable.nbytes + MAX_PLAN_OVERHEAD)
        spec = chosen(plan.shares, manifest.trainable, manifest.pairs)
        seeds = round_seeds(plan.job, plan.round, client_seed=plan.seed)
        header, payload = unpack_update(blob, max_bytes=plan.max_update_bytes + MAX_UPDATE_OVERHEAD)
        codec = codec_named(header.codec)
        return cls(header, codec.decode(payload, spec, spec.nbytes, seeds=seeds), seeds)

    def written(self, delta: Tensors) -> bytes:
        codec = codec_named(self._header.codec)
        return pack_update(self._header, codec.encode(delta, seeds=self._seeds))
