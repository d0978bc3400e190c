"""Rows in a bucket, read in ranges of 4 MiB: ahead of whoever takes them in order, and kept while they are needed."""

import collections
import threading
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np

from jaxsae._core import buckets
from jaxsae._core.files import InputError
from jaxsae.data.lazy import LazyRows, Windows

_BLOCK = 4 << 20  # bytes that are read together
_WIDEST = 256  # blocks of rows that may be shuffled together
_WINDOW = 64  # those that are by default
_IN_ORDER = 16  # blocks that are read together where each is wanted once


class File(NamedTuple):
    """A file of rows.

    Attributes:
      path: as from `files.any_path`.
      offset: of the first row, in bytes.
      rows: how many.
    """

    path: Any
    offset: int
    rows: int


def open_files(
    files: Sequence[File],
    width: int,
    dtype: Any,
    checksum: str,
    check: Callable[[int, bytes], None] = lambda number, header: None,
) -> LazyRows:
    """Open rows of files in a bucket; nothing is read yet.

    Args:
      files: which hold the rows, at least one each.
      width: of the rows.
      dtype: of the rows.
      checksum: of all files.
      check: called with the number of a file and its bytes before the rows, when its first rows are read.
    """
    rows: Any = _Blocks(files, width, np.dtype(dtype), check)
    windows = Windows(*(blocks * _BLOCK // (width * np.dtype(dtype).itemsize) for blocks in (_WINDOW, _WIDEST)))
    return LazyRows(lambda _: rows, np.array([0, len(rows)]), range(len(rows)), width, dtype, checksum, windows)


class _Blocks:
    """Rows of files in a bucket, taken by their numbers.

    They lie in blocks. Whoever takes rows is about to take others from the same blocks, as batches of a window are, and
    then from those that follow: these are read ahead, as many again.
    """

    def __init__(self, files: Sequence[File], width: int, dtype: np.dtype, check: Callable[[int, bytes], None]):
        self._files, self._width, self._dtype, self._check = files, width, dtype, check
        self._row = width * self._dtype.itemsize
        self._per_block = max(1, _BLOCK // self._row)
        self._edges = np.cumsum([0, *(file.rows for file in files)])
        self._blocks = np.cumsum([0, *(-(-file.rows // self._per_block) for file in files)])
        self._kept: collections.OrderedDict[int, Any] = collections.OrderedDict()
        self._most, self._lock = 1, threading.Lock()

    def __len__(self) -> int:
        return int(self._edges[-1])

    def __getitem__(self, numbers: Any) -> np.ndarray:
        numbers = np.asarray(numbers, np.intp)
        files = np.searchsorted(self._edges, numbers, side="right") - 1
        within = numbers - self._edges[files]
        blocks = self._blocks[files] + within // self._per_block
        order, out = np.argsort(blocks, kind="stable"), np.empty((len(numbers), self._width), self._dtype)
        groups = np.split(order, np.flatnonzero(np.diff(blocks[order])) + 1) if len(order) else []
        all_of_them = 2 * len(numbers) > self._per_block * len(groups)  # so that nobody comes back to these blocks
        together = _IN_ORDER if all_of_them else _WIDEST
        for start in range(0, len(groups), together):
            some = groups[start : start + together]
            wanted = [int(blocks[group[0]]) for group in some]
            for block, pending, group in zip(wanted, self._request(wanted), some, strict=True):
                out[group] = self._parse(block, pending)[within[group] % self._per_block]
        return out

    def _request(self, wanted: list[int]) -> list[Any]:
        """Begin to read blocks, and as many after them; forget those that were least recently asked for."""
        ahead = range(wanted[-1] + 1, min(wanted[-1] + 1 + len(wanted), int(self._blocks[-1])))
        with self._lock:
            self._most = max(self._most, len(wanted))
            for block in (*wanted, *ahead):
                if block not in self._kept:
                    self._kept[block] = buckets.start_reading(*self._span(block))
            for block in (*ahead, *wanted):
                self._kept.move_to_end(block)
            pending = [self._kept[block] for block in wanted]
            # Two windows, and one more for a reader that is ahead of the others.
            while len(self._kept) > 3 * self._most:
                self._kept.popitem(last=False)
        return pending

    def _place(self, block: int) -> tuple[int, int, int]:
        """The file of a block, its first row there, and the one after its last."""
        file = int(np.searchsorted(self._blocks, block, side="right")) - 1
        first = (block - int(self._blocks[file])) * self._per_block
        return file, first, min(first + self._per_block, self._files[file].rows)

    def _span(self, block: int) -> tuple[Any, int, int]:
        """The path of a block and its bytes, with those before the rows if it is the first of its file."""
        number, first, last = self._place(block)
        path, offset, _ = self._files[number]
        return path, offset + first * self._row if first else 0, offset + last * self._row

    def _parse(self, block: int, pending: Any) -> np.ndarray:
        """The rows of a block."""
        number, first, _ = self._place(block)
        path, start, stop = self._span(block)
        try:
            with buckets.reached(path):
                content = pending.result()
            if len(content) != stop - start:
                what = f"bytes {start} to {stop} are {len(content)}"
                raise InputError(f"{path}: {what}; it has changed: begin again.")
            if not first:
                self._check(number, content[: self._files[number].offset])
        except InputError:
            with self._lock:
                self._kept.pop(block, None)  # so that it can be tried again
            raise
        at = 0 if first else self._files[number].offset
        return np.frombuffer(content, self._dtype, offset=at).reshape(-1, self._width)
