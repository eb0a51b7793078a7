# SPDX-License-Identifier: Apache-2.0
"""What a private job's rounds have beside those of others: who is drawn, with what noise, and what
it costs.

All of it is known before a round begins, and is written into the journal with its beginning: the
mechanism that is charged for, the clipping norm, and the secret seed of the draw and of the noise.
A round that a crash interrupted is charged once and drawn once.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Final

import numpy as np

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
)
from aggregation.privacy.adaptive_clipping import (
    default_count_noise,
    next_bound,
    noised_share,
    update_multiplier,
)
from aggregation.privacy.distributed_gaussian import share_multiplier
from aggregation.privacy.gaussian import Noise, count_noise
from aggregation.privacy.keystream import Keystream
from aggregation.privacy.private_mean import PrivateMean, PrivateSum
from coordinator.errors import Fault, JobError
from coordinator.job import Job
from coordinator.journal import Charge
from coordinator.privacy_section import PrivacySection
from protocol.plan import UNCLIPPED
from protocol.tensors import ParamSpec

_CLIP: Final = "clip"


@dataclass(frozen=True, slots=True, kw_only=True)
class Privacy:
    """What does not change from round to round."""

    section: PrivacySection
    mechanism: Mechanism
    population: int  # N
    asked: int  # in a round; 0: all
    drawn: int  # m, clients that a round expects; with noise of the server, divides by

    @classmethod
    def of(cls, job: Job) -> Privacy | None:
        """A job's; None where it promises nothing. The noise is found here where it is not given.

        Raises: JobError for a budget or a noise that cannot be met.
        """
        section = job.privacy
        if not section.is_private:
            return None
        population = section.population or job.data.clients
        drawn = job.rounds.asked or population
        mechanism = _mechanism(section, drawn, population)
        try:
            if not section.noise_multiplier:
                found = calibrated(
                    mechanism, job.rounds.count, epsilon=section.epsilon, delta=section.delta
                )
                mechanism = replace(mechanism, multiplier=found)
        except PrivacyError as error:
            raise _job_error("epsilon", section.epsilon, str(error)) from error
        made = cls(
            section=section,
            mechanism=mechanism,
            population=population,
            asked=job.rounds.asked,
            drawn=drawn,
        )
        made._check()
        return made

    def _check(self) -> None:
        section, multiplier = self.section, self.mechanism.multiplier
        try:
            noise = self.noise(section.clip)
        except PrivacyError as error:
            if section.clip_quantile:
                raise _job_error("clip_quantile", section.clip_quantile, str(error)) from error
            raise _job_error("noise_multiplier", multiplier, str(error)) from error
        if section.is_central and self.population > noise.most:
            words = f"expected more noise, or at most {noise.most} clients, to sum their updates"
            raise _job_error("noise_multiplier", multiplier, words)
        first = epsilon_of(self.mechanism, 1, section.delta)
        if section.epsilon and first > section.epsilon:
            words = (
                f"expected a budget for one round or more: with noise_multiplier = {multiplier:g} "
                f"the first round alone costs {first:.4g}"
            )
            raise _job_error("epsilon", section.epsilon, words)

    @property
    def share(self) -> float:
        """The noise that each client adds itself, in clipping norms; 0 where the server does.

        Clients that help the server take their shares away: of `drawn` as many as the job says.
        """
        section, multiplier = self.section, self.mechanism.multiplier
        if section.mode == "local":
            return multiplier
        if section.mode == "distributed":
            traitors = math.floor(section.corrupt * self.drawn)
            return share_multiplier(multiplier, fewest=section.min_survivors, colluding=traitors)
        return 0.0

    @property
    def count_deviation(self) -> float:
        """σ_b, of the count of unclipped updates; 0 where the norm stays."""
        return default_count_noise(self.drawn) if self.section.clip_quantile else 0.0

    def noise(self, clip: float) -> Noise:
        """On a round's updates. Raises: PrivacyError where the count leaves none for them."""
        multiplier = self.mechanism.multiplier
        if self.count_deviation:
            multiplier = update_multiplier(multiplier, self.count_deviation)
        return Noise(clip=clip, multiplier=multiplier)

    def clip(self, memory: Mapping[str, np.ndarray]) -> float:
        """C of the next round, by what the last one left."""
        return float(memory[_CLIP]) if _CLIP in memory else self.section.clip

    def charge(self, number: int, memory: Mapping[str, np.ndarray], seed: bytes) -> Charge:
        """What a round is going to release."""
        return Charge(round=number, mechanism=self.mechanism, clip=self.clip(memory), seed=seed)

    def ledger(self, charges: Sequence[Charge]) -> Ledger:
        """What has been charged so far."""
        return Ledger(
            delta=self.section.delta,
            budget=self.section.epsilon or math.inf,
            charges=tuple((one.round, one.mechanism) for one in charges),
        )

    def affords(self, charges: Sequence[Charge], number: int) -> bool:
        """Whether the budget covers a round beside what was charged."""
        try:
            self.ledger(charges).charge(number, self.mechanism)
        except BudgetError:
            return False
        return True

    @property
    def needs(self) -> int:
        """Clients that must be enrolled, here or not, for a draw to be what is accounted for.

        Each of fewer clients would be drawn more often; who takes part by itself does not care.
        """
        return self.population if isinstance(self.mechanism, FixedRound) else 0

    def miscounted(self, known: int) -> str:
        """What follows where another number of clients is enrolled than the job counts on."""
        if known == self.population or not self.section.is_central:
            return ""
        return (
            f"the job counts on {self.population} clients (privacy.population), {known} are "
            f"enrolled: the guarantee holds, and steps are {known / self.population:.2g} times as "
            "long as the mean of updates"
        )

    @property
    def most_asked(self) -> int:
        """Clients of a round that is not drawn, 0: all that can take part. Of more of them more
        could take their shares of the noise away than is accounted for."""
        return self.drawn if self.section.mode == "distributed" else self.asked

    def draw(self, names: Sequence[str], seed: bytes) -> list[str] | None:
        """The clients of a round, sorted, of all that are enrolled, whether they can take part;
        None where no drawing is accounted for, and any choice will do."""
        if not self.section.is_central:
            return None
        known = sorted(names)
        stream = Keystream(seed, "cohort")
        match self.section.sampling:
            case "all":
                return known
            case "poisson":
                return [name for name in known if stream.below(self.population) < self.drawn]
            case _:
                if len(known) < self.needs:
                    raise PrivacyError(
                        f"expected {self.needs} enrolled clients to draw {self.drawn} of, found "
                        f"{len(known)}: each would be drawn more often than is accounted for"
                    )
                # Fisher and Yates' shuffle, as far as it is needed.
                for place in range(self.drawn):
                    other = place + stream.below(len(known) - place)
                    known[place], known[other] = known[other], known[place]
                return sorted(known[: self.drawn])


def _mechanism(section: PrivacySection, drawn: int, population: int) -> Mechanism:
    """What a round is, with the noise that is given, or any."""
    given = section.noise_multiplier or 1.0
    if section.mode == "distributed":
        return SummedRound(multiplier=given)
    if section.mode == "local":
        return LocalRound(multiplier=given)
    if section.sampling == "without-replacement":
        return FixedRound(clients=population, drawn=drawn, multiplier=given)
    return PoissonRound(rate=drawn / population, multiplier=given)


def _job_error(key: str, value: float, allowed: str) -> JobError:
    return JobError([Fault(key=f"privacy.{key}", value=value, allowed=allowed)])


@dataclass(frozen=True, slots=True, kw_only=True)
class PrivateRound:
    """One round of a private job, charged for."""

    privacy: Privacy
    charge: Charge

    def merger(self, shared: ParamSpec) -> PrivateMean | None:
        """Sums and noises the round's updates; None where clients have noised them, and whatever
        is made of them costs nothing more."""
        if not self.privacy.section.is_central:
            return None
        return PrivateMean(
            noise=self.privacy.noise(self.charge.clip),
            expected=float(self.privacy.drawn),
            shared=shared,
            seed=self.charge.seed,
        )

    @property
    def tells(self) -> tuple[str, ...]:
        """Metrics that clients tell for the sake of the clipping norm."""
        return (UNCLIPPED,) if self.privacy.count_deviation else ()

    def fault(self, metrics: Mapping[str, float]) -> str:
        """What is wrong with them; "" where nothing is."""
        if self.tells and metrics.get(UNCLIPPED) not in (0.0, 1.0):
            return f"update: expected {UNCLIPPED} to be 0 or 1, found {metrics.get(UNCLIPPED)}"
        return ""

    def unclipped_share(self, state: PrivateSum, unclipped: int) -> float | None:
        """b̃, the noised share of updates that were not clipped; None where it is not released."""
        deviation = self.privacy.count_deviation
        if not deviation:
            return None
        # Of another count or sum it is another draw, as the noise on updates is.
        use = f"count/{unclipped}/{state.count}/{state.digest()}"
        drawn = count_noise(deviation, self.charge.seed, use)
        return noised_share(unclipped, state.count, drawn, expected=float(self.privacy.drawn))

    def remembered(self, share: float | None) -> dict[str, np.ndarray]:
        """What the next round has to know."""
        if share is None:
            return {}
        section = self.privacy.section
        clip = next_bound(
            self.charge.clip, share, quantile=section.clip_quantile, rate=section.clip_rate
        )
        return {_CLIP: np.array(clip)}

    def report(self, charges: Sequence[Charge], share: float | None) -> dict[str, Any]:
        """What the round's report says of it."""
        ledger = self.privacy.ledger(charges)
        spent, budget = ledger.spent, self.privacy.section.epsilon
        return {
            "epsilon": spent.epsilon,
            # Of next to no noise Rényi accounting may have no bound, and JSON no infinity.
            "epsilon_rdp": spent.rdp if math.isfinite(spent.rdp) else None,
            "delta": ledger.delta,
            "budget": budget or None,
            "left": ledger.left if budget else None,
            "neighbours": spent.neighbours,
            "noise_multiplier": self.privacy.mechanism.multiplier,
            "clip": self.charge.clip,
            "unclipped": share,
        }
