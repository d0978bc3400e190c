"""Masked least squares: the values of the atoms that are active in each row.

Given which atoms are active, what should their values be?

For one row with dictionary rows `A = D[indices] [k d]` the refit solves

    minimise ½‖y − Aᵀz‖² + ½ ridge ‖z‖²   over z ≥ 0 (or z free)

in Gram space, `G = AAᵀ`, `c = Ay`. Every selector in the library (encoder, pursuit, lasso) ends here.

Inside, each problem is made free of units: atoms have unit norm and so has `y`. Then one tolerance fits all
data, norms that spread over many orders cost nothing, and neither tiny nor huge data leave float32's range.
"""

import dataclasses
import enum
import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct
from jaxtyping import Array, Float, Int

from jaxsae import rows
from jaxsae.codes import SparseCode
from jaxsae.solvers import FISTA

_EXACT = jax.lax.Precision.HIGHEST  # a plain float32 dot is TF32 or bfloat16 on accelerators


class Status(enum.IntEnum):
    """How the refit of a row ended."""

    CONVERGED = 0
    MAX_STEPS = 1
    NONFINITE = 2


@struct.dataclass
class RefitInfo:
    """How a refit ended, row by row.

    Attributes:
      kkt: `[*b]` relative KKT residual of the values returned (see `certify`), as the solver saw it; NaN where the
        row is not finite.
      steps: `[*b]` int32, solver steps taken.
      status: `[*b]` int32, a `Status`: 0 converged, 1 stopped at `max_steps`, 2 not finite, or out of the
        dtype's range (row returned unchanged).
    """

    kkt: Float[Array, "*b"]
    steps: Int[Array, "*b"]
    status: Int[Array, "*b"]


@struct.dataclass
class Certificate:
    """Bounds on how far a code is from optimal on its support, computed without the solver.

    Attributes:
      kkt: `[*b]` relative KKT residual, `max_i v_i / (max_i‖a_i‖ ‖y‖)`; 0 is optimal.
      gap: `[*b]` duality gap relative to `½‖y‖²`: the excess of the row's error over the best possible one, relative
        to `‖y‖²`, is at most this. In float32, on nearly singular supports (condition numbers of 1e5 and more), the
        dual point is feasible only to rounding, and the gap can fall short.
    """

    kkt: Float[Array, "*b"]
    gap: Float[Array, "*b"]


def refit(
    dictionary: Float[Array, "m d"],
    y: Float[Array, "*b d"],
    code: SparseCode,
    solver: Any = None,
    *,
    nonnegative: bool = True,
    ridge: float | Float[Array, ""] = 0.0,
) -> tuple[SparseCode, RefitInfo]:
    """Optimise the values of a code on its support, the dictionary fixed.

        minimise_z ½‖y − Σᵢ zᵢ D[indices_i]‖² + ½ ridge ‖z‖²,   z ≥ 0

    A row never ends worse than it began (starting values are projected first); a row with NaN or Inf comes back
    unchanged with status `NONFINITE` and touches no other. The derivative in `dictionary`, `y` and `ridge` is
    the implicit one on the active set; the support, and the starting values, have none.

    Args:
      dictionary: `[m d]`, one atom a row, any norm; bfloat16 and float16 are accumulated in float32.
      y: targets `[*b d]`.
      code: support and starting values, `[*b k]`.
      solver: `FISTA()` by default, or any pytree of `solvers.py`.
      nonnegative: constrain `z ≥ 0`.
      ridge: weight of `½‖z‖²`, in the units of the atoms' squared norm.

    Returns:
      The code with its values refitted, in the dtype they had, and `RefitInfo`.

    Raises:
      ValueError, TypeError: at trace time, if shapes or dtypes do not fit together.

    Example:
      >>> import jax.numpy as jnp, jaxsae
      >>> D = jnp.array([[1.0, 0.0], [0.6, 0.8], [0.0, 1.0]])
      >>> code = jaxsae.SparseCode(values=jnp.array([0.5, 0.5]), indices=jnp.array([0, 1]), num_latents=3)
      >>> refitted, info = jaxsae.refit(D, jnp.array([2.2, 1.6]), code)
      >>> jnp.round(refitted.values, 3), int(info.status)
      (Array([1., 2.], dtype=float32), 0)

    Source: Gao et al. (2024), "Scaling and evaluating sparse autoencoders", Section 5.1.
    """
    _validate(dictionary, y, code, "refit")
    solver = FISTA() if solver is None else solver
    ridge = jnp.asarray(ridge, _accumulator(dictionary, y))
    values, info = _refit(nonnegative, solver, dictionary, y, code.indices, code.values, ridge)
    return dataclasses.replace(code, values=values), info


def certify(
    dictionary: Float[Array, "m d"], y: Float[Array, "*b d"], code: SparseCode, *, nonnegative: bool = True
) -> Certificate:
    """Certify a code's values on its support, from the residual itself and whatever computed them.

    With `r = y − Aᵀz` and `g = −Ar`:

        v_i = |g_i| where z_i > 0,  max(−g_i, 0) elsewhere     (|g_i| everywhere if the sign is free)
        kkt = max_i v_i / (max_i‖a_i‖ ‖y‖)
        gap = (½‖r‖² − (uᵀy − ½‖u‖²)) / ½‖y‖²,   u = r − Aᵀδ,  δ = G⁺(Ar)₊

    `u` is feasible for the dual (`Au ≤ 0`), so the gap bounds the excess error; where rounding or a singular `G`
    makes it infeasible, another feasible `u` stands in. A negative value under the
    constraint counts as its own violation. Both are 0 where `y = 0` and the code decodes to 0.

    Args:
      dictionary: `[m d]`.
      y: targets `[*b d]`.
      code: `[*b k]`.
      nonnegative: certify against `z ≥ 0`, or against free signs.

    Returns:
      `Certificate`, `[*b]` in float32 or better; NaN where a row is not finite.

    Raises:
      ValueError, TypeError: at trace time, if shapes or dtypes do not fit together.

    Example:
      >>> import jax.numpy as jnp, jaxsae
      >>> code = jaxsae.SparseCode(values=jnp.array([0.5]), indices=jnp.array([0]), num_latents=2)
      >>> jaxsae.certify(jnp.eye(2), jnp.array([1.0, 0.0]), code).kkt
      Array(0.5, dtype=float32)
    """
    _validate(dictionary, y, code, "certify")
    dtype = _accumulator(dictionary, y)
    return Certificate(*_CERTIFY[nonnegative](dictionary.astype(dtype), (y.astype(dtype), code.indices, code.values)))


def check(info_or_code: RefitInfo | SparseCode) -> None:
    """Raise if any row of a refit failed, or if any row of a code overflowed; on the host, outside jit.

    Args:
      info_or_code: what `refit` or `refine` returned beside the code, or a code.

    Raises:
      RuntimeError: naming how many rows, the worst of them, and what to do.

    Example:
      >>> import jax.numpy as jnp, jaxsae
      >>> jaxsae.check(jaxsae.codes.from_dense(jnp.array([[0.0, 2.0, 1.0]]), capacity=1))
      Traceback (most recent call last):
      RuntimeError: 1 of 1 rows have more active latents than slots; row 0 lost 1. Pass a capacity of at least 2.
    """
    if isinstance(info_or_code, SparseCode):
        overflow = np.asarray(info_or_code.overflow).ravel()
        if overflow.any():
            worst = int(overflow.argmax())
            needed = info_or_code.indices.shape[-1] + overflow[worst]
            raise RuntimeError(
                f"{np.count_nonzero(overflow)} of {overflow.size} rows have more active latents than slots; "
                f"row {worst} lost {overflow[worst]}. Pass a capacity of at least {needed}."
            )
        return
    status, kkt = np.asarray(info_or_code.status).ravel(), np.asarray(info_or_code.kkt).ravel()
    nonfinite, unconverged = status == Status.NONFINITE, status == Status.MAX_STEPS
    problems = []
    if nonfinite.any():
        problems.append(
            f"{nonfinite.sum()} of {status.size} rows hold NaN or Inf {_some(nonfinite.nonzero()[0])}; mend them."
        )
    if unconverged.any():
        worst = sorted(unconverged.nonzero()[0], key=lambda row: -kkt[row])
        problems.append(
            f"{unconverged.sum()} of {status.size} rows stopped at max_steps {_some(worst)}, the worst at KKT "
            f"{kkt[worst[0]]:.1e}; raise max_steps or tol."
        )
    if problems:
        raise RuntimeError(" ".join(problems))


def _some(row_numbers) -> str:
    shown = ", ".join(str(row) for row in row_numbers[:5])
    return f"(rows {shown}{', …' if len(row_numbers) > 5 else ''})"


def _validate(dictionary, y, code, name: str) -> None:
    for what, array in (("a dictionary", dictionary), ("y", y), ("values", code.values)):
        if not jnp.issubdtype(array.dtype, jnp.floating):
            raise TypeError(f"`{name}` got {what} of dtype {array.dtype}, expected floating point; convert it first.")
    if not jnp.issubdtype(code.indices.dtype, jnp.integer):
        raise TypeError(
            f"`{name}` got indices of dtype {code.indices.dtype}, expected integers; convert them to int32."
        )
    if dictionary.ndim != 2 or dictionary.shape[0] != code.num_latents:
        raise ValueError(
            f"`{name}` got a dictionary of shape {dictionary.shape} for a code of {code.num_latents} latents; pass "
            f"one of shape ({code.num_latents}, d), one atom a row."
        )
    if y.shape[-1:] != dictionary.shape[1:]:
        raise ValueError(
            f"`{name}` got y of shape {y.shape}, but the atoms have width {dictionary.shape[1]}; pass y of shape "
            f"(*b, {dictionary.shape[1]})."
        )
    if code.indices.shape != code.values.shape or code.indices.shape[:-1] != y.shape[:-1]:
        raise ValueError(
            f"`{name}` got values {code.values.shape} and indices {code.indices.shape} for y of shape {y.shape}; "
            f"pass both with shape {(*y.shape[:-1], 'k')}."
        )


def _accumulator(*arrays) -> jnp.dtype:
    return jnp.promote_types(jnp.result_type(*arrays), jnp.float32)


def _row_bytes(k: int, d: int, dtype) -> int:
    return (k * (d + k) + d) * jnp.dtype(dtype).itemsize


def _divide(x, by):
    """`x / by`, and 0 where `by` is 0."""
    return jnp.where(by == 0, 0, x / jnp.where(by == 0, 1, by))


def _gather(dictionary, indices, y, *, least: float | Array = 0.0):
    """The rows' atoms `[n k d]` and targets `[n d]`, each divided by its largest magnitude, `[n k]` and `[n 1]`.

    No atom that is not zero is divided by less than `least`.
    """
    atoms = dictionary.at[indices].get(mode="fill", fill_value=0).astype(y.dtype)
    atom_scale = jnp.max(jnp.abs(atoms), axis=2, initial=0)
    atom_scale = jnp.where(atom_scale == 0, 0, jnp.maximum(atom_scale, least))
    y_scale = jnp.max(jnp.abs(y), axis=1, keepdims=True, initial=0)
    return _divide(atoms, atom_scale[:, :, None]), atom_scale, _divide(y, y_scale), y_scale


class _Problem(NamedTuple):
    """Unit-free problems of `n` rows: `x = z · unit` minimises `½xᵀGx − cᵀx`; `G` has ones on its diagonal."""

    gram: Array  # [n k k]
    c: Array  # [n k]
    unit: Array  # [n k]  ‖a_i‖ / ‖y‖; 0 for padding, zero atoms and y = 0, where the answer is 0
    weight: Array  # [n k]  ‖a_i‖ / max‖a‖: from the gradient in x to the KKT residual
    finite: Array  # [n]  and within range: an answer that overflows or vanishes is none


def _problems(dictionary, y, indices, ridge) -> _Problem:
    root = jnp.sqrt(ridge)
    atoms, atom_scale, y, y_scale = _gather(dictionary, indices, y, least=root)
    gram = jnp.einsum("nid,njd->nij", atoms, atoms, precision=_EXACT)
    c = jnp.einsum("nid,nd->ni", atoms, y, precision=_EXACT)
    norm = jnp.sqrt(jnp.diagonal(gram, axis1=1, axis2=2))
    y_norm = jnp.linalg.norm(y, axis=1, keepdims=True)
    length = norm * atom_scale
    # The ridge joins the diagonal before it is made 1; a zero atom is left out.
    relative_ridge = _divide(root, atom_scale) ** 2
    norm = jnp.sqrt(norm**2 + relative_ridge)
    gram = gram + relative_ridge[:, :, None] * jnp.eye(gram.shape[-1], dtype=gram.dtype)
    unit = _divide(_divide(norm, y_norm) * atom_scale, y_scale)
    in_range = (jnp.isfinite(unit) & ((unit > 0) | (norm == 0) | (y_scale == 0))).all(1)
    return _Problem(
        gram=_divide(gram, norm[:, :, None] * norm[:, None, :]),
        c=_divide(c, norm * y_norm),
        unit=unit,
        weight=_divide(norm * atom_scale, jnp.max(length, axis=1, keepdims=True, initial=0)),
        finite=jnp.isfinite(atom_scale).all(1) & in_range & jnp.isfinite(y_scale[:, 0]) & (ridge >= 0),
    )


def _violation(z, gradient, nonnegative: bool):
    """How far each coordinate is from optimal, `z` in units where the Gram matrix has ones on its diagonal."""
    if not nonnegative:
        return jnp.abs(gradient)
    return jnp.where(z > 0, jnp.abs(gradient), jnp.maximum(jnp.maximum(-gradient, -z), 0))


class _Carry(NamedTuple):
    state: Any  # the solver's
    best: Array  # [k] the iterate to return, the best so far
    best_gradient: Array  # [k]
    steps: Array
    running: Array


def _drive(solver, gram, c, weight, z, nonnegative: bool):
    """Run a solver on one unit-free problem until its KKT residual is within tolerance.

    It stops on a residual that is at least the one it returns: as if every atom were as long as the longest, so that
    short atoms are solved as well as long ones.

    The objective's change between two points of a quadratic is `½(z − z')ᵀ(g + g')`, exactly; so "better" is decided
    without subtracting two nearly equal objectives.
    """
    project = jax.nn.relu if nonnegative else lambda z: z

    def residual(z, gradient, weight):
        return jnp.max(weight * _violation(z, gradient, nonnegative), initial=0)

    strict = jnp.maximum(weight, 1)

    def improvement(state, z, gradient):
        return -0.5 * jnp.sum((state.z - z) * (state.gradient + gradient))

    start = solver.init(gram, c, project(z))

    def step(carry: _Carry) -> _Carry:
        state = solver.step(gram, c, carry.state, project)
        within = residual(state.z, state.gradient, strict) <= solver.tol
        done = within & (improvement(state, start.z, start.gradient) >= 0)
        better = done | (improvement(state, carry.best, carry.best_gradient) > 0)
        steps = carry.steps + 1
        return _Carry(
            state,
            jnp.where(better, state.z, carry.best),
            jnp.where(better, state.gradient, carry.best_gradient),
            steps,
            ~done & (steps < solver.max_steps),
        )

    # NaN compares false: a row that is not finite never runs.
    running = (residual(start.z, start.gradient, strict) > solver.tol) & (solver.max_steps > 0)
    carry = _Carry(start, start.z, start.gradient, jnp.zeros((), jnp.int32), running)
    carry = jax.lax.while_loop(lambda carry: carry.running, step, carry)
    return carry.best, residual(carry.best, carry.best_gradient, weight), carry.steps


def _excess(gram, c, z, other):
    """How much higher the objective is at `z` than at `other`."""
    return 0.5 * jnp.sum((z - other) * (jnp.matmul(gram, z + other, precision=_EXACT) - 2 * c))


def _solve(nonnegative: bool, shared, per_row):
    solver, dictionary, ridge = shared
    y, indices, values = per_row

    def chunk(y, indices, values):
        problem = _problems(dictionary, y.astype(ridge.dtype), indices, ridge)
        start = values.astype(ridge.dtype) * problem.unit
        usable = jnp.isfinite(start).all(1)
        best, kkt, steps = jax.vmap(functools.partial(_drive, solver, nonnegative=nonnegative))(
            problem.gram, problem.c, problem.weight, jnp.where(usable[:, None], start, 0)
        )
        finite = problem.finite & jnp.isfinite(values).all(1)
        feasible = jax.nn.relu(values) if nonnegative else values
        refitted = _divide(best, problem.unit).astype(values.dtype)
        moved = (steps > 0) | ~usable  # else the start is optimal already, and comes back to the bit
        if values.dtype != ridge.dtype:  # rounded to fewer bits, the best iterate can be worse than the start
            rounded = refitted.astype(ridge.dtype) * problem.unit
            moved &= ~(
                jax.vmap(_excess)(problem.gram, problem.c, rounded, feasible.astype(ridge.dtype) * problem.unit) > 0
            )
        refitted = jnp.where(moved[:, None] | (problem.unit == 0), refitted, feasible)
        status = jnp.where(kkt <= solver.tol, Status.CONVERGED, Status.MAX_STEPS)
        info = RefitInfo(
            kkt=jnp.where(finite, kkt, jnp.nan),
            steps=jnp.where(finite, steps, 0),
            status=jnp.where(finite, status, Status.NONFINITE).astype(jnp.int32),
        )
        return jnp.where(finite[:, None], refitted, values), info

    row_bytes = _row_bytes(indices.shape[-1], dictionary.shape[-1], ridge.dtype)
    return rows.map_chunks(chunk, y, indices, values, batch=y.shape[:-1], row_bytes=row_bytes)


_SOLVE = {nonnegative: rows.fold_vmap(functools.partial(_solve, nonnegative)) for nonnegative in (True, False)}


@functools.partial(jax.jit, static_argnums=0)
def _solve_jitted(nonnegative: bool, solver, dictionary, y, indices, values, ridge):
    return _SOLVE[nonnegative]((solver, dictionary, ridge), (y, indices, values))


_refit = jax.custom_vjp[tuple[Array, RefitInfo]](_solve_jitted, nondiff_argnums=(0,))


def _refit_forward(nonnegative, solver, dictionary, y, indices, values, ridge):
    outputs = _refit(nonnegative, solver, dictionary, y, indices, values, ridge)
    values, info = outputs
    return outputs, (dictionary, y, indices, values, ridge, info.status != Status.NONFINITE)


def _refit_backward(nonnegative, residuals, cotangents):
    """The implicit derivative on the active set `F`, the coordinates that the constraint leaves free.

    From `G_FF z_F = c_F`, with `u = G_FF⁻¹ z̄_F` and `r = y − Aᵀz`:  `ȳ = Aᵀu`, `Ā = u rᵀ − z (Aᵀu)ᵀ`, `ridge‾ = −uᵀz`.
    """
    dictionary, y, indices, values, ridge, finite = residuals
    k, d = indices.shape[-1], dictionary.shape[-1]
    finite = finite & jnp.isfinite(cotangents[0]).all(-1)

    def chunk(carry, y, indices, z, z_bar, finite):
        dictionary_bar, ridge_bar = carry
        # Rows that are not finite, and padding rows, become empty supports: no derivative, no NaN.
        free = (indices < dictionary.shape[0]) & finite[:, None] & ((z > 0) | (not nonnegative))
        atoms = dictionary.at[indices].get(mode="fill", fill_value=0).astype(ridge.dtype)
        atoms = jnp.where(free[:, :, None], atoms, 0)
        y, z, z_bar = (
            jnp.where(keep, x, 0).astype(ridge.dtype) for x, keep in ((y, finite[:, None]), (z, free), (z_bar, free))
        )
        u = _solve_free(jnp.einsum("nid,njd->nij", atoms, atoms, precision=_EXACT), free, z_bar, ridge)
        y_bar, x = (jnp.einsum("nkd,nk->nd", atoms, v, precision=_EXACT) for v in (u, z))
        atoms_bar = u[:, :, None] * (y - x)[:, None, :] - z[:, :, None] * y_bar[:, None, :]
        dictionary_bar = dictionary_bar.at[jnp.where(free, indices, dictionary.shape[0])].add(atoms_bar, mode="drop")
        return (dictionary_bar, ridge_bar - jnp.sum(u * z)), y_bar

    (dictionary_bar, ridge_bar), y_bar = rows.scan_chunks(
        chunk,
        (jnp.zeros(dictionary.shape, ridge.dtype), jnp.zeros_like(ridge)),
        *(y, indices, values, cotangents[0], finite),
        batch=y.shape[:-1],
        row_bytes=2 * _row_bytes(k, d, ridge.dtype),
    )
    return None, dictionary_bar.astype(dictionary.dtype), y_bar.astype(y.dtype), None, None, ridge_bar


_refit.defvjp(_refit_forward, jax.jit(_refit_backward, static_argnums=0))


def _solve_free(gram, free, rhs, ridge):
    """Solve `(G_FF + ridge) u = rhs` for each row; `u` is 0 off `F`, where gram and rhs are 0."""
    diagonal = jnp.diagonal(gram, axis1=1, axis2=2) + ridge
    norm = jnp.sqrt(jnp.where(free & (diagonal > 0), diagonal, 1))
    eye = jnp.eye(gram.shape[-1], dtype=gram.dtype)
    unit = jnp.where(eye > 0, 1, gram / (norm[:, :, None] * norm[:, None, :]))
    solved = jax.vmap(_semidefinite_solver())(unit, (rhs / norm)[:, :, None])[:, :, 0]
    return jnp.where(free, solved / norm, 0)


def _solve_semidefinite(gram, rhs):
    """Solve `GX = B` for one `G` of unit diagonal, singular or not, when the columns of `B [k n]` are in its range.

    A few ulps on the diagonal let repeated atoms be factorised; two steps of refinement take their effect out.
    """
    jitter = 4 * gram.shape[-1] * jnp.finfo(gram.dtype).eps
    factor = jnp.linalg.cholesky(gram + jitter * jnp.eye(gram.shape[-1], dtype=gram.dtype))
    x = jnp.zeros_like(rhs)
    for _ in range(3):
        x = x + jax.scipy.linalg.cho_solve((factor, True), rhs - jnp.matmul(gram, x, precision=_EXACT))
    return x


_solve_semidefinite_in_turn = jax.custom_batching.sequential_vmap(_solve_semidefinite)


def _semidefinite_solver():
    # jaxlib's batched LAPACK on a CPU waits, inside the thread pool, for work it queued in that same pool: two of
    # them at once stop a two-core machine for ever (seen with jaxlib 0.10.2). One matrix at a time never queues.
    return _solve_semidefinite_in_turn if jax.default_backend() == "cpu" else _solve_semidefinite


def _certify(nonnegative: bool, dictionary, per_row):
    def chunk(y, indices, values):
        atoms, atom_scale, y, y_scale = _gather(dictionary, indices, y)
        norm = jnp.linalg.norm(atoms, axis=2)
        length = norm * atom_scale
        weight = _divide(length, jnp.max(length, axis=1, keepdims=True, initial=0))
        z = _divide(values.astype(y.dtype) * atom_scale, y_scale) * norm
        return jax.vmap(functools.partial(_certify_row, nonnegative))(_divide(atoms, norm[:, :, None]), weight, y, z)

    y, indices, _ = per_row
    row_bytes = 3 * _row_bytes(indices.shape[-1], y.shape[-1], y.dtype)
    return rows.map_chunks(chunk, *per_row, batch=y.shape[:-1], row_bytes=row_bytes)


def _certify_row(nonnegative: bool, atoms, weight, y, z):
    """KKT residual and duality gap of one row, for atoms of norm 1 (or 0) that had norms in proportion to `weight`."""
    project = jax.nn.relu if nonnegative else lambda g: g
    matvec = functools.partial(jnp.matmul, precision=_EXACT)
    y_norm = jnp.linalg.norm(y)
    r = y - matvec(z, atoms)
    slope = matvec(atoms, r)
    kkt = _divide(jnp.max(weight * _violation(z, -slope, nonnegative), initial=0), y_norm)
    gram = matvec(atoms, atoms.T)

    def gap(on, rhs):
        """The gap of the dual point `u = r − Aᵀδ`, with `δ` on a set of coordinates and `A Aᵀδ = rhs` there."""
        both = on[:, None] & on[None, :]
        restricted = jnp.where(both, gram, jnp.eye(on.size, dtype=gram.dtype))
        moved = matvec(_semidefinite_solver()(restricted, jnp.where(on, rhs, 0)[:, None])[:, 0], atoms)
        dual = slope - matvec(atoms, moved)
        infeasible = jnp.max(project(dual) if nonnegative else jnp.abs(dual), initial=0)
        # P − D = ½‖r − u‖² − zᵀAu, free of the cancellation between two nearly equal objectives.
        value = _divide(jnp.sum(moved**2) - 2 * jnp.sum(z * dual), y_norm**2)
        return jnp.where(infeasible <= 32 * jnp.finfo(y.dtype).eps * y_norm, value, jnp.inf)

    everywhere = gap(jnp.ones_like(slope, bool), project(slope))
    # Where (Ar)₊ is not in the range of G (k > d, opposite atoms), make u orthogonal to the atoms in use instead.
    in_use = gap((z != 0) | (slope > 0), slope)
    best = jnp.minimum(jnp.minimum(everywhere, in_use), _divide(jnp.sum(r**2), y_norm**2))  # u = 0 is feasible too
    finite = jnp.isfinite(y_norm) & jnp.isfinite(slope).all()
    return jnp.where(finite, kkt, jnp.nan), jnp.where(finite, jnp.maximum(best, 0), jnp.nan)


_CERTIFY = {n: jax.jit(rows.fold_vmap(functools.partial(_certify, n))) for n in (True, False)}
