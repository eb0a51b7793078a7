# SPDX-License-Identifier: Apache-2.0
"""Debian's package descriptions, read from the machine's own package lists: short texts, labelled
by archive section, written by maintainers whose shares are very uneven."""

from __future__ import annotations

import hashlib
import subprocess
import tempfile
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass

import numpy as np

from simulations.datasets.dataset import Dataset, take
from simulations.errors import DataError

COMMAND = ("apt-cache", "dumpavail")
LEFT_OUT = frozenset({"libs", "oldlibs", "libdevel", "doc"})
KEPT_SECTIONS = 16
TEST_FRACTION = 0.15
MAX_TEXT_CHARACTERS = 1000  # the synopsis and the first lines; models read far less
GROUP_HEX_DIGITS = 12
FIELDS = frozenset({"Package", "Maintainer", "Section", "Filename"})
MEND = "run: apt-get update (on Debian or a derivative, as root)"


@dataclass(frozen=True, slots=True, kw_only=True)
class Description:
    """One package: its name, what it says of itself, its archive section, who maintains it."""

    package: str
    text: str
    section: str
    maintainer: str


def load_debian_descriptions(*, seed: int) -> Dataset:
    """The descriptions of every available package of the 16 largest sections.

    Libraries, development files and documentation are left out. `groups` are hashed maintainers;
    a test set drawn at random by `seed` comes from all of them.

    Raises: DataError without apt-cache or with empty package lists.
    Cost: about 2 s on one core for the 63,000 packages of Debian 12.
    """
    return dataset_of(parse_descriptions(_dumpavail()), seed=seed)


def _dumpavail() -> Iterator[str]:
    with tempfile.TemporaryFile() as errors:
        try:
            process = subprocess.Popen(
                COMMAND, stdout=subprocess.PIPE, stderr=errors, encoding="utf-8", errors="replace"
            )
        except OSError as error:
            raise DataError(
                f"debian-descriptions: expected the command {COMMAND[0]} of a Debian machine, "
                f"found {error}; there, {MEND}"
            ) from error
        with process:
            if process.stdout is None:
                raise DataError(f"debian-descriptions: {' '.join(COMMAND)} has no output")
            yield from process.stdout
        if process.returncode != 0:
            errors.seek(0)
            said = errors.read(500).decode("utf-8", "replace").strip()
            raise DataError(
                f"debian-descriptions: {' '.join(COMMAND)} ended with {process.returncode}: "
                f"{said or 'no message'}; {MEND}"
            )


def parse_descriptions(lines: Iterable[str]) -> list[Description]:
    """Descriptions in the order of package names, one a package, from Debian control stanzas."""
    found: dict[str, Description] = {}
    for fields in _stanzas(lines):
        # What is installed but in no list (Filename is missing) differs from machine to machine.
        if not fields.keys() >= FIELDS or not fields.get("Description"):
            continue
        name = fields["Package"]
        found.setdefault(
            name,
            Description(
                package=name,
                text=fields["Description"][:MAX_TEXT_CHARACTERS],
                section=fields["Section"].rsplit("/", 1)[-1],
                maintainer=fields["Maintainer"],
            ),
        )
    return [found[name] for name in sorted(found)]


def _stanzas(lines: Iterable[str]) -> Iterator[Mapping[str, str]]:
    fields: dict[str, str] = {}
    key = ""
    for line in lines:
        line = line.rstrip("\n")
        if not line:
            if fields:
                yield fields
            fields, key = {}, ""
        elif line[0] in " \t":
            if key == "Description" and len(fields[key]) < MAX_TEXT_CHARACTERS:
                rest = line.strip()
                if rest != ".":  # a lone dot stands for an empty line
                    fields[key] += f" {rest}"
        else:
            key, _, value = line.partition(":")
            value = value.strip()
            if key == "Description-en":  # the form with the long text, where lists have it
                key = "Description"
                fields.pop(key, None)
            if key == "Description" and key in fields:
                key = ""
            elif key == "Description":
                fields[key] = value if value.endswith((".", "!", "?")) else f"{value}."
            elif key in FIELDS:
                fields[key] = value
    if fields:
        yield fields


def dataset_of(descriptions: list[Description], *, seed: int) -> Dataset:
    """Labels, groups and the test split for descriptions sorted by package name."""
    counts = Counter(d.section for d in descriptions if d.section not in LEFT_OUT)
    if not counts:
        raise DataError(
            f"debian-descriptions: expected package lists with descriptions, found "
            f"{len(descriptions)} packages; {MEND}"
        )
    largest = sorted(counts, key=lambda section: (-counts[section], section))[:KEPT_SECTIONS]
    names = tuple(sorted(largest))
    index = {name: i for i, name in enumerate(names)}
    kept = [d for d in descriptions if d.section in index]
    held = round(len(kept) * TEST_FRACTION)
    if len(names) < 2 or not 0 < held < len(kept):
        raise DataError(
            f"debian-descriptions: expected packages of at least 2 sections, found {len(kept)} "
            f"packages of {', '.join(names)}; {MEND}"
        )
    order = np.random.default_rng([seed, 0xDEB]).permutation(len(kept))
    texts = np.empty(len(kept), dtype=object)
    texts[:] = [d.text for d in kept]
    arrays = {
        "texts": texts,
        "labels": np.array([index[d.section] for d in kept], dtype=np.int64),
    }
    groups = np.array([_hashed(d.maintainer) for d in kept])
    return Dataset(
        name="debian-descriptions",
        kind="text",
        train=take(arrays, order[held:]),
        test=take(arrays, order[:held]),
        class_names=names,
        groups=groups[order[held:]],
    )


def _hashed(maintainer: str) -> str:
    """A stable short name that keeps people's names out of reports. It hides nothing from who has
    the package lists: they are public."""
    return hashlib.sha256(maintainer.encode("utf-8")).hexdigest()[:GROUP_HEX_DIGITS]
