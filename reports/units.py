# SPDX-License-Identifier: Apache-2.0
"""Numbers for people, the same in the terminal, in reports and in comparisons."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any


def bytes_text(count: float) -> str:
    """Bytes in powers of 1000: "812 B", "4.23 MB"."""
    return _scaled(count, ("B", "kB", "MB", "GB", "TB"))


def count_text(count: float) -> str:
    """A count in powers of 1000: "812", "9.47 k", "1.2 M"."""
    return _scaled(count, ("", "k", "M", "G", "T", "P")).rstrip()


def duration_text(seconds: float) -> str:
    """Seconds: "7 s", "12:30", "1:02:03"; below ten seconds with one decimal."""
    if seconds < 9.95:
        return f"{seconds:.1f} s"
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    hours, rest = divmod(whole, 3600)
    minutes, left = divmod(rest, 60)
    return f"{hours}:{minutes:02}:{left:02}" if hours else f"{minutes}:{left:02}"


def _scaled(value: float, units: tuple[str, ...]) -> str:
    for unit in units[:-1]:
        if abs(value) < 999.5:
            return f"{value:.3g} {unit}"
        value /= 1000
    return f"{value:.3g} {units[-1]}"


def axis_percent(value: float) -> str:
    """A share as a tick says it: as many digits as close ticks need to differ."""
    return f"{100 * value:.4g} %"


def privacy_words(privacy: Mapping[str, Any]) -> str:
    """What a private job has spent, in a few words; "" for a job that promises nothing."""
    if not privacy:
        return ""
    spent = f"epsilon {privacy['epsilon']:.3f}"
    if privacy.get("budget"):
        spent += f" of {privacy['budget']:g}"
    words = [spent, f"noise {privacy['noise_multiplier']:g}", f"clip {privacy['clip']:.3g}"]
    if privacy.get("unclipped") is not None:
        words.append(f"unclipped {100 * privacy['unclipped']:.0f} %")
    return "  ".join(words)
