"""Dictionary learning by k-SVD: code with the dictionary fixed, update the atoms one after another, and repeat.

    minimise ‖Y − Z D‖²   over D [m d] with rows of norm 1, and Z [n m] with at most k entries a row

Coding is `pursuit.omp`; an update keeps the supports. Without atom j, the rows that use it are left with
`E = R + v dᵀ`, and the best rank-one fit `E ≈ v dᵀ` gives both the atom and its values, at the cost of those rows
alone. Each atom sees the updates of those before it, so the objective never rises.

With the dictionary fixed too, what remains is least squares on the supports: `refine`, which is the shared `refit`.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, PRNGKeyArray

from jaxsae import codes, gram, pursuit, rows
from jaxsae.codes import SparseCode
from jaxsae.linalg import divide, matmul, solve_semidefinite
from jaxsae.refit import RefitInfo, refit

_ALIKE = 0.99  # the cosine from which on two atoms count as one, as in the authors' own code
_ROUNDS = 10  # of a rank-one fit under constraints


class History(NamedTuple):
    """What each of `t` steps of `fit` left: `‖Y − ZD‖² / ‖Y‖²`, over the rows that are finite.

    Attributes:
      coded: `[t]` after coding.
      updated: `[t]` after the update of the dictionary; never more.
      replaced: `[t]` int32, atoms that were replaced then.
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
    """Learn a dictionary of `m` atoms in which each signal is a sum of `k` of them.

    Each step codes the signals by orthogonal matching pursuit, updates atoms and values, then replaces atoms that are
    of no use (`replace`). Signals with NaN or Inf take no part.

    Args:
      key: chooses the signals to start from.
      y: signals `[n d]`.
      m: atoms.
      k: most atoms of a signal.
      steps: codings, each with its update.
      tol: residual norm at which a signal needs no further atom, in the units of `y`.
      start: dictionary to start from, of any norm; by default `m` of the signals.
      update: `exact` (the default), `approximate` or `mod`, or another function of their signature.
      nonnegative: constrain the values, `z ≥ 0`.
      nonnegative_atoms: constrain the atoms, for signals that are non-negative themselves.

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
    n, d = y.shape
    if not 1 <= k <= min(m, d):
        raise ValueError(f"`fit` got k = {k} for m = {m} atoms of width {d}; pass k from 1 to {min(m, d)}.")
    if start is None and m > n:
        raise ValueError(
            f"`fit` got {n} signals to start m = {m} atoms from; pass more signals, fewer atoms or `start`."
        )
    if start is not None and start.shape != (m, d):
        raise ValueError(f"`fit` got a start of shape {start.shape}; pass one of shape ({m}, {d}), one atom a row.")
    start = _signals(key, y, m) if start is None else start
    static = _Static(k, steps, update or exact, nonnegative, nonnegative_atoms)
    return _fit(static, _unit(jax.nn.relu(start) if nonnegative_atoms else start), y, jnp.full(n, tol, y.dtype))


class _Static(NamedTuple):
    k: int
    steps: int
    update: Callable[..., tuple[Array, SparseCode]]
    nonnegative: bool
    nonnegative_atoms: bool


@functools.partial(jax.jit, static_argnums=0)
def _fit(static: _Static, start, y, tol):
    k, steps, update, nonnegative, nonnegative_atoms = static
    finite = jnp.isfinite(y).all(axis=1)
    known = jnp.where(finite[:, None], y, 0)

    def error(D, code):
        return divide(jnp.sum((known - codes.combine(D, _on(code, finite))) ** 2), jnp.sum(known**2))

    def step(D, _):
        code, _ = pursuit.omp(D, y, k=k, nonnegative=nonnegative, tol=tol)
        coded = error(D, code)
        D, code = update(D, y, code, nonnegative=nonnegative, nonnegative_atoms=nonnegative_atoms)
        updated = error(D, code)
        D, replaced = replace(D, y, code, nonnegative_atoms=nonnegative_atoms)
        return D, History(coded, updated, replaced)

    return jax.lax.scan(step, start, length=steps)


def _signals(key, y, m: int):
    """Signals drawn without replacement, of norm 1; those that are 0 or not finite only if there are no others."""
    usable = jnp.isfinite(y).all(axis=1) & (y != 0).any(axis=1)
    _, chosen = jax.lax.top_k(jax.random.uniform(key, (len(y),)) + usable, m)
    return jnp.where(usable[chosen, None], y[chosen], 0)


def _on(code: SparseCode, rows: Array) -> SparseCode:
    """The code with the other rows empty."""
    on = code.mask & rows[:, None]
    return dataclasses.replace(
        code, values=jnp.where(on, code.values, 0), indices=jnp.where(on, code.indices, code.num_latents)
    )


def _unit(atoms):
    return divide(atoms, jnp.linalg.norm(atoms, axis=-1, keepdims=True))


# --- Updates of a dictionary and the values of a code, the supports given


def refine(
    D: Float[Array, "m d"], y: Float[Array, "n d"], code: SparseCode, *, nonnegative: bool = False
) -> tuple[SparseCode, RefitInfo]:
    """Update the values alone, supports and dictionary fixed: the shared `refit`, as Section 5.1 of Gao et al. has it.

    Args:
      D: dictionary `[m d]`.
      y: signals `[n d]`.
      code: supports and starting values `[n k]`.
      nonnegative: constrain `z ≥ 0`.

    Returns:
      As `refit`.

    Example:
      >>> import jax.numpy as jnp, jaxsae
      >>> code = jaxsae.SparseCode(values=jnp.array([[1.0]]), indices=jnp.array([[1]]), num_latents=2)
      >>> jaxsae.ksvd.refine(jnp.eye(2), jnp.array([[1.0, 3.0]]), code)[0].values
      Array([[3.]], dtype=float32)
    """
    return refit(D, y, code, nonnegative=nonnegative)


def exact(
    D: Float[Array, "m d"],
    y: Float[Array, "n d"],
    code: SparseCode,
    *,
    nonnegative: bool = False,
    nonnegative_atoms: bool = False,
) -> tuple[Float[Array, "m d"], SparseCode]:
    """Update atoms and their values in turn, each by the best rank-one fit of what the others leave: exact k-SVD.

        E = R + v dᵀ,   (d, v) = argmin ‖E − v dᵀ‖²,   R ← E − v dᵀ        (rows that use the atom)

    `d` is the leading eigenvector of `EᵀE [d d]`, meant for widths up to a few hundred. Under constraints `d` and `v`
    are found in turn, each the best given the other, from whichever start is best: the atom, or the singular vector
    of either sign (non-negative k-SVD, Aharon et al. 2005). The objective never rises.

    Args:
      D: dictionary `[m d]`, atoms of any norm.
      y: signals `[n d]`; rows with NaN or Inf, in `y` or in their values, take no part.
      code: supports and values `[n k]`. An index that stands twice in a row is put into its first slot.
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
    fit_atom = _alternating if nonnegative or nonnegative_atoms else _leading
    gram.validate(D, y, code, "exact")
    return _sweep(fit_atom, _Signs(nonnegative, nonnegative_atoms), D, y, code)


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

    Each half is the best given the other, so the objective never rises. It costs a few passes over the rows of an atom,
    whatever the width.

    Args:
      D: as for `exact`.
      y: as for `exact`.
      code: as for `exact`.
      nonnegative: as for `exact`.
      nonnegative_atoms: as for `exact`.

    Returns:
      As `exact`.

    Raises:
      ValueError, TypeError: as `exact`.

    Example:
      >>> import jax.numpy as jnp, jaxsae
      >>> code = jaxsae.SparseCode(values=jnp.ones((2, 1)), indices=jnp.zeros((2, 1), jnp.int32), num_latents=1)
      >>> D, code = jaxsae.ksvd.approximate(jnp.array([[1.0, 0.0]]), jnp.array([[3.0, 4.0], [6.0, 8.0]]), code)
      >>> jnp.round(D, 3)
      Array([[0.6, 0.8]], dtype=float32)

    Source: Rubinstein, Zibulevsky & Elad (2008), "Efficient implementation of the K-SVD algorithm using batch
    orthogonal matching pursuit".
    """
    gram.validate(D, y, code, "approximate")
    return _sweep(_power_step, _Signs(nonnegative, nonnegative_atoms), D, y, code)


def mod(
    D: Float[Array, "m d"],
    y: Float[Array, "n d"],
    code: SparseCode,
    *,
    nonnegative: bool = False,
    nonnegative_atoms: bool = False,
) -> tuple[Float[Array, "m d"], SparseCode]:
    """Update all atoms at once, the values fixed: the method of optimal directions.

        D = (ZᵀZ)⁻¹ ZᵀY,   then atoms of norm 1, and values to match

    It takes memory and time of `[m m]`. Where rounding would make the error rise, the dictionary is kept.

    Args:
      D: as for `exact`.
      y: as for `exact`.
      code: as for `exact`.
      nonnegative: makes no difference: values keep their signs.
      nonnegative_atoms: must be False.

    Returns:
      As `exact`.

    Raises:
      ValueError, TypeError: as `exact`, and for `nonnegative_atoms`.

    Example:
      >>> import jax.numpy as jnp, jaxsae
      >>> code = jaxsae.SparseCode(values=jnp.ones((2, 1)), indices=jnp.zeros((2, 1), jnp.int32), num_latents=1)
      >>> D, code = jaxsae.ksvd.mod(jnp.array([[1.0, 0.0]]), jnp.array([[3.0, 4.0], [6.0, 8.0]]), code)
      >>> jnp.round(D, 3)
      Array([[0.6, 0.8]], dtype=float32)

    Source: Engan, Aase & Husøy (1999), "Method of optimal directions for frame design".
    """
    if nonnegative_atoms:
        raise ValueError("`mod` got nonnegative_atoms, which it has no way to keep; use `exact` or `approximate`.")
    gram.validate(D, y, code, "mod")
    return _mod(D, y, code)


@jax.jit
def _mod(D, y, code: SparseCode):
    finite, known, learnt = _known(D, y, code)
    m, dtype = len(D), known.dtype

    def add(total, values, indices):
        z = SparseCode(values, indices, m).dense()
        return total + matmul(z.T, z), None

    zz, _ = rows.scan_chunks(
        *(add, jnp.zeros((m, m), dtype), learnt.values, learnt.indices),
        batch=y.shape[:1],
        row_bytes=m * dtype.itemsize,
        cpu_rows=1024,
    )
    norm = jnp.sqrt(jnp.diagonal(zz))
    unit = divide(zz, norm[:, None] * norm).at[jnp.diag_indices(m)].set(1)
    best = divide(solve_semidefinite(unit, divide(codes.correlate(learnt, known), norm[:, None])), norm[:, None])
    best = jnp.where(norm[:, None] > 0, best, D)
    error, error_before = (jnp.sum((known - codes.combine(atoms, learnt)) ** 2) for atoms in (best, D.astype(dtype)))
    best = jnp.where(error < error_before, best, D)
    size = jnp.linalg.norm(best, axis=1).at[learnt.indices].get(mode="fill", fill_value=0)
    return _unit(best).astype(D.dtype), _put(code, dataclasses.replace(learnt, values=learnt.values * size), finite)


def replace(
    D: Float[Array, "m d"], y: Float[Array, "n d"], code: SparseCode, *, nonnegative_atoms: bool = False
) -> tuple[Float[Array, "m d"], Int[Array, ""]]:
    """Replace atoms of no use by the signals that are represented worst.

    Of no use is an atom that no signal uses, or one whose cosine with an earlier atom is above 0.99 in absolute value.
    Each takes a signal of its own, as long as there are signals with an error.

    Args:
      D: dictionary `[m d]`.
      y: signals `[n d]`.
      code: what represents them, `[n k]`.
      nonnegative_atoms: take the positive part of the signals.

    Returns:
      The dictionary, new atoms of norm 1, and how many were replaced.

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
    gram.validate(D, y, code, "replace")
    return _replace(nonnegative_atoms, D, y, code)


@functools.partial(jax.jit, static_argnums=0)
def _replace(nonnegative_atoms: bool, D, y, code: SparseCode):
    m = len(D)
    _, known, learnt = _known(D, y, code)
    atoms = _unit(D.astype(known.dtype))

    def repeats(some, number):
        return jnp.any((jnp.abs(matmul(some, atoms.T)) > _ALIKE) & (jnp.arange(m) < number[:, None]), axis=1)

    repeated = rows.map_chunks(
        repeats, atoms, jnp.arange(m), batch=(m,), row_bytes=m * atoms.dtype.itemsize, cpu_rows=256
    )
    uses = jnp.zeros(m, jnp.int32).at[learnt.indices].add(1, mode="drop")
    useless = repeated | (uses == 0)
    error = jnp.sum((known - codes.combine(atoms, learnt)) ** 2, axis=1)
    error, worst = jax.lax.top_k(error, min(m, len(y)))
    turn = jnp.cumsum(useless) - 1
    error, worst = (x.at[turn].get(mode="fill", fill_value=0) for x in (error, worst))
    new = known[worst]
    new = _unit(jax.nn.relu(new) if nonnegative_atoms else new)
    useless &= (error > 0) & (new != 0).any(axis=1)
    return jnp.where(useless[:, None], new, atoms).astype(D.dtype), jnp.sum(useless, dtype=jnp.int32)


# --- One sweep over the atoms


class _Signs(NamedTuple):
    """Which factors of a rank-one fit are constrained, `v ≥ 0` and `d ≥ 0`."""

    values: bool
    atoms: bool

    def project_values(self, v):
        return jax.nn.relu(v) if self.values else v

    def project_atom(self, d):
        return jax.nn.relu(d) if self.atoms else d


def _known(D, y, code: SparseCode) -> tuple[Array, Array, SparseCode]:
    """Which rows are finite; the signals, and the code they can be learnt from, in float32 or better.

    The others are 0 and empty, and so are later slots of an index that stands twice.
    """
    dtype, m = gram.accumulator(D, y), code.num_latents
    finite = jnp.isfinite(y).all(axis=1) & (jnp.isfinite(code.values) | ~code.mask).all(axis=1)
    on = code.mask & finite[:, None]
    values, indices = jnp.where(on, code.values, 0).astype(dtype), jnp.where(on, code.indices, m)
    same = (indices[:, :, None] == indices[:, None, :]) & on[:, None, :]
    first = on & (jnp.argmax(same, axis=2) == jnp.arange(indices.shape[1]))
    values = jnp.where(first, jnp.einsum("nij,nj->ni", same.astype(dtype), values), 0)
    return finite, jnp.where(finite[:, None], y, 0).astype(dtype), SparseCode(values, jnp.where(first, indices, m), m)


def _put(code: SparseCode, learnt: SparseCode, finite: Array) -> SparseCode:
    """What was learnt, in the rows that are finite."""
    values = jnp.where(finite[:, None], learnt.values.astype(code.values.dtype), code.values)
    return dataclasses.replace(code, values=values, indices=jnp.where(finite[:, None], learnt.indices, code.indices))


@functools.partial(jax.jit, static_argnums=(0, 1))
def _sweep(fit_atom: Callable, signs: _Signs, D, y, code: SparseCode):
    """Fit each atom and its values in turn to the residual of the rows that use it.

    A fit sees these rows through `fold(f, total)`, `total ← f(total, E, v)` over blocks of them, the last one padded
    with zeros; it takes the atom before, of norm 1, and returns the one after.
    """
    m, (n, k) = len(D), code.indices.shape
    finite, known, learnt = _known(D, y, code)
    size = _block_size(n * k / m)
    order = codes.by_latent(learnt.indices, m)
    bounds = jnp.searchsorted(learnt.indices.ravel()[order], jnp.arange(m + 1))
    order = jnp.pad(order, (0, size))

    def sweep(j, carry):
        D, values, residual = carry
        start, end = bounds[j], bounds[j + 1]
        atom = D[j]

        def block(number, values, residual):
            """Slots and rows of a block, past the end where it is padding, and the rows without the atom."""
            at = start + number * size
            slots = jax.lax.dynamic_slice_in_dim(order, at, size)
            slots = jnp.where(at + jnp.arange(size) < end, slots, n * k)
            v = values.at[slots].get(mode="fill", fill_value=0)
            E = residual.at[slots // k].get(mode="fill", fill_value=0) + v[:, None] * atom
            return slots, E, v

        def fold(f, total):
            def add(number, total):
                _, E, v = block(number, values, residual)
                return f(total, E, v)

            return jax.lax.fori_loop(0, blocks, add, total)

        def put(number, carry):
            slots, E, _ = block(number, *carry)
            v = signs.project_values(matmul(E, new))
            values, residual = carry
            values = values.at[slots].set(v, mode="drop")
            return values, residual.at[slots // k].set(E - v[:, None] * new, mode="drop")

        blocks = (end - start + size - 1) // size
        new = fit_atom(fold, signs, atom)
        values, residual = jax.lax.fori_loop(0, blocks, put, (values, residual))
        return D.at[j].set(new), values, residual

    atoms = signs.project_atom(D.astype(known.dtype))
    length = jnp.linalg.norm(atoms, axis=1)
    # The values of a zero atom change nothing, and say in what direction it is to go.
    scale = jnp.where(length > 0, length, 1).at[learnt.indices].get(mode="fill", fill_value=0)
    carry = _unit(atoms), (learnt.values * scale).ravel(), known - codes.combine(atoms, learnt)
    atoms, values, _ = jax.lax.fori_loop(0, m, sweep, carry)
    return atoms.astype(D.dtype), _put(code, dataclasses.replace(learnt, values=values.reshape(n, k)), finite)


def _block_size(uses: float) -> int:
    """Rows of a block: many enough for few blocks an atom, few enough for little padding; 256 is best, measured."""
    size = 32
    while size < min(uses / 2, 256):
        size *= 2
    return size


def _leading(fold, signs: _Signs, atom):
    """The leading right singular vector of `E`, of the atom's sign; the atom itself where rounding leaves it better."""
    covariance = fold(lambda total, E, _: total + matmul(E.T, E), jnp.zeros((atom.size, atom.size), atom.dtype))
    new = _eigenvector(covariance)
    new = jnp.where(jnp.sum(new * atom) < 0, -new, new)
    gain, gain_before = (jnp.sum(x * matmul(covariance, x)) for x in (new, atom))
    return jnp.where(gain > gain_before, new, atom)


def _eigenvector(covariance: Float[Array, "d d"]) -> Float[Array, " d"]:
    """The leading eigenvector of a positive semi-definite matrix, by squaring it until it has rank one.

    After `p` squarings what is lost of the eigenvalue is at most `d/(2e 2ᵖ)` of it, whatever the gap to the next one.
    """

    def square(carry):
        power, _, count = carry
        power = matmul(power, power)
        return divide(power, jnp.trace(power)), jnp.sum(jnp.diagonal(power)), count + 1

    # For a trace of 1, the trace of the square is 1 at rank one alone.
    carry = (divide(covariance, jnp.trace(covariance)), jnp.zeros((), covariance.dtype), 0)
    power, _, _ = jax.lax.while_loop(lambda carry: (carry[1] < 1 - 1e-6) & (carry[2] < 24), square, carry)
    return _unit(matmul(covariance, power[jnp.argmax(jnp.diagonal(power))]))


def _power_step(fold, signs: _Signs, atom):
    """`Eᵀv`, of norm 1."""
    return _step_to(fold(lambda total, E, v: total + matmul(v, E), jnp.zeros_like(atom)), signs, atom)


def _step_to(direction, signs: _Signs, atom):
    """A direction as an atom; the atom before where that is 0, or out of range."""
    new = _unit(signs.project_atom(direction))
    return jnp.where(jnp.isfinite(new).all() & (new != 0).any(), new, atom)


def _alternating(fold, signs: _Signs, atom):
    """Under constraints: `v` and `d` in turn, from the atom or the leading singular vector, whichever fits better."""
    singular = _leading(fold, signs, atom)
    starts = jnp.stack([atom, *(_step_to(sign * singular, signs, atom) for sign in (1, -1))])
    gain = fold(
        lambda total, E, _: total + jnp.sum(signs.project_values(matmul(E, starts.T)) ** 2, axis=0),
        jnp.zeros(3, atom.dtype),
    )

    def alternate(_, d):
        towards = fold(lambda total, E, _: total + matmul(signs.project_values(matmul(E, d)), E), jnp.zeros_like(d))
        return _step_to(towards, signs, d)

    return jax.lax.fori_loop(0, _ROUNDS, alternate, starts[jnp.argmax(gain)])
