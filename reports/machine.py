# SPDX-License-Identifier: Apache-2.0
"""What a result was made with: the machine in a few words and the versions that decide results."""

from __future__ import annotations

import os
import platform
import sys
from importlib import metadata
from pathlib import Path

# Order is the order of reports; what is not installed is left out.
DISTRIBUTIONS = (
    "fedloom",
    "numpy",
    "torch",
    "transformers",
    "peft",
    "onnx",
    "onnxscript",
    "onnxruntime",
    "flwr",
    "ray",
    "scikit-learn",
    "safetensors",
    "cryptography",
)


def versions() -> dict[str, str]:
    """Python and the installed distributions of `DISTRIBUTIONS`, without importing any of them."""
    found = {"python": platform.python_version()}
    for name in DISTRIBUTIONS:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return found


def machine() -> dict[str, str | int | float]:
    """Processor, usable cores, memory in GiB, system and, if torch is loaded already, the GPU."""
    found: dict[str, str | int | float] = {
        "processor": _processor(),
        "cores": usable_cores(),
        "memory_gib": round(_memory_bytes() / 2**30, 1),
        "system": f"{platform.system()} {platform.release()}",
    }
    torch = sys.modules.get("torch")
    if torch is not None and torch.cuda.is_available():
        found["gpu"] = torch.cuda.get_device_name(0)
    return found


def usable_cores() -> int:
    """Cores that this process may use, which containers make fewer than the machine has."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def _processor() -> str:
    # platform.processor() is empty on most Linux systems.
    try:
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()


def _memory_bytes() -> int:
    try:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (AttributeError, OSError, ValueError):
        return 0
