# SPDX-License-Identifier: Apache-2.0
"""What a client starts from, by what its plan says and what it holds."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from aggregation.codecs import codec_named
from aggregation.mergers import BaseChange
from aggregation.offsets import pack_changes
from client_sdk.errors import PlanError
from client_sdk.memory import FolderMemory
from client_sdk.updates import close_update, variants_of
from client_sdk.work import CONTROL, longest_plan, open_plan
from protocol.controls import joined
from protocol.factors import FactorPair, cut
from protocol.manifest import Manifest, Preprocessing, TrainingSpec
from protocol.plan import Plan, pack_plan
from protocol.tensors import ParamSpec
from protocol.update import unpack_update

RNG = np.random.default_rng(0)
TENSORS = {
    "q.A": RNG.standard_normal((4, 10)).astype("f4"),
    "q.B": RNG.standard_normal((12, 4)).astype("f4"),
    "head": RNG.standard_normal(3).astype("f4"),
}
PAIRS = (FactorPair(down="q.A", up="q.B", scale=2.0, base="q.weight"),)
SPEC = TrainingSpec(batch_size=8, optimizer="sgd", learning_rate=0.1)
MANIFEST = Manifest(
    job="ab" * 32, backbone="none", method="lora", task="classification",
    class_names=("a", "b"), trainable=ParamSpec.of(TENSORS), state=ParamSpec(()), inputs=(),
    preprocessing=Preprocessing(kind="array"), training=SPEC, pairs=PAIRS, graphs={},
)  # fmt: skip
SCAFFOLD = replace(MANIFEST, training=replace(SPEC, scaffold=True))
PLAN = Plan(
    job=MANIFEST.job, round=2, nonce="cd" * 16, client="c1", downlink_codec="float32",
    uplink_codec="float32", task="fit", learning_rate=0.5, local_epochs=1, seed=9,
    max_update_bytes=10_000,
)  # fmt: skip
CODEC = codec_named("float32")


def change(seed: int, rank: int = 2) -> dict[str, BaseChange]:
    rng = np.random.default_rng(seed)
    left, right = (rng.standard_normal(s).astype("f4") for s in ((12, rank), (rank, 10)))
    return {"q.A": BaseChange(left=left, right=right)}


def plan_with(changes: dict[str, BaseChange], **fields: object) -> bytes:
    ranks, payload = pack_changes(changes, PAIRS)
    plan = replace(PLAN, offset_ranks=ranks, **fields)
    return pack_plan(plan, CODEC.encode(TENSORS) + payload)


@pytest.fixture
def memory(tmp_path: Path) -> FolderMemory:
    return FolderMemory(tmp_path / "memory")


def test_weights_move_by_what_the_plan_says_upon_what_was_kept(memory: FolderMemory) -> None:
    first = open_plan(plan_with(change(0)), MANIFEST, TENSORS, memory)
    np.testing.assert_array_equal(first.offset["q.weight"], change(0)["q.A"].product())
    again = plan_with(change(1), round=3, offset_round=2)
    second = open_plan(again, MANIFEST, TENSORS, memory)
    expected = change(0)["q.A"].product() + change(1)["q.A"].product()
    np.testing.assert_array_equal(second.offset["q.weight"], expected)
    # A plan that is sent again gives the same.
    repeated = open_plan(again, MANIFEST, TENSORS, memory)
    np.testing.assert_array_equal(repeated.offset["q.weight"], expected)
    unmoved = open_plan(plan_with({}, round=4, offset_round=3), MANIFEST, TENSORS, memory)
    np.testing.assert_array_equal(unmoved.offset["q.weight"], expected)


def test_an_evaluation_keeps_nothing(memory: FolderMemory) -> None:
    work = open_plan(plan_with(change(0), task="evaluate"), MANIFEST, TENSORS, memory)
    assert work.offset
    with pytest.raises(PlanError, match="frozen weights of round 2, found none"):
        open_plan(plan_with({}, round=3, offset_round=2), MANIFEST, TENSORS, memory)


@pytest.mark.parametrize(
    ("blob", "manifest", "words"),
    [
        (plan_with({}, offset_round=1), MANIFEST, "frozen weights of round 1, found none"),
        (plan_with(change(0))[:-1], MANIFEST, "expected"),
        (plan_with(change(0)) + b"xx", MANIFEST, "expected"),
        (pack_plan(replace(PLAN, offset_ranks=(1, 1)), b""), MANIFEST, "one rank a pair"),
        (pack_plan(replace(PLAN, offset_ranks=(9,)), b""), MANIFEST, "found rank 9"),
        (
            plan_with(change(0)),
            replace(MANIFEST, pairs=(replace(PAIRS[0], base=""),)),
            'does not name the frozen weight beside "q.A"',
        ),
    ],
)
def test_plans_that_cannot_be_followed_say_why(
    memory: FolderMemory, blob: bytes, manifest: Manifest, words: str
) -> None:
    with pytest.raises(PlanError, match=words):
        open_plan(blob, manifest, TENSORS, memory)


def test_a_client_that_keeps_nothing_cannot_follow_weights_that_move() -> None:
    with pytest.raises(PlanError, match="keeps tensors between rounds"):
        open_plan(plan_with(change(0)), MANIFEST, TENSORS)


def test_a_smaller_rank_is_filled_up_with_zeros() -> None:
    small = cut(TENSORS, 3, PAIRS)
    work = open_plan(pack_plan(replace(PLAN, rank=3), CODEC.encode(small)), MANIFEST, TENSORS)
    assert MANIFEST.trainable.mismatch(work.start) is None
    np.testing.assert_array_equal(work.start["q.A"][:3], small["q.A"])
    assert not work.start["q.A"][3:].any() and not work.start["q.B"][:, 3:].any()
    with pytest.raises(PlanError):
        open_plan(pack_plan(replace(PLAN, rank=2), CODEC.encode(small)), MANIFEST, TENSORS)


def test_corrections_are_the_server_s_control_less_the_own(memory: FolderMemory) -> None:
    control = {name: np.full_like(value, 0.5) for name, value in TENSORS.items()}
    blob = pack_plan(PLAN, CODEC.encode(joined(TENSORS, control)))
    first = open_plan(blob, SCAFFOLD, TENSORS, memory)
    assert all((value == 0.5).all() for value in first.correction.values()), "own starts at zero"
    assert first.correction.keys() == first.start.keys() == TENSORS.keys()
    memory.save(CONTROL, 1, {name: np.full_like(v, 0.25) for name, v in TENSORS.items()})
    memory.save(CONTROL, 2, {name: np.full_like(v, 9.0) for name, v in TENSORS.items()})
    # What this very round left when it was played before does not count.
    again = open_plan(blob, SCAFFOLD, TENSORS, memory)
    assert all((value == 0.25).all() for value in again.correction.values())
    evaluated = pack_plan(replace(PLAN, task="evaluate"), CODEC.encode(TENSORS))
    assert open_plan(evaluated, SCAFFOLD, TENSORS, memory).correction == {}


def test_control_variates_need_a_client_that_keeps_its_own() -> None:
    control = {name: np.zeros_like(value) for name, value in TENSORS.items()}
    blob = pack_plan(PLAN, CODEC.encode(joined(TENSORS, control)))
    with pytest.raises(PlanError, match="keeps tensors between rounds"):
        open_plan(blob, SCAFFOLD, TENSORS)
    with pytest.raises(PlanError, match="plan: "):
        open_plan(pack_plan(PLAN, CODEC.encode(TENSORS)), SCAFFOLD, TENSORS)


AROUND = replace(PLAN, uplink_codec="grid:8,0.5", min_survivors=3, dropouts=0.3, smoothing=0.5)


@pytest.mark.parametrize("sends", ["all", "up"])
def test_a_centre_stands_beside_what_is_sent_and_corrects_no_gradient(sends: str) -> None:
    sent = {name: value for name, value in TENSORS.items() if sends == "all" or name != "q.A"}
    centre = {name: np.full_like(value, 0.5) for name, value in sent.items()}
    blob = pack_plan(replace(AROUND, sends=sends), CODEC.encode(joined(sent, centre)))
    assert len(blob) <= longest_plan(MANIFEST)
    work = open_plan(blob, MANIFEST, TENSORS)
    assert work.start.keys() == TENSORS.keys() and work.centre.keys() == sent.keys()
    assert all((value == 0.5).all() for value in work.centre.values())
    assert not work.correction


@pytest.mark.parametrize("wrong", [np.nan, np.inf])
def test_a_centre_that_is_not_finite_or_not_like_the_tensors_is_refused(wrong: float) -> None:
    centre = {name: np.full_like(value, wrong) for name, value in TENSORS.items()}
    sent = joined(TENSORS, centre)
    whole = b"".join(sent[name].tobytes() for name in sorted(sent))
    with pytest.raises(PlanError, match="expected finite values"):
        open_plan(pack_plan(AROUND, whole), MANIFEST, TENSORS)
    for payload in (CODEC.encode(TENSORS), whole[:-4], whole + bytes(4)):
        with pytest.raises(PlanError, match=r"plan: .*bytes"):
            open_plan(pack_plan(AROUND, payload), MANIFEST, TENSORS)


PERSONAL = replace(MANIFEST, personal=("head",))
SHARED = {name: value for name, value in TENSORS.items() if name != "head"}


def test_personal_tensors_are_the_client_s_own(memory: FolderMemory) -> None:
    blob = pack_plan(PLAN, CODEC.encode(SHARED))
    first = open_plan(blob, PERSONAL, TENSORS, memory)
    np.testing.assert_array_equal(first.start["head"], TENSORS["head"])
    trained = {name: value + 1 for name, value in first.start.items()}
    _, payload = unpack_update(
        close_update(first, PERSONAL, trained, {}, 7, memory), max_bytes=10_000
    )
    delta = CODEC.decode(payload, PERSONAL.shared, 10_000)
    assert delta.keys() == SHARED.keys(), "the head stays"
    later = open_plan(
        pack_plan(replace(PLAN, round=3), CODEC.encode(SHARED)), PERSONAL, TENSORS, memory
    )
    np.testing.assert_array_equal(later.start["head"], TENSORS["head"] + 1)
    # Played again, the first round starts as it did.
    again = open_plan(blob, PERSONAL, TENSORS, memory)
    np.testing.assert_array_equal(again.start["head"], TENSORS["head"])
    # A round's test is of what the round trained.
    test = pack_plan(replace(PLAN, task="evaluate"), CODEC.encode(SHARED))
    np.testing.assert_array_equal(
        open_plan(test, PERSONAL, TENSORS, memory).start["head"], TENSORS["head"] + 1
    )


@pytest.mark.parametrize("share", [0.0, 0.25, 1.0])
def test_a_mixture_is_of_what_was_trained_last_and_what_the_plan_says(
    memory: FolderMemory, share: float
) -> None:
    fit = replace(PLAN, mix=share)
    work = open_plan(pack_plan(fit, CODEC.encode(TENSORS)), MANIFEST, TENSORS, memory)
    evaluate = pack_plan(replace(fit, task="evaluate"), CODEC.encode(TENSORS))
    before = open_plan(evaluate, MANIFEST, TENSORS, memory)
    assert variants_of(before, memory).keys() == {""}, "nothing was trained yet"
    trained = {name: value + 4 for name, value in work.start.items()}
    close_update(work, MANIFEST, trained, {}, 7, memory)
    variants = variants_of(open_plan(evaluate, MANIFEST, TENSORS, memory), memory)
    assert list(variants) == ["", "/local", "/mixed"]
    for name, value in TENSORS.items():
        np.testing.assert_array_equal(variants[""][name], value)
        np.testing.assert_array_equal(variants["/local"][name], trained[name])
        np.testing.assert_allclose(variants["/mixed"][name], value + 4 * share, rtol=1e-6)
    unasked = open_plan(
        pack_plan(replace(PLAN, task="evaluate"), CODEC.encode(TENSORS)), MANIFEST, TENSORS, memory
    )
    assert variants_of(unasked, memory).keys() == {""}


def test_only_metrics_that_the_plan_asks_for_leave(memory: FolderMemory) -> None:
    metrics = {"loss": 1.0, "selected/0": 2.0, "selected/1": 0.0, "secret": 3.0}
    told = {}
    for words in ((), ("loss",), ("loss", "selected")):
        work = open_plan(
            pack_plan(replace(PLAN, tells=words), CODEC.encode(TENSORS)), MANIFEST, TENSORS
        )
        blob = close_update(work, MANIFEST, work.start, metrics, 7)
        told[words] = set(unpack_update(blob, max_bytes=10_000)[0].metrics)
    assert told == {
        (): set(),
        ("loss",): {"loss"},
        ("loss", "selected"): {"loss", "selected/0", "selected/1"},
    }


def test_control_variates_go_with_personal_tensors_which_have_none(memory: FolderMemory) -> None:
    manifest = replace(SCAFFOLD, personal=("head",))
    control = {name: np.zeros_like(value) for name, value in SHARED.items()}
    blob = pack_plan(PLAN, CODEC.encode(joined(SHARED, control)))
    work = open_plan(blob, manifest, TENSORS, memory)
    assert work.correction.keys() == SHARED.keys()
    trained = {name: value - 1 for name, value in work.start.items()}
    _, payload = unpack_update(
        close_update(work, manifest, trained, {}, 7, memory), max_bytes=10**4
    )
    delta = CODEC.decode(payload, manifest.exchanged, 10**4)
    # One step at the rate 0.5 that moved by -1 had the gradient 2.
    for name in SHARED:
        np.testing.assert_allclose(delta[f"control/{name}"], 2, rtol=0, atol=1e-5)
    assert memory.latest(CONTROL, before=3).keys() == SHARED.keys()
