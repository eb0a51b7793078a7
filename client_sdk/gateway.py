# SPDX-License-Identifier: Apache-2.0
"""What a device asks of the coordinator's public port, beside what Flower asks there itself.

    GET  /v1/authority           before anything is trusted
    POST /v1/enroll, /v1/renew
    GET  /v1/bundles/JOB/FILE    with the headers by which Flower knows a node

All but the first is asked over TLS that the pinned authority signed for.
"""

from __future__ import annotations

import datetime
import email.utils
import http.client
import re
import ssl
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final, NamedTuple
from urllib.parse import urlsplit

from client_sdk.errors import (
    ClockError,
    CoordinatorStatusError,
    CoordinatorUnreachableError,
    DeniedError,
    IdentityError,
)
from protocol.limits import MAX_ENROLMENT_BYTES, MAX_PEM_LENGTH
from protocol.node_headers import MAX_AGE_S, MAX_AHEAD_S, node_headers

if TYPE_CHECKING:
    from cryptography.hazmat.primitives.asymmetric import ec

TIMEOUT_S: Final = 30.0
_PORT: Final = 8443
_MAX_WORDS: Final = 1_000  # of a refusal in plain text
_NO_BUNDLE: Final = "0" * 64
# Of OpenSSL: a certificate that is not valid yet, or not any more.
_OUTSIDE_ITS_TIME: Final = (9, 10)
_RANGE: Final = re.compile(r"bytes (\d{1,18})-\d{1,18}/(\d{1,18})")


class Address(NamedTuple):
    """Where a coordinator's public port is."""

    host: str
    port: int

    @property
    def authority(self) -> str:
        """host:port, as Flower and gRPC take it."""
        return f"{self.bracketed}:{self.port}"

    @property
    def bracketed(self) -> str:
        """The host as it stands before a port."""
        return f"[{self.host}]" if ":" in self.host else self.host

    def __str__(self) -> str:
        return f"https://{self.authority}"


def address_of(coordinator: str) -> Address:
    """The address in a URL such as https://host:8443. Raises: IdentityError."""
    try:
        parts = urlsplit(coordinator)
        port = parts.port or _PORT
    except ValueError:
        parts, port = urlsplit(""), 0
    if parts.scheme != "https" or not parts.hostname or parts.path not in ("", "/"):
        raise IdentityError(
            f'coordinator: expected a URL such as https://host:8443, found "{coordinator}"'
        )
    return Address(parts.hostname, port)


def authority_of(address: Address) -> str:
    """The certificate (PEM) that whoever answers calls the authority's; nothing says it is.

    Raises: CoordinatorUnreachableError.
    """
    answer = _asked(address, _anybody(), "GET", "/v1/authority", most=MAX_PEM_LENGTH)
    try:
        return answer.decode("ascii")
    except UnicodeDecodeError:
        raise CoordinatorUnreachableError(
            f"{address}: expected a coordinator's authority, found something else"
        ) from None


@dataclass(frozen=True, slots=True)
class Download:
    """A file on its way, from byte `first` on of `size`."""

    first: int
    size: int
    _response: http.client.HTTPResponse
    _address: Address

    def read(self, most: int) -> bytes:
        """Bytes, at most so many; b"" at the end, and where the connection was cut.

        Raises: CoordinatorUnreachableError.
        """
        try:
            return self._response.read(most)
        except (OSError, http.client.HTTPException) as error:
            raise _silent(self._address, error) from None


class Gateway:
    """A coordinator's public port, for a device that knows the authority. Holds no connection."""

    def __init__(
        self,
        address: Address,
        authority: str,
        key: ec.EllipticCurvePrivateKey | None = None,
        *,
        clock: Callable[[], float] = time.time,
    ) -> None:
        """`authority` in PEM, as it was pinned; `key` is the node's, to ask for what is a member's.

        Raises: IdentityError for an authority that is no certificate.
        """
        self.address = address
        self._key = key
        self._clock = clock
        self._context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
        try:
            self._context.load_verify_locations(cadata=authority)
        except ssl.SSLError as error:
            raise IdentityError(f"authority: expected a certificate in PEM ({error})") from None

    def enroll(self, request: bytes) -> bytes:
        """The answer to an `Identity.enrol_request`. Raises: CoordinatorUnreachableError."""
        return self._exchange("/v1/enroll", request)

    def renew(self, request: bytes) -> bytes:
        """The answer to an `Identity.renew_request`. Raises: CoordinatorUnreachableError."""
        return self._exchange("/v1/renew", request)

    def check(self) -> float:
        """That the coordinator is there and lets this device in.

        Returns: by how many seconds this device's clock is ahead, to about one.

        Raises: DeniedError with the coordinator's reason; ClockError; CoordinatorUnreachableError.
        """
        path = f"/v1/bundles/{_NO_BUNDLE}/manifest.json"
        for last in (False, True):
            with self._answered("GET", path, self._node_headers()) as response:
                ahead = _ahead(response, self._clock())
                _require_clock(ahead)
                if response.status == http.client.NOT_FOUND:
                    return ahead or 0.0  # there is no such bundle: the device was let in
                reason = _refusal(response)
            # Twice, for two processes of a device may have signed the same microsecond.
            if response.status == http.client.UNAUTHORIZED and last:
                raise DeniedError(
                    f"{self.address} does not let this device in: {reason}; if that is no mistake, "
                    "leave with: fedloom device leave"
                )
            if response.status != http.client.UNAUTHORIZED:
                break
        raise CoordinatorStatusError(
            f"{self.address}: {response.status}: {reason}", response.status
        )

    @contextmanager
    def download(
        self, job: str, name: str, *, first: int = 0, etag: str = ""
    ) -> Iterator[Download]:
        """A file of a job's bundle, from byte `first` on if it is still that of `etag`.

        A coordinator may send it whole all the same; `Download.first` says what it did.

        Raises: CoordinatorStatusError, 404 where there is no such file; DeniedError;
            CoordinatorUnreachableError.
        """
        headers = self._node_headers()
        if first:
            headers |= {"range": f"bytes={first}-", "if-range": etag}
        with self._answered("GET", f"/v1/bundles/{job}/{name}", headers) as response:
            match response.status:
                case http.client.OK:
                    begin, size = 0, response.headers.get("content-length", "")
                case http.client.PARTIAL_CONTENT:
                    found = _RANGE.fullmatch(response.headers.get("content-range", ""))
                    begin, size = (int(found[1]), found[2]) if found else (-1, "")
                case http.client.UNAUTHORIZED:
                    _require_clock(_ahead(response, self._clock()))
                    raise DeniedError(f"{self.address}: {_refusal(response)}")
                case status:
                    raise CoordinatorStatusError(
                        f"{self.address}: {name}: {status}: {_words(response)}", status
                    )
            if not size.isdecimal() or begin not in (0, first):
                raise CoordinatorUnreachableError(
                    f"{self.address}: {name}: expected its size, and the bytes from {first} on; "
                    "found an answer that does not say so"
                )
            yield Download(begin, int(size), response, self.address)

    def _exchange(self, path: str, request: bytes) -> bytes:
        try:
            return _asked(
                self.address, self._context, "POST", path, request, most=MAX_ENROLMENT_BYTES
            )
        except ssl.SSLCertVerificationError as error:
            raise _untrusted(self.address, error, self._clock()) from None

    @contextmanager
    def _answered(
        self, method: str, path: str, headers: Mapping[str, str]
    ) -> Iterator[http.client.HTTPResponse]:
        try:
            connection, response = _answer(self.address, self._context, method, path, b"", headers)
        except ssl.SSLCertVerificationError as error:
            raise _untrusted(self.address, error, self._clock()) from None
        try:
            yield response
        finally:
            _close(connection, response)

    def _node_headers(self) -> dict[str, str]:
        if self._key is None:
            raise IdentityError("expected the key of a member, found none; enrol this device first")
        now = datetime.datetime.fromtimestamp(self._clock(), datetime.UTC)
        return node_headers(self._key, now)


def _anybody() -> ssl.SSLContext:
    """Whoever answers. Nothing that comes over it is trusted."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.check_hostname = False
    context.verify_mode = ssl.CERT_NONE
    return context


def _asked(
    address: Address,
    context: ssl.SSLContext,
    method: str,
    path: str,
    body: bytes = b"",
    *,
    most: int,
) -> bytes:
    """The answer's body. Raises: CoordinatorUnreachableError, SSLCertVerificationError."""
    connection, response = _answer(address, context, method, path, body, {})
    try:
        if response.status != http.client.OK:
            raise CoordinatorStatusError(
                f"{address}: {response.status}: {_words(response)}", response.status
            )
        answer = response.read(most + 1)
    except (OSError, http.client.HTTPException) as error:
        raise _silent(address, error) from None
    finally:
        _close(connection, response)
    if len(answer) > most:
        raise CoordinatorUnreachableError(f"{address}: expected at most {most} bytes, found more")
    return answer


def _answer(
    address: Address,
    context: ssl.SSLContext,
    method: str,
    path: str,
    body: bytes,
    headers: Mapping[str, str],
) -> tuple[http.client.HTTPSConnection, http.client.HTTPResponse]:
    """Raises: CoordinatorUnreachableError, SSLCertVerificationError."""
    connection = http.client.HTTPSConnection(*address, context=context, timeout=TIMEOUT_S)
    try:
        connection.request(method, path, body=body or None, headers=dict(headers))
        return connection, connection.getresponse()
    except BaseException as error:
        connection.close()
        if isinstance(error, ssl.SSLCertVerificationError):
            raise
        if isinstance(error, OSError | http.client.HTTPException):
            raise _silent(address, error) from None
        raise


def _close(connection: http.client.HTTPSConnection, response: http.client.HTTPResponse) -> None:
    """Of an answer after which the connection ends, the response holds what is open."""
    response.close()
    connection.close()


def _silent(address: Address, error: Exception) -> CoordinatorUnreachableError:
    return CoordinatorUnreachableError(
        f"{address}: no answer ({error or type(error).__name__}); is the coordinator up, and its "
        "port open?"
    )


def _untrusted(
    address: Address, error: ssl.SSLCertVerificationError, now: float
) -> CoordinatorUnreachableError:
    """In words for people. A certificate out of its time is most often a clock that is wrong, so
    the time is asked for over TLS that trusts nobody, and for these words alone."""
    if error.verify_code in _OUTSIDE_ITS_TIME:
        try:
            connection, response = _answer(address, _anybody(), "GET", "/", b"", {})
            _close(connection, response)
        except CoordinatorUnreachableError as unreachable:
            return unreachable
        try:
            _require_clock(_ahead(response, now))
        except ClockError as off:
            return off
        return CoordinatorUnreachableError(
            f"{address}: its certificate is out of its time ({error.verify_message}); the "
            "coordinator makes a new one when it is started again"
        )
    return CoordinatorUnreachableError(
        f"{address}: its certificate is not one of the coordinator's for this address "
        f"({error.verify_message}); use an address that the operator gave to `init`"
    )


def _ahead(response: http.client.HTTPResponse, now: float) -> float | None:
    """By how many seconds `now` is ahead of an answer's Date; None where it has none."""
    try:
        told = email.utils.parsedate_to_datetime(response.headers.get("date", ""))
    except (TypeError, ValueError):
        return None
    if told.tzinfo is None:
        return None
    return now - told.timestamp() - 0.5  # Date is cut to whole seconds


def _require_clock(ahead: float | None) -> None:
    if ahead is None or -MAX_AGE_S < ahead < MAX_AHEAD_S:
        return
    raise ClockError(
        f"clock off by {abs(ahead):.0f} s: this device is {'ahead' if ahead > 0 else 'behind'} of "
        "the coordinator, which refuses it; set the clock, or switch on what keeps it (timedatectl "
        "set-ntp true)"
    )


def _refusal(response: http.client.HTTPResponse) -> str:
    """Why this device was not let in. Raises: ClockError where only its clock is the reason."""
    words = _words(response)
    if words.startswith("clock off"):
        raise ClockError(words)
    return words


def _words(response: http.client.HTTPResponse) -> str:
    try:
        return response.read(_MAX_WORDS).decode("utf-8", "replace").strip()
    except (OSError, http.client.HTTPException):
        return "(the answer broke off)"
