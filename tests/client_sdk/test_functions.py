# SPDX-License-Identifier: Apache-2.0
"""Functions of the device's own code, by their address."""

from __future__ import annotations

from pathlib import Path

import pytest

from client_sdk.errors import FunctionError
from client_sdk.functions import load_function


def test_function_of_an_installed_module_is_found() -> None:
    assert load_function("math:sqrt")(9) == 3


def test_function_of_a_file_is_found_and_the_file_is_run_once(tmp_path: Path) -> None:
    file = tmp_path / "json.py"  # the name of another module
    file.write_text("calls = []\ndef count():\n    calls.append(1)\n    return len(calls)\n")
    assert load_function(f"{file}:count")() == 1
    assert load_function(f"{file}:count")() == 2
    import json

    assert json.dumps([]) == "[]"


@pytest.mark.parametrize(
    ("address", "words"),
    [
        ("math", 'expected "module:function"'),
        (":sqrt", 'expected "module:function"'),
        ("math:a b", 'expected "module:function"'),
        ("math:nothing", "expected a function nothing in math, found none"),
        ("math:pi", "expected a function pi in math, found none"),
        ("no_such_module_here:f", "cannot be loaded .*ModuleNotFoundError"),
        ("./no_such_file.py:f", "cannot be loaded .*FileNotFoundError"),
    ],
)
def test_address_is_refused_when_it_leads_nowhere(address: str, words: str) -> None:
    with pytest.raises(FunctionError, match=words):
        load_function(address)


def test_file_that_raises_is_told_and_run_again_the_next_time(tmp_path: Path) -> None:
    file = tmp_path / "own.py"
    file.write_text("raise RuntimeError('no camera')\n")
    with pytest.raises(FunctionError, match="RuntimeError: no camera"):
        load_function(f"{file}:f")
    file.write_text("def f():\n    return 5\n# longer than before\n")
    assert load_function(f"{file}:f")() == 5
