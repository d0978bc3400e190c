"""Shared parts of the TPU kernels: fetching rows from HBM during computation, and the memory that takes."""

import math
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from jaxsae._core.linalg import EXACT

LANES = 128
VMEM = 54 << 20  # bytes that a kernel may plan with; v5e, v5p and v6e have at least 64 MiB a core
SMEM = 1 << 19


def round_up(n: int, to: int) -> int:
    """The next multiple of a number."""
    return math.ceil(n / to) * to


class Fetch:
    """Copies of rows of an array `[n d]` in HBM into double buffers in VMEM."""

    def __init__(self, source, buffers, semaphores):  # noqa: D107
        self.packed = source.dtype in (jnp.bfloat16, jnp.int32)
        self.source = source.bitcast(jnp.int32) if source.dtype == jnp.bfloat16 else source
        self.count = self.source.shape[0] * (2 if self.packed else 1)
        self.buffers, self.semaphores = buffers, semaphores

    def copy(self, row, at, slot):
        """The copy of one row to one place of a slot, to start or to wait for."""
        source = self.source.at[pl.ds(row // 2 if self.packed else row, 1)]
        return pltpu.make_async_copy(source, self.buffers.at[slot, pl.ds(at, 1)], self.semaphores.at[slot])

    def read(self, row, at, slot):
        """One row in float32 `[1 d]`, after its copy has finished."""
        raw = self.buffers[slot, pl.ds(at, 1), :]
        if not self.packed:
            return raw
        bits = jnp.where(row % 2 == 1, raw, raw << 16) & -65536
        return jax.lax.bitcast_convert_type(bits, jnp.float32)


def viewed(x, interpret: Any):
    """An array as passed to the kernel: the interpreter cannot bitcast a reference."""
    if not interpret or x.dtype != jnp.bfloat16:
        return x
    pairs = jnp.swapaxes(x.reshape(-1, 2, x.shape[1]), 1, 2)
    return jax.lax.bitcast_convert_type(pairs, jnp.int32)


def buffer_dtype(dtype) -> Any:
    """The dtype of buffered rows."""
    return jnp.int32 if dtype == jnp.bfloat16 else dtype


def for_each(count, f) -> None:
    """Run `f(i)` for `i < count`."""

    def body(i, carry):
        f(i)
        return carry

    jax.lax.fori_loop(0, count, body, 0)


def pipeline(groups: int, each, work) -> None:
    """Start the copies of the next group, wait for this one's, and work on it, for each group in turn.

    Args:
      groups: number of groups.
      each: `each(group, slot, act)` calls `act(copy)` for every copy of a group.
      work: `work(group, slot)`.
    """
    each(0, 0, lambda copy: copy.start())

    def body(group):
        slot = group % 2

        @pl.when(group + 1 < groups)
        def _():
            each(group + 1, 1 - slot, lambda copy: copy.start())

        each(group, slot, lambda copy: copy.wait())
        work(group, slot)

    for_each(groups, body)


def params(vmem: int):
    """The compiler's parameters for a kernel that needs `vmem` bytes of VMEM."""
    return pltpu.CompilerParams(dimension_semantics=("parallel",), vmem_limit_bytes=max(16 << 20, vmem + (8 << 20)))


def check(D, vmem: int, smem: int, *, y: Any = None) -> None:
    """Raise if a kernel does not apply."""
    for x in (D,) if y is None else (D, y):
        if x.dtype not in (jnp.float32, jnp.bfloat16):
            raise NotImplementedError(f"the TPU kernels take float32 and bfloat16, not {x.dtype}")
    if D.dtype == jnp.bfloat16 and D.shape[0] % 2:
        raise NotImplementedError(f"the TPU kernels read bfloat16 atoms in pairs, and {D.shape[0]} is odd")
    if vmem > VMEM or smem > SMEM:
        raise NotImplementedError(f"the kernel would need {vmem} bytes of VMEM and {smem} of SMEM")


class Group:
    """Samples whose atoms are stacked in a buffer, so that one product fills the MXU.

    The buffer holds `P` samples of `kp` rows each, then `P` targets in 8 rows.
    """

    def __init__(self, k: int, most: int = 8):  # noqa: D107
        self.k, self.kp = k, round_up(k, 8)
        self.P = max(1, min(most, LANES // self.kp))
        self.R = self.P * self.kp

    def vmem(self, d: int) -> int:
        """Bytes of `scratch_shapes`, and of the other values of a product."""
        return (4 * self.R + 40) * round_up(d, LANES) * 4 + 4 * (self.R + 8) * round_up(self.R, LANES) * 4

    def scratch_shapes(self, D, y):
        """Two slots of atoms and of targets, a buffer in float32, and their semaphores."""
        d = D.shape[1]
        return [
            pltpu.VMEM((2, self.R, d), buffer_dtype(D.dtype)),
            pltpu.VMEM((2, 8, d), buffer_dtype(y.dtype)),
            pltpu.VMEM((self.R + 8, d), jnp.float32),
            pltpu.SemaphoreType.DMA((2,)),
            pltpu.SemaphoreType.DMA((2,)),
        ]

    def products(self, D_ref, y_ref, buffers, sample, first_row, index, groups, emit, scale=None) -> None:
        """`emit(group, AAᵀ [R + 8, R])` for each group; rows `R + p` are the targets' products with all atoms.

        Args:
          D_ref: the dictionary, in HBM.
          y_ref: targets, in HBM.
          buffers: as in `scratch_shapes`.
          sample: `(group, p) -> ` the index of a sample in the block.
          first_row: the block's first row of `y`.
          index: `(sample, i) -> ` the index of its slot `i`.
          groups: number of groups.
          emit: called with the products.
          scale: `sample -> ` factor of its target.
        """
        atoms_buffer, y_buffer, work, atoms_sem, y_sem = buffers
        atoms, targets = Fetch(D_ref, atoms_buffer, atoms_sem), Fetch(y_ref, y_buffer, y_sem)

        def each(group, slot, act):
            for p in range(self.P):
                at = sample(group, p)

                def one(i, p=p, at=at):
                    row = index(at, i)

                    @pl.when((row >= 0) & (row < atoms.count))
                    def _():
                        act(atoms.copy(row, p * self.kp + i, slot))

                for_each(self.k, one)

                @pl.when(first_row + at < targets.count)
                def _(p=p, at=at):
                    act(targets.copy(first_row + at, p, slot))

        def multiply(group, slot):
            for p in range(self.P):
                at = sample(group, p)
                if atoms.packed:

                    def one(i, p=p, at=at):
                        place = p * self.kp + i
                        work[pl.ds(place, 1), :] = atoms.read(index(at, i), place, slot)

                    for_each(self.k, one)
                target = targets.read(first_row + at, p, slot)
                work[pl.ds(self.R + p, 1), :] = target if scale is None else target * scale(at)
            if not atoms.packed:
                work[pl.ds(0, self.R), :] = atoms_buffer[slot]
            both = work[...]
            contract = (((1,), (1,)), ((), ()))
            left, how = work[pl.ds(0, self.R), :], {"precision": EXACT, "preferred_element_type": jnp.float32}
            emit(group, jax.lax.dot_general(both, left, contract, **how))

        pipeline(groups, each, multiply)
