"""The bounds on the values, `lower ≤ z ≤ upper`, as solvers use them."""

import math
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float

from jaxsae._core import chunking

_PASS = "pass (lower, upper), numbers or arrays, infinite where there is no bound"


class Bounds(NamedTuple):
    """Bounds on the values of one row: numbers that are known at trace time, so that most have no cost, or arrays."""

    lower: Any = 0.0  # a float, or an array [*b k]
    upper: Any = math.inf

    @property
    def from_above(self) -> bool:
        """Whether any value may have an upper bound."""
        return not (isinstance(self.upper, float) and self.upper == math.inf)

    @property
    def at_zero(self) -> bool:
        """Whether values on a bound are known to be 0."""
        return isinstance(self.lower, float) and not self.from_above

    def project(self, z: Float[Array, "*k"]) -> Float[Array, "*k"]:
        """The nearest values within the bounds."""
        z = jnp.maximum(z, self.lower)
        return jnp.minimum(z, self.upper) if self.from_above else z

    def inside(self, z: Float[Array, "*k"]) -> Bool[Array, "*k"]:
        """Which values are on no bound."""
        return (z > self.lower) & (z < self.upper) if self.from_above else z > self.lower

    def outside(self, z: Float[Array, "*k"]) -> Bool[Array, "*k"]:
        """Which values are out of their bounds."""
        return (z < self.lower) | (z > self.upper) if self.from_above else z < self.lower

    def split(self, z: Float[Array, "*k"], gradient: Float[Array, "*k"]) -> tuple[Array, Array]:
        """The gradient inside of the bounds, and that on them where its opposite leads inside; 0 elsewhere."""
        inside = self.inside(z)
        inward = jnp.minimum(gradient, 0)
        if self.from_above:
            above, below = z > self.lower, z < self.upper
            inward = jnp.where(above, jnp.where(below, 0, jnp.maximum(gradient, 0)), jnp.where(below, inward, 0))
        return jnp.where(inside, gradient, 0), jnp.where(inside, 0, inward)

    def violation(self, z: Float[Array, "*k"], gradient: Float[Array, "*k"]) -> Float[Array, "*k"]:
        """KKT violation of each value: by how much it is out of bounds, or its gradient allows to descend."""
        if self.from_above:
            down, up = jnp.where(z > self.lower, gradient, 0), jnp.where(z < self.upper, -gradient, 0)
            outside = jnp.maximum(jnp.maximum(self.lower - z, z - self.upper), 0)
            return jnp.maximum(jnp.maximum(down, up), outside)
        if self.lower == -math.inf:
            return jnp.abs(gradient)
        return jnp.where(z > self.lower, jnp.abs(gradient), jnp.maximum(jnp.maximum(-gradient, self.lower - z), 0))


def of_sign(nonnegative: bool) -> Bounds:
    """`z ≥ 0`, or no bounds."""
    return Bounds() if nonnegative else Bounds(-math.inf)


def validate_bounds(bounds: Any, z: Array, name: str) -> Bounds:
    """Bounds as arrays like the values; raise if they are none, or are known to cross."""
    if not isinstance(bounds, tuple | list) or len(bounds) != 2:
        raise TypeError(f"`{name}` got {bounds!r} as bounds; {_PASS}.")
    try:
        both = [jnp.asarray(bound, z.dtype) for bound in bounds]
    except (TypeError, ValueError) as error:
        raise TypeError(f"`{name}` got {bounds!r} as bounds; {_PASS}.") from error
    for what, bound in zip(("lower", "upper"), both, strict=True):
        if bound.ndim > z.ndim or any(a not in (1, b) for a, b in zip(bound.shape[::-1], z.shape[::-1], strict=False)):
            raise ValueError(
                f"`{name}` got bounds of which the {what} has shape {bound.shape}; pass what broadcasts to {z.shape}."
            )
    both = Bounds(*(jnp.broadcast_to(bound, z.shape) for bound in both))
    if chunking.is_concrete(both) and (crossing := ~(np.asarray(both.lower) <= np.asarray(both.upper))).any():
        first = tuple(int(axis[0]) for axis in np.nonzero(crossing))
        raise ValueError(
            f"`{name}` got bounds that cross, or are NaN, in {crossing.sum()} of {crossing.size} places, the first of "
            f"them {first}: {both.lower[first]} and {both.upper[first]}; pass lower ≤ upper."
        )
    return both
