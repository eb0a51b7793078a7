# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import logging
import time
from dataclasses import replace

import pytest

from aggregation.errors import BudgetError, PrivacyError
from aggregation.privacy.accountant import (
    FixedRound,
    Ledger,
    LocalRound,
    Mechanism,
    PoissonRound,
    SummedRound,
    calibrated,
    epsilon_of,
    mechanism_from_json,
    mechanism_to_json,
    rounds_within,
    spent,
)
from aggregation.privacy.analytic_gaussian import gaussian_delta
from simulations.benchmarks.privacy_accounting import SETTINGS, epsilon_error
from simulations.progress import SilentProgress

DELTA = 1e-5
TABLE = [  # q, z, T, delta; epsilon by RDP and by PLD, as computed elsewhere
    (0.01, 1.0, 1000, 1e-5, 2.1014, 1.8282),
    (0.1, 1.0, 100, 1e-5, 7.9039, 7.0466),
    (0.05, 0.7, 200, 1e-5, 12.0158, 10.5502),
    (1.0, 5.0, 50, 1e-5, 7.0774, 6.5730),
    (0.001, 1.0, 2000, 1e-6, 0.8819, 0.2523),
]


@pytest.mark.parametrize(("q", "z", "T", "delta", "rdp", "pld"), TABLE)
def test_epsilon_is_that_of_the_table(q, z, T, delta, rdp, pld):
    found = spent(((PoissonRound(rate=q, multiplier=z), T),), delta)
    assert found.rdp == pytest.approx(rdp, abs=6e-5)
    assert found.pld == pytest.approx(pld, abs=2e-4)
    assert found.epsilon == found.pld
    assert found.neighbours == "add or remove one"


@pytest.mark.parametrize(("q", "z", "T", "delta"), SETTINGS)
def test_epsilon_is_that_of_dp_accounting(q, z, T, delta, caplog):
    import dp_accounting
    from dp_accounting import pld, rdp

    event = dp_accounting.PoissonSampledDpEvent(q, dp_accounting.GaussianDpEvent(z))
    theirs = pld.PLDAccountant().compose(event, T).get_epsilon(delta)
    theirs_rdp = rdp.RdpAccountant().compose(event, T).get_epsilon(delta)
    caplog.clear()
    found = spent(((PoissonRound(rate=q, multiplier=z), T),), delta)
    assert theirs - 1e-3 <= found.epsilon <= theirs * 1.01 + 1e-3
    assert found.rdp == pytest.approx(theirs_rdp, rel=0.005)
    assert found.epsilon <= found.rdp
    assert not caplog.records, "orders that cannot be computed are nobody's concern"


def test_the_figure_is_of_twenty_settings_and_holds():
    assert len(set(SETTINGS)) == 20 and {row[:4] for row in TABLE} <= set(SETTINGS)
    made = epsilon_error(SilentProgress())
    assert made.holds and "20 settings" in made.note


def test_the_figure_fails_where_too_little_is_accounted_for(monkeypatch):
    from simulations.benchmarks import privacy_accounting

    def cheap(history, delta):
        return replace(spent(history, delta), epsilon=0.99 * spent(history, delta).epsilon)

    monkeypatch.setattr(privacy_accounting, "spent", cheap)
    monkeypatch.setattr(privacy_accounting, "SETTINGS", SETTINGS[:2])
    assert epsilon_error(SilentProgress()).holds is False


def test_what_is_logged_by_others_is_left_as_it_was():
    before = logging.getLogger("absl").level
    epsilon_of(PoissonRound(rate=0.11, multiplier=1.0), 3, DELTA)
    assert logging.getLogger("absl").level == before


def test_rounds_of_several_kinds_compose_in_any_order():
    first, second = PoissonRound(rate=0.1, multiplier=1.0), PoissonRound(rate=0.2, multiplier=2.0)
    whole = PoissonRound(rate=1.0, multiplier=20.0)
    together = spent(((first, 5), (second, 7), (whole, 3)), DELTA)
    again = spent(((whole, 1), (second, 7), (first, 5), (whole, 2)), DELTA)
    assert together == again
    alone = [epsilon_of(first, 5, DELTA), epsilon_of(second, 7, DELTA)]
    assert max(alone) < together.epsilon < sum(alone) + epsilon_of(whole, 3, DELTA)
    # ... and it is what dp_accounting says of them together
    import dp_accounting
    from dp_accounting import pld

    accountant = pld.PLDAccountant()
    for mechanism, count in ((first, 5), (second, 7), (whole, 3)):
        gaussian = dp_accounting.GaussianDpEvent(mechanism.multiplier)
        accountant.compose(dp_accounting.PoissonSampledDpEvent(mechanism.rate, gaussian), count)
    assert together.epsilon == pytest.approx(accountant.get_epsilon(DELTA), rel=1e-3)


def test_samples_of_a_fixed_size_are_never_taken_for_poisson_samples():
    fixed = FixedRound(clients=100, drawn=10, multiplier=4.0)
    poisson = PoissonRound(rate=0.1, multiplier=4.0)
    with pytest.raises(PrivacyError, match="one kind"):
        spent(((fixed, 1), (poisson, 1)), DELTA)
    found = spent(((fixed, 100),), DELTA)
    assert found.neighbours == "replace one"
    assert found.epsilon == min(found.rdp, found.pld)
    # Replacing moves twice as far as removing: nothing may come out cheaper.
    assert found.epsilon > epsilon_of(poisson, 100, DELTA)


def test_noise_of_clients_in_a_sum_is_accounted_for_by_what_holds_of_discrete_noise():
    import dp_accounting
    from dp_accounting import rdp

    gaussian = dp_accounting.SelfComposedDpEvent(dp_accounting.GaussianDpEvent(3.0), 20)
    theirs = rdp.RdpAccountant().compose(gaussian).get_epsilon(DELTA)
    found = spent(((SummedRound(multiplier=3.0), 20),), DELTA)
    assert found.epsilon == found.rdp == pytest.approx(theirs, rel=1e-9)
    # The Gaussian's own curve is lower, and is not promised of a discrete one.
    assert found.pld == spent(((PoissonRound(rate=1.0, multiplier=3.0), 20),), DELTA).pld
    assert found.pld < found.epsilon
    assert found.neighbours == "one client's update or zeros"


def test_a_clients_own_update_is_accounted_for_with_twice_the_norm_and_no_sampling():
    found = spent(((LocalRound(multiplier=6.0), 4),), DELTA)
    assert found.epsilon == found.pld
    # Four releases of 3 sensitivities are one of 1.5.
    assert gaussian_delta(1.5, found.epsilon) == pytest.approx(DELTA, rel=1e-6)
    assert found.neighbours == "replace one"
    z = calibrated(LocalRound(multiplier=1.0), 4, epsilon=8.0, delta=DELTA)
    assert epsilon_of(LocalRound(multiplier=z), 4, DELTA) <= 8.0
    assert epsilon_of(LocalRound(multiplier=z - 1e-4), 4, DELTA) > 8.0


@pytest.mark.parametrize(
    "mechanism",
    [
        PoissonRound(rate=0.5, multiplier=2.0),
        FixedRound(clients=9, drawn=3, multiplier=2.0),
        SummedRound(multiplier=2.0),
        LocalRound(multiplier=2.0),
    ],
)
def test_every_mechanism_is_written_down_and_read_again(mechanism: Mechanism):
    assert mechanism_from_json(mechanism_to_json(mechanism)) == mechanism
    other = PoissonRound(rate=0.25, multiplier=2.0)
    if type(mechanism) is not PoissonRound:
        with pytest.raises(PrivacyError, match="one kind"):
            spent(((mechanism, 1), (other, 1)), DELTA)


def test_samples_of_a_fixed_size_are_accounted_with_twice_the_norm():
    import dp_accounting
    from dp_accounting import rdp

    accountant = rdp.RdpAccountant(
        neighboring_relation=dp_accounting.NeighboringRelation.REPLACE_ONE
    )
    gaussian = dp_accounting.GaussianDpEvent(2.0)
    accountant.compose(dp_accounting.SampledWithoutReplacementDpEvent(100, 10, gaussian), 50)
    found = spent(((FixedRound(clients=100, drawn=10, multiplier=4.0), 50),), DELTA)
    assert found.rdp == pytest.approx(accountant.get_epsilon(DELTA), rel=1e-9)


def test_where_all_are_drawn_the_curve_is_the_gaussians_own():
    found = spent(((FixedRound(clients=20, drawn=20, multiplier=5.0), 50),), DELTA)
    multiplier = 5.0 / 2 / 50**0.5
    assert gaussian_delta(multiplier, found.epsilon) == pytest.approx(DELTA, rel=1e-6)
    assert found.epsilon == found.pld
    from dp_accounting import pld
    from dp_accounting.privacy_accountant import NeighboringRelation

    theirs = pld.PLDAccountant(NeighboringRelation.REPLACE_ONE)
    import dp_accounting

    theirs.compose(dp_accounting.GaussianDpEvent(5.0), 50)
    assert found.epsilon == pytest.approx(theirs.get_epsilon(DELTA), abs=1e-3)


@pytest.mark.parametrize(
    "mechanism",
    [
        PoissonRound(rate=0.1, multiplier=1.0),
        PoissonRound(rate=1.0, multiplier=1.0),
        FixedRound(clients=50, drawn=10, multiplier=1.0),
    ],
)
def test_calibrated_noise_is_just_enough(mechanism):
    multiplier = calibrated(mechanism, 30, epsilon=6.0, delta=DELTA)
    kind = type(mechanism)
    settings = {"rate": mechanism.rate} if isinstance(mechanism, PoissonRound) else {
        "clients": mechanism.clients, "drawn": mechanism.drawn,
    }  # fmt: skip
    assert epsilon_of(kind(**settings, multiplier=multiplier), 30, DELTA) <= 6.0
    less = round(multiplier - 1e-4, 4)
    assert epsilon_of(kind(**settings, multiplier=less), 30, DELTA) > 6.0


def test_hardly_any_noise_is_accounted_for_in_no_time_and_never_below_what_it_costs():
    started = time.perf_counter()
    found = spent(((PoissonRound(rate=0.5, multiplier=0.001), 3),), DELTA)
    assert time.perf_counter() - started < 20  # a loss distribution would take hours
    assert found.epsilon >= 3 / (2 * 0.001**2)
    just, below = (
        epsilon_of(PoissonRound(rate=0.1, multiplier=z), 2, DELTA) for z in (0.1, 0.0999)
    )
    assert below > just


def test_rounds_within_a_budget_are_all_that_fit():
    mechanism = PoissonRound(rate=0.1, multiplier=1.0)
    rounds = rounds_within(mechanism, epsilon=4.0, delta=DELTA)
    assert epsilon_of(mechanism, rounds, DELTA) <= 4.0 < epsilon_of(mechanism, rounds + 1, DELTA)
    assert rounds_within(mechanism, epsilon=0.01, delta=DELTA) == 0
    assert (
        rounds_within(PoissonRound(rate=1.0, multiplier=1e6), epsilon=100.0, delta=DELTA)
        == 1_000_000
    )


def test_a_ledger_charges_before_release_and_refuses_beyond_its_budget():
    mechanism = PoissonRound(rate=0.1, multiplier=1.0)
    empty = Ledger(delta=DELTA, budget=3.0)
    assert empty.spent.epsilon == 0 and empty.left == 3.0
    ledger, rounds = empty, rounds_within(mechanism, epsilon=3.0, delta=DELTA)
    for number in range(1, rounds + 1):
        after = ledger.charge(number, mechanism)
        assert after.spent.epsilon > ledger.spent.epsilon
        assert after.left < ledger.left
        ledger = after
    with pytest.raises(BudgetError, match=r"round \d+: expected an epsilon of at most 3"):
        ledger.charge(rounds + 1, mechanism)
    assert len(ledger.charges) == rounds, "a refused charge changes nothing"
    assert empty.charges == ()
    # A cheaper release may still fit.
    ledger.charge(rounds + 1, PoissonRound(rate=0.1, multiplier=1000.0))


def test_a_round_is_charged_once_however_often_it_is_played():
    mechanism = PoissonRound(rate=0.1, multiplier=1.0)
    ledger = Ledger(delta=DELTA).charge(1, mechanism).charge(2, mechanism)
    assert ledger.charge(2, mechanism) == ledger
    assert ledger.charge(1, mechanism) == ledger
    assert ledger.left == float("inf")
    with pytest.raises(PrivacyError, match="expected a round after 2"):
        ledger.charge(2, PoissonRound(rate=0.1, multiplier=2.0))
    with pytest.raises(PrivacyError, match="expected a round after 2"):
        ledger.charge(0, mechanism)


def test_hundreds_of_rounds_are_charged_about_as_fast_as_they_are_composed_once():
    mechanism = PoissonRound(rate=0.1, multiplier=1.5)
    epsilon_of(mechanism, 300, DELTA)  # the distribution of one round is known

    started = time.perf_counter()
    epsilon_of(mechanism, 299, DELTA)
    one = time.perf_counter() - started
    ledger = Ledger(delta=DELTA, budget=50.0, charges=tuple((n, mechanism) for n in range(1, 301)))
    started = time.perf_counter()
    for number in range(301, 306):
        ledger = ledger.charge(number, mechanism)
    assert time.perf_counter() - started < 5 * (5 * one + 0.05)


@pytest.mark.parametrize(
    "wrong",
    [
        lambda: PoissonRound(rate=0.0, multiplier=1.0),
        lambda: PoissonRound(rate=1.1, multiplier=1.0),
        lambda: PoissonRound(rate=0.5, multiplier=0.0),
        lambda: FixedRound(clients=5, drawn=6, multiplier=1.0),
        lambda: FixedRound(clients=5, drawn=0, multiplier=1.0),
        lambda: FixedRound(clients=5, drawn=1, multiplier=float("inf")),
        lambda: Ledger(delta=0.0),
        lambda: Ledger(delta=1e-5, budget=0.0),
        lambda: spent((), 1.0),
        lambda: calibrated(PoissonRound(rate=0.1, multiplier=1), 10, epsilon=0.0, delta=1e-5),
    ],
)
def test_settings_that_mean_nothing_are_refused(wrong):
    with pytest.raises(PrivacyError):
        wrong()
