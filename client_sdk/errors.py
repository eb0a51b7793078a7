# SPDX-License-Identifier: Apache-2.0
"""The errors of this package.

ClientError
├── MemoryFileError  what the client keeps between rounds cannot be read or written
├── PlanError        a plan that this client will not follow
├── SplitError       the server that holds a network's body refused, or could not be reached
└── TrainingError    the trainer gave something that is no update
"""

from __future__ import annotations


class ClientError(Exception):
    """Everything that this package raises on purpose."""


class MemoryFileError(ClientError):
    """A file that the client keeps between rounds cannot be read or written."""


class PlanError(ClientError):
    """The plan is not for this client, this job, or cannot be read."""


class SplitError(ClientError):
    """The server that holds the body refused a message, broke off, or could not be reached."""


class TrainingError(ClientError):
    """What was trained does not fit the job's ParamSpec, or is not finite."""
