# SPDX-License-Identifier: Apache-2.0
"""The pages under docs/ that repeat the code say what the code says."""

from __future__ import annotations

import re
from pathlib import Path

from fedloom.job_reference import job_reference
from fedloom.update_reference import update_reference
from protocol.rejection import RejectionCode

ROOT = Path(__file__).parents[1]


def test_job_page_lists_every_key_as_the_code_has_it() -> None:
    page = (ROOT / "docs" / "jobs.md").read_text(encoding="utf-8")
    assert page == job_reference(), "run: python -m fedloom.job_reference > docs/jobs.md"


def test_page_on_updates_is_what_the_code_says() -> None:
    page = (ROOT / "docs" / "updates.md").read_text(encoding="utf-8")
    assert page == update_reference(), "run: python -m fedloom.update_reference > docs/updates.md"


def test_rejection_page_explains_every_code() -> None:
    page = (ROOT / "docs" / "rejections.md").read_text(encoding="utf-8")
    assert re.findall(r"^\| (E\d+) ", page, flags=re.MULTILINE) == [str(c) for c in RejectionCode]


def test_pages_link_to_files_that_exist() -> None:
    pages = [ROOT / "README.md", ROOT / "CHANGELOG.md", *sorted((ROOT / "docs").glob("*.md"))]
    missing = [
        f"{page.name}: {target}"
        for page in pages
        for target in re.findall(r"\]\(([^)#]+)\)", page.read_text(encoding="utf-8"))
        if "://" not in target and not (page.parent / target).exists()
    ]
    assert not missing


def test_the_threat_model_names_tests_that_exist() -> None:
    page = (ROOT / "docs" / "threat-model.md").read_text(encoding="utf-8")
    named = re.findall(r"`(tests/[\w/.]+\.py)(?:::(\w+))?`", page)
    assert len(named) > 20
    missing = [
        f"{file}::{test}"
        for file, test in named
        if not (ROOT / file).is_file()
        or (test and f"def {test}(" not in (ROOT / file).read_text(encoding="utf-8"))
    ]
    assert not missing
