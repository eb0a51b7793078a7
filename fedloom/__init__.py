# SPDX-License-Identifier: Apache-2.0
"""The facade: the few names that callers need, imported when first used.

`import fedloom` costs nothing; `fedloom.simulate` imports what a simulation needs, `fedloom.
OnnxTrainer` only what a device needs. Everything else is an implementation detail of the packages
beside this one.
"""

from __future__ import annotations

from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from coordinator.errors import JobError as JobError
    from coordinator.job import Job as Job
    from coordinator.job import dump_job as dump_job
    from coordinator.job import load_job as load_job
    from edge_runtime.adapter import Adapter as Adapter
    from edge_runtime.adapter import read_adapter as read_adapter
    from edge_runtime.bundle import Bundle as Bundle
    from edge_runtime.bundle import open_bundle as open_bundle
    from edge_runtime.errors import BundleError as BundleError
    from edge_runtime.predictor import Predictor as Predictor
    from edge_runtime.trainer import OnnxTrainer as OnnxTrainer
    from reports.report import write_report as write_report
    from simulations.progress import ProgressListener as ProgressListener
    from simulations.progress import SilentProgress as SilentProgress
    from simulations.run import build_bundle as build_bundle
    from simulations.run import simulate as simulate

__version__ = "0.1.0"

# public name -> (module, name there)
_HOMES = {
    "Adapter": ("edge_runtime.adapter", "Adapter"),
    "Bundle": ("edge_runtime.bundle", "Bundle"),
    "BundleError": ("edge_runtime.errors", "BundleError"),
    "Job": ("coordinator.job", "Job"),
    "JobError": ("coordinator.errors", "JobError"),
    "OnnxTrainer": ("edge_runtime.trainer", "OnnxTrainer"),
    "Predictor": ("edge_runtime.predictor", "Predictor"),
    "ProgressListener": ("simulations.progress", "ProgressListener"),
    "SilentProgress": ("simulations.progress", "SilentProgress"),
    "build_bundle": ("simulations.run", "build_bundle"),
    "dump_job": ("coordinator.job", "dump_job"),
    "load_job": ("coordinator.job", "load_job"),
    "open_bundle": ("edge_runtime.bundle", "open_bundle"),
    "read_adapter": ("edge_runtime.adapter", "read_adapter"),
    "simulate": ("simulations.run", "simulate"),
    "write_report": ("reports.report", "write_report"),
}

__all__ = [*sorted(_HOMES), "__version__"]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'fedloom' has no attribute {name!r}; it has {__all__}")
    module_name, attribute = _HOMES[name]
    _check_owner(module_name.partition(".")[0])
    value = getattr(import_module(module_name), attribute)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted(__all__)


def _check_owner(package: str) -> None:
    # Names such as `protocol` are common. pip lets a second distribution install over them
    # without a word, so say it here rather than fail somewhere inside.
    found = Path(import_module(package).__file__ or "").resolve().parent
    ours = Path(__file__).resolve().parent.parent / package
    if found != ours:
        raise ImportError(
            f"the package {package!r} that Python found in {found} is not fedloom's, which is in "
            f"{ours}: uninstall the other distribution, or remove its folder from the Python path"
        )
