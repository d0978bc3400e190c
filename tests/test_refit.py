import functools
import itertools

import chex
import jax
import jax.flatten_util
import jax.numpy as jnp
import numpy as np
import pytest
from problems import (
    Problem,
    assert_same_bits,
    atoms_of,
    each_sign,
    f64,
    objective,
    objective_gap,
    optimum,
    problem,
    projected,
    residual,
    with_code,
)

import jaxsae
from jaxsae import SparseCode, Status

# Most tests share one shape, and so one compilation.
ROWS, K = 64, 6
PADDING = 32
problem = functools.partial(problem, batch=(ROWS,), k=K)

SOLVERS = pytest.mark.parametrize(
    "solver",
    [jaxsae.ConjugateGradient(fallback=None), jaxsae.FISTA(), jaxsae.ProjectedGradient(max_steps=50_000)],
    ids=lambda solver: type(solver).__name__,
)
EXACT = jaxsae.FISTA(tol=1e-13, max_steps=100_000)  # in float64


# --- what a refit promises --------------------------------------------------------------------------------


@SOLVERS
@each_sign
@pytest.mark.parametrize("coherence", [0.0, 0.8])
def test_a_refit_reaches_the_optimum_on_the_support_it_was_given(solver, nonnegative, coherence):
    dictionary, y, code = problem(coherence=coherence)
    refitted, info = jaxsae.refit(dictionary, y, code, solver, nonnegative=nonnegative)
    assert np.all(np.asarray(info.status) == Status.CONVERGED)
    assert np.all(np.asarray(info.kkt) <= 1e-5)
    assert np.all(np.asarray(info.steps) <= solver.max_steps)
    assert_same_bits(refitted.indices, code.indices)
    assert np.max(objective_gap(dictionary, y, refitted, nonnegative)) <= 1e-6
    if nonnegative:
        z = np.asarray(refitted.values)
        assert np.all(z >= 0)
        assert np.any(z == 0), "some bounds should be active, or the test says nothing about them"


@SOLVERS
@each_sign
@pytest.mark.parametrize("max_steps", [0, 1, 3, 2000])
@pytest.mark.parametrize("start", ["random", "signed", "optimal", "nearly optimal"])
def test_a_row_never_ends_worse_than_it_began(solver, nonnegative, max_steps, start):
    dictionary, y, code = problem(coherence=0.8)
    rng = np.random.default_rng(1)
    best = f64(optimum(dictionary, y, code, nonnegative).values)
    values = {
        "random": code.values,
        "signed": rng.normal(size=best.shape),
        "optimal": best,
        "nearly optimal": best * (1 + 1e-3 * rng.normal(size=best.shape)),
    }[start]
    code = with_code(code, values=np.asarray(values, np.float32))
    refitted, info = jaxsae.refit(dictionary, y, code, solver.replace(max_steps=max_steps), nonnegative=nonnegative)
    before, after = (objective(dictionary, y, c) for c in (projected(code, nonnegative), refitted))
    # The answer is rounded to float32, which moves the objective in its last digit.
    assert np.all(after <= before + 2e-7 * before + 1e-12)
    assert np.all(np.asarray(info.steps) <= max_steps)


def test_without_steps_the_projected_start_comes_back_to_the_bit():
    dictionary, y, code = problem()
    code = with_code(code, values=0.3 * (np.asarray(code.values) - 0.7))
    for nonnegative in (True, False):
        refitted, info = jaxsae.refit(dictionary, y, code, jaxsae.FISTA(max_steps=0), nonnegative=nonnegative)
        assert_same_bits(refitted.values, projected(code, nonnegative).values)
        assert np.all(np.asarray(info.status) == Status.MAX_STEPS)


def test_a_start_far_worse_than_zero_gives_way_to_zero():
    dictionary, y, code = problem()
    code = with_code(code, values=np.full(code.values.shape, 1e3, np.float32))
    assert not np.any(jaxsae.refit(dictionary, y, code, jaxsae.FISTA(max_steps=0))[0].values)


@SOLVERS
@each_sign
@pytest.mark.parametrize("coherence", [0.0, 0.8])
def test_a_refit_of_a_refit_takes_no_step(solver, nonnegative, coherence):
    dictionary, y, code = problem(coherence=coherence)
    refitted, _ = jaxsae.refit(dictionary, y, code, solver, nonnegative=nonnegative)
    # The residual of the rounded answer may lie a last digit above a tolerance that was just met.
    solver = solver.replace(tol=1.1 * solver.tol)
    again, info = jaxsae.refit(dictionary, y, refitted, solver, nonnegative=nonnegative)
    assert not np.any(info.steps)
    assert_same_bits(again, refitted)


@SOLVERS
def test_after_a_refit_the_reconstruction_is_neither_shrunk_nor_stretched(solver):
    # ‖x̂‖² = ⟨y, x̂⟩ is complementarity, row by row: a check that knows nothing of the solver.
    dictionary, y, code = problem()
    refitted, _ = jaxsae.refit(dictionary, y, code, solver)
    x_hat = f64(y) - residual(dictionary, y, refitted)
    power, cross = (x_hat**2).sum(-1), (f64(y) * x_hat).sum(-1)
    np.testing.assert_allclose(power, cross, atol=5e-5 * (f64(y) ** 2).sum(-1).max())
    shrunk = f64(y) - residual(dictionary, y, with_code(refitted, values=0.8 * refitted.values))
    assert np.all((shrunk**2).sum(-1) < (f64(y) * shrunk).sum(-1))


# --- a row is alone ---------------------------------------------------------------------------------------


def spoiled(good: Problem, where: str, bad: float) -> tuple[Problem, np.ndarray]:
    """The problem with one number made bad, and which rows that touches."""
    dictionary, y, values = (np.array(leaf) for leaf in (good.dictionary, good.y, good.code.values))
    row, atom = 5, np.asarray(good.code.indices)[5, 0]
    hit = np.arange(ROWS) == row
    match where:
        case "y":
            y[row, 3] = bad
        case "start":
            values[row, 2] = bad
        case "atom":
            dictionary[atom, 7] = bad
            hit = np.any(np.asarray(good.code.indices) == atom, axis=1)
    return Problem(jnp.asarray(dictionary), jnp.asarray(y), with_code(good.code, values=values)), hit


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("where", ["y", "start", "atom"])
@each_sign
def test_a_row_that_is_not_finite_comes_back_unchanged_and_touches_no_other(bad, where, nonnegative):
    good = problem()
    # Negative starts too: unchanged means not even projected.
    good = good._replace(code=with_code(good.code, values=np.asarray(good.code.values) - 1))
    expected = jaxsae.refit(*good, nonnegative=nonnegative)
    broken, hit = spoiled(good, where, bad)
    refitted, info = jaxsae.refit(*broken, nonnegative=nonnegative)
    np.testing.assert_array_equal(np.asarray(info.status) == Status.NONFINITE, hit)
    assert_same_bits(refitted.values[hit], broken.code.values[hit])
    assert np.all(np.isnan(info.kkt[hit]))
    assert not np.any(info.steps[hit])
    others = [jax.tree.map(lambda leaf: np.asarray(leaf)[~hit], out) for out in ((refitted, info), expected)]
    assert_same_bits(*others)


@pytest.mark.bits
def test_a_row_is_the_same_to_the_bit_alone_in_a_crowd_and_under_vmap():
    dictionary, y, code = problem(batch=(4096,), coherence=0.5)
    refit = functools.partial(jaxsae.refit, dictionary)
    crowd = refit(y, code)
    first = jax.tree.map(lambda leaf: leaf[:ROWS], (y, code))
    expected = jax.tree.map(lambda leaf: leaf[:ROWS], crowd)
    assert_same_bits(refit(*first), expected)
    folded = jax.tree.map(lambda leaf: leaf.reshape(4, 16, *leaf.shape[1:]), first)
    mapped = jax.vmap(jax.vmap(refit))(*folded)
    assert_same_bits(jax.tree.map(lambda leaf: leaf.reshape(ROWS, *leaf.shape[2:]), mapped), expected)
    for row in (0, 1, 4095):
        alone = refit(*jax.tree.map(lambda leaf, row=row: leaf[row], (y, code)))
        assert_same_bits(alone, jax.tree.map(lambda leaf, row=row: leaf[row], crowd))


@pytest.mark.bits
def test_vmap_over_dictionaries_is_one_refit_each():
    members = [problem(seed) for seed in range(3)]
    stacked = jax.tree.map(lambda *leaves: jnp.stack(leaves), *members)
    mapped = jax.vmap(jaxsae.refit)(*stacked)
    for i, member in enumerate(members):
        assert_same_bits(jax.tree.map(lambda leaf, i=i: leaf[i], mapped), jaxsae.refit(*member))


@pytest.mark.bits
def test_vmap_over_tolerances_and_ridges():
    dictionary, y, code = problem()
    tols, ridges = jnp.array([1e-2, 1e-5]), jnp.array([0.0, 0.5])
    mapped = jax.vmap(lambda tol, ridge: jaxsae.refit(dictionary, y, code, jaxsae.FISTA(tol=tol), ridge=ridge))(
        tols, ridges
    )
    for i in range(2):
        alone = jaxsae.refit(dictionary, y, code, jaxsae.FISTA(tol=float(tols[i])), ridge=float(ridges[i]))
        assert_same_bits(jax.tree.map(lambda leaf, i=i: leaf[i], mapped), alone)


# --- the order, the number and the units of things --------------------------------------------------------


def test_unused_slots_change_nothing():
    dictionary, y, code = problem()
    padded = SparseCode(
        values=jnp.pad(code.values, ((0, 0), (2, 3))),
        indices=jnp.pad(code.indices, ((0, 0), (2, 3)), constant_values=PADDING),
        num_latents=code.num_latents,
    )
    # At the default tolerance, rounding alone can make a row stop one step sooner.
    expected, expected_info = jaxsae.refit(dictionary, y, code, jaxsae.FISTA(tol=1e-6))
    refitted, info = jaxsae.refit(dictionary, y, padded, jaxsae.FISTA(tol=1e-6))
    np.testing.assert_allclose(refitted.values[:, 2:-3], expected.values, rtol=1e-4, atol=1e-5)
    assert not np.any(refitted.values[:, [0, 1, -3, -2, -1]])
    np.testing.assert_allclose(info.steps, expected_info.steps, atol=5)


def test_permuting_the_support_permutes_the_answer():
    dictionary, y, code = problem()
    order = np.random.default_rng(2).permutation(K)
    turned = with_code(code, values=code.values[:, order], indices=code.indices[:, order])
    expected, _ = jaxsae.refit(dictionary, y, code, jaxsae.FISTA(tol=1e-6))
    refitted, _ = jaxsae.refit(dictionary, y, turned, jaxsae.FISTA(tol=1e-6))
    np.testing.assert_allclose(refitted.values, expected.values[:, order], rtol=1e-3, atol=1e-4)


@each_sign
@pytest.mark.parametrize("atoms", [1e-10, 1.0, 1e10])
@pytest.mark.parametrize("data", [1e-20, 1.0, 1e20])
def test_the_answer_has_the_units_of_data_over_atoms(atoms, data, nonnegative):
    dictionary, y, code = problem()
    expected, expected_info = jaxsae.refit(dictionary, y, code, nonnegative=nonnegative)
    unit = data / atoms
    start = with_code(code, values=np.asarray(code.values) * np.float32(unit))
    refitted, info = jaxsae.refit(atoms * dictionary, data * y, start, nonnegative=nonnegative)
    assert np.all(np.asarray(info.status) == Status.CONVERGED)
    np.testing.assert_allclose(f64(refitted.values) / unit, expected.values, rtol=1e-3, atol=1e-4)
    if atoms == 1:  # larger and smaller ones go to the fallback at once
        np.testing.assert_allclose(info.steps, expected_info.steps, atol=5)


def test_rows_of_very_different_size_share_a_batch():
    dictionary, y, code = problem()
    sizes = np.logspace(-20, 20, ROWS, dtype=np.float32)[:, None]
    expected, _ = jaxsae.refit(dictionary, y, with_code(code, values=np.zeros((ROWS, K), np.float32)))
    refitted, info = jaxsae.refit(dictionary, sizes * y, with_code(code, values=np.zeros((ROWS, K), np.float32)))
    assert np.all(np.asarray(info.status) == Status.CONVERGED)
    np.testing.assert_allclose(refitted.values / sizes, expected.values, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("orders", [2, 8])
def test_atoms_of_very_different_norm_share_a_support(orders):
    dictionary, y, code = problem()
    norms = np.logspace(0, orders, 32, dtype=np.float32)
    code = with_code(code, values=np.asarray(code.values) / norms[np.asarray(code.indices)])
    dictionary = norms[:, None] * dictionary
    refitted, info = jaxsae.refit(dictionary, y, code)
    assert np.all(np.asarray(info.status) == Status.CONVERGED)
    left = objective_gap(dictionary, y, refitted)
    # The KKT residual is relative to the longest atom, so it hardly sees the shortest; the gap does.
    assert np.all(np.asarray(jaxsae.certify(dictionary, y, refitted).gap) >= left - 1e-7)
    if orders == 2:
        assert np.max(left) <= 1e-6


# --- ordinary inputs --------------------------------------------------------------------------------------


def ordinary(case: str) -> Problem:
    dictionary, y, code = (np.array(problem().dictionary), np.array(problem().y), problem().code)
    values, indices = np.array(code.values), np.array(code.indices)
    consecutive = np.broadcast_to(np.arange(K), indices.shape)
    match case:
        case "no slots":
            values, indices = values[:, :0], indices[:, :0]
        case "one slot":
            values, indices = values[:, :1], indices[:, :1]
        case "one atom and padding":
            values[:, 1:], indices[:, 1:] = 0, PADDING
        case "only padding":
            values, indices = 0 * values, np.full_like(indices, PADDING)
        case "some rows only padding":
            values[::2], indices[::2] = 0, PADDING
        case "y = 0":
            y[::2] = 0
        case "zero atoms":
            dictionary[::3] = 0
        case "all atoms zero":
            dictionary[:] = 0
        case "an index twice":
            indices[:, 1] = indices[:, 0]
        case "one index only":
            indices[:] = indices[:, :1]
        case "equal atoms":
            dictionary[1::2], indices = dictionary[::2], consecutive
        case "opposite atoms":
            dictionary[1::2], indices = -dictionary[::2], consecutive
        case "parallel atoms of other norm":
            dictionary[1::2], indices = dictionary[::2] / 128, consecutive
        case "more atoms than dimensions":
            dictionary, y = dictionary[:, :3], y[:, :3]
        case "one dimension":
            dictionary[:, 1:], y[:, 1:] = 0, 0
        case "y against every atom":
            y = -np.abs(y)
            dictionary = np.abs(dictionary)
    code = SparseCode(jnp.asarray(values), jnp.asarray(indices), code.num_latents)
    return Problem(jnp.asarray(dictionary), jnp.asarray(y), code)


ORDINARY = [
    "one atom and padding",
    "only padding",
    "some rows only padding",
    "y = 0",
    "zero atoms",
    "all atoms zero",
    "an index twice",
    "one index only",
    "equal atoms",
    "opposite atoms",
    "parallel atoms of other norm",
    "one dimension",
    "y against every atom",
]


@pytest.mark.parametrize(
    ("case", "solver", "nonnegative"),
    [
        *itertools.product(ORDINARY, [jaxsae.FISTA(), jaxsae.ProjectedGradient()], [True, False]),
        # Of other shapes, so each costs a compilation.
        ("no slots", jaxsae.FISTA(), True),
        ("one slot", jaxsae.FISTA(), True),
        ("more atoms than dimensions", jaxsae.FISTA(), False),
    ],
    ids=lambda value: value if isinstance(value, str | bool) else type(value).__name__,
)
def test_ordinary_inputs(case, nonnegative, solver):
    dictionary, y, code = ordinary(case)
    refitted, info = jaxsae.refit(dictionary, y, code, solver, nonnegative=nonnegative)
    assert np.all(np.asarray(info.status) == Status.CONVERGED)
    z = np.asarray(refitted.values)
    assert np.all(np.isfinite(z))
    assert np.all(z[~np.asarray(code.mask)] == 0)
    assert not nonnegative or np.all(z >= 0)
    best = objective(dictionary, y, optimum(dictionary, y, code, nonnegative))
    assert np.all(objective(dictionary, y, refitted) <= best + 1e-6 * (f64(y) ** 2).sum(-1))
    # Nothing says what a zero atom's value should be, nor any atom's where y = 0: the least is 0.
    nothing = np.all(atoms_of(dictionary, code) == 0, axis=-1) | np.all(f64(y) == 0, axis=-1)[:, None]
    assert not np.any(z[nothing])


@pytest.mark.parametrize("case", ORDINARY)
@each_sign
def test_ordinary_inputs_are_certified(case, nonnegative):
    dictionary, y, code = ordinary(case)
    refitted, _ = jaxsae.refit(dictionary, y, code, jaxsae.FISTA(tol=1e-6), nonnegative=nonnegative)
    certificate = jaxsae.certify(dictionary, y, refitted, nonnegative=nonnegative)
    assert np.max(certificate.kkt) <= 1e-5
    assert np.max(certificate.gap) <= 1e-4
    assert np.min(certificate.gap) >= 0


@functools.partial(jax.jit, static_argnums=0)
@functools.partial(jax.grad, argnums=(1, 2, 3, 4))
def gradient_of_squares(nonnegative, dictionary, y, ridge, values, indices, keep):
    """Of the sum of squared values, over the rows to keep; by dictionary, y, ridge and starting values."""
    code = SparseCode(values, indices, dictionary.shape[0])
    refitted, _ = jaxsae.refit(dictionary, y, code, nonnegative=nonnegative, ridge=ridge)
    return jnp.sum(jnp.where(keep, jnp.sum(refitted.values**2, axis=-1), 0))


def gradients(dictionary, y, code, *, nonnegative=True, ridge=0.0, keep=True):
    keep = np.broadcast_to(keep, y.shape[:-1])
    return gradient_of_squares(nonnegative, dictionary, y, ridge, code.values, code.indices, keep)


@pytest.mark.parametrize("case", ORDINARY)
@each_sign
def test_ordinary_inputs_have_finite_gradients(case, nonnegative):
    dictionary, y, code = ordinary(case)
    for ridge in (0.0, 0.01):
        *others, d_values = gradients(dictionary, y, code, nonnegative=nonnegative, ridge=ridge)
        assert all(np.all(np.isfinite(gradient)) for gradient in others)
        assert not np.any(d_values), "where the solver starts must not matter"


@pytest.mark.parametrize(("batch", "k"), [((0,), K), ((3, 0), 0)])
def test_an_empty_batch_is_an_empty_answer(batch, k):
    dictionary = problem().dictionary
    y = jnp.zeros((*batch, 16))
    code = SparseCode(jnp.zeros((*batch, k)), jnp.zeros((*batch, k), jnp.int32), 32)
    refitted, info = jaxsae.refit(dictionary, y, code)
    assert refitted.values.shape == (*batch, k)
    assert {leaf.shape for leaf in jax.tree.leaves((info, jaxsae.certify(dictionary, y, code)))} == {batch}
    gradient = jax.grad(lambda dictionary: jnp.sum(jaxsae.refit(dictionary, y, code)[0].values))(dictionary)
    assert not np.any(gradient)


# --- ridge and free signs ---------------------------------------------------------------------------------


@SOLVERS
@pytest.mark.parametrize("ridge", [1e-3, 0.3, 100.0])
def test_ridge_with_free_signs_has_a_closed_form(solver, ridge):
    dictionary, y, code = problem()
    atoms = atoms_of(dictionary, code)
    gram = np.einsum("nid,njd->nij", atoms, atoms) + ridge * np.eye(K)
    expected = np.linalg.solve(gram, np.einsum("nid,nd->ni", atoms, f64(y))[..., None])[..., 0]
    refitted, info = jaxsae.refit(dictionary, y, code, solver, nonnegative=False, ridge=ridge)
    assert np.all(np.asarray(info.status) == Status.CONVERGED)
    np.testing.assert_allclose(refitted.values, expected, rtol=1e-3, atol=1e-3 * np.abs(expected).max())


@SOLVERS
@pytest.mark.parametrize("ridge", [1e-3, 0.3, 100.0])
def test_ridge_on_nonnegative_values_is_nnls_with_more_equations(solver, ridge):
    dictionary, y, code = problem()
    refitted, _ = jaxsae.refit(dictionary, y, code, solver, ridge=ridge)
    best = objective(dictionary, y, optimum(dictionary, y, code, ridge=ridge), ridge)
    assert np.all(objective(dictionary, y, refitted, ridge) <= best + 1e-6 * (f64(y) ** 2).sum(-1))
    assert np.all(np.asarray(refitted.values) >= 0)


def test_ridge_in_the_units_of_the_atoms():
    dictionary, y, code = problem()
    expected, _ = jaxsae.refit(dictionary, y, code, ridge=0.5)
    for atoms in (1e-8, 1e8):
        start = with_code(code, values=np.asarray(code.values) / np.float32(atoms))
        refitted, _ = jaxsae.refit(atoms * dictionary, y, start, ridge=0.5 * atoms**2)
        np.testing.assert_allclose(f64(refitted.values) * atoms, expected.values, rtol=1e-3, atol=1e-4)


@each_sign
def test_a_ridge_makes_equal_atoms_share(nonnegative):
    dictionary, y, code = ordinary("equal atoms")
    refitted, _ = jaxsae.refit(dictionary, y, code, jaxsae.FISTA(tol=1e-6), nonnegative=nonnegative, ridge=1.0)
    z = np.asarray(refitted.values)
    np.testing.assert_allclose(z[:, ::2], z[:, 1::2], rtol=1e-3, atol=1e-3)


# --- numbers are numbers ----------------------------------------------------------------------------------


def test_tolerance_steps_and_ridge_change_without_a_retrace():
    dictionary, y, code = problem()
    solver = jaxsae.FISTA()
    traced = jax.jit(chex.assert_max_traces(lambda s, ridge: jaxsae.refit(dictionary, y, code, s, ridge=ridge), 1))
    steps = []
    for tol, max_steps, ridge in ((1e-2, 50, 0.0), (1e-5, 100, 0.1), (0.0, 3, 1.0)):
        _, info = traced(solver.replace(tol=tol, max_steps=max_steps), ridge)
        steps.append(int(np.max(info.steps)))
    assert steps[0] < steps[1]
    assert steps[2] == 3
    chex.clear_trace_counter()


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
def test_a_half_precision_dictionary_is_refitted_in_float32(dtype):
    dictionary, y, code = problem(coherence=0.5)
    half = dictionary.astype(dtype)
    refitted, info = jaxsae.refit(half, y, code)
    assert_same_bits((refitted, info), jaxsae.refit(half.astype(jnp.float32), y, code))
    assert refitted.values.dtype == jnp.float32
    assert np.max(objective_gap(half, y, refitted)) <= 1e-6


def in_bfloat16(*, start=None) -> Problem:
    dictionary, y, code = problem()
    dictionary, y = dictionary.astype(jnp.bfloat16), y.astype(jnp.bfloat16)
    code = optimum(dictionary, y, code) if start == "optimum" else code
    return Problem(dictionary, y, with_code(code, values=jnp.asarray(code.values, jnp.bfloat16)))


def test_bfloat16_throughout():
    dictionary, y, code = in_bfloat16()
    refitted, info = jaxsae.refit(dictionary, y, code)
    assert (refitted.values.dtype, info.kkt.dtype) == (jnp.bfloat16, jnp.float32)
    assert np.all(np.asarray(info.status) == Status.CONVERGED)
    # The answer is as good as its eight bits allow.
    assert np.max(objective_gap(dictionary, y, refitted)) <= 20 * float(jnp.finfo(jnp.bfloat16).eps) ** 2
    before = objective(dictionary, y, projected(code))
    assert np.all(objective(dictionary, y, refitted) <= before * (1 + 1e-6))


def test_rounding_the_answer_to_bfloat16_leaves_no_row_worse_than_it_began():
    dictionary, y, start = in_bfloat16(start="optimum")
    refitted, _ = jaxsae.refit(dictionary, y, start)
    before = objective(dictionary, y, start)
    assert np.all(objective(dictionary, y, refitted) <= before * (1 + 1e-6))


def test_an_atom_too_short_to_square_keeps_its_value():
    dictionary, y, code = problem()
    indices = np.asarray(code.indices)
    norms = np.where(np.arange(32) == indices[0, 0], 1, 1e-25).astype(np.float32)
    best = with_code(code, values=np.asarray(optimum(dictionary, y, code).values, np.float32))
    start = with_code(code, values=np.asarray(best.values) / norms[indices])
    refitted, _ = jaxsae.refit(norms[:, None] * dictionary, y, start)
    before, after = (objective(norms[:, None] * dictionary, y, c)[0] for c in (start, refitted))
    assert after <= before * (1 + 1e-6)


@pytest.mark.parametrize("ridge", [-1.0, np.nan])
def test_a_ridge_that_is_no_ridge_leaves_the_rows_as_they_were(ridge):
    dictionary, y, code = problem()
    refitted, info = jaxsae.refit(dictionary, y, code, ridge=ridge)
    assert np.all(np.asarray(info.status) == Status.INVALID)
    assert_same_bits(refitted.values, code.values)
    with pytest.raises(RuntimeError, match="rows have a ridge or penalty that is negative or not finite"):
        jaxsae.check(info)
    with pytest.raises(ValueError, match="got a ridge of"):
        jaxsae.certify(dictionary, y, code, ridge=ridge)


@pytest.mark.parametrize("what", ["tol", "max_steps"])
@pytest.mark.parametrize("number", [-1.0, np.nan, np.inf])
def test_a_solver_with_numbers_that_make_no_sense_is_refused(what, number):
    dictionary, y, code = problem()
    for solver in (jaxsae.FISTA(), jaxsae.ConjugateGradient()):
        chained = jaxsae.ConjugateGradient(fallback=solver.replace(**{what: number}))
        for refused in (solver.replace(**{what: number}), chained):
            with pytest.raises(ValueError, match=f"got {what} {number}; pass a finite number of at least 0"):
                jaxsae.refit(dictionary, y, code, refused)


def test_a_solver_passed_by_itself_solves_what_the_default_solves():
    dictionary, y, code = problem(coherence=0.97)
    for tol in (1e-5, 1e-6):
        _, info = jaxsae.refit(dictionary, y, code, jaxsae.ConjugateGradient(tol=tol, max_steps=1))
        assert np.all(np.asarray(info.status) == Status.CONVERGED) and np.max(info.kkt) <= tol
    _, info = jaxsae.refit(dictionary, y, code, jaxsae.ConjugateGradient(max_steps=1, fallback=None))
    assert np.any(np.asarray(info.status) == Status.MAX_STEPS), "else there is nothing to fall back from"


@pytest.mark.parametrize(
    "units", [(1e-38, 1e-38), (1e-40, 1e-40), (1, 1e-38), (1e-38, 1), (10, 1e-37), (1, 1e-45)], ids=str
)
def test_what_is_too_small_for_the_dtype_is_said_to_be(units):
    dictionary, y, code = problem()
    of_atoms, of_data = (np.float64(unit) for unit in units)
    small = *(jnp.asarray(np.float32(f64(x) * by)) for x, by in ((dictionary, of_atoms), (y, of_data))), code
    refitted, info = jaxsae.refit(*small)
    assert np.all(np.asarray(info.status) == Status.NONFINITE)
    assert_same_bits(refitted.values, code.values)
    assert np.all(np.isnan(jaxsae.certify(*small).kkt))
    exact = 2.0**-100  # nothing is subnormal: solved as ever
    _, info = jaxsae.refit(exact * dictionary, exact * y, code)
    assert np.all(np.asarray(info.status) == Status.CONVERGED)


def test_float64_is_solved_in_float64(x64):
    dictionary, y, code = problem(dtype=np.float64, coherence=0.5)
    refitted, info = jaxsae.refit(dictionary, y, code, EXACT)
    assert (refitted.values.dtype, info.kkt.dtype) == (jnp.float64, jnp.float64)
    assert np.all(np.asarray(info.status) == Status.CONVERGED)
    np.testing.assert_allclose(refitted.values, optimum(dictionary, y, code).values, rtol=1e-9, atol=1e-9)


# --- the derivative ---------------------------------------------------------------------------------------


def small(seed=0) -> Problem:
    """Float64, two batch axes, atoms that many rows share, and unused slots."""
    dictionary, y, code = problem.func(seed, batch=(2, 3), d=6, m=7, k=4, dtype=np.float64)
    indices = np.array(code.indices)
    indices[0, :, 1], indices[1, 2] = 7, 7
    return Problem(dictionary, y, with_code(code, indices=indices))


@each_sign
def test_the_derivative_is_that_of_finite_differences(nonnegative, x64):
    dictionary, y, code = small()
    weights = np.random.default_rng(3).normal(size=code.values.shape)
    _, unravel = jax.flatten_util.ravel_pytree((dictionary, y, jnp.zeros(())))

    def loss(point):
        dictionary, y, ridge = unravel(point)
        refitted, _ = jaxsae.refit(dictionary, y, code, EXACT, nonnegative=nonnegative, ridge=ridge)
        return jnp.sum(weights * refitted.values + 0.5 * refitted.values**2)

    # One program for the values and the gradient: compiling is most of the time.
    evaluate = jax.jit(lambda points: jax.lax.map(jax.value_and_grad(loss), points))
    for ridge in (0.0, 0.2):
        point = np.concatenate([np.ravel(dictionary), np.ravel(y), [ridge]])
        steps = 1e-5 * np.eye(point.size)
        # A ridge is never negative, so its difference is taken from the right, to second order.
        ridges = point + np.outer([0, 1e-6, 2e-6], steps[-1] > 0)
        values, slopes = map(np.asarray, evaluate(np.concatenate([point + steps[:-1], point - steps[:-1], ridges])))
        right, left = values[:-3].reshape(2, -1)
        by_ridge = (4 * values[-2] - values[-1] - 3 * values[-3]) / 2e-6
        differences = jnp.append((right - left) / 2e-5, by_ridge)
        for got, expected in zip(unravel(jnp.asarray(slopes[-3])), unravel(differences), strict=True):
            scale = np.abs(got).max()
            assert scale > 0
            np.testing.assert_allclose(got, expected, rtol=0, atol=1e-6 * scale)


@pytest.mark.parametrize("atoms", [1e-10, 1e10])
def test_the_gradient_has_its_units(atoms):
    dictionary, y, code = problem()
    d_dictionary, d_y, *_ = gradients(dictionary, y, code)
    start = with_code(code, values=np.asarray(code.values) / np.float32(atoms))
    scaled_dictionary, scaled_y, *_ = gradients(np.float32(atoms) * dictionary, y, start)
    for scaled, gradient, unit in ((scaled_dictionary, d_dictionary, atoms**-3), (scaled_y, d_y, atoms**-2)):
        np.testing.assert_allclose(f64(scaled) / unit, gradient, rtol=1e-3, atol=1e-3 * np.abs(gradient).max())


def test_coordinates_at_their_bound_do_not_move():
    dictionary, y, code = problem()
    refitted, _ = jaxsae.refit(dictionary, y, code)
    at_bound = np.asarray(refitted.values) == 0
    weights = jnp.where(at_bound, 1.0, 0.0)
    gradient = jax.grad(lambda y: jnp.sum(weights * jaxsae.refit(dictionary, y, code)[0].values))(y)
    assert at_bound.any()
    assert not np.any(gradient)


@pytest.mark.parametrize("where", ["y", "start", "atom"])
@pytest.mark.parametrize("loss", ["of all rows", "of the finite rows"])
def test_rows_that_are_not_finite_have_no_gradient_and_spoil_none(where, loss):
    good = problem()
    bad, hit = spoiled(good, where, np.nan)
    counted = np.ones(ROWS, bool) if loss == "of all rows" else ~hit
    d_dictionary, d_y, d_ridge, _ = gradients(*bad, ridge=0.1, keep=counted)
    expected = gradients(*good, ridge=0.1, keep=~hit)
    assert not np.any(d_y[hit])
    np.testing.assert_allclose(d_dictionary, expected[0], rtol=1e-4, atol=1e-4)
    np.testing.assert_allclose(d_y, expected[1], rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(d_ridge, expected[2], rtol=1e-4)


def test_jit_of_vmap_of_grad():
    dictionary, y, code = problem()

    def loss(dictionary, y, code):
        return jnp.sum(jaxsae.refit(dictionary, y, code)[0].values ** 2)

    per_row = jax.jit(jax.vmap(jax.grad(loss, argnums=(0, 1)), in_axes=(None, 0, 0)))(dictionary, y, code)
    d_dictionary, d_y, *_ = gradients(dictionary, y, code)
    np.testing.assert_allclose(np.sum(per_row[0], axis=0), d_dictionary, rtol=1e-4, atol=1e-4)
    np.testing.assert_allclose(per_row[1], d_y, rtol=1e-4, atol=1e-5)


def test_gradients_come_in_the_dtypes_of_the_arguments():
    dictionary, y, code = problem()
    half = dictionary.astype(jnp.bfloat16)
    gradient = jax.grad(lambda D, y: jnp.sum(jaxsae.refit(D, y, code)[0].values), argnums=(0, 1))
    d_dictionary, d_y = gradient(half, y)
    assert (d_dictionary.dtype, d_y.dtype) == (jnp.bfloat16, jnp.float32)
    exact, _ = gradient(half.astype(jnp.float32), y)
    np.testing.assert_allclose(f64(d_dictionary), exact, rtol=0.02, atol=0.02)


# --- check, and what is refused ---------------------------------------------------------------------------


def info_of(status, kkt):
    return jaxsae.RefitInfo(
        kkt=jnp.array(kkt), steps=jnp.zeros(len(kkt), jnp.int32), status=jnp.array(status, jnp.int32)
    )


def test_check_passes_a_refit_that_converged():
    assert jaxsae.check(jaxsae.refit(*problem())[1]) is None


@pytest.mark.parametrize(
    ("info", "message"),
    [
        (info_of([0, 2, 0], [0.0, np.nan, 0.0]), r"1 of 3 rows hold NaN or Inf \(rows 1\); fix them\.$"),
        (
            info_of([1, 0, 1, 1], [1e-3, 0.0, 2e-2, 1e-4]),
            r"3 of 4 rows stopped at max_steps \(rows 2, 0, 3\), the worst at KKT 2\.0e-02; raise max_steps or tol",
        ),
        (info_of([1] * 7, [1e-3] * 7), r"7 of 7 rows stopped at max_steps \(rows 0, 1, 2, 3, 4, …\)"),
        (info_of([2, 1], [np.nan, 0.5]), r"1 of 2 rows hold NaN.* 1 of 2 rows stopped"),
    ],
)
def test_check_names_the_worst_rows(info, message):
    with pytest.raises(RuntimeError, match=message):
        jaxsae.check(info)


D, Y, CODE = problem()


@pytest.mark.parametrize(
    ("error", "message", "arguments"),
    [
        (TypeError, "a dictionary of dtype int32", (D.astype(jnp.int32), Y, CODE)),
        (TypeError, "y of dtype int32", (D, Y.astype(jnp.int32), CODE)),
        (TypeError, "values of dtype int32", (D, Y, CODE.replace(values=CODE.indices))),
        (TypeError, "indices of dtype float32", (D, Y, CODE.replace(indices=CODE.values))),
        (ValueError, r"a dictionary of shape \(31, 16\) for a code of 32 latents", (D[:31], Y, CODE)),
        (ValueError, r"a dictionary of shape \(16,\)", (D[0], Y, CODE)),
        (ValueError, r"y of shape \(64, 15\), but the atoms have width 16", (D, Y[:, :15], CODE)),
        (ValueError, r"for y of shape \(63, 16\)", (D, Y[:63], CODE)),
        (ValueError, r"values \(64, 5\) and indices \(64, 6\)", (D, Y, CODE.replace(values=CODE.values[:, :5]))),
    ],
)  # fmt: skip
@pytest.mark.parametrize("function", [jaxsae.refit, jaxsae.certify], ids=["refit", "certify"])
def test_what_does_not_fit_is_refused_in_a_sentence(function, error, message, arguments, unchecked):
    for call in (lambda: function(*arguments), lambda: jax.eval_shape(function, *arguments)):
        with pytest.raises(error, match=message) as raised:
            call()
        assert f"`{function.__name__}` got" in str(raised.value)
        assert ";" in str(raised.value), "a message says what was got, then what to do"
