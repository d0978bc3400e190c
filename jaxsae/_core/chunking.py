"""Map functions over batches of rows, a chunk at a time, in bounded memory."""

import functools
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer
from jaxtyping import Array, Bool

from jaxsae import sharding

WORKSPACE_BYTES = 256 << 20  # default bound on the memory of a chunk
# Rows of a chunk on a CPU, whatever the batch, so that the result of a row is bitwise identical alone or among
# thousands. What so many rows gather also stays in the cache.
_CPU_ROWS = 16


def _chunk_size(total: Any, row_bytes: int, workspace_bytes: int, cpu_rows: int) -> tuple[int, Any]:
    """The number of rows of a chunk, and the number of chunks."""
    most = max(1, workspace_bytes // max(row_bytes, 1))
    if sharding.on_cpu():
        most = min(most, cpu_rows)
    step = min(most, _CPU_ROWS)
    if not isinstance(total, int):  # symbolic, in an export
        size = most // step * step
        return size, (total + size - 1) // size
    padded = max(step, math.ceil(total / step) * step)
    chunks = math.ceil(padded / (most // step * step))
    return math.ceil(padded / chunks / step) * step, chunks


def scan_chunks(
    f: Callable,
    carry: Any,
    *arrays: Any,
    batch: tuple[Any, ...],
    row_bytes: int,
    workspace_bytes: int = WORKSPACE_BYTES,
    cpu_rows: int = _CPU_ROWS,
) -> tuple[Any, Any]:
    """Fold `f(carry, *chunk) -> (carry, outputs)` over chunks of rows.

    Chunks take rows in strides, so that a batch sharded over devices is not moved.

    Args:
      f: function of arrays `[n ...]` whose outputs are arrays `[n ...]`; rows of zeros must not
        change `carry`, since the last rows may be such padding.
      carry: state passed from chunk to chunk.
      *arrays: pytrees of arrays `[*b ...]`.
      batch: the leading shape `*b`.
      row_bytes: memory that `f` needs per row, in bytes.
      workspace_bytes: most bytes that a chunk may need; a chunk has at least one row.
      cpu_rows: most rows of a chunk on a CPU; if more than 16, a multiple of 16.

    Returns:
      The final carry, and the outputs as `[*b ...]`.
    """
    total = math.prod(batch)
    size, chunks = _chunk_size(total, row_bytes, workspace_bytes, cpu_rows)
    arrays = jax.tree.map(lambda x: x.reshape(total, *x.shape[len(batch) :]), arrays)

    def read(x, number):
        if total == size * chunks:
            return x.reshape(size, chunks, *x.shape[1:])[:, number]
        if total == 0:
            return jnp.zeros((size, *x.shape[1:]), x.dtype)
        # Padding the whole batch would copy it.
        return x.at[number + chunks * jnp.arange(size)].get(mode="fill", fill_value=0)

    def join(x):
        x = jnp.moveaxis(x, 0, 1).reshape(size * chunks, *x.shape[2:])
        return x[:total].reshape(*batch, *x.shape[1:])

    def step(carry, number):
        return f(carry, *jax.tree.map(lambda x: read(x, number), arrays))

    carry = sharding.vary_alike(carry, arrays)
    carry, outputs = jax.lax.scan(step, carry, jnp.arange(chunks))
    return carry, jax.tree.map(join, outputs)


def map_chunks(f: Callable, *arrays: Any, **options: Any) -> Any:
    """Apply `f(*chunk) -> outputs` to chunks of rows; arguments as for `scan_chunks`."""
    return scan_chunks(lambda _, *chunk: (None, f(*chunk)), None, *arrays, **options)[1]


def revise_rows(
    f: Callable,
    where: Bool[Array, " n"],
    outputs: Any,
    *arrays: Any,
    row_bytes: int,
    workspace_bytes: int = WORKSPACE_BYTES,
) -> Any:
    """Replace `outputs` by `f(*chunk)` in the rows where a mask is true, a chunk at a time.

    Args:
      f: function of arrays `[n ...]` whose outputs are arrays `[n ...]`.
      where: `[n]`, the rows to compute; the others cost nothing.
      outputs: pytree of arrays `[n ...]`, with the dtypes that `f` returns.
      *arrays: pytrees of arrays `[n ...]`.
      row_bytes: memory that `f` needs per row, in bytes.
      workspace_bytes: most bytes that a chunk may need; a chunk has at least one row.

    Returns:
      The outputs, with those rows replaced.
    """
    total = where.shape[0]
    if total == 0:
        return outputs
    size, chunks = _chunk_size(total, row_bytes, workspace_bytes, _CPU_ROWS)
    numbers = jnp.nonzero(where, size=size * chunks, fill_value=total)[0]

    def visit(chunk, outputs):
        at = jax.lax.dynamic_slice_in_dim(numbers, chunk * size, size)
        new = f(*jax.tree.map(lambda x: x.at[at].get(mode="fill", fill_value=0), arrays))
        return jax.tree.map(lambda x, new: x.at[at].set(new, mode="drop"), outputs, new)

    outputs = sharding.vary_alike(outputs, arrays)
    return jax.lax.fori_loop(0, (jnp.sum(where) + size - 1) // size, visit, outputs)


def pad_rows(x: jax.Array, n: int, value: int) -> jax.Array:
    """`x` padded to `n` rows with a constant value."""
    return x if len(x) == n else jnp.pad(x, [(0, n - len(x)), *[(0, 0)] * (x.ndim - 1)], constant_values=value)


def each_row(f: Callable, *arrays: Any, flops: int) -> Any:
    """Apply `f` to each row of a chunk.

    On a CPU the loop is unrolled if a row costs enough `flops`: XLA runs independent products on several cores, but a
    batched product on one.
    """
    if not sharding.on_cpu() or flops < 1 << 18:
        return jax.vmap(f)(*arrays)
    rows = [f(*(x[row] for x in arrays)) for row in range(len(arrays[0]))]
    # Without the barrier XLA recomputes each row wherever a result is read, which takes minutes to compile.
    return jax.tree.map(lambda *x: jnp.stack(x), *jax.lax.optimization_barrier(rows))


def fold_vmap(f: Callable[[Any, Any], Any]) -> Callable[[Any, Any], Any]:
    """Give `f(shared, per_row)` a vmap that extends the leading batch instead of batching every operation inside.

    `vmap(f)` over rows then has the memory bound and the speed of one call on the whole batch, and its bitwise
    identical result. If `shared` is mapped too (one dictionary each), the entries run one after another.
    """
    folded = jax.custom_batching.custom_vmap(f)

    @folded.def_vmap
    def rule(size, batched, shared, per_row):
        def widen(x, is_batched):
            return x if is_batched else jnp.broadcast_to(x, (size, *jnp.shape(x)))

        per_row = jax.tree.map(widen, per_row, batched[1])
        if any(jax.tree.leaves(batched[0])):
            shared = jax.tree.map(widen, shared, batched[0])
            outputs = jax.lax.map(lambda entry: folded(*entry), (shared, per_row))
        else:
            outputs = folded(shared, per_row)
        return outputs, jax.tree.map(lambda _: True, outputs)

    return folded


def over_rows(f: Callable[[Any, Any, Any], Any]) -> Callable[[Any, Any, Any], Any]:
    """Compile `f(static, shared, per_row)` for each `static`, with the `vmap` of `fold_vmap`, `in_buckets`."""

    @functools.cache
    def folded(static):
        return fold_vmap(functools.partial(f, static))

    @functools.wraps(f)
    def compiled(static, shared, per_row):
        return folded(static)(shared, per_row)

    return in_buckets(compiled)


def in_buckets(f: Callable[[Any, Any, Any], Any]) -> Callable[[Any, Any, Any], Any]:
    """Compile `f(static, shared, per_row)` for each `static` and, outside of transformations, few numbers of rows.

    On a CPU, other numbers are padded with rows of zeros, at most an eighth as many. The first array of `per_row` has
    one axis besides the batch.
    """
    compiled = jax.jit(f, static_argnums=0)

    @functools.wraps(f)
    def call(static, shared, per_row):
        batch = jax.tree.leaves(per_row)[0].shape[:-1]
        n = math.prod(batch)
        if n == 0 or not _on_default_cpu((shared, per_row)) or batch == (size := bucket(n),):
            return compiled(static, shared, per_row)

        # By NumPy, which compiles nothing, and here copies what is no device's.
        def pad(x):
            x = np.asarray(x).reshape((n, *x.shape[len(batch) :]))
            return np.concatenate([x, np.zeros((size - n, *x.shape[1:]), x.dtype)])

        outputs = compiled(static, shared, jax.tree.map(pad, per_row))
        return jax.tree.map(lambda x: jax.device_put(np.asarray(x)[:n].reshape((*batch, *x.shape[1:]))), outputs)

    return call


def flatten(per_row: Any) -> tuple[tuple[Any, ...], Any]:
    """The batch of the first array `[*b d]` of a tree, and the tree with one axis in its place: `[n ...]`."""
    batch = jax.tree.leaves(per_row)[0].shape[:-1]
    n = math.prod(batch)
    return batch, jax.tree.map(lambda x: x.reshape(n, *x.shape[len(batch) :]), per_row)


def unflatten(batch: tuple[Any, ...], rows: Any) -> Any:
    """A tree of arrays `[n ...]` as `[*b ...]`."""
    return jax.tree.map(lambda x: x.reshape(*batch, *x.shape[1:]), rows)


def bucket(n: int) -> int:
    """The least of 16, 18, … 32, 36, … (eight per factor of two) that is at least `n`.

    Example:
      >>> bucket(3), bucket(100), bucket(1025)
      (16, 104, 1152)
    """
    step = max(1, 1 << max((n - 1).bit_length() - 4, 0))
    return max(16, math.ceil(n / step) * step)


def is_concrete(tree: Any) -> bool:
    """Whether this process can look at all numbers of a tree, of which none is being transformed."""
    leaves = jax.tree.leaves(tree)
    return not any(isinstance(x, Tracer) or not getattr(x, "is_fully_addressable", True) for x in leaves)


def known_false(where: Array) -> bool:
    """Whether this process sees that no entry is true, outside of transformations."""
    return is_concrete(where) and not np.asarray(where).any()


def numpy_for(tree: Any) -> Any:
    """NumPy, which compiles nothing, or `jax.numpy` for a tree that is being transformed."""
    return np if is_concrete(tree) else jnp


def spread(x: Any, shape: tuple[Any, ...], dtype) -> Any:
    """`x` in a dtype, broadcast to a shape."""
    xp = numpy_for(x) if all(isinstance(n, int) for n in shape) else jnp  # symbolic, in an export
    return xp.broadcast_to(xp.asarray(x, dtype), shape)


def _on_default_cpu(tree: Any) -> bool:
    """Whether a program of these arrays would run at once, on the CPU that JAX takes by default."""
    if not is_concrete(tree) or not sharding.on_cpu() or not jax.sharding.get_abstract_mesh().empty:
        return False
    device = jax.config.jax_default_device or jax.local_devices()[0]  # pyright: ignore[reportAttributeAccessIssue]
    return all(x.devices() == {device} for x in jax.tree.leaves(tree) if isinstance(x, jax.Array))
