# SPDX-License-Identifier: Apache-2.0
"""Who other devices are, to one that shares a secure sum with them.

The coordinator shows their certificates. A device believes those that its pinned authority has
issued, each for the name that it stands under. Their times are not held against this device's
clock: whoever is not a member any more is left out by the coordinator, which could enrol others.
"""

from __future__ import annotations

from collections.abc import Mapping

from cryptography.exceptions import InvalidSignature, UnsupportedAlgorithm
from cryptography.x509.oid import NameOID

from aggregation.secure_aggregation import Verifier
from client_sdk.errors import SumError
from protocol.errors import SignatureError
from protocol.keys import load_certificate, verifier


def trusted_peers(credentials: Mapping[str, str], *, authority: str) -> Verifier:
    """Checks signatures by certificates (PEM) of one authority (PEM).

    Raises: SumError for a certificate of another authority, or for another name.
    """
    try:
        issuer = load_certificate(authority)
        for name, pem in credentials.items():
            certificate = load_certificate(pem)
            certificate.verify_directly_issued_by(issuer)
            found = [
                str(each.value)
                for each in certificate.subject.get_attributes_for_oid(NameOID.COMMON_NAME)
            ]
            if found != [name]:
                raise SumError(f"the certificate shown for {name} is for {', '.join(found)}")
        return verifier(credentials)
    except (SignatureError, ValueError, TypeError, InvalidSignature, UnsupportedAlgorithm) as error:
        raise SumError(
            f"expected peers with certificates of this device's authority ({error})"
        ) from error
