"""Implicit differentiation of a refit, on the active set, without unrolling a solver.

On the coordinates `F` that the constraint leaves free, the values solve `G_FF z_F = c_F`. With `r = y − Aᵀz`,

    ż_F = G_FF⁻¹ (Ȧr + A(ẏ − Ȧᵀz) − ridge̊ z)_F,

which is linear in the tangents; its transpose, with `u = G_FF⁻¹ z̄_F`, is

    ȳ = Aᵀu,   Ā = u rᵀ − z (Aᵀu)ᵀ,   ridge‾ = −uᵀz.
"""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.custom_derivatives import SymbolicZero
from jaxtyping import Array

from jaxsae._core import chunking, sparse
from jaxsae._core.linalg import EXACT, solve_on
from jaxsae._core.linear import linear
from jaxsae.least_squares import problems


class Static(NamedTuple):
    """What is known of a refit when it is compiled."""

    nonnegative: bool
    num_latents: int
    workspace_bytes: int = chunking.WORKSPACE_BYTES


class Refitted(NamedTuple):
    """A refit's arguments, the values that it returned, and which rows have a derivative."""

    dictionary: Any  # [m d], or any pytree with `take`
    y: Array  # [*b d]
    indices: Array  # [*b k]
    values: Array  # [*b k]
    ridge: Array  # in the dtype of the arithmetic
    finite: Array  # [*b]


def values_dot(static: Static, refitted: Refitted, dictionary_dot: Any, y_dot: Any, ridge_dot: Any) -> Array:
    """The tangent `[*b k]` of the values, from those of the arguments, of which some may be a `SymbolicZero`."""
    dots = {}
    leaves = jax.tree.leaves(dictionary_dot, is_leaf=_is_zero)
    moving = [dot for dot, x in zip(leaves, jax.tree.leaves(refitted.dictionary), strict=True) if problems.moves(x)]
    for name, parts in (("dictionary", moving), ("y", [y_dot]), ("ridge", [ridge_dot])):
        if not all(_is_zero(dot) for dot in parts):
            dots[name] = [jnp.zeros(dot.shape, dot.dtype) if _is_zero(dot) else dot for dot in parts]
    return linear(_forward, _backward, (static, tuple(dots)), refitted, dots)


def _is_zero(dot: Any) -> bool:
    return isinstance(dot, SymbolicZero)


class _Rows(NamedTuple):
    """A chunk of rows, with zeros where there is no derivative."""

    free: Array  # [n k]
    atoms: Array  # [n k d]
    y: Array  # [n d]
    z: Array  # [n k]

    def solve(self, ridge, rhs):
        """`G_FF⁻¹` of `rhs [n k]`."""
        return solve_free(_contract("nid,njd->nij", self.atoms, self.atoms), self.free, rhs, ridge)


_contract = functools.partial(jnp.einsum, precision=EXACT)


def _rows(static: Static, dictionary, ridge, y, indices, z, finite) -> _Rows:
    # Rows that are not finite, and padding rows, become empty supports: no derivative, no NaN.
    free = sparse.used(indices, static.num_latents) & finite[:, None] & ((z > 0) | (not static.nonnegative))
    atoms = problems.take(dictionary, indices, static.num_latents, ridge.dtype)
    y, z = (jnp.where(keep, x, 0).astype(ridge.dtype) for x, keep in ((y, finite[:, None]), (z, free)))
    return _Rows(free, jnp.where(free[:, :, None], atoms, 0), y, z)


def _scan(static: Static, chunk, carry, refitted: Refitted, *per_row):
    (k, d), dtype = (refitted.indices.shape[-1], refitted.y.shape[-1]), refitted.ridge.dtype
    return chunking.scan_chunks(
        chunk,
        carry,
        *(refitted.y, refitted.indices, refitted.values, refitted.finite, *per_row),
        batch=refitted.y.shape[:-1],
        row_bytes=2 * problems.row_bytes(k, d, dtype.itemsize),
        workspace_bytes=static.workspace_bytes,
    )


def _forward(options: tuple[Static, tuple[str, ...]], refitted: Refitted, dots: dict[str, list[Array]]) -> Array:
    """The tangent of the values, from those of the arguments that are named."""
    static, _ = options
    dictionary, ridge = refitted.dictionary, refitted.ridge

    def chunk(_, y, indices, z, finite, *y_dot):
        rows = _rows(static, dictionary, ridge, y, indices, z, finite)
        rhs, moved = jnp.zeros_like(rows.z), jnp.zeros_like(rows.y)
        for dot in y_dot:
            moved = moved + jnp.where(finite[:, None], dot, 0).astype(moved.dtype)
        if "dictionary" in dots:
            atoms_dot = problems.take_tangent(dictionary, dots["dictionary"], indices, static.num_latents, ridge.dtype)
            atoms_dot = jnp.where(rows.free[:, :, None], atoms_dot, 0)
            r = rows.y - _contract("nkd,nk->nd", rows.atoms, rows.z)
            rhs, moved = _contract("nkd,nd->nk", atoms_dot, r), moved - _contract("nkd,nk->nd", atoms_dot, rows.z)
        rhs = rhs + _contract("nkd,nd->nk", rows.atoms, moved)
        for dot in dots.get("ridge", ()):
            rhs = rhs - dot * rows.z
        return None, rows.solve(ridge, jnp.where(rows.free, rhs, 0)).astype(z.dtype)

    return _scan(static, chunk, None, refitted, *dots.get("y", ()))[1]


def _backward(options: tuple[Static, tuple[str, ...]], refitted: Refitted, values_bar: Array) -> dict[str, list[Array]]:
    """The cotangents of the arguments that are named, from that of the values."""
    static, names = options
    dictionary, ridge = refitted.dictionary, refitted.ridge
    finite = refitted.finite & jnp.isfinite(values_bar).all(-1)

    def chunk(carry, y, indices, z, finite, z_bar):
        dictionary_bar, ridge_bar = carry
        rows = _rows(static, dictionary, ridge, y, indices, z, finite)
        u = rows.solve(ridge, jnp.where(rows.free, z_bar, 0).astype(ridge.dtype))
        y_bar, x = (_contract("nkd,nk->nd", rows.atoms, v) for v in (u, rows.z))
        if dictionary_bar is not None:
            atoms_bar = u[:, :, None] * (rows.y - x)[:, None, :] - rows.z[:, :, None] * y_bar[:, None, :]
            where = indices, static.num_latents, rows.free
            dictionary_bar = problems.accumulate(dictionary_bar, dictionary, *where, atoms_bar)
        return (dictionary_bar, ridge_bar - jnp.sum(u * rows.z)), y_bar

    total = problems.zero_cotangent(dictionary, ridge.dtype) if "dictionary" in names else None
    carry = total, jnp.zeros_like(ridge)
    (total, ridge_bar), y_bar = _scan(static, chunk, carry, refitted._replace(finite=finite), values_bar)
    bars = {"y": [y_bar.astype(refitted.y.dtype)], "ridge": [ridge_bar]}
    if total is not None:
        bars["dictionary"] = problems.moving_cotangents(total, dictionary)
    return {name: bars[name] for name in names}


def solve_free(G: Array, free: Array, rhs: Array, ridge: Array | float = 0.0) -> Array:
    """Solve `(G_FF + ridge) u = rhs` for each of `n` rows; `u` is 0 off `F`, the coordinates that are `free`."""
    diagonal = jnp.diagonal(G, axis1=1, axis2=2) + ridge
    norm = jnp.sqrt(jnp.where(free & (diagonal > 0), diagonal, 1))
    eye = jnp.eye(G.shape[-1], dtype=G.dtype)
    both = free[:, :, None] & free[:, None, :]
    unit = jnp.where(eye > 0, 1, jnp.where(both, G, 0) / (norm[:, :, None] * norm[:, None, :]))
    solved = jax.lax.custom_linear_solve(
        lambda x: _contract("nij,nj->ni", unit, x),
        rhs / norm,
        lambda _, b: jax.vmap(solve_on)(unit, free, b),
        symmetric=True,
    )
    return jnp.where(free, solved / norm, 0)
