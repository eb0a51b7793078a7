# SPDX-License-Identifier: Apache-2.0
"""What a device and the enrolment authority say to each other, each message one canonical JSON.

    device                                  coordinator
    enrol   token, CSR, what it can do   →
                                         ←  enrolled  name, certificate, authority, signing key
    renew   certificate, CSR, time,
            signed by the current key    →
                                         ←  enrolled
                                         ←  refused   code and reason, in place of either

A CSR proves by its own signature that its sender has the key; its subject and extensions are not
read. `enrolled` is signed by the authority that the device was told to trust, so that what it pins
does not rest on the transport.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Any, Final, Literal, TypeVar

from protocol import _checks, _json
from protocol.container import require_canonical
from protocol.errors import MalformedError, TooLongError, VersionError
from protocol.keys import MAX_SIGNATURE_BYTES
from protocol.limits import (
    MAX_CLIENT_LENGTH,
    MAX_ENROLMENT_BYTES,
    MAX_FACT_LENGTH,
    MAX_FACTS,
    MAX_REASON_LENGTH,
    MAX_UNIX_TIME,
)
from protocol.rejection import displayable

ENROLMENT_VERSION: Final = 1
TOKEN_DIGITS: Final = 64  # hex digits: 256 random bits

_RENEWAL_CONTEXT: Final = b"fedloom renewal\0"
_ANSWER_CONTEXT: Final = b"fedloom enrolled\0"
_NODE_CONTEXT: Final = b"fedloom node key\0"
_MAX_SAFE: Final = 2**53  # integers that every JSON reader takes as they are


class RefusalCode(StrEnum):
    """Why a request was refused. Codes are never renumbered; new ones are added at the end."""

    MALFORMED = "E301"  # cannot be read
    TOO_LONG = "E302"
    WRONG_VERSION = "E303"
    TOKEN = "E304"  # unknown, used up or expired: the caller is not told which
    KEY = "E305"  # the CSR, its key or its proof of possession
    CERTIFICATE = "E306"  # expired, of another authority, of an unknown device
    REVOKED = "E307"
    SIGNATURE = "E308"  # the renewal is not signed by the certificate's key
    CLOCK = "E309"  # the device's clock is too far from the coordinator's


@dataclass(frozen=True, slots=True, kw_only=True)
class EnrolRequest:
    """A device asks to become a member."""

    kind: Literal["enrol"] = "enrol"
    token: str  # TOKEN_DIGITS hex digits
    csr: str  # PEM
    node_key: str = ""  # PEM of the key that Flower knows the node by; "": the CSR's
    node_proof: str = ""  # hex; `node_text(csr)` signed by that key
    versions: Mapping[str, str] = field(default_factory=dict)
    capabilities: Mapping[str, str | int | float] = field(default_factory=dict)

    def __post_init__(self) -> None:
        error = MalformedError
        _checks.hexadecimal("token", self.token, TOKEN_DIGITS, TOKEN_DIGITS, error)
        _checks.pem("csr", self.csr, "CERTIFICATE REQUEST", error=MalformedError)
        if self.node_key or self.node_proof:
            _checks.pem("node_key", self.node_key, "PUBLIC KEY", error=MalformedError)
            _signature("node_proof", self.node_proof)
        object.__setattr__(self, "versions", _facts("versions", self.versions, numbers=False))
        object.__setattr__(self, "capabilities", _facts("capabilities", self.capabilities))


@dataclass(frozen=True, slots=True, kw_only=True)
class RenewRequest:
    """A member asks for a new certificate over the key that it has."""

    kind: Literal["renew"] = "renew"
    certificate: str  # PEM, the one that ends soon
    csr: str  # PEM
    time: int  # seconds since 1970, by the device's clock
    signature: str  # hex; `renewal_text` signed by the certificate's key

    def __post_init__(self) -> None:
        _checks.pem("certificate", self.certificate, "CERTIFICATE", error=MalformedError)
        _checks.pem("csr", self.csr, "CERTIFICATE REQUEST", error=MalformedError)
        _checks.integer("time", self.time, 0, MAX_UNIX_TIME, MalformedError)
        _signature("signature", self.signature)


@dataclass(frozen=True, slots=True, kw_only=True)
class Enrolled:
    """What makes a device a member, or keeps it one."""

    kind: Literal["enrolled"] = "enrolled"
    device: str  # its name, the certificate's common name
    certificate: str  # PEM
    authority: str  # PEM of the certificate that signed it
    coordinator: str  # name
    signing_key: str  # Ed25519, 64 hex digits: who signs bundles
    not_after: int  # seconds since 1970, the certificate's end
    signature: str = ""  # hex; `answer_text` signed by the authority

    def __post_init__(self) -> None:
        error = MalformedError
        _checks.text("device", self.device, MAX_CLIENT_LENGTH, error)
        _checks.pem("certificate", self.certificate, "CERTIFICATE", error=MalformedError)
        _checks.pem("authority", self.authority, "CERTIFICATE", error=MalformedError)
        _checks.text("coordinator", self.coordinator, MAX_CLIENT_LENGTH, error)
        _checks.hexadecimal("signing_key", self.signing_key, 64, 64, error)
        _checks.integer("not_after", self.not_after, 0, MAX_UNIX_TIME, error)
        if self.signature:
            _signature("signature", self.signature)


@dataclass(frozen=True, slots=True, kw_only=True)
class Refusal:
    """Why nothing came of a request. The reason may quote the request, and is made displayable."""

    kind: Literal["refused"] = "refused"
    code: RefusalCode
    reason: str

    def __post_init__(self) -> None:
        code = _checks.one_of("code", self.code, tuple(RefusalCode), MalformedError)
        object.__setattr__(self, "code", RefusalCode(code))
        if not isinstance(self.reason, str):
            raise MalformedError(f"reason: expected text, found {_checks.shown(self.reason)}")
        object.__setattr__(self, "reason", displayable(self.reason, MAX_REASON_LENGTH))

    def __str__(self) -> str:
        return f"{self.reason} ({self.code})"


EnrolmentMessage = EnrolRequest | RenewRequest | Enrolled | Refusal
_Message = TypeVar("_Message", EnrolRequest, RenewRequest, Enrolled, Refusal)

_FIELDS: Final[Mapping[str, tuple[str, ...]]] = {
    "enrol": ("token", "csr", "node_key", "node_proof", "versions", "capabilities"),
    "renew": ("certificate", "csr", "time", "signature"),
    "enrolled": (
        "device",
        "certificate",
        "authority",
        "coordinator",
        "signing_key",
        "not_after",
        "signature",
    ),
    "refused": ("code", "reason"),
}


def pack_enrolment(message: EnrolmentMessage) -> bytes:
    """The bytes that travel. Raises: TooLongError."""
    raw = _json.canonical(_to_json(message))
    _require_short(raw)
    return raw


def unpack_enrol_request(raw: bytes) -> EnrolRequest:
    """Raises: MalformedError, TooLongError, VersionError."""
    return _canonical(EnrolRequest(**_parsed(raw, "enrol")), raw)


def unpack_renew_request(raw: bytes) -> RenewRequest:
    """Raises: MalformedError, TooLongError, VersionError."""
    return _canonical(RenewRequest(**_parsed(raw, "renew")), raw)


def unpack_enrolment_answer(raw: bytes) -> Enrolled | Refusal:
    """Raises: MalformedError, TooLongError, VersionError."""
    fields = _parsed(raw, "enrolled", "refused")
    if fields["kind"] == "refused":
        return _canonical(Refusal(**fields), raw)
    return _canonical(Enrolled(**fields), raw)


def node_text(csr: str) -> bytes:
    """What a node key of its own signs, to prove that the sender of this CSR has it as well."""
    return _NODE_CONTEXT + csr.encode("ascii")


def renewal_text(*, certificate: str, csr: str, time: int) -> bytes:
    """What the certificate's key signs in a RenewRequest."""
    content = {"certificate": certificate, "csr": csr, "time": time}
    return _RENEWAL_CONTEXT + _json.canonical(content)


def answer_text(answer: Enrolled) -> bytes:
    """What the authority signs: all of the answer but the signature."""
    content = _to_json(answer)
    del content["signature"]
    return _ANSWER_CONTEXT + _json.canonical(content)


def _parsed(raw: bytes, *kinds: str) -> dict[str, Any]:
    """The fields of a message of one of these kinds, `kind` among them."""
    _require_short(raw)
    try:
        value = _json.parse(raw)
    except ValueError as error:
        raise MalformedError(f"message: {error}") from None
    found = _checks.mapping("message", value, MalformedError)
    version = found.get("version")
    if version != ENROLMENT_VERSION or isinstance(version, bool):
        raise VersionError(
            f"message: expected version {ENROLMENT_VERSION}, found {_checks.shown(version)}; both "
            "sides need releases that share a version"
        )
    kind = _checks.one_of("kind", found.get("kind"), kinds, MalformedError)
    names = ("kind", "version", *_FIELDS[kind])
    fields = _checks.keys("message", found, names, MalformedError)
    return {name: value for name, value in fields.items() if name != "version"}


def _canonical(message: _Message, raw: bytes) -> _Message:
    require_canonical(_to_json(message), raw)
    return message


def _to_json(message: EnrolmentMessage) -> dict[str, Any]:
    fields = {name: getattr(message, name) for name in ("kind", *_FIELDS[message.kind])}
    return {"version": ENROLMENT_VERSION, **fields}


def _require_short(raw: bytes) -> None:
    if len(raw) > MAX_ENROLMENT_BYTES:
        raise TooLongError(
            f"message: expected at most {MAX_ENROLMENT_BYTES} bytes, found {len(raw)}"
        )


def _signature(field: str, value: object) -> None:
    _checks.hexadecimal(field, value, 2, 2 * MAX_SIGNATURE_BYTES, MalformedError)


def _facts(field: str, value: object, *, numbers: bool = True) -> dict[str, Any]:
    """A flat mapping of short names to short texts or plain numbers, a copy of its own."""
    found = _checks.mapping(field, value, MalformedError)
    if len(found) > MAX_FACTS:
        raise MalformedError(f"{field}: expected at most {MAX_FACTS} entries, found {len(found)}")
    return {
        _checks.text(field, name, MAX_FACT_LENGTH, MalformedError): _fact(
            f"{field}.{name}", fact, numbers
        )
        for name, fact in found.items()
    }


def _fact(field: str, value: object, numbers: bool) -> str | int | float:
    if isinstance(value, str) or not numbers:
        return _checks.text(field, value, MAX_FACT_LENGTH, MalformedError)
    if isinstance(value, float):
        return _checks.real(field, value, MalformedError)
    return _checks.integer(field, value, -_MAX_SAFE, _MAX_SAFE, MalformedError)
