# SPDX-License-Identifier: Apache-2.0
"""Does a private release give away no more of one client than its ε says? A canary is sent to see.

The worst case of a Gaussian release is a client whose update points one way and is clipped to C,
in a sum of which everything else is known. The release is run many times with that client and
many times without; each result is projected on the canary's direction, and whoever guesses
"present" above a threshold t has a rate of hits and of false alarms. (ε, δ)-privacy allows no
guess better than hits ≤ e^ε·false + δ, so that

    ε ≥ ln((hits - δ)/false),   and of the guess "absent" below t likewise,

with the Clopper–Pearson bounds of both rates in the place of the rates. It is a lower bound and
proves no privacy: a release that stays below its claim may still have a fault that another attack
finds; one above its claim is broken.

*Source* Jagielski, Ullman, Oprea, "Auditing Differentially Private Machine Learning", NeurIPS 2020
(arXiv 2006.07709), for bounds from rates with Clopper–Pearson intervals; Nasr et al., "Tight
Auditing of Differentially Private Machine Learning", USENIX Security 2023 (arXiv 2302.07956), for
the second bound: of noise that is known to be Gaussian any one threshold bounds the distance of
the two distributions, μ ≥ Φ⁻¹(hits) - Φ⁻¹(false), which is far tighter, and as good as that
knowledge.
*Differs from source* one release is audited and not a training run: what makes the release up
(clipping, grid, noise, its seeds) is run as it is shipped, and nothing else is. The threshold is
chosen on one half of the trials and the rates are counted on the other, so that the confidence is
that of one threshold.
*Cost* a release a trial: about 0.2 ms with the shipped mechanism.
"""

from __future__ import annotations

import math
import secrets
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import NormalDist
from typing import Final

import numpy as np

from protocol.tensors import ParamSpec
from simulations.audits.audited import Audited
from simulations.benchmarks.figure import Figure, figure
from simulations.benchmarks.runs import labelled
from simulations.progress import ProgressListener

DELTA: Final = 1e-5
CONFIDENCE: Final = 0.95
TRIALS: Final = 200_000
# With fewer the bound that assumes nothing cannot reach the ε of the claim.
QUICK_TRIALS: Final = 100_000
CLIP: Final = 1.0
MULTIPLIER: Final = 1.0
SIZE: Final = 16
# Longer than any update may be, so that a release that does not clip is found.
LENGTH: Final = 10.0
_CANDIDATES: Final = 400  # thresholds looked at, for each of the two guesses
# Of noise that is Gaussian any threshold tells; those with few false alarms on one half of the
# trials are those that were lucky there.
_USUAL_RATES: Final = np.linspace(0.02, 0.98, 25)


@dataclass(frozen=True, slots=True, kw_only=True)
class Mechanism:
    """One release, in the two steps in which a server makes it."""

    added: Callable[[np.ndarray], np.ndarray]
    """An update, float32 [size], as it is added to the sum: clipped, in whatever units it has."""
    release: Callable[[np.ndarray, bytes], np.ndarray]
    """A sum and a secret seed of 32 bytes to the noised sum, [size], in whatever units."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Scores:
    """Releases projected on the canary's direction, float64 [trials / 2] each."""

    present: np.ndarray
    absent: np.ndarray


@dataclass(frozen=True, slots=True, kw_only=True)
class Guess:
    """A threshold, what was counted at it on fresh trials, and what follows."""

    value: float
    """The lower bound: of ε, or of μ."""
    threshold: float
    above: bool
    """Whether the guess is "present" above the threshold, or "absent" below it."""
    hits: int
    false: int
    trials: int
    """Of each kind, so that hits / trials is the rate."""


def shipped_gaussian(clip_l2: float, multiplier: float, *, size: int = SIZE) -> Mechanism:
    """The central release as the server makes it. Raises: PrivacyError for impossible settings."""
    from aggregation.privacy.clipping import clip
    from aggregation.privacy.gaussian import Noise, in_steps, noised_mean

    noise = Noise(clip=clip_l2, multiplier=multiplier)
    spec = ParamSpec.of({"canary": np.zeros(size, np.float32)})

    def added(update: np.ndarray) -> np.ndarray:
        return in_steps(spec, clip({"canary": update}, clip_l2).delta, noise.step)

    def release(sums: np.ndarray, seed: bytes) -> np.ndarray:
        return noised_mean(sums, noise, expected=1.0, seed=seed, use="update")

    return Mechanism(added=added, release=release)


def canary_scores(
    mechanism: Mechanism,
    *,
    trials: int,
    size: int = SIZE,
    length: float = LENGTH,
    seed: Callable[[], bytes] = lambda: secrets.token_bytes(32),
) -> Scores:
    """Half of the trials with the canary, half without, each a release with a seed of its own.

    Args:
        mechanism: what is audited.
        trials: an even number of 4 or more.
        size: values of an update.
        length: of the canary before it is clipped.
        seed: draws the seed of a release.

    Raises: ValueError for another number of trials.
    """
    if trials < 4 or trials % 2:
        raise ValueError(f"trials: expected an even number of 4 or more, found {trials}")
    # No axis: noise that is not independent from value to value shows.
    signs = np.where(np.arange(size) % 2 == 0, -1.0, 1.0)
    direction = signs / math.sqrt(size)
    sums = {
        "present": mechanism.added((length * direction).astype(np.float32)),
        "absent": mechanism.added(np.zeros(size, np.float32)),
    }
    scores = {
        name: np.fromiter(
            (direction @ mechanism.release(value, seed()) for _ in range(trials // 2)),
            np.float64,
            trials // 2,
        )
        for name, value in sums.items()
    }
    return Scores(**scores)


def epsilon_lower_bound(
    scores: Scores, *, delta: float = DELTA, confidence: float = CONFIDENCE
) -> Guess:
    """ε below which no mechanism gives such scores, but for a chance of 1 - confidence.

    Nothing is assumed of the noise. With m trials of each kind no more than about ln(m/7.4) can be
    shown, however bad a mechanism is: half of them choose the threshold.
    """

    def value(hits: np.ndarray, false: np.ndarray) -> np.ndarray:
        return np.log(np.maximum((hits - delta) / false, 1.0))

    return _best(scores, value, _few_false, confidence)


def mu_lower_bound(scores: Scores, *, confidence: float = CONFIDENCE) -> Guess:
    """How far apart, in deviations, the two distributions are at least if both are Gaussian.

    1/μ is the noise multiplier that they seem to have.
    """
    from scipy.special import ndtri

    def value(hits: np.ndarray, false: np.ndarray) -> np.ndarray:
        # No more than so many deviations is told apart by any number of trials.
        inside = np.clip([hits, false], 1e-15, 1 - 1e-15)
        return np.maximum(ndtri(inside[0]) - ndtri(inside[1]), 0.0)

    return _best(scores, value, lambda others: np.quantile(others, _USUAL_RATES), confidence)


def rates(scores: Scores) -> tuple[np.ndarray, np.ndarray]:
    """False alarms and hits of the guess "present" at every threshold, both rising from 0 to 1."""
    thresholds = np.unique(np.concatenate([scores.present, scores.absent]))[::-1]
    return _share_above(scores.absent, thresholds), _share_above(scores.present, thresholds)


def canary_audit(
    progress: ProgressListener,
    *,
    quick: bool = False,
    mechanism: Callable[[float, float], Mechanism] = shipped_gaussian,
) -> Audited:
    """The shipped release with the noise that its ε asks for, and with half of it.

    `mechanism` makes a release from a clipping norm and a multiplier; the second is claimed to be
    `MULTIPLIER` whatever it is.
    """
    from aggregation.privacy.analytic_gaussian import gaussian_epsilon

    claimed = gaussian_epsilon(MULTIPLIER, DELTA)
    trials = QUICK_TRIALS if quick else TRIALS
    found: dict[str, Scores] = {}
    for name, part in (("right noise", 1.0), ("half the noise", 0.5)):
        progress.stage(f"canary: {trials} releases with {name}")
        found[name] = canary_scores(mechanism(CLIP, part * MULTIPLIER), trials=trials)
    right, half = found.values()
    figures = canary_figures(right, half, claimed=claimed, epsilon_of_mu=_epsilon_of_mu)
    return Audited(
        figures=tuple(labelled(figures) if quick else figures),
        draw=lambda path: draw(found, claimed, path),
    )


def canary_figures(
    right: Scores, half: Scores, *, claimed: float, epsilon_of_mu: Callable[[float], float]
) -> list[Figure]:
    """`canary_audit` holds where the right noise stays below the claim and half of it does not."""
    bound, alarm = epsilon_lower_bound(right), epsilon_lower_bound(half)
    gaussian = mu_lower_bound(right)
    claim = f"{claimed:.4f}"
    setting = (
        f"one release of noise {MULTIPLIER:g}·C at delta {DELTA:g}, {2 * len(right.present)} "
        f"trials, {100 * CONFIDENCE:g} % confidence"
    )
    audit = figure(
        "canary_audit",
        bound.value,
        unit="epsilon",
        target=f"<= {claim}",
        note=f"at least, right noise; {_counted(bound)}; half the noise: {alarm.value:.3f}, "
        f"{'alarm' if alarm.value > claimed else 'NO ALARM'}; {setting}",
    )
    return [
        audit if alarm.value > claimed else replace(audit, holds=False),
        figure(
            "canary_alarm",
            alarm.value,
            unit="epsilon",
            target=f"> {claim}",
            note=f"at least, half of the claimed noise; {_counted(alarm)}",
        ),
        figure(
            "canary_gaussian",
            epsilon_of_mu(gaussian.value),
            unit="epsilon",
            target=f"<= {claim}",
            note=f"at least, right noise, if it is Gaussian; a multiplier of at most "
            f"{1 / gaussian.value if gaussian.value else math.inf:.3f}; {_counted(gaussian)}",
        ),
    ]


def draw(found: Mapping[str, Scores], claimed: float, path: Path) -> None:
    """Hits over false alarms, on two logarithmic axes, and where the claim ends."""
    from matplotlib.figure import Figure as Canvas

    canvas = Canvas(figsize=(6.4, 4.4), layout="constrained")
    axes = canvas.add_subplot()
    false = np.logspace(-5, 0, 200)
    normal = NormalDist()
    for number, (name, scores) in enumerate(found.items()):
        x, y = rates(scores)
        axes.plot(x, y, color=f"C{number}", label=name)
    exact = [normal.cdf(normal.inv_cdf(min(p, 1 - 1e-12)) + 1 / MULTIPLIER) for p in false]
    axes.plot(false, exact, color="black", linewidth=0.8, linestyle=":", label="as it should be")
    allowed = np.minimum(np.exp(claimed) * false + DELTA, 1.0)
    axes.plot(false, allowed, color="black", linewidth=0.8, label=f"epsilon {claimed:.2f}")
    axes.set_xscale("log")
    axes.set_yscale("log")
    axes.set_xlim(1e-5, 1)
    axes.set_ylim(1e-5, 1.2)
    axes.set_xlabel("false alarms")
    axes.set_ylabel("hits")
    axes.legend(frameon=False)
    canvas.savefig(path, dpi=150)


def _best(
    scores: Scores,
    value: Callable[[np.ndarray, np.ndarray], np.ndarray],
    candidates: Callable[[np.ndarray], np.ndarray],
    confidence: float,
) -> Guess:
    """The guess whose bound is best on the first half of the trials, as the second half has it."""
    middle = len(scores.present) // 2
    chosen: tuple[float, bool, float] | None = None
    for above in (True, False):
        # Of the guess "absent" below t both kinds change places, and signs.
        those, others = _sides(scores, above, slice(middle))
        thresholds = candidates(others)
        bounds = value(*_bounded(those, others, thresholds, confidence))
        best = int(np.argmax(bounds))
        if chosen is None or bounds[best] > chosen[0]:
            chosen = float(bounds[best]), above, float(thresholds[best])
    assert chosen is not None
    _, above, threshold = chosen
    those, others = _sides(scores, above, slice(middle, None))
    at = np.array([threshold])
    found = value(*_bounded(those, others, at, confidence))
    return Guess(
        value=float(found[0]),
        threshold=threshold if above else -threshold,
        above=above,
        hits=int((those > threshold).sum()),
        false=int((others > threshold).sum()),
        trials=len(those),
    )


def _sides(scores: Scores, above: bool, part: slice) -> tuple[np.ndarray, np.ndarray]:
    """What lies above a threshold when the guess is right, and when it is wrong."""
    if above:
        return scores.present[part], scores.absent[part]
    return -scores.absent[part], -scores.present[part]


def _few_false(others: np.ndarray) -> np.ndarray:
    """Thresholds with ever more false alarms, of scores of which each would be one."""
    ranked = np.sort(others)[::-1]
    places = np.unique(np.geomspace(1, len(ranked), _CANDIDATES).astype(int)) - 1
    return ranked[places]


def _bounded(
    those: np.ndarray, others: np.ndarray, thresholds: np.ndarray, confidence: float
) -> tuple[np.ndarray, np.ndarray]:
    """The rate of hits from below and of false alarms from above, sure together (Bonferroni)."""
    from scipy.special import betaincinv

    tail = (1 - confidence) / 2
    hits, false = _count_above(those, thresholds), _count_above(others, thresholds)
    n, m = len(those), len(others)
    # Clopper–Pearson: a rate is the quantile of a beta distribution, and 0 or 1 at the ends.
    low = np.where(hits == 0, 0.0, betaincinv(np.maximum(hits, 1), n - hits + 1, tail))
    high = np.where(false == m, 1.0, betaincinv(false + 1, np.maximum(m - false, 1), 1 - tail))
    return low, high


def _count_above(values: np.ndarray, thresholds: np.ndarray) -> np.ndarray:
    return len(values) - np.searchsorted(np.sort(values), thresholds, side="right")


def _share_above(values: np.ndarray, thresholds: np.ndarray) -> np.ndarray:
    return _count_above(values, thresholds) / len(values)


def _epsilon_of_mu(mu: float) -> float:
    from aggregation.privacy.analytic_gaussian import gaussian_epsilon

    return gaussian_epsilon(1 / mu, DELTA) if mu else 0.0


def _counted(guess: Guess) -> str:
    side = '"present" above' if guess.above else '"absent" below'
    return (
        f"{side} {guess.threshold:.2f}: {guess.hits} hits and {guess.false} false alarms "
        f"of {guess.trials} each"
    )
