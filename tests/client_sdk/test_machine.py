# SPDX-License-Identifier: Apache-2.0
"""Facts of the machine, read from copies of what Linux shows."""

from __future__ import annotations

import random
from pathlib import Path

import pytest

from client_sdk.machine import Machine


@pytest.fixture
def machine(tmp_path: Path) -> Machine:
    (tmp_path / "sys" / "class" / "power_supply").mkdir(parents=True)
    (tmp_path / "proc" / "net").mkdir(parents=True)
    return Machine(sys=tmp_path / "sys", proc=tmp_path / "proc")


def supply(machine: Machine, name: str, **files: object) -> None:
    folder = machine.sys / "class" / "power_supply" / name
    folder.mkdir()
    for file, text in files.items():
        (folder / file).write_text(f"{text}\n")


def route(machine: Machine, *rows: tuple[str, int, int]) -> None:
    """IPv4 default routes: device, flags, metric; and one that is no default route."""
    lines = ["Iface\tDestination\tGateway\tFlags\tRefCnt\tUse\tMetric\tMask\tMTU\tWindow\tIRTT"]
    lines += [f"lan0\t0000A8C0\t00000000\t0001\t0\t0\t{0}\t00FFFFFF\t0\t0\t0"]
    lines += [f"{d}\t00000000\t0100A8C0\t{f:04X}\t0\t0\t{m}\t00000000\t0\t0\t0" for d, f, m in rows]
    (machine.proc / "net" / "route").write_text("\n".join(lines) + "\n")


def device(machine: Machine, name: str, *, kind: str = "", driver: str = "", type: int = 1) -> None:
    folder = machine.sys / "class" / "net" / name
    (folder / "device").mkdir(parents=True)
    (folder / "type").write_text(f"{type}\n")
    (folder / "uevent").write_text(f"DEVTYPE={kind}\nINTERFACE={name}\n" if kind else "IFINDEX=2\n")
    if driver:
        target = machine.sys / "bus" / "drivers" / driver
        target.mkdir(parents=True)
        (folder / "device" / "driver").symlink_to(target)


# Power


def test_machine_without_a_battery_runs_on_mains(machine: Machine) -> None:
    assert machine.on_mains() == (True, "there is no battery")
    assert machine.battery_percent() == (None, "there is no battery")
    supply(machine, "mouse", type="Battery", scope="Device", status="Discharging", capacity=9)
    assert machine.on_mains().value is True and machine.battery_percent().value is None


@pytest.mark.parametrize(
    ("plug", "status", "mains"),
    [
        ("1", "Charging", True),
        ("1", "Discharging", True),  # a plug too weak for what runs
        ("0", "Discharging", False),
        ("0", "Not charging", True),  # fed by a dock that shows as no plug
        ("0", "Unknown", None),
        ("0", "", None),
    ],
)
def test_laptop_knows_whether_it_is_plugged_in(
    machine: Machine, plug: str, status: str, mains: bool | None
) -> None:
    supply(machine, "AC", type="Mains", online=plug)
    supply(machine, "BAT0", type="Battery", status=status, capacity=41)
    supply(machine, "BAT1", type="Battery", status="Unknown", capacity=80)
    assert machine.on_mains().value is mains
    assert machine.battery_percent() == (60, "BAT0, BAT1")


def test_battery_that_does_not_tell_is_unknown(machine: Machine) -> None:
    supply(machine, "BAT0", type="Battery", capacity="?")
    assert machine.battery_percent() == (None, "no battery tells its charge")


def test_power_is_unknown_when_linux_does_not_show_it(tmp_path: Path) -> None:
    machine = Machine(sys=tmp_path, proc=tmp_path)
    for fact in (machine.on_mains(), machine.battery_percent()):
        assert fact.value is None and "No such file" in fact.seen


# Link


@pytest.mark.parametrize(
    ("name", "kind", "driver", "metered", "words"),
    [
        ("eth0", "", "e1000e", False, "eth0 is wired"),
        ("enp3s0", "", "", False, "wired"),
        ("wlp2s0", "wlan", "iwlwifi", None, "hotspot"),
        ("wwan0", "wwan", "qmi_wwan", True, "mobile"),
        ("ppp0", "", "", True, "mobile"),
        ("usb0", "", "rndis_host", True, "phone or a modem on a cable"),
        ("enx02", "", "cdc_ncm", True, "cdc_ncm"),
        ("tun0", "", "", None, "any kind of link"),
    ],
)
def test_link_is_judged_by_what_carries_the_default_route(
    machine: Machine, name: str, kind: str, driver: str, metered: bool | None, words: str
) -> None:
    device(machine, name, kind=kind, driver=driver)
    device(machine, "other0", kind="wwan")
    route(machine, ("other0", 3, 600), (name, 3, 100), ("eth9", 0x203, 1), ("eth8", 2, 0))
    fact = machine.metered()
    assert fact.value is metered and words in fact.seen


def test_link_of_ipv6_is_found_when_there_is_no_other(machine: Machine) -> None:
    assert machine.metered() == (None, "there is no default route")
    zeros = "0" * 32
    (machine.proc / "net" / "ipv6_route").write_text(
        f"{zeros} 00 {zeros} 00 {zeros} ffffffff 00000001 00000000 00200200 lo\n"
        f"{zeros} 00 {zeros} 00 fe80{'0' * 28} 00000400 00000001 00000000 00000003 eth0\n"
    )
    device(machine, "eth0")
    assert machine.metered() == (False, "eth0 is wired")


# Memory


def test_free_memory_is_the_least_of_machine_and_control_group(machine: Machine) -> None:
    assert machine.free_memory_mb().value is None
    (machine.proc / "meminfo").write_text("MemTotal: 9000000 kB\nMemAvailable:  4096000 kB\n")
    assert machine.free_memory_mb() == (4000, "meminfo")
    (machine.proc / "self").mkdir()
    (machine.proc / "self" / "cgroup").write_text("0::/app.slice\n")
    group = machine.sys / "fs" / "cgroup" / "app.slice"
    group.mkdir(parents=True)
    (group / "memory.current").write_text(f"{200 << 20}\n")
    for limit, expected in (("max", 4000), (512 << 20, 312), (100 << 20, 0), (64 << 30, 4000)):
        (group / "memory.max").write_text(f"{limit}\n")
        assert machine.free_memory_mb().value == expected


def test_this_machine_can_be_looked_at() -> None:
    machine = Machine()
    for fact in (machine.on_mains(), machine.battery_percent(), machine.metered()):
        assert fact.seen
    assert (machine.free_memory_mb().value or 0) > 0
    assert machine.now().tzinfo is None


def test_facts_of_broken_files_raise_nothing(machine: Machine) -> None:
    rng = random.Random(0)
    supply(machine, "BAT0", type="Battery")
    device(machine, "eth0")
    route(machine, ("eth0", 3, 0))
    files = [
        machine.sys / "class" / "power_supply" / "BAT0" / "type",
        machine.sys / "class" / "power_supply" / "BAT0" / "capacity",
        machine.sys / "class" / "net" / "eth0" / "uevent",
        machine.proc / "meminfo",
    ]
    for _ in range(50):
        for file in files:
            file.write_bytes(rng.randbytes(20))
        machine.on_mains(), machine.battery_percent(), machine.metered(), machine.free_memory_mb()
