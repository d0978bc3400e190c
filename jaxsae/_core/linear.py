"""Linear functions that bring their own transpose, under every transformation.

A gradient that is summed over chunks of rows must not be found by transposing a loop, which would add up whole
dictionaries. `jax.custom_vjp` takes such a gradient, but forbids forward mode; this primitive has both, to any order.
"""

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
    y = jax.eval_shape(lambda residuals, x: f(static, residuals, x), residuals, x)
    operator = _Operator(f, transpose, static, residual_tree, x_tree, jax.tree.structure(y))
    return jax.tree.unflatten(operator.y, operator.bind(residual_leaves, x_leaves))


class _Operator(NamedTuple):
    f: Callable
    transpose: Callable
    static: Hashable
    residuals: Any  # tree structures
    x: Any
    y: Any

    def apply(self, residuals: list, x: list) -> list:
        """The leaves of `y`, from those of the arguments."""
        y = self.f(self.static, jax.tree.unflatten(self.residuals, residuals), jax.tree.unflatten(self.x, x))
        return jax.tree.leaves(y)

    def bind(self, residuals: list, x: list, mesh: Any = None) -> list:
        """`apply`, as a primitive."""
        mesh = jax.sharding.get_abstract_mesh() if mesh is None else mesh
        return _linear.bind(*sharding.vary_alike([*residuals, *x]), operator=self, mesh=mesh)

    def transposed(self) -> "_Operator":
        """The transpose."""
        return self._replace(f=self.transpose, transpose=self.f, x=self.y, y=self.x)

    def split(self, leaves) -> tuple[list, list]:
        """The residuals and `x`."""
        size = self.residuals.num_leaves
        return list(leaves[:size]), list(leaves[size:])


_linear = Primitive("jaxsae_linear")
_linear.multiple_results = True


def _evaluate(*leaves, operator: _Operator, mesh):
    with jax.sharding.use_abstract_mesh(mesh):  # the mesh that it was traced under
        return operator.apply(*operator.split(leaves))


def _shapes(*leaves, operator: _Operator, mesh):
    structs = [jax.ShapeDtypeStruct(x.shape, x.dtype) for x in leaves]
    with jax.sharding.use_abstract_mesh(mesh):
        outputs = jax.eval_shape(operator.apply, *operator.split(structs))
    like, whole = leaves[0], leaves[0].sharding.update(spec=PartitionSpec())
    return [like.update(shape=y.shape, dtype=y.dtype, weak_type=False, sharding=whole) for y in outputs]


def _jvp(primals, tangents, *, operator: _Operator, mesh):
    (residuals, x), (residuals_dot, x_dot) = map(operator.split, (primals, tangents))
    y, parts = operator.bind(residuals, x, mesh), []
    if any(type(dot) is not ad.Zero for dot in x_dot):
        parts.append(operator.bind(residuals, [ad.instantiate_zeros(dot) for dot in x_dot], mesh))
    moving = [number for number, dot in enumerate(residuals_dot) if type(dot) is not ad.Zero]
    if moving:

        def at(*moved):
            places = dict(zip(moving, moved, strict=True))
            return operator.apply([places.get(number, leaf) for number, leaf in enumerate(residuals)], x)

        dots = [residuals_dot[number] for number in moving]
        parts.append(jax.jvp(at, [residuals[number] for number in moving], dots)[1])
    return y, parts[0] if len(parts) == 1 else [a + b for a, b in zip(*parts, strict=True)]


def _transpose(y_bar, *leaves, operator: _Operator, mesh):
    residuals, x = operator.split(leaves)
    x_bar = operator.transposed().bind(residuals, [ad.instantiate_zeros(bar) for bar in y_bar], mesh)
    # What is known of `x` is zeros.
    return [None] * len(residuals) + [b if ad.is_undefined_primal(a) else None for a, b in zip(x, x_bar, strict=True)]


def _batch(leaves, axes, *, operator: _Operator, mesh):
    """Another operator, mapped over the residuals that are mapped and over all of `x`."""
    (size,) = {leaf.shape[axis] for leaf, axis in zip(leaves, axes, strict=True) if axis is not None}
    leaves = [leaf if axis is None else jnp.moveaxis(leaf, axis, 0) for leaf, axis in zip(leaves, axes, strict=True)]
    (residuals, x), (residual_axes, x_axes) = map(operator.split, (leaves, axes))
    x = [jnp.broadcast_to(a, (size, *a.shape)) if axis is None else a for a, axis in zip(x, x_axes, strict=True)]
    places = tuple(None if axis is None else 0 for axis in residual_axes)
    trees = (jax.tree.structure(["leaf"] * tree.num_leaves) for tree in operator[3:])
    y = _Operator(_mapped, _mapped_transpose, (operator, places), *trees).bind(residuals, x, mesh)
    return y, [0] * len(y)


def _mapped(static, residuals, x):
    operator, places = static
    return jax.vmap(operator.apply, in_axes=(list(places), 0))(residuals, x)


def _mapped_transpose(static, residuals, y_bar):
    operator, places = static
    return _mapped((operator.transposed(), places), residuals, y_bar)


_linear.def_impl(jax.jit(_evaluate, static_argnames=("operator", "mesh")))
_linear.def_abstract_eval(_shapes)
mlir.register_lowering(_linear, mlir.lower_fun(_evaluate, multiple_results=True))
ad.primitive_jvps[_linear] = _jvp
ad.primitive_transposes[_linear] = _transpose
batching.primitive_batchers[_linear] = _batch
