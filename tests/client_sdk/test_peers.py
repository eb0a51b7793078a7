# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import pytest
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ec

from client_sdk.errors import SumError
from client_sdk.peers import trusted_peers
from coordinator.enrolment.authority import Issued
from protocol.keys import new_key, public_pem, sign
from simulations.throwaway import ThrowAway

OURS, OTHER = ThrowAway(), ThrowAway()
DEVICES = {name: OURS.device(name) for name in ("lathe", "mill")}
CREDENTIALS = {name: issued.certificate.decode() for name, issued in DEVICES.items()}
AUTHORITY = OURS.certificate.decode()


def signature(issued: Issued, message: bytes) -> bytes:
    key = serialization.load_pem_private_key(issued.key, password=None)
    assert isinstance(key, ec.EllipticCurvePrivateKey)
    return sign(message, key)


def test_each_signs_for_itself_alone() -> None:
    verify = trusted_peers(CREDENTIALS, authority=AUTHORITY)
    by_mill = signature(DEVICES["mill"], b"keys")
    assert verify("mill", b"keys", by_mill)
    assert not verify("lathe", b"keys", by_mill)
    assert not verify("mill", b"other keys", by_mill)
    assert not verify("mill", b"keys", b"")
    assert not verify("saw", b"keys", by_mill), "whoever was not shown has signed nothing"


def test_peers_of_another_authority_or_under_another_name_are_refused() -> None:
    stranger = OTHER.device("saw").certificate.decode()
    with pytest.raises(SumError, match="this device's authority"):
        trusted_peers({**CREDENTIALS, "saw": stranger}, authority=AUTHORITY)
    with pytest.raises(SumError, match="the certificate shown for saw is for mill"):
        trusted_peers({**CREDENTIALS, "saw": CREDENTIALS["mill"]}, authority=AUTHORITY)
    for no_certificate in (public_pem(new_key().public_key()), "nonsense"):
        with pytest.raises(SumError, match="this device's authority"):
            trusted_peers({"saw": no_certificate}, authority=AUTHORITY)
