"""Implicit differentiation of a refit, on the active set, without unrolling a solver."""

from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array

from jaxsae._core import chunking, sparse
from jaxsae._core.linalg import EXACT, solve_semidefinite
from jaxsae.least_squares import problems


def backward(
    dictionary,
    y,
    indices,
    values,
    values_bar,
    ridge,
    finite,
    *,
    nonnegative: bool,
    num_latents: int,
    workspace_bytes: int,
) -> tuple[Any, Array, Array]:
    """Implicit differentiation on the active set `F`, the coordinates that the constraint leaves free.

    From `G_FF z_F = c_F`, with `u = G_FF⁻¹ z̄_F` and `r = y − Aᵀz`:  `ȳ = Aᵀu`, `Ā = u rᵀ − z (Aᵀu)ᵀ`, `ridge‾ = −uᵀz`.

    Args:
      dictionary: `[m d]`, or any pytree with `take`.
      y: targets `[*b d]`.
      indices: `[*b k]`.
      values: values that the refit returned, `[*b k]`.
      values_bar: their cotangent, `[*b k]`.
      ridge: weight of `½‖z‖²`, in the dtype of the arithmetic.
      finite: `[*b]`, the rows that have a derivative.
      nonnegative: whether the constraint was `z ≥ 0`.
      num_latents: `m`.
      workspace_bytes: most bytes that a chunk of rows may need.

    Returns:
      The cotangents of the dictionary, of `y` and of `ridge`.
    """
    k, d = indices.shape[-1], y.shape[-1]
    finite = finite & jnp.isfinite(values_bar).all(-1)

    def chunk(carry, y, indices, z, z_bar, finite):
        dictionary_bar, ridge_bar = carry
        # Rows that are not finite, and padding rows, become empty supports: no derivative, no NaN.
        free = sparse.used(indices, num_latents) & finite[:, None] & ((z > 0) | (not nonnegative))
        atoms = problems.take(dictionary, indices, num_latents, ridge.dtype)
        atoms = jnp.where(free[:, :, None], atoms, 0)
        y, z, z_bar = (
            jnp.where(keep, x, 0).astype(ridge.dtype) for x, keep in ((y, finite[:, None]), (z, free), (z_bar, free))
        )
        u = _solve_free(jnp.einsum("nid,njd->nij", atoms, atoms, precision=EXACT), free, z_bar, ridge)
        y_bar, x = (jnp.einsum("nkd,nk->nd", atoms, v, precision=EXACT) for v in (u, z))
        atoms_bar = u[:, :, None] * (y - x)[:, None, :] - z[:, :, None] * y_bar[:, None, :]
        dictionary_bar = problems.accumulate(dictionary_bar, dictionary, indices, num_latents, free, atoms_bar)
        return (dictionary_bar, ridge_bar - jnp.sum(u * z)), y_bar

    (dictionary_bar, ridge_bar), y_bar = chunking.scan_chunks(
        chunk,
        (problems.zero_cotangent(dictionary, ridge.dtype), jnp.zeros_like(ridge)),
        *(y, indices, values, values_bar, finite),
        batch=y.shape[:-1],
        row_bytes=2 * problems.row_bytes(k, d, ridge.dtype.itemsize),
        workspace_bytes=workspace_bytes,
    )
    return problems.cotangent(dictionary_bar, dictionary), y_bar.astype(y.dtype), ridge_bar


def _solve_free(G, free, rhs, ridge):
    """Solve `(G_FF + ridge) u = rhs` for each row; `u` is 0 off `F`, where G and rhs are 0."""
    diagonal = jnp.diagonal(G, axis1=1, axis2=2) + ridge
    norm = jnp.sqrt(jnp.where(free & (diagonal > 0), diagonal, 1))
    eye = jnp.eye(G.shape[-1], dtype=G.dtype)
    unit = jnp.where(eye > 0, 1, G / (norm[:, :, None] * norm[:, None, :]))
    solved = jax.vmap(solve_semidefinite)(unit, (rhs / norm)[:, :, None])[:, :, 0]
    return jnp.where(free, solved / norm, 0)
