# SPDX-License-Identifier: Apache-2.0
"""How a device becomes a member.

The first thing asked for is the authority's certificate, from whoever answers; it is trusted only
if its fingerprint is the one that the operator told. The token is shown to nobody before that.
"""

from __future__ import annotations

import os
import platform
from collections.abc import Mapping
from pathlib import Path

from client_sdk.gateway import Gateway, address_of, authority_of
from client_sdk.home import Home
from client_sdk.identity import Identity, Membership, require_authority


def enroll(folder: Path, coordinator: str, token: str, fingerprint: str) -> Membership:
    """Makes this device a member; the key is made in `folder` and stays there.

    Args:
        coordinator: URL, as `fedloom coordinator token create` says it.
        fingerprint: of the authority, from the same place.

    Raises:
        CoordinatorUnreachableError: nobody answers, or not as a coordinator does.
        IdentityChangedError, RefusedError, IdentityError: as `Identity.join`.
    """
    address = address_of(coordinator)
    authority = authority_of(address)
    require_authority(authority, fingerprint)
    identity, home = Identity(folder), Home(folder)
    if not identity.key_path.exists():
        home.require_free()
    request = identity.enrol_request(token, versions=versions(), capabilities=capabilities())
    answer = Gateway(address, authority).enroll(request)
    held = identity.join(answer, fingerprint=fingerprint)
    home.set_coordinator(address)
    return held


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
