# SPDX-License-Identifier: Apache-2.0
"""Who a device is: its key, its certificate, and the coordinator that it trusts.

    FOLDER/
    ├── .identity         says that these files were made here
    ├── key.pem           made here, for its owner alone; leaves only as a public key in a CSR
    ├── membership.json   what the coordinator answered, and what was pinned: one file, so that a
    │                     crash leaves the old membership or the new one
    ├── node_key          the key again, in the form that Flower's SuperNode reads
    ├── certificate.pem   ┐ copies out of membership.json, for programs that want a file;
    └── authority.pem     ┘ mended when the folder is opened

What carries the messages is not known here: requests come out as bytes, answers go in as bytes.
"""

from __future__ import annotations

import contextlib
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from cryptography import x509
from cryptography.exceptions import InvalidSignature, UnsupportedAlgorithm
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID

from client_sdk.errors import IdentityChangedError, IdentityError, RefusedError
from protocol.enrolment import (
    Enrolled,
    EnrolRequest,
    Refusal,
    RenewRequest,
    answer_text,
    pack_enrolment,
    renewal_text,
    unpack_enrolment_answer,
)
from protocol.errors import ProtocolError, SignatureError
from protocol.files import read_small
from protocol.keys import (
    certificate_fingerprint,
    key_fingerprint,
    load_certificate,
    load_key,
    new_key,
    private_openssh,
    require_p384,
    save_key,
    sign,
    verify,
)
from protocol.limits import MAX_ENROLMENT_BYTES
from protocol.owned_files import PUBLIC, partial_files, write_whole

_KEY: Final = "key.pem"
_MEMBERSHIP: Final = "membership.json"
_NODE_KEY: Final = "node_key"
_CERTIFICATE: Final = "certificate.pem"
_AUTHORITY: Final = "authority.pem"
_FILES: Final = (_KEY, _MEMBERSHIP, _NODE_KEY, _CERTIFICATE, _AUTHORITY)
_MARK: Final = ".identity"  # written first and removed last: the files beside it are ours
_FOLDER_MADE: Final = b"the folder was made with it\n"
_FOLDER_FOUND: Final = b"the folder was there before\n"

_FINGERPRINT: Final = re.compile(r"[0-9a-f]{64}")


@dataclass(frozen=True, slots=True, kw_only=True)
class Membership:
    """What a device holds of a deployment that it is a member of."""

    device: str  # its name there
    coordinator: str
    signing_key: str  # Ed25519, 64 hex digits: bundles must be signed by it
    authority: str  # PEM: server certificates must be signed by it
    certificate: str  # PEM, the device's own
    not_before: int  # of that certificate, seconds since 1970
    not_after: int

    @property
    def fingerprint(self) -> str:
        """The pinned authority's, 64 hex digits."""
        return certificate_fingerprint(load_certificate(self.authority))


class Identity:
    """A device's folder. One process at a time should enrol or renew."""

    def __init__(self, folder: Path) -> None:
        """Nothing is made until the device asks to enrol.

        Raises: IdentityError for a membership that cannot be read; `leave_folder` removes it.
        """
        self.folder = folder
        self._membership = self._read()
        if self._membership is not None:
            self._write_copies(self._membership)

    @property
    def membership(self) -> Membership | None:
        """None before the device enrolled."""
        return self._membership

    @property
    def key_path(self) -> Path:
        """PEM, for TLS; there once the device asked to enrol."""
        return self.folder / _KEY

    @property
    def node_key_path(self) -> Path:
        """OpenSSH, for `flower-supernode --auth-supernode-private-key`; there once it enrolled."""
        return self.folder / _NODE_KEY

    @property
    def certificate_path(self) -> Path:
        """PEM; there once the device enrolled, and another file after each renewal."""
        return self.folder / _CERTIFICATE

    @property
    def authority_path(self) -> Path:
        """PEM; there once the device enrolled."""
        return self.folder / _AUTHORITY

    def key(self) -> ec.EllipticCurvePrivateKey:
        """The device's key, made here at the first call. Raises: IdentityError."""
        path = self.key_path
        try:
            if not path.exists():
                if self._membership is not None:
                    raise IdentityError(
                        f"{path}: expected the key of {self._membership.device!r}, it is gone; "
                        "leave and enrol again"
                    )
                self._make_folder()
                # Where another process was first, its key is the device's.
                with contextlib.suppress(FileExistsError):
                    save_key(new_key(), path)
            return load_key(path)
        except SignatureError as error:
            raise IdentityError(str(error)) from error
        except OSError as error:
            raise IdentityError(f"{path}: the key cannot be written ({error})") from error

    def enrol_request(
        self,
        token: str,
        *,
        versions: Mapping[str, str] | None = None,
        capabilities: Mapping[str, str | int | float] | None = None,
    ) -> bytes:
        """What to send to enrol. Raises: IdentityError, also for a token of another form."""
        try:
            request = EnrolRequest(
                token=token.strip(),
                csr=self._csr(),
                versions=versions or {},
                capabilities=capabilities or {},
            )
            return pack_enrolment(request)
        except ProtocolError as error:
            raise IdentityError(str(error)) from error

    def join(self, answer: bytes, *, fingerprint: str) -> Membership:
        """Take the answer to an `enrol_request`, and pin who gave it.

        Args:
            fingerprint: of the authority, as the operator told it; see `plain_fingerprint`.

        Raises: RefusedError; IdentityChangedError where another coordinator is pinned, or the
            authority is not the one that was told; IdentityError for what cannot be accepted. The
            folder is as before then.
        """
        expected = plain_fingerprint(fingerprint)
        found = _answer(answer)
        require_authority(found.authority, expected)
        return self._accept(found)

    def renewal_due(self, now: float) -> bool:
        """Whether two thirds of the certificate's life are over; `now` in seconds since 1970.

        Raises: IdentityError before the device enrolled.
        """
        held = self._held()
        return now >= held.not_before + (held.not_after - held.not_before) * 2 / 3

    def renew_request(self, now: float) -> bytes:
        """What to send to renew; `now` in seconds since 1970. Raises: IdentityError."""
        held, csr = self._held(), self._csr()
        text = renewal_text(certificate=held.certificate, csr=csr, time=int(now))
        request = RenewRequest(
            certificate=held.certificate,
            csr=csr,
            time=int(now),
            signature=sign(text, self.key()).hex(),
        )
        return pack_enrolment(request)

    def renew(self, answer: bytes) -> Membership:
        """Take the answer to a `renew_request`. Raises: as `join`."""
        self._held()
        return self._accept(_answer(answer))

    def leave(self) -> None:
        """As `leave_folder`. Raises: IdentityError."""
        leave_folder(self.folder)
        self._membership = None

    def _accept(self, answer: Enrolled) -> Membership:
        """Check everything, then write one file."""
        try:
            authority = load_certificate(answer.authority)
            self._require_same(answer, authority)
            signer = require_p384("authority", authority.public_key())
            verify(answer_text(answer), bytes.fromhex(answer.signature), signer)
            certificate = load_certificate(answer.certificate)
            certificate.verify_directly_issued_by(authority)
        except (ValueError, TypeError, InvalidSignature, UnsupportedAlgorithm) as error:
            raise IdentityError(
                f"answer: expected it and its certificate signed by the coordinator's authority "
                f"({error}); nothing was accepted"
            ) from error
        if certificate.public_key() != self.key().public_key():
            raise IdentityError(
                "answer: expected a certificate over this device's key, found one over another; "
                "nothing was accepted"
            )
        names = certificate.subject.get_attributes_for_oid(NameOID.COMMON_NAME)
        if [name.value for name in names] != [answer.device]:
            raise IdentityError(
                f"answer: expected a certificate for {answer.device!r}, found one for another "
                "name; nothing was accepted"
            )
        # Its times are not held against this device's clock: many know no time before they connect.
        made, held = _membership(answer, certificate), self._membership
        if held is not None and made.not_after < held.not_after:
            raise IdentityError(
                "answer: expected a certificate that ends later than the one held, found an "
                "earlier one; nothing was accepted"
            )
        try:
            write_whole(self.folder / _MEMBERSHIP, pack_enrolment(answer))
        except OSError as error:
            raise IdentityError(f"{self.folder}: cannot be written ({error})") from error
        self._membership = made
        self._write_copies(made)
        return made

    def _require_same(self, answer: Enrolled, authority: x509.Certificate) -> None:
        held = self._membership
        if held is None:
            return
        _require_pinned("authority", held.fingerprint, certificate_fingerprint(authority))
        _require_pinned("signing key", held.signing_key, answer.signing_key)
        _require_pinned("name", held.coordinator, answer.coordinator)
        if held.device != answer.device:
            raise IdentityError(
                f"answer: expected it for {held.device!r}, found {answer.device!r}; nothing was "
                "accepted"
            )

    def _held(self) -> Membership:
        if self._membership is None:
            raise IdentityError(
                f"{self.folder}: expected a membership, found none; enrol this device first"
            )
        return self._membership

    def _csr(self) -> str:
        key = self.key()
        # The name is the coordinator's to give; this one only says whose key it is.
        name = x509.NameAttribute(
            NameOID.COMMON_NAME, f"device {key_fingerprint(key.public_key())[:16]}"
        )
        request = (
            x509.CertificateSigningRequestBuilder()
            .subject_name(x509.Name([name]))
            .sign(key, hashes.SHA384())
        )
        return request.public_bytes(serialization.Encoding.PEM).decode("ascii")

    def _read(self) -> Membership | None:
        path = self.folder / _MEMBERSHIP
        if not path.exists():
            return None
        try:
            answer = unpack_enrolment_answer(read_small(path, MAX_ENROLMENT_BYTES))
            if isinstance(answer, Refusal):
                raise ValueError("it is a refusal")
            return _membership(answer, load_certificate(answer.certificate))
        except ValueError as error:
            raise IdentityError(
                f"{path}: expected what an enrolment left, it cannot be read ({error}); leave and "
                "enrol again"
            ) from error

    def _write_copies(self, held: Membership) -> None:
        """Those that are missing or of another membership, as after a crash."""
        copies = {
            _CERTIFICATE: (held.certificate.encode(), PUBLIC),
            _AUTHORITY: (held.authority.encode(), PUBLIC),
        }
        try:
            for name, (content, mode) in copies.items():
                path = self.folder / name
                if not path.exists() or path.read_bytes() != content:
                    write_whole(path, content, mode=mode)
            if not self.node_key_path.exists():
                write_whole(self.node_key_path, private_openssh(self.key()))
        except OSError as error:
            raise IdentityError(f"{self.folder}: cannot be written ({error})") from error

    def _make_folder(self) -> None:
        """The folder, with the mark in it."""
        if (self.folder / _MARK).exists():
            return
        found = self.folder.exists()
        for name in _FILES:
            if (self.folder / name).exists():
                raise IdentityError(
                    f"{self.folder / name}: expected no such file before the device enrols; use "
                    "another folder, or move it away"
                )
        self.folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        write_whole(self.folder / _MARK, _FOLDER_FOUND if found else _FOLDER_MADE)


def leave_folder(folder: Path) -> None:
    """Remove all that an `Identity` made, even one that cannot be read, and nothing else.

    The folder goes if it was made with it and holds nothing of others. Raises: IdentityError.
    """
    mark = folder / _MARK
    if not mark.exists():
        return
    try:
        made = mark.read_bytes() == _FOLDER_MADE
        # The key first: without it what is left is worth nothing.
        for path in [folder / name for name in (*_FILES, _MARK)]:
            for file in (*partial_files(path), path):
                file.unlink(missing_ok=True)
        if made and not any(folder.iterdir()):
            folder.rmdir()
    except OSError as error:
        raise IdentityError(f"{folder}: cannot be removed ({error})") from error


def plain_fingerprint(text: str) -> str:
    """A SHA-256 as people give it, with or without colons, as 64 lower-case hex digits.

    Raises: IdentityError.
    """
    plain = "".join(text.split()).replace(":", "").lower()
    if not _FINGERPRINT.fullmatch(plain):
        raise IdentityError(
            f"fingerprint: expected the SHA-256 of the authority's certificate, 64 hex digits with "
            f"or without colons, found {text[:100]!r}; ask the operator for it"
        )
    return plain


def require_authority(pem: str, fingerprint: str) -> None:
    """Returns if the certificate has that fingerprint: it may then be trusted in TLS.

    Raises: IdentityChangedError, or IdentityError for what is no certificate or fingerprint.
    """
    expected = plain_fingerprint(fingerprint)
    try:
        found = certificate_fingerprint(load_certificate(pem))
    except ValueError as error:
        raise IdentityError(f"authority: expected a certificate in PEM ({error})") from error
    if found != expected:
        raise IdentityChangedError(
            f"authority: expected the fingerprint {expected}, found {found}; nothing was accepted. "
            "Compare the fingerprint with the operator's: somebody may stand in between"
        )


def _require_pinned(what: str, pinned: str, found: str) -> None:
    if pinned != found:
        raise IdentityChangedError(
            f"the coordinator's {what} changed: {pinned} is pinned, found {found}; nothing was "
            "accepted. If the operator says that it was replaced, leave and enrol again"
        )


def _answer(raw: bytes) -> Enrolled:
    try:
        found = unpack_enrolment_answer(raw)
    except ProtocolError as error:
        raise IdentityError(f"answer: {error}") from error
    if isinstance(found, Refusal):
        raise RefusedError(found)
    return found


def _membership(answer: Enrolled, certificate: x509.Certificate) -> Membership:
    return Membership(
        device=answer.device,
        coordinator=answer.coordinator,
        signing_key=answer.signing_key,
        authority=answer.authority,
        certificate=answer.certificate,
        not_before=int(certificate.not_valid_before_utc.timestamp()),
        not_after=int(certificate.not_valid_after_utc.timestamp()),
    )
