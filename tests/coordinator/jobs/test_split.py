# SPDX-License-Identifier: Apache-2.0
"""Which body is served, and to whom."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from coordinator.deployment import Deployment, Settings
from coordinator.jobs.folder import JobFolder
from coordinator.jobs.outstanding import Outstanding
from coordinator.jobs.split import reason_against, split_job
from coordinator.jobs.submit import OwnData, submit
from coordinator.jobs.tester import BesideBody, open_tester
from coordinator.onnx_body import OnnxBody
from edge_runtime.bundle import open_bundle
from edge_runtime.split_trainer import SplitTrainer
from protocol.stream import Open

NONCE = "cd" * 16


@pytest.fixture
def deployment(tmp_path: Path, cache_of_the_session: Path) -> Iterator[Deployment]:
    settings = Settings(name="ward", addresses=("localhost",))
    with Deployment.create(tmp_path / "deployment", settings) as made:
        yield made


def submitted(deployment: Deployment, job: Any, name: str) -> JobFolder:
    names = tuple(f"c{number}" for number in range(10))
    submit(deployment, job, OwnData(name="digits", class_names=names), name=name)
    return JobFolder(deployment.jobs_folder / name)


def enrolled(deployment: Deployment, folder: Path) -> str:
    from client_sdk.identity import Identity

    identity = Identity(folder)
    token = deployment.enrolment.create_token("bed")
    answer = deployment.enrolment.enrol(identity.enrol_request(token))
    return identity.join(answer, fingerprint=deployment.authority.fingerprint).device


def test_the_body_of_the_job_that_is_played_is_served(
    deployment: Deployment, make_split: Any, tiny_job: Any
) -> None:
    assert split_job(deployment) is None
    split = submitted(deployment, make_split().job, "split")
    submitted(deployment, tiny_job("lora"), "whole")
    assert split_job(deployment) == split
    deployment.jobs.stop("split")
    assert split_job(deployment) is None, "the job that is played now is whole"
    deployment.jobs.resume("split")
    assert split_job(deployment) == split


def test_members_have_sessions_for_plans_that_are_out(
    deployment: Deployment, make_split: Any, tmp_path: Path
) -> None:
    folder = submitted(deployment, make_split().job, "split")
    bundle = open_bundle(folder.bundle, public_key=None)
    name = enrolled(deployment, tmp_path / "device")

    def reason(**changes: Any) -> str:
        given = {"job": bundle.manifest.job, "round": 1, "client": name, "nonce": NONCE, "lane": 0}
        return reason_against(deployment, bundle, outstanding, Open(**{**given, **changes}))

    with Outstanding(folder.outstanding) as outstanding:
        outstanding.expect(name, 1, NONCE)
        assert reason() == ""
        assert "no plan is out" in reason(nonce="ef" * 16)
        assert "expected job" in reason(job="ab" * 32)
        assert reason(client="eve") == "this device is no member"
        deployment.enrolment.revoke(name)
        assert reason() == "this device is no member"


def test_a_body_beside_gives_what_the_engine_gives(deployment: Deployment, make_split: Any) -> None:
    made = make_split()
    folder = submitted(deployment, made.job, "split")
    bundle = open_bundle(folder.bundle, public_key=None)
    engine = OnnxBody(folder.body)
    states = made.split.entering
    rng = np.random.default_rng(0)
    hidden = rng.standard_normal((4, *states.shape)).astype(np.float32)
    body = BesideBody(engine)
    ((left, kept),) = engine.forward([hidden], None, keep=True)
    np.testing.assert_array_equal(body.forward(hidden, None, keep=True), left)
    gradient = rng.standard_normal(left.shape).astype(np.float32)
    (entered,) = engine.backward([(kept, gradient)])
    np.testing.assert_array_equal(body.backward(gradient), entered)
    data = made.data(10)
    tested = open_tester(folder, bundle).evaluate(bundle.initial(), data)
    assert tested == SplitTrainer(bundle, body).evaluate(bundle.initial(), data)
