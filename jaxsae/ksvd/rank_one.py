"""One sweep of k-SVD: update each atom and its values in turn, by a rank-one fit to the residual of the others.

A fit is `fit_atom(fold, signs, atom) -> atom`: `leading` is the best fit, `power_step` one step towards it, and
`alternating` the best that alternation finds under sign constraints.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from jaxsae import codes
from jaxsae._core import sparse
from jaxsae._core.linalg import divide, matmul, max_or_nan, power_of_two
from jaxsae.codes import SparseCode
from jaxsae.least_squares import problems

_ROUNDS = 10  # of alternation, in a constrained rank-one fit


def unit(atoms):
    """Atoms scaled to norm 1, whatever their size; zero atoms stay 0."""
    atoms = divide(atoms, power_of_two(max_or_nan(jnp.abs(atoms), -1, True)))
    return divide(atoms, jnp.linalg.norm(atoms, axis=-1, keepdims=True))


class Signs(NamedTuple):
    """Which factors of a rank-one fit are constrained, `v ≥ 0` and `d ≥ 0`."""

    values: bool
    atoms: bool

    def project_values(self, v):
        """The nearest feasible values."""
        return jax.nn.relu(v) if self.values else v

    def project_atom(self, d):
        """The nearest feasible atom."""
        return jax.nn.relu(d) if self.atoms else d


class Learnable(NamedTuple):
    """Unit-free data to learn a dictionary from, in float32 or better.

    Each atom, and the signals as a whole, are scaled by powers of two, and values to match, so that squares fit.
    """

    atoms: Array  # [m d]
    signals: Array  # [n d]  0 where a row is not finite
    code: SparseCode  # without those rows, and with repeated indices merged into their first slot
    finite: Array  # [n]
    scale: Array  # of the signals

    def put(self, code: SparseCode, learnt: SparseCode) -> SparseCode:
        """The learnt code for atoms of norm 1, scaled back, in the finite rows."""
        rows, values = self.finite[:, None], (learnt.values * self.scale).astype(code.values.dtype)
        values, indices = jnp.where(rows, values, code.values), jnp.where(rows, learnt.indices, code.indices)
        return dataclasses.replace(code, values=values, indices=indices)


def learnable(D, y, code: SparseCode) -> Learnable:
    """The `Learnable` part of signals and of their code."""
    dtype, m = problems.accumulator(D, y), code.num_latents
    D, y = D.astype(dtype), y.astype(dtype)
    finite = jnp.isfinite(y).all(axis=1) & sparse.finite_rows(code.values, code.indices, m)
    known = jnp.where(finite[:, None], y, 0)
    scale = power_of_two(problems.largest(known, (0, 1)))[0, 0]
    size = power_of_two(max_or_nan(jnp.abs(D), 1))
    on = code.mask & finite[:, None]
    values, indices = jnp.where(on, code.values, 0).astype(dtype), jnp.where(on, code.indices, m)
    # The values of a zero atom do not affect the residual, but determine the direction of its update.
    values = divide(values * jnp.where(size == 0, 1, size).at[indices].get(mode="fill", fill_value=0), scale)
    same = (indices[:, :, None] == indices[:, None, :]) & on[:, None, :]
    first = on & (jnp.argmax(same, axis=2) == jnp.arange(indices.shape[1]))
    values = jnp.where(first, jnp.einsum("nij,nj->ni", same.astype(dtype), values), 0)
    learnt = SparseCode(values, jnp.where(first, indices, m), m)
    return Learnable(divide(D, size[:, None]), divide(known, scale), learnt, finite, scale)


@functools.partial(jax.jit, static_argnums=(0, 1))
def sweep(fit_atom: Callable, signs: Signs, D, y, code: SparseCode):
    """Fit each atom and its values in turn to the residual of the rows that use it.

    A fit reads these rows through `fold(f, total)`, `total ← f(total, E, v)` over blocks of them, the last one padded
    with zeros; it takes the current atom, of norm 1, and returns the new one.
    """
    m, (n, k) = len(D), code.indices.shape
    given = learnable(D, y, code)
    learnt = given.code
    size = _block_size(n * k / m)
    order = sparse.by_latent(learnt.indices, m)
    bounds = jnp.searchsorted(learnt.indices.ravel()[order], jnp.arange(m + 1, dtype=learnt.indices.dtype))
    order = jnp.pad(order, (0, size))

    def sweep(j, carry):
        D, values, residual = carry
        start, end = bounds[j], bounds[j + 1]
        atom = D[j]

        def block(number, values, residual):
            """The slots of a block (out of range for padding), the residuals without the atom, and its values."""
            at = start + number * size
            slots = jax.lax.dynamic_slice_in_dim(order, at, size)
            slots = jnp.where(at + jnp.arange(size, dtype=at.dtype) < end, slots, n * k)
            v = values.at[slots].get(mode="fill", fill_value=0)
            E = residual.at[slots // k].get(mode="fill", fill_value=0) + v[:, None] * atom
            return slots, E, v

        def fold(f, total):
            def add(number, total):
                _, E, v = block(number, values, residual)
                return f(total, E, v)

            return jax.lax.fori_loop(0, blocks, add, total)

        def put(number, carry):
            slots, E, _ = block(number, *carry)
            v = signs.project_values(matmul(E, new))
            values, residual = carry
            values = values.at[slots].set(v, mode="drop")
            return values, residual.at[slots // k].set(E - v[:, None] * new, mode="drop")

        blocks = (end - start + size - 1) // size
        new = fit_atom(fold, signs, atom)
        values, residual = jax.lax.fori_loop(0, blocks, put, (values, residual))
        return D.at[j].set(new), values, residual

    atoms = signs.project_atom(given.atoms)
    if n * k == 0:
        return unit(atoms).astype(D.dtype), code
    length = jnp.linalg.norm(atoms, axis=1)
    scale = jnp.where(length > 0, length, 1).at[learnt.indices].get(mode="fill", fill_value=0)
    carry = unit(atoms), (learnt.values * scale).ravel(), given.signals - codes.decode(atoms, learnt)
    atoms, values, _ = jax.lax.fori_loop(0, m, sweep, carry)
    return atoms.astype(D.dtype), given.put(code, dataclasses.replace(learnt, values=values.reshape(n, k)))


def _block_size(uses: float) -> int:
    """Rows of a block: large for few blocks per atom, small for little padding; at most 256, the fastest measured."""
    size = 32
    while size < min(uses / 2, 256):
        size *= 2
    return size


def leading(fold, signs: Signs, atom):
    """The leading right singular vector of `E`, signed like the atom; the atom itself if rounding makes it better."""
    covariance = fold(lambda total, E, _: total + matmul(E.T, E), jnp.zeros((atom.size, atom.size), atom.dtype))
    new = eigenvector(covariance)
    new = jnp.where(jnp.sum(new * atom) < 0, -new, new)
    gain, gain_before = (jnp.sum(x * matmul(covariance, x)) for x in (new, atom))
    return jnp.where(gain > gain_before, new, atom)


def eigenvector(covariance: Float[Array, "d d"]) -> Float[Array, " d"]:
    """The leading eigenvector of a positive semi-definite matrix, by squaring it until it has rank one.

    After `p` squarings the relative error of the eigenvalue is at most `d/(2e 2ᵖ)`, whatever the gap to the next one.
    """

    def square(carry):
        power, _, count = carry
        power = matmul(power, power)
        return divide(power, jnp.trace(power)), jnp.sum(jnp.diagonal(power)), count + 1

    # For a trace of 1, the trace of the square is 1 only at rank one.
    carry = (divide(covariance, jnp.trace(covariance)), jnp.zeros((), covariance.dtype), 0)
    power, _, _ = jax.lax.while_loop(lambda carry: (carry[1] < 1 - 1e-6) & (carry[2] < 24), square, carry)
    return unit(matmul(covariance, power[jnp.argmax(jnp.diagonal(power))]))


def power_step(fold, signs: Signs, atom):
    """`Eᵀv`, scaled to norm 1."""
    return _step_to(fold(lambda total, E, v: total + matmul(v, E), jnp.zeros_like(atom)), signs, atom)


def _step_to(direction, signs: Signs, atom):
    """A direction as an atom; the previous atom where the direction is 0 or not finite."""
    new = unit(signs.project_atom(direction))
    return jnp.where(jnp.isfinite(new).all() & (new != 0).any(), new, atom)


def alternating(fold, signs: Signs, atom):
    """Alternate `v` and `d` under constraints, from the atom or the leading singular vector, whichever is better."""
    singular = leading(fold, signs, atom)
    starts = jnp.stack([atom, *(_step_to(sign * singular, signs, atom) for sign in (1, -1))])
    gain = fold(
        lambda total, E, _: total + jnp.sum(signs.project_values(matmul(E, starts.T)) ** 2, axis=0),
        jnp.zeros(3, atom.dtype),
    )

    def alternate(_, d):
        towards = fold(lambda total, E, _: total + matmul(signs.project_values(matmul(E, d)), E), jnp.zeros_like(d))
        return _step_to(towards, signs, d)

    return jax.lax.fori_loop(0, _ROUNDS, alternate, starts[jnp.argmax(gain)])
