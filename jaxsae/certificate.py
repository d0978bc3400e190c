"""Certificates: how far a code is from optimal on its support, from the residual and whatever computed the code."""

import functools

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from jaxsae import gram, pytrees, rows, sharding, solvers
from jaxsae.codes import SparseCode
from jaxsae.linalg import matmul, max_or_nan, solve_on


@pytrees.dataclass
class Certificate:
    """Bounds on how far a code is from optimal on its support, computed without the solver.

    Attributes:
      kkt: `[*b]` relative KKT residual, `max_i v_i / (max_i‖a_i‖ ‖y‖)`; 0 is optimal.
      gap: `[*b]` duality gap relative to `½‖y‖²`: the excess of the row's error over the best possible one, relative
        to `‖y‖²`, is at most this. In float32, on nearly singular supports (condition numbers of 3e4 and more), the
        dual point is feasible only to rounding, and the gap can fall short.

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
    dictionary: Float[Array, "m d"] | gram.Dictionary,
    y: Float[Array, "*b d"],
    code: SparseCode,
    *,
    nonnegative: bool = True,
) -> Certificate:
    """Certify a code's values on its support, from the residual itself and whatever computed them.

    With `r = y − Aᵀz` and `g = −Ar`:

        v_i = |g_i| where z_i > 0,  max(−g_i, 0) elsewhere     (|g_i| everywhere if the sign is free)
        kkt = max_i v_i / (max_i‖a_i‖ ‖y‖)
        gap = (½‖r‖² − (uᵀy − ½‖u‖²)) / ½‖y‖²,   u = r − Aᵀδ,  δ = G⁺(Ar)₊

    `u` is feasible for the dual (`Au ≤ 0`), so the gap bounds the excess error; where rounding or a singular `G`
    makes it infeasible, another feasible `u` stands in. A negative value under the constraint counts as its own
    violation. Of `y = 0` a code that decodes to 0 has 0 for both, and any other infinity.

    Args:
      dictionary: `[m d]`, or any pytree with `take`, as for `refit`.
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

    Source: Boyd & Vandenberghe (2004), "Convex optimization", Section 5.5: duality gaps and KKT conditions.
    """
    gram.validate(dictionary, y, code, "certify")
    y = y.astype(gram.accumulator(dictionary, y))
    certified = functools.partial(_certify_jitted, nonnegative, code.num_latents)
    return Certificate(*sharding.automatic(certified, code.indices)(dictionary, (y, code.indices, code.values)))


@functools.partial(jax.jit, static_argnums=(0, 1))
def _certify_jitted(nonnegative: bool, num_latents: int, dictionary, per_row):
    return _certify_folded(nonnegative, num_latents)(dictionary, per_row)


@functools.cache
def _certify_folded(nonnegative: bool, num_latents: int):
    return rows.fold_vmap(functools.partial(_certify, nonnegative, num_latents))


def _certify(nonnegative: bool, num_latents: int, dictionary, per_row):
    def chunk(y, indices, values):
        ridge = jnp.zeros((), y.dtype)
        problem = gram.unit_rows(dictionary, y, indices, num_latents=num_latents, ridge=ridge)
        z = values.astype(y.dtype) * problem.unit
        return jax.vmap(functools.partial(_certify_row, nonnegative))(problem.atoms, problem.weight, problem.y, z)

    y, indices, _ = per_row
    row_bytes = 3 * gram.row_bytes(indices.shape[-1], y.shape[-1], y.dtype.itemsize)
    return rows.map_chunks(chunk, *per_row, batch=y.shape[:-1], row_bytes=row_bytes)


def _certify_row(nonnegative: bool, atoms, weight, y, z):
    """KKT residual and duality gap of one row, for atoms of norm 1 (or 0) that had norms in proportion to `weight`."""
    project = jax.nn.relu if nonnegative else lambda g: g
    y_norm = jnp.linalg.norm(y)

    def relative(x, to):
        return jnp.where(x == 0, 0, x / to)  # of y = 0: 0 is optimal, and whatever is not is infinitely far from it

    r = y - matmul(z, atoms)
    slope = matmul(atoms, r)
    kkt = relative(max_or_nan(weight * solvers.violation(z, -slope, nonnegative)), y_norm)
    atoms_atoms = matmul(atoms, atoms.T)

    def gap(on, rhs):
        """The gap of the dual point `u = r − Aᵀδ`, with `δ` on a set of coordinates and `A Aᵀδ = rhs` there."""
        moved = matmul(solve_on(atoms_atoms, on, rhs), atoms)
        dual = slope - matmul(atoms, moved)
        infeasible = max_or_nan(project(dual) if nonnegative else jnp.abs(dual))
        # P − D = ½‖r − u‖² − zᵀAu, free of the cancellation between two nearly equal objectives.
        value = relative(jnp.sum(moved**2) - 2 * jnp.sum(z * dual), y_norm**2)
        return jnp.where(infeasible <= 32 * jnp.finfo(y.dtype).eps * y_norm, value, jnp.inf)

    everywhere = gap(jnp.ones_like(slope, bool), project(slope))
    # Where (Ar)₊ is not in the range of G (k > d, opposite atoms), make u orthogonal to the atoms in use instead.
    in_use = gap((z != 0) | (slope > 0), slope)
    best = jnp.minimum(jnp.minimum(everywhere, in_use), relative(jnp.sum(r**2), y_norm**2))  # u = 0 is feasible too
    finite = jnp.isfinite(y_norm) & jnp.isfinite(slope).all()
    return jnp.where(finite, kkt, jnp.nan), jnp.where(finite, jnp.maximum(best, 0), jnp.nan)
