"""The rows of a study: photographs, files, a language model's residual stream, or features that are known."""

import functools
import operator
import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Annotated, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxsae import data as data_module, language_model
from jaxsae._core import arguments
from jaxsae._core.files import InputError
from jaxsae.app.units import Units
from jaxsae.data.origin import Origin, of_pairs, of_rows
from jaxsae.language_model import chat, harvest, text as texts

CONTEXT = 256  # tokens in a context; the first gives no row
_TOGETHER = 4  # contexts whose logits are in memory together
_CHUNK = 4096  # synthetic rows made together: their dense codes are
_FEATURES = 4  # per dimension, of synthetic rows

Progress = Callable[[str, int], None]


class HookPoint(NamedTuple):
    """Where in a language model, and on which text, rows are harvested.

    Attributes:
      model: as for `language_model.load`.
      layer: block, from 0.
      text: files; Python's standard library if None.
      site: where in the block, one of `language_model.SITES`.
      target: of transcoders, the site of the block that they reconstruct; None for autoencoders.
      chat: whether the text holds conversations, in a column `messages`.

    Example:
      >>> HookPoint("smollm2").layer
      8
    """

    model: str | os.PathLike
    layer: arguments.Index = 8
    text: Sequence[Path] | None = None
    site: Annotated[str, arguments.SITE] = "resid_post"
    target: Annotated[str, arguments.SITE] | None = None
    chat: bool = False

    @property
    def points(self) -> list[tuple[int, str]]:
        """The places of its rows."""
        return [(self.layer, site) for site in (self.site, self.target) if site is not None]


class Paired(NamedTuple):
    """Rows of files, for transcoders.

    Attributes:
      data: the inputs, as for `data.open_rows`.
      target: what is reconstructed from them, row by row.

    Example:
      >>> Paired("x.npy", "y.npy").target
      'y.npy'
    """

    data: str | os.PathLike
    target: str | os.PathLike


class Features(NamedTuple):
    """Rows made of known features, by `data.synthetic`.

    Attributes:
      width: of the rows; there are four times as many features.
      l0: mean number of features per row.
      correlation: of features.
      noise: as for `data.synthetic`.

    Example:
      >>> Features(noise=0.1).width
      64
    """

    width: arguments.Count = 64
    l0: arguments.Positive = 8.0
    correlation: arguments.Weight = 0.2
    noise: arguments.Weight = 0.0


Source = str | os.PathLike | Paired | HookPoint | Features | None


class Truth(NamedTuple):
    """The features of synthetic rows.

    Attributes:
      dictionary: `[m d]`, of norm 1.
      z: `[n m]`, the code of the held-out rows.
    """

    dictionary: jax.Array
    z: np.ndarray


class Rows(NamedTuple):
    """The rows of a study; of transcoders, inputs and targets side by side.

    Attributes:
      train: `[n d]`, scaled to unit mean square about their mean.
      heldout: `[n d]`, to measure on, in their own units.
      units: of the training rows.
      source: where they come from, in words.
      truth: their features, if these are known.
      probe: the language model that they come from, if any.
      origin: where in a language model they are, if that is known.
    """

    train: np.ndarray
    heldout: np.ndarray
    units: Units
    source: str
    truth: Truth | None = None
    probe: "Probe | None" = None
    origin: Origin = Origin()

    @property
    def width(self) -> int:
        """Width of what is reconstructed."""
        return len(self.units.centre)

    @property
    def inputs(self) -> int | None:
        """Width of the inputs of transcoders, the first columns; None for autoencoders."""
        return self.units.inputs

    @property
    def targets(self) -> np.ndarray:
        """What is to be reconstructed of the held-out rows, `[n d_out]`."""
        return self.heldout[:, self.inputs or 0 :]


class Probe(NamedTuple):
    """A language model, and the contexts of the held-out rows.

    Attributes:
      model: the model.
      layer: block of which the reconstructed rows are.
      site: where in the block.
      contexts: `[n s]`, tokens.
    """

    model: language_model.LanguageModel
    layer: int
    site: str
    contexts: np.ndarray


def photographs(train_rows: int, heldout: int, seed: int) -> Rows:
    """Patches of two photographs, those held out from their right quarters.

    Args:
      train_rows: number of rows to train on.
      heldout: number of rows held out.
      seed: of the patches.

    Example:
      >>> photographs(100, 10, 0).width
      192
    """
    rows, rest = data_module.image_patches(train_rows, heldout, side=8, seed=seed)
    return Rows(rows, rest, Units(jnp.zeros(rows.shape[1])), "8 × 8 colour patches of scikit-learn's two photographs")


def synthetic(features: Features, train_rows: int, heldout: int, seed: int) -> Rows:
    """Rows of known features.

    Args:
      features: what they are made of.
      train_rows: number of rows to train on.
      heldout: number of rows held out.
      seed: of the features and of the rows.

    Raises:
      InputError: if there are no such features.

    Example:
      >>> rows = synthetic(Features(width=8, l0=2.0), 100, 10, 0)
      >>> rows.train.shape, rows.truth.z.shape
      ((100, 8), (10, 32))
    """
    arguments.check(Features, features._asdict())
    d, world_key, row_key = features.width, *jax.random.split(jax.random.key(seed))
    try:
        world = data_module.synthetic(
            world_key,
            d=d,
            m=_FEATURES * d,
            l0=features.l0,
            correlation=features.correlation,
            roots=d,
            noise=features.noise,
        )
    except ValueError as error:
        raise InputError(str(error)) from error
    total = train_rows + heldout
    draws = (world.sample(jax.random.fold_in(row_key, start), _CHUNK) for start in range(0, total, _CHUNK))
    # Dense codes are large, and only those of the held-out rows are needed.
    parts = [
        (np.asarray(x), np.asarray(z) if number >= train_rows // _CHUNK else None)
        for number, (x, z) in enumerate(draws)
    ]
    x = np.concatenate([x for x, _ in parts])[:total]
    z = np.concatenate([z for _, z in parts if z is not None])[train_rows % _CHUNK :][:heldout]
    source = f"{_FEATURES * d} known features in {d} dimensions, {features.l0:g} per row"
    source += f", with noise of {features.noise:g} of their norm" if features.noise else ""
    units = _units(x[:train_rows])
    return Rows(units.scaled(x[:train_rows]), x[train_rows:], units, source, Truth(world.dictionary, z))


def from_file(path: str | os.PathLike | Paired, train_rows: int, heldout: int, batch: int) -> Rows:
    """The first rows of a file or directory to train on, and its last ones held out.

    Args:
      path: the file or directory; or two, of inputs and targets.
      train_rows: most rows to train on.
      heldout: number of rows held out.
      batch: least number of rows to train on.

    Raises:
      InputError: if the rows are too few, not finite, or all equal.

    Example:
      >>> import tempfile
      >>> with tempfile.TemporaryDirectory() as folder:
      ...     np.save(f"{folder}/x.npy", np.random.default_rng(0).normal(size=(100, 4)).astype(np.float32))
      ...     rows = from_file(f"{folder}/x.npy", 1000, 20, 10)
      >>> rows.train.shape, rows.heldout.shape
      ((80, 4), (20, 4))
    """
    if not isinstance(path, Paired):
        return _of_rows(data_module.open_rows(path), str(path), None, train_rows, heldout, batch)._replace(
            origin=of_rows(path)
        )
    origin, parts = of_pairs(*path), [data_module.open_rows(each) for each in path]
    everything, name = data_module.beside(parts, list(map(str, path))), " to ".join(map(str, path))
    return _of_rows(everything, name, parts[0].shape[1], train_rows, heldout, batch)._replace(origin=origin)


def _of_rows(everything, name: str, inputs: int | None, train_rows: int, heldout: int, batch: int) -> Rows:
    needed = batch + heldout
    if len(everything) < needed:
        raise InputError(f"{name}: holds {len(everything)} rows, the study needs at least {needed}; pass more.")
    data_module.require_finite(everything, name)
    first, cast = len(everything) - heldout, data_module.shards.cast
    rows = cast(everything[: min(first, train_rows)], np.float32, name, "scale it")
    rest = cast(everything[first:], np.float32, name, "scale it", range(first, len(everything)))
    if any((part == part[0]).all() for part in np.split(rows, [inputs or 0], axis=1) if part.size):
        raise InputError(f"{name}: all rows are equal, there is nothing to learn; pass activations of varied inputs.")
    units = _units(rows, inputs)
    return Rows(units.scaled(rows), rest, units, name)


def _units(rows: np.ndarray, inputs: int | None = None) -> Units:
    """Those in which rows have unit mean square about their mean; inputs and targets, each."""

    def scale(part: np.ndarray) -> float:
        return float(1 / np.sqrt(np.sum(np.var(part[:: max(1, len(part) // 10_000)], axis=0, dtype=np.float64))))

    target = rows[:, inputs or 0 :]
    centre = jnp.asarray(target[:10_000].mean(axis=0))
    if inputs is None:
        return Units(centre, scale(target))
    return Units(centre, scale(rows[:, :inputs]), scale(target), inputs)


def from_model(site: HookPoint, folder: Path, train_rows: int, heldout: int, batch: int, progress: Progress) -> Rows:
    """Rows of a language model, harvested to a directory unless they are there.

    Args:
      site: the model, and where in it.
      folder: for the rows.
      train_rows: number of rows to train on.
      heldout: number of rows held out, from whole contexts.
      batch: least number of rows to train on.
      progress: called with a description and the number of contexts just harvested.

    Raises:
      InputError: if the model or the text cannot be used, or the text is too short.
    """
    arguments.check(HookPoint, site._asdict())
    points = site.points
    harvest.check(site.model, points=points, context=CONTEXT, out=folder)
    tokenizer = language_model.read_tokenizer(site.model)
    model = language_model.load(site.model)
    wanted = contexts(train_rows + heldout)
    files = texts.standard_library() if site.text is None else site.text
    chats = {"column": "messages", "template": chat.read(site.model, tokenizer)} if site.chat else {}
    text = texts.pack(files, tokenizer, context=CONTEXT, tokens=wanted * CONTEXT, **chats)
    read = texts.STANDARD_LIBRARY if site.text is None else ", ".join(text.files)
    source = {"model": str(site.model), "text": read}
    show = functools.partial(progress, f"{site.model}  harvesting")
    harvest.run(folder, model, text.contexts, points=points, source=source, progress=show)
    place = site.site if site.target is None else f"{site.site} to {site.target}"
    where = "residual of {} after block {}" if place == "resid_post" else f"{place} of {{}}, block {{}}"
    name = f"{where.format(site.model, site.layer)}, on {read}"
    name += f" ({text.replaced} characters of it not UTF-8)" if text.replaced else ""
    probe = Probe(model, *points[-1], text.contexts[-contexts(heldout) :])
    folders = harvest.directories(folder, points)
    rows = folders[0] if len(folders) == 1 else Paired(*folders)
    return from_file(rows, train_rows, heldout, batch)._replace(source=name, probe=probe)


def contexts(rows: int) -> int:
    """The number of contexts that give so many rows.

    Args:
      rows: how many.

    Example:
      >>> contexts(256)
      2
    """
    return -(-rows // (CONTEXT - 1))


def losses(probe: Probe, replaced: Mapping[str, np.ndarray]) -> dict[str, language_model.NextToken]:
    """Next-token losses with rows in place of the activations, by name, and `"clean"` ones.

    Args:
      probe: the model, and its contexts.
      replaced: rows `[n d]`, those of all contexts in order, by name.
    """

    def replace(rows, h):
        return h.at[:, 1:].set(rows.reshape(h.shape[0], -1, h.shape[2]))

    found, each = [], probe.contexts.shape[1] - 1
    for start in range(0, len(probe.contexts), _TOGETHER):
        some = probe.contexts[start : start + _TOGETHER]
        span = slice(start * each, (start + len(some)) * each)
        splices = {name: functools.partial(replace, rows[span]) for name, rows in replaced.items()}
        ids = [jnp.asarray(some)]
        found.append(language_model.cross_entropy(probe.model, ids, probe.layer, splices, site=probe.site))
    return {name: functools.reduce(operator.add, (part[name] for part in found)) for name in found[0]}
