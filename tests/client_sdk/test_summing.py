# SPDX-License-Identifier: Apache-2.0
"""Devices in a secure sum, each message answered by what is on their disks alone."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
import pytest

from aggregation.codecs import Seeds, SumCodec, codec_named
from aggregation.codecs.common_grid import signed_sums, sum_bits
from aggregation.privacy.distributed_gaussian import noise_reach, share_variance
from aggregation.secure_aggregation import (
    Aborted,
    SecureSum,
    Stage,
    Task,
    Terms,
    close_stage,
    new_context,
    open_attempt,
    receive,
)
from aggregation.summed_weights import digit_count, summed_weight
from client_sdk.errors import PlanError, SumError
from client_sdk.memory import FolderMemory
from client_sdk.summing import FolderSums, HeldSums, SumStore, answer_sum, held, hold
from protocol.keys import new_key, public_pem, sign, verifier
from protocol.plan import Plan
from protocol.summing import SumRequest, pack_sum_request
from protocol.tensors import ParamSpec

JOB = "ab" * 32
NAMES = ("lathe", "mill", "press", "saw")
DIGEST = bytes(range(32))
TERMS = Terms(corrupt=0.0, dropouts=0.3, min_survivors=3)
CODEC = codec_named("grid:8,2.0")
KEYS = {name: new_key() for name in NAMES}
PUBLIC = {name: public_pem(key.public_key()) for name, key in KEYS.items()}
PLAN = Plan(
    job=JOB,
    round=1,
    nonce="00" * 8,
    client="lathe",
    downlink_codec="float32",
    uplink_codec="grid:8,2.0",
    task="fit",
    learning_rate=0.1,
    local_epochs=1,
    seed=1,
    max_update_bytes=100,
    min_survivors=3,
    dropouts=0.3,
)


def update_of(name: str) -> dict[str, np.ndarray]:
    return {"a": np.random.default_rng(NAMES.index(name)).standard_normal(30).astype("f4") * 0.1}


@dataclass
class Shop:
    """Four devices, of which only folders outlive a message."""

    folder: Path
    digests: Mapping[str, bytes]
    weights: Mapping[str, int] = field(default_factory=dict)

    def train(self, round: int = 1, **noise: float) -> None:
        for number, name in enumerate(NAMES):
            update = update_of(name)
            payload = CODEC.encode(update, seeds=Seeds(own=number))
            plan = replace(PLAN, client=name, round=round, **noise)  # type: ignore[arg-type]
            digest = self.digests.get(name, DIGEST)
            weight, seed = self.weights.get(name, 0), bytes([number]) * 32
            hold(self.memory(name), plan, update, payload, digest, weight=weight, seed=seed)

    def memory(self, name: str) -> FolderMemory:
        return FolderMemory(self.folder / name / "memory")

    def answer(
        self, name: str, message: bytes, round: int = 1, store: SumStore | None = None
    ) -> bytes:
        request = SumRequest(job=JOB, round=round, client=name, credentials=PUBLIC, message=message)
        return answer_sum(
            pack_sum_request(request),
            client=name,
            memory=lambda job: self.memory(name),
            store=store or FolderSums(self.folder / name / "sums"),
            sign=lambda text: sign(text, KEYS[name]),
            trust=verifier,
        )

    def sum(
        self,
        *,
        round: int = 1,
        noise: int = 0,
        until: Stage = Stage.OVER,
        lost: Callable[[str, Stage], bool] = lambda name, stage: False,
    ) -> SecureSum | Aborted | None:
        """A server's attempt, given up before the stage `until`, with room for `noise`."""
        assert isinstance(CODEC, SumCodec)
        task = Task(
            job=bytes.fromhex(JOB),
            round=round,
            nonce=np.random.default_rng().bytes(16),
            plan=DIGEST,
            values=30 + (digit_count(CODEC.levels) if self.weights else 0),
            bits=sum_bits(CODEC.levels, len(NAMES), noise=noise),
        )
        state, messages = open_attempt(new_context(task, NAMES, TERMS))
        self.refused: dict[str, str] = {}
        while state.stage is not until:
            for name, message in messages.items():
                if lost(name, state.stage):
                    continue
                try:
                    answer = self.answer(name, message, round)
                except SumError as error:
                    self.refused[name] = str(error)
                    continue
                state, fault = receive(state, name, answer, verifier(PUBLIC))
                assert fault is None
            state, found = close_stage(state)
            if isinstance(found, SecureSum | Aborted):
                return found
            messages = found
        return None


@pytest.fixture
def shop(tmp_path: Path) -> Shop:
    made = Shop(tmp_path, {})
    made.train()
    return made


def plain_sum(names: tuple[str, ...] = NAMES) -> np.ndarray:
    assert isinstance(CODEC, SumCodec)
    integers = [
        CODEC.quantise(update_of(name), seeds=Seeds(own=NAMES.index(name))) for name in names
    ]
    return np.sum(integers, axis=0)


def test_devices_that_keep_nothing_in_memory_reach_the_sum(shop: Shop) -> None:
    found = shop.sum()
    assert isinstance(found, SecureSum) and found.members == NAMES
    np.testing.assert_array_equal(found.values, plain_sum())
    for name in NAMES:
        (state,) = (shop.folder / name / "sums").iterdir()
        assert state.stat().st_mode & 0o077 == 0, "secrets are for the owner alone"


def test_weights_are_digits_of_the_same_sum(tmp_path: Path) -> None:
    shop = Shop(tmp_path, {}, weights={name: 9_000 * (1 + at) for at, name in enumerate(NAMES)})
    shop.train()
    found = shop.sum()
    assert isinstance(found, SecureSum) and found.members == NAMES
    np.testing.assert_array_equal(found.values[:30], plain_sum())
    assert summed_weight(found.values[30:], len(NAMES), 255) == 9_000 * (1 + 2 + 3 + 4)


def test_a_device_that_was_asked_for_no_weight_is_not_summed_with_those_that_were(
    tmp_path: Path,
) -> None:
    shop = Shop(tmp_path, {}, weights=dict.fromkeys(NAMES[1:], 5))
    shop.train()
    found = shop.sum()
    assert isinstance(found, SecureSum) and found.members == NAMES[1:]
    assert "wrong-task" in shop.refused[NAMES[0]]


def test_what_was_given_up_is_attempted_again_with_other_keys(shop: Shop) -> None:
    for stage in (Stage.SHARES, Stage.VECTORS, Stage.CONSENTS, Stage.REVEALS):
        assert shop.sum(until=stage) is None
    found = shop.sum(lost=lambda name, stage: name == "mill" and stage is Stage.VECTORS)
    assert isinstance(found, SecureSum)
    np.testing.assert_array_equal(found.values, plain_sum(("lathe", "press", "saw")))


def test_an_update_that_was_opened_is_not_summed_again(shop: Shop) -> None:
    """Of two sums over different devices the difference would show single updates."""
    assert isinstance(shop.sum(), SecureSum)
    again = shop.sum(lost=lambda name, stage: name == "mill")
    assert isinstance(again, Aborted)
    assert len(shop.refused) == 3
    assert all("was opened already" in reason for reason in shop.refused.values())
    shop.train(round=2)
    assert isinstance(shop.sum(round=2), SecureSum), "the next round is another matter"
    assert isinstance(shop.sum(round=1), Aborted)
    assert all("is over here" in reason for reason in shop.refused.values())


def test_the_sum_has_the_noise_of_all_and_an_update_leaves_with_its_share_once(
    tmp_path: Path,
) -> None:
    shop = Shop(tmp_path, {})
    shop.train(clip=2.4, noise=0.5)
    shares = [held(shop.memory(name), 1).noise for name in NAMES]
    variances = {share.variance for share in shares if share is not None}
    assert len(variances) == 1
    noise = noise_reach(*variances, len(NAMES))
    assert isinstance(CODEC, SumCodec)
    bits = sum_bits(CODEC.levels, len(NAMES), noise=noise)
    # Given up before any vector was out: fresh keys, the same noise.
    assert shop.sum(noise=noise, until=Stage.VECTORS) is None and not shop.refused
    found = shop.sum(noise=noise)
    assert isinstance(found, SecureSum) and found.members == NAMES
    drawn = np.sum([share.drawn for share in shares if share is not None], axis=0)
    sums = signed_sums(found.values, bits, noise=noise)
    np.testing.assert_array_equal(sums, plain_sum() + drawn)
    assert np.abs(drawn).max() > 255, "a value of an update is nothing beside it"


@pytest.mark.parametrize("stage", [Stage.CONSENTS, Stage.REVEALS])
def test_an_update_whose_noise_is_out_is_in_no_other_attempt(tmp_path: Path, stage: Stage) -> None:
    shop = Shop(tmp_path, {})
    shop.train(clip=2.4, noise=0.5)
    assert isinstance(CODEC, SumCodec)
    step = CODEC.step(ParamSpec.of(update_of("saw")))
    noise = noise_reach(share_variance(0.5, 2.4, step), len(NAMES))
    assert shop.sum(noise=noise, until=stage) is None
    assert isinstance(shop.sum(noise=noise), Aborted)
    assert len(shop.refused) == 4
    assert all("that noise is accounted for once" in reason for reason in shop.refused.values())


def test_a_device_that_saw_another_plan_is_not_summed_with(tmp_path: Path) -> None:
    shop = Shop(tmp_path, {"mill": bytes(32)})
    shop.train()
    found = shop.sum()
    assert isinstance(found, SecureSum) and "mill" not in found.members
    assert "wrong-task" in shop.refused["mill"]


def test_nothing_leaves_that_could_not_be_written_down(shop: Shop) -> None:
    class Full(HeldSums):
        def save(self, job: str, state: bytes) -> None:
            raise SumError("disk full")

    _, messages = open_attempt(new_context(_task(), NAMES, TERMS))
    with pytest.raises(SumError, match="disk full"):
        shop.answer("mill", messages["mill"], store=Full())


def _task() -> Task:
    assert isinstance(CODEC, SumCodec)
    return Task(
        job=bytes.fromhex(JOB), round=1, nonce=bytes(16), plan=DIGEST, values=30,
        bits=sum_bits(CODEC.levels, len(NAMES)),
    )  # fmt: skip


def test_messages_for_others_of_nothing_and_of_no_attempt_are_refused(shop: Shop) -> None:
    _, messages = open_attempt(new_context(_task(), NAMES, TERMS))
    announcement = messages["mill"]
    request = SumRequest(job=JOB, round=1, client="saw", credentials=PUBLIC, message=announcement)
    with pytest.raises(PlanError, match="expected one for mill, found saw"):
        answer_sum(
            pack_sum_request(request),
            client="mill",
            memory=lambda job: shop.memory("mill"),
            store=HeldSums(),
            sign=lambda text: b"",
            trust=verifier,
        )
    with pytest.raises(PlanError, match="message of a sum"):
        shop.answer("mill", b"nonsense")
    with pytest.raises(SumError, match="nothing was trained here for a sum of round 7"):
        shop.answer("mill", announcement, round=7)
    shop.answer("mill", announcement)
    later = replace(_task(), nonce=bytes(8))
    _, others = open_attempt(new_context(later, NAMES, TERMS))
    assert shop.answer("mill", others["mill"]), "a new attempt takes the place of the old"


def test_a_codec_that_cannot_be_summed_is_refused_before_anything_is_kept(tmp_path: Path) -> None:
    memory = FolderMemory(tmp_path)
    with pytest.raises(PlanError, match="expected a codec whose payloads can be summed"):
        hold(memory, replace(PLAN, uplink_codec="int8"), update_of("mill"), b"", DIGEST)
    assert not list(tmp_path.iterdir())
