"""Operations on the `k` active rows of a dictionary, each by one read of them where there is a kernel for it.

    gather_gram    G = AAᵀ, c = Ay of each row, with A = D[indices]
    refit_fused    argmin ½‖y − Aᵀz‖² + ½ ridge ‖z‖² over z ≥ 0, by FISTA

Each has a reference that XLA compiles everywhere (`reference`), and kernels for TPUs (`tpu`) and GPUs (`gpu`). By
default the kernel answers where it was measured on this very kind of device to be worth it (`tuning`), and the
reference wherever the kernel does not apply to a shape or dtype. `implementation="pallas"` and `"xla"` insist.

All take any leading batch; `vmap` over rows widens the batch; derivatives are our own, and made of the same operations.
On a mesh, call them inside `jax.shard_map`: a compiler cannot divide a kernel by itself.
"""

import functools
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from jaxsae import codes
from jaxsae._core import chunking, sparse
from jaxsae._core.linalg import EXACT, divide, promoted
from jaxsae.codes import SparseCode
from jaxsae.least_squares import implicit, problems
from jaxsae.least_squares.kernels import choice, reference

__all__ = ["gather_gram", "refit_fused"]


class _Static(NamedTuple):
    """What a call is compiled for."""

    op: str
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
      dictionary: `[m d]`, one atom a row.
      indices: `[*b k]`; a slot out of range, such as `m` or −1, is not in use, and has zeros in `G` and `c`.
      y: targets `[*b d]`.
      implementation: "xla" or "pallas", or None for what was measured to be best.

    Returns:
      `G [*b k k]` and `c [*b k]`, in float32 or better.

    Raises:
      ValueError: at trace time, if shapes do not fit together, or there is no such implementation.
      NotImplementedError: at trace time, if `implementation="pallas"` and no kernel applies.

    Example:
      >>> import jax.numpy as jnp
      >>> from jaxsae import kernels
      >>> G, c = kernels.gather_gram(jnp.eye(3), jnp.array([2, 0, 3]), jnp.array([1.0, 2.0, 3.0]))
      >>> G.tolist(), c.tolist()
      ([[1.0, 0.0, 0.0], [0.0, 1.0, 0.0], [0.0, 0.0, 0.0]], [3.0, 1.0, 0.0])
    """
    _validate("gather_gram", dictionary, indices, implementation, y=(y, dictionary.shape[1:]))
    return _gather_gram(_Static("gather_gram", implementation), dictionary, indices, y)


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

    The arithmetic is that of `refit` with `FISTA`, without what `refit` does for rows in which rounding shows, or whose
    atoms are too large or too small to square. A row that is not finite comes back as it was, with a residual of NaN.
    The derivative in `dictionary`, `y` and `ridge` is the implicit one on the active set.

    Args:
      dictionary: `[m d]`, one atom a row.
      indices: `[*b k]`; a slot out of range, such as `m` or −1, is not in use.
      y: targets `[*b d]`.
      z0: starting values `[*b k]`.
      nonnegative: constrain `z ≥ 0`.
      ridge: weight of `½‖z‖²`, in the units of the atoms' squared norm.
      tol: stop a row when its KKT residual is at most this.
      max_steps: stop a row after this many steps.
      implementation: "xla" or "pallas", or None for what was measured to be best.

    Returns:
      Values `[*b k]` in the dtype of `z0`, relative KKT residuals `[*b]`, and steps `[*b]` int32.

    Raises:
      ValueError, NotImplementedError: as `gather_gram`.

    Example:
      >>> import jax.numpy as jnp
      >>> from jaxsae import kernels
      >>> D = jnp.array([[1.0, 0.0], [0.6, 0.8]])
      >>> z, kkt, steps = kernels.refit_fused(D, jnp.arange(2), jnp.array([2.2, 1.6]), jnp.zeros(2))
      >>> jnp.round(z, 3)
      Array([1., 2.], dtype=float32)
    """
    _validate(
        *("refit_fused", dictionary, indices, implementation),
        y=(y, dictionary.shape[1:]),
        z0=(z0, indices.shape[-1:]),
    )
    ridge = jnp.asarray(ridge, problems.accumulator(dictionary, y))
    numbers = ridge, jnp.asarray(tol, ridge.dtype), jnp.asarray(max_steps, jnp.int32)
    static = _Static("refit_fused", implementation, nonnegative=nonnegative)
    return _refit_fused(static, dictionary, indices, y, z0, numbers)


def solve(
    dictionary: Array, indices: Array, y: Array, z0: Array, ridge: Array, tol, max_steps, nonnegative: bool,
    implementation: str | None = None,
) -> problems.Solved:  # fmt: skip
    """FISTA on the problems of `n` rows, free of units: what `refit_fused` and `refit` are made of."""
    indices = _slots(indices, len(dictionary))

    def by_kernel(kernel, options):
        _, scale, norm = problems.scaled(y.astype(ridge.dtype))
        arguments = dictionary, indices, y, scale, norm, z0, ridge, tol, max_steps
        x, square, usable, kkt, steps = kernel.solve(*arguments, nonnegative=nonnegative, **options)
        _, units = problems.measure(square, sparse.used(indices, len(dictionary)), scale, norm, ridge)
        return problems.Solved(x, units.unit, units.finite, usable, kkt, steps)

    def by_xla():
        return reference.solve(dictionary, indices, y, z0, ridge, tol, max_steps, nonnegative=nonnegative)

    shape = dictionary.shape[1], indices.shape[-1]
    return choice.choose("refit_fused", implementation, *shape, dictionary.dtype, by_kernel, by_xla, len(indices))


# --- Which implementation answers


def _validate(name: str, dictionary, indices, implementation, **rows_of) -> None:
    choice.check_implementation(name, implementation)
    if not problems.is_array(dictionary) or dictionary.ndim != 2:
        shape = getattr(dictionary, "shape", type(dictionary).__name__)
        raise ValueError(f"`{name}` got a dictionary of shape {shape}; pass an array of shape (m, d), one atom a row.")
    for what, (x, last) in rows_of.items():
        if x.shape != (*indices.shape[:-1], *last):
            raise ValueError(
                f"`{name}` got {what} of shape {x.shape} for indices {indices.shape} and a dictionary "
                f"{dictionary.shape}; pass {what} of shape {(*indices.shape[:-1], *last)}."
            )


def _slots(indices: Array, m: int) -> Array:
    """Indices in `[0, m]`, as kernels take them: `m` for whatever is out of range."""
    return jnp.where(sparse.used(indices, m), indices, m)


def _bucket(n: int) -> int:
    """Rows to compile for: so that a batch that is a little larger or smaller meets a program that is there."""
    step = max(128, 1 << max((n - 1).bit_length() - 3, 0))
    return math.ceil(n / step) * step


def _flat(batch: tuple[int, ...], *arrays: Array) -> tuple[int, list[Array]]:
    n = math.prod(batch)
    return n, [x.reshape(n, *x.shape[len(batch) :]) for x in arrays]


def _over_rows(f) -> Callable[..., Any]:
    """A function of a static, of what rows share and of `n` rows, over any leading batch and `vmap`.

    Where a kernel is to be used rows are padded to a bucket before anything is compiled; padding rows have no support.
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
            if size != n:
                flat = [
                    jnp.pad(x, ((0, size - n), *((0, 0),) * (x.ndim - 1)), constant_values=m if i == 0 else 0)
                    for i, x in enumerate(flat)
                ]
            outputs = jitted(static, shared, *flat)
            return jax.tree.map(lambda x: x[:n].reshape(*batch, *x.shape[1:]), outputs)

        return chunking.fold_vmap(call)

    return lambda static, shared, *per_row: folded(static)(shared, per_row)


# --- The operations, with their derivatives


@_over_rows
def _gram_rows(static: _Static, shared, indices, y):
    (dictionary,) = shared
    return choice.choose(
        *(static.op, static.implementation, dictionary.shape[1], indices.shape[1], dictionary.dtype),
        lambda kernel, options: _masked(dictionary, indices, kernel.gather_gram(dictionary, indices, y, **options)),
        lambda: reference.gather_gram(dictionary, indices, y),
        len(indices),
    )


def _masked(dictionary, indices, products):
    G, c = products
    on = sparse.used(indices, len(dictionary))
    return jnp.where(on[:, :, None] & on[:, None, :], G, 0), jnp.where(on, c, 0)


def _gather_gram_primal(static: _Static, dictionary, indices, y):
    return _gram_rows(static, (dictionary,), indices, y)


def _gather_gram_forward(static, dictionary, indices, y):
    return _gather_gram(static, dictionary, indices, y), (dictionary, indices, y)


def _gather_gram_backward(static: _Static, residuals, cotangents):
    """`Ā = (Ḡ + Ḡᵀ) A + c̄ yᵀ`, `ȳ = Aᵀc̄`."""
    dictionary, indices, y = residuals
    (m, d), k = dictionary.shape, indices.shape[-1]
    dtype = problems.accumulator(dictionary, y)

    def chunk(total, indices, y, gram_bar, c_bar):
        on = sparse.used(indices, m)
        atoms = jnp.where(on[:, :, None], problems.take(dictionary, indices, m, dtype), 0)
        symmetric = gram_bar + jnp.swapaxes(gram_bar, 1, 2)
        bar = jnp.einsum("nij,njd->nid", symmetric, atoms, precision=EXACT)
        bar = bar + c_bar[:, :, None] * y.astype(dtype)[:, None, :]
        return problems.accumulate(total, dictionary, indices, m, on, bar), None

    total, _ = chunking.scan_chunks(
        chunk,
        problems.zero_cotangent(dictionary, dtype),
        *(indices, y, *cotangents),
        batch=indices.shape[:-1],
        row_bytes=2 * problems.row_bytes(k, d, jnp.dtype(dtype).itemsize),
    )
    y_bar = codes.decode(dictionary, SparseCode(cotangents[1], indices, m), implementation=static.implementation)
    return problems.cotangent(total, dictionary), None, y_bar.astype(y.dtype)


_gather_gram = jax.custom_vjp[Any](_gather_gram_primal, nondiff_argnums=(0,))
_gather_gram.defvjp(_gather_gram_forward, _gather_gram_backward)


@_over_rows
def _refit_rows(static: _Static, shared, indices, y, z0):
    dictionary, (ridge, tol, most) = shared
    nonnegative = static.nonnegative
    found = solve(dictionary, indices, y, z0, ridge, tol, most, nonnegative, static.implementation)
    finite = found.finite & (jnp.isfinite(z0) | ~sparse.used(indices, len(dictionary))).all(1)
    start = jax.nn.relu(z0) if nonnegative else z0
    moved = ((found.steps > 0) | ~found.usable)[:, None] | (found.unit == 0)
    z = jnp.where(moved, divide(found.x, found.unit).astype(z0.dtype), start)
    return (
        jnp.where(finite[:, None], z, z0),
        jnp.where(finite, found.kkt, jnp.nan),
        jnp.where(finite, found.steps, 0),
    )


def _refit_fused_primal(static: _Static, dictionary, indices, y, z0, numbers):
    return _refit_rows(static, (dictionary, numbers), indices, y, z0)


def _refit_fused_forward(static, dictionary, indices, y, z0, numbers):
    outputs = _refit_fused(static, dictionary, indices, y, z0, numbers)
    return outputs, (dictionary, indices, y, *outputs[:2], numbers)


def _refit_fused_backward(static: _Static, residuals, cotangents):
    dictionary, indices, y, z, kkt, numbers = residuals
    bars = implicit.backward(
        *(dictionary, y, indices, z, cotangents[0], numbers[0], jnp.isfinite(kkt)),
        nonnegative=static.nonnegative,
        num_latents=len(dictionary),
        workspace_bytes=chunking.SCRATCH,
    )
    return bars.dictionary, None, bars.y, None, (bars.ridge, None, None)


_refit_fused = jax.custom_vjp[Any](_refit_fused_primal, nondiff_argnums=(0,))
_refit_fused.defvjp(_refit_fused_forward, _refit_fused_backward)


# --- What `codes.decode` and `codes.scatter_add` run where it was measured to be worth it


def _decode(by_xla, dictionary, values, indices, *, m: int, implementation: str | None):
    choice.check_implementation("decode", implementation)
    (*batch, k), d = indices.shape, dictionary.shape[1]

    def by_kernel(kernel, options):
        _, flat = _flat(tuple(batch), _slots(indices, m), values)
        decode = jax.custom_batching.sequential_vmap(functools.partial(kernel.gather_decode, **options))
        return decode(dictionary, *flat).reshape(*batch, d).astype(promoted(values, dictionary))

    return choice.choose("decode", implementation, d, k, dictionary.dtype, by_kernel, by_xla, math.prod(batch))


def _scatter_add(by_xla, values, x, indices, *, m: int, implementation: str | None):
    choice.check_implementation("scatter_add", implementation)
    *batch, k = indices.shape

    def by_kernel(kernel, options):
        _, (slots, left, right) = _flat(tuple(batch), _slots(indices, m), values, x)
        order = sparse.by_latent(slots, m)
        places = slots.ravel()[order], order // k, left.reshape(-1, 1)[order], right[:, None, :]
        return jax.custom_batching.sequential_vmap(functools.partial(kernel.scatter_sorted, m=m, **options))(*places)

    return choice.choose("scatter_add", implementation, x.shape[-1], k, x.dtype, by_kernel, by_xla, math.prod(batch))


sparse.KERNELS.update(rows=_decode, atoms=_scatter_add)


def applies(dictionary: Any, indices: Array, y: Array, values: Array) -> bool:
    """Whether `refit_fused` would run a kernel by default, and so a refit had better be made of it."""
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
