# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import stat
from pathlib import Path
from typing import Any

import pytest

from coordinator import deployment
from coordinator.deployment import SETTINGS_FILE, Deployment, Settings
from coordinator.errors import DeploymentError
from protocol.signing import public_key_hex

SETTINGS = Settings(name="ward", addresses=("localhost", "192.0.2.7", "2001:db8::1"))


def test_what_was_made_is_what_is_opened(tmp_path: Path) -> None:
    folder = tmp_path / "made"
    with Deployment.create(folder, SETTINGS) as made:
        fingerprint, token = made.authority.fingerprint, made.operator_token()
        signer = public_key_hex(made.signing_key)
    with Deployment(folder) as again:
        assert again.settings == SETTINGS
        assert again.authority.fingerprint == fingerprint
        assert public_key_hex(again.signing_key) == signer
        assert again.operator_token() == token and len(token) == 64


def test_secrets_are_their_owners_alone(tmp_path: Path) -> None:
    folder = tmp_path / "made"
    Deployment.create(folder, SETTINGS).close()
    assert stat.S_IMODE(folder.stat().st_mode) == 0o700
    secret = ("signing.pem", "operator.token", "registry.sqlite", "authority/authority.key")
    for name in secret:
        assert stat.S_IMODE((folder / name).stat().st_mode) == 0o600, name


def test_a_deployment_is_not_made_twice(tmp_path: Path) -> None:
    Deployment.create(tmp_path, SETTINGS).close()
    before = {path: path.read_bytes() for path in tmp_path.rglob("*.pem")}
    with pytest.raises(DeploymentError, match="there is a deployment already"):
        Deployment.create(tmp_path, SETTINGS)
    assert {path: path.read_bytes() for path in tmp_path.rglob("*.pem")} == before


@pytest.mark.parametrize("step", ["save_private_key", "write_whole"])
def test_making_goes_on_where_it_was_cut_off(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, step: str
) -> None:
    def fail(*_: Any, **__: Any) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as broken, pytest.raises(KeyboardInterrupt):
        broken.setattr(deployment, step, fail)
        Deployment.create(tmp_path, SETTINGS)
    with pytest.raises(DeploymentError, match="expected a deployment, found none"):
        Deployment(tmp_path)
    authority = (tmp_path / "authority" / "authority.pem").read_bytes()
    with Deployment.create(tmp_path, SETTINGS) as made:
        assert made.authority.pem.encode() == authority


@pytest.mark.parametrize(("changed", "words"), [
    ({"name": "two words"}, "name"),
    ({"addresses": ()}, "at least one name or IP address"),
    ({"addresses": ("Upper.example",)}, "DNS names in lower case"),
    ({"addresses": ("-a.example",)}, "DNS names in lower case"),
    ({"port": 0}, "port: expected a port from 1 to 65535, found 0"),
    ({"split_port": 70_000}, "split_port: expected a port"),
    ({"port": 8444}, "expected different ones"),
    ({"port": True}, "found True"),
])  # fmt: skip
def test_settings_that_cannot_be_meant_are_refused(changed: dict[str, Any], words: str) -> None:
    from coordinator.errors import CoordinatorError

    with pytest.raises(CoordinatorError, match=words):
        Settings(**{"name": "ward", "addresses": ("localhost",), **changed})


@pytest.mark.parametrize(("text", "words"), [
    ("name = ", "expected TOML"),
    ('name = "a"\naddresses = "localhost"', "expected a list of texts, found localhost"),
    ('name = 3\naddresses = ["localhost"]', "name: expected a text, found 3"),
    ('name = "a"\naddresses = ["localhost"]\nprt = 1', "expected the keys .*port.*, found prt"),
    ('name = "a"\naddresses = ["localhost"]\nport = "x"', "deployment.toml: port: expected"),
])  # fmt: skip
def test_a_settings_file_says_what_is_wrong_in_it(tmp_path: Path, text: str, words: str) -> None:
    Deployment.create(tmp_path, SETTINGS).close()
    (tmp_path / SETTINGS_FILE).write_text(text)
    with pytest.raises(DeploymentError, match=words):
        Deployment(tmp_path)
