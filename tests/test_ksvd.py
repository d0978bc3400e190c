"""k-SVD: sweeps against numpy in float64, what replaces atoms, and dictionaries that are found again."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from problems import assert_same_bits, f64, residual, scipy_nnls, with_code

import jaxsae
from benchmarks.ksvd import recovered, synthetic
from jaxsae import SparseCode, ksvd
from jaxsae.ksvd import learning, rank_one

N, D, M, K = 96, 8, 12, 3
UPDATES = [ksvd.exact, ksvd.approximate, ksvd.mod]
SIGNS = [(False, False), (True, False), (False, True), (True, True)]

every_update = pytest.mark.parametrize("update", UPDATES, ids=lambda update: update.__name__)
every_sweep = pytest.mark.parametrize("update", UPDATES[:2], ids=lambda update: update.__name__)
every_sign = pytest.mark.parametrize(("nonnegative", "nonnegative_atoms"), SIGNS)


def signals(seed=0, *, n=N, nonnegative=False, nonnegative_atoms=False):
    """A dictionary that is not that of the signals, the signals `[n d]`, and codes for them with unused slots."""
    rng = np.random.default_rng(seed)
    draws = [rng.normal(size=shape).astype(np.float32) for shape in ((M, D), (M, D), (n, D), (n, K))]
    true, atoms, noise, values = draws
    if nonnegative_atoms:
        true, atoms = np.abs(true), np.abs(atoms)
    if nonnegative:
        values = np.abs(values)
    indices = np.argsort(rng.random((n, M)), axis=1)[:, :K]
    y = np.einsum("nk,nkd->nd", values, true[indices]) + 0.3 * noise
    unused = rng.random((n, K)) < 0.1
    code = SparseCode(jnp.where(unused, 0, values), jnp.asarray(np.where(unused, M, indices), jnp.int32), M)
    return jnp.asarray(atoms), jnp.asarray(y), code


def error(atoms, y, code) -> float:
    return float((residual(atoms, y, code) ** 2).sum())


# --- Sweeps, in numpy


def numpy_sweep(fit_atom, atoms, y, code, *, nonnegative=False):
    """Atoms in turn: `fit_atom(E, v, d) -> d`, then the best values."""
    atoms, values, indices = f64(atoms), f64(code.values).copy(), np.asarray(code.indices)
    length = np.linalg.norm(atoms, axis=1)
    values *= np.append(length, 1)[indices]
    atoms /= length[:, None]
    left = residual(atoms, y, with_code(code, values=values))
    for j in range(len(atoms)):
        row, slot = np.nonzero(indices == j)
        E = left[row] + values[row, slot, None] * atoms[j]
        atoms[j] = fit_atom(E, values[row, slot], atoms[j])
        v = E @ atoms[j]
        values[row, slot] = np.maximum(v, 0) if nonnegative else v
        left[row] = E - values[row, slot, None] * atoms[j]
    return atoms, values


def svd(E, v, d):
    singular = np.linalg.svd(E)[2][0]
    return singular if singular @ d >= 0 else -singular


def power_step(E, v, d):
    return v @ E / np.linalg.norm(v @ E)


@pytest.mark.parametrize(("update", "fit_atom"), [(ksvd.exact, svd), (ksvd.approximate, power_step)])
@pytest.mark.parametrize("n", [N, 700])
def test_a_sweep_is_numpys(update, fit_atom, n):
    # With 700 signals, each atom has several blocks of rows.
    atoms, y, code = signals(n=n)
    expected_atoms, expected_values = numpy_sweep(fit_atom, atoms, y, code)
    got, updated = update(atoms, y, code)
    np.testing.assert_allclose(got, expected_atoms, atol=2e-5)
    np.testing.assert_allclose(updated.values, expected_values, atol=2e-4)
    np.testing.assert_array_equal(updated.indices, code.indices)


def test_one_power_step_under_constraints_is_numpys():
    def step(E, v, d):
        towards = np.maximum(v @ E, 0)
        return towards / np.linalg.norm(towards)

    atoms, y, code = signals(nonnegative=True, nonnegative_atoms=True)
    expected_atoms, expected_values = numpy_sweep(step, atoms, y, code, nonnegative=True)
    got, updated = ksvd.approximate(atoms, y, code, nonnegative=True, nonnegative_atoms=True)
    np.testing.assert_allclose(got, expected_atoms, atol=2e-5)
    np.testing.assert_allclose(updated.values, expected_values, atol=2e-4)


def test_mod_is_least_squares():
    atoms, y, code = signals()
    Z = f64(code.dense())
    best = np.linalg.lstsq(Z, f64(y))[0]
    length = np.linalg.norm(best, axis=1, keepdims=True)
    got, updated = ksvd.mod(atoms, y, code)
    np.testing.assert_allclose(got, best / length, atol=2e-4)
    np.testing.assert_allclose(updated.dense(), Z * length[:, 0], rtol=1e-3, atol=1e-4)


def test_non_negative_least_squares_do_no_better_in_either_factor():
    """After an exact non-negative update of one atom, neither the values nor the atom can be improved alone."""
    _, y, _ = signals(nonnegative=True, nonnegative_atoms=True)
    code = SparseCode(jnp.ones((N, 1)), jnp.zeros((N, 1), jnp.int32), 1)
    (atom,), updated = ksvd.exact(jnp.ones((1, D)), y, code, nonnegative=True, nonnegative_atoms=True)
    best_values = [scipy_nnls(f64(atom)[:, None], row)[0] for row in f64(y)]
    np.testing.assert_allclose(updated.values[:, 0], best_values, atol=1e-4)
    best_atom = np.array([scipy_nnls(f64(updated.values), column)[0] for column in f64(y).T])
    np.testing.assert_allclose(atom, best_atom / np.linalg.norm(best_atom), atol=1e-3)


def test_the_exact_update_of_one_atom_is_the_best_of_all():
    _, y, _ = signals()
    code = SparseCode(jnp.ones((N, 1)), jnp.zeros((N, 1), jnp.int32), 1)
    atom, updated = ksvd.exact(jnp.ones((1, D)), y, code)
    np.testing.assert_allclose(error(atom, y, updated), (np.linalg.svd(f64(y))[1][1:] ** 2).sum(), rtol=1e-5)


@every_sweep
@every_sign
def test_the_error_never_rises(update, nonnegative, nonnegative_atoms):
    signs = {"nonnegative": nonnegative, "nonnegative_atoms": nonnegative_atoms}
    atoms, y, code = signals(1, **signs)
    errors = [error(atoms, y, code)]
    for _ in range(6):
        atoms, code = update(atoms, y, code, **signs)
        errors.append(error(atoms, y, code))
        assert not nonnegative or np.min(code.values) >= 0
        assert not nonnegative_atoms or np.min(atoms) >= 0
        np.testing.assert_allclose(np.linalg.norm(atoms, axis=1), 1, atol=1e-5)
    assert np.all(np.diff(errors) <= 1e-6 * errors[0])
    assert errors[-1] < 0.5 * errors[0]


def test_the_error_of_mod_never_rises():
    atoms, y, code = signals(1)
    errors = [error(atoms, y, code)]
    for _ in range(2):
        atoms, code = ksvd.mod(atoms, y, code)
        errors.append(error(atoms, y, code))
    assert errors[1] < errors[0]
    assert errors[2] <= errors[1] * (1 + 1e-6), "there is nothing left to gain"


@pytest.mark.parametrize("ratio", [0.0, 0.5, 0.999, 1.0])
def test_the_eigenvector_is_found_whatever_the_gap(ratio):
    rng = np.random.default_rng(0)
    basis = np.linalg.qr(rng.normal(size=(D, D)))[0]
    values = np.append([1, ratio], 0.1 * ratio * np.ones(D - 2))
    covariance = (basis * values) @ basis.T
    v = f64(jax.jit(rank_one.eigenvector)(jnp.asarray(covariance, jnp.float32)))
    assert np.linalg.norm(v) == pytest.approx(1, abs=1e-6)
    assert v @ covariance @ v == pytest.approx(1, abs=2e-6)


# --- Hard inputs


def spoil(y, code):
    """NaN in a signal, Inf in another, NaN in the values of a third; and the rows that are fine."""
    y, values = np.array(y), np.array(code.values)
    y[3, 2], y[5, 0] = np.nan, np.inf
    values[7, np.argmax(np.asarray(code.mask)[7])] = np.nan
    return jnp.asarray(y), with_code(code, values=values), np.delete(np.arange(N), [3, 5, 7])


@every_update
def test_rows_that_are_not_finite_take_no_part(update):
    atoms, y, code = signals()
    y, code, fine = spoil(y, code)
    got, updated = update(atoms, y, code)
    rest = SparseCode(code.values[fine], code.indices[fine], M)
    expected, expected_code = update(atoms, y[fine], rest)
    np.testing.assert_allclose(got, expected, atol=1e-5)
    np.testing.assert_allclose(updated.values[fine], expected_code.values, atol=1e-4)
    others = np.array([3, 5, 7])
    assert_same_bits((updated.values[others], updated.indices[others]), (code.values[others], code.indices[others]))


@every_update
def test_zero_rows_zero_atoms_and_atoms_without_use_are_harmless(update):
    atoms, y, code = signals()
    atoms, y = atoms.at[2].set(0).at[4].multiply(3), y.at[0].set(0)
    code = with_code(code, indices=jnp.where(code.indices == 4, M, code.indices))
    code = with_code(code, values=jnp.where(code.mask, code.values, 0))
    got, updated = update(atoms, y, code)
    assert np.all(np.isfinite(got)) and np.all(np.isfinite(updated.values))
    np.testing.assert_allclose(got[4], atoms[4] / np.linalg.norm(atoms[4]), atol=1e-6)
    assert np.linalg.norm(got[2]) == pytest.approx(1, abs=1e-5), "a zero atom that is in use becomes one"
    assert error(got, y, updated) < error(atoms, y, code)


@every_update
def test_an_index_that_stands_twice_is_put_into_one_slot(update):
    atoms, y, code = signals()
    twice = with_code(code, indices=code.indices.at[:, 1].set(code.indices[:, 0]))
    twice = with_code(twice, values=jnp.where(twice.mask, code.values, 0))
    total = jnp.where(twice.mask[:, 0], twice.values[:, 0] + twice.values[:, 1], 0)
    once = with_code(
        twice, indices=twice.indices.at[:, 1].set(M), values=twice.values.at[:, 0].set(total).at[:, 1].set(0)
    )
    (got, updated), (expected, expected_code) = update(atoms, y, twice), update(atoms, y, once)
    np.testing.assert_allclose(got, expected, atol=1e-5)
    np.testing.assert_allclose(updated.dense(), expected_code.dense(), atol=1e-4)


@every_update
def test_duplicate_atoms_do_not_make_the_error_rise(update):
    atoms, y, code = signals()
    atoms = atoms.at[1].set(atoms[0]).at[2].set(-2 * atoms[0])
    got, updated = update(atoms, y, code)
    assert error(got, y, updated) <= error(atoms, y, code)


@every_update
def test_shapes_that_do_not_fit_are_refused(update, unchecked):
    atoms, y, code = signals()
    with pytest.raises(ValueError, match="atoms have width"):
        update(atoms, y[:, 1:], code)


def test_mod_refuses_non_negative_atoms():
    with pytest.raises(ValueError, match="use `exact`"):
        ksvd.mod(*signals(), nonnegative_atoms=True)


@every_sweep
def test_the_dtype_is_kept(update):
    atoms, y, code = signals()
    small = (atoms.astype(jnp.bfloat16), y.astype(jnp.bfloat16), with_code(code, values=code.values.astype("bfloat16")))
    got, updated = update(*small)
    assert got.dtype == updated.values.dtype == jnp.bfloat16
    np.testing.assert_allclose(f64(got), f64(update(atoms, y, code)[0]), atol=0.05)


# --- Replacement


def test_useless_atoms_are_replaced_by_the_worst_signals():
    atoms = jnp.eye(4, 6).at[2].set(-2 * jnp.eye(4, 6)[1])  # 2 repeats 1, and nobody uses 3
    y = jnp.zeros((5, 6)).at[0, 4].set(2.0).at[1, 5].set(-3.0).at[2, 0].set(1).at[3, 3].set(jnp.nan)
    code = SparseCode(jnp.array([[0.0], [0], [1], [1], [0]]), jnp.array([[0], [1], [0], [2], [1]]), 4)
    got, count = ksvd.replace(atoms, y, code)
    assert int(count) == 2
    np.testing.assert_allclose(got, [*np.eye(4, 6)[:2], [0, 0, 0, 0, 0, -1], [0, 0, 0, 0, 1, 0]], atol=1e-6)


def test_nothing_is_replaced_by_a_signal_without_error():
    atoms, y = jnp.eye(3), jnp.eye(3)[:1]
    code = SparseCode(jnp.ones((1, 1)), jnp.zeros((1, 1), jnp.int32), 3)
    got, count = ksvd.replace(atoms, y, code)
    assert int(count) == 0
    np.testing.assert_array_equal(got, atoms)


# --- Learning


def experiment(*, n):
    """Signals of the experiment of Aharon et al. (2006), without noise."""
    return jnp.asarray(synthetic(1, None)[1][:n], jnp.float32)


# Most of the time of these is the compilation of separate programs.
@pytest.mark.parametrize(
    "update", [ksvd.exact, *(pytest.param(f, marks=pytest.mark.slow) for f in (ksvd.approximate, ksvd.mod))]
)
def test_the_dictionary_is_found_again(update):
    true, y = synthetic(0, 20.0)
    got, history = ksvd.fit(jax.random.key(0), jnp.asarray(y, jnp.float32), m=50, k=3, steps=80, update=update)
    assert recovered(true, f64(got)) >= 0.84
    assert np.all(f64(history.updated) <= f64(history.coded) * (1 + 1e-6))
    np.testing.assert_allclose(np.linalg.norm(got, axis=1), 1, atol=1e-5)


@pytest.mark.slow
def test_non_negative_factors_are_found_again():
    rng = np.random.default_rng(0)
    true = np.maximum(rng.normal(size=(M, 16)), 0)
    true /= np.linalg.norm(true, axis=1, keepdims=True)
    indices = np.argsort(rng.random((600, M)), axis=1)[:, :2]
    y = jnp.asarray(np.einsum("nk,nkd->nd", rng.exponential(size=(600, 2)), true[indices]), jnp.float32)
    shares = []
    for seed in range(4):
        got, history = ksvd.fit(
            *(jax.random.key(seed), y), m=M, k=2, steps=40, nonnegative=True, nonnegative_atoms=True
        )
        assert np.min(got) >= 0
        assert np.all(f64(history.updated) <= f64(history.coded) * (1 + 1e-6))
        shares.append(recovered(true, f64(got)))
    assert np.mean(shares) >= 0.8


def test_a_fit_leaves_out_what_is_not_finite_and_starts_from_what_is_given():
    y = experiment(n=200)
    y = y.at[17, 3].set(jnp.nan).at[4].set(0)
    start = y[jnp.arange(20, 70)] * 2
    got, history = ksvd.fit(jax.random.key(0), y, m=50, k=3, steps=2, start=start)
    assert np.all(np.isfinite(got)) and np.all(np.isfinite(history.updated))
    expected, _ = ksvd.fit(jax.random.key(5), y.at[17].set(0), m=50, k=3, steps=2, start=start)
    np.testing.assert_allclose(got, expected, atol=1e-5)


def test_a_tolerance_ends_the_coding_early():
    y = experiment(n=200)
    tol = 0.9 * float(jnp.max(jnp.linalg.norm(y, axis=1)))
    _, history = ksvd.fit(jax.random.key(0), y, m=50, k=3, steps=2, tol=tol)
    assert float(history.coded[0]) > 0.1


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"m": 50, "k": 21}, "k from 1 to 20"),
        ({"m": 50, "k": 0}, "k from 1 to 20"),
        ({"m": 2, "k": 3}, "k from 1 to 2"),
        ({"m": 201, "k": 3}, "fewer atoms or `start`"),
        ({"m": 50, "k": 3, "start": jnp.ones((49, 20))}, r"one of shape \(50, 20\)"),
    ],
)
def test_what_cannot_be_learnt_is_refused(options, message, unchecked):
    y = experiment(n=200)
    with pytest.raises(ValueError, match=message):
        ksvd.fit(jax.random.key(0), y, **options)


def test_fits_are_compiled_once():
    y = experiment(n=200)
    before = learning._fit._cache_size()
    for key in map(jax.random.key, range(2)):
        ksvd.fit(key, y, m=50, k=3, steps=2, tol=0.1)
    assert learning._fit._cache_size() <= before + 1


@pytest.mark.parametrize(
    "update",
    [
        pytest.param(ksvd.exact, marks=pytest.mark.slow),
        ksvd.approximate,
        pytest.param(ksvd.mod, marks=pytest.mark.slow),
    ],
    ids=lambda update: update.__name__,
)
def test_learning_is_free_of_units(update):
    y = jnp.asarray(np.random.default_rng(0).normal(size=(60, 10)), jnp.float32)

    def fit(unit):
        return ksvd.fit(jax.random.key(0), unit * y, m=8, k=2, steps=2, update=update, tol=0.5 * unit)

    D, history = fit(1.0)
    assert history.updated[-1] < history.coded[0]
    code, _ = jaxsae.pursuit.omp(D, y, k=2)
    start = D * jnp.float32(1.5)  # not of norm 1
    moved = update(start, y, code)
    for unit in (2.0**-60, 2.0**60):
        again, seen = fit(unit)
        np.testing.assert_array_equal(again, D)
        np.testing.assert_array_equal(seen.updated, history.updated)
        for atoms in (1.0, 2.0**-60, 2.0**60):
            if unit / atoms in (2.0**-120, 2.0**120):
                continue  # values near the end of the range
            values = code.values * jnp.float32(unit / atoms)
            got = update(atoms * start, unit * y, code.replace(values=values))
            np.testing.assert_array_equal(got[0], moved[0])
            np.testing.assert_array_equal(got[1].values, unit * moved[1].values)
    lost = jnp.asarray(np.float32(f64(y) * 1e-39))
    _, history = ksvd.fit(jax.random.key(0), lost, m=8, k=2, steps=2, update=update)
    assert np.all(np.isnan(history.updated)), "what is lost is said to be"


@pytest.mark.parametrize("value", [0.0, np.nan])
def test_of_nothing_there_is_no_error(value):
    _, history = ksvd.fit(jax.random.key(0), jnp.full((16, 6), value), m=4, k=2, steps=1)
    assert np.isnan(history.updated).all()


@pytest.mark.parametrize("update", [ksvd.exact, ksvd.approximate, ksvd.replace], ids=lambda update: update.__name__)
def test_without_rows_atoms_are_as_those_that_no_row_uses(update):
    D = jnp.asarray(np.random.default_rng(0).normal(size=(6, 4)), jnp.float32)
    y, unused = jnp.zeros((3, 4)), jaxsae.SparseCode(jnp.zeros((3, 2)), jnp.full((3, 2), 6), 6)
    none = jax.tree.map(lambda leaf: leaf[:0], unused)
    wanted, _ = update(D, y, unused, nonnegative_atoms=True)
    found, _ = update(D, y[:0], none, nonnegative_atoms=True)
    np.testing.assert_array_equal(found, wanted)
