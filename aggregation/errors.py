# SPDX-License-Identifier: Apache-2.0
"""What can be wrong with encoded tensors, with what is merged, or with what is to stay private.

AggregationError (ValueError)
├── CodecError                  bytes or tensors that a codec refuses; `.code` is a RejectionCode
│   ├── PayloadTruncatedError   E201
│   ├── PayloadTooLongError     E202  also: decodes to more memory than the limit
│   ├── SpecMismatchError       E203  tensors that do not fit the spec, or are not float32
│   ├── PayloadNotFiniteError   E204
│   ├── UnknownCodecError       E209
│   └── PayloadMalformedError   E211
├── MergeError                  updates, weights or settings that cannot be merged
├── SecureSumError              settings of a secure sum that cannot be met, or values outside them
│   └── SecureMessageError      bytes that are no message of a secure sum
└── PrivacyError                a privacy setting that cannot be met
    └── BudgetError             a release that the budget does not cover
"""

from __future__ import annotations

from typing import ClassVar

from protocol.rejection import RejectionCode


class AggregationError(ValueError):
    """Root of this package's errors."""


class CodecError(AggregationError):
    """Bytes or tensors that a codec refuses."""

    code: ClassVar[RejectionCode] = RejectionCode.MALFORMED


class PayloadTruncatedError(CodecError):
    """Fewer bytes than the spec says."""

    code = RejectionCode.TRUNCATED


class PayloadTooLongError(CodecError):
    """More bytes than the spec says, or more memory than the limit."""

    code = RejectionCode.TOO_LONG


class SpecMismatchError(CodecError):
    """Tensors that do not fit the spec, or that no codec carries."""

    code = RejectionCode.WRONG_SPEC


class PayloadNotFiniteError(CodecError):
    """NaN or infinite values, or values that would become so."""

    code = RejectionCode.NOT_FINITE


class UnknownCodecError(CodecError):
    """A codec name that this release does not know."""

    code = RejectionCode.WRONG_CODEC


class PayloadMalformedError(CodecError):
    """Bytes of the right length that no encoder writes."""

    code = RejectionCode.MALFORMED


class MergeError(AggregationError):
    """Updates, weights or settings that cannot be merged."""


class SecureSumError(AggregationError):
    """Settings of a secure sum that cannot be met, or values outside them."""


class SecureMessageError(SecureSumError):
    """Bytes that are no message of a secure sum, or no state of one."""


class PrivacyError(AggregationError):
    """A privacy setting that cannot be met, or values that a mechanism cannot take."""


class BudgetError(PrivacyError):
    """A release that the budget does not cover; nothing has been released."""
