"""Rows that show what latents stand for: where each is largest, and a sample of where it is active.

Both are on the host, since they sort; both are mergeable: `a + b` of two parts of the rows is exactly that of all rows.
"""

import dataclasses
from collections.abc import Sequence

import numpy as np

from jaxsae.codes import SparseCode


@dataclasses.dataclass(frozen=True)
class _Chosen:
    """For each of some latents, the active entries of a code with the smallest keys, one of each document."""

    values: np.ndarray
    rows: np.ndarray
    documents: np.ndarray

    def __add__(self, other):
        if type(self) is not type(other) or self.rows.shape != other.rows.shape:
            raise ValueError(f"got {self._kind()} and {other._kind()} to add; pass two of the same latents and n.")
        parts = [np.concatenate(pair, axis=1) for pair in zip(self._fields(), other._fields(), strict=True)]
        there = parts[1] >= 0
        return self._of(np.nonzero(there)[0], *(part[there] for part in parts), shape=self.rows.shape)

    def _kind(self) -> str:
        return f"{type(self).__name__} {self.rows.shape}"

    def _fields(self) -> tuple[np.ndarray, ...]:
        return self.values, self.rows, self.documents

    @classmethod
    def _of(cls, latent, values, rows, documents, *, shape: tuple[int, int]):
        """The best of entries, `[e]` each; `latent` counts from 0 to `shape[0] − 1`."""
        order = np.lexsort((rows, cls._key(values, rows), latent))
        latent, values, rows, documents = (each[order] for each in (latent, values, rows, documents))
        # Of each document the first; `np.unique` returns where each pair occurs first.
        _, numbers = np.unique(documents, return_inverse=True)
        first = np.unique(latent * (len(rows) + 1) + numbers, return_index=True)[1]
        first.sort()
        latent, values, rows, documents = (each[first] for each in (latent, values, rows, documents))
        rank = np.arange(len(latent)) - np.searchsorted(latent, latent)
        kept = rank < shape[1]
        at = latent[kept], rank[kept]
        found = np.zeros(shape, values.dtype), np.full(shape, -1), np.full(shape, -1)
        for whole, part in zip(found, (values, rows, documents), strict=True):
            whole[at] = part[kept]
        return cls(*found)

    @staticmethod
    def _key(values: np.ndarray, rows: np.ndarray) -> np.ndarray:
        raise NotImplementedError


class TopContexts(_Chosen):
    """The rows where each of some latents is largest in magnitude, at most one of each document.

    A document stands with its largest value; equal values are in the order of their rows. `a + b` merges two parts of
    the rows, and is exactly what all of them give: a document that is among the first `n` is there in each part where
    its largest value is.

    Attributes:
      values: `[t n]`, of the latents at these rows, in descending magnitude; 0 where there are fewer.
      rows: `[t n]` int64, their numbers; −1 where there are fewer.
      documents: `[t n]` int64, the documents they are of; −1 where there are fewer.

    Example:
      >>> import jax.numpy as jnp, jaxsae
      >>> code = jaxsae.codes.from_dense(jnp.array([[1.0, 2.0], [3.0, 0.0], [2.0, 2.0]]), capacity=2)
      >>> whole = jaxsae.metrics.top_contexts(code, [0, 1], n=2)
      >>> whole.rows.tolist(), whole.values.tolist()
      ([[1, 2], [0, 2]], [[3.0, 2.0], [2.0, 2.0]])
      >>> parts = [code.replace(values=code.values[at], indices=code.indices[at]) for at in (slice(1), slice(1, 3))]
      >>> first, rest = (
      ...     jaxsae.metrics.top_contexts(part, [0, 1], n=2, rows=rows)
      ...     for part, rows in zip(parts, ([0], [1, 2]), strict=True)
      ... )
      >>> (first + rest).rows.tolist()
      [[1, 2], [0, 2]]
    """

    @staticmethod
    def _key(values: np.ndarray, rows: np.ndarray) -> np.ndarray:
        return -np.abs(values)


class ContextSample(_Chosen):
    """A sample without replacement of the rows where each of some latents is active.

    It has the rows with the smallest hashes, so the sample does not depend on the order of the rows or on how they are
    batched, and `a + b` of two parts is exactly that of all of them.

    Attributes:
      values: `[t n]`, of the latents at these rows, in the order of the hashes; 0 where there are fewer.
      rows: `[t n]` int64, their numbers; −1 where there are fewer.
      documents: as `rows`.

    Example:
      >>> import jax.numpy as jnp, jaxsae
      >>> code = jaxsae.codes.from_dense(jnp.ones((100, 1)), capacity=1)
      >>> sample = jaxsae.metrics.context_sample(code, [0], n=3)
      >>> len(set(sample.rows[0].tolist()))
      3

    Source: bottom-k sketches, Cohen & Kaplan (2007), "Summarizing data using bottom-k sketches".
    """

    @staticmethod
    def _key(values: np.ndarray, rows: np.ndarray) -> np.ndarray:
        return _hash(rows)


def top_contexts(
    code: SparseCode,
    latents: Sequence[int] | np.ndarray,
    *,
    n: int = 20,
    rows: Sequence[int] | np.ndarray | None = None,
    documents: Sequence[int] | np.ndarray | None = None,
) -> TopContexts:
    """Find the rows where latents are largest. Rows with NaN or Inf are left out.

    Args:
      code: `[b k]`, with no index repeated within a row.
      latents: `[t]`, which ones, each once.
      n: how many rows for each.
      rows: `[b]`, numbers of the rows, from 0, each once; 0, 1, 2 … by default.
      documents: `[b]`, from 0, numbers of the documents they are of; each row is one by default.

    Raises:
      ValueError: if a latent is not one of the code's, or given twice, or an argument is not of the code's rows.

    Example:
      >>> import jax.numpy as jnp, jaxsae
      >>> code = jaxsae.codes.from_dense(jnp.array([[1.0], [3.0], [2.0]]), capacity=1)
      >>> jaxsae.metrics.top_contexts(code, [0], n=2, documents=[7, 8, 8]).rows.tolist()
      [[1, 0]]
    """
    at, entries = _entries("top_contexts", code, latents, rows, documents)
    return TopContexts._of(at, *entries, shape=(len(latents), n))


def context_sample(
    code: SparseCode,
    latents: Sequence[int] | np.ndarray,
    *,
    n: int = 100,
    rows: Sequence[int] | np.ndarray | None = None,
) -> ContextSample:
    """Sample the rows where latents are active. Rows with NaN or Inf are left out.

    Args:
      code: as for `top_contexts`.
      latents: likewise.
      n: how many rows for each.
      rows: as for `top_contexts`.

    Raises:
      ValueError: as `top_contexts`.

    Example:
      >>> import jax.numpy as jnp, jaxsae
      >>> code = jaxsae.codes.from_dense(jnp.array([[0.0], [3.0], [2.0]]), capacity=1)
      >>> sorted(jaxsae.metrics.context_sample(code, [0], n=2).rows[0].tolist())
      [1, 2]

    Source: see `ContextSample`.
    """
    at, entries = _entries("context_sample", code, latents, rows, None)
    return ContextSample._of(at, *entries, shape=(len(latents), n))


def _entries(name: str, code: SparseCode, latents, rows, documents):
    """The active entries of some latents: which of them, and value, row and document, `[e]` each."""
    place, active = places(name, code, latents), active_slots(code)
    count = len(active)
    rows = np.arange(count) if rows is None else np.asarray(rows, np.int64)
    documents = rows if documents is None else np.asarray(documents, np.int64)
    if rows.shape != (count,) or documents.shape != (count,):
        raise ValueError(
            f"`{name}` got {rows.shape} row numbers and {documents.shape} documents for a code of {count} rows; pass "
            "one for each."
        )
    indices = np.where(active, np.asarray(code.indices), code.num_latents)
    row, slot = np.nonzero(place[indices] >= 0)
    at = place[indices[row, slot]]
    return at, (np.asarray(code.values)[row, slot], rows[row], documents[row])


def places(name: str, code: SparseCode, latents: Sequence[int] | np.ndarray) -> np.ndarray:
    """Where each latent of a code is in a selection, `[m + 1]`, or −1; the last is of unused slots."""
    latents = np.asarray(latents, np.int64)
    m = code.num_latents
    if np.ndim(code.values) != 2:
        raise ValueError(f"`{name}` got a code of shape {np.shape(code.values)}; pass one of rows, (b, k).")
    if latents.ndim != 1 or ((latents < 0) | (latents >= m)).any() or len(np.unique(latents)) < len(latents):
        raise ValueError(f"`{name}` got latents {latents.tolist()[:8]} of {m}; pass some from 0 to {m - 1}, each once.")
    place = np.full(m + 1, -1)
    place[latents] = np.arange(len(latents))
    return place


def active_slots(code: SparseCode) -> np.ndarray:
    """Which slots `[b k]` hold an active latent, in rows whose values are all finite."""
    values, indices = np.asarray(code.values), np.asarray(code.indices)
    there = (indices >= 0) & (indices < code.num_latents)
    finite = (np.isfinite(values) | ~there).all(axis=-1, keepdims=True)
    return there & (values != 0) & finite


def _hash(numbers: np.ndarray) -> np.ndarray:
    """A pseudo-random 64-bit number for each (the finaliser of SplitMix64)."""
    x = numbers.astype(np.uint64) + np.uint64(0x9E3779B97F4A7C15)
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))
