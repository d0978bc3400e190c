"""Rows to train and measure on: activations on disk, or patches of two photographs."""

import hashlib
import io
import itertools
import json
import os
import tokenize
import zipfile
import zlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
import safetensors

from jaxsae import shards
from jaxsae.files import InputError, local_path

Rows = np.ndarray | shards.Rows  # `[n d]`, in memory or not

_THREADS, _AHEAD = 2, 8  # of the reading of batches; in number
_SAMPLED, _BLOCKS = 64 << 20, 256  # bytes of rows whose values are hashed, and in how many places
_MEND = "write the file anew"
# What numpy lets out when a file is not what it says.
_UNREADABLE = (
    *(ValueError, TypeError, EOFError, OSError, LookupError, SyntaxError, NotImplementedError, MemoryError),
    *(tokenize.TokenError, zipfile.BadZipFile, zlib.error, safetensors.SafetensorError, RuntimeError),
)


def open_rows(path: str | os.PathLike) -> Rows:
    """Open activations as rows `[n d]`: a file in one of several formats, or a directory of shards.

    Formats are `.npy` and `.safetensors`, memory-mapped; `.npz`; and `.array_record`, whose records are rows, each as
    the bytes of an `.npy` file. Leading axes are flattened into rows. There must be one array of activations in a file.
    Of a directory that is still being written, the whole shards are opened.

    Args:
      path: the file, or the directory.

    Returns:
      `[n d]`, float16, bfloat16, float32 or float64.

    Raises:
      InputError: if the file is missing, truncated, not an array, empty, or not floating point; as `shards.read`.

    Example:
      >>> import tempfile, numpy as np
      >>> with tempfile.TemporaryDirectory() as folder:
      ...     np.save(f"{folder}/x.npy", np.zeros((2, 3, 4), np.float32))
      ...     open_rows(f"{folder}/x.npy").shape
      (6, 4)
    """
    path = local_path(path)
    expected = "expected a .npy or .npz array of floating-point activations (rows, width)"
    kind = {".safetensors": _open_safetensors, ".array_record": _open_records}.get(path.suffix)
    if Path(path, shards.MANIFEST).is_file():
        rows = shards.open_rows(path)
        if not len(rows):
            raise InputError(f"{path}: has shape {rows.shape}; {expected}.")
        return rows
    if not path.is_file():
        what = f"a directory without {shards.MANIFEST}" if path.is_dir() else "no such file"
        raise InputError(f"{path}: {what}; {expected}.")
    with open(path, "rb") as file:
        magic = file.read(6)
    if kind is None and magic[:2] != b"PK" and magic != b"\x93NUMPY":
        raise InputError(f"{path}: {'not an array file' if magic else 'the file is empty'}; {expected}.")
    try:
        if kind is not None:
            array = kind(path)
        elif magic[:2] == b"PK":
            with open(path, "rb") as file, np.load(file, allow_pickle=False) as archive:
                array = _only_array(archive, path)
        else:
            array = np.load(path, mmap_mode="r", allow_pickle=False)
    except InputError:
        raise
    except _UNREADABLE as error:
        raise InputError(f"{path}: is damaged or holds no plain array ({_reason(error)}); {expected}.") from error
    dtype = array.dtype.newbyteorder("=")
    if dtype not in (np.float16, np.float32, np.float64, jnp.bfloat16):
        raise InputError(f"{path}: holds {array.dtype}; {expected}: convert it with .astype('float32').")
    if array.ndim < 2 or array.size == 0:
        raise InputError(f"{path}: has shape {array.shape}; {expected}.")
    if isinstance(array, shards.Rows):
        return array
    rows = array.reshape(-1, array.shape[-1])
    if dtype == array.dtype:
        return rows
    return shards.Rows(lambda _: rows, np.array([0, len(rows)]), range(len(rows)), rows.shape[1], dtype)


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
        except _UNREADABLE as error:
            if len(numbers) > 1:  # find which
                return [row for number in numbers for row in self._rows([number])]
            raise InputError(
                f"{self._path}: record {numbers[0]} is no .npy file ({_reason(error)}); {_MEND}."
            ) from error


def _open_records(path: Path) -> shards.Rows:
    records: Any = _Records(path)
    window, dtype = range(len(records)), records.first.dtype.newbyteorder("=")
    return shards.Rows(lambda _: records, np.array([0, len(records)]), window, len(records.first), dtype)


def _reason(error: Exception) -> str:
    return (str(error) or type(error).__name__).splitlines()[0]


def _only_array(archive, path: Path) -> np.ndarray:
    if len(archive.files) != 1:
        names = ", ".join(archive.files) or "nothing"
        raise InputError(f"{path}: holds {len(archive.files)} arrays ({names}); expected one: save it alone.")
    array = archive[archive.files[0]]
    if not isinstance(array, np.ndarray):
        raise TypeError(f"its only member is {archive.files[0]!r}")
    return array


def require_finite(rows: Rows, what: str) -> None:
    """Raise if there are rows with NaN or Inf.

    Args:
      rows: `[n d]`, may be memory-mapped.
      what: they are, to be told.

    Raises:
      InputError: how many there are, and which is the first.

    Example:
      >>> require_finite(np.array([[1.0], [np.nan]]), "x.npy")
      Traceback (most recent call last):
      jaxsae.files.InputError: x.npy: 1 of 2 rows hold NaN or Inf, the first is row 1; drop or mend them.
    """
    chunk = max(1, (64 << 20) // rows[0].nbytes)  # the rows may be a file larger than memory
    finite = [np.isfinite(rows[at : at + chunk]).all(axis=1) for at in range(0, len(rows), chunk)]
    bad = np.flatnonzero(~np.concatenate(finite))
    if bad.size:
        raise InputError(
            f"{what}: {bad.size} of {len(rows)} rows hold NaN or Inf, the first is row {bad[0]}; drop or mend them."
        )


def fingerprint(rows: Rows) -> str:
    """A hash by which other rows in the place of these are noticed, cheap for any number of them.

    It is of their number, width, dtype and values: all of them up to 64 MiB, beyond that blocks spread evenly; of a
    directory of shards, the checksums in its manifest instead; of rows that are computed, no values.

    Args:
      rows: `[n d]`, may be memory-mapped.

    Example:
      >>> a, b = np.zeros((5, 2)), np.zeros((5, 2))
      >>> b[3, 1] = 1.0
      >>> fingerprint(a) == fingerprint(a.copy()), fingerprint(a) == fingerprint(b)
      (True, False)
    """
    hashed = hashlib.blake2b(repr((rows.shape, rows.dtype.newbyteorder("=").name)).encode(), digest_size=8)
    if isinstance(rows, shards.Rows) and rows.checksum is not None:
        hashed.update(rows.checksum.encode())
        return hashed.hexdigest()
    most = max(_BLOCKS, _SAMPLED // max(1, rows.nbytes // len(rows)))
    blocks = 1 if len(rows) <= most else _BLOCKS
    size = min(len(rows), most) // blocks
    for start in np.linspace(0, len(rows) - size, blocks).astype(int).tolist():
        block = np.asarray(rows[start : start + size])
        hashed.update(np.ascontiguousarray(block, block.dtype.newbyteorder("<")).ravel().view(np.uint8))
    return hashed.hexdigest()


class Batches:
    """Batches `[size d]` in float32 for ever, read ahead by grain; the order is a function of the seed alone.

    Attributes:
      position: how many batches were taken; set it to go on from there, or from anywhere else, to the bit.
    """

    def __init__(self, source: "_Numbered"):
        """As `batches` makes it.

        Args:
          source: batch by its number.
        """
        import grain

        self.source = source
        reading = grain.ReadOptions(num_threads=_THREADS, prefetch_buffer_size=_AHEAD)
        self._iterator = iter(grain.MapDataset.source(source).to_iter_dataset(reading))

    def __iter__(self) -> "Batches":
        return self

    def __next__(self) -> np.ndarray:
        try:
            return next(self._iterator)
        except InputError as error:  # grain adds lines of its own
            raise InputError(str(error).partition("\n")[0]) from error

    @property
    def position(self) -> int:
        """Of the attributes."""
        return self._iterator.get_state()["next_index"]

    @position.setter
    def position(self, number: int) -> None:
        self._iterator.set_state({"next_index": number})

    def rows(self, number: int) -> list[tuple[int, np.ndarray]]:
        """Which rows batch `number` holds: `(source, row numbers)`, for those sources that it draws from."""
        return [(source, numbers) for source, _, numbers in self.source.parts(number)]


class _Numbered:
    """Batch by its number: what grain reads."""

    def __init__(self, sources: Sequence[Rows], names: Sequence[str], order: Any, size: int, part: slice):
        self._sources, self._names, self._order = sources, names, order
        self._size, self._part = size, range(size)[part]
        self._edges = np.cumsum([0, *map(len, sources)])

    def __len__(self) -> int:
        return (1 << 62) // self._size

    def parts(self, number: int) -> list[tuple[int, np.ndarray, np.ndarray]]:
        """Of each source that a batch draws from: its number, places in the batch, and row numbers, ascending."""
        flat = np.array([self._order[number * self._size + place] for place in self._part])
        sources = np.searchsorted(self._edges, flat, side="right") - 1
        order = np.argsort(flat, kind="stable")  # a memory-mapped file is then read forwards
        cuts = np.searchsorted(sources[order], range(len(self._sources) + 1))
        found = [(source, order[cuts[source] : cuts[source + 1]]) for source in range(len(self._sources))]
        return [(source, at, flat[at] - self._edges[source]) for source, at in found if len(at)]

    def __getitem__(self, index: int) -> np.ndarray:
        batch = np.empty((len(self._part), self._sources[0].shape[1]), np.float32)
        for source, at, numbers in self.parts(index):
            rows = self._sources[source][numbers]
            batch[at] = shards.cast(rows, np.float32, self._names[source], "scale it", numbers)
        return batch


def batches(
    rows: Rows | Sequence[Rows],
    size: int,
    *,
    seed: int,
    weights: Sequence[float] | None = None,
    window: int | None = None,
    part: slice = slice(None),
    names: Sequence[str] | None = None,
) -> Batches:
    """Yield batches `[size d]` in float32 for ever, each row once before any comes again, in an order anew each time.

    So it is of each source: a pass over its rows ends before the next begins, though a batch may hold rows of both.

    Args:
      rows: `[n d]`, may be memory-mapped; or several of them, to be mixed.
      size: rows a batch, at most `n`.
      seed: of the shuffles.
      weights: in which proportions to mix, whatever the lengths; by default in those of the lengths, as if joined.
      window: rows that are shuffled among themselves, one window after the other, where rows had better be read
        forwards (`harvest.live`); by default all are. The last window of a pass holds the rest.
      part: which rows of each batch to read, those that this process needs; all by default.
      names: of the sources, for messages.

    Raises:
      InputError: if there are fewer rows than a batch holds, or the shapes, dtypes, window or weights do not fit; in
        reading, at a row of float64 that overflows.

    Example:
      >>> stream = batches(np.arange(6.0).reshape(3, 2), 2, seed=0)
      >>> next(stream).shape, stream.position
      ((2, 2), 1)
    """
    import grain

    sources: list[Any] = [rows] if hasattr(rows, "shape") else list(rows)  # pyright: ignore[reportArgumentType]
    names = names or [f"source {number}" for number in range(len(sources))]
    for name, source in zip(names, sources, strict=True):
        if source.ndim != 2 or not source.size or source.dtype.kind in "cObSU":
            got = f"{source.dtype} of shape {source.shape}"
            raise InputError(f"{name}: got {got}, expected real numbers (rows, width); pass those.")
    for option, value in (("size", size), ("window", window)):
        if value is not None and value < 1:
            raise InputError(f"got {option} {value}; pass at least 1.")
    total = sum(map(len, sources))
    if total < size:
        raise InputError(f"got {total} rows for batches of {size}; pass more rows or a smaller batch.")
    widths = {source.shape[1] for source in sources}
    if len(widths) > 1:
        raise InputError(f"got sources of widths {sorted(widths)}; pass activations of one layer.")

    def shuffled(first: int, end: int, seed: int):
        n = end - first
        whole = 0 if window is None or window >= n else n // window * window  # rows in windows; the rest is one more
        rest = grain.MapDataset.range(first + whole, end).seed(seed % 2**32).shuffle()
        if not whole:
            return rest.repeat()
        seed %= 2**31  # the number of the window is added to it, and the sum has 32 bits
        windows = grain.MapDataset.range(first, first + whole)
        windows = grain.experimental.WindowShuffleMapDataset(windows, window_size=window, seed=seed)
        return grain.MapDataset.concatenate([windows, rest] if first + whole < end else [windows]).repeat()

    if weights is None:
        order = shuffled(0, total, seed)
    else:
        if len(weights) != len(sources) or not all(0 < weight < np.inf for weight in weights):
            raise InputError(f"got weights {list(weights)} for {len(sources)} sources; pass a positive one for each.")
        edges = np.cumsum([0, *map(len, sources)]).tolist()
        pairs = enumerate(itertools.pairwise(edges))
        order = grain.MapDataset.mix([shuffled(*pair, seed + number) for number, pair in pairs], weights)
    return Batches(_Numbered(sources, names, order, size, part))


def image_patches(rows: int, heldout: int, *, side: int = 10, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Patches of natural images, for training and held out, from scikit-learn's two photographs.

    Each patch is `side × side` pixels of 3 colours, its own mean removed; then all are scaled by one number so that
    the mean squared norm of training patches is 1. Training patches come from the left three quarters of each
    picture and held-out ones from the rest: no pixel is in both.

    Args:
      rows: training patches.
      heldout: held-out patches.
      side: pixels along a side.
      seed: of the places they are cut from.

    Returns:
      `[rows d]` and `[heldout d]` float32, `d = 3 · side²`.

    Raises:
      InputError: if scikit-learn is not installed.

    Example:
      >>> train, heldout = image_patches(100, 10)
      >>> train.shape, heldout.shape
      ((100, 300), (10, 300))
    """
    try:
        from sklearn.datasets import load_sample_images
    except ImportError as error:
        raise InputError(
            "the photographs come with scikit-learn, which is missing; pip install 'jaxsae[study]'."
        ) from error
    generator = np.random.default_rng(seed)
    pictures = [np.asarray(image, np.float32) for image in load_sample_images().images]
    border = [3 * picture.shape[1] // 4 for picture in pictures]
    train = _cut([picture[:, :b] for picture, b in zip(pictures, border, strict=True)], rows, side, generator)
    rest = _cut([picture[:, b:] for picture, b in zip(pictures, border, strict=True)], heldout, side, generator)
    scale = 1 / np.sqrt(np.mean(np.sum(train**2, axis=1)))
    return train * scale, rest * scale


def _cut(pictures, count, side, generator):
    """Cut `count` patches at random places, as many from each picture, and remove the mean of each."""
    patches = []
    for picture, share in zip(pictures, np.array_split(np.arange(count), len(pictures)), strict=True):
        windows = np.lib.stride_tricks.sliding_window_view(picture, (side, side), axis=(0, 1))
        i = generator.integers(windows.shape[0], size=len(share))
        j = generator.integers(windows.shape[1], size=len(share))
        patches.append(windows[i, j].reshape(len(share), windows[0, 0].size))
    patches = generator.permutation(np.concatenate(patches))
    return patches - patches.mean(axis=1, keepdims=True)
