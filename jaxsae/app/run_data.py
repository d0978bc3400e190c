"""The data of a run: opened, the last rows held out, and a sample that gives centre and scale."""

import functools
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxsae import data as data_module, sharding, train
from jaxsae._core.files import InputError, shown
from jaxsae.app.options import Options
from jaxsae.data import batching, cleaning
from jaxsae.data.origin import Origin, of_rows

_SAMPLE = 10_000  # rows from which centre and scale are estimated
_MAX_SEARCHED = 1000  # skipped batches that are searched for NaN and Inf


class RunData(NamedTuple):
    """The data of a run.

    Attributes:
      names: of the sources.
      sources: the rows to train on.
      heldout: those to measure on, `[n d]`.
      config: the options, and whatever else must be equal for a run to be resumed.
      read: makes the batches.
      origin: where all of the rows come from, if that is known.
      dropped: number of rows that are left out.
    """

    names: list[str]
    sources: list[data_module.Rows]
    heldout: np.ndarray
    config: dict[str, Any]
    read: Callable[..., data_module.Batches]
    origin: Origin = Origin()
    dropped: int = 0

    @property
    def name(self) -> str:
        """The names of all sources."""
        return ", ".join(self.names)

    @property
    def total(self) -> int:
        """The number of rows to train on."""
        return sum(map(len, self.sources))


def prepare(
    data,
    options: Options,
    start,
    weights,
    window: int | None,
    reader_threads: int,
    skip_tokens: Sequence[int] = (),
    max_norm: float | None = None,
) -> RunData:
    """Open the data of a run, and hold out its last rows.

    Args:
      data: as of `runs.run`.
      options: likewise.
      start: likewise.
      weights: likewise.
      window: likewise.
      reader_threads: likewise.
      skip_tokens: likewise.
      max_norm: likewise.

    Raises:
      InputError: if the rows cannot be used, or are too few.
    """
    names, everything, dropped = _open(data, skip_tokens, max_norm)
    window = batching.shuffle_window(everything, window)
    sources, heldout = _split(names, everything, options, weights)
    config = options._asdict() | {"data": [*map(len, sources), heldout.shape[1]], "weights": weights and list(weights)}
    config |= {"window": window, "rows of": names if isinstance(data, Mapping) else None}  # files may have been moved
    config |= {} if start is None else {"start": shown(start)}
    config |= {"skip_tokens": list(skip_tokens), "max_norm": max_norm} if skip_tokens or max_norm else {}
    config |= {"values of the data, by checksum": list(map(data_module.fingerprint, everything))}
    order = {"seed": options.seed, "weights": weights, "window": window, "names": names, "threads": reader_threads}
    read = functools.partial(data_module.batches, sources, options.batch, **order)
    origin = Origin() if isinstance(data, Mapping) else _origin(data)
    return RunData(names, sources, heldout, config, read, origin, dropped)


def _origin(data) -> Origin:
    """Where the rows come from, if all come from one place."""
    paths = [data] if isinstance(data, str | os.PathLike) else data
    first, *others = (of_rows(path).known() for path in paths)
    return Origin(**{name: value for name, value in first.items() if all(each.get(name) == value for each in others)})


def _open(data, skip_tokens: Sequence[int], max_norm: float | None) -> tuple[list[str], list[data_module.Rows], int]:
    """Names and rows of all sources, and the number of rows that are left out."""
    if isinstance(data, Mapping):
        return list(data), list(data.values()), 0
    paths = [data] if isinstance(data, str | os.PathLike) else list(data)
    whole = [data_module.open_rows(path) for path in paths]
    how: dict[str, Any] = {"skip_tokens": skip_tokens, "max_norm": max_norm}
    left = [cleaning.clean(path, rows, **how) for path, rows in zip(paths, whole, strict=True)]
    return list(map(shown, paths)), left, sum(map(len, whole)) - sum(map(len, left))


def _split(names, everything, options: Options, weights) -> tuple[list[data_module.Rows], np.ndarray]:
    """The rows to train on, by source, and the last rows of each, `heldout` in all."""
    if weights is not None and len(weights) != len(names):
        raise InputError(f"got {len(weights)} weights for {len(names)} files; pass one for each.")
    total, needed = sum(map(len, everything)), options.batch + options.heldout
    if total < needed:
        what = f"holds {total} rows, but a batch and the held-out rows are {needed}"
        raise InputError(f"{', '.join(names)}: {what}; pass more rows, or less of either.")
    ends = np.cumsum([0, *map(len, everything)]) * options.heldout // total
    counts = np.diff(ends)
    heldout = [
        data_module.shards.cast(
            rows[len(rows) - count :], np.float32, name, "scale it", range(len(rows) - count, len(rows))
        )
        for name, rows, count in zip(names, everything, counts, strict=True)
    ]
    if len({rows.shape[1] for rows in everything}) > 1:
        widths = ", ".join(str(rows.shape[1]) for rows in everything)
        raise InputError(f"{', '.join(names)}: have widths {widths}; pass one layer's.")
    for name, rows in zip(names, heldout, strict=True):
        if len(rows):
            data_module.require_finite(rows, f"{name}, held-out part")
    rest = [rows[: len(rows) - count] for rows, count in zip(everything, counts, strict=True)]
    return rest, np.concatenate(heldout)


def sample(batches: data_module.Batches, rows: int) -> np.ndarray:
    """A sample of the rows: those of the first batches."""
    first = batches.source[0]
    more = range(1, -(-min(_SAMPLE, rows) // len(first)))
    return np.concatenate([first, *(batches.source[number] for number in more)])[:_SAMPLE]


def centre_and_scale(
    sample: np.ndarray, name: str, warn: Callable[[str], None] = lambda text: None
) -> tuple[jax.Array, float]:
    """Geometric median of a sample, and the scale that gives it unit mean square about it, without its outliers.

    Warns if these are more than one in a thousand.
    """
    sample = sample[np.isfinite(sample).all(1)]
    if len(sample) == 0 or (sample == sample[0]).all():
        raise InputError(f"{name}: all rows are equal, or none is finite; pass activations of varied inputs.")
    norms = cleaning.norms(sample)
    if (far := cleaning.outliers(norms)).any():
        if far.mean() > 1e-3:
            share = np.sum(np.float64(norms[far]) ** 2) / np.sum(np.float64(norms) ** 2)
            what = f"{far.mean():.1%} of the rows are more than {cleaning.OUTLIER:g} times the median norm, and have"
            warn(f"{what} {share:.0%} of the mean square: the training is theirs. --max-norm 10 leaves them out.")
        rest = sample[~far]
        sample = sample if (rest == rest[0]).all() else rest
    unit = float(np.abs(sample).max())  # so that nothing overflows
    centre = train.geometric_median(jnp.asarray(sample / unit))
    variance = np.mean(np.sum((np.float64(sample) / unit - np.asarray(centre, np.float64)) ** 2, axis=1))
    return unit * centre, float(1 / (unit * np.sqrt(variance)))


def in_order(rows: RunData, size: int, count: int) -> Iterator[jax.Array]:
    """The first training rows, in batches; the last one is padded with NaN."""
    part = sharding.rows_needed(size)
    source = rows.read(part=part).source
    for start in range(0, count, size):
        x = np.array(source[start // size], np.float32)
        x[max(0, count - start - part.start) :] = np.nan
        yield sharding.make_global_batch(x, size, part.start)


def nonfinite_rows(sources, names, batches: data_module.Batches, bad: Sequence[int]) -> dict[str, list[int]]:
    """The rows with NaN or Inf in the skipped batches, by file."""
    found: dict[str, set[int]] = {}
    for number in bad[-_MAX_SEARCHED:]:
        for source, rows in batches.rows(number):
            wrong = rows[~np.isfinite(np.asarray(sources[source][rows], np.float32)).all(axis=1)]
            found.setdefault(names[source], set()).update(wrong.tolist())
    return {path: sorted(rows) for path, rows in found.items() if rows}
