"""Operations on the `k` active atoms of each row, each of which reads them once where a kernel exists.

    gather_gram    G = AAᵀ, c = Ay of each row, with A = D[indices]
    gather_decode  Aᵀz
    refit_fused    argmin ½‖y − Aᵀz‖² + ½ ridge ‖z‖² over z ≥ 0, by FISTA
    scatter_rows   Σ left · right, in the row of each latent: the gradient of a dictionary

Each has a reference that XLA compiles everywhere, and kernels for TPUs (`tpu`) and GPUs (`gpu`). By default the kernel
is used where it was measured to be faster on this kind of device (`tuning`), and the reference elsewhere, as well as
for shapes and dtypes that the kernel does not support. `implementation="pallas"` and `"xla"` force one of them.

All take any leading batch; `vmap` over rows extends the batch; custom derivatives are made of the same operations.
On a mesh, call them inside `jax.shard_map`: the compiler cannot split a kernel over devices.
"""

import functools
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.custom_derivatives import zero_from_primal
from jaxtyping import Array, Float, Int

from jaxsae import codes
from jaxsae._core import chunking, sparse
from jaxsae._core.linalg import EXACT, divide, result_type
from jaxsae._core.linear import linear
from jaxsae.codes import SparseCode
from jaxsae.least_squares import implicit, problems, solvers
from jaxsae.least_squares.bounds import of_sign
from jaxsae.least_squares.kernels import choice

__all__ = ["gather_decode", "gather_gram", "refit_fused", "scatter_rows"]


class _Static(NamedTuple):
    """Static arguments of a call."""

    implementation: str | None
    nonnegative: bool = True


def gather_gram(
    dictionary: Float[Array, "m d"],
    indices: Int[Array, "*b k"],
    y: Float[Array, "*b d"],
    *,
    implementation: str | None = None,
) -> tuple[Float[Array, "*b k k"], Float[Array, "*b k"]]:
    """Gram matrix and correlations of each row's atoms: `G = AAᵀ`, `c = Ay`, with `A = D[indices]`.

    Args:
      dictionary: `[m d]`, one atom per row.
      indices: `[*b k]`; a slot out of range, such as `m` or −1, is unused, and has zeros in `G` and `c`.
      y: targets `[*b d]`.
      implementation: "xla", "pallas", or None for the one that was measured to be faster.

    Returns:
      `G [*b k k]` and `c [*b k]`, in float32 or better.

    Raises:
      ValueError: at trace time, if shapes do not fit together, or there is no such implementation.
      NotImplementedError: before it runs, if `implementation="pallas"` and no kernel applies.

    Example:
      >>> import jax.numpy as jnp
      >>> from jaxsae import kernels
      >>> G, c = kernels.gather_gram(jnp.eye(3), jnp.array([2, 0, 3]), jnp.array([1.0, 2.0, 3.0]))
      >>> G.tolist(), c.tolist()
      ([[1.0, 0.0, 0.0], [0.0, 1.0, 0.0], [0.0, 0.0, 0.0]], [3.0, 1.0, 0.0])
    """
    _validate("gather_gram", dictionary, indices, implementation, y=(y, dictionary.shape[1:]))
    return _gather_gram(_Static(implementation), (dictionary,), indices, y)


def refit_fused(
    dictionary: Float[Array, "m d"],
    indices: Int[Array, "*b k"],
    y: Float[Array, "*b d"],
    z0: Float[Array, "*b k"],
    *,
    nonnegative: bool = True,
    ridge: float | Float[Array, ""] = 0.0,
    tol: float | Float[Array, ""] = 1e-5,
    max_steps: int | Int[Array, ""] = 2000,
    implementation: str | None = None,
) -> tuple[Float[Array, "*b k"], Float[Array, "*b"], Int[Array, "*b"]]:
    """Gather, Gram matrix and FISTA in one pass: the values of the atoms that are active in each row.

        minimise ½‖y − Σᵢ zᵢ D[indicesᵢ]‖² + ½ ridge ‖z‖²,   z ≥ 0

    The arithmetic is that of `refit` with `FISTA`, without the second pass of `refit` for rows with visible rounding or
    with atoms too large or too small to square. A row that is not finite is returned unchanged, with a residual of NaN.
    Derivatives with respect to `dictionary`, `y` and `ridge` are implicit, on the active set.

    Args:
      dictionary: `[m d]`, one atom per row.
      indices: `[*b k]`; a slot out of range, such as `m` or −1, is unused.
      y: targets `[*b d]`.
      z0: starting values `[*b k]`.
      nonnegative: constrain `z ≥ 0`.
      ridge: weight of `½‖z‖²`, in the units of the atoms' squared norm.
      tol: stop a row when its KKT residual is at most this.
      max_steps: stop a row after this many steps.
      implementation: "xla", "pallas", or None for the one that was measured to be faster.

    Returns:
      Values `[*b k]` in the dtype of `z0`, relative KKT residuals `[*b]`, and steps `[*b]` int32.

    Raises:
      ValueError, NotImplementedError: as for `gather_gram`.

    Example:
      >>> import jax.numpy as jnp
      >>> from jaxsae import kernels
      >>> D = jnp.array([[1.0, 0.0], [0.6, 0.8]])
      >>> z, kkt, steps = kernels.refit_fused(D, jnp.arange(2), jnp.array([2.2, 1.6]), jnp.zeros(2))
      >>> jnp.round(z, 3)
      Array([1., 2.], dtype=float32)
    """
    rows_of = {"y": (y, dictionary.shape[1:]), "z0": (z0, indices.shape[-1:])}
    _validate("refit_fused", dictionary, indices, implementation, **rows_of)
    ridge = jnp.asarray(ridge, problems.accumulator(dictionary, y))
    numbers = ridge, jnp.asarray(tol, ridge.dtype), jnp.asarray(max_steps, jnp.int32)
    static = _Static(implementation, nonnegative)
    return _refit_fused(static, (dictionary, numbers), indices, y, z0)


def gather_decode(
    dictionary: Float[Array, "m d"],
    indices: Int[Array, "*b k"],
    values: Float[Array, "*b k"],
    *,
    implementation: str | None = None,
) -> Float[Array, "*b d"]:
    """Sum the atoms of each row, weighted: `Σᵢ valuesᵢ D[indicesᵢ]`, accumulated in float32 or better.

    `codes.decode` is the same for a `SparseCode`.

    Args:
      dictionary: `[m d]`, one atom per row.
      indices: `[*b k]`; a slot out of range, such as `m` or −1, is unused.
      values: `[*b k]`.
      implementation: "xla", "pallas", or None for the one that was measured to be faster.

    Returns:
      `[*b d]`, in the dtype that the values and the dictionary promote to.

    Raises:
      ValueError, NotImplementedError: as for `gather_gram`.

    Example:
      >>> import jax.numpy as jnp
      >>> from jaxsae import kernels
      >>> kernels.gather_decode(jnp.eye(3), jnp.array([2, 0]), jnp.array([3.0, 1.0]))
      Array([1., 0., 3.], dtype=float32)
    """
    _validate("gather_decode", dictionary, indices, implementation, values=(values, indices.shape[-1:]))
    return sparse.form("rows", dictionary, values, indices, m=len(dictionary), implementation=implementation)


def scatter_rows(
    indices: Int[Array, "*b k"],
    left: Float[Array, "*b k r"],
    right: Float[Array, "*b r d"],
    *,
    num_latents: int,
    implementation: str | None = None,
) -> Float[Array, "m d"]:
    """Sum outer products into the rows of their latents: the gradient of a dictionary.

        out[j] = Σ left[n, i] · right[n]   over the rows n and slots i with indices[n, i] = j

    The gradient of `gather_decode` has rank `r = 1`, `z x̄ᵀ` (`codes.scatter_add`); that of a refit has rank 2,
    `u rᵀ − z (Aᵀu)ᵀ`.

    Args:
      indices: `[*b k]`; a slot out of range, such as `m` or −1, is unused.
      left: `[*b k r]`.
      right: `[*b r d]`.
      num_latents: `m`.
      implementation: "xla", "pallas", or None for the one that was measured to be faster.

    Returns:
      `[m d]`, in the dtype that `left` and `right` promote to, float32 or better.

    Raises:
      ValueError, NotImplementedError: as for `gather_gram`.

    Example:
      >>> import jax.numpy as jnp
      >>> from jaxsae import kernels
      >>> left, right = jnp.array([[3.0], [1.0]]), jnp.array([[1.0, 2.0]])
      >>> kernels.scatter_rows(jnp.array([2, 0]), left, right, num_latents=3).tolist()
      [[1.0, 2.0], [0.0, 0.0], [3.0, 6.0]]
    """
    choice.check_implementation("scatter_rows", implementation)
    expected = *indices.shape[:-1], *left.shape[-1:]
    if left.shape[:-1] != indices.shape or right.shape[:-1] != expected:
        raise ValueError(
            f"`scatter_rows` got left {left.shape} and right {right.shape} for indices {indices.shape}; pass "
            f"left of shape {(*indices.shape, 'r')} and right of shape {(*indices.shape[:-1], 'r', 'd')}."
        )
    values = jnp.moveaxis(left, -1, -2)  # each rank-one term is another row with the same support
    repeated = jnp.broadcast_to(indices[..., None, :], values.shape)
    return sparse.form("atoms", values, right, repeated, m=num_latents, implementation=implementation)


def solve(
    dictionary: Array, indices: Array, y: Array, z0: Array, ridge: Array, tol, max_steps, nonnegative: bool,
    implementation: str | None = None,
) -> problems.Solved:  # fmt: skip
    """FISTA on the unit-free problems of `n` rows, for `refit_fused` and `refit`."""
    indices = _slots(indices, len(dictionary))

    def by_kernel(kernel, options):
        _, scale, norm = problems.scaled(y.astype(ridge.dtype))
        arguments = dictionary, indices, y, scale, norm, z0, ridge, tol, max_steps
        x, square, warm_started, kkt, steps = kernel.solve(*arguments, nonnegative=nonnegative, **options)
        _, unit, _, finite = problems.measure(square, sparse.used(indices, len(dictionary)), scale, norm, ridge)
        return problems.Solved(x, unit, finite, warm_started, kkt, steps)

    def by_xla():
        def chunk(indices, y, z0):
            y, z0, m = y.astype(ridge.dtype), z0.astype(ridge.dtype), len(dictionary)
            problem = problems.problems(dictionary, y, indices, num_latents=m, ridge=ridge)
            return problems.solved(solvers.FISTA(tol=tol, max_steps=max_steps), problem, z0, of_sign(nonnegative))

        row_bytes = 2 * problems.row_bytes(indices.shape[1], y.shape[1], ridge.dtype.itemsize)
        return chunking.map_chunks(chunk, indices, y, z0, batch=indices.shape[:1], row_bytes=row_bytes)

    shape = dictionary.shape[1], indices.shape[-1]
    return choice.choose("refit_fused", implementation, *shape, dictionary.dtype, by_kernel, by_xla, len(indices))


# --- Choice of implementation


def _validate(name: str, dictionary, indices, implementation, **rows_of) -> None:
    choice.check_implementation(name, implementation)
    if not problems.is_array(dictionary) or dictionary.ndim != 2:
        shape = getattr(dictionary, "shape", type(dictionary).__name__)
        raise ValueError(
            f"`{name}` got a dictionary of shape {shape}; pass an array of shape (m, d), one atom per row."
        )
    for what, (x, last) in rows_of.items():
        if x.shape != (*indices.shape[:-1], *last):
            raise ValueError(
                f"`{name}` got {what} of shape {x.shape} for indices {indices.shape} and a dictionary "
                f"{dictionary.shape}; pass {what} of shape {(*indices.shape[:-1], *last)}."
            )


def _slots(indices: Array, m: int) -> Array:
    """Indices in `[0, m]`, as kernels take them: `m` for indices out of range."""
    return jnp.where(sparse.used(indices, m), indices, m)


def _bucket(n: int) -> int:
    """Number of rows to compile for, rounded up so that batches of similar size share a program."""
    step = max(128, 1 << max((n - 1).bit_length() - 3, 0))
    return math.ceil(n / step) * step


def _flat(batch: tuple[int, ...], *arrays: Array) -> tuple[int, list[Array]]:
    n = math.prod(batch)
    return n, [x.reshape(n, *x.shape[len(batch) :]) for x in arrays]


def _over_rows(f) -> Callable[..., Any]:
    """Extend a function of static arguments, shared arguments and `n` rows to any leading batch and `vmap`.

    Where a kernel may be used, rows are padded to a bucket before compilation; padding rows have no support.
    """
    jitted = jax.jit(f, static_argnums=0)

    @functools.cache
    def folded(static):
        def call(shared, per_row):
            indices, *others = per_row
            batch = indices.shape[:-1]
            m = shared[0].shape[0]
            n, flat = _flat(batch, _slots(indices, m), *others)
            size = n if static.implementation == "xla" or choice.device()[0] not in choice.PLATFORMS else _bucket(n)
            flat = [chunking.pad_rows(x, size, 0 if i else m) for i, x in enumerate(flat)]
            outputs = jitted(static, shared, *flat)
            return jax.tree.map(lambda x: x[:n].reshape(*batch, *x.shape[1:]), outputs)

        return chunking.fold_vmap(call)

    return lambda static, shared, *per_row: folded(static)(shared, per_row)


# --- The operations, with their derivatives


@_over_rows
def _gram_rows(static: _Static, shared, indices, y):
    (dictionary,), (n, k) = shared, indices.shape
    d, dtype = dictionary.shape[1], problems.accumulator(dictionary, y)

    def by_kernel(kernel, options):
        return _masked(dictionary, indices, kernel.gather_gram(dictionary, indices, y, **options))

    def by_xla():
        def chunk(indices, y):
            products = problems.gather_products(dictionary, y.astype(dtype), indices, num_latents=len(dictionary))
            return _masked(dictionary, indices, products)

        row_bytes = problems.row_bytes(k, d, dtype.itemsize)
        return chunking.map_chunks(chunk, indices, y, batch=(n,), row_bytes=row_bytes)

    return choice.choose("gather_gram", static.implementation, d, k, dictionary.dtype, by_kernel, by_xla, n)


def _masked(dictionary, indices, products):
    G, c = products
    on = sparse.used(indices, len(dictionary))
    return jnp.where(on[:, :, None] & on[:, None, :], G, 0), jnp.where(on, c, 0)


_gather_gram = jax.custom_jvp[Any](_gram_rows, nondiff_argnums=(0,))


@_gather_gram.defjvp
def _gather_gram_tangent(static: _Static, primals, tangents):
    """`Ġ = ȦAᵀ + AȦᵀ`, `ċ = Ȧy + Aẏ`."""
    ((dictionary,), indices, y), ((dictionary_dot,), _, y_dot) = primals, tangents
    products = _gather_gram(static, *primals)
    dots = dictionary_dot, y_dot
    return products, linear(_gram_forward, _gram_backward, static, (dictionary, indices, y), dots)


def _gram_forward(static: _Static, residuals, dots):
    (dictionary, indices, y), m = residuals, len(residuals[0])
    dtype = problems.accumulator(dictionary, y)

    def chunk(_, indices, y, y_dot):
        on = sparse.used(indices, m)[:, :, None]
        A, A_dot = (jnp.where(on, problems.take(D, indices, m, dtype), 0) for D in (dictionary, dots[0]))
        half = jnp.einsum("nid,njd->nij", A_dot, A, precision=EXACT)
        c_dot = [jnp.einsum("nkd,nd->nk", A, x.astype(dtype), precision=EXACT) for A, x in ((A_dot, y), (A, y_dot))]
        return None, (half + jnp.swapaxes(half, 1, 2), sum(c_dot))

    return _scan_rows(chunk, None, dictionary, indices, y, dots[1])[1]


def _scan_rows(chunk, carry, dictionary, indices, y, *others):
    row_bytes = 2 * problems.row_bytes(indices.shape[-1], y.shape[-1], problems.accumulator(dictionary, y).itemsize)
    return chunking.scan_chunks(chunk, carry, indices, y, *others, batch=indices.shape[:-1], row_bytes=row_bytes)


def _gram_backward(static: _Static, residuals, cotangents):
    """`Ā = (Ḡ + Ḡᵀ) A + c̄ yᵀ`, `ȳ = Aᵀc̄`."""
    (dictionary, indices, y), m = residuals, len(residuals[0])
    dtype = problems.accumulator(dictionary, y)

    def chunk(total, indices, y, gram_bar, c_bar):
        on = sparse.used(indices, m)
        atoms = jnp.where(on[:, :, None], problems.take(dictionary, indices, m, dtype), 0)
        symmetric = gram_bar + jnp.swapaxes(gram_bar, 1, 2)
        bar = jnp.einsum("nij,njd->nid", symmetric, atoms, precision=EXACT)
        bar = bar + c_bar[:, :, None] * y.astype(dtype)[:, None, :]
        return problems.accumulate(total, dictionary, indices, m, on, bar), None

    total = problems.zero_cotangent(dictionary, dtype)
    ((total,), _) = _scan_rows(chunk, total, dictionary, indices, y, *cotangents)
    y_bar = codes.decode(dictionary, SparseCode(cotangents[1], indices, m), implementation=static.implementation)
    return total.astype(dictionary.dtype), y_bar.astype(y.dtype)


@_over_rows
def _refit_rows(static: _Static, shared, indices, y, z0):
    dictionary, (ridge, tol, max_steps) = shared
    nonnegative = static.nonnegative
    found = solve(dictionary, indices, y, z0, ridge, tol, max_steps, nonnegative, static.implementation)
    finite = found.finite & sparse.finite_rows(z0, indices, len(dictionary))
    start = jax.nn.relu(z0) if nonnegative else z0
    moved = ((found.steps > 0) | ~found.warm_started)[:, None] | (found.unit == 0)
    z = jnp.where(moved, divide(found.x, found.unit).astype(z0.dtype), start)
    z = jnp.where(finite[:, None], z, z0)
    return z, jnp.where(finite, found.kkt, jnp.nan), jnp.where(finite, found.steps, 0)


_refit_fused = jax.custom_jvp[Any](_refit_rows, nondiff_argnums=(0,))


@functools.partial(_refit_fused.defjvp, symbolic_zeros=True)
def _refit_fused_tangent(static: _Static, primals, tangents):
    (dictionary, (ridge, *_)), indices, y, _ = primals
    (dictionary_dot, (ridge_dot, *_)), _, y_dot, _ = tangents
    z, kkt, steps = _refit_fused(static, *primals)
    refitted = implicit.Refitted(dictionary, y, indices, z, ridge, jnp.isfinite(kkt))
    known = implicit.Static(static.nonnegative, len(dictionary))
    z_dot = implicit.values_dot(known, refitted, dictionary_dot, y_dot, ridge_dot)
    return (z, kkt, steps), (z_dot, *zero_from_primal((kkt, steps)))


# --- The kernels of `codes.decode` and `codes.scatter_add`, used where they were measured to be faster


def _decode(by_xla, dictionary, values, indices, *, m: int, implementation: str | None):
    choice.check_implementation("decode", implementation)
    (*batch, k), d = indices.shape, dictionary.shape[1]

    def by_kernel(kernel, options):
        _, flat = _flat(tuple(batch), _slots(indices, m), values)
        decode = jax.custom_batching.sequential_vmap(functools.partial(kernel.gather_decode, **options))
        return decode(dictionary, *flat).reshape(*batch, d).astype(result_type(values, dictionary))

    return choice.choose("decode", implementation, d, k, dictionary.dtype, by_kernel, by_xla, math.prod(batch))


def _scatter_add(by_xla, values, x, indices, *, m: int, implementation: str | None, total: Array | None = None):
    choice.check_implementation("scatter_add", implementation)
    *batch, k = indices.shape

    def by_kernel(kernel, options):
        _, (slots, left, right) = _flat(tuple(batch), _slots(indices, m), values, x)
        order = sparse.by_latent(slots, m)
        places = slots.ravel()[order], order // k, left.reshape(-1, 1)[order], right[:, None, :]
        found = jax.custom_batching.sequential_vmap(functools.partial(kernel.scatter_sorted, m=m, **options))(*places)
        return found if total is None else total + found

    return choice.choose("scatter_add", implementation, x.shape[-1], k, x.dtype, by_kernel, by_xla, math.prod(batch))


sparse.KERNELS.update(rows=_decode, atoms=_scatter_add)


def applies(dictionary: Any, indices: Array, y: Array, values: Array) -> bool:
    """Whether `refit_fused` runs a kernel by default, so that `refit` should use it."""
    if not problems.is_array(dictionary) or any(x.dtype != jnp.float32 for x in (y, values)):
        return False
    d, slots = dictionary.shape[1], indices.shape[-1]
    if indices.size == 0 or choice.kernel("refit_fused", None, d, slots, dictionary.dtype) is None:
        return False
    scalars = jnp.zeros((), jnp.float32), jnp.zeros((), jnp.float32), jnp.zeros((), jnp.int32)
    flat = [x.reshape(-1, x.shape[-1]) for x in (indices, y, values)]
    try:
        jax.eval_shape(functools.partial(solve, nonnegative=True, implementation="pallas"), dictionary, *flat, *scalars)
    except NotImplementedError:
        return False
    return True
