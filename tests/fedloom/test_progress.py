# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import io
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import pytest

from fedloom.progress import PlainProgress, RichProgress, progress_on


@dataclass(frozen=True)
class Round:
    round: int
    accuracy: float | None
    uplink_bytes: int = 1_000_000
    downlink_bytes: int = 2_000_000
    clients: int = 20
    rejections: tuple[str, ...] | int = ()
    seconds: float = 2.0
    loss: float | None = None
    privacy: Mapping[str, Any] = field(default_factory=dict)


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_plain_progress_says_each_round_in_one_line() -> None:
    stream = io.StringIO()
    progress = PlainProgress(stream)
    progress.stage("compiling")
    progress.start(2, 20)
    progress.round(Round(1, 0.5))
    progress.round(Round(2, None, rejections=("a", "b")))
    progress.finish({})
    lines = stream.getvalue().splitlines()
    assert lines[:2] == ["compiling", "2 rounds over 20 clients"]
    assert lines[2].startswith(
        "round 1/2  accuracy 0.5000  up 1 MB  down 2 MB  10.0 clients/s  left "
    )
    # An unevaluated round repeats the last accuracy; bytes add up.
    assert lines[3].startswith(
        "round 2/2  accuracy 0.5000  up 2 MB  down 4 MB  10.0 clients/s  2 rejected  left 0.0 s"
    )


def test_a_private_round_says_what_was_spent() -> None:
    stream = io.StringIO()
    progress = PlainProgress(stream)
    progress.start(2, 20)
    spent: dict[str, Any] = {
        "epsilon": 2.31456, "budget": 8.0, "noise_multiplier": 0.9, "clip": 0.1234,
        "unclipped": None,
    }  # fmt: skip
    progress.round(Round(1, 0.5, privacy=spent))
    progress.round(Round(2, 0.5, privacy={**spent, "budget": None, "unclipped": 0.412}))
    first, second = stream.getvalue().splitlines()[1:]
    assert "accuracy 0.5000  epsilon 2.315 of 8  noise 0.9  clip 0.123  up" in first
    assert "epsilon 2.315  noise 0.9  clip 0.123  unclipped 41 %" in second


def test_rich_progress_draws_a_bar_and_gives_the_terminal_back_after_a_failure() -> None:
    terminal = Terminal()
    with pytest.raises(RuntimeError, match="boom"), progress_on(terminal) as progress:
        assert isinstance(progress, RichProgress)
        progress.stage("compiling [lora]")
        progress.start(2, 20)
        progress.round(Round(1, 0.93, rejections=1))
        raise RuntimeError("boom")
    shown = terminal.getvalue()
    assert "compiling [lora]" in shown
    assert "0.9300" in shown
    assert shown.rstrip("\n").endswith("\x1b[?25h")  # the cursor is back


def test_progress_is_plain_when_the_stream_is_no_terminal() -> None:
    with progress_on(io.StringIO()) as progress:
        assert isinstance(progress, PlainProgress)


def test_rich_progress_refuses_a_round_before_the_start() -> None:
    with pytest.raises(RuntimeError, match="before start"):
        RichProgress(Terminal()).round(Round(1, None))
