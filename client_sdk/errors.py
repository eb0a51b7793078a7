# SPDX-License-Identifier: Apache-2.0
"""The errors of this package.

ClientError
├── MemoryFileError  what the client keeps between rounds cannot be read or written
├── PlanError        a plan that this client will not follow
└── TrainingError    the trainer gave something that is no update
"""

from __future__ import annotations


class ClientError(Exception):
    """Everything that this package raises on purpose."""


class MemoryFileError(ClientError):
    """A file that the client keeps between rounds cannot be read or written."""


class PlanError(ClientError):
    """The plan is not for this client, this job, or cannot be read."""


class TrainingError(ClientError):
    """What was trained does not fit the job's ParamSpec, or is not finite."""
