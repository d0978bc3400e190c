"""From text to activations: tokenise, pack into contexts, run a language model, write or hand on its residual stream.

A context holds `context` tokens, and gives `context − 1` rows: its first position, whose activation is massive in most
models, is left out. A shard holds the rows of the same contexts however often a harvest was interrupted, so that one
that goes on neither repeats a row nor loses one.
"""

import functools
import itertools
import os
import random
import sysconfig
import threading
import zlib
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Annotated, Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from jaxsae import arguments, shards
from jaxsae.arguments import Count, Index
from jaxsae.files import InputError
from jaxsae.language_model import LanguageModel, residual

_SHARD = 128 << 20  # bytes of float32 rows, about
_MOST_STEPS = 32  # in a shard
_PIECE = 1 << 20  # characters tokenised at a time: a tokenizer takes some hundred bytes for each


class Text(NamedTuple):
    """Tokens of some files, packed.

    Attributes:
      contexts: `[n s]` int32.
      files: that were read; those after `tokens` was reached were not.
      replaced: characters that were not UTF-8.
      empty: files with nothing in them.
    """

    contexts: np.ndarray
    files: list[str]
    replaced: int
    empty: int


def standard_library() -> list[Path]:
    """The sources of Python's standard library, without its tests, shuffled: a text that is on every machine.

    Example:
      >>> standard_library()[0].suffix
      '.py'
    """
    root = Path(sysconfig.get_path("stdlib"))
    left_out = {"site-packages", "dist-packages", "test", "tests", "idlelib", "__pycache__"}
    files = [file for file in sorted(root.rglob("*.py")) if not left_out & set(file.relative_to(root).parts)]
    random.Random(0).shuffle(files)
    return files


def pack(files: Sequence[Path], tokenizer: Any, *, context: int, tokens: int | None = None) -> Text:
    """Tokenise files, one after the other, and cut them into contexts; a rest that fills none is left out.

    Files are separated by `<|endoftext|>` where the vocabulary has it, and contexts begin with whatever the tokenizer
    puts before a text.

    Args:
      files: UTF-8 text, in this order; other bytes become U+FFFD and are counted.
      tokenizer: a `tokenizers.Tokenizer`.
      context: tokens in a context, at least 2.
      tokens: read so many, rounded up to whole contexts; all by default.

    Raises:
      InputError: if a file cannot be read, or all of them do not fill a context.

    Example:
      >>> import tempfile, tokenizers
      >>> tokenizer = tokenizers.Tokenizer(tokenizers.models.WordLevel({"a": 0, "b": 1, "?": 2}, unk_token="?"))
      >>> tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
      >>> with tempfile.TemporaryDirectory() as folder:
      ...     _ = Path(folder, "x.txt").write_text("a b b a b")
      ...     pack([Path(folder, "x.txt")], tokenizer, context=2).contexts.tolist()
      [[0, 1], [1, 0]]
    """
    start = tokenizer.encode("").ids  # what its post-processor adds
    separator = tokenizer.token_to_id("<|endoftext|>")
    body = context - len(start)
    if body < 1 or context < 2:
        raise InputError(f"got contexts of {context} tokens; pass at least {2 + len(start)}.")
    wanted = None if tokens is None else -(-tokens // context) * body
    parts, count, read, replaced, empty = [], 0, [], 0, 0
    for file in files:
        if wanted is not None and count >= wanted:
            break
        text, bad = _read(file)
        read, replaced, empty = [*read, str(file)], replaced + bad, empty + (not text)
        of_file = [tokenizer.encode(piece, add_special_tokens=False).ids for piece in _pieces(text)]
        of_file += [[separator]] if separator is not None and text else []
        parts += [np.asarray(ids, np.int32) for ids in of_file]
        count += sum(map(len, of_file))
    ids = np.concatenate([np.zeros(0, np.int32), *parts])[:wanted]
    rows = ids[: len(ids) // body * body].reshape(-1, body)
    if not len(rows):
        what = "the text is empty" if not len(ids) else f"the text has {len(ids)} tokens, less than a context of {body}"
        raise InputError(f"{_names(files)}: {what}; pass more text, or a smaller --context.")
    before = np.tile(np.asarray(start, np.int32), (len(rows), 1))
    return Text(np.concatenate([before, rows], axis=1), read, replaced, empty)


def _names(files) -> str:
    return str(files[0]) if len(files) == 1 else f"{len(files)} files"


def _read(file: Path) -> tuple[str, int]:
    try:
        content = file.read_bytes()
    except OSError as error:
        raise InputError(f"{file}: {error.strerror}; pass files of text.") from error
    text = content.decode(errors="replace")
    return text, text.count("\ufffd") - content.count("\ufffd".encode())


def _pieces(text: str) -> Iterator[str]:
    """Cut a long text after line breaks."""
    start = 0
    while len(text) - start > _PIECE:
        cut = text.rfind("\n", start, start + _PIECE) + 1 or start + _PIECE
        yield text[start:cut]
        start = cut
    yield text[start:]


def run(
    out: str | os.PathLike,
    model: LanguageModel,
    contexts: np.ndarray,
    *,
    layer: Index,
    source: dict[str, Any],
    batch: Count = 8,
    dtype: Annotated[str, arguments.ROWS_DTYPE] = "float16",
    progress: Callable[[int], None] = lambda contexts: None,
) -> shards.Rows:
    """Write the residual stream of a language model over contexts, as shards, with the tokens beside them.

    Row `r` of a shard belongs to position `1 + r mod (s − 1)` of context `r // (s − 1)` in its column `tokens`. What an
    interrupted harvest of the same contexts left in `out` is kept, and gone on from.

    Args:
      out: directory.
      model: the language model.
      contexts: tokens `[n s]`.
      layer: block after which the residual is taken, from 0.
      source: where the contexts come from; written into the manifest.
      batch: contexts in a step, rounded up to a multiple of the devices, over which they are spread.
      dtype: of the rows, float16 or float32.
      progress: called with the number of contexts just done, those of an interrupted harvest first.

    Returns:
      All rows, `[n·(s − 1) d]`.

    Raises:
      InputError: if an argument does not fit the model, a row overflows `dtype`, or `out` holds something else.

    Example:
      >>> import tempfile
      >>> from jaxsae.language_model import tiny
      >>> contexts = np.arange(12, dtype=np.int32).reshape(2, 6)
      >>> with tempfile.TemporaryDirectory() as folder:
      ...     run(folder, tiny(), contexts, layer=1, source={"model": "tiny"}).shape
      (10, 8)
    """
    arguments.check(run, {"layer": layer, "batch": batch, "dtype": dtype})
    require_fit(model, contexts, layer)
    n, length = contexts.shape
    crc = f"{zlib.crc32(np.asarray(contexts, np.int32).tobytes()):08x}"
    source = {**source, "layer": layer, "contexts": n, "context": length, "tokens_crc32": crc}
    writer = shards.Writer(out, width=model.config.width, dtype=dtype, source=source)
    first = writer.rows // (length - 1)
    if first:
        progress(first)
    if not writer.manifest.complete:
        mesh, batch = _spread(jax.devices(), batch, n)
        steps = _steps_per_shard(batch * (length - 1) * model.config.width)
        residuals = _residuals(model, contexts[first:], layer, batch, mesh, progress)
        for start in range(first, n, steps * batch):
            rows = np.concatenate(list(itertools.islice(residuals, steps)))
            writer.append(rows.reshape(-1, rows.shape[-1]), tokens=contexts[start : start + len(rows)])
        writer.finish()
    return shards.open_rows(out)


def live(
    model: LanguageModel, contexts: np.ndarray, *, layer: Index, batch: Count = 8, window: Count = 1 << 16
) -> shards.Rows:
    """The residual stream of a language model over contexts, computed when it is asked for: nothing is written.

    Row `r` belongs to position `1 + r mod (s − 1)` of context `r // (s − 1)`. Contexts are computed a step at a time,
    and kept as long as a reader needs them that takes rows in windows, `data.batches(rows, …, window=window)`: each is
    computed once a pass. The position is all there is to save of such a reader; the window it is in is computed anew.

    Args:
      model: the language model.
      contexts: tokens `[n s]`.
      layer: block after which the residual is taken, from 0.
      batch: contexts in a step, rounded up to a multiple of this process' devices, over which they are spread.
      window: rows that are shuffled among themselves; two windows are kept in memory, in float32.

    Returns:
      `[n·(s − 1) d]`, float32.

    Raises:
      InputError: if an argument does not fit the model.

    Example:
      >>> from jaxsae.language_model import tiny
      >>> live(tiny(), np.arange(12, dtype=np.int32).reshape(2, 6), layer=1)[np.array([3, 9])].shape
      (2, 8)
    """
    arguments.check(live, {"layer": layer, "batch": batch, "window": window})
    require_fit(model, contexts, layer)
    mesh, batch = _spread(jax.local_devices(), batch, len(contexts))
    model = jax.device_put(model, NamedSharding(mesh, PartitionSpec()))
    (n, length), alone = contexts.shape, threading.Lock()
    step = batch * (length - 1)

    @functools.lru_cache(2 * (-(-window // step) + 1))
    def compute(number):
        some = contexts[number * batch : (number + 1) * batch]
        return np.asarray(_step(model, some, layer, batch, mesh)).reshape(-1, model.config.width)

    def load(number):
        with alone:  # readers that want the same one
            return compute(number)

    edges = np.minimum(np.arange(-(-n // batch) + 1) * step, n * (length - 1))
    return shards.Rows(load, edges, range(n * (length - 1)), model.config.width, np.float32)


def require_fit(model: LanguageModel, contexts: np.ndarray, layer: int) -> None:
    """Raise if a model has no such layer, or cannot read such contexts.

    Args:
      model: the language model.
      contexts: tokens `[n s]`.
      layer: block after which the residual is to be taken, from 0.

    Raises:
      InputError: what it is, and what the model has.

    Example:
      >>> from jaxsae.language_model import tiny
      >>> require_fit(tiny(), np.array([[1, 2, 99]]), 1)
      Traceback (most recent call last):
      jaxsae.files.InputError: the tokenizer made token 99, the model's vocabulary has 16; pass the model's own.
    """
    c = model.config
    require_site(model, layer, contexts.shape[1])
    if contexts.max() >= c.vocab:
        raise InputError(
            f"the tokenizer made token {contexts.max()}, the model's vocabulary has {c.vocab}; pass the model's own."
        )


def require_site(model: LanguageModel, layer: int, context: int) -> None:
    """Raise if a model has no such layer, or if contexts are not of a length that it reads: before there are any.

    Args:
      model: the language model.
      layer: block after which the residual is to be taken, from 0.
      context: tokens in a context.

    Raises:
      InputError: what it is, and what the model has.

    Example:
      >>> from jaxsae.language_model import tiny
      >>> require_site(tiny(), 3, 16)
      Traceback (most recent call last):
      jaxsae.files.InputError: got layer 3, the model has 3; pass one from 0 to 2.
    """
    c = model.config
    if not 0 <= layer < c.layers:
        raise InputError(f"got layer {layer}, the model has {c.layers}; pass one from 0 to {c.layers - 1}.")
    if not 2 <= context <= c.context:
        raise InputError(f"got contexts of {context} tokens, the model takes {c.context}; pass that or less, but 2.")


def _steps_per_shard(values: int) -> int:
    """As many steps of so many values as are kept in memory, and lost if the harvest is killed."""
    return max(1, min(_MOST_STEPS, _SHARD // (4 * values)))


def _spread(devices, batch: int, contexts: int) -> tuple[Mesh, int]:
    """A mesh of devices, and a number of contexts, no more than there are, that can be split evenly over them."""
    mesh = jax.make_mesh((len(devices),), ("data",), axis_types=(AxisType.Auto,), devices=devices)
    return mesh, -(-min(batch, contexts) // len(devices)) * len(devices)


def _residuals(model, contexts, layer: int, batch: int, mesh: Mesh, progress) -> Iterator[np.ndarray]:
    """Residuals `[batch s − 1 d]`, without those of the first position; the last batch may be smaller."""
    model = jax.device_put(model, NamedSharding(mesh, PartitionSpec()))
    pending = None
    for start in range(0, len(contexts), batch):
        some = contexts[start : start + batch]
        rows = _step(model, some, layer, batch, mesh)
        # One step ahead: the device computes while rows are fetched and written.
        if pending is not None:
            yield np.asarray(pending)
        pending = rows
        progress(len(some))
    if pending is not None:
        yield np.asarray(pending)


def _step(model, some: np.ndarray, layer: int, batch: int, mesh: Mesh) -> jax.Array:
    """Residuals of at most `batch` contexts."""
    ids = np.pad(some, [(0, batch - len(some)), (0, 0)])
    return _after_first(model, jax.device_put(ids, NamedSharding(mesh, PartitionSpec("data"))), layer)[: len(some)]


@functools.partial(jax.jit, static_argnames="layer")
def _after_first(model, ids, layer):
    return residual(model, ids, layer)[:, 1:].astype(jnp.float32)
