# SPDX-License-Identifier: Apache-2.0
"""Names of job files, and the classes that they stand for."""

from __future__ import annotations

import pytest

from aggregation import (
    FedAdam,
    FedAvgM,
    FedYogi,
    FFALoRA,
    GreedySoup,
    Krum,
    MergeError,
    TrimmedMean,
    WeightedMean,
)
from aggregation.selection import (
    MERGERS,
    SERVER_FORMS,
    SERVER_OPTIMIZERS,
    described_merger,
    fewest_updates,
    is_robust,
    merger_named,
    mixes_ranks,
    moves_base,
    needs_accuracy,
    server_optimizer_named,
    term_smoothing,
)
from protocol.factors import FactorPair

PAIRS = (FactorPair(down="a", up="b", scale=2.0),)


@pytest.mark.parametrize("name", list(MERGERS))
def test_every_merger_is_made_by_its_name_alone_and_knows_it(name: str) -> None:
    merger = described_merger(name)
    assert type(merger) is MERGERS[name] and merger.name == name  # type: ignore[attr-defined]


def test_settings_and_pairs_reach_the_merger() -> None:
    assert merger_named("weighted-mean", ()) == WeightedMean()
    assert merger_named("ffa-lora", PAIRS) == FFALoRA(pairs=PAIRS)
    assert merger_named("krum:4", ()) == Krum(byzantine=4)
    assert merger_named("trimmed-mean:share=0.2", ()) == TrimmedMean(share=0.2)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("mean", "merger: expected one of weighted-mean, counted-pool"),
        ("krum:-1", "byzantine"),
        ("krum:4,5", "has no place"),
        ("ffa-lora:pairs=x", "has no place"),
        ("fedit", "pairs: expected one pair"),
    ],
)
def test_a_merger_is_refused(text: str, message: str) -> None:
    with pytest.raises(MergeError, match=message):
        merger_named(text, ())


def test_a_greedy_soup_is_given_what_it_chooses_by() -> None:
    def accuracy(tensors: object) -> float:
        return 0.5

    merger = merger_named("greedy-soup", (), accuracy)
    assert isinstance(merger, GreedySoup) and merger.evaluate is accuracy
    with pytest.raises(MergeError, match="evaluate: expected a callable, found None"):
        merger_named("greedy-soup", ())
    with pytest.raises(MergeError, match="has no place"):
        merger_named("greedy-soup:evaluate=x", (), accuracy)


def test_what_a_job_has_to_know_of_a_merger() -> None:
    def those(question: object) -> set[str]:
        return {name for name in MERGERS if question(described_merger(name))}  # type: ignore[operator]

    assert those(moves_base) == {"flora", "fedex-lora"}
    assert those(mixes_ranks) == {"flora", "fedex-lora", "flexlora", "hetlora"}
    assert those(needs_accuracy) == {"greedy-soup"}
    assert {"krum", "centred-clipping", "foolsgold"} < those(is_robust)
    assert "weighted-mean" not in those(is_robust)
    assert those(term_smoothing) == {"masked-geometric-median"} < those(is_robust)
    assert term_smoothing(described_merger("masked-geometric-median:0.25")) == 0.25


@pytest.mark.parametrize(
    ("name", "least"),
    [("weighted-mean", 1), ("krum:2", 7), ("multi-krum:2", 7), ("bulyan:2", 11), ("median", 1)],
)
def test_rules_that_compare_updates_need_enough_of_them(name: str, least: int) -> None:
    assert fewest_updates(described_merger(name)) == least


def test_server_optimizers_take_rate_and_adaptivity_where_they_have_them() -> None:
    own = {"learning_rate": 0.02, "adaptivity": 1e-5}
    assert server_optimizer_named("adam", **own) == FedAdam(learning_rate=0.02, adaptivity=1e-5)
    assert server_optimizer_named("momentum:0.5", **own) == FedAvgM(
        learning_rate=0.02, momentum=0.5
    )
    yogi = server_optimizer_named("yogi:beta_1=0.8", **own)
    assert yogi == FedYogi(learning_rate=0.02, adaptivity=1e-5, beta_1=0.8)
    assert len(SERVER_FORMS) == len(SERVER_OPTIMIZERS) and "momentum[:MOMENTUM]" in SERVER_FORMS


@pytest.mark.parametrize(
    "text", ["sgd", "adam:learning_rate=1", "adam:beta_1=1", "averaging:0.5", "momentum:much"]
)
def test_a_server_optimizer_is_refused(text: str) -> None:
    with pytest.raises(MergeError):
        server_optimizer_named(text)
