"""Mergeable sums with compensated rounding, of which all metrics consist."""

import dataclasses
from collections.abc import Sequence
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

_Metric = TypeVar("_Metric")


class _Sums:
    """Base class of metrics: `+`, compiled once for each class and shape."""

    def __add__(self: _Metric, other: _Metric) -> _Metric:
        return _merge(self, other)

    def _plus(self, other: Any) -> Any:
        """The merged metric, traceable; field by field by default."""
        names = [field.name for field in dataclasses.fields(self)]  # pyright: ignore[reportArgumentType]
        return type(self)(**{name: _plus(getattr(self, name), getattr(other, name)) for name in names})


@jax.jit
def _merge(a, b):
    return a._plus(b)


def _plus(a, b):
    return tuple(map(_plus, a, b)) if isinstance(a, tuple) else a._plus(b)


def _rest() -> Any:
    """A field for the rounding errors of the other fields, by name."""
    return dataclasses.field(default_factory=dict)


def _added(a: Any, b: Any, names: Sequence[str], scales: tuple[Any, Any] = (1.0, 1.0)) -> dict[str, Any]:
    """The named fields of `scales[0] · a + scales[1] · b`, and their `rest`."""
    (x, y), found, rest = scales, {}, {}
    for name in names:
        left = x * a.rest.get(name, 0.0) + y * b.rest.get(name, 0.0)
        found[name], rest[name] = _two_sum(x * getattr(a, name), y * getattr(b, name), left)
    return found | {"rest": rest}


def _two_sum(a, b, rest):
    """`a + b + rest`, rounded, and its rounding error (Knuth)."""
    total = a + b
    part = total - a
    rest = rest + ((a - (total - part)) + (b - part))
    rounded = total + jnp.where(jnp.isfinite(total), rest, 0)
    return rounded, jnp.where(jnp.isfinite(rounded), rest - (rounded - total), 0)


def _exact(fields: dict[str, Any]) -> dict[str, Any]:
    """The fields of a single batch, with a `rest` of zeros."""
    return fields | {"rest": jax.tree.map(jnp.zeros_like, fields)}


def _unit(*arrays: Array) -> Float[Array, ""]:
    """A power of two in units of which sums of squares neither overflow nor underflow; 1 for ordinary magnitudes."""
    most = jnp.stack([jnp.max(jnp.abs(x), initial=0) for x in arrays]).max()
    step = -3 * int(jnp.finfo(most.dtype).minexp) // 8  # 47 in float32
    power = jnp.clip(jnp.round(jnp.frexp(most)[1] / step), -2, 2)
    power = jnp.where(most > 0, power, -2).astype(jnp.int32)
    return jax.lax.stop_gradient(jnp.ldexp(jnp.ones((), most.dtype), step * power))
