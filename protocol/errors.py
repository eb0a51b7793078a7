# SPDX-License-Identifier: Apache-2.0
"""What can be wrong with bytes from the network, a manifest or a key.

ProtocolError (ValueError)
├── SpecError              a ParamSpec that cannot be, or tensors that do not fit one
├── ContainerError         an update or plan container; `.code` is its RejectionCode
│   ├── TruncatedError     E201
│   ├── TooLongError       E202
│   ├── NotFiniteError     E204  a metric or setting that is NaN or infinite
│   ├── WeightError        E208  a sample count outside what is allowed
│   ├── MalformedError     E211  magic, lengths, header text or header values
│   ├── VersionError       E212
│   └── ChecksumError      E213
├── ManifestError          manifest.json, and the files that it names
└── SignatureError         a signature, a public key or a key file
"""

from __future__ import annotations

from typing import ClassVar

from protocol.rejection import RejectionCode


class ProtocolError(ValueError):
    """Root of this package's errors."""


class SpecError(ProtocolError):
    """A ParamSpec that cannot be, or tensors that do not fit one."""

    code: ClassVar[RejectionCode] = RejectionCode.WRONG_SPEC


class ContainerError(ProtocolError):
    """An update or plan container that cannot be accepted."""

    code: ClassVar[RejectionCode] = RejectionCode.MALFORMED


class TruncatedError(ContainerError):
    """Ends before its own lengths say."""

    code = RejectionCode.TRUNCATED


class TooLongError(ContainerError):
    """Longer than its own lengths say, or than the reader allows."""

    code = RejectionCode.TOO_LONG


class NotFiniteError(ContainerError):
    """A header value that is NaN or infinite."""

    code = RejectionCode.NOT_FINITE


class WeightError(ContainerError):
    """A sample count outside what is allowed."""

    code = RejectionCode.BAD_WEIGHT


class MalformedError(ContainerError):
    """Not a container of this kind, or a header that cannot be read."""

    code = RejectionCode.MALFORMED


class VersionError(ContainerError):
    """A container of a version that this program does not read."""

    code = RejectionCode.WRONG_VERSION


class ChecksumError(ContainerError):
    """Bytes changed between writer and reader."""

    code = RejectionCode.CORRUPTED


class ManifestError(ProtocolError):
    """A manifest, or a file that it names, is not as it must be."""


class SignatureError(ProtocolError):
    """A signature, a public key or a key file is not as it must be."""
