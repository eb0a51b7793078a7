# SPDX-License-Identifier: Apache-2.0
"""An authority, its desk, and a clock that stands still until a test moves it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID

from coordinator.enrolment.authority import Authority
from coordinator.enrolment.service import Enrolment
from coordinator.enrolment.store import Store
from protocol.enrolment import (
    Enrolled,
    EnrolRequest,
    Refusal,
    RenewRequest,
    pack_enrolment,
    renewal_text,
    unpack_enrolment_answer,
)
from protocol.keys import new_key, sign

SIGNING_KEY = "cd" * 32


@dataclass
class Clock:
    """Seconds since 1970, any moment will do."""

    now: float = 2_000_000_000.0

    def __call__(self) -> float:
        return self.now

    def __iadd__(self, seconds: float) -> Clock:
        self.now += seconds
        return self


@dataclass(frozen=True)
class Applicant:
    """A device's key and its CSR."""

    key: ec.EllipticCurvePrivateKey
    csr: str

    @classmethod
    def new(cls) -> Applicant:
        key = new_key()
        return cls(key, csr_of(key))

    def enrol(self, token: str, **fields: Any) -> bytes:
        return pack_enrolment(EnrolRequest(token=token, csr=self.csr, **fields))

    def renew(self, certificate: str, at: float, *, csr: str | None = None) -> bytes:
        fields = {"certificate": certificate, "csr": csr or self.csr}
        signature = sign(renewal_text(**fields, time=int(at)), self.key).hex()
        return pack_enrolment(RenewRequest(**fields, time=int(at), signature=signature))


def csr_of(key: Any) -> str:
    name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "whatever")])
    request = x509.CertificateSigningRequestBuilder().subject_name(name).sign(key, hashes.SHA384())
    return request.public_bytes(serialization.Encoding.PEM).decode()


@dataclass
class Desk:
    """All that a test of enrolment needs."""

    folder: Path
    clock: Clock
    authority: Authority
    store: Store
    service: Enrolment

    def open(self) -> Enrolment:
        """Another process's view of the same files; close its store."""
        return Enrolment(
            Authority.open(self.folder, now=self.clock),
            Store(self.folder / "registry.sqlite"),
            coordinator="hospital",
            signing_key=SIGNING_KEY,
            now=self.clock,
        )

    def enrolled(self, applicant: Applicant, label: str = "cam") -> Enrolled:
        token = self.service.create_token(label)
        answer = unpack_enrolment_answer(self.service.enrol(applicant.enrol(token)))
        assert isinstance(answer, Enrolled), answer
        return answer


def refusal_of(raw: bytes) -> Refusal:
    answer = unpack_enrolment_answer(raw)
    assert isinstance(answer, Refusal), answer
    return answer


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def desk(tmp_path: Path, clock: Clock) -> Iterator[Desk]:
    authority = Authority.create(tmp_path, "hospital", now=clock)
    with Store(tmp_path / "registry.sqlite") as store:
        service = Enrolment(
            authority, store, coordinator="hospital", signing_key=SIGNING_KEY, now=clock
        )
        yield Desk(tmp_path, clock, authority, store, service)


@pytest.fixture
def applicant() -> Applicant:
    return Applicant.new()


@pytest.fixture
def new_applicant() -> Callable[[], Applicant]:
    return Applicant.new


@pytest.fixture
def refusal() -> Callable[[bytes], Refusal]:
    return refusal_of


@pytest.fixture
def make_csr() -> Callable[[Any], str]:
    return csr_of
