"""Sparse codes: which latents of each row are active, and their values."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer
from jax.sharding import PartitionSpec
from jaxtyping import Array, Bool, Float, Int

from jaxsae import sharding
from jaxsae._core import pytrees
from jaxsae._core.linalg import as_array
from jaxsae._core.sparse import add_at, form, used

__all__ = ["SparseCode", "decode", "from_dense", "scatter_add", "sum_by_latent", "top_k", "used"]


@pytrees.dataclass
class SparseCode:
    """The active latents of a batch of rows, in `k` slots per row.

    An index outside `[0, num_latents)` marks an unused slot, whatever its value: −1, for example, or `num_latents`,
    which the library writes, with value 0. A latent on the support may have value 0 (after a refit, for example).
    If an index occurs twice in a row, its values add up.

    Attributes:
      values: `[*b k]`, in the units of the activations.
      indices: `[*b k]`, int32.
      num_latents: number of latents `m`; static.
      num_dropped: `[*b]` int32, number of active latents that did not fit into the `k` slots of the row.

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
    num_latents: int = pytrees.static()
    num_dropped: Int[Array, "*b"] = None  # pyright: ignore[reportAssignmentType]

    def __post_init__(self):
        # JAX also builds pytrees whose leaves are not arrays (axes, specs, None).
        if self.num_dropped is None and hasattr(self.indices, "shape"):
            zeros = (jnp if isinstance(self.indices, Tracer) else np).zeros(self.indices.shape[:-1], np.int32)
            object.__setattr__(self, "num_dropped", jnp.asarray(zeros, np.int32))  # NumPy compiles nothing

    @property
    def mask(self) -> Bool[Array, "*b k"]:
        """Which slots are on the support."""
        return used(self.indices, self.num_latents)

    @property
    def l0(self) -> Int[Array, "*b"]:
        """`‖z‖₀` of each row, the number of non-zero values."""
        return jnp.sum(self.mask & (self.values != 0), axis=-1, dtype=jnp.int32)

    def dense(self) -> Float[Array, "*b m"]:
        """The code as a dense `[*b m]` array."""

        def scatter(values, indices):
            return add_at(jnp.zeros(self.num_latents, values.dtype), indices, values)

        return jnp.vectorize(scatter, signature="(k),(k)->(m)")(self.values, self.indices)


def from_dense(z: Float[Array, "*b m"], capacity: int) -> SparseCode:
    """Keep the `capacity` largest entries of each row, by magnitude, in descending order.

    Args:
      z: dense code `[*b m]`.
      capacity: number of slots `k` per row, at most `m`. A row with more non-zeros loses its smallest, and
        `num_dropped` counts them.

    Raises:
      TypeError: if `z` is not floating point.
      ValueError: if `capacity` is not in `[1, m]`.

    Example:
      >>> import jax.numpy as jnp, jaxsae
      >>> code = jaxsae.codes.from_dense(jnp.array([[0.0, 2.0, 5.0, 1.0], [0.0, 0.0, 4.0, 0.0]]), capacity=2)
      >>> code.indices.tolist(), code.num_dropped.tolist()
      ([[2, 1], [2, 4]], [1, 0])
    """
    z = jnp.asarray(z)
    if not jnp.issubdtype(z.dtype, jnp.floating):
        raise TypeError(f"`from_dense` got z of dtype {z.dtype}, expected floating point; convert it first.")
    m = z.shape[-1]
    if not 1 <= capacity <= m:
        raise ValueError(f"got capacity {capacity} for {m} latents; pass a capacity from 1 to {m}.")
    # All `k` magnitudes are used: otherwise XLA's CPU top-k would become a full sort.
    magnitude, indices = top_k(jax.lax.stop_gradient(jnp.abs(z)), capacity)
    kept = magnitude != 0
    values = jnp.where(kept, jnp.take_along_axis(z, indices, axis=-1), 0)
    active = jnp.sum(jnp.abs(z) > 0, axis=-1, dtype=jnp.int32)  # NaN needs no slot
    num_dropped = active - jnp.sum(magnitude > 0, axis=-1, dtype=jnp.int32)
    return SparseCode(values, jnp.where(kept, indices, m), m, num_dropped)


def top_k(
    x: Float[Array, "*b m"], k: int, *, approximate: bool = False
) -> tuple[Float[Array, "*b k"], Int[Array, "*b k"]]:
    """The `k` largest of each row and their indices, like `jax.lax.top_k`, but faster where `k` is far below `m`.

    The `k` largest lie in the `k` groups with the largest maxima, so only these are sorted.

    Args:
      x: `[*b m]`; NaN counts as largest.
      k: number of entries, at most `m`.
      approximate: let a TPU miss about a twentieth of them, which spares it a sort of rows where `k` is large; other
        devices miss none.

    Returns:
      Values in descending order, and their indices; equal values are in ascending order of index.

    Example:
      >>> import jax.numpy as jnp, jaxsae
      >>> values, indices = jaxsae.codes.top_k(jnp.array([1.0, 3.0, 2.0]), 2)
      >>> values.tolist(), indices.tolist()
      ([3.0, 2.0], [1, 2])
    """
    if sharding.is_sharded(x.shape[-1]):
        return _top_k_of_all(x, k, approximate)
    return _top_k(x, k, x.shape[-1] if approximate else None)


@functools.partial(jax.jit, static_argnums=(1, 2))
@jax.named_scope("top_k")
def _top_k(x, k: int, among: int | None):
    """`top_k`, approximate if the number of latents is given among which the `k` largest are wanted in the end."""
    m, size = x.shape[-1], 1
    while m % (2 * size) == 0 and k * (2 * size) ** 2 <= m:  # balances the number of groups and their size
        size *= 2
    # Measured: smaller groups are not faster.
    default = functools.partial(_top_k_of_groups, k=k, size=size) if size >= 8 else functools.partial(_sorted, k=k)
    # A TPU's own top-k reads a row once; groups would be copied into another layout, and sorted three times.
    return jax.lax.platform_dependent(x, tpu=functools.partial(_sorted, k=k, among=among), default=default)


def _sorted(x, *, k: int, among: int | None = None):
    """`top_k` by JAX."""
    if among is None:
        values, indices = jax.lax.top_k(x, k)
    else:
        # XLA keeps some twenty candidates for each entry wanted among all; of these `m`, it must keep at least `k`.
        size = min(among, 16 * x.shape[-1])
        values, indices = jax.lax.approx_max_k(x, k, reduction_input_size_override=size)
    return values, indices


def _top_k_of_groups(x, *, k: int, size: int):
    """`top_k` among the groups of `size` neighbours with the largest maxima."""
    groups = x.reshape(*x.shape[:-1], x.shape[-1] // size, size)
    # `jnp.max` on XLA's CPU backend ignores NaN.
    lowest = jnp.array(-jnp.inf, x.dtype)
    greatest = jax.lax.reduce(jax.lax.stop_gradient(groups), lowest, _max_or_nan, (groups.ndim - 1,))
    # The barrier keeps the maxima in use; otherwise XLA's CPU backend sorts all of them. (A barrier for the pair alone
    # becomes one for the result of the top-k, at which XLA crashes: seen in jaxlib 0.10.2.)
    _, chosen, _ = jax.lax.optimization_barrier((*jax.lax.top_k(greatest, k), jnp.zeros(())))
    chosen = jnp.sort(chosen, axis=-1)
    candidates = jnp.take_along_axis(groups, chosen[..., None], axis=-2).reshape(*x.shape[:-1], k * size)
    values, at = jax.lax.top_k(candidates, k)
    return values, size * jnp.take_along_axis(chosen, at // size, axis=-1) + at % size


def _top_k_of_all(x, k: int, approximate: bool):
    """`top_k` where the latents are split over devices: among each device's own, then among all candidates."""
    row, devices, m = sharding.rows_spec(x), sharding.axis_size("latent"), x.shape[-1]
    axis = sharding.axis("latent")

    def here(x):
        values, indices = _top_k(x, min(k, x.shape[-1]), m if approximate else None)
        found = values, indices + x.shape[-1] * jax.lax.axis_index(axis)
        shared = x.ndim > 1 and len(x) % devices == 0  # then each device selects for some of the rows
        if shared:
            trade = functools.partial(jax.lax.all_to_all, split_axis=0, concat_axis=x.ndim - 1)
        else:
            trade = functools.partial(jax.lax.all_gather, axis=x.ndim - 1)
        values, indices = (trade(each, axis, tiled=True) for each in found)
        values, at = jax.lax.top_k(values, k)
        found = values, jnp.take_along_axis(indices, at, axis=-1)
        return tuple(jax.lax.all_gather(each, axis, axis=0, tiled=True) for each in found) if shared else found

    places = [*row, *[None] * (x.ndim - 1 - len(row)), axis]
    return sharding.shard_map(here, PartitionSpec(*places), row)(x)


def _max_or_nan(a, b):
    return jnp.where((a > b) | jnp.isnan(a), a, b)


def decode(
    dictionary: Float[Array, "m d"], code: SparseCode, *, implementation: str | None = None
) -> Float[Array, "*b d"]:
    """Sum the atoms of each row: `Σᵢ valuesᵢ · dictionary[indicesᵢ]`, accumulated in float32 or better.

    Its derivative reads no other rows of the dictionary either: `D̄ = Zᵀx̄` (`scatter_add`), `z̄ᵢ = ⟨D[indicesᵢ], x̄⟩`.

    Args:
      dictionary: `[m d]`, one atom per row.
      code: `[*b k]`.
      implementation: "xla", "pallas", or None for the one that was measured to be faster on this kind of device.

    Returns:
      `[*b d]`, in the dtype that the values and the dictionary promote to.

    Raises:
      TypeError, ValueError: at trace time, if the dictionary and the code do not fit together.
      NotImplementedError: before it runs, if `implementation="pallas"` and no kernel applies.

    Example:
      >>> import jax.numpy as jnp, jaxsae
      >>> code = jaxsae.SparseCode(values=jnp.array([3.0, 1.0]), indices=jnp.array([2, 0]), num_latents=3)
      >>> jaxsae.codes.decode(jnp.eye(3), code)
      Array([1., 0., 3.], dtype=float32)
    """
    m = code.num_latents
    dictionary, values, indices = _checked("decode", dictionary, code.values, code.indices)
    if dictionary.shape[:-1] != (m,):
        raise ValueError(
            f"`decode` got a dictionary of shape {dictionary.shape} for a code of {m} latents; pass one of shape "
            f"({m}, d), one atom per row."
        )
    return form("rows", dictionary, values, indices, m=m, implementation=implementation)


def _checked(name: str, *arrays):
    """The arguments as arrays, the last of them indices."""
    *floats, indices = (as_array(x) for x in arrays)
    for x in floats:
        if not jnp.issubdtype(x.dtype, jnp.floating):
            raise TypeError(f"`{name}` got numbers of dtype {x.dtype}, expected floating point; convert them first.")
    if not jnp.issubdtype(indices.dtype, jnp.integer):
        raise TypeError(f"`{name}` got indices of dtype {indices.dtype}, expected integers; convert them to int32.")
    return *floats, indices


def scatter_add(code: SparseCode, x: Float[Array, "*b d"], *, implementation: str | None = None) -> Float[Array, "m d"]:
    """Sum the rows in which each latent is active, weighted by its values: `Zᵀx`, accumulated in float32 or better.

    The cost is proportional to the slots in use, not to all latents; the order of summation is fixed.

    Args:
      code: `[*b k]`.
      x: `[*b d]`.
      implementation: as for `decode`.

    Returns:
      `[m d]`, in the dtype that the values and `x` promote to, float32 or better.

    Raises:
      TypeError, ValueError: at trace time, if the rows and the code do not fit together.
      NotImplementedError: as for `decode`.

    Example:
      >>> import jax.numpy as jnp, jaxsae
      >>> code = jaxsae.SparseCode(values=jnp.array([[3.0], [1.0]]), indices=jnp.array([[1], [1]]), num_latents=2)
      >>> jaxsae.codes.scatter_add(code, jnp.eye(2))
      Array([[0., 0.],
             [3., 1.]], dtype=float32)
    """
    values, x, indices = _checked("scatter_add", code.values, x, code.indices)
    if values.shape != indices.shape or x.shape[:-1] != values.shape[:-1]:
        raise ValueError(
            f"`scatter_add` got rows {x.shape} for a code of values {values.shape} and indices {indices.shape}; pass "
            "as many rows as the code has."
        )
    return form("atoms", values, x, indices, m=code.num_latents, implementation=implementation)


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
    if not sharding.is_sharded(m):
        return add_at(jnp.zeros(m, values.dtype), indices, values)
    row = sharding.rows_spec(indices)

    def here(values, indices):
        m_here = m // jax.lax.axis_size(sharding.axis("latent"))
        total = add_at(jnp.zeros(m_here, values.dtype), sharding.local_indices(indices, m_here), values)
        return sharding.sum_rows(total, row)

    return sharding.shard_map(here, (row, row), sharding.by_latent())(values, indices)
