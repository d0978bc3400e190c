"""Imports on first use (PEP 562), so that importing a package, or asking the command for help, costs little."""

import ast
import importlib
import importlib.abc
import importlib.util
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any


def attach(package: str, file: str) -> tuple[Callable[[str], Any], Callable[[], list[str]]]:
    """`__getattr__` and `__dir__` of a package whose index stands below `if TYPE_CHECKING:`.

    Each `from module import name as name` there is done when the name is first used; type checkers read the same lines.

    Args:
      package: its name.
      file: its `__init__.py`.

    Source: after `lazy_loader.attach_stub` (Scientific Python, SPEC 1).
    """
    guards = [node for node in ast.parse(Path(file).read_text()).body if isinstance(node, ast.If)]
    nodes = [node for guard in guards for node in guard.body if isinstance(node, ast.ImportFrom)]
    places = {alias.name: node.module or package for node in nodes for alias in node.names}

    def __getattr__(name: str) -> Any:
        if name not in places:
            raise AttributeError(f"module {package!r} has no attribute {name!r}")
        if places[name] == package:
            return importlib.import_module(f"{package}.{name}")
        place = importlib.import_module(places[name])
        found = getattr(place, name) if hasattr(place, name) else importlib.import_module(f"{places[name]}.{name}")
        setattr(sys.modules[package], name, found)
        return found

    return __getattr__, lambda: sorted(places)


def when_imported(name: str, f: Callable[[ModuleType], None]) -> None:
    """Call `f(module)` once a module is imported: now if it is already."""
    if name in sys.modules:
        f(sys.modules[name])
        return
    finder = next((each for each in sys.meta_path if isinstance(each, _Waiting) and each.name == name), None)
    if finder is None:
        finder = _Waiting(name)
        sys.meta_path.insert(0, finder)
    finder.calls.append(f)


class _Waiting(importlib.abc.MetaPathFinder):
    """Leaves a module to the finders after it, and calls functions once it is imported."""

    def __init__(self, name: str):
        self.name = name
        self.calls: list[Callable[[ModuleType], None]] = []

    def find_spec(self, fullname, path=None, target=None):
        if fullname != self.name:
            return None
        sys.meta_path.remove(self)
        spec = importlib.util.find_spec(fullname)
        if spec is not None and spec.loader is not None:
            run = spec.loader.exec_module

            def exec_module(module: ModuleType) -> None:
                run(module)
                for call in self.calls:
                    call(module)

            spec.loader.exec_module = exec_module
        return spec
