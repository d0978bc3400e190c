"""FISTA on one small problem in fast memory: `solvers.fista_step` under `driver.iterate`, for kernels.

A kernel defines the product with `G` and the axis of a row's `k` slots; so the same code runs 128 rows in the lanes of
a TPU, `[k 128]` with one number per row `[1 128]`, and one row per program of a GPU, `[k]`.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from jaxsae._core.linalg import power_iteration
from jaxsae.least_squares import driver, solvers
from jaxsae.least_squares.bounds import of_sign


class Space(NamedTuple):
    """The vector operations of a kernel, on vectors of `k` slots.

    Attributes:
      matvec: `v -> Gv`.
      total: sum over the slots, in a shape that broadcasts against a vector.
      largest: likewise, the maximum.
      any: reduces a mask of rows (1 or 0 in float32, in the shape of `total`) to one scalar.
      slot: the index of each slot, in float32.
    """

    matvec: Callable[[Any], Any]
    total: Callable[[Any], Any]
    largest: Callable[[Any], Any]
    any: Callable[[Any], Any]
    slot: Any


def spectral_norm(space: Space, columns):
    """`solvers.spectral_norm`, given the squared norms of the columns of `G`."""
    longest = columns == space.largest(columns)
    first = -space.largest(jnp.where(longest, -space.slot, -1e9))
    column = space.matvec((space.slot == first).astype(jnp.float32))
    return power_iteration(space.matvec, column, solvers.POWER_STEPS, space.total)


def solve(space: Space, columns, c, weight, start, *, tol, max_steps, nonnegative: bool):
    """Minimise `½ zᵀGz − cᵀz`, until the KKT residual is within `tol`, for at most `max_steps` steps.

    Args:
      space: the vector operations.
      columns: squared norms of the columns of `G`.
      c: the linear term.
      weight: as in `problems.Problem`.
      start: starting values; replaced by 0 if far worse than that, as in `problems.solved`.
      tol: tolerance of the KKT residual.
      max_steps: most steps.
      nonnegative: constrain `z ≥ 0`.

    Returns:
      The best iterate, its KKT residual and the number of steps (int32), as from `driver.drive`; and whether the
      given start was used.
    """
    bounds = of_sign(nonnegative)
    start = bounds.project(start)
    warm_started = 0.5 * space.total(start * (space.matvec(start) - 2 * c)) < 10
    start = jnp.where(warm_started, start, 0.0)

    def gradient(z):
        return space.matvec(z) - c

    def step(state):
        return solvers.fista_step(state, lambda v, _: bounds.project(v), gradient, space.total)

    def repeat(step, carry, running):
        """Repeat while any row is running; the others wait."""

        def hold(pair):
            carry, running = pair
            new, still = step(carry)
            carry = jax.tree.map(lambda new, old: jnp.where(running > 0, new, old), new, carry)
            return carry, ((running > 0) & still).astype(jnp.float32)

        return jax.lax.while_loop(lambda pair: space.any(pair[1]), hold, (carry, running.astype(jnp.float32)))[0]

    begin = solvers.fista_start(start, gradient(start), spectral_norm(space, columns))
    x, kkt, steps = driver.iterate(
        *(step, begin, weight, tol, max_steps, bounds), total=space.total, largest=space.largest, repeat=repeat
    )
    return x, kkt, steps, warm_started
