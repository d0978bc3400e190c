"""Activations that keep a fixed number of latents per row or per batch."""

import dataclasses
import math
import numbers
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import PartitionSpec
from jaxtyping import Array, Bool, Float, Int

from jaxsae import codes, sharding
from jaxsae._core import pytrees
from jaxsae._core.linalg import promote_dtypes, result_type
from jaxsae.autoencoder.activations.base import Activation, _of_any_units, _past, check_number
from jaxsae.codes import SparseCode


class _Selection(Activation):
    """An activation that selects `k` latents per row; subclasses define `_chosen`."""

    k: int
    selects = True

    def __init_subclass__(cls) -> None:
        super().__init_subclass__()
        # The sparse code of such a subclass is made from its dense code.
        if "__call__" in vars(cls) and "_chosen" not in vars(cls):
            cls.selects = False
            cls._chosen = lambda self, pre: codes.from_dense(self(pre), self.k)

    def __post_init__(self):
        _validate_k(self)

    @property
    def slots(self) -> int:
        """`k`."""
        return self.k

    def _validate(self, m: int) -> None:
        if self.k > m:
            raise ValueError(f"{type(self).__name__} got k = {self.k} for {m} latents; pass k of at most {m}.")

    def _chosen(self, pre: Float[Array, "*b m"]) -> SparseCode:
        """The code in exactly `k` slots."""
        raise NotImplementedError

    def code(self, pre: Float[Array, "*b m"], capacity: int) -> SparseCode:
        """The code in `k` slots, padded with empty ones to `capacity`."""
        m = pre.shape[-1]
        self._validate(m)
        if capacity < self.k:
            raise ValueError(
                f"{type(self).__name__} fixes k = {self.k}, but got capacity {capacity}; leave capacity out."
            )
        code = self._chosen(pre)
        spare = [(0, 0)] * (pre.ndim - 1) + [(0, capacity - self.k)]
        # Latents not selected are inactive, so none counts as dropped.
        return SparseCode(jnp.pad(code.values, spare), jnp.pad(code.indices, spare, constant_values=m), m)


def _validate_k(activation: Any) -> None:
    k = activation.k
    if isinstance(k, bool) or not isinstance(k, int | np.integer) or k < 1:
        raise ValueError(f"{type(activation).__name__} got k = {k}; pass k of at least 1, a whole number.")


def dropped(pre: Float[Array, "*b m"], k: int, keep: float | Array | None = None) -> Bool[Array, "*b m"]:
    """Mask of the values outside the `k` (or `keep`) largest of their row, by comparison with the last one kept."""
    number = k if keep is None else jnp.sum(_kept(k, keep))
    out = below(
        pre, *last_of(codes.top_k(jax.lax.stop_gradient(pre), k), k if keep is None else jnp.maximum(number, 1))
    )
    return out if keep is None else out | ((number == 0) & ~jnp.isnan(pre))


def last_of(
    found: tuple[Float[Array, "*b k"], Int[Array, "*b k"]], number: int | Array
) -> tuple[Float[Array, "*b 1"], Int[Array, "*b 1"]]:
    """Value and index of the last of the first `number` entries that `codes.top_k` found."""
    # The barrier keeps both outputs of top-k in use; otherwise XLA's CPU backend sorts whole rows. (The third array, as
    # in `codes.top_k`, avoids a crash: with sharded latents, XLA ends the process at a barrier for the pair alone.)
    top, indices, _ = jax.lax.optimization_barrier((*found, jnp.zeros(())))
    return top[..., number - 1, None], indices[..., number - 1, None]


def below(pre: Float[Array, "*b m"], least: Float[Array, "*b 1"], last: Int[Array, "*b 1"]) -> Bool[Array, "*b m"]:
    """Mask of the values that come after one in the order of `codes.top_k`; NaN is never masked."""
    return (pre < least) | ((pre == least) & (jnp.arange(pre.shape[-1], dtype=last.dtype) > last))


def _kept(k: int, keep: float | Array) -> Bool[Array, " k"]:
    """Mask of the first `⌊keep⌋` of `k` slots."""
    dtype = result_type(keep, jnp.float32)
    return jnp.arange(k, dtype=dtype) < jnp.floor(keep).astype(dtype)


@pytrees.dataclass
class TopK(_Selection):
    """Keep the `k` largest pre-activations of each row, where they are positive.

    Attributes:
      k: number of active latents per row; static.
      keep: use only this many of them, rounded down, from 0 to `k`; a float, which may be traced, for sweeps over
        sparsity in one compilation. All by default.

    Raises:
      ValueError: if `k < 1`, or `keep` is a number out of its range.

    Example:
      >>> import jax.numpy as jnp, jaxsae
      >>> jaxsae.TopK(1)(jnp.array([1.0, 3.0, 2.0]))
      Array([0., 3., 0.], dtype=float32)

    Source: Gao et al. (2024), Section 2.3; Makhzani & Frey (2013).
    """

    k: int = pytrees.static()
    keep: float | Array | None = pytrees.fixed(default=None)
    takes_largest = True
    rescale = _of_any_units

    def __post_init__(self):
        super().__post_init__()
        check_number(self, "keep", numbers.Real, 0, self.k, f"a number from 0 to k = {self.k}")

    def __call__(self, pre: Float[Array, "*b m"]) -> Float[Array, "*b m"]:
        """The dense code, by comparison with the k-th largest: no scatter, forwards or backwards."""
        self._validate(pre.shape[-1])
        return jnp.where(dropped(pre, self.k, self.keep), 0, jax.nn.relu(pre))

    def _chosen(self, pre: Float[Array, "*b m"]) -> SparseCode:
        m = pre.shape[-1]
        values, indices = codes.top_k(pre, self.k)
        kept = values > 0
        if self.keep is not None:
            kept &= _kept(self.k, self.keep)
        # Keep NaN, so that it stays visible.
        kept |= jnp.isnan(values)
        return SparseCode(jnp.where(kept, values, 0), jnp.where(kept, indices, m), m)


@pytrees.dataclass
class AbsTopK(_Selection):
    """Keep the `k` pre-activations of largest magnitude, with their signs: one latent serves both signs of its atom.

    Attributes:
      k: number of active latents per row; static.

    Raises:
      ValueError: if `k < 1`.

    Example:
      >>> import jax.numpy as jnp, jaxsae
      >>> jaxsae.AbsTopK(1)(jnp.array([1.0, -3.0, 2.0]))
      Array([ 0., -3.,  0.], dtype=float32)

    Source: Zhu et al. (2025), "AbsTopK: rethinking sparse autoencoders for bidirectional features".
    """

    k: int = pytrees.static()
    signed = True
    rescale = _of_any_units

    def __call__(self, pre: Float[Array, "*b m"]) -> Float[Array, "*b m"]:
        """The dense code."""
        self._validate(pre.shape[-1])
        return jnp.where(dropped(jnp.abs(pre), self.k), 0, pre)

    def _chosen(self, pre: Float[Array, "*b m"]) -> SparseCode:
        return codes.from_dense(pre, self.k)


@pytrees.dataclass
class GroupMax(_Selection):
    """Split the latents into `k` groups of neighbours and keep the largest of each, if it is positive.

    Cheaper than TopK, since no sort is needed; two latents of one group are never active together.

    Attributes:
      k: number of groups, and of slots per row; divides `m`; static.

    Raises:
      ValueError: if `k < 1`, or does not divide the number of latents.

    Example:
      >>> import jax.numpy as jnp, jaxsae
      >>> jaxsae.GroupMax(2)(jnp.array([1.0, 3.0, -1.0, 2.0]))
      Array([0., 3., 0., 2.], dtype=float32)

    Source: EleutherAI, sparsify.
    """

    k: int = pytrees.static()
    takes_largest = True
    rescale = _of_any_units

    def _validate(self, m: int) -> None:
        if m % self.k:
            raise ValueError(f"GroupMax got k = {self.k} for {m} latents; pass a k that divides {m}.")

    def __call__(self, pre: Float[Array, "*b m"]) -> Float[Array, "*b m"]:
        """The dense code."""
        self._validate(pre.shape[-1])
        groups = pre.reshape(*pre.shape[:-1], self.k, -1)
        first = jnp.argmax(groups, axis=-1, keepdims=True)
        return jnp.where(jnp.arange(groups.shape[-1]) == first, jax.nn.relu(groups), 0).reshape(pre.shape)

    def _chosen(self, pre: Float[Array, "*b m"]) -> SparseCode:
        groups = pre.reshape(*pre.shape[:-1], self.k, -1)
        first = jnp.argmax(groups, axis=-1)
        values = jax.nn.relu(jnp.take_along_axis(groups, first[..., None], axis=-1)[..., 0])
        indices = first.astype(jnp.int32) + groups.shape[-1] * jnp.arange(self.k, dtype=jnp.int32)
        values, order = jax.lax.top_k(values, self.k)
        indices = jnp.take_along_axis(indices, order, axis=-1)
        kept = (values > 0) | jnp.isnan(values)
        return SparseCode(values, jnp.where(kept, indices, pre.shape[-1]), pre.shape[-1])


class Cut(NamedTuple):
    """Which values of a batch `BatchTopK` keeps.

    Attributes:
      least: the smallest of them; 0 if all positive ones are kept.
      ties: how many of those that equal it are kept: the first ones.
    """

    least: Float[Array, ""]
    ties: Int[Array, ""]


@pytrees.dataclass
class BatchTopK(Activation):
    """Keep the `B·k` largest values of a training batch of `B` rows; infer with a threshold estimated from them.

        training: the B·k largest positive entries of the batch;   inference: z = pre where pre > threshold

    The number of active latents then varies by row. The threshold is a running mean, over about a hundred steps, of the
    smallest value kept, initialised at the first step.

    Attributes:
      k: mean number of active latents per row, in training; static.
      threshold: `[]`, for inference; negative, which amounts to ReLU, until the first training step.

    Raises:
      ValueError: if `k < 1`.

    Example:
      >>> import jax.numpy as jnp, jaxsae
      >>> pre = jnp.array([[4.0, 3.0], [2.0, 1.0]])
      >>> z, activation = jaxsae.BatchTopK(1).train(pre)
      >>> z.tolist(), float(activation.threshold)
      ([[4.0, 3.0], [0.0, 0.0]], 3.0)

    Source: Bussmann, Leask & Nanda (2024), "BatchTopK sparse autoencoders".
    """

    k: int = pytrees.static()
    threshold: float | Float[Array, ""] = pytrees.fixed(default=-1.0)
    takes_largest = True

    def __post_init__(self):
        _validate_k(self)

    def __call__(self, pre: Float[Array, "*b m"]) -> Float[Array, "*b m"]:
        """The dense code at inference, where rows are independent."""
        return _past(self.threshold, pre, pre)

    def train(self, pre: Float[Array, "b m"]) -> tuple[Float[Array, "b m"], "BatchTopK"]:
        """The dense code of a training batch, and the activation with its threshold updated."""
        z = jax.nn.relu(pre)
        count = self._count(math.prod(pre.shape[:-1]), pre.shape[-1])
        if sharding.is_sharded(pre.shape[-1]):
            z = jnp.where(_beyond(jax.lax.stop_gradient(z), count), 0, z)
        else:
            flat = z.reshape(-1)
            z = jnp.where(dropped(flat, count), 0, flat).reshape(pre.shape)
        return z, self._moved(jax.lax.stop_gradient(z))

    def _moved(self, kept: Float[Array, "..."]) -> "BatchTopK":
        """The activation, its threshold moved towards the smallest positive value."""
        least = jnp.min(kept, where=kept > 0, initial=jnp.inf).astype(jnp.float32)
        least, before = promote_dtypes(least, self.threshold)
        threshold = jnp.where(before < 0, least, 0.99 * before + 0.01 * least)
        return dataclasses.replace(self, threshold=jnp.where(jnp.isfinite(least), threshold, before))

    def survey(
        self, pre_fn: Callable[[Float[Array, "b d"]], Float[Array, "b m"]], parts: Float[Array, "n b d"]
    ) -> tuple[Cut, "BatchTopK"]:
        """What to keep of a batch that is trained in parts, and the activation with its threshold updated.

        Args:
          pre_fn: from the rows of a part to their pre-activations.
          parts: the rows, `[n b d]`.
        """
        like = jax.eval_shape(pre_fn, parts[0])
        count = self._count(math.prod(parts.shape[:2]), like.shape[-1])
        divided = sharding.is_sharded(like.shape[-1])
        devices = sharding.axis_size("data") * sharding.axis_size("latent") if divided else 1

        def add(largest, part):
            z = jax.nn.relu(jax.lax.stop_gradient(pre_fn(part)))
            if not divided:
                return _largest(largest, z), None
            places = PartitionSpec(*(sharding.axis(role) for role in ("data", "latent")))
            return sharding.shard_map(_largest, (sharding.by_all(), places), sharding.by_all())(largest, z), None

        # Each device's own: those of all devices are among them.
        largest, _ = jax.lax.scan(add, jnp.zeros((devices, count), like.dtype), parts)
        least, ties = _cut(_keys(largest), count)
        cut = Cut(jax.lax.bitcast_convert_type(least, _wide(largest.dtype)).astype(largest.dtype), ties)
        return cut, self._moved(jnp.where(largest >= cut.least, largest, 0))

    def select(self, pre: Float[Array, "b m"], cut: Cut) -> tuple[Float[Array, "b m"], Cut]:
        """The dense code of a part of a training batch, and the cut of the parts that follow."""
        z = jax.nn.relu(pre)
        frozen = jax.lax.stop_gradient(z)
        ties = (frozen == cut.least) & (frozen > 0)
        here = jnp.minimum(cut.ties, jnp.sum(ties, dtype=jnp.int32))
        beyond = (frozen < cut.least) | (ties & (_after(ties, here) | (here == 0)))
        return jnp.where(beyond, 0, z), cut._replace(ties=cut.ties - here)

    def _count(self, rows: int, m: int) -> int:
        if self.k > m:
            raise ValueError(f"BatchTopK got k = {self.k} for {m} latents; pass a smaller k.")
        return self.k * rows

    def margin(self, pre: Float[Array, "*b m"]) -> Float[Array, "*b m"]:
        """`pre`, the margin above a threshold of 0; latents with at most `t` are inactive in `at_margin(t)`."""
        return pre

    def at_margin(self, t: float | Array) -> "BatchTopK":
        """The activation, threshold set so that exactly the positive latents with margin above `t` are active."""
        return dataclasses.replace(self, threshold=jnp.asarray(t, jnp.float32))

    def rescale(self, scale: float | Array) -> "BatchTopK":
        """The activation in other units."""
        return dataclasses.replace(self, threshold=self.threshold / scale)


def _beyond(z: Float[Array, "*b m"], count: int) -> Bool[Array, "*b m"]:
    """Mask of the values outside the `count` largest of the whole batch, none of them negative; NaN is never masked.

    As `dropped` of the flat batch, which would be gathered, but by bisection on the number of values above a threshold:
    devices exchange only these counts. It reads the batch once a digit, which on one device is slower than `dropped`.
    """
    wide = z.reshape(-1, z.shape[-1])
    keys = _keys(wide)
    least, left = _cut(keys, count)
    ties = keys == least
    beyond = (keys < least) | (ties & _after(ties, left))
    return (beyond & ~jnp.isnan(wide)).reshape(z.shape)


def _wide(dtype):
    return result_type(dtype, jnp.float32)


def _keys(z: Float[Array, "b m"]) -> Int[Array, "b m"]:
    """Integers ordered as these values, none of them negative: the bits of floats of one sign are so ordered."""
    wide = z.astype(_wide(z.dtype))
    integer = jnp.dtype(f"int{jnp.finfo(wide.dtype).bits}")
    return jax.lax.bitcast_convert_type(wide, integer) & jnp.iinfo(integer).max


def _cut(keys: Int[Array, "b m"], count: int) -> tuple[Int[Array, ""], Int[Array, ""]]:
    """The smallest of the `count` largest keys, and how many of those that equal it are among them."""
    integer, size = keys.dtype, jnp.iinfo(keys.dtype).bits
    digits = 1 if sharding.on_cpu() else 4  # at a time; more of them read the batch less often, and compare more

    def narrow(number, least):
        place = integer.type(size - digits) - integer.type(digits) * number.astype(integer)
        steps = [least + (integer.type(step) << place) for step in range(1, 1 << digits)]
        passed = jnp.stack([_has(keys >= at, count) & (at > least) for at in steps])  # not beyond the largest integer
        return least + (jnp.sum(passed, dtype=integer) << place)

    least = jax.lax.fori_loop(0, size // digits, narrow, jnp.zeros((), integer))
    return least, count - jnp.sum(keys > least, dtype=jnp.int32)


def _largest(so_far: Float[Array, "1 n"], z: Float[Array, "b m"]) -> Float[Array, "1 n"]:
    """The largest of those so far and of a batch."""
    count = so_far.shape[-1]
    of_batch = codes.top_k(z.reshape(-1), min(count, z.size))
    both = jnp.concatenate([so_far[0], _held(of_batch)])
    return _held(codes.top_k(both, count))[None]


def _held(found: tuple[Float[Array, "*b k"], Int[Array, "*b k"]]) -> Float[Array, "*b k"]:
    """The values that `codes.top_k` found, its result in use as a whole, as in `last_of`."""
    return jax.lax.optimization_barrier((*found, jnp.zeros(())))[0]


def _has(mask: Bool[Array, "b m"], count: int) -> Bool[Array, ""]:
    """Whether at least so many are true."""
    high, low = _split_sum(jnp.sum(mask, axis=1, dtype=jnp.int32))
    return (high > count >> 12) | ((high == count >> 12) & (low >= count & 0xFFF))


def _split_sum(counts: Int[Array, " b"]) -> tuple[Int[Array, ""], Int[Array, ""]]:
    """A sum that may exceed 32 bits, as `2¹² high + low`."""
    low = jnp.sum(counts & 0xFFF)
    return jnp.sum(counts >> 12) + (low >> 12), low & 0xFFF


def _after(ties: Bool[Array, "b m"], count: Array) -> Bool[Array, "b m"]:
    """Mask of the values after the first `count` that are true, row by row."""
    rows, columns = (jnp.arange(size, dtype=jnp.int32) for size in ties.shape)
    by_row = jnp.minimum(jnp.sum(ties, axis=1, dtype=jnp.int32), count)
    so_far = jax.lax.associative_scan(lambda a, b: jnp.minimum(a + b, count), by_row)
    row = jnp.argmax(so_far >= count)  # in which the last of them is
    within = (ties & (rows == row)[:, None]).any(0)
    left = count - jnp.where(row > 0, so_far[row - 1], 0)

    def narrow(_, bounds):
        low, high = bounds
        middle = low + (high - low) // 2
        enough = jnp.sum(within & (columns <= middle), dtype=jnp.int32) >= left
        return jnp.where(enough, low, middle + 1), jnp.where(enough, middle, high)

    ends = jnp.int32(0), jnp.int32(ties.shape[1] - 1)
    column, _ = jax.lax.fori_loop(0, max(1, (ties.shape[1] - 1).bit_length()), narrow, ends)
    return (rows[:, None] > row) | ((rows[:, None] == row) & (columns > column))
