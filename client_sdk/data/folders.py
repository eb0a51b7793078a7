# SPDX-License-Identifier: Apache-2.0
"""What kind of data a folder holds, by the names in it."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

FolderKind = Literal["idx", "jsonl", "npz", "images"]


def kind_of_folder(folder: Path) -> FolderKind | None:
    """IDX pairs, lines of jsonl, train.npz, or a subfolder a class; None for anything else."""
    entries = list(folder.iterdir())
    if any("-idx" in entry.name and "-ubyte" in entry.name for entry in entries):
        return "idx"
    if any(entry.suffix == ".jsonl" for entry in entries):
        return "jsonl"
    if any(entry.name == "train.npz" for entry in entries):
        return "npz"
    if any(entry.is_dir() and not entry.name.startswith(".") for entry in entries):
        return "images"
    return None


def entries_of(folder: Path) -> str:
    """The first names in a folder, for an error message."""
    return ", ".join(sorted(entry.name for entry in folder.iterdir())[:5]) or "nothing"
