"""Sparse decoding and its derivatives as one trilinear form of atoms, values and rows, on one device and on a mesh."""

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax.extend.core import Primitive
from jax.interpreters import ad, batching, mlir
from jax.sharding import PartitionSpec
from jaxtyping import Array, Bool, Int

from jaxsae import sharding
from jaxsae._core import chunking
from jaxsae._core.linalg import result_type

_CACHE = 2**25  # bytes: on a CPU, larger sums are accumulated in the order of their latents


def take(x: Array, indices: Int[Array, "*b k"]) -> Array:
    """Entries `[*b k …]` of `x [m …]`, and 0 for unused slots; negative indices are unused too."""
    return x.at[indices].get(mode="fill", fill_value=0, wrap_negative_indices=False)


def add_at(total: Array, indices: Int[Array, "*b k"], x: Array) -> Array:
    """`total [m …]` with `x [*b k …]` added at its indices, except for unused slots."""
    return total.at[indices].add(x, mode="drop", wrap_negative_indices=False)


# --- One trilinear form of atoms, values and rows, and its three partial derivatives
#
#     T(D, v, x) = Σₙ Σᵢ vₙᵢ ⟨D[indicesₙᵢ], xₙ⟩
#
# `decode` is ∂T/∂x, `scatter_add` is ∂T/∂D, and ∂T/∂v is the inner product of each atom with the row. Each is linear in
# two arguments, and its transpose in either of them is another of the three: one primitive with these rules can be
# differentiated forwards, backwards and to any order, and reads no other rows of the dictionary.

_form = Primitive("jaxsae_sparse_form")


def form(wrt: str, left: Array, right: Array, indices: Array, *, m: int, implementation: str | None = None) -> Array:
    """The derivative of `T` with respect to "atoms" `[m d]`, "values" `[*b k]` or "rows" `[*b d]`.

    `left` and `right` are the other two, in this order; `implementation` is "xla", "pallas", or None for the best.
    """
    params = {"wrt": wrt, "m": m, "batch_dims": 0, "implementation": implementation}

    def bind(*arguments):
        return _form.bind(*sharding.vary_alike(arguments), **params, mesh=jax.sharding.get_abstract_mesh())

    return sharding.automatic(bind, None if wrt == "atoms" else indices)(left, right, indices)


_OTHERS = {"atoms": ("values", "rows"), "values": ("atoms", "rows"), "rows": ("atoms", "values")}


def _evaluate(left, right, indices, *, wrt: str, m: int, batch_dims: int, implementation: str | None, mesh):
    with jax.sharding.use_abstract_mesh(mesh):  # the mesh that it was traced under
        f = _on_each_device if sharding.is_sharded(m) else _on_one_device
        f = functools.partial(f, wrt, m=m, implementation=implementation)
        for _ in range(batch_dims):
            f = jax.vmap(f)
        return f(left, right, indices)


def _shape(left, right, indices, *, wrt: str, m: int, batch_dims: int, implementation: str | None, mesh):
    dtype = result_type(left.dtype, right.dtype)
    if wrt == "rows":
        shape = *indices.shape[:-1], left.shape[-1]
    else:  # gradients, in float32 or better
        dtype = result_type(dtype, jnp.float32)
        shape = indices.shape if wrt == "values" else (*indices.shape[:batch_dims], m, right.shape[-1])
    whole = left.sharding.update(spec=PartitionSpec())
    return left.update(shape=shape, dtype=dtype, weak_type=False, sharding=whole)


def _transpose(bar, left, right, indices, *, wrt: str, mesh, **params):
    if type(bar) is ad.Zero:  # nothing depends on the result: both may be unknown
        return [ad.Zero(x.aval) if ad.is_undefined_primal(x) else None for x in (left, right, indices)]
    known = dict(zip(_OTHERS[wrt], (left, right), strict=True)) | {wrt: bar}
    (wanted,) = (name for name, x in known.items() if ad.is_undefined_primal(x))
    arguments = sharding.vary_alike((*(known[name] for name in _OTHERS[wanted]), indices))
    found = _form.bind(*arguments, wrt=wanted, mesh=mesh, **params).astype(known[wanted].aval.dtype)
    return [found if ad.is_undefined_primal(x) else None for x in (left, right)] + [None]


def _batch(arguments, axes, *, wrt: str, batch_dims: int, **params):
    """More rows if the atoms are not mapped; else one more batch axis, each entry with its own atoms."""
    (size,) = {x.shape[axis] for x, axis in zip(arguments, axes, strict=True) if axis is not None}
    shared = wrt != "atoms" and axes[0] is None
    front = batch_dims if shared else 0

    def mapped(x, axis):
        if axis is None:
            return jnp.broadcast_to(jnp.expand_dims(x, front), (*x.shape[:front], size, *x.shape[front:]))
        return jnp.moveaxis(x, axis, front)

    arguments = [
        x if shared and number == 0 else mapped(x, axis)
        for number, (x, axis) in enumerate(zip(arguments, axes, strict=True))
    ]
    return _form.bind(*arguments, wrt=wrt, batch_dims=batch_dims + (not shared), **params), front


def _linear_in(place: int):
    def tangent(dot, *arguments, **params):
        return _form.bind(*arguments[:place], dot, *arguments[place + 1 :], **params)

    return tangent


_form.def_impl(jax.jit(_evaluate, static_argnames=("wrt", "m", "batch_dims", "implementation", "mesh")))
_form.def_abstract_eval(_shape)
mlir.register_lowering(_form, mlir.lower_fun(_evaluate, multiple_results=False))
ad.primitive_transposes[_form] = _transpose
batching.primitive_batchers[_form] = _batch
ad.defjvp(_form, _linear_in(0), _linear_in(1), None)


# For "rows" and "atoms": `f(by_xla, left, right, indices, m=, implementation=)`, which calls a kernel or `by_xla()`.
# `least_squares.kernels`, which imports `codes`, registers them here.
KERNELS: dict[str, Callable[..., Array]] = {}


def _on_one_device(wrt: str, left, right, indices, *, m: int, implementation: str | None, **added_to: Array):
    """The form; for "atoms" added to `total`, if it is given."""
    by_xla = {"rows": _decode, "values": _project, "atoms": _scatter_add}[wrt]
    by_xla = functools.partial(by_xla, left, right, indices, m=m, **added_to)
    if wrt not in KERNELS:
        return by_xla()
    return KERNELS[wrt](by_xla, left, right, indices, m=m, implementation=implementation, **added_to)


def _decode(dictionary, values, indices, *, m: int):
    dtype = result_type(values, dictionary)
    accumulator = result_type(dtype, jnp.float32)

    def chunk(values, indices):
        values = jnp.where(used(indices, m), values, 0)  # NaN in an unused slot times 0 would be NaN
        return jnp.einsum("nk,nkd->nd", values, take(dictionary, indices), preferred_element_type=accumulator)

    return _by_chunks(chunk, dictionary, values, indices).astype(dtype)


def _project(dictionary, x, indices, *, m: int):
    """`⟨D[indicesᵢ], x⟩` for each slot."""
    accumulator = result_type(x, dictionary, jnp.float32)

    def chunk(x, indices):
        return jnp.einsum("nd,nkd->nk", x, take(dictionary, indices), preferred_element_type=accumulator)

    return _by_chunks(chunk, dictionary, x, indices)


def _by_chunks(f, dictionary, x, indices):
    row_bytes = indices.shape[-1] * dictionary.shape[-1] * max(dictionary.dtype.itemsize, 4)
    return chunking.map_chunks(f, x, indices, batch=indices.shape[:-1], row_bytes=row_bytes)


def _scatter_add(values, x, indices, *, m: int, total: Array | None = None):
    k, d = indices.shape[-1], x.shape[-1]
    dtype = result_type(values, x, jnp.float32)
    if not indices.size:
        return jnp.zeros((m, d), dtype) if total is None else total
    values, indices, x = values.reshape(-1, k).astype(dtype), indices.reshape(-1, k), x.reshape(-1, d)
    if total is None:
        # A zero that XLA cannot fold into a constant, which it would share with other sums, and copy.
        zero = 0 * jnp.sum(values[:1, :1])
        total = jnp.full((m, d), jnp.where(zero == 0, zero, 0))
    if not sharding.on_cpu():

        def scatter(total, values, indices, x):
            return add_at(total, indices, values[:, :, None] * x[:, None, :].astype(dtype)), None

        row_bytes = 2 * k * d * dtype.itemsize
        return chunking.scan_chunks(scatter, total, values, indices, x, batch=indices.shape[:1], row_bytes=row_bytes)[0]

    order = by_latent(indices, m) if total.nbytes > _CACHE else jnp.arange(indices.size)

    def add(i, total):
        row, slot = order[i] // k, order[i] % k
        at = jnp.clip(indices[row, slot], 0, m - 1)
        more = jnp.where(used(indices[row, slot], m), values[row, slot] * x[row].astype(dtype), 0)  # NaN times 0 is NaN
        atom = jax.lax.dynamic_slice_in_dim(total, at, 1) + more
        return jax.lax.dynamic_update_slice_in_dim(total, atom, at, 0)

    return jax.lax.fori_loop(0, indices.size, add, total)


# --- Where the latents are split over devices, each works on the slots of its own latents

_SLOTS = 8  # processed together


def _own_slots(indices, m: int):
    """Each row's slots, with this device's `m` latents first: their order, indices, and the most in any row."""
    at = sharding.local_indices(indices, m)
    at = jnp.pad(at, [(0, 0)] * (at.ndim - 1) + [(0, -at.shape[-1] % _SLOTS)], constant_values=m)
    order = jnp.argsort(at == m, axis=-1, stable=True)
    return order, jnp.take_along_axis(at, order, axis=-1), jnp.max(jnp.sum(at < m, axis=-1), initial=0)


def _for_slots(f, start, count, *arrays):
    """Fold `f(carry, first, *parts) -> carry` over the slots in use, `_SLOTS` at a time."""

    def step(number, carry):
        parts = (jax.lax.dynamic_slice_in_dim(x, number * _SLOTS, _SLOTS, axis=-1) for x in arrays)
        return f(carry, number * _SLOTS, *parts)

    return jax.lax.fori_loop(0, (count + _SLOTS - 1) // _SLOTS, step, start)


def _in_order(x, order):
    spare = [(0, 0)] * (x.ndim - 1) + [(0, order.shape[-1] - x.shape[-1])]
    return jnp.take_along_axis(jnp.pad(x, spare), order, axis=-1)


def _on_each_device(wrt: str, left, right, indices, *, m: int, implementation: str | None):
    """`_on_one_device` on each device's own latents, then summed over devices."""
    row, axis = sharding.rows_spec(indices), sharding.axis("latent")

    def here(left, right, indices):
        m_here = m // jax.lax.axis_size(axis)
        order, at, count = _own_slots(indices, m_here)
        part = functools.partial(_on_one_device, wrt, m=m_here, implementation=implementation)
        dtype = result_type(left, right, jnp.float32)
        if wrt == "values":

            def put(found, first, at):
                return jax.lax.dynamic_update_slice_in_dim(found, part(left, right, at), first, axis=-1)

            found = _for_slots(put, jnp.zeros(at.shape, dtype), count, at)
            back = jnp.argsort(order, axis=-1)[..., : indices.shape[-1]]
            return jax.lax.psum(jnp.take_along_axis(found, back, axis=-1), axis)
        if wrt == "rows":
            total = jnp.zeros((*indices.shape[:-1], left.shape[-1]), dtype)
            values = _in_order(right, order)
            total = _for_slots(lambda total, _, z, at: total + part(left, z, at), total, count, values, at)
            return jax.lax.psum(total, axis).astype(result_type(left, right))
        total, values = jnp.zeros((m_here, right.shape[-1]), dtype), _in_order(left, order)
        total = _for_slots(lambda total, _, z, at: part(z, right, at, total=total), total, count, values, at)
        return sharding.sum_rows(total, row)

    specs = {"atoms": sharding.by_latent(), "values": row, "rows": row}
    return sharding.shard_map(here, (*(specs[name] for name in _OTHERS[wrt]), row), specs[wrt])(left, right, indices)


def by_latent(indices: Int[Array, "b k"], m: int) -> Int[Array, " bk"]:
    """Positions sorted by the latents they hold, so that consecutive writes are near each other."""
    size, indices = indices.size, jnp.where(used(indices, m), indices, m)
    if size * (m + 1) >= 2**32:
        return jnp.argsort(indices.ravel())
    # One integer that holds latent and position sorts five times as fast as a pair.
    keys = jnp.sort(indices.ravel().astype(jnp.uint32) * size + jnp.arange(size, dtype=jnp.uint32))
    return (keys % size).astype(jnp.int32)


def finite_rows(values: Array, indices: Int[Array, "*b k"], num_latents: int) -> Bool[Array, "*b"]:
    """Which rows have finite values in all slots in use."""
    return (jnp.isfinite(values) | ~used(indices, num_latents)).all(-1)


def used(indices: Int[Array, "..."], num_latents: int) -> Bool[Array, "..."]:
    """Which slots hold a latent: those with an index in `[0, num_latents)`.

    Args:
      indices: `[*b k]`.
      num_latents: number of latents `m`.

    Example:
      >>> import jax.numpy as jnp, jaxsae
      >>> jaxsae.codes.used(jnp.array([0, 2, 3, -1]), num_latents=3)
      Array([ True,  True, False, False], dtype=bool)
    """
    indices = jnp.asarray(indices)
    indices = indices.astype(result_type(indices.dtype, jnp.int32))  # int8 cannot represent 300 latents
    return (indices >= 0) & (indices < num_latents)
