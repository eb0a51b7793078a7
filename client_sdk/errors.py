# SPDX-License-Identifier: Apache-2.0
"""The errors of this package.

ClientError
├── IdentityError    the device's key, certificate or folder cannot be used, or an answer not taken
│   ├── IdentityChangedError  the coordinator is not the one that the device enrolled with
│   └── RefusedError          the coordinator refused to enrol or renew; `.code` says why
├── MemoryFileError  what the client keeps between rounds cannot be read or written
├── PlanError        a plan that this client will not follow
├── SplitError       the server that holds a network's body refused, or could not be reached
└── TrainingError    the trainer gave something that is no update
"""

from __future__ import annotations

from protocol.enrolment import Refusal, RefusalCode


class ClientError(Exception):
    """Everything that this package raises on purpose."""


class IdentityError(ClientError):
    """The device's key, certificate or folder cannot be used, or an answer cannot be taken."""


class IdentityChangedError(IdentityError):
    """The coordinator's authority or signing key is another than the one that was pinned."""


class RefusedError(IdentityError):
    """The coordinator refused to enrol this device, or to renew its certificate."""

    def __init__(self, refusal: Refusal) -> None:
        super().__init__(f"the coordinator refused: {refusal}")
        self.code: RefusalCode = refusal.code


class MemoryFileError(ClientError):
    """A file that the client keeps between rounds cannot be read or written."""


class PlanError(ClientError):
    """The plan is not for this client, this job, or cannot be read."""


class SplitError(ClientError):
    """The server that holds the body refused a message, broke off, or could not be reached."""


class TrainingError(ClientError):
    """What was trained does not fit the job's ParamSpec, or is not finite."""
