# SPDX-License-Identifier: Apache-2.0
"""A device adds the noise that its job promised, and holds the coordinator to it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from aggregation.codecs import codec_named
from aggregation.errors import PrivacyError
from client_sdk.errors import PlanError
from client_sdk.memory import FolderMemory
from client_sdk.noise import charge_release, repeatable_seed, secret_seed
from client_sdk.readiness import readiness
from client_sdk.summing import held
from client_sdk.updates import respond
from protocol.client_noise import ClientNoise
from protocol.errors import MalformedError, ManifestError
from protocol.manifest import Manifest, Preprocessing, TrainingSpec
from protocol.plan import Plan, pack_plan
from protocol.tensors import ParamSpec
from protocol.update import unpack_update

SIZE = 4000
TENSORS = {"w": np.zeros(SIZE, np.float32)}
LOCAL = ClientNoise(multiplier=0.5, clip=2.0, rounds=3)
SHARED = ClientNoise(multiplier=0.5, clip=2.0, rounds=3, fewest=5)
GRID = "grid:8,1.8"
PLAN = Plan(
    job="ab" * 32,
    round=2,
    nonce="cd" * 16,
    client="c1",
    downlink_codec="float32",
    uplink_codec="float32",
    task="fit",
    learning_rate=0.5,
    local_epochs=1,
    seed=9,
    tells=(),
    clip=2.0,
    noise=0.5,
    max_update_bytes=100_000,
)
SUMMED = replace(PLAN, uplink_codec=GRID, min_survivors=5)


def manifest(noise: ClientNoise | None, fewest_samples: int | None = None) -> Manifest:
    return Manifest(
        job=PLAN.job,
        backbone="none",
        method="none",
        task="classification",
        class_names=("a", "b"),
        trainable=ParamSpec.of(TENSORS),
        state=ParamSpec(()),
        inputs=(),
        preprocessing=Preprocessing(kind="array"),
        training=TrainingSpec(batch_size=8, optimizer="sgd", learning_rate=0.1),
        noise=noise,
        fewest_samples=fewest_samples,
        graphs={},
    )


class Trainer:
    """Moves every value by the same; counts how often it is asked."""

    asked = 0

    def __init__(self, moved: float = 0.0) -> None:
        self.moved = moved

    def fit(self, tensors: Any, data: Any, **_: Any) -> tuple[Any, Mapping[str, float]]:
        self.asked += 1
        return {"w": tensors["w"] + np.float32(self.moved)}, {"loss": 0.25}

    def evaluate(self, tensors: Any, data: Any, *, offset: Any) -> Mapping[str, float]:
        self.asked += 1
        return {"accuracy": 1.0}


def answered(plan: Plan, promised: ClientNoise | None, folder: Path, **options: Any) -> bytes:
    data = {"labels": np.zeros(9, np.int64)}
    return respond(
        pack_plan(plan, codec_named("float32").encode(TENSORS)),
        bundle_manifest=manifest(promised),
        initial=TENSORS,
        trainer=options.pop("trainer", Trainer()),
        data_fit=data,
        data_held_out=data,
        client="c1",
        memory=FolderMemory(folder),
        **options,
    )


def test_an_update_leaves_with_noise_and_with_nothing_else(tmp_path: Path) -> None:
    trainer = Trainer(moved=5.0)
    header, payload = unpack_update(
        answered(PLAN, LOCAL, tmp_path, trainer=trainer), max_bytes=100_000
    )
    assert header.samples == 1 and header.metrics == {}
    sent = codec_named("float32").decode(payload, ParamSpec.of(TENSORS), 10**6)["w"]
    # The update is cut to a norm of 2 over 4,000 values: what remains is noise of 0.5 * 2.
    assert sent.std() == pytest.approx(1.0, rel=0.05)
    assert abs(sent.mean()) < 0.1


def test_noise_is_new_each_time_but_where_a_simulation_repeats_it(tmp_path: Path) -> None:
    secret = [answered(PLAN, LOCAL, tmp_path / f"{n}", noise=secret_seed) for n in range(2)]
    assert secret[0] != secret[1]
    same = [answered(PLAN, LOCAL, tmp_path / f"r{n}", noise=repeatable_seed) for n in range(2)]
    assert same[0] == same[1]
    seeds = {
        repeatable_seed(plan) for plan in (PLAN, replace(PLAN, round=3), replace(PLAN, client="c2"))
    }
    assert len(seeds) == 3


def test_a_part_in_a_sum_has_its_share_of_the_noise(tmp_path: Path) -> None:
    answer = answered(SUMMED, SHARED, tmp_path)
    _, payload = unpack_update(answer, max_bytes=100_000)
    assert not payload, "the update stays here"
    summand = held(FolderMemory(tmp_path), 2)
    assert summand.noise is not None
    codec = codec_named(GRID)
    step = codec.step(ParamSpec.of(TENSORS))  # type: ignore[attr-defined]
    deviation = summand.noise.drawn.std() * step
    assert deviation == pytest.approx(0.5 * 2.0, rel=0.05)
    # Modulo 2^20 it is the update and the noise; taken off again, the update as the grid has it.
    integers = summand.integers(20).astype(np.int64)
    plain = (integers - summand.noise.drawn) % (1 << 20)
    assert set(plain.tolist()) <= {127, 128}, "no change lies between two integers"


def test_noise_for_a_shorter_norm_than_the_codec_has_is_refused(tmp_path: Path) -> None:
    tight = replace(SUMMED, uplink_codec="grid:8,2.0")
    with pytest.raises(PrivacyError, match="expected noise for a norm of 2"):
        answered(tight, SHARED, tmp_path)
    fine = replace(SUMMED, noise=1e-3)
    with pytest.raises(PrivacyError, match="use more bits a value"):
        answered(fine, replace(SHARED, multiplier=1e-3), tmp_path)


@pytest.mark.parametrize(
    ("plan", "promised", "words"),
    [
        (replace(PLAN, noise=0.4), LOCAL, r"expected noise = 0\.5.*found 0\.4"),
        (replace(PLAN, noise=0.0), LOCAL, r"expected noise = 0\.5.*found 0"),
        (replace(PLAN, clip=1.0), LOCAL, r"expected clip = 2\.0.*found 1\.0"),
        (replace(PLAN, tells=("loss",)), LOCAL, r"expected tells = \(\).*found"),
        (replace(PLAN, error_feedback=True), LOCAL, "expected error_feedback = False"),
        (replace(SUMMED, full_weight_samples=9), SHARED, "expected full_weight_samples = 0"),
        (replace(PLAN, task="evaluate"), LOCAL, "expected training alone"),
        (SUMMED, LOCAL, "expected no secure sum"),
        (PLAN, SHARED, "expected a sum of 5 or more.*found min_survivors = 0"),
        (replace(SUMMED, min_survivors=4), SHARED, "expected a sum of 5 or more"),
        (PLAN, None, "of which the bundle has no word"),
    ],
)
def test_a_plan_beyond_the_promise_is_refused_before_the_data_are_touched(
    plan: Plan, promised: ClientNoise | None, words: str, tmp_path: Path
) -> None:
    trainer = Trainer()
    with pytest.raises(PlanError, match=words):
        answered(plan, promised, tmp_path, trainer=trainer)
    assert trainer.asked == 0 and not list(tmp_path.iterdir())


def test_weights_that_clients_give_themselves_would_have_no_noise(tmp_path: Path) -> None:
    with pytest.raises(PlanError, match="expected smoothing = 0"):
        charge_release(replace(SUMMED, smoothing=1.0), manifest(SHARED), FolderMemory(tmp_path))


def test_rounds_are_counted_and_the_first_beyond_them_is_refused(tmp_path: Path) -> None:
    for number in (9, 5, 1):
        # A device that is started again goes on counting, whichever rounds it is asked for.
        plan = replace(PLAN, round=number, nonce=f"{number:032x}")
        charge_release(plan, manifest(LOCAL), FolderMemory(tmp_path))
    with pytest.raises(PlanError, match="at most 3 noised updates"):
        charge_release(replace(PLAN, nonce="ff" * 16), manifest(LOCAL), FolderMemory(tmp_path))
    # The last one comes again, after a crash: it was charged.
    charge_release(replace(PLAN, nonce=f"{1:032x}"), manifest(LOCAL), FolderMemory(tmp_path))
    with pytest.raises(PlanError, match="keeps tensors between rounds"):
        charge_release(PLAN, manifest(LOCAL), None)


def test_a_promise_of_noise_is_part_of_the_signed_manifest() -> None:
    for noise in (None, LOCAL, SHARED):
        for fewest in (None, 0, 12):
            made = manifest(noise, fewest)
            assert Manifest.from_json(made.to_json()) == made
    for change in ({"multiplier": 0.0}, {"clip": -1.0}, {"rounds": 0}, {"fewest": -1}):
        with pytest.raises(ManifestError, match=r"noise\."):
            replace(LOCAL, **change)  # type: ignore[arg-type]
    with pytest.raises(MalformedError, match="clip: expected a norm above 0"):
        replace(PLAN, clip=0.0)


def test_who_does_not_tell_how_many_samples_it_has_compares_them_itself() -> None:
    told = readiness(manifest(None), 40, 8)
    assert (told.samples, told.held_out, told.ready) == (40, 8, True)
    quiet = readiness(manifest(None, 20), 40, 8)
    assert (quiet.samples, quiet.held_out, quiet.ready) == (None, None, True)
    few = readiness(manifest(None, 20), 19, 8)
    assert (few.samples, few.ready) == (None, False) and "fewer samples" in few.reason
