# SPDX-License-Identifier: Apache-2.0
"""What `grid` and `votes` share: their integers may be added before they are decoded."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from aggregation import CodecError, Seeds
from aggregation.codecs import SumCodec, codec_named
from aggregation.codecs.common_grid import signed_sums, sum_bits
from aggregation.codecs.random_k import RandomK
from aggregation.rotation import power_below, rotate
from protocol import ParamSpec, Tensors

SEEDS = st.integers(0, 2**64 - 1)
NAMES = (
    "grid:1,2.0", "grid:8,2.0", "grid:16,0.5", "grid:8,2.0,0.3", "votes:2.0", "votes:2.0,ternary",
    "votes:0.7,ternary,0.5",
)  # fmt: skip
SPEC = ParamSpec.of({"a": np.zeros((7, 9), "f4"), "b": np.zeros(20, "f4")})


def codec_of(name: str) -> SumCodec:
    codec = codec_named(name)
    assert isinstance(codec, SumCodec)
    return codec


def drawn(seed: int, norm: float) -> dict[str, np.ndarray]:
    """A lopsided update of a norm."""
    rng = np.random.default_rng(seed)
    tensors = {"a": rng.standard_normal((7, 9)) ** 3, "b": rng.standard_normal(20) * 0.01}
    whole = math.sqrt(sum(float((value**2).sum()) for value in tensors.values()))
    return {name: (value * (norm / whole)).astype("f4") for name, value in tensors.items()}


def distance(one: Tensors, two: Tensors) -> float:
    return math.sqrt(sum(float(((one[k] - two[k]).astype("f8") ** 2).sum()) for k in one))


@pytest.mark.parametrize("name", NAMES)
@settings(max_examples=15)
@given(shared=SEEDS, clients=st.integers(1, 12))
def test_the_sum_decodes_to_the_mean_of_the_payloads(name: str, shared: int, clients: int) -> None:
    codec = codec_of(name)
    sums = np.zeros(codec.length(SPEC), np.uint64)
    decoded = []
    for client in range(clients):
        seeds = Seeds(own=client, shared=shared)
        update = drawn(client, 0.3 * (client + 1))
        integers = codec.quantise(update, seeds=seeds)
        assert integers.max() <= codec.levels
        sums += integers
        payload = codec.encode(update, seeds=seeds)
        assert len(payload) == codec.payload_bytes(SPEC)
        decoded.append(codec.decode(payload, SPEC, SPEC.nbytes, seeds=seeds))
    assert int(sums.max()) < 1 << sum_bits(codec.levels, clients)
    mean = codec.mean(sums, clients, SPEC, seeds=Seeds(shared=shared))
    expected = {key: np.mean([one[key] for one in decoded], axis=0) for key in mean}
    assert distance(mean, expected) < 1e-4 * codec.norm  # type: ignore[attr-defined]
    assert ParamSpec.of(mean) == SPEC


@pytest.mark.parametrize("name", NAMES)
def test_longer_updates_are_shortened_to_the_norm(name: str) -> None:
    codec, seeds = codec_of(name), Seeds(own=1, shared=2)
    norm = codec.norm  # type: ignore[attr-defined]
    long = codec.encode(drawn(0, 50.0), seeds=seeds)
    # Of one direction, all that is above the norm is the same, but for rounding of the last bit.
    same = codec.encode(drawn(0, norm * 1.001), seeds=seeds)
    spec = ParamSpec.of({"integers": np.zeros(codec.length(SPEC), "f4")})
    assert spec.size == codec.length(SPEC)
    one, two = (codec.decode(p, SPEC, SPEC.nbytes, seeds=seeds) for p in (long, same))
    assert distance(one, two) < 0.02 * norm


@pytest.mark.parametrize("name", NAMES)
@settings(max_examples=30)
@given(own=SEEDS, shared=SEEDS, spike=st.booleans())
def test_no_payload_reaches_farther_than_it_says(
    name: str, own: int, shared: int, spike: bool
) -> None:
    codec, seeds = codec_of(name), Seeds(own=own, shared=shared)
    update = drawn(own % 1000, 50.0)
    if spike:
        update = {key: np.zeros(entry.shape, "f4") for key, entry in SPEC.entries}
        update["b"][own % 20] = 9
    found = codec.decode(codec.encode(update, seeds=seeds), SPEC, SPEC.nbytes, seeds=seeds)
    zeros = {key: np.zeros(entry.shape, "f4") for key, entry in SPEC.entries}
    reach = codec.reach(SPEC)
    assert distance(found, zeros) <= reach
    if name.startswith("grid:16,0.5"):
        assert reach < 0.501, "the finer the grid, the nearer to the norm"


@pytest.mark.parametrize("name", ["grid:8,2.0", "votes:2.0,ternary"])
def test_no_change_is_no_change(name: str) -> None:
    codec = codec_of(name)
    zeros = {key: np.zeros(entry.shape, "f4") for key, entry in SPEC.entries}
    total = np.sum([codec.quantise(zeros, seeds=Seeds(own=n)) for n in range(400)], axis=0)
    assert distance(codec.mean(total, 400, SPEC), zeros) < 0.01


@given(shared=SEEDS)
def test_clients_of_a_round_choose_the_same_rotated_values(shared: int) -> None:
    codec, seeds = codec_of("grid:16,1.0,0.3"), Seeds(shared=shared)
    update = drawn(3, 1.0)
    vector = SPEC.flatten(update)
    rotate(vector, shared)
    kept = RandomK(density=0.3)
    flat = ParamSpec.of({"v": vector})
    chosen = kept.decode(kept.encode({"v": vector}, seeds=seeds), flat, 1 << 20, seeds=seeds)["v"]
    decoded = SPEC.flatten(
        codec.decode(codec.encode(update, seeds=seeds), SPEC, 1 << 20, seeds=seeds)
    )
    rotate(decoded, shared)
    np.testing.assert_allclose(decoded, chosen, atol=2e-4)


def test_sums_that_cannot_be_are_refused() -> None:
    codec = codec_of("grid:8,2.0")
    sums = np.full(codec.length(SPEC), 2 * 255 + 1, np.uint64)
    with pytest.raises(CodecError, match="expected 0 to 510 of 2 clients, found 511"):
        codec.mean(sums, 2, SPEC)
    with pytest.raises(CodecError, match="expected shape"):
        codec.mean(sums[1:], 3, SPEC)


@given(noise=st.integers(0, 5000), clients=st.integers(1, 9), rng=SEEDS)
def test_noise_may_take_sums_below_zero_and_beyond_what_clients_have(
    noise: int, clients: int, rng: int
) -> None:
    codec = codec_of("grid:8,2.0")
    bits = sum_bits(codec.levels, clients, noise=noise)
    draw = np.random.default_rng(rng)
    plain = draw.integers(0, clients * codec.levels + 1, codec.length(SPEC))
    drawn = draw.integers(-noise, noise + 1, codec.length(SPEC))
    drawn[:2] = plain[:2] = -noise, noise
    plain[:2] = 0, clients * codec.levels
    modular = ((plain + drawn) % (1 << bits)).astype(np.uint32)
    found = signed_sums(modular, bits, noise=noise)
    np.testing.assert_array_equal(found, plain + drawn)
    mean = codec.mean(found, clients, SPEC, noise=noise)
    assert ParamSpec.of(mean) == SPEC
    if noise:
        with pytest.raises(CodecError, match="sums: expected"):
            codec.mean(found, clients, SPEC, noise=noise - 1)


@pytest.mark.parametrize(
    ("levels", "clients", "bits"), [(255, 100, 15), (1, 100, 7), (2, 100, 8), (1, 1, 1)]
)
def test_bits_of_a_sum(levels: int, clients: int, bits: int) -> None:
    assert sum_bits(levels, clients) == bits


@pytest.mark.parametrize(
    "name", ["grid:0,1.0", "grid:17,1.0", "grid:8,0", "grid:8,-1", "grid:8,1.0,0", "votes:0",
             "votes:1.0,maybe", "grid:8"],
)  # fmt: skip
def test_settings_that_cannot_be_are_refused(name: str) -> None:
    with pytest.raises(CodecError):
        codec_named(name)


def test_the_unit_is_that_of_the_power_below() -> None:
    """Of an update of the full norm, values beyond the range are rare."""
    size = 3 * 4096
    assert power_below(size) == 8192
    codec = codec_of("grid:8,1.0")
    beyond = 0
    for seed in range(10):
        update = np.zeros(size, "f4")
        update[:4] = 0.5
        integers = codec.quantise({"v": update}, seeds=Seeds(own=seed, shared=seed))
        beyond += int(((integers == 0) | (integers == 255)).sum())
    assert beyond < 1e-4 * 10 * size
