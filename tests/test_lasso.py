"""The lasso and its relaxations: against scikit-learn in float64, by their definitions, and on hard inputs."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from problems import assert_same_bits, each_sign, f64
from sklearn.linear_model import Lasso

import jaxsae
from jaxsae import Status
from jaxsae.lasso import homotopy
from jaxsae.lasso.penalised import blend, cross_validate, lambda_max, lasso, path, relaxed

# One shape for almost everything, and so one program a dtype and a sign.
ROWS, D, M = 40, 16, 32
SHARES = (0.5, 0.1, 0.01)  # of λ_max


def data(seed=0, *, coherence=0.0, dtype=np.float32):
    """Atoms of unequal norm, and targets of a few of them with noise."""
    rng = np.random.default_rng(seed)
    atoms = (1 - coherence) * rng.normal(size=(M, D)) + coherence * rng.normal(size=D)
    atoms *= rng.uniform(0.5, 2.0, (M, 1))
    z = rng.normal(size=(ROWS, M)) * (rng.random((ROWS, M)) < 0.15)
    y = z @ atoms + 0.3 * rng.normal(size=(ROWS, D))
    return jnp.asarray(atoms, dtype), jnp.asarray(y, dtype)


def grid(atoms, y, nonnegative=False):
    return lambda_max(atoms, y, nonnegative=nonnegative)[:, None] * jnp.asarray(SHARES, y.dtype)


def scikit_learn(atoms, y, lam, nonnegative=False):
    """`[n m]`, by coordinate descent in float64, to a gap far below what is asked of us."""
    options = {"fit_intercept": False, "positive": nonnegative, "tol": 1e-14, "max_iter": 10**6}
    rows = zip(f64(y), f64(lam), strict=True)
    return np.stack([Lasso(alpha=max(lam / y.size, 1e-12), **options).fit(f64(atoms).T, y).coef_ for y, lam in rows])


def lasso_objective(atoms, y, z, lam):
    """`½‖y − Dᵀz‖² + λ‖z‖₁` of dense codes."""
    return 0.5 * ((f64(y) - f64(z) @ f64(atoms)) ** 2).sum(-1) + f64(lam) * np.abs(f64(z)).sum(-1)


def gap_by_definition(atoms, y, z, lam, nonnegative):
    """The primal less the dual objective, of the residual scaled down until it is feasible, relative to `½‖y‖²`."""
    r = f64(y) - f64(z) @ f64(atoms)
    g = r @ f64(atoms).T
    top = (g if nonnegative else np.abs(g)).max(-1)
    u = r * np.where(top > f64(lam), f64(lam) / np.maximum(top, 1e-300), 1)[:, None]
    dual = (u * f64(y)).sum(-1) - 0.5 * (u**2).sum(-1)
    return (lasso_objective(atoms, y, z, lam) - dual) / np.maximum(0.5 * (f64(y) ** 2).sum(-1), 1e-300)


def slack(atoms, y, z):
    """What the gap of float32 may fall short of its definition by.

    Its dual point is feasible to `8 eps max‖a‖ ‖y‖`, by correlations that are rounded as much.
    """
    longest = np.linalg.norm(f64(atoms), axis=1).max()
    size = np.maximum(np.linalg.norm(f64(y), axis=-1), 1e-300)
    return 2 * 16 * np.finfo(np.float32).eps * longest * np.abs(f64(z)).sum(-1) / size


# --- the lasso and its path


@each_sign
@pytest.mark.parametrize("coherence", [0.0, 0.5])
def test_coefficients_are_those_of_scikit_learn(nonnegative, coherence, x64):
    atoms, y = data(coherence=coherence, dtype=np.float64)
    lams = grid(atoms, y, nonnegative)
    code, info = path(atoms, y, lams, nonnegative=nonnegative, tol=1e-8)
    assert np.all(info.status == Status.CONVERGED)
    assert np.max(info.gap) <= 1e-8
    for at in range(len(SHARES)):
        expected = scikit_learn(atoms, y, lams[:, at], nonnegative)
        np.testing.assert_allclose(code.dense()[:, at], expected, atol=1e-5)


@each_sign
def test_float32_reaches_the_same_coefficients_to_what_it_can_hold(nonnegative):
    atoms, y = data()
    lams = grid(atoms, y, nonnegative)
    code, info = path(atoms, y, lams, nonnegative=nonnegative)
    assert np.all(info.status == Status.CONVERGED)
    for at in range(len(SHARES)):
        expected = scikit_learn(atoms, y, lams[:, at], nonnegative)
        np.testing.assert_allclose(code.dense()[:, at], expected, atol=2e-4)
        objective_gap = lasso_objective(atoms, y, code.dense()[:, at], lams[:, at]) - lasso_objective(
            atoms, y, expected, lams[:, at]
        )
        assert np.max(objective_gap / (0.5 * (f64(y) ** 2).sum(-1))) <= 1e-6


@each_sign
def test_the_gap_is_its_definition(nonnegative, x64):
    atoms, y = data(dtype=np.float64)
    lams = grid(atoms, y, nonnegative)
    # Stopped early, so that there is a gap to be seen.
    code, info = path(atoms, y, lams, nonnegative=nonnegative, max_steps=3)
    assert np.any(info.status == Status.MAX_STEPS)
    for at in range(len(SHARES)):
        expected = gap_by_definition(atoms, y, code.dense()[:, at], lams[:, at], nonnegative)
        np.testing.assert_allclose(info.gap[:, at], expected, rtol=1e-9, atol=1e-14)
    assert np.all((info.status == Status.CONVERGED) == (info.gap <= 1e-6))


def test_a_path_is_its_penalties_one_by_one_in_descending_order(x64):
    atoms, y = data(dtype=np.float64)
    lams = grid(atoms, y)
    code, info = path(atoms, y, lams[:, ::-1])
    np.testing.assert_array_equal(info.lam, lams)
    assert np.all(np.diff(info.steps, axis=1) > 0)
    alone, alone_info = lasso(atoms, y, lams[:, 1])
    np.testing.assert_allclose(alone.dense(), code.dense()[:, 1], atol=1e-12)
    np.testing.assert_array_equal(alone_info.lam, lams[:, 1])


def test_the_default_grid_begins_where_the_code_is_empty():
    atoms, y = data()
    code, info = path(atoms, y, n_lambdas=3, eps=1e-2)
    np.testing.assert_allclose(info.lam / lambda_max(atoms, y)[:, None], [[1, 0.1, 0.01]] * ROWS, rtol=1e-5)
    assert not np.any(code.l0[:, 0])
    assert np.all(code.l0[:, 1] > 0)


def test_the_refit_takes_the_shrinkage_out(x64):
    atoms, y = data(dtype=np.float64)
    lams = grid(atoms, y)[:, 1]
    code, _ = lasso(atoms, y, lams)
    refitted, _ = jaxsae.refit(atoms, y, code, jaxsae.BlockPivoting(tol=1e-12), nonnegative=False)
    for row in range(ROWS):
        on = np.asarray(code.values[row] != 0)
        A = f64(atoms)[np.asarray(code.indices[row])[on]]
        z, signs = f64(code.values[row])[on], np.sign(code.values[row])[on]
        expected = z + float(lams[row]) * np.linalg.solve(A @ A.T, signs)
        np.testing.assert_allclose(f64(refitted.values[row])[on], expected, atol=1e-8)


# --- relaxations


@each_sign
def test_relaxed_goes_from_the_lasso_to_its_refit(nonnegative, x64):
    atoms, y = data(coherence=0.5, dtype=np.float64)
    lams = grid(atoms, y, nonnegative)[:, 1]
    chosen, _ = lasso(atoms, y, lams, nonnegative=nonnegative)
    refitted, _ = jaxsae.refit(atoms, y, chosen, nonnegative=nonnegative)
    ends = {0.0: refitted, 1.0: chosen}
    errors = []
    for phi in (1.0, 0.7, 0.3, 0.05, 0.0):
        code, info = relaxed(atoms, y, lams, phi, nonnegative=nonnegative)
        assert np.all(info.status == Status.CONVERGED)
        np.testing.assert_allclose(info.lam, phi * lams)
        np.testing.assert_array_equal(code.indices, chosen.indices)
        if phi in ends:
            np.testing.assert_allclose(code.dense(), ends[phi].dense(), atol=1e-10)
        errors.append(((f64(y) - f64(code.dense()) @ f64(atoms)) ** 2).sum(-1))
    assert np.all(np.diff(errors, axis=0) <= 1e-12)


@each_sign
def test_relaxed_is_a_lasso_on_the_support(nonnegative, x64):
    atoms, y = data(coherence=0.5, dtype=np.float64)
    lams = grid(atoms, y, nonnegative)[:, 1]
    chosen, _ = lasso(atoms, y, lams, nonnegative=nonnegative)
    code, _ = relaxed(atoms, y, lams, 0.3, nonnegative=nonnegative)
    on = np.asarray(chosen.dense()) != 0
    for row in range(ROWS):
        inside = f64(atoms) * on[row][:, None]
        expected = scikit_learn(inside, y[row : row + 1], 0.3 * lams[row : row + 1], nonnegative)
        np.testing.assert_allclose(code.dense()[row], expected[0], atol=1e-5)


def test_the_share_may_differ_from_row_to_row(x64):
    atoms, y = data(coherence=0.5, dtype=np.float64)
    lams = grid(atoms, y)[:, 1]
    phi = jnp.asarray(np.arange(ROWS) % 2, atoms.dtype)
    code, _ = relaxed(atoms, y, lams, phi)
    for one in (0.0, 1.0):
        expected, _ = relaxed(atoms, y, lams, one)
        assert_same_bits(code.values[phi == one], expected.values[phi == one])


def test_the_blend_is_a_line_and_relaxed_where_no_sign_changes(x64):
    atoms, y = data(coherence=0.5, dtype=np.float64)
    lams = grid(atoms, y)[:, 1]
    chosen, _ = lasso(atoms, y, lams)
    refitted, _ = jaxsae.refit(atoms, y, chosen, nonnegative=False)
    code, info = blend(atoms, y, lams, 0.3)
    assert np.all(info.status == Status.CONVERGED)
    np.testing.assert_allclose(code.values, 0.3 * chosen.values + 0.7 * refitted.values, atol=1e-12)
    same = np.all(np.sign(chosen.values) == np.sign(refitted.values), axis=-1)
    assert 0 < same.sum() < ROWS, "both kinds of rows are wanted"
    eased, _ = relaxed(atoms, y, lams, 0.3)
    np.testing.assert_allclose(code.values[same], eased.values[same], atol=1e-6)


@pytest.mark.slow
def test_cross_validation_measures_what_is_held_out(x64):
    rng = np.random.default_rng(7)
    samples, folds = 30, 3
    X = rng.normal(size=(samples, 6))
    y = X[:, :2] @ [3.0, -2.0] + 0.5 * rng.normal(size=samples)
    key = jax.random.key(1)
    fit = functools.partial(cross_validate, phis=(1.0, 0.0), folds=folds, n_lambdas=4, eps=0.05)
    code, seen = jax.jit(fit)(key, jnp.asarray(X.T), jnp.asarray(y))
    dealt = np.asarray(jax.random.permutation(key, jnp.arange(samples) % folds))
    lasso_error, refit_error = np.zeros((2, 4))
    for fold in range(folds):
        kept = dealt != fold
        for at, lam in enumerate(f64(seen.lams) * kept.mean()):
            z = scikit_learn(X[kept].T, y[kept][None], [lam])[0]
            on = z != 0
            lasso_error[at] += ((y[~kept] - X[~kept] @ z) ** 2).sum() / samples
            z[on] = np.linalg.lstsq(X[kept][:, on], y[kept])[0]
            refit_error[at] += ((y[~kept] - X[~kept] @ z) ** 2).sum() / samples
    np.testing.assert_allclose(seen.error, np.stack([lasso_error, refit_error], axis=1), rtol=1e-6)
    assert np.all(seen.deviation > 0)
    best = np.unravel_index(np.argmin(seen.error), seen.error.shape)
    assert (seen.lam, seen.phi) == (seen.lams[best[0]], seen.phis[best[1]])
    expected, _ = relaxed(jnp.asarray(X.T), jnp.asarray(y), seen.lam, seen.phi)
    np.testing.assert_allclose(code.dense(), expected.dense(), atol=1e-10)


# --- hard inputs, all of one shape


def _hard(rng):
    normal, y = rng.normal(size=(M, D)), rng.normal(size=(ROWS, D))
    half = normal[: M // 2]
    return {
        "repeated atoms": (np.concatenate([half, half]), y),
        "opposite atoms": (np.concatenate([half, -half]), y),
        "ties": (np.concatenate([np.eye(D), np.eye(D)]), np.round(2 * y)),
        "small integers": (rng.integers(-2, 3, (M, D)), rng.integers(-3, 4, (ROWS, D))),
        "signs": (rng.choice([-1, 1], (M, D)), rng.integers(-3, 4, (ROWS, D))),
        "zeros and ones": (rng.choice([0, 1], (M, D)), rng.choice([0, 1], (ROWS, D))),
        "zero atoms": (normal * (rng.random((M, 1)) < 0.7), y),
        "norms over eight orders": (normal * 10 ** rng.uniform(-4, 4, (M, 1)), y),
        "low rank": (rng.normal(size=(M, 4)) @ rng.normal(size=(4, D)), y),
        "coherent": (0.2 * normal + 0.8 * rng.normal(size=D), y),
        "targets that are atoms": (normal, normal[rng.integers(0, M, ROWS)]),
        "tiny targets": (normal, 1e-30 * y),
        "huge": (1e15 * normal, 1e15 * y),
        "zero targets": (normal, y * (np.arange(ROWS) % 3 > 0)[:, None]),
    }


HARD = _hard(np.random.default_rng(0))


@each_sign
@pytest.mark.parametrize("name", HARD)
def test_hard_inputs_are_solved(name, nonnegative):
    atoms, y = (jnp.asarray(array, jnp.float32) for array in HARD[name])
    code, info = path(atoms, y, grid(atoms, y, nonnegative), nonnegative=nonnegative)
    assert np.all(info.status == Status.CONVERGED)
    z, silent = f64(code.dense()), ~np.any(atoms, axis=1)
    assert not np.any(z[:, :, silent])
    assert not np.any(np.asarray(code.dense())[~np.any(y, axis=1)])
    if nonnegative:
        assert np.all(z >= 0)
    for at in range(len(SHARES)):
        gap = gap_by_definition(atoms, y, z[:, at], info.lam[:, at], nonnegative)
        assert np.all(gap <= 2e-6 + slack(atoms, y, z[:, at])), "by other arithmetic than the solver's"


def test_what_float32_cannot_solve_is_said_to_be_unsolved(optimised):
    normal, y = HARD["targets that are atoms"][0], HARD["coherent"][1]
    atoms, y = (jnp.asarray(x, jnp.float32) for x in (0.01 * normal + 0.99 * normal[0], y))
    code, info = path(atoms, y, grid(atoms, y))
    assert np.all(np.isfinite(info.gap) & (info.gap <= 1))
    assert np.all((info.status == Status.CONVERGED) == (info.gap <= 1e-6))
    for at in range(len(SHARES)):
        z = code.dense()[:, at]
        gap = gap_by_definition(atoms, y, z, info.lam[:, at], nonnegative=False)
        assert np.all(gap <= 1.1 * f64(info.gap[:, at]) + 2e-6 + slack(atoms, y, z))
        assert np.all(lasso_objective(atoms, y, z, info.lam[:, at]) <= 1.001 * lasso_objective(atoms, y, 0 * z, 0))


@each_sign
@pytest.mark.parametrize(
    "coherence", [pytest.param(0.9, marks=pytest.mark.slow), 0.99, pytest.param(0.999, marks=pytest.mark.slow)]
)
def test_the_gap_holds_whatever_the_order_of_sums(coherence, nonnegative, optimised):
    # Other orders of atoms and coordinates are other orders of sums; large codes cancel to what is left of y.
    rng = np.random.default_rng(0)
    normal, y = HARD["targets that are atoms"][0], HARD["coherent"][1]
    atoms = (1 - coherence) * normal + coherence * normal[0]
    for order, turn in ((np.arange(M), np.arange(D)), (rng.permutation(M), rng.permutation(D))):
        permuted = jnp.asarray(atoms[order][:, turn], jnp.float32), jnp.asarray(y[:, turn], jnp.float32)
        code, info = path(*permuted, grid(*permuted, nonnegative), nonnegative=nonnegative)
        longest = np.linalg.norm(f64(permuted[0]), axis=1).max()
        for at in range(len(SHARES)):
            z, lam, gap = code.dense()[:, at], info.lam[:, at], f64(info.gap[:, at])
            stated = (2 * D + 18) * np.finfo(np.float32).eps * longest * np.abs(f64(z)).sum(-1)
            stated /= np.linalg.norm(f64(permuted[1]), axis=-1)
            unit = longest * np.linalg.norm(f64(permuted[1]), axis=-1) / np.where(lam > 0, f64(lam), np.inf)
            second = (D / 2 + 1) * np.finfo(np.float32).eps * unit
            short = gap_by_definition(*permuted, z, lam, nonnegative) - gap * (1 + 1e-5)
            short -= 2 * np.sqrt(gap) * second + second**2
            assert np.all(short <= np.minimum(stated, slack(*permuted, z)) + 1e-7)
            r = f64(permuted[1]) - f64(z) @ f64(permuted[0])
            g = r @ f64(permuted[0]).T
            off = np.where(f64(z) != 0, np.abs(g - f64(lam)[:, None] * np.sign(z)), 0)
            over = (g if nonnegative else np.abs(g)) - f64(lam)[:, None]
            kkt = np.maximum(off, over).max(-1) / longest / np.linalg.norm(f64(permuted[1]), axis=-1)
            assert np.all(kkt <= f64(info.kkt[:, at]) * (1 + 1e-5) + D * np.finfo(np.float32).eps)


def test_rows_that_are_not_finite_touch_no_other_and_no_row_depends_on_the_others():
    atoms, y = data()
    lams = grid(atoms, y)
    expected = path(atoms, y, lams)
    bad = np.arange(ROWS) % 7 == 3
    spoilt = jnp.where(bad[:, None], jnp.where(jnp.arange(D) == 2, jnp.nan, jnp.inf), y)
    code, info = path(atoms, spoilt, lams)
    assert np.all(info.status[bad] == Status.NONFINITE)
    assert np.all(np.isnan(info.gap[bad]) & np.isnan(info.kkt[bad]))
    assert not np.any(code.mask[bad]) and not np.any(code.values[bad])
    order = np.random.default_rng(0).permutation(ROWS)
    shuffled = path(atoms, y[order], lams[order])
    keep = functools.partial(jax.tree.map, lambda x: x[~bad])
    assert_same_bits(keep((code, info)), keep(expected))
    assert_same_bits(shuffled, jax.tree.map(lambda x: x[order], expected))


def test_a_traced_penalty_below_zero_is_a_status_and_vmap_is_the_batch():
    atoms, y = data()
    lams = grid(atoms, y)[:, 1].at[5].set(-1.0).at[6].set(jnp.nan)
    code, info = jax.jit(jax.vmap(lasso, in_axes=(None, 0, 0)))(atoms, y, lams)
    assert info.status[5] == info.status[6] == Status.INVALID
    assert not np.any(code.mask[5])
    expected, _ = path(atoms, y, grid(atoms, y))
    good = np.delete(np.arange(ROWS), [5, 6])
    np.testing.assert_allclose(code.dense()[good], expected.dense()[good, 1], atol=1e-5)


def test_too_few_slots_are_said_to_be():
    atoms, y = data()
    lams = grid(atoms, y)
    enough, _ = path(atoms, y, lams)
    code, info = path(atoms, y, lams, capacity=4)
    missing = np.asarray(code.num_dropped > 0)
    assert np.all(missing[np.asarray(enough.l0 > 4)])
    assert np.all((info.status == Status.MAX_STEPS) == (info.gap > 1e-6)) and np.any(info.gap[missing] > 1e-2)
    assert np.all(info.status[~missing] == Status.CONVERGED)
    np.testing.assert_allclose(code.dense()[~missing], enough.dense()[~missing], atol=1e-5)
    with pytest.raises(RuntimeError, match="more active latents than slots"):
        jaxsae.check(code)
    with pytest.raises(RuntimeError, match="stopped at max_steps"):
        jaxsae.check(info)


@each_sign
def test_the_descent_that_takes_over_gets_there_alone(nonnegative):
    atoms, y = data()
    lams = grid(atoms, y, nonnegative)[:, 1]
    nothing = jnp.zeros((ROWS, D)), jnp.full((ROWS, D), M), jnp.zeros(ROWS, int), jnp.zeros(ROWS, int)
    nowhere = homotopy.Solution(*nothing, jnp.full(ROWS, jnp.nan), jnp.full(ROWS, jnp.nan))
    static = homotopy.Static(nonnegative, D)
    descend = functools.partial(homotopy._descend, static, jnp.float32(1e-6), jnp.int32(5000), atoms)
    end = jax.jit(jax.vmap(descend))(y, lams, nowhere)
    assert np.max(end.gap) <= 1e-6
    z = jaxsae.SparseCode(end.values, end.indices, M).dense()
    assert np.all(gap_by_definition(atoms, y, z, lams, nonnegative) <= 2e-6 + slack(atoms, y, z))


def test_what_does_not_fit_is_refused_in_a_sentence(unchecked):
    atoms, y = data()
    for error, call in {
        "penalty of -1.0; pass penalties of 0 or more": lambda: lasso(atoms, y, -1.0),
        "penalty of nan; pass": lambda: lasso(atoms, y, jnp.full(ROWS, jnp.nan)),
        "penalty of inf; pass": lambda: path(atoms, y, jnp.array([1.0, jnp.inf])),
        "tol -1e-06; pass a finite gap": lambda: lasso(atoms, y, 1.0, tol=-1e-6),
        "tol nan; pass": lambda: relaxed(atoms, y, 1.0, 0.5, tol=jnp.nan),
        "tol inf; pass": lambda: blend(atoms, y, 1.0, 0.5, tol=jnp.inf),
        "max_steps -1; pass 0 or more": lambda: path(atoms, y, max_steps=-1),
        "eps 0.0; pass a positive ratio up to 1": lambda: path(atoms, y, eps=0.0),
        "eps 2.0; pass a positive ratio up to 1": lambda: path(atoms, y, lams=jnp.ones(2), eps=2.0),
        "eps nan; pass": lambda: cross_validate(jax.random.key(0), atoms, y[0], eps=jnp.nan),
        "phi nan; pass numbers from 0 to 1": lambda: relaxed(atoms, y, 1.0, jnp.nan),
        "penalties of shape \\(3,\\) for y of shape \\(40, 16\\)": lambda: lasso(atoms, y, jnp.ones(3)),
        "pass shape \\(L,\\) or": lambda: path(atoms, y, 1.0),
        "n_lambdas 0": lambda: path(atoms, y, n_lambdas=0),
        "capacity 33 for 32 atoms": lambda: lasso(atoms, y, 1.0, capacity=33),
        "the atoms have width 16": lambda: lasso(atoms, y[:, :3], 1.0),
        "dictionary of shape \\(16,\\)": lambda: lasso(atoms[0], y, 1.0),
        "phi 1.5; pass numbers from 0 to 1": lambda: relaxed(atoms, y, 1.0, 1.5),
        "gamma -0.5; pass": lambda: blend(atoms, y, 1.0, -0.5),
        "y of shape \\(40, 16\\) and 10 folds": lambda: cross_validate(jax.random.key(0), atoms, y),
    }.items():
        with pytest.raises(ValueError, match=error):
            call()
    with pytest.raises(TypeError, match="dtype int32"):
        lasso(atoms, jnp.zeros((ROWS, D), jnp.int32), 1.0)
