"""First-order solvers of one small quadratic programme, as pytrees of numbers with a pure `init` and `step`.

Each minimises `½ zᵀGz − cᵀz` over `z ≥ 0` (or any `z`) for one row: `G [k k]` positive semi-definite,
`c [k]`. The set enters as its projection, `project`. A state has fields `z`, the iterate, and `gradient`,
`Gz − c` at it; `refit.py` drives the steps, judges the iterates and decides when to stop, so that a solver
holds nothing but its own mathematics.
"""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import struct
from jaxtyping import Array, Float

Project = Callable[[Array], Array]


def _matvec(gram: Float[Array, "k k"], z: Float[Array, " k"]) -> Float[Array, " k"]:
    return jnp.matmul(gram, z, precision=jax.lax.Precision.HIGHEST)


def spectral_norm(gram: Float[Array, "k k"], *, iterations: int = 8) -> Float[Array, ""]:
    """Estimate `‖G‖₂` of a positive semi-definite matrix by power iteration, from below.

    It starts at the longest column: never zero unless `G` is, and the same whatever the order of the atoms.
    """
    if gram.shape[-1] == 0:
        return jnp.zeros((), gram.dtype)
    v = gram[:, jnp.argmax(jnp.sum(gram * gram, axis=0))]
    norm = jnp.linalg.norm(v)

    def iterate(_, carry):
        v, norm = carry
        v = _matvec(gram, v / jnp.where(norm > 0, norm, 1))
        return v, jnp.linalg.norm(v)

    return jax.lax.fori_loop(0, iterations, iterate, (v, norm))[1]


def _raise_curvature(curvature, dz, dg):
    """The larger of the curvature so far and the one just met, `dzᵀG dz / ‖dz‖²`.

    Power iteration estimates `‖G‖₂` from below; each step taken is evidence that can only raise it.
    """
    squared = jnp.sum(dz * dz)
    met = jnp.sum(dz * dg) / jnp.where(squared > 0, squared, 1)
    return jnp.maximum(curvature, jnp.where(squared > 0, met, 0))


class ProjectedGradientState(NamedTuple):
    """Iterate `z [k]`, its gradient `[k]`, and the curvature `L` that sets the step `1/L`."""

    z: Array
    gradient: Array
    curvature: Array


@struct.dataclass
class ProjectedGradient:
    """Projected gradient with a spectral step: `z ← P(z − (Gz − c)/L)`, `L = ‖G‖₂` by power iteration.

    The method of Section 5.1 of Gao et al. (2024). Each step lowers the objective; on ill-conditioned
    supports there are many: prefer `FISTA`.

    Attributes:
      tol: stop a row when its KKT residual, relative and without unit, is at most this.
      max_steps: stop a row after this many steps.

    Example:
      >>> import jax, jax.numpy as jnp, jaxsae
      >>> D = jnp.array([[1.0, 0.0], [0.6, 0.8]])
      >>> code = jaxsae.SparseCode(values=jnp.zeros(2), indices=jnp.arange(2), num_latents=2)
      >>> refit, info = jaxsae.refit(D, jnp.array([2.2, 1.6]), code, jaxsae.ProjectedGradient(tol=1e-6))
      >>> jnp.round(refit.values, 3)
      Array([1., 2.], dtype=float32)
    """

    tol: float | Array = 1e-5
    max_steps: int | Array = 5000

    def init(self, gram: Array, c: Array, z: Array) -> ProjectedGradientState:
        """The state at a feasible start `z`."""
        return ProjectedGradientState(z, _matvec(gram, z) - c, spectral_norm(gram))

    def step(self, gram: Array, c: Array, state: ProjectedGradientState, project: Project) -> ProjectedGradientState:
        """One projected step, at the cost of one product with `G`."""
        safe = jnp.where(state.curvature > 0, state.curvature, 1)
        z = project(state.z - state.gradient / safe)
        gradient = _matvec(gram, z) - c
        curvature = _raise_curvature(state.curvature, z - state.z, gradient - state.gradient)
        return ProjectedGradientState(z, gradient, curvature)


class FISTAState(NamedTuple):
    """Iterate `z` and extrapolation `w`, each `[k]` with its gradient, curvature `L` and momentum `t`."""

    z: Array
    gradient: Array
    w: Array
    gradient_w: Array
    curvature: Array
    t: Array


@struct.dataclass
class FISTA:
    """Accelerated projected gradient (Beck & Teboulle 2009) with gradient restart (O'Donoghue & Candès 2015).

        z⁺ = P(w − (Gw − c)/L),   t⁺ = (1 + √(1 + 4t²))/2,   w⁺ = z⁺ + (t − 1)/t⁺ · (z⁺ − z),

    with the momentum dropped (`t⁺ = 1`, `w⁺ = z⁺`) whenever it points uphill, `(Gw − c)ᵀ(z⁺ − z) > 0`.

    Attributes:
      tol: stop a row when its KKT residual, relative and without unit, is at most this.
      max_steps: stop a row after this many steps.

    Example:
      >>> import jax, jax.numpy as jnp, jaxsae
      >>> D = jnp.array([[1.0, 0.0], [0.6, 0.8]])
      >>> code = jaxsae.SparseCode(values=jnp.zeros(2), indices=jnp.arange(2), num_latents=2)
      >>> refit, info = jaxsae.refit(D, jnp.array([2.2, 1.6]), code, jaxsae.FISTA(tol=1e-6))
      >>> jnp.round(refit.values, 3)
      Array([1., 2.], dtype=float32)
    """

    tol: float | Array = 1e-5
    max_steps: int | Array = 2000

    def init(self, gram: Array, c: Array, z: Array) -> FISTAState:
        """The state at a feasible start `z`, without momentum."""
        gradient = _matvec(gram, z) - c
        return FISTAState(z, gradient, z, gradient, spectral_norm(gram), jnp.ones((), gram.dtype))

    def step(self, gram: Array, c: Array, state: FISTAState, project: Project) -> FISTAState:
        """One accelerated step, at the cost of one product with `G`: the gradient is affine, so `w`'s is free."""
        safe = jnp.where(state.curvature > 0, state.curvature, 1)
        z = project(state.w - state.gradient_w / safe)
        gradient = _matvec(gram, z) - c
        curvature = _raise_curvature(state.curvature, z - state.w, gradient - state.gradient_w)
        restart = jnp.sum(state.gradient_w * (z - state.z)) > 0
        t = jnp.where(restart, 1.0, (1 + jnp.sqrt(1 + 4 * state.t**2)) / 2)
        momentum = jnp.where(restart, 0.0, (state.t - 1) / t)
        w = z + momentum * (z - state.z)
        gradient_w = gradient + momentum * (gradient - state.gradient)
        return FISTAState(z, gradient, w, gradient_w, curvature, t)
