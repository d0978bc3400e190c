"""Arrays in untrusted files: mapped into memory, and checked before use.

The sizes that a file declares are compared with its own before memory is allocated, nothing outside its folder is
opened, and whatever is wrong raises one `InputError`.
"""

import contextlib
import io
import json
import math
import mmap
import os
import struct
import zipfile
import zlib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import IO, Any

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
from jax.core import Tracer
from safetensors import safe_open

from jaxsae._core import processes
from jaxsae._core.files import InputError, in_one_line

Arrays = dict[str, np.ndarray]

_SAFETENSORS = {
    "F64": np.float64,
    "F32": np.float32,
    "F16": np.float16,
    "BF16": ml_dtypes.bfloat16,
    "I64": np.int64,
    "I32": np.int32,
    "I16": np.int16,
    "I8": np.int8,
    "U8": np.uint8,
    "BOOL": np.bool_,
}
_WRITTEN = {np.dtype(dtype) for dtype in _SAFETENSORS.values()}
_CHUNK = 8 << 20  # bytes copied before mapped pages are released
_ALIGNMENT = 64  # bytes, at which jax uses numpy's memory without a copy
_MAX_JSON = 64 << 20  # bytes
_MAX_EXPANSION = 20  # times: weights do not compress, so what expands more is malicious
_FREE_EXPANSION = 1 << 20  # bytes that may always be unpacked


def map_file(path: Path) -> memoryview:
    """The bytes of a file, memory-mapped.

    Raises:
      InputError: if it is empty, missing or not a file.
    """
    try:
        with open(path, "rb") as file:
            return memoryview(mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ))
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or "the file is empty"
        raise InputError(f"{path}: {reason}; expected a file of weights: download it again.") from error


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object.

    Raises:
      InputError: if it is missing, damaged or not an object.
    """
    with in_one_line(f"{path}: not a JSON configuration", "download it again"):
        if path.stat().st_size > _MAX_JSON:
            raise ValueError(f"{path.stat().st_size >> 20} MiB")
        config = json.loads(path.read_bytes(), object_pairs_hook=_once)
    if not isinstance(config, dict):
        raise InputError(f"{path}: holds {type(config).__name__}, expected a JSON object; download it again.")
    return config


def _once(members: list[tuple[str, Any]]) -> dict[str, Any]:
    """The members of a JSON object; raise if two have the same name."""
    found = dict(members)
    if len(found) < len(members):
        names = [name for name, _ in members]
        raise ValueError(f"it has {next(name for name in names if names.count(name) > 1)!r} twice")
    return found


def safetensors_file(path: Path) -> Path | None:
    """The file of that name, or its index if it is sharded, or None."""
    index = path.with_name(f"{path.name}.index.json")
    if path.is_file() and index.is_file():
        raise InputError(f"{path}: exists beside {index.name}, the index of its shards; remove the outdated one.")
    return path if path.is_file() else index if index.is_file() else None


def read_safetensors(path: Path) -> Arrays:
    """The arrays of a safetensors file, or of all that an index `….safetensors.index.json` names, memory-mapped.

    Raises:
      InputError: if a file is missing, damaged, or outside the folder of the index.
    """
    if path.suffix != ".json":
        return _read_one_safetensors(path)
    names = read_json(path).get("weight_map")
    if not isinstance(names, dict) or not all(isinstance(name, str) for name in names.values()):
        raise InputError(f"{path}: has no weight_map from arrays to files; download it again.")
    arrays: Arrays = {}
    for name in sorted(set(names.values())):
        if name != os.path.basename(name) or name in ("", ".", ".."):
            raise InputError(f"{path}: names {name!r}, which is not a file beside it; do not trust this file.")
        part = _read_one_safetensors(path.with_name(name))
        if twice := arrays.keys() & part.keys():
            raise InputError(f"{path}: {min(twice)} is in two of its files; download it again.")
        arrays |= part
    if missing := names.keys() - arrays.keys():
        raise InputError(f"{path}: {', '.join(sorted(missing))} is in none of its files; download it again.")
    return arrays


def _read_one_safetensors(path: Path) -> Arrays:
    data = map_file(path)
    with in_one_line(f"{path}: is damaged or not a safetensors file", "download it again"):
        with safe_open(path, framework="numpy"):  # validates the header
            pass
        length = int.from_bytes(data[:8], "little")
        header = json.loads(bytes(data[8 : 8 + length]))
        header.pop("__metadata__", None)
        unknown = {name: info["dtype"] for name, info in header.items() if info["dtype"] not in _SAFETENSORS}
        if unknown:
            raise InputError(f"{path}: holds dtypes {unknown}, expected {', '.join(_SAFETENSORS)}; convert it.")
        arrays = {}
        for name, info in header.items():
            start, stop = (8 + length + offset for offset in info["data_offsets"])
            arrays[name] = np.frombuffer(data[start:stop], _SAFETENSORS[info["dtype"]]).reshape(info["shape"])
        return arrays


def write_safetensors(file: Path | None, arrays: Mapping[str, Any]) -> None:
    """Write arrays piece by piece, so that no more than a piece of them is in memory; without metadata.

    The safetensors library writes only what is all in memory. If the arrays are spread over several processes, all of
    them call it, and those that have no file to write pass None.

    Args:
      file: to write, or None.
      arrays: by name, each of jax or as `writable` returns it.
    """
    names = {np.dtype(dtype): name for name, dtype in _SAFETENSORS.items()}
    order = sorted(arrays, key=lambda name: (-arrays[name].dtype.itemsize, name))  # each is then aligned
    ends = np.cumsum([0, *(arrays[name].size * arrays[name].dtype.itemsize for name in order)]).tolist()
    header = {
        name: {"dtype": names[arrays[name].dtype], "shape": arrays[name].shape, "data_offsets": span}
        for name, *span in zip(order, ends, ends[1:], strict=False)
    }
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    failure: OSError | None = None
    with contextlib.nullcontext() if file is None else open(file, "wb") as out:
        if out is not None:
            out.write(len(text).to_bytes(8, "little") + text)
        for name, start in zip(order, ends, strict=False):
            for place, piece in processes.pieces(arrays[name]):
                if out is None or failure is not None:
                    continue  # other processes wait for this one to take the piece
                try:
                    _write_at(out, 8 + len(text) + start, arrays[name], place, piece)
                except OSError as error:
                    failure = error
    if failure is not None:
        raise failure


def _write_at(out: IO[bytes], start: int, array: Any, place: tuple[slice, ...], piece: np.ndarray) -> None:
    """Write a piece of an array that begins at `start`, row by row unless it has whole rows."""
    row = math.prod(array.shape[1:]) * piece.dtype.itemsize
    piece = np.ascontiguousarray(piece, piece.dtype.newbyteorder("<"))
    _forget(array)
    if array.ndim < 2 or piece.shape[1:] == array.shape[1:]:
        out.seek(start + (place[0].start * row if place else 0))
        out.write(piece.reshape(-1).view(np.uint8).data)
        return
    before = place[1].start * piece.dtype.itemsize
    for number, values in enumerate(piece, place[0].start):
        out.seek(start + number * row + before)
        out.write(values.view(np.uint8).data)


def read_zip(path: Path, *, check: bool = True) -> dict[str, memoryview]:
    """The members of a zip file by name: mapped if they are stored uncompressed, else unpacked.

    Args:
      path: the file.
      check: compare contents with their checksums.

    Raises:
      InputError: if it is damaged, or if members expand excessively or their names point outside the archive.
    """
    data = map_file(path)
    with in_one_line(f"{path}: is damaged or not a zip file", "download it again"), zipfile.ZipFile(path) as archive:
        infos = archive.infolist()
        _refuse_traps(path, infos, len(data))
        return {info.filename: _member(data, archive, info, check) for info in infos if not info.is_dir()}


def _refuse_traps(path: Path, infos: list[zipfile.ZipInfo], size: int) -> None:
    for info in infos:
        parts = info.filename.replace("\\", "/").split("/")
        if ".." in parts or parts[0] == "" or ":" in parts[0]:
            raise InputError(f"{path}: its member {info.filename!r} points outside it; do not trust this file.")
    unpacked = sum(info.file_size for info in infos)
    if unpacked > max(_MAX_EXPANSION * size, _FREE_EXPANSION):
        raise InputError(
            f"{path}: {size:,} bytes would unpack to {unpacked:,}, and weights do not compress; do not trust this file."
        )
    names = [info.filename for info in infos]
    if len(set(names)) < len(names):
        raise InputError(f"{path}: has two members of the same name; do not trust this file.")


def _member(data: memoryview, archive: zipfile.ZipFile, info: zipfile.ZipInfo, check: bool) -> memoryview:
    if info.flag_bits & 1:
        raise ValueError(f"{info.filename} is encrypted")
    if info.compress_type != zipfile.ZIP_STORED:
        with archive.open(info) as file:
            content = file.read(info.file_size + 1)
        if len(content) != info.file_size:
            raise ValueError(f"{info.filename} does not have the size that it declares")
        return memoryview(content)
    header = info.header_offset
    if header < 0 or bytes(data[header : header + 4]) != b"PK\x03\x04":
        raise ValueError(f"{info.filename} is not at its declared offset")
    start = header + 30 + sum(struct.unpack("<HH", data[header + 26 : header + 30]))
    content = data[start : start + info.file_size]
    if len(content) != info.file_size:
        raise ValueError(f"{info.filename} is truncated")
    if check and _checksum(content) != info.CRC:
        raise ValueError(f"{info.filename} does not match its checksum")
    return content


def _checksum(content: memoryview) -> int:
    checksum = 0
    for start in range(0, len(content), _CHUNK):
        checksum = zlib.crc32(content[start : start + _CHUNK], checksum)
        _forget(content)
    return checksum


def read_npz(path: Path, *, check: bool = True) -> Arrays:
    """The arrays of an `.npz` file, memory-mapped if it is not compressed.

    Raises:
      InputError: if it is damaged, or holds anything other than numbers.
    """
    arrays = {}
    for name, content in read_zip(path, check=check).items():
        if not name.endswith(".npy"):
            raise InputError(f"{path}: holds {name}, expected only arrays; download it again.")
        with in_one_line(f"{path}: {name} is not a plain array", "download it again"):
            arrays[name.removesuffix(".npy")] = _npy(content)
    return arrays


def _npy(content: memoryview) -> np.ndarray:
    file = io.BytesIO(bytes(content[: 1 << 16]))
    version = np.lib.format.read_magic(file)
    if version not in ((1, 0), (2, 0)):
        raise ValueError(f"version {version}")
    read = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
    shape, fortran, dtype = read(file)
    if dtype.kind not in "fiub" or dtype.itemsize > 8:
        raise ValueError(f"dtype {dtype}")
    body = content[file.tell() :]
    if min(shape, default=0) < 0 or math.prod(shape) * dtype.itemsize != len(body):
        raise ValueError(f"shape {shape} of {dtype} in {len(body)} bytes")
    return np.frombuffer(body, dtype).reshape(shape, order="F" if fortran else "C")


def place(
    array: np.ndarray,
    dtype: Any = None,
    *,
    name: str = "an array",
    infinite: bool = False,
    where: jax.sharding.Sharding | None = None,
) -> jax.Array:
    """Copy an array, perhaps memory-mapped and transposed, to jax's device, in another dtype if given.

    It is copied piece by piece, and pages that were read are released, so that memory holds no more of a large file
    than the arrays themselves.

    Args:
      array: of numbers.
      dtype: of the copy; that of the array by default.
      name: what it is called in errors.
      infinite: whether infinite numbers are valid, such as thresholds that nothing exceeds.
      where: how to split it over devices, each of which then reads its own part; one device by default.

    Raises:
      InputError: if it holds NaN or, unless they are valid, infinite numbers.
    """
    dtype = jax.dtypes.canonicalize_dtype(array.dtype if dtype is None else dtype)
    if where is None:
        return jax.device_put(_checked(array, dtype, name, infinite))
    return jax.make_array_from_callback(
        array.shape, where, lambda index: _checked(array[index], dtype, name, infinite), dtype=dtype
    )


def _checked(array: np.ndarray, dtype: np.dtype, name: str, infinite: bool) -> np.ndarray:
    """A copy in memory that jax can use as it is, of valid numbers only."""
    size = array.size * dtype.itemsize
    memory = np.empty(size + _ALIGNMENT, np.uint8)
    start = -memory.ctypes.data % _ALIGNMENT
    out = memory[start : start + size].view(dtype).reshape(array.shape)
    for part in _pieces(array):
        with np.errstate(over="ignore"):  # which is an error below
            out[part] = array[part]
        valid = np.isfinite(out[part])
        if infinite:
            valid |= np.isinf(array[part]) & np.isinf(out[part])  # and not too large for the dtype
        _forget(array)
        if not valid.all():
            kind = "NaN or too large" if infinite else "NaN or infinite"
            raise InputError(
                f"{name} holds {kind} numbers in {dtype}, such as {out[part][~valid].flat[0]}; expected numbers: "
                "use another SAE, or another dtype if they are too large for this one."
            )
    return out


def ready(value: Any, name: str = "an array") -> jax.Array | np.ndarray:
    """An array as `write_safetensors` takes it: of jax, where it is, or what `writable` makes of it.

    Args:
      value: as for `writable`.
      name: what it is called in errors.

    Raises:
      InputError: as `writable`.

    Example:
      >>> ready(2.0).itemsize
      4
    """
    if not isinstance(value, jax.Array) or isinstance(value, Tracer) or value.is_deleted():
        return writable(value, name)
    if jnp.issubdtype(value.dtype, jax.dtypes.extended) or value.dtype not in _WRITTEN:
        raise _unwritable(value, name)
    return value


def _unwritable(value: Any, name: str) -> InputError:
    known = ", ".join(sorted(kind.name for kind in _WRITTEN))
    return InputError(f"{name} holds {value.dtype}, expected one of {known}; convert it.")


def writable(value: Any, name: str = "an array") -> np.ndarray:
    """Convert to an array that can be written: in host memory, row-major and little-endian.

    Writers copy buffers and ignore strides and byte order, so every array that is written must pass through here.

    Args:
      value: of numpy or jax, or anything that numpy converts to an array; plain numbers get jax's dtype.
      name: what it is called in errors.

    Raises:
      InputError: if its dtype cannot be written, or its values are not available.

    Example:
      >>> writable(np.arange(6, dtype=">f4").reshape(2, 3).T).flags.c_contiguous
      True
    """
    if isinstance(value, Tracer | jax.ShapeDtypeStruct | np.ma.MaskedArray):
        what = "masked" if isinstance(value, np.ma.MaskedArray) else "abstract, without values"
        raise InputError(f"{name} is {what} ({type(value).__name__}); pass an array of numbers, outside of jit.")
    with in_one_line(f"{name} is a {type(value).__name__} that numpy cannot read", "convert it"):
        array = np.asarray(value)
    if not hasattr(value, "dtype"):
        with np.errstate(over="ignore"):
            narrow = array.astype(jax.dtypes.canonicalize_dtype(array.dtype))
        overflows = array.dtype.kind == "f" and np.isfinite(array) & ~np.isfinite(narrow)
        cut = narrow != array if array.dtype.kind in "iu" else overflows
        if np.any(cut):
            raise InputError(f"{name} holds numbers beyond the range of {narrow.dtype}; pass a numpy array of them.")
        array = narrow
    dtype = array.dtype.newbyteorder("<")
    if dtype not in _WRITTEN:
        raise _unwritable(array, name)
    return np.ascontiguousarray(array, dtype).reshape(array.shape)


def _pieces(array: np.ndarray) -> Iterator[tuple[slice, ...]]:
    """Slices in the order of the file."""
    if array.nbytes <= _CHUNK:
        yield (slice(None),) * array.ndim
        return
    axis = int(np.argmax(np.abs(array.strides)))
    step = max(1, _CHUNK * array.shape[axis] // array.nbytes)
    for start in range(0, array.shape[axis], step):
        yield (slice(None),) * axis + (slice(start, start + step),)


def _forget(content: Any) -> None:
    """Release the pages of a mapped file that were read; they stay in the system's page cache."""
    while content is not None and not isinstance(content, mmap.mmap):
        content = content.obj if isinstance(content, memoryview) else getattr(content, "base", None)
    if content is not None and hasattr(mmap, "MADV_DONTNEED") and len(content) > _CHUNK:
        content.madvise(mmap.MADV_DONTNEED)
