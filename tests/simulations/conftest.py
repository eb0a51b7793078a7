# SPDX-License-Identifier: Apache-2.0
"""Whole tiny runs, and the parts of one."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pytest


@dataclass
class Played:
    """What rounds have given."""

    tensors: dict[str, np.ndarray]
    reports: list[Any] = field(default_factory=list)
    offset: dict[str, np.ndarray] = field(default_factory=dict)


@pytest.fixture(scope="session")
def make_setup(tiny_job: Callable[..., Any]) -> Callable[..., Any]:
    """A `Setup` of a tiny job, with whatever data it names."""
    from simulations.progress import SilentProgress
    from simulations.setup import set_up

    def make(method: str = "lora", **options: Any) -> Any:
        return set_up(tiny_job(method, **options), SilentProgress())

    return make


@pytest.fixture(scope="session")
def sign_setup() -> Callable[..., Any]:
    """The opened bundle of a setup, in a folder."""

    def sign(setup: Any, folder: Path) -> Any:
        from coordinator.bundles import write_bundle
        from edge_runtime import open_bundle
        from protocol.signing import new_key

        names: Sequence[str] = setup.dataset.class_names
        write_bundle(setup.job, setup.recipe, setup.compiled, names, new_key(), folder)
        return open_bundle(folder, public_key=None)

    return sign


@pytest.fixture
def play_rounds(
    make_setup: Callable[..., Any], sign_setup: Callable[..., Any], tmp_path: Path
) -> Callable[..., Played]:
    """Play a tiny job, on any backend, and give the final tensors and the reports."""
    from coordinator.journal import Journal
    from simulations.backends.play import play

    count = iter(range(100))

    def run(method: str = "lora", *, spoil: Callable[[Any], Any] | None = None, **options: Any):  # type: ignore[no-untyped-def]
        setup = make_setup(method, **options)
        if spoil is not None:
            setup = spoil(setup)
        folder = tmp_path / f"run-{next(count)}"
        folder.mkdir()
        bundle = sign_setup(setup, folder / "bundle")
        played = Played({})
        with Journal(folder / "journal.sqlite") as journal:
            result = play(setup, bundle, folder, journal, played.reports.append)
            played.tensors, played.offset = dict(result.tensors), dict(result.offset)
        return played

    return run
