"""Gathering of atoms, and the unit-free least-squares problem of each row: `G = AAᵀ`, `c = Ay`.

A dictionary is an array `[m d]`, or any pytree with `take(indices [*b k]) -> atoms [*b k d]`.
"""

import dataclasses
import functools
import math
from collections.abc import Callable
from typing import Any, NamedTuple, Protocol, runtime_checkable

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from jaxsae import sharding
from jaxsae._core import chunking, sparse
from jaxsae._core.linalg import EXACT, as_array, divide, matmul, max_or_nan, power_of_two, residual, result_type
from jaxsae.codes import SparseCode
from jaxsae.least_squares import driver, solvers
from jaxsae.least_squares.bounds import Bounds

__all__ = ["Dictionary"]


@runtime_checkable
class Dictionary(Protocol):
    """Protocol of a dictionary that is not an array: sharded, quantised or factored, for example.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> from jaxsae import pytrees
      >>> @pytrees.dataclass
      ... class Halves:
      ...     atoms: jax.Array
      ...
      ...     def take(self, indices):
      ...         return 0.5 * self.atoms[indices]
      >>> isinstance(Halves(jnp.eye(2)), Dictionary)  # so that `jaxsae.refit` and `jaxsae.certify` accept it
      True
    """

    def take(self, indices: Int[Array, "*b k"]) -> Float[Array, "*b k d"]:
        """The atoms at these indices, which are all in range."""
        ...


def is_array(dictionary: Any) -> bool:
    """Whether a dictionary is an array `[m d]`, rather than an object with `take`."""
    return hasattr(dictionary, "ndim") or isinstance(dictionary, list | tuple)


def take(dictionary: Any, indices: Array, num_latents: int, dtype) -> Array:
    """Atoms `[*b k d]`; those of unused slots are arbitrary, and must be masked."""
    indices = jnp.clip(indices, 0, num_latents - 1)
    if is_array(dictionary):
        return dictionary.at[indices].get(mode="clip").astype(dtype)
    return dictionary.take(indices).astype(dtype)


class Problem(NamedTuple):
    """Unit-free problems of `n` rows: `x = z · unit` minimises `½xᵀGx − cᵀx`; `G` has ones on its diagonal."""

    gram: Array  # [n k k]
    c: Array  # [n k]
    unit: Array  # [n k]  ‖a_i‖ / ‖y‖; 0 for padding, zero atoms and y = 0, where the solution is 0
    weight: Array  # [n k]  ‖a_i‖ / max‖a‖: from the gradient in x to the KKT residual
    finite: Array  # [n]  finite, without overflow or underflow in the solution


def largest(x: Array, axis: int | tuple[int, ...] = -1) -> Array:
    """`max |x|`, axes kept; NaN where an entry is not finite, or subnormal among entries of similar size.

    XLA flushes subnormal numbers to 0 on most devices, which among entries of similar size is more than rounding.
    """
    most = max_or_nan(jnp.abs(x), axis, True)
    limits = jnp.finfo(x.dtype)
    kind = jnp.dtype(f"uint{limits.bits}")
    size = jax.lax.bitcast_convert_type(x, kind) << 1  # without the sign
    subnormal = (size > 0) & (size < np.asarray(limits.tiny).view(kind) << 1)
    return jnp.where(subnormal.any(axis, keepdims=True) & (most < limits.tiny / limits.eps), jnp.nan, most)


def scaled(y: Array) -> tuple[Array, Array, Array]:
    """Targets scaled so that they can be squared, the powers of two `[n 1]` that divide them, and their norms.

    The power is NaN where a target is not finite, or is too small.
    """
    scale = power_of_two(largest(y))
    y = divide(y, scale)
    return y, scale, jnp.linalg.norm(y, axis=1, keepdims=True)


def gather_products(dictionary: Any, y: Array, indices: Array, *, num_latents: int) -> tuple[Array, Array]:
    """`G = AAᵀ` `[n k k]` and `c = Ay` `[n k]` in the dtype of `y`; those of unused slots are arbitrary."""
    k, d = indices.shape[1], y.shape[1]

    def row(indices, y):
        atoms = take(dictionary, indices, num_latents, y.dtype)
        return matmul(atoms, atoms.T), matmul(atoms, y)

    def halves(indices, y):
        """Three quarters of the multiplications of `row`, since `G` is symmetric."""
        a, b = (take(dictionary, half, num_latents, y.dtype) for half in jnp.split(indices, (k // 2,)))
        below = matmul(b, a.T)
        gram = jnp.block([[matmul(a, a.T), below.T], [below, matmul(b, b.T)]])
        return gram, jnp.concatenate([matmul(a, y), matmul(b, y)])

    large = k >= 128 and sharding.on_cpu()  # elsewhere and below, small products cost more than that
    return chunking.each_row(halves if large else row, indices, y, flops=2 * k * k * d)


def problems(dictionary: Any, y: Array, indices: Array, *, num_latents: int, ridge: Array) -> Problem:
    """The problems of `n` rows, in the dtype of `ridge`, if the squares of their atoms are within its range."""
    on = sparse.used(indices, num_latents)
    y, y_scale, y_norm = scaled(y)
    gram, c = gather_products(dictionary, y, indices, num_latents=num_latents)
    gram = jnp.where(on[:, :, None] & on[:, None, :], gram, 0)
    c = jnp.where(on, c, 0)
    eye = jnp.eye(on.shape[1], dtype=bool)
    square = jnp.sum(jnp.where(eye, gram, 0), axis=2)  # the diagonal; `jnp.diagonal` gathers it
    norm, unit, weight, finite = measure(square, on, y_scale, y_norm, ridge)
    gram = divide(jnp.where(eye, gram + ridge, gram), norm[:, :, None] * norm[:, None, :])
    return Problem(gram, divide(c, norm * y_norm), unit, weight, finite)


def unit_free(G: Array, c: Array, bounds: Bounds) -> tuple[Problem, Array]:
    """The unit-free problems of `n` rows, with `max |c_i|` of 1; and whether they can be those of a least-squares fit.

    They cannot if `G` is not symmetric, has entries that no positive semi-definite matrix has, bounds cross, or a value
    has no limit: a zero on the diagonal where `c` is not 0 and leads to no bound.
    """
    diagonal = jnp.diagonal(G, axis1=1, axis2=2)
    finite = jnp.isfinite(G).all((1, 2)) & jnp.isfinite(c).all(1)
    norm = jnp.sqrt(jnp.maximum(diagonal, 0))
    gram = divide(divide(G, norm[:, :, None]), norm[:, None, :])
    rounding = jnp.finfo(c.dtype).eps ** 0.5
    skew = jnp.max(jnp.abs(gram - jnp.swapaxes(gram, 1, 2)), axis=(1, 2), initial=0)
    size = jnp.where(diagonal[:, :, None] > 0, jnp.abs(gram), jnp.where(G == 0, 0, jnp.inf))
    largest = jnp.max(size, axis=(1, 2), initial=0)
    limited = (diagonal > 0) | (c == 0) | jnp.isfinite(jnp.where(c < 0, bounds.lower, bounds.upper))
    limited &= (bounds.lower <= bounds.upper) & (bounds.lower < jnp.inf) & (bounds.upper > -jnp.inf)
    valid = (skew <= rounding) & (largest <= 1 + rounding) & ((diagonal >= 0) & limited).all(1)
    c = divide(c, norm)
    scale = max_or_nan(jnp.abs(c), 1, True)
    unit = divide(norm, scale)
    finite &= jnp.isfinite(scale[:, 0]) & representable(unit).all(1)
    weight = divide(norm, jnp.max(norm, axis=1, keepdims=True, initial=0))
    return Problem(gram, divide(c, scale), unit, weight, finite), valid


def shifted(G: Array, c: Array, bounds: Bounds) -> tuple[Array, Array, Bounds]:
    """A point within the bounds of `n` rows, that nearest to 0, and `c` and the bounds as seen from there."""
    nearest = bounds.project(jnp.zeros_like(c))
    nearest = jnp.where(jnp.isfinite(nearest), nearest, 0)
    return nearest, jax.vmap(residual)(c, nearest, G), Bounds(bounds.lower - nearest, bounds.upper - nearest)


def unit_bounds(problem: Problem, bounds: Bounds) -> Bounds:
    """Bounds `[n k]` of `x`; 0 for values of no curvature."""
    flat = problem.unit == 0
    return Bounds(*(jnp.where(flat, 0, bound.astype(problem.unit.dtype) * problem.unit) for bound in bounds))


def lengths(square: Array, on: Array, ridge: Array, largest: Callable) -> tuple[Array, Array]:
    """The norms of atoms with their ridge, and those norms relative to the longest atom; also used in kernels."""
    norm = jnp.sqrt(square + jnp.where(on, ridge, 0))  # the ridge joins the diagonal before it is made 1
    return norm, norm / jnp.sqrt(jnp.maximum(largest(square), 2.0**-60))


def measure(square: Array, on: Array, y_scale: Array, y_norm: Array, ridge: Array) -> tuple[Array, ...]:
    """The norms `[n k]` of atoms with their ridge, and `unit`, `weight` and `finite` of their `Problem`.

    Arguments are the atoms' squared norms and the outputs of `scaled`.
    """
    norm, weight = lengths(square, on, ridge, functools.partial(jnp.max, axis=1, keepdims=True, initial=0))
    unit = divide(divide(norm, y_norm), y_scale)
    well_scaled = representable(unit) & ((unit > 0) | (y_scale == 0)) & jnp.isfinite(y_scale)
    in_range = ~on | ((square > 2.0**-60) & (square < 2.0**60) & well_scaled)
    return norm, unit, weight, in_range.all(1) & (ridge >= 0) & (ridge < 2.0**60)


def representable(unit: Array, dtype: Any = None) -> Array:
    """Whether values `x / unit` are representable to rounding, rather than flushed to 0, for `x` of about 1."""
    limits = jnp.finfo(unit.dtype if dtype is None else dtype)
    return unit < float(limits.eps / limits.tiny)


class Solved(NamedTuple):
    """A solver's results for `n` rows."""

    x: Array  # [n k]  unit-free values
    unit: Array  # [n k]  as in `Problem`
    finite: Array  # [n]  as in `Problem`
    warm_started: Array  # [n]  whether it started at the given values, rather than at 0
    kkt: Array  # [n]
    steps: Array  # [n]


def drive_rows(solver: solvers.Solver, problem: Problem, z, max_steps, bounds: Bounds):
    """Run a solver on `n` rows, each for at most `max_steps [n]` steps."""
    per_row = jax.tree.map(lambda bound: None if isinstance(bound, float) else 0, bounds)
    drive = jax.vmap(functools.partial(driver.drive, solver), in_axes=(0, 0, 0, 0, 0, per_row))
    return drive(problem.gram, problem.c, problem.weight, z, max_steps, bounds)


def drive_chain(solver: solvers.Solver, problem: Problem, z, max_steps, bounds: Bounds):
    """Run a solver on `n` rows, then its fallback on those that it did not solve."""
    fallback = solver.fallback
    best, kkt, steps = drive_rows(solver, problem, z, max_steps, bounds)
    if fallback is None:
        return best, kkt, steps

    def hand_on():
        limit = jnp.full_like(steps, fallback.max_steps)
        better, kkt, more = drive_chain(fallback, problem, best, limit, bounds)
        return better, kkt, steps + more

    return jax.lax.cond(jnp.any(left(solver, kkt)), hand_on, lambda: (best, kkt, steps))


def left(solver: solvers.Solver, kkt):
    """Whether a row is passed to the solver's fallback."""
    return kkt > solver.tol


def last_tol(solver: solvers.Solver):
    """The tolerance for convergence of a row: that of the last solver in the chain."""
    return solver.tol if solver.fallback is None else last_tol(solver.fallback)


def solved(
    solver: solvers.Solver, problem: Problem, values: Array, bounds: Bounds, drive: Callable = drive_rows
) -> Solved:
    """Run a solver on `n` rows, from starting values `[n k]` with units; `drive_chain` runs its fallbacks too."""
    start = bounds.project(values * problem.unit)
    # A start far away (‖y‖² is 1 here) loses precision to rounding; NaN and overflow count as far away.
    gap = jax.vmap(objective_gap)(problem.gram, problem.c, start, jnp.zeros_like(start))
    warm_started = (gap < 10) & (gap > -jnp.inf)
    start = jnp.where(warm_started[:, None], start, bounds.project(jnp.zeros_like(start)))
    max_steps = jnp.full(values.shape[:1], solver.max_steps, jnp.int32)
    x, kkt, steps = drive(solver, problem, start, max_steps, bounds)
    return Solved(x, problem.unit, problem.finite, warm_started, kkt, steps)


def objective_gap(G, c, z, other):
    """How much higher the objective of one row is at `z` than at `other`."""
    return 0.5 * jnp.sum((z - other) * (matmul(G, z + other) - 2 * c))


class UnitRows(NamedTuple):
    """Problems of `n` rows before their products are formed: `x = z · unit` minimises `½‖y − Aᵀx‖² + ½ Σ ridge x²`."""

    atoms: Array  # [n k d]  together with the ridge of norm 1
    y: Array  # [n d]  of norm 1
    ridge: Array  # [n k]
    unit: Array  # [n k]  as in `Problem`, but y = 0 counts as of norm 1
    weight: Array  # [n k]  as in `Problem`
    finite: Array  # [n]  as in `Problem`


def take_used(dictionary: Any, indices: Array, num_latents: int, dtype) -> Array:
    """Atoms `[n k d]`, 0 in unused slots."""
    return jnp.where(sparse.used(indices, num_latents)[:, :, None], take(dictionary, indices, num_latents, dtype), 0)


def unit_rows(atoms: Array, y: Array, ridge: Array) -> UnitRows:
    """The unit-free atoms `[n k d]` and targets of `n` rows, whatever their size; 0 stays 0."""
    root = jnp.sqrt(ridge)
    y, *of_y = scaled(y)
    y_scale, y_norm = (jnp.where(x == 0, 1, x) for x in of_y)
    size = power_of_two(largest(atoms)[:, :, 0])
    atom_scale = jnp.where(size == 0, 0, jnp.maximum(size, power_of_two(root)))
    atoms = divide(atoms, atom_scale[:, :, None])
    length, relative_root = jnp.linalg.norm(atoms, axis=2), divide(root, atom_scale)
    norm = jnp.hypot(length, relative_root)
    unit = norm / y_norm * atom_scale / y_scale
    longest = max_or_nan(length * atom_scale, 1, True)
    well_scaled = representable(unit) & ((unit > 0) | (norm == 0)) & jnp.isfinite(y_scale)
    return UnitRows(
        atoms=divide(atoms, norm[:, :, None]),
        y=y / y_norm,
        ridge=divide(relative_root, norm) ** 2,
        unit=unit,
        weight=divide(norm * atom_scale, longest),
        finite=well_scaled.all(1) & jnp.isfinite(longest[:, 0]) & (ridge >= 0),
    )


def products(rows: UnitRows) -> Problem:
    """The problems of rows in Gram space."""
    gram = jnp.einsum("nid,njd->nij", rows.atoms, rows.atoms, precision=EXACT) + jax.vmap(jnp.diag)(rows.ridge)
    c = jnp.einsum("nkd,nd->nk", rows.atoms, rows.y, precision=EXACT)
    return Problem(gram, c, rows.unit, rows.weight, rows.finite)


def residuals(dictionary: Any, y: Array, code: SparseCode) -> Array:
    """`(y − Aᵀz) / ‖y‖` `[n d]` to about machine precision; y = 0 counts as of norm 1.

    Atoms, values and targets are divided only by powers of two, so that nothing is rounded before it cancels.
    """
    atoms = take_used(dictionary, code.indices, code.num_latents, y.dtype)
    atom_scale = power_of_two(largest(atoms)[:, :, 0])
    y, *of_y = scaled(y)
    y_scale, y_norm = (jnp.where(x == 0, 1, x) for x in of_y)
    values = code.values.astype(y.dtype) * atom_scale / y_scale
    return jax.vmap(residual)(y, values, divide(atoms, atom_scale[:, :, None])) / y_norm


def row_bytes(k: int, d: int, itemsize: int) -> int:
    """Memory of one row whose atoms are gathered."""
    return (k * (2 * d + 4 * k) + 2 * d) * itemsize


def moves(leaf: Any) -> bool:
    """Whether a leaf of a dictionary has derivatives."""
    return jnp.issubdtype(leaf.dtype, jnp.inexact)


def take_tangent(dictionary: Any, dots: list[Array], indices: Array, num_latents: int, dtype) -> Array:
    """The tangent of `take`, from those of the dictionary's leaves that move."""
    leaves, structure = jax.tree.flatten(dictionary)
    remaining = iter(dots)
    tangents = [next(remaining) if moves(leaf) else np.zeros(leaf.shape, jax.dtypes.float0) for leaf in leaves]
    atoms = functools.partial(take, indices=indices, num_latents=num_latents, dtype=dtype)
    return jax.jvp(atoms, (dictionary,), (jax.tree.unflatten(structure, tangents),))[1]


def zero_cotangent(dictionary: Any, dtype) -> list[Array | None]:
    """The initial carry of `accumulate`: zeros for every leaf of the dictionary that moves."""
    return [jnp.zeros(leaf.shape, dtype) if moves(leaf) else None for leaf in jax.tree.leaves(dictionary)]


def accumulate(carry: Any, dictionary: Any, indices, num_latents: int, on, atoms_bar) -> Any:
    """Add the cotangent of the rows' atoms `[n k d]`, where `on [n k]` is true, to that of the dictionary."""
    if is_array(dictionary):
        return [carry[0].at[jnp.where(on, indices, num_latents)].add(atoms_bar, mode="drop")]
    _, pull_back = jax.vjp(lambda dictionary: take(dictionary, indices, num_latents, atoms_bar.dtype), dictionary)
    (bar,) = pull_back(atoms_bar)  # 0 for unused slots, since u and z are
    return [None if total is None else total + leaf for total, leaf in zip(carry, jax.tree.leaves(bar), strict=True)]


def moving_cotangents(carry: Any, dictionary: Any) -> list[Array]:
    """The accumulated cotangents of the leaves that move, in their dtypes."""
    leaves = jax.tree.leaves(dictionary)
    return [total.astype(leaf.dtype) for total, leaf in zip(carry, leaves, strict=True) if total is not None]


def accumulator(dictionary: Any, y: Array) -> jnp.dtype:
    """The dtype of the arithmetic: float32 or better."""
    return result_type(dtype(dictionary), y.dtype, jnp.float32)


def dtype(dictionary: Any) -> jnp.dtype:
    """The dtype of the atoms of a dictionary."""
    return dictionary.dtype if is_array(dictionary) else _one_atom(dictionary).dtype


def _one_atom(dictionary: Any):
    return jax.eval_shape(lambda dictionary: dictionary.take(jnp.zeros((1, 1), jnp.int32)), dictionary)


def check_numbers(
    name: str, what: str, x: Any, *, least: int | float = 0, most: int | float = math.inf, do: str
) -> None:
    """Raise if a concrete number or array has entries that are NaN, infinite or outside `[least, most]`."""
    if not chunking.is_concrete(x):
        return
    x = np.asarray(x)
    wrong = ~(np.isfinite(x) & (x >= least) & (x <= most))
    if wrong.any():
        raise ValueError(f"`{name}` got {what} {x[wrong][0]}; pass {do}.")


def validate_rows(dictionary: Any, y: Any, name: str) -> tuple[Any, Array]:
    """Return a dictionary and targets as JAX arrays; raise if they do not fit together."""
    y = as_array(y)
    if not is_array(dictionary):
        if not isinstance(dictionary, Dictionary):
            raise TypeError(
                f"`{name}` got a dictionary of type {type(dictionary).__name__}; pass an array of shape (m, d), or a "
                f"pytree with a method take(indices) that returns atoms of shape (*indices.shape, d)."
            )
        atom = _one_atom(dictionary)
        if atom.ndim != 3 or atom.shape[:2] != (1, 1):
            raise ValueError(
                f"`{name}` got a dictionary whose take gives shape {atom.shape} for indices of shape (1, 1); return "
                f"atoms of shape (1, 1, d)."
            )
    else:
        atom = dictionary = as_array(dictionary)
        if dictionary.ndim != 2:
            raise ValueError(
                f"`{name}` got a dictionary of shape {atom.shape}; pass one of shape (m, d), one atom per row."
            )
    for what, kind in (("a dictionary", atom.dtype), ("y", y.dtype)):
        check_floating(name, what, kind)
    if y.shape[-1:] != atom.shape[-1:]:
        d = atom.shape[-1]
        raise ValueError(f"`{name}` got y of shape {y.shape}, but the atoms have width {d}; pass y of shape (*b, {d}).")
    return dictionary, y


def check_floating(name: str, what: str, kind) -> None:
    """Raise if a dtype is not floating-point."""
    if not jnp.issubdtype(kind, jnp.floating):
        raise TypeError(f"`{name}` got {what} of dtype {kind}, expected floating point; convert it first.")


def validate(dictionary: Any, y: Any, code: SparseCode, name: str) -> tuple[Any, Array, SparseCode]:
    """Return a dictionary, targets and a code as JAX arrays; raise if they do not fit together."""
    dictionary, y = validate_rows(dictionary, y, name)
    code = jax.tree.map(as_array, code)
    check_floating(name, "values", code.values.dtype)
    if not jnp.issubdtype(code.indices.dtype, jnp.integer):
        raise TypeError(
            f"`{name}` got indices of dtype {code.indices.dtype}, expected integers; convert them to int32."
        )
    if is_array(dictionary) and len(dictionary) != code.num_latents:
        raise ValueError(
            f"`{name}` got a dictionary of shape {dictionary.shape} for a code of {code.num_latents} latents; pass "
            f"one of shape ({code.num_latents}, d), one atom per row."
        )
    if code.indices.shape != code.values.shape or code.indices.shape[:-1] != y.shape[:-1]:
        raise ValueError(
            f"`{name}` got values {code.values.shape} and indices {code.indices.shape} for y of shape {y.shape}; "
            f"pass both with shape {(*y.shape[:-1], 'k')}."
        )
    if code.indices.dtype.itemsize < 4:  # narrow types may not hold the index of an unused slot
        code = dataclasses.replace(code, indices=code.indices.astype(jnp.int32))
    return dictionary, y, code


def validate_gram(G: Any, c: Any, z: Any, name: str) -> tuple[Array, Array, Array]:
    """`G` and `c` in the dtype of the arithmetic, and values, 0 by default; raise if they do not fit together."""
    G, c = as_array(G), as_array(c)
    z = jnp.zeros(c.shape, c.dtype) if z is None else as_array(z)
    for what, x in (("G", G), ("c", c), ("z", z)):
        check_floating(name, what, x.dtype)
    if G.ndim < 2 or G.shape[-1] != G.shape[-2]:
        raise ValueError(f"`{name}` got G of shape {G.shape}; pass square matrices, of shape (*b, n, n).")
    if c.shape != G.shape[:-1] or z.shape != c.shape:
        raise ValueError(
            f"`{name}` got c of shape {c.shape} and values of shape {z.shape} for G of shape {G.shape}; pass both with "
            f"shape {G.shape[:-1]}."
        )
    dtype = result_type(G, c, jnp.float32)
    return G.astype(dtype), c.astype(dtype), z.astype(result_type(G, c))
