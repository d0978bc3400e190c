"""Pallas kernels for TPUs (Mosaic): one DMA per atom from HBM, two groups in flight, Gram matrices on the MXU.

Indices are in scalar memory; each slot in use starts one DMA of its atom, and the atoms of the next group of rows are
fetched while the current one is processed. Unused slots start none. Old contents of a buffer, including NaN, are masked
after the product, since a row of `A` affects only its own row and column of `AAᵀ`.

A TPU stores 16-bit rows in pairs, so that a DMA reads at least a pair; the half is selected in VMEM. A bfloat16
dictionary therefore costs as many bytes as a float32 one, and needs an even number of atoms.
"""

import dataclasses
import functools
import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from jaxsae._core.chunking import pad_rows
from jaxsae._core.linalg import divide
from jaxsae.least_squares import problems
from jaxsae.least_squares.kernels import fista, mosaic
from jaxsae.least_squares.kernels.mosaic import LANES, for_each, round_up
from jaxsae.sharding import varying_as

_HBM = pl.BlockSpec(memory_space=pl.ANY)
_total, _largest = (functools.partial(f, axis=0, keepdims=True) for f in (jnp.sum, jnp.max))  # over slots
_RING = 4  # sums of `scatter_sorted`: one in progress, the others being written


def _scalars(samples: int, k: int) -> pl.BlockSpec:
    return pl.BlockSpec((samples, k), lambda i: (i, 0), memory_space=pltpu.SMEM)


def gather_gram(D, indices, y, *, samples: int = 32, interpret: Any = False):
    """`G [n k k]` and `c [n k]` of `n` rows; unused slots hold arbitrary values, to be masked."""
    (n, k), (m, d), y = indices.shape, D.shape, _even(y)
    group = mosaic.Group(k)
    least = math.lcm(8, group.P)
    samples = round_up(min(samples, n), least)

    def needed(samples):
        return group.vmem(d) + 2 * samples * (group.kp + 8) * round_up(k, LANES) * 4

    while samples > least and needed(samples) > mosaic.VMEM // 2:
        samples = round_up(samples // 2, least)
    mosaic.check(D, needed(samples), 2 * samples * round_up(k, LANES) * 4, y=y)
    n_padded = round_up(n, samples)

    def kernel(indices_ref, D_ref, y_ref, gram_ref, c_ref, *buffers):
        def emit(g, products):
            for p in range(group.P):
                at, first = g * group.P + p, p * group.kp
                gram_ref[at] = products[first : first + k, first : first + k]
                c_ref[pl.ds(at, 1), :] = products[group.R + p : group.R + p + 1, first : first + k]

        group.products(
            *(D_ref, y_ref, buffers),
            sample=lambda g, p: g * group.P + p,
            first_row=pl.program_id(0) * samples,
            index=lambda at, i: indices_ref[at, i],
            groups=samples // group.P,
            emit=emit,
        )

    G, c = pl.pallas_call(
        kernel,
        grid=(n_padded // samples,),
        in_specs=[_scalars(samples, k), _HBM, _HBM],
        out_specs=[pl.BlockSpec((samples, k, k), lambda i: (i, 0, 0)), pl.BlockSpec((samples, k), lambda i: (i, 0))],
        out_shape=[varying_as((indices, D, y), (n_padded, *shape), jnp.float32) for shape in ((k, k), (k,))],
        scratch_shapes=group.scratch_shapes(D, y),
        compiler_params=mosaic.params(needed(samples)),
        interpret=interpret,
        name="gather_gram",
    )(pad_rows(indices, n_padded, m), mosaic.viewed(D, interpret), mosaic.viewed(y, interpret))
    return G[:n], c[:n]


def gather_decode(D, indices, values, *, samples: int = 128, interpret: Any = False):
    """`Σᵢ valuesᵢ D[indicesᵢ]` `[n d]` in float32; unused slots are ignored, whatever their value."""
    (n, k), (m, d) = indices.shape, D.shape
    kp, wide, width = round_up(k, 8), round_up(d, LANES), round_up(k, LANES)
    samples = min(round_up(n, 8), samples)
    while samples > 8 and (8 * samples * wide > mosaic.VMEM // 2 or 4 * samples * width * 4 > mosaic.SMEM):
        samples = round_up(samples // 2, 8)
    vmem = (3 * kp * wide + 2 * samples * wide) * 4
    mosaic.check(D, vmem, 4 * samples * width * 4)
    n_padded = round_up(n, samples)

    def kernel(indices_ref, values_ref, D_ref, out_ref, buffer, semaphores):
        atoms = mosaic.Fetch(D_ref, buffer, semaphores)
        row_of = jax.lax.broadcasted_iota(jnp.int32, (8, 1), 0)

        def used(at, i):
            row = indices_ref[at, i]
            return (row >= 0) & (row < m)

        def each(at, slot, act):
            def one(i):
                @pl.when(used(at, i))
                def _():
                    act(atoms.copy(indices_ref[at, i], i, slot))

            for_each(k, one)

        def decode(at, slot):
            def eight(tile, total):
                # Eight rows of the buffer at a time: a column of their values, which are scalars.
                column, on = jnp.zeros((8, 1), jnp.float32), jnp.zeros((8, 1), jnp.int32)
                rows = buffer[slot, pl.ds(pl.multiple_of(8 * tile, 8), 8), :]
                odd = jnp.zeros((8, 1), jnp.int32)
                for j in range(8):
                    i = jnp.minimum(8 * tile + j, k - 1)
                    here = (row_of == j) & used(at, i) & (8 * tile + j < k)
                    column = jnp.where(here, values_ref[at, i], column)
                    on = jnp.where(here, 1, on)
                    odd = jnp.where(here, indices_ref[at, i] % 2, odd)
                if atoms.packed:
                    bits = jnp.where(odd == 1, rows, rows << 16) & -65536
                    rows = jax.lax.bitcast_convert_type(bits, jnp.float32)
                return total + jnp.where(on == 1, rows * column, 0.0)

            total = jax.lax.fori_loop(0, kp // 8, eight, jnp.zeros((8, d), jnp.float32))
            out_ref[pl.ds(at, 1), :] = jnp.sum(total, axis=0, keepdims=True)

        mosaic.pipeline(samples, each, decode)

    out = pl.pallas_call(
        kernel,
        grid=(n_padded // samples,),
        in_specs=[_scalars(samples, k), _scalars(samples, k), _HBM],
        out_specs=pl.BlockSpec((samples, d), lambda i: (i, 0)),
        out_shape=varying_as((indices, values, D), (n_padded, d), jnp.float32),
        scratch_shapes=[pltpu.VMEM((2, kp, d), mosaic.buffer_dtype(D.dtype)), pltpu.SemaphoreType.DMA((2,))],
        compiler_params=mosaic.params(vmem),
        interpret=interpret,
        name="gather_decode",
    )(pad_rows(indices, n_padded, m), pad_rows(values.astype(jnp.float32), n_padded, 0), mosaic.viewed(D, interpret))
    return out[:n]


class _Block(NamedTuple):
    """The buffers of `solve` for 128 groups of rows, one per lane."""

    products: Any  # [128 · height, 128]  of a group: its Gram matrices, and below them its targets' products
    gram: Any  # [P kp kp 128]
    vector: Any  # [P kp 128]

    def row(self, r, R: int):
        """Row `r` of all groups' products, transposed: `[R 128]`."""
        return self.products[pl.ds(r, LANES, stride=R + 8), :].T[:R]

    def turn(self, group: mosaic.Group) -> None:
        """Transpose the Gram matrices so that rows are in lanes, and write their diagonals to `vector`."""
        kp = group.kp
        self.vector[...] = jnp.zeros_like(self.vector)
        slot = jax.lax.broadcasted_iota(jnp.int32, (kp, LANES), 0)
        for p in range(group.P):

            def one(i, p=p):
                turned = self.row(p * kp + i, group.R)[p * kp : (p + 1) * kp]
                self.gram[p, pl.ds(i, 1)] = turned[None]
                self.vector[p] = jnp.where(slot == i, turned, self.vector[p])

            for_each(kp, one)

    def normalise(self, p: int, on, norm, ridge):
        """Scale the Gram matrices with their ridge to a unit diagonal; return the squared norms of their columns."""
        slot = jax.lax.broadcasted_iota(jnp.int32, norm.shape, 0)
        self.vector[p] = norm

        def one(i, columns):
            norm_i = self.vector[p, pl.ds(i, 1), :]
            entries = jnp.where(on & (norm_i > 0), self.gram[p, i], 0.0) + jnp.where(on & (slot == i), ridge, 0.0)
            entries = divide(entries, norm * norm_i)
            self.gram[p, pl.ds(i, 1)] = entries[None]
            return columns + entries * entries

        return jax.lax.fori_loop(0, norm.shape[0], one, jnp.zeros_like(norm))

    def space(self, p: int, kp: int) -> fista.Space:
        """The vector operations of FISTA: vectors are `[kp 128]`, scalars of each row `[1 128]`."""

        def matvec(v):
            # Row by row of `v`, from memory: a value cannot be indexed at a place known only at run time.
            self.vector[p] = v

            def add(i, total):
                return total + self.gram[p, i] * self.vector[p, pl.ds(i, 1), :]

            return jax.lax.fori_loop(0, kp, add, jnp.zeros((kp, LANES), jnp.float32))

        return fista.Space(
            matvec=matvec,
            total=_total,
            largest=_largest,
            any=lambda running: jnp.max(running) > 0,
            slot=jax.lax.broadcasted_iota(jnp.int32, (kp, LANES), 0).astype(jnp.float32),
        )


def _solve_block(
    indices_ref, scale_ref, numbers_ref, max_steps_ref, D_ref, y_ref, used_ref, norm_ref, z0_ref,
    x_ref, square_ref, kkt_ref, steps_ref, warm_started_ref, *scratch, group: mosaic.Group, nonnegative: bool,
):  # fmt: skip
    (*buffers, products, gram, vector), (k, kp, P, R) = scratch, (group.k, group.kp, group.P, group.R)
    ridge, tol = numbers_ref[0, 0], numbers_ref[0, 1]
    block = _Block(products, gram, vector)

    def emit(g, product):
        products[pl.ds(pl.multiple_of(g * (R + 8), 8), R + 8), pl.ds(0, R)] = product

    group.products(
        *(D_ref, y_ref, buffers),
        sample=lambda g, p: p * LANES + g,
        first_row=pl.program_id(0) * P * LANES,
        index=lambda at, i: indices_ref[at, i],
        groups=LANES,
        emit=emit,
        scale=lambda at: scale_ref[0, 0, at],
    )
    block.turn(group)
    for p in range(P):
        on = _turn(used_ref, p, k, kp) > 0
        squares = jnp.where(on, vector[p], 0.0)
        norm, weight = problems.lengths(squares, on, ridge, _largest)
        columns = block.normalise(p, on, norm, ridge)
        y_norm = norm_ref[0, pl.ds(p, 1), :]
        c = divide(jnp.where(on, block.row(R + p, R)[p * kp : (p + 1) * kp], 0.0), norm * y_norm)
        start = jnp.where(on, _turn(z0_ref, p, k, kp), 0.0) * norm
        x, kkt, steps, warm_started = fista.solve(
            *(block.space(p, kp), columns, c, weight, start),
            tol=tol,
            max_steps=max_steps_ref[0, 0],
            nonnegative=nonnegative,
        )
        here = pl.ds(p * LANES, LANES)
        x_ref[here, :] = _turn_back(x, k)
        square_ref[here, :] = _turn_back(squares, k)
        kkt_ref[0, pl.ds(p, 1), :] = kkt
        steps_ref[0, pl.ds(p, 1), :] = steps
        warm_started_ref[0, pl.ds(p, 1), :] = jnp.where(warm_started, 1, 0)


def solve(D, indices, y, y_scale, y_norm, z0, ridge, tol, max_steps, *, nonnegative: bool, interpret: Any = False):
    """Gather, Gram matrix and FISTA for `n` rows in one pass; arguments and results as for `gpu.solve`.

    128 groups of rows fill a block: their Gram matrices are transposed so that rows are in lanes, where a product with
    `G` is `k²` multiplications for 128 rows at once.
    """
    (n, k), (m, d), y = indices.shape, D.shape, _even(y)
    group = mosaic.Group(k, most=4)
    P, kp, R = group.P, group.kp, group.R
    if k > LANES:
        raise NotImplementedError(f"the Gram matrices of 128 rows of {k} atoms do not fit into VMEM; at most 128 do")
    samples, height = P * LANES, R + 8
    turned = P * kp * kp * LANES * 4
    vmem = group.vmem(d) + height * LANES * LANES * 4 + turned + 10 * samples * LANES * 4 + 16 * kp * LANES * 4
    mosaic.check(D, vmem, 2 * samples * LANES * 4, y=y)
    n_padded = round_up(n, samples)
    numbers = jnp.stack([jnp.asarray(x, jnp.float32) for x in (ridge, tol)])[None]
    max_steps = jnp.asarray(max_steps, jnp.int32).reshape(1, 1)
    blocks = n_padded // samples
    indices = pad_rows(indices, n_padded, m)
    used = jnp.where(indices < m, 1.0, 0.0)
    y_scale, y_norm = (pad_rows(x, n_padded, 1)[:, 0] for x in (y_scale, y_norm))
    z0 = divide(divide(z0.astype(jnp.float32), y_norm[:n, None]), y_scale[:n, None])
    row_wise = pl.BlockSpec((samples, k), lambda i: (i, 0))
    number = pl.BlockSpec((1, P, LANES), lambda i: (i, 0, 0))
    scalars = pl.BlockSpec(memory_space=pltpu.SMEM)
    inputs = (
        indices, divide(1.0, y_scale).reshape(blocks, 1, samples), numbers, max_steps, mosaic.viewed(D, interpret),
        mosaic.viewed(y, interpret), used, y_norm.reshape(blocks, P, LANES), pad_rows(z0, n_padded, 0),
    )  # fmt: skip
    x, square, kkt, steps, warm_started = pl.pallas_call(
        functools.partial(_solve_block, group=group, nonnegative=nonnegative),
        grid=(blocks,),
        in_specs=[
            _scalars(samples, k),
            pl.BlockSpec((1, 1, samples), lambda i: (i, 0, 0), memory_space=pltpu.SMEM),
            *(scalars, scalars, _HBM, _HBM, row_wise, number, row_wise),
        ],
        out_specs=[row_wise, row_wise, number, number, number],
        out_shape=[
            *(varying_as(inputs, (n_padded, k), jnp.float32),) * 2,
            varying_as(inputs, (blocks, P, LANES), jnp.float32),
            *(varying_as(inputs, (blocks, P, LANES), jnp.int32),) * 2,
        ],
        scratch_shapes=[
            *group.scratch_shapes(D, y),
            pltpu.VMEM((height * LANES, LANES), jnp.float32),
            pltpu.VMEM((P, kp, kp, LANES), jnp.float32),
            pltpu.VMEM((P, kp, LANES), jnp.float32),
        ],
        compiler_params=mosaic.params(vmem),
        interpret=interpret,
        name="refit_fused",
    )(*inputs)
    kkt, steps, warm_started = (x.reshape(n_padded)[:n] for x in (kkt, steps, warm_started))
    return x[:n], square[:n], warm_started > 0, kkt, steps


def _turn(ref, p: int, k: int, kp: int):
    """Rows `p` of a block `[samples k]`, in lanes: `[kp 128]`, with zeros for slots beyond `k`."""
    rows = ref[pl.ds(p * LANES, LANES), :]
    if k < LANES:
        rows = jnp.concatenate([rows, jnp.zeros((LANES, LANES - k), rows.dtype)], axis=1)
    return rows.T[:kp]


def _turn_back(x, k: int):
    """The inverse of `_turn`: `[128 k]`."""
    kp = x.shape[0]
    if kp < LANES:
        x = jnp.concatenate([x, jnp.zeros((LANES - kp, LANES), x.dtype)], axis=0)
    return x.T[:, :k]


def _even(y):
    """Targets that can be read in pairs."""
    return y.astype(jnp.float32) if y.dtype == jnp.bfloat16 and y.shape[0] % 2 else y


def _scatter_block(
    latents_ref, rows_ref, left_ref, right_ref, zeros_ref, out_ref, buffer, sums, state, arriving, leaving
):
    r, entries = left_ref.shape
    m, d = out_ref.shape
    current, started = 0, 1  # of the state: the latent being summed, and the number of writes started

    @pl.when(pl.program_id(0) == 0)
    def _():
        state[current], state[started] = m, 0

    def each(group, slot, act):
        for e in range(8):
            at = 8 * group + e

            @pl.when(latents_ref[0, at] < m)
            def _(at=at, e=e):
                source = right_ref.at[pl.ds(rows_ref[0, at], 1)]
                act(pltpu.make_async_copy(source, buffer.at[slot, pl.ds(e, 1)], arriving.at[slot]))

    def write(number):
        place = number % _RING
        return pltpu.make_async_copy(sums.at[place], out_ref.at[pl.ds(state[current], 1)], leaving.at[place])

    def flush():
        @pl.when(state[current] < m)
        def _():
            write(state[started]).start()
            state[started] += 1

            @pl.when(state[started] >= _RING)
            def _():
                write(state[started]).wait()  # the previous write from that place

    def add(group, slot):
        for e in range(8):
            at = 8 * group + e
            latent = latents_ref[0, at]

            @pl.when(latent != state[current])
            def _(latent=latent):
                flush()
                state[current] = latent
                sums[state[started] % _RING] = jnp.zeros((1, d), jnp.float32)

            @pl.when(latent < m)
            def _(at=at, e=e):
                place = state[started] % _RING
                for j in range(r):
                    sums[place] += left_ref[j, at] * buffer[slot, e, pl.ds(j, 1), :]

    mosaic.pipeline(entries // 8, each, add)

    @pl.when(pl.program_id(0) == pl.num_programs(0) - 1)
    def _():
        flush()
        first = jnp.maximum(state[started] - _RING + 1, 0)
        for_each(state[started] - first, lambda i: write(first + i).wait())


def scatter_sorted(latents, rows, left, right, *, m: int, entries: int = 256, interpret: Any = False):
    """`[m d]`, the sum of `left · right[row]` over the places of each latent.

    Places are sorted by latent: a sum stays in VMEM until the latent changes, and is written once, during the next sum.
    Blocks run in order on one core, since a latent may span two of them.
    """
    (N, r), d = left.shape, right.shape[-1]
    if right.dtype not in (jnp.float32, jnp.bfloat16):
        raise NotImplementedError(f"the TPU kernels take float32 and bfloat16, not {right.dtype}")
    if r > 8:
        raise NotImplementedError(f"the kernel was made for outer products of rank 1 and 2, not {r}")
    right = right.astype(jnp.float32)
    wide = round_up(d, LANES)
    vmem = (2 * 8 * 8 + 8 * _RING + 16) * wide * 4
    mosaic.check(right, vmem, 0)
    padded = round_up(N, entries)
    latents, rows = (pad_rows(x[:, None], padded, value).reshape(1, padded) for x, value in ((latents, m), (rows, 0)))
    left = pad_rows(left.astype(jnp.float32), padded, 0).T
    block = pl.BlockSpec((1, entries), lambda i: (0, i), memory_space=pltpu.SMEM)
    params = mosaic.params(vmem)
    return pl.pallas_call(
        _scatter_block,
        grid=(padded // entries,),
        in_specs=[*(block, block), pl.BlockSpec((r, entries), lambda i: (0, i), memory_space=pltpu.SMEM), _HBM, _HBM],
        out_specs=_HBM,
        out_shape=varying_as((latents, rows, left, right), (m, d), jnp.float32),
        scratch_shapes=[
            pltpu.VMEM((2, 8, r, d), jnp.float32),
            pltpu.VMEM((_RING, 1, d), jnp.float32),
            pltpu.SMEM((2,), jnp.int32),
            pltpu.SemaphoreType.DMA((2,)),
            pltpu.SemaphoreType.DMA((_RING,)),
        ],
        input_output_aliases={4: 0},
        compiler_params=dataclasses.replace(params, dimension_semantics=("arbitrary",)),
        interpret=interpret,
        name="scatter_rows",
    )(latents, rows, left, right, jnp.zeros((m, d), jnp.float32))
