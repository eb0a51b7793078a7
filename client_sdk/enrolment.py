# SPDX-License-Identifier: Apache-2.0
"""A device and the coordinator's public port: how it becomes a member.

The first thing asked for is the authority's certificate, from whoever answers; it is trusted only
if its fingerprint is the one that the operator told. The token is shown to nobody before that.
"""

from __future__ import annotations

import http.client
import os
import platform
import ssl
from collections.abc import Mapping
from pathlib import Path
from typing import Final
from urllib.parse import urlsplit

from client_sdk.errors import CoordinatorUnreachableError, IdentityError
from client_sdk.identity import Identity, Membership, require_authority
from protocol.limits import MAX_ENROLMENT_BYTES, MAX_PEM_LENGTH

TIMEOUT_S: Final = 30.0
_PORT: Final = 8443
_MAX_WORDS: Final = 1_000  # of a refusal in plain text


def enroll(folder: Path, coordinator: str, token: str, fingerprint: str) -> Membership:
    """Makes this device a member; the key is made in `folder` and stays there.

    Args:
        coordinator: URL, as `fedloom coordinator token create` says it.
        fingerprint: of the authority, from the same place.

    Raises:
        CoordinatorUnreachableError: nobody answers, or not as a coordinator does.
        IdentityChangedError, RefusedError, IdentityError: as `Identity.join`.
    """
    host, port = _address(coordinator)
    anybody = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    anybody.check_hostname = False
    anybody.verify_mode = ssl.CERT_NONE
    authority = _asked(host, port, anybody, "GET", "/v1/authority", b"", MAX_PEM_LENGTH)
    try:
        pem = authority.decode("ascii")
    except UnicodeDecodeError:
        raise CoordinatorUnreachableError(
            f"{coordinator}: expected a coordinator's authority, found something else"
        ) from None
    require_authority(pem, fingerprint)
    identity = Identity(folder)
    request = identity.enrol_request(token, versions=versions(), capabilities=capabilities())
    answer = _asked(host, port, _trusting(pem), "POST", "/v1/enroll", request, MAX_ENROLMENT_BYTES)
    return identity.join(answer, fingerprint=fingerprint)


def versions() -> dict[str, str]:
    """Of what a round depends on."""
    from importlib.metadata import PackageNotFoundError, version

    found = {"python": platform.python_version()}
    for package in ("fedloom", "onnxruntime", "flwr"):
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            found[package] = "none"
    return found


def capabilities() -> Mapping[str, str | int | float]:
    """Of this machine, as far as it is known."""
    return {
        "machine": platform.machine(),
        "system": platform.system(),
        "cores": os.cpu_count() or 0,
    }


def _address(coordinator: str) -> tuple[str, int]:
    try:
        parts = urlsplit(coordinator)
        port = parts.port or _PORT
    except ValueError:
        parts, port = urlsplit(""), 0
    if parts.scheme != "https" or not parts.hostname or parts.path not in ("", "/"):
        raise IdentityError(
            f'coordinator: expected a URL such as https://host:8443, found "{coordinator}"'
        )
    return parts.hostname, port


def _trusting(authority: str) -> ssl.SSLContext:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.load_verify_locations(cadata=authority)
    return context


def _asked(
    host: str, port: int, context: ssl.SSLContext, method: str, path: str, body: bytes, most: int
) -> bytes:
    """The answer's body, at most so many bytes. Raises: CoordinatorUnreachableError."""
    where = f"https://{host}:{port}"
    connection = http.client.HTTPSConnection(host, port, context=context, timeout=TIMEOUT_S)
    try:
        connection.request(method, path, body=body or None)
        response = connection.getresponse()
        answer = response.read(most + 1)
    except ssl.SSLCertVerificationError as error:
        raise CoordinatorUnreachableError(
            f"{where}: its certificate is not one of the coordinator's for this address "
            f"({error.verify_message}); use an address that the operator gave to `init`"
        ) from None
    except (TimeoutError, OSError, http.client.HTTPException) as error:
        raise CoordinatorUnreachableError(
            f"{where}: no answer ({error}); is the coordinator up, and its port open?"
        ) from None
    finally:
        connection.close()
    if len(answer) > most:
        raise CoordinatorUnreachableError(f"{where}: expected at most {most} bytes, found more")
    if response.status != http.client.OK:
        words = answer[:_MAX_WORDS].decode("utf-8", "replace").strip()
        raise CoordinatorUnreachableError(f"{where}: {response.status}: {words}")
    return answer
