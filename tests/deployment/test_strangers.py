# SPDX-License-Identifier: Apache-2.0
"""A deployment and somebody who holds the authority's certificate, and nothing else; and one who
held more, and was revoked."""

from __future__ import annotations

import http.client
import json
import socket
import ssl
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

pytestmark = [pytest.mark.slow, pytest.mark.timeout(300)]

SUBMIT = "/v1/control/start-run"
REGISTER = "/v1/control/register-node"
ACQUIRE = ("/v1/fleet/activate-node", "/v1/fleet/pull-messages", "/v1/fleet/push-messages")


# A device's own condition: its work on a plan takes as long as the test wants.
HOLDING = """
import json, pathlib, time

def go():
    state = pathlib.Path({state!r})
    if state.exists() and json.loads(state.read_text())["doing"] == "training":
        while not pathlib.Path({gate!r}).exists():
            time.sleep(0.1)
    return True
"""


@pytest.fixture
def deployed(ward: Any) -> Iterator[Any]:
    ward.init()
    with ward.up():
        yield ward


def asked(
    ward: Any, method: str, path: str, body: bytes = b"", headers: dict[str, str] | None = None
) -> tuple[int, bytes]:
    """Status and body, from the public port, of a caller that trusts the authority."""
    context = ssl.create_default_context(cafile=str(ward.folder / "authority" / "authority.pem"))
    connection = http.client.HTTPSConnection("127.0.0.1", ward.port, context=context, timeout=30)
    try:
        connection.request(method, path, body=body or None, headers=headers or {})
        response = connection.getresponse()
        return response.status, response.read(1_000)
    finally:
        connection.close()


def test_unauthenticated_callers_are_refused(
    deployed: Any, answered: Callable[..., int], tmp_path: Path
) -> None:
    """`unauthenticated_refused`."""
    ward = deployed
    assert asked(ward, "POST", SUBMIT, b"x")[0] == 404
    assert asked(ward, "POST", REGISTER, b"x")[0] == 404
    for path in ACQUIRE:
        assert asked(ward, "POST", path, b"x")[0] == 401
    assert asked(ward, "GET", f"/v1/bundles/{'ab' * 32}/manifest.json")[0] == 401
    assert asked(ward, "GET", "/metrics")[0] == 404
    assert answered(f"http://127.0.0.1:{ward.operator}/metrics") == 401
    assert asked(ward, "POST", "/v1/enroll", b"{}")[0] == 200, "answered, by a refusal"

    # Flower's own command line, with the very connection that the operator's has.
    home = tmp_path / "flwr"
    home.mkdir()
    text = (ward.folder / "superlink" / "flwr" / "config.toml").read_text()
    (home / "config.toml").write_text(text.replace(f":{ward.superlink}", f":{ward.port}"))
    flwr = str(Path(sys.executable).parent / "flwr")
    words = [flwr, "run", str(ward.folder / "superlink" / "app"), "fedloom", "--format", "json"]
    environment = {**ward.environment(), "FLWR_HOME": str(home), "FLWR_TELEMETRY_ENABLED": "0"}
    done = subprocess.run(
        words, env=environment, capture_output=True, text=True, timeout=60, check=False
    )
    assert '"success": false' in done.stdout, done.stdout
    assert "submitted" not in ward.said("coordinator", "audit", ward.folder)


def test_code_that_is_submitted_on_the_machine_itself_is_not_run(
    deployed: Any, soon: Callable[..., bool], tmp_path: Path
) -> None:
    """Every user of the coordinator's machine reaches SuperLink, which asks nobody who they are."""
    ward = deployed
    app = tmp_path / "app"
    app.mkdir()
    (app / "evil.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')\napp = 1\n")
    own = (ward.folder / "superlink" / "app" / "pyproject.toml").read_text()
    (app / "pyproject.toml").write_text(own.replace("fedloom_app:nothing", "evil:app"))
    flwr = {"FLWR_HOME": str(ward.folder / "superlink" / "flwr"), "FLWR_TELEMETRY_ENABLED": "0"}
    environment = {**ward.environment(), **flwr}

    def said(*words: str) -> dict[str, Any]:
        done = subprocess.run(
            [str(Path(sys.executable).parent / "flwr"), *words, "fedloom", "--format", "json"],
            env=environment, cwd=tmp_path, timeout=60, check=True, capture_output=True, text=True,
        )  # fmt: skip
        return dict(json.loads(done.stdout[done.stdout.index("{") :]))

    assert said("run", str(app))["success"]
    assert soon(lambda: said("list")["runs"][0]["status"].startswith("finished"), 60, 1.0)
    assert said("list")["runs"][0]["status"] == "finished:failed"
    assert not (tmp_path / "ran").exists()


def test_ports_of_the_operators_are_on_loopback(deployed: Any) -> None:
    """Another address of this machine reaches the gateway, and nothing beside it."""
    ward = deployed
    other = other_address()
    for port, reached in ((ward.port, True), (ward.operator, False), (ward.superlink, False)):
        with socket.socket() as one:
            one.settimeout(3)
            assert (one.connect_ex((other, port)) == 0) == reached, port


def other_address() -> str:
    """An address of this machine that is not 127.0.0.1."""
    for found in socket.getaddrinfo(socket.gethostname(), None, socket.AF_INET):
        address = str(found[4][0])
        if not address.startswith("127."):
            return address
    # On Linux all of 127.0.0.0/8 is this machine, and what is bound to 127.0.0.1 hears no other.
    return "127.0.0.2"


def test_a_revoked_device_is_out_within_a_second(
    deployed: Any,
    digits: Callable[..., Path],
    tiny_job: Callable[..., Any],
    soon: Callable[..., bool],
    tmp_path: Path,
    record_property: Callable[[str, object], None],
) -> None:
    """`revoke_seconds`: in the middle of a round; what it was at work on is left out."""
    from contextlib import ExitStack
    from dataclasses import replace

    from client_sdk.gateway import Gateway
    from client_sdk.home import Home
    from client_sdk.identity import Identity
    from coordinator.jobs.folder import JobFolder

    ward = deployed
    state, gate = ward.folder / "jobs" / "job" / "state.json", tmp_path / "gate"
    ask = tmp_path / "ask.py"
    ask.write_text(HOLDING.format(state=str(state), gate=str(gate)))
    job = tiny_job("lora")
    job = replace(job, rounds=replace(job.rounds, count=1, min_clients=2))
    with ExitStack() as stack:
        told = ward.token(quota=2)
        names = [ward.enroll(number, told) for number in range(2)]
        stack.enter_context(ward.running(0, digits(0, 40)))
        stack.enter_context(ward.running(1, digits(1, 40), "--function", f"{ask}:go"))
        ward.submit(job, "job")
        known = JobFolder(ward.folder / "jobs" / "job")

        assert soon(lambda: set(known.state().asked) == set(names), 120, 0.02), ward.logs()
        home = Home(ward.home(1))
        identity = Identity(home.folder)
        assert identity.membership is not None
        gateway = Gateway(home.coordinator(), identity.membership.authority, identity.key())
        gateway.check()
        ward.said("coordinator", "revoke", ward.folder, names[1], "--why", "stolen")
        revoked = time.monotonic()
        with pytest.raises(Exception, match="revoked"):
            gateway.check()
        seconds = time.monotonic() - revoked
        record_property("revoke_seconds", seconds)
        assert seconds < 1.0
        gate.touch()
        folder = ward.finish("job")
        (line,) = (folder / "metrics.jsonl").read_text().splitlines()
        report = json.loads(line)
        assert report["updates"] == 1
        (rejection,) = report["rejections"]
        assert (rejection["client"], rejection["code"]) == (names[1], "E218")
