# SPDX-License-Identifier: Apache-2.0
"""Functions of the device's own code, by "module:function" or "file.py:function".

Such an address stands in the device's own settings and nowhere else: no plan, bundle or message
can name one.
"""

from __future__ import annotations

import importlib
import importlib.util
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

from client_sdk.errors import FunctionError


def load_function(address: str) -> Callable[..., Any]:
    """The function; its module is loaded, once a process.

    Raises: FunctionError when the module cannot be loaded or has no such function.
    """
    place, _, name = address.rpartition(":")
    if not place or not name.isidentifier():
        raise FunctionError(
            f'"{address}": expected "module:function" or "path/to/file.py:function"'
        )
    try:
        is_file = place.endswith(".py")
        module = _from_file(Path(place)) if is_file else importlib.import_module(place)
    except Exception as error:  # own code may raise anything when it is loaded
        raise FunctionError(
            f'"{address}": {place} cannot be loaded ({type(error).__name__}: {error}); install it '
            "where fedloom is installed, or name the file: path/to/file.py:function"
        ) from error
    function = getattr(module, name, None)
    if not callable(function):
        raise FunctionError(f'"{address}": expected a function {name} in {place}, found none')
    return function


def _from_file(file: Path) -> ModuleType:
    file = file.resolve(strict=True)
    # A name that no installed module has: the file's own may be that of one.
    name = f"own code: {file}"
    if name in sys.modules:
        return sys.modules[name]
    spec = importlib.util.spec_from_file_location(name, file)
    if spec is None or spec.loader is None:
        raise ImportError(f"{file} is no Python file")
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    try:
        spec.loader.exec_module(module)
    except BaseException:
        del sys.modules[name]
        raise
    return module
