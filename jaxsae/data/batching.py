"""Batches of rows in an order fixed by a seed, prefetched by grain."""

import itertools
import time
from collections.abc import Sequence
from typing import Any

import numpy as np

from jaxsae._core.files import InputError, first_line
from jaxsae.data import shards
from jaxsae.data.lazy import LazyRows
from jaxsae.data.rows import Rows

_AHEAD = 8  # batches prefetched


class Batches:
    """An infinite iterator of float32 batches `[size d]`, prefetched by grain, whose order depends on the seed only.

    Attributes:
      position: number of batches taken; set it to resume from any batch.
      waited: seconds that were spent waiting for batches.
    """

    def __init__(self, source: "_Numbered", threads: int):
        """See `batches`.

        Args:
          source: maps a number to its batch.
          threads: that read.
        """
        import grain

        self.source, self.waited = source, 0.0
        reading = grain.ReadOptions(num_threads=threads, prefetch_buffer_size=_AHEAD if threads else 0)
        self._iterator = iter(grain.MapDataset.source(source).to_iter_dataset(reading))

    def __iter__(self) -> "Batches":
        return self

    def __next__(self) -> np.ndarray:
        start = time.perf_counter()
        try:
            return next(self._iterator)
        except InputError as error:  # grain adds lines of its own
            raise InputError(first_line(error)) from error
        finally:
            self.waited += time.perf_counter() - start

    @property
    def position(self) -> int:
        """The number of batches taken."""
        return self._iterator.get_state()["next_index"]

    @position.setter
    def position(self, number: int) -> None:
        self._iterator.set_state({"next_index": number})

    def rows(self, number: int) -> list[tuple[int, np.ndarray]]:
        """The rows in batch `number`: `(source, row numbers)` for each source that it draws from."""
        self.source.load_together(number)
        return [(source, numbers) for source, _, numbers in self.source.parts(number)]


class _Numbered:
    """Random access to batches by number, as a grain data source."""

    def __init__(self, sources: Sequence[Rows], names: Sequence[str], order: Any, size: int, part: slice):
        self._sources, self._names, self._order = sources, names, order
        self._size, self._part = size, range(size)[part]
        self._edges = np.cumsum([0, *map(len, sources)])
        self.together = any(isinstance(rows, LazyRows) and rows.together for rows in sources)

    def __len__(self) -> int:
        return (1 << 62) // self._size

    def parts(self, number: int, whole: bool = False) -> list[tuple[int, np.ndarray, np.ndarray]]:
        """For each source that a batch draws from: its number, places in the batch, and row numbers, ascending.

        Of this process's part of the batch, or of the whole.
        """
        places = range(self._size) if whole else self._part
        flat = np.array([self._order[number * self._size + place] for place in places])
        sources = np.searchsorted(self._edges, flat, side="right") - 1
        order = np.argsort(flat, kind="stable")  # a memory-mapped file is then read forwards
        cuts = np.searchsorted(sources[order], range(len(self._sources) + 1))
        found = [(source, order[cuts[source] : cuts[source + 1]]) for source in range(len(self._sources))]
        return [(source, at, flat[at] - self._edges[source]) for source, at in found if len(at)]

    def load_together(self, number: int) -> None:
        """Load what the whole batch draws from, where that takes all processes: their parts draw from other shards."""
        if self.together:
            for source, _, numbers in self.parts(number, whole=True):
                rows = self._sources[source]
                if isinstance(rows, LazyRows) and rows.together:
                    rows.load(numbers)

    def __getitem__(self, index: int) -> np.ndarray:
        self.load_together(index)
        batch = np.empty((len(self._part), self._sources[0].shape[1]), np.float32)
        for source, at, numbers in self.parts(index):
            rows = self._sources[source][numbers]
            batch[at] = shards.cast(rows, np.float32, self._names[source], "scale it", numbers)
        return batch


def shuffle_window(sources: Sequence[Rows], window: int | None) -> int | None:
    """The number of rows that `batches` shuffles together; None if it is all.

    Args:
      sources: rows, which may have their own.
      window: what was asked for, if anything.

    Raises:
      InputError: if so many rows cannot be kept in memory, so that each would be read or computed several times.

    Example:
      >>> shuffle_window([np.zeros((4, 2))], None), shuffle_window([np.zeros((4, 2))], 3)
      (None, 3)
    """
    known = [source.shuffled for source in sources if isinstance(source, LazyRows) and source.shuffled is not None]
    if window is None:
        return min((each.best for each in known), default=None)
    most = min((each.most for each in known), default=window)
    if window > most:
        raise InputError(f"got window {window}; pass at most {most}, of which each of these rows is read once.")
    return window


def batches(
    rows: Rows | Sequence[Rows],
    size: int,
    *,
    seed: int,
    weights: Sequence[float] | None = None,
    window: int | None = None,
    part: slice = slice(None),
    names: Sequence[str] | None = None,
    threads: int = 2,
) -> Batches:
    """Yield float32 batches `[size d]` indefinitely: each epoch holds every row once, in a new order.

    With several sources this holds for each. A batch may hold rows of two epochs.

    Args:
      rows: `[n d]`, may be memory-mapped; or several such sources, to be mixed.
      size: rows per batch, at most `n`.
      seed: seed of the shuffles.
      weights: proportions in which to mix the sources; by default those of their lengths, as if concatenated.
      window: shuffle only within consecutive windows of this many rows. By default shuffle all rows together, except
        where rows are best read in order: in windows of 256 MiB for those in a bucket, of its own for `harvest.live`.
        The last window of an epoch holds the rest.
      part: the rows of each batch that this process reads; all by default.
      names: names of the sources, for messages.
      threads: that read ahead; none do where loading takes all processes.

    Raises:
      InputError: if there are fewer rows than a batch holds, or the shapes, dtypes, window or weights do not fit;
        while reading, if a float64 row overflows.

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
    for option, value in (("size", size), ("window", window), ("threads", threads)):
        if value is not None and value < 1:
            raise InputError(f"got {option} {value}; pass at least 1.")
    total = sum(map(len, sources))
    if total < size:
        raise InputError(f"got {total} rows for batches of {size}; pass more rows or a smaller batch.")
    widths = {source.shape[1] for source in sources}
    if len(widths) > 1:
        raise InputError(f"got sources of widths {sorted(widths)}; pass activations of one layer.")
    window = shuffle_window(sources, window)

    def shuffled(first: int, end: int, seed: int):
        def together(first):
            return grain.MapDataset.range(first, end).seed(seed % 2**32).shuffle()

        if window is None or window >= end - first:
            return together(first).repeat()
        rest = end - (end - first) % window  # the rows from here on form the last window
        windows = grain.experimental.WindowShuffleMapDataset(
            grain.MapDataset.range(first, rest),
            window_size=window,
            seed=seed % 2**31,  # the number of the window is added to it, and the sum has 32 bits
        )
        return grain.MapDataset.concatenate([windows, together(rest)] if rest < end else [windows]).repeat()

    if weights is None:
        order = shuffled(0, total, seed)
    else:
        if len(weights) != len(sources) or not all(0 < weight < np.inf for weight in weights):
            raise InputError(f"got weights {list(weights)} for {len(sources)} sources; pass a positive one for each.")
        edges = np.cumsum([0, *map(len, sources)]).tolist()
        pairs = enumerate(itertools.pairwise(edges))
        order = grain.MapDataset.mix([shuffled(*pair, seed + number) for number, pair in pairs], weights)
    numbered = _Numbered(sources, names, order, size, part)
    return Batches(numbered, 0 if numbered.together else threads)
