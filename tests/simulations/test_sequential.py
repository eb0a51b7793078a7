# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from aggregation.codecs import codec_named
from client_sdk.updates import respond
from edge_runtime.trainer import OnnxTrainer
from protocol.plan import Plan, pack_plan
from simulations.backends.prepared import PreparedClient, prepare
from simulations.backends.sequential import SequentialClients
from simulations.clients import ClientData


def plan_for(made: Any, client: str, **changes: Any) -> bytes:
    fields: dict[str, Any] = {
        "job": made.job.hash(), "round": 1, "nonce": "cd" * 16, "client": client,
        "downlink_codec": "float32", "uplink_codec": "float32", "task": "fit",
        "learning_rate": 0.1, "local_epochs": 1, "seed": 4, "max_update_bytes": 1 << 20,
    }  # fmt: skip
    return pack_plan(Plan(**fields | changes), codec_named("float32").encode(made.start()))


@pytest.fixture
def clients(make_bundle: Callable[..., Any]) -> tuple[Any, OnnxTrainer, list[PreparedClient]]:
    made = make_bundle("head")
    prepared = [
        PreparedClient(id=name, fit=made.data(6, seed=seed), held_out=made.data(2, seed=seed))
        for seed, name in enumerate(("a", "b"))
    ]
    return made, OnnxTrainer(made.bundle, threads=1), prepared


def test_answers_are_those_of_a_device_in_the_order_asked(clients: Any) -> None:
    made, trainer, prepared = clients
    serve = SequentialClients(made.bundle.manifest, made.bundle.initial(), trainer, prepared).serve
    work = [("b", "fit", plan_for(made, "b")), ("a", "evaluate", plan_for(made, "a",
            task="evaluate"))]  # fmt: skip
    answers = list(serve(work))
    assert [name for name, _ in answers] == ["b", "a"]
    for (name, answer), (_, _, plan) in zip(answers, work, strict=True):
        client = next(c for c in prepared if c.id == name)
        assert answer == respond(
            plan,
            bundle_manifest=made.bundle.manifest,
            initial=made.bundle.initial(),
            trainer=trainer,
            data_fit=client.fit,
            data_held_out=client.held_out,
            client=name,
        )


def test_what_a_client_raises_is_its_answer_and_the_next_one_works(clients: Any) -> None:
    made, trainer, prepared = clients
    prepared[0].fit["pixel_values"][:] = np.inf
    serve = SequentialClients(made.bundle.manifest, made.bundle.initial(), trainer, prepared).serve
    (_, first), (_, second) = serve([(n, "fit", plan_for(made, n)) for n in ("a", "b")])
    assert isinstance(first, ValueError) and "loss became" in str(first)
    assert isinstance(second, bytes)


def test_preparing_does_what_the_device_would(make_bundle: Callable[..., Any]) -> None:
    made = make_bundle("head")
    images = np.full((2, 8, 8), 255, np.uint8)
    arrays = {"images": images, "labels": np.array([1, 2])}
    nothing = {name: value[:0] for name, value in arrays.items()}
    client = prepare(
        ClientData(id="x", fit=arrays, held_out=nothing), made.bundle.manifest.preprocessing
    )
    assert client.id == "x" and client.held_out == {}
    assert client.fit["pixel_values"].shape == (2, 1, 8, 8)
    np.testing.assert_allclose(client.fit["pixel_values"], (1 - 0.3) / 0.4, rtol=1e-6)
