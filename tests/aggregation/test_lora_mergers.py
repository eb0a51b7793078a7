# SPDX-License-Identifier: Apache-2.0
"""What every merger of LoRA factors has to hold, and what each says of itself."""

from __future__ import annotations

import tracemalloc

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from aggregation.errors import MergeError
from aggregation.mergers.fedex_lora import FedExLoRA
from aggregation.mergers.fedit import FedIT
from aggregation.mergers.fedsa_lora import FedSALoRA
from aggregation.mergers.ffa_lora import FFALoRA
from aggregation.mergers.flexlora import FlexLoRA
from aggregation.mergers.flora import FLoRA
from aggregation.mergers.hetlora import HetLoRA
from aggregation.mergers.lora_fair import LoRAFair
from aggregation.mergers.lora_sb import CoreTriple, LoRASB
from aggregation.mergers.rolora import RoLoRA
from protocol import ParamSpec
from protocol.factors import FactorPair

D, K, R = 12, 10, 3
PAIRS = (FactorPair(down="q.A", up="q.B", scale=2.0), FactorPair(down="v.A", up="v.B", scale=0.5))
TRIPLES = (CoreTriple(core="q.R", down="q.A", up="q.B", scale=2.0),)
MERGERS = {
    merger.name: merger
    for merger in (
        FedIT(pairs=PAIRS),
        FFALoRA(pairs=PAIRS),
        FedSALoRA(pairs=PAIRS),
        RoLoRA(pairs=PAIRS),
        FLoRA(pairs=PAIRS),
        FlexLoRA(pairs=PAIRS),
        FedExLoRA(pairs=PAIRS),
        LoRAFair(pairs=PAIRS),
        HetLoRA(pairs=PAIRS),
        LoRASB(triples=TRIPLES),
    )
}
ALL = list(MERGERS)
USE_CURRENT = ["flora", "flexlora", "fedex-lora", "lora-fair", "hetlora"]
MIXED = ["flora", "flexlora", "fedex-lora", "hetlora"]
FROZEN = {"ffa-lora": ("q.A", "v.A"), "rolora": ("q.A", "v.A"), "lora-sb": ("q.A", "q.B")}


def normal(rng, *shape) -> np.ndarray:
    return rng.standard_normal(shape).astype(np.float32)


def current_for(name: str, d: int = D, k: int = K, r: int = R) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(7)
    tensors = {"q.A": normal(rng, r, k), "q.B": normal(rng, d, r), "head": normal(rng, 4)}
    if name == "lora-sb":
        return tensors | {"q.R": normal(rng, r, r)}
    # another shape, so that layers cannot be taken for one another
    return tensors | {"v.A": normal(rng, r, k + 1), "v.B": normal(rng, d + 2, r)}


def draw_update(name: str, current, rng, rank: int | None = None) -> dict[str, np.ndarray]:
    update = {tensor: normal(rng, *array.shape) for tensor, array in current.items()}
    for tensor in FROZEN.get(name, ()):
        update[tensor] = np.zeros_like(update[tensor])
    if rank is not None:
        update = {
            tensor: a[:rank] if tensor.endswith("A") else a[:, :rank] if a.ndim == 2 else a
            for tensor, a in update.items()
        }
    return update


def merge(merger, current, updates):
    state = merger.init(ParamSpec.of(current), current=current)
    for update, weight in updates:
        state = merger.add(state, update, weight)
    return merger.finish(state)


def drawn(name, current, count, *, seed=0, ranks=(None,)):
    rng = np.random.default_rng(seed)
    return [
        (draw_update(name, current, rng, ranks[i % len(ranks)]), float(rng.integers(1, 100)))
        for i in range(count)
    ]


def after(current, merged) -> dict[str, np.ndarray]:
    return {name: current[name] + merged.delta[name] for name in current}


def product_of(name, tensors, layer) -> np.ndarray:
    """s·B·A or s·B·R·A of one layer, dense float64."""
    up, down = (tensors[f"{layer}.{factor}"].astype(np.float64) for factor in "BA")
    if name == "lora-sb":
        down = tensors["q.R"] @ down
    scale = {pair.down: pair.scale for pair in PAIRS}[f"{layer}.A"]
    return scale * up @ down


def own_tensors(current, update) -> dict[str, np.ndarray]:
    """A client's trained tensors, of its own rank."""
    cut = {}
    for name, change in update.items():
        whole = current[name].astype(np.float64)
        cut[name] = whole[tuple(slice(size) for size in change.shape)] + change
    return cut


def layers(name) -> tuple[str, ...]:
    return ("q",) if name == "lora-sb" else ("q", "v")


def effective(name, current, merged, layer) -> np.ndarray:
    """What the layer's weight has beyond W0 once the merge is applied, dense."""
    total = product_of(name, after(current, merged), layer)
    if f"{layer}.A" in merged.base:
        total = total + merged.base[f"{layer}.A"].product()
    return total


def target(name, current, updates, layer) -> np.ndarray:
    """The weighted mean of the clients' products, literally."""
    weight = sum(w for _, w in updates)
    return sum(
        w / weight * product_of(name, own_tensors(current, update), layer) for update, w in updates
    )


def gap(found, wanted) -> float:
    return float(np.linalg.norm(found - wanted) / np.linalg.norm(wanted))


def image(merged):
    """All bits of a result."""
    parts = [(n, a.tobytes()) for n, a in sorted(merged.delta.items())]
    parts += [(n, a.tobytes()) for n, a in sorted(merged.memory.items())]
    for name, change in sorted(merged.base.items()):
        right = b"" if change.right is None else change.right.tobytes()
        parts.append((name, change.left.tobytes() + right))
    return parts, merged.notes


@pytest.mark.parametrize("name", ALL)
def test_result_fits_the_spec_and_the_same_updates_give_the_same_bits(name):
    current = current_for(name)
    updates = drawn(name, current, 4)
    merged = merge(MERGERS[name], current, updates)
    assert ParamSpec.of(current).mismatch(merged.delta) is None
    assert image(merged) == image(merge(MERGERS[name], current, updates))
    for change in merged.base.values():
        assert change.left.dtype == np.float32
        assert change.right is None or change.right.dtype == np.float32


@pytest.mark.parametrize("name", ALL)
@pytest.mark.parametrize("count", [3, 9])  # stacks of factors, and dense ones
def test_another_order_gives_the_same_weights_to_rounding(name, count):
    current = current_for(name)
    updates = drawn(name, current, count)
    one, other = (merge(MERGERS[name], current, u) for u in (updates, updates[::-1]))
    for layer in layers(name):
        found = effective(name, current, other, layer)
        assert gap(found, effective(name, current, one, layer)) < 1e-5
    np.testing.assert_allclose(one.delta["head"], other.delta["head"], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("name", ALL)
def test_states_updates_and_current_tensors_are_never_written_to(name):
    current = current_for(name)
    updates = drawn(name, current, 9)
    before = [
        a.tobytes() for tensors in (current, *(u for u, _ in updates)) for a in tensors.values()
    ]
    merger = MERGERS[name]
    states = [merger.init(ParamSpec.of(current), current=current)]
    images = []
    for update, weight in updates:
        states.append(merger.add(states[-1], update, weight))
        images.append(image(merger.finish(states[-1])))
    for state, bits in zip(states[1:], images, strict=True):
        merged = merger.finish(state)
        assert image(merged) == bits
        for array in merged.delta.values():
            array[...] = 9
    assert [image(merger.finish(state)) for state in states[1:]] == images
    tensors = [a for group in (current, *(u for u, _ in updates)) for a in group.values()]
    assert [a.tobytes() for a in tensors] == before


@pytest.mark.parametrize("name", ALL)
def test_only_the_ratio_of_weights_matters(name):
    current = current_for(name)
    updates = drawn(name, current, 5)
    scaled = [(update, 2.0**40 * weight) for update, weight in updates]
    assert image(merge(MERGERS[name], current, scaled)) == image(
        merge(MERGERS[name], current, updates)
    )


@pytest.mark.parametrize("name", ALL)
@pytest.mark.parametrize("weight", [1, 3.7, 1e-300, 1e300])
def test_one_client_gets_back_its_own_product(name, weight):
    current = current_for(name)
    [(update, _)] = drawn(name, current, 1)
    merged = merge(MERGERS[name], current, [(update, weight)])
    new = after(current, merged)
    own = own_tensors(current, update)
    for layer in layers(name):
        if name == "fedsa-lora":  # the client goes on with its own B
            found = product_of(name, new | {f"{layer}.B": own[f"{layer}.B"]}, layer)
        else:
            found = effective(name, current, merged, layer)
        # the ridge of LoRA-FAIR brings back rounding errors of B alone
        assert gap(found, product_of(name, own, layer)) < 1e-6
    np.testing.assert_allclose(new["head"], own["head"], rtol=1e-6)


@settings(max_examples=25)
@given(
    seed=st.integers(0, 2**32 - 1),
    count=st.integers(1, 9),
    d=st.integers(1, 9),
    k=st.integers(1, 9),
    r=st.integers(1, 4),
)
@pytest.mark.parametrize("name", [name for name in ALL if MERGERS[name].exact])
def test_exact_mergers_give_the_mean_of_the_products(name, seed, count, d, k, r):
    current = current_for(name, d, k, r)
    updates = drawn(name, current, count, seed=seed)
    merged = merge(MERGERS[name], current, updates)
    for layer in layers(name):
        wanted = target(name, current, updates, layer)
        scale = max(
            float(np.linalg.norm(product_of(name, own_tensors(current, update), layer)))
            for update, _ in updates
        )
        assert np.linalg.norm(effective(name, current, merged, layer) - wanted) <= 1e-5 * max(
            float(np.linalg.norm(wanted)), 0.1 * scale
        )


@pytest.mark.parametrize("name", [name for name in ALL if not MERGERS[name].exact])
def test_mergers_that_are_not_exact_miss_the_mean_of_the_products(name):
    current = current_for(name)
    updates = drawn(name, current, 5)
    merged = merge(MERGERS[name], current, updates)
    assert gap(effective(name, current, merged, "q"), target(name, current, updates, "q")) > 0.01


@pytest.mark.parametrize("name", ALL)
def test_the_result_follows_from_weighted_sums_only_where_the_merger_says_so(name):
    current = current_for(name)
    updates = drawn(name, current, 4)
    weight = sum(w for _, w in updates)
    mean = {
        tensor: sum(w / weight * u[tensor].astype(np.float64) for u, w in updates).astype("f4")
        for tensor in current
    }
    found = merge(MERGERS[name], current, [(mean, weight)])
    wanted = merge(MERGERS[name], current, updates)
    gaps = [
        gap(effective(name, current, found, layer), effective(name, current, wanted, layer))
        for layer in layers(name)
    ]
    if MERGERS[name].sum_only:
        assert max(gaps) < 1e-5
    else:
        assert min(gaps) > 1e-3


@pytest.mark.parametrize("name", ALL)
def test_tensors_in_no_pair_are_averaged_by_weight(name):
    current = current_for(name)
    updates = drawn(name, current, 6)
    weight = sum(w for _, w in updates)
    wanted = sum(w * u["head"].astype(np.float64) for u, w in updates) / weight
    merged = merge(MERGERS[name], current, updates)
    np.testing.assert_allclose(merged.delta["head"], wanted, rtol=1e-6, atol=1e-7)


@settings(max_examples=20)
@given(seed=st.integers(0, 2**32 - 1), ranks=st.permutations([4, 8, 16]), count=st.integers(1, 7))
@pytest.mark.parametrize("name", ["flora", "fedex-lora"])
def test_exact_mergers_are_exact_for_mixed_ranks(name, seed, ranks, count):
    current = current_for(name, 40, 36, 16)
    updates = drawn(name, current, count, seed=seed, ranks=ranks)
    merged = merge(MERGERS[name], current, updates)
    for layer in layers(name):
        wanted = target(name, current, updates, layer)
        assert gap(effective(name, current, merged, layer), wanted) < 1e-5


@pytest.mark.parametrize("name", MIXED)
def test_a_smaller_rank_is_that_of_factors_padded_with_zeros(name):
    current = current_for(name)
    updates = drawn(name, current, 4, ranks=(1, 3, 2))
    whole = []
    for update, weight in updates:
        full = {tensor: -array for tensor, array in current.items()}
        for tensor, change in update.items():
            full[tensor][tuple(slice(size) for size in change.shape)] = change
        whole.append((full, weight))
    small, padded = (merge(MERGERS[name], current, u) for u in (updates, whole))
    for layer in layers(name):
        found = effective(name, current, small, layer)
        assert gap(found, effective(name, current, padded, layer)) < 1e-6


@pytest.mark.parametrize("name", ALL)
def test_smaller_ranks_are_refused_unless_the_merger_allows_them(name):
    current = current_for(name)
    [(update, weight)] = drawn(name, current, 1, ranks=(2,))
    assert MERGERS[name].mixed_ranks == (name in MIXED)
    if name in MIXED:
        merge(MERGERS[name], current, [(update, weight)])
    else:
        with pytest.raises(MergeError, match="cannot merge: tensor"):
            merge(MERGERS[name], current, [(update, weight)])


@pytest.mark.parametrize("name", MIXED)
@pytest.mark.parametrize(
    ("down", "up"),
    [((2, K), (D, 3)), ((4, K), (D, 4)), ((0, K), (D, 0)), ((2, K + 1), (D, 2)), ((2, K), (1, 2))],
)
def test_ranks_that_do_not_agree_are_refused(name, down, up):
    current = current_for(name)
    [(update, _)] = drawn(name, current, 1)
    update |= {"q.A": np.zeros(down, "f4"), "q.B": np.zeros(up, "f4")}
    with pytest.raises(MergeError, match=r'pair "q.A", "q.B": expected shapes .* from 1 to 3'):
        merge(MERGERS[name], current, [(update, 1)])


@pytest.mark.parametrize("name", MIXED)
@pytest.mark.parametrize("dtype", ["f8", "i4", "c8", "U1", "O"])
def test_smaller_ranks_of_another_type_are_refused(name, dtype):
    current = current_for(name)
    [(update, _)] = drawn(name, current, 1, ranks=(2,))
    update["q.A"] = np.full((2, K), "x" if dtype == "U1" else 1, dtype)
    with pytest.raises(MergeError, match=r'cannot merge: tensor "q\.A"'):
        merge(MERGERS[name], current, [(update, 1)])


@pytest.mark.parametrize("name", [*USE_CURRENT, "fedit"])
def test_memory_does_not_grow_with_the_number_of_clients(name):
    d, k, r = 48, 40, 6
    current = {"q.A": np.ones((r, k), "f4"), "q.B": np.ones((d, r), "f4")}
    spec = ParamSpec.of(current)
    merger = type(MERGERS[name])(pairs=PAIRS[:1])
    rng = np.random.default_rng(0)

    def peak(clients: int) -> int:
        tracemalloc.start()
        try:
            state = merger.init(spec, current=current)
            for _ in range(clients):
                state = merger.add(state, draw_update(name, current, rng), 1.0)
            merger.finish(state)
            return tracemalloc.get_traced_memory()[1]
        finally:
            tracemalloc.stop()

    few, many = peak(20), peak(500)
    assert many <= few + 4096
    # the product of one layer, before and after and on its way, and the sums of the factors
    assert many <= 8 * (6 * d * k + 20 * r * (d + k))


@pytest.mark.parametrize("name", ALL)
def test_finish_refuses_when_nothing_was_added(name):
    with pytest.raises(MergeError, match="nothing was added"):
        merge(MERGERS[name], current_for(name), [])


@pytest.mark.parametrize("name", ALL)
@pytest.mark.parametrize("weight", [0, -1, np.nan, np.inf, 10**400, "1", None, True])
def test_add_refuses_when_the_weight_is_not_positive_and_finite(name, weight):
    current = current_for(name)
    [(update, _)] = drawn(name, current, 1)
    with pytest.raises(MergeError, match="weight"):
        merge(MERGERS[name], current, [(update, weight)])


@pytest.mark.parametrize("name", ALL)
def test_add_refuses_when_the_sum_of_weights_overflows(name):
    current = current_for(name)
    update = {tensor: np.zeros_like(array) for tensor, array in current.items()}
    with pytest.raises(MergeError, match="finite sum of weights"):
        merge(MERGERS[name], current, [(update, 1.7e308), (update, 1.7e308)])


@pytest.mark.parametrize("name", ALL)
@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_add_refuses_when_a_value_is_not_finite_and_the_old_state_stands(name, value):
    current = current_for(name)
    merger = MERGERS[name]
    [(good, _), (bad, _)] = drawn(name, current, 2)
    bad["q.R" if name == "lora-sb" else "q.A" if name not in FROZEN else "q.B"][1, 1] = value
    state = merger.add(merger.init(ParamSpec.of(current), current=current), good, 1)
    before = image(merger.finish(state))
    with pytest.raises(MergeError, match='tensor "q'):
        merger.add(state, bad, 1)
    assert image(merger.finish(state)) == before


@pytest.mark.parametrize("name", ALL)
@pytest.mark.parametrize(
    "change",
    [
        {"q.A": None},
        {"other": np.zeros(3, "f4")},
        {"head": np.zeros(5, "f4")},
        {"q.A": np.zeros((R, K))},
        {"q.B": np.zeros(D, "f4")},
        {"q.A": 1.0},
    ],
)
def test_add_refuses_when_tensors_do_not_fit(name, change):
    current = current_for(name)
    [(update, _)] = drawn(name, current, 1)
    update = {n: a for n, a in (update | change).items() if a is not None}
    with pytest.raises(MergeError, match="cannot merge: tensor"):
        merge(MERGERS[name], current, [(update, 1)])


@pytest.mark.parametrize("name", ALL)
def test_init_refuses_integers(name):
    current = current_for(name) | {"step": np.zeros(1, "i8")}
    with pytest.raises(MergeError, match='"step" is int64'):
        MERGERS[name].init(ParamSpec.of(current), current=current)


@pytest.mark.parametrize("name", USE_CURRENT)
def test_init_refuses_when_current_tensors_are_missing_or_not_finite(name):
    current = current_for(name)
    spec = ParamSpec.of(current)
    with pytest.raises(MergeError, match='current tensors: tensor "head" is missing'):
        MERGERS[name].init(spec)
    current["q.B"][0, 0] = np.nan
    with pytest.raises(MergeError, match=r'tensor "q\.B": expected finite'):
        MERGERS[name].init(spec, current=current)


@pytest.mark.parametrize("name", [name for name in ALL if name != "lora-sb"])
def test_pairs_that_are_none_or_doubled_or_not_in_the_spec_are_refused(name):
    kind, q = type(MERGERS[name]), PAIRS[0]
    current = current_for(name)
    with pytest.raises(MergeError, match="one pair of factors or more"):
        kind(pairs=())
    with pytest.raises(MergeError, match=r'found "q\.B" twice'):
        kind(pairs=(q, FactorPair(down="v.A", up="q.B", scale=1.0)))
    for down, up, said in (
        ("none", "q.B", '"none" is not in the spec'),
        ("q.A", "head", "expected shapes"),
        ("q.B", "q.A", "expected shapes"),
    ):
        with pytest.raises(MergeError, match=said):
            kind(pairs=(FactorPair(down=down, up=up, scale=1.0),)).init(
                ParamSpec.of(current), current=current
            )


def test_attributes_say_what_the_coordinator_needs_to_know():
    said = {
        name: (m.sum_only, m.exact, m.order_independent, m.mixed_ranks)
        for name, m in MERGERS.items()
    }
    assert said == {
        "fedit": (True, False, False, False),
        "ffa-lora": (True, True, False, False),
        "fedsa-lora": (True, False, False, False),
        "rolora": (True, True, False, False),
        "flora": (False, True, False, True),
        "flexlora": (False, False, False, True),
        "fedex-lora": (False, True, False, True),
        "lora-fair": (False, False, False, False),
        "hetlora": (False, False, False, True),
        "lora-sb": (True, True, False, False),
    }
