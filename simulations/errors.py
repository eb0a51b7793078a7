# SPDX-License-Identifier: Apache-2.0
"""What can go wrong before or around a simulated run.

SimulationError
├── DataError        a data set is missing, empty, truncated or contradicts itself
├── PartitionError   a partition is unknown, has impossible settings or does not fit the data set
└── RunFolderError   a run directory belongs to another job

A client's own fault in a round is a `protocol.rejection.Rejection`, never one of these.
"""

from __future__ import annotations


class SimulationError(Exception):
    """Anything in this tree; the command line turns it into exit code 2."""


class DataError(SimulationError):
    """A data set cannot be used as it is; the message names the file and the mend."""


class PartitionError(SimulationError):
    """A partition cannot be made; the message names what is allowed."""


class RunFolderError(SimulationError):
    """A run directory cannot be gone on with; the message says what belongs to it."""
