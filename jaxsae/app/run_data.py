"""The data of a run: opened, the last rows held out, and a sample that gives the units of the training."""

import functools
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np

from jaxsae import data as data_module, sharding
from jaxsae._core.files import InputError, shown
from jaxsae.app.options import Options
from jaxsae.data import batching, cleaning
from jaxsae.data.origin import Origin, of_pairs, of_rows

_SAMPLE = 10_000  # rows from which the units are estimated
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
      inputs: width of a transcoder's inputs, the first columns of its rows; None for an autoencoder.
    """

    names: list[str]
    sources: list[data_module.Rows]
    heldout: np.ndarray
    config: dict[str, Any]
    read: Callable[..., data_module.Batches]
    origin: Origin = Origin()
    dropped: int = 0
    inputs: int | None = None

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
    target=None,
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
      target: likewise.

    Raises:
      InputError: if the rows cannot be used, or are too few.
    """
    names, everything, dropped, inputs = _open(data, target, skip_tokens=skip_tokens, max_norm=max_norm)
    window = batching.shuffle_window(everything, window)
    sources, heldout = _split(names, everything, options, weights)
    config = options._asdict() | {"data": [*map(len, sources), heldout.shape[1]], "weights": weights and list(weights)}
    config |= {"window": window, "rows of": names if isinstance(data, Mapping) else None}  # files may have been moved
    config |= {} if start is None else {"start": shown(start)}
    config |= {} if inputs is None else {"inputs": inputs}
    config |= {"skip_tokens": list(skip_tokens), "max_norm": max_norm} if skip_tokens or max_norm else {}
    config |= {"values of the data, by checksum": list(map(data_module.fingerprint, everything))}
    order = {"seed": options.seed, "weights": weights, "window": window, "names": names, "threads": reader_threads}
    read = functools.partial(data_module.batches, sources, options.batch, **order)
    origin = Origin() if isinstance(data, Mapping) else _origin(data, target)
    return RunData(names, sources, heldout, config, read, origin, dropped, inputs)


def _origin(data, target) -> Origin:
    """Where the rows come from, if all come from one place."""
    found = [of_rows(path) for path in _paths(data)]
    if target is not None:
        found = [of_pairs(*pair) for pair in zip(_paths(data), _paths(target), strict=True)]
    first, *others = (each.known() for each in found)
    return Origin(**{name: value for name, value in first.items() if all(each.get(name) == value for each in others)})


def _paths(data) -> list:
    return [data] if isinstance(data, str | os.PathLike) else list(data)


def _open(data, target, **left_out: Any) -> tuple[list[str], list[data_module.Rows], int, int | None]:
    """Names and rows of all sources, how many of these are left out, and the width of a transcoder's inputs."""
    if isinstance(data, Mapping):
        names, whole, targets = list(data), list(data.values()), target and dict(target)
        masks = [np.ones(len(rows), bool) for rows in whole]
    else:
        paths = _paths(data)
        names, whole = list(map(shown, paths)), [data_module.open_rows(path) for path in paths]
        targets = None if target is None else {shown(path): data_module.open_rows(path) for path in _paths(target)}
        masks = [cleaning.mask(path, rows, **left_out) for path, rows in zip(paths, whole, strict=True)]
    inputs = None if targets is None else whole[0].shape[1]
    if targets is not None:
        if len(targets) != len(names) or len({rows.shape[1] for rows in whole}) > 1:
            widths = ", ".join(str(rows.shape[1]) for rows in whole)
            what = f"got {len(names)} inputs, {widths} wide, and {len(targets)} targets"
            raise InputError(f"{what}; pass a target for each input, and inputs of one width.")
        pairs = zip(whole, names, targets.values(), targets, strict=True)
        whole = [data_module.beside([x, y], [name, other]) for x, name, y, other in pairs]
    left = [cleaning.keep(rows, mask) for rows, mask in zip(whole, masks, strict=True)]
    return names, left, sum(map(len, whole)) - sum(map(len, left)), inputs


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
