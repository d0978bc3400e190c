"""The loop of k-SVD, and its updates of atoms.

Coding is by `pursuit.omp`, without its refit; an update keeps the supports. Without atom j, the rows that use it have
the residual `E = R + v dᵀ`, and the best rank-one fit `E ≈ v dᵀ` gives both the atom and its values, at the cost of
those rows alone. Each update uses the results of those before it, so the objective never increases.

With the dictionary fixed as well, the problem is least squares on the supports: `jaxsae.refit`.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, PRNGKeyArray

from jaxsae import codes
from jaxsae._core import chunking
from jaxsae._core.linalg import as_array, divide, matmul, power_of_two, ratio, result_type, solve_semidefinite
from jaxsae.codes import SparseCode
from jaxsae.ksvd import rank_one
from jaxsae.least_squares import problems
from jaxsae.pursuit import greedy

_ALIKE = 0.99  # the cosine above which two atoms count as one, as in the authors' code


class History(NamedTuple):
    """The errors of `t` steps of `fit`: `‖Y − ZD‖² / ‖Y‖²`, over the finite rows; NaN if those are subnormal.

    Attributes:
      coded: `[t]` after coding.
      updated: `[t]` after the update of the dictionary; never larger.
      replaced: `[t]` int32, number of atoms replaced after the update.
    """

    coded: Float[Array, " t"]
    updated: Float[Array, " t"]
    replaced: Int[Array, " t"]


def fit(
    key: PRNGKeyArray,
    y: Float[Array, "n d"],
    *,
    m: int,
    k: int,
    steps: int = 20,
    tol: float | Float[Array, ""] = 0.0,
    start: Float[Array, "m d"] | None = None,
    update: Callable[..., tuple[Array, SparseCode]] | None = None,
    nonnegative: bool = False,
    nonnegative_atoms: bool = False,
) -> tuple[Float[Array, "m d"], History]:
    """Learn a dictionary of `m` atoms in which each signal is a combination of at most `k` of them.

    Each step codes the signals by orthogonal matching pursuit, updates atoms and values, then replaces unused and
    repeated atoms (`replace`). Signals with NaN or Inf are ignored.

    Args:
      key: PRNG key, which chooses the signals to start from.
      y: signals `[n d]`.
      m: number of atoms.
      k: most atoms per signal.
      steps: number of codings, each followed by an update.
      tol: stop adding atoms to a signal when its residual norm is at most this, in the units of `y`.
      start: initial dictionary, with atoms of any norm; by default `m` of the signals.
      update: `exact` (the default), `approximate`, `mod`, or another function with their signature.
      nonnegative: constrain the values to `z ≥ 0`.
      nonnegative_atoms: constrain the atoms to be non-negative, for non-negative signals.

    Returns:
      Atoms `[m d]` of norm 1, and `History`.

    Raises:
      ValueError: at trace time, if `k` exceeds `m` or `d`, or if there are fewer signals than atoms to start from.

    Example:
      >>> import jax, jax.numpy as jnp, jaxsae
      >>> y = jnp.array([[3.0, 3.0], [1.0, 1.0], [0.0, -2.0], [0.0, 1.0]])
      >>> D, history = jaxsae.ksvd.fit(jax.random.key(0), y, m=2, k=1, steps=4)
      >>> float(history.updated[-1]) < 1e-6
      True

    Source: Aharon, Elad & Bruckstein (2006), "K-SVD: An algorithm for designing overcomplete dictionaries for sparse
    representation".
    """
    y, start = as_array(y), None if start is None else as_array(start)
    if y.ndim != 2 or not jnp.issubdtype(y.dtype, jnp.floating):
        raise ValueError(f"`fit` got signals of dtype {y.dtype} and shape {y.shape}; pass floating point (n, d).")
    n, d = y.shape
    problems.check_numbers("fit", "tol", tol, do="a finite norm of at least 0")
    if steps < 1:
        raise ValueError(f"`fit` got {steps} steps; pass at least 1.")
    if not 1 <= k <= min(m, d):
        raise ValueError(f"`fit` got k = {k} for m = {m} atoms of width {d}; pass k from 1 to {min(m, d)}.")
    if start is None and m > n:
        raise ValueError(
            f"`fit` got {n} signals to start m = {m} atoms from; pass more signals, fewer atoms or `start`."
        )
    if start is not None and start.shape != (m, d):
        raise ValueError(f"`fit` got a start of shape {start.shape}; pass one of shape ({m}, {d}), one atom per row.")
    start = _signals(m, key, y) if start is None else start
    return _fit(
        k, steps, update or exact, nonnegative, nonnegative_atoms, start, y, chunking.spread(tol, (n,), y.dtype)
    )


@functools.partial(jax.jit, static_argnums=(0, 1, 2, 3, 4))
def _fit(k: int, steps: int, update: Callable, nonnegative: bool, nonnegative_atoms: bool, start, y, tol):
    start = rank_one.unit(jax.nn.relu(start) if nonnegative_atoms else start)
    y, scale = _without_units(y)
    tol = divide(tol.astype(scale.dtype), scale)
    finite = jnp.isfinite(y).all(axis=1)
    known = jnp.where(finite[:, None], y, 0)

    def error(D, code):
        left = ratio(jnp.sum((known - codes.decode(D, _on(code, finite))) ** 2), jnp.sum(known**2))
        return jnp.where(jnp.isnan(scale), jnp.nan, left)

    def step(D, _):
        # A refit would take longer to compile than all the rest, and the update changes the values anyway.
        code = greedy.chosen_by_omp(D, y, k=k, nonnegative=nonnegative, tol=tol)
        coded = error(D, code)
        D, code = update(D, y, code, nonnegative=nonnegative, nonnegative_atoms=nonnegative_atoms)
        updated = error(D, code)
        D, replaced = replace(D, y, code, nonnegative_atoms=nonnegative_atoms)
        return D, History(coded, updated, replaced)

    return jax.lax.scan(step, start, length=steps)


def _without_units(y):
    """Signals divided by a power of two, so that their squares are in range, and that power."""
    wide = y.astype(result_type(y.dtype, jnp.float32))
    finite = jnp.isfinite(wide).all(axis=1, keepdims=True)
    scale = power_of_two(problems.largest(jnp.where(finite, wide, 0), (0, 1)))[0, 0]
    return divide(wide, scale).astype(y.dtype), scale


@functools.partial(jax.jit, static_argnums=0)
def _signals(m: int, key, y):
    """Signals drawn without replacement; those that are 0 or not finite are drawn last, and become 0 if not finite."""
    valid = jnp.isfinite(y).all(axis=1) & (y != 0).any(axis=1)
    _, chosen = jax.lax.top_k(jax.random.uniform(key, (len(y),)) + jnp.where(valid, 1.0, 0.0), m)
    return jnp.where(valid[chosen, None], y[chosen], 0)


def _on(code: SparseCode, rows: Array) -> SparseCode:
    """The code, with all other rows empty."""
    on = code.mask & rows[:, None]
    return dataclasses.replace(
        code, values=jnp.where(on, code.values, 0), indices=jnp.where(on, code.indices, code.num_latents)
    )


# --- Updates of a dictionary and of the values of a code, with the supports fixed


def exact(
    D: Float[Array, "m d"],
    y: Float[Array, "n d"],
    code: SparseCode,
    *,
    nonnegative: bool = False,
    nonnegative_atoms: bool = False,
) -> tuple[Float[Array, "m d"], SparseCode]:
    """Update atoms and their values in turn, each by the best rank-one fit to the residual of the others: exact k-SVD.

        E = R + v dᵀ,   (d, v) = argmin ‖E − v dᵀ‖²,   R ← E − v dᵀ        (rows that use the atom)

    `d` is the leading eigenvector of `EᵀE [d d]`, which suits widths up to a few hundred. Under constraints `d` and `v`
    alternate, each the best given the other, from the best start: the atom, or the singular vector of either sign
    (non-negative k-SVD, Aharon et al. 2005). The objective never increases.

    Args:
      D: dictionary `[m d]`, atoms of any norm.
      y: signals `[n d]`; rows with NaN or Inf, in `y` or in their values, are ignored.
      code: supports and values `[n k]`. An index repeated in a row is merged into its first slot.
      nonnegative: constrain `z ≥ 0`.
      nonnegative_atoms: constrain the atoms.

    Returns:
      Atoms of norm 1 (0 where they were 0 and no row uses them), and the code with its values updated.

    Raises:
      ValueError, TypeError: at trace time, if shapes or dtypes do not fit together.

    Example:
      >>> import jax.numpy as jnp, jaxsae
      >>> code = jaxsae.SparseCode(values=jnp.ones((2, 1)), indices=jnp.zeros((2, 1), jnp.int32), num_latents=1)
      >>> D, code = jaxsae.ksvd.exact(jnp.array([[1.0, 0.0]]), jnp.array([[3.0, 4.0], [6.0, 8.0]]), code)
      >>> jnp.round(D, 3), jnp.round(code.values, 3)
      (Array([[0.6, 0.8]], dtype=float32), Array([[ 5.],
             [10.]], dtype=float32))

    Source: Aharon, Elad & Bruckstein (2006), "K-SVD"; Aharon, Elad & Bruckstein (2005), "K-SVD and its non-negative
    variant for dictionary design".
    """
    fit_atom = rank_one.alternating if nonnegative or nonnegative_atoms else rank_one.leading
    D, y, code = problems.validate(D, y, code, "exact")
    return rank_one.sweep(fit_atom, rank_one.Signs(nonnegative, nonnegative_atoms), D, y, code)


def approximate(
    D: Float[Array, "m d"],
    y: Float[Array, "n d"],
    code: SparseCode,
    *,
    nonnegative: bool = False,
    nonnegative_atoms: bool = False,
) -> tuple[Float[Array, "m d"], SparseCode]:
    """Update atoms and their values in turn, each by one power step in place of the exact fit: approximate k-SVD.

        d = Eᵀv / ‖Eᵀv‖,   v = E d        (projected, under constraints)

    Each half is the best given the other, so the objective never increases. It costs a few passes over the rows of an
    atom, whatever the width.

    Args:
      D: as for `exact`.
      y: as for `exact`.
      code: as for `exact`.
      nonnegative: as for `exact`.
      nonnegative_atoms: as for `exact`.

    Returns:
      As for `exact`.

    Raises:
      ValueError, TypeError: as for `exact`.

    Example:
      >>> import jax.numpy as jnp, jaxsae
      >>> code = jaxsae.SparseCode(values=jnp.ones((2, 1)), indices=jnp.zeros((2, 1), jnp.int32), num_latents=1)
      >>> D, code = jaxsae.ksvd.approximate(jnp.array([[1.0, 0.0]]), jnp.array([[3.0, 4.0], [6.0, 8.0]]), code)
      >>> jnp.round(D, 3)
      Array([[0.6, 0.8]], dtype=float32)

    Source: Rubinstein, Zibulevsky & Elad (2008), "Efficient implementation of the K-SVD algorithm using batch
    orthogonal matching pursuit".
    """
    D, y, code = problems.validate(D, y, code, "approximate")
    return rank_one.sweep(rank_one.power_step, rank_one.Signs(nonnegative, nonnegative_atoms), D, y, code)


def mod(
    D: Float[Array, "m d"],
    y: Float[Array, "n d"],
    code: SparseCode,
    *,
    nonnegative: bool = False,
    nonnegative_atoms: bool = False,
) -> tuple[Float[Array, "m d"], SparseCode]:
    """Update all atoms at once, with the values fixed: the method of optimal directions.

        D = (ZᵀZ)⁻¹ ZᵀY,   then atoms scaled to norm 1, and values to match

    It forms and factorises the `[m m]` matrix `ZᵀZ`. Where rounding would increase the error, the dictionary is kept.

    Args:
      D: as for `exact`.
      y: as for `exact`.
      code: as for `exact`.
      nonnegative: ignored, since values keep their signs.
      nonnegative_atoms: must be False.

    Returns:
      As for `exact`.

    Raises:
      ValueError, TypeError: as for `exact`, or if `nonnegative_atoms` is True.

    Example:
      >>> import jax.numpy as jnp, jaxsae
      >>> code = jaxsae.SparseCode(values=jnp.ones((2, 1)), indices=jnp.zeros((2, 1), jnp.int32), num_latents=1)
      >>> D, code = jaxsae.ksvd.mod(jnp.array([[1.0, 0.0]]), jnp.array([[3.0, 4.0], [6.0, 8.0]]), code)
      >>> jnp.round(D, 3)
      Array([[0.6, 0.8]], dtype=float32)

    Source: Engan, Aase & Husøy (1999), "Method of optimal directions for frame design".
    """
    if nonnegative_atoms:
        raise ValueError("`mod` got nonnegative_atoms, which it does not support; use `exact` or `approximate`.")
    D, y, code = problems.validate(D, y, code, "mod")
    return _mod(D, y, code)


@jax.jit
def _mod(D, y, code: SparseCode):
    given = rank_one.learnable(D, y, code)
    learnt, known = given.code, given.signals
    m, dtype = len(D), known.dtype

    def add(total, values, indices):
        z = SparseCode(values, indices, m).dense()
        return total + matmul(z.T, z), None

    zz, _ = chunking.scan_chunks(
        *(add, jnp.zeros((m, m), dtype), learnt.values, learnt.indices),
        batch=y.shape[:1],
        row_bytes=m * dtype.itemsize,
        cpu_rows=1024,
    )
    norm = jnp.sqrt(jnp.diagonal(zz))
    unit = divide(zz, norm[:, None] * norm).at[jnp.diag_indices(m)].set(1)
    best = divide(solve_semidefinite(unit, divide(codes.scatter_add(learnt, known), norm[:, None])), norm[:, None])
    best = jnp.where(norm[:, None] > 0, best, given.atoms)
    error, error_before = (jnp.sum((known - codes.decode(atoms, learnt)) ** 2) for atoms in (best, given.atoms))
    best = jnp.where(error < error_before, best, given.atoms)
    size = jnp.linalg.norm(best, axis=1).at[learnt.indices].get(mode="fill", fill_value=0)
    learnt = dataclasses.replace(learnt, values=learnt.values * size)
    return rank_one.unit(best).astype(D.dtype), given.put(code, learnt)


def replace(
    D: Float[Array, "m d"], y: Float[Array, "n d"], code: SparseCode, *, nonnegative_atoms: bool = False
) -> tuple[Float[Array, "m d"], Int[Array, ""]]:
    """Replace unused and repeated atoms by the signals with the largest errors.

    An atom is repeated if the absolute value of its cosine with an earlier one is above 0.99. Each takes a different
    signal, while there are signals with an error.

    Args:
      D: dictionary `[m d]`.
      y: signals `[n d]`.
      code: codes of the signals, `[n k]`.
      nonnegative_atoms: take the positive part of the signals.

    Returns:
      The dictionary, with atoms of norm 1, and the number of atoms replaced.

    Raises:
      ValueError, TypeError: at trace time, if shapes or dtypes do not fit together.

    Example:
      >>> import jax.numpy as jnp, jaxsae
      >>> code = jaxsae.SparseCode(values=jnp.ones((4, 1)), indices=jnp.zeros((4, 1), jnp.int32), num_latents=2)
      >>> y = jnp.array([[1.0, 0.0], [1.0, 0.0], [1.0, 0.0], [1.0, 5.0]])
      >>> D, count = jaxsae.ksvd.replace(jnp.array([[1.0, 0.0], [1.0, 0.0]]), y, code)
      >>> [round(x, 2) for x in D[1].tolist()], int(count)
      ([0.2, 0.98], 1)

    Source: Aharon, Elad & Bruckstein (2006), Section IV.
    """
    D, y, code = problems.validate(D, y, code, "replace")
    return _replace(nonnegative_atoms, D, y, code)


@functools.partial(jax.jit, static_argnums=0)
def _replace(nonnegative_atoms: bool, D, y, code: SparseCode):
    m = len(D)
    given = rank_one.learnable(D, y, code)
    learnt, known, atoms = given.code, given.signals, rank_one.unit(given.atoms)
    if not len(y):
        return atoms.astype(D.dtype), jnp.int32(0)

    def repeats(some, number):
        return jnp.any((jnp.abs(matmul(some, atoms.T)) > _ALIKE) & (jnp.arange(m) < number[:, None]), axis=1)

    repeated = chunking.map_chunks(
        repeats, atoms, jnp.arange(m), batch=(m,), row_bytes=m * atoms.dtype.itemsize, cpu_rows=256
    )
    uses = jnp.zeros(m, jnp.int32).at[learnt.indices].add(1, mode="drop")
    replaced = repeated | (uses == 0)
    error = jnp.sum((known - codes.decode(given.atoms, learnt)) ** 2, axis=1)
    error, worst = jax.lax.top_k(error, min(m, len(y)))
    turn = jnp.cumsum(replaced) - 1
    error, worst = (x.at[turn].get(mode="fill", fill_value=0) for x in (error, worst))
    new = known[worst]
    new = rank_one.unit(jax.nn.relu(new) if nonnegative_atoms else new)
    replaced &= (error > 0) & (new != 0).any(axis=1)
    return jnp.where(replaced[:, None], new, atoms).astype(D.dtype), jnp.sum(replaced, dtype=jnp.int32)
