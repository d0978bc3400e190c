"""Which latents are active together: counts of pairs in bounded memory, mergeable, with the error stated.

On the host, since it sorts.
"""

import dataclasses
from collections.abc import Sequence

import numpy as np

from jaxsae.autoencoder.contexts import active_slots, places
from jaxsae.codes import SparseCode

_PAIRS = 1 << 22  # that are sorted together


@dataclasses.dataclass(frozen=True)
class CoActivation:
    """How often each of some latents is active together with others, by at most `c` counters for each.

    Where a latent has more than `c` partners, the counters are decreased together, and those at 0 are let go. So a
    count may be too small, by at most `missed`, and is never too large; a partner without a counter was active together
    with the latent at most `missed` times:

        count ≤ true count ≤ count + missed,    missed ≤ (pairs − Σ counts) / (c + 1)

    With at most `c` different partners all counts are exact. `a + b` merges two parts of the rows, and keeps both
    bounds.

    Attributes:
      rows: `[t]` int64, number of rows on which each latent is active.
      pairs: `[t]` int64, of its active rows, the sum of the other active latents.
      partners: `[t c]` int64, other latents by descending count, −1 for unused counters.
      counts: `[t c]` int64, rows on which both are active, at least; 0 for unused counters.
      missed: `[t]` int64, how much less than the true ones counts are at most.

    Example:
      >>> import jax.numpy as jnp, jaxsae
      >>> code = jaxsae.codes.from_dense(jnp.array([[1.0, 2.0, 0.0], [3.0, 0.0, 1.0], [2.0, 2.0, 0.0]]), capacity=2)
      >>> found = jaxsae.metrics.co_activation(code, [0], capacity=2)
      >>> found.partners.tolist(), found.counts.tolist(), found.given.round(2).tolist()
      ([[1, 2]], [[2, 1]], [[0.67, 0.33]])
      >>> twice = found + found
      >>> twice.counts.tolist(), twice.missed.tolist()
      ([[4, 2]], [0])

    Source: Misra & Gries (1982), "Finding repeated elements"; merged as in Agarwal et al. (2013), "Mergeable
      summaries".
    """

    rows: np.ndarray
    pairs: np.ndarray
    partners: np.ndarray
    counts: np.ndarray
    missed: np.ndarray

    def __add__(self, other: "CoActivation") -> "CoActivation":
        if self.counts.shape != other.counts.shape:
            raise ValueError(
                f"got co-activations {self.counts.shape} and {other.counts.shape} to add; pass two of the same latents "
                "and capacity."
            )
        partners, counts = (
            np.concatenate([getattr(each, name) for each in (self, other)], axis=1) for name in ("partners", "counts")
        )
        there = counts > 0
        found = _summed(np.nonzero(there)[0], partners[there], counts[there])
        rows, pairs, missed = (getattr(self, name) + getattr(other, name) for name in ("rows", "pairs", "missed"))
        return _reduced(rows, pairs, missed, *found, capacity=self.counts.shape[1])

    @property
    def given(self) -> np.ndarray:
        """`P(partner active | latent active)`, `[t c]`, at least; NaN for a latent that was never active."""
        with np.errstate(invalid="ignore"):
            return self.counts / self.rows[:, None]

    @property
    def error(self) -> np.ndarray:
        """How much less than the true ones `given` are at most, `[t]`; 0 where all counts are exact."""
        return self.missed / np.maximum(self.rows, 1)


def co_activation(code: SparseCode, latents: Sequence[int] | np.ndarray, *, capacity: int = 1024) -> CoActivation:
    """Count which latents are active together with some. Rows with NaN or Inf are left out.

    Args:
      code: `[b k]`, with no index repeated within a row.
      latents: `[t]`, which ones, each once.
      capacity: counters `c` for each.

    Raises:
      ValueError: if a latent is not one of the code's, or given twice, or there is no counter.

    Example:
      >>> import jax.numpy as jnp, jaxsae
      >>> code = jaxsae.codes.from_dense(jnp.ones((5, 3)), capacity=3)
      >>> jaxsae.metrics.co_activation(code, [2], capacity=4).counts.tolist()
      [[5, 5, 0, 0]]

    Source: see `CoActivation`.
    """
    if capacity < 1:
        raise ValueError(f"`co_activation` got a capacity of {capacity}; pass at least 1.")
    place, active = places("co_activation", code, latents), active_slots(code)
    indices = np.where(active, np.asarray(code.indices), code.num_latents)
    row, slot = np.nonzero(place[indices] >= 0)
    at, t = place[indices[row, slot]], len(latents)
    rows = np.bincount(at, minlength=t)
    pairs = np.bincount(at, active.sum(axis=1)[row] - 1, minlength=t).astype(np.int64)
    parts = []
    step = max(1, _PAIRS // max(1, indices.shape[1]))
    for start in range(0, len(row), step):
        some = slice(start, start + step)
        others = indices[row[some]]
        others[np.arange(len(others)), slot[some]] = code.num_latents
        used = others < code.num_latents
        parts.append(_summed(np.repeat(at[some], used.sum(axis=1)), others[used]))
    found = [np.concatenate(part) for part in zip(*parts, strict=True)] if parts else [np.zeros(0, np.int64)] * 3
    return _reduced(rows, pairs, np.zeros(t, np.int64), *_summed(*found), capacity=capacity)


def _summed(at: np.ndarray, partners: np.ndarray, counts: np.ndarray | None = None) -> tuple[np.ndarray, ...]:
    """The counts of equal pairs together; by default each is 1."""
    keys, place, number = np.unique(
        at.astype(np.int64) << 32 | partners.astype(np.int64), return_inverse=True, return_counts=True
    )
    if counts is not None:
        number = np.zeros(len(keys), np.int64)
        np.add.at(number, place, counts)
    return keys >> 32, keys & 0xFFFFFFFF, number


def _reduced(rows, pairs, missed, at, partners, counts, *, capacity: int) -> CoActivation:
    """At most so many counters for each latent: all are decreased by the largest that is too many."""
    order = np.lexsort((partners, -counts, at))
    at, partners, counts = at[order], partners[order], counts[order]
    rank = np.arange(len(at)) - np.searchsorted(at, at)
    over = rank == capacity
    decrease = np.zeros_like(missed)
    decrease[at[over]] = counts[over]
    counts = counts - decrease[at]
    kept = counts > 0
    shape = len(rows), capacity
    place = at[kept], rank[kept]
    whole = np.full(shape, -1), np.zeros(shape, np.int64)
    whole[0][place], whole[1][place] = partners[kept], counts[kept]
    return CoActivation(rows, pairs, *whole, missed + decrease)
