"""Linear functions that bring their own transpose, under every transformation.

A gradient that is summed over chunks of rows must not be found by transposing a loop, which would add up whole
dictionaries. `jax.custom_vjp` takes such a gradient, but forbids forward mode; this primitive has both, to any order.
"""

import functools
from collections.abc import Callable, Hashable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.extend.core import Primitive
from jax.interpreters import ad, batching, mlir
from jax.sharding import PartitionSpec

from jaxsae import sharding


def linear(f: Callable, transpose: Callable, static: Hashable, residuals: Any, x: Any) -> Any:
    """`f(static, residuals, x)`, linear in `x`, with `transpose(static, residuals, y_bar) -> x_bar` as its transpose.

    Args:
      f: a function of the module, so that a second call compiles nothing; of pytrees of arrays. Where the residuals
        have derivatives, JAX differentiates it by its own rules.
      transpose: another; its result has the dtypes of `x`.
      static: argument of both.
      residuals: argument of both.
      x: pytree of floating-point arrays.
    """
    residual_leaves, residual_tree = jax.tree.flatten(residuals)
    x_leaves, x_tree = jax.tree.flatten(x)
    operator = _Operator(f, transpose, static, residual_tree, x_tree)
    leaves = operator.bind(residual_leaves, x_leaves)
    return jax.tree.unflatten(operator.outputs([*residual_leaves, *x_leaves])[0], leaves)


class _Operator(NamedTuple):
    f: Callable
    transpose: Callable
    static: Hashable
    residuals: Any  # tree structures
    x: Any

    def apply(self, residuals: list, x: list) -> Any:
        """`y`, from the leaves of the arguments."""
        return self.f(self.static, jax.tree.unflatten(self.residuals, residuals), jax.tree.unflatten(self.x, x))

    def bind(self, residuals: list, x: list, mesh: Any = None) -> list:
        """The leaves of `y`, by the primitive."""
        mesh = jax.sharding.get_abstract_mesh() if mesh is None else mesh
        return _linear.bind(*sharding.vary_alike([*residuals, *x]), operator=self, mesh=mesh)

    def outputs(self, leaves, mesh: Any = None) -> tuple[Any, list]:
        """The tree structure of `y`, and the shapes and dtypes of its leaves."""
        mesh = jax.sharding.get_abstract_mesh() if mesh is None else mesh
        return _outputs(self, mesh, tuple((x.shape, jnp.dtype(x.dtype)) for x in leaves))

    def split(self, leaves) -> tuple[list, list]:
        """The residuals and `x`."""
        size = self.residuals.num_leaves
        return list(leaves[:size]), list(leaves[size:])


@functools.lru_cache(maxsize=1024)  # an eager derivative would trace `f` at every call
def _outputs(operator: _Operator, mesh, kinds: tuple) -> tuple[Any, list]:
    structs = operator.split([jax.ShapeDtypeStruct(*kind) for kind in kinds])
    with jax.sharding.use_abstract_mesh(mesh):
        y = jax.eval_shape(operator.apply, *structs)
    return jax.tree.structure(y), [(leaf.shape, leaf.dtype) for leaf in jax.tree.leaves(y)]


_linear = Primitive("jaxsae_linear")
_linear.multiple_results = True


def _evaluate(*leaves, operator: _Operator, mesh):
    with jax.sharding.use_abstract_mesh(mesh):  # the mesh that it was traced under
        return jax.tree.leaves(operator.apply(*operator.split(leaves)))


def _shapes(*leaves, operator: _Operator, mesh):
    like, whole = leaves[0], leaves[0].sharding.update(spec=PartitionSpec())
    _, outputs = operator.outputs(leaves, mesh)
    return [like.update(shape=shape, dtype=dtype, weak_type=False, sharding=whole) for shape, dtype in outputs]


def _jvp(primals, tangents, *, operator: _Operator, mesh):
    (residuals, x), (residuals_dot, x_dot) = map(operator.split, (primals, tangents))
    y, parts = operator.bind(residuals, x, mesh), []
    if any(type(dot) is not ad.Zero for dot in x_dot):
        parts.append(operator.bind(residuals, [ad.instantiate_zeros(dot) for dot in x_dot], mesh))
    moving = tuple(number for number, dot in enumerate(residuals_dot) if type(dot) is not ad.Zero)
    if moving:
        dots = [residuals_dot[number] for number in moving]
        parts.append(_moved(residuals, x, dots, operator=operator, moving=moving, mesh=mesh))
    return y, parts[0] if len(parts) == 1 else [a + b for a, b in zip(*parts, strict=True)]


@functools.partial(jax.jit, static_argnames=("operator", "moving", "mesh"))
def _moved(residuals, x, dots, *, operator: _Operator, moving: tuple[int, ...], mesh):
    """The tangent of `y`, from those of some of the residuals."""

    def at(*moved):
        places = dict(zip(moving, moved, strict=True))
        given = [places.get(number, leaf) for number, leaf in enumerate(residuals)]
        return _evaluate(*given, *x, operator=operator, mesh=mesh)

    return jax.jvp(at, [residuals[number] for number in moving], dots)[1]


def _transpose(y_bar, *leaves, operator: _Operator, mesh):
    residuals, x = operator.split(leaves)
    y, _ = operator.outputs([*residuals, *(a.aval if ad.is_undefined_primal(a) else a for a in x)], mesh)
    transposed = operator._replace(f=operator.transpose, transpose=operator.f, x=y)
    x_bar = transposed.bind(residuals, [ad.instantiate_zeros(bar) for bar in y_bar], mesh)
    # What is known of `x` is zeros.
    return [None] * len(residuals) + [b if ad.is_undefined_primal(a) else None for a, b in zip(x, x_bar, strict=True)]


def _batch(leaves, axes, *, operator: _Operator, mesh):
    """Another operator, mapped over the residuals that are mapped and over all of `x`."""
    (size,) = {leaf.shape[axis] for leaf, axis in zip(leaves, axes, strict=True) if axis is not None}
    leaves = [leaf if axis is None else jnp.moveaxis(leaf, axis, 0) for leaf, axis in zip(leaves, axes, strict=True)]
    (residuals, x), (residual_axes, x_axes) = map(operator.split, (leaves, axes))
    x = [jnp.broadcast_to(a, (size, *a.shape)) if axis is None else a for a, axis in zip(x, x_axes, strict=True)]
    places = tuple(None if axis is None else 0 for axis in residual_axes)
    mapped = operator._replace(f=_mapped, transpose=_mapped_transpose, static=(operator, places))
    y = mapped.bind(residuals, x, mesh)
    return y, [0] * len(y)


def _mapped(static, residuals, x, transpose: bool = False):
    operator, places = static
    f = operator.transpose if transpose else operator.f

    def one(residuals, x):
        return f(operator.static, jax.tree.unflatten(operator.residuals, residuals), x)

    return jax.vmap(one, in_axes=(list(places), 0))(jax.tree.leaves(residuals), x)


def _mapped_transpose(static, residuals, y_bar):
    return _mapped(static, residuals, y_bar, transpose=True)


_linear.def_impl(jax.jit(_evaluate, static_argnames=("operator", "mesh")))
_linear.def_abstract_eval(_shapes)
mlir.register_lowering(_linear, mlir.lower_fun(_evaluate, multiple_results=True))
ad.primitive_jvps[_linear] = _jvp
ad.primitive_transposes[_linear] = _transpose
batching.primitive_batchers[_linear] = _batch
