"""Refine more rows than fit in memory: blocks of rows in, blocks of codes out."""

import contextlib
import functools
import math
import operator
import os
import shutil
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

from jaxsae import sharding
from jaxsae._core import processes
from jaxsae._core.files import AnyPath, InputError, any_path, atomic_file
from jaxsae._core.linalg import result_type
from jaxsae.autoencoder.refinement import refine
from jaxsae.autoencoder.sae import SAE, encode, encode_dense, row_width, split_rows
from jaxsae.autoencoder.shrinkage import Shrinkage, shrinkage
from jaxsae.codes import SparseCode
from jaxsae.data import shards
from jaxsae.data.rows import Rows
from jaxsae.least_squares.outcome import RefitInfo, Status
from jaxsae.least_squares.solvers import Solver

BLOCK = 256  # rows refined together
_PRE_ACTIVATIONS = 256 << 20  # bytes of pre-activations held at a time


class Block(NamedTuple):
    """A block of refined rows.

    Attributes:
      rows: `[n]`, row numbers in the input.
      x: `[n d]`.
      target: what the code is to reconstruct, `[n d_out]`; `x`, except of transcoders.
      code: the encoder's code, `[n k]`.
      refined: `[n k]`.
      info: `[n]`.
    """

    rows: np.ndarray
    x: Array
    target: Array
    code: SparseCode
    refined: SparseCode
    info: RefitInfo


class Chunk(NamedTuple):
    """Some rows.

    Attributes:
      start: number of the first.
      x: activations `[n d]`.
      target: what to reconstruct, `[n d_out]`; `x`, except of transcoders.
    """

    start: int
    x: Array
    target: Array


class Coded(NamedTuple):
    """A chunk of encoded rows, the whole of it on every device.

    Attributes:
      start: number of its first row in the input.
      x: `[n d]`.
      target: `[n d_out]`, as of `Chunk`.
      code: the encoder's code, `[n k]`.
    """

    start: int
    x: Array
    target: Array
    code: SparseCode


def chunks(sae: SAE, rows: Rows | Array, *, first: int = 0) -> Iterator[Chunk]:
    """Yield rows in chunks whose pre-activations fit in memory.

    On a mesh (`jax.set_mesh`) each process reads the rows that its devices need.

    Args:
      sae: the autoencoder.
      rows: `[n d]`, or as `split_rows` takes them from a transcoder; may be memory-mapped.
      first: row to begin at.

    Example:
      >>> import jaxsae
      >>> sae = jaxsae.init(jax.random.key(0), d=4, m=8, activation=jaxsae.ReLU())
      >>> [(start, x.shape) for start, x, _ in chunks(sae, np.zeros((600, 4)))]
      [(0, (600, 4))]
    """
    size = _chunk_rows(sae.m)
    # At least float32, whatever the SAE's dtype, so that the certified values are those written.
    dtype = result_type(sae.W_dec.dtype, jnp.float32)
    for start in range(first, len(rows), size):
        count = min(size, len(rows) - start)
        part = sharding.rows_needed(count)
        block, numbers = rows[start + part.start : start + part.stop], range(start + part.start, len(rows))
        x = shards.cast(block, dtype, "the rows", "scale them", numbers)
        yield Chunk(start, *split_rows(sae, sharding.make_global_batch(x, count, part.start)))


def _chunk_rows(m: int) -> int:
    """The number of rows whose pre-activations fit into memory, on the current mesh."""
    devices = max(1, jax.sharding.get_mesh().size)
    return max(BLOCK, devices * _PRE_ACTIVATIONS // (4 * m) // BLOCK * BLOCK)


@jax.jit
def _max_l0(sae, x):
    l0 = jnp.sum(encode_dense(sae, x) != 0, axis=1)
    return jnp.max(jnp.where(jnp.isfinite(x).all(1), l0, 0))


def max_l0(sae: SAE, rows: Rows | Array) -> int:
    """The largest L0 of any row, at least 1: the smallest capacity that drops nothing.

    Args:
      sae: the autoencoder.
      rows: `[n d]`, may be memory-mapped.

    Example:
      >>> import jaxsae
      >>> sae = jaxsae.SAE(jnp.eye(3), jnp.zeros(3), jnp.eye(3), jnp.zeros(3), jaxsae.ReLU())
      >>> max_l0(sae, np.array([[1.0, 0.0, 0.0], [1.0, 2.0, 0.0]]))
      2
    """
    return max([1, *(int(_max_l0(sae, chunk.x)) for chunk in chunks(sae, rows))])


def encode_chunks(sae: SAE, rows: Rows | Array, *, capacity: int | None = None, first: int = 0) -> Iterator[Coded]:
    """Encode rows, a chunk at a time.

    Args:
      sae: the autoencoder.
      rows: as for `chunks`.
      capacity: maximum slots per row; `max_l0` by default, unless the activation fixes it.
      first: row to begin at; the chunks are the same as without, if it is the first of one.

    Raises:
      InputError: as `require_fit`.

    Example:
      >>> import jaxsae
      >>> sae = jaxsae.init(jax.random.key(0), d=4, m=8, activation=jaxsae.TopK(2))
      >>> [(chunk.start, chunk.code.values.shape) for chunk in encode_chunks(sae, np.ones((64, 4)), first=60)]
      [(60, (4, 2))]
    """
    require_fit(sae, rows)
    if capacity is None and sae.activation.slots is None:
        capacity = max_l0(sae, rows)
    for start, x, target in chunks(sae, rows, first=first):
        yield Coded(start, *sharding.replicate((x, target, encode(sae, x, capacity=capacity))))


def refine_chunk(
    sae: SAE,
    chunk: Coded,
    solver: Solver | Callable[[int, int], Solver] | None = None,
    *,
    only: np.ndarray | None = None,
) -> Iterator[Block]:
    """Refine the rows of an encoded chunk, a block at a time, as `refine_blocks` does.

    Args:
      sae: the autoencoder.
      chunk: of `encode_chunks`.
      solver: as for `refine_blocks`.
      only: positions in the chunk of the rows to refine; all by default.

    Example:
      >>> import jaxsae
      >>> sae = jaxsae.init(jax.random.key(0), d=4, m=8, activation=jaxsae.TopK(2))
      >>> [chunk] = encode_chunks(sae, np.random.default_rng(0).normal(size=(64, 4)))
      >>> [block.rows.tolist() for block in refine_chunk(sae, chunk, only=np.array([3, 5]))]
      [[3, 5]]
    """
    start, x, target, code = chunk
    l0 = np.asarray(code.l0)
    order = np.argsort(l0, kind="stable") if only is None else only[np.argsort(l0[only], kind="stable")]
    for at in range(0, len(order), BLOCK):
        block = order[at : at + BLOCK]
        slots = _slots(int(l0[block].max()), sae)
        values, indices = _resize(code.values[block], slots, 0), _resize(code.indices[block], slots, sae.m)
        part = SparseCode(values, indices, sae.m, code.num_dropped[block])
        block_solver = solver(slots, sae.W_dec.shape[1]) if callable(solver) else solver
        refined, info = sharding.replicate(refine(sae, x[block], part, block_solver, target=target[block]))
        yield Block(start + block, x[block], target[block], part, refined, info)


def refine_blocks(
    sae: SAE,
    rows: Rows | Array,
    solver: Solver | Callable[[int, int], Solver] | None = None,
    *,
    capacity: int | None = None,
) -> Iterator[Block]:
    """Encode and refine rows, a block at a time; a transcoder's towards its targets.

    Rows of similar L0 share a block with as few slots as hold them, 32, 128, 256 … or the width: the cost of a refit
    grows with the square of its slots, and a ReLU's L0 has a long tail. So blocks are not in row order: see
    `Block.rows`.

    Args:
      sae: the autoencoder.
      rows: as for `chunks`.
      solver: as for `refine`, or a function that makes one for rows of `k` slots and width `d`.
      capacity: maximum slots per row; `max_l0` by default, unless the activation fixes it.

    Example:
      >>> import jaxsae
      >>> sae = jaxsae.init(jax.random.key(0), d=4, m=8, activation=jaxsae.TopK(2))
      >>> for block in refine_blocks(sae, np.random.default_rng(0).normal(size=(64, 4))):
      ...     block.refined.values.shape, bool((block.info.kkt <= 1e-5).all())
      ((64, 4), True)
    """
    for chunk in encode_chunks(sae, rows, capacity=capacity):  # small; blocks are made of any rows
        yield from refine_chunk(sae, chunk, solver)


def require_fit(sae: SAE, rows: Rows | Array) -> None:
    """Raise unless rows can be encoded and refined.

    Args:
      sae: the autoencoder.
      rows: as for `chunks`.

    Raises:
      InputError: if there are none, or as `require_width`.

    Example:
      >>> import jaxsae
      >>> require_fit(jaxsae.init(jax.random.key(0), d=4, m=8, activation=jaxsae.ReLU()), np.ones((0, 4)))
      Traceback (most recent call last):
      jaxsae.InputError: got no rows; pass at least one.
    """
    if not len(rows):
        raise InputError("got no rows; pass at least one.")
    require_width(sae, rows)


def require_width(sae: SAE, rows: Rows | Array, inputs: int | None = None) -> None:
    """Raise unless rows are of the width that an SAE takes; a transcoder's hold its targets too.

    Args:
      sae: the autoencoder.
      rows: as for `chunks`.
      inputs: how many of their columns are inputs, if that is known; the others are targets.

    Raises:
      InputError: with both widths.

    Example:
      >>> import jaxsae
      >>> require_width(jaxsae.init(jax.random.key(0), d=4, m=8, activation=jaxsae.ReLU()), np.zeros((2, 5)))
      Traceback (most recent call last):
      jaxsae.InputError: got rows of width 5, but this SAE has d = 4; pass the data it was made for.
    """
    got, d, d_out = rows.shape[1], sae.d, row_width(sae) - sae.d
    if got == d + d_out and inputs in (None, d):
        return
    if not d_out:
        raise InputError(f"got rows of width {got}, but this SAE has d = {d}; pass the data it was made for.")
    if got == d:
        raise InputError(f"got a transcoder and no target, {d_out} wide; pass --target, the rows that it reconstructs.")
    parts = f"{got} wide together" if inputs is None else f"{inputs} and {got - inputs} wide"
    what = f"got inputs and targets {parts}, but this transcoder maps {d} to {d_out}"
    raise InputError(f"{what}; pass the data it was made for.")


def _slots(l0: int, sae: SAE) -> int:
    # Few sizes, since each is compiled once per shape of autoencoder: 32, 128, 256, 512 …
    slots = 32 if l0 <= 32 else min(max(128, 1 << (l0 - 1).bit_length()), sae.m)
    width = sae.W_dec.shape[1]
    return width if l0 <= width < slots else slots  # empty slots must not give a row more atoms than the width


def _resize(slots, size: int, empty: int):
    # Slots are in descending order of value, so only empty ones are cut off.
    return jnp.pad(slots[:, :size], [(0, 0), (0, max(0, size - slots.shape[1]))], constant_values=empty)


class RefineSummary(NamedTuple):
    """Summary of a `refine_file` call.

    Attributes:
      rows: number of rows.
      capacity: slots per row.
      shrinkage: `Shrinkage` over all rows.
      overflowed: rows with more active latents than slots.
      nonfinite: rows with NaN or Inf, left unchanged.
      unconverged: rows that stopped at `max_steps`.
      worst_kkt: the largest relative KKT residual.
    """

    rows: int
    capacity: int
    shrinkage: Shrinkage
    overflowed: int
    nonfinite: int
    unconverged: int
    worst_kkt: float


def refine_file(
    sae: SAE,
    rows: Rows | Array,
    out: str | os.PathLike,
    solver: Solver | Callable[[int, int], Solver] | None = None,
    *,
    capacity: int | None = None,
    progress: Callable[[int], None] = lambda rows: None,
) -> RefineSummary:
    """Refine rows into an `.npz` file, in order: `indices`, `values` `[n k]`, `kkt`, `status`, `num_dropped` `[n]`.

    Only blocks are held in memory, so rows may be a larger memory-mapped file; `out` appears only once complete. Of
    several processes, the first one writes.

    Args:
      sae: the autoencoder.
      rows: as for `chunks`.
      out: the file to write.
      solver: as for `refine_blocks`.
      capacity: slots per row; `max_l0` by default, unless the activation fixes it.
      progress: called with the number of rows in each finished block.

    Raises:
      InputError: if the rows are not as wide as the SAE, or the file cannot be written.

    Example:
      >>> import tempfile, jaxsae
      >>> sae = jaxsae.init(jax.random.key(0), d=4, m=8, activation=jaxsae.TopK(2))
      >>> with tempfile.TemporaryDirectory() as folder:
      ...     summary = refine_file(sae, np.random.default_rng(0).normal(size=(64, 4)), f"{folder}/codes.npz")
      ...     summary.unconverged, np.load(f"{folder}/codes.npz")["values"].shape
      (0, (64, 2))
    """
    out = any_path(out)
    require_fit(sae, rows)
    capacity = capacity or sae.activation.slots or max_l0(sae, rows)
    if capacity > sae.m:
        raise InputError(f"got capacity {capacity} for {sae.m} latents; pass a capacity of at most {sae.m}.")
    columns = {
        "indices": (np.int32, (len(rows), capacity)),
        "values": (np.float32, (len(rows), capacity)),
        "kkt": (np.float32, (len(rows),)),
        "status": (np.int32, (len(rows),)),
        "num_dropped": (np.int32, (len(rows),)),
    }
    with contextlib.ExitStack() as held:
        with processes.all_or_none():
            arrays = held.enter_context(_columns(out, columns)) if processes.is_primary() else {}

        def write(block: Block) -> tuple[Shrinkage, np.ndarray]:
            refined, info, num_dropped = jax.device_get((block.refined, block.info, block.code.num_dropped))
            slots, kkt, status = min(capacity, refined.indices.shape[1]), info.kkt, info.status
            if arrays:  # all of them numpy's: other processes do not take part
                arrays["indices"][block.rows, :slots] = refined.indices[:, :slots]
                arrays["indices"][block.rows, slots:] = sae.m
                arrays["values"][block.rows, :slots] = refined.values[:, :slots]
                arrays["kkt"][block.rows] = kkt
                arrays["status"][block.rows] = status
                arrays["num_dropped"][block.rows] = num_dropped
            progress(len(block.rows))
            dropped = (num_dropped > 0) & (status != Status.NONFINITE)
            counts = [np.count_nonzero(x) for x in (dropped, status == Status.NONFINITE, status == Status.MAX_STEPS)]
            found = np.array([*counts, np.max(np.nan_to_num(kkt), initial=0)])
            measured = shrinkage(sae, block.x, block.code, block.refined, target=block.target)
            return sharding.replicate(measured), found

        measured, found = zip(*map(write, refine_blocks(sae, rows, solver, capacity=capacity)), strict=True)
        total = jax.device_get(functools.reduce(operator.add, measured))  # so that one process alone can read it
        overflowed, nonfinite, unconverged = np.sum(found, axis=0)[:3].astype(int).tolist()
        return RefineSummary(
            rows=len(rows),
            capacity=capacity,
            shrinkage=jax.tree.map(jnp.asarray, total),
            overflowed=overflowed,
            nonfinite=nonfinite,
            unconverged=unconverged,
            worst_kkt=float(np.max(found, axis=0)[3]),
        )


@contextlib.contextmanager
def _columns(out: AnyPath, columns: dict[str, tuple[type, tuple[int, ...]]]) -> Iterator[dict[str, np.memmap]]:
    """Arrays on disk, of which an `.npz` file is made in the end."""
    with atomic_file(out) as temporary:
        size = sum(np.dtype(dtype).itemsize * math.prod(shape) for dtype, shape in columns.values())
        _require_space(temporary, 2 * size)  # the columns, and the file made of them
        parts = {name: f"{temporary}.{name}.npy" for name in columns}
        arrays = {name: np.lib.format.open_memmap(parts[name], "w+", *columns[name]) for name in columns}
        yield arrays
        with zipfile.ZipFile(temporary, "w", zipfile.ZIP_STORED) as archive:
            for name, array in arrays.items():
                array.flush()
                archive.write(parts[name], f"{name}.npy")


def _require_space(path: Path, needed: int) -> None:
    # A memory map that outgrows the disk kills the process without a message.
    free = shutil.disk_usage(path.parent).free
    if free < needed:
        raise InputError(
            f"the codes need {needed >> 20} MiB of disk while they are written, {free >> 20} MiB are free."
        )
