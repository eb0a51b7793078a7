# SPDX-License-Identifier: Apache-2.0
"""Clients that lie: what they send, and that everybody else's answers stay as they are."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from aggregation.codecs import codec_named
from client_sdk.updates import respond
from edge_runtime.trainer import OnnxTrainer
from protocol.plan import Plan, pack_plan
from protocol.update import unpack_update
from simulations.attacks import alie_deviations, attacked, flip_labels, plant_backdoor
from simulations.backends.prepared import PreparedClient
from simulations.backends.sequential import SequentialClients
from simulations.clients import ClientData
from simulations.errors import SimulationError

NAMES = ("a", "b", "c", "d", "e")
BAD = ("b", "d")


@pytest.fixture
def setting(make_bundle: Callable[..., Any]) -> tuple[Any, Any, list[tuple[str, str, bytes]]]:
    made = make_bundle("head")
    clients = [
        PreparedClient(id=name, fit=made.data(6, seed=n), held_out=made.data(3, seed=9))
        for n, name in enumerate(NAMES)
    ]
    manifest, initial = made.bundle.manifest, made.bundle.initial()
    serve = SequentialClients(manifest, initial, OnnxTrainer(made.bundle, threads=1), clients).serve
    work = []
    for name in NAMES:
        plan = Plan(
            job=manifest.job, round=1, nonce="ab" * 8, client=name, downlink_codec="float32",
            uplink_codec="float32", task="fit", learning_rate=0.1, local_epochs=1, seed=3,
            max_update_bytes=1 << 20,
        )  # fmt: skip
        work.append((name, "fit", pack_plan(plan, codec_named("float32").encode(initial))))
    return made, serve, work


def deltas(made: Any, answers: Any) -> dict[str, np.ndarray]:
    spec = made.bundle.manifest.trainable
    found = {}
    for name, blob in answers:
        header, payload = unpack_update(blob, max_bytes=1 << 20)
        assert header.client == name and header.samples == 6
        tensors = codec_named(header.codec).decode(payload, spec, spec.nbytes)
        found[name] = np.concatenate([tensors[key].reshape(-1) for key in spec.names])
    return found


@pytest.mark.parametrize(
    "attack", ["sign-flip:1", "sign-flip:10", "scaling:10", "alie", "ipm:0.5", "backdoor:5"]
)
def test_bad_clients_send_what_the_attack_says(setting: Any, attack: str) -> None:
    made, serve, work = setting
    honest = deltas(made, serve(work))
    sent = deltas(made, attacked(serve, made.bundle.manifest, attack, BAD)(work))
    good = np.stack([honest[name] for name in NAMES if name not in BAD]).astype(np.float64)
    for name in NAMES:
        expected = {
            "sign-flip:1": -honest[name],
            "sign-flip:10": -10 * honest[name],
            "scaling:10": 10 * honest[name],
            "alie": good.mean(axis=0) - alie_deviations(5, 2) * good.std(axis=0),
            "ipm:0.5": -0.5 * good.mean(axis=0),
            "backdoor:5": 5 * honest[name],
        }[attack]
        if name in BAD:
            np.testing.assert_allclose(sent[name], expected, rtol=1e-5, atol=1e-7)
            assert not np.allclose(sent[name], honest[name])
        else:
            np.testing.assert_array_equal(sent[name], honest[name])


def test_evaluations_and_label_flips_pass_through(setting: Any) -> None:
    made, serve, work = setting
    flipped = attacked(serve, made.bundle.manifest, "label-flip", BAD)
    assert dict(flipped(work)) == dict(serve(work))
    labels = np.array([0, 1, 9])
    client = ClientData(
        id="a", fit={"x": np.ones(3), "labels": labels}, held_out={"labels": labels}
    )
    changed = flip_labels(client, 10)
    assert changed.fit["labels"].tolist() == [9, 8, 0]
    assert changed.held_out["labels"].tolist() == [0, 1, 9]


def test_a_backdoor_is_planted_in_every_second_training_image() -> None:
    images = np.random.default_rng(0).integers(0, 200, (5, 8, 8), dtype=np.uint8)
    labels = np.array([0, 1, 2, 3, 4])
    client = ClientData(
        id="a", fit={"images": images, "labels": labels}, held_out={"labels": labels}
    )
    planted = plant_backdoor(client, 7)
    assert planted.fit["labels"].tolist() == [7, 1, 7, 3, 7]
    assert (planted.fit["images"][::2, 6:, 6:] == 255).all()
    np.testing.assert_array_equal(planted.fit["images"][1::2], images[1::2])
    np.testing.assert_array_equal(planted.fit["images"][:, :6], images[:, :6])
    assert planted.held_out is client.held_out and images.max() < 200


def test_alie_is_as_far_off_as_its_source_says() -> None:
    # n = 20, f = 4: 7 supporters are needed, 9 of the 16 honest lie nearer: the 56.25 % quantile.
    assert alie_deviations(20, 4) == pytest.approx(0.1573, abs=1e-4)


@pytest.mark.parametrize("attack", ["flip", "ipm:much", ""])
def test_unknown_attacks_are_refused(setting: Any, attack: str) -> None:
    made, serve, _ = setting
    with pytest.raises(SimulationError, match="attack: expected"):
        attacked(serve, made.bundle.manifest, attack, BAD)


def test_respond_is_what_the_honest_send(setting: Any) -> None:
    made, serve, work = setting
    name, _, blob = work[0]
    answer = dict(attacked(serve, made.bundle.manifest, "sign-flip:1", BAD)(work))[name]
    assert answer == respond(
        blob,
        bundle_manifest=made.bundle.manifest,
        initial=made.bundle.initial(),
        trainer=OnnxTrainer(made.bundle, threads=1),
        data_fit=made.data(6, seed=0),
        data_held_out={},
        client=name,
    )
