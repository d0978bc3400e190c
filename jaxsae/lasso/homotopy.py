"""Homotopy for the lasso: its path, followed from one change of the support to the next.

The minimiser of `½‖y − Dᵀz‖² + λ‖z‖₁` is piecewise linear in `λ`: while its support `S` and signs `s` stay,

    z_S(λ) = G_SS⁻¹(c_S − λ s),   G = DDᵀ,  c = Dy.

The path starts at `λ_max`, where the first atom joins, and descends to the next penalty at which an atom joins or
leaves (Osborne et al. 2000; LARS with the lasso's modification). There is one step per change, which costs two products
with `D` and a rank-one update of `G_SS⁻¹`. Each step computes correlations from the residual and corrects the values,
so that errors do not accumulate. A duality gap certifies the result; rows in which ties or nearly dependent atoms leave
it too large continue with FISTA.
"""

import functools
import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array

from jaxsae import codes
from jaxsae._core import chunking
from jaxsae._core.linalg import divide, matmul, max_or_nan, power_of_two, residual, sq_spectral_norm
from jaxsae.codes import SparseCode
from jaxsae.least_squares import problems
from jaxsae.least_squares.outcome import Status
from jaxsae.least_squares.solvers import POWER_STEPS, FISTAState, fista_start, fista_step

_STARTS = 4  # runs of FISTA on a row, each from the result of the one before


class Static(NamedTuple):
    """Static arguments: the sign constraint and the number of slots per row."""

    nonnegative: bool
    capacity: int


class Solution(NamedTuple):
    """The solution of one row or several, at one penalty."""

    values: Array  # [k]
    indices: Array  # [k]  m where a slot is free
    num_dropped: Array  # number of atoms that did not fit into the slots
    steps: Array
    kkt: Array  # relative, as in `certify`; NaN where the row is not finite
    gap: Array  # relative to ½‖y‖²


def solve(static: Static, shared, per_row) -> tuple[Solution, Array]:
    """Solve each row at its own penalties, on all atoms or on a support; the solutions and their `Status`.

    Args:
      static: `Static`.
      shared: `D [m d]`, the tolerance of the gap, and the most steps.
      per_row: `y [*b d]`, penalties `[*b]`, or `[*b L]` in descending order, and supports `[*b s]` or None. With
        supports, the indices returned are positions in the support.
    """
    solved, paths, left = _follow_paths(static, shared, per_row)
    if chunking.known_false(left):
        return solved
    return _descend_rest(static, shared, (*per_row, paths, left))


class _Rows(NamedTuple):
    """The unit-free problems of `n` rows."""

    D: Array  # [m d]
    y: Array  # [n d]
    lams: Array  # [n L]
    support: Array | None  # [n s]
    possible: Array  # [n L]  whether a penalty is finite and at least 0
    valid: Array  # [n L]  and the rest too
    unit: Array  # divides D
    y_unit: Array  # [n 1]  divides y

    def of_rows(self, f, support):
        """`f(dictionary, ...)` over a chunk of rows, which share the dictionary or have their own atoms."""
        if support is None:
            return jax.vmap(functools.partial(f, self.D))
        return functools.partial(jax.vmap(f), _take(self.D, support))

    def own_bytes(self):
        """Memory of the atoms of one row."""
        return 0 if self.support is None else self.support.shape[1] * self.D.shape[1] * self.D.dtype.itemsize

    def with_units(self, solution: Solution, tol, shape: tuple[Any, ...]) -> tuple[Solution, Array]:
        """The solution `[*shape]` in the units of the data, empty where a row is not valid, and its `Status`."""
        m = len(self.D) if self.support is None else self.support.shape[1]
        values = divide(solution.values * self.y_unit[:, :, None], self.unit)
        finite = self.valid & jnp.isfinite(solution.kkt) & jnp.isfinite(values).all(-1)
        solution = Solution(
            values=jnp.where(finite[:, :, None], values, 0),
            indices=jnp.where(finite[:, :, None], solution.indices, m),
            num_dropped=jnp.where(finite, solution.num_dropped, 0),
            steps=jnp.where(finite, solution.steps, 0),
            kkt=jnp.where(finite, solution.kkt, jnp.nan),
            gap=jnp.where(finite, solution.gap, jnp.nan),
        )
        status = jnp.where(solution.gap <= tol, Status.CONVERGED, Status.MAX_STEPS)
        status = jnp.where(finite, status, jnp.where(self.possible, Status.NONFINITE, Status.INVALID))
        status = status.astype(jnp.int32)
        return jax.tree.map(lambda x: x.reshape(*shape, *x.shape[2:]), (solution, status))


def _rows(D, y, lams, support) -> _Rows:
    n, d, y_ndim = math.prod(y.shape[:-1]), y.shape[-1], y.ndim
    valid = jnp.isfinite(D).all()
    unit = power_of_two(problems.largest(D, (0, 1)))[0, 0]
    valid &= jnp.isfinite(unit)
    y, y_unit, y_norm = problems.scaled(y.reshape(n, d))
    lams = lams.reshape(n, lams.shape[-1] if lams.ndim == y_ndim else 1)
    possible = (lams >= 0) & jnp.isfinite(lams)
    valid &= jnp.isfinite(y_unit) & jnp.isfinite(y_norm) & possible
    valid &= problems.representable(divide(unit, y_unit))
    lams = jnp.minimum(divide(divide(lams, y_unit), unit), jnp.finfo(y.dtype).max)
    support = None if support is None else support.reshape(n, support.shape[-1])
    return _Rows(divide(D, unit), y, lams, support, possible, valid, unit, y_unit)


@chunking.over_rows
def _follow_paths(static: Static, shared, per_row) -> tuple[tuple[Solution, Array], Solution, Array]:
    """The result of the path alone, its solutions without units, and which of them FISTA has to continue."""
    D, tol, max_steps = shared
    shape, rows = per_row[1].shape, _rows(D, *per_row)
    (n, d), count, k = rows.y.shape, rows.lams.shape[1], static.capacity
    m = len(D) if rows.support is None else rows.support.shape[1]

    def follow(y, lams, support):
        return rows.of_rows(functools.partial(_follow, static, max_steps), support)(y, lams)

    path_bytes = (6 * k * (k + d) + 12 * m + 4 * count * k) * D.dtype.itemsize + rows.own_bytes()
    paths = chunking.map_chunks(follow, rows.y, rows.lams, rows.support, batch=(n,), row_bytes=path_bytes)
    left = ~(paths.gap <= tol) & (paths.num_dropped == 0) & rows.valid
    return rows.with_units(paths, tol, shape), *jax.tree.map(lambda x: x.reshape(*shape, *x.shape[2:]), (paths, left))


@chunking.over_rows
def _descend_rest(static: Static, shared, per_row) -> tuple[Solution, Array]:
    """The result by the path, or by FISTA where the path has not solved a row."""
    (D, tol, max_steps), (y, lams, support, paths, left) = shared, per_row
    shape, rows = lams.shape, _rows(D, y, lams, support)
    (n, d), count = rows.y.shape, rows.lams.shape[1]
    m = len(D) if support is None else support.shape[-1]
    paths, left = jax.tree.map(lambda x: x.reshape(n * count, *x.shape[len(shape) :]), (paths, left))

    def descend_rows(row, lam, solution):
        own = None if rows.support is None else rows.support.at[row].get(mode="clip")
        descend = functools.partial(_descend, static, tol, max_steps)
        return rows.of_rows(descend, own)(rows.y.at[row].get(mode="clip"), lam, solution)

    owner = jnp.repeat(jnp.arange(n), count, total_repeat_length=n * count)
    solution = chunking.revise_rows(
        *(descend_rows, left, paths, owner, rows.lams.ravel(), paths),
        row_bytes=(20 * m + 4 * d) * D.dtype.itemsize + rows.own_bytes(),
    )
    return rows.with_units(jax.tree.map(lambda x: x.reshape(n, count, *x.shape[1:]), solution), tol, shape)


def _take(D, indices):
    """Atoms, with zeros where a slot is free."""
    return D.at[indices].get(mode="fill", fill_value=0)


class _Row(NamedTuple):
    """The unit-free problem of one row."""

    D: Array  # [m d]
    y: Array  # [d]
    scale: Array  # max‖a‖ ‖y‖
    rounding: Array  # of a correlation
    static: Static


def _row(static: Static, D, y) -> _Row:
    scale = jnp.sqrt(jnp.max(jnp.sum(D * D, axis=1))) * jnp.linalg.norm(y)
    return _Row(D, y, scale, 8 * jnp.finfo(D.dtype).eps * scale, static)


# --- The path


class _PathState(NamedTuple):
    """A point of one row's path, where every atom of the support has `⟨aᵢ, r⟩ = λ signᵢ`."""

    lam: Array
    values: Array  # [k]
    indices: Array  # [k]  m where a slot is free
    signs: Array  # [k]  0 where a slot is free
    inverse: Array  # [k k]  of the Gram matrix of the support; 0 elsewhere
    status: Array  # [m]  int8: whether an atom may join
    full: Array  # whether an atom is to join but no slot is free
    breakdown: Array  # whether rounding has moved the state off the path
    steps: Array


# Status of an atom. A dependent one is in the span of the support, until an atom leaves it.
_FREE, _ACTIVE, _DEPENDENT = range(3)


def _follow(static: Static, max_steps, D, y, lams) -> Solution:
    """Follow one row's path down to each of its penalties: `[L]`."""
    row = _row(static, D, y)

    def down(state: _PathState, lam):
        def unfinished(state):
            return (state.lam > lam) & ~state.full & ~state.breakdown & (state.steps < max_steps)

        state = jax.lax.while_loop(unfinished, lambda state: _step(row, state, lam), state)
        return state, _solution_at(row, state, lam)

    return jax.lax.scan(down, _start(row), lams)[1]


def _start(row: _Row) -> _PathState:
    k, m, dtype = row.static.capacity, len(row.D), row.D.dtype
    c = matmul(row.D, row.y)
    return _PathState(
        lam=max_or_nan(c if row.static.nonnegative else jnp.abs(c)),
        values=jnp.zeros(k, dtype),
        indices=jnp.full(k, m, jnp.int32),
        signs=jnp.zeros(k, dtype),
        inverse=jnp.zeros((k, k), dtype),
        status=jnp.full(m, _FREE, jnp.int8),
        full=jnp.zeros((), bool),
        breakdown=jnp.zeros((), bool),
        steps=jnp.zeros((), jnp.int32),
    )


def _step(row: _Row, state: _PathState, target) -> _PathState:
    """Descend to the next penalty at which an atom joins the support or leaves it, or to `target`."""
    m, tiny = len(row.D), 64 * jnp.finfo(row.D.dtype).eps
    A = _take(row.D, state.indices)
    r = row.y - matmul(state.values, A)
    g_on = matmul(A, r)
    slope = matmul(state.inverse, state.signs)  # of the values, as λ falls
    g, fall = matmul(jnp.stack([r, matmul(slope, A)]), row.D.T)  # correlations, and how fast they fall
    z = _corrected(state, g_on)

    def until_joining(sign):
        gain = 1 - sign * fall  # rate at which λ approaches the correlation; 0 for a repeated atom
        able = (state.status == _FREE) & (gain > tiny)
        return jnp.where(able, jnp.maximum(state.lam - sign * g, 0) / jnp.where(able, gain, 1), jnp.inf)

    positive = until_joining(1)
    joining = positive if row.static.nonnegative else jnp.minimum(positive, until_joining(-1))
    j = jnp.argmin(joining)
    shrinks = state.signs * slope < 0
    leaving = jnp.where(shrinks, jnp.maximum(-z / jnp.where(shrinks, slope, 1), 0), jnp.inf)
    i = jnp.argmin(leaving)
    length = jnp.minimum(jnp.minimum(joining[j], leaving[i]), state.lam - target)
    reaches = length >= state.lam - target
    leaves = ~reaches & (leaving[i] <= joining[j])
    joins = ~reaches & ~leaves

    projection, distance = _project(state, A, row.D[j])
    independent = (distance > tiny * jnp.sum(row.D[j] ** 2)) & (jnp.sum(state.indices < m) < row.y.size)
    slot = jnp.argmax(state.indices == m)
    room = state.indices[slot] == m
    entering = (joins & independent & room) & (jnp.arange(z.size) == slot)
    out = leaves & (jnp.arange(z.size) == i)
    # Adding or removing a row and column changes the inverse by a matrix of rank one.
    edge = jnp.where(leaves, state.inverse[i], projection - entering.astype(z.dtype))
    weight = jnp.where(leaves, -divide(1, state.inverse[i, i]), jnp.where(entering.any(), divide(1, distance), 0))
    inverse = state.inverse + weight * edge[:, None] * edge

    chosen, gone = jnp.arange(m) == j, jnp.arange(m, dtype=jnp.int32) == state.indices[i]
    status = jnp.where(joins & chosen, jnp.where(independent, _ACTIVE, _DEPENDENT), state.status)
    status = jnp.where(leaves & (gone | (status == _DEPENDENT)), _FREE, status)
    breakdown = jnp.max(jnp.abs(g_on - state.lam * state.signs)) > 0.1 * state.lam + 4 * row.rounding
    return _PathState(
        lam=jnp.where(breakdown, state.lam, jnp.where(reaches, target, state.lam - length)),
        values=jnp.where(out, 0, z + length * slope),
        indices=jnp.where(out, m, jnp.where(entering, jnp.int32(j), state.indices)),
        signs=jnp.where(out, 0, jnp.where(entering, jnp.where(positive[j] <= joining[j], 1, -1), state.signs)),
        inverse=jnp.where(out[:, None] | out, 0, inverse),
        status=status.astype(jnp.int8),
        full=joins & independent & ~room,
        breakdown=breakdown,
        steps=state.steps + 1,
    )


def _corrected(state: _PathState, g_on):
    """Values at which the correlations of the support are `λ signs`, from those at the state's values."""
    return state.values + matmul(state.inverse, g_on - state.lam * state.signs)


def _project(state: _PathState, A, atom):
    """Coordinates `[k]` of an atom's projection onto the span of the support, and its squared distance from it."""
    x = matmul(state.inverse, matmul(A, atom))
    x = x + matmul(state.inverse, matmul(A, atom - matmul(x, A)))  # otherwise nearby atoms corrupt the inverse
    return x, jnp.sum((atom - matmul(x, A)) ** 2)


def _solution_at(row: _Row, state: _PathState, lam) -> Solution:
    A = _take(row.D, state.indices)
    z = _corrected(state, matmul(A, residual(row.y, state.values, A)))
    z = jnp.where(state.signs * z > 0, z, 0)
    kkt, gap, over = _judge(row, A, z, lam, residual(row.y, z, A))
    missing = jnp.maximum(over - jnp.sum(state.indices < len(row.D), dtype=jnp.int32), 1)
    num_dropped = jnp.where(state.full & (state.lam > lam), missing, 0)
    return Solution(z, state.indices, num_dropped, state.steps, kkt, gap)


def _judge(row: _Row, A, z, lam, r):
    """KKT residual and duality gap, both relative, of the values `z` of atoms `A`; and how many atoms exceed `λ`.

    With `u = αr`, `α` the largest in [0, 1] for which `u` is feasible to rounding (`|Du| ≤ λ`),

        P(z) − D(u) = ½(1 − α)²‖r‖² + Σᵢ |zᵢ| (λ − α gᵢ sign zᵢ),

    whose terms are non-negative, so that no nearly equal objectives are subtracted. The gap is too small only by the
    rounding of `g`, so `r` must be accurate to about machine precision: where atoms nearly cancel, the error of plain
    sums is many times the rounding of `g`.
    """
    g, g_on = matmul(row.D, r), matmul(A, r)
    g = g if row.static.nonnegative else jnp.abs(g)
    top = max_or_nan(g)
    shrunk = jnp.where(top > lam, divide(lam, top), 1)
    alpha = jnp.where(top > lam + row.rounding, shrunk, 1)
    # `shrunk`, not `alpha`, in the first term: it is small, and where `λ` is small it may be the whole gap.
    gap = 0.5 * (1 - shrunk) ** 2 * jnp.sum(r * r) + jnp.sum(jnp.abs(z) * (lam - alpha * g_on * jnp.sign(z)))
    off = max_or_nan(jnp.where(z != 0, jnp.abs(g_on - lam * jnp.sign(z)), 0))
    kkt = divide(jnp.maximum(off, top - lam), row.scale)
    gap = divide(gap, 0.5 * jnp.sum(row.y * row.y))
    return jnp.maximum(kkt, 0), jnp.maximum(gap, 0), jnp.sum(g > lam + row.rounding, dtype=jnp.int32)


# --- FISTA, for rows that the path does not solve


class _Descent(NamedTuple):
    """The state of FISTA, on `z [m]`, and the best iterate."""

    fista: FISTAState
    best: Array
    kkt: Array
    gap: Array
    steps: Array


def _descend(static: Static, tol, max_steps, D, y, lam, solution: Solution) -> Solution:
    """Continue one row with FISTA with gradient restart, on all atoms, from the end of its path or from 0.

    Residuals are updated from that of the start, and so are accurate to machine precision only near it. A row whose
    updated residual meets the tolerance, but whose recomputed one does not, starts again from there.
    """
    row = _row(static, D, y)
    return jax.lax.fori_loop(
        0, _STARTS, lambda _, solution: _descend_from(row, tol, max_steps, lam, solution), solution
    )


def _descend_from(row: _Row, tol, max_steps, lam, solution: Solution) -> Solution:
    static, D, y = row.static, row.D, row.y
    warm_start = solution.gap <= 1  # at 0 the gap and the KKT residual are at most 1
    kkt, gap = (jnp.where(warm_start, x, 1) for x in (solution.kkt, solution.gap))
    given = jnp.where(warm_start, solution.values, 0)
    start, r_start = SparseCode(given, solution.indices, len(D)).dense(), residual(y, given, _take(D, solution.indices))
    curvature = sq_spectral_norm(D, jnp.max(jnp.abs(D), axis=0), POWER_STEPS)

    def residual_at(z):
        return r_start - matmul(z - start, D)

    def gradient(z):
        return -matmul(D, residual_at(z))

    def prox(v, curvature):
        z = jnp.maximum(v - lam / curvature, 0)
        return z if static.nonnegative else z + jnp.minimum(v + lam / curvature, 0)

    def step(s: _Descent) -> _Descent:
        fista = fista_step(s.fista, prox, gradient)
        kkt, gap, _ = _judge(row, D, fista.z, lam, residual_at(fista.z))
        better = gap < s.gap
        best, kkt, gap = (jnp.where(better, *pair) for pair in ((fista.z, s.best), (kkt, s.kkt), (gap, s.gap)))
        return _Descent(fista, best, kkt, gap, s.steps + 1)

    begin = _Descent(fista_start(start, gradient(start), curvature), start, kkt, gap, solution.steps)
    end = jax.lax.while_loop(lambda s: (s.gap > tol) & (s.steps < max_steps), step, begin)
    code = codes.from_dense(end.best, static.capacity)
    # Recompute the gap: some atoms may not have fitted into the slots, and the updated residual was rounded.
    A = _take(D, code.indices)
    kkt, gap, _ = _judge(row, A, code.values, lam, residual(y, code.values, A))
    found = Solution(code.values, code.indices, code.num_dropped, end.steps, kkt, gap)
    # Without the atoms that did not fit, the code may be worse than an empty one.
    empty = jnp.zeros_like(code.values), jnp.full_like(code.indices, len(D)), code.num_dropped, end.steps
    found = _choose(gap <= 1, found, Solution(*empty, jnp.ones_like(kkt), jnp.ones_like(gap)))
    return _choose(warm_start & ~(found.gap < solution.gap), solution._replace(steps=end.steps), found)


def _choose(first, a, b):
    return jax.tree.map(lambda a, b: jnp.where(first, a, b), a, b)
