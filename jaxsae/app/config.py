"""Options of a command in a file: read before the command line, and written at the start of a run."""

import inspect
import json
import os
import tomllib
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from jaxsae._core.files import AnyPath, InputError, any_path, atomic_file, in_one_line, reached, shown

VERSION = 1
_OWN = ("config", "json", "resume")  # options of one call rather than of what it does


def expanded(argv: Sequence[str], commands: Mapping[str, Callable[..., Any]]) -> list[str]:
    """A command line in which `--config FILE` is replaced by the options in the file, before all others: these win.

    Args:
      argv: the command and its options.
      commands: by name.

    Raises:
      InputError: if the file cannot be read, is of another version, or has an option that the command lacks.
    """
    at = next((n for n, word in enumerate(argv) if word.partition("=")[0] == "--config"), None)
    command = commands.get(argv[0]) if argv else None
    if at is None or command is None or "config" not in inspect.signature(command).parameters:
        return list(argv)
    _, given, value = argv[at].partition("=")
    end = at + (1 if given else 2)
    if not given and end > len(argv):
        return list(argv)  # whose error the command line gives
    options = _read(any_path(value if given else argv[at + 1]), command)
    return [argv[0], *_words(options), *argv[1:at], *argv[end:]]


def _read(path: AnyPath, command: Callable[..., Any]) -> dict[str, Any]:
    with in_one_line(f"{path}: not a file of options", "pass TOML or JSON"):
        with reached(path):
            text = path.read_bytes().decode("utf-8")
        found = json.loads(text) if path.suffix == ".json" else tomllib.loads(text)
        if not isinstance(found, dict):
            raise ValueError(f"it holds {type(found).__name__}")
    parameters = {flag(name)[2:]: name for name in inspect.signature(command).parameters}
    found = {name.replace("_", "-"): value for name, value in found.items()}
    found = {parameters.get(name, name.replace("-", "_")): value for name, value in found.items()}
    found.pop("derived", None)  # for readers
    version = found.pop("version", VERSION)
    if version != VERSION or isinstance(version, bool):
        raise InputError(f"{path}: is of version {version!r}, expected {VERSION}; use the jaxsae that wrote it.")
    known = [name for name in inspect.signature(command).parameters if name not in _OWN]
    if unknown := sorted(found.keys() - set(known)):
        raise InputError(f"{path}: has {', '.join(unknown)}, expected one of: {', '.join(known)}.")
    for name, value in found.items():
        if isinstance(value, dict) or (isinstance(value, list) and any(isinstance(x, dict | list) for x in value)):
            raise InputError(f"{path}: its {name} is a table, expected a number, text or a list of them; flatten it.")
    return found


def flag(parameter: str) -> str:
    """The option of a command that stands for a parameter; a word that Python keeps to itself ends with `_` there.

    Args:
      parameter: its name.

    Example:
      >>> flag("save_every"), flag("from_")
      ('--save-every', '--from')
    """
    return f"--{parameter.rstrip('_').replace('_', '-')}"


def _words(options: Mapping[str, Any]) -> list[str]:
    """Options as words of a command line; what is null or false is left out."""
    words = []
    for name, value in options.items():
        if value is None or value is False or value == []:
            continue
        words += (
            [flag(name)] if value is True else [flag(name), *map(str, value if isinstance(value, list) else [value])]
        )
    return words


def write(path: AnyPath, options: Mapping[str, Any], derived: Mapping[str, Any]) -> None:
    """Write the options of a run, so that `--config` repeats it.

    Args:
      path: of the JSON file.
      options: by name; those of one call are left out.
      derived: what followed from them, to be read and not to be repeated.
    """
    found = {name.rstrip("_"): _plain(value) for name, value in options.items() if name not in _OWN}
    found = {"version": VERSION} | found | {"derived": derived}
    with atomic_file(path) as temporary:
        temporary.write_text(json.dumps(found, indent=1, allow_nan=False) + "\n")


def _plain(value: Any) -> Any:
    if isinstance(value, tuple | list):
        return [_plain(each) for each in value]
    return shown(value) if isinstance(value, os.PathLike) else value
