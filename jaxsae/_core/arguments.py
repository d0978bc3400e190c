"""What an option may be: declared on its type, and checked in one place, before any work.

    def train(*, batch: Count = 1024, out: OutputDirectory, ...): ...

`check(train, {"batch": 0})` raises "got batch 0; pass a whole number from 1 to 2147483647.": for commands, jobs and
their options alike, so that whoever adds one cannot forget to.
"""

import functools
import math
import numbers
import os
import re
import tempfile
import types
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, NamedTuple, Union, get_args, get_origin, get_type_hints

from jaxsae._core.files import InputError, local_path

_LARGEST = 2.0**127  # about what float32 holds


class Range(NamedTuple):
    """Finite numbers from `low` to `high`; whole ones, if the type is int.

    Attributes:
      low: the least.
      high: the largest.
      above: whether `low` itself is left out.
    """

    low: float
    high: float = _LARGEST
    above: bool = False

    def require(self, kind: Any, name: str, value: Any) -> None:
        """Raise unless it is such a number."""
        right = isinstance(value, numbers.Integral if kind is int else numbers.Real) and not isinstance(value, bool)
        number: Any = value if right else math.nan
        if not self.low <= number <= self.high or (self.above and number == self.low):
            what = "whole number" if kind is int else "number"
            start = f"above {self.low:g} and up to" if self.above else f"from {self.low:g} to"
            raise InputError(f"got {name} {_shown(value)}; pass a {what} {start} {_shown(self.high)}.")


class Choice(NamedTuple):
    """One of some names.

    Attributes:
      names: all of them.
    """

    names: tuple[str, ...]

    def require(self, kind: Any, name: str, value: Any) -> None:
        """Raise unless it is one of them."""
        if value not in self.names:
            raise InputError(f"got {name} {_shown(value)}, expected one of: {', '.join(self.names)}.")


class Text(NamedTuple):
    """A string of some form.

    Attributes:
      form: regular expression of the whole of it.
      what: it is, in words.
    """

    form: str
    what: str

    def require(self, kind: Any, name: str, value: Any) -> None:
        """Raise unless it has that form."""
        if not isinstance(value, str) or not re.fullmatch(self.form, value):
            raise InputError(f"got {name} {_shown(value)}; pass {self.what}.")


class Input(NamedTuple):
    """A file or directory to be read, or a name that stands for one.

    Attributes:
      must_exist: whether it must exist; not where whatever reads it has a better message.
      scheme: of addresses that the reader takes too, such as `"hf"`.
    """

    must_exist: bool = False
    scheme: str | None = None

    def require(self, kind: Any, name: str, value: Any) -> None:
        """Raise unless it can be read, as far as one can tell from outside."""
        if self.scheme is not None and str(value).startswith(f"{self.scheme}://"):
            return
        path = _local(name, value)
        try:
            if self.must_exist:
                path.stat()
        except FileNotFoundError as error:
            raise InputError(f"{path}: no such file or directory; expected one for {name}.") from error
        except OSError as error:
            raise InputError(f"{path}: {error.strerror}; pass another for {name}.") from error


class Output(NamedTuple):
    """Where a file or a directory can be written.

    Attributes:
      over: what may be there already: `Path.is_file`, `Path.is_dir`, or both.
    """

    over: tuple[Callable[[Path], bool], ...]

    def require(self, kind: Any, name: str, value: Any) -> None:
        """Raise unless something can be; nothing is left there."""
        path = _local(name, value)
        try:
            if path.exists() and not any(test(path) for test in self.over):
                raise FileExistsError(0, "a directory is there" if path.is_dir() else "something else is there")
            inside = path if path.is_dir() else next(parent for parent in path.absolute().parents if parent.exists())
            os.rmdir(tempfile.mkdtemp(prefix=f".{path.name}.", dir=inside))
        except OSError as error:
            raise InputError(f"cannot write {path}: {error.strerror}; choose another place for {name}.") from error


Count = Annotated[int, Range(1, 2**31 - 1)]
Index = Annotated[int, Range(0, 2**31 - 1)]
Parts = Annotated[int, Range(1, 2**16)]  # of a mesh
Seed = Annotated[int, Range(0, 2**32 - 1)]
Positive = Annotated[float, Range(0, above=True)]
Weight = Annotated[float, Range(0)]
Proportion = Annotated[float, Range(1e-6, 1e6)]
InputPath = Annotated[Path, Input()]
InputFiles = tuple[Annotated[Path, Input(must_exist=True)], ...]  # read one after the other
DIRECTORY = Output((Path.is_dir,))
OutputFile = Annotated[Path, Output((Path.is_file,))]
OutputDirectory = Annotated[Path, DIRECTORY]
Autoencoder = Annotated[str, Input(scheme="hf")]
Model = Annotated[str, Input()]
Context = Annotated[int, Range(2, 2**31 - 1)]
Revision = Annotated[str, Text(r"\S+", "a branch, a tag or a commit")]
ACTIVATION = Choice(("relu", "topk", "abstopk", "groupmax", "batchtopk", "jumprelu", "gated"))
ROWS_DTYPE = Choice(("float16", "float32"))


def check(declaration: Callable, values: Mapping[str, Any], name: Callable[[str], str] = str) -> None:
    """Raise unless each value is one that its declared type allows.

    Args:
      declaration: a function or a `NamedTuple`, whose annotations are looked at.
      values: of some of its parameters or fields.
      name: what a parameter is called in the message.

    Raises:
      InputError: what was got, and what to pass, of the first that is not.

    Example:
      >>> class Options(NamedTuple):
      ...     batch: Count = 1024
      >>> check(Options, {"batch": 0})
      Traceback (most recent call last):
      jaxsae.InputError: got batch 0; pass a whole number from 1 to 2147483647.
    """
    hints = _hints(declaration)
    for parameter, value in values.items():
        _require(hints[parameter], name(parameter), value)


@functools.cache
def _hints(declaration: Callable) -> dict[str, Any]:
    return get_type_hints(declaration, include_extras=True)


def _require(hint: Any, name: str, value: Any) -> None:
    origin, inner = get_origin(hint), get_args(hint)
    if origin is Annotated:
        for declared in hint.__metadata__:
            declared.require(hint.__origin__, name, value)
    elif origin is tuple or origin is Sequence:
        each = inner[:1] * len(value) if origin is Sequence or inner[1:] == (...,) else inner
        for part, item in zip(each, value, strict=True):
            _require(part, name, item)
    elif origin in (Union, types.UnionType) and value is not None:
        for part in inner:
            _require(part, name, value)


def _local(name: str, value: Any) -> Path:
    text = os.fspath(value)
    if not text or "\0" in text:
        raise InputError(f"got {name} {text!r}; pass a path.")
    return local_path(text)


def _shown(value: Any) -> str:
    if isinstance(value, int) and value.bit_length() > 128:
        return f"of {value.bit_length()} bits"
    return f"{value:.7g}" if isinstance(value, float) else repr(value)[:200] if isinstance(value, str) else str(value)
