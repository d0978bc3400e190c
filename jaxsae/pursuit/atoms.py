"""The atoms of a pursuit: scaled to norm 1, and searched for the one that correlates most with a residual.

A large array is scaled a block at a time, as it is read, so that neither a copy of it nor its correlations with every
row are ever held. A dictionary that is not an array computes its correlations itself.
"""

import functools
import math
from typing import Any, NamedTuple, Protocol, runtime_checkable

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from jaxsae import sharding
from jaxsae._core import pytrees
from jaxsae._core.linalg import divide, matmul
from jaxsae.least_squares import problems

__all__ = ["Searchable"]

_COPY_BYTES = 64 << 20  # largest array that is scaled at once
_BLOCK_BYTES = 4 << 20  # of a larger one, scaled each time that it is read
_ACCELERATOR_BLOCK_BYTES = 64 << 20


@runtime_checkable
class Searchable(problems.Dictionary, Protocol):
    """Protocol of a dictionary that is not an array, and that a greedy pursuit can search: quantised, for example.

    It is asked for all correlations of a chunk of rows at once; what memory it needs for that is its own affair.

    Example:
      >>> import jax, jax.numpy as jnp, jaxsae
      >>> from jaxsae import pursuit, pytrees
      >>> @pytrees.dataclass
      ... class Int8:
      ...     q: jax.Array  # [m d]
      ...     scale: jax.Array  # [m 1]
      ...
      ...     def take(self, indices):
      ...         return self.scale[indices] * self.q[indices].astype(jnp.float32)
      ...
      ...     def correlate(self, r):
      ...         return r @ self.q.astype(r.dtype).T * self.scale[:, 0]
      >>> D = Int8(jnp.array([[127, 0], [76, 102]], jnp.int8), jnp.full((2, 1), 1 / 127))
      >>> code, info = pursuit.omp(D, jnp.array([1.0, 2.0]), k=1, nonnegative=True)
      >>> code.indices.tolist()
      [1]
    """

    def correlate(self, r: Float[Array, "n d"]) -> Float[Array, "n m"]:
        """The inner products of rows with every atom."""
        ...


@pytrees.dataclass
class Atoms:
    """Atoms of norm 1, or 0 where they are zero, of a dictionary that is scaled as it is read."""

    dictionary: Any  # [m d], or a pytree with `take` and `correlate`
    sizes: "Sizes"

    def __len__(self) -> int:
        return len(self.sizes.length)

    def take(self, indices: Int[Array, "*b k"]) -> Float[Array, "*b k d"]:
        """Atoms at these indices."""
        sizes = Sizes(*(x[indices][..., None] for x in self.sizes))
        return sizes.scale(problems.take(self.dictionary, indices, len(self), sizes.length.dtype))

    def correlate(self, r: Float[Array, "n d"]) -> Float[Array, "n m"]:
        """Correlations of a dictionary that is not an array."""
        return self.sizes.scale(self.dictionary.correlate(r).astype(self.sizes.length.dtype))

    def block(self, start: Array, size: int) -> Float[Array, "size d"]:
        """Consecutive atoms of an array."""
        atoms, *sizes = (jax.lax.dynamic_slice_in_dim(x, start, size) for x in (self.dictionary, *self.sizes))
        sizes = Sizes(*(x[:, None] for x in sizes))
        return sizes.scale(atoms.astype(sizes.length.dtype))


class Sizes(NamedTuple):
    """The norm of each row as a product of two numbers, which may not overflow where it would, `[n]` each."""

    length: Array  # relative to the largest entry
    largest: Array

    def scale(self, x: Array) -> Array:
        """`x` divided by these norms; 0 where they are."""
        return divide(divide(x, self.largest), self.length)


def unit(x: Float[Array, "n d"]) -> tuple[Float[Array, "n d"], Sizes]:
    """Rows scaled to norm 1, and what divided them; rows that are zero or not finite become 0."""
    x = jnp.where(jnp.isfinite(x).all(1, keepdims=True), x, 0)
    largest = jnp.max(jnp.abs(x), axis=1, initial=0)
    x = divide(x, largest[:, None])
    length = jnp.linalg.norm(x, axis=1)
    return divide(x, length[:, None]), Sizes(length, largest)


def count(dictionary: Any, d: int, dtype) -> int:
    """The number of atoms of a dictionary."""
    if problems.is_array(dictionary):
        return len(dictionary)
    products = jax.eval_shape(dictionary.correlate, jax.ShapeDtypeStruct((1, d), dtype)).shape
    if len(products) != 2 or products[0] != 1:
        raise ValueError(
            f"got a dictionary whose correlate gives shape {products} for residuals of shape {(1, d)}; return "
            f"correlations of shape (1, m)."
        )
    return products[1]


def copies(dictionary: Any, dtype) -> bool:
    """Whether a dictionary is an array of which a scaled copy is made, as of any that is split over devices."""
    if not problems.is_array(dictionary):
        return False
    m, d = dictionary.shape
    split = bool(jax.sharding.get_abstract_mesh().explicit_axes) or sharding.is_sharded(m)
    return split or m * d * jnp.dtype(dtype).itemsize <= _COPY_BYTES


def scaled(dictionary: Any, d: int, dtype, *, copy: bool) -> tuple[Any, Sizes, Bool[Array, ""]]:
    """The atoms scaled to norm 1, their sizes, and whether all are finite; subnormal numbers count as NaN."""
    if copy:
        dictionary = dictionary.astype(dtype)
        return *unit(dictionary), jnp.isfinite(problems.largest(dictionary)).all()
    m = count(dictionary, d, dtype)
    size = block_size(m, d, dtype)

    def measure(carry, start):
        block = problems.take(dictionary, start + jnp.arange(size, dtype=jnp.int32), m, dtype)
        sizes, finite = carry
        write = functools.partial(jax.lax.dynamic_update_slice_in_dim, start_index=start, axis=0)
        sizes = jax.tree.map(write, sizes, unit(block)[1])
        return (sizes, finite & jnp.isfinite(problems.largest(block)).all()), None

    start = sharding.vary_alike((Sizes(jnp.zeros(m, dtype), jnp.zeros(m, dtype)), jnp.bool_(True)), dictionary)
    (sizes, finite), _ = jax.lax.scan(measure, start, _starts(m, size))
    return Atoms(dictionary, sizes), sizes, finite


def best(
    atoms: Any, r: Float[Array, "n d"], *, nonnegative: bool, free: Bool[Array, "n m"] | None = None, norm: Any = 1.0
) -> tuple[Float[Array, " n"], Float[Array, " n"], Int[Array, " n"]]:
    """Search for the atom of each row that correlates most with its residual, the first of several.

    Args:
      atoms: those of `scaled`.
      r: residuals.
      nonnegative: search for the largest correlation, rather than the largest in magnitude.
      free: which atoms may be chosen; all of them if None.
      norm: what divides the correlations, `[n m]`.

    Returns:
      What was compared, 0 if no atom is free; the correlation itself; and the index.
    """

    def among(correlations, free):
        scores = divide(correlations if nonnegative else jnp.abs(correlations), norm)
        score, at = largest(scores if free is None else jnp.where(free, scores, 0))
        return score, jnp.take_along_axis(correlations, at[:, None], axis=1)[:, 0], at

    if not isinstance(atoms, Atoms):
        return among(matmul(r, atoms.T), free)
    if not problems.is_array(atoms.dictionary):
        return among(atoms.correlate(r), free)
    size = block_size(len(atoms), r.shape[1], r.dtype)

    def visit(found, start):
        here = free if free is None else jax.lax.dynamic_slice_in_dim(free, start, size, axis=1)
        score, correlation, at = among(matmul(r, atoms.block(start, size).T), here)
        better = score > found[0]
        return jax.tree.map(lambda new, old: jnp.where(better, new, old), (score, correlation, start + at), found), None

    start = jnp.full(len(r), -jnp.inf, r.dtype), jnp.zeros(len(r), r.dtype), jnp.zeros(len(r), jnp.int32)
    return jax.lax.scan(visit, sharding.vary_alike(start, r, atoms), _starts(len(atoms), size))[0]


def largest(x: Float[Array, "n m"]) -> tuple[Float[Array, " n"], Int[Array, " n"]]:
    """The largest entry of each row, and its first index."""
    # `argmax` is four times slower on XLA's CPU backend.
    most = jnp.max(x, axis=1)
    m = x.shape[1]
    return most, jnp.min(jnp.where(x == most[:, None], jnp.arange(m), m - 1), axis=1).astype(jnp.int32)


def block_size(m: int, d: int, dtype) -> int:
    """The number of atoms of a block."""
    most = _BLOCK_BYTES if sharding.on_cpu() else _ACCELERATOR_BLOCK_BYTES
    return min(m, max(1, most // (d * jnp.dtype(dtype).itemsize)))


def row_bytes(atoms: Any, d: int) -> int:
    """Memory of a search for one row."""
    m = len(atoms)
    at_once = block_size(m, d, jnp.float32) if isinstance(atoms, Atoms) and problems.is_array(atoms.dictionary) else m
    return 8 * at_once + m  # `free` has a byte for each atom


def _starts(m: int, size: int) -> Array:
    """The first atom of each block; the last two may overlap."""
    return jnp.minimum(size * jnp.arange(math.ceil(m / size), dtype=jnp.int32), m - size)
