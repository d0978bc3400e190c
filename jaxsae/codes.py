"""Sparse codes: which latents of each row are active, and their values."""

import functools

import jax
import jax.numpy as jnp
from flax import struct
from jax.extend.core import Primitive
from jax.interpreters import ad, batching, mlir
from jax.sharding import PartitionSpec
from jaxtyping import Array, Bool, Float, Int

from jaxsae import sharding
from jaxsae._core import chunking, pytrees

__all__ = [
    "SparseCode",
    "combine",
    "correlate",
    "from_dense",
    "sum_by_latent",
    "top_k",
    "used",
]

_CACHE = 2**25  # bytes: sums larger than this are made in the order of their latents on a CPU


@pytrees.dataclass
class SparseCode:
    """The active latents of a batch of rows, in `k` slots a row.

    An index outside `[0, num_latents)` is an unused slot, whatever its value: −1 is, and `num_latents`, which the
    library writes itself, with value 0. A latent on the support may have value 0 (a refit can put it there).
    An index that stands twice in a row counts twice: its values add up.

    Attributes:
      values: `[*b k]`, in the units of the activations.
      indices: `[*b k]`, int32.
      num_latents: number of latents `m`; static.
      overflow: `[*b]` int32, how many active latents of the row did not fit into `k` slots.

    Example:
      >>> import jax.numpy as jnp, jaxsae
      >>> code = jaxsae.SparseCode(values=jnp.array([3.0, 1.0, 0.0]), indices=jnp.array([2, 0, 4]), num_latents=4)
      >>> code.dense()
      Array([1., 0., 3., 0.], dtype=float32)
      >>> code.mask
      Array([ True,  True, False], dtype=bool)
    """

    values: Float[Array, "*b k"]
    indices: Int[Array, "*b k"]
    num_latents: int = struct.field(pytree_node=False)
    overflow: Int[Array, "*b"] = None  # pyright: ignore[reportAssignmentType]

    def __post_init__(self):
        # JAX rebuilds pytrees around things that are not arrays (axes, specs, None): leave those alone.
        if self.overflow is None and hasattr(self.indices, "shape"):
            object.__setattr__(self, "overflow", jnp.zeros(self.indices.shape[:-1], jnp.int32))

    @property
    def mask(self) -> Bool[Array, "*b k"]:
        """Which slots are on the support."""
        return used(self.indices, self.num_latents)

    @property
    def l0(self) -> Int[Array, "*b"]:
        """`‖z‖₀` of each row: how many values are not zero."""
        return jnp.sum(self.mask & (self.values != 0), axis=-1, dtype=jnp.int32)

    def dense(self) -> Float[Array, "*b m"]:
        """The code as a dense `[*b m]` array."""

        def scatter(values, indices):
            return scatter_add(jnp.zeros(self.num_latents, values.dtype), indices, values)

        return jnp.vectorize(scatter, signature="(k),(k)->(m)")(self.values, self.indices)


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
    indices = indices.astype(jnp.promote_types(indices.dtype, jnp.int32))  # int8 has no number for 300 latents
    return (indices >= 0) & (indices < num_latents)


def take(x: Array, indices: Int[Array, "*b k"]) -> Array:
    """Entries `[*b k …]` of `x [m …]`, and 0 for unused slots; a negative index does not count from the end."""
    return x.at[indices].get(mode="fill", fill_value=0, wrap_negative_indices=False)


def scatter_add(total: Array, indices: Int[Array, "*b k"], x: Array) -> Array:
    """`total [m …]` with `x [*b k …]` added at its indices, but for unused slots."""
    return total.at[indices].add(x, mode="drop", wrap_negative_indices=False)


def from_dense(z: Float[Array, "*b m"], capacity: int) -> SparseCode:
    """Keep the `capacity` largest entries of each row, by magnitude, in descending order.

    Args:
      z: dense code `[*b m]`.
      capacity: number of slots `k` a row, at most `m`. A row with more non-zeros loses its smallest, and
        `overflow` says how many.

    Raises:
      TypeError: if `z` is not floating point.
      ValueError: if `capacity` is not in `[1, m]`.

    Example:
      >>> import jax.numpy as jnp, jaxsae
      >>> code = jaxsae.codes.from_dense(jnp.array([[0.0, 2.0, 5.0, 1.0], [0.0, 0.0, 4.0, 0.0]]), capacity=2)
      >>> code.indices.tolist(), code.overflow.tolist()
      ([[2, 1], [2, 4]], [1, 0])
    """
    z = jnp.asarray(z)
    if not jnp.issubdtype(z.dtype, jnp.floating):
        raise TypeError(f"`from_dense` got z of dtype {z.dtype}, expected floating point; convert it first.")
    m = z.shape[-1]
    if not 1 <= capacity <= m:
        raise ValueError(f"got capacity {capacity} for {m} latents; pass a capacity from 1 to {m}.")
    # All the values are used: taking fewer would turn XLA's CPU top-k into a full sort.
    magnitude, indices = top_k(jax.lax.stop_gradient(jnp.abs(z)), capacity)
    kept = magnitude != 0
    values = jnp.where(kept, jnp.take_along_axis(z, indices, axis=-1), 0)
    active = jnp.sum(jnp.abs(z) > 0, axis=-1, dtype=jnp.int32)  # NaN is in no need of a slot
    overflow = active - jnp.sum(magnitude > 0, axis=-1, dtype=jnp.int32)
    return SparseCode(values, jnp.where(kept, indices, m), m, overflow)


def top_k(x: Float[Array, "*b m"], k: int) -> tuple[Float[Array, "*b k"], Int[Array, "*b k"]]:
    """The `k` largest of each row and where they are, as `jax.lax.top_k` has them, sooner where `k` is far below `m`.

    The `k` largest lie in the `k` groups with the largest maxima, so only these are sorted.

    Args:
      x: `[*b m]`; NaN counts as largest.
      k: how many, at most `m`.

    Returns:
      Values in descending order and indices, equal values in ascending order of index.

    Example:
      >>> import jax.numpy as jnp, jaxsae
      >>> values, indices = jaxsae.codes.top_k(jnp.array([1.0, 3.0, 2.0]), 2)
      >>> values.tolist(), indices.tolist()
      ([3.0, 2.0], [1, 2])
    """
    if sharding.spread(x.shape[-1]):
        return _top_k_of_all(x, k)
    m, size = x.shape[-1], 1
    while m % (2 * size) == 0 and k * (2 * size) ** 2 <= m:  # balances the number of groups and of their members
        size *= 2
    if size < 8:  # measured: fewer gain nothing
        values, indices = jax.lax.top_k(x, k)
        return values, indices
    groups = x.reshape(*x.shape[:-1], m // size, size)
    # `jnp.max` on XLA's CPU backend passes over NaN.
    lowest = jnp.array(-jnp.inf, x.dtype)
    greatest = jax.lax.reduce(jax.lax.stop_gradient(groups), lowest, _greater, (groups.ndim - 1,))
    # The barrier keeps the maxima in use, without which XLA's CPU backend sorts all of them instead. (A barrier for the
    # pair alone becomes one for the result of the top-k, at which XLA ends the process: seen in jaxlib 0.10.2.)
    _, chosen, _ = jax.lax.optimization_barrier((*jax.lax.top_k(greatest, k), jnp.zeros(())))
    chosen = jnp.sort(chosen, axis=-1)
    members = jnp.take_along_axis(groups, chosen[..., None], axis=-2).reshape(*x.shape[:-1], k * size)
    values, at = jax.lax.top_k(members, k)
    return values, size * jnp.take_along_axis(chosen, at // size, axis=-1) + at % size


def _top_k_of_all(x, k: int):
    """`top_k` where each device has some of the latents: of its own, then of all candidates."""
    row, ways = sharding.rows_spec(x), sharding.ways("latent")

    def here(x):
        values, indices = top_k(x, min(k, x.shape[-1]))
        found = values, indices + x.shape[-1] * jax.lax.axis_index("latent")
        shared = x.ndim > 1 and len(x) % ways == 0  # then each device judges some of the rows
        if shared:
            trade = functools.partial(jax.lax.all_to_all, split_axis=0, concat_axis=x.ndim - 1)
        else:
            trade = functools.partial(jax.lax.all_gather, axis=x.ndim - 1)
        values, indices = (trade(each, "latent", tiled=True) for each in found)
        values, at = jax.lax.top_k(values, k)
        found = values, jnp.take_along_axis(indices, at, axis=-1)
        return tuple(jax.lax.all_gather(each, "latent", axis=0, tiled=True) for each in found) if shared else found

    places = [*row, *[None] * (x.ndim - 1 - len(row)), "latent"]
    return sharding.split(here, PartitionSpec(*places), row)(x)


def _greater(a, b):
    return jnp.where((a > b) | jnp.isnan(a), a, b)


def combine(dictionary: Float[Array, "m d"], code: SparseCode) -> Float[Array, "*b d"]:
    """Sum the atoms of each row: `Σᵢ valuesᵢ · dictionary[indicesᵢ]`, accumulated in float32 or better.

    Its derivative touches no other rows of the dictionary either: `D̄ = Zᵀx̄` (`correlate`), `z̄ᵢ = ⟨D[indicesᵢ], x̄⟩`.

    Args:
      dictionary: `[m d]`, one atom a row.
      code: `[*b k]`.

    Returns:
      `[*b d]`, in the dtype that the values and the dictionary promote to.

    Raises:
      TypeError, ValueError: at trace time, if the dictionary and the code do not fit together.

    Example:
      >>> import jax.numpy as jnp, jaxsae
      >>> code = jaxsae.SparseCode(values=jnp.array([3.0, 1.0]), indices=jnp.array([2, 0]), num_latents=3)
      >>> jaxsae.codes.combine(jnp.eye(3), code)
      Array([1., 0., 3.], dtype=float32)
    """
    m = code.num_latents
    dictionary, values, indices = _checked("combine", dictionary, code.values, code.indices)
    if dictionary.shape[:-1] != (m,):
        raise ValueError(
            f"`combine` got a dictionary of shape {dictionary.shape} for a code of {m} latents; pass one of shape "
            f"({m}, d), one atom a row."
        )
    return form("rows", dictionary, values, indices, m=m)


def _checked(name: str, *arrays):
    """The arguments as arrays, the last of them indices."""
    *floats, indices = (jnp.asarray(x) for x in arrays)
    for x in floats:
        if not jnp.issubdtype(x.dtype, jnp.floating):
            raise TypeError(f"`{name}` got numbers of dtype {x.dtype}, expected floating point; convert them first.")
    if not jnp.issubdtype(indices.dtype, jnp.integer):
        raise TypeError(f"`{name}` got indices of dtype {indices.dtype}, expected integers; convert them to int32.")
    return *floats, indices


def correlate(code: SparseCode, x: Float[Array, "*b d"]) -> Float[Array, "m d"]:
    """Sum the rows in which each latent is active, weighted by its values: `Zᵀx`, accumulated in float32 or better.

    The cost is that of the rows of each latent, not of all latents; the order of the sums is fixed.

    Args:
      code: `[*b k]`.
      x: `[*b d]`.

    Returns:
      `[m d]`, in the dtype that the values and `x` promote to, float32 or better.

    Raises:
      TypeError, ValueError: at trace time, if the rows and the code do not fit together.

    Example:
      >>> import jax.numpy as jnp, jaxsae
      >>> code = jaxsae.SparseCode(values=jnp.array([[3.0], [1.0]]), indices=jnp.array([[1], [1]]), num_latents=2)
      >>> jaxsae.codes.correlate(code, jnp.eye(2))
      Array([[0., 0.],
             [3., 1.]], dtype=float32)
    """
    values, x, indices = _checked("correlate", code.values, x, code.indices)
    if values.shape != indices.shape or x.shape[:-1] != values.shape[:-1]:
        raise ValueError(
            f"`correlate` got rows {x.shape} for a code of values {values.shape} and indices {indices.shape}; pass "
            "as many rows as the code has."
        )
    return form("atoms", values, x, indices, m=code.num_latents)


def sum_by_latent(code: SparseCode) -> Float[Array, " m"]:
    """The sum `[m]` of each latent's values over all rows.

    Args:
      code: `[*b k]`.

    Example:
      >>> import jax.numpy as jnp, jaxsae
      >>> code = jaxsae.SparseCode(values=jnp.array([[3.0], [1.0]]), indices=jnp.array([[1], [1]]), num_latents=2)
      >>> sum_by_latent(code)
      Array([0., 4.], dtype=float32)
    """
    return sharding.automatic(functools.partial(_sum_by_latent, m=code.num_latents))(code.values, code.indices)


def _sum_by_latent(values, indices, *, m: int):
    if not sharding.spread(m):
        return scatter_add(jnp.zeros(m, values.dtype), indices, values)
    row = sharding.rows_spec(indices)

    def here(values, indices):
        m_here = m // sharding.size("latent")
        total = scatter_add(jnp.zeros(m_here, values.dtype), sharding.mine(indices, m_here), values)
        return sharding.sum_rows(total, row)

    return sharding.split(here, (row, row), sharding.LATENTS)(values, indices)


# --- One trilinear form of atoms, values and rows, and its three partial derivatives
#
#     T(D, v, x) = Σₙ Σᵢ vₙᵢ ⟨D[indicesₙᵢ], xₙ⟩
#
# `combine` is ∂T/∂x, `correlate` is ∂T/∂D, and the third, ∂T/∂v, is what each atom has in common with the row. Each is
# linear in two arguments, and its transpose in either of them is another of the three: one primitive with these rules
# is differentiated forwards, backwards and as often as one likes, and touches no other rows of the dictionary.

_form = Primitive("jaxsae_sparse_form")


def form(wrt: str, left: Array, right: Array, indices: Array, *, m: int) -> Array:
    """The derivative of `T` with respect to "atoms" `[m d]`, "values" `[*b k]` or "rows" `[*b d]`.

    `left` and `right` are the other two, in this order.
    """

    def bind(*arguments):
        arguments = sharding.vary_alike(arguments)
        return _form.bind(*arguments, wrt=wrt, m=m, members=0, mesh=jax.sharding.get_abstract_mesh())

    return sharding.automatic(bind, None if wrt == "atoms" else indices)(left, right, indices)


_OTHERS = {"atoms": ("values", "rows"), "values": ("atoms", "rows"), "rows": ("atoms", "values")}


def _evaluate(left, right, indices, *, wrt: str, m: int, members: int, mesh):
    with jax.sharding.use_abstract_mesh(mesh):  # that it was traced under, when it is lowered
        f = {"rows": _combine, "values": _project, "atoms": _correlate}[wrt]
        if sharding.spread(m):
            f = {"rows": _combine_all, "values": _project_all, "atoms": _correlate_all}[wrt]
        f = functools.partial(f, m=m)
        for _ in range(members):
            f = jax.vmap(f)
        return f(left, right, indices)


def _shape(left, right, indices, *, wrt: str, m: int, members: int, mesh):
    dtype = jnp.result_type(left.dtype, right.dtype)
    if wrt == "rows":
        shape = *indices.shape[:-1], left.shape[-1]
    else:  # gradients, in float32 or better
        dtype = jnp.promote_types(dtype, jnp.float32)
        shape = indices.shape if wrt == "values" else (*indices.shape[:members], m, right.shape[-1])
    whole = left.sharding.update(spec=PartitionSpec())
    return left.update(shape=shape, dtype=dtype, weak_type=False, sharding=whole)


def _transpose(bar, left, right, indices, *, wrt: str, mesh, **params):
    if type(bar) is ad.Zero:  # of what nothing depends on, both may be unknown
        return [ad.Zero(x.aval) if ad.is_undefined_primal(x) else None for x in (left, right, indices)]
    known = dict(zip(_OTHERS[wrt], (left, right), strict=True)) | {wrt: bar}
    (wanted,) = (name for name, x in known.items() if ad.is_undefined_primal(x))
    arguments = sharding.vary_alike((*(known[name] for name in _OTHERS[wanted]), indices))
    found = _form.bind(*arguments, wrt=wanted, mesh=mesh, **params).astype(known[wanted].aval.dtype)
    return [found if ad.is_undefined_primal(x) else None for x in (left, right)] + [None]


def _batch(arguments, axes, *, wrt: str, members: int, **params):
    """More rows if the atoms are none of what is mapped; else one more level of members, each with its own."""
    (size,) = {x.shape[axis] for x, axis in zip(arguments, axes, strict=True) if axis is not None}
    shared = wrt != "atoms" and axes[0] is None
    front = members if shared else 0

    def mapped(x, axis):
        if axis is None:
            return jnp.broadcast_to(jnp.expand_dims(x, front), (*x.shape[:front], size, *x.shape[front:]))
        return jnp.moveaxis(x, axis, front)

    arguments = [
        x if shared and number == 0 else mapped(x, axis)
        for number, (x, axis) in enumerate(zip(arguments, axes, strict=True))
    ]
    return _form.bind(*arguments, wrt=wrt, members=members + (not shared), **params), front


def _linear_in(place: int):
    def tangent(dot, *arguments, **params):
        return _form.bind(*arguments[:place], dot, *arguments[place + 1 :], **params)

    return tangent


_form.def_impl(jax.jit(_evaluate, static_argnames=("wrt", "m", "members", "mesh")))
_form.def_abstract_eval(_shape)
mlir.register_lowering(_form, mlir.lower_fun(_evaluate, multiple_results=False))
ad.defjvp(_form, _linear_in(0), _linear_in(1), None)
ad.primitive_transposes[_form] = _transpose
batching.primitive_batchers[_form] = _batch


def _combine(dictionary, values, indices, *, m: int):
    dtype = jnp.result_type(values, dictionary)
    accumulator = jnp.promote_types(dtype, jnp.float32)

    def chunk(values, indices):
        values = jnp.where(used(indices, m), values, 0)  # else NaN in an unused slot counted
        return jnp.einsum("nk,nkd->nd", values, take(dictionary, indices), preferred_element_type=accumulator)

    return _by_chunks(chunk, dictionary, values, indices).astype(dtype)


def _project(dictionary, x, indices, *, m: int):
    """`⟨D[indicesᵢ], x⟩` for each slot."""
    accumulator = jnp.promote_types(jnp.result_type(x, dictionary), jnp.float32)

    def chunk(x, indices):
        return jnp.einsum("nd,nkd->nk", x, take(dictionary, indices), preferred_element_type=accumulator)

    return _by_chunks(chunk, dictionary, x, indices)


def _by_chunks(f, dictionary, x, indices):
    row_bytes = indices.shape[-1] * dictionary.shape[-1] * max(dictionary.dtype.itemsize, 4)
    return chunking.map_chunks(f, x, indices, batch=indices.shape[:-1], row_bytes=row_bytes)


def _correlate(values, x, indices, *, m: int):
    k, d = indices.shape[-1], x.shape[-1]
    dtype = jnp.promote_types(jnp.result_type(values, x), jnp.float32)
    if not indices.size:
        return jnp.zeros((m, d), dtype)
    values, indices, x = values.reshape(-1, k).astype(dtype), indices.reshape(-1, k), x.reshape(-1, d)
    # A zero that XLA cannot know: it would make constant ones early, share them with other sums, and copy them.
    zero = 0 * jnp.sum(values[:1, :1])
    total = jnp.full((m, d), jnp.where(zero == 0, zero, 0))
    if not sharding.on_cpu():

        def scatter(total, values, indices, x):
            return scatter_add(total, indices, values[:, :, None] * x[:, None, :].astype(dtype)), None

        row_bytes = 2 * k * d * dtype.itemsize
        return chunking.scan_chunks(scatter, total, values, indices, x, batch=indices.shape[:1], row_bytes=row_bytes)[0]

    order = by_latent(indices, m) if total.nbytes > _CACHE else jnp.arange(indices.size)

    def add(i, total):
        row, slot = order[i] // k, order[i] % k
        at = jnp.clip(indices[row, slot], 0, m - 1)
        more = jnp.where(used(indices[row, slot], m), values[row, slot] * x[row], 0)  # NaN times 0 would be NaN
        atom = jax.lax.dynamic_slice_in_dim(total, at, 1) + more
        return jax.lax.dynamic_update_slice_in_dim(total, atom, at, 0)

    return jax.lax.fori_loop(0, indices.size, add, total)


# --- where each device has some of the latents: each works on the slots that are its own

_SLOTS = 8  # looked at together


def _own_slots(indices, m: int):
    """Each row's slots, those of this device's `m` latents first: their order, their indices, and most of a row."""
    at = sharding.mine(indices, m)
    at = jnp.pad(at, [(0, 0)] * (at.ndim - 1) + [(0, -at.shape[-1] % _SLOTS)], constant_values=m)
    order = jnp.argsort(at == m, axis=-1, stable=True)
    return order, jnp.take_along_axis(at, order, axis=-1), jnp.max(jnp.sum(at < m, axis=-1), initial=0)


def _for_slots(f, start, most, *arrays):
    """Fold `f(carry, first, *parts) -> carry` over some slots at a time, as many as are used."""

    def step(number, carry):
        parts = (jax.lax.dynamic_slice_in_dim(x, number * _SLOTS, _SLOTS, axis=-1) for x in arrays)
        return f(carry, number * _SLOTS, *parts)

    return jax.lax.fori_loop(0, (most + _SLOTS - 1) // _SLOTS, step, start)


def _in_order(x, order):
    spare = [(0, 0)] * (x.ndim - 1) + [(0, order.shape[-1] - x.shape[-1])]
    return jnp.take_along_axis(jnp.pad(x, spare), order, axis=-1)


def _combine_all(dictionary, values, indices, *, m: int):
    row = sharding.rows_spec(indices)

    def here(dictionary, values, indices):
        m_here = len(dictionary)
        order, at, most = _own_slots(indices, m_here)
        dtype = jnp.promote_types(jnp.result_type(values, dictionary), jnp.float32)

        def add(total, first, values, at):
            return total + _combine(dictionary, values, at, m=m_here)

        total = jnp.zeros((*indices.shape[:-1], dictionary.shape[-1]), dtype)
        total = _for_slots(add, total, most, _in_order(values, order), at)
        return jax.lax.psum(total, "latent").astype(jnp.result_type(values, dictionary))

    return sharding.split(here, (sharding.LATENTS, row, row), row)(dictionary, values, indices)


def _project_all(dictionary, x, indices, *, m: int):
    row = sharding.rows_spec(indices)

    def here(dictionary, x, indices):
        m_here = len(dictionary)
        order, at, most = _own_slots(indices, m_here)

        def put(found, first, at):
            part = _project(dictionary, x, at, m=m_here)
            return jax.lax.dynamic_update_slice_in_dim(found, part, first, axis=-1)

        found = jnp.zeros(at.shape, jnp.promote_types(jnp.result_type(x, dictionary), jnp.float32))
        found = _for_slots(put, found, most, at)
        back = jnp.argsort(order, axis=-1)[..., : indices.shape[-1]]
        return jax.lax.psum(jnp.take_along_axis(found, back, axis=-1), "latent")

    return sharding.split(here, (sharding.LATENTS, row, row), row)(dictionary, x, indices)


def _correlate_all(values, x, indices, *, m: int):
    row = sharding.rows_spec(indices)

    def here(values, x, indices):
        m_here = m // sharding.size("latent")
        order, at, most = _own_slots(indices, m_here)

        def add(total, first, values, at):
            return total + _correlate(values, x, at, m=m_here)

        dtype = jnp.promote_types(jnp.result_type(values, x), jnp.float32)
        total = _for_slots(add, jnp.zeros((m_here, x.shape[-1]), dtype), most, _in_order(values, order), at)
        return sharding.sum_rows(total, row)

    return sharding.split(here, (row, row, row), sharding.LATENTS)(values, x, indices)


def by_latent(indices: Int[Array, "b k"], m: int) -> Int[Array, " bk"]:
    """Positions in the order of the latents they hold, so that what is written next is near what was written last."""
    size, indices = indices.size, jnp.where(used(indices, m), indices, m)
    if size * (m + 1) >= 2**32:
        return jnp.argsort(indices.ravel())
    # One integer for latent and position sorts five times as fast as a pair.
    keys = jnp.sort(indices.ravel().astype(jnp.uint32) * size + jnp.arange(size, dtype=jnp.uint32))
    return (keys % size).astype(jnp.int32)
