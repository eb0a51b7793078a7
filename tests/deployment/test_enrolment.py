# SPDX-License-Identifier: Apache-2.0
"""The real thing on loopback, started by its own commands: from `init` to a revoked device."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import pytest

pytestmark = pytest.mark.slow


def test_from_init_to_a_revoked_device(ward: Any, answered: Callable[..., int]) -> None:
    folder, home = ward.folder, ward.home(0)
    ward.init()
    with ward.up():
        told = ward.token()
        wrong = [*told[:4], "--fingerprint", "0" * 64, "--dir", home]
        assert "somebody may stand in between" in ward.said("device", "enroll", *wrong, code=2)
        assert not home.exists(), "nothing was accepted"

        name = ward.enroll(0, told)
        mine = json.loads(ward.said("device", "status", "--dir", home, "--json"))
        assert mine["certificate_valid"] and mine["coordinator"] == "ward"
        (listed,) = json.loads(ward.said("coordinator", "devices", folder, "--json"))
        assert listed["name"] == name and listed["versions"]["fedloom"] != "none"
        other = [*told, "--dir", ward.home(1)]
        assert "ask the operator for a new one" in ward.said("device", "enroll", *other, code=2)

        # Metrics are the operator's alone.
        metrics = f"http://127.0.0.1:{ward.operator}/metrics"
        assert answered(metrics) == 401
        assert answered(metrics, (folder / "operator.token").read_text()) == 200

        ward.said("coordinator", "revoke", folder, name)
        ward.said("device", "leave", "--dir", home)
        assert not home.exists()
    events = json.loads(ward.said("coordinator", "audit", folder, "--json"))
    assert [entry["event"] for entry in events["entries"]] == [
        "token", "enrolled", "refused", "revoked",
    ]  # fmt: skip
    assert events["broken"] is None
