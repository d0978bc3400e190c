"""Shared parts of the pursuits: unit-free rows, chunks of them, and the final refit.

A selection chooses, for each row, the slots of a code and starting values; `pursue` does the rest. A selection gets
atoms and targets of norm 1, with rows of zeros in place of those that are zero or not finite.
"""

import dataclasses
import functools
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.custom_derivatives import zero_from_primal
from jaxtyping import Array, Float

from jaxsae import sharding
from jaxsae._core import chunking, pytrees
from jaxsae._core.linalg import EXACT, as_array, divide, result_type, sq_norm
from jaxsae.codes import SparseCode, decode, from_dense
from jaxsae.least_squares import implicit, problems
from jaxsae.least_squares.outcome import RefitInfo, Status
from jaxsae.least_squares.refit import estimate, refit
from jaxsae.least_squares.solvers import FISTA, ConjugateGradient
from jaxsae.pursuit import atoms

_GRAM_BYTES = 4 << 20  # largest Gram matrix to form: larger ones do not stay in the cache
_SOLVER = ConjugateGradient(tol=1e-6, max_steps=256, fallback=None)


class Method(NamedTuple):
    """A selection, with its static arguments."""

    name: str
    select: Callable[["Problem"], "Chosen"]
    k: int
    nonnegative: bool
    refits: bool = True
    greedy: bool = False  # chooses one atom at a time, and so can search a dictionary that it does not copy
    by_gram: Callable[["Problem"], "Chosen"] | None = None  # a faster `select`, of which some rows may not end


class Problem(NamedTuple):
    """Unit-free rows to represent: atoms and targets have norm 1, or are 0 where they are zero or not finite."""

    D: Any  # [m d], or `atoms.Atoms`
    y: Array  # [n d]
    tol: Array  # [n]
    max_atoms: Array  # [n]  most atoms of each row
    k: int
    nonnegative: bool
    options: dict[str, Any]
    mask: Array | None  # [n d]  1 where a target is known; None if all are known


@pytrees.dataclass
class Masked:
    """The masked atoms of each row: index `row · m + atom` is `mask[row] * D[atom]`."""

    D: Float[Array, "m d"]
    mask: Float[Array, "n d"]

    def take(self, indices):
        """Masked atoms."""
        return self.D[indices % len(self.D)] * self.mask[indices // len(self.D)]


class Chosen(NamedTuple):
    """The result of a selection, for `n` rows."""

    values: Array  # [n k]  for atoms of norm 1; the refit starts there
    indices: Array  # [n k]
    steps: Array  # [n]
    ended: Array  # [n]  whether the row converged, rather than stopping at `max_steps`
    gradient: Array | None = None  # [n k]  for atoms of norm 1; None if the values are not refitted yet
    kkt: Array | None = None  # [n]  of the gradient, for atoms as they are


def pursue(
    method: Method, D: Any, y: Array, tol: Any, max_atoms: Any, options: Any = None, mask: Array | None = None
) -> tuple[SparseCode, RefitInfo]:
    """Select atoms, then refit their values, or only compute their KKT residual if the method does not refit."""
    D, y = _validated(D, y, method)
    if mask is not None:
        if not problems.is_array(D):
            raise TypeError(f"`{method.name}` got a mask and a dictionary of type {type(D).__name__}; pass an array.")
        y, mask = jnp.where(mask, y, 0), mask.astype(D.dtype)
    max_atoms = method.k if max_atoms is None else max_atoms
    _check_options(method, tol, max_atoms, options or {})
    tol = chunking.spread(tol, y.shape[:-1], problems.accumulator(D, y))
    max_atoms = chunking.spread(max_atoms, y.shape[:-1], np.int32)
    options = jax.tree.map(lambda x: _number(x, tol.dtype), options or {})
    if mask is None and _gram_fits(method, D, tol.dtype):
        return _pursue_by_gram(method, D, y, tol, max_atoms)
    return _pursue(method, D, y, tol, max_atoms, options, mask)


def _pursue(method: Method, D: Any, y: Array, tol: Any, max_atoms: Any, options: Any, mask: Array | None):
    chosen, broken = _select(method, *jax.lax.stop_gradient(((D, options), (y, tol, max_atoms, mask))))
    code = _code(D, y, chosen)
    solver = None if method.refits else FISTA(max_steps=0)  # computes the KKT residual, without changing the values
    dictionary, support = (D, code) if mask is None else _masked(D, code, mask)
    y = y if chunking.known_false(broken) else jnp.where(broken[..., None], 0, y)
    refitted, info = refit(dictionary, y, support, solver, nonnegative=method.nonnegative)
    info = _outcome(None, None, jax.lax.stop_gradient((chosen, broken, info)))
    return dataclasses.replace(code, values=refitted.values) if method.refits else code, info


@chunking.in_buckets
def _outcome(_static, _shared, per_row) -> RefitInfo:
    """The outcome of rows, from that of their selection and that of their refit."""
    chosen, broken, info = per_row
    status = jnp.where(chosen.ended, info.status, jnp.maximum(info.status, Status.MAX_STEPS))
    return _info(info.kkt, chosen.steps, status, broken)


def select_alone(method: Method, D: Any, y: Array, tol: Any) -> SparseCode:
    """The codes of rows `[n d]` as a method selects them, without a refit."""
    D, y = _validated(D, y, method)
    per_row = y, tol, jnp.full(tol.shape, method.k, jnp.int32)

    def select(*per_row):
        chosen, _ = _select(method, (D, {}), (*per_row, None))
        return _code(D, y, chosen)

    if not _gram_fits(method, D, tol.dtype):
        return select(*per_row)
    (code, _), left = _first_pass(method, D, per_row)
    row_bytes = problems.row_bytes(method.k, y.shape[1], tol.dtype.itemsize)
    return chunking.revise_rows(select, left, code, *per_row, row_bytes=row_bytes)


def _code(D: Any, y: Array, chosen: Chosen) -> SparseCode:
    values = chosen.values.astype(result_type(problems.dtype(D), y))
    return SparseCode(values, chosen.indices, atoms.count(D, y.shape[-1], y.dtype))


def _info(kkt: Array, steps: Array, status: Array, broken: Array) -> RefitInfo:
    return RefitInfo(
        kkt=jnp.where(broken, jnp.nan, kkt),
        steps=steps,
        status=jnp.where(broken, Status.NONFINITE, status).astype(jnp.int32),
    )


def _gram_fits(method: Method, D: Any, dtype) -> bool:
    """Whether a method can use a Gram matrix, and a small one saves work."""
    if method.by_gram is None or not problems.is_array(D):
        return False
    m, d = D.shape
    here = not jax.sharding.get_abstract_mesh().explicit_axes and not sharding.is_sharded(m)
    return here and 4 * method.k <= d and m * m * dtype.itemsize <= _GRAM_BYTES


def _pursue_by_gram(method: Method, D: Any, y: Array, tol: Any, max_atoms: Any) -> tuple[SparseCode, RefitInfo]:
    """Select by the Gram matrix; then, outside of transformations only if there are any, the rows that it leaves."""
    shared, per_row = jax.lax.stop_gradient((D, (y, tol, max_atoms)))
    outcome, left = _first_pass(method, shared, per_row)
    if not chunking.known_false(left):
        outcome = _second_pass(method, shared, (*per_row, outcome, left))
    code, info = outcome
    values = _differentiable(code.values, D, y, code.indices, info.status)
    return dataclasses.replace(code, values=values), info


@chunking.over_rows
def _first_pass(method: Method, D, per_row):
    """The outcome by the Gram matrix, and the rows that it leaves."""
    chosen, broken = _select(method._replace(select=method.by_gram), (D, {}), (*per_row, None))
    code = _code(D, per_row[0], chosen)
    normal = jnp.isfinite(code.values) & (jnp.abs(chosen.values) >= jnp.finfo(chosen.values.dtype).tiny)
    solved = chosen.ended & (normal | ~code.mask).all(-1)
    info = _info(chosen.kkt, chosen.steps, jnp.full(broken.shape, Status.CONVERGED), broken)
    return (code, info), ~(broken | solved)


@chunking.over_rows
def _second_pass(method: Method, D, per_row):
    """The outcome of the rows that are left, by the method itself, with a refit."""
    batch, (y, tol, max_atoms, outcome, left) = chunking.flatten(per_row)
    outcome = chunking.revise_rows(
        lambda y, tol, max_atoms: _pursue(method, D, y, tol, max_atoms, {}, None),
        *(left, outcome, y, tol, max_atoms),
        row_bytes=problems.row_bytes(method.k, y.shape[1], tol.dtype.itemsize),
    )
    return chunking.unflatten(batch, outcome)


@jax.custom_jvp
def _differentiable(values, D, y, indices, status):
    """Values that solve their least-squares problems, with the derivative of a refit."""
    return values


@functools.partial(_differentiable.defjvp, symbolic_zeros=True)
def _differentiable_tangent(primals, tangents):
    (values, D, y, indices, status), (_, D_dot, y_dot, _, _) = primals, tangents
    ridge = jnp.zeros((), problems.accumulator(D, y))
    refitted = implicit.Refitted(D, y, indices, values, ridge, status < Status.NONFINITE)
    known = implicit.Static(nonnegative=False, num_latents=len(D))
    return values, implicit.values_dot(known, refitted, D_dot, y_dot, zero_from_primal(ridge, symbolic_zeros=True))


def _masked(D: Array, code: SparseCode, mask: Array) -> tuple[Masked, SparseCode]:
    """The masked atoms of each row, and the code with their indices."""
    mask, m = mask.reshape(-1, mask.shape[-1]), code.num_latents
    first = m * jnp.arange(len(mask), dtype=jnp.int32).reshape(*code.indices.shape[:-1], 1)
    indices = jnp.where(code.mask, first + code.indices, m * len(mask))
    return Masked(D, mask), SparseCode(code.values, indices, m * len(mask))


def _check_options(method: Method, tol: Any, max_atoms: Any, options: dict[str, Any]) -> None:
    check = functools.partial(problems.check_numbers, method.name)
    check("tol", tol, do="a finite norm of at least 0")
    check("max_atoms", max_atoms, most=method.k, do=f"a number from 0 to k = {method.k}")
    check("max_steps", options.get("max_steps", 0), do="0 or more, finite")
    for what, most in (("relaxation", math.inf), ("false_alarm", 1.0)):
        if options.get(what) is not None:
            smallest = float(jnp.finfo(jnp.float32).tiny)
            check(what, options[what], least=smallest, most=most, do=f"a positive number{' up to 1' * (most == 1)}")


def _number(x: Any, dtype) -> Array:
    """A floating-point number in `dtype`; integers are unchanged."""
    x = jnp.asarray(x)
    return x.astype(dtype) if jnp.issubdtype(x.dtype, jnp.inexact) else x


def _validated(D: Any, y: Any, method: Method) -> tuple[Any, Array]:
    """The dictionary and the rows, as arrays if they are."""
    name, k = method.name, method.k
    if isinstance(D, np.memmap):
        D = jax.device_put(D, may_alias=True)  # on a CPU it is then read where it lies
    D, y = as_array(D) if problems.is_array(D) else D, as_array(y)
    if D.ndim != 2 if problems.is_array(D) else not (method.greedy and isinstance(D, atoms.Searchable)):
        also = ", or a pytree with methods take(indices) and correlate(residuals)" if method.greedy else ""
        raise TypeError(f"`{name}` got a dictionary of type {type(D).__name__}; pass an array of shape (m, d){also}.")
    D, y = problems.validate_rows(D, y, name)
    m = atoms.count(D, y.shape[-1], y.dtype)
    if not 1 <= k <= m:
        raise ValueError(f"`{name}` got k = {k} for {m} atoms; pass a k from 1 to {m}.")
    return D, y


@chunking.over_rows
def _select(method: Method, shared, per_row):
    """Run a method on unit-free rows, and scale its values back; and which rows are not finite."""
    (D, options), (y, tol, max_atoms, mask) = shared, per_row
    batch, y = y.shape[:-1], y.reshape(-1, y.shape[-1]).astype(tol.dtype)
    copy = not method.greedy or mask is not None or method.select is method.by_gram or atoms.copies(D, tol.dtype)
    D, of_atom, known = atoms.scaled(D, y.shape[1], tol.dtype, copy=copy)
    # Every row is compared with every atom. As in `refit`, subnormal numbers count as NaN.
    finite = jnp.isfinite(problems.largest(y)[:, 0]) & known
    y, of_y = atoms.unit(jnp.where(finite[:, None], y, 0))
    tol = divide(divide(tol.reshape(-1), of_y.largest), of_y.length)
    mask = mask if mask is None else mask.reshape(y.shape).astype(y.dtype)
    chosen = method.select(Problem(D, y, tol, max_atoms.reshape(-1), method.k, method.nonnegative, options, mask))
    length, largest = (x.at[chosen.indices].get(mode="fill", fill_value=0) for x in of_atom)
    values = divide(chosen.values * of_y.length[:, None], length) * divide(of_y.largest[:, None], largest)
    chosen = chosen._replace(values=values)
    if chosen.gradient is not None:
        norm = length * divide(largest, jnp.max(largest, axis=1, keepdims=True))
        weight = divide(norm, jnp.max(norm, axis=1, keepdims=True))
        chosen = chosen._replace(kkt=jnp.max(weight * jnp.abs(chosen.gradient), axis=1))
    return chunking.unflatten(batch, (chosen, ~finite))


def by_chunks(select: Callable, problem: Problem, *, row_bytes: int, cpu_rows: int = 256) -> Any:
    """Select a chunk of rows at a time."""

    def chunk(y, tol, max_atoms, mask):
        return select(problem._replace(y=y, tol=tol, max_atoms=max_atoms, mask=mask))

    per_row = problem.y, problem.tol, problem.max_atoms, problem.mask
    return chunking.map_chunks(chunk, *per_row, batch=problem.tol.shape, row_bytes=row_bytes, cpu_rows=cpu_rows)


def invert(problem: Problem, code: SparseCode) -> tuple[SparseCode, Array]:
    """The best values on a support, and their residual."""
    # Rows on which conjugate gradient does not converge are used as they are: only the final refit must be accurate.
    code = estimate(problem.D, problem.y, code, _SOLVER, nonnegative=problem.nonnegative)
    return code, residual(problem, code)


def residual(problem: Problem, code: SparseCode) -> Array:
    """`y − Dᵀz`, `[n d]`."""
    if isinstance(problem.D, Array):
        return problem.y - decode(problem.D, code)
    return problem.y - jnp.einsum("nk,nkd->nd", code.values, take_atoms(problem, code), precision=EXACT)


def empty(problem: Problem) -> SparseCode:
    """An empty code."""
    shape, m = (len(problem.y), problem.k), len(problem.D)
    return SparseCode(jnp.zeros(shape, problem.y.dtype), jnp.full(shape, m, jnp.int32), m)


def keep(problem: Problem, z: Array, threshold: Any = 0.0, *, times: int = 1) -> SparseCode:
    """The largest entries of each row `[n m]` above a threshold `[n 1]`, at most `times * max_atoms` of them."""
    z = jax.nn.relu(z) if problem.nonnegative else z
    code = from_dense(jnp.where(jnp.abs(z) > threshold, z, 0), min(times * problem.k, z.shape[1]))
    kept = jnp.arange(code.indices.shape[1], dtype=jnp.int32) < times * problem.max_atoms[:, None]
    indices, values = jnp.where(kept, code.indices, z.shape[1]), jnp.where(kept, code.values, 0)
    return SparseCode(values, indices, z.shape[1])


def take_atoms(problem: Problem, code: SparseCode) -> Array:
    """Atoms `[n k d]`, 0 in unused slots."""
    return problems.take_used(problem.D, code.indices, len(problem.D), problem.y.dtype)


def line_search(atoms: Array, direction: Array, r: Array) -> Array:
    """The step size `[n 1]` along a direction of values `[n k]` that minimises the residual."""
    moved = jnp.einsum("nk,nkd->nd", direction, atoms, precision=EXACT)
    return divide(jnp.sum(moved * r, axis=1), sq_norm(moved))[:, None]


def choose(where: Array, a: Any, b: Any) -> Any:
    """`jnp.where` per row, on two pytrees of arrays `[n ...]`."""
    return jax.tree.map(lambda a, b: jnp.where(where.reshape(-1, *[1] * (a.ndim - 1)), a, b), a, b)


def takes_another(problem: Problem, number: Array, r: Array, score: Array) -> Array:
    """Which rows take another atom, by their residual, its largest correlation, and their `max_atoms`."""
    return (score > rounding(r)) & (sq_norm(r) > problem.tol**2) & (number < problem.max_atoms)


def rounding(y: Array) -> float:
    """The size of correlations that may be pure rounding, for atoms and targets of norm 1."""
    return 32 * float(jnp.finfo(y.dtype).eps)
