"""Rows `[n d]` that are read or computed on access."""

import copy
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np

MAX_MAPS = 128  # files mapped at a time: each holds a file descriptor, of which some systems allow 256


class Windows(NamedTuple):
    """Numbers of rows that are shuffled together.

    Attributes:
      best: the default.
      most: of as many, each is read once.
    """

    best: int
    most: int


class LazyRows:
    """Rows `[n d]` of files, or computed, read on access.

    A slice is a view and reads nothing. A row, rows by number, a slice with a step and `np.asarray(rows)` are arrays.
    """

    def __init__(
        self,
        load: Callable[[int], np.ndarray],
        edges: np.ndarray,
        window: range,
        width: int,
        dtype: Any,
        checksum: str | None = None,
        shuffled: Windows | None = None,
        together: bool = False,
    ):
        """See `open_rows`, which makes them.

        Args:
          load: returns a shard by its number.
          edges: first row of each shard, and the total.
          window: the visible rows.
          width: width of the rows.
          dtype: dtype of the rows.
          checksum: checksum of all shards, if known; "" for computed rows.
          shuffled: how many rows to shuffle together, where they are best read in order.
          together: whether loading a shard takes all processes: they load the same ones, in the same order, and in
            their main threads.
        """
        self._load, self._edges, self.checksum = load, edges, checksum
        self.shuffled, self.together = shuffled, together
        self.shape, self.ndim, self.dtype = (0, width), 2, np.dtype(dtype)
        self._view(window)

    def _view(self, window: range) -> None:
        self._window, self.shape = window, (len(window), self.shape[1])
        self.size = len(window) * self.shape[1]
        self.nbytes = self.size * self.dtype.itemsize

    def __len__(self) -> int:
        return len(self._window)

    def __getitem__(self, index: Any) -> Any:
        if isinstance(index, slice):
            window = self._window[index]
            if window.step == 1:
                view = copy.copy(self)
                view._view(window)
                return view
            return self._take(np.arange(window.start, window.stop, window.step), self.dtype)
        numbers = np.asarray(index)
        if isinstance(index, tuple) or (numbers.dtype.kind not in "iu" and numbers.size):
            raise IndexError("rows are taken by a slice or by number; np.asarray(rows) takes any index")
        if ((numbers < -len(self)) | (numbers >= len(self))).any():
            raise IndexError(f"an index is out of range for {len(self)} rows")
        return self._take(self._window.start + numbers.astype(np.intp) % max(1, len(self)), self.dtype)

    def load(self, numbers: np.ndarray) -> None:
        """Load the shards of some rows, in order.

        Args:
          numbers: of the rows.
        """
        for shard in np.unique(np.searchsorted(self._edges, self._window.start + numbers, side="right") - 1):
            self._load(int(shard))

    def _take(self, numbers: Any, dtype: Any) -> np.ndarray:
        """Rows by their numbers in the directory."""
        numbers = np.asarray(numbers, np.intp)
        flat = numbers.ravel()
        shards = np.searchsorted(self._edges, flat, side="right") - 1
        order = np.argsort(shards, kind="stable")
        out = np.empty((flat.size, self.shape[1]), dtype)
        for part in np.split(order, np.flatnonzero(np.diff(shards[order])) + 1) if flat.size else ():
            number = int(shards[part[0]])
            out[part] = self._load(number)[flat[part] - self._edges[number]]
        return out.reshape(*numbers.shape, self.shape[1])

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> np.ndarray:
        if copy is False:
            raise ValueError("rows that are read on access cannot be an array without a copy")
        return self._take(np.arange(self._window.start, self._window.stop), dtype or self.dtype)
