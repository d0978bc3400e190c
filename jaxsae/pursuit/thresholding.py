"""Iterative thresholding: pursuits that revise the whole support at each step.

Each repeats `step(part, r, code) -> (code, r)` until a row converges; the code of the smallest residual is refitted.
"""

import dataclasses
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from jaxsae._core.linalg import EXACT, divide, matmul, sq_norm, sq_spectral_norm
from jaxsae.codes import SparseCode
from jaxsae.least_squares.outcome import RefitInfo
from jaxsae.pursuit import selection
from jaxsae.pursuit.selection import Chosen, Method, Problem, pursue

_SETTLED = 1e-5  # a row has converged when its residual changes by less than this, relative to `‖y‖`


def iti(
    D: Float[Array, "m d"],
    y: Float[Array, "*b d"],
    *,
    k: int,
    tol: float | Float[Array, "*b"] = 0.0,
    max_atoms: Int[Array, "*b"] | None = None,
    nonnegative: bool = False,
    false_alarm: float | Float[Array, ""] | None = None,
    relaxation: float | Float[Array, ""] = 1.0,
    max_steps: int | Array = 100,
) -> tuple[SparseCode, RefitInfo]:
    """Iterative thresholding with inversion: threshold the correlations of the current estimate, refit on the support.

        S = {j: |z + κ D(y − Dᵀz)|_j is among the k largest, and above the threshold},   z_S = argmin ‖y − A_Sᵀ z‖

    With a false-alarm rate `α` the threshold is `κ σ Φ⁻¹(1 − α/2)`, `σ = ‖y − Dᵀz‖ / √d`: correlations of random atoms
    with the residual exceed it with probability `α` (for one sign, `Φ⁻¹(1 − α)`). A row stops when its support
    repeats.

    Args:
      D: dictionary `[m d]`, one atom per row, any norm; `z` and the correlations are for atoms scaled to norm 1.
      y: targets `[*b d]`.
      k: most atoms per row, at most `m`.
      tol: stop a row when `‖r‖` is at most this, in the units of `y`; a number, or one per row `[*b]`.
      max_atoms: most atoms of each row, `[*b]`, at most `k`; `k` if None.
      nonnegative: constrain `z ≥ 0`, with a one-sided threshold.
      false_alarm: rate `α` of the threshold; None keeps the `k` largest.
      relaxation: step size `κ`; smaller ones change the support more slowly.
      max_steps: stop a row after this many steps.

    Returns:
      The code `[*b k]` of the smallest residual, and `RefitInfo` with the steps taken; the status is `MAX_STEPS` for
      rows whose support still changed.

    Raises:
      ValueError, TypeError: at trace time, if shapes or dtypes do not fit together, or `k` is not in `[1, m]`.

    Example:
      >>> import jax, jax.numpy as jnp, jaxsae
      >>> from jaxsae import pursuit
      >>> D = jax.random.normal(jax.random.key(0), (40, 20))
      >>> code, info = pursuit.iti(D, 3 * D[7] - 2 * D[30], k=2)
      >>> sorted(code.indices.tolist()), int(info.status)
      ([7, 30], 0)

    Source: Maleki (2009), "Coherence analysis of iterative thresholding algorithms"; Maleki & Donoho (2010), "Optimally
      tuned iterative reconstruction algorithms for compressed sensing"; the threshold rule is that of Donoho, Tsaig,
      Drori & Starck (2012), "Sparse solution of underdetermined linear equations by stagewise orthogonal matching
      pursuit".
    """
    options = {"false_alarm": false_alarm, "relaxation": relaxation, "max_steps": max_steps}
    return pursue(Method("iti", _iti, k, nonnegative), D, y, tol, max_atoms, options)


def _iti(problem: Problem) -> Chosen:
    alpha, relaxation = problem.options["false_alarm"], problem.options["relaxation"]

    def step(part, r, code):
        moved = code.dense() + relaxation * matmul(r, problem.D.T)
        threshold = 0.0
        if alpha is not None:
            rate = alpha if problem.nonnegative else alpha / 2
            sigma = jnp.sqrt(sq_norm(r) / r.shape[1])[:, None]
            threshold = -relaxation * sigma * jax.scipy.special.ndtri(rate)
        return selection.invert(part, selection.keep(part, moved, threshold))

    return _iterate(problem, step)


def iht(
    D: Float[Array, "m d"],
    y: Float[Array, "*b d"],
    *,
    k: int,
    tol: float | Float[Array, "*b"] = 0.0,
    max_atoms: Int[Array, "*b"] | None = None,
    nonnegative: bool = False,
    relaxation: float | Float[Array, ""] | None = None,
    max_steps: int | Array = 300,
) -> tuple[SparseCode, RefitInfo]:
    """Iterative hard thresholding: `z ← H_k(z + κ D(y − Dᵀz))`, where `H_k` keeps the `k` largest; then a refit.

    With `κ ≤ 1/‖D‖₂²` the residual never increases. A row stops when it converges.

    Args:
      D: dictionary `[m d]`, one atom per row, any norm; `z`, correlations and `‖D‖₂` are for atoms scaled to norm 1.
      y: targets `[*b d]`.
      k: most atoms per row, at most `m`.
      tol: stop a row when `‖r‖` is at most this, in the units of `y`; a number, or one per row `[*b]`.
      max_atoms: most atoms of each row, `[*b]`, at most `k`; `k` if None.
      nonnegative: constrain `z ≥ 0`.
      relaxation: step size `κ`; `1/‖D‖₂²` if None. On random atoms 0.65 recovers more (Maleki & Donoho).
      max_steps: stop a row after this many steps.

    Returns:
      The refitted code `[*b k]` of the smallest residual, and `RefitInfo` with the steps taken; the status is
      `MAX_STEPS` for rows that did not converge.

    Raises:
      ValueError, TypeError: at trace time, if shapes or dtypes do not fit together, or `k` is not in `[1, m]`.

    Example:
      >>> import jax, jax.numpy as jnp, jaxsae
      >>> from jaxsae import pursuit
      >>> D = jax.random.normal(jax.random.key(0), (40, 30))
      >>> code, info = pursuit.iht(D, 3 * D[7] - 2 * D[30], k=2, relaxation=0.65)
      >>> sorted(code.indices.tolist())
      [7, 30]

    Source: Blumensath & Davies (2009), "Iterative hard thresholding for compressed sensing".
    """
    options = {"relaxation": relaxation, "max_steps": max_steps}
    return pursue(Method("iht", _iht, k, nonnegative), D, y, tol, max_atoms, options)


def _iht(problem: Problem) -> Chosen:
    relaxation = problem.options["relaxation"]
    if relaxation is None:
        # Power iteration estimates the norm from below, hence the margin of 5%.
        start = jnp.ones(problem.D.shape[1], problem.D.dtype)
        relaxation = divide(1.0, 1.05 * sq_spectral_norm(problem.D, start, 50))

    def step(part, r, code):
        code = selection.keep(part, code.dense() + relaxation * matmul(r, problem.D.T))
        return code, selection.residual(part, code)

    return _iterate(problem, step)


def niht(
    D: Float[Array, "m d"],
    y: Float[Array, "*b d"],
    *,
    k: int,
    tol: float | Float[Array, "*b"] = 0.0,
    max_atoms: Int[Array, "*b"] | None = None,
    nonnegative: bool = False,
    max_steps: int | Array = 300,
) -> tuple[SparseCode, RefitInfo]:
    """Normalised iterative hard thresholding: `iht` with an adaptive step size per row; then a refit.

        κ = ‖g_S‖² / ‖A_Sᵀ g_S‖²,   g = D(y − Dᵀz),   z⁺ = H_k(z + κ g),

    and while the support changes and `κ > 0.99 ‖z⁺ − z‖² / ‖Dᵀ(z⁺ − z)‖²`, `κ` is divided by 1.98: the residual never
    increases, whatever the norm of `D`.

    Args:
      D: dictionary `[m d]`, one atom per row, any norm; `z` and the correlations are for atoms scaled to norm 1.
      y: targets `[*b d]`.
      k: most atoms per row, at most `m`.
      tol: stop a row when `‖r‖` is at most this, in the units of `y`; a number, or one per row `[*b]`.
      max_atoms: most atoms of each row, `[*b]`, at most `k`; `k` if None.
      nonnegative: constrain `z ≥ 0`.
      max_steps: stop a row after this many steps.

    Returns:
      The refitted code `[*b k]` of the smallest residual, and `RefitInfo` with the steps taken; the status is
      `MAX_STEPS` for rows that did not converge.

    Raises:
      ValueError, TypeError: at trace time, if shapes or dtypes do not fit together, or `k` is not in `[1, m]`.

    Example:
      >>> import jax, jax.numpy as jnp, jaxsae
      >>> from jaxsae import pursuit
      >>> D = jax.random.normal(jax.random.key(0), (40, 20))
      >>> code, info = pursuit.niht(D, 3 * D[7] - 2 * D[30], k=2)
      >>> sorted(code.indices.tolist())
      [7, 30]

    Source: Blumensath & Davies (2010), "Normalized iterative hard thresholding: guaranteed stability and performance".
    """
    return pursue(Method("niht", _niht, k, nonnegative), D, y, tol, max_atoms, {"max_steps": max_steps})


def _niht(problem: Problem) -> Chosen:
    def step(part, r, code):
        z, gradient = code.dense(), matmul(r, problem.D.T)
        # The first support is that of the largest correlations.
        start = selection.keep(part, gradient)
        indices = jnp.where(jnp.any(code.mask, axis=1, keepdims=True), code.indices, start.indices)
        support = dataclasses.replace(code, indices=indices)
        atoms = selection.take_atoms(problem, support)
        size = selection.line_search(atoms, jnp.einsum("nkd,nd->nk", atoms, r, precision=EXACT), r)

        def ahead(size):
            moved = selection.keep(part, z + size * gradient)
            return moved, selection.residual(part, moved)

        def too_long(size):
            moved, left = ahead(size)
            stays = jnp.all(jnp.any(moved.indices[:, :, None] == indices[:, None, :], axis=2) | ~moved.mask, axis=1)
            bound = 0.99 * divide(sq_norm(moved.dense() - z), sq_norm(left - r))
            return ~stays[:, None] & (size > bound[:, None]) & (bound[:, None] > 0)

        def shorten(carry):
            size, long = carry
            size = jnp.where(long, size / 1.98, size)
            return size, long & too_long(size)

        size, _ = jax.lax.while_loop(lambda carry: jnp.any(carry[1]), shorten, (size, too_long(size)))
        return ahead(size)

    return _iterate(problem, step)


def cosamp(
    D: Float[Array, "m d"],
    y: Float[Array, "*b d"],
    *,
    k: int,
    tol: float | Float[Array, "*b"] = 0.0,
    max_atoms: Int[Array, "*b"] | None = None,
    nonnegative: bool = False,
    max_steps: int | Array = 50,
) -> tuple[SparseCode, RefitInfo]:
    """Compressive sampling matching pursuit: add the `2k` atoms that correlate most, refit, keep the `k` largest.

        T = supp(z) ∪ {the 2k largest of |D(y − Dᵀz)|},   b_T = argmin ‖y − A_Tᵀ b‖,   z⁺ = H_k(b)

    A row stops when it converges; its values are then refitted.

    Args:
      D: dictionary `[m d]`, one atom per row, any norm; `z` and the correlations are for atoms scaled to norm 1.
      y: targets `[*b d]`.
      k: most atoms per row, at most `m`; the theory requires `3k ≤ d`.
      tol: stop a row when `‖r‖` is at most this, in the units of `y`; a number, or one per row `[*b]`.
      max_atoms: most atoms of each row, `[*b]`, at most `k`; `k` if None.
      nonnegative: constrain `z ≥ 0`.
      max_steps: stop a row after this many steps.

    Returns:
      The refitted code `[*b k]` of the smallest residual, and `RefitInfo` with the steps taken; the status is
      `MAX_STEPS` for rows that did not converge.

    Raises:
      ValueError, TypeError: at trace time, if shapes or dtypes do not fit together, or `k` is not in `[1, m]`.

    Example:
      >>> import jax, jax.numpy as jnp, jaxsae
      >>> from jaxsae import pursuit
      >>> D = jax.random.normal(jax.random.key(0), (40, 20))
      >>> code, info = pursuit.cosamp(D, 3 * D[7] - 2 * D[30], k=2)
      >>> sorted(code.indices.tolist()), int(info.status)
      ([7, 30], 0)

    Source: Needell & Tropp (2009), "CoSaMP: iterative signal recovery from incomplete and inaccurate samples".
    """
    return pursue(Method("cosamp", _cosamp, k, nonnegative), D, y, tol, max_atoms, {"max_steps": max_steps})


def _cosamp(problem: Problem) -> Chosen:
    m = len(problem.D)

    def step(part, r, code):
        joined = selection.keep(part, matmul(r, problem.D.T), times=2)
        known = jnp.any(joined.indices[:, :, None] == code.indices[:, None, :], axis=2)
        indices = jnp.concatenate([code.indices, jnp.where(known, m, joined.indices)], axis=1)
        values = jnp.concatenate([code.values, jnp.zeros_like(joined.values)], axis=1)
        merged, _ = selection.invert(part, SparseCode(values, indices, m))
        code = selection.keep(part, merged.dense())
        return code, selection.residual(part, code)

    return _iterate(problem, step)


def _iterate(problem: Problem, step: Callable) -> Chosen:
    """Repeat `step(part, r, code) -> (code, r)` until rows converge, and keep the code of the smallest residual."""
    (m, d), k = problem.D.shape, problem.k

    def chunk(part: Problem) -> Chosen:
        y, tol = part.y, part.tol

        def body(carry: _Iteration) -> _Iteration:
            code, r = step(part, carry.r, carry.code)
            code, r = selection.choose(carry.running, (code, r), (carry.code, carry.r))
            better = sq_norm(r) < sq_norm(carry.best_r)
            best, best_r = selection.choose(better, (code, r), (carry.best, carry.best_r))
            moves = sq_norm(r - carry.r) > _SETTLED**2
            steps = carry.steps + jnp.int32(carry.running)
            running = carry.running & moves & (sq_norm(r) > tol**2) & (steps < problem.options["max_steps"])
            return _Iteration(code, r, best, best_r, steps, running, carry.ended | (carry.running & ~moves))

        code = selection.empty(part)
        running = sq_norm(y) > tol**2
        start = _Iteration(code, y, code, y, jnp.zeros(len(y), jnp.int32), running, ~running)
        end = jax.lax.while_loop(lambda carry: jnp.any(carry.running), body, start)
        ended = end.ended | (sq_norm(end.r) <= tol**2)
        return Chosen(end.best.values, end.best.indices, end.steps, ended)

    return selection.by_chunks(chunk, problem, row_bytes=4 * (6 * m + 8 * k * d))


class _Iteration(NamedTuple):
    """State of `_iterate`."""

    code: SparseCode
    r: Array  # [n d]
    best: SparseCode
    best_r: Array  # [n d]
    steps: Array  # [n]
    running: Array  # [n]
    ended: Array  # [n]  converged
