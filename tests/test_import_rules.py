# SPDX-License-Identifier: Apache-2.0
"""The arrows of the design: who may import whom, and where the heavy libraries may stand."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import pytest

ROOT = Path(__file__).resolve().parent.parent

# package -> what it may import of ours besides itself
ARROWS: dict[str, set[str]] = {
    "protocol": set(),
    "aggregation": {"protocol"},
    "edge_runtime": {"protocol"},
    "tuning": {"protocol"},
    "client_sdk": {"edge_runtime", "aggregation", "protocol"},
    "reports": set(),
    "coordinator": {"edge_runtime", "tuning", "aggregation", "protocol", "reports"},
    "simulations": {
        "protocol", "aggregation", "edge_runtime", "tuning", "client_sdk", "coordinator", "reports"
    },
    "fedloom": {
        "protocol", "aggregation", "edge_runtime", "tuning", "client_sdk", "coordinator",
        "reports", "simulations",
    },
}  # fmt: skip

# library -> the files and folders that may import it, and those that may do so when loaded
# (everywhere else the import has to stand inside a function)
FLWR_FILES = {
    "coordinator/flower_link.py",
    "coordinator/flower_messages.py",
    "simulations/server_app.py",
    "coordinator/jobs/process.py",
    "client_sdk/client_app.py",
    "client_sdk/pinned_app.py",
    "simulations/grid.py",
    "simulations/backends/ray.py",
    "simulations/benchmarks/node_runtime.py",
    "simulations/benchmarks/flower_masks.py",
}
TORCH_PLACES = (
    "tuning/",
    "simulations/backends/",
    "simulations/pretraining/",
    "simulations/benchmarks/",
)
TORCH_LIKE = {"torch", "transformers", "peft"}
# Too slow to load for whoever only wants a job file or a codec.
LAZY = {
    "torch",
    "transformers",
    "peft",
    "onnx",
    "onnxscript",
    "sklearn",
    "matplotlib",
    "PIL",
    "ray",
    "scipy",
    "dp_accounting",
}
# These exist to use the library, and are imported lazily themselves.
LAZY_EXCEPTIONS = ("tuning/", "simulations/backends/", "simulations/pretraining/")


class Import(NamedTuple):
    """One import statement: which file, where, of what, and whether loading the file runs it."""

    file: str
    line: int
    module: str
    on_load: bool

    @property
    def package(self) -> str:
        return self.module.partition(".")[0]

    def __str__(self) -> str:
        return f"{self.file}:{self.line} imports {self.module}"


def imports_of(tree: ast.AST, file: str) -> Iterator[Import]:
    """Imports of a module, those only for type checkers left out."""

    def visit(node: ast.AST, on_load: bool) -> Iterator[Import]:
        children = ast.iter_child_nodes(node)
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield Import(file, node.lineno, alias.name, on_load)
        elif isinstance(node, ast.ImportFrom):
            package = file.partition("/")[0] if node.level else node.module or ""
            yield Import(file, node.lineno, package, on_load)
        elif isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test):
            children = iter(node.orelse)
        elif isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            on_load = False
        for child in children:
            yield from visit(child, on_load)

    yield from visit(tree, True)


def all_imports() -> list[Import]:
    found = []
    for package in ARROWS:
        for path in sorted((ROOT / package).rglob("*.py")):
            file = path.relative_to(ROOT).as_posix()
            found += imports_of(ast.parse(path.read_text(encoding="utf-8"), file), file)
    return found


IMPORTS = all_imports()


def test_every_package_imports_only_what_its_arrows_allow() -> None:
    wrong = []
    for item in IMPORTS:
        importer = item.file.partition("/")[0]
        if item.package in ARROWS and item.package not in ARROWS[importer] | {importer}:
            wrong.append(str(item))
    assert wrong == []


def test_facade_imports_the_packages_lazily() -> None:
    entered = ("fedloom/__init__.py", "fedloom/__main__.py", "fedloom/errors.py", "fedloom/cli/")
    wrong = [
        str(item)
        for item in IMPORTS
        if item.file.startswith(entered) and item.on_load
        if item.package in ARROWS and item.package != "fedloom"
    ]
    assert wrong == []


def test_flwr_is_imported_only_in_its_adapters() -> None:
    wrong = [str(i) for i in IMPORTS if i.package == "flwr" and i.file not in FLWR_FILES]
    assert wrong == []


def test_torch_is_imported_only_where_jobs_are_compiled_or_simulated() -> None:
    wrong = [
        str(item)
        for item in IMPORTS
        if item.package in TORCH_LIKE and not item.file.startswith(TORCH_PLACES)
        # Lazily the simulation may ask for it anywhere.
        if item.on_load or not item.file.startswith("simulations/")
    ]
    assert wrong == []


def test_heavy_libraries_are_imported_inside_functions() -> None:
    wrong = [
        str(item)
        for item in IMPORTS
        if item.package in LAZY and item.on_load and not item.file.startswith(LAZY_EXCEPTIONS)
    ]
    assert wrong == []


def test_nothing_unpickles() -> None:
    unsafe = {"pickle", "cloudpickle", "dill", "marshal", "shelve", "joblib"}
    assert [str(item) for item in IMPORTS if item.package in unsafe] == []


def test_imports_are_found_when_nested_relative_or_for_type_checkers_only() -> None:
    source = (
        "from typing import TYPE_CHECKING\n"
        "if TYPE_CHECKING:\n    import torch\nelse:\n    import onnx\n"
        "def f():\n    from flwr.app import Message\n"
        "class A:\n    import ray\n"
        "from . import sibling\n"
    )
    found = {(i.module, i.on_load) for i in imports_of(ast.parse(source), "tuning/x.py")}
    assert found == {
        ("typing", True), ("onnx", True), ("flwr.app", False), ("ray", True), ("tuning", True)
    }  # fmt: skip


@pytest.mark.parametrize("package", ["protocol", "aggregation", "edge_runtime", "client_sdk"])
def test_device_side_loads_no_training_framework(package: str) -> None:
    modules = sorted(
        ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")
        for path in (ROOT / package).rglob("*.py")
        if path.relative_to(ROOT).as_posix() not in FLWR_FILES
    )
    code = (
        "import importlib, sys\n"
        f"for name in {modules!r}: importlib.import_module(name)\n"
        f"print(sorted({TORCH_LIKE | {'onnx', 'sklearn'}!r} & set(sys.modules)))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, timeout=120
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == "[]"
