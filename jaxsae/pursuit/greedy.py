"""Greedy pursuits: one atom at a time, each chosen by its correlation with the residual of the others.

Atoms may have any norm: the selection scales them to norm 1, and never chooses zero atoms. The selection has no
derivative; the values have that of the refit on the selected support. Rows stop independently. A row with NaN or Inf
gets an empty code and the status `NONFINITE`, as do all rows if an atom has them.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from jaxsae._core.linalg import EXACT, matmul, sq_norm
from jaxsae.codes import SparseCode
from jaxsae.least_squares import problems, solvers
from jaxsae.least_squares.outcome import RefitInfo
from jaxsae.pursuit import selection
from jaxsae.pursuit.atoms import Searchable, best, largest, row_bytes
from jaxsae.pursuit.selection import Chosen, Method, Problem, pursue

_IN_CACHE = 1 << 14  # numbers of an array of correlations that stays in the cache beside a Gram matrix


def omp(
    D: Float[Array, "m d"] | np.memmap | Searchable,
    y: Float[Array, "*b d"],
    *,
    k: int,
    tol: float | Float[Array, "*b"] = 0.0,
    max_atoms: Int[Array, "*b"] | None = None,
    nonnegative: bool = False,
    mask: Bool[Array, "*b d"] | None = None,
) -> tuple[SparseCode, RefitInfo]:
    """Orthogonal matching pursuit: add the atom that correlates most with the residual, refit all, repeat.

        j = argmax |⟨a_j, r⟩| / ‖a_j‖,   S ← S ∪ {j},   z_S = argmin ‖y − A_Sᵀ z‖,   r = y − A_Sᵀ z_S

    With free signs the refits update a Cholesky factorisation, `A_S A_Sᵀ = LLᵀ`: with `Q = L⁻¹A_S`, the orthonormalised
    atoms so far, a new atom `a` adds the row `(w, ρ)` to `L` and the row `q` to `Q`, and reduces the residual:

        w = Qa,   q = (a − Qᵀw) / ρ,   ρ = ‖a − Qᵀw‖,   r ← r − ⟨q, r⟩ q

    If the Gram matrix `DDᵀ` takes at most 4 MiB and `4k ≤ d`, it replaces the atoms: `w` and `Dr = Dy − Σ z_j Da_j` are
    combinations of its rows, `ρ² = 1 − ‖w‖²` for atoms of norm 1, and values whose measured KKT residual is within the
    tolerance of the refit are final. Rows that rounding may have decided (`ρ² ≤ √eps`, or `‖r‖ ≈ tol`) are done anew
    without it. The rule does not depend on the batch, nor does the result of a row.
    Non-negative values are refitted after each selection, and an atom whose value becomes 0 keeps its slot: `code.mask`
    are the atoms chosen, `code.values > 0` those left.

    A dictionary of more than 64 MiB, such as the unembedding of a language model, is searched a block at a time, and
    needs no copy; nor does a memory map on a CPU.

    Args:
      D: dictionary `[m d]`, one atom per row, any norm; or a memory map, or a `Searchable`.
      y: targets `[*b d]`.
      k: most atoms per row, at most `m`.
      tol: stop a row when `‖r‖` is at most this, in the units of `y`; a number, or one per row `[*b]`.
      max_atoms: most atoms of each row, `[*b]`, at most `k`; `k` if None.
      nonnegative: constrain `z ≥ 0`, and select by `⟨a_j, r⟩` itself (Bruckstein et al. 2008).
      mask: the known entries of `y`; all of them if None. Atoms are selected and fitted by the known entries alone
        (Mairal, Elad & Sapiro 2008). With free signs only.

    Returns:
      The code `[*b k]`, with atoms in the order of selection, and `RefitInfo`, whose `steps` is the number of atoms
      selected. A row also stops before `k` atoms if none correlates with the residual beyond rounding.

    Raises:
      ValueError, TypeError: at trace time, if shapes or dtypes do not fit together, `k` is not in `[1, m]`, or both
        `mask` and `nonnegative` are given.

    Example:
      >>> import jax.numpy as jnp, jaxsae
      >>> from jaxsae import pursuit
      >>> D = jnp.array([[1.0, 0.0, 0.0], [0.0, 2.0, 0.0], [0.0, 0.6, 0.8]])
      >>> code, info = pursuit.omp(D, jnp.array([3.0, -4.0, 0.0]), k=3)
      >>> code.indices.tolist(), code.values.tolist()
      ([1, 0, 3], [-2.0, 3.0, 0.0])

    Source: Pati, Rezaiifar & Krishnaprasad (1993), "Orthogonal matching pursuit"; Rubinstein, Zibulevsky & Elad (2008),
      "Efficient implementation of the K-SVD algorithm using batch orthogonal matching pursuit"; Bruckstein, Elad &
      Zibulevsky (2008), "On the uniqueness of nonnegative sparse solutions to underdetermined systems of equations";
      Mairal, Elad & Sapiro (2008), "Sparse representation for color image restoration".
    """
    if mask is not None and (nonnegative or jnp.shape(mask) != jnp.shape(y)):
        raise ValueError(
            f"`omp` got a mask of shape {jnp.shape(mask)} for y of shape {jnp.shape(y)} and nonnegative={nonnegative}; "
            "pass one of the same shape, and nonnegative=False."
        )
    return pursue(_method(k, nonnegative), D, y, tol, max_atoms, mask=mask)


def chosen_by_omp(D: Array, y: Array, *, k: int, tol: Any, nonnegative: bool) -> SparseCode:
    """`omp` of rows `[n d]` without its refit: values that are optimal to the rounding of the selection."""
    return selection.select_alone(_method(k, nonnegative), D, y, tol)


def _method(k: int, nonnegative: bool) -> Method:
    if nonnegative:
        return Method("omp", _omp_nonnegative, k, nonnegative, greedy=True)
    return Method("omp", _omp, k, nonnegative, greedy=True, by_gram=_omp_by_gram)


def _omp(problem: Problem) -> Chosen:
    """Select with free signs, by updates of a Cholesky factorisation; the rows of a chunk share one product `D r`."""
    m, d, k = len(problem.D), problem.y.shape[1], problem.k

    def chunk(part: Problem) -> Chosen:
        y, n = part.y, len(part.y)
        row = jnp.arange(n, dtype=jnp.int32)
        norm = 1.0 if part.mask is None else jnp.sqrt(matmul(part.mask, problem.D.T**2))  # of the masked atoms

        def step(carry: _Greedy) -> _Greedy:
            number, r, basis, coordinates, values, free, indices, running = carry
            score, _, at = best(problem.D, r, nonnegative=False, free=free, norm=norm)
            atom = problems.take(problem.D, at[:, None], m, y.dtype)[:, 0]
            atom = atom if part.mask is None else atom * part.mask
            w = jnp.sum(basis * atom, axis=2)

            def without(i, pair):
                rest, x = pair
                return rest - w[i][:, None] * basis[i], x - w[i][:, None] * coordinates[i]

            itself = jnp.broadcast_to(jnp.arange(k, dtype=jnp.int32) == number, (n, k)).astype(y.dtype)
            rest, x = jax.lax.fori_loop(0, number, without, (atom, itself))
            pivot = sq_norm(rest)
            running &= selection.takes_another(part, number, r, score)
            running &= pivot > jnp.finfo(y.dtype).eps * sq_norm(atom)  # else it depends on the others, to rounding
            size = jnp.sqrt(jnp.where(running, pivot, 1))[:, None]
            q, x = (jnp.where(running[:, None], v / size, 0) for v in (rest, x))
            explained = jnp.sum(q * r, axis=1, keepdims=True)
            r, values = r - explained * q, values + explained * x
            basis, coordinates = basis.at[number].set(q), coordinates.at[number].set(x)
            at = jnp.where(running, at, m)
            indices, free = indices.at[:, number].set(at), free.at[row, at].set(False, mode="drop")
            return _Greedy(number + 1, r, basis, coordinates, values, free, indices, running)

        start = _Greedy(
            jnp.int32(0),
            y,
            jnp.zeros((k, n, d), y.dtype),
            jnp.zeros((k, n, k), y.dtype),
            jnp.zeros((n, k), y.dtype),
            jnp.ones((n, m), bool),
            jnp.full((n, k), m, jnp.int32),
            jnp.ones(n, bool),
        )
        end = jax.lax.while_loop(lambda carry: (carry.number < k) & jnp.any(carry.running), step, start)
        steps = jnp.sum(end.indices < m, axis=1, dtype=jnp.int32)
        return Chosen(end.values, end.indices, steps, jnp.ones(n, bool))

    return selection.by_chunks(chunk, problem, row_bytes=4 * k * (d + k) + row_bytes(problem.D, d))


class _Greedy(NamedTuple):
    """State of `_omp`."""

    number: Array  # of the step
    r: Array  # [n d]
    basis: Array  # [k n d]
    coordinates: Array  # [k n k]  of the basis, in the atoms chosen
    values: Array  # [n k]
    free: Array  # [n m]  which atoms are not chosen yet
    indices: Array  # [n k]
    running: Array  # [n]


def _omp_by_gram(problem: Problem) -> Chosen:
    """Select with free signs, from `Dy` and the Gram matrix alone.

    A row has not `ended` if rounding may have decided a step, or keeps its values from being a least-squares solution.
    """
    (m, d), k = problem.D.shape, problem.k
    gram = matmul(problem.D, problem.D.T)
    row_bytes, cpu_rows = 4 * (4 * m + 3 * k * k + d), max(16, _IN_CACHE // m // 16 * 16)
    return selection.by_chunks(functools.partial(_follow, gram), problem, row_bytes=row_bytes, cpu_rows=cpu_rows)


class _Followed(NamedTuple):
    """State of `_follow`. Slots of a row are on the first axis: what is computed for each is then a vector of rows."""

    number: Array  # of the step
    indices: Array  # [k n]
    coordinates: Array  # [k k n]  of the orthonormalised atoms, in the atoms
    values: Array  # [k n]
    left: Array  # [n]  ‖r‖²
    steps: Array  # [n]
    running: Array  # [n]
    certain: Array  # [n]  whether rounding has decided nothing so far


def _follow(gram: Array, problem: Problem) -> Chosen:
    """OMP of a few rows. A step reads `k − 1` rows of the Gram matrix for each, whatever the width."""
    (m, d), k, n = problem.D.shape, problem.k, len(problem.y)
    products, eps = matmul(problem.y, problem.D.T), float(jnp.finfo(gram.dtype).eps)
    row = jnp.arange(n, dtype=jnp.int32)

    def get(x, *at):
        return x.at[at].get(mode="promise_in_bounds")

    def step(carry: _Followed) -> _Followed:
        number, indices, coordinates, values, left, steps, running, certain = carry
        correlations = products
        for value, index in zip(values[: k - 1], indices[: k - 1], strict=True):  # unused slots have the value 0
            correlations = correlations - value[:, None] * get(gram, index)
        score, at = largest(jnp.abs(correlations))
        running &= (score > selection.rounding(gram)) & (number < problem.max_atoms)
        near = (problem.tol > 0) & (jnp.abs(left - problem.tol**2) <= 64 * eps)
        certain &= ~(running & near)
        running &= (left > problem.tol**2) & certain
        before = coordinates[: k - 1]
        w = jnp.sum(before[:, : k - 1] * get(gram, indices[: k - 1], at[None]), axis=1)
        pivot = 1 - jnp.sum(w * w, axis=0)
        certain &= ~running | (pivot > jnp.sqrt(eps))
        running &= certain
        size = jnp.sqrt(jnp.where(running, pivot, 1))
        itself = (jnp.arange(k, dtype=jnp.int32) == number).astype(gram.dtype)[:, None]
        x = jnp.where(running, (itself - jnp.sum(w[:, None] * before, axis=0)) / size, 0)
        explained = jnp.where(running, get(correlations, row, at) / size, 0)
        return _Followed(
            number + 1,
            indices.at[number].set(jnp.where(running, at, 0)),
            coordinates.at[number].set(x),
            values + explained * x,
            left - explained * explained,
            steps + jnp.int32(running),
            running,
            certain,
        )

    start = _Followed(
        jnp.int32(0),
        jnp.zeros((k, n), jnp.int32),
        jnp.zeros((k, k, n), gram.dtype),
        jnp.zeros((k, n), gram.dtype),
        jnp.ones(n, gram.dtype),
        jnp.zeros(n, jnp.int32),
        jnp.ones(n, bool),
        jnp.ones(n, bool),
    )
    end = jax.lax.while_loop(lambda carry: (carry.number < k) & jnp.any(carry.running), step, start)
    used = jnp.arange(k, dtype=jnp.int32)[:, None] < end.steps
    at = end.indices
    gradient = jnp.sum(get(gram, at[:, None], at[None]) * end.values, axis=1) - get(products, row, at)
    gradient = jnp.where(used, gradient, 0)
    tol = jnp.asarray(solvers.default(k, d).tol, gram.dtype)  # at which a refit would change nothing
    ended = end.certain & (jnp.max(jnp.abs(gradient), axis=0) <= tol)
    return Chosen(end.values.T, jnp.where(used, at, m).T, end.steps, ended, gradient.T)


def _omp_nonnegative(problem: Problem) -> Chosen:
    """Select by positive correlations, with a refit after each selection."""
    return _greedy(problem, lambda part, r, code, slot, score: selection.invert(part, code)[0], again=False)


def matching_pursuit(
    D: Float[Array, "m d"] | np.memmap | Searchable,
    y: Float[Array, "*b d"],
    *,
    k: int,
    tol: float | Float[Array, "*b"] = 0.0,
    max_atoms: Int[Array, "*b"] | None = None,
    nonnegative: bool = False,
) -> tuple[SparseCode, RefitInfo]:
    """Matching pursuit: subtract from the residual its projection onto the most correlated atom, `k` times.

        j = argmax |⟨a_j, r⟩| / ‖a_j‖,   z_j ← z_j + ⟨a_j, r⟩ / ‖a_j‖²,   r = y − Aᵀz

    The values are not refitted; use `jaxsae.refit` for that. An atom may be selected repeatedly; with non-negative
    values, only while its correlation with the residual is positive.

    Args:
      D: dictionary `[m d]`, one atom per row, any norm; or a memory map, or a `Searchable`.
      y: targets `[*b d]`.
      k: steps per row, and so most atoms; at most `m`.
      tol: stop a row when `‖r‖` is at most this, in the units of `y`; a number, or one per row `[*b]`.
      max_atoms: most atoms of each row, `[*b]`, at most `k`; `k` if None.
      nonnegative: constrain `z ≥ 0`, and select by `⟨a_j, r⟩` itself.

    Returns:
      The code `[*b k]`, and `RefitInfo` with the steps taken and the KKT residual on the support; the status is
      `MAX_STEPS` for rows that are not optimal there to 1e-5. Values have no derivative.

    Raises:
      ValueError, TypeError: at trace time, if shapes or dtypes do not fit together, or `k` is not in `[1, m]`.

    Example:
      >>> import jax.numpy as jnp, jaxsae
      >>> from jaxsae import pursuit
      >>> D = jnp.array([[1.0, 0.0], [0.6, 0.8]])
      >>> code, info = pursuit.matching_pursuit(D, jnp.array([2.0, 1.0]), k=2)
      >>> code.indices.tolist(), [round(z, 3) for z in code.values.tolist()], int(info.status)
      ([0, 1], [2.0, 0.8], 1)

    Source: Mallat & Zhang (1993), "Matching pursuits with time-frequency dictionaries".
    """
    method = Method("matching_pursuit", _matching_pursuit, k, nonnegative, refits=False, greedy=True)
    return pursue(method, D, y, tol, max_atoms)


def _matching_pursuit(problem: Problem) -> Chosen:
    def explained_by_one(part, r, code, slot, score):
        taken = jnp.arange(problem.k) == slot[:, None]
        return dataclasses.replace(code, values=code.values + jnp.where(taken, score[:, None], 0))

    return _greedy(problem, explained_by_one)


def gradient_pursuit(
    D: Float[Array, "m d"] | np.memmap | Searchable,
    y: Float[Array, "*b d"],
    *,
    k: int,
    tol: float | Float[Array, "*b"] = 0.0,
    max_atoms: Int[Array, "*b"] | None = None,
    nonnegative: bool = False,
) -> tuple[SparseCode, RefitInfo]:
    """Gradient pursuit: add the atom that correlates most with the residual, then take a gradient step on all selected.

        S ← S ∪ {argmax |⟨a_j, r⟩| / ‖a_j‖},   g = A_S r,   z_S ← z_S + (‖g‖² / ‖A_Sᵀg‖²) g,   r = y − A_Sᵀ z_S

    Atoms are scaled to norm 1. With non-negative values the step is projected, then followed as far as it lowers the
    residual. It is the inference-time optimisation that encoders of sparse autoencoders are compared with. The values
    are not refitted; use `jaxsae.refit` for that.

    Args:
      D: dictionary `[m d]`, one atom per row, any norm; or a memory map, or a `Searchable`.
      y: targets `[*b d]`.
      k: steps per row, and so most atoms; at most `m`.
      tol: stop a row when `‖r‖` is at most this, in the units of `y`; a number, or one per row `[*b]`.
      max_atoms: most atoms of each row, `[*b]`, at most `k`; `k` if None.
      nonnegative: constrain `z ≥ 0`, and select by `⟨a_j, r⟩` itself.

    Returns:
      The code `[*b k]`, and `RefitInfo` with the steps taken and the KKT residual on the support; the status is
      `MAX_STEPS` for rows that are not optimal there to 1e-5. Values have no derivative.

    Raises:
      ValueError, TypeError: at trace time, if shapes or dtypes do not fit together, or `k` is not in `[1, m]`.

    Example:
      >>> import jax.numpy as jnp, jaxsae
      >>> from jaxsae import pursuit
      >>> D = jnp.array([[1.0, 0.0], [0.6, 0.8]])
      >>> code, info = pursuit.gradient_pursuit(D, jnp.array([2.0, 1.0]), k=2, nonnegative=True)
      >>> code.indices.tolist(), [round(z, 3) for z in code.values.tolist()]
      ([0, 1], [2.0, 0.8])

    Source: Blumensath & Davies (2008), "Gradient pursuits"; Smith (2024), "Replacing SAE encoders with inference-time
      optimisation".
    """
    method = Method("gradient_pursuit", _gradient_pursuit, k, nonnegative, refits=False, greedy=True)
    return pursue(method, D, y, tol, max_atoms)


def _gradient_pursuit(problem: Problem) -> Chosen:
    def one_gradient_step(part, r, code, slot, score):
        atoms = selection.take_atoms(problem, code)
        gradient = jnp.einsum("nkd,nd->nk", atoms, r, precision=EXACT)
        if not problem.nonnegative:
            step = selection.line_search(atoms, gradient, r) * gradient
        else:
            gradient = jnp.where(code.values > 0, gradient, jnp.maximum(gradient, 0))
            step = jnp.maximum(code.values + selection.line_search(atoms, gradient, r) * gradient, 0) - code.values
            step = jnp.clip(selection.line_search(atoms, step, r), 0, 1) * step
        return dataclasses.replace(code, values=code.values + step)

    return _greedy(problem, one_gradient_step)


def _greedy(problem: Problem, revise: Callable, *, again: bool = True) -> Chosen:
    """Select by correlations one atom per step, those chosen before too if `again`, and revise the values each time."""
    m, d, k = len(problem.D), problem.y.shape[1], problem.k

    def chunk(part: Problem) -> Chosen:
        n = len(part.y)
        row = jnp.arange(n, dtype=jnp.int32)

        def step(carry):
            number, r, code, free, steps, running = carry
            score, correlation, at = best(problem.D, r, nonnegative=problem.nonnegative, free=free)
            running &= selection.takes_another(part, number, r, score)
            same = code.indices == at[:, None]
            slot = jnp.where(jnp.any(same, axis=1), jnp.argmax(same, axis=1), jnp.sum(code.mask, axis=1))
            taken = running[:, None] & (jnp.arange(k) == slot[:, None])
            code = dataclasses.replace(code, indices=jnp.where(taken, at[:, None], code.indices))
            values = jnp.where(running[:, None], revise(part, r, code, slot, correlation).values, code.values)
            code = dataclasses.replace(code, values=values)
            free = None if again else free.at[row, jnp.where(running, at, m)].set(False, mode="drop")
            return number + 1, selection.residual(part, code), code, free, steps + jnp.int32(running), running

        free = None if again else jnp.ones((n, m), bool)
        start = jnp.int32(0), part.y, selection.empty(part), free, jnp.zeros(n, jnp.int32), jnp.ones(n, bool)
        _, _, code, _, steps, _ = jax.lax.while_loop(lambda carry: (carry[0] < k) & jnp.any(carry[-1]), step, start)
        return Chosen(code.values, code.indices, steps, jnp.ones(n, bool))

    return selection.by_chunks(chunk, problem, row_bytes=row_bytes(problem.D, d) + 8 * k * d)
