"""Pursuits: which atoms of a dictionary should represent a row, when no encoder says so?

Each function chooses at most `k` atoms a row, greedily or by thresholding, and ends in the shared `refit`:

    y ──▶ correlations D r ──▶ support ──refit──▶ SparseCode
              ▲                   │
              └──── residual ◀────┘

Atoms may have any norm: choices are made between atoms scaled to norm 1, and zero atoms (or such as are not finite) are
never chosen. Choices have no derivative; the values have that of the refit on the support chosen. A row ends when its
own rule says so, and touches no other.
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from jaxsae import gram, rows
from jaxsae.codes import SparseCode, combine
from jaxsae.linalg import divide, matmul
from jaxsae.refit import RefitInfo, Status, refit

_GRAM_BYTES = 4 << 20  # of a Gram matrix that is worth forming: more would not stay in a cache


def omp(
    D: Float[Array, "m d"],
    y: Float[Array, "*b d"],
    *,
    k: int,
    tol: float | Float[Array, "*b"] = 0.0,
    nonnegative: bool = False,
) -> tuple[SparseCode, RefitInfo]:
    """Orthogonal matching pursuit: add the atom that correlates most with the residual, refit all, repeat.

        j = argmax |⟨a_j, r⟩| / ‖a_j‖,   S ← S ∪ {j},   z_S = argmin ‖y − A_Sᵀ z‖,   r = y − A_Sᵀ z_S

    With free signs the refits are updates of a Cholesky factorisation, `A_S A_Sᵀ = LLᵀ`: with `Q = L⁻¹A_S`, the
    orthonormal atoms so far, a new atom `a` adds the row `(w, ρ)` to `L`, the row `q` to `Q`, and lowers the residual:

        w = Qa,   q = (a − Qᵀw) / ρ,   ρ = ‖a − Qᵀw‖,   r ← r − ⟨q, r⟩ q

    The same elimination, applied to `Da` and to coordinates, keeps `Dr` and the values. So with the Gram matrix `DDᵀ`
    no step costs a product with `D`; it is formed if it has 4 MiB at most and `4k ≤ d`, and else the rows of a chunk
    share one product `D r` a step. The rule asks nothing about the batch: a row's answer does not depend on it.
    Non-negative values are refitted after each choice, and an atom whose value fell to 0 keeps its slot.

    Args:
      D: dictionary `[m d]`, one atom a row, any norm.
      y: targets `[*b d]`.
      k: most atoms a row, at most `m`.
      tol: end a row when `‖r‖` is at most this, in units of `y`; a number, or `[*b]`, one for each row.
      nonnegative: values `z ≥ 0`, and choices by `⟨a_j, r⟩` itself (Bruckstein et al. 2008).

    Returns:
      The code `[*b k]`, atoms in the order in which they were chosen, and `RefitInfo`, with `steps` the number of
      atoms chosen. A row ends with fewer than `k` also if no atom correlates with what is left, to rounding.

    Raises:
      ValueError, TypeError: at trace time, if shapes or dtypes do not fit together, or `k` is not in `[1, m]`.

    Example:
      >>> import jax.numpy as jnp, jaxsae
      >>> from jaxsae import pursuit
      >>> D = jnp.array([[1.0, 0.0, 0.0], [0.0, 2.0, 0.0], [0.0, 0.6, 0.8]])
      >>> code, info = pursuit.omp(D, jnp.array([3.0, -4.0, 0.0]), k=3)
      >>> code.indices.tolist(), code.values.tolist()
      ([1, 0, 3], [-2.0, 3.0, 0.0])

    Source: Pati, Rezaiifar & Krishnaprasad (1993), "Orthogonal matching pursuit"; Rubinstein, Zibulevsky & Elad (2008),
      "Efficient implementation of the K-SVD algorithm using batch orthogonal matching pursuit"; Bruckstein, Elad &
      Zibulevsky (2008), "On the uniqueness of nonnegative sparse solutions to underdetermined systems of equations".
    """
    return _pursue(_Static("omp", k, nonnegative), D, y, tol)


def _omp(problem: "_Problem") -> "_Chosen":
    """Choose with free signs, by updates of a Cholesky factorisation.

    A row `q` of the basis is followed by `Dq`, if there is a Gram matrix, and by its coordinates in the atoms chosen; the
    residual, by the same of its own.
    """
    (m, d), k = problem.D.shape, problem.k
    precomputed = 4 * k <= d and m * m * problem.D.dtype.itemsize <= _GRAM_BYTES
    table = jnp.concatenate([problem.D, matmul(problem.D, problem.D.T)], axis=1) if precomputed else problem.D
    width = table.shape[1] + k

    def correlations(state):
        return state[:, d : d + m] if precomputed else matmul(state[:, :d], problem.D.T)

    def chunk(y, tol):
        n = len(y)
        products = matmul(y, problem.D.T) if precomputed else y[:, :0]

        def step(carry: _Greedy) -> _Greedy:
            number, state, basis, free, indices, running = carry
            score, at = _largest(jnp.where(free, jnp.abs(correlations(state)), 0))
            atom = table[at]
            w = basis[:, jnp.arange(n), d + at] if precomputed else jnp.sum(basis[:, :, :d] * atom, axis=2)
            rest = jnp.pad(atom, ((0, 0), (0, k))) + (jnp.arange(width) == width - k + number)
            rest = jax.lax.fori_loop(0, number, lambda i, rest: rest - w[i][:, None] * basis[i], rest)
            pivot = _square(rest[:, :d])
            running = running & (score > _rounding(y)) & (_square(state[:, :d]) > tol**2)
            running &= pivot > jnp.finfo(y.dtype).eps  # else it depends on the others, to rounding
            q = jnp.where(running[:, None], rest / jnp.sqrt(jnp.where(running, pivot, 1))[:, None], 0)
            state = state - jnp.sum(q[:, :d] * state[:, :d], axis=1, keepdims=True) * q
            here = running[:, None] & (jnp.arange(m) == at[:, None])
            indices = indices.at[:, number].set(jnp.where(running, at, m))
            return _Greedy(number + 1, state, basis.at[number].set(q), free & ~here, indices, running)

        start = _Greedy(
            jnp.int32(0),
            jnp.concatenate([y, products, jnp.zeros((n, k), y.dtype)], axis=1),
            jnp.zeros((k, n, width), y.dtype),
            jnp.ones((n, m), bool),
            jnp.full((n, k), m, jnp.int32),
            jnp.ones(n, bool),
        )
        end = jax.lax.while_loop(lambda carry: (carry.number < k) & jnp.any(carry.running), step, start)
        steps = jnp.sum(end.indices < m, axis=1, dtype=jnp.int32)
        return _Chosen(-end.state[:, width - k :], end.indices, steps, jnp.ones(n, bool))

    # A Gram matrix is read from the cache along with a few rows; without one, rows share the reading of the dictionary.
    return _by_chunks(chunk, problem, row_bytes=4 * (k * width + 2 * m), cpu_rows=16 if precomputed else 256)


class _Greedy(NamedTuple):
    """What greedy selections carry from step to step."""

    number: Array  # of the step
    state: Array  # [n width]  the residual and what is kept beside it
    basis: Array  # [k n width]
    free: Array  # [n m]  which atoms are not chosen yet
    indices: Array  # [n k]
    running: Array  # [n]


def _omp_nonnegative(problem: "_Problem") -> "_Chosen":
    """Choose by positive correlations, with a refit after each choice."""
    m, k = len(problem.D), problem.k

    def chunk(y, tol):
        n = len(y)

        def step(carry):
            number, r, code, free, running = carry
            score, at = _largest(jnp.where(free, matmul(r, problem.D.T), 0))
            running = running & (score > _rounding(y)) & (_square(r) > tol**2)
            indices = code.indices.at[:, number].set(jnp.where(running, at, m))
            code, r = _invert(problem, y, code.replace(indices=indices))
            return number + 1, r, code, free & (jnp.arange(m) != at[:, None]), running

        code = SparseCode(jnp.zeros((n, k), y.dtype), jnp.full((n, k), m, jnp.int32), m)
        start = jnp.int32(0), y, code, jnp.ones((n, m), bool), jnp.ones(n, bool)
        *_, code, _, _ = jax.lax.while_loop(lambda carry: (carry[0] < k) & jnp.any(carry[-1]), step, start)
        steps = jnp.sum(code.mask, axis=1, dtype=jnp.int32)
        return _Chosen(code.values, code.indices, steps, jnp.ones(n, bool))

    return _by_chunks(chunk, problem, row_bytes=4 * (2 * m + k))


# --- What all of them share


class _Static(NamedTuple):
    method: str
    k: int
    nonnegative: bool


class _Problem(NamedTuple):
    """Rows to represent, free of units: atoms and targets of norm 1, or 0 where they are zero or not finite."""

    D: Array  # [m d]
    y: Array  # [n d]
    tol: Array  # [n]
    k: int
    nonnegative: bool


class _Chosen(NamedTuple):
    """What a selection ends with, for `n` rows."""

    values: Array  # [n k]  for atoms of norm 1; the refit starts there
    indices: Array  # [n k]
    steps: Array  # [n]
    ended: Array  # [n]  by the method's own rule, and not at the most steps allowed


def _pursue(static: _Static, D: Array, y: Array, tol: Any) -> tuple[SparseCode, RefitInfo]:
    """Select, then refit."""
    code = _validated(D, y, static)
    tol = jnp.broadcast_to(jnp.asarray(tol, gram.accumulator(D, y)), y.shape[:-1])
    chosen, finite = _select_jitted(static, *jax.lax.stop_gradient((D, (y, tol))))
    code = code.replace(values=chosen.values.astype(code.values.dtype), indices=chosen.indices)
    code, info = refit(D, y, code, nonnegative=static.nonnegative)
    status = jnp.where(chosen.ended, info.status, jnp.maximum(info.status, Status.MAX_STEPS))
    return code, RefitInfo(
        kkt=jnp.where(finite, info.kkt, jnp.nan),
        steps=chosen.steps,
        status=jnp.where(finite, status, Status.NONFINITE).astype(jnp.int32),
    )


def _validated(D: Array, y: Array, static: _Static) -> SparseCode:
    """An empty code for these rows."""
    name, k, _ = static
    if not gram.is_array(D) or D.ndim != 2:
        raise TypeError(f"`{name}` got a dictionary of type {type(D).__name__}; pass an array of shape (m, d).")
    m = len(D)
    if not 1 <= k <= m:
        raise ValueError(f"`{name}` got k = {k} for {m} atoms; pass a k from 1 to {m}.")
    shape = (*y.shape[:-1], k)
    code = SparseCode(jnp.zeros(shape, jnp.result_type(D, y)), jnp.full(shape, m, jnp.int32), m)
    gram.validate(D, y, code, name)
    return code


@functools.partial(jax.jit, static_argnums=0)
def _select_jitted(static: _Static, D, per_row):
    return _select_folded(static)(D, per_row)


@functools.cache
def _select_folded(static: _Static):
    return rows.fold_vmap(functools.partial(_select, static))


def _select(static: _Static, D, per_row):
    """Run a method on rows free of units, and give its values theirs."""
    y, tol = per_row
    D, length, largest = _unit(D.astype(tol.dtype))
    finite = jnp.isfinite(y).all(-1)
    batch, y = y.shape[:-1], y.reshape(-1, y.shape[-1]).astype(tol.dtype)
    y, y_length, y_largest = _unit(y)
    tol = divide(divide(tol.reshape(-1), y_largest), y_length)
    chosen = _METHODS[static.method, static.nonnegative](_Problem(D, y, tol, static.k, static.nonnegative))
    size, unit = (x.at[chosen.indices].get(mode="fill", fill_value=0) for x in (length, largest))
    values = divide(chosen.values * y_length[:, None], size) * divide(y_largest[:, None], unit)
    chosen = chosen._replace(values=values)
    return jax.tree.map(lambda x: x.reshape(*batch, *x.shape[1:]), chosen), finite


def _unit(x: Array) -> tuple[Array, Array, Array]:
    """Rows of norm 1 and the two numbers `[n]` they were divided by; those that are zero or not finite become 0."""
    x = jnp.where(jnp.isfinite(x).all(1, keepdims=True), x, 0)
    largest = jnp.max(jnp.abs(x), axis=1, initial=0)
    x = divide(x, largest[:, None])
    length = jnp.linalg.norm(x, axis=1)
    return divide(x, length[:, None]), length, largest


def _by_chunks(chunk: Callable, problem: _Problem, *, row_bytes: int, cpu_rows: int = 256) -> Any:
    y, tol = problem.y, problem.tol
    return rows.map_chunks(chunk, y, tol, batch=tol.shape, row_bytes=row_bytes, cpu_rows=cpu_rows)


def _invert(problem: _Problem, y: Array, code: SparseCode) -> tuple[SparseCode, Array]:
    """The best values on a support, and the residual that they leave."""
    code, _ = refit(problem.D, y, code, nonnegative=problem.nonnegative)
    return code, y - combine(problem.D, code)


def _largest(x: Array) -> tuple[Array, Array]:
    """The largest of each row, and the first place where it is: `argmax` on XLA's CPU backend takes four times as long."""
    most = jnp.max(x, axis=1)
    m = x.shape[1]
    return most, jnp.min(jnp.where(x == most[:, None], jnp.arange(m), m - 1), axis=1).astype(jnp.int32)


def _square(x: Array) -> Array:
    return jnp.sum(x * x, axis=1)


def _rounding(y: Array) -> float:
    """Correlations, of atoms and targets of norm 1, that may be nothing but rounding."""
    return 32 * float(jnp.finfo(y.dtype).eps)


_METHODS: dict[tuple[str, bool], Callable[[_Problem], _Chosen]] = {
    ("omp", False): _omp,
    ("omp", True): _omp_nonnegative,
}
