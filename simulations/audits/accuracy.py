# SPDX-License-Identifier: Apache-2.0
"""What a privacy budget costs in accuracy: a private job by three methods, with noise and without.

A job of `[privacy]` is played with SSF, LoRA and LoRA whose A stands still, each over several
seeds, and each beside the same job without `[privacy]`. A seed decides the data, their partition,
who is drawn, the start and the noise; methods are compared seed by seed.

The best of the three is named by a rule that does not take chance for a difference. Let a be the
accuracies over seeds, and `top` the method with the highest mean. Its lead on a method m,

    lead(m) = mean(a_top - a_m),   decided if lead(m) > t·sd(a_top - a_m)/√seeds,

is decided where an interval of 95 % does not reach 0; t is Student's 97.5 % quantile with seeds - 1
degrees of freedom. Of `top` and all on which its lead is not decided, the one whose clients sent
least is named. One seed decides nothing.

Runs are folders of `simulate`: one that is finished and of the same job is read, one that was cut
off goes on from its journal.

*Source* Student, "The Probable Error of a Mean", Biometrika 6 (1908): paired differences.
*Differs from source* Seeds are few and accuracies are shares of one test part, so that intervals
are approximate; they are of one pair each, and nothing is corrected for there being two.
*Cost* six runs a seed.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import mean, stdev
from typing import Final

from coordinator.errors import Fault, JobError
from coordinator.job import Job, load_job
from coordinator.privacy_section import PrivacySection
from coordinator.sections import (
    AggregationSection,
    DataSection,
    JobSection,
    MethodSpec,
    RoundsSection,
    TrainingSection,
    UpdateSection,
)
from reports.run_record import RunRecord, is_run, read_run
from reports.units import bytes_text
from simulations.audits.audited import Audited
from simulations.benchmarks.figure import Figure, figure
from simulations.benchmarks.runs import labelled
from simulations.errors import SimulationError
from simulations.progress import ProgressListener
from simulations.run import JOB_FILE, simulate

SEEDS: Final = 3
QUICK_SEEDS: Final = 2
CONFIDENCE: Final = 0.95


@dataclass(frozen=True, slots=True, kw_only=True)
class Arm:
    """A method that is compared."""

    key: str  # in names of figures and folders
    name: str
    method: MethodSpec
    factors: str = "both"


ARMS: Final = (
    Arm(key="ssf", name="SSF", method=MethodSpec(name="ssf")),
    Arm(key="lora", name="LoRA", method=MethodSpec(name="lora")),
    Arm(key="lora_up", name="LoRA, A frozen", method=MethodSpec(name="lora"), factors="up"),
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Runs:
    """One arm's runs, private or not, in the order of seeds."""

    accuracies: tuple[float, ...]
    uplink_bytes: tuple[int, ...]
    curves: tuple[tuple[tuple[int, float], ...], ...]  # rounds and accuracies of each
    epsilons: tuple[float, ...]  # spent by each; () without privacy

    @property
    def accuracy(self) -> float:
        """Mean over seeds."""
        return mean(self.accuracies)

    @property
    def sent(self) -> float:
        """Bytes that clients sent, mean over seeds."""
        return mean(self.uplink_bytes)


@dataclass(frozen=True, slots=True, kw_only=True)
class Choice:
    """The arm that is named, and what it was chosen from."""

    named: str
    highest: str
    level: tuple[str, ...]
    """Arms that the seeds do not tell from the highest, itself among them, in their order."""

    @property
    def decided(self) -> bool:
        """Whether the seeds tell the highest from all others."""
        return len(self.level) == 1


def private_job(*, quick: bool = False) -> Job:
    """The job of examples/fashion-private-ssf.toml; `quick`: fewer clients, rounds and images."""
    clients = 20 if quick else 100
    return Job(
        job=JobSection(name="private-accuracy", seed=0),
        data=DataSection(
            dataset="fashion-mnist",
            clients=clients,
            partition="dirichlet:1.0",
            max_train_samples=20 * clients,
            max_test_samples=200 if quick else 1000,
            held_out=0.0,
        ),
        method=ARMS[0].method,
        training=TrainingSection(optimizer="sgd", learning_rate=0.02, batch_size=8),
        update=UpdateSection(codec="float32", metrics=""),
        aggregation=AggregationSection(weighting="uniform"),
        rounds=RoundsSection(count=3 if quick else 10, clients_per_round=clients // 2),
        privacy=PrivacySection(
            mode="central", epsilon=8.0, delta=1e-5, clip=0.1, clip_quantile=0.5
        ),
    )


def accuracy_audit(
    progress: ProgressListener,
    *,
    out: Path,
    job: Job | None = None,
    seeds: int | None = None,
    quick: bool = False,
) -> Audited:
    """Play what `out`/runs does not hold yet, and compare.

    Args:
        out: a folder, which may be that of an audit of the same job that was cut off.
        job: a private one, whose method, factors and seed give way to those compared.
        seeds: how many, from 0 on.

    Raises:
        JobError: the job is not private, or does not go with one of the methods.
        RunFolderError: `out` holds runs of another job.
        DataError, BackboneError: as `simulate`.
    """
    base = job or private_job(quick=quick)
    if not base.privacy.is_private:
        words = 'expected a job whose clients are private, e.g. "central"'
        raise JobError([Fault(key="privacy.mode", value=base.privacy.mode, allowed=words)])
    count = seeds or (QUICK_SEEDS if quick else SEEDS)
    # All jobs are made before the first one runs, so that one that cannot be costs nothing.
    jobs = {
        (arm.key, private): [
            variant(base, arm, private=private, seed=seed) for seed in range(count)
        ]
        for arm in ARMS
        for private in (True, False)
    }
    total, number = count * len(jobs), 0
    records: dict[tuple[str, bool], list[RunRecord]] = {key: [] for key in jobs}
    for seed in range(count):
        for (key, private), of_seeds in jobs.items():
            number += 1
            folder = out / "runs" / f"{key}-{'private' if private else 'plain'}-{seed}"
            progress.stage(f"accuracy: run {number} of {total}, {folder.name}")
            records[key, private].append(played(of_seeds[seed], folder, progress))
    found = {key: gathered(of_seeds) for key, of_seeds in records.items()}
    figures = accuracy_figures(found, base)
    return Audited(
        figures=tuple(labelled(figures) if quick else figures),
        draw=lambda path: draw(found, path),
    )


def variant(base: Job, arm: Arm, *, private: bool, seed: int) -> Job:
    """The job by a method, with or without its `[privacy]`."""
    return replace(
        base,
        job=replace(base.job, seed=seed),
        method=arm.method,
        aggregation=replace(base.aggregation, factors=arm.factors),
        privacy=base.privacy if private else PrivacySection(),
    )


def played(job: Job, folder: Path, progress: ProgressListener) -> RunRecord:
    """The run of a job in its folder: read if it is finished, begun or gone on with if not.

    Raises: as `simulate`.
    """
    if not (is_run(folder) and load_job(folder / JOB_FILE).hash() == job.hash()):
        simulate(job, folder, progress=progress)
    return read_run(folder)


def gathered(records: Sequence[RunRecord]) -> Runs:
    """One arm's runs. Raises: SimulationError for one without an accuracy."""
    for record in records:
        if record.summary["accuracy"] is None:
            raise SimulationError(
                f"{record.folder}: expected an accuracy of the last round, and its test gave none; "
                "remove the folder and start again, or choose another job"
            )
    private = [record.summary.get("privacy") or {} for record in records]
    return Runs(
        accuracies=tuple(float(record.summary["accuracy"]) for record in records),
        uplink_bytes=tuple(int(record.summary["uplink_bytes"]) for record in records),
        curves=tuple(
            tuple((line.round, line.accuracy or 0.0) for line, _ in record.evaluated())
            for record in records
        ),
        epsilons=tuple(float(one["epsilon"]) for one in private if one),
    )


def chosen(private: Mapping[str, Runs]) -> Choice:
    """Of private arms by name, the one that the module's rule names."""
    highest = max(private, key=lambda name: private[name].accuracy)
    level = tuple(
        name
        for name, runs in private.items()
        if name == highest or not leads(private[highest].accuracies, runs.accuracies)
    )
    named = min(level, key=lambda name: private[name].sent)
    return Choice(named=named, highest=highest, level=level)


def leads(first: Sequence[float], second: Sequence[float]) -> bool:
    """Whether the first is ahead of the second, seed by seed, by more than chance explains."""
    from scipy.special import stdtrit

    gaps = [a - b for a, b in zip(first, second, strict=True)]
    if len(gaps) < 2:
        return False
    quantile = float(stdtrit(len(gaps) - 1, 0.5 + CONFIDENCE / 2))
    return mean(gaps) > quantile * stdev(gaps) / math.sqrt(len(gaps))


def accuracy_figures(found: Mapping[tuple[str, bool], Runs], job: Job) -> list[Figure]:
    """The named arm first, then each arm with privacy, without, and what its clients sent."""
    names = {arm.key: arm.name for arm in ARMS}
    choice = chosen({arm.key: found[arm.key, True] for arm in ARMS})
    best = found[choice.named, True]
    section = job.privacy
    figures = [
        figure(
            "private_accuracy",
            best.accuracy,
            note=f"{names[choice.named]}{_spread(best)}, {choice_words(choice, names)}; "
            f"{job.data.dataset}, {job.data.clients} clients, {job.rounds.count} rounds",
        )
    ]
    for arm in ARMS:
        noised, plain = found[arm.key, True], found[arm.key, False]
        cost = 100 * (plain.accuracy - noised.accuracy)
        figures += [
            figure(
                f"private_accuracy_{arm.key}",
                noised.accuracy,
                note=f"{arm.name}{_spread(noised)}, {cost:.1f} points below the same without "
                f"privacy, {plain.accuracy:.4f}{_spread(plain)}",
            ),
            figure(
                f"private_uplink_{arm.key}",
                noised.sent / 1e6,
                unit="MB",
                note=f"{arm.name}, sent by clients in all rounds; {bytes_text(plain.sent)} without "
                "privacy",
            ),
        ]
    spent = max(epsilon for arm in ARMS for epsilon in found[arm.key, True].epsilons)
    target = f"<= {section.epsilon:g}" if section.epsilon else ""
    words = f"most that a run spent, at delta = {section.delta:g}"
    return [*figures, figure("private_epsilon", spent, target=target, note=words)]


def choice_words(choice: Choice, names: Mapping[str, str]) -> str:
    """How an arm came to be named."""
    if choice.decided:
        return f"ahead of the others with {CONFIDENCE:.0%} confidence"
    others = " and ".join(names[name] for name in choice.level if name != choice.named)
    return f"sends least of those that the seeds do not tell apart: the others are {others}"


def draw(found: Mapping[tuple[str, bool], Runs], path: Path) -> None:
    """Accuracy over rounds, and at the end over what clients sent: means, and a dot a seed."""
    from matplotlib.figure import Figure as Canvas
    from matplotlib.ticker import MaxNLocator

    canvas = Canvas(figsize=(8.4, 3.8), layout="constrained")
    over_rounds, at_end = canvas.subplots(1, 2)
    for place, arm in enumerate(ARMS):
        colour = f"C{place}"
        for private in (True, False):
            runs = found[arm.key, private]
            label = arm.name + ("" if private else ", without privacy")
            line = {"color": colour, "linestyle": "-" if private else ":"}
            rounds = [number for number, _ in runs.curves[0]]
            points = [[value for _, value in curve] for curve in runs.curves]
            over_rounds.plot(
                rounds, [mean(column) for column in zip(*points, strict=True)], label=label, **line
            )
            face = colour if private else "white"
            megabytes = [count / 1e6 for count in runs.uplink_bytes]
            at_end.plot(megabytes, runs.accuracies, "o", color=colour, mfc=face, ms=4, alpha=0.6)
            marker = {"marker": "D", "color": colour, "mfc": face, "ms": 8}
            at_end.plot([runs.sent / 1e6], [runs.accuracy], linestyle="none", **marker)
    over_rounds.xaxis.set_major_locator(MaxNLocator(integer=True))
    over_rounds.set_xlabel("round")
    over_rounds.set_ylabel("accuracy, mean over seeds")
    over_rounds.legend(frameon=False, loc="lower right")
    at_end.set_xlabel("MB sent by clients, all rounds")
    at_end.set_ylabel("accuracy after the last round")
    at_end.set_title("large: mean; hollow: without privacy", fontsize="medium")
    canvas.savefig(path, dpi=150)


def _spread(runs: Runs) -> str:
    if len(runs.accuracies) < 2:
        return ", one seed"
    return f" ± {stdev(runs.accuracies):.4f} over {len(runs.accuracies)} seeds"
