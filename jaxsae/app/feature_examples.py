"""What codes say of some latents: sums, the rows to show, and what the latents do at these and around them."""

from collections.abc import Iterable
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np

from jaxsae._core.files import json_number
from jaxsae.app import feature_text
from jaxsae.app.feature_codes import Codes
from jaxsae.app.feature_text import Text
from jaxsae.autoencoder import metrics
from jaxsae.autoencoder.shrinkage import RATIO_EDGES
from jaxsae.codes import SparseCode

_TOP, _BANDS, _EACH = 20, 5, 3  # examples: the largest, and some of each of so many bands
_SAMPLED = 256  # rows of each latent from which the bands are made
_BEFORE, _AFTER = 16, 8  # tokens shown around the one of an example
_PARTNERS = 10  # latents that are shown beside one
_COUNTERS = 1 << 24  # of co-activation, for all latents together
_OCTAVES = 5  # of values, below the largest one of the latent that has the smallest


class Summary(NamedTuple):
    """Sums over all rows, for each of some latents.

    Attributes:
      chosen: `[t]`, which latents.
      fires: `[t]`, on how many rows each does.
      total, total_refined: `[t]`, sums of its values there.
      largest, largest_refined: `[t]`, the values of largest magnitude.
      edges: `[E + 1]`, of the histograms.
      values, refined_values: `[t E]`, histograms.
      ratios: `[t R]`, histograms of refined over encoder's values, over `RATIO_EDGES`.
      top: its largest values.
      sample: a sample of them.
      together: which other latents fire with it.
    """

    chosen: np.ndarray
    fires: np.ndarray
    total: np.ndarray
    total_refined: np.ndarray
    largest: np.ndarray
    largest_refined: np.ndarray
    edges: np.ndarray
    values: np.ndarray
    refined_values: np.ndarray
    ratios: np.ndarray
    top: metrics.TopContexts
    sample: metrics.ContextSample
    together: metrics.CoActivation


def summarise(found: Codes, chosen: np.ndarray, text: Text | None, *, signed: bool) -> Summary:
    """Sum up the codes of a pass.

    Args:
      found: the codes.
      chosen: `[t]`, which latents.
      text: the tokens of the rows, whose documents are shown once each; None if each row is its own.
      signed: whether values may be negative.
    """
    t, bins = len(chosen), len(RATIO_EDGES) - 1
    edges = _edges(found.largest[chosen], signed=signed)
    sums, largest = np.zeros((2, t)), np.zeros((2, t))
    histograms = np.zeros((2, t, len(edges) - 1), np.int64)
    ratios = np.zeros((t, bins), np.int64)
    counters = min(found.m, max(256, _COUNTERS // max(1, t)))
    merged: list[Any] = []
    for rows, code, refined in found.batches():
        documents = None if text is None else text.documents(rows)
        parts = [
            metrics.top_contexts(code, chosen, n=_TOP, rows=rows, documents=documents),
            metrics.context_sample(code, chosen, n=_SAMPLED, rows=rows),
            metrics.co_activation(code, chosen, capacity=counters),
        ]
        merged = [a + b for a, b in zip(merged, parts, strict=True)] if merged else parts
        at, row, slot = _entries(code, chosen)
        both = np.asarray(code.values)[row, slot], refined[row, slot]
        for total, most, histogram, values in zip(sums, largest, histograms, both, strict=True):
            total += np.bincount(at, values, minlength=t)
            _keep_largest(most, at, values)
            histogram += _histogram(at, values, edges, t)
        ratios += _histogram(at, both[1] / both[0], RATIO_EDGES, t)
    if not merged:  # no latent fires
        nothing = SparseCode(jnp.zeros((0, 1)), jnp.zeros((0, 1), jnp.int32), found.m)
        merged = [
            metrics.top_contexts(nothing, chosen, n=_TOP),
            metrics.context_sample(nothing, chosen, n=_SAMPLED),
            metrics.co_activation(nothing, chosen, capacity=counters),
        ]
    used = np.flatnonzero(histograms.sum(axis=(0, 1)))
    seen = slice(used[0], used[-1] + 1) if len(used) else slice(0, 1)
    edges = edges[seen.start : seen.stop + 1]
    return Summary(
        *(chosen, found.fires[chosen], sums[0], sums[1], largest[0], largest[1], edges),
        *(histograms[0][:, seen], histograms[1][:, seen], ratios, merged[0], merged[1], merged[2]),
    )


def _entries(code: SparseCode, chosen: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """The entries of chosen latents in a code: which of them, row and slot."""
    place = np.full(code.num_latents + 1, -1)
    place[chosen] = np.arange(len(chosen))
    at = place[np.asarray(code.indices)]
    row, slot = np.nonzero(at >= 0)
    return at[row, slot], row, slot


def _edges(largest: np.ndarray, *, signed: bool) -> np.ndarray:
    """Edges of bins, eight per factor of two, that hold most values of all latents; more are cut off later."""
    fires = largest[largest > 0]
    low, high = (fires.min() / 2**_OCTAVES, 4 * fires.max()) if len(fires) else (1.0, 2.0)
    steps = np.arange(np.floor(8 * np.log2(low)), np.ceil(8 * np.log2(high)) + 1)
    above = np.exp2(steps / 8)
    return np.concatenate([-above[::-1], above] if signed else [[0.0], above])


def _histogram(at: np.ndarray, values: np.ndarray, edges: np.ndarray, t: int) -> np.ndarray:
    bins = len(edges) - 1
    slot = np.clip(np.searchsorted(edges, values, side="right") - 1, 0, bins - 1)
    return np.bincount(at * bins + slot, minlength=t * bins).reshape(t, bins)


def _keep_largest(most: np.ndarray, at: np.ndarray, values: np.ndarray) -> None:
    """Replace in `most` what is smaller in magnitude than a value at its place."""
    order = np.lexsort((-np.abs(values), at))
    places, first = np.unique(at[order], return_index=True)
    found = values[order][first].astype(np.float64)
    larger = np.abs(found) > np.abs(most[places])
    most[places[larger]] = found[larger]


def numbers(summary: Summary, found: Codes, finite: int) -> list[dict[str, Any]]:
    """The numbers of each latent, without examples.

    Args:
      summary: the sums.
      found: the codes.
      finite: number of rows without NaN and Inf.
    """
    together, said = summary.together, []
    for i, (index, count) in enumerate(zip(summary.chosen.tolist(), summary.fires.tolist(), strict=True)):
        mean, mean_refined = (json_number(total[i] / count) if count else None for total in summary[2:4])
        partners = [
            {"index": j, "given": given, "lift": json_number(given * finite / found.fires[j])}
            for j, given in zip(together.partners[i][:_PARTNERS].tolist(), together.given[i].tolist(), strict=False)
            if j >= 0
        ]
        said.append(
            {
                "index": index,
                "count": count,
                "density": count / max(1, finite),
                "mean": mean,
                "mean_refined": mean_refined,
                "max": json_number(summary.largest[i]) if count else None,
                "max_refined": json_number(summary.largest_refined[i]) if count else None,
                "shrinkage": _ratio(summary.total_refined[i], summary.total[i]),
                "values": summary.values[i].tolist(),
                "refined_values": summary.refined_values[i].tolist(),
                "ratios": summary.ratios[i].tolist(),
                "coactive": partners,
                "coactive_error": float(together.error[i]),
            }
        )
    return said


def _ratio(a: float, b: float) -> float | None:
    return json_number(a / b) if b else None


def bands(summary: Summary) -> list[list[tuple[float, float, np.ndarray]]]:
    """For each latent, bands of equally many of its sampled values, the highest first: `(lowest, highest, rows)`."""
    said = []
    for values, rows, shown in zip(summary.sample.values, summary.sample.rows, summary.top.rows, strict=True):
        there = np.flatnonzero(rows >= 0)
        order = there[np.lexsort((rows[there], -np.abs(values[there])))]
        some = []
        for band in (each for each in np.array_split(order, _BANDS) if len(each)):
            drawn = np.sort(band)  # in the order of their hashes
            drawn = drawn[~np.isin(rows[drawn], shown)][:_EACH]
            some.append((float(values[band[-1]]), float(values[band[0]]), rows[drawn]))
        said.append(some)
    return said


class Around:
    """The values of latents at given rows, and at those around them in their contexts."""

    def __init__(self, found: Codes, summary: Summary, text: Text | None, rows: int):
        """Nothing yet.

        Args:
          found: the codes.
          summary: of them.
          text: the tokens of the rows, if there are any.
          rows: how many there are.
        """
        self._found, self._chosen, self._text, self._count = found, summary.chosen, text, rows
        self._keys = np.zeros(0, np.int64)
        self._values = np.zeros((2, 0))

    def window(self, row: int) -> np.ndarray:
        """The rows shown around one: itself, and if there are tokens, neighbours in its context."""
        if self._text is None:
            return np.array([row])
        position = int(self._text.place(np.array([row]))[1][0])
        before = min(position - 1, _BEFORE)
        after = min(self._text.contexts.shape[1] - 1 - position, _AFTER)
        return np.arange(row - before, row + after + 1)

    def look_up(self, asked: Iterable[tuple[int, np.ndarray]]) -> None:
        """Read the values of latents, by their place among the chosen ones, at rows."""
        keys = [place * self._count + rows for place, rows in asked]
        self._keys = np.unique(np.concatenate(keys)) if keys else self._keys
        self._values = np.zeros((2, len(self._keys)))
        if not len(self._keys):
            return
        for rows, code, refined in self._found.batches():
            at, row, slot = _entries(code, self._chosen)
            wanted = at * self._count + rows[row]
            place = np.minimum(np.searchsorted(self._keys, wanted), len(self._keys) - 1)
            hit = self._keys[place] == wanted
            self._values[:, place[hit]] = np.asarray(code.values)[row, slot][hit], refined[row, slot][hit]
        missing = np.isin(self._keys % self._count, self._found.nonfinite)
        self._values[:, missing] = np.nan

    def at(self, place: int, rows: np.ndarray) -> np.ndarray:
        """The encoder's and the refined values `[2 n]` of a latent at rows looked up; NaN in rows that hold NaN."""
        return self._values[:, np.searchsorted(self._keys, place * self._count + rows)]

    def example(self, place: int, row: int) -> dict[str, Any]:
        """An example as it is in `features.json`, without its pixels."""
        window = self.window(row)
        values, refined = self.at(place, window).tolist()
        here = int(np.searchsorted(window, row))
        said = {"row": row, "value": _short(values[here]), "refined": _short(refined[here])}
        said |= dict.fromkeys(
            ("context", "position", "document", "first", "tokens", "values", "refined_values", "pixels")
        )
        if self._text is None:
            return said
        context, position = (int(each[0]) for each in self._text.place(np.array([row])))
        first = position - here
        if first == 1:  # the token that has no row
            first, values, refined = 0, [None, *values], [None, *refined]
        ids = self._text.contexts[context, first : first + len(values)]
        document = None if self._text.ends is None else int(self._text.documents(np.array([row]))[0])
        said |= {"context": context, "position": position, "document": document}
        tokens = feature_text.decoded(self._text, ids)
        if tokens is None:
            return said
        shown = {"values": list(map(_short, values)), "refined_values": list(map(_short, refined))}
        return said | {"first": first, "tokens": tokens} | shown


def _short(value: float | None) -> float | None:
    return None if value is None or not np.isfinite(value) else float(f"{value:.4g}")
