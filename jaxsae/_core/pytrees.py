"""Frozen dataclasses that are pytrees, like those of `flax.struct`, with the class as part of their structure.

Training changes floating-point leaves, except in fields declared with `fixed`.

JAX 0.10 and 0.12 compare classes registered by `jax.tree_util.register_dataclass`, which `flax.struct` calls, by their
static fields alone. `jit` was seen to run for a `GroupMax(4)` what it had compiled for an `AbsTopK(4)`: rarely, since
it compares hashes first. For classes registered as here, it compares the class too.
"""

import dataclasses
import json
from typing import Any, TypeVar, dataclass_transform

import jax
import jax.numpy as jnp
from jax import export

from jaxsae._core import lazy

_T = TypeVar("_T")


def static(**options: Any) -> Any:
    """A field that is part of the pytree's structure: `jit` compiles anew for each value.

    Args:
      options: of `dataclasses.field`, such as `default`.

    Example:
      >>> @dataclass
      ... class Power:
      ...     of: jax.Array
      ...     exponent: int = static(default=2)
      >>> jax.jit(lambda power: power.of**power.exponent)(Power(jnp.float32(3)))
      Array(9., dtype=float32)
    """
    return dataclasses.field(metadata={"pytree_node": False}, **options)


def fixed(**options: Any) -> Any:
    """A traced but non-trainable field.

    Args:
      options: of `dataclasses.field`, such as `default`.

    Example:
      >>> @dataclass
      ... class Clipped:
      ...     by: float
      ...     at_most: float = fixed(default=3.0)
      >>> partition(Clipped(1.5))
      (Clipped(by=1.5, at_most=None), Clipped(by=None, at_most=3.0))
    """
    return dataclasses.field(metadata={"trained": False}, **options)


def sharded(*axes: str | None) -> Any:
    """A field whose array is split over a mesh, given one entry per axis as in a `jax.sharding.PartitionSpec`.

    Args:
      axes: `"latent"` for the axis of the latents, None for the others.

    Example:
      >>> from jaxsae import sharding
      >>> @dataclass
      ... class Bias:
      ...     by_latent: jax.Array = sharded("latent")
      >>> tuple(sharding.specs(Bias(jnp.zeros(8))).by_latent)
      ('latent',)
    """
    return dataclasses.field(metadata={"axes": axes})


def partition(tree: _T) -> tuple[_T, _T]:
    """Split a tree into trainable and other leaves; each part has None where the other has a leaf.

    Trainable leaves are floating-point numbers outside fields declared with `fixed`, at any depth.

    Args:
      tree: pytree, in which dataclasses may stand at any depth.

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
    """Whether each leaf of a node is trained, in order."""
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
    """Merge the two parts that `partition` returned.

    Args:
      trained: the trainable part.
      rest: the other part.

    Example:
      >>> merge({"a": 1.0, "b": None}, {"a": None, "b": 2})
      {'a': 1.0, 'b': 2}
    """
    return jax.tree.map(lambda a, b: b if a is None else a, trained, rest, is_leaf=lambda leaf: leaf is None)


@dataclass_transform(field_specifiers=(static, fixed, sharded), frozen_default=True)
def dataclass(cls: type[_T]) -> type[_T]:
    """Make a class a frozen dataclass that is a pytree, with `replace`.

    Fields are leaves or pytrees, except those declared with `static`, or `flax.struct.field(pytree_node=False)`. The
    library's own classes are registered with `jax.export`, so that exported functions can take them.

    Args:
      cls: class with annotated fields.

    Example:
      >>> @dataclass
      ... class Scale:
      ...     by: float
      ...     kind: str = static(default="row")
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
        # Not by `__init__`, which may reject other leaves that JAX puts into a tree: axes, names, None.
        self = object.__new__(made)
        vars(self).update(zip(leaves, found, strict=True), **dict(zip(static, fixed, strict=True)))
        return self

    jax.tree_util.register_pytree_with_keys(made, flatten_with_keys, unflatten, flatten)

    lazy.when_imported("flax.serialization", lambda flax: _register_with_flax(flax, made, leaves))
    if made.__module__.startswith("jaxsae."):  # classes of others register themselves
        export.register_pytree_node_serialization(
            made,
            serialized_name=f"jaxsae.{made.__qualname__}",
            serialize_auxdata=lambda static: json.dumps(static).encode(),
            deserialize_auxdata=lambda content: tuple(json.loads(content)),
        )
    made.replace = dataclasses.replace
    return made


def _register_with_flax(serialization: Any, made: type, leaves: list[str]) -> None:
    def to_state(self):
        return {name: serialization.to_state_dict(getattr(self, name)) for name in leaves}

    def from_state(self, state):
        parts = {name: serialization.from_state_dict(getattr(self, name), state[name], name) for name in leaves}
        return dataclasses.replace(self, **parts)

    serialization.register_serialization_state(made, to_state, from_state)
