# SPDX-License-Identifier: Apache-2.0
"""What a series of noisy releases costs, ε at a given δ, and a ledger that refuses to overspend.

Where the server adds the noise, two ways to choose a round's clients are accounted for, and never
one as the other:

`PoissonRound`  each client takes part with probability q, independently, and nobody knows who;
                q = 1: all do. Neighbours: federations with and without one client.
                ε by privacy loss distributions, Rényi accounting as the cross-check.
`FixedRound`    m of n clients, every set of m equally likely, and nobody knows which.
                Neighbours: federations that differ in what one client holds; n is known.
                ε by Rényi accounting; where m = n by privacy loss distributions too.

Where clients add it, the server chooses and sees who takes part, and no choice is counted:

`SummedRound`   a secure sum that clients' shares of noise are in. Neighbours: one client's update,
                or zeros in its place. Its noise is discrete and its steps may be coarse, so that ε
                is that of Rényi accounting, which holds for it to the letter; the distributions are
                the Gaussian's.
`LocalRound`    one client's own update, noised. Neighbours: federations that differ in what that
                client holds. ε by privacy loss distributions.

Noise multipliers are of the clipping norm C. Replacing a client moves a sum by up to 2C, so that a
FixedRound or LocalRound of multiplier z is a Gaussian of z/2 to its neighbours. dp_accounting has
two conventions there: its Rényi accountant takes a multiple of the sensitivity, its distributions
for REPLACE_ONE one of C. Only the first is used here, with z/2.

dp_accounting has no loss distribution for samples of fixed size: the smaller of two bounds is
reported, Rényi's with the sampling (Wang, Balle, Kasiviswanathan, AISTATS 2019, arXiv 1808.00087)
and the Gaussian without it. Both are upper bounds, and neither is tight.

*Source* dp_accounting (Google): distributions are discretised pessimistically, by Doroshenko et
al., PoPETs 2022 (arXiv 2207.04380). Composition is over all releases, whose order does not matter;
a release may choose its clipping norm by what earlier ones gave, not its noise multiplier.
*Differs from source* Steps are 10⁻³ and not 10⁻⁴ where the losses of one release are spread so
widely that it makes no difference; Gaussians without sampling have their exact curve.
*Cost* the distribution of one setting 0.1 to 0.6 seconds, then remembered; composing it some
hundred times 0.1 to 0.3 seconds.
"""

from __future__ import annotations

import logging
import math
from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from functools import lru_cache
from typing import TYPE_CHECKING, Any, Final

import numpy as np

from aggregation.errors import BudgetError, PrivacyError
from aggregation.privacy.analytic_gaussian import gaussian_epsilon

if TYPE_CHECKING:
    from dp_accounting.pld.privacy_loss_distribution import PrivacyLossDistribution

_PER_Z: Final = 10_000  # calibrated multipliers are whole multiples of 1/10000
_LEAST_SAMPLED: Final = 0.1
"""Noise multipliers below hide nobody, drawn or not, and have loss distributions of any length: the
sampling is left out, which can only make epsilon larger."""
_MOST_ROUNDS: Final = 1_000_000
_LARGEST_Z: Final = 2.0**20


@dataclass(frozen=True, slots=True, kw_only=True)
class PoissonRound:
    """One release, of clients that take part each with probability `rate`; 1: all of them."""

    rate: float  # q
    multiplier: float  # z

    def __post_init__(self) -> None:
        if not 0 < self.rate <= 1:
            raise PrivacyError(
                f"rate: expected a probability above 0 and at most 1, found {self.rate}"
            )
        _require_multiplier(self.multiplier)


@dataclass(frozen=True, slots=True, kw_only=True)
class FixedRound:
    """One release, of `drawn` clients of `clients`."""

    clients: int  # n
    drawn: int  # m
    multiplier: float  # z

    def __post_init__(self) -> None:
        if not 0 < self.drawn <= self.clients:
            raise PrivacyError(f"drawn: expected 1 to {self.clients} clients, found {self.drawn}")
        _require_multiplier(self.multiplier)


@dataclass(frozen=True, slots=True, kw_only=True)
class SummedRound:
    """One release of a sum with noise that clients added, whoever took part."""

    multiplier: float  # z, of the shares that may be counted on together

    def __post_init__(self) -> None:
        _require_multiplier(self.multiplier)


@dataclass(frozen=True, slots=True, kw_only=True)
class LocalRound:
    """One release of a client's own update."""

    multiplier: float  # z

    def __post_init__(self) -> None:
        _require_multiplier(self.multiplier)


Mechanism = PoissonRound | FixedRound | SummedRound | LocalRound
_WORDS: Final[Mapping[type[Mechanism], str]] = {
    PoissonRound: "poisson",
    FixedRound: "without-replacement",
    SummedRound: "summed",
    LocalRound: "local",
}
_NEIGHBOURS: Final[Mapping[type[Mechanism], str]] = {
    PoissonRound: "add or remove one",
    FixedRound: "replace one",
    SummedRound: "one client's update or zeros",
    LocalRound: "replace one",
}
History = tuple[tuple[Mechanism, int], ...]
"""How often each was used; the order does not matter."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Spent:
    """What a history costs at a δ."""

    epsilon: float  # the one to report
    pld: float  # by privacy loss distributions, without the sampling where they cannot have it
    rdp: float  # by Rényi accounting
    neighbours: str  # such as "add or remove one"


def mechanism_to_json(mechanism: Mechanism) -> dict[str, Any]:
    """Ready for `json.dumps`."""
    return {"sampling": _WORDS[type(mechanism)], **asdict(mechanism)}


def mechanism_from_json(content: Mapping[str, Any]) -> Mechanism:
    """The inverse of `mechanism_to_json`. Raises: PrivacyError."""
    settings = dict(content)
    kinds: dict[object, type[Mechanism]] = {word: kind for kind, word in _WORDS.items()}
    try:
        return kinds[settings.pop("sampling", None)](**settings)
    except (KeyError, TypeError) as error:
        raise PrivacyError(f"expected a round's mechanism, found {content!r}") from error


def spent(history: History, delta: float) -> Spent:
    """ε of all releases of a history together.

    Raises: PrivacyError for a delta outside 0 to 1, or rounds of both kinds: their guarantees are
        about different neighbours and do not add up.
    """
    _require_delta(delta)
    counts: Counter[Mechanism] = Counter()
    for mechanism, count in history:
        counts[mechanism] += count
    tidy = tuple(sorted(((m, n) for m, n in counts.items() if n), key=repr))
    if len({type(mechanism) for mechanism, _ in tidy}) > 1:
        raise PrivacyError(
            "expected rounds of one kind, found several: Poisson samples, samples of a fixed size "
            "and noise of clients are accounted for by different neighbours"
        )
    return _spent(tidy, delta)


def epsilon_of(mechanism: Mechanism, rounds: int, delta: float) -> float:
    """The reported ε of so many rounds of one kind."""
    return spent(((mechanism, rounds),), delta).epsilon


def calibrated(mechanism: Mechanism, rounds: int, *, epsilon: float, delta: float) -> float:
    """The least noise multiplier, in steps of 10⁻⁴, with which so many rounds cost at most
    `epsilon`. The multiplier of `mechanism` itself is not looked at.

    Raises: PrivacyError where no multiplier below 2²⁰ does.
    """
    _require_delta(delta)
    if not 0 < epsilon < math.inf:
        raise PrivacyError(f"epsilon: expected a finite number above 0, found {epsilon!r}")
    return _calibrated(replace(mechanism, multiplier=1.0), rounds, epsilon, delta)


def rounds_within(mechanism: Mechanism, *, epsilon: float, delta: float) -> int:
    """How many rounds a budget allows, at most 10⁶; 0 where not one."""

    def fits(rounds: int) -> bool:
        return epsilon_of(mechanism, rounds, delta) <= epsilon

    if not fits(1):
        return 0
    low, high = 1, 2
    while high <= _MOST_ROUNDS and fits(high):
        low, high = high, 2 * high
    high = min(high, _MOST_ROUNDS + 1)
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if fits(middle) else (low, middle)
    return low


@dataclass(frozen=True, slots=True, kw_only=True)
class Ledger:
    """What has been released, against a budget; charging gives a new ledger."""

    delta: float
    budget: float = math.inf  # ε; infinite: only counted
    charges: tuple[tuple[int, Mechanism], ...] = ()
    """Round and mechanism, in the order of rounds."""

    def __post_init__(self) -> None:
        _require_delta(self.delta)
        if not self.budget > 0:
            raise PrivacyError(f"budget: expected an epsilon above 0, found {self.budget}")

    @property
    def spent(self) -> Spent:
        """Of all charges together."""
        return spent(tuple((mechanism, 1) for _, mechanism in self.charges), self.delta)

    @property
    def left(self) -> float:
        """ε of the budget that is not spent. It is no budget of its own: privacy losses add up to
        less than their sum."""
        return max(self.budget - self.spent.epsilon, 0.0)

    def charge(self, number: int, mechanism: Mechanism) -> Ledger:
        """The ledger with one round's release more; a round is charged once, however often asked.

        Raises: BudgetError where it would exceed the budget; PrivacyError for a round that was
            charged for something else, or that comes before one that was.
        """
        for round, charged in self.charges:
            if round == number and charged == mechanism:
                return self
            if round >= number:
                raise PrivacyError(
                    f"round {number}: expected a round after {self.charges[-1][0]}, the last that "
                    "was charged, or the same charge again"
                )
        after = replace(self, charges=(*self.charges, (number, mechanism)))
        cost = after.spent.epsilon
        if cost > self.budget:
            raise BudgetError(
                f"round {number}: expected an epsilon of at most {self.budget:g} at delta "
                f"{self.delta:g}, with it {cost:.4f} would be spent; nothing was released"
            )
        return after


def _require_delta(delta: float) -> None:
    if not 0 < delta < 1:
        raise PrivacyError(f"delta: expected a number between 0 and 1, found {delta!r}")


def _require_multiplier(multiplier: float) -> None:
    if not 0 < multiplier < math.inf:
        raise PrivacyError(f"noise multiplier: expected a number above 0, found {multiplier!r}")


@lru_cache(maxsize=1024)
def _spent(history: History, delta: float) -> Spent:
    neighbours = _NEIGHBOURS[type(history[0][0])] if history else ""
    if not history:
        return Spent(epsilon=0.0, pld=0.0, rdp=0.0, neighbours=neighbours)
    rdp = _rdp_epsilon(history, delta)
    pld = _pld_epsilon(history, delta)
    sampled = any(isinstance(m, FixedRound) and m.drawn < m.clients for m, _ in history)
    # Of Poisson rounds the distribution is the one to report, and is the smaller in any case.
    epsilon = min(pld, rdp) if sampled else pld
    if any(isinstance(mechanism, SummedRound) for mechanism, _ in history):
        epsilon = rdp
    return Spent(epsilon=epsilon, pld=pld, rdp=rdp, neighbours=neighbours)


def _pld_epsilon(history: History, delta: float) -> float:
    """By the Gaussian's exact curve where nothing is sampled, else by convolutions."""
    plain, sampled = _parted(history)
    if not sampled:
        return gaussian_epsilon(plain, delta)
    step = min(_step(mechanism) for mechanism, _ in sampled)
    composed = _distribution(1.0, plain, step) if plain else None
    for mechanism, count in sampled:
        one = _distribution(mechanism.rate, mechanism.multiplier, step)
        one = one.self_compose(count) if count > 1 else one
        composed = one if composed is None else composed.compose(one)
    assert composed is not None
    return float(composed.get_epsilon_for_delta(delta))


def _parted(history: History) -> tuple[float, list[tuple[PoissonRound, int]]]:
    """The multiplier, of the sensitivity, of all Gaussians without sampling together (0: there is
    none), and the others. Of a FixedRound and of very little noise the sampling is left out."""
    precision, sampled = 0.0, []
    for mechanism, count in history:
        if isinstance(mechanism, FixedRound | LocalRound):
            precision += count * (mechanism.multiplier / 2) ** -2
        elif (
            isinstance(mechanism, SummedRound)
            or mechanism.rate == 1
            or mechanism.multiplier < _LEAST_SAMPLED
        ):
            precision += count * mechanism.multiplier**-2
        else:
            sampled.append((mechanism, count))
    return float(precision**-0.5) if precision else 0.0, sampled


def _step(mechanism: PoissonRound) -> float:
    """How finely the losses of a release are told apart: a hundredth of their deviation, about."""
    deviation = mechanism.rate * math.sqrt(math.expm1(min(mechanism.multiplier**-2.0, 20.0)))
    return next((step for step in (1e-3, 5e-4, 2e-4) if step <= deviation / 100), 1e-4)


@lru_cache(maxsize=32)
def _distribution(rate: float, multiplier: float, step: float) -> PrivacyLossDistribution:
    """Of one release, to neighbours with and without one client."""
    from dp_accounting.pld import privacy_loss_distribution

    return privacy_loss_distribution.from_gaussian_mechanism(
        multiplier, sampling_prob=rate, value_discretization_interval=step
    )


def _rdp_epsilon(history: History, delta: float) -> float:
    from dp_accounting import rdp

    total = sum(count * np.array(_rdp(mechanism)) for mechanism, count in history)
    return float(rdp.compute_epsilon(rdp.RdpAccountant().orders, total, delta)[0])


@lru_cache(maxsize=256)
def _rdp(mechanism: Mechanism) -> tuple[float, ...]:
    """Rényi divergences of one release, at dp_accounting's orders."""
    from dp_accounting import rdp
    from dp_accounting.privacy_accountant import NeighboringRelation

    fixed = isinstance(mechanism, FixedRound)
    # Of the others without sampling, dp_accounting has no neighbours by these names: a Gaussian of
    # so many sensitivities is one.
    accountant = rdp.RdpAccountant(
        neighboring_relation=NeighboringRelation.REPLACE_ONE
        if fixed
        else NeighboringRelation.ADD_OR_REMOVE_ONE
    )
    with quiet():
        accountant.compose(_event(mechanism))
    return tuple(accountant.rdp.tolist())


def _event(mechanism: Mechanism) -> Any:
    """As dp_accounting's Rényi accountant has it: noise is a multiple of the sensitivity."""
    import dp_accounting

    if isinstance(mechanism, PoissonRound):
        gaussian = dp_accounting.GaussianDpEvent(mechanism.multiplier)
        return dp_accounting.PoissonSampledDpEvent(mechanism.rate, gaussian)
    if isinstance(mechanism, SummedRound):
        return dp_accounting.GaussianDpEvent(mechanism.multiplier)
    if isinstance(mechanism, LocalRound):
        return dp_accounting.GaussianDpEvent(mechanism.multiplier / 2)
    return dp_accounting.SampledWithoutReplacementDpEvent(
        mechanism.clients,
        mechanism.drawn,
        dp_accounting.GaussianDpEvent(mechanism.multiplier / 2),
    )


@contextmanager
def quiet() -> Iterator[None]:
    """The accountant warns of each Rényi order that it cannot compute and does without."""
    logger = logging.getLogger("absl")
    before = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(before)


@lru_cache(maxsize=256)
def _calibrated(mechanism: Mechanism, rounds: int, epsilon: float, delta: float) -> float:
    """By bisection on a grid, each point chosen as if ε were a power of z between the last two."""

    def excess(steps: int) -> float:
        """ln(ε/budget), which falls with the noise."""
        # Divided, not multiplied: decimals as they are written.
        found = epsilon_of(replace(mechanism, multiplier=steps / _PER_Z), rounds, delta)
        return math.log(max(found, 1e-12) / epsilon)

    low, above = 1, math.inf
    high = _PER_Z
    while (below := excess(high)) > 0:
        low, above = high, below
        high *= 2
        if high > _LARGEST_Z * _PER_Z:
            raise PrivacyError(
                f"epsilon {epsilon:g} at delta {delta:g} over {rounds} rounds: no noise multiplier "
                f"up to {_LARGEST_Z:g} is enough"
            )
    while above == math.inf and high > 1:
        found = excess(high // 2)
        if found > 0:
            low, above = high // 2, found
        else:
            high, below = high // 2, found
    halve = False
    while high - low > 1:
        share = 0.5 if halve else above / (above - below)
        middle = round(low * (high / low) ** share)
        middle = min(max(middle, low + 1), high - 1)
        found = excess(middle)
        # One side that stays where it is makes steps small: halve then.
        halve = not halve and abs(found) > 1e-3
        if found > 0:
            low, above = middle, found
        else:
            high, below = middle, found
    return high / _PER_Z
