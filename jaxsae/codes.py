"""Sparse codes: which latents of each row are active, and their values."""

import functools

import jax
import jax.numpy as jnp
from flax import struct
from jax.sharding import PartitionSpec
from jaxtyping import Array, Bool, Float, Int

from jaxsae import pytrees, rows, sharding

__all__ = [
    "SparseCode",
    "combine",
    "correlate",
    "from_dense",
    "sum_by_latent",
    "top_k",
]

_CACHE = 2**25  # bytes: sums larger than this are made in the order of their latents on a CPU


@pytrees.dataclass
class SparseCode:
    """The active latents of a batch of rows, in `k` slots a row.

    An unused slot holds value 0 and index `num_latents`, one past the end, so that gathers fill it
    with zero and scatters drop it. A latent on the support may have value 0 (a refit can put it there).
    An index that stands twice in a row counts twice: its values add up.

    Attributes:
      values: `[*b k]`, in the units of the activations.
      indices: `[*b k]` int32, in `[0, num_latents]`.
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
        return self.indices < self.num_latents

    @property
    def l0(self) -> Int[Array, "*b"]:
        """`‖z‖₀` of each row: how many values are not zero."""
        return jnp.sum(self.mask & (self.values != 0), axis=-1, dtype=jnp.int32)

    def dense(self) -> Float[Array, "*b m"]:
        """The code as a dense `[*b m]` array."""

        def scatter(values, indices):
            return jnp.zeros(self.num_latents, values.dtype).at[indices].add(values, mode="drop")

        return jnp.vectorize(scatter, signature="(k),(k)->(m)")(self.values, self.indices)


def from_dense(z: Float[Array, "*b m"], capacity: int) -> SparseCode:
    """Keep the `capacity` largest entries of each row, by magnitude, in descending order.

    Args:
      z: dense code `[*b m]`.
      capacity: number of slots `k` a row, at most `m`. A row with more non-zeros loses its smallest, and
        `overflow` says how many.

    Raises:
      ValueError: if `capacity` is not in `[1, m]`.

    Example:
      >>> import jax.numpy as jnp, jaxsae
      >>> code = jaxsae.codes.from_dense(jnp.array([[0.0, 2.0, 5.0, 1.0], [0.0, 0.0, 4.0, 0.0]]), capacity=2)
      >>> code.indices.tolist(), code.overflow.tolist()
      ([[2, 1], [2, 4]], [1, 0])
    """
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
    if sharding.spread() and x.shape[-1] % sharding.ways("latent") == 0:
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

    Example:
      >>> import jax.numpy as jnp, jaxsae
      >>> code = jaxsae.SparseCode(values=jnp.array([3.0, 1.0]), indices=jnp.array([2, 0]), num_latents=3)
      >>> jaxsae.codes.combine(jnp.eye(3), code)
      Array([1., 0., 3.], dtype=float32)
    """
    return _combine(*sharding.vary_alike((dictionary, code.values, code.indices)))


@jax.custom_vjp
def _combine(dictionary, values, indices):
    if sharding.spread():
        return _combine_all(dictionary, values, indices)
    dtype = jnp.result_type(values, dictionary)
    accumulator = jnp.promote_types(dtype, jnp.float32)

    def chunk(values, indices):
        return jnp.einsum("nk,nkd->nd", values, _atoms(dictionary, indices), preferred_element_type=accumulator)

    summed = _by_chunks(chunk, dictionary, values, indices)
    return summed.astype(dtype)


def _combine_forward(dictionary, values, indices):
    return _combine(dictionary, values, indices), (dictionary, values, indices)


def _combine_backward(residuals, x_bar):
    dictionary, values, indices = residuals
    values_bar = (_project_all if sharding.spread() else _project)(dictionary, x_bar, indices).astype(values.dtype)
    dictionary_bar = correlate(SparseCode(values, indices, len(dictionary)), x_bar).astype(dictionary.dtype)
    return dictionary_bar, values_bar, None


_combine.defvjp(_combine_forward, _combine_backward)


def _project(dictionary, x, indices):
    """`⟨D[indicesᵢ], x⟩` for each slot."""
    accumulator = jnp.promote_types(x.dtype, jnp.float32)

    def chunk(x, indices):
        return jnp.einsum("nd,nkd->nk", x, _atoms(dictionary, indices), preferred_element_type=accumulator)

    return _by_chunks(chunk, dictionary, x, indices)


def _atoms(dictionary, indices):
    return dictionary.at[indices].get(mode="fill", fill_value=0)


def _by_chunks(f, dictionary, x, indices):
    row_bytes = indices.shape[-1] * dictionary.shape[-1] * max(dictionary.dtype.itemsize, 4)
    return rows.map_chunks(f, x, indices, batch=indices.shape[:-1], row_bytes=row_bytes)


def correlate(code: SparseCode, x: Float[Array, "*b d"]) -> Float[Array, "m d"]:
    """Sum the rows in which each latent is active, weighted by its values: `Zᵀx`, accumulated in float32 or better.

    The cost is that of the rows of each latent, not of all latents; the order of the sums is fixed.

    Args:
      code: `[*b k]`.
      x: `[*b d]`.

    Returns:
      `[m d]`, in the dtype that the values and `x` promote to, float32 or better.

    Example:
      >>> import jax.numpy as jnp, jaxsae
      >>> code = jaxsae.SparseCode(values=jnp.array([[3.0], [1.0]]), indices=jnp.array([[1], [1]]), num_latents=2)
      >>> jaxsae.codes.correlate(code, jnp.eye(2))
      Array([[0., 0.],
             [3., 1.]], dtype=float32)
    """
    if sharding.spread():
        return _correlate_all(code, x)
    k, d = code.indices.shape[-1], x.shape[-1]
    dtype = jnp.promote_types(jnp.result_type(code.values, x), jnp.float32)
    values, indices, x = code.values.reshape(-1, k).astype(dtype), code.indices.reshape(-1, k), x.reshape(-1, d)
    # A zero that XLA cannot know: it would make constant ones early, share them with other sums, and copy them.
    zero = 0 * jnp.sum(values[:1, :1])
    total = jnp.full((code.num_latents, d), jnp.where(zero == 0, zero, 0))
    if not sharding.on_cpu():

        def scatter(total, values, indices, x):
            return total.at[indices].add(values[:, :, None] * x[:, None, :].astype(dtype), mode="drop"), None

        row_bytes = 2 * k * d * dtype.itemsize
        return rows.scan_chunks(scatter, total, values, indices, x, batch=indices.shape[:1], row_bytes=row_bytes)[0]

    order = by_latent(indices, code.num_latents) if total.nbytes > _CACHE else jnp.arange(indices.size)

    def add(i, total):
        row, slot = order[i] // k, order[i] % k
        at = jnp.minimum(indices[row, slot], code.num_latents - 1)
        value = jnp.where(indices[row, slot] < code.num_latents, values[row, slot], 0)
        atom = jax.lax.dynamic_slice_in_dim(total, at, 1) + value * x[row]
        return jax.lax.dynamic_update_slice_in_dim(total, atom, at, 0)

    return jax.lax.fori_loop(0, indices.size, add, total)


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
    m = code.num_latents
    if not sharding.spread():
        return jnp.zeros(m, code.values.dtype).at[code.indices].add(code.values, mode="drop")
    row = sharding.rows_spec(code.indices)

    def here(values, indices):
        m_here = m // sharding.size("latent")
        total = jnp.zeros(m_here, values.dtype).at[sharding.mine(indices, m_here)].add(values, mode="drop")
        return sharding.sum_rows(total, row)

    return sharding.split(here, (row, row), sharding.LATENTS)(code.values, code.indices)


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


def _combine_all(dictionary, values, indices):
    row = sharding.rows_spec(indices)

    def here(dictionary, values, indices):
        order, at, most = _own_slots(indices, len(dictionary))
        dtype = jnp.promote_types(jnp.result_type(values, dictionary), jnp.float32)

        def add(total, first, values, at):
            return total + _combine(dictionary, values, at)

        total = jnp.zeros((*indices.shape[:-1], dictionary.shape[-1]), dtype)
        total = _for_slots(add, total, most, _in_order(values, order), at)
        return jax.lax.psum(total, "latent").astype(jnp.result_type(values, dictionary))

    return sharding.split(here, (sharding.LATENTS, row, row), row)(dictionary, values, indices)


def _project_all(dictionary, x, indices):
    row = sharding.rows_spec(indices)

    def here(dictionary, x, indices):
        order, at, most = _own_slots(indices, len(dictionary))

        def put(found, first, at):
            part = _project(dictionary, x, at).astype(found.dtype)
            return jax.lax.dynamic_update_slice_in_dim(found, part, first, axis=-1)

        found = jnp.zeros(at.shape, jnp.promote_types(x.dtype, jnp.float32))
        found = _for_slots(put, found, most, at)
        back = jnp.argsort(order, axis=-1)[..., : indices.shape[-1]]
        return jax.lax.psum(jnp.take_along_axis(found, back, axis=-1), "latent")

    return sharding.split(here, (sharding.LATENTS, row, row), row)(dictionary, x, indices)


def _correlate_all(code: SparseCode, x):
    row, m = sharding.rows_spec(code.indices), code.num_latents

    def here(values, indices, x):
        m_here = m // sharding.size("latent")
        order, at, most = _own_slots(indices, m_here)

        def add(total, first, values, at):
            return total + correlate(SparseCode(values, at, m_here), x)

        dtype = jnp.promote_types(jnp.result_type(values, x), jnp.float32)
        total = _for_slots(add, jnp.zeros((m_here, x.shape[-1]), dtype), most, _in_order(values, order), at)
        return sharding.sum_rows(total, row)

    return sharding.split(here, (row, row, row), sharding.LATENTS)(code.values, code.indices, x)


def by_latent(indices: Int[Array, "b k"], m: int) -> Int[Array, " bk"]:
    """Positions in the order of the latents they hold, so that what is written next is near what was written last."""
    size = indices.size
    if size * (m + 1) >= 2**32:
        return jnp.argsort(indices.ravel())
    # One integer for latent and position sorts five times as fast as a pair.
    keys = jnp.sort(indices.ravel().astype(jnp.uint32) * size + jnp.arange(size, dtype=jnp.uint32))
    return (keys % size).astype(jnp.int32)
