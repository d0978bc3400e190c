"""The hard set: supports on which a solver may fail, cycle or lie. Each row must end honest, finite, and no worse."""

import dataclasses
import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from problems import Problem, assert_same_bits, atoms_of, each_sign, f64, objective, optimum, problem, with_code

import jaxsae
from jaxsae import SparseCode, Status

# One shape for almost everything, and so one compilation a solver.
ROWS, D, M, K = 32, 16, 32, 8
PADDING = M
base = functools.partial(problem, batch=(ROWS,), d=D, m=M, k=K)

SOLVERS = [
    None,
    jaxsae.ProjectedGradient(),
    jaxsae.FISTA(),
    jaxsae.ConjugateGradient(),
    jaxsae.BlockPivoting(),
]


def name(solver) -> str:
    return "default" if solver is None else type(solver).__name__


each_solver = pytest.mark.parametrize("solver", SOLVERS, ids=name)
TOL = 1e-5
CERTIFIED = 1e-4  # what a row that converged at 1e-5 must be certified to, by other arithmetic than the solver's


# --- the cases --------------------------------------------------------------------------------------------


def near(atoms, rng, cosine=0.9998) -> np.ndarray:
    """An atom beside each of these, at this cosine."""
    aside = rng.normal(size=atoms.shape)
    aside -= atoms * ((aside * atoms).sum(1) / (atoms**2).sum(1))[:, None]
    length = np.linalg.norm(atoms, axis=1) / np.linalg.norm(aside, axis=1)
    return cosine * atoms + np.sqrt(1 - cosine**2) * aside * length[:, None]


# Two sets of atoms in integers, of 3 and 5 dimensions, with a target each. Block pivoting that always exchanges all
# that is infeasible goes round in circles on both.
CYCLE_3 = np.array([[-1, -2, 1], [-1, -2, 2], [-1, 1, -2]]), np.array([0, 1, 3])
CYCLE_5 = (
    np.array([[-2, 2, 0, -1, -2], [0, 1, -1, 1, -1], [-2, -1, 2, -1, 2], [-1, -1, 2, -1, 2], [-1, 0, 1, 2, -2]]),
    np.array([-3, -1, -2, 2, -2]),
)


@functools.cache
def hard(case: str) -> Problem:
    """Rows of one kind; the supports of neighbouring atoms hold whole pairs `2j, 2j + 1`."""
    dictionary, y, code = base(coherence=0.5)
    dictionary, y, values, indices = f64(dictionary), f64(y), f64(code.values), np.array(code.indices)
    rng = np.random.default_rng(1)
    neighbours = (2 * np.arange(ROWS)[:, None] + np.arange(K)) % M
    first = np.broadcast_to(np.arange(K), (ROWS, K))  # every row on atoms 0 to 7
    pattern = rng.integers(0, 2, (ROWS, K))
    match case:
        case "random":
            pass
        case "equal atoms":
            dictionary[1::2], indices = dictionary[::2], neighbours
        case "pairs at cosine 0.9998":
            dictionary[1::2], indices = near(dictionary[::2], rng), neighbours
        case "all atoms within cosine 0.9998":
            dictionary = near(np.tile(dictionary[:1], (M, 1)), rng)
        case "opposite atoms":
            dictionary[1::2], indices = -dictionary[::2], neighbours
        case "pairs at cosine -0.9998":
            dictionary[1::2], indices = -near(dictionary[::2], rng), neighbours
        case "atoms that are sums of others":
            dictionary, indices = np.round(16 * dictionary) / 16, neighbours  # few bits, so that the sums are exact
            dictionary[2::4], dictionary[3::4] = dictionary[::4] + dictionary[1::4], dictionary[::4] - dictionary[1::4]
        case "zero atoms":
            dictionary[::3] = 0
        case "only zero atoms":
            dictionary[:] = 0
        case "an index twice":
            indices[:, 1] = indices[:, 0]
        case "one index only":
            indices[:] = indices[:, :1]
        case "more atoms than dimensions":
            dictionary[:, 3:], y[:, 3:] = 0, 0
        case "one dimension":
            dictionary[:, 1:], y[:, 1:] = 0, 0
        case "0 to 8 slots":
            unused = np.arange(K) >= np.arange(ROWS)[:, None] % (K + 1)
            values[unused], indices[unused] = 0, PADDING
        case "only padding":
            values[:], indices[:] = 0, PADDING
        case "c < 0":
            dictionary, y = np.abs(dictionary), -np.abs(y)
        case "c = 0":
            dictionary[:, 8:], y[:, :8] = 0, 0
        case "y = 0":
            y[::2] = 0
        case "y in the span":
            y = np.einsum("nk,nkd->nd", pattern * values, dictionary[indices])
        case "y in the span of equal atoms":
            dictionary[1::2], indices = dictionary[::2], neighbours
            y = np.einsum("nk,nkd->nd", pattern * values, dictionary[indices])
        case "norms over 1e6":
            norms = rng.permutation(np.logspace(-3, 3, M))
            dictionary, values = dictionary * norms[:, None], values / norms[indices]
        case "equal atoms of norms over 1e6":
            dictionary[1::2], indices = 2.0**-20 * dictionary[::2], neighbours
        case "data of 1e20" | "data of 1e-20":
            unit = float(case.split()[-1])
            y, values = unit * y, unit * values
        case "atoms of 1e20" | "atoms of 1e-20":
            unit = float(case.split()[-1])
            dictionary, values = unit * dictionary, values / unit
        case "all of 1e20" | "all of 1e-20":
            unit = float(case.split()[-1])
            dictionary, y = unit * dictionary, unit * y
        case "rows from 1e-20 to 1e20":
            units = np.logspace(-20, 20, ROWS)[:, None]
            y, values = units * y, units * values
        case "not finite: y":
            y[:3, 3] = np.nan, np.inf, -np.inf
        case "not finite: start":
            values[:3, 2] = np.nan, np.inf, -np.inf
        case "not finite: atoms":
            dictionary[indices[0, :3], 7] = np.nan, np.inf, -np.inf
        case "ties: orthogonal atoms":
            dictionary[:8], indices = np.eye(8, D), first
            y = np.pad(rng.integers(-1, 2, (ROWS, 8)), ((0, 0), (0, 8)))
        case "ties: atoms in a circle":  # singular, and symmetric under each turn
            circle = sum(n * np.roll(np.eye(8), turn, axis=1) for n, turn in ((2, 0), (1, 1), (1, -1)))
            dictionary[:8], indices = np.pad(circle, ((0, 0), (0, 8))), first
            y = np.pad(rng.integers(-1, 2, (ROWS, 8)), ((0, 0), (0, 8)))
            y[0], y[1, :8] = 1, [1, -1] * 4
        case "ties: bounds met exactly":  # value and gradient are both 0 for half of the atoms
            dictionary[:8], indices = np.pad(np.tril(np.ones((8, 8))), ((0, 0), (0, 8))), first
            y[:, :8] = pattern @ dictionary[:8, :8]
        case "cycles of block pivoting":
            dictionary[:8], y, values, indices = 0, np.zeros_like(y), pattern, first
            for at, (atoms, target) in ((slice(0, 3), CYCLE_3), (slice(3, 8), CYCLE_5)):
                dictionary[at, at], y[:, at] = atoms, rng.integers(0, 3, (ROWS, 1)) * target
        case "exponentially many pivots":  # Murty's matrix times its transpose: Fathi (1979)
            factor = np.eye(8) + 2 * np.tril(np.ones((8, 8)), -1)
            dictionary[:8], indices = np.pad(factor, ((0, 0), (0, 8))), first
            c = rng.permuted(np.broadcast_to(2.0 ** np.arange(8), (ROWS, 8)), axis=1)
            c[:2] = np.ones(8), 2.0 ** np.arange(8)
            y[:, :8] = np.linalg.solve(factor, c.T).T
            y[:, 8:], values = 0, pattern
        case "start at the optimum":
            values = optimum(dictionary, y, code).values
        case "start far away":
            values *= 1e6
        case "start at 1e25":
            values *= 1e25
        case "start below zero":
            values = -values
        case _:
            raise ValueError(case)
    code = SparseCode(jnp.asarray(values, jnp.float32), jnp.asarray(indices, jnp.int32), M)
    return Problem(jnp.asarray(dictionary, jnp.float32), jnp.asarray(y, jnp.float32), code)


NOT_FINITE = ["not finite: y", "not finite: start", "not finite: atoms"]
WIDE = ["more atoms than dimensions", "one dimension"]
OUT_OF_RANGE = ["start at 1e25"]  # whose square is: honest is enough
TIES = [
    "ties: orthogonal atoms", "ties: atoms in a circle", "ties: bounds met exactly",
    "cycles of block pivoting", "exponentially many pivots",
]  # fmt: skip
SOLVABLE = [
    "random", "equal atoms", "pairs at cosine 0.9998", "opposite atoms", "pairs at cosine -0.9998",
    "all atoms within cosine 0.9998", "atoms that are sums of others", "zero atoms", "only zero atoms",
    "an index twice", "one index only",
    *WIDE, "0 to 8 slots", "only padding", "c < 0", "c = 0", "y = 0", "y in the span", "y in the span of equal atoms",
    "norms over 1e6", "equal atoms of norms over 1e6", "data of 1e20", "data of 1e-20", "atoms of 1e20",
    "atoms of 1e-20", "all of 1e20", "all of 1e-20", "rows from 1e-20 to 1e20", *TIES,
    "start at the optimum", "start far away", "start below zero",
]  # fmt: skip
each_case = pytest.mark.parametrize("case", SOLVABLE + OUT_OF_RANGE + NOT_FINITE)


# --- what they are judged by: numpy and scipy in float64 --------------------------------------------------


def least_by_scipy(p: Problem) -> np.ndarray:
    """The least squared error of each row."""
    return 2 * objective(p.dictionary, p.y, p.code.replace(values=optimum(*p).values))


def brute_force(p: Problem, nonnegative: bool) -> np.ndarray:
    """The least squared error of each row: the best of the least squares on all 2^k supports that are feasible."""
    atoms, y = atoms_of(p.dictionary, p.code), f64(p.y)
    k = atoms.shape[1]
    best = (y**2).sum(1)
    for chosen in itertools.product([False, True], repeat=k) if nonnegative else [(True,) * k]:
        on = atoms[:, np.array(chosen)]
        z = np.einsum("nds,nd->ns", np.linalg.pinv(on, rcond=1e-12), y)
        error = ((y - np.einsum("ns,nsd->nd", z, on)) ** 2).sum(1)
        best = np.where(np.all(z >= 0, axis=1) | (not nonnegative), np.minimum(best, error), best)
    return best


def added(p: Problem, code: SparseCode, least) -> np.ndarray:
    """How much more squared error each row has than the least possible, relative to `‖y‖²`; 0 where `y = 0`."""
    power = (f64(p.y) ** 2).sum(-1)
    return (2 * objective(p.dictionary, p.y, code) - least) / np.where(power > 0, power, 1)


def kkt_residual(p: Problem, code: SparseCode, nonnegative: bool) -> np.ndarray:
    atoms, z = atoms_of(p.dictionary, code), f64(code.values)
    norms = np.linalg.norm(atoms, axis=-1)
    gradient = np.einsum("nkd,nd->nk", atoms, np.einsum("nk,nkd->nd", z, atoms) - f64(p.y))
    violation = np.where((z > 0) | (not nonnegative), np.abs(gradient), np.maximum(-gradient, 0)).max(1, initial=0)
    scale = norms.max(1, initial=0) * np.linalg.norm(f64(p.y), axis=1)
    return violation / np.where(scale > 0, scale, 1)


def is_finite(p: Problem) -> np.ndarray:
    parts = (atoms_of(p.dictionary, p.code), f64(p.y), f64(p.code.values))
    return np.all([np.isfinite(part).reshape(len(part), -1).all(1) for part in parts], axis=0)


def keep(tree, rows):
    return jax.tree.map(lambda leaf: np.asarray(leaf)[rows], tree)


def assert_honest(p: Problem, code: SparseCode, info: jaxsae.RefitInfo, nonnegative: bool, tol: float):
    """In each row, status and residual are true, values are finite, and the result is no worse than the start."""
    finite = is_finite(p)
    np.testing.assert_array_equal(np.asarray(info.status) == Status.NONFINITE, ~finite)
    assert_same_bits(keep(code, ~finite), keep(p.code, ~finite))
    certificate = jaxsae.certify(p.dictionary, p.y, code, nonnegative=nonnegative)
    code, start, info, certificate = (keep(tree, finite) for tree in (code, p.code, info, certificate))
    p = p._replace(y=np.asarray(p.y)[finite])

    z = f64(code.values)
    assert np.all(np.isfinite(z))
    assert np.all(z >= 0) or not nonnegative
    start = with_code(start, values=np.maximum(start.values, 0)) if nonnegative else start
    before, after = (objective(p.dictionary, p.y, c) for c in (start, code))
    assert np.all(after <= before + 1e-6 * (f64(p.y) ** 2).sum(-1)), np.max(added(p, code, 2 * before))

    kkt, converged = kkt_residual(p, code, nonnegative), info.status == Status.CONVERGED
    assert np.all(info.kkt[converged] <= tol)
    assert np.all(kkt[converged] <= CERTIFIED), kkt[converged].max()
    assert np.all(certificate.kkt[converged] <= CERTIFIED), certificate.kkt[converged].max()
    assert np.all(info.kkt[~converged] > tol)
    # A residual at the tolerance may be seen a little below it from elsewhere.
    assert np.all(kkt[~converged] > 0.5 * tol), kkt[~converged].min()
    for told in (info.kkt, certificate.kkt):
        np.testing.assert_allclose(told, kkt, rtol=1e-2, atol=CERTIFIED / 2)
    assert np.all(certificate.gap >= 0)  # infinite where its square is out of range, but never NaN


# --- the promises -----------------------------------------------------------------------------------------


@each_solver
@each_sign
@each_case
def test_every_row_is_told_the_truth_and_is_no_worse_than_it_began(case, nonnegative, solver):
    p = hard(case)
    refitted, info = jaxsae.refit(*p, solver, nonnegative=nonnegative)
    assert_honest(p, refitted, info, nonnegative, getattr(solver, "tol", TOL))


@each_solver
@each_sign
@pytest.mark.parametrize("case", NOT_FINITE)
def test_a_row_that_is_not_finite_touches_no_other(case, nonnegative, solver):
    good, bad = (jaxsae.refit(*hard(c), solver, nonnegative=nonnegative) for c in ("random", case))
    finite = is_finite(hard(case))
    assert_same_bits(keep(bad, finite), keep(good, finite))


@pytest.mark.parametrize("solver", SOLVERS[1:], ids=name)
@pytest.mark.parametrize("max_steps", [0, 1, 3])
@each_case
def test_a_row_that_is_stopped_early_is_told_so(case, max_steps, solver):
    p = hard(case)
    if solver.fallback is not None:
        solver = solver.replace(fallback=None)
    refitted, info = jaxsae.refit(*p, solver.replace(max_steps=max_steps))
    assert np.all(np.asarray(info.steps) <= max_steps)
    assert_honest(p, refitted, info, True, solver.tol)


@each_sign
@pytest.mark.parametrize("case", SOLVABLE)
def test_the_default_solver_converges_on_every_row(case, nonnegative):
    _, info = jaxsae.refit(*hard(case), nonnegative=nonnegative)
    worst = int(np.argmax(info.kkt))
    assert np.all(np.asarray(info.status) == Status.CONVERGED), f"row {worst}: kkt {info.kkt[worst]:.1e}"


least_error = functools.cache(lambda case, nonnegative: brute_force(hard(case), nonnegative))


@each_solver
@each_sign
@pytest.mark.parametrize("case", SOLVABLE)
def test_no_support_within_the_support_does_better(case, nonnegative, solver):
    p = hard(case)
    refitted, _ = jaxsae.refit(*p, solver, nonnegative=nonnegative)
    objective_gap = added(p, refitted, least_error(case, nonnegative))
    assert np.min(objective_gap) >= -1e-9, "brute force should be the least"
    if "0.9998" not in case:  # a gap in float32 may fall short on nearly singular supports
        gap = f64(jaxsae.certify(p.dictionary, p.y, refitted, nonnegative=nonnegative).gap)
        assert np.all(objective_gap <= 1.001 * gap + 1e-6), (objective_gap - gap).max()
    if solver is None:
        assert np.max(objective_gap) <= (1e-4 if case in WIDE else 1e-6)


@pytest.mark.parametrize(("atoms", "target"), [CYCLE_3, CYCLE_5], ids=["3 atoms", "5 atoms"])
def test_the_cycles_are_cycles(atoms, target):
    gram, c, on = atoms @ atoms.T, atoms @ target, np.zeros(len(atoms), bool)
    seen = []
    while not any(np.array_equal(on, before) for before in seen):
        seen.append(on)
        z = np.zeros(len(atoms))
        z[on] = np.linalg.solve(gram[np.ix_(on, on)], c[on])
        infeasible = np.where(on, z, gram @ z - c) < 0
        assert infeasible.any(), "it has converged"
        on = on ^ infeasible


@each_solver
@pytest.mark.parametrize("k", [0, 1])
def test_no_slot_is_an_empty_answer_and_one_slot_a_projection(k, solver):
    p = base(k=k)
    atoms = atoms_of(p.dictionary, p.code)
    z = np.einsum("nkd,nd->nk", atoms, f64(p.y)) / np.sum(atoms**2, axis=2)
    refitted, info = jaxsae.refit(*p, solver)
    assert np.all(np.asarray(info.status) == Status.CONVERGED)
    np.testing.assert_allclose(refitted.values, np.maximum(z, 0), rtol=1e-4, atol=1e-4)


@each_sign
def test_a_code_that_decodes_to_something_is_not_optimal_for_nothing(nonnegative):
    p = hard("start far away")._replace(y=jnp.zeros((ROWS, D)))
    assert np.all(np.asarray(jaxsae.certify(*p, nonnegative=nonnegative).kkt) > TOL)


# --- the order, the number and the units of things --------------------------------------------------------


def changed(p: Problem, change: str) -> tuple[Problem, np.ndarray, float]:
    """The same rows told otherwise; which rows, and the units of their answer."""
    y, values, indices = (np.array(leaf) for leaf in (p.y, p.code.values, p.code.indices))
    rng, rows, unit = np.random.default_rng(2), np.arange(ROWS), 1.0
    match change:
        case "support permuted":
            order = rng.permuted(np.broadcast_to(np.arange(K), indices.shape), axis=1)
            values, indices = (np.take_along_axis(x, order, axis=1) for x in (values, indices))
        case "rows permuted":
            rows = rng.permutation(ROWS)
        case "half of the rows":
            rows = np.arange(3, ROWS, 2)
        case "y scaled":
            unit = 3e7
        case "y scaled by a power of two":
            unit = 2.0**30
        case "padding added":
            values = np.insert(values, [0, 3, 3, K], 0, axis=1)
            indices = np.insert(indices, [0, 3, 3, K], PADDING, axis=1)
    values, y = np.float32(unit) * values, np.float32(unit) * y
    code = SparseCode(jnp.asarray(values[rows]), jnp.asarray(indices[rows]), M)
    return Problem(p.dictionary, jnp.asarray(y[rows]), code), rows, unit


TO_THE_BIT = ["rows permuted", "y scaled by a power of two", "half of the rows"]
CHANGES = ["rows permuted", "y scaled by a power of two", "support permuted", "y scaled", "padding added"]


@pytest.mark.parametrize(
    ("change", "solver"),
    [*itertools.product(CHANGES, SOLVERS), pytest.param("half of the rows", None, marks=pytest.mark.bits)],
    ids=lambda value: value if isinstance(value, str) else name(value),
)
@pytest.mark.parametrize(
    "case",
    [
        "random", "equal atoms", "pairs at cosine 0.9998", "pairs at cosine -0.9998", "more atoms than dimensions",
        "norms over 1e6", *TIES,
    ],
)  # fmt: skip
def test_what_is_told_otherwise_is_answered_alike(case, change, solver):
    if solver is not None:  # at 1e-5, answers along the pairs' eigenvalue λ of 2e-4 may differ by √(k/λ)·1e-5: 2e-3
        solver = dataclasses.replace(solver, tol=1e-6)
    p = hard(case)
    told, rows, unit = changed(p, change)
    answer, again = (f64(jaxsae.refit(*q, solver)[0].values) for q in (p, told))
    if change in TO_THE_BIT:
        assert_same_bits(again / unit, answer[rows])
    # Where values are not unique, what they decode to is. Rounding `G` moves the thin directions of near pairs most.
    decoded = np.einsum("nk,nkd->nd", answer, atoms_of(p.dictionary, p.code))[rows]
    decoded_again = np.einsum("nk,nkd->nd", again / unit, atoms_of(told.dictionary, told.code))
    bound = (1e-3 if "0.9998" in case else 1e-4) * np.linalg.norm(f64(p.y), axis=1)[rows]
    assert np.all(np.linalg.norm(decoded_again - decoded, axis=1) <= bound)


# --- accuracy ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("cosine", [0.3, 0.8, 0.99])
@pytest.mark.parametrize(
    ("k", "d", "dtype"),
    [
        *((k, d, np.float32) for k, d in [(4, 16), (32, 64), (64, 64), (9, 4), (100, 32)]),
        *((k, d, np.float64) for k, d in [(4, 16), (64, 64), (9, 4)]),
    ],
)
def test_the_default_solver_adds_next_to_no_error(k, d, cosine, dtype):
    share = np.sqrt(cosine / (1 - cosine))  # of the direction common to all atoms
    with jax.enable_x64(dtype == np.float64):
        p = problem(batch=(64,), d=d, m=2 * k, k=k, coherence=share / (1 + share), dtype=dtype)
        noise = np.random.default_rng(1).normal(size=(32, d))
        p = p._replace(y=p.y.at[32:].set(noise))  # in all directions, those that the atoms hardly have too
        refitted, info = jaxsae.refit(*p)
    assert (refitted.values.dtype, info.kkt.dtype) == (dtype, dtype)
    assert np.max(added(p, refitted, least_by_scipy(p))) <= (1e-6 if k <= d else 1e-4)
    kkt, converged = kkt_residual(p, refitted, True), np.asarray(info.status) == Status.CONVERGED
    assert np.max(kkt, where=converged, initial=0) <= CERTIFIED
    assert np.min(kkt, where=~converged, initial=1) > 0.5 * TOL


# --- scipy's own bug reports ------------------------------------------------------------------------------


def monotone_rates(seed: int):
    """Rates that never fall, fitted to counts in bins of which some are empty."""
    rng, bins = np.random.default_rng(seed), np.arange(67)
    trials = rng.poisson(200 * np.exp(-((bins - 38) ** 2) / 250)) * (bins % 31 != 2)
    hits = 0.72 * rng.binomial(trials, 1 / (1 + np.exp((35 - bins) / 4)))
    full = trials > 0
    equal_to_the_next = np.eye(67) - np.eye(67, k=1)
    system = np.where(full[:, None], trials[:, None] * np.tri(67), equal_to_the_next)
    weight = np.sqrt(np.where(full, trials, 1))
    return weight[:, None] * system, weight * hits


def powers_of_time():
    """Fitted to ones at 89 times; the columns are from 1 to 1e13 long."""
    t = np.geomspace(1, 4e4, 89)
    scale = (9 - 0.2 * np.log(t)) * (1 + 0.1 * np.random.default_rng(0).normal(size=89))
    return np.stack([3 / t, np.ones(89), 0.44 * t, t**2 / 3, t**3 / 2], axis=1) / scale[:, None], np.ones(89)


def uses(seed: int, d: int, k: int, used: int):
    """A system whose solution has so many positive values."""
    rng = np.random.default_rng(seed)
    a = rng.normal(size=(d, k)) / 5
    return a, a[:, :used] @ rng.uniform(20, 120, used) + 5 * rng.normal(size=d)


def sum_by_weight():
    """A last equation of weight 200 all but fixes the sum of the values."""
    a = np.concatenate([np.random.default_rng(0).uniform(size=(3, 4)), np.full((1, 4), 200.0)])
    return a, a[:, 0]


def empty_samples():
    """More columns than equations, two of which are empty."""
    rng = np.random.RandomState(42)
    a, y = rng.randn(5, 12), rng.randn(5)
    a[:2] = 0
    return a, y


# Rebuilt from their descriptions, but for gh-21021 "tall" (given, to three digits) and gh-22791 (given).
REPORTS = {
    "gh-20168": monotone_rates(0),
    "gh-20168 again": monotone_rates(1),
    "gh-20302": powers_of_time(),
    "gh-21021 wide": uses(0, d=5, k=8, used=5),
    "gh-21021 tall": (
        np.array([[0.251, -0.240], [0.511, 0.287], [0.820, -0.0352], [0.0307, -0.0777]]),
        np.array([24.5, 28.0, 41.1, -1.21]),
    ),
    "gh-21021 one column used": uses(5, d=25, k=5, used=1),
    "gh-20813, which gh-21021 closed": sum_by_weight(),
    "gh-22791": empty_samples(),
}
WIDE_REPORTS = [title for title, (a, _) in REPORTS.items() if a.shape[1] > a.shape[0]]


@functools.cache
def reported(start: str) -> Problem:
    """All of scipy's reports as rows of one shape: unused slots and equations of zeros fill them up."""
    d, k = (max(a.shape[axis] for a, _ in REPORTS.values()) for axis in (0, 1))
    m = sum(a.shape[1] for a, _ in REPORTS.values())
    dictionary, y = np.zeros((m, d)), np.zeros((len(REPORTS), d))
    values, indices = np.zeros((len(REPORTS), k)), np.full((len(REPORTS), k), m)
    taken = 0
    for row, (a, target) in enumerate(REPORTS.values()):
        slots = np.arange(a.shape[1])
        indices[row, slots] = taken + slots
        dictionary[taken + slots, : len(a)], y[row, : len(a)] = a.T, target
        if start == "equal shares":
            values[row, slots] = np.linalg.norm(target) / np.linalg.norm(a, axis=0) / len(slots)
        taken += len(slots)
    code = SparseCode(jnp.asarray(values, jnp.float32), jnp.asarray(indices, jnp.int32), m)
    return Problem(jnp.asarray(dictionary, jnp.float32), jnp.asarray(y, jnp.float32), code)


@each_solver
@pytest.mark.parametrize("start", ["zeros", "equal shares"])
def test_the_instances_of_scipys_bug_reports(start, solver):
    p = reported(start)
    refitted, info = jaxsae.refit(*p, solver)
    assert_honest(p, refitted, info, True, TOL)
    if solver is None:
        objective_gap = dict(zip(REPORTS, added(p, refitted, least_by_scipy(p)), strict=True))
        assert {title: e for title, e in objective_gap.items() if e > (1e-4 if title in WIDE_REPORTS else 1e-6)} == {}
