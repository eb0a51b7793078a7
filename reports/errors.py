# SPDX-License-Identifier: Apache-2.0
"""What can go wrong when a run is shown.

ReportError
└── RunRecordError   a folder is not a finished run, or a file in it is damaged
"""

from __future__ import annotations


class ReportError(Exception):
    """Anything in this tree; the command line turns it into exit code 2."""


class RunRecordError(ReportError):
    """A folder is not a finished run; the message names the file and what is wrong with it."""
