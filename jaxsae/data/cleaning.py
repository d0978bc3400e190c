"""Rows that poison a training: attention sinks, whose norms are a hundred times those of others, and special tokens.

Rows are left out by number, before they are read.
"""

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from jaxsae._core.files import InputError, any_path
from jaxsae.data import origin, shards
from jaxsae.data.lazy import LazyRows
from jaxsae.data.rows import Rows

OUTLIER = 30.0  # times the median norm
_CHUNK = 1 << 14  # rows read at a time


def norms(rows: Rows) -> np.ndarray:
    """The Euclidean norm of every row, float32 `[n]`; reads them all.

    Args:
      rows: `[n d]`.

    Example:
      >>> norms(np.array([[3.0, 4.0], [0.0, 1.0]])).tolist()
      [5.0, 1.0]
    """
    parts = (np.asarray(rows[start : start + _CHUNK], np.float64) for start in range(0, len(rows), _CHUNK))
    return np.concatenate([np.zeros(0), *(np.linalg.norm(part, axis=1) for part in parts)]).astype(np.float32)


def outliers(norms: np.ndarray, times: float = OUTLIER) -> np.ndarray:
    """Which norms are more than so many times their median, `[n]` bool; none that is not finite, and none if that is 0.

    Args:
      norms: `[n]`.
      times: the multiple.

    Example:
      >>> outliers(np.array([1.0, 2.0, 3.0, 100.0])).tolist()
      [False, False, False, True]
    """
    finite = np.isfinite(norms)
    median = np.median(norms[finite]) if finite.any() else 0
    return finite & (norms > times * median) if median > 0 else np.zeros_like(finite)


class _Kept(LazyRows):
    """Some rows of others, by number."""

    def __init__(self, rows: Any, numbers: np.ndarray):
        lazy = rows if isinstance(rows, LazyRows) else None
        checksum, shuffled = (lazy.checksum, lazy.shuffled) if lazy else (None, None)
        window, together = range(len(numbers)), lazy is not None and lazy.together
        edges = np.array([0, len(numbers)])
        super().__init__(rows.__getitem__, edges, window, rows.shape[1], rows.dtype, checksum, shuffled, together)
        self._rows, self._numbers = rows, numbers

    def load(self, numbers: np.ndarray) -> None:
        self._rows.load(self._numbers[self._window.start + numbers])

    def _take(self, numbers: Any, dtype: Any) -> np.ndarray:
        return np.asarray(self._rows[self._numbers[np.asarray(numbers, np.intp)]], dtype)


def keep(rows: Rows, mask: np.ndarray) -> Rows:
    """Some of the rows, read on access.

    Args:
      rows: `[n d]`.
      mask: which, `[n]` bool.

    Example:
      >>> keep(np.arange(6.0).reshape(3, 2), np.array([True, False, True]))[1].tolist()
      [4.0, 5.0]
    """
    return rows if mask.all() else _Kept(rows, np.flatnonzero(mask))


def mask(
    path: str | os.PathLike, rows: Rows, *, skip_tokens: Sequence[int] = (), max_norm: float | None = None
) -> np.ndarray:
    """Which rows of a file or directory to keep, `[n]` bool.

    Args:
      path: of them; norms and tokens are read beside the shards of a harvest.
      rows: of it, all.
      skip_tokens: leave out the rows of these tokens.
      max_norm: leave out rows whose norm is more than so many times the median.

    Raises:
      InputError: if nothing beside the rows says their tokens, if norms would have to be read from a bucket, or if no
        row is left.

    Example:
      >>> mask("x.npy", np.diag([1.0, 2.0, 3.0, 99.0]), max_norm=10.0).tolist()
      [True, True, True, False]
    """
    kept = np.ones(len(rows), bool)
    if skip_tokens:
        kept &= ~np.isin(_tokens(path, len(rows)), skip_tokens)
    if max_norm is not None:
        kept &= ~outliers(_norms(path, rows), max_norm)
    if not kept.any():
        raise InputError(f"{path}: no row is left of {len(rows)}; pass fewer tokens to skip, or a larger norm.")
    return kept


def _tokens(path: str | os.PathLike, rows: int) -> np.ndarray:
    """The token of each row of a harvest, without the first of each context."""
    tokens = origin.contexts(path, rows)
    if tokens is None:
        raise InputError(f"{path}: nothing says the tokens of its rows; pass a directory that jaxsae harvest wrote.")
    return tokens[:, 1:].ravel()


def _norms(path: str | os.PathLike, rows: Rows) -> np.ndarray:
    if origin.has_column(path, "norms"):
        return shards.column(path, "norms")
    if not isinstance(any_path(path), Path):
        raise InputError(f"{path}: has no norms beside its rows, and all would have to be read; harvest it again.")
    return norms(rows)
