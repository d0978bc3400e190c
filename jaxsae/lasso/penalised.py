"""The lasso at one penalty and along its path, its relaxations, and cross-validation.

The penalty selects the support and shrinks the values on it: with `S` the support and `s` the signs, the refit is
`z_S + λ (D_S D_Sᵀ)⁻¹ s`. `relaxed` and `blend` undo part of that shrinkage.
"""

import dataclasses
import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from jaxsae import codes
from jaxsae._core import chunking, pytrees
from jaxsae._core.linalg import as_array, divide, matmul, max_or_nan, power_of_two, promote_dtypes
from jaxsae.codes import SparseCode
from jaxsae.lasso import homotopy
from jaxsae.lasso.homotopy import Static
from jaxsae.least_squares import problems
from jaxsae.least_squares.certificate import certify
from jaxsae.least_squares.outcome import RefitInfo
from jaxsae.least_squares.refit import refit

Number = int | float | Array | np.ndarray


@pytrees.dataclass
class LassoInfo(RefitInfo):
    """The outcome of a lasso, per row.

    Attributes:
      kkt: `[*b]` relative KKT residual, `max_i v_i / (max_i‖a_i‖ ‖y‖)`, with `g = D(y − Dᵀz)` and `v_i = |g_i − λ sign
        z_i|` where `z_i` is not 0, `max(|g_i| − λ, 0)` elsewhere (`g_i − λ` if non-negative); NaN where not finite.
      steps: `[*b]` int32, changes of the support from `λ_max` down to `lam`, plus steps of FISTA where needed.
      status: `[*b]` int32, a `Status`: 0 the gap is within `tol`; 1 stopped at `max_steps`, or at `capacity` atoms with
        more to join; 2 not finite, or out of range; 3 `lam` is negative or not finite. Codes of 2 and 3 are empty.
      gap: `[*b]` duality gap relative to `½‖y‖²`, a bound on the excess of the objective over its minimum. The dual
        point, the residual scaled down to `|g| ≤ λ`, is feasible to `8 eps max‖a‖ ‖y‖` and the rounding of a product
        with an atom: for any order of summation, the gap is too small by at most `(2d + 18) eps max‖a‖ ‖z‖₁ / ‖y‖`, to
        first order in `d eps max‖a‖ ‖y‖ / λ`.
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
    """Minimise `½‖y − Dᵀz‖² + λ‖z‖₁`, optionally over `z ≥ 0`.

    Scikit-learn's `alpha` is `λ / d`, and its design matrix `X [n p]` is `D.T`: `d` samples, `m` variables. The result
    of a row does not depend on its batch. There is no derivative; `refit` on the support has one.

    Args:
      D: `[m d]`, one atom per row, of any norm. An atom of zeros is never chosen.
      y: targets `[*b d]`.
      lam: the penalty, a number or one per row `[*b]`, in the units of `Dy`.
      nonnegative: constrain `z ≥ 0`.
      capacity: slots per row; `min(m, d)`, which suffices, if None. A row that needs more stops at the penalty where
        its slots are full, and its `num_dropped` is positive.
      tol: count a row as converged when its duality gap, relative to `½‖y‖²`, is at most this.
      max_steps: stop a row after this many steps.

    Returns:
      The code, in float32 or better, and `LassoInfo`.

    Raises:
      ValueError, TypeError: at trace time, if shapes or dtypes do not fit together, or a known `lam`, `tol` or
        `max_steps` is negative or not finite.

    Example:
      >>> import jax.numpy as jnp, jaxsae.lasso
      >>> code, info = jaxsae.lasso.lasso(jnp.eye(3), jnp.array([3.0, -1.0, 0.2]), 0.5)
      >>> code.dense(), int(info.status)
      (Array([ 2.5, -0.5,  0. ], dtype=float32), 0)

    Source: Tibshirani (1996); Osborne, Presnell & Turlach (2000); Efron et al. (2004), "Least angle regression".
    """
    static, D, y = _prepare("lasso", D, y, nonnegative, capacity, tol, max_steps)
    return _run(static, D, y, _penalties("lasso", lam, D, y), None, tol, max_steps)


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
    """The lasso at a grid of penalties, each from the one before, at the cost of the last alone.

    Args:
      D: `[m d]`, one atom per row.
      y: targets `[*b d]`.
      lams: penalties `[L]` or `[*b L]`; if None, from each row's `λ_max` to `eps λ_max`, evenly spaced on a log scale.
      n_lambdas: `L`, if `lams` is None.
      eps: ratio of the last penalty to the first, if `lams` is None.
      nonnegative: constrain `z ≥ 0`.
      capacity: slots per row; see `lasso`.
      tol: duality gap at convergence; see `lasso`.
      max_steps: stop a row after this many steps.

    Returns:
      The codes `[*b L k]` and `LassoInfo [*b L]`, whose `lam` holds the penalties in descending order.

    Raises:
      ValueError, TypeError: as for `lasso`, or if there is no penalty, or `eps` is not in (0, 1].

    Example:
      >>> import jax.numpy as jnp, jaxsae.lasso
      >>> D = jnp.array([[1.0, 0.0], [0.0, 1.0]])
      >>> code, info = jaxsae.lasso.path(D, jnp.array([4.0, 3.0]), n_lambdas=3, eps=0.25)
      >>> info.lam, code.dense()[1:]
      (Array([4., 2., 1.], dtype=float32), Array([[2., 1.],
             [3., 2.]], dtype=float32))

    Source: Osborne, Presnell & Turlach (2000), "A new approach to variable selection in least squares problems"; Efron
      et al. (2004), "Least angle regression".
    """
    static, D, y = _prepare("path", D, y, nonnegative, capacity, tol, max_steps)
    _check_ratio("path", eps)
    if lams is None:
        lams = _grid("path", D, y, n_lambdas, eps, nonnegative)
    elif np.ndim(lams) == 0 or np.shape(lams)[-1] == 0:
        raise ValueError(f"`path` got penalties of shape {np.shape(lams)}; pass shape (L,) or (*b, L), L at least 1.")
    else:
        xp = chunking.numpy_for(lams)
        lams = _penalties("path", xp.flip(xp.sort(xp.asarray(lams), axis=-1), -1), D, y, grid=True)
    return _run(static, D, y, lams, None, tol, max_steps)


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
    """The relaxed lasso of Meinshausen (2007): the penalty `φλ` on the atoms that the lasso selects at `λ`.

        S = support of the lasso at λ;   minimise ½‖y − Dᵀz‖² + φλ‖z‖₁   over z on S

    `φ = 1` is the lasso and `φ = 0` its refit; the residual does not grow as `φ` decreases. Glmnet's `relax` is
    `blend`.

    Args:
      D: `[m d]`, one atom per row.
      y: targets `[*b d]`.
      lam: the penalty of the selection, a number or `[*b]`.
      phi: from 0 to 1, a number or `[*b]`.
      nonnegative: constrain `z ≥ 0`.
      capacity: slots per row; see `lasso`.
      tol: duality gap at convergence; see `lasso`.
      max_steps: stop a row after this many steps.

    Returns:
      The code, on the support of the lasso, and `LassoInfo` of the second problem (`lam` is `φλ`); a row whose
      selection or refit did not converge has the status of that step.

    Raises:
      ValueError, TypeError: as for `lasso`, or if a known `phi` is not in [0, 1].

    Example:
      >>> import jax.numpy as jnp, jaxsae.lasso
      >>> D, y = jnp.eye(3), jnp.array([3.0, 1.0, 0.2])
      >>> [jaxsae.lasso.relaxed(D, y, 0.5, phi)[0].dense().tolist() for phi in (1.0, 0.5, 0.0)]
      [[2.5, 0.5, 0.0], [2.75, 0.75, 0.0], [3.0, 1.0, 0.0]]

    Source: Meinshausen (2007), "Relaxed lasso".
    """
    _, D, y = _prepare("relaxed", D, y, nonnegative, capacity, tol, max_steps)
    phi = _share("relaxed", "phi", phi)
    options = {"nonnegative": nonnegative, "tol": tol, "max_steps": max_steps}
    selected, info = lasso(D, y, lam, capacity=capacity, **options)  # select
    xp = chunking.numpy_for((phi, info.lam))
    lams = xp.broadcast_to(xp.asarray(phi, info.lam.dtype) * xp.asarray(info.lam), info.lam.shape)
    eased = _on_support(D, y, selected, lams, **options)
    refitted = refit(D, y, selected, nonnegative=nonnegative)  # then refit
    gap = certify(D, y, refitted[0], nonnegative=nonnegative).gap
    return _relaxed(None, None, (selected, info, *eased, *refitted, gap))


@chunking.in_buckets
def _relaxed(_static, _shared, per_row) -> tuple[SparseCode, LassoInfo]:
    """The lasso on the support, or the refit where its penalty is 0."""
    selected, info, eased, eased_info, refitted, refit_info, gap = per_row
    refits = eased_info.lam == 0
    last = LassoInfo(refit_info.kkt, refit_info.steps, refit_info.status, gap, eased_info.lam)
    last = jax.tree.map(functools.partial(jnp.where, refits), last, eased_info)
    values = jnp.where(refits[..., None], refitted.values, eased.values)
    steps, status = info.steps + last.steps, jnp.maximum(info.status, last.status)
    return dataclasses.replace(selected, values=values), dataclasses.replace(last, steps=steps, status=status)


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

    It equals `relaxed` with `φ = γ` if no value changes sign between the lasso and the refit.

    Args:
      D: `[m d]`, one atom per row.
      y: targets `[*b d]`.
      lam: the penalty of the selection, a number or `[*b]`.
      gamma: from 0 to 1, a number or `[*b]`.
      nonnegative: constrain `z ≥ 0`.
      capacity: slots per row; see `lasso`.
      tol: duality gap at convergence; see `lasso`.
      max_steps: stop a row after this many steps.

    Returns:
      The code, on the support of the lasso, and the lasso's `LassoInfo`; a row whose refit did not converge has the
      status of the refit.

    Raises:
      ValueError, TypeError: as for `lasso`, or if a known `gamma` is not in [0, 1].

    Example:
      >>> import jax.numpy as jnp, jaxsae.lasso
      >>> jaxsae.lasso.blend(jnp.eye(3), jnp.array([3.0, 1.0, 0.2]), 0.5, 0.5)[0].dense()
      Array([2.75, 0.75, 0.  ], dtype=float32)

    Source: Hastie, Tibshirani & Tibshirani (2020), "Best subset, forward stepwise or lasso?".
    """
    gamma = _share("blend", "gamma", gamma)
    selected, info = lasso(D, y, lam, nonnegative=nonnegative, capacity=capacity, tol=tol, max_steps=max_steps)
    refitted, refit_info = refit(D, y, selected, nonnegative=nonnegative)
    gamma = jnp.asarray(gamma, selected.values.dtype)[..., None]
    values = gamma * selected.values + (1 - gamma) * refitted.values
    status = jnp.maximum(info.status, refit_info.status)
    return dataclasses.replace(selected, values=values), dataclasses.replace(info, status=status)


@pytrees.dataclass
class CrossValidation:
    """The results of cross-validation.

    Attributes:
      lams: `[L]` penalties for all samples, in descending order.
      phis: `[P]` relaxations, in descending order.
      error: `[L P]` mean squared error of the held-out samples.
      deviation: `[L P]` standard error of `error`, from the spread over the folds.
      lam: the penalty with the least error.
      phi: the relaxation with the least error.
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

    Samples are the `d` columns: `D = X.T` for a design matrix `X [n p]`, which is centred, as is `y`. A fold leaves its
    samples out of both, and its penalties are scaled in proportion. `phis=(1.0,)` tunes the plain lasso.

    Args:
      key: PRNG key, which assigns the samples to the folds.
      D: `[m d]`, `m` variables of `d` samples.
      y: `[d]`.
      phis: relaxations to try, in [0, 1].
      folds: number of folds, from 2 to `d`.
      n_lambdas: number of penalties; see `path`.
      eps: ratio of the last penalty to the first.
      nonnegative: constrain `z ≥ 0`.
      capacity: slots per row; see `lasso`.
      tol: duality gap at convergence; see `lasso`.
      max_steps: stop a row after this many steps.

    Returns:
      The relaxed lasso of all samples with the best penalty and relaxation, and `CrossValidation`.

    Raises:
      ValueError, TypeError: as for `relaxed`, or if the number of folds does not fit the samples.

    Example:
      >>> import jax, jaxsae.lasso
      >>> keys = jax.random.split(jax.random.key(0), 3)
      >>> X = jax.random.normal(keys[0], (60, 20))
      >>> y = X[:, :2] @ jax.numpy.array([3.0, -2.0]) + 0.1 * jax.random.normal(keys[1], (60,))
      >>> code, seen = jaxsae.lasso.cross_validate(keys[2], X.T, y, folds=5, n_lambdas=20)
      >>> sorted(code.indices[code.mask].tolist()), float(seen.phi)
      ([0, 1], 0.0)

    Source: Meinshausen (2007), "Relaxed lasso", which tunes `λ` and `φ` in this way.
    """
    static, D, y = _prepare("cross_validate", D, y, nonnegative, capacity, tol, max_steps)
    phis = jnp.asarray(_share("cross_validate", "phis", phis), problems.accumulator(D, y))
    phis = jnp.sort(phis.ravel(), descending=True)
    if y.ndim != 1 or not 2 <= folds <= y.size:
        raise ValueError(
            f"`cross_validate` got y of shape {y.shape} and {folds} folds; pass one target of d samples, and from 2 to "
            f"d folds."
        )
    dealt = jax.random.permutation(key, jnp.arange(y.size) % folds)
    lams = _grid("cross_validate", D, y, n_lambdas, eps, nonnegative)

    # Each fold is a row with its own dictionary, all concatenated into one; the last fold leaves no sample out.
    kept = dealt != jnp.arange(folds + 1)[:, None]
    inside = jnp.where(kept[:, None, :], D, 0).reshape(-1, y.size)
    targets, scaled = jnp.where(kept, y, 0), jnp.mean(kept, axis=1, keepdims=True, dtype=phis.dtype) * lams
    atoms = jnp.arange(len(inside), dtype=jnp.int32).reshape(folds + 1, -1)
    selected, _ = _run(static, inside, targets, scaled, atoms, tol, max_steps)  # select
    own = jnp.where(selected.mask, selected.indices + atoms[:, :1, None], len(inside))
    targets = jnp.broadcast_to(targets[:, None], (*scaled.shape, y.size))
    eased_lams = scaled[..., None] * phis
    support = SparseCode(selected.values, own, len(inside), selected.num_dropped)
    options = {"nonnegative": nonnegative, "tol": tol, "max_steps": max_steps}
    eased, _ = _on_support(inside, targets, support, eased_lams, **options)  # then refit, in part
    indices = jnp.broadcast_to(selected.indices[:, :, None], eased.indices.shape)
    fits = SparseCode(eased.values, indices, len(D), eased.num_dropped)
    y, y_hat = promote_dtypes(y, codes.decode(D, fits))
    missed = jnp.where(kept[:, None, None], 0, y - y_hat)
    totals = jnp.sum(missed**2, axis=-1)[:-1]
    sizes = jnp.bincount(dealt, length=folds).astype(phis.dtype)
    error = jnp.sum(totals, axis=0) / y.size
    deviation = jnp.std(totals / sizes[:, None, None], axis=0, ddof=1) / math.sqrt(folds)
    best = jnp.unravel_index(jnp.argmin(error), error.shape)
    code = jax.tree.map(lambda x: x[-1][best], fits)
    return code, CrossValidation(lams, phis, error, deviation, lams[best[0]], phis[best[1]])


def lambda_max(D: Float[Array, "m d"], y: Float[Array, "*b d"], *, nonnegative: bool = False) -> Float[Array, "*b"]:
    """The smallest penalty at which the lasso of each row is 0: `max_i |⟨D[i], y⟩|`, or `max_i ⟨D[i], y⟩₊` if `z ≥ 0`.

    Args:
      D: `[m d]`, one atom per row.
      y: targets `[*b d]`.
      nonnegative: whether the lasso is constrained to `z ≥ 0`.

    Returns:
      `[*b]`; NaN where a row is not finite, or the penalty is too small for the dtype.

    Raises:
      ValueError, TypeError: at trace time, if shapes or dtypes do not fit together.

    Example:
      >>> import jax.numpy as jnp, jaxsae.lasso
      >>> jaxsae.lasso.lambda_max(jnp.eye(2), jnp.array([1.0, -3.0]))
      Array(3., dtype=float32)
    """
    _, D, y = _prepare("lambda_max", D, y, nonnegative, None, 0, 0)
    return _lambda_max(nonnegative, D, (y,))


@chunking.in_buckets
def _lambda_max(nonnegative: bool, D, per_row):
    D, y = (x.astype(problems.accumulator(D, *per_row)) for x in (D, *per_row))
    unit = power_of_two(problems.largest(D, (0, 1)))
    D = divide(D, unit)

    def chunk(y):
        y, y_unit, _ = problems.scaled(y)
        c = matmul(y, D.T)
        most = max_or_nan(c if nonnegative else jnp.abs(c), 1, True)
        found = most * y_unit * unit
        return jnp.where((most > 0) & (found < jnp.finfo(y.dtype).tiny), jnp.nan, found)[:, 0]

    return chunking.map_chunks(chunk, y, batch=y.shape[:-1], row_bytes=len(D) * y.dtype.itemsize)


# --- Arguments


def _prepare(name: str, D, y, nonnegative: bool, capacity: int | None, tol, max_steps) -> tuple[Static, Array, Array]:
    """Validate arguments; return the static arguments, and the dictionary and targets as arrays."""
    D, y = as_array(D), as_array(y)
    problems.check_numbers(name, "tol", tol, do="a finite gap of at least 0")
    problems.check_numbers(name, "max_steps", max_steps, do="0 or more, finite")
    if D.ndim != 2 or len(D) == 0:
        raise ValueError(f"`{name}` got a dictionary of shape {D.shape}; pass one of shape (m, d), one atom per row.")
    m = len(D)
    capacity = min(D.shape) if capacity is None else capacity
    if not 1 <= capacity <= m:
        raise ValueError(f"`{name}` got capacity {capacity} for {m} atoms; pass a capacity from 1 to {m}.")
    return Static(nonnegative, capacity), *problems.validate_rows(D, y, name)


def _penalties(name: str, lam: Any, D, y, *, grid: bool = False) -> Any:
    """Penalties `[*b]`, or `[*b L]`, in the dtype of the arithmetic."""
    problems.check_numbers(name, "a penalty of", lam, do="penalties of 0 or more, finite")
    shape = (*y.shape[:-1], *np.shape(lam)[-1:]) if grid else y.shape[:-1]
    pairs = zip(np.shape(lam)[::-1], shape[::-1], strict=False)
    if np.ndim(lam) > len(shape) or any(size not in (1, wanted) for size, wanted in pairs):
        raise ValueError(
            f"`{name}` got penalties of shape {np.shape(lam)} for y of shape {y.shape}; pass one number, or shape "
            f"{shape}."
        )
    return chunking.spread(lam, shape, problems.accumulator(D, y))


def _share(name: str, what: str, x: Any) -> Any:
    problems.check_numbers(name, what, x, most=1, do="numbers from 0 to 1")
    return x


def _grid(name: str, D, y, n_lambdas: int, eps: Any, nonnegative: bool) -> Array:
    """Penalties `[*b L]` from `λ_max` to `eps λ_max`, evenly spaced on a log scale."""
    _check_ratio(name, eps)
    if n_lambdas < 1:
        raise ValueError(f"`{name}` got n_lambdas {n_lambdas}; pass at least 1.")
    return _spaced((nonnegative, n_lambdas), (D, eps), (y,))


@chunking.in_buckets
def _spaced(static: tuple[bool, int], shared, per_row) -> Array:
    (nonnegative, n_lambdas), (D, eps) = static, shared
    top = _lambda_max(nonnegative, D, per_row)
    return top[..., None] * jnp.asarray(eps, top.dtype) ** jnp.linspace(0, 1, n_lambdas, dtype=top.dtype)


def _check_ratio(name: str, eps: Any) -> None:
    smallest = float(jnp.finfo(jnp.float32).tiny)
    problems.check_numbers(name, "eps", eps, least=smallest, most=1, do="a positive ratio up to 1")


def _on_support(D, y, code: SparseCode, lams, *, nonnegative: bool, tol, max_steps) -> tuple[SparseCode, LassoInfo]:
    """The lasso on the support of a code `[*b k]` at penalties `[*b]`, or descending `[*b L]`, in the code's slots."""
    static = Static(nonnegative, code.indices.shape[-1])
    placed, info = _run(static, D, y, lams, code.indices, tol, max_steps)
    return _in_slots(None, None, (code, placed)), info


@chunking.in_buckets
def _in_slots(_static, _shared, per_row) -> SparseCode:
    """The values of a second code, whose indices are slots of the first, in these slots."""
    code, placed = per_row
    indices, num_dropped = code.indices, code.num_dropped
    if placed.indices.ndim > indices.ndim:
        indices, num_dropped = indices[..., None, :], num_dropped[..., None]
    indices = jnp.broadcast_to(indices, placed.indices.shape)
    num_dropped = jnp.broadcast_to(num_dropped, placed.num_dropped.shape)
    return SparseCode(placed.dense(), indices, code.num_latents, num_dropped)


def _run(static: Static, D, y, lams, support, tol, max_steps) -> tuple[SparseCode, LassoInfo]:
    """The lasso at penalties `[*b]`, or descending `[*b L]`, on all atoms or on supports `[*b s]`."""
    dtype = problems.accumulator(D, y)
    tol = jnp.asarray(tol, dtype)
    shared = D.astype(dtype), tol, jnp.asarray(max_steps, jnp.int32)
    end, status = homotopy.solve(static, shared, (y.astype(dtype), lams, support))
    info = LassoInfo(kkt=end.kkt, steps=end.steps, status=status, gap=end.gap, lam=as_array(lams))
    atoms = len(D) if support is None else support.shape[-1]
    return SparseCode(end.values, end.indices, atoms, end.num_dropped), info
