"""The loop around a solver's step: stop on the KKT residual, keep the best iterate."""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import Array

from jaxsae import sharding
from jaxsae._core.linalg import max_or_nan
from jaxsae.least_squares.bounds import Bounds
from jaxsae.least_squares.solvers import Solver, State


class _Carry(NamedTuple):
    state: State
    best: Array  # [k] the iterate to return, the best so far
    best_gradient: Array  # [k]
    steps: Array


def drive(solver: Solver, G, c, weight, z, max_steps, bounds: Bounds):
    """Run a solver on one unit-free problem until its KKT residual is within tolerance, for at most `max_steps`."""
    start = sharding.vary_alike(solver.init(G, c, z, bounds), weight, max_steps)
    return iterate(lambda state: solver.step(G, c, state, bounds), start, weight, solver.tol, max_steps, bounds)


def _while_running(step, carry, running):
    """Repeat `step(carry) -> (carry, running)`, for one row."""
    return jax.lax.while_loop(lambda pair: pair[1], lambda pair: step(pair[0]), (carry, running))[0]


def iterate(
    step,
    start,
    weight,
    tol,
    max_steps,
    bounds: Bounds,
    *,
    total=jnp.sum,
    largest: Callable = max_or_nan,
    repeat=_while_running,
):
    """Repeat `step(state) -> state` until the KKT residual is within `tol`, and return the best iterate.

    It stops on a residual that counts every atom as at least as long as the longest, so that short atoms are solved as
    well as long ones; the residual returned is at most that.

    The change of a quadratic between two points is exactly `½(z − z')ᵀ(g + g')`; so iterates are compared without
    subtracting two nearly equal objectives.

    Args:
      step: step of a solver.
      start: its state at a feasible start.
      weight: as in `problems.Problem`.
      tol: tolerance of the KKT residual.
      max_steps: most steps.
      bounds: on the values.
      total: sum over the slots of a row.
      largest: maximum over the slots of a row.
      repeat: `(step, carry, running) -> carry`, a loop while the row, or any of several, is `running`.

    Returns:
      The best iterate, its KKT residual, and the number of steps.
    """

    def residual(z, gradient, weight):
        return largest(weight * bounds.violation(z, gradient))

    strict = jnp.maximum(weight, 1)

    def improvement(state, z, gradient):
        return -0.5 * total((state.z - z) * (state.gradient + gradient))

    def update(carry: _Carry):
        state = step(carry.state)
        within = residual(state.z, state.gradient, strict) <= tol
        done = within & (improvement(state, start.z, start.gradient) >= 0)
        better = done | (improvement(state, carry.best, carry.best_gradient) > 0)
        best = jnp.where(better, state.z, carry.best)
        best_gradient = jnp.where(better, state.gradient, carry.best_gradient)
        steps = carry.steps + 1
        return _Carry(state, best, best_gradient, steps), ~done & (steps < max_steps)

    # NaN compares false: a row that is not finite never runs.
    running = (residual(start.z, start.gradient, strict) > tol) & (max_steps > 0)
    carry = repeat(update, _Carry(start, start.z, start.gradient, jnp.zeros_like(running, jnp.int32)), running)
    return carry.best, residual(carry.best, carry.best_gradient, weight), carry.steps
