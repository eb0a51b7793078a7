# SPDX-License-Identifier: Apache-2.0
"""What a device's owner decides, remembered in `settings.json` of the device's folder."""

from __future__ import annotations

import dataclasses
import json
import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

from client_sdk.conditions import Conditions
from client_sdk.errors import ConditionsError, SettingsError

_MIB: Final = 1 << 20
_MAX_BYTES: Final = 64 * 1024


@dataclass(frozen=True, slots=True, kw_only=True)
class Settings:
    """What a device trains on, and when."""

    data: str
    """As `client_sdk.data.open_source` takes it; paths are absolute."""
    held_out: float = 0.1
    """Share of the samples that is tested on and never trained on, where the source sets none
    apart itself; 0 for none."""
    tokenizer: str = ""
    """Folder of a tokenizer.json for texts, in the place of the one that a bundle brings; "" for
    that one."""
    bundles_mb: int = 4096  # MiB of disk that jobs' bundles may take
    outbox_mb: int = 256  # MiB of disk for updates that wait to be acknowledged
    conditions: Conditions = field(default_factory=Conditions)

    def __post_init__(self) -> None:
        for name in ("data", "tokenizer"):
            if not isinstance(getattr(self, name), str):
                raise SettingsError(f"{name}: expected text, found {getattr(self, name)!r}")
        if not self.data.strip():
            raise SettingsError("data: expected where this device's data are, found nothing")
        share = self.held_out
        if isinstance(share, bool) or not isinstance(share, int | float) or not 0 <= share < 1:
            raise SettingsError(f"held_out: expected a share of 0 to below 1, found {share!r}")
        for name in ("bundles_mb", "outbox_mb"):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int) or not 1 <= value <= 1 << 30:
                raise SettingsError(f"{name}: expected MiB, 1 or more, found {value!r}")

    @property
    def bundle_bytes(self) -> int:
        """Disk for bundles."""
        return self.bundles_mb * _MIB

    @property
    def outbox_bytes(self) -> int:
        """Disk for the outbox."""
        return self.outbox_mb * _MIB


def absolute_source(address: str) -> str:
    """A source's address that means the same from any folder; that of a module stays as it is."""
    if not address:
        return ""
    place, colon, name = address.rpartition(":")
    if colon and place.endswith(".py") and name.isidentifier():
        return f"{_absolute(place)}:{name}"
    path = Path(address).expanduser()
    if ":" in address and not path.exists():
        return address
    return _absolute(address)


def pack_settings(settings: Settings) -> bytes:
    """As they are kept."""
    return json.dumps(dataclasses.asdict(settings), indent=2).encode() + b"\n"


def unpack_settings(raw: bytes) -> Settings:
    """Raises: SettingsError, ConditionsError."""
    try:
        found = json.loads(raw) if len(raw) <= _MAX_BYTES else None
    except ValueError as error:
        raise SettingsError(f"settings: expected JSON ({error}); give them again") from None
    conditions = found.get("conditions", {}) if isinstance(found, dict) else {}
    return _made(Settings, found, conditions=_made(Conditions, conditions))


def _made(kind: Any, found: object, **given: object) -> Any:
    known = [item.name for item in dataclasses.fields(kind)]
    if not isinstance(found, dict):
        raise SettingsError(f"settings: expected {', '.join(known)}; found none; give them again")
    if strange := sorted(set(found) - set(known)):
        raise SettingsError(
            f"settings: expected {', '.join(known)}; found {strange[0]!r}: another release of "
            "fedloom wrote it; give the settings again"
        )
    try:
        return kind(**(found | given))
    except TypeError as error:
        if issubclass(kind, Conditions):
            raise ConditionsError(f"settings: {error}; give them again") from None
        raise SettingsError(f"settings: {error}; give them again") from None


def _absolute(path: str) -> str:
    return os.path.abspath(os.path.expanduser(path))
