# SPDX-License-Identifier: Apache-2.0
"""What is forwarded, what is refused, and what a refusal costs."""

from __future__ import annotations

import contextlib
import threading
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import httpx
import pytest

from coordinator.errors import RefusedError
from coordinator.gateway.settings import GatewayLimits

PULL = "/v1/fleet/pull-messages"


def test_request_of_a_device_reaches_superlink_and_its_answer_comes_back(up: Any) -> None:
    signed = up.device.headers()
    inner = {"x-forwarded-for": "1.2.3.4", "cookie": "a=b", "authorization": "Bearer x"}
    version = {"flwr-package-version": "1.41.0", "content-type": "application/protobuf"}
    with up.client() as client:
        answer = client.post(PULL, content=b"\x0a\x01", headers=signed | version | inner)
    assert (answer.status_code, answer.content) == (200, b"\x0a\x01")
    assert answer.headers["content-type"] == "application/protobuf"
    assert answer.headers["flwr-version-incompatibility-message"] == "old"
    assert "x-inner" not in answer.headers and "server" not in answer.headers
    (reached,) = up.superlink.headers
    assert up.superlink.paths == [PULL]
    assert (signed | version).items() <= reached.items()
    assert reached["content-length"] == "2" and "transfer-encoding" not in reached
    assert not reached.keys() & inner.keys()
    assert up.eventually(lambda: up.seen == [(up.device.public_key, 2, 2)])


def test_body_without_a_length_is_forwarded(up: Any) -> None:
    with up.client() as client:
        pieces = iter([b"ab", b"cd"])
        answer = client.post(PULL, content=pieces, headers=up.device.headers())
    assert answer.content == b"abcd"


ELSEWHERE = [
    ("POST", "/v1/control/start-run"),
    ("POST", "/v1/control/register-node"),
    ("POST", "/v1/runtime/acquire-task"),
    ("GET", "/metrics"),
    ("GET", "/healthz"),
    ("GET", "/docs"),
    ("GET", "/"),
    ("GET", PULL),
    ("GET", "/v1/enroll"),
    ("POST", "/v1/fleet/"),
    ("POST", "/v1/fleet/../control/start-run"),
    ("POST", "/v1/fleet/%2e%2e/control/start-run"),
    ("POST", "/v1/fleet%2fpull-messages"),
    ("POST", "//v1/fleet/pull-messages"),
    ("POST", "/v1/fleet/pull-messages/"),
    ("POST", "/v1/fleet/pull-messages;x"),
    ("POST", "/v1/fleet/x\\..\\..\\control"),
]


def test_nothing_else_is_there(up: Any) -> None:
    for method, path in ELSEWHERE:
        with up.connect() as connection:
            headers = "".join(f"{k}: {v}\r\n" for k, v in up.device.headers().items())
            asked = f"{method} {path} HTTP/1.1\r\nhost: x\r\n{headers}content-length: 0\r\n\r\n"
            connection.sendall(asked.encode())
            assert connection.recv(100).startswith(b"HTTP/1.1 404 "), path
    assert up.superlink.paths == []


def test_query_is_not_passed_on(up: Any) -> None:
    with up.client() as client:
        assert client.post(PULL + "?a=b", headers=up.device.headers()).status_code == 200
    assert up.superlink.paths == [PULL]


def test_stranger_is_refused_before_its_body_is_read(up: Any) -> None:
    with up.connect() as connection:
        connection.sendall(
            f"POST {PULL} HTTP/1.1\r\nhost: x\r\ncontent-length: 1000000\r\n"
            "expect: 100-continue\r\n\r\n".encode()
        )
        answer = b"".join(iter(lambda: connection.recv(4096), b""))
    assert answer.startswith(b"HTTP/1.1 401 ")
    assert b"expected the header flwr-public-key, found none" in answer
    assert up.superlink.paths == []


def test_revoked_device_is_refused_at_its_next_request(up: Any) -> None:
    with up.client() as client:
        assert client.post(PULL, headers=up.device.headers()).status_code == 200
        up.refused[up.device.public_key] = "the device was revoked"
        answer = client.post(PULL, headers=up.device.headers())
        assert (answer.status_code, answer.text) == (401, "the device was revoked")
        assert (
            client.get(f"/v1/bundles/{'a' * 64}/x", headers=up.device.headers()).status_code == 401
        )
    assert len(up.superlink.paths) == 1


def test_headers_are_good_for_one_request(up: Any) -> None:
    signed = up.device.headers()
    with up.client() as client:
        assert client.post(PULL, content=b"a", headers=signed).status_code == 200
        answer = client.post(PULL, content=b"b", headers=signed)
    assert answer.status_code == 401 and "used before" in answer.text
    assert up.superlink.received == 1


@pytest.mark.parametrize("off_s", [-86_400, 86_400])
def test_device_is_told_how_far_off_its_clock_is(up: Any, off_s: int) -> None:
    with up.client() as client:
        answer = client.post(PULL, headers=up.device.headers(later_s=off_s))
    assert answer.status_code == 401 and "clock off by 86" in answer.text


def test_too_long_a_body_is_refused_by_its_declared_length(serve: Any) -> None:
    up = serve(GatewayLimits(fleet_bytes=1000))
    with up.client() as client:
        answer = client.post(PULL, content=bytes(1001), headers=up.device.headers())
        assert answer.status_code == 413 and "at most 1000 bytes" in answer.text
        assert client.post(PULL, content=bytes(1000), headers=up.device.headers()).content == bytes(
            1000
        )
    assert up.superlink.received == 1000


def test_too_long_a_body_without_a_length_is_cut_off(serve: Any) -> None:
    up = serve(GatewayLimits(fleet_bytes=100_000))
    pieces = (bytes(10_000) for _ in range(20))
    with up.client() as client:
        answer = client.post(PULL, content=pieces, headers=up.device.headers())
    assert answer.status_code == 413
    assert up.superlink.received <= 100_000


def test_ten_times_oversized_bodies_take_little_memory(serve: Any) -> None:
    limit, most = 8 << 20, 32 << 20
    up = serve(GatewayLimits(fleet_bytes=limit, requests_of_device=20))
    up.superlink.answer = b""

    def send(number: int) -> None:
        # Half of them say how long they are, half do not.
        pieces = (bytes(64 << 10) for _ in range(10 * limit >> 16))
        headers = up.device.headers()
        if number % 2:
            headers["content-length"] = str(10 * limit)
        # It may be closed while it is still sending.
        with up.client() as client, contextlib.suppress(httpx.TransportError):
            assert client.post(PULL, content=pieces, headers=headers).status_code == 413

    before = peak_bytes(reset=True)
    with ThreadPoolExecutor(10) as pool:
        list(pool.map(send, range(10)))
    # Of this whole process: ten clients, the gateway, and the other end of its connections.
    assert peak_bytes() - before <= most
    assert up.superlink.received <= 5 * limit


def peak_bytes(*, reset: bool = False) -> int:
    if reset:
        with open("/proc/self/clear_refs", "w") as file:
            file.write("5")
    with open("/proc/self/status") as file:
        return next(int(line.split()[1]) * 1024 for line in file if line.startswith("VmHWM"))


def test_one_device_cannot_take_every_place(serve: Any) -> None:
    up = serve(GatewayLimits(requests_of_device=2))
    up.superlink.wait_s = 0.5

    def ask(_: int) -> httpx.Response:
        with up.client() as client:
            return client.post(PULL, headers=up.device.headers())

    with ThreadPoolExecutor(6) as pool:
        answers = list(pool.map(ask, range(6)))
    assert {answer.status_code for answer in answers} == {200, 503}
    refused = [answer for answer in answers if answer.status_code == 503]
    assert all(answer.headers["retry-after"] == "1" for answer in refused)


def test_device_is_asked_to_come_again_when_superlink_is_away(serve: Any) -> None:
    up = serve(GatewayLimits(upstream_s=0.3))
    up.superlink.wait_s = 0.8
    with up.client() as client:
        answer = client.post(PULL, headers=up.device.headers())
    assert answer.status_code == 504


def test_status_of_superlink_comes_through(up: Any) -> None:
    up.superlink.status, up.superlink.answer = 401, b"no"
    with up.client() as client:
        answer = client.post(PULL, headers=up.device.headers())
    assert (answer.status_code, answer.content) == (401, b"no")


def test_enrolment_is_answered_by_the_owner(serve: Any) -> None:
    threads = []

    def enroll(body: bytes) -> bytes:
        threads.append(threading.current_thread())
        if body == b"bad":
            raise RefusedError("the token was used", status=409)
        if body == b"broken":
            raise KeyError("secret")
        return body[::-1]

    up = serve(enroll=enroll)
    with up.client() as client:
        assert client.post("/v1/enroll", content=b"abc").content == b"cba"
        assert client.post("/v1/renew", content=b"ABC").content == b"abc"
        answer = client.post("/v1/enroll", content=b"bad")
        assert (answer.status_code, answer.text) == (409, "the token was used")
        answer = client.post("/v1/enroll", content=b"broken")
        assert answer.status_code == 500 and "secret" not in answer.text
        answer = client.post("/v1/enroll", content=bytes(16 * 1024 + 1))
        assert answer.status_code == 413
        answer = client.post("/v1/enroll", content=iter([bytes(10_000), bytes(10_000)]))
        assert answer.status_code == 413
    assert threads[0] is not threading.main_thread()


def test_enrolments_of_an_address_are_bounded(serve: Any) -> None:
    up = serve(GatewayLimits(enrolments_burst=3, enrolments_per_s=0.001))
    with up.client() as client:
        answers = [client.post("/v1/enroll", content=b"x") for _ in range(4)]
        devices = client.post(PULL, headers=up.device.headers())
    assert [answer.status_code for answer in answers] == [200, 200, 200, 429]
    assert int(answers[3].headers["retry-after"]) > 100
    assert devices.status_code == 200


def test_health_and_metrics_are_on_loopback(serve: Any) -> None:
    up = serve()
    with up.client() as client:
        client.post(PULL, headers=up.device.headers())
        client.post("/v1/control/start-run")
    assert httpx.get(up.status_url + "/healthz", trust_env=False).text == "ok"
    assert httpx.get(up.status_url + "/else", trust_env=False).status_code == 404
    for labels in ('route="fleet",status="200"', 'route="none",status="404"'):
        name = f"fedloom_gateway_requests_total{{{labels}}}"
        assert up.eventually(lambda name=name: up.metric(name) == 1)


def test_health_says_when_superlink_does_not_answer(up: Any) -> None:
    up.superlink.status = 500
    answer = httpx.get(up.status_url + "/healthz", trust_env=False)
    assert (answer.status_code, answer.text) == (503, "superlink: HTTP 500")
