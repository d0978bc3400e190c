"""Certificates: bounds on how far a code is from optimal on its support, computed from its residual alone."""

import contextlib
import functools
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from jaxsae import sharding
from jaxsae._core import chunking, pytrees, sparse
from jaxsae._core.linalg import EXACT, matmul, max_or_nan, residual, solve_on
from jaxsae.codes import SparseCode
from jaxsae.least_squares import problems
from jaxsae.least_squares.bounds import Bounds, of_sign, validate_bounds


@pytrees.dataclass
class Certificate:
    """Bounds on how far a code is from optimal on its support, computed without the solver; they have no derivative.

    Attributes:
      kkt: `[*b]` relative KKT residual, `max_i v_i / (max_i‖a_i‖ ‖y‖)` with the `v_i` of `certify`; 0 is optimal. The
        whole gradient of a value counts as soon as it is off its bound, however little: for values of other solvers
        that end next to their bounds, look at the gap.
      gap: `[*b]` duality gap relative to `½‖y‖²`: the excess of the row's error over the best possible one, relative
        to `‖y‖²`, is at most this. The dual point is feasible only to rounding: for any order of summation, the gap is
        too small by at most `2 (32 + d) eps Σᵢ ‖a_i‖ max(|z_i|, |z*_i|) / ‖y‖`, `z*` the best values. On CPUs and
        GPUs certificates are computed in float64, whatever the arguments, where that is negligible up to condition
        numbers of `A` of some 1e9; on TPUs in float32, where it is up to 3e4.

    Example:
      >>> import jax.numpy as jnp, jaxsae
      >>> code = jaxsae.SparseCode(values=jnp.array([0.5]), indices=jnp.array([0]), num_latents=2)
      >>> certificate = jaxsae.certify(jnp.eye(2), jnp.array([1.0, 0.0]), code)  # the best value is 1, the error 0
      >>> float(certificate.kkt), float(certificate.gap)
      (0.5, 0.25)
    """

    kkt: Float[Array, "*b"]
    gap: Float[Array, "*b"]


def certify(
    dictionary: Float[Array, "m d"] | problems.Dictionary,
    y: Float[Array, "*b d"],
    code: SparseCode,
    *,
    nonnegative: bool = True,
    ridge: float | Float[Array, ""] = 0.0,
) -> Certificate:
    """Certify a code's values on its support, computed from the residual and independent of the solver.

    With `r = y − Aᵀz` and `g = −Ar`:

        v_i = |g_i| where z_i > 0,  max(−g_i, 0) elsewhere     (|g_i| everywhere if the sign is free)
        kkt = max_i v_i / (max_i‖a_i‖ ‖y‖)
        gap = (½‖r‖² − (uᵀy − ½‖u‖²)) / ½‖y‖²,   u = r − Aᵀδ,  δ = G⁺(Ar)₊

    All is computed in float64, and on a TPU the residual in twice the precision of float32. A ridge adds `k`
    coordinates, in which `y` is 0 and atom `i` is `√ridge` at coordinate `i`, so that the problem is that of `refit`
    with the same ridge.

    `u` is feasible for the dual (`Au ≤ 0`), so the gap bounds the excess error; where rounding or a singular `G`
    makes it infeasible, another feasible `u` is used. A negative value under the constraint counts as a violation of
    its size. For `y = 0`, both are 0 if the code decodes to 0, and infinite otherwise.

    Args:
      dictionary: `[m d]`, or any pytree with `take`, as for `refit`.
      y: targets `[*b d]`.
      code: `[*b k]`.
      nonnegative: whether the constraint is `z ≥ 0`; free signs otherwise.
      ridge: weight of `½‖z‖²`, as for `refit`.

    Returns:
      `Certificate`, `[*b]` in float32 or better; NaN where a row is not finite.

    Raises:
      ValueError, TypeError: at trace time, if shapes or dtypes do not fit together, or a known ridge is negative
        or not finite.

    Example:
      >>> import jax.numpy as jnp, jaxsae
      >>> code = jaxsae.SparseCode(values=jnp.array([0.5]), indices=jnp.array([0]), num_latents=2)
      >>> jaxsae.certify(jnp.eye(2), jnp.array([1.0, 0.0]), code).kkt
      Array(0.5, dtype=float32)

    Source: Boyd & Vandenberghe (2004), "Convex optimization", Section 5.5: duality gaps and KKT conditions.
    """
    dictionary, y, code = problems.validate(dictionary, y, code, "certify")
    problems.check_numbers("certify", "a ridge of", ridge, do="a ridge of 0 or more, finite")
    dtype = problems.accumulator(dictionary, y)
    with _float64():
        ridge = jnp.asarray(ridge, _wide(dtype))
        certified = sharding.automatic(
            functools.partial(_certify, (nonnegative, code.num_latents, dtype)), code.indices
        )
        arguments = (dictionary, ridge), (y.astype(dtype), code.indices, code.values)
        return Certificate(*certified(*jax.lax.stop_gradient(arguments)))


def _float64():
    """Let what is traced inside use float64, where processors have it."""
    return contextlib.nullcontext() if sharding.on_tpu() else jax.enable_x64(True)


def _wide(dtype):
    """The dtype of the arithmetic for arguments of a dtype."""
    return dtype if sharding.on_tpu() else jnp.dtype(jnp.float64)


def _rounded_up(x: Array, dtype) -> Array:
    """A bound in fewer bits."""
    nearest = x.astype(dtype)
    return jnp.where(nearest.astype(x.dtype) < x, jnp.nextafter(nearest, jnp.asarray(jnp.inf, dtype)), nearest)


@chunking.over_rows
def _certify(static: tuple[bool, int, Any], shared, per_row):
    nonnegative, num_latents, dtype = static
    dictionary, ridge = shared

    def chunk(y, indices, values):
        atoms = problems.take_used(dictionary, indices, num_latents, dtype)
        # Of numbers that are subnormal in the dtype of the arguments, float64 may get 0.
        finite = jnp.isfinite(problems.largest(atoms)).all((1, 2)) & jnp.isfinite(problems.largest(y)[:, 0])
        y = y.astype(ridge.dtype)
        values = jnp.where(sparse.used(indices, num_latents), values, 0)
        problem = problems.unit_rows(atoms.astype(ridge.dtype), y, ridge)
        finite &= problem.finite & problems.representable(problem.unit, dtype).all(1)
        z = values.astype(y.dtype) * problem.unit
        if y.dtype == dtype:
            r = problems.residuals(dictionary, y, SparseCode(values, indices, num_latents))
        else:  # twice the precision as it is
            r = problem.y - jnp.einsum("nk,nkd->nd", z, problem.atoms, precision=EXACT)
        certify_row = jax.vmap(functools.partial(_certify_row, nonnegative))
        some = jnp.any(y != 0, axis=1)
        certified = certify_row(problem.atoms, problem.ridge, problem.weight, some, r, z, finite)
        return tuple(_rounded_up(x, dtype) for x in certified)

    y, indices, _ = per_row
    row_bytes = 4 * problems.row_bytes(indices.shape[-1], y.shape[-1], ridge.dtype.itemsize)
    return chunking.map_chunks(chunk, *per_row, batch=y.shape[:-1], row_bytes=row_bytes)


def _certify_row(nonnegative: bool, atoms, ridge, weight, some, r, z, finite):
    """KKT residual and duality gap of one row, for atoms that are of norm 1 (or 0) together with their ridge.

    Before scaling, their norms were proportional to `weight`; `r` is the residual for a target of norm 1, or for 0 if
    `some` is false.
    """
    slope = matmul(atoms, r) - ridge * z
    G = matmul(atoms, atoms.T) + jnp.diag(ridge)

    def move(delta):
        moved = matmul(delta, atoms)
        return jnp.sum(moved**2) + jnp.sum(ridge * delta**2), slope - matmul(atoms, moved) - ridge * delta

    limits = of_sign(nonnegative)
    gap = _gap(limits, G, slope, z, move, float(jnp.finfo(z.dtype).eps))
    gap = jnp.minimum(gap, jnp.sum(r**2) + jnp.sum(ridge * z**2))  # u = 0 is feasible too
    kkt = max_or_nan(weight * limits.violation(z, -slope))
    finite &= jnp.isfinite(slope).all()
    # For y = 0, anything but 0 is infinitely far from optimal.
    return tuple(jnp.where(finite, jnp.where((x == 0) | some, x, jnp.inf), jnp.nan) for x in (kkt, jnp.maximum(gap, 0)))


def _gap(bounds: Bounds, G, slope, z, move, rounding: float):
    """Duality gap of one row of unit-free atoms, with `slope = Ar`, by the best dual point `u = r − Aᵀδ` found.

    `move(δ)` returns `‖Aᵀδ‖²` and `Au`. Where no such point is feasible to the rounding of the arithmetic, one that is
    to the `rounding` of `G` and the slope counts. A value between two bounds allows any `Au`: where it is negative the
    value is compared with the lower bound, and with the upper one where it is positive.
    """
    infinite = [jnp.logical_not(jnp.isfinite(bound)) for bound in bounds]

    def project(dual):
        """What makes a dual point infeasible."""
        return jnp.where(infinite[0], jnp.minimum(dual, 0), 0) + jnp.where(infinite[1], jnp.maximum(dual, 0), 0)

    def above(dual):
        """The values, from the bounds that they are compared with."""
        if bounds.at_zero:
            return z
        lower, upper = _finite_or(*bounds), _finite_or(*bounds[::-1])
        return z - jnp.where(dual < 0, lower, upper)

    def at(on, wanted):
        """The dual point with `δ` on a set of coordinates, where `Au` is as wanted."""
        delta = solve_on(G, on, wanted(slope))
        delta = delta + solve_on(G, on, wanted(move(delta)[1]))  # refine once, against the rounding of G
        return move(delta)

    def within(infeasible):
        """The least gap of the dual points that are no more infeasible than that."""
        return jnp.min(jnp.stack([jnp.where(by <= infeasible, gap, jnp.inf) for by, gap in points]))

    # Where (Ar)₊ is not in the range of G (k > d, opposite atoms), make u orthogonal to the atoms in use instead.
    in_use = bounds.inside(z) | (bounds.split(z, -slope)[1] != 0)
    found = at(jnp.ones_like(in_use), project), at(in_use, lambda dual: dual), (jnp.zeros((), z.dtype), slope)
    # P − D = ½‖r − u‖² − zᵀAu, free of the cancellation between two nearly equal objectives.
    gaps = [moved - 2 * jnp.sum(above(dual) * dual) for moved, dual in found]
    gaps = [jnp.where(jnp.isfinite(gap), gap, jnp.inf) for gap in gaps]  # a factorisation may fail
    points = [(max_or_nan(jnp.abs(project(dual))), gap) for (_, dual), gap in zip(found, gaps, strict=True)]
    least = within(32 * jnp.finfo(z.dtype).eps)
    return jnp.where(jnp.isfinite(least), least, within(32 * rounding))


def _finite_or(bound: Array, other: Array) -> Array:
    """A bound, or the other one where it is infinite, or 0."""
    return jnp.where(jnp.isfinite(bound), bound, jnp.where(jnp.isfinite(other), other, 0))


def certify_gram(
    G: Float[Array, "*b n n"],
    c: Float[Array, "*b n"],
    z: Float[Array, "*b n"],
    *,
    nonnegative: bool = True,
    bounds: tuple[float | Float[Array, "..."], float | Float[Array, "..."]] | None = None,
) -> Certificate:
    """Certify values of a quadratic problem from its Gram matrix, independent of the solver.

    As `certify`, with `s = max_i |c_i|/√G_ii` in place of `‖y‖`, which a Gram matrix does not hold: `s` is the length
    of `y` along its best atom, so that both bounds are at least those of `certify`. With bounds on the values, `s` is
    that of `c − Gp` for the point `p` within them that is nearest to 0. The gradient `Gz − c` is summed in twice the
    precision of the arguments; the rounding of `G` and `c` themselves is not seen. The gap has the allowance of
    `Certificate`.

    Args:
      G: `[*b n n]`, symmetric and positive semi-definite.
      c: `[*b n]`.
      z: values `[*b n]`.
      nonnegative: whether the constraint is `z ≥ 0`; free signs otherwise.
      bounds: `(lower, upper)` as for `nnls`, instead.

    Returns:
      `Certificate`, `[*b]` in float32 or better; NaN where a row is not finite, or the problem `INVALID` to `nnls`.

    Raises:
      ValueError, TypeError: at trace time, if shapes or dtypes do not fit together, or known bounds cross.

    Example:
      >>> import jax.numpy as jnp, jaxsae
      >>> jaxsae.certify_gram(jnp.eye(2), jnp.array([1.0, -1.0]), jnp.array([0.5, 0.0]))
      Certificate(kkt=Array(0.5, dtype=float32), gap=Array(0.25, dtype=float32))

    Source: Boyd & Vandenberghe (2004), "Convex optimization", Section 5.5: duality gaps and KKT conditions.
    """
    G, c, z = problems.validate_gram(G, c, z, "certify_gram")
    limits = None if bounds is None else validate_bounds(bounds, z, "certify_gram")
    with _float64():
        certified = sharding.automatic(functools.partial(_certify_gram, nonnegative, _wide(c.dtype)), c)
        return Certificate(*certified(*jax.lax.stop_gradient((c, G, z, limits))))


@functools.partial(jax.jit, static_argnums=(0, 1))
def _certify_gram(nonnegative: bool, wide: Any, *per_row):
    batch, rows = chunking.flatten(per_row)
    n, dtype = rows[0].shape[-1], rows[0].dtype

    def chunk(*chunk):
        certified = certify(*jax.tree.map(lambda x: x.astype(wide), chunk))
        return tuple(_rounded_up(x, dtype) for x in certified)

    def certify(c, G, z, limits):
        nearest, at, bounds = jnp.zeros_like(c), c, of_sign(nonnegative)
        if limits is not None:
            nearest, at, bounds = problems.shifted(G, c, limits)
        problem, valid = problems.unit_free(G, at, bounds)
        finite = problem.finite & valid & jnp.isfinite(z).all(1)
        x = (z - nearest) * problem.unit
        within = bounds if limits is None else problems.unit_bounds(problem, bounds)
        axes = (None if limits is None else 0, 0, 0, 0, 0, 0)
        certify_row = jax.vmap(functools.partial(_certify_gram_row, float(jnp.finfo(dtype).eps)), in_axes=axes)
        certified = certify_row(within, problem.gram, problem.c, problem.weight, x, finite)
        # Infinitely far from optimal are what moves where nothing should, and what should move and is not seen.
        moved = jnp.any(matmul(G, (z - nearest)[:, :, None]) != 0, axis=(1, 2))
        wrong = moved & ~jnp.any(at != 0, axis=1)
        if limits is not None:
            ahead = jnp.where(c > 0, limits.upper, limits.lower)
            flat = (jnp.diagonal(G, axis1=1, axis2=2) == 0) & (c != 0)
            wrong |= jnp.any((flat & (z != ahead)) | limits.outside(z), axis=1)
        return tuple(jnp.where(wrong & finite, jnp.inf, x) for x in certified)

    return chunking.unflatten(
        batch, chunking.map_chunks(chunk, *rows, batch=rows[0].shape[:1], row_bytes=8 * n * n * wide.itemsize)
    )


def _certify_gram_row(rounding: float, bounds: Bounds, G, c, weight, z, finite):
    slope = residual(c, z, G)

    def move(delta):
        product = matmul(G, delta)
        return jnp.maximum(jnp.sum(delta * product), 0), slope - product

    kkt = max_or_nan(weight * bounds.violation(z, -slope))
    # Rounded, a singular matrix is no longer positive semi-definite; smaller off its diagonal it is.
    definite = jnp.where(jnp.eye(z.size, dtype=bool), G, G * (1 - z.size * rounding))
    gap = jnp.maximum(_gap(bounds, definite, slope, z, move, rounding), 0)
    return tuple(jnp.where(finite, x, jnp.nan) for x in (kkt, gap))
