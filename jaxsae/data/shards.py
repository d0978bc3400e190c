"""A portable directory of activations: plain `.npy` shards and a JSON manifest, which is updated atomically.

    manifest.json     width, dtype, rows, complete, source; the rows of each shard, size and CRC-32 of its files
    00000.npy         [n d], float16 or float32; bfloat16, which .npy lacks, as uint16 of the same bits
    00000.tokens.npy  a column beside it, of any shape and dtype

A shard exists once the manifest lists it: the manifest is replaced atomically, once the shard's files are on disk.
"""

import contextlib
import functools
import io
import json
import math
import os
import re
import threading
import zlib
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxsae._core import processes
from jaxsae._core.files import (
    AnyPath,
    InputError,
    any_path,
    atomic_file,
    flush_folder,
    in_one_line,
    names as names_in,
    reached,
    remove,
)
from jaxsae.data import lazy, remote
from jaxsae.data.lazy import LazyRows

MANIFEST = "manifest.json"
_FORMAT, _VERSION, _DTYPES = "jaxsae-activations", 1, ("float16", "float32", "bfloat16")
_SHARD = re.compile(r"([0-9]{5,})(?:\.([A-Za-z_][A-Za-z0-9_]*))?\.npy")  # its number and, if any, its column
_PARTIAL = re.compile(rf"\.(?:{_SHARD.pattern}|{re.escape(MANIFEST)})(?:\.\w+)?\.partial")  # of `atomic_file`
_HEADERS = threading.Lock()  # they are Python, whose parser (3.11) fails at random in several threads
_MEND = "copy or make the directory again"


class Manifest(NamedTuple):
    """The manifest of a directory.

    Attributes:
      width: width of the rows.
      dtype: name of the rows' dtype.
      source: JSON that describes where the rows come from.
      complete: whether its writer has finished.
      shards: as in the JSON, `{"rows": n, "files": {name: {"bytes": …, "crc32": …}}}`.
    """

    width: int
    dtype: str
    source: Any
    complete: bool = False
    shards: tuple[dict[str, Any], ...] = ()

    @property
    def rows(self) -> int:
        """The number of rows in all shards."""
        return sum(shard["rows"] for shard in self.shards)

    @property
    def files(self) -> dict[str, dict[str, Any]]:
        """The files of all shards, by name."""
        return {name: file for shard in self.shards for name, file in shard["files"].items()}


def read(folder: str | os.PathLike) -> Manifest:
    """Read the manifest of a directory, complete or not, and check that its files are there.

    Args:
      folder: the directory.

    Raises:
      InputError: if the manifest is missing, damaged or in another format, or a file is missing or of the wrong size.

    Example:
      >>> import tempfile
      >>> with tempfile.TemporaryDirectory() as folder:
      ...     Writer(folder, width=4, dtype="float16", source={}).append(np.zeros((6, 4)))
      ...     read(folder).rows, read(folder).complete
      (6, False)
    """
    folder = any_path(folder)
    path = folder / MANIFEST
    try:
        with reached(path):
            content = path.read_bytes()
    except OSError as error:
        raise InputError(f"{path}: {error.strerror}; expected the manifest of a directory of activations.") from error
    with in_one_line(f"{path}: is damaged or no manifest of activations", _MEND):
        manifest = _parse(content)
    sizes = names_in(folder) if manifest.shards else {}
    for name, file in manifest.files.items():
        if sizes.get(name) != file["bytes"]:
            found = f"has {sizes[name]} bytes" if name in sizes else "no such file"
            raise InputError(f"{folder / name}: {found}, expected {file['bytes']} bytes; {_MEND}.")
    return manifest


def _parse(content: bytes) -> Manifest:
    record = json.loads(content)
    if (record["format"], record["version"]) != (_FORMAT, _VERSION):
        raise ValueError(f"{record['format']!r} {record['version']!r}, expected {_FORMAT!r} {_VERSION}")
    manifest = Manifest(**{name: record[name] for name in Manifest._fields})._replace(shards=tuple(record["shards"]))
    right = type(manifest.width) is int and manifest.width > 0
    right &= manifest.dtype in _DTYPES and type(manifest.complete) is bool
    for number, shard in enumerate(manifest.shards):
        names = [_SHARD.fullmatch(name) for name in shard["files"]]  # no name leads out of the directory
        right &= all(name and int(name[1]) == number for name in names) and _name(number) in shard["files"]
        right &= all(type(file["bytes"]) is int and type(file["crc32"]) is str for file in shard["files"].values())
        right &= type(shard["rows"]) is int and shard["rows"] > 0
    if not right or record["rows"] != manifest.rows:
        raise ValueError("a field is invalid")
    return manifest


def _name(number: int, column: str | None = None) -> str:
    return f"{number:05d}.npy" if column is None else f"{number:05d}.{column}.npy"


class Writer:
    """The single writer of a directory: starts it, or resumes after its last complete shard.

    Attributes:
      manifest: the manifest on disk.
      shards: number of shards.
      rows: number of rows.

    Example:
      >>> import tempfile
      >>> with tempfile.TemporaryDirectory() as folder:
      ...     writer = Writer(folder, width=4, dtype="float16", source={"model": "none"})
      ...     writer.append(np.zeros((6, 4)), tokens=np.arange(6))
      ...     writer.finish()
      ...     writer.shards, open_rows(folder).shape, column(folder, "tokens").shape
      (1, (6, 4), (6,))
    """

    def __init__(self, folder: str | os.PathLike, *, width: int, dtype: Any, source: Any, together: bool = False):
        """Start or resume a directory.

        Args:
          folder: the directory, made if missing.
          width: width of the rows.
          dtype: float16, float32 or bfloat16.
          source: any JSON that describes where the rows come from; a directory is only resumed with an equal one.
          together: of several processes, each makes a writer, and calls all its methods: each writes a shard, and the
            first one the manifest.

        Raises:
          InputError: if the directory holds something else, was made with other arguments, or is damaged.
        """
        self.folder = any_path(folder)
        self._path = self.folder / MANIFEST
        name = dtype if isinstance(dtype, str) else np.dtype(dtype).name
        if isinstance(width, bool) or not isinstance(width, int | np.integer):
            raise InputError(f"{folder}: got width {width}; pass a whole number.")
        if width < 1 or name not in _DTYPES:
            raise InputError(
                f"{folder}: got width {width} and dtype {name}; pass at least 1, and one of {', '.join(_DTYPES)}."
            )
        new = Manifest(int(width), name, json.loads(json.dumps(source, allow_nan=False)))
        self._together = together and jax.process_count() > 1
        with self._all_or_none():
            if self._commits():
                self._begin(new)
        if not self._commits():
            self._hold(read(self.folder))

    def _commits(self) -> bool:
        """Whether this process writes the manifest."""
        return not self._together or processes.is_primary()

    def _all_or_none(self) -> contextlib.AbstractContextManager[None]:
        """A block that fails in all processes that write together, or in none."""
        return processes.all_or_none() if self._together else contextlib.nullcontext()

    def _begin(self, new: Manifest) -> None:
        """Write the first manifest, or read what is there, and remove unfinished shards."""
        if isinstance(self.folder, Path):  # in a bucket, names need no folders
            try:
                self.folder.mkdir(parents=True, exist_ok=True)
            except OSError as error:
                raise InputError(f"cannot write {self.folder}: {error.strerror}; choose another --out.") from error
            flush_folder(self.folder.parent)
        with reached(self.folder):
            begun = self._path.exists()
        if begun:
            self._hold(read(self.folder))
            got, expected = _arguments(new), _arguments(self.manifest)
            for name in (name for name in sorted(got | expected) if got.get(name) != expected.get(name)):
                what = f"got {name} {got.get(name, 'nothing')}, expected {expected.get(name, 'nothing')}"
                raise InputError(f"{self.folder}: {what}; choose another --out, or remove it.")
        elif all(_PARTIAL.fullmatch(name) for name in self._names()):
            self._write_manifest(new)
        else:
            raise InputError(f"{self.folder}: holds files but no {MANIFEST}; choose another --out, or remove it.")
        self._sweep()

    def append(self, rows: Any, /, **columns: Any) -> None:
        """Write a shard atomically; several processes that write together, one each, in their order.

        Args:
          rows: `[n d]`, cast to the directory's dtype; None from the last of several processes, if they have none left.
          **columns: arrays of any shape and dtype, the same names in every shard.

        Raises:
          InputError: if the rows are of another width or overflow in the cast, or the directory is complete.
          OSError: if writing fails, as on a full disk; existing shards are kept.
        """
        self._require_writable()
        try:
            with self._all_or_none():
                shard = None if rows is None else self._write_shard(rows, columns)
            added = [each for each in (processes.gather(shard) if self._together else [shard]) if each is not None]
            self._commit(self.manifest._replace(shards=(*self.manifest.shards, *added)))
        except BaseException:
            with contextlib.suppress(OSError, ValueError):
                if self._commits() and self._on_disk() == self.manifest:  # else it lists the new shard
                    self._sweep()
            raise

    def _write_shard(self, rows: Any, columns: dict[str, Any]) -> dict[str, Any]:
        """Write the files of a shard, and return its entry for the manifest."""
        number = self.shards + (jax.process_index() if self._together else 0)
        rows = _stored_rows(rows, self.manifest, self.folder)
        contents = {_name(number, name): _serialised(x, name) for name, x in {None: rows, **columns}.items()}
        first = self.manifest.shards[0]["files"] if self.shards else contents
        same = {name.partition(".")[2] for name in first} == {name.partition(".")[2] for name in contents}
        if not same or not all(map(_SHARD.fullmatch, contents)):
            raise InputError(f"{self.folder}: got columns {list(columns)}; pass plain names, the same in every shard.")
        for name, content in contents.items():
            _write(self.folder / name, content)
        files = {name: {"bytes": len(content), "crc32": _crc32(content)} for name, content in contents.items()}
        return {"rows": len(rows), "files": files}

    def finish(self) -> None:
        """Mark the directory complete."""
        if not self.manifest.complete:
            self._require_writable()
            self._commit(self.manifest._replace(complete=True))

    def _require_writable(self) -> None:
        if self.manifest.complete:
            raise InputError(f"{self.folder}: is complete; choose another --out, or remove it.")
        if self._commits() and self._on_disk() != self.manifest:
            raise InputError(f"{self.folder}: another process has written there; stop one, and start the other again.")

    def _commit(self, manifest: Manifest) -> None:
        with self._all_or_none():
            if self._commits():
                self._write_manifest(manifest)
        self._hold(manifest)

    def _write_manifest(self, manifest: Manifest) -> None:
        record = {"format": _FORMAT, "version": _VERSION, "rows": manifest.rows, **manifest._asdict()}
        _write(self._path, json.dumps(record, indent=1).encode())
        self._hold(manifest)

    def _on_disk(self) -> Manifest:
        with reached(self._path):
            return _parse(self._path.read_bytes())

    def _names(self) -> list[str]:
        """What the directory holds; in a bucket, its files."""
        return os.listdir(self.folder) if isinstance(self.folder, Path) else list(names_in(self.folder))

    def _hold(self, manifest: Manifest) -> None:
        self.manifest, self.shards, self.rows = manifest, len(manifest.shards), manifest.rows

    def _sweep(self) -> None:
        """Remove the files of unfinished shards."""
        for name in self._names():
            if _PARTIAL.fullmatch(name) or (_SHARD.fullmatch(name) and name not in self.manifest.files):
                remove(self.folder / name)


def _arguments(manifest: Manifest) -> dict[str, str]:
    """Arguments of a `Writer` by name, with the members of a source one by one, to name the one that differs."""
    source = manifest.source if isinstance(manifest.source, dict) else {"": manifest.source}
    parts = {f"source {name}".rstrip(): value for name, value in source.items()}
    parts |= {"width": manifest.width, "dtype": manifest.dtype}
    return {name: json.dumps(value, sort_keys=True) for name, value in parts.items()}


def _stored_rows(rows: Any, manifest: Manifest, folder: AnyPath) -> np.ndarray:
    rows = np.asarray(rows)
    if rows.ndim != 2 or rows.shape[1] != manifest.width or not len(rows):
        raise InputError(f"{folder}: got rows of shape {rows.shape}; pass at least one, {manifest.width} wide.")
    return cast(rows, manifest.dtype, str(folder), "pass --dtype float32").view(_stored(manifest.dtype))


def cast(rows: Any, dtype: Any, what: str, do: str, numbers: Any = None) -> np.ndarray:
    """Cast rows to another floating-point dtype; overflow is an error.

    Args:
      rows: `[n d]`, real numbers.
      dtype: the dtype to cast to.
      what: name of the rows in messages.
      do: advice in messages.
      numbers: row numbers for messages; their positions by default.

    Raises:
      InputError: if the values are not real numbers, a finite one overflows, or a row underflows to zero.

    Example:
      >>> cast(np.array([[1.0], [1e300]]), np.float32, "x.npy", "scale it")
      Traceback (most recent call last):
      jaxsae.InputError: x.npy: row 1 holds 1e+300, 1 finite values overflow float32; scale it.
    """
    masked = isinstance(rows, np.ma.MaskedArray)
    rows, dtype = np.asarray(rows), jnp.dtype(dtype)
    if masked or rows.dtype.kind == "m":
        kind = "masked numbers" if masked else "durations"
        raise InputError(f"{what}: holds {kind}; expected real numbers: fill or convert them.")
    if not (jnp.issubdtype(rows.dtype, jnp.floating) or jnp.issubdtype(rows.dtype, jnp.integer)):
        raise InputError(f"{what}: holds {rows.dtype}; expected real numbers: convert it with .astype('float32').")
    with np.errstate(over="ignore"):
        found = rows.astype(dtype, copy=False)
    if not np.can_cast(rows.dtype, dtype):
        wrong = np.argwhere(~np.isfinite(found) & np.isfinite(rows))
        if len(wrong):
            row = wrong[0, 0] if numbers is None else numbers[wrong[0, 0]]
            held = f"row {row} holds {rows[tuple(wrong[0])]:g}"
            raise InputError(f"{what}: {held}, {len(wrong)} finite values overflow {dtype}; {do}.")
        some, left = ((part != 0).reshape(len(rows), -1).any(1) for part in (rows, found))
        vanished = np.flatnonzero(some & ~left)
        if len(vanished):
            row = vanished[0] if numbers is None else numbers[vanished[0]]
            raise InputError(
                f"{what}: row {row} and {len(vanished) - 1} others are too small for {dtype}, and become 0; {do}."
            )
    return found


def _stored(dtype: str) -> str:
    """The dtype of the values in a `.npy` file."""
    return "uint16" if dtype == "bfloat16" else dtype


def _serialised(array: Any, column: str | None) -> bytes:
    array = np.atleast_1d(array)
    if array.dtype.kind in "OV":
        raise InputError(f"column {column}: holds {array.dtype}, which .npy cannot store; convert it with .astype().")
    np.save(buffer := io.BytesIO(), np.ascontiguousarray(array), allow_pickle=False)
    return buffer.getvalue()


def _crc32(content: bytes) -> str:
    return f"{zlib.crc32(content):08x}"


def _write(path: AnyPath, content: bytes) -> None:
    with atomic_file(path) as temporary:
        temporary.write_bytes(content)


def column(folder: str | os.PathLike, name: str) -> np.ndarray:
    """A column of all complete shards, concatenated along its first axis.

    Args:
      folder: the directory.
      name: name of the column.

    Raises:
      InputError: as `read`, or if a shard has no such column, or it is damaged.

    Example:
      >>> import tempfile
      >>> with tempfile.TemporaryDirectory() as folder:
      ...     Writer(folder, width=4, dtype="float16", source={}).append(np.zeros((2, 4)), tokens=np.array([7, 9]))
      ...     column(folder, "tokens").tolist()
      [7, 9]
    """
    manifest = read(folder)
    files = [_name(number, name) for number in range(len(manifest.shards))]
    if not files or not manifest.files.keys() >= set(files):
        raise InputError(f"{folder}: not every shard has a column {name!r}; pass one that its {MANIFEST} lists.")
    paths = [any_path(folder) / file for file in files]
    for path in paths:
        _check(path, manifest.files[path.name]["crc32"])
    with in_one_line(f"{folder}: the column {name!r} does not fit together", "read its files"):
        return np.concatenate([np.load(io.BytesIO(path.read_bytes()), allow_pickle=False) for path in paths])


def verify(folder: str | os.PathLike) -> None:
    """Read every file of a directory, and compare it with its checksum.

    Args:
      folder: the directory.

    Raises:
      InputError: as `read`, or at the first file that does not match its checksum.

    Example:
      >>> import tempfile
      >>> with tempfile.TemporaryDirectory() as folder:
      ...     Writer(folder, width=4, dtype="float16", source={}).append(np.zeros((6, 4)))
      ...     verify(folder)
    """
    for name, file in read(folder).files.items():
        _check(any_path(folder) / name, file["crc32"])


def _check(path: AnyPath, crc32: str) -> None:
    """Compare a file, which need not fit into memory, with its checksum."""
    total = 0
    try:
        with reached(path), path.open("rb") as file:
            while piece := file.read(1 << 22):
                total = zlib.crc32(piece, total)
    except OSError as error:
        raise InputError(f"{path}: cannot be read ({error.strerror}); {_MEND}.") from error
    if f"{total:08x}" != crc32:
        raise InputError(f"{path}: is damaged, its CRC-32 is {total:08x}, expected {crc32}; {_MEND}.")


def open_rows(folder: str | os.PathLike) -> LazyRows:
    """Open the rows of a directory; if it is incomplete, those of its complete shards.

    Args:
      folder: the directory.

    Returns:
      `[n d]`, float16, float32 or bfloat16. A shard's checksum is verified on first read, which raises `InputError` if
      it is damaged; not in a bucket, where only what is needed is read (`verify` reads all).

    Raises:
      InputError: as `read`, or if a shard does not hold an array of the manifest's shape and dtype.

    Example:
      >>> import tempfile
      >>> with tempfile.TemporaryDirectory() as folder:
      ...     Writer(folder, width=4, dtype="float16", source={}).append(np.ones((6, 4)))
      ...     rows = open_rows(folder)
      ...     rows[2:4].shape, rows[0].tolist()
      ((2, 4), [1.0, 1.0, 1.0, 1.0])
    """
    manifest, where = read(folder), any_path(folder)
    paths = [where / _name(number) for number in range(len(manifest.shards))]
    shapes, dtype = [(shard["rows"], manifest.width) for shard in manifest.shards], jnp.dtype(manifest.dtype)
    checksum = " ".join(manifest.files[path.name]["crc32"] for path in paths)
    if not isinstance(where, Path):
        return _open_remote(paths, manifest, shapes, checksum)
    offsets = [_offset(path, shape, manifest.dtype) for path, shape in zip(paths, shapes, strict=True)]

    checked: set[int] = set()

    @functools.lru_cache(lazy.MAX_MAPS)
    def load(number):
        if number not in checked:
            _check(paths[number], manifest.files[paths[number].name]["crc32"])
            checked.add(number)
        return np.asarray(np.memmap(paths[number], dtype, "r", offsets[number], shapes[number]))

    edges = np.cumsum([0, *(rows for rows, _ in shapes)])
    return LazyRows(load, edges, range(manifest.rows), manifest.width, dtype, checksum)


def _open_remote(paths: list[Any], manifest: Manifest, shapes: list[tuple[int, int]], checksum: str) -> LazyRows:
    """The rows of a directory in a bucket; the header of each shard is checked when its first rows are read."""
    dtype = jnp.dtype(manifest.dtype)
    sizes = [manifest.files[path.name]["bytes"] for path in paths]
    files = [
        remote.File(path, size - math.prod(shape) * dtype.itemsize, shape[0])
        for path, shape, size in zip(paths, shapes, sizes, strict=True)
    ]

    def check(number: int, header: bytes) -> None:
        _read_header(io.BytesIO(header), paths[number], shapes[number], manifest.dtype, sizes[number])

    return remote.open_files(files, manifest.width, dtype, checksum, check)


def _offset(path: Path, shape: tuple[int, int], dtype: str) -> int:
    """Byte offset of the values of a shard."""
    with in_one_line(f"{path}: is not a .npy file", _MEND), open(path, "rb") as file:
        return _read_header(file, path, shape, dtype, path.stat().st_size)


def _read_header(file: io.BufferedIOBase, path: AnyPath, shape: tuple[int, int], dtype: str, size: int) -> int:
    """The length of a shard's header, which must be that of an array of such a shape and dtype."""
    expected = (1, 0), (shape, False, np.dtype(_stored(dtype)).newbyteorder("<"))
    with _HEADERS, in_one_line(f"{path}: is not a .npy file", _MEND):
        found = np.lib.format.read_magic(file), np.lib.format.read_array_header_1_0(file)
        offset = file.tell()
    if found != expected or offset + math.prod(shape) * jnp.dtype(dtype).itemsize != size:
        raise InputError(f"{path}: does not hold an array {shape} of {dtype} in C order; {_MEND}.")
    return offset
