# SPDX-License-Identifier: Apache-2.0
"""From a job to its noise, its draws and its ledger."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest

from aggregation.errors import BudgetError, PrivacyError
from aggregation.privacy.accountant import (
    FixedRound,
    LocalRound,
    PoissonRound,
    SummedRound,
    epsilon_of,
)
from aggregation.privacy.adaptive_clipping import update_multiplier
from coordinator.errors import JobError
from coordinator.job import Job
from coordinator.privacy import Privacy, PrivateRound
from coordinator.privacy_section import PrivacySection
from coordinator.sections import AggregationSection, DataSection, RoundsSection, UpdateSection

SEED = bytes(range(32))
NAMES = [f"client-{number:03d}" for number in range(100)]


def job_of(count: int = 10, drawn: int = 20, clients: int = 100, **settings: object) -> Job:
    section = {"mode": "central", "noise_multiplier": 1.0, **settings}
    codec = "grid:8,0.05" if section["mode"] == "distributed" else "float32"
    return Job(
        data=DataSection(clients=clients, held_out=0.0),
        update=UpdateSection(metrics="", codec=codec),
        aggregation=AggregationSection(weighting="uniform"),
        rounds=RoundsSection(count=count, clients_per_round=drawn),
        privacy=PrivacySection(**section),  # type: ignore[arg-type]
    )


def privacy_of(**settings: object) -> Privacy:
    found = Privacy.of(job_of(**settings))  # type: ignore[arg-type]
    assert found is not None
    return found


def test_a_job_without_privacy_has_none() -> None:
    assert Privacy.of(Job()) is None


def test_the_noise_that_is_not_given_is_the_least_for_the_budget() -> None:
    found = privacy_of(noise_multiplier=0.0, epsilon=8.0, count=10)
    multiplier = found.mechanism.multiplier
    cost = [
        epsilon_of(PoissonRound(rate=0.2, multiplier=z), 10, 1e-5)
        for z in (multiplier, multiplier - 1e-4)
    ]
    assert cost[0] <= 8.0 < cost[1]


def test_the_noise_that_is_given_stays_and_the_budget_ends_the_rounds() -> None:
    found = privacy_of(epsilon=4.0)
    assert found.mechanism == PoissonRound(rate=0.2, multiplier=1.0)
    charges, number = [], 1
    while found.affords(charges, number):
        charges.append(found.charge(number, {}, SEED))
        number += 1
    assert epsilon_of(found.mechanism, number - 1, 1e-5) <= 4.0
    assert epsilon_of(found.mechanism, number, 1e-5) > 4.0
    with pytest.raises(BudgetError):
        found.ledger(charges).charge(number, found.mechanism)


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"epsilon": 0.001}, r"privacy\.epsilon = 0\.001: .*the first round alone costs"),
        ({"clip_quantile": 0.5, "drawn": 8}, r"privacy\.clip_quantile = 0\.5: .*more clients in"),
        ({"noise_multiplier": 1e-6}, r"privacy\.noise_multiplier = 1e-06: "),
    ],
)
def test_what_cannot_be_met_is_refused_before_anything_is_done(
    settings: dict[str, object], words: str
) -> None:
    with pytest.raises(JobError, match=words):
        privacy_of(**settings)


def test_samples_of_a_fixed_size_are_accounted_for_as_such() -> None:
    found = privacy_of(sampling="without-replacement")
    assert found.mechanism == FixedRound(clients=100, drawn=20, multiplier=1.0)
    whole = privacy_of(sampling="all", drawn=0)
    assert whole.mechanism == PoissonRound(rate=1.0, multiplier=1.0)
    assert whole.drawn == 100
    assert privacy_of(population=400).mechanism == PoissonRound(rate=0.05, multiplier=1.0)


def test_clients_of_a_sum_share_its_noise_among_those_that_may_be_counted_on() -> None:
    shared = {"mode": "distributed", "noise_multiplier": 2.0, "secure_aggregation": True}
    found = privacy_of(**shared, drawn=40, min_survivors=20, corrupt=0.1)
    assert found.mechanism == SummedRound(multiplier=2.0)
    # 4 of 40 may be traitors: 16 shares have to be enough.
    assert found.share == 0.5
    assert found.most_asked == 40 and found.draw(NAMES, SEED) is None and found.needs == 0
    everybody = privacy_of(**shared, drawn=0, min_survivors=60, corrupt=0.0)
    assert everybody.most_asked == everybody.population == 100
    assert privacy_of().share == 0.0


def test_a_client_alone_has_all_of_the_noise() -> None:
    found = privacy_of(mode="local", noise_multiplier=0.0, epsilon=30.0, drawn=0)
    assert isinstance(found.mechanism, LocalRound)
    assert found.share == found.mechanism.multiplier > 1
    assert epsilon_of(found.mechanism, 10, 1e-5) <= 30.0
    assert found.draw(NAMES, SEED) is None and found.most_asked == 0
    assert found.miscounted(7) == ""


def test_each_client_is_drawn_by_itself_with_the_rate_that_is_accounted_for() -> None:
    found = privacy_of()
    rounds = [found.draw(NAMES, bytes([n]) * 32) for n in range(200)]
    sizes = [len(drawn) for drawn in rounds]
    assert abs(sum(sizes) / 200 - 20) < 5 * math.sqrt(16 / 200)
    # the number of clients is binomial, and not the same every time
    variance = sum((size - 20) ** 2 for size in sizes) / 200
    assert 16 * 0.6 < variance < 16 * 1.6
    counts = [sum(name in drawn for drawn in rounds) for name in NAMES]
    assert min(counts) > 15 and max(counts) < 70
    # fewer clients: each with the same probability
    few = [len(found.draw(NAMES[:10], bytes([n]) * 32)) for n in range(200)]
    assert abs(sum(few) / 200 - 2) < 5 * math.sqrt(1.6 / 200)


def test_a_fixed_number_is_drawn_where_that_is_accounted_for() -> None:
    found = privacy_of(sampling="without-replacement")
    rounds = [found.draw(NAMES, bytes([n]) * 32) for n in range(200)]
    assert {len(set(drawn)) for drawn in rounds} == {20}
    assert all(drawn == sorted(drawn) for drawn in rounds)
    counts = [sum(name in drawn for drawn in rounds) for name in NAMES]
    assert min(counts) > 15 and max(counts) < 70
    assert found.needs == 100 and privacy_of().needs == 0
    with pytest.raises(PrivacyError, match="expected 100 enrolled clients"):
        found.draw(NAMES[:99], SEED)


def test_a_draw_is_of_its_seed_and_of_the_names_alone() -> None:
    found = privacy_of()
    assert found.draw(NAMES, SEED) == found.draw(NAMES[::-1], SEED)
    assert found.draw(NAMES, SEED) != found.draw(NAMES, bytes(32))


def test_the_count_takes_its_part_of_the_noise() -> None:
    plain, steered = privacy_of(), privacy_of(clip_quantile=0.5)
    assert plain.noise(0.5).multiplier == 1.0
    assert steered.noise(0.5).multiplier == update_multiplier(1.0, 1.0)
    assert steered.mechanism == plain.mechanism, "what is charged for is both together"


def test_the_norm_of_the_next_round_is_remembered_and_charged_with_it() -> None:
    steered = privacy_of(clip_quantile=0.5)
    first = steered.charge(1, {}, SEED)
    assert first.clip == 0.1
    memory = PrivateRound(privacy=steered, charge=first).remembered(0.0)
    second = steered.charge(2, memory, SEED)
    assert second.clip == pytest.approx(0.1 * math.exp(0.2 * 0.5))
    assert PrivateRound(privacy=privacy_of(), charge=first).remembered(None) == {}


def test_secrets_are_in_no_representation() -> None:
    charge = privacy_of().charge(1, {}, SEED)
    private = PrivateRound(privacy=privacy_of(), charge=charge)
    from protocol.tensors import ParamSpec

    for shown in (charge, private, private.merger(ParamSpec(()))):
        assert repr(SEED) not in repr(shown) and SEED.hex() not in repr(shown)


def test_the_report_says_what_was_spent_and_what_is_left() -> None:
    found = privacy_of(epsilon=4.0)
    charges = [found.charge(number, {}, SEED) for number in (1, 2)]
    told = PrivateRound(privacy=found, charge=charges[-1]).report(charges, 0.25)
    assert told["epsilon"] == epsilon_of(found.mechanism, 2, 1e-5)
    assert told["left"] == pytest.approx(4.0 - told["epsilon"])
    assert told["epsilon_rdp"] > told["epsilon"]
    assert (told["budget"], told["clip"], told["unclipped"]) == (4.0, 0.1, 0.25)
    endless = replace(found, section=replace(found.section, epsilon=0.0))
    told = PrivateRound(privacy=endless, charge=charges[-1]).report(charges, None)
    assert told["budget"] is None and told["left"] is None
