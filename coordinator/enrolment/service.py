# SPDX-License-Identifier: Apache-2.0
"""Enrolment and renewal: request bytes in, answer bytes out, every outcome in the audit log.

What a device does wrong is answered by a refusal, never by an exception. A device that got no
answer asks again with the same token and key, and is given the certificate that it was given; the
token is spent once.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import replace
from typing import Final

from cryptography.exceptions import UnsupportedAlgorithm
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ec

from coordinator.enrolment.audit import Audit
from coordinator.enrolment.authority import (
    MAX_DEVICE_LIFETIME_S,
    Authority,
    CertificateFault,
    plain_label,
)
from coordinator.enrolment.devices import Device, Devices
from coordinator.enrolment.store import Store
from coordinator.enrolment.tokens import HOUR_S, TokenFault, Tokens, token_hash
from protocol.enrolment import (
    Enrolled,
    EnrolRequest,
    Refusal,
    RefusalCode,
    answer_text,
    node_text,
    pack_enrolment,
    renewal_text,
    unpack_enrol_request,
    unpack_renew_request,
)
from protocol.errors import ContainerError, SignatureError, TooLongError, VersionError
from protocol.keys import (
    key_fingerprint,
    load_public,
    load_request,
    public_pem,
    require_p384,
    verify,
)
from protocol.rejection import displayable

MAX_CLOCK_ERROR_S: Final = 3_600
"""How far a renewal's time may be from ours. A replayed one only gives the device its own."""
_NAME_DIGITS: Final = 16  # of the key's fingerprint, behind the label
_MAX_CALLER: Final = 100


class Enrolment:
    """The authority's desk. Any thread may call it."""

    def __init__(
        self,
        authority: Authority,
        store: Store,
        *,
        coordinator: str,
        signing_key: str,
        lifetime_s: int = MAX_DEVICE_LIFETIME_S,
        now: Callable[[], float] = time.time,
    ) -> None:
        """
        Args:
            coordinator: the name that devices pin.
            signing_key: the Ed25519 key that bundles are signed with, 64 hex digits; pinned, too.
            lifetime_s: of device certificates; seven days at most.
            now: the clock, in seconds since 1970; the authority's should be the same.
        """
        self.authority = authority
        self.tokens = Tokens(store, now=now)
        self.devices = Devices(store, authority, now=now)
        self.audit = Audit(store, now=now)
        self._store = store
        self._coordinator = plain_label("coordinator", coordinator)
        self._signing_key = signing_key
        self._lifetime_s = lifetime_s
        self._now = now

    def create_token(self, label: str, *, quota: int = 1, lifetime_s: float = HOUR_S) -> str:
        """As `Tokens.create`, and noted in the log."""
        with self._store.transaction():
            token = self.tokens.create(label, quota=quota, lifetime_s=lifetime_s)
            self.audit.append(
                "token", label, token=_short(token), quota=quota, lifetime_s=int(lifetime_s)
            )
        return token

    def revoke(self, name: str, *, why: str = "") -> bool:
        """As `Devices.revoke`, and noted in the log."""
        with self._store.transaction():
            changed = self.devices.revoke(name)
            if changed:
                self.audit.append("revoked", name, why=displayable(why, 200))
        return changed

    def enrol(self, request: bytes, *, caller: str = "") -> bytes:
        """Answers an EnrolRequest.

        Args:
            caller: who asks, as far as the transport knows; for the log.

        Raises: RegistryError if nothing can be written; the device may ask again.
        """
        try:
            message = unpack_enrol_request(request)
            key = _proven_key(message.csr)
            node_key = _proven_node_key(message, key)
            with self._store.transaction():
                answer = self._enrolled(message, key, node_key, caller)
        except ContainerError as error:
            return self._refuse("enrol", _code_of(error), str(error), caller)
        except _RefusedError as error:
            return self._refuse("enrol", error.code, error.told, caller, error.noted)
        return pack_enrolment(answer)

    def renew(self, request: bytes, *, caller: str = "") -> bytes:
        """Answers a RenewRequest; the rest is as for `enrol`.

        The key stays: a device that lost the answer to a change of keys would be shut out.
        """
        try:
            message = unpack_renew_request(request)
            device = self._member(message.certificate)
            key = _proven_key(message.csr)
            if key_fingerprint(key) != device.fingerprint:
                raise _RefusedError(
                    RefusalCode.KEY,
                    "csr: expected the key of the certificate, found another; to change the key, "
                    "leave and enrol again",
                )
            text = renewal_text(certificate=message.certificate, csr=message.csr, time=message.time)
            try:
                verify(text, bytes.fromhex(message.signature), key)
            except SignatureError as error:
                raise _RefusedError(RefusalCode.SIGNATURE, str(error)) from None
            self._require_clock(message.time)
            with self._store.transaction():
                # Once more, inside: it may have been revoked in between.
                device = self._member(message.certificate)
                answer = self._certified(device.name, key)
                self.devices.certify(device.name, answer.certificate, answer.not_after)
                self._note("renewed", device.name, caller)
        except ContainerError as error:
            return self._refuse("renew", _code_of(error), str(error), caller)
        except _RefusedError as error:
            return self._refuse("renew", error.code, error.told, caller, error.noted)
        return pack_enrolment(answer)

    def _enrolled(
        self,
        message: EnrolRequest,
        key: ec.EllipticCurvePublicKey,
        node_key: ec.EllipticCurvePublicKey,
        caller: str,
    ) -> Enrolled:
        """Within the transaction: what it raises undoes the use of the token."""
        fingerprint, token = key_fingerprint(key), token_hash(message.token)
        known = self.devices.by_fingerprint(fingerprint)
        if known is not None and known.token == token and known.not_after > self._now():
            self._require_not_revoked(known)
            self._note("enrolled again", known.name, caller, token=_short(message.token))
            return self._answer(known.name, known.certificate, known.not_after)
        used = self.tokens.redeem(message.token)
        if isinstance(used, TokenFault):
            raise _RefusedError(
                RefusalCode.TOKEN,
                "token: expected one that is valid, this is none; ask the operator for a new one",
                f"{used} {_short(message.token)}",
            )
        if known is not None:
            self._require_not_revoked(known)
            answer = self._certified(known.name, key)
            self.devices.certify(known.name, answer.certificate, answer.not_after, token=token)
        else:
            answer = self._certified(f"{used.label}-{fingerprint[:_NAME_DIGITS]}", key)
            device = Device(
                name=answer.device,
                fingerprint=fingerprint,
                node_fingerprint=key_fingerprint(node_key),
                node_key=public_pem(node_key),
                label=used.label,
                token=token,
                certificate=answer.certificate,
                not_after=answer.not_after,
                enrolled=self._now(),
                seen=self._now(),
                versions=message.versions,
                capabilities=message.capabilities,
            )
            if not self.devices.add(device):
                raise _RefusedError(
                    RefusalCode.KEY, "key: another device has this node key or name; make a new key"
                )
        self._note("enrolled", answer.device, caller, token=_short(message.token), key=fingerprint)
        return answer

    def _certified(self, name: str, key: ec.EllipticCurvePublicKey) -> Enrolled:
        """A new certificate, and the answer that carries it."""
        made = self.authority.device(name, key, lifetime_s=self._lifetime_s)
        pem = made.public_bytes(serialization.Encoding.PEM).decode("ascii")
        return self._answer(name, pem, int(made.not_valid_after_utc.timestamp()))

    def _answer(self, name: str, certificate: str, not_after: int) -> Enrolled:
        unsigned = Enrolled(
            device=name,
            certificate=certificate,
            authority=self.authority.pem,
            coordinator=self._coordinator,
            signing_key=self._signing_key,
            not_after=not_after,
        )
        return replace(unsigned, signature=self.authority.sign(answer_text(unsigned)).hex())

    def _member(self, certificate: str) -> Device:
        found = self.devices.check(certificate)
        if not isinstance(found, CertificateFault):
            return found
        if found is CertificateFault.REVOKED:
            raise _RefusedError(RefusalCode.REVOKED, "certificate: the device was revoked")
        raise _RefusedError(
            RefusalCode.CERTIFICATE,
            f"certificate: expected a member's valid one, but {found}; "
            "ask the operator for a token and enrol again",
        )

    def _require_clock(self, claimed: int) -> None:
        off = claimed - int(self._now())
        if abs(off) > MAX_CLOCK_ERROR_S:
            raise _RefusedError(
                RefusalCode.CLOCK,
                f"time: clock off by {off:+} seconds, at most {MAX_CLOCK_ERROR_S} are allowed; "
                "set the device's clock",
            )

    def _require_not_revoked(self, device: Device) -> None:
        if device.revoked is not None:
            raise _RefusedError(
                RefusalCode.REVOKED, "key: the device was revoked", f"{device.name} was revoked"
            )

    def _note(self, event: str, subject: str, caller: str, **detail: str) -> None:
        self.audit.append(event, subject, caller=displayable(caller, _MAX_CALLER), **detail)

    def _refuse(
        self, what: str, code: RefusalCode, told: str, caller: str, noted: str = ""
    ) -> bytes:
        self.audit.append_limited(
            "refused",
            what,
            code=str(code),
            reason=displayable(noted or told, 300),
            caller=displayable(caller, _MAX_CALLER),
        )
        return pack_enrolment(Refusal(code=code, reason=told))


class _RefusedError(Exception):
    """Ends a transaction with nothing done; `noted` is for the log where it says more."""

    def __init__(self, code: RefusalCode, told: str, noted: str = "") -> None:
        super().__init__(told)
        self.code = code
        self.told = told
        self.noted = noted


def _proven_key(pem: str) -> ec.EllipticCurvePublicKey:
    """The key of a CSR that its sender has: the CSR is signed by it."""
    try:
        csr = load_request(pem)
        # The kind first: checking a signature by a huge RSA key takes long.
        key = require_p384("csr", csr.public_key())
        proven = csr.is_signature_valid
    except SignatureError as error:
        raise _RefusedError(RefusalCode.KEY, str(error)) from None
    except (ValueError, TypeError, UnsupportedAlgorithm):
        raise _RefusedError(
            RefusalCode.KEY, "csr: expected a PKCS#10 request, found something else"
        ) from None
    if not proven:
        raise _RefusedError(RefusalCode.KEY, "csr: its signature is not by its own key")
    return key


def _proven_node_key(
    message: EnrolRequest, key: ec.EllipticCurvePublicKey
) -> ec.EllipticCurvePublicKey:
    """The key that Flower will know the device by; whoever names one must have it."""
    if not message.node_key:
        return key
    try:
        node_key = load_public(message.node_key)
        verify(node_text(message.csr), bytes.fromhex(message.node_proof), node_key)
    except SignatureError as error:
        raise _RefusedError(RefusalCode.KEY, f"node key: {error}") from None
    return node_key


def _code_of(error: ContainerError) -> RefusalCode:
    if isinstance(error, TooLongError):
        return RefusalCode.TOO_LONG
    return RefusalCode.WRONG_VERSION if isinstance(error, VersionError) else RefusalCode.MALFORMED


def _short(token: str) -> str:
    """What stands for a token in the log."""
    return token_hash(token)[:12]
