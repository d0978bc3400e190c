"""Validation of options: allowed values are declared in type annotations and checked before any work.

    def train(*, batch: Count = 1024, out: OutputDirectory, ...): ...

`check(train, {"batch": 0})` raises "got batch 0; pass a whole number from 1 to 2147483647." Commands, jobs and their
options are all checked this way.
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

from jaxsae._core.files import InputError, address, any_path, local_path

_LARGEST = 2.0**127  # about the largest float32


class Range(NamedTuple):
    """Finite numbers from `low` to `high`; whole numbers if the type is int.

    Attributes:
      low: the smallest.
      high: the largest.
      above: whether `low` itself is excluded.
    """

    low: float
    high: float = _LARGEST
    above: bool = False

    def require(self, kind: Any, name: str, value: Any) -> None:
        """Raise unless the value is such a number."""
        valid = isinstance(value, numbers.Integral if kind is int else numbers.Real) and not isinstance(value, bool)
        number: Any = value if valid else math.nan
        if not self.low <= number <= self.high or (self.above and number == self.low):
            what = "whole number" if kind is int else "number"
            start = f"above {self.low:g} and up to" if self.above else f"from {self.low:g} to"
            raise InputError(f"got {name} {_shown(value)}; pass a {what} {start} {_shown(self.high)}.")


class Choice(NamedTuple):
    """One of several names.

    Attributes:
      names: the names allowed.
    """

    names: tuple[str, ...]

    def require(self, kind: Any, name: str, value: Any) -> None:
        """Raise unless the value is one of them."""
        if value not in self.names:
            raise InputError(f"got {name} {_shown(value)}, expected one of: {', '.join(self.names)}.")


class Text(NamedTuple):
    """A string that matches a pattern.

    Attributes:
      form: regular expression that the whole string must match.
      what: description of the string, for the message.
    """

    form: str
    what: str

    def require(self, kind: Any, name: str, value: Any) -> None:
        """Raise unless the value matches."""
        if not isinstance(value, str) or not re.fullmatch(self.form, value):
            raise InputError(f"got {name} {_shown(value)}; pass {self.what}.")


class Input(NamedTuple):
    """A file or directory to read, or a name for one.

    Attributes:
      must_exist: whether to check that it exists; False if its reader has a better error message.
      scheme: URL scheme that is accepted too, such as `"hf"`.
      bucket: whether it may be in a bucket, where its reader looks for it.
    """

    must_exist: bool = False
    scheme: str | None = None
    bucket: bool = False

    def require(self, kind: Any, name: str, value: Any) -> None:
        """Raise unless the path is valid and, if required, exists."""
        if self.scheme is not None and str(value).startswith(f"{self.scheme}://"):
            return
        if self.bucket and address(value):
            any_path(value)
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
    """A path to which a file or a directory can be written.

    Attributes:
      over: what may exist there already: `Path.is_file`, `Path.is_dir`, or both.
      bucket: whether it may be in a bucket.
    """

    over: tuple[Callable[[Path], bool], ...]
    bucket: bool = False

    def require(self, kind: Any, name: str, value: Any) -> None:
        """Raise unless the path is writable; leaves no file behind."""
        if self.bucket and address(value):
            from jaxsae._core import buckets

            buckets.require_writable(any_path(value))
            return
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
InputFiles = tuple[Annotated[Path, Input(must_exist=True)], ...]  # read in order
Rows = Annotated[Path, Input(bucket=True)]  # activations
DIRECTORY = Output((Path.is_dir,))
ANY_DIRECTORY = Output((Path.is_dir,), bucket=True)
OutputFile = Annotated[Path, Output((Path.is_file,))]
AnyFile = Annotated[Path, Output((Path.is_file,), bucket=True)]  # on disk or in a bucket
OutputDirectory = Annotated[Path, DIRECTORY]
AnyDirectory = Annotated[Path, ANY_DIRECTORY]
Autoencoder = Annotated[str, Input(scheme="hf", bucket=True)]
HubAddress = Annotated[str, Text(r"hf://[^/\s]+/[^/\s]+(/[^/\s]+)*", "hf://organisation/repository, or a folder in it")]
Model = Annotated[str, Input()]
Site = Annotated[str, Text(r"[\w.]+", "a site such as mlp_out, or a hook such as blocks.8.hook_mlp_out")]
Name = Annotated[str, Text(r"[^\0]+", "a name")]
Token = Annotated[str, Text(r"bos|eos|pad|unk|[0-9]{1,9}", "the number of a token, or bos, eos, pad or unk")]
Context = Annotated[int, Range(2, 2**31 - 1)]
Prompt = Annotated[str, Text(r"[^\0\ud800-\udfff]+", "a text of at least one character, in UTF-8")]
Number = Annotated[float, Range(-_LARGEST)]
Revision = Annotated[str, Text(r"\S+", "a branch, a tag or a commit")]
ACTIVATION = Choice(
    (
        *("relu", "topk", "abstopk", "groupmax", "batchtopk", "jumprelu", "gated", "matryoshka", "matchingpursuit"),
        "alignedrelu",
    )
)
# Places in a block of a language model, see `language_model.sites`.
SITE = Choice(("resid_pre", "hook_z", "attn_out", "resid_mid", "mlp_in", "mlp_out", "resid_post"))
ROWS_DTYPE = Choice(("float16", "float32"))
MOMENTS = Choice(("float32", "bfloat16"))
FEATURES_BY = Choice(("shrinkage", "density", "max"))  # which latents come first


def check(declaration: Callable, values: Mapping[str, Any], name: Callable[[str], str] = str) -> None:
    """Raise unless each value is allowed by its declared type.

    Args:
      declaration: a function or a `NamedTuple`, whose annotations declare the types.
      values: values of some of its parameters or fields.
      name: maps a parameter to its name in the message.

    Raises:
      InputError: for the first value that is not, with what was got and what to pass.

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
