"""FISTA on one small problem in fast memory: the arithmetic of `solvers.FISTA` under `solvers.drive`, for kernels.

A kernel says how a product with `G` is made and along which axis a row's `k` slots lie; so the same lines run 128
rows in the lanes of a TPU, `[k 128]` with one number a row `[1 128]`, and one row in a program of a GPU, `[k]`.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from jaxsae._core.linalg import divide


class Space(NamedTuple):
    """Where a kernel keeps a vector of `k` slots.

    Attributes:
      matvec: `v -> Gv`.
      total: sum over the slots, in a shape that broadcasts against a vector.
      largest: the same for the maximum.
      any: from a row's mask (1 or 0 in float32, in the shape of `total`) to one scalar.
      slot: the number of each slot, in float32.
    """

    matvec: Callable[[Any], Any]
    total: Callable[[Any], Any]
    largest: Callable[[Any], Any]
    any: Callable[[Any], Any]
    slot: Any


def spectral_norm(space: Space, columns, *, iterations: int = 8):
    """`solvers.spectral_norm`, given the squared norms of the columns of `G`."""
    longest = columns == space.largest(columns)
    first = -space.largest(jnp.where(longest, -space.slot, -1e9))
    v = space.matvec((space.slot == first).astype(jnp.float32))

    def iterate(_, carry):
        v, norm = carry
        v = space.matvec(v / jnp.where(norm > 0, norm, 1.0))
        return v, jnp.sqrt(space.total(v * v))

    return jax.lax.fori_loop(0, iterations, iterate, (v, jnp.sqrt(space.total(v * v))))[1]


def solve(space: Space, columns, c, weight, start, *, tol, most, nonnegative: bool):
    """Minimise `½ zᵀGz − cᵀz` from a feasible start, until the KKT residual is within `tol`, for at most `most` steps.

    Args:
      space: where vectors live.
      columns: squared norms of the columns of `G`.
      c: the linear term.
      weight: as of `problems.Problem`.
      start: a feasible point.
      tol: tolerance of the KKT residual.
      most: steps.
      nonnegative: constrain `z ≥ 0`.

    Returns:
      The best iterate, its KKT residual, and the number of steps (int32), as `solvers.drive` has them.
    """

    def residual(z, gradient, weight):
        violation = jnp.abs(gradient)
        if nonnegative:
            violation = jnp.where(z > 0, violation, jnp.maximum(jnp.maximum(-gradient, -z), 0.0))
        return space.largest(weight * violation)

    def improvement(z, gradient, other, gradient_other):
        return -0.5 * space.total((z - other) * (gradient + gradient_other))

    strict = jnp.maximum(weight, 1.0)
    gradient = space.matvec(start) - c
    curvature = spectral_norm(space, columns)
    start_gradient = gradient
    # NaN compares false: a row that is not finite never runs.
    running = ((residual(start, gradient, strict) > tol) & (most > 0)).astype(jnp.float32)

    def step(carry):
        z_old, g_old, w, g_w, curvature, t_old, best, best_gradient, steps, running = carry
        on = running > 0
        z = w - g_w / jnp.where(curvature > 0, curvature, 1.0)
        z = jnp.maximum(z, 0.0) if nonnegative else z
        g = space.matvec(z) - c
        dz = z - w
        met = divide(space.total(dz * (g - g_w)), space.total(dz * dz))
        uphill = space.total(g_w * (z - z_old)) > 0
        t = jnp.where(uphill, 1.0, (1 + jnp.sqrt(1 + 4 * t_old * t_old)) / 2)
        momentum = jnp.where(uphill, 0.0, (t_old - 1) / t)
        done = (residual(z, g, strict) <= tol) & (improvement(z, g, start, start_gradient) >= 0)
        better = on & (done | (improvement(z, g, best, best_gradient) > 0))
        steps = steps + running
        return (
            jnp.where(on, z, z_old),
            jnp.where(on, g, g_old),
            jnp.where(on, z + momentum * (z - z_old), w),
            jnp.where(on, g + momentum * (g - g_old), g_w),
            jnp.where(on, jnp.maximum(curvature, met), curvature),
            jnp.where(on, t, t_old),
            jnp.where(better, z, best),
            jnp.where(better, g, best_gradient),
            steps,
            (on & ~done & (steps < most)).astype(jnp.float32),
        )

    t, steps = jnp.ones_like(curvature), jnp.zeros_like(running)
    carry = (start, gradient, start, gradient, curvature, t, start, gradient, steps, running)
    carry = jax.lax.while_loop(lambda carry: space.any(carry[-1]), step, carry)
    *_, best, best_gradient, steps, _ = carry
    return best, residual(best, best_gradient, weight), steps.astype(jnp.int32)
