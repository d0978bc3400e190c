"""Activations on disk, opened as rows `[n d]` whatever their format; damaged files are refused."""

import hashlib
import io
import json
import os
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
import safetensors

from jaxsae._core.files import InputError, any_path, first_line, in_one_line, reached
from jaxsae.data import npy, shards
from jaxsae.data.lazy import LazyRows
from jaxsae.data.npy import EXPECTED

Rows = np.ndarray | LazyRows  # `[n d]`, in memory or not
_SAMPLED, _BLOCKS = 64 << 20, 256  # bytes of rows that are hashed, and in how many blocks
_MEND = "write the file again"


def open_rows(path: str | os.PathLike) -> Rows:
    """Open activations as rows `[n d]`: a file in one of several formats, or a directory of shards or of `.npy` files.

    Formats are `.npy` and `.safetensors`, memory-mapped; `.npz`; and `.array_record`, whose records are rows, each as
    the bytes of an `.npy` file. Leading axes are flattened into rows. A file must hold exactly one array. In a
    directory of shards that is still being written, the complete ones are opened. The `.npy` files of any other
    directory, each `[n d]` of one width and dtype, are taken in natural order of their names, `x_2.npy` before
    `x_10.npy`, and mapped as their rows are read. In a bucket (`gs://`, `s3://`), directories and `.npy` files are read
    in ranges, ahead of a reader that takes rows in order or by windows.

    Args:
      path: the file, or the directory.

    Returns:
      `[n d]`, float16, bfloat16, float32 or float64.

    Raises:
      InputError: if the file is missing, truncated, not an array, empty, or not floating point; and as `shards.read`.

    Example:
      >>> import tempfile, numpy as np
      >>> with tempfile.TemporaryDirectory() as folder:
      ...     np.save(f"{folder}/x.npy", np.zeros((2, 3, 4), np.float32))
      ...     open_rows(f"{folder}/x.npy").shape
      (6, 4)
    """
    path = any_path(path)
    kind = {".safetensors": _open_safetensors, ".array_record": _open_records}.get(path.suffix)
    with reached(path):
        is_directory = (path / shards.MANIFEST).is_file()
    if is_directory:
        rows = shards.open_rows(path)
        if not len(rows):
            raise InputError(f"{path}: has shape {rows.shape}; {EXPECTED}.")
        return rows
    if not isinstance(path, Path):
        return npy.open_remote(path)
    if not path.is_file():
        if below := sorted(each.parent.name for each in path.glob(f"*/{shards.MANIFEST}")):
            raise InputError(f"{path}: a directory without {shards.MANIFEST}; pass one in it: {', '.join(below)}.")
        if path.is_dir():
            return npy.open_folder(path)
        raise InputError(f"{path}: no such file; {EXPECTED}.")
    with open(path, "rb") as file:
        magic = file.read(6)
    if kind is None and magic[:2] != b"PK" and magic != b"\x93NUMPY":
        raise InputError(f"{path}: {'not an array file' if magic else 'the file is empty'}; {EXPECTED}.")
    with in_one_line(f"{path}: is damaged or holds no plain array", EXPECTED):
        if kind is not None:
            array = kind(path)
        elif magic[:2] == b"PK":
            with open(path, "rb") as file, np.load(file, allow_pickle=False) as archive:
                array = _only_array(archive, path)
        else:
            array = np.load(path, mmap_mode="r", allow_pickle=False)
    dtype = array.dtype.newbyteorder("=")
    if dtype not in (np.float16, np.float32, np.float64, jnp.bfloat16):
        raise InputError(f"{path}: holds {array.dtype}; {EXPECTED}: convert it with .astype('float32').")
    if array.ndim < 2 or array.size == 0:
        raise InputError(f"{path}: has shape {array.shape}; {EXPECTED}.")
    if isinstance(array, LazyRows):
        return array
    rows = array.reshape(-1, array.shape[-1])
    if dtype == array.dtype:
        return rows
    return LazyRows(lambda _: rows, np.array([0, len(rows)]), range(len(rows)), rows.shape[1], dtype)


def _open_safetensors(path: Path) -> np.ndarray:
    with safetensors.safe_open(path, "numpy") as file:  # checks the header
        names = list(file.keys())
    if len(names) != 1:
        raise InputError(f"{path}: holds {len(names)} arrays ({', '.join(names) or 'nothing'}); expected one.")
    with open(path, "rb") as file:
        start = int.from_bytes(file.read(8), "little")
        entry = json.loads(file.read(start))[names[0]]
    dtype = {"F16": "float16", "BF16": "bfloat16", "F32": "float32", "F64": "float64"}.get(entry["dtype"])
    if dtype is None:
        raise TypeError(f"its values are {entry['dtype']}")
    offset = 8 + start + entry["data_offsets"][0]
    return np.memmap(path, jnp.dtype(dtype), "r", offset, tuple(entry["shape"]))


class _Records:
    """Rows of an ArrayRecord file by their numbers."""

    def __init__(self, path: Path):
        import grain

        self._path = path
        self._source: Any = grain.sources.ArrayRecordDataSource([str(path)])
        if not len(self._source):
            raise ValueError("it has no records")
        (self.first,) = self._rows([0])
        if self.first.ndim != 1:
            raise ValueError(f"a record has shape {self.first.shape}")

    def __len__(self) -> int:
        return len(self._source)

    def __getitem__(self, numbers: np.ndarray) -> np.ndarray:
        rows, expected = self._rows(np.asarray(numbers).tolist()), self.first
        for number, row in zip(numbers, rows, strict=True):
            if row.ndim == 1 and row.shape != expected.shape:
                what, wanted = f"has width {len(row)}", f"{len(expected)}"
            elif (row.shape, row.dtype) != (expected.shape, expected.dtype):
                what, wanted = f"has shape {row.shape} of {row.dtype}", f"{expected.shape} of {expected.dtype}"
            else:
                continue
            raise InputError(f"{self._path}: record {number} {what}, expected {wanted} as record 0; {_MEND}.")
        return np.stack(rows)

    def _rows(self, numbers: list[int]) -> list[np.ndarray]:
        try:
            records = map(io.BytesIO, self._source.__getitems__(numbers))
            return [np.lib.format.read_array(record, allow_pickle=False) for record in records]
        except Exception as error:
            if len(numbers) > 1:  # find which
                return [row for number in numbers for row in self._rows([number])]
            what = f"record {numbers[0]} is not a .npy file ({first_line(error)})"
            raise InputError(f"{self._path}: {what}; {_MEND}.") from error


def _open_records(path: Path) -> LazyRows:
    records: Any = _Records(path)
    window, dtype = range(len(records)), records.first.dtype.newbyteorder("=")
    return LazyRows(lambda _: records, np.array([0, len(records)]), window, len(records.first), dtype)


def _only_array(archive, path: Path) -> np.ndarray:
    if len(archive.files) != 1:
        names = ", ".join(archive.files) or "nothing"
        raise InputError(f"{path}: holds {len(archive.files)} arrays ({names}); expected one: save it alone.")
    array = archive[archive.files[0]]
    if not isinstance(array, np.ndarray):
        raise TypeError(f"its only member is {archive.files[0]!r}")
    return array


def require_finite(rows: Rows, what: str) -> None:
    """Raise if any row holds NaN or Inf.

    Args:
      rows: `[n d]`, may be memory-mapped.
      what: name of the rows in errors.

    Raises:
      InputError: with the number of such rows, and the first of them.

    Example:
      >>> require_finite(np.array([[1.0], [np.nan]]), "x.npy")
      Traceback (most recent call last):
      jaxsae.InputError: x.npy: 1 of 2 rows hold NaN or Inf, the first is row 1; drop or fix them.
    """
    chunk = max(1, (64 << 20) // rows[0].nbytes)  # the rows may be a file larger than memory
    finite = [np.isfinite(rows[at : at + chunk]).all(axis=1) for at in range(0, len(rows), chunk)]
    bad = np.flatnonzero(~np.concatenate(finite))
    if bad.size:
        found = f"{bad.size} of {len(rows)} rows hold NaN or Inf, the first is row {bad[0]}"
        raise InputError(f"{what}: {found}; drop or fix them.")


def fingerprint(rows: Rows) -> str:
    """A cheap hash that detects changed rows.

    It covers their number, width, dtype and values: all values up to 64 MiB, evenly spaced blocks beyond that. For a
    directory of shards the checksums in its manifest replace the values; values of computed rows are not hashed.

    Args:
      rows: `[n d]`, may be memory-mapped.

    Example:
      >>> a, b = np.zeros((5, 2)), np.zeros((5, 2))
      >>> b[3, 1] = 1.0
      >>> fingerprint(a) == fingerprint(a.copy()), fingerprint(a) == fingerprint(b)
      (True, False)
    """
    hashed = hashlib.blake2b(repr((rows.shape, rows.dtype.newbyteorder("=").name)).encode(), digest_size=8)
    if isinstance(rows, LazyRows) and rows.checksum is not None:
        hashed.update(rows.checksum.encode())
        return hashed.hexdigest()
    hashed_rows = max(_BLOCKS, _SAMPLED // max(1, rows.nbytes // len(rows)))
    blocks = 1 if len(rows) <= hashed_rows else _BLOCKS
    size = min(len(rows), hashed_rows) // blocks
    for start in np.linspace(0, len(rows) - size, blocks).astype(int).tolist():
        block = np.asarray(rows[start : start + size])
        hashed.update(np.ascontiguousarray(block, block.dtype.newbyteorder("<")).tobytes())
    return hashed.hexdigest()
