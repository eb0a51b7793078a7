# SPDX-License-Identifier: Apache-2.0
"""What plans carry: whole tensors, or changes to what a client holds."""

from __future__ import annotations

import numpy as np
import pytest

from aggregation.codecs import codec_named, round_seeds
from coordinator.downlink import Broadcast, broadcast
from coordinator.sections import UpdateSection
from protocol.tensors import ParamSpec, Tensors

SPEC = ParamSpec.of({"a": np.zeros(64, "f4"), "b": np.zeros((2, 3), "f4")})
JOB = "ab" * 32


def drawn(seed: int) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(seed)
    return {name: rng.standard_normal(e.shape, dtype=np.float32) for name, e in SPEC.entries}


def made(codec: str, downlink: str, tensors: Tensors, number: int, copy: Tensors) -> Broadcast:
    update = UpdateSection(downlink=downlink, downlink_codec=codec)
    return broadcast(
        update,
        SPEC,
        tensors,
        job=JOB,
        round=number,
        copy=copy,
        holders=["ada"] if number > 1 else [],
    )


def decoded(codec: str, payload: bytes, number: int) -> Tensors:
    seeds = round_seeds(JOB, number)
    return codec_named(codec).decode(payload, SPEC, SPEC.nbytes, seeds=seeds)


@pytest.mark.parametrize("codec", ["float32", "float16"])
def test_whole_tensors_are_what_every_client_sees(codec: str) -> None:
    sent = made(codec, "tensors", drawn(0), 3, drawn(1))
    parcel = sent.for_client("ada")
    assert parcel == sent.for_client("ben") and parcel.base_round is None and not sent.keep
    for name, value in decoded(codec, parcel.payload, 3).items():
        assert value.tobytes() == sent.seen[name].tobytes()


@pytest.mark.parametrize("codec", ["one-bit", "float16"])
def test_clients_with_and_without_the_base_see_the_same_bits(codec: str) -> None:
    copy = drawn(1)
    sent = made(codec, "changes", drawn(0), 3, copy)
    holder, other = sent.for_client("ada"), sent.for_client("ben")
    assert (holder.base_round, other.base_round, sent.keep) == (2, None, True)
    assert (holder.codec, other.codec) == (codec, "float32")
    assert len(holder.payload) < len(other.payload)
    change, whole = decoded(codec, holder.payload, 3), decoded("float32", other.payload, 3)
    for name, value in sent.seen.items():
        assert (copy[name] + change[name]).tobytes() == value.tobytes() == whole[name].tobytes()


def test_the_first_round_builds_on_the_bundle_that_everybody_has() -> None:
    sent = made("one-bit", "changes", drawn(0), 1, drawn(0))
    assert sent.for_client("ada") == sent.for_client("ben")
    assert (sent.for_client("ada").codec, sent.for_client("ada").base_round) == ("one-bit", 0)
    for name, value in drawn(0).items():
        assert sent.seen[name].tobytes() == value.tobytes()


def test_what_a_lossy_codec_leaves_behind_is_sent_in_later_rounds() -> None:
    goal = drawn(0)
    copy: Tensors = made("one-bit", "changes", drawn(1), 1, drawn(1)).seen
    distances = []
    for number in range(2, 30):
        copy = made("one-bit", "changes", goal, number, copy).seen
        distances.append(np.sqrt(sum(np.square(goal[n] - copy[n]).sum() for n in goal)))
    # Sent once, the change would stay as far off as after the first of these rounds.
    assert distances[-1] < distances[0] / 20
