"""What latents stand for: the contexts that activate them most, samples of the others, and numbers beside them.

One pass encodes all rows, and refines those on which a chosen latent fires (`feature_codes`). What is said of each
latent is then read from their codes (`feature_examples`), so examples and their neighbours need no second pass over the
data; `feature_text` has the tokens, and what a language model makes of a latent.
"""

import contextlib
import dataclasses
import functools
import json
import math
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Annotated, Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxsae import codes, data as data_module, sharding
from jaxsae._core import arguments, processes
from jaxsae._core.files import InputError, atomic_file, owned, remove, shown
from jaxsae._core.linalg import divide, matmul, norms
from jaxsae.app import feature_codes, feature_examples, feature_text, features_page
from jaxsae.app.feature_codes import Codes
from jaxsae.app.feature_examples import Around, Summary
from jaxsae.app.feature_text import Lens, Text
from jaxsae.autoencoder import stream
from jaxsae.autoencoder.sae import SAE
from jaxsae.autoencoder.shrinkage import RATIO_EDGES
from jaxsae.data.origin import Origin, require_model

_COUNT = 20  # latents, by default
_FIRED = 10  # rows on which a latent has to fire for its shrinkage to be compared
_NEAREST = 10  # atoms
_PRODUCTS = 64 << 20  # bytes of cosines held at a time


@dataclasses.dataclass(frozen=True)
class Choice:
    """Which latents to look at: some by number, some at random, or those that come first by a measure.

    Attributes:
      latents: their numbers.
      random: how many at random.
      by: "shrinkage" for those whose values rise most by refinement, in proportion, of those that fire on ten rows or
        more; "density" for those that fire on most rows; "max" for those with the largest value.
      count: how many of these; 20 by default.
      seed: of those at random.

    Example:
      >>> Choice(random=3).known(100).tolist()
      [51, 63, 83]
    """

    latents: Sequence[arguments.Index] = ()
    random: arguments.Count | None = None
    by: Annotated[str, arguments.FEATURES_BY] | None = None
    count: arguments.Count | None = None
    seed: arguments.Seed = 0

    def known(self, m: int) -> np.ndarray | None:
        """The latents of `m`, in order; None if they are known only once the rows are read."""
        arguments.check(Choice, dataclasses.asdict(self))
        given = {"--latents": len(self.latents) > 0, "--random": self.random is not None, "--by": self.by is not None}
        if sum(given.values()) > 1:
            raise InputError(f"got {' and '.join(name for name in given if given[name])}; pass one of them.")
        if self.count is not None and (given["--latents"] or given["--random"]):
            raise InputError("got --count with --latents or --random; pass it with --by.")
        if given["--latents"]:
            found = np.unique(np.asarray(self.latents, np.int64))
            if found[-1] >= m:
                raise InputError(f"got latent {found[-1]}, the SAE has {m}; pass some from 0 to {m - 1}.")
            return found
        if self.random is not None:
            if self.random > m:
                raise InputError(f"got --random {self.random}, the SAE has {m} latents; pass {m} or fewer.")
            return np.sort(np.random.default_rng(self.seed).choice(m, self.random, replace=False))
        return None

    def first(self, found: Codes) -> np.ndarray:
        """The latents that come first by the measure, in order of their number."""
        fires = found.fires > 0
        measure = {"density": found.fires, "max": found.largest}.get(self.by or "shrinkage")
        if measure is None:
            fires, measure = found.fires >= _FIRED, _shrinkage(found)
        order = np.lexsort((np.arange(found.m), -np.where(fires, measure, -np.inf)))
        return np.sort(order[fires[order]][: self.count or _COUNT])


class Sources(NamedTuple):
    """What is looked at, and where it comes from.

    Attributes:
      sae: path of the autoencoder.
      data: path of the rows.
      belongs: where the autoencoder belongs.
      rows: where the rows come from.
      model: the language model whose vocabulary and loss are used, or None.
      patch: height, width and channels of rows that are patches of pictures, or None.

    Example:
      >>> Sources("run", "x.npy").patch is None
      True
    """

    sae: str
    data: str | os.PathLike
    belongs: Origin = Origin()
    rows: Origin = Origin()
    model: str | None = None
    patch: tuple[arguments.Count, arguments.Count, arguments.Count] | None = None


def run(
    out: Path,
    sae: SAE,
    rows: data_module.Rows,
    *,
    sources: Sources,
    choice: Choice,
    progress: Callable[[int], None] = lambda rows: None,
    warn: Callable[[str], None] = lambda text: None,
) -> dict[str, Any] | None:
    """Describe latents by the rows that activate them; write `features.json`, `features.parquet` and `report.html`.

    All rows are read once, and encoded; those on which a chosen latent fires are refined. If it is interrupted, the
    same call resumes it, and writes the same. Beside the memory of a chunk of rows, it needs four bytes for each token,
    and twelve bytes of disk, until it is done, for each active value of the refined rows.

    Args:
      out: the directory.
      sae: the autoencoder.
      rows: `[n d]`; those with NaN or Inf are left out, and counted.
      sources: where these come from; if tokens lie beside the rows, examples are shown in their text.
      choice: which latents.
      progress: called with the number of rows just done.
      warn: called with what cannot be shown.

    Returns:
      What `features.json` holds; None in all processes but the first.

    Raises:
      InputError: if the arguments do not fit together, before any work.

    Example:
      >>> import tempfile, jaxsae
      >>> sae = jaxsae.init(jax.random.key(0), d=4, m=8, activation=jaxsae.TopK(2))
      >>> x = np.random.default_rng(0).normal(size=(64, 4)).astype(np.float32)
      >>> with tempfile.TemporaryDirectory() as folder:
      ...     found = run(Path(folder), sae, x, sources=Sources("sae", "x.npy"), choice=Choice(latents=[3]))
      >>> [latent["index"] for latent in found["latents"]], found["rows_are"]
      ([3], 'rows')
    """
    with processes.all_or_none():
        if (out / "report.json").exists():
            raise InputError(f"{out}: holds a run or a study, whose page this would replace; choose another --out.")
        chosen, text, lens = _opened(sae, rows, sources, choice, warn)
    wanted = np.ones(sae.m, bool) if chosen is None else np.isin(np.arange(sae.m), chosen)
    folder = out / ".codes"
    with contextlib.ExitStack() as held:
        with processes.all_or_none():
            if processes.is_primary():
                held.enter_context(owned(out, warn=warn))
        how = {"wanted": wanted, "extremes": sources.patch is not None, "progress": progress}
        found = feature_codes.collect(sae, rows, folder, **how)
        if chosen is None:  # the first process has the codes, and all of them the latents
            first = None if found is None else choice.first(found).tolist()
            chosen = np.array(processes.gather(first)[0], np.int64)
        atoms, nearest = _atoms(sae, chosen)
        if found is None:
            return None
        record = _record(sae, rows, found, chosen, sources, text, lens, atoms)
        for latent, near in zip(record["latents"], nearest, strict=True):
            latent["nearest"] = near
        with atomic_file(out / "features.json") as temporary:
            temporary.write_text(json.dumps(record, allow_nan=False, separators=(",", ":")))
        _write_table(out / "features.parquet", record["latents"], warn)
        features_page.write(out)
        remove(folder)
        return record


def _opened(
    sae: SAE, rows: data_module.Rows, sources: Sources, choice: Choice, warn: Callable[[str], None]
) -> tuple[np.ndarray | None, Text | None, Lens | None]:
    """The latents, as far as they are known, the text and the language model; refuses what does not fit together."""
    if sae.transcoder:
        raise InputError(f"{sources.sae}: is a transcoder, which is not described yet; pass an autoencoder.")
    stream.require_fit(sae, rows)
    chosen, patch, name = choice.known(sae.m), sources.patch, sources.model
    if patch is not None and (math.prod(patch) != sae.d or patch[2] not in (1, 3)):
        of = f"{' '.join(map(str, patch))}, {math.prod(patch)} numbers"
        raise InputError(f"got --patch {of} for rows of {sae.d}; pass height, width, and 1 or 3 channels.")
    if patch is not None and name is not None:
        raise InputError("got --patch and --model; pass --patch for pictures, --model for text.")
    if name is not None and jax.process_count() > 1:
        raise InputError("got --model with --distributed; leave out one of them.")
    for what, known in {"the SAE is": sources.belongs, "the rows are": sources.rows}.items():
        if name is not None:
            require_model(name, known, what)
    text = None if patch is not None else feature_text.read(sources.data, len(rows), sources.rows, name, warn)
    if name is None:
        return chosen, text, None
    lens = feature_text.open_lens(name, _origin(sources), sae.d, None if text is None else text.contexts.shape[1])
    return chosen, text, lens


def _origin(sources: Sources) -> Origin:
    return Origin(**(sources.rows.known() | sources.belongs.known()))


def _shrinkage(found: Codes) -> np.ndarray:
    """`Σ refined / Σ encoder's value` of every latent, `[m]`; 0 where it never fires."""
    sums = np.zeros((2, found.m))
    for _, code, refined in found.batches():
        used = np.asarray(code.indices) < found.m
        for total, values in zip(sums, (np.asarray(code.values), refined), strict=True):
            total += np.bincount(np.asarray(code.indices)[used], values[used], minlength=found.m)
    return np.divide(sums[1], sums[0], out=np.zeros(found.m), where=sums[0] != 0)


def _atoms(sae: SAE, chosen: np.ndarray) -> tuple[np.ndarray, list[list[dict[str, Any]]]]:
    """The atoms of some latents `[t d]`, and for each the nearest others."""
    count = min(_NEAREST, sae.m - 1)
    step = max(1, _PRODUCTS // (4 * sae.m))
    atoms, nearest = [np.zeros((0, sae.W_dec.shape[1]), np.float32)], []
    for at in range(0, len(chosen), step):
        some = np.resize(chosen[at : at + step], min(step, len(chosen)))  # of one size, which is compiled once
        own, cosines, indices = map(np.asarray, _nearest(sae.W_dec, some.astype(np.int32), count + 1))
        for n, index in enumerate(chosen[at : at + step].tolist()):
            atoms.append(own[n : n + 1])
            others = [(j, x) for j, x in zip(indices[n].tolist(), cosines[n].tolist(), strict=True) if j != index]
            nearest.append([{"index": j, "cosine": round(x, 4)} for j, x in others[:count]])
    return np.concatenate(atoms), nearest


@functools.partial(jax.jit, static_argnums=2)
def _nearest(W_dec, chosen, count: int):
    own = W_dec[chosen].astype(jnp.float32)
    products = matmul(own, W_dec.astype(jnp.float32).T)
    cosines = divide(divide(products, norms(own)), norms(W_dec)[:, 0].astype(jnp.float32))
    return sharding.replicate((own, *codes.top_k(cosines, count)))


def _record(
    sae: SAE,
    rows: data_module.Rows,
    found: Codes,
    chosen: np.ndarray,
    sources: Sources,
    text: Text | None,
    lens: Lens | None,
    atoms: np.ndarray,
) -> dict[str, Any]:
    """What `features.json` holds, but for the nearest atoms."""
    summary = feature_examples.summarise(found, chosen, text, signed=sae.activation.signed)
    latents = feature_examples.numbers(summary, found, len(rows) - len(found.nonfinite))
    _add_examples(latents, rows, found, summary, text, sources.patch)
    _add_words(latents, sae, found, summary, text, lens, atoms)
    for latent, atom in zip(latents, atoms, strict=True):
        latent["atom"] = None if sources.patch is None else _levels(atom / max(np.abs(atom).max(), 1e-30), -1.0, 1.0)
    patch, shape = sources.patch, None if text is None else text.contexts.shape
    extremes = dict(zip(("low", "high"), found.extremes, strict=True))
    return {
        "format": "jaxsae-features",
        "version": 1,
        "sae": {
            "path": shown(sources.sae),
            "activation": type(sae.activation).__name__.lower(),
            "latents": sae.m,
            "width": sae.d,
        },
        "origin": _origin(sources).known(),
        "data": {
            "path": shown(sources.data),
            "rows": len(rows),
            "nonfinite": len(found.nonfinite),
            "contexts": None if shape is None else shape[0],
            "context": None if shape is None else shape[1],
        },
        "rows_are": "patches" if patch else "rows" if text is None or text.tokenizer is None else "tokens",
        "patch": patch and dict(zip(("height", "width", "channels"), patch, strict=True)) | extremes,
        "model": None if lens is None else lens.name,
        "ablation": None if lens is None or text is None else feature_text.ABLATION,
        "edges": summary.edges.tolist(),
        "ratio_edges": RATIO_EDGES.tolist(),
        "latents": latents,
    }


def _add_examples(
    latents: list[dict[str, Any]],
    rows: data_module.Rows,
    found: Codes,
    summary: Summary,
    text: Text | None,
    patch: tuple[int, int, int] | None,
) -> None:
    """Add to each latent the rows where it is largest, and those of its bands."""
    top = [[row for row in each if row >= 0] for each in summary.top.rows.tolist()]
    bands = feature_examples.bands(summary)
    asked = [
        (place, row)
        for place, (largest, some) in enumerate(zip(top, bands, strict=True))
        for row in [*largest, *(row for _, _, drawn in some for row in drawn.tolist())]
    ]
    around = Around(found, summary, text, len(rows))
    around.look_up((place, around.window(row)) for place, row in asked)
    pixels: dict[int, list[int]] = {}
    if patch is not None and asked:
        numbers = np.unique([row for _, row in asked])
        shown = np.asarray(rows[numbers], np.float64)
        pixels = {row: _levels(x, *found.extremes) for row, x in zip(numbers.tolist(), shown, strict=True)}
    example = lambda place, row: around.example(place, row) | {"pixels": pixels.get(row)}  # noqa: E731
    for place, latent in enumerate(latents):
        latent["top"] = [example(place, row) for row in top[place]]
        latent["bands"] = [
            {"low": low, "high": high, "examples": [example(place, row) for row in drawn.tolist()]}
            for low, high, drawn in bands[place]
        ]


def _levels(x: np.ndarray, low: float, high: float) -> list[int]:
    """Numbers from `low` to `high` as levels from 0 to 255."""
    return np.rint(np.clip(255 * (x - low) / max(high - low, 1e-30), 0, 255)).astype(int).tolist()


def _add_words(
    latents: list[dict[str, Any]],
    sae: SAE,
    found: Codes,
    summary: Summary,
    text: Text | None,
    lens: Lens | None,
    atoms: np.ndarray,
) -> None:
    """Add to each latent the tokens that it promotes and suppresses, and what its ablation costs."""
    for latent in latents:
        latent |= {"promotes": None, "suppresses": None, "loss_effect": None}
    if lens is None:
        return
    for latent, said in zip(latents, feature_text.words(lens, atoms), strict=True):
        latent |= said
    if text is None:
        return
    length = text.contexts.shape[1] - 1
    drawn = []  # contexts of each latent, in the order of the sample
    for rows in summary.sample.rows:
        contexts = text.place(rows[rows >= 0])[0]
        drawn.append(contexts[np.sort(np.unique(contexts, return_index=True)[1])][: feature_text.CONTEXTS])
    around = Around(found, summary, text, text.contexts.shape[0] * length)
    row_numbers = [(contexts[:, None] * length + np.arange(length)) for contexts in drawn]
    around.look_up((place, rows.ravel()) for place, rows in enumerate(row_numbers))
    for place, (latent, contexts, rows) in enumerate(zip(latents, drawn, row_numbers, strict=True)):
        values = np.nan_to_num(around.at(place, rows.ravel())[0]).reshape(rows.shape)
        values = np.pad(values, [(0, 0), (1, 0)])  # the first token has no row
        latent["loss_effect"] = feature_text.effect(lens, sae, atoms[place], text.contexts[contexts], values)


def _write_table(path: Path, latents: list[dict[str, Any]], warn: Callable[[str], None]) -> None:
    """Write the numbers of the latents as a Parquet file."""
    try:
        import pyarrow
        from pyarrow import parquet
    except ImportError:
        warn(f"{path}: is not written, since pyarrow is missing; pip install 'jaxsae[text]'.")
        return
    names = ("index", "count", "density", "mean", "mean_refined", "max", "max_refined", "shrinkage", "loss_effect")
    kinds = {"index": pyarrow.int64(), "count": pyarrow.int64()}
    columns = {
        name: pyarrow.array([latent[name] for latent in latents], kinds.get(name, pyarrow.float64())) for name in names
    }
    with atomic_file(path) as temporary:
        parquet.write_table(pyarrow.table(columns), temporary)
