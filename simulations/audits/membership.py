# SPDX-License-Identifier: Apache-2.0
"""Was this image in the training data of a published adapter? Shadow models are trained to see.

The attacker trains N adapters as the federation does, each on a random half of a pool of images,
and notes for every image x how sure each adapter is of its label, φ = ln(p/(1 - p)). The values of
adapters that had x and of those that had not are taken for two Gaussians; an adapter under attack
is judged by the ratio of their densities at its own φ,

    score(x) = ln N(φ; μ_in(x), σ_in²) - ln N(φ; μ_out(x), σ_out²).

Each of the N is attacked in its turn with the help of the others. Beside it, the attack of whoever
trains nothing: one threshold on φ for all images.

Reported are the area under the curve of hits over false alarms (AUC: 0.5 is a coin) and the hits at
a false-alarm rate of 1 %: an attack that is sure of a few is worse than one that is a little right
about all. Positive control: an adapter overfitted to few images has to leak. Null control: with the
memberships shuffled, for the attacker as for the count, the same attack has to find nothing on
average of many shuffles. How far single shuffles are off is the error that an AUC has at the least:
adapters judge each other, so that their areas are not independent.

The same adapters, of the same images and seeds, are then trained with differential privacy, of
clients and of samples (`guarded.py`), and attacked alike.

*Source* LiRA: Carlini et al., "Membership Inference Attacks From First Principles", IEEE S&P 2022
(arXiv 2112.03570), the online attack; the threshold: Yeom et al., CSF 2018 (arXiv 1709.01604).
*Differs from source* variances are pooled over images, as the source does for few shadow models; an
image's mean leans on that of all where few adapters had it (a prior of one adapter). No image is
asked about in several augmented forms. Every adapter draws its half by itself: of halves balanced
for each image the others would tell what the one under attack had.
*Cost* 4·N trainings, N of them of gradients of single samples.
"""

from __future__ import annotations

import math
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Final

import numpy as np

from coordinator.job import Job
from coordinator.sections import (
    DataSection,
    JobSection,
    MethodSpec,
    TrainingSection,
)
from edge_runtime.keystream import repeatable_keystream
from edge_runtime.trainer import OnnxTrainer
from simulations.audits.audited import Audited
from simulations.audits.guarded import (
    DELTA,
    EPSILON,
    GUARDS,
    Guard,
    Guarded,
    noised,
)
from simulations.audits.shadows import Shadow, Trained, averaged
from simulations.benchmarks.figure import Figure, figure
from simulations.benchmarks.runs import labelled, set_up_with, signed_bundle
from simulations.datasets import Dataset
from simulations.errors import DataError
from simulations.progress import ProgressListener
from simulations.setup import load_job_data

FALSE_ALARMS: Final = 0.01
CONTROL_AUC: Final = 0.7
SHUFFLES: Final = 40
# Of the null control's mean AUC; by chance it is further off about once in 300 audits.
NULL_DEVIATIONS: Final = 3.0
# φ of cross-entropies below is not known in float32.
_LEAST_ENTROPY: Final = 1e-7


USUAL: Final = Trained(name="usual", pool=1_000, clients=10, rounds=5, local_epochs=2)
OVERFITTED: Final = Trained(name="overfitted", pool=200, clients=1, rounds=1, local_epochs=40)
SHADOWS: Final = 16
QUICK_SHADOWS: Final = 6


@dataclass(frozen=True, slots=True, kw_only=True)
class Leak:
    """What an attack on several adapters found; errors are standard errors of means over them."""

    auc: float
    auc_error: float
    hits: float  # at FALSE_ALARMS
    hits_error: float
    curve: tuple[np.ndarray, np.ndarray]  # false alarms and hits, all adapters together


def halves(adapters: int, pool: int, rng: np.random.Generator) -> np.ndarray:
    """Which images each adapter is trained on: bool [adapters, pool], half of every row."""
    chosen = np.zeros((adapters, pool), bool)
    for row in chosen:
        row[rng.permutation(pool)[: pool // 2]] = True
    return chosen


def logit_confidence(entropies: np.ndarray) -> np.ndarray:
    """φ = ln(p/(1 - p)) of cross-entropies -ln p, in nats, without forming p near 1."""
    known = np.maximum(np.asarray(entropies, np.float64), _LEAST_ENTROPY)
    return np.asarray(-known - np.log(-np.expm1(-known)))


def likelihood_ratios(phi: np.ndarray, members: np.ndarray) -> np.ndarray:
    """The scores of every image for every adapter, by the others: float64 [adapters, pool].

    Args:
        phi: [adapters, pool].
        members: bool [adapters, pool].

    Raises: ValueError for fewer than 4 adapters: no variance can be estimated.
    """
    if len(phi) < 4:
        raise ValueError(f"expected 4 adapters or more, found {len(phi)}")
    scores = np.empty(phi.shape)
    for target in range(len(phi)):
        others = np.delete(np.arange(len(phi)), target)
        values, inside = phi[others], members[others]
        densities = []
        for part in (inside, ~inside):
            counts = part.sum(axis=0)
            sums = np.where(part, values, 0.0).sum(axis=0)
            # How an image's value differs from its mean over all others, on average of the part.
            middle = values.mean(axis=0)
            lean = middle + (values - middle)[part].mean()
            means = (sums + lean) / (counts + 1)
            spread = np.square(values - means)[part].mean()
            densities.append(-0.5 * np.log(spread) - np.square(phi[target] - means) / (2 * spread))
        scores[target] = densities[0] - densities[1]
    return scores


def area_under_curve(scores: np.ndarray, members: np.ndarray) -> float:
    """The chance that a member scores above a non-member, equal scores counting half."""
    mine, others = scores[members], np.sort(scores[~members])
    below = np.searchsorted(others, mine, side="left") + np.searchsorted(others, mine, side="right")
    return float(below.mean() / (2 * len(others)))


def curve(scores: np.ndarray, members: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """False alarms and hits at every threshold, from the strictest to the laxest."""
    thresholds = np.unique(scores)[::-1]
    mine, others = np.sort(scores[members]), np.sort(scores[~members])
    hits = 1 - np.searchsorted(mine, thresholds, side="left") / len(mine)
    false = 1 - np.searchsorted(others, thresholds, side="left") / len(others)
    return false, hits


def hits_at(scores: np.ndarray, members: np.ndarray, rate: float = FALSE_ALARMS) -> float:
    """The most hits of a threshold with at most so many false alarms."""
    false, hits = curve(scores, members)
    allowed = hits[false <= rate + 1e-12]
    return float(allowed.max()) if len(allowed) else 0.0


def leak(scores: np.ndarray, members: np.ndarray, *, least_error: float = 0.0) -> Leak:
    """Over all adapters: scores and members [adapters, pool]; `least_error` of the AUC."""
    areas = [area_under_curve(*one) for one in zip(scores, members, strict=True)]
    hits = [hits_at(*one) for one in zip(scores, members, strict=True)]
    return Leak(
        auc=float(np.mean(areas)),
        auc_error=max(_error(areas), least_error),
        hits=float(np.mean(hits)),
        hits_error=_error(hits),
        curve=curve(scores.reshape(-1), members.reshape(-1)),
    )


def null_areas(
    phi: np.ndarray, members: np.ndarray, rng: np.random.Generator, *, times: int = SHUFFLES
) -> np.ndarray:
    """AUC of the attack with memberships that have nothing to do with the training: [times]."""
    found = []
    for _ in range(times):
        mixed = shuffled(members, rng)
        found.append(leak(likelihood_ratios(phi, mixed), mixed).auc)
    return np.array(found)


def shuffled(members: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """As many members for each adapter, drawn anew."""
    return np.stack([rng.permutation(row) for row in members])


def membership_audit(
    progress: ProgressListener,
    *,
    quick: bool = False,
    job: Job | None = None,
    usual: Trained = USUAL,
    overfitted: Trained = OVERFITTED,
    adapters: int | None = None,
    guards: Sequence[Guard] = GUARDS,
) -> Audited:
    """Adapters of a job, by default LoRA on private images, as usual and overfitted.

    The job says what is trained and how a client trains; clients and rounds are those of `usual`
    and `overfitted`. `guards` are the ways to train privately, as usual otherwise.
    Raises: DataError where there are fewer images than a pool asks for.
    """
    count = adapters or (QUICK_SHADOWS if quick else SHADOWS)
    if quick:
        usual = replace(usual, pool=min(usual.pool, 400), rounds=2)
        overfitted = replace(overfitted, pool=min(overfitted.pool, 60))
    rng = np.random.default_rng(0)
    found: dict[str, Leak] = {}
    words = {}
    progress.stage("membership: compiling the training step")
    job, dataset = _images(usual.pool) if job is None else (job, load_job_data(job))
    guarded = [guard(job, usual) for guard in guards]
    with tempfile.TemporaryDirectory() as folder:
        setup = set_up_with(job, dataset)
        trainer = OnnxTrainer(signed_bundle(setup, Path(folder) / "plain"), threads=1)
        for trained in (usual, overfitted):
            members = halves(count, trained.pool, rng)
            shadow = Shadow(trainer, dataset, trained, learning_rate=job.training.learning_rate)
            phi, accuracy = _trained(shadow, members, trained.name, progress)
            words[trained.name] = (
                f"{count} adapters of {job.method.name}, {trained.pool // 2} of {trained.pool} "
                f"images of {dataset.name} each over {trained.clients} clients, {trained.rounds} "
                f"rounds of {trained.local_epochs} passes; accuracy of the last {accuracy:.3f}"
            )
            areas = null_areas(phi, members, rng)
            error = float(areas.std(ddof=1))
            found[trained.name] = leak(likelihood_ratios(phi, members), members, least_error=error)
            if trained is usual:
                null, of_usual = areas, members
                found["threshold"] = leak(phi, members, least_error=error)
                mixed = shuffled(members, rng)
                found["shuffled"] = leak(likelihood_ratios(phi, mixed), mixed, least_error=error)
        for guard in guarded:
            progress.stage(f"membership: compiling the training step, private {guard.name}")
            setup = set_up_with(guard.job, dataset)
            bundle = signed_bundle(setup, Path(folder) / guard.name)
            shadow = Shadow(
                OnnxTrainer(bundle, threads=1, keystream=repeatable_keystream),
                dataset,
                usual,
                learning_rate=job.training.learning_rate,
                combine=noised(guard.job, bundle.manifest.trainable)
                if guard.job.privacy.is_private
                else averaged,
            )
            phi, accuracy = _trained(shadow, of_usual, f"private {guard.name}", progress)
            words[guard.name] = f"{guard.words}; accuracy of the last {accuracy:.3f}"
            error = float(null_areas(phi, of_usual, rng).std(ddof=1))
            scores = likelihood_ratios(phi, of_usual)
            found[guard.name] = leak(scores, of_usual, least_error=error)
    figures = membership_figures(found, null, words)
    for guard in guarded:
        figures += guarded_figures(guard, found[guard.name], words[guard.name])
    return Audited(
        figures=tuple(labelled(figures) if quick else figures),
        draw=lambda path: draw(found, path),
    )


def _trained(
    shadow: Shadow, members: np.ndarray, name: str, progress: ProgressListener
) -> tuple[np.ndarray, float]:
    """φ of every adapter for every image, [adapters, pool], and the last one's test accuracy."""
    phi, accuracy = np.empty(members.shape), 0.0
    for number, row in enumerate(members):
        progress.stage(f"membership: {name} adapter {number + 1} of {len(members)}")
        tensors = shadow.train(row, seed=number)
        phi[number] = logit_confidence(shadow.entropies(tensors))
        accuracy = shadow.accuracy(tensors)
    return phi, accuracy


def membership_figures(
    found: Mapping[str, Leak], null: np.ndarray, words: Mapping[str, str]
) -> list[Figure]:
    """What leaks, and whether the two controls are as they must be; `null` of `null_areas`."""
    usual, control, plain = found["usual"], found["overfitted"], found["threshold"]
    error = _error(null.tolist())
    away = abs(float(null.mean()) - 0.5) / error
    return [
        figure(
            "membership_auc",
            usual.auc,
            note=f"± {usual.auc_error:.3f}, 0.5 is a coin; one threshold for all images "
            f"{plain.auc:.3f} ± {plain.auc_error:.3f}; {words['usual']}",
        ),
        figure(
            "membership_tpr_at_fpr_1e2",
            usual.hits,
            note=f"± {usual.hits_error:.3f}, 0.01 is a coin; one threshold for all images "
            f"{plain.hits:.3f}",
        ),
        figure(
            "membership_auc_overfitted",
            control.auc,
            target=f">= {CONTROL_AUC}",
            note=f"± {control.auc_error:.3f}, positive control; {control.hits:.3f} ± "
            f"{control.hits_error:.3f} at 1 % false alarms; {words['overfitted']}",
        ),
        figure(
            "membership_auc_shuffled",
            away,
            unit="errors from 0.5",
            target=f"<= {NULL_DEVIATIONS:g}",
            note=f"null control: mean AUC {null.mean():.4f} ± {error:.4f} of {len(null)} shuffles",
        ),
    ]


def guarded_figures(guard: Guarded, leaked: Leak, words: str) -> list[Figure]:
    """What leaks of adapters that were trained privately, beside what may."""
    promise = f"epsilon = {EPSILON:g} at delta = {DELTA:g}"
    literal = min(math.exp(EPSILON) * FALSE_ALARMS + DELTA, 1.0)
    allowed = guard.allowed_hits(FALSE_ALARMS)
    return [
        figure(
            f"membership_auc_private_{guard.name}",
            leaked.auc,
            note=f"± {leaked.auc_error:.3f}; {promise} of {guard.name}, {words}",
        ),
        figure(
            f"membership_tpr_at_fpr_1e2_private_{guard.name}",
            leaked.hits,
            target=f"<= {allowed:.3f}",
            note=f"± {leaked.hits_error:.3f}; all that is promised of {guard.name} allows so many "
            f"where one image stands for another, {promise} alone {literal:.3g}",
        ),
    ]


def draw(found: Mapping[str, Leak], path: Path) -> None:
    """Hits over false alarms, on two logarithmic axes."""
    from matplotlib.figure import Figure as Canvas

    canvas = Canvas(figsize=(5.6, 4.6), layout="constrained")
    axes = canvas.add_subplot()
    names = {
        "usual": "as usual",
        "threshold": "as usual, one threshold",
        "overfitted": "overfitted",
        "clients": "private clients",
        "samples": "private samples",
        "shuffled": "memberships shuffled",
    }
    for name in [name for name in names if name in found]:
        false, hits = found[name].curve
        axes.plot(false, hits, label=f"{names[name]}: AUC {found[name].auc:.3f}")
    line = np.logspace(-4, 0, 50)
    axes.plot(line, line, color="black", linewidth=0.8, linestyle=":", label="a coin")
    axes.axvline(FALSE_ALARMS, color="grey", linewidth=0.6)
    axes.set_xscale("log")
    axes.set_yscale("log")
    axes.set_xlim(1e-3, 1)
    axes.set_ylim(1e-3, 1.1)
    axes.set_xlabel("false alarms: non-members taken for members")
    axes.set_ylabel("hits: members found")
    axes.legend(frameon=False, loc="lower right")
    canvas.savefig(path, dpi=150)


def _images(count: int) -> tuple[Job, Dataset]:
    """The job on Fashion-MNIST's private half, or on digits."""

    def load(name: str) -> tuple[Job, Dataset]:
        job = Job(
            job=JobSection(name="membership", seed=0),
            data=DataSection(
                dataset=name,
                clients=1,
                partition="iid",
                held_out=0.0,
                max_train_samples=count,
                max_test_samples=500,
            ),
            method=MethodSpec(name="lora", settings={"rank": 8, "alpha": 16.0}),
            training=TrainingSection(optimizer="adamw", learning_rate=3e-3, batch_size=8),
        )
        return job, load_job_data(job)

    try:
        return load("fashion-mnist")
    except DataError:
        return load("digits")


def _error(values: list[float]) -> float:
    return float(np.std(values, ddof=1) / np.sqrt(len(values)))
