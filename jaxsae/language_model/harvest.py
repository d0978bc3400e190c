"""From contexts of tokens to activations: run a language model, write or stream what it computes at its sites.

A context holds `context` tokens, and gives `context − 1` rows: its first position, whose activation is massive in most
models, is left out. Each shard holds the rows of whole contexts, so that an interrupted harvest resumes without
repeating or losing a row.
"""

import functools
import itertools
import json
import mmap
import os
import threading
import zlib
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Annotated, Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.experimental import multihost_utils
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec
from jax.stages import Lowered

from jaxsae._core import arguments, processes
from jaxsae._core.arguments import Count, Index
from jaxsae._core.files import AnyPath, InputError, any_path, atomic_file, reached
from jaxsae.data import cleaning, shards
from jaxsae.data.lazy import LazyRows, Windows
from jaxsae.language_model import config, files as model_files, sites
from jaxsae.language_model.models import LanguageModel, residuals

MANIFEST = "harvest.json"  # of several directories from one pass
_SHARD = 128 << 20  # bytes of float32 rows, about
_MAX_STEPS = 32  # in a shard
_TOKENS = 1 << 20  # read at a time, where all are
_COPIED = 2 << 30  # bytes of a model that is copied to each device


def run(
    out: str | os.PathLike,
    model: LanguageModel,
    contexts: np.ndarray,
    *,
    points: Sequence[tuple[Index, Annotated[str, arguments.SITE]]],
    source: dict[str, Any],
    batch: Count = 8,
    dtype: Annotated[str, arguments.ROWS_DTYPE] = "float16",
    progress: Callable[[int], None] = lambda contexts: None,
) -> list[LazyRows]:
    """Write the activations of a language model over contexts, as shards, with tokens and norms beside them.

    One place is written to `out`; several, from one pass, each to a directory of its own below it, as `directories`
    names them, which `out/harvest.json` lists. Row `r` of a shard belongs to position `1 + r mod (s − 1)` of context
    `r // (s − 1)` in its column `tokens`. An interrupted harvest of the same contexts in `out` is resumed. Several
    processes compute a shard each, on their own devices, and the result is that of one; it may be resumed by another
    number of them.

    Args:
      out: directory.
      model: the language model.
      contexts: tokens `[n s]`.
      points: pairs of a layer and one of `sites.SITES`.
      source: where the contexts come from; written into the manifest.
      batch: contexts in a step, rounded up to a multiple of the devices, over which they are spread.
      dtype: of the rows, float16 or float32.
      progress: called with the number of contexts just done, those of an interrupted harvest first.

    Returns:
      All rows `[n·(s − 1) d]` of each of `points`.

    Raises:
      InputError: if an argument does not fit the model, a row overflows `dtype`, or `out` holds something else.

    Example:
      >>> import tempfile
      >>> from jaxsae.language_model import tiny
      >>> contexts = np.arange(12, dtype=np.int32).reshape(2, 6)
      >>> with tempfile.TemporaryDirectory() as folder:
      ...     [rows] = run(folder, tiny(), contexts, points=[(1, "resid_post")], source={"model": "tiny"})
      ...     rows.shape
      (10, 8)
    """
    arguments.check(run, {"points": points, "batch": batch, "dtype": dtype})
    require_fit(model, contexts, points)
    n, length = contexts.shape
    source = {**source, "contexts": n, "context": length, "tokens_crc32": checksum(contexts)}
    folders = directories(out, points)
    if len(folders) > 1:
        _write_list(any_path(out), folders, points, source)
    writers = [
        shards.Writer(
            folder,
            width=sites.width(model.config, site),
            dtype=dtype,
            source={**source, "layer": layer, "site": site},
            together=True,
        )
        for folder, (layer, site) in zip(folders, points, strict=True)
    ]
    done = [writer.rows // (length - 1) for writer in writers]
    if min(done):
        progress(min(done))
    # Where a harvest was killed between two directories, those behind catch up first.
    for first, last in itertools.pairwise(sorted({*done, n})):
        behind = [place for place, each in enumerate(done) if each <= first]
        how = {"points": [points[place] for place in behind], "batch": batch, "progress": progress}
        _write([writers[place] for place in behind], model, contexts[:last], first, **how)
    for writer in writers:
        writer.finish()
    return [shards.open_rows(folder) for folder in folders]


def _write(writers, model: LanguageModel, contexts: np.ndarray, first: int, *, points, batch: int, progress) -> None:
    """Append the activations over the contexts from the `first` on; each process has a part of them."""
    (n, length), count, me = contexts.shape, jax.process_count(), jax.process_index()
    mesh, batch = _data_mesh(jax.local_devices(), batch, n)
    # Bounded, since a shard is held in memory, and lost if the harvest is killed; and by what is a process's part.
    bounds = (_MAX_STEPS, _SHARD // (4 * batch * (length - 1) * model.config.width), -(-(n - first) // (count * batch)))
    steps = max(1, min(bounds))
    own = [contexts[at + me * steps * batch :][: steps * batch] for at in range(first, n, count * steps * batch)]
    of_all = lambda done: progress(count * done)  # noqa: E731  the others are about as far
    computed = _activations(model, own, points, batch, mesh, of_all)
    for some in own:
        parts = list(itertools.islice(computed, steps)) if len(some) else []
        for place, writer in enumerate(writers):
            if not parts:
                writer.append(None)
                continue
            rows = np.concatenate([part[place] for part in parts])
            rows = rows.reshape(-1, rows.shape[-1])
            writer.append(rows, tokens=some, norms=cleaning.norms(rows))
        _let_go(contexts)


def checksum(contexts: np.ndarray) -> str:
    """The CRC-32 of tokens.

    Args:
      contexts: `[n s]`.

    Example:
      >>> checksum(np.arange(4).reshape(2, 2))
      '278eafa9'
    """
    found = 0
    for some in _parts(contexts):
        found = zlib.crc32(np.ascontiguousarray(some, np.int32).data, found)
    return f"{found:08x}"


def _parts(contexts: np.ndarray) -> Iterator[np.ndarray]:
    """Contexts, some at a time; of a file, what was read is let go, so that a long text takes no memory."""
    step = max(1, _TOKENS // max(1, np.shape(contexts)[1]))
    for start in range(0, len(contexts), step):
        yield contexts[start : start + step]
        _let_go(contexts)


def _let_go(contexts: np.ndarray) -> None:
    """Drop the pages of a memory-mapped file from memory; they are read again where needed."""
    mapped = getattr(contexts, "_mmap", None)
    if mapped is not None and hasattr(mmap, "MADV_DONTNEED"):
        mapped.madvise(mmap.MADV_DONTNEED)


def directories(out: str | os.PathLike, points: Sequence[tuple[int, str]]) -> list[AnyPath]:
    """Where a harvest writes the rows of each of its points.

    Args:
      out: of the harvest.
      points: likewise.

    Example:
      >>> [path.name for path in directories("out", [(4, "resid_post"), (8, "mlp_out")])]
      ['layer_4_resid_post', 'layer_8_mlp_out']
    """
    folder = any_path(out)
    return [folder] if len(points) == 1 else [folder / f"layer_{layer}_{site}" for layer, site in points]


def _write_list(out: AnyPath, folders: list[AnyPath], points, source: dict[str, Any]) -> None:
    """Write which directories a harvest has; refuse those of another one."""
    names = {path.name: {"layer": layer, "site": site} for path, (layer, site) in zip(folders, points, strict=True)}
    content = json.dumps({"directories": names, "source": source}, indent=1)
    with processes.all_or_none(), reached(out):
        if not processes.is_primary():
            return
        found = out / MANIFEST
        if found.exists():
            if json.loads(found.read_bytes()) != json.loads(content):
                raise InputError(f"{out}: holds another harvest, see {MANIFEST}; choose another --out, or remove it.")
            return
        if isinstance(out, Path):
            out.mkdir(parents=True, exist_ok=True)
        with atomic_file(found) as temporary:
            temporary.write_text(content + "\n")


def live(
    model: LanguageModel,
    contexts: np.ndarray,
    *,
    points: Sequence[tuple[Index, Annotated[str, arguments.SITE]]],
    batch: Count = 8,
    window: Count = 1 << 16,
) -> list[LazyRows]:
    """The activations of a language model over contexts, computed on demand and never written.

    Row `r` belongs to position `1 + r mod (s − 1)` of context `r // (s − 1)`. Contexts are computed a step at a time,
    and kept as long as a reader of windows, `data.batches(rows, …, window=window)`, needs them, so that each is
    computed once per pass. Such a reader saves only its position; when resumed, it computes the current window again.
    Several processes compute each step together, every device some of its contexts, and each gets all rows.

    Args:
      model: the language model.
      contexts: tokens `[n s]`.
      points: pairs of a layer and one of `sites.SITES`, all computed in one pass.
      batch: contexts in a step, rounded up to a multiple of the devices of all processes, over which they are spread.
      window: rows that are shuffled together; two windows are kept in memory, in float32.

    Returns:
      `[n·(s − 1) d]`, float32, of each of `points`.

    Raises:
      InputError: if an argument does not fit the model.

    Example:
      >>> from jaxsae.language_model import tiny
      >>> [rows] = live(tiny(), np.arange(12, dtype=np.int32).reshape(2, 6), points=[(1, "resid_post")])
      >>> rows[np.array([3, 9])].shape
      (2, 8)
    """
    arguments.check(live, {"points": points, "batch": batch, "window": window})
    require_fit(model, contexts, points)
    mesh, batch = _data_mesh(jax.devices(), batch, len(contexts))
    model = _placed(model, mesh)
    (n, length), lock = contexts.shape, threading.Lock()
    step = batch * (length - 1)

    @functools.lru_cache(2 * (-(-window // step) + 1))
    def compute(number):
        some = contexts[number * batch : (number + 1) * batch]
        found = map(np.asarray, _step(model, some, points, batch, mesh))
        return [rows.reshape(-1, rows.shape[-1]) for rows in found]

    def load(place, number):
        with lock:  # of concurrent readers, only one computes a step
            return compute(number)[place]

    edges = np.minimum(np.arange(-(-n // batch) + 1) * step, n * (length - 1))
    shared = {
        "dtype": np.float32,
        "checksum": "",
        "shuffled": Windows(window, window),
        "together": jax.process_count() > 1,
    }
    return [
        LazyRows(
            functools.partial(load, place), edges, range(n * (length - 1)), sites.width(model.config, site), **shared
        )
        for place, (_, site) in enumerate(points)
    ]


def check(
    model: str | os.PathLike,
    *,
    points: Sequence[tuple[int, str]],
    context: int,
    out: str | os.PathLike | None = None,
) -> None:
    """Raise the errors of a harvest before text is tokenised and weights are read.

    Args:
      model: as for `language_model.load`; only its configuration is read.
      points: pairs of layer and site.
      context: tokens in a context.
      out: directory to write, or None.

    Raises:
      InputError: if the model cannot be read, `points` or `context` do not fit it, or `out` holds something else.

    Example:
      >>> check("no-such-place", points=[(1, "resid_post")], context=64)
      Traceback (most recent call last):
      jaxsae.InputError: no-such-place: no such file; expected a GGUF file, a Hugging Face directory, or ...
    """
    where = None if out is None else any_path(out)
    manifest = shards.MANIFEST if len(points) == 1 else MANIFEST
    if isinstance(where, Path) and where.exists() and not where.is_dir():
        raise InputError(f"cannot write {out}: Not a directory; choose another --out.")
    if isinstance(where, Path) and where.is_dir() and any(where.iterdir()) and not (where / manifest).exists():
        raise InputError(f"{out}: holds files but no {manifest}; choose another --out, or remove it.")
    _require_points(model_files.read_config(model), points, context)


def require_fit(model: LanguageModel, contexts: np.ndarray, points: Sequence[tuple[int, str]]) -> None:
    """Raise if a model does not have a place, or cannot read the contexts.

    Args:
      model: the language model.
      contexts: tokens `[n s]`.
      points: pairs of layer and site.

    Raises:
      InputError: with the value, and the range that fits the model.

    Example:
      >>> from jaxsae.language_model import tiny
      >>> require_fit(tiny(), np.array([[1, 2, 99]]), [(1, "resid_post")])
      Traceback (most recent call last):
      jaxsae.InputError: the tokenizer made token 99, the model's vocabulary has 16; pass the model's own.
    """
    if np.ndim(contexts) != 2 or not np.size(contexts) or np.asarray(contexts).dtype.kind not in "iu":
        what = f"{np.shape(contexts)} of {np.asarray(contexts).dtype}"
        raise InputError(f"got contexts of shape {what}; pass tokens (n, s), at least one context.")
    c, bounds = model.config, [(int(some.min()), int(some.max())) for some in _parts(np.asanyarray(contexts))]
    low, high = min(low for low, _ in bounds), max(high for _, high in bounds)
    _require_points(c, points, np.shape(contexts)[1])
    if low < 0 or high >= c.vocab:
        wrong = low if low < 0 else high
        what = f"the tokenizer made token {wrong}, the model's vocabulary has {c.vocab}"
        raise InputError(f"{what}; pass the model's own.")


def _require_points(c: config.Config, points: Sequence[tuple[int, str]], context: int) -> None:
    for point in points:
        sites.require(c, *point)
    if len(set(points)) < max(1, len(points)):
        raise InputError(
            f"got {len(points)} places, {len(set(points))} of them different; pass at least one, each once."
        )
    if context < 2:
        raise InputError(f"got contexts of {context} tokens, and the first gives no row; pass at least 2.")
    if context > c.context:
        raise InputError(f"got contexts of {context} tokens, the model takes {c.context}; pass that or less.")


def _data_mesh(devices, batch: int, contexts: int) -> tuple[Mesh, int]:
    """A mesh of devices, and the number of contexts in a step, rounded up to be split evenly over them."""
    mesh = jax.make_mesh((len(devices),), ("data",), axis_types=(AxisType.Auto,), devices=devices)
    return mesh, -(-min(batch, contexts) // len(devices)) * len(devices)


def _activations(model, parts, points, batch: int, mesh: Mesh, progress) -> Iterator[list[np.ndarray]]:
    """Activations `[batch s − 1 n]` at each point, without the first position; the last batch of a part may be smaller.

    Contexts are read from where they are as they are needed.
    """
    model = _placed(model, mesh)
    pending = None
    for some in (part[start : start + batch] for part in parts for start in range(0, len(part), batch)):
        rows = _step(model, some, points, batch, mesh)
        # One step ahead: the device computes while rows are fetched and written.
        if pending is not None:
            yield list(map(np.asarray, pending))
        pending = rows
        progress(len(some))
    if pending is not None:
        yield list(map(np.asarray, pending))


def _placed(model: LanguageModel, mesh: Mesh) -> LanguageModel:
    """The model on a mesh: a copy on each device, or if it is large, every weight split over all of them.

    A split weight is gathered when its block is computed, and let go, as in fully sharded data parallelism.
    """

    def place(leaf: jax.Array, to: NamedSharding) -> jax.Array:
        if to.is_fully_addressable:
            return jax.device_put(leaf, to)  # no copy of what is there already
        return jax.make_array_from_callback(leaf.shape, to, np.asarray(leaf).__getitem__)

    return jax.tree.map(place, model, _shardings(model, mesh))


def _shardings(model: LanguageModel, mesh: Mesh) -> Any:
    large = sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(model)) > _COPIED and mesh.size > 1

    def of(leaf: Any) -> NamedSharding:
        ends = range(leaf.ndim - 2, leaf.ndim) if large and leaf.ndim > 1 else ()  # of a matrix; not that of the blocks
        axis = max((n for n in ends if leaf.shape[n] % mesh.size == 0), key=leaf.shape.__getitem__, default=None)
        return NamedSharding(mesh, PartitionSpec() if axis is None else PartitionSpec(*[None] * axis, "data"))

    return jax.tree.map(of, model)


def lowered(
    model: str | os.PathLike, *, layer: int, site: str, context: int, batch: int, devices: Sequence[Any]
) -> tuple[Lowered, int]:
    """A step of a harvest, lowered for devices that need not exist, and the number of its contexts.

    Args:
      model: as for `language_model.load`; only its configuration is read.
      layer: the block, from 0.
      site: one of `sites.SITES`.
      context: tokens in a context.
      batch: contexts in a step, rounded up to a multiple of the devices.
      devices: those of a slice.

    Raises:
      InputError: as `check`.

    Example:
      >>> lowered("no-such-place", layer=1, site="resid_post", context=64, batch=8, devices=jax.devices())
      Traceback (most recent call last):
      jaxsae.InputError: no-such-place: no such file; expected a GGUF file, a Hugging Face directory, or ...
    """
    config = model_files.read_config(model)
    _require_points(config, [(layer, site)], context)
    mesh, batch = _data_mesh(devices, batch, batch)
    abstract = nnx.eval_shape(lambda: LanguageModel(config, nnx.Rngs(0)))
    place = lambda leaf, to: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=to)  # noqa: E731
    ids = jax.ShapeDtypeStruct((batch, context), jnp.int32, sharding=NamedSharding(mesh, PartitionSpec("data")))
    whole = jax.tree.map(place, abstract, _shardings(abstract, mesh))
    return _after_first.lower(whole, ids, ((layer, site),)), batch


def _step(model, some: np.ndarray, points, batch: int, mesh: Mesh) -> list[np.ndarray | jax.Array]:
    """Activations at each point over at most `batch` contexts."""
    padded = np.pad(some, [(0, batch - len(some)), (0, 0)])
    spread = NamedSharding(mesh, PartitionSpec("data"))
    ids = jax.make_array_from_callback(padded.shape, spread, padded.__getitem__)
    found = _after_first(model, ids, tuple(map(tuple, points)))
    if not found[0].is_fully_addressable:  # each process gets all of them
        found = multihost_utils.process_allgather(found, tiled=True)
    return [rows[: len(some)] for rows in found]


@functools.partial(jax.jit, static_argnames="points")
def _after_first(model, ids, points):
    return [x[:, 1:].astype(jnp.float32) for x in residuals(model, ids, points)]
