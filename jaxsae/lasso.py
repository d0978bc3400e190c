"""The lasso: a code chosen by an L1 penalty, its path, and what takes its shrinkage out again.

    minimise ½‖y − Σᵢ zᵢ D[i]‖² + λ‖z‖₁   over z free, or z ≥ 0

The solution is piecewise linear in `λ`, and is followed down from `λ_max`, where the first atom comes in, from one
change of the support to the next (the homotopy of Osborne et al. 2000, LARS with the lasso's modification). On a
support `S` with signs `s`,

    z_S(λ) = G_SS⁻¹(c_S − λ s),   G = DDᵀ,  c = Dy,

so the steps are as many as the changes, each at the cost of two products with `D`, and the end is exact to rounding. A
duality gap from the residual itself judges it; rows that ties or dependent atoms have led astray go on by FISTA.

`lasso` shrinks: the refit on its support is `z_S + λ G_SS⁻¹ s`. `relaxed` and `blend` choose how much of that to undo.
"""

import functools
import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct
from jaxtyping import Array, Float, Int

from jaxsae import codes, gram, rows
from jaxsae.certificate import certify
from jaxsae.codes import SparseCode
from jaxsae.linalg import divide, matmul
from jaxsae.refit import RefitInfo, Status, refit

Number = float | Array | np.ndarray


@struct.dataclass
class LassoInfo(RefitInfo):
    """How a lasso ended, row by row.

    Attributes:
      kkt: `[*b]` relative KKT residual, `max_i v_i / (max_i‖a_i‖ ‖y‖)` with `v_i = |g_i − λ sign z_i|` where `z_i` is not
        0, `max(|g_i| − λ, 0)` elsewhere (`g_i − λ` if non-negative), and `g = D(y − Dᵀz)`; NaN where not finite.
      steps: `[*b]` int32, changes of the support from `λ_max` down to `lam`, and steps of FISTA where needed.
      status: `[*b]` int32, a `Status`: 0 the gap is within `tol`; 1 stopped at `max_steps`, or at `capacity` atoms with
        more to come; 2 not finite, or `lam` negative (an empty code).
      gap: `[*b]` duality gap relative to `½‖y‖²`: the excess of the objective over the least is at most this. The dual
        point, the residual scaled down to `|g| ≤ λ`, is feasible to rounding.
      lam: `[*b]` the penalty.
    """

    gap: Float[Array, "*b"]
    lam: Float[Array, "*b"]


def lasso(
    D: Float[Array, "m d"],
    y: Float[Array, "*b d"],
    lam: Number,
    *,
    nonnegative: bool = False,
    capacity: int | None = None,
    tol: Number = 1e-6,
    max_steps: int | Array = 5000,
) -> tuple[SparseCode, LassoInfo]:
    """Minimise `½‖y − Dᵀz‖² + λ‖z‖₁`, over `z ≥ 0` if asked.

    Scikit-learn's `alpha` is `λ / d`, its design matrix `X [n p]` is `D.T`: `d` samples, `m` variables. A row does not
    depend on its batch. There is no derivative: it is that of `refit` on the support, where wanted.

    Args:
      D: `[m d]`, one atom a row, of any norm. An atom of zeros is never chosen.
      y: targets `[*b d]`.
      lam: the penalty, one number or one a row `[*b]`, in the units of `Dy`.
      nonnegative: constrain `z ≥ 0`.
      capacity: slots a row; `min(m, d)`, which suffices, if None. A row that needs more stops at the penalty where its
        slots were full, and `overflow` says that atoms are missing.
      tol: count a row as converged when its duality gap, relative to `½‖y‖²`, is at most this.
      max_steps: stop a row after this many steps.

    Returns:
      The code, in float32 or better, and `LassoInfo`.

    Raises:
      ValueError, TypeError: at trace time, if shapes or dtypes do not fit together, or a known `lam` is negative.

    Example:
      >>> import jax.numpy as jnp, jaxsae.lasso
      >>> D = jnp.array([[1.0, 0.0], [0.0, 1.0], [0.6, 0.8]])
      >>> code, info = jaxsae.lasso.lasso(D, jnp.array([3.0, -0.1]), 0.5)
      >>> code.dense(), int(info.status)
      (Array([2.5, 0. , 0. ], dtype=float32), 0)

    Source: Tibshirani (1996); Osborne, Presnell & Turlach (2000); Efron et al. (2004), "Least angle regression".
    """
    static = _prepare("lasso", D, y, nonnegative, capacity)
    lam = _penalties("lasso", lam, D, y)[..., None]
    code, info = _run(static, (D, tol, max_steps), (y, lam, None))
    return jax.tree.map(lambda x: jnp.squeeze(x, y.ndim - 1), (code, info))


def path(
    D: Float[Array, "m d"],
    y: Float[Array, "*b d"],
    lams: Number | None = None,
    *,
    n_lambdas: int = 100,
    eps: Number = 1e-3,
    nonnegative: bool = False,
    capacity: int | None = None,
    tol: Number = 1e-6,
    max_steps: int | Array = 5000,
) -> tuple[SparseCode, LassoInfo]:
    """The lasso at a grid of penalties, each from the one before: as much work as the last alone.

    Args:
      D: `[m d]`, one atom a row.
      y: targets `[*b d]`.
      lams: penalties `[L]`, or `[*b L]`; from each row's `λ_max` to `eps λ_max`, evenly in the logarithm, if None.
      n_lambdas: `L`, where `lams` is None.
      eps: the last penalty relative to the first, where `lams` is None.
      nonnegative, capacity, tol, max_steps: as of `lasso`.

    Returns:
      The codes `[*b L k]` and `LassoInfo [*b L]`, whose `lam` holds the penalties in descending order.

    Raises:
      ValueError, TypeError: as `lasso`, or if there is no penalty.

    Example:
      >>> import jax.numpy as jnp, jaxsae.lasso
      >>> D = jnp.array([[1.0, 0.0], [0.0, 1.0]])
      >>> code, info = jaxsae.lasso.path(D, jnp.array([4.0, 3.0]), n_lambdas=3, eps=0.25)
      >>> info.lam, code.dense()[1:]
      (Array([4., 2., 1.], dtype=float32), Array([[2., 1.],
             [3., 2.]], dtype=float32))
    """
    static = _prepare("path", D, y, nonnegative, capacity)
    if lams is None:
        if n_lambdas < 1:
            raise ValueError(f"`path` got n_lambdas {n_lambdas}; pass at least 1.")
        top = lambda_max(D, y, nonnegative=nonnegative)
        lams = top[..., None] * eps ** jnp.linspace(0, 1, n_lambdas, dtype=top.dtype)
    elif np.ndim(lams) == 0 or np.shape(lams)[-1] == 0:
        raise ValueError(f"`path` got penalties of shape {np.shape(lams)}; pass shape (L,) or (*b, L), L at least 1.")
    lams = jnp.sort(_penalties("path", lams, D, y, grid=True), axis=-1, descending=True)
    return _run(static, (D, tol, max_steps), (y, lams, None))


def relaxed(
    D: Float[Array, "m d"],
    y: Float[Array, "*b d"],
    lam: Number,
    phi: Number,
    *,
    nonnegative: bool = False,
    capacity: int | None = None,
    tol: Number = 1e-6,
    max_steps: int | Array = 5000,
) -> tuple[SparseCode, LassoInfo]:
    """The relaxed lasso of Meinshausen (2007): the penalty `φλ` on the atoms that the lasso chose at `λ`.

        S = support of the lasso at λ;   minimise ½‖y − Dᵀz‖² + φλ‖z‖₁   over z on S

    `φ = 1` is the lasso, `φ = 0` its refit; the residual does not grow in between as `φ` falls. Glmnet's `relax` is
    another thing: `blend`.

    Args:
      D: `[m d]`, one atom a row.
      y: targets `[*b d]`.
      lam: the penalty that chooses, one number or `[*b]`.
      phi: from 0 to 1, one number or `[*b]`.
      nonnegative, capacity, tol, max_steps: as of `lasso`.

    Returns:
      The code, on the support of the lasso, and `LassoInfo` of the second problem (`lam` is `φλ`); a row whose choice
      or refit did not converge has its status from there.

    Raises:
      ValueError, TypeError: as `lasso`, or if a known `phi` is not in [0, 1].

    Example:
      >>> import jax.numpy as jnp, jaxsae.lasso
      >>> D, y = jnp.eye(3), jnp.array([3.0, 1.0, 0.2])
      >>> [jaxsae.lasso.relaxed(D, y, 0.5, phi)[0].dense().tolist() for phi in (1.0, 0.5, 0.0)]
      [[2.5, 0.5, 0.0], [2.75, 0.75, 0.0], [3.0, 1.0, 0.0]]

    Source: Meinshausen (2007), "Relaxed lasso".
    """
    phi = _share("relaxed", "phi", phi)
    selected, info = lasso(
        D, y, lam, nonnegative=nonnegative, capacity=capacity, tol=tol, max_steps=max_steps
    )  # select
    lams = (phi * info.lam)[..., None]
    code, relaxed_info = _relax(D, y, selected, lams, nonnegative=nonnegative, tol=tol, max_steps=max_steps)  # refit
    code, relaxed_info = jax.tree.map(lambda x: jnp.squeeze(x, y.ndim - 1), (code, relaxed_info))
    return code, relaxed_info.replace(
        steps=info.steps + relaxed_info.steps, status=jnp.maximum(info.status, relaxed_info.status)
    )


def blend(
    D: Float[Array, "m d"],
    y: Float[Array, "*b d"],
    lam: Number,
    gamma: Number,
    *,
    nonnegative: bool = False,
    capacity: int | None = None,
    tol: Number = 1e-6,
    max_steps: int | Array = 5000,
) -> tuple[SparseCode, LassoInfo]:
    """Blend the lasso with its refit, `γ · lasso + (1 − γ) · refit`, which glmnet calls the relaxed lasso.

    It equals `relaxed` with `φ = γ` where no value changes sign between the lasso and the refit.

    Args:
      D: `[m d]`, one atom a row.
      y: targets `[*b d]`.
      lam: the penalty that chooses, one number or `[*b]`.
      gamma: from 0 to 1, one number or `[*b]`.
      nonnegative, capacity, tol, max_steps: as of `lasso`.

    Returns:
      The code, on the support of the lasso, and the lasso's `LassoInfo`; a row whose refit did not converge has its
      status from there.

    Raises:
      ValueError, TypeError: as `lasso`, or if a known `gamma` is not in [0, 1].

    Example:
      >>> import jax.numpy as jnp, jaxsae.lasso
      >>> jaxsae.lasso.blend(jnp.eye(2), jnp.array([3.0, 0.2]), 0.5, 0.5)[0].dense()
      Array([2.75, 0.  ], dtype=float32)

    Source: Hastie, Tibshirani & Tibshirani (2020), "Best subset, forward stepwise or lasso?".
    """
    gamma = _share("blend", "gamma", gamma)
    selected, info = lasso(D, y, lam, nonnegative=nonnegative, capacity=capacity, tol=tol, max_steps=max_steps)
    refitted, refit_info = refit(D, y, selected, nonnegative=nonnegative)
    gamma = jnp.asarray(gamma, selected.values.dtype)[..., None]
    values = gamma * selected.values + (1 - gamma) * refitted.values
    return selected.replace(values=values), info.replace(status=jnp.maximum(info.status, refit_info.status))


@struct.dataclass
class CrossValidation:
    """What cross-validation saw.

    Attributes:
      lams: `[L]` penalties, on all samples, in descending order.
      phis: `[P]`.
      error: `[L P]` mean squared error of the samples held out.
      deviation: `[L P]` its standard error, from the spread over the folds.
      lam: the penalty of least error.
      phi: the `φ` of least error.
    """

    lams: Float[Array, " L"]
    phis: Float[Array, " P"]
    error: Float[Array, "L P"]
    deviation: Float[Array, "L P"]
    lam: Float[Array, ""]
    phi: Float[Array, ""]


def cross_validate(
    key: Array,
    D: Float[Array, "m d"],
    y: Float[Array, " d"],
    *,
    phis: tuple[float, ...] | Array = (0.0, 0.25, 0.5, 0.75, 1.0),
    folds: int = 10,
    n_lambdas: int = 100,
    eps: Number = 1e-3,
    nonnegative: bool = False,
    capacity: int | None = None,
    tol: Number = 1e-6,
    max_steps: int | Array = 5000,
) -> tuple[SparseCode, CrossValidation]:
    """Choose the penalty and the relaxation of a regression by cross-validation, and fit all samples with them.

    Samples are the `d` columns: `D = X.T` of a design matrix `X [n p]`, centred, as `y` is. A fold leaves its samples
    out of both, and its penalties are smaller in proportion. `phis=(1.0,)` tunes the plain lasso.

    Args:
      key: PRNG key, which deals the samples to the folds.
      D: `[m d]`, `m` variables of `d` samples.
      y: `[d]`.
      phis: relaxations to try, in [0, 1].
      folds: how many, from 2 to `d`.
      n_lambdas, eps: the grid of penalties, as of `path`.
      nonnegative, capacity, tol, max_steps: as of `lasso`.

    Returns:
      The relaxed lasso of all samples at the best pair, and `CrossValidation`.

    Raises:
      ValueError, TypeError: as `relaxed`, or if the folds do not fit the samples.

    Example:
      >>> import jax, jaxsae.lasso
      >>> keys = jax.random.split(jax.random.key(0), 3)
      >>> X = jax.random.normal(keys[0], (60, 20))
      >>> y = X[:, :2] @ jax.numpy.array([3.0, -2.0]) + 0.1 * jax.random.normal(keys[1], (60,))
      >>> code, seen = jaxsae.lasso.cross_validate(keys[2], X.T, y, folds=5, n_lambdas=20)
      >>> sorted(code.indices[code.mask].tolist()), float(seen.phi)
      ([0, 1], 0.0)
    """
    phis = jnp.asarray(_share("cross_validate", "phis", phis), gram.accumulator(D, y)).ravel()
    if y.ndim != 1 or not 2 <= folds <= y.size:
        raise ValueError(
            f"`cross_validate` got y of shape {y.shape} and {folds} folds; pass one target of d samples, and from 2 to "
            f"d folds."
        )
    options = {"nonnegative": nonnegative, "tol": tol, "max_steps": max_steps}
    dealt = jax.random.permutation(key, jnp.arange(y.size) % folds)
    grid = eps ** jnp.linspace(0, 1, n_lambdas, dtype=phis.dtype)
    lams = lambda_max(D, y, nonnegative=nonnegative) * grid
    order = jnp.argsort(phis, descending=True)

    def held_out(fold):
        kept = dealt != fold
        inside, target = jnp.where(kept, D, 0), jnp.where(kept, y, 0)
        share = jnp.mean(kept, dtype=phis.dtype)
        selected, info = path(inside, target, share * lams, capacity=capacity, **options)  # select
        relaxations = info.lam[:, None] * phis[order]
        many = jnp.broadcast_to(target, (n_lambdas, y.size))
        code, _ = _relax(inside, many, selected, relaxations, **options)  # refit
        error = jnp.where(kept, 0, y - codes.combine(D, code)) ** 2
        return jnp.zeros((n_lambdas, phis.size), phis.dtype).at[:, order].set(jnp.sum(error, -1) / jnp.sum(~kept))

    errors = jax.lax.map(held_out, jnp.arange(folds))
    weights = jnp.bincount(dealt, length=folds).astype(phis.dtype)[:, None, None] / y.size
    error = jnp.sum(weights * errors, axis=0)
    best = jnp.unravel_index(jnp.argmin(error), error.shape)
    lam, phi = lams[best[0]], phis[best[1]]
    seen = CrossValidation(lams, phis, error, jnp.std(errors, axis=0, ddof=1) / math.sqrt(folds), lam, phi)
    return relaxed(D, y, lam, phi, capacity=capacity, **options)[0], seen


def lambda_max(D: Float[Array, "m d"], y: Float[Array, "*b d"], *, nonnegative: bool = False) -> Float[Array, "*b"]:
    """The least penalty at which the lasso of each row is 0: `max_i |⟨D[i], y⟩|`, or the largest positive one.

    Args:
      D: `[m d]`, one atom a row.
      y: targets `[*b d]`.
      nonnegative: of the lasso with `z ≥ 0`.

    Example:
      >>> import jax.numpy as jnp, jaxsae.lasso
      >>> jaxsae.lasso.lambda_max(jnp.eye(2), jnp.array([1.0, -3.0]))
      Array(3., dtype=float32)
    """
    D, y = (x.astype(gram.accumulator(D, y)) for x in (D, y))

    def chunk(y):
        c = matmul(y, D.T)
        return jnp.max(c if nonnegative else jnp.abs(c), axis=1, initial=0)

    return rows.map_chunks(chunk, y, batch=y.shape[:-1], row_bytes=len(D) * y.dtype.itemsize)


# --- What is asked


class _Static(NamedTuple):
    nonnegative: bool
    capacity: int


def _prepare(name: str, D, y, nonnegative: bool, capacity: int | None) -> _Static:
    """Raise if a dictionary and targets do not fit together."""
    if D.ndim != 2 or len(D) == 0:
        raise ValueError(f"`{name}` got a dictionary of shape {D.shape}; pass one of shape (m, d), one atom a row.")
    m = len(D)
    capacity = min(D.shape) if capacity is None else capacity
    if not 1 <= capacity <= m:
        raise ValueError(f"`{name}` got capacity {capacity} for {m} atoms; pass a capacity from 1 to {m}.")
    empty = SparseCode(jnp.zeros((*y.shape[:-1], 1)), jnp.full((*y.shape[:-1], 1), m), m)
    gram.validate(D, y, empty, name)
    return _Static(nonnegative, capacity)


def _penalties(name: str, lam: Any, D, y, *, grid: bool = False) -> Array:
    """Penalties `[*b]`, or `[*b L]`, in the dtype of the arithmetic."""
    if not isinstance(lam, jax.core.Tracer) and np.any(np.asarray(lam) < 0):
        raise ValueError(f"`{name}` got a penalty of {np.min(np.asarray(lam))}; pass penalties of 0 or more.")
    shape = (*y.shape[:-1], *np.shape(lam)[-1:]) if grid else y.shape[:-1]
    if np.ndim(lam) > len(shape) or np.broadcast_shapes(np.shape(lam), shape) != shape:
        raise ValueError(
            f"`{name}` got penalties of shape {np.shape(lam)} for y of shape {y.shape}; pass one number, or shape "
            f"{shape}."
        )
    return jnp.broadcast_to(jnp.asarray(lam, gram.accumulator(D, y)), shape)


def _share(name: str, what: str, x: Any) -> Any:
    if not isinstance(x, jax.core.Tracer) and not np.all((np.asarray(x) >= 0) & (np.asarray(x) <= 1)):
        raise ValueError(f"`{name}` got {what} {np.asarray(x)}; pass numbers from 0 to 1.")
    return x


def _relax(D, y, code: SparseCode, lams, *, nonnegative: bool, tol, max_steps) -> tuple[SparseCode, LassoInfo]:
    """The lasso on the support of a code `[*b k]` at descending penalties `[*b L]`; the refit where they are 0."""
    k = code.indices.shape[-1]
    refitted, refit_info = refit(D, y, code, nonnegative=nonnegative)
    bound = certify(D, y, refitted, nonnegative=nonnegative).gap
    placed, info = _run(_Static(nonnegative, k), (D, tol, max_steps), (y, lams, code.indices))
    zero = lams == 0
    values = jnp.where(zero[..., None], refitted.values[..., None, :], placed.dense())
    wide = jax.tree.map(lambda x: jnp.broadcast_to(x[..., None], lams.shape), (refit_info, bound, code.overflow))
    chosen = LassoInfo(wide[0].kkt, wide[0].steps, wide[0].status, wide[1], lams)
    info = jax.tree.map(functools.partial(jnp.where, zero), chosen, info)
    indices = jnp.broadcast_to(code.indices[..., None, :], values.shape)
    return SparseCode(values, indices, code.num_latents, wide[2]), info


def _run(static: _Static, shared, per_row) -> tuple[SparseCode, LassoInfo]:
    D, tol, max_steps = shared
    y, lams, support = per_row
    dtype = gram.accumulator(D, y)
    shared = D.astype(dtype), jnp.asarray(tol, dtype), jnp.asarray(max_steps, jnp.int32)
    values, indices, overflow, info = _run_jitted(static, shared, (y.astype(dtype), lams, support))
    atoms = len(D) if support is None else support.shape[-1]
    return SparseCode(values, indices, atoms, overflow), info


@functools.partial(jax.jit, static_argnums=0)
def _run_jitted(static: _Static, shared, per_row):
    return _run_folded(static)(shared, per_row)


@functools.cache
def _run_folded(static: _Static):
    return rows.fold_vmap(functools.partial(_solve, static))


# --- How it is solved, free of units: `D` and `y` have been divided by powers of two


class _Arrival(NamedTuple):
    """The solution of one row at one penalty."""

    values: Array  # [k]
    indices: Array  # [k]
    overflow: Array
    steps: Array
    kkt: Array
    gap: Array


def _solve(static: _Static, shared, per_row):
    """All rows down their paths; then those whose gap says that they went astray, by FISTA."""
    D, tol, most = shared
    y, lams, support = per_row
    (*batch, d), count, m = y.shape, lams.shape[-1], len(D)
    n, k, itemsize = math.prod(batch), static.capacity, y.dtype.itemsize
    unit = gram.power_of_two(jnp.max(jnp.abs(D)))
    D = divide(D, unit)
    y, y_unit, _ = gram.scaled(y.reshape(n, d))
    lam = lams.reshape(n, count)
    penalties = jnp.minimum(divide(divide(lam, y_unit), unit), jnp.finfo(y.dtype).max)
    support = None if support is None else support.reshape(n, -1)

    def problem(support):
        """The rows' dictionaries, and the axis along which rows have their own."""
        return (D, None) if support is None else (_atoms(D, support), 0)

    def walk(y, penalties, support):
        atoms, axis = problem(support)
        follow = functools.partial(_follow, static)
        return jax.vmap(follow, in_axes=(axis, 0, 0, None))(atoms, y, penalties, most)

    def accelerate(row, penalty, arrival):
        atoms, axis = problem(None if support is None else support.at[row].get(mode="clip"))
        descend = functools.partial(_descend, static)
        inputs = atoms, y.at[row].get(mode="clip"), penalty, arrival
        return jax.vmap(descend, in_axes=(axis, 0, 0, 0, None, None))(*inputs, tol, most)

    walk_bytes = (6 * k * k + 4 * k * d + 12 * m + count * 4 * k + (0 if support is None else 2 * k * d)) * itemsize
    arrival = rows.map_chunks(walk, y, penalties, support, batch=(n,), row_bytes=walk_bytes)
    arrival = jax.tree.map(lambda x: x.reshape(n * count, *x.shape[2:]), arrival)
    astray = (arrival.gap > tol) & (arrival.overflow == 0)
    numbers = jnp.repeat(jnp.arange(n), count, total_repeat_length=n * count)
    inputs = numbers, penalties.ravel(), arrival
    arrival = rows.revise_rows(
        accelerate, astray, arrival, *inputs, row_bytes=(16 * m + (0 if support is None else 2 * k * d)) * itemsize
    )
    arrival = jax.tree.map(lambda x: x.reshape(n, count, *x.shape[1:]), arrival)
    values = divide(arrival.values * y_unit[:, :, None], unit)
    finite = jnp.isfinite(y_unit) & jnp.isfinite(arrival.kkt) & jnp.isfinite(values).all(-1)
    finite &= (lam >= 0) & jnp.isfinite(lam)
    atoms = m if support is None else support.shape[-1]
    status = jnp.where(arrival.gap <= tol, Status.CONVERGED, Status.MAX_STEPS)
    info = LassoInfo(
        kkt=jnp.where(finite, arrival.kkt, jnp.nan),
        steps=jnp.where(finite, arrival.steps, 0),
        status=jnp.where(finite, status, Status.NONFINITE).astype(jnp.int32),
        gap=jnp.where(finite, arrival.gap, jnp.nan),
        lam=lam,
    )
    outputs = (
        jnp.where(finite[:, :, None], values, 0),
        jnp.where(finite[:, :, None], arrival.indices, atoms),
        jnp.where(finite, arrival.overflow, 0),
        info,
    )
    return jax.tree.map(lambda x: x.reshape(*batch, *x.shape[1:]), outputs)


def _atoms(D, indices):
    return D.at[indices].get(mode="fill", fill_value=0)


class _Walk(NamedTuple):
    """A point of one row's path, where every atom of the support has `⟨aᵢ, r⟩ = λ signᵢ`."""

    lam: Array
    values: Array  # [k]
    indices: Array  # [k]  m where a slot is free
    signs: Array  # [k]  0 where a slot is free
    inverse: Array  # [k k]  of the Gram matrix of the support; 0 elsewhere
    standing: Array  # [m]  whether an atom may join
    full: Array  # an atom would join, and no slot is free
    steps: Array


_FREE, _ACTIVE, _DEPENDENT = 0, 1, 2  # the last: no news to the support, until an atom leaves it


def _follow(static: _Static, D, y, lams, most) -> _Arrival:
    """Follow one row's path down to each of its penalties; arrivals `[L ...]`."""
    k, m = static.capacity, len(D)
    c = matmul(D, y)
    zeros = jnp.zeros(k, D.dtype)
    start = _Walk(
        lam=jnp.max(c if static.nonnegative else jnp.abs(c), initial=0),
        values=zeros,
        indices=jnp.full(k, m, jnp.int32),
        signs=zeros,
        inverse=jnp.zeros((k, k), D.dtype),
        standing=jnp.zeros(m, jnp.int8),
        full=jnp.zeros((), bool),
        steps=jnp.zeros((), jnp.int32),
    )

    def arrive(walk: _Walk, lam):
        def on_the_way(walk):
            return (walk.lam > lam) & ~walk.full & (walk.steps < most)

        walk = jax.lax.while_loop(on_the_way, lambda walk: _step(static, D, y, walk, lam), walk)
        A = _atoms(D, walk.indices)
        z = _corrected(walk, matmul(A, y - matmul(walk.values, A)))
        z = jnp.where(walk.signs * z > 0, z, 0)
        r = y - matmul(z, A)
        kkt, gap, over = _judge(static, D, y, r, z, matmul(A, r), lam)
        missing = jnp.maximum(over - jnp.sum(walk.indices < m, dtype=jnp.int32), 1)
        overflow = jnp.where(walk.full & (walk.lam > lam), missing, 0)
        return walk, _Arrival(z, walk.indices, overflow, walk.steps, kkt, gap)

    return jax.lax.scan(arrive, start, lams)[1]


def _corrected(walk: _Walk, g):
    """Values at which the correlations of the support are `λ signs`, from those `g [k]` at the walk's values."""
    return walk.values + matmul(walk.inverse, g - walk.lam * walk.signs)


def _step(static: _Static, D, y, walk: _Walk, target) -> _Walk:
    """Go down to the penalty at which an atom joins the support or leaves it, or to `target`."""
    m, tiny = len(D), 64 * jnp.finfo(D.dtype).eps
    A = _atoms(D, walk.indices)
    r = y - matmul(walk.values, A)
    slope = matmul(walk.inverse, walk.signs)  # of the values, as λ falls
    g, fall = matmul(jnp.stack([r, matmul(slope, A)]), D.T)  # correlations, and how fast they go down
    z = _corrected(walk, matmul(A, r))

    def until_joining(sign):
        gain = 1 - sign * fall  # at which λ comes down on the correlation; a repeated atom's falls as fast as λ
        able = (walk.standing == _FREE) & (gain > tiny)
        return jnp.where(able, jnp.maximum(walk.lam - sign * g, 0) / jnp.where(able, gain, 1), jnp.inf)

    positive = until_joining(1)
    joining = positive if static.nonnegative else jnp.minimum(positive, until_joining(-1))
    j = jnp.argmin(joining)
    shrinks = walk.signs * slope < 0
    leaving = jnp.where(shrinks, jnp.maximum(-z / jnp.where(shrinks, slope, 1), 0), jnp.inf)
    i = jnp.argmin(leaving)
    length = jnp.minimum(jnp.minimum(joining[j], leaving[i]), walk.lam - target)
    arrives = length >= walk.lam - target
    leaves = ~arrives & (leaving[i] <= joining[j])
    joins = ~arrives & ~leaves

    # The inverse of the Gram matrix with one atom more, or less, differs by a matrix of rank one.
    atom = D[j]
    projection = matmul(walk.inverse, matmul(A, atom))
    square = jnp.sum(atom * atom)
    left_over = square - jnp.sum(matmul(A, atom) * projection)
    independent = left_over > tiny * square
    slot = jnp.argmax(walk.indices == m)
    room = walk.indices[slot] == m
    slots, atoms = jnp.arange(z.size), jnp.arange(m)
    enters = joins & independent & room
    entering, out = enters & (slots == slot), leaves & (slots == i)
    edge = jnp.where(leaves, walk.inverse[i], projection - entering)
    scale = jnp.where(leaves, -divide(1, walk.inverse[i, i]), jnp.where(enters, divide(1, left_over), 0))
    inverse = walk.inverse + scale * edge[:, None] * edge
    joined = jnp.where(independent, _ACTIVE, _DEPENDENT)
    standing = jnp.where(joins & (atoms == j), joined, walk.standing)
    freed = leaves & ((atoms == walk.indices[i]) | (standing == _DEPENDENT))
    return _Walk(
        lam=jnp.where(arrives, target, walk.lam - length),
        values=jnp.where(out, 0, z + length * slope),
        indices=jnp.where(out, m, jnp.where(entering, j, walk.indices)).astype(jnp.int32),
        signs=jnp.where(out, 0, jnp.where(entering, jnp.where(positive[j] <= joining[j], 1, -1), walk.signs)),
        inverse=jnp.where(out[:, None] | out, 0, inverse),
        standing=jnp.where(freed, _FREE, standing).astype(jnp.int8),
        full=joins & independent & ~room,
        steps=walk.steps + 1,
    )


def _judge(static: _Static, D, y, r, z, g_on, lam):
    """KKT residual, relative duality gap, and how many atoms exceed the penalty, of values with residual `r [d]`.

    `g_on` are the correlations of the atoms that `z` belongs to. With `u = αr`, `α` the largest in [0, 1] for which `u`
    is feasible,

        P(z) − D(u) = ½(1 − α)²‖r‖² + Σᵢ (λ|zᵢ| − α gᵢ zᵢ),

    whose terms are all positive: no two nearly equal objectives are subtracted.
    """
    g = matmul(D, r)
    y_norm, longest = jnp.linalg.norm(y), jnp.sqrt(jnp.max(jnp.sum(D * D, axis=1)))
    top = jnp.max(g if static.nonnegative else jnp.abs(g), initial=0)
    rounding = 32 * jnp.finfo(D.dtype).eps * longest * y_norm
    alpha = jnp.where(top > lam + rounding, divide(lam, top), 1)
    gap = 0.5 * (1 - alpha) ** 2 * jnp.sum(r * r) + jnp.sum(lam * jnp.abs(z) - alpha * g_on * z)
    off = jnp.max(jnp.where(z != 0, jnp.abs(g_on - lam * jnp.sign(z)), 0), initial=0)
    kkt = jnp.maximum(off, top - lam)
    over = jnp.sum((g if static.nonnegative else jnp.abs(g)) > lam + rounding, dtype=jnp.int32)
    return jnp.maximum(divide(kkt, longest * y_norm), 0), jnp.maximum(divide(gap, 0.5 * y_norm**2), 0), over


class _Descent(NamedTuple):
    """Iterate `z [m]` with residual and correlations, extrapolation `w` likewise, curvature, momentum, and the best."""

    z: Array
    r: Array
    w: Array
    g_w: Array
    curvature: Array
    t: Array
    best: Array
    kkt: Array
    gap: Array
    steps: Array


def _descend(static: _Static, D, y, lam, arrival: _Arrival, tol, most) -> _Arrival:
    """Go on with one row by FISTA with gradient restart, on all atoms, from where its path ended."""
    m = len(D)
    start = SparseCode(arrival.values, arrival.indices, m).dense()

    def norm(_, carry):
        v = matmul(matmul(carry[0], D.T), D)
        size = jnp.linalg.norm(v)
        return divide(v, size), size

    r = y - matmul(start, D)
    curvature = jax.lax.fori_loop(0, 8, norm, (jnp.max(jnp.abs(D), axis=0), jnp.zeros((), D.dtype)))[1]
    begin = _Descent(
        *(start, r, start, matmul(D, r), curvature, jnp.ones((), D.dtype), start),
        *(arrival.kkt, arrival.gap, jnp.zeros((), jnp.int32)),
    )

    def step(s: _Descent) -> _Descent:
        moved = s.w + divide(s.g_w, s.curvature)
        threshold = divide(lam, s.curvature)
        z = jnp.maximum(moved - threshold, 0)
        if not static.nonnegative:
            z = z + jnp.minimum(moved + threshold, 0)
        r = y - matmul(z, D)
        change = z - s.z
        t = jnp.where(jnp.sum((s.w - z) * change) > 0, 1, (1 + jnp.sqrt(1 + 4 * s.t**2)) / 2)
        momentum = jnp.where(t == 1, 0, (s.t - 1) / t)
        w = z + momentum * change
        g_w = matmul(D, y - matmul(w, D))
        # Power iteration estimates `‖D‖²` from below; each step taken is evidence that can only raise it.
        bent = divide(jnp.sum(matmul(z - s.w, D) ** 2), jnp.sum((z - s.w) ** 2))
        kkt, gap, _ = _judge(static, D, y, r, z, matmul(D, r), lam)
        better = gap < s.gap
        best, kkt, gap = (jnp.where(better, a, b) for a, b in ((z, s.best), (kkt, s.kkt), (gap, s.gap)))
        return _Descent(z, r, w, g_w, jnp.maximum(s.curvature, bent), t, best, kkt, gap, s.steps + 1)

    end = jax.lax.while_loop(lambda s: (s.gap > tol) & (s.steps < most), step, begin)
    code = codes.from_dense(end.best, static.capacity)
    better = end.gap < arrival.gap
    steps = arrival.steps + end.steps
    found = _Arrival(code.values, code.indices, code.overflow, steps, end.kkt, end.gap)
    return jax.tree.map(lambda a, b: jnp.where(better, a, b), found, arrival._replace(steps=steps))
