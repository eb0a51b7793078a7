# SPDX-License-Identifier: Apache-2.0
"""The contract suite of the rules that merge whole updates: what each must do, and what it states
of itself."""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as npst

from aggregation.errors import MergeError
from aggregation.mergers.breadcrumbs import Breadcrumbs
from aggregation.mergers.dare import DARE
from aggregation.mergers.greedy_soup import GreedySoup
from aggregation.mergers.lines import LiNeS
from aggregation.mergers.opcm import OPCM
from aggregation.mergers.task_arithmetic import TaskArithmetic
from aggregation.mergers.ties import TIES
from aggregation.mergers.uniform_soup import UniformSoup
from aggregation.robust.bulyan import Bulyan
from aggregation.robust.centred_clipping import CentredClipping
from aggregation.robust.coordinate_median import CoordinateMedian
from aggregation.robust.foolsgold import FoolsGold
from aggregation.robust.geometric_median import GeometricMedian
from aggregation.robust.krum import Krum
from aggregation.robust.masked_geometric_median import MaskedGeometricMedian
from aggregation.robust.multi_krum import MultiKrum
from aggregation.robust.norm_bound import NormBound
from aggregation.robust.trimmed_mean import TrimmedMean
from protocol import ParamSpec


def accuracy(delta) -> float:
    """Of few values, as accuracies are."""
    return sum(int((value > 0.5).sum()) for value in delta.values()) / 8


@dataclass(frozen=True, kw_only=True)
class Rule:
    merger: Any
    name: str
    weighted: bool  # sample weights count
    sum_only: bool = False
    order_independent: bool = False
    least: int = 1  # updates
    streams: bool = False  # keeps no update


RULES = [
    Rule(merger=NormBound(), name="norm-bound", weighted=False),
    Rule(merger=NormBound(bound=2), name="norm-bound", weighted=False, streams=True),
    Rule(merger=CoordinateMedian(), name="median", weighted=False, order_independent=True),
    Rule(
        merger=TrimmedMean(share=0.3), name="trimmed-mean", weighted=False, order_independent=True
    ),
    Rule(merger=Krum(), name="krum", weighted=False, least=5),
    Rule(merger=MultiKrum(), name="multi-krum", weighted=False, least=5),
    Rule(merger=Bulyan(), name="bulyan", weighted=False, least=7),
    Rule(merger=GeometricMedian(), name="geometric-median", weighted=False),
    Rule(merger=CentredClipping(), name="centred-clipping", weighted=False),
    Rule(merger=CentredClipping(radius=0.5), name="centred-clipping", weighted=False),
    Rule(
        merger=MaskedGeometricMedian(smoothing=0.5),
        name="masked-geometric-median",
        weighted=False,
        streams=True,
    ),
    Rule(merger=FoolsGold(), name="foolsgold", weighted=False),
    Rule(
        merger=TaskArithmetic(), name="task-arithmetic", weighted=True, sum_only=True, streams=True
    ),
    Rule(merger=UniformSoup(), name="uniform-soup", weighted=False, streams=True),
    Rule(merger=GreedySoup(evaluate=accuracy), name="greedy-soup", weighted=False),
    Rule(merger=LiNeS(), name="lines", weighted=True, sum_only=True, streams=True),
    Rule(merger=Breadcrumbs(), name="breadcrumbs", weighted=True, streams=True),
    Rule(merger=TIES(density=0.6), name="ties", weighted=True),
    Rule(merger=DARE(drop=0.5), name="dare", weighted=True, streams=True),
    Rule(merger=DARE(drop=0.5, then="ties", density=0.6), name="dare", weighted=True),
    Rule(merger=OPCM(), name="opcm", weighted=False, streams=True),
]


def rules(chosen):
    """The rules for which `chosen` holds."""
    some = [rule for rule in RULES if chosen(rule)]
    return pytest.mark.parametrize("rule", some, ids=lambda rule: repr(rule.merger)[:40])


ANY_RULE = rules(lambda _: True)
MATRIX = {"a.0.w": np.zeros((2, 3), "f4"), "b.2.w": np.zeros(2, "f4")}
SPEC = ParamSpec.of(MATRIX)
ROUNDS = npst.arrays(
    np.float32,
    st.tuples(st.integers(7, 9), st.just(SPEC.size)),
    elements=st.floats(-1e3, 1e3, width=32),
)


def tensors_of(row, spec=SPEC) -> dict[str, np.ndarray]:
    """A row as an update, in the types of the spec."""
    tensors, start = {}, 0
    for name, entry in spec.entries:
        part = row[start : start + entry.size]
        tensors[name] = np.array(part, entry.dtype).reshape(entry.shape)
        start += entry.size
    return tensors


def added(rule, rows, weights=None, *, spec=SPEC, memory=None):
    state = rule.merger.init(spec, memory=memory or {})
    for number, row in enumerate(rows):
        weight = 1.0 if weights is None else weights[number]
        client = f"c{number}"
        state = rule.merger.add(state, tensors_of(row, spec), weight, client=client)
    return state


def merged(rule, rows, weights=None, **options) -> np.ndarray:
    delta = rule.merger.finish(added(rule, rows, weights, **options)).delta
    return np.concatenate([value.reshape(-1).astype(np.float64) for value in delta.values()])


def example(seed=0, rows=8) -> np.ndarray:
    return np.random.default_rng(seed).normal(0.5, 1, (rows, SPEC.size)).astype(np.float32)


@ANY_RULE
def test_a_rule_states_what_the_coordinator_needs_to_know(rule):
    merger = rule.merger
    assert merger.name == rule.name
    assert (merger.sum_only, merger.exact, merger.order_independent) == (
        rule.sum_only,
        False,
        rule.order_independent,
    )
    for field in fields(merger):
        if field.name != "evaluate":
            assert type(getattr(merger, field.name)) in (int, float, str, bool)


@ANY_RULE
@settings(max_examples=15)
@given(ROUNDS)
def test_the_same_updates_in_the_same_order_give_the_same_bits(rule, rows):
    weights = [1.0 + number for number in range(len(rows))]
    assert merged(rule, rows, weights).tobytes() == merged(rule, rows, weights).tobytes()


@rules(lambda rule: rule.order_independent)
@given(st.data())
def test_another_order_gives_the_same_bits_where_a_rule_says_so(rule, data):
    # both zeros, and values that float sums round
    elements = st.sampled_from([0.0, -0.0, 1e8, -1e8, 0.1, -0.1, 1e-30, 3.0])
    rows = data.draw(npst.arrays(np.float32, (7, SPEC.size), elements=elements))
    order = data.draw(st.permutations(range(7)))
    assert merged(rule, rows).tobytes() == merged(rule, rows[order]).tobytes()


@rules(lambda rule: not rule.order_independent)
def test_another_order_gives_other_bits_where_a_rule_does_not_deny_it(rule):
    wide = ParamSpec.of({name: value.astype("f8") for name, value in MATRIX.items()})
    # updates and their opposites have equal scores, of which the first is taken
    mirrored = [np.vstack([half, -half]) for half in (example(seed, 4) for seed in range(5))]
    # float64 sums of float32 values are exact unless their sizes differ much
    sizes = 10.0 ** np.array([-7, 0, 7, 3, -3, 7, 0, -7], "f4")[:, None]
    for rows in [*(example(seed) * sizes for seed in range(5)), *mirrored]:
        found = set()
        for order in (range(8), range(7, -1, -1), (3, 1, 4, 0, 5, 7, 2, 6)):
            state = rule.merger.init(wide)
            for number in order:
                update = tensors_of(rows[number], wide)
                state = rule.merger.add(state, update, 1.0, client=f"c{number}")
            delta = rule.merger.finish(state).delta
            found.add(b"".join(value.tobytes() for value in delta.values()))
        if len(found) > 1:
            return
    raise AssertionError("no order changed a bit: the rule might say so")


@ANY_RULE
def test_only_sums_count_where_a_rule_says_so_and_nowhere_else(rule):
    weights = [1.0, 3.0, 2.0, 2.0, 1.0, 1.0, 4.0, 2.0]
    rows = example()
    # as many updates of the same weights and the same weighted sum
    level = np.tile(np.average(rows, axis=0, weights=weights), (8, 1))
    first, second = merged(rule, rows, weights), merged(rule, level, weights)
    assert (np.abs(first - second).max() < 1e-5) == rule.sum_only


@ANY_RULE
def test_no_rule_here_gives_the_weighted_mean(rule):
    rows, weights = example(seed=3), [1.0, 8.0, 1.0, 1.0, 1.0, 5.0, 1.0, 1.0]
    mean = np.average(rows.astype("f8"), axis=0, weights=weights)
    assert np.abs(merged(rule, rows, weights) - mean).max() > 1e-3


@ANY_RULE
def test_weights_count_only_where_a_rule_says_so(rule):
    rows = example(seed=1)
    equal = merged(rule, rows, [5.0] * 8)
    assert equal.tobytes() == merged(rule, rows).tobytes() or rule.weighted
    np.testing.assert_allclose(equal, merged(rule, rows), rtol=1e-6, atol=1e-7)
    uneven = merged(rule, rows, [1e6] + [1.0] * 7)
    assert (np.abs(uneven - equal).max() > 1e-3) == rule.weighted


@ANY_RULE
@settings(max_examples=15)
@given(ROUNDS)
def test_states_and_arguments_are_never_written_to(rule, rows):
    merger = rule.merger
    base = added(rule, rows[:-1])
    updates = [tensors_of(rows[-1]), tensors_of(-rows[-1])]
    before = [{name: value.tobytes() for name, value in update.items()} for update in updates]
    expected = merged(rule, rows)
    one = merger.add(base, updates[0], 2.0 if not rule.weighted else 1.0, client="last")
    other = merger.add(base, updates[1], 1.0, client="other")
    again = merger.add(base, updates[0], 1.0, client=f"c{len(rows) - 1}")
    merger.finish(other)
    first = merger.finish(again).delta
    for value in merger.finish(again).delta.values():
        value[...] = 7
    assert [
        {name: value.tobytes() for name, value in update.items()} for update in updates
    ] == before
    np.testing.assert_array_equal(np.concatenate([v.ravel() for v in first.values()]), expected)
    assert all(np.isfinite(value).all() for value in merger.finish(one).delta.values())


@ANY_RULE
def test_memory_is_not_written_to_and_serves_the_next_round(rule):
    memory: dict[str, np.ndarray] = {}
    for number in range(3):
        image = {name: value.tobytes() for name, value in memory.items()}
        state = added(rule, example(seed=number), memory=memory)
        result = rule.merger.finish(state)
        assert {name: value.tobytes() for name, value in memory.items()} == image
        assert all(value.dtype.kind == "f" for value in result.memory.values())
        for value in result.delta.values():
            value[...] = 9
        for name, value in result.memory.items():
            assert not (value == 9).all(), name
        memory = dict(result.memory)


@ANY_RULE
def test_the_result_fits_a_spec_of_scalars_and_other_floats(rule):
    tensors = {
        "h.1.w": np.zeros((3, 2), "f2"),
        "scale": np.zeros((), "f4"),
        "w.0.x": np.zeros((1, 2, 2), "f8"),
    }
    spec = ParamSpec.of(tensors)
    rows = np.random.default_rng(2).normal(size=(8, spec.size))
    result = rule.merger.finish(added(rule, rows, spec=spec)).delta
    assert spec.mismatch(result) is None
    assert all(np.isfinite(value).all() for value in result.values())


@ANY_RULE
def test_blocks_of_columns_change_nothing(rule, monkeypatch):
    whole = merged(rule, example(seed=4))
    monkeypatch.setattr("aggregation.stack.BLOCK_VALUES", 17)
    np.testing.assert_allclose(merged(rule, example(seed=4)), whole, rtol=1e-6, atol=1e-7)


@ANY_RULE
def test_a_rule_that_streams_keeps_no_update(rule):
    state = added(rule, example(rows=50))
    state = getattr(state, "kept", state)
    sizes = [
        getattr(state, name).size
        for name in type(state).__slots__
        if isinstance(getattr(state, name), np.ndarray)
    ]
    assert (sizes == [SPEC.size]) == rule.streams


@ANY_RULE
def test_one_update_is_enough_or_the_rule_says_what_is(rule):
    row = example(rows=1)
    if rule.least == 1:
        assert np.isfinite(merged(rule, row)).all()
    for count in range(1, rule.least):
        with pytest.raises(MergeError, match=rf"at least n = {rule.least} .*found n = {count}"):
            merged(rule, example(rows=count))
    if rule.least > 1:
        assert np.isfinite(merged(rule, example(rows=rule.least))).all()


# the others keep or scale some values only, OPCM scales matrices otherwise than the rest
@rules(lambda rule: not isinstance(rule.merger, Breadcrumbs | DARE | LiNeS | OPCM | TIES))
def test_equal_updates_are_merged_to_a_multiple_of_them(rule):
    row = example(rows=1)[0]
    found = merged(rule, [row] * 8)
    factor = found[0] / row[0]
    np.testing.assert_allclose(found, factor * row, rtol=1e-5)
    if isinstance(rule.merger, TaskArithmetic):
        assert factor == pytest.approx(8 * 0.4)
    elif isinstance(rule.merger, NormBound | CentredClipping):
        assert 0 < factor <= 1 + 1e-6
    else:
        assert factor == pytest.approx(1)


@ANY_RULE
def test_finish_refuses_when_nothing_was_added(rule):
    with pytest.raises(MergeError, match=f"{rule.name}: .*nothing was added"):
        rule.merger.finish(rule.merger.init(SPEC))


@ANY_RULE
@pytest.mark.parametrize("weight", [0, -1, np.nan, np.inf, 10**400, "1", None, True, 1 + 0j])
def test_add_refuses_when_the_weight_is_not_positive_and_finite(rule, weight):
    with pytest.raises(MergeError, match="weight"):
        rule.merger.add(rule.merger.init(SPEC), tensors_of(np.ones(8)), weight, client="c")


@ANY_RULE
def test_huge_weights_are_refused_or_do_no_harm(rule):
    rows = example()
    try:
        found = merged(rule, rows, [1.7e308] * 8)
    except MergeError as error:
        assert rule.weighted and "weight" in str(error)
    else:
        np.testing.assert_allclose(found, merged(rule, rows), rtol=1e-6, atol=1e-7)


@ANY_RULE
@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_add_refuses_when_a_value_is_not_finite_and_the_old_state_stands(rule, value):
    rows = example()
    state = added(rule, rows)
    bad = tensors_of(rows[0])
    bad["b.2.w"][1] = value
    with pytest.raises(MergeError, match=r'tensor "b\.2\.w"'):
        rule.merger.add(state, bad, 1.0, client="bad")
    found = rule.merger.finish(state).delta["b.2.w"]
    np.testing.assert_array_equal(found, merged(rule, rows)[6:].astype("f4"))


@ANY_RULE
@pytest.mark.parametrize(
    "update",
    [
        {},
        {"a.0.w": np.zeros((2, 3), "f4")},
        {**MATRIX, "c": np.zeros(1, "f4")},
        {**MATRIX, "b.2.w": np.zeros((2, 1), "f4")},
        {**MATRIX, "b.2.w": np.zeros(2)},
        {**MATRIX, "b.2.w": [0.0, 0.0]},
    ],
)
def test_add_refuses_when_tensors_do_not_fit(rule, update):
    with pytest.raises(MergeError, match="cannot merge: tensor"):
        rule.merger.add(rule.merger.init(SPEC), update, 1.0, client="c")


@ANY_RULE
def test_init_refuses_integers(rule):
    with pytest.raises(MergeError, match='"step" is int64'):
        rule.merger.init(ParamSpec.of({"step": np.zeros(1, "i8")}))


@ANY_RULE
def test_the_largest_values_of_float32_overflow_nowhere_but_in_the_result(rule):
    largest = np.float32(3.4e38)
    rows = [*example(rows=6), np.full(8, largest), np.full(8, -largest)]
    try:
        found = merged(rule, rows)
    except MergeError as error:
        assert "finite" in str(error)
    else:
        assert np.isfinite(found).all()


@ANY_RULE
def test_values_beyond_float32_are_refused_or_merged_as_they_are(rule):
    spec = ParamSpec.of({"a.0.w": np.zeros(2)})
    update = {"a.0.w": np.array([1.0, 1e300])}
    state = rule.merger.init(spec)
    if isinstance(rule.merger, TaskArithmetic | UniformSoup | LiNeS | MaskedGeometricMedian):
        result = rule.merger.finish(rule.merger.add(state, update, 1.0)).delta["a.0.w"]
        assert 1e299 < result[1] < 2e300
    else:
        with pytest.raises(MergeError, match=r'"a\.0\.w": expected values within float32'):
            rule.merger.add(state, update, 1.0, client="c")
