"""Frozen dataclasses that are pytrees, like those of `flax.struct`, and whose class is a part of their structure.

JAX compares two of `jax.tree_util.register_dataclass`, which `flax.struct` calls, by their static fields alone and not
by their classes (0.10 and 0.12 do so). `jit` was seen to run for a `GroupMax(4)` what it had compiled for an
`AbsTopK(4)`: seldom, since it looks by a hash first. Of what is registered otherwise it compares the class.
"""

import dataclasses
from typing import Any, TypeVar, dataclass_transform

import jax
from flax import serialization, struct

_T = TypeVar("_T")


@dataclass_transform(field_specifiers=(struct.field,), frozen_default=True)
def dataclass(cls: type[_T]) -> type[_T]:
    """Make a class a frozen dataclass and a pytree, with `replace`.

    Fields are leaves or pytrees, but for those of `flax.struct.field(pytree_node=False)`, which are static.

    Args:
      cls: with annotated fields.

    Example:
      >>> from flax import struct
      >>> @dataclass
      ... class Scale:
      ...     by: float
      ...     kind: str = struct.field(pytree_node=False, default="row")
      >>> jax.tree.map(lambda by: 2 * by, Scale(1.5)).replace(kind="column")
      Scale(by=3.0, kind='column')
    """
    made: Any = dataclasses.dataclass(frozen=True)(cls)
    fields = dataclasses.fields(made)
    leaves = [each.name for each in fields if each.metadata.get("pytree_node", True)]
    static = [each.name for each in fields if each.name not in leaves]
    keys = [jax.tree_util.GetAttrKey(name) for name in leaves]

    def flatten(self):
        return [getattr(self, name) for name in leaves], tuple(getattr(self, name) for name in static)

    def flatten_with_keys(self):
        found, fixed = flatten(self)
        return list(zip(keys, found, strict=True)), fixed

    def unflatten(fixed, found):
        return made(**dict(zip(leaves, found, strict=True)), **dict(zip(static, fixed, strict=True)))

    jax.tree_util.register_pytree_with_keys(made, flatten_with_keys, unflatten, flatten)

    def to_state(self):
        return {name: serialization.to_state_dict(getattr(self, name)) for name in leaves}

    def from_state(self, state):
        parts = {name: serialization.from_state_dict(getattr(self, name), state[name], name) for name in leaves}
        return dataclasses.replace(self, **parts)

    serialization.register_serialization_state(made, to_state, from_state)
    made.replace = dataclasses.replace
    return made
