"""Plain `.npy` files of rows, as any program writes them: those of a directory, and one in a bucket.

Headers are read when they are opened, rows on access.
"""

import functools
import io
import math
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from jaxsae._core import buckets
from jaxsae._core.files import AnyPath, InputError, in_one_line, names, reached
from jaxsae.data import lazy, remote
from jaxsae.data.lazy import LazyRows

EXPECTED = "expected a .npy or .npz array of floating-point activations (rows, width)"
_HEADER = 1 << 16  # bytes, which a header does not fill
_OTHERS = (".npz", ".safetensors", ".array_record")
_COLUMN = re.compile(r"[0-9]{5,}\.[A-Za-z_][A-Za-z0-9_]*\.npy")  # beside a shard, see `shards`


class _Array(NamedTuple):
    """An array in a file, whose values begin at a byte."""

    path: Any
    shape: tuple[int, ...]
    dtype: np.dtype
    fortran: bool
    offset: int


def open_folder(folder: AnyPath) -> LazyRows:
    """Open the rows of all `.npy` files of a directory, in natural order of their names: `x_2.npy` before `x_10.npy`.

    Args:
      folder: as from `files.any_path`.

    Raises:
      InputError: if it has none, or one of them does not hold rows of the width and dtype of the first; if it has
        arrays in another format, or shards of a harvest without their manifest.
    """
    sizes = {name: size for name, size in sorted(names(folder).items(), key=_natural) if not name.startswith(".")}
    if column := next(filter(_COLUMN.fullmatch, sizes), None):
        raise InputError(f"{folder}: a directory without manifest.json, and with {column} of a harvest; copy both.")
    if other := next((name for name in sizes if name.endswith(_OTHERS)), None):
        raise InputError(f"{folder}: holds {other}; of a directory, only .npy files are read: pass the files instead.")
    files = [(folder / name, size) for name, size in sizes.items() if name.endswith(".npy")]
    if not files:
        raise InputError(f"{folder}: a directory without manifest.json or .npy files; {EXPECTED}.")
    arrays = [_parse(path, size, head) for (path, size), head in zip(files, _heads(files), strict=True)]
    for array in arrays:
        _require_rows(array, arrays[0])
    arrays = [array for array in arrays if array.shape[0]]
    if not arrays:
        raise InputError(f"{folder}: its .npy files have no rows; {EXPECTED}.")
    return _mapped(arrays) if isinstance(folder, Path) else _in_bucket(arrays, buckets.versions(folder))


def _natural(item: tuple[str, int]) -> tuple[list[Any], str]:
    """What sorts files by the numbers in their names."""
    parts = re.split("([0-9]+)", item[0])
    return [int(part) if place % 2 else part for place, part in enumerate(parts)], item[0]


def _heads(files: list[tuple[Any, int]]) -> Iterable[bytes]:
    """The beginnings of files; of those in a bucket, many are read at a time."""
    if isinstance(files[0][0], Path):
        for path, _ in files:
            with in_one_line(f"{path}: cannot be read", "check its permissions"), open(path, "rb") as file:
                head = file.read(_HEADER)
            yield head
        return
    pending = [buckets.start_reading(path, 0, min(size, _HEADER)) if size else None for path, size in files]
    for (path, _), each in zip(files, pending, strict=True):
        with reached(path):
            yield b"" if each is None else each.result()


def _parse(path: Any, size: int, head: bytes) -> _Array:
    """What the header of a file says, if that can be rows."""
    with in_one_line(f"{path}: not a .npy file", EXPECTED):
        read = {(1, 0): np.lib.format.read_array_header_1_0, (2, 0): np.lib.format.read_array_header_2_0}
        file = io.BytesIO(head)
        shape, fortran, dtype = read[np.lib.format.read_magic(file)](file)
    if dtype.newbyteorder("=") not in (np.float16, np.float32, np.float64):
        raise InputError(f"{path}: holds {dtype}; {EXPECTED}: convert it with .astype('float32').")
    if size != file.tell() + math.prod(shape) * dtype.itemsize:
        raise InputError(f"{path}: has {size} bytes, too few or too many for {shape}; write the file again.")
    return _Array(path, shape, dtype, fortran, file.tell())


def _require_rows(array: _Array, first: _Array) -> None:
    """Refuse what is not `[n d]`, or of another width or dtype than the first file of a directory."""
    if len(array.shape) != 2 or not array.shape[1]:
        raise InputError(f"{array.path}: has shape {array.shape}, expected (rows, width); write it as such.")
    kinds = [f"width {of.shape[1]} of {of.dtype.newbyteorder('=').name}" for of in (array, first)]
    if kinds[0] != kinds[1]:
        raise InputError(f"{array.path}: has {kinds[0]}, {first.path.name} has {kinds[1]}; pass rows of one kind.")


def _mapped(arrays: list[_Array]) -> LazyRows:
    @functools.lru_cache(lazy.MAX_MAPS)
    def load(number: int) -> np.ndarray:
        path, shape, dtype, fortran, offset = arrays[number]
        with in_one_line(f"{path}: has changed", "begin again"):
            return np.asarray(np.memmap(path, dtype, "r", offset, shape, "F" if fortran else "C"))

    edges, (_, width) = np.cumsum([0, *(array.shape[0] for array in arrays)]), arrays[0].shape
    return LazyRows(load, edges, range(int(edges[-1])), width, arrays[0].dtype.newbyteorder("="))


def _in_bucket(arrays: list[_Array], versions: dict[str, str]) -> LazyRows:
    for path, _, dtype, fortran, _ in arrays:
        if fortran or not dtype.isnative:
            kind = f"{dtype.str} in Fortran order" if fortran else dtype.str
            raise InputError(f"{path}: holds {kind}, which is not read from a bucket; write it in C order, or copy it.")
    files = [remote.File(array.path, array.offset, math.prod(array.shape[:-1])) for array in arrays]
    checksum = " ".join(f"{array.path.name} {versions.get(array.path.name)}" for array in arrays)
    return remote.open_files(files, arrays[0].shape[-1], arrays[0].dtype, checksum)


def open_remote(path: Any) -> LazyRows:
    """Open the rows of a file in a bucket, whose leading axes are flattened, or of the files of a directory there.

    Args:
      path: as from `files.any_path`.

    Raises:
      InputError: if it is missing, or neither.
    """
    if path.suffix != ".npy" and any(name.endswith(".npy") for name in names(path)):
        return open_folder(path)
    size, version = buckets.describe(path)
    if path.suffix != ".npy":
        what = "neither a .npy file nor a directory with manifest.json or .npy files"
        raise InputError(f"{path}: {what}; copy it here.")
    [head] = _heads([(path, size)])
    array = _parse(path, size, head)
    if len(array.shape) < 2 or 0 in array.shape:
        raise InputError(f"{path}: has shape {array.shape}; {EXPECTED}.")
    return _in_bucket([array], {path.name: version})
