# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest

from client_sdk.conditions import Conditions
from client_sdk.errors import ConditionsError, SettingsError
from client_sdk.settings import Settings, absolute_source, pack_settings, unpack_settings


def test_settings_come_back_as_they_were_kept() -> None:
    conditions = Conditions(hours="22:00-06:00", threads=2)
    settings = Settings(data="/data", held_out=0.25, tokenizer="/words", conditions=conditions)
    assert unpack_settings(pack_settings(settings)) == settings
    assert unpack_settings(b'{"data": "/data"}') == Settings(data="/data")
    assert (settings.bundle_bytes, settings.outbox_bytes) == (4 << 30, 256 << 20)


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"data": " "}, "data: expected where this device's data are"),
        ({"data": 3}, "data: expected text, found 3"),
        ({"data": "a", "tokenizer": None}, "tokenizer: expected text"),
        ({"data": "a", "held_out": 1}, "held_out: expected a share of 0 to below 1, found 1"),
        ({"data": "a", "held_out": "0.1"}, "held_out: expected a share"),
        ({"data": "a", "bundles_mb": 0}, "bundles_mb: expected MiB, 1 or more, found 0"),
        ({"data": "a", "outbox_mb": 1.5}, "outbox_mb: expected MiB"),
        ({"data": "a", "hours": "x"}, "settings: expected data, .* found 'hours'"),
        ({"held_out": 0.1}, "settings: .*'data'"),
        ([], "settings: expected data, .* found none"),
    ],
)
def test_settings_that_cannot_be_meant_are_refused(given: Any, said: str) -> None:
    with pytest.raises(SettingsError, match=said):
        unpack_settings(json.dumps(given).encode())


def test_kept_conditions_that_cannot_be_meant_are_refused() -> None:
    with pytest.raises(ConditionsError, match="hours: expected"):
        unpack_settings(b'{"data": "a", "conditions": {"hours": "noon"}}')
    with pytest.raises(SettingsError, match="expected JSON"):
        unpack_settings(b"{")


def test_source_means_the_same_from_any_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "a:b").mkdir()
    assert absolute_source("images") == str(tmp_path / "images")
    assert absolute_source("own.py:load") == f"{tmp_path}/own.py:load"
    assert absolute_source("package.module:load") == "package.module:load"
    assert absolute_source("a:b") == str(tmp_path / "a:b")
    assert absolute_source("~/images") == os.path.expanduser("~/images")
    assert absolute_source("") == ""
