# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import sys

import numpy as np
import pytest

from simulations.datasets import debian_descriptions
from simulations.datasets.debian_descriptions import (
    Description,
    dataset_of,
    load_debian_descriptions,
    parse_descriptions,
)
from simulations.errors import DataError

STANZAS = """\
Package: zebra
Maintainer: Ann <ann@example.org>
Depends: libc6
Description-en: Stripes for all
 The first paragraph,
 in two lines.
 .
 The second.
Tag: role::program,
 use::gameplaying
Section: non-free/games
Filename: pool/z.deb

Package: ant
Maintainer: Bob <bob@example.org>
Description: Small worker
Description-en: Small worker with a longer story
 Told here.
Section: utils
Filename: pool/a.deb

Package: ant
Maintainer: Bob <bob@example.org>
Description: An older ant
Section: utils
Filename: pool/a1.deb

Package: local
Maintainer: Me
Description: Installed by hand, in no list
Section: utils
Status: install ok installed

Package: silent
Maintainer: Bob <bob@example.org>
Section: utils
Filename: pool/s.deb
"""


def many(per_section: dict[str, int]) -> list[Description]:
    return [
        Description(
            package=f"{section}-{i:03}",
            text=f"{section} number {i}.",
            section=section,
            maintainer=f"maintainer {i % 3}",
        )
        for section, count in per_section.items()
        for i in range(count)
    ]


def test_parse_takes_long_texts_and_the_first_of_each_package() -> None:
    ant, zebra = parse_descriptions(STANZAS.splitlines(keepends=True))
    assert zebra == Description(
        package="zebra",
        text="Stripes for all. The first paragraph, in two lines. The second.",
        section="games",
        maintainer="Ann <ann@example.org>",
    )
    assert ant.text == "Small worker with a longer story. Told here."


def test_parse_prefers_the_long_form_whatever_the_order() -> None:
    stanza = ["Package: p", "Maintainer: m", "Section: s", "Filename: f"]
    both = ["Description: Short", "Description-en: Short", " and long"]
    for lines in (both, [*both[1:], both[0]]):
        (found,) = parse_descriptions([*stanza, *lines])
        assert found.text == "Short. and long"


def test_parse_bounds_the_text() -> None:
    lines = ["Package: p", "Maintainer: m", "Section: s", "Filename: f", "Description: d"]
    (found,) = parse_descriptions([*lines, *([" " + "x" * 100] * 100)])
    assert len(found.text) == debian_descriptions.MAX_TEXT_CHARACTERS


def test_dataset_keeps_the_largest_sections_without_libraries() -> None:
    sizes = {f"s{i:02}": 30 + i for i in range(20)}
    built = dataset_of(
        many({**sizes, "libs": 90, "libdevel": 90, "oldlibs": 90, "doc": 90}), seed=0
    )
    assert built.class_names == tuple(f"s{i:02}" for i in range(4, 20))
    texts = np.concatenate([built.train["texts"], built.test["texts"]])
    labels = np.concatenate([built.train["labels"], built.test["labels"]])
    assert len(texts) == len(set(texts)) == sum(30 + i for i in range(4, 20))
    assert all(
        text.startswith(built.class_names[label]) for text, label in zip(texts, labels, strict=True)
    )
    assert len(built.test["labels"]) == round(len(texts) * 0.15)


def test_dataset_hides_maintainers_and_follows_the_seed() -> None:
    built, again, other = (dataset_of(many({"a": 40, "b": 30}), seed=s) for s in (1, 1, 2))
    assert built.groups is not None
    assert set(np.unique(built.groups, return_counts=True)[1]) != {1}
    assert len(set(built.groups)) == 3
    assert all(len(group) == 12 and int(group, 16) >= 0 for group in built.groups)
    # A maintainer's texts carry one group: number i belongs to maintainer i mod 3.
    pairs = {
        (group, int(text.split()[-1].rstrip(".")) % 3)
        for group, text in zip(built.groups, built.train["texts"], strict=True)
    }
    assert len(pairs) == 3
    assert built.train["texts"].tolist() == again.train["texts"].tolist()
    assert built.test["texts"].tolist() != other.test["texts"].tolist()


@pytest.mark.parametrize(
    ("command", "said"),
    [
        (
            ("no-such-apt-cache", "dumpavail"),
            "no-such-apt-cache of a Debian machine.*apt-get update",
        ),
        ((sys.executable, "-c", "pass"), "found 0 packages; run: apt-get update"),
        (
            (sys.executable, "-c", "import sys; sys.exit('lists are locked')"),
            "ended with 1: lists are locked; run: apt-get update",
        ),
    ],
)
def test_load_says_apt_get_update_when_there_are_no_lists(
    monkeypatch, command: tuple[str, ...], said: str
) -> None:
    monkeypatch.setattr(debian_descriptions, "COMMAND", command)
    with pytest.raises(DataError, match=said):
        load_debian_descriptions(seed=0)


def test_load_reads_what_the_command_prints(monkeypatch, tmp_path) -> None:
    stanzas = "\n".join(
        f"Package: p{i}\nMaintainer: m{i % 2}\nSection: s{i % 3}\nFilename: f\n"
        f"Description: text {i} — schön\n"
        for i in range(30)
    )
    (tmp_path / "lists").write_text(stanzas, encoding="utf-8")
    copy = "import sys; sys.stdout.buffer.write(open(sys.argv[1], 'rb').read())"
    monkeypatch.setattr(
        debian_descriptions, "COMMAND", (sys.executable, "-c", copy, str(tmp_path / "lists"))
    )
    loaded = load_debian_descriptions(seed=0)
    assert loaded.class_names == ("s0", "s1", "s2")
    assert len(loaded.train["labels"]) + len(loaded.test["labels"]) == 30
    assert "schön" in loaded.train["texts"][0]
