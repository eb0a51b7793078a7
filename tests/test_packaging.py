# SPDX-License-Identifier: Apache-2.0
"""What is shipped: the packages of the tree, owned by us alone, each file under its licence."""

from __future__ import annotations

import tomllib
from importlib import metadata
from pathlib import Path
from typing import Any

import pytest

import fedloom

ROOT = Path(__file__).resolve().parent.parent
PROJECT: dict[str, Any] = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
PACKAGES: list[str] = PROJECT["tool"]["setuptools"]["packages"]
TOP_LEVEL = sorted({name.partition(".")[0] for name in PACKAGES})


def test_packages_listed_are_the_folders_with_an_init() -> None:
    found = {
        ".".join(path.parent.relative_to(ROOT).parts)
        for top in TOP_LEVEL
        for path in (ROOT / top).rglob("__init__.py")
    }
    assert sorted(PACKAGES) == PACKAGES
    assert set(PACKAGES) == found


def test_no_module_lies_in_a_folder_that_is_not_shipped() -> None:
    lost = [
        path.relative_to(ROOT).as_posix()
        for top in TOP_LEVEL
        for path in (ROOT / top).rglob("*.py")
        if ".".join(path.parent.relative_to(ROOT).parts) not in PACKAGES
    ]
    assert lost == []


def test_package_data_exist() -> None:
    for package, patterns in PROJECT["tool"]["setuptools"]["package-data"].items():
        folder = ROOT / package.replace(".", "/")
        for pattern in patterns:
            assert list(folder.glob(pattern)), f"{package}: nothing matches {pattern}"


def test_fedloom_alone_owns_its_top_level_names() -> None:
    owners = metadata.packages_distributions()
    assert {name: set(owners[name]) for name in TOP_LEVEL} == {
        name: {"fedloom"} for name in TOP_LEVEL
    }


def test_version_is_said_once() -> None:
    assert fedloom.__version__ == PROJECT["project"]["version"]
    assert f"## [{fedloom.__version__}]" in (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")


def test_device_extra_brings_no_training_framework() -> None:
    extras = PROJECT["project"]["optional-dependencies"]
    names = " ".join([*PROJECT["project"]["dependencies"], *extras["device"]])
    assert not {"torch", "transformers", "peft", "scikit-learn"} & set(names.split())
    assert "torch" not in names and "fedloom[" not in names


def test_constraints_pin_every_direct_dependency() -> None:
    lines = (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines()
    pinned = {line.partition("==")[0].lower() for line in lines if "==" in line}
    assert "torch==2.13.0" in lines
    assert "://" not in "".join(lines)
    extras = PROJECT["project"]["optional-dependencies"].values()
    wanted = [name for group in (PROJECT["project"]["dependencies"], *extras) for name in group]
    for requirement in wanted:
        name = requirement.partition(">")[0].partition("[")[0].lower()
        assert name == "fedloom" or name in pinned, f"{requirement} is not in constraints.txt"


def test_sources_name_their_licence_first() -> None:
    sources = [path for top in (*TOP_LEVEL, "tests", "examples") for path in _sources(ROOT / top)]
    assert len(sources) > 20
    bare = [
        path.relative_to(ROOT).as_posix()
        for path in sources
        if "SPDX-License-Identifier: Apache-2.0" not in _head(path)
    ]
    assert bare == []


def test_facade_knows_its_names_and_nothing_else() -> None:
    assert set(fedloom.__all__) <= set(dir(fedloom))
    with pytest.raises(AttributeError, match="no attribute 'nonsense'"):
        _ = fedloom.nonsense


@pytest.mark.parametrize("name", sorted(set(fedloom.__all__) - {"__version__"}))
def test_facade_name_can_be_imported(name: str) -> None:
    assert getattr(fedloom, name) is getattr(fedloom, name)


def test_facade_says_who_is_in_the_way_when_a_package_is_not_ours(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # A folder named like a package of ours, as a second distribution would leave it.
    monkeypatch.setattr(fedloom, "__file__", str(tmp_path / "fedloom" / "__init__.py"))
    with pytest.raises(ImportError, match=r"'protocol'.*is not fedloom's.*uninstall"):
        fedloom._check_owner("protocol")


def _sources(folder: Path) -> list[Path]:
    return sorted(folder.rglob("*.py"))


def _head(path: Path) -> str:
    """The first lines; a script may have its interpreter line before."""
    return "".join(path.read_text(encoding="utf-8").splitlines(keepends=True)[:2])
