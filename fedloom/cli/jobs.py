# SPDX-License-Identifier: Apache-2.0
"""Jobs of a deployment: `fedloom coordinator submit`, `status`, `logs`, `stop` and `resume`."""

from __future__ import annotations

import json
import time
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Final

import typer

from fedloom.cli.plain import PlainCommand
from fedloom.cli.simulate import job_overrides
from fedloom.errors import FAILED, UsageError

if TYPE_CHECKING:
    from coordinator.deployment import Deployment
    from coordinator.job import Job
    from coordinator.jobs.registry import JobEntry
    from coordinator.jobs.submit import OwnData

_LOOK_S: Final = 0.5
_LOG_BYTES: Final = 64 << 10  # of a log's end

_Folder = Annotated[Path, typer.Argument(metavar="DIR", help="The deployment's folder.")]
_Name = Annotated[
    str, typer.Option("--job", metavar="NAME", help="Which one (default: the latest submitted).")
]
_Json = Annotated[bool, typer.Option("--json", help="Print JSON.")]


def add_commands(app: typer.Typer) -> None:
    """The commands of this module, as commands of `app`."""
    for command in (submit, status, logs, stop, resume):
        app.command(cls=PlainCommand)(command)


def submit(
    folder: _Folder,
    job: Annotated[Path, typer.Argument(metavar="JOB.toml", help="The job file.")],
    name: Annotated[str, typer.Option(help="What to call it (default: the job's own name).")] = "",
    dataset: Annotated[
        str | None, typer.Option(help="As in simulate: class names, and samples to test on here.")
    ] = None,
    seed: Annotated[int | None, typer.Option(help="Decides every random choice.")] = None,
    settings: Annotated[
        list[str] | None,
        typer.Option("--set", metavar="SECTION.KEY=VALUE", help="Change any key of the job."),
    ] = None,
    follow: Annotated[
        bool, typer.Option("--follow", help="Show its rounds, until it has ended.")
    ] = False,
) -> None:
    """Compile and sign the job JOB.toml, and have the deployment in DIR play it."""
    from coordinator.deployment import Deployment
    from coordinator.job import load_job

    loaded = load_job(job, [*job_overrides(dataset=dataset, seed=seed), *(settings or [])])
    with Deployment(folder) as deployment:
        # Only now, as it takes seconds to load: a wrong job file is told at once.
        from coordinator.jobs.submit import submit as enter

        entry = enter(
            deployment, loaded, _own_data(loaded), name=name,
            stage=lambda what: typer.echo(what, err=True),
        )  # fmt: skip
        typer.echo(f"job          {entry.name}")
        typer.echo(f"hash         {entry.hash}")
        typer.echo(f"folder       {deployment.jobs_folder / entry.name}")
        if follow:
            _follow(deployment, entry.name)
        else:
            typer.echo(f"next         fedloom coordinator status {folder} --follow")


def status(
    folder: _Folder,
    name: _Name = "",
    follow: Annotated[
        bool, typer.Option("--follow", help="Show the rounds of one job, until it has ended.")
    ] = False,
    as_json: _Json = False,
) -> None:
    """Say what the jobs in DIR are doing, and why one waits."""
    from coordinator.deployment import Deployment

    with Deployment(folder) as deployment:
        entries = deployment.jobs.all()
        if name:
            entries = [deployment.jobs.named(name)]
        if follow:
            _follow(deployment, _chosen(deployment, name).name)
        elif as_json:
            typer.echo(json.dumps([_described(deployment, entry) for entry in entries], indent=2))
        elif not entries:
            typer.echo(f"no job yet; next: fedloom coordinator submit {folder} JOB.toml")
        else:
            typer.echo("\n".join(_lines(_described(deployment, entry)) for entry in entries))


def logs(folder: _Folder, name: _Name = "") -> None:
    """Print the end of a job's log."""
    from coordinator.deployment import Deployment
    from coordinator.jobs.folder import JobFolder

    with Deployment(folder) as deployment:
        path = JobFolder(deployment.jobs_folder / _chosen(deployment, name).name).log
    if not path.exists():
        raise UsageError(f"{path}: nothing was logged yet")
    with path.open("rb") as file:
        file.seek(max(0, file.seek(0, 2) - _LOG_BYTES))
        typer.echo(file.read().decode("utf-8", "replace"), nl=False)


def stop(folder: _Folder, name: _Name = "") -> None:
    """Stop a job; what its journal holds stays, and `resume` goes on from there."""
    from coordinator.deployment import Deployment

    with Deployment(folder) as deployment:
        entry = _chosen(deployment, name)
        changed = deployment.jobs.stop(entry.name)
    typer.echo(f"{entry.name}: {'is stopped' if changed else 'was stopped before'}")


def resume(folder: _Folder, name: _Name = "") -> None:
    """Go on with a job that was stopped, or that failed."""
    from coordinator.deployment import Deployment

    with Deployment(folder) as deployment:
        entry = _chosen(deployment, name)
        changed = deployment.jobs.resume(entry.name)
    typer.echo(f"{entry.name}: {'goes on' if changed else 'is going on already'}")


def _own_data(job: Job) -> OwnData:
    from coordinator.jobs.submit import OwnData
    from simulations.clients import apart
    from simulations.setup import load_job_data

    if job.data.classes:
        return OwnData(name="the devices' own", class_names=job.data.class_names)
    dataset = load_job_data(job)
    test, validation = apart(dataset.test, job.data.validation, job.job.seed)
    return OwnData(
        name=dataset.name, class_names=dataset.class_names, test=test, validation=validation
    )


def _chosen(deployment: Deployment, name: str) -> JobEntry:
    """The job called so, or the latest. Raises: DeploymentError, UsageError."""
    if name:
        return deployment.jobs.named(name)
    entries = deployment.jobs.all()
    if not entries:
        raise UsageError(
            f"no job yet; submit one with: fedloom coordinator submit {deployment.folder} JOB.toml"
        )
    return entries[-1]


def _described(deployment: Deployment, entry: JobEntry) -> dict[str, Any]:
    from coordinator.jobs.folder import JobFolder

    folder = JobFolder(deployment.jobs_folder / entry.name)
    state = asdict(folder.state())
    doing = state.pop("doing")
    if entry.outcome:
        doing = str(entry.outcome)
    elif not entry.wanted:
        doing = "stopped" if not folder.is_played() else "stopping"
    elif doing in ("stopped", "failed", "finished"):
        doing = "queued"  # it is wanted again, and has not begun yet
    return {
        "name": entry.name,
        "doing": doing,
        "hash": entry.hash,
        "submitted": entry.submitted,
        "ended": entry.ended,
        "starts": entry.starts,
        "folder": str(folder.path),
        **state,
        "why": entry.reason or state["why"],
    }


def _lines(job: dict[str, Any]) -> str:
    """A job in a few lines."""
    from reports.units import privacy_words

    where = f", round {job['round']} of {job['rounds']}" if job["rounds"] else ""
    lines = [f"{job['name']}: {job['doing']}{where}"]
    if job["why"]:
        lines.append(f"  {job['why']}")
    if spent := privacy_words(job["privacy"]):
        lines.append(f"  {spent}")
    if job["doing"] == "training":
        late = [name for name in job["asked"] if name not in job["answered"]]
        lines.append(f"  {len(job['answered'])} of {len(job['asked'])} devices have answered")
        if late:
            lines.append(f"  at work: {', '.join(late)}")
    lines += [f"  {device}: {reason}" for device, reason in job["not_asked"].items()]
    if job["doing"] == "finished":
        lines.append(f"  report: {Path(job['folder']) / 'report.html'}")
    return "\n".join(lines)


def _follow(deployment: Deployment, name: str) -> None:
    """Rounds as they come, until the job has ended or is stopped. Raises: typer.Exit."""
    from coordinator.job import load_job
    from coordinator.jobs.folder import JobFolder
    from fedloom.progress import progress_on

    folder = JobFolder(deployment.jobs_folder / name)
    shown, told = 0, ""
    with progress_on() as progress:
        rounds = load_job(folder.job).rounds.count
        progress.start(rounds, len(deployment.enrolment.devices.members_by_node()))
        while True:
            job = _described(deployment, deployment.jobs.named(name))
            for report in _reports(folder, job["hash"])[shown:]:
                progress.round(report)
                shown += 1
            now = _lines(job) if job["why"] else job["doing"]
            if now != told and job["doing"] != "asking":
                progress.stage(now)
                told = now
            if job["doing"] in ("finished", "failed", "stopped"):
                break
            time.sleep(_LOOK_S)
    typer.echo(_lines(job))
    if job["doing"] != "finished":
        raise typer.Exit(FAILED)


def _reports(folder: Any, digest: str) -> list[Any]:
    """Of the rounds that are committed."""
    from coordinator.journal import Journal
    from coordinator.reports import RoundReport

    if not folder.journal.exists():
        return []
    with Journal(folder.journal) as journal:
        return [RoundReport.from_json(row) for row in journal.reports(digest)]
