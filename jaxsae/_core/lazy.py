"""Lazy import of submodules (PEP 562)."""

import importlib
from collections.abc import Callable
from typing import Any


def submodules(package: str, *names: str) -> Callable[[str], Any]:
    """A package's `__getattr__` that imports the named submodules on first use."""

    def __getattr__(name: str) -> Any:
        if name in names:
            return importlib.import_module(f"{package}.{name}")
        raise AttributeError(f"module {package!r} has no attribute {name!r}")

    return __getattr__
