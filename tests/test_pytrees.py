"""Our dataclasses are pytrees, of which no two of different classes have the same structure."""

import dataclasses
import importlib
import inspect
import itertools
import pkgutil

import jax
import jax.numpy as jnp
import numpy as np
from flax import serialization, struct

import jaxsae
from jaxsae._core import pytrees


@pytrees.dataclass
class Scale:
    by: jax.Array
    shift: jax.Array | None = None
    kind: str = struct.field(pytree_node=False, default="row")


def test_leaves_and_static_fields():
    scale = Scale(jnp.ones(3))
    leaves, structure = jax.tree.flatten_with_path(scale)
    assert [jax.tree_util.keystr(path) for path, _ in leaves] == [".by"]
    assert structure == jax.tree.structure(Scale(jnp.zeros(3))) != jax.tree.structure(Scale(jnp.ones(3), kind="latent"))
    doubled = jax.jit(lambda scale: jax.tree.map(lambda leaf: 2 * leaf, scale))(scale)
    assert isinstance(doubled, Scale) and doubled.kind == "row" and float(doubled.by[0]) == 2
    assert scale.replace(kind="latent").kind == "latent"


def test_flax_can_serialise_them():
    scale = Scale(jnp.arange(3.0), kind="latent")
    found = serialization.from_bytes(Scale(jnp.zeros(3), kind="latent"), serialization.to_bytes(scale))
    np.testing.assert_array_equal(found.by, scale.by)


def classes():
    for info in pkgutil.walk_packages(jaxsae.__path__, "jaxsae."):
        if info.name != "jaxsae.__main__":
            module = importlib.import_module(info.name)
            for _, found in inspect.getmembers(module, inspect.isclass):
                if found.__module__ == info.name and dataclasses.is_dataclass(found) and hasattr(found, "replace"):
                    yield found


def structure(found):
    """That of an instance whose leaves are all there, and whose static fields, if any, are None."""
    instance = object.__new__(found)
    for field in dataclasses.fields(found):
        object.__setattr__(instance, field.name, 0.0 if field.metadata.get("pytree_node", True) else None)
    return jax.tree.structure(instance)


def test_two_classes_never_have_the_same_structure():
    # Were it so, `jit` could run for one what it compiled for the other.
    found = list(classes())
    assert {jaxsae.SAE, jaxsae.TopK, jaxsae.FISTA, jaxsae.SparseCode} <= set(found)
    for a, b in itertools.combinations(found, 2):
        assert structure(a) != structure(b), (a, b)
    each = [jaxsae.init(jax.random.key(0), d=4, m=8, activation=of(4)) for of in (jaxsae.AbsTopK, jaxsae.GroupMax)]
    assert jax.tree.structure(each[0]) != jax.tree.structure(each[1])
