"""Run a function of rows over any leading batch, a chunk of rows at a time, in bounded memory."""

import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

# Rows of one chunk on a CPU. Gathered rows and their Gram matrices then stay in the cache from the gather to
# the last solver step, and each chunk stops with its own slowest row.
_CPU_ROWS = 16
_ACCELERATOR_SCRATCH = 256 << 20


def _chunk_rows(row_bytes: int) -> int:
    if jax.default_backend() == "cpu":
        return _CPU_ROWS
    return max(_CPU_ROWS, _ACCELERATOR_SCRATCH // max(row_bytes, 1) // _CPU_ROWS * _CPU_ROWS)


def scan_chunks(f: Callable, carry: Any, *arrays: Any, batch: tuple[int, ...], row_bytes: int) -> tuple[Any, Any]:
    """Fold `f(carry, *chunk) -> (carry, outputs)` over chunks of rows.

    Rows are dealt to the chunks in strides, so that a batch sharded over devices stays where it is.

    Args:
      f: function of arrays `[n ...]` whose outputs are arrays `[n ...]`; rows of zeros must be harmless
        to it and to `carry`, since the last rows may be such padding.
      carry: state handed from chunk to chunk.
      *arrays: pytrees of arrays `[*b ...]`.
      batch: the leading shape `*b`.
      row_bytes: scratch that `f` needs for one row, in bytes.

    Returns:
      The last carry, and the outputs as `[*b ...]`.
    """
    total = math.prod(batch)
    chunks = max(1, math.ceil(total / _chunk_rows(row_bytes)))
    size = math.ceil(total / chunks)

    def split(x):
        x = _pad_rows(x.reshape(total, *x.shape[len(batch) :]), size * chunks)
        return jnp.moveaxis(x.reshape(size, chunks, *x.shape[1:]), 1, 0)

    def join(x):
        x = jnp.moveaxis(x, 0, 1).reshape(size * chunks, *x.shape[2:])
        return x[:total].reshape(*batch, *x.shape[1:])

    carry, outputs = jax.lax.scan(lambda carry, chunk: f(carry, *chunk), carry, jax.tree.map(split, arrays))
    return carry, jax.tree.map(join, outputs)


def map_chunks(f: Callable, *arrays: Any, batch: tuple[int, ...], row_bytes: int) -> Any:
    """Apply `f(*chunk) -> outputs` to chunks of rows; see `scan_chunks`.

    On a CPU a chunk has the same size whatever the batch, so that a row goes through the same arithmetic, to the
    bit, alone or among thousands.
    """
    total = math.prod(batch)
    padded = math.ceil(total / _CPU_ROWS) * _CPU_ROWS

    def flatten(x):
        return _pad_rows(x.reshape(total, *x.shape[len(batch) :]), padded)

    def step(_, *chunk):
        return None, f(*chunk)

    _, outputs = scan_chunks(step, None, *jax.tree.map(flatten, arrays), batch=(padded,), row_bytes=row_bytes)
    return jax.tree.map(lambda x: x[:total].reshape(*batch, *x.shape[1:]), outputs)


def fold_vmap(f: Callable[[Any, Any], Any]) -> Callable[[Any, Any], Any]:
    """Give `f(shared, per_row)` a vmap that widens the leading batch instead of batching every operation inside.

    Then `vmap(f)` over rows has the memory bound, the speed and the bits of one call on the whole batch. If
    something shared is mapped too (a dictionary for each member), members run one after another.
    """
    folded = jax.custom_batching.custom_vmap(f)

    @folded.def_vmap
    def rule(size, batched, shared, per_row):
        def widen(x, is_batched):
            return x if is_batched else jnp.broadcast_to(x, (size, *jnp.shape(x)))

        per_row = jax.tree.map(widen, per_row, batched[1])
        if any(jax.tree.leaves(batched[0])):
            shared = jax.tree.map(widen, shared, batched[0])
            outputs = jax.lax.map(lambda member: folded(*member), (shared, per_row))
        else:
            outputs = folded(shared, per_row)
        return outputs, jax.tree.map(lambda _: True, outputs)

    return folded


def _pad_rows(x, rows: int):
    return jnp.pad(x, [(0, rows - x.shape[0])] + [(0, 0)] * (x.ndim - 1))
