# SPDX-License-Identifier: Apache-2.0
"""Facts of the machine that a device runs on, from Linux's own files and without a daemon."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path
from typing import NamedTuple


class Fact(NamedTuple):
    """Something of the machine, None where it cannot be known, and where that was seen."""

    value: int | None
    seen: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Machine:
    """Where facts are read, and the clock. Raises nothing: what cannot be read is unknown."""

    sys: Path = Path("/sys")
    proc: Path = Path("/proc")
    now: Callable[[], datetime] = field(default=datetime.now)
    """Local time."""

    def on_mains(self) -> Fact:
        """Whether power comes from the wall. A machine without a battery runs on mains."""
        try:
            supplies = _supplies(self.sys)
        except OSError as error:
            return Fact(None, f"{self.sys}/class/power_supply cannot be read ({error.strerror})")
        plugs = [supply for supply in supplies if supply.kind in ("Mains", "USB", "Wireless")]
        online = [supply for supply in plugs if supply.read("online") not in ("", "0")]
        if online:
            return Fact(True, f"{online[0].name} is online")
        batteries = [supply for supply in supplies if supply.kind in ("Battery", "UPS")]
        states = {supply.read("status") for supply in batteries}
        if not batteries:
            if plugs:
                return Fact(False, f"{plugs[0].name} is offline")
            return Fact(True, "there is no battery")
        if "Discharging" in states:
            return Fact(False, "a battery is discharging")
        if states & {"Charging", "Full", "Not charging"}:
            # Nothing discharges, so something else feeds the machine.
            return Fact(True, "no battery is discharging")
        return Fact(None, "the batteries do not say whether they are charging")

    def battery_percent(self) -> Fact:
        """The charge of the machine's batteries, their mean where there are several."""
        try:
            supplies = _supplies(self.sys)
        except OSError as error:
            return Fact(None, f"{self.sys}/class/power_supply cannot be read ({error.strerror})")
        batteries = [supply for supply in supplies if supply.kind in ("Battery", "UPS")]
        found = [supply.read("capacity") for supply in batteries]
        known = [int(text) for text in found if text.isdecimal()]
        if not known:
            return Fact(None, "no battery tells its charge" if found else "there is no battery")
        return Fact(sum(known) // len(known), ", ".join(supply.name for supply in batteries))

    def metered(self) -> Fact:
        """Whether the way out is paid by the byte.

        Mobile modems and phones on a cable are, Ethernet is not; a Wi-Fi may be a phone's. From
        inside a container the host's own link cannot be seen.
        """
        device = self._way_out()
        if device is None:
            return Fact(None, "there is no default route")
        folder = self.sys / "class" / "net" / device
        kind = dict(line.partition("=")[::2] for line in _text(folder / "uevent").splitlines()).get(
            "DEVTYPE", ""
        )
        driver = (folder / "device" / "driver").resolve().name
        if kind == "wwan" or re.match(r"wwan|ppp|rmnet|ccmni", device):
            return Fact(True, f"{device} is a mobile link")
        if driver in ("rndis_host", "ipheth", "cdc_ncm", "cdc_mbim", "qmi_wwan", "huawei_cdc_ncm"):
            return Fact(True, f"{device} is a phone or a modem on a cable ({driver})")
        if kind in ("wlan", "bluetooth") or (folder / "wireless").exists():
            return Fact(None, f"{device} is wireless and may be a phone's hotspot")
        if re.match(r"eth|en|em", device) and _text(folder / "type") == "1":
            return Fact(False, f"{device} is wired")
        return Fact(None, f"{device} may be any kind of link")

    def free_memory_mb(self) -> Fact:
        """MiB that programs may still take: of the machine, or of its control group if less."""
        found = re.search(r"^MemAvailable:\s+(\d+) kB$", _text(self.proc / "meminfo"), re.MULTILINE)
        if found is None:
            return Fact(None, f"{self.proc}/meminfo does not tell it")
        free, seen = int(found[1]) * 1024, "meminfo"
        group = re.search(r"^0::(/.*)$", _text(self.proc / "self" / "cgroup"), re.MULTILINE)
        folder = self.sys / "fs" / "cgroup" / (group[1].lstrip("/") if group else "")
        limit, used = _text(folder / "memory.max"), _text(folder / "memory.current")
        if limit.isdecimal() and used.isdecimal() and int(limit) - int(used) < free:
            free, seen = max(int(limit) - int(used), 0), "its control group"
        return Fact(free >> 20, seen)

    def _way_out(self) -> str | None:
        """The network device of the default route with the lowest metric, of IPv4 before IPv6."""
        routes = []
        for line in _text(self.proc / "net" / "route").splitlines()[1:]:
            parts = line.split()
            # Flags: 1 is up, 0x200 refuses.
            default = len(parts) > 7 and parts[1] == parts[7] == "00000000"
            if default and int(parts[3], 16) & 0x201 == 1:
                routes.append((0, int(parts[6]), parts[0]))
        for line in _text(self.proc / "net" / "ipv6_route").splitlines():
            parts = line.split()
            default = len(parts) > 9 and set(parts[0]) == {"0"} and parts[1] == "00"
            if default and parts[9] != "lo" and int(parts[8], 16) & 0x201 == 1:
                routes.append((1, int(parts[5], 16), parts[9]))
        return min(routes)[2] if routes else None


@dataclass(frozen=True, slots=True)
class _Supply:
    folder: Path

    @property
    def name(self) -> str:
        return self.folder.name

    @property
    def kind(self) -> str:
        return self.read("type")

    def read(self, name: str) -> str:
        return _text(self.folder / name)


def _supplies(sys: Path) -> list[_Supply]:
    """What feeds the machine; batteries of mice and the like are left out. Raises: OSError."""
    found = [_Supply(entry) for entry in sorted((sys / "class" / "power_supply").iterdir())]
    return [supply for supply in found if supply.read("scope") != "Device"]


def _text(path: Path) -> str:
    """A small file of the kernel, stripped; "" where it cannot be read."""
    try:
        return path.read_text(encoding="utf-8", errors="replace").strip()
    except OSError:
        return ""
