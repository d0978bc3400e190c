"""Small dense linear algebra, in full precision on every backend."""

import functools
import math
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from jaxsae import sharding

EXACT = jax.lax.Precision.HIGHEST  # a plain float32 dot is TF32 or bfloat16 on accelerators
matmul = functools.partial(jnp.matmul, precision=EXACT)


def divide(x, by):
    """`x / by`, and 0 where `by` is 0."""
    return jnp.where(by == 0, 0, x / jnp.where(by == 0, 1, by))


def ratio(x, by):
    """`x / by`, and NaN where `by` is 0."""
    return jnp.where(by == 0, jnp.nan, x / jnp.where(by == 0, 1, by))


def as_array(x) -> Array:
    """`jnp.asarray`, which compiles a program for each shape of NumPy array if it is not given a dtype (jax 0.10)."""
    return jnp.asarray(x, jax.dtypes.canonicalize_dtype(x.dtype) if isinstance(x, np.ndarray) else None)


def result_type(*arrays) -> jnp.dtype:
    """The dtype that arrays or dtypes promote to, also where `jax_numpy_dtype_promotion` is strict."""
    with jax.numpy_dtype_promotion("standard"):
        return jnp.result_type(*arrays)


def promote_dtypes(*arrays) -> list[Array]:
    """The arrays, cast to the dtype that they promote to."""
    dtype = result_type(*arrays)
    return [jnp.asarray(array, dtype) for array in arrays]


def widen(tree):
    """A tree with its floating-point arrays in float32 or better, for sums."""

    def wide(x):
        x = jnp.asarray(x)
        return x.astype(result_type(x, jnp.float32)) if jnp.issubdtype(x.dtype, jnp.inexact) else x

    return jax.tree.map(wide, tree)


def norms(x: Float[Array, "*b d"]) -> Float[Array, "*b 1"]:
    """`‖x‖` of each row in float32 or better; its derivative is 0, not NaN, at 0."""
    squares = jnp.sum(widen(x) ** 2, axis=-1, keepdims=True)
    return jnp.where(squares == 0, 0, jnp.sqrt(jnp.where(squares == 0, 1, squares)))


def sq_norm(x: Float[Array, "*b d"]) -> Float[Array, "*b"]:
    """`‖x‖²` of each row."""
    return jnp.sum(x * x, axis=-1)


def power_of_two(x: Float[Array, "*b"]) -> Float[Array, "*b"]:
    """The largest power of two up to `|x|`, with its sign, by which division is exact; `x` if not finite.

    It is 0 for 0 and for subnormal numbers, which XLA flushes to 0 on most devices. Its derivative is 0.
    """
    x, limits = jax.lax.stop_gradient(x), jnp.finfo(x.dtype)
    bits = jax.lax.bitcast_convert_type(x, f"uint{limits.bits}")
    return jnp.where(jnp.isfinite(x), jax.lax.bitcast_convert_type(bits >> limits.nmant << limits.nmant, x.dtype), x)


def power_of_two_or_one(x: Float[Array, "*b"]) -> Float[Array, "*b"]:
    """The largest power of two up to each `x > 0`, clipped so that its inverse is finite; 1 for 0, Inf and NaN."""
    exponent = jnp.finfo(x.dtype).minexp
    return jnp.where((x > 0) & jnp.isfinite(x), jnp.clip(power_of_two(x), 2.0**exponent, 2.0**-exponent), 1)


@functools.partial(jax.custom_jvp, nondiff_argnums=(1, 2))
def max_or_nan(x: Array, axis: int | tuple[int, ...] | None = None, keepdims: bool = False) -> Array:
    """The largest of `x`, at least 0, or NaN if any is NaN: XLA's maximum on a CPU ignores NaN in many shapes."""
    # As integers: those of NaN without its sign exceed that of Inf, and those of negative numbers are negative.
    kind = jnp.dtype(f"int{jnp.finfo(x.dtype).bits}")
    bits = jax.lax.bitcast_convert_type(x, kind)
    magnitude = bits & jnp.iinfo(kind).max
    bits = jnp.where(magnitude > np.asarray(np.inf, x.dtype).view(kind), magnitude, bits)
    return jax.lax.bitcast_convert_type(jnp.max(bits, axis=axis, keepdims=keepdims, initial=0), x.dtype)


@max_or_nan.defjvp
def _max_or_nan_tangent(axis, keepdims, primals, tangents):
    """The derivative of `jnp.max`; that of the integers would be 0."""
    _, tangent = jax.jvp(lambda x: jnp.max(x, axis=axis, keepdims=keepdims, initial=0), primals, tangents)
    return max_or_nan(*primals, axis, keepdims), tangent


def residual(y: Float[Array, " d"], z: Float[Array, " k"], atoms: Float[Array, "k d"]) -> Float[Array, " d"]:
    """`y − zA` to about machine precision despite cancellation: summed in twice the precision, in a fixed order.

    Where atoms nearly cancel, the error of a plain sum is about `eps ‖z‖₁ max‖a‖`, which may exceed the residual. Here
    each product is split into exact ones, so that fused multiply-adds round nothing differently, and the error of each
    addition is computed exactly and summed separately.

    Source: Ogita, Rump & Oishi (2005), "Accurate sum and dot product"; Knuth (1969) for the error of an addition.
    """

    def add(total, x):
        high, low = total
        new = high + x
        added = new - high
        return new, low + ((high - (new - added)) + (x - added))

    def subtract(total, pair):
        (a, a_rest), (b, b_rest) = (_halves(x) for x in pair)
        high, low = functools.reduce(add, (a * b, a * b_rest, a_rest * b), total)
        return (high, low + a_rest * b_rest), None

    carry = sharding.vary_alike((y, jnp.zeros_like(y)), y, z, atoms)
    (high, low), _ = jax.lax.scan(subtract, carry, (-z, atoms))
    return high + low


def _halves(x):
    """Two numbers with half the digits each whose sum is `x`: their products are exact."""
    kind, bits = (jnp.uint32, 12) if x.dtype == jnp.float32 else (jnp.uint64, 27)
    whole = jax.lax.bitcast_convert_type(x, kind)
    first = jax.lax.bitcast_convert_type(whole >> bits << bits, x.dtype)
    return first, x - first


def power_iteration(product: Callable, v: Array, steps: int, total: Callable = jnp.sum) -> Array:
    """Estimate the largest eigenvalue of a positive semi-definite matrix, from below.

    Args:
      product: `v -> Gv`, for one vector or several side by side.
      v: starting vector.
      steps: number of iterations.
      total: sum over the entries of a vector.
    """

    def norm(v):
        return jnp.sqrt(total(v * v))

    def iterate(_, carry):
        v, size = carry
        v = product(v / jnp.where(size > 0, size, 1))
        return v, norm(v)

    return jax.lax.fori_loop(0, steps, iterate, (v, norm(v)))[1]


def sq_spectral_norm(D: Float[Array, "m d"], start: Float[Array, " d"], steps: int) -> Float[Array, ""]:
    """`‖D‖₂²` by power iteration, from below."""
    return power_iteration(lambda v: matmul(matmul(v, D.T), D), start, steps)


def one_at_a_time(f: Callable) -> Callable:
    """Give `f`, which factorises matrices, a `vmap` that runs one after another on a CPU.

    jaxlib's batched LAPACK on a CPU waits, inside the thread pool, for work it queued in that same pool: two calls at
    once deadlock a two-core machine (seen with jaxlib 0.10.2). One matrix at a time never queues.
    """
    in_turn = jax.custom_batching.sequential_vmap(f)

    @functools.wraps(f)
    def call(*arrays):
        return in_turn(*arrays) if sharding.on_cpu() else f(*arrays)

    return call


def cholesky(gram: Float[Array, "k k"]) -> Float[Array, "k k"]:
    """The lower factor of a positive semi-definite `G` of unit diagonal, singular or not, with a few ulps added."""
    diagonal = 1 + gram.shape[-1] * jnp.finfo(gram.dtype).eps
    gram = jnp.where(jnp.eye(gram.shape[-1], dtype=bool), diagonal, gram)
    return jax.lax.linalg.cholesky(gram, symmetrize_input=False)  # which would read a large `G` across its rows


@one_at_a_time
def solve_semidefinite(gram: Float[Array, "k k"], rhs: Float[Array, "k n"]) -> Float[Array, "k n"]:
    """Solve `GX = B` for one `G` of unit diagonal, singular or not, when the columns of `B` are in its range.

    A few ulps on the diagonal make the factorisation succeed for repeated atoms; two steps of refinement correct for
    them.
    """
    factor = cholesky(gram)

    def refine(_, x):
        return x + jax.scipy.linalg.cho_solve((factor, True), rhs - matmul(gram, x))

    return jax.lax.fori_loop(0, 3, refine, sharding.vary_alike(jnp.zeros_like(rhs), gram))  # compiled once


def solve_on(gram: Float[Array, "k k"], on: Array, rhs: Float[Array, " k"]) -> Float[Array, " k"]:
    """Solve `G_FF x_F = b_F` on the coordinates `F` where `on [k]` is true; `x` is 0 elsewhere."""
    return (_solve_packed if on.size >= 256 and sharding.on_cpu() else _solve_masked)(gram, on, rhs)


def _solve_masked(gram, on, rhs):
    both = on[:, None] & on[None, :]
    restricted = jnp.where(both, gram, jnp.eye(on.size, dtype=gram.dtype))
    return solve_semidefinite(restricted, jnp.where(on, rhs, 0)[:, None])[:, 0]


@one_at_a_time
def _solve_packed(gram, on, rhs):
    """`_solve_masked` of the first width that holds `F`: half the coordinates take an eighth of the work."""
    widths = [math.ceil(on.size * eighths / 8) for eighths in (1, 2, 3, 4, 6, 8)]
    order = jnp.argsort(~on, stable=True)

    def within(width: int):
        first = order[:width]
        x = _solve_masked(gram[first][:, first], on[first], rhs[first])
        return jnp.zeros_like(rhs).at[first].set(x)

    branch = jnp.searchsorted(jnp.array(widths), jnp.sum(on))
    return jax.lax.switch(branch, [functools.partial(within, width) for width in widths])
