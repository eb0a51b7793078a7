# SPDX-License-Identifier: Apache-2.0
"""A device's calls to the real gateway, and in which words they fail."""

from __future__ import annotations

import socket
import time
from pathlib import Path
from typing import Any

import pytest

from client_sdk.errors import (
    ClockError,
    CoordinatorStatusError,
    CoordinatorUnreachableError,
    DeniedError,
    IdentityError,
)
from client_sdk.gateway import Address, Gateway, address_of, authority_of
from client_sdk.identity import Identity

YEAR = 365 * 24 * 3600.0


@pytest.mark.parametrize(
    ("url", "address"),
    [
        ("https://host:8443", ("host", 8443)),
        ("https://host", ("host", 8443)),
        ("https://[::1]:9/", ("::1", 9)),
    ],
)
def test_address_is_that_of_the_url(url: str, address: tuple[str, int]) -> None:
    assert address_of(url) == address


@pytest.mark.parametrize("url", ["http://host", "host:8443", "https://host/path", "https://h:x"])
def test_what_is_no_coordinators_url_is_refused(url: str) -> None:
    with pytest.raises(IdentityError, match="expected a URL such as https://host:8443"):
        address_of(url)


def test_address_of_ipv6_is_written_in_brackets() -> None:
    assert str(Address("::1", 9)) == "https://[::1]:9"


def test_member_is_let_in_and_clocks_agree(served: Any, tmp_path: Path) -> None:
    device = served.enrolled(tmp_path / "device")
    assert abs(served.gateway(device).check()) < 2
    assert authority_of(served.address) == served.deployment.authority.pem


def test_certificate_is_renewed_over_the_same_key(served: Any, tmp_path: Path) -> None:
    device = served.enrolled(tmp_path / "device")
    identity = Identity(tmp_path / "device")
    before, key = identity.membership, identity.key_path.read_bytes()
    answer = served.gateway(device).renew(identity.renew_request(time.time()))
    after = identity.renew(answer)
    assert before is not None and after.certificate != before.certificate
    assert after.not_after >= before.not_after and identity.key_path.read_bytes() == key


def test_stranger_and_revoked_device_are_told_why(served: Any, tmp_path: Path) -> None:
    device = served.enrolled(tmp_path / "device")
    stranger = Gateway(served.address, device.membership.authority, Identity(tmp_path / "s").key())
    with pytest.raises(DeniedError, match="no member; enrol it with a token"):
        stranger.check()
    served.deployment.enrolment.revoke(device.membership.device)
    with pytest.raises(DeniedError, match=r"revoked.*fedloom device leave"):
        served.gateway(device).check()
    with (
        pytest.raises(DeniedError, match="revoked"),
        served.gateway(device).download("ab" * 32, "manifest.json"),
    ):
        pass


def test_headers_that_were_used_before_are_not_taken_for_a_refusal(
    served: Any, tmp_path: Path
) -> None:
    now = time.time()
    times = iter([now, now, now, now, now + 1e-3, now])
    gateway = served.gateway(served.enrolled(tmp_path / "device"), clock=lambda: next(times))
    gateway.check()
    assert gateway.check() is not None


@pytest.mark.parametrize(("off", "word"), [(3600, "ahead"), (-3600, "behind"), (8, "ahead")])
def test_clock_that_is_off_is_said_with_what_to_do(
    served: Any, tmp_path: Path, off: float, word: str
) -> None:
    device = served.enrolled(tmp_path / "device")
    gateway = served.gateway(device, clock=lambda: time.time() + off)
    with pytest.raises(ClockError, match=rf"clock off by \d+ s: this device is {word} .* set the"):
        gateway.check()


def test_certificate_out_of_its_time_is_told_as_a_clock_where_it_is_one(
    serve: Any, tmp_path: Path
) -> None:
    old = serve(now=lambda: time.time() - 30 * YEAR)
    held = old.deployment.authority.pem
    key = Identity(tmp_path / "device").key()
    with pytest.raises(CoordinatorUnreachableError, match="its certificate is out of its time"):
        Gateway(old.address, held, key).check()
    with pytest.raises(ClockError, match=r"clock off by .* behind of the coordinator"):
        Gateway(old.address, held, key, clock=lambda: time.time() - YEAR).check()


def test_another_authority_is_not_trusted(serve: Any, served: Any, tmp_path: Path) -> None:
    from simulations.throwaway import Authority

    other = Authority().certificate.decode()
    with pytest.raises(CoordinatorUnreachableError, match="is not one of the coordinator's"):
        Gateway(served.address, other, Identity(tmp_path / "a").key()).check()
    with pytest.raises(IdentityError, match="expected a certificate in PEM"):
        Gateway(served.address, "nonsense")


def test_nobody_there_is_unreachable() -> None:
    with socket.create_server(("127.0.0.1", 0)) as closed:
        address = Address("127.0.0.1", closed.getsockname()[1])
    with pytest.raises(CoordinatorUnreachableError, match=r"no answer .* is the coordinator up"):
        authority_of(address)


def test_missing_file_is_told_by_its_status(served: Any, tmp_path: Path) -> None:
    device = served.enrolled(tmp_path / "device")
    with (
        pytest.raises(CoordinatorStatusError, match="no bundle abab") as raised,
        served.gateway(device).download("ab" * 32, "manifest.json"),
    ):
        pass
    assert raised.value.status == 404


def test_key_is_needed_for_what_is_a_members(served: Any) -> None:
    with pytest.raises(IdentityError, match="enrol this device first"):
        Gateway(served.address, served.deployment.authority.pem).check()
