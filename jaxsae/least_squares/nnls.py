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
from jaxsae.least_squares.outcome import RefitInfo, Status
from jaxsae.least_squares.refit import check_solver, finish, refit


def nnls(
    G: Float[Array, "*b n n"],
    c: Float[Array, "*b n"],
    z0: Float[Array, "*b n"] | None = None,
    solver: solvers.Solver | None = None,
    *,
    nonnegative: bool = True,
) -> tuple[Float[Array, "*b n"], RefitInfo]:
    """Minimise a convex quadratic over non-negative values, from its Gram matrix.

        minimise_z ½ zᵀGz − cᵀz,   z ≥ 0

    With `G = AᵀA` and `c = Aᵀb` that is `minimise ½‖b − Az‖²`; a ridge is added to the diagonal of `G`. Of several
    optima any may be returned. KKT residuals are relative to `√max G_ii · max |c_i|/√G_ii`, since `‖b‖` is not known.
    Derivatives with respect to `G` and `c` are implicit, on the active set, forwards and backwards to any order; where
    a value and its gradient are both 0 they are those of a value that stays 0.

    Args:
      G: `[*b n n]`, symmetric and positive semi-definite.
      c: `[*b n]`.
      z0: starting values `[*b n]`, 0 by default. `BlockPivoting` starts from its positive values: the solution of a
        problem nearby saves most factorisations.
      solver: a `Solver`, with its fallback; `solvers.default(n, dtype=…)` if None.
      nonnegative: constrain `z ≥ 0`.

    Returns:
      Values `[*b n]`, and `RefitInfo`: status `NONFINITE` where `G`, `c` or `z0` hold NaN or Inf, and `INVALID` where
      `G` is not symmetric beyond rounding or has entries that no positive semi-definite matrix has, or a value has no
      limit (`G_ii = 0 < c_i`, as where a product underflows); such rows are returned unchanged. A `G` that is
      indefinite otherwise may end at any point that satisfies the KKT conditions, or with status `MAX_STEPS`.

    Raises:
      ValueError, TypeError: at trace time, if shapes or dtypes do not fit together, or a known `tol` or `max_steps` of
        the solver is negative or not finite.

    Example:
      >>> import jax.numpy as jnp, jaxsae
      >>> A = jnp.array([[1.0, 1.0], [3.0, 2.0]])
      >>> z, info = jaxsae.nnls(A.T @ A, A.T @ jnp.array([2.0, 3.0]))
      >>> jnp.round(z, 3), int(info.status)
      (Array([0. , 1.6], dtype=float32), 0)

    Source: Lawson & Hanson (1974), "Solving least squares problems", Chapter 23; the solvers name their own.
    """
    G, c, z0 = problems.validate_gram(G, c, z0, "nnls")
    if solver is None:
        solver = solvers.default(c.shape[-1], dtype=c.dtype)
    solver = check_solver(solver)
    if jax.sharding.get_abstract_mesh().explicit_axes:

        def own(G, c, z0, solver):
            return nnls(G, c, z0, solver, nonnegative=nonnegative)

        return sharding.automatic(own, c)(G, c, z0, solver)
    shared, per_row = sharding.vary_alike((solver, (c, G, z0)))
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
    batch, (c, G, z0) = chunking.flatten(per_row)
    n, itemsize = c.shape[-1], c.dtype.itemsize

    def chunk(c, G, z0):
        problem, valid = problems.unit_free(G, c, nonnegative)
        values = jnp.where(valid[:, None], z0.astype(c.dtype), 0)
        solved = problems.solved(solver, problem, values, nonnegative, drive=problems.drive_chain)
        finite = solved.finite & jnp.isfinite(z0).all(1)
        z, info = finish(solver, problem, solved, z0, finite, nonnegative)
        status = jnp.where(valid | ~finite, info.status, Status.INVALID).astype(jnp.int32)
        z = jnp.where((valid & finite)[:, None], z, z0)
        return z, dataclasses.replace(info, status=status)

    # Rows to factorise are solved one after another, each to its own end.
    cpu_rows = 16 if isinstance(solver, solvers.ConjugateGradient | solvers.FISTA | solvers.ProjectedGradient) else 1
    found = chunking.map_chunks(chunk, c, G, z0, batch=c.shape[:1], row_bytes=8 * n * n * itemsize, cpu_rows=cpu_rows)
    return chunking.unflatten(batch, found)


_nnls = jax.custom_jvp[tuple[Array, RefitInfo]](_solve, nondiff_argnums=(0,))


@_nnls.defjvp
def _nnls_tangent(nonnegative: bool, primals, tangents):
    """`ż_F = G_FF⁻¹ (ċ − Ġz)_F`."""
    (_, (_, G, _)), (_, (c_dot, G_dot, _)) = primals, tangents
    z, info = _nnls(nonnegative, *primals)
    free = (info.status < Status.NONFINITE)[..., None] & ((z > 0) | (not nonnegative))
    return (z, info), (_tangent(G, z, free, G_dot, c_dot), zero_from_primal(info))


@jax.jit  # or a derivative outside of `jit` would compile its solution of equations at every call
def _tangent(G, z, free, G_dot, c_dot):
    rhs = c_dot - matmul(G_dot, jnp.where(free, z, 0).astype(G.dtype)[..., None])[..., 0]
    flat = (x.reshape(-1, *x.shape[z.ndim - 1 :]) for x in (G, free, jnp.where(free, rhs, 0)))
    return implicit.solve_free(*flat).reshape(z.shape).astype(z.dtype)
