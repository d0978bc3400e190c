"""What kernels of every platform need of shapes."""

from typing import Any

import jax
from jax.sharding import ManualAxisType


def like(inputs: Any, shape: tuple[int, ...], dtype) -> jax.ShapeDtypeStruct:
    """An output's shape, varying over the axes of a `shard_map` that any of the inputs varies over."""
    axes = frozenset().union(*(jax.typeof(x).manual_axis_type.varying for x in inputs))
    return jax.ShapeDtypeStruct(shape, dtype, manual_axis_type=ManualAxisType(varying=axes))
