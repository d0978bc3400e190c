"""Pallas kernels for GPUs (Triton): one program per row, atoms gathered by pointer, Gram matrix in registers.

Sizes are padded to powers of two and masked: an unused slot reads nothing and is a row of zeros. Products of float32
are three products of TF32, with an error close to that of float32; those of bfloat16 are exact, and summed in float32.

Since 0.11, jax warns that Pallas will drop Triton in favour of Mosaic GPU, which needs warp groups and barriers laid
out by hand, and so a GPU to test them on.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu

from jaxsae._core.linalg import EXACT, divide
from jaxsae.least_squares import problems
from jaxsae.least_squares.kernels import fista
from jaxsae.sharding import varying_as

_TILE = 128  # most rows and columns of the Gram matrix in one program


def _power_of_two(n: int, least: int) -> int:
    return max(least, 1 << (n - 1).bit_length())


def _check(*arrays) -> None:
    for x in arrays:
        if x.dtype not in (jnp.float32, jnp.bfloat16, jnp.float16):
            raise NotImplementedError(f"the GPU kernels take float32, bfloat16 and float16, not {x.dtype}")


def _precision(dtype, interpret: Any):
    if dtype != jnp.float32:
        return None
    return EXACT if interpret else jax.lax.DotAlgorithmPreset.TF32_TF32_F32_X3  # no CPU has TF32


def _slots(indices_ref, row, first, K: int, k: int, m: int):
    """Indices of the slots `first … first + K − 1`, and which of them are in use."""
    slot = first + jnp.arange(K)
    index = plgpu.load(indices_ref.at[row, slot], mask=slot < k, other=m)
    used = (index >= 0) & (index < m)
    return jnp.where(used, index, 0), used


def _atoms(D_ref, slots, columns):
    """Atoms `[K bd]`, with zeros for unused slots and columns beyond the last."""
    index, used = slots
    mask = used[:, None] & (columns < D_ref.shape[1])[None, :]
    return plgpu.load(D_ref.at[index[:, None], columns[None, :]], mask=mask, other=0.0)


def _row(ref, row, columns):
    return plgpu.load(ref.at[row, columns], mask=columns < ref.shape[1], other=0.0).astype(jnp.float32)


def _dot(a, b, precision):
    contract = (((1,), (1,)), ((), ()))
    return jax.lax.dot_general(a, b, contract, precision=precision, preferred_element_type=jnp.float32)


def _products(D_ref, y_ref, row, slots, others, *, block: int, precision: Any, scale: Any = 1.0):
    """Products of a row's atoms with `others` `[K K]` (None: with themselves) and with its scaled target `[K]`."""

    def add(step, carry):
        G, c = carry
        columns = step * block + jnp.arange(block)
        atoms = _atoms(D_ref, slots, columns)
        right = atoms if others is None else _atoms(D_ref, others, columns)
        y = _row(y_ref, row, columns) * scale
        return G + _dot(atoms, right, precision), c + jnp.sum(atoms.astype(jnp.float32) * y[None, :], axis=1)

    K = slots[0].size
    zeros = jnp.zeros((K, K), jnp.float32), jnp.zeros(K, jnp.float32)
    return jax.lax.fori_loop(0, pl.cdiv(D_ref.shape[1], block), add, zeros)


def _call(name: str, kernel, grid, inputs, outputs, *, warps: int, stages: int, interpret: Any, **options):
    """Run a kernel; `outputs` are pairs of shape and dtype."""
    return pl.pallas_call(
        kernel,
        grid=grid,
        out_shape=[varying_as(inputs, shape, dtype) for shape, dtype in outputs],
        compiler_params=None if interpret else plgpu.CompilerParams(num_warps=warps, num_stages=stages),
        interpret=bool(interpret),
        name=name,
        **options,
    )(*inputs)


def gather_gram(D, indices, y, *, block: int = 32, warps: int = 4, stages: int = 3, interpret: Any = False):
    """`G [n k k]` and `c [n k]` of `n` rows, with one program per tile of `G`."""
    (n, k), m = indices.shape, len(D)
    _check(D, y)
    if D.dtype != jnp.float32:
        y = y.astype(jnp.float32)
    T = min(_power_of_two(k, 16), _TILE)
    tiles = pl.cdiv(k, T)
    precision = _precision(D.dtype, interpret)

    def kernel(indices_ref, D_ref, y_ref, gram_ref, c_ref):
        row, top, left = pl.program_id(0), pl.program_id(1) * T, pl.program_id(2) * T
        slots = _slots(indices_ref, row, top, T, k, m)
        others = None if tiles == 1 else _slots(indices_ref, row, left, T, k, m)
        G, c = _products(D_ref, y_ref, row, slots, others, block=block, precision=precision)
        i, j = top + jnp.arange(T), left + jnp.arange(T)
        plgpu.store(gram_ref.at[row, i[:, None], j[None, :]], G, mask=(i < k)[:, None] & (j < k)[None, :])
        plgpu.store(c_ref.at[row, i], c, mask=(i < k) & (left == 0))

    outputs = [((n, k, k), jnp.float32), ((n, k), jnp.float32)]
    options = {"warps": warps, "stages": stages, "interpret": interpret}
    return _call("gather_gram", kernel, (n, tiles, tiles), (indices, D, y), outputs, **options)


def gather_decode(
    D, indices, values, *, block: int = 128, slots: int = 32, warps: int = 4, stages: int = 3, interpret: Any = False
):
    """`Σᵢ valuesᵢ D[indicesᵢ]` `[n d]` in float32, with one program per row and block of columns."""
    (n, k), (m, d) = indices.shape, D.shape
    _check(D, values)
    K = min(_power_of_two(k, 1), slots)
    block = min(block, _power_of_two(d, 16))

    def kernel(indices_ref, values_ref, D_ref, out_ref):
        row, columns = pl.program_id(0), pl.program_id(1) * block + jnp.arange(block)

        def add(step, total):
            index, used = _slots(indices_ref, row, step * K, K, k, m)
            value = plgpu.load(values_ref.at[row, jnp.minimum(step * K + jnp.arange(K), k - 1)], mask=used, other=0.0)
            atoms = _atoms(D_ref, (index, used), columns).astype(jnp.float32)
            return total + jnp.sum(value.astype(jnp.float32)[:, None] * atoms, axis=0)

        total = jax.lax.fori_loop(0, pl.cdiv(k, K), add, jnp.zeros(block, jnp.float32))
        plgpu.store(out_ref.at[row, columns], total, mask=columns < d)

    grid, outputs = (n, pl.cdiv(d, block)), [((n, d), jnp.float32)]
    options = {"warps": warps, "stages": stages, "interpret": interpret}
    return _call("gather_decode", kernel, grid, (indices, values, D), outputs, **options)[0]


def _solve_row(
    indices_ref, D_ref, y_ref, start_ref, target_ref, numbers_ref, max_steps_ref,
    x_ref, square_ref, kkt_ref, steps_ref, warm_started_ref, *, K: int, k: int, nonnegative: bool, **options: Any,
):  # fmt: skip
    row, slot = pl.program_id(0), jnp.arange(K)
    index, on = _slots(indices_ref, row, 0, K, k, D_ref.shape[0])
    scale, y_norm, ridge = target_ref[row, 0], target_ref[row, 1], numbers_ref[0]
    G, c = _products(D_ref, y_ref, row, (index, on), None, scale=scale, **options)
    diagonal = slot[:, None] == slot[None, :]
    squares = jnp.sum(jnp.where(diagonal, G, 0.0), axis=1)
    norm, weight = problems.lengths(squares, on, ridge, jnp.max)
    both = on[:, None] & on[None, :]
    G = divide(jnp.where(both, G, 0.0) + jnp.where(diagonal & both, ridge, 0.0), norm[:, None] * norm[None, :])
    start = plgpu.load(start_ref.at[row, jnp.minimum(slot, k - 1)], mask=on, other=0.0) * norm
    space = fista.Space(
        matvec=lambda v: jnp.sum(G * v[None, :], axis=1),
        total=jnp.sum,
        largest=jnp.max,
        any=lambda running: running > 0,
        slot=slot.astype(jnp.float32),
    )
    x, kkt, steps, warm_started = fista.solve(
        *(space, jnp.sum(G * G, axis=1), divide(c, norm * y_norm), weight, start),
        tol=numbers_ref[1],
        max_steps=max_steps_ref[0],
        nonnegative=nonnegative,
    )
    plgpu.store(x_ref.at[row, slot], x, mask=slot < k)
    plgpu.store(square_ref.at[row, slot], squares, mask=slot < k)
    kkt_ref[row], steps_ref[row] = kkt, steps
    warm_started_ref[row] = warm_started.astype(jnp.int32)


def solve(
    D, indices, y, y_scale, y_norm, z0, ridge, tol, max_steps,
    *, nonnegative: bool, block: int = 32, warps: int | None = None, stages: int = 3, interpret: Any = False,
):  # fmt: skip
    """Gather, Gram matrix and FISTA for `n` rows, one program per row; `problems.scaled` gives `y_scale` and `y_norm`.

    Returns unit-free values, squared norms of the atoms, which rows started at `z0`, KKT residuals and steps.
    """
    n, k = indices.shape
    _check(D, y)
    K = _power_of_two(k, 16)
    if K > _TILE:
        raise NotImplementedError(f"the Gram matrix of {k} atoms does not fit into registers; at most {_TILE} do")
    start = divide(divide(z0.astype(jnp.float32), y_norm), y_scale)
    target = jnp.concatenate([divide(1.0, y_scale), y_norm], axis=1)
    numbers = jnp.stack([jnp.asarray(x, jnp.float32) for x in (ridge, tol)])
    max_steps = jnp.asarray(max_steps, jnp.int32).reshape(1)
    options = {"K": K, "k": k, "nonnegative": nonnegative, "block": block, "precision": _precision(D.dtype, interpret)}
    kernel, inputs = functools.partial(_solve_row, **options), (indices, D, y, start, target, numbers, max_steps)
    outputs = [((n, k), jnp.float32)] * 2 + [((n,), jnp.float32), ((n,), jnp.int32), ((n,), jnp.int32)]
    options = {"warps": warps or (8 if K == _TILE else 4), "stages": stages, "interpret": interpret}
    x, square, kkt, steps, warm_started = _call("refit_fused", kernel, (n,), inputs, outputs, **options)
    return x, square, warm_started > 0, kkt, steps


def scatter_sorted(latents, rows, left, right, *, m: int, block: int = 256, warps: int = 4, interpret: Any = False):
    """`[m d]`, the sum of `left · right[row]` over the places of each latent.

    The program at the first place of a latent sums over all its places and writes one row, without atomics and in a
    fixed order.
    """
    (N, r), (_, _, d) = left.shape, right.shape
    _check(left, right)
    block = min(block, _power_of_two(d, 16))
    zeros = jnp.zeros((m, d), jnp.float32)

    def kernel(latents_ref, rows_ref, left_ref, right_ref, zeros_ref, out_ref):
        at, columns = pl.program_id(0), pl.program_id(1) * block + jnp.arange(block)
        latent = latents_ref[at]
        first = ((at == 0) | (latents_ref[jnp.maximum(at - 1, 0)] != latent)) & (latent < m)

        def add(carry):
            place, total, _ = carry
            for j in range(r):
                target = right_ref.at[rows_ref[place], j, columns]
                target = plgpu.load(target, mask=columns < d, other=0.0)
                total = total + left_ref[place, j] * target.astype(jnp.float32)
            following = jnp.where(place + 1 < N, latents_ref[jnp.minimum(place + 1, N - 1)], m)
            return place + 1, total, following == latent

        carry = (at, jnp.zeros(block, jnp.float32), first)
        _, total, _ = jax.lax.while_loop(lambda carry: carry[2], add, carry)
        plgpu.store(out_ref.at[jnp.minimum(latent, m - 1), columns], total, mask=first & (columns < d))

    grid, inputs, outputs = (N, pl.cdiv(d, block)), (latents, rows, left, right, zeros), [((m, d), jnp.float32)]
    options = {"warps": warps, "stages": 1, "interpret": interpret, "input_output_aliases": {4: 0}}
    return _call("scatter_rows", kernel, grid, inputs, outputs, **options)[0]
