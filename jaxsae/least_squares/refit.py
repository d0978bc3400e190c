"""Masked least squares: the best values of each row's active atoms.

For one row with dictionary rows `A = D[indices] [k d]` the refit solves

    minimise ½‖y − Aᵀz‖² + ½ ridge ‖z‖²   over z ≥ 0 (or z free)

in Gram space, `G = AAᵀ`, `c = Ay`. Every selector in the library (encoder, pursuit, lasso) ends here.

Internally each problem is unit-free: atoms and `y` have norm 1. One tolerance then suits all data, norms that differ by
orders of magnitude do no harm, and neither tiny nor huge data leave float32's range.

A refit makes two passes. The first runs the solver on all rows. The second packs together the rows that it did not
solve, those whose atoms are too large or too small to square, and those with visible rounding; it runs the fallback on
them and works from the residual. The result of a row does not depend on the other rows.
"""

import dataclasses
import functools
import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.custom_derivatives import zero_from_primal
from jax.sharding import PartitionSpec
from jaxtyping import Array, Float

from jaxsae import sharding
from jaxsae._core import chunking, sparse
from jaxsae._core.linalg import EXACT, divide, max_or_nan, solve_on
from jaxsae.codes import SparseCode
from jaxsae.least_squares import implicit, problems, solvers
from jaxsae.least_squares.bounds import Bounds, of_sign
from jaxsae.least_squares.kernels import ops
from jaxsae.least_squares.outcome import RefitInfo, Status


def refit(
    dictionary: Float[Array, "m d"] | problems.Dictionary,
    y: Float[Array, "*b d"],
    code: SparseCode,
    solver: solvers.Solver | None = None,
    *,
    nonnegative: bool = True,
    ridge: float | Float[Array, ""] = 0.0,
    workspace_bytes: int | None = None,
) -> tuple[SparseCode, RefitInfo]:
    """Optimise the values of a code on its support, with the dictionary fixed.

        minimise_z ½‖y − Σᵢ zᵢ D[indices_i]‖² + ½ ridge ‖z‖²,   z ≥ 0

    A row never ends worse than it began (starting values are projected first, and replaced by 0 if far worse than
    that). A row with NaN or Inf is returned unchanged with status `NONFINITE`, and does not affect others. Derivatives
    with respect to `dictionary`, `y` and `ridge` are implicit, on the active set; the support and the starting values
    have none.

    Args:
      dictionary: `[m d]`, one atom per row, any norm, or any pytree with `take(indices [*b k]) -> atoms [*b k d]`;
        atoms in bfloat16 and float16 are accumulated in float32.
      y: targets `[*b d]`.
      code: support and starting values, `[*b k]`.
      solver: a `Solver`, such as those of `solvers`, with its fallback; `solvers.default(k, d)` if None.
      nonnegative: constrain `z ≥ 0`.
      ridge: weight of `½‖z‖²`, in the units of the atoms' squared norm.
      workspace_bytes: most bytes that a chunk of rows may need, beside arguments and results; by default
        `chunking.WORKSPACE_BYTES`, or more if one row needs more.

    Returns:
      The code with refitted values, in their original dtype, and `RefitInfo`.

    Raises:
      ValueError, TypeError: at trace time, if shapes or dtypes do not fit together, or a known `tol` or `max_steps` of
        the solver is negative or not finite. For such a ridge, rows have status `INVALID` instead.

    Example:
      >>> import jax, jax.numpy as jnp, jaxsae
      >>> D = jnp.array([[1.0, 0.0], [0.6, 0.8], [0.0, 1.0]])
      >>> code = jaxsae.SparseCode(values=jnp.array([0.5, 0.5]), indices=jnp.array([0, 1]), num_latents=3)
      >>> refitted, info = jaxsae.refit(D, jnp.array([2.2, 1.6]), code)
      >>> jnp.round(refitted.values, 3), int(info.status)
      (Array([1., 2.], dtype=float32), 0)

      Train a dictionary through the refit: rows have two atoms, the supports are known, and the start is perturbed.

      >>> keys = jax.random.split(jax.random.key(0), 4)
      >>> true = jax.random.normal(keys[0], (8, 6))
      >>> _, support = jax.lax.top_k(jax.random.uniform(keys[1], (64, 8)), 2)
      >>> code = jaxsae.SparseCode(values=jax.random.uniform(keys[2], (64, 2)), indices=support, num_latents=8)
      >>> y = jaxsae.codes.decode(true, code)
      >>> def loss(D):
      ...     return jnp.mean((y - jaxsae.codes.decode(D, jaxsae.refit(D, y, code)[0])) ** 2)
      >>> D = start = true + 0.3 * jax.random.normal(keys[3], true.shape)
      >>> slope = jax.jit(jax.grad(loss))
      >>> for _ in range(100):
      ...     D = D - 5.0 * slope(D)
      >>> bool(loss(D) < 0.01 * loss(start))
      True

    Source: Gao et al. (2024), "Scaling and evaluating sparse autoencoders", Section 5.1.
    """
    options = {"solver": solver, "nonnegative": nonnegative, "ridge": ridge, "workspace_bytes": workspace_bytes}
    return _refit_code(dictionary, y, code, passes=2, **options)


def estimate(dictionary: Any, y: Array, code: SparseCode, solver: solvers.Solver, *, nonnegative: bool) -> SparseCode:
    """`refit` by its first pass alone, which compiles to a third of the code; unsolved rows end where they are."""
    return _refit_code(dictionary, y, code, solver, nonnegative, 0.0, None, passes=1)[0]


@jax.named_scope("refit")
def _refit_code(
    dictionary, y, code: SparseCode, solver, nonnegative: bool, ridge, workspace_bytes: int | None, *, passes: int
) -> tuple[SparseCode, RefitInfo]:
    dictionary, y, code = problems.validate(dictionary, y, code, "refit")
    needed = _row_bytes(code.indices.shape[-1], y.shape[-1], problems.accumulator(dictionary, y).itemsize)
    workspace_bytes = max(chunking.WORKSPACE_BYTES, needed) if workspace_bytes is None else workspace_bytes
    if workspace_bytes < needed:
        raise ValueError(
            f"`refit` got workspace_bytes of {workspace_bytes} bytes, but one row needs {needed}; pass at least that."
        )
    kernel = solver is None and ops.applies(dictionary, code.indices, y, code.values)
    if solver is None:
        solver = solvers.default(code.indices.shape[-1], y.shape[-1], kernel=kernel)
    solver = check_solver(solver)
    if jax.sharding.get_abstract_mesh().explicit_axes:

        def own(dictionary, y, code, solver, ridge):
            return _refit_code(dictionary, y, code, solver, nonnegative, ridge, workspace_bytes, passes=passes)

        return sharding.automatic(own, code.indices)(dictionary, y, code, solver, jnp.asarray(ridge))
    ridge = jnp.asarray(ridge, problems.accumulator(dictionary, y))
    static = _Static(nonnegative, code.num_latents, workspace_bytes, kernel, passes)
    if sharding.is_sharded(code.num_latents) and problems.is_array(dictionary):
        values, info = _refit_by_devices(static, solver, dictionary, y, code.indices, code.values, ridge)
        return dataclasses.replace(code, values=values), info
    shared, per_row = (solver, dictionary, ridge), (y, code.indices, code.values)
    values, info = _refit(static, *sharding.vary_alike((shared, per_row)))
    return dataclasses.replace(code, values=values), info


def check_solver(solver: solvers.Solver) -> solvers.Solver:
    """`resolve` a solver; raise if it is none, or a known number of it or of its fallbacks is invalid."""
    if isinstance(solver, type) or not isinstance(solver, solvers.Solver):
        raise TypeError(f"got {solver!r} as a solver; pass an instance, such as jaxsae.FISTA().")
    if solver.tol is None:
        raise ValueError(f"`{type(solver).__name__}` got a tol of None, which only a fallback may have; pass a number.")
    resolved = each = solvers.resolve(solver)
    while each is not None:
        check = functools.partial(problems.check_numbers, type(each).__name__, do="a finite number of at least 0")
        check("tol", each.tol)
        check("max_steps", each.max_steps)
        if not jnp.issubdtype(jnp.result_type(each.max_steps), jnp.integer):
            raise TypeError(f"`{type(each).__name__}` got max_steps {each.max_steps}; pass an integer.")
        each = each.fallback
    return resolved


@functools.partial(jax.jit, static_argnums=0)
def _refit_by_devices(static: "_Static", solver, dictionary, y, indices, values, ridge):
    """Refit on a mesh: each device gathers the atoms of its rows from all devices, then refits them alone."""
    batch, n = y.shape[:-1], math.prod(y.shape[:-1])
    spare = -n % (sharding.axis_size("data") * sharding.axis_size("latent"))
    empty = (0, static.num_latents, 0)
    y, indices, values = (
        chunking.pad_rows(x.reshape(n, x.shape[-1]), n + spare, value)
        for x, value in zip((y, indices, values), empty, strict=True)
    )

    def here(solver, dictionary, y, indices, values, ridge):
        # Were `y` split over all devices outside, XLA would split the encoder's input likewise, and multiply in pieces.
        y = jax.lax.dynamic_slice_in_dim(y, len(indices) * jax.lax.axis_index(sharding.axis("latent")), len(indices))
        atoms = sharding.gather_atoms(dictionary, indices)
        slots = jnp.arange(indices.size, dtype=indices.dtype).reshape(indices.shape)
        slots = jnp.where(sparse.used(indices, static.num_latents), slots, indices.size)
        own = static._replace(num_latents=indices.size)
        return _refit(own, (solver, atoms.reshape(-1, atoms.shape[-1]), ridge), (y, slots, values))

    row, whole, by_data = sharding.by_all(), sharding.REPLICATED, PartitionSpec(sharding.axis("data"))
    split = sharding.shard_map(here, (whole, sharding.by_latent(), by_data, row, row, whole), row)
    values, info = split(solver, dictionary, y, indices, values, ridge)
    return values[:n].reshape(*batch, -1), jax.tree.map(lambda x: x[:n].reshape(batch), info)


class _Static(NamedTuple):
    nonnegative: bool
    num_latents: int
    workspace_bytes: int
    kernel: bool  # whether a kernel runs the first pass
    passes: int  # 2, or 1 without the second


def _unsolved(solver: solvers.Solver, info: RefitInfo):
    """Whether a row was not solved, or was out of range, in the first pass."""
    unsolved = info.status == Status.NONFINITE
    if solver.fallback is None:
        return unsolved
    return unsolved | problems.left(solver, info.kkt)


def _solver_bytes(k: int, d: int, itemsize: int) -> int:
    """Memory of one row while it is solved."""
    return (4 * k * k + 16 * (k + d)) * itemsize


def _row_bytes(k: int, d: int, itemsize: int) -> int:
    """Memory of one row through both passes; half of it while its problem is formed."""
    return 2 * (problems.row_bytes(k, d, itemsize) + _solver_bytes(k, d, itemsize))


class _Outcome(NamedTuple):
    """The results for `n` rows."""

    values: Array  # [n k]
    x: Array  # [n k]  unit-free values, as the solver left them
    info: RefitInfo


def _solve_rows(static: _Static, shared, y, indices, values) -> _Outcome:
    """Refit `n` rows by the solver alone; rows whose atoms are out of range are returned as not finite."""
    solver, dictionary, ridge = shared
    nonnegative, num_latents, workspace_bytes, kernel, _ = static
    bounds = of_sign(nonnegative)
    y = y.astype(ridge.dtype)
    problem = None
    if kernel:
        solved = ops.solve(dictionary, indices, y, values, ridge, solver.tol, solver.max_steps, nonnegative)
    else:
        problem = chunking.map_chunks(
            functools.partial(problems.problems, dictionary, num_latents=num_latents, ridge=ridge),
            *(y, indices),
            batch=y.shape[:1],
            row_bytes=problems.row_bytes(indices.shape[1], y.shape[1], y.dtype.itemsize),
            workspace_bytes=workspace_bytes // 2,
        )
        solved = problems.solved(solver, problem, values.astype(ridge.dtype), bounds)
    finite = solved.finite & sparse.finite_rows(values, indices, num_latents)
    values, info = finish(solver, problem, solved, values, finite, bounds)
    return _Outcome(values, solved.x, info)


def finish(
    solver, problem: problems.Problem | None, solved: problems.Solved, values, finite, bounds: Bounds
) -> tuple[Array, RefitInfo]:
    """Values with units from a solver's results for `n` rows that started at `values`, and their outcome."""
    feasible = bounds.project(values)
    refitted = divide(solved.x, solved.unit).astype(values.dtype)
    moved = (solved.steps > 0) | ~solved.warm_started  # else the start is already optimal, and is returned as it is
    # Rounded to fewer bits, the best iterate can be worse than the start.
    if problem is not None and values.dtype != solved.x.dtype:
        rounded, began = (z.astype(solved.x.dtype) * solved.unit for z in (refitted, feasible))
        moved &= ~(jax.vmap(problems.objective_gap)(problem.gram, problem.c, rounded, began) > 0)
    refitted = jnp.where(moved[:, None] | (solved.unit == 0), refitted, feasible)
    finite &= jnp.isfinite(refitted).all(1)
    return jnp.where(finite[:, None], refitted, values), _info(solver, solved.kkt, solved.steps, finite)


def _info(solver: solvers.Solver, kkt, steps, finite) -> RefitInfo:
    """The outcome of rows, by the tolerance of the last solver in the chain."""
    status = jnp.where(kkt <= problems.last_tol(solver), Status.CONVERGED, Status.MAX_STEPS)
    return RefitInfo(
        kkt=jnp.where(finite, kkt, jnp.nan),
        steps=jnp.where(finite, steps, 0),
        status=jnp.where(finite, status, Status.NONFINITE).astype(jnp.int32),
    )


class _Point(NamedTuple):
    """Unit-free feasible values, and the gradient there, computed from the residual."""

    x: Array  # [n k]
    gradient: Array  # [n k]


def _at(rows: problems.UnitRows, x, bounds: Bounds) -> _Point:
    x = bounds.project(x)
    residual = rows.y - jnp.einsum("nkd,nk->nd", rows.atoms, x, precision=EXACT)
    return _Point(x, rows.ridge * x - jnp.einsum("nkd,nd->nk", rows.atoms, residual, precision=EXACT))


def _lower(point: _Point, other: _Point):
    """Whether the objective is lower at one point than at another, `[n 1]`; false for NaN and overflow."""
    change = jnp.sum((point.x - other.x) * (point.gradient + other.gradient), axis=1, keepdims=True)
    return (change < 0) & (change > -jnp.inf)


def _choose(where, point: _Point, other: _Point) -> _Point:
    return jax.tree.map(lambda a, b: jnp.where(where, a, b), point, other)


def _revise(static: _Static, shared, y, indices, values, x, info: RefitInfo) -> _Outcome:
    """Refit `n` rows for which the solver alone was not enough, and compute their KKT residuals from `y − Aᵀz`.

    Atoms are scaled whatever their size; unsolved rows continue with the fallback; then one Newton step on the active
    set is taken if it helps, and the start, or 0, is returned if that is better.
    """
    (solver, dictionary, ridge), bounds = shared, of_sign(static.nonnegative)
    y = y.astype(ridge.dtype)
    rows = problems.unit_rows(problems.take_used(dictionary, indices, static.num_latents, y.dtype), y, ridge)
    at = functools.partial(_at, rows, bounds=bounds)
    given, origin = at(values.astype(y.dtype) * rows.unit), at(jnp.zeros_like(x))
    warm_started = _lower(given, origin)
    start = _choose(warm_started, given, origin)

    problem = problems.products(rows)
    fallback = solver if solver.fallback is None else solver.fallback
    max_steps = jnp.where(_unsolved(solver, info), fallback.max_steps, 0).astype(jnp.int32)
    x = jnp.where(info.steps[:, None] > 0, x, start.x)
    x, _, steps = problems.drive_chain(fallback, problem, x, max_steps, bounds)
    here, steps = at(x), info.steps + steps
    # The condition number of `G` magnifies the rounding of `Gx`, which may even make `G` indefinite; only its square
    # root magnifies that of the residual.
    free = bounds.inside(x) if static.nonnegative else rows.unit > 0
    newton = at(here.x - jax.vmap(solve_on)(problem.gram, free, here.gradient))
    best = _choose((steps[:, None] > 0) & _lower(newton, here), newton, here)

    refitted = divide(best.x, rows.unit).astype(values.dtype)
    moved = _lower(at(refitted.astype(y.dtype) * rows.unit), start)
    best = _choose(moved, best, start)
    feasible = bounds.project(values)
    refitted = jnp.where(moved | (rows.unit == 0), refitted, jnp.where(warm_started, feasible, 0))
    finite = rows.finite & sparse.finite_rows(values, indices, static.num_latents) & jnp.isfinite(refitted).all(1)
    kkt = max_or_nan(rows.weight * bounds.violation(best.x, best.gradient), 1)
    return _Outcome(jnp.where(finite[:, None], refitted, values), best.x, _info(solver, kkt, steps, finite))


def _widths(k: int) -> list[int]:
    """Numbers of slots to solve at, so that a row with few atoms in many slots does not pay for all of them.

    Each width takes more than a second to compile. A batch that is split over devices would move when it is sorted.
    """
    return [k // 4, k // 2, k] if k >= 192 and (sharding.on_cpu() or not sharding.is_divided()) else [k]


def _narrow(solve, num_latents: int, width: int, y, indices, values) -> _Outcome:
    """Solve rows of at most `width` atoms in `width` slots."""
    on = sparse.used(indices, num_latents)
    slots = jnp.argsort(~on, axis=1, stable=True)[:, :width]
    outcome = solve(y, *(jnp.take_along_axis(array, slots, axis=1) for array in (indices, values)))
    place = jnp.minimum(jnp.cumsum(on, axis=1) - 1, width - 1)
    values, x = (jnp.where(on, jnp.take_along_axis(array, place, axis=1), 0) for array in outcome[:2])
    return _Outcome(values, x, outcome.info)


def _solve_all(static: _Static, shared, y, indices, values) -> _Outcome:
    """Refit rows by the solver alone, a chunk at a time."""
    (n, k), d, itemsize = indices.shape, y.shape[1], shared[2].dtype.itemsize
    solve, half = functools.partial(_solve_rows, static, shared), static.workspace_bytes // 2
    if static.kernel:
        return solve(y, indices, values)  # which needs no workspace
    if len(_widths(k)) == 1:
        in_cache = (4 << 20) // max(k * k * itemsize, 1)  # rows whose Gram matrices the cache holds
        return chunking.map_chunks(
            *(solve, y, indices, values),
            batch=(n,),
            row_bytes=_solver_bytes(k, d, itemsize),
            workspace_bytes=half,
            cpu_rows=max(16, min(256, in_cache // 16 * 16)),
        )
    l0 = jnp.sum(sparse.used(indices, static.num_latents), axis=1)
    outcome = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), jax.eval_shape(solve, y, indices, values))
    previous = -1
    for width in _widths(k):
        f = solve if width == k else functools.partial(_narrow, solve, static.num_latents, width)
        where = (l0 > previous) & (l0 <= width)
        outcome = chunking.revise_rows(
            *(f, where, outcome, y, indices, values),
            row_bytes=_solver_bytes(width, d, itemsize),
            workspace_bytes=half,
        )
        previous = width
    return outcome


def _cancels(x, steps):
    """Whether large terms of `Gx` cancel, so that the rounding of `G` matters."""
    return (steps > 0) & (jnp.finfo(x.dtype).eps * jnp.sum(x * x, axis=1) > 2.0**-18)


def _solve(static: _Static, shared, per_row):
    """Solve all rows, then revise those that need a second pass: outside of transformations, only if there are any."""
    outcome, left = _first_pass(static, shared, per_row)
    if static.passes == 1 or chunking.known_false(left):
        return outcome.values, outcome.info
    outcome = _second_pass(static, shared, (*per_row, outcome, left))
    return outcome.values, outcome.info


@chunking.over_rows
def _first_pass(static: _Static, shared, per_row) -> tuple[_Outcome, Array]:
    """Solve all rows by the solver alone; and which rows need a second pass."""
    batch, (y, indices, values) = chunking.flatten(per_row)
    outcome = _solve_all(static, shared, y, indices, values)
    left = _unsolved(shared[0], outcome.info) | _cancels(outcome.x, outcome.info.steps)
    return chunking.unflatten(batch, (_valid(shared[2], outcome), left))


@chunking.over_rows
def _second_pass(static: _Static, shared, per_row) -> _Outcome:
    """Revise the rows that the first pass has left."""
    batch, (y, indices, values, outcome, left) = chunking.flatten(per_row)
    outcome = chunking.revise_rows(
        functools.partial(_revise, static, shared),
        *(left, outcome, y, indices, values, outcome.x, outcome.info),
        row_bytes=_row_bytes(indices.shape[1], y.shape[1], shared[2].dtype.itemsize),
        workspace_bytes=static.workspace_bytes,
    )
    return chunking.unflatten(batch, _valid(shared[2], outcome))


def _valid(ridge, outcome: _Outcome) -> _Outcome:
    """The status of every row is `INVALID` if the ridge is."""
    valid = (ridge >= 0) & jnp.isfinite(ridge)
    status = jnp.where(valid, outcome.info.status, Status.INVALID).astype(jnp.int32)
    return outcome._replace(info=dataclasses.replace(outcome.info, status=status))


_refit = jax.custom_jvp[tuple[Array, RefitInfo]](_solve, nondiff_argnums=(0,))


@functools.partial(_refit.defjvp, symbolic_zeros=True)
def _refit_tangent(static: _Static, primals, tangents):
    (_, dictionary, ridge), (y, indices, _) = primals
    (_, dictionary_dot, ridge_dot), (y_dot, _, _) = tangents
    values, info = _refit(static, *primals)
    refitted = implicit.Refitted(dictionary, y, indices, values, ridge, info.status < Status.NONFINITE)
    known = implicit.Static(static.nonnegative, static.num_latents, static.workspace_bytes)
    values_dot = implicit.values_dot(known, refitted, dictionary_dot, y_dot, ridge_dot)
    return (values, info), (values_dot, zero_from_primal(info))
