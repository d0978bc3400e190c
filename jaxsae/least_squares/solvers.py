"""Solvers of a small quadratic programme, as pytrees of numbers with pure `init` and `step` functions.

Each minimises `½ zᵀGz − cᵀz` within bounds for one row: `G [k k]` positive semi-definite with ones (or zeros) on its
diagonal, `c [k]` in its range, `bounds` those of `bounds.Bounds`. A state has fields `z`, the iterate, and `gradient`,
`Gz − c` at it; `driver.py` runs the steps, chooses the best iterate and decides when to
stop, so that a solver holds only its mathematics. A solver may have a `fallback`, with its own tolerance (None: that
of the solver before it), which continues from the best iterate of the unsolved rows; a row converges to the tolerance
of the last one.
"""

import dataclasses
from collections.abc import Callable
from typing import Any, ClassVar, NamedTuple, Protocol, runtime_checkable

import jax.numpy as jnp
from jaxtyping import Array, Float

from jaxsae._core import pytrees
from jaxsae._core.linalg import divide, matmul, power_iteration, solve_on
from jaxsae.least_squares.bounds import Bounds
from jaxsae.least_squares.interior_point import InteriorPoint

__all__ = [
    "FISTA", "BlockPivoting", "ConjugateGradient", "InteriorPoint", "ProjectedGradient", "Solver", "default", "within",
]  # fmt: skip


@runtime_checkable
class State(Protocol):
    """State of a solver: at least its iterate, and the gradient `Gz − c` there."""

    @property
    def z(self) -> Array: ...
    @property
    def gradient(self) -> Array: ...


@runtime_checkable
class Solver(Protocol):
    """A solver of `minimise ½ zᵀGz − cᵀz` within bounds for one row, as a dataclass that is a pytree.

    Attributes:
      tol: stop a row when its KKT residual is at most this; None, in a fallback, is that of the solver before it.
      max_steps: stop a row after this many steps.
      fallback: solver for the unsolved rows, or None.

    Example:
      >>> import jaxsae
      >>> isinstance(jaxsae.FISTA(), Solver)  # so that `jaxsae.refit` accepts it
      True
    """

    __dataclass_fields__: ClassVar[dict[str, Any]]

    @property
    def tol(self) -> float | Array | None: ...  # noqa: D102
    @property
    def max_steps(self) -> int | Array: ...  # noqa: D102
    @property
    def fallback(self) -> "Solver | None": ...  # noqa: D102

    def init(self, gram: Array, c: Array, z: Array, bounds: Bounds) -> State:
        """The state at a feasible start `z`."""
        ...

    def step(self, gram: Array, c: Array, state: Any, bounds: Bounds) -> State:
        """The state after one more step."""
        ...


POWER_STEPS = 8  # for an estimate of the curvature, corrected as steps are taken


def spectral_norm(gram: Float[Array, "k k"]) -> Float[Array, ""]:
    """Estimate `‖G‖₂` of a positive semi-definite matrix by power iteration, from below.

    It starts at the longest column, which is zero only if `G` is, and does not depend on the order of the atoms.
    """
    if gram.shape[-1] == 0:
        return jnp.zeros((), gram.dtype)
    longest = jnp.argmax(jnp.sum(gram * gram, axis=0))
    return power_iteration(lambda v: matmul(gram, v), gram[:, longest], POWER_STEPS)


class FISTAState(NamedTuple):
    """Iterate `z` and extrapolation `w`, each `[k]` with its gradient, curvature `L` and momentum `t`."""

    z: Array
    gradient: Array
    w: Array
    gradient_w: Array
    curvature: Array
    t: Array


def fista_start(z: Array, gradient: Array, curvature: Array) -> FISTAState:
    """The state at a feasible `z`, without momentum."""
    return FISTAState(z, gradient, z, gradient, curvature, jnp.ones_like(curvature))


def fista_step(state: FISTAState, prox: Callable, gradient: Callable, total: Callable = jnp.sum) -> FISTAState:
    """One step of FISTA with gradient restart on `f + h`, at the cost of one gradient of `f`.

    Args:
      state: of one row, or of several, each with one `curvature`.
      prox: `(v, L) -> argmin_z h(z) + ½L‖z − v‖²`.
      gradient: gradient of the quadratic `f`. It is affine, so that the one at the extrapolation is free.
      total: sum over the entries of a row.
    """
    safe = jnp.where(state.curvature > 0, state.curvature, 1)
    z = prox(state.w - state.gradient_w / safe, safe)
    at_z = gradient(z)
    # Power iteration estimates the curvature from below; each step gives a lower bound that may raise it.
    dz = z - state.w
    curvature = jnp.maximum(state.curvature, divide(total(dz * (at_z - state.gradient_w)), total(dz * dz)))
    restart = total((state.w - z) * (z - state.z)) > 0
    t = jnp.where(restart, 1, (1 + jnp.sqrt(1 + 4 * state.t**2)) / 2)
    momentum = jnp.where(restart, 0, (state.t - 1) / t)
    w, gradient_w = z + momentum * (z - state.z), at_z + momentum * (at_z - state.gradient)
    return FISTAState(z, at_z, w, gradient_w, curvature, t)


@pytrees.dataclass
class ProjectedGradient:
    """Projected gradient with a spectral step: `z ← P(z − (Gz − c)/L)`, `L = ‖G‖₂` by power iteration.

    Each step lowers the objective, but ill-conditioned supports take many: prefer `ConjugateGradient`.

    Attributes:
      tol: stop a row when its relative KKT residual is at most this.
      max_steps: stop a row after this many steps.

    Example:
      >>> import jax, jax.numpy as jnp, jaxsae
      >>> D = jnp.array([[1.0, 0.0], [0.6, 0.8]])
      >>> code = jaxsae.SparseCode(values=jnp.zeros(2), indices=jnp.arange(2), num_latents=2)
      >>> refit, info = jaxsae.refit(D, jnp.array([2.2, 1.6]), code, jaxsae.ProjectedGradient(tol=1e-6))
      >>> jnp.round(refit.values, 3)
      Array([1., 2.], dtype=float32)

    Source: Gao et al. (2024), "Scaling and evaluating sparse autoencoders", Section 5.1, which uses it.
    """

    tol: float | Array = 1e-5
    max_steps: int | Array = 5000
    fallback = None

    def init(self, gram: Array, c: Array, z: Array, bounds: Bounds) -> FISTAState:
        """The state at a feasible start `z`."""
        return fista_start(z, matmul(gram, z) - c, spectral_norm(gram))

    def step(self, gram: Array, c: Array, state: FISTAState, bounds: Bounds) -> FISTAState:
        """One step of `FISTA` without momentum, at the cost of one product with `G`."""
        state = FISTA().step(gram, c, state, bounds)
        return fista_start(state.z, state.gradient, state.curvature)


@pytrees.dataclass
class FISTA:
    """Accelerated projected gradient with gradient restart.

        z⁺ = P(w − (Gw − c)/L),   t⁺ = (1 + √(1 + 4t²))/2,   w⁺ = z⁺ + (t − 1)/t⁺ · (z⁺ − z),

    with the momentum dropped (`t⁺ = 1`, `w⁺ = z⁺`) whenever it points uphill, `(w − z⁺)ᵀ(z⁺ − z) > 0`.

    Attributes:
      tol: stop a row when its relative KKT residual is at most this.
      max_steps: stop a row after this many steps.
      fallback: solver for the unsolved rows, or None.

    Example:
      >>> import jax, jax.numpy as jnp, jaxsae
      >>> D = jnp.array([[1.0, 0.0], [0.6, 0.8]])
      >>> code = jaxsae.SparseCode(values=jnp.zeros(2), indices=jnp.arange(2), num_latents=2)
      >>> refit, info = jaxsae.refit(D, jnp.array([2.2, 1.6]), code, jaxsae.FISTA(tol=1e-6))
      >>> jnp.round(refit.values, 3)
      Array([1., 2.], dtype=float32)

    Source: Beck & Teboulle (2009), "A fast iterative shrinkage-thresholding algorithm for linear inverse problems";
      O'Donoghue & Candès (2015), "Adaptive restart for accelerated gradient schemes".
    """

    tol: float | Array | None = 1e-5
    max_steps: int | Array = 2000
    fallback: Solver | None = None

    def init(self, gram: Array, c: Array, z: Array, bounds: Bounds) -> FISTAState:
        """The state at a feasible start `z`, without momentum."""
        return fista_start(z, matmul(gram, z) - c, spectral_norm(gram))

    def step(self, gram: Array, c: Array, state: FISTAState, bounds: Bounds) -> FISTAState:
        """One accelerated step, at the cost of one product with `G`."""
        return fista_step(state, lambda v, _: bounds.project(v), lambda z: matmul(gram, z) - c)


class BlockPivotingState(NamedTuple):
    """Iterate `z [k]` with its gradient, the free set `[k]`, and the state of the back-up rule."""

    z: Array
    gradient: Array
    free: Array
    fewest: Array  # smallest number of wrong coordinates so far
    patience: Array  # full exchanges still allowed without improvement


@pytrees.dataclass
class BlockPivoting:
    """Block principal pivoting: solve on a set of free coordinates, exchange the wrong ones.

        G_FF x_F = c_F,   wrong = {i ∈ F: x_i < 0} ∪ {i ∉ F: (Gx − c)_i < 0}

    for `x ≥ 0`; upper bounds are treated alike.

    All wrong coordinates are exchanged at once; after three exchanges without fewer of them, only the last one is
    (Murty's rule), until there are fewer. Each step is one masked Cholesky factorisation, with a few ulps on the
    diagonal for which two steps of refinement correct. It ends at the optimum to rounding, whatever the condition
    number. Where atoms are linearly dependent exchanges may cycle; the fallback then continues from the best
    `max(x, 0)` so far.

    Attributes:
      tol: stop a row when its relative KKT residual is at most this.
      max_steps: stop a row after this many factorisations.
      fallback: solver for the unsolved rows, or None.

    Example:
      >>> import jax, jax.numpy as jnp, jaxsae
      >>> D = jnp.array([[1.0, 0.0], [0.6, 0.8]])
      >>> code = jaxsae.SparseCode(values=jnp.zeros(2), indices=jnp.arange(2), num_latents=2)
      >>> refit, info = jaxsae.refit(D, jnp.array([2.2, 1.6]), code, jaxsae.BlockPivoting())
      >>> jnp.round(refit.values, 3), int(info.steps)
      (Array([1., 2.], dtype=float32), 2)

    Source: Kim & Park (2011), "Fast nonnegative matrix factorization: an active-set-like method and comparisons".
    """

    tol: float | Array | None = 1e-5
    max_steps: int | Array = 20
    fallback: Solver | None = FISTA()

    def init(self, gram: Array, c: Array, z: Array, bounds: Bounds) -> BlockPivotingState:
        """The state at a feasible start `z`, with the coordinates free that are on no bound."""
        size = jnp.int32(z.size)
        return BlockPivotingState(z, matmul(gram, z) - c, bounds.inside(z), size + 1, jnp.int32(3))

    def step(self, gram: Array, c: Array, state: BlockPivotingState, bounds: Bounds) -> BlockPivotingState:
        """Solve on the free set, then exchange, at the cost of one factorisation."""
        free = state.free
        if bounds.at_zero:
            x = solve_on(gram, free, c)
            wrong = jnp.where(free, bounds.outside(x), matmul(gram, x) < c)
        else:
            on_bounds = jnp.where(free, 0, state.z)
            x = solve_on(gram, free, c - matmul(gram, on_bounds)) + on_bounds
            gradient = matmul(gram, x) - c
            wrong = jnp.where(free, bounds.outside(x), bounds.split(x, gradient)[1] != 0)
        count = jnp.sum(wrong, dtype=jnp.int32)
        better = count < state.fewest
        patience = jnp.where(better, 3, state.patience - 1)
        last = jnp.max(jnp.where(wrong, jnp.arange(wrong.size), -1), initial=-1)
        exchange = wrong & ((patience >= 0) | (jnp.arange(wrong.size) == last))
        z = bounds.project(x)
        return BlockPivotingState(
            z, matmul(gram, z) - c, free ^ exchange, jnp.minimum(count, state.fewest), jnp.maximum(patience, -1)
        )


class ConjugateGradientState(NamedTuple):
    """Iterate `z [k]` with its gradient, direction `p [k]` (the step is `−p`) and the largest curvature `L` so far."""

    z: Array
    gradient: Array
    p: Array
    projected: Array  # p was cut off at the bounds: follow it as far as it lowers the objective, then restart
    curvature: Array


@pytrees.dataclass
class ConjugateGradient:
    """Conjugate gradient on the free coordinates, projected along the bounds.

    With `φ` the gradient where `z > 0` and `β = min(g, 0)` elsewhere (for `z ≥ 0`), each step costs one product `Gp`:

        a = gᵀp / pᵀGp,   z⁺ = z − ap,   p⁺ = φ⁺ − (φ⁺ᵀGp / pᵀGp) p.

    A step that would leave the feasible set is replaced by `p = z − max(z − ap, 0)`, followed as far as it lowers the
    objective, so that many coordinates reach their bound at once. When `‖β‖` exceeds the decrease expected on the face,
    the direction `φ + β` frees coordinates. On a face it converges as conjugate gradient does: fast where eigenvalues
    cluster, as they do in Gram matrices with a few common directions.

    Attributes:
      tol: stop a row when its relative KKT residual is at most this.
      max_steps: stop a row after this many steps.
      fallback: solver for the unsolved rows, or None. By default `BlockPivoting`, at this solver's tolerance: on nearly
        parallel atoms (a mean cosine of 0.99) conjugate gradient does not converge in thousands of steps.

    Example:
      >>> import jax, jax.numpy as jnp, jaxsae
      >>> D = jnp.array([[1.0, 0.0], [0.6, 0.8]])
      >>> code = jaxsae.SparseCode(values=jnp.zeros(2), indices=jnp.arange(2), num_latents=2)
      >>> refit, info = jaxsae.refit(D, jnp.array([2.2, 1.6]), code, jaxsae.ConjugateGradient(tol=1e-6))
      >>> jnp.round(refit.values, 3)
      Array([1., 2.], dtype=float32)

    Source: after Moré & Toraldo (1991), "On the solution of large quadratic programming problems with bound
      constraints", and Dostál (1997), "Box constrained quadratic programming with proportioning and projections".
    """

    tol: float | Array | None = 1e-5
    max_steps: int | Array = 1000
    fallback: Solver | None = BlockPivoting(tol=None, fallback=FISTA(tol=None))

    def init(self, gram: Array, c: Array, z: Array, bounds: Bounds) -> ConjugateGradientState:
        """The state at a feasible start `z`, with the projected gradient as direction."""
        gradient = matmul(gram, z) - c
        inside, inward = bounds.split(z, gradient)
        return ConjugateGradientState(z, gradient, inside + inward, jnp.zeros((), bool), jnp.ones((), gram.dtype))

    def step(self, gram: Array, c: Array, state: ConjugateGradientState, bounds: Bounds) -> ConjugateGradientState:
        """One step along `−p`, or the choice of a projected direction, at the cost of one product with `G`."""
        z, gradient, p, projected, curvature = state
        gram_p = matmul(gram, p)
        p_gram_p = jnp.sum(p * gram_p)
        curvature = jnp.maximum(curvature, divide(p_gram_p, jnp.sum(p * p)))
        a = jnp.maximum(divide(jnp.sum(gradient * p), p_gram_p), 0)
        leaves = ~projected & jnp.any(bounds.outside(z - a * p))
        # A projected direction ends on the bounds at full length, which lowers the objective if a ≥ ½.
        length = jnp.where(projected, jnp.where(a >= 0.5, 1, a), jnp.where(leaves, 0, a))
        ahead = bounds.project(z - length * p)
        gradient = gradient - length * gram_p

        free, (phi, beta) = bounds.inside(ahead), bounds.split(ahead, gradient)
        most = jnp.minimum(phi, (ahead - bounds.lower) * curvature)
        most = jnp.maximum(most, (ahead - bounds.upper) * curvature) if bounds.from_above else most
        promise = jnp.sum(phi * most)
        conjugate = phi - jnp.where(projected | ~free, 0, divide(jnp.sum(phi * gram_p), p_gram_p) * p)
        direction = jnp.where(jnp.sum(beta * beta) > promise, phi + beta, conjugate)
        # If the projected direction leads uphill, take a projected gradient step, which never does.
        uphill = projected & (a <= 0)
        cut = jnp.where(leaves, a * p, (phi + beta) / curvature)
        p = jnp.where(leaves | uphill, ahead - bounds.project(ahead - cut), direction)
        return ConjugateGradientState(ahead, gradient, p, leaves | uphill, curvature)


def resolve(solver: Solver) -> Solver:
    """Replace each fallback's tolerance of None by that of the solver before it."""
    fallback = solver.fallback
    if fallback is None:
        return solver
    if fallback.tol is None:
        fallback = dataclasses.replace(fallback, tol=solver.tol)
    return dataclasses.replace(solver, fallback=resolve(fallback))


def within(solver: Solver, *, tol: float | None = None, max_steps: int | Array | None = None) -> Solver:
    """Change the tolerance, or limit the steps, of a solver and its fallbacks.

    Args:
      solver: solver to change.
      tol: tolerance of all of them; unchanged by default.
      max_steps: most steps of all of them together; fallbacks with no steps left are dropped.

    Example:
      >>> import jaxsae
      >>> within(jaxsae.solvers.default(32, 768), tol=1e-3, max_steps=128)
      ConjugateGradient(tol=0.001, max_steps=128, fallback=None)
    """
    changed: dict[str, Any] = {} if tol is None else {"tol": tol}
    left = None
    if max_steps is not None:
        changed["max_steps"] = min(solver.max_steps, max_steps)
        left = max_steps - changed["max_steps"]
    if solver.fallback is not None:
        changed["fallback"] = None if left == 0 else within(solver.fallback, tol=tol, max_steps=left)
    return dataclasses.replace(solver, **changed)


def default(k: int, d: int | None = None, *, dtype: Any = jnp.float32, kernel: bool = False) -> Solver:
    """The default solver for `k` slots and width `d`, by measurement (`python -m benchmarks refine` and `nnls`).

    On two CPU cores `ConjugateGradient` is the fastest of these solvers, or close to it, in every case measured except
    nearly parallel atoms (a mean cosine of 0.99), on which it does not converge in a thousand steps; there
    `BlockPivoting` is the fastest, and takes the rows unsolved after 128 steps. With `k > d` the Gram matrix is
    singular and pivoting may cycle, so the default is `FISTA`. Conjugate gradient continues to a tenth of the usual
    tolerance, so that ill-conditioned rows too end within 1e-6 of their least error (tests/test_hard_set.py). Kernels
    (`jaxsae.kernels`) run FISTA in fast memory. No accelerator has been measured yet, so elsewhere the default does not
    depend on the backend.

    Without a width, that is for `nnls` and `nnls_dense`, problems of 256 values or more, or in float64, are taken to be
    as ill-conditioned as those of inverting images: `BlockPivoting` is the fastest where it ends, and `InteriorPoint`
    takes the rows on which it does not.

    Args:
      k: slots per row.
      d: width of the atoms; None for `nnls` and `nnls_dense`.
      dtype: dtype of the arithmetic.
      kernel: whether a kernel will solve the rows.

    Returns:
      A solver, with its fallbacks.

    Example:
      >>> import jaxsae
      >>> type(jaxsae.solvers.default(32, 768)).__name__, type(jaxsae.solvers.default(1024, 768)).__name__
      ('ConjugateGradient', 'FISTA')
    """
    if kernel:
        return FISTA(tol=1e-6, max_steps=256, fallback=BlockPivoting(tol=1e-6))
    if d is not None:
        return FISTA() if k > d else ConjugateGradient(tol=1e-6, max_steps=128, fallback=BlockPivoting(tol=1e-6))
    double = jnp.dtype(dtype) == jnp.float64
    tol = 1e-12 if double else 1e-6
    pivoting = BlockPivoting(tol=tol, max_steps=20, fallback=InteriorPoint(tol=None))
    return pivoting if double or k >= 256 else ConjugateGradient(tol=tol, max_steps=128, fallback=pivoting)
