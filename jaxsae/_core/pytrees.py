"""Frozen dataclasses that are pytrees, like those of `flax.struct`, and whose class is a part of their structure.

Their fields also say what training may change: floating-point numbers, unless the field is made by `fixed`.

JAX compares two of `jax.tree_util.register_dataclass`, which `flax.struct` calls, by their static fields alone and not
by their classes (0.10 and 0.12 do so). `jit` was seen to run for a `GroupMax(4)` what it had compiled for an
`AbsTopK(4)`: seldom, since it looks by a hash first. Of what is registered otherwise it compares the class.
"""

import dataclasses
import json
from typing import Any, TypeVar, dataclass_transform

import jax
import jax.numpy as jnp
from flax import serialization, struct
from jax import export

_T = TypeVar("_T")


def fixed(**options: Any) -> Any:
    """A field whose numbers are no parameters: leaves of the pytree, which may be traced, and which training leaves be.

    Args:
      options: of `dataclasses.field`, `default` for example.

    Example:
      >>> @dataclass
      ... class Clipped:
      ...     by: float
      ...     at_most: float = fixed(default=3.0)
      >>> partition(Clipped(1.5))
      (Clipped(by=1.5, at_most=None), Clipped(by=None, at_most=3.0))
    """
    return struct.field(metadata={"trained": False}, **options)


def sharded(*axes: str | None) -> Any:
    """A field whose array is split over a mesh, as a `jax.sharding.PartitionSpec` says, but of all its axes.

    Args:
      axes: `"latent"` for the one of the latents, None for each other.

    Example:
      >>> from jaxsae import sharding
      >>> @dataclass
      ... class Bias:
      ...     by_latent: jax.Array = sharded("latent")
      >>> tuple(sharding.specs(Bias(jnp.zeros(8))).by_latent)
      ('latent',)
    """
    return struct.field(metadata={"axes": axes})


def partition(tree: _T) -> tuple[_T, _T]:
    """Split a tree into what training changes and what it does not, each with None in the place of the other.

    Changed are numbers of floating point that no field marked `fixed` holds, at any depth.

    Args:
      tree: dataclasses that are pytrees, in any containers.

    Example:
      >>> import jaxsae
      >>> sae = jaxsae.init(jax.random.key(0), d=4, m=8, activation=jaxsae.TopK(2, keep=1.0))
      >>> trained, rest = partition(sae)
      >>> trained.activation.keep, rest.activation.keep, rest.W_enc
      (None, 1.0, None)
    """
    leaves, structure = jax.tree.flatten(tree)
    marks = _trained(tree, True)
    trained = [leaf if mark else None for leaf, mark in zip(leaves, marks, strict=True)]
    rest = [None if mark else leaf for leaf, mark in zip(leaves, marks, strict=True)]
    return structure.unflatten(trained), structure.unflatten(rest)


def _trained(node: Any, marked: bool) -> list[bool]:
    """Whether each leaf of a node is trained, in their order."""
    if jax.tree_util.all_leaves([node]):
        return [marked and jnp.issubdtype(getattr(node, "dtype", type(node)), jnp.inexact)]
    fields = dataclasses.fields(node) if dataclasses.is_dataclass(node) else ()
    fixed = {field.name for field in fields if not field.metadata.get("trained", True)}
    children, _ = jax.tree_util.tree_flatten_with_path(node, is_leaf=lambda other: other is not node)
    return [
        mark
        for (key,), child in children
        for mark in _trained(child, marked and getattr(key, "name", None) not in fixed)
    ]


def merge(trained: _T, rest: _T) -> _T:
    """The tree that `partition` split.

    Args:
      trained: the first of the two.
      rest: the second.

    Example:
      >>> merge({"a": 1.0, "b": None}, {"a": None, "b": 2})
      {'a': 1.0, 'b': 2}
    """
    return jax.tree.map(lambda a, b: b if a is None else a, trained, rest, is_leaf=lambda leaf: leaf is None)


@dataclass_transform(field_specifiers=(struct.field, fixed, sharded), frozen_default=True)
def dataclass(cls: type[_T]) -> type[_T]:
    """Make a class a frozen dataclass and a pytree, with `replace`.

    Fields are leaves or pytrees, but for those of `flax.struct.field(pytree_node=False)`, which are static. Ours can be
    arguments of functions that `jax.export` writes to disk.

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
        # Not by `__init__`, which may refuse what JAX also rebuilds a tree around: axes, names, None.
        self = object.__new__(made)
        vars(self).update(zip(leaves, found, strict=True), **dict(zip(static, fixed, strict=True)))
        return self

    jax.tree_util.register_pytree_with_keys(made, flatten_with_keys, unflatten, flatten)

    def to_state(self):
        return {name: serialization.to_state_dict(getattr(self, name)) for name in leaves}

    def from_state(self, state):
        parts = {name: serialization.from_state_dict(getattr(self, name), state[name], name) for name in leaves}
        return dataclasses.replace(self, **parts)

    serialization.register_serialization_state(made, to_state, from_state)
    if made.__module__.startswith("jaxsae."):  # others name theirs themselves
        export.register_pytree_node_serialization(
            made,
            serialized_name=f"jaxsae.{made.__qualname__}",
            serialize_auxdata=lambda static: json.dumps(static).encode(),
            deserialize_auxdata=lambda content: tuple(json.loads(content)),
        )
    made.replace = dataclasses.replace
    return made
