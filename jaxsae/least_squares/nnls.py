"""Non-negative least squares from a Gram matrix, or from a dense matrix: the problem of a refit itself."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
from jax.custom_derivatives import zero_from_primal
from jaxtyping import Array, Float

from jaxsae import sharding
from jaxsae._core import chunking
from jaxsae._core.linalg import as_array, matmul, result_type
from jaxsae.codes import SparseCode
from jaxsae.least_squares import implicit, problems, solvers
from jaxsae.least_squares.bounds import Bounds, of_sign, validate_bounds
from jaxsae.least_squares.outcome import RefitInfo, Status
from jaxsae.least_squares.refit import check_solver, finish, refit


def nnls(
    G: Float[Array, "*b n n"],
    c: Float[Array, "*b n"],
    z0: Float[Array, "*b n"] | None = None,
    solver: solvers.Solver | None = None,
    *,
    nonnegative: bool = True,
    bounds: tuple[float | Float[Array, "..."], float | Float[Array, "..."]] | None = None,
) -> tuple[Float[Array, "*b n"], RefitInfo]:
    """Minimise a convex quadratic over non-negative or bounded values, from its Gram matrix.

        minimise_z ½ zᵀGz − cᵀz,   z ≥ 0   or   lower ≤ z ≤ upper

    With `G = AᵀA` and `c = Aᵀb` that is `minimise ½‖b − Az‖²`; a ridge is added to the diagonal of `G`. Of several
    optima any may be returned. KKT residuals are relative to `√max G_ii · max |c_i|/√G_ii`, since `‖b‖` is not known;
    with bounds, to that of `c − Gp` for the point `p` within them that is nearest to 0. Derivatives with respect to
    `G`, `c` and bounds are implicit, on the active set, forwards and backwards to any order; where a value and its
    gradient are both 0 they are those of a value that stays 0.

    Args:
      G: `[*b n n]`, symmetric and positive semi-definite.
      c: `[*b n]`.
      z0: starting values `[*b n]`, 0 by default. `BlockPivoting` starts from its positive values: the solution of a
        problem nearby saves most factorisations.
      solver: a `Solver`, with its fallback; `solvers.default(n, dtype=…)` if None.
      nonnegative: constrain `z ≥ 0`, if there are no bounds.
      bounds: `(lower, upper)`, as for `scipy.optimize.lsq_linear`: numbers or arrays that broadcast to `[*b n]`, which
        may be infinite; where both are equal the value is fixed.

    Returns:
      Values `[*b n]`, and `RefitInfo`: status `NONFINITE` where `G`, `c` or `z0` hold NaN or Inf, and `INVALID` where
      `G` is not symmetric beyond rounding or has entries that no positive semi-definite matrix has, bounds cross or are
      NaN, or a value has no limit (`G_ii = 0 < c_i`, as where a product underflows); such rows are returned unchanged.
      A `G` that is indefinite otherwise may end at any point that satisfies the KKT conditions, or with status
      `MAX_STEPS`.

    Raises:
      ValueError, TypeError: at trace time, if shapes or dtypes do not fit together, known bounds cross or are NaN, or a
        known `tol` or `max_steps` of the solver is negative or not finite.

    Example:
      >>> import jax.numpy as jnp, jaxsae
      >>> A = jnp.array([[1.0, 1.0], [3.0, 2.0]])
      >>> G, c = A.T @ A, A.T @ jnp.array([2.0, 3.0])
      >>> z, info = jaxsae.nnls(G, c)
      >>> jnp.round(z, 3), int(info.status)
      (Array([0. , 1.6], dtype=float32), 0)
      >>> jnp.round(jaxsae.nnls(G, c, bounds=(0.0, 1.0))[0], 3)
      Array([0.4, 1. ], dtype=float32)

    Source: Lawson & Hanson (1974), "Solving least squares problems", Chapter 23; the solvers name their own.
    """
    G, c, z0 = problems.validate_gram(G, c, z0, "nnls")
    limits = None if bounds is None else validate_bounds(bounds, z0, "nnls")
    if solver is None:
        solver = solvers.default(c.shape[-1], dtype=c.dtype)
    solver = check_solver(solver)
    if jax.sharding.get_abstract_mesh().explicit_axes:

        def own(G, c, z0, solver, limits):
            return nnls(G, c, z0, solver, nonnegative=nonnegative, bounds=limits)

        return sharding.automatic(own, c)(G, c, z0, solver, limits)
    shared, per_row = sharding.vary_alike((solver, (c, G, z0, limits)))
    return _nnls(nonnegative, shared, per_row)


def nnls_dense(
    A: Float[Array, "m n"],
    b: Float[Array, "*b m"],
    x0: Float[Array, "*b n"] | None = None,
    solver: solvers.Solver | None = None,
    *,
    nonnegative: bool = True,
    ridge: float | Float[Array, ""] = 0.0,
) -> tuple[Float[Array, "*b n"], RefitInfo]:
    """Minimise `‖Ax − b‖` over `x ≥ 0`, with the arguments of `scipy.optimize.nnls`.

    It is a refit of all columns of `A`: where they are nearly parallel, the last digits come from the residual rather
    than from `AᵀA`.

    Args:
      A: `[m n]`, tall or wide; columns may be repeated or zero.
      b: `[*b m]`, any number of right-hand sides.
      x0: starting values `[*b n]`, 0 by default.
      solver: as for `nnls`.
      nonnegative: constrain `x ≥ 0`.
      ridge: weight of `½‖x‖²`.

    Returns:
      Values `[*b n]`, and `RefitInfo`.

    Raises:
      ValueError, TypeError: as for `refit`.

    Example:
      >>> import jax.numpy as jnp, jaxsae
      >>> x, info = jaxsae.nnls_dense(jnp.array([[1.0, 1.0], [3.0, 2.0]]), jnp.array([2.0, 3.0]))
      >>> jnp.round(x, 3), int(info.status)
      (Array([0. , 1.6], dtype=float32), 0)

    Source: Lawson & Hanson (1974), "Solving least squares problems", Chapter 23.
    """
    A, b = as_array(A), as_array(b)
    if A.ndim != 2 or b.shape[-1:] != A.shape[:1]:
        raise ValueError(f"`nnls_dense` got A of shape {A.shape} and b of shape {b.shape}; pass (m, n) and (*b, m).")
    n, batch = A.shape[1], b.shape[:-1]
    values = jnp.zeros((*batch, n), result_type(A, b)) if x0 is None else as_array(x0)
    if solver is None:
        solver = solvers.default(n, dtype=result_type(A, b, jnp.float32))
    indices = jnp.broadcast_to(jnp.arange(n, dtype=jnp.int32), (*batch, n))
    code, info = refit(A.T, b, SparseCode(values, indices, n), solver, nonnegative=nonnegative, ridge=ridge)
    return code.values, info


def _solve(nonnegative: bool, solver, per_row):
    return _compiled(nonnegative)(solver, per_row)


@functools.cache
def _compiled(nonnegative: bool):
    return jax.jit(chunking.fold_vmap(functools.partial(_solve_rows, nonnegative)))


def _solve_rows(nonnegative: bool, solver, per_row):
    batch, (c, G, z0, limits) = chunking.flatten(per_row)
    n, itemsize = c.shape[-1], c.dtype.itemsize

    def chunk(c, G, z0, limits):
        if limits is None:
            bounds = of_sign(nonnegative)
            problem, valid = problems.unit_free(G, c, bounds)
            _, z, info = solve(problem, valid, z0, bounds, bounds)
        else:  # from a point within the bounds, so that what is compared is of the size of what may change
            nearest, at, bounds = problems.shifted(G, c, limits)
            problem, valid = problems.unit_free(G, at, bounds)
            fixed, problem, within = _without_fixed(problem, bounds)
            x, z, info = solve(problem, valid, z0.astype(c.dtype) - nearest, within, bounds)
            z = jnp.where(x <= within.lower, limits.lower, limits.project(nearest + z))
            z = jnp.where(fixed, nearest, jnp.where(x >= within.upper, limits.upper, z))
            ahead = jnp.where(c > 0, limits.upper, jnp.where(c < 0, limits.lower, nearest))
            z = jnp.where(jnp.diagonal(G, axis1=1, axis2=2) == 0, ahead, z).astype(z0.dtype)
        return jnp.where((info.status < Status.NONFINITE)[:, None], z, z0), info

    def solve(problem, valid, start, within, bounds):
        values = jnp.where(valid[:, None], start.astype(problem.c.dtype), 0)
        solved = problems.solved(solver, problem, values, within, drive=problems.drive_chain)
        finite = solved.finite & jnp.isfinite(start).all(1)
        z, info = finish(solver, problem, solved, start, finite, bounds)
        status = jnp.where(valid | ~finite, info.status, Status.INVALID).astype(jnp.int32)
        return solved.x, z, dataclasses.replace(info, status=status)

    # Rows to factorise are solved one after another, each to its own end.
    cpu_rows = 16 if isinstance(solver, solvers.ConjugateGradient | solvers.FISTA | solvers.ProjectedGradient) else 1
    options = {"batch": c.shape[:1], "row_bytes": 8 * n * n * itemsize, "cpu_rows": cpu_rows}
    return chunking.unflatten(batch, chunking.map_chunks(chunk, c, G, z0, limits, **options))


def _without_fixed(problem: problems.Problem, bounds: Bounds) -> tuple[Array, problems.Problem, Bounds]:
    """Which values have no choice; the problem in which those are free, and 0; and its unit-free bounds."""
    lower, upper = problems.unit_bounds(problem, bounds)
    fixed = ~(lower < upper)
    eye = jnp.eye(fixed.shape[1], dtype=lower.dtype)
    gram = jnp.where(fixed[:, :, None] | fixed[:, None, :], eye, problem.gram)
    within = Bounds(jnp.where(fixed, -jnp.inf, lower), jnp.where(fixed, jnp.inf, upper))
    return fixed, problem._replace(gram=gram, c=jnp.where(fixed, 0, problem.c)), within


_nnls = jax.custom_jvp[tuple[Array, RefitInfo]](_solve, nondiff_argnums=(0,))


@_nnls.defjvp
def _nnls_tangent(nonnegative: bool, primals, tangents):
    """`ż_F = G_FF⁻¹ (ċ − Ġz − Gż_B)_F`, with `ż_B` that of the bounds."""
    (_, (_, G, _, limits)), (_, (c_dot, G_dot, _, limits_dot)) = primals, tangents
    z, info = _nnls(nonnegative, *primals)
    solved = (info.status < Status.NONFINITE)[..., None]
    free = solved & ((z > 0) | (not nonnegative) if limits is None else limits.inside(z))
    z_dot = _tangent(G, jnp.where(solved, z, 0), free, _of_bounds(z, free, limits, limits_dot), G_dot, c_dot)
    return (z, info), (z_dot, zero_from_primal(info))


def _of_bounds(z, free, limits: Bounds | None, limits_dot: Bounds | None):
    """The tangent of the values that are on bounds, and 0 for the others; None if no bound moves."""
    if limits is None or limits_dot is None:
        return None
    at_upper = (z >= limits.upper) & (limits.lower < limits.upper)
    on_bound = ~free & jnp.isfinite(z) & ((z >= limits.upper) | (z <= limits.lower))
    return jnp.where(on_bound, jnp.where(at_upper, limits_dot.upper, limits_dot.lower), 0)


@jax.jit  # or a derivative outside of `jit` would compile its solution of equations at every call
def _tangent(G, z, free, bounds_dot, G_dot, c_dot):
    def times(G, z):
        return matmul(G, z.astype(G.dtype)[..., None])[..., 0]

    rhs = c_dot - times(G_dot, z)
    rhs = rhs if bounds_dot is None else rhs - times(jnp.where(jnp.isfinite(G), G, 0), bounds_dot)
    flat = (x.reshape(-1, *x.shape[z.ndim - 1 :]) for x in (G, free, jnp.where(free, rhs, 0)))
    z_dot = implicit.solve_free(*flat).reshape(z.shape)
    return (z_dot if bounds_dot is None else jnp.where(free, z_dot, bounds_dot)).astype(z.dtype)
