"""Pursuits: against scikit-learn and float64, on hard inputs, and where theory says that they succeed and fail."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from problems import assert_same_bits, f64, residual, scipy_nnls
from sklearn.linear_model import orthogonal_mp, orthogonal_mp_gram

import jaxsae
from jaxsae import Status, pursuit
from jaxsae.pursuit import selection

D, M, K = 64, 256, 8


def planted(seed=0, *, rows, d=D, m=M, k=K, noise=0.3, nonnegative=False):
    """Unit atoms, and rows of `k` of them with noise: `D [m d]`, `y [n d]`, `z [n m]`."""
    rng = np.random.default_rng(seed)
    dictionary = rng.normal(size=(m, d))
    dictionary /= np.linalg.norm(dictionary, axis=1, keepdims=True)
    z = np.zeros((rows, m))
    support = np.argsort(rng.random((rows, m)), axis=1)[:, :k]
    values = rng.normal(size=(rows, k))
    np.put_along_axis(z, support, np.abs(values) if nonnegative else values, axis=1)
    y = z @ dictionary + noise * rng.normal(size=(rows, d))
    return jnp.asarray(dictionary, jnp.float32), jnp.asarray(y, jnp.float32), z


def compiled(method, **options):
    return jax.jit(lambda dictionary, y: method(dictionary, y, **options))


def support(code) -> np.ndarray:
    """`[n m]`, whether an atom is on the support."""
    on = np.zeros((*code.indices.shape[:-1], code.num_latents + 1), bool)
    np.put_along_axis(on, np.asarray(code.indices), True, axis=-1)
    return on[..., :-1]


def assert_agrees(code, best: np.ndarray):
    """Equal supports except in at most a thousandth of the rows, and equal values where supports agree."""
    equal = np.all(support(code) == (best != 0), axis=1)
    assert np.mean(equal) >= 0.999
    np.testing.assert_allclose(f64(code.dense())[equal], best[equal], atol=1e-4)


OMP = compiled(pursuit.omp, k=K)


def test_omp_chooses_what_scikit_learn_does():
    dictionary, y, _ = planted(rows=10_000)
    code, info = OMP(dictionary, y)
    atoms = f64(dictionary)
    assert_agrees(code, orthogonal_mp_gram(atoms @ atoms.T, atoms @ f64(y).T, n_nonzero_coefs=K).T)
    assert np.all(np.asarray(info.status) == Status.CONVERGED)
    assert np.max(info.kkt) <= 1e-5
    assert np.all(np.asarray(info.steps) == K)


def float64_omp(dictionary, y, k) -> np.ndarray:
    """By least squares anew on each support."""
    atoms, y = f64(dictionary), f64(y)
    z, chosen = np.zeros((len(y), len(atoms))), np.zeros((len(y), 0), int)
    for _ in range(k):
        correlations = np.abs((y - z @ atoms) @ atoms.T)
        np.put_along_axis(correlations, chosen, 0, axis=1)
        chosen = np.append(chosen, np.argmax(correlations, axis=1)[:, None], axis=1)
        for row, columns in enumerate(chosen):
            z[row, columns] = np.linalg.lstsq(atoms[columns].T, y[row])[0]
    return z


# Few atoms in a wide space, with a Gram matrix; many atoms of few dimensions; as many atoms as there are dimensions.
@pytest.mark.parametrize(("d", "m", "k"), [(20, 48, 5), (20, 48, 12), (12, 300, 12)])
def test_omp_chooses_what_least_squares_anew_would(d, m, k):
    dictionary, y, _ = planted(rows=300, d=d, m=m, k=k, noise=0.1)
    code, _ = compiled(pursuit.omp, k=k)(dictionary, y)
    steps_before_rounding = min(k, d - 1)
    code = code.replace(indices=code.indices.at[:, steps_before_rounding:].set(m))
    best = float64_omp(dictionary, y, steps_before_rounding)
    assert np.mean(np.all(support(code) == (best != 0), axis=1)) >= 0.99


@pytest.mark.slow
def test_omp_chooses_what_least_squares_anew_would_among_many_atoms():
    dictionary, y, _ = planted(rows=500, d=768, m=16384, k=32, noise=0.1)
    code, _ = compiled(pursuit.omp, k=32)(dictionary, y)
    assert_agrees(code, float64_omp(dictionary, y, 32))
    atoms = f64(dictionary)
    best = orthogonal_mp(atoms.T, f64(y[:4]).T, n_nonzero_coefs=32).T  # a Gram matrix would take 2 GiB
    np.testing.assert_allclose(f64(code.dense())[:4], best, atol=1e-4)


# --- What holds for all of them

METHODS = {
    "omp": pursuit.omp,
    "matching_pursuit": pursuit.matching_pursuit,
    "gradient_pursuit": pursuit.gradient_pursuit,
    "iti": pursuit.iti,
    "iht": pursuit.iht,
    "niht": pursuit.niht,
    "cosamp": pursuit.cosamp,
}
NOT_REFITTED = ("matching_pursuit", "gradient_pursuit")
d, m, k, n = 20, 48, 5, 48
methods = pytest.mark.parametrize("name", METHODS)
# Each is a separate program, with some seconds of compilation.
variants = pytest.mark.parametrize(
    ("name", "nonnegative"),
    [
        *((name, False) for name in METHODS),
        *((name, True) for name in ("omp", "gradient_pursuit", "iti")),
        *(pytest.param(name, True, marks=pytest.mark.slow) for name in ("matching_pursuit", "iht", "niht", "cosamp")),
    ],
)


@functools.cache
def program(name, nonnegative=False):
    return compiled(METHODS[name], k=k, nonnegative=nonnegative)


def hard():
    """Atoms of all sizes, one zero, two equal; a zero row, a NaN, and one of a single atom."""
    dictionary, y, _ = planted(rows=n, d=d, m=m, k=k)
    scale = np.random.default_rng(1).uniform(0.1, 10, (m, 1))
    dictionary = (dictionary * scale).at[7].set(0).at[9].set(dictionary[8])
    return dictionary, y.at[3].set(0).at[5, 2].set(jnp.nan).at[6].set(3 * dictionary[8])


@variants
def test_hard_rows_and_atoms_are_ordinary(name, nonnegative):
    dictionary, y = hard()
    code, info = program(name, nonnegative)(dictionary, y)
    status, on = np.asarray(info.status), support(code)
    assert np.flatnonzero(status == Status.NONFINITE).tolist() == [5]
    assert np.flatnonzero(np.isnan(info.kkt)).tolist() == [5]
    assert np.all(np.isfinite(code.values))
    assert not on[[3, 5]].any() and not on[:, 7].any()
    assert np.all(on.sum(1) == np.asarray(code.mask).sum(1)), "an atom stands in one slot only"
    assert not nonnegative or np.all(np.asarray(code.values) >= 0)
    if name not in NOT_REFITTED:
        assert np.nanmax(info.kkt) <= 1e-5
    judged = jaxsae.certify(dictionary, y, code, nonnegative=nonnegative)
    np.testing.assert_allclose(np.delete(info.kkt, 5), np.delete(judged.kkt, 5), atol=3e-6)

    good = np.delete(np.arange(n), 5)
    left = np.linalg.norm(residual(dictionary, y, code), axis=1)
    assert np.all(left[good] <= np.linalg.norm(y, axis=1)[good] * (1 + 1e-6))
    np.testing.assert_allclose(left[6], 0, atol=1e-4)


@methods
@pytest.mark.parametrize("number", [np.nan, np.inf, 1e-40])
def test_an_atom_that_is_no_number_is_named_by_every_row_that_met_it(name, number):
    dictionary, y = hard()
    for broken in ((dictionary.at[11].set(number), y), (dictionary, jnp.full_like(y, number))):
        code, info = program(name)(*broken)
        np.testing.assert_array_equal(info.status, Status.NONFINITE)
        assert np.isnan(info.kkt).all() and not code.mask.any()


@variants
def test_a_row_is_the_same_in_any_company(name, nonnegative):
    dictionary, y = hard()
    one = program(name, nonnegative)(dictionary, y)
    other = program(name, nonnegative)(dictionary, y[::-1].at[:20].multiply(100))
    assert_same_bits(jax.tree.map(lambda x: x[:28], one), jax.tree.map(lambda x: x[20:][::-1], other))


@methods
def test_units_make_no_difference(name):
    dictionary, y = hard()
    one, _ = program(name)(dictionary, y)
    other, _ = program(name)(dictionary * 2.0**-20, y * 2.0**20)
    np.testing.assert_array_equal(one.indices, other.indices)
    np.testing.assert_allclose(one.values, other.values * 2.0**-40, rtol=1e-6)
    # Atoms too small to square: the refit takes another way, to another of the optima that repeated atoms leave.
    tiny, _ = program(name)(dictionary * 2.0**-30, y * 2.0**20)
    np.testing.assert_array_equal(one.indices, tiny.indices)


@pytest.mark.parametrize("name", ["omp", "iti"])
def test_vmap_and_a_single_row_are_the_batch(name):
    dictionary, y = hard()
    f, expected = functools.partial(METHODS[name], k=k), program(name)(dictionary, y)
    assert_same_bits(jax.jit(jax.vmap(f, in_axes=(None, 0)))(dictionary, y), expected)
    assert_same_bits(f(dictionary, y[0]), jax.tree.map(lambda x: x[0], expected))


@pytest.mark.slow
@variants
def test_more_slots_than_dimensions(name, nonnegative):
    dictionary, y, _ = planted(rows=n, d=6, m=m, k=2)
    code, info = compiled(METHODS[name], k=9, nonnegative=nonnegative)(dictionary, y)
    assert np.all(np.isfinite(code.values)) and np.all(np.asarray(info.status) != Status.NONFINITE)
    left = np.linalg.norm(residual(dictionary, y, code), axis=1) / np.linalg.norm(y, axis=1)
    assert np.all(left <= 1 + 1e-6)
    if name == "omp" and not nonnegative:
        assert np.max(left) <= 1e-5


def test_omp_ends_at_a_tolerance_of_each_row():
    dictionary, y, _ = planted(rows=n, d=d, m=m, k=k)
    norm = np.linalg.norm(y, axis=1)
    tol = jnp.asarray(norm * np.linspace(0.2, 1.1, n), jnp.float32)
    code, info = jax.jit(lambda y, tol: pursuit.omp(dictionary, y, k=12, tol=tol))(y, tol)
    left = np.linalg.norm(residual(dictionary, y, code), axis=1)
    steps = np.asarray(info.steps)
    assert np.all(left <= np.asarray(tol) * (1 + 1e-5))
    assert np.all(steps[norm <= np.asarray(tol)] == 0) and np.all(steps == code.mask.sum(1))
    before = float64_omp(dictionary, y, 1)
    early = np.linalg.norm(f64(y) - before @ f64(dictionary), axis=1) <= np.asarray(tol)
    assert np.all(steps[early] <= 1) and np.all(steps[~early] > 1)


def nearly_equal():
    """Two atoms at a small angle, the only ones in a plane, and rows in it: rounding decides the second step."""
    dictionary, _, _ = planted(rows=n, d=d, m=m, k=k)
    dictionary = dictionary.at[:, :2].set(0).at[:2].set(0).at[:2, 0].set(1).at[1, 1].set(1e-2)
    y = np.zeros((n, d), np.float32)
    y[:, :2] = np.random.default_rng(2).uniform(1, 2, (n, 2))
    return dictionary, jnp.asarray(y)


@pytest.mark.parametrize("data", [lambda: planted(rows=n, d=d, m=m, k=k)[:2], hard, nearly_equal])
def test_a_gram_matrix_changes_no_outcome(data, monkeypatch):
    dictionary, y = data()
    norm = np.nan_to_num(np.linalg.norm(y, axis=1))
    options = {"tol": jnp.asarray(norm * np.linspace(0, 1.1, n), jnp.float32), "max_atoms": jnp.arange(n) % (k + 1)}
    code, info = compiled(pursuit.omp, k=k, **options)(dictionary, y)
    eager = pursuit.omp(dictionary, y, k=k, **options)
    np.testing.assert_array_equal(eager[0].indices, code.indices)
    np.testing.assert_allclose(eager[0].values, code.values, rtol=1e-4, atol=1e-6)
    monkeypatch.setattr(selection, "_GRAM_BYTES", 0)
    without, wanted = compiled(pursuit.omp, k=k, **options)(dictionary, y)
    np.testing.assert_array_equal(code.indices, without.indices)
    np.testing.assert_allclose(code.values, without.values, rtol=1e-3, atol=1e-4)
    np.testing.assert_array_equal(info.steps, wanted.steps)
    np.testing.assert_array_equal(info.status, wanted.status)


def test_nonnegative_omp_chooses_what_nnls_anew_would():
    dictionary, y, _ = planted(rows=n, d=d, m=m, k=k, nonnegative=True)
    code, _ = program("omp", True)(dictionary, y)
    atoms, targets = f64(dictionary), f64(y)
    z, on = np.zeros((n, m)), np.zeros((n, m), bool)
    for _ in range(k):
        correlations = np.where(on, 0, (targets - z @ atoms) @ atoms.T)
        on[np.arange(n), np.argmax(correlations, axis=1)] = True
        for row in range(n):
            z[row, on[row]] = scipy_nnls(atoms[on[row]].T, targets[row])
    np.testing.assert_array_equal(support(code), on)
    np.testing.assert_allclose(f64(code.dense()), z, atol=1e-4)


def test_gradient_pursuit_lies_between_matching_pursuit_and_omp():
    dictionary, y, _ = planted(rows=n, d=d, m=m, k=k)
    names = ("omp", "gradient_pursuit", "matching_pursuit")
    left = [(residual(dictionary, y, program(name)(dictionary, y)[0]) ** 2).sum(1).mean() for name in names]
    assert left[0] < left[1] < left[2]


def test_values_have_the_derivative_of_the_refit():
    dictionary, y, _ = planted(rows=n, d=d, m=m, k=k)

    def loss(method, D, y):
        return jnp.sum(method(D, y).values ** 2)

    code, _ = program("omp")(dictionary, y)
    slopes = jax.grad(functools.partial(loss, lambda D, y: pursuit.omp(D, y, k=k)[0]), (0, 1))
    refit = jax.grad(functools.partial(loss, lambda D, y: jaxsae.refit(D, y, code, nonnegative=False)[0]), (0, 1))
    wanted = refit(dictionary, y)
    for found in (slopes(dictionary, y), jax.jit(slopes)(dictionary, y)):
        for got, want in zip(found, wanted, strict=True):
            np.testing.assert_allclose(got, want, rtol=1e-4, atol=1e-5)


# --- Recovery: exact well inside the region where theory and practice have it, and none well outside


@pytest.mark.parametrize(("method", "options"), [(pursuit.omp, {}), (pursuit.iti, {})], ids=["omp", "iti"])
def test_exact_recovery_has_a_region(method, options):
    rng = np.random.default_rng(3)
    d, m, sizes = 100, 200, np.repeat([10, 70], 32)
    atoms = rng.normal(size=(m, d)) / np.sqrt(d)
    rank = np.argsort(np.argsort(rng.random((64, m)), axis=1), axis=1)
    z = np.where(rank < sizes[:, None], rng.normal(size=(64, m)), 0)
    run = jax.jit(lambda D, y, max_atoms: method(D, y, k=70, max_atoms=max_atoms, **options))
    code, _ = run(jnp.asarray(atoms, jnp.float32), jnp.asarray(z @ atoms, jnp.float32), jnp.asarray(sizes))
    error = np.linalg.norm(f64(code.dense()) - z, axis=1) / np.linalg.norm(z, axis=1)
    assert np.all(np.asarray(code.mask).sum(1) <= sizes)
    assert np.all(error[sizes == 10] < 1e-4)
    assert np.all(error[sizes == 70] > 1e-2)


def test_false_alarms_are_as_rare_as_asked_for():
    # In a row of noise, each atom passes the first threshold with the probability asked for.
    rng = np.random.default_rng(4)
    atoms = jnp.asarray(rng.normal(size=(m, d)) / np.sqrt(d), jnp.float32)
    y = jnp.asarray(rng.normal(size=(n, d)), jnp.float32)
    code, _ = compiled(pursuit.iti, k=20, false_alarm=0.1, max_steps=1)(atoms, y)
    assert 0.07 < support(code).mean() < 0.13


@pytest.mark.parametrize("size", [0, m + 1])
def test_more_atoms_than_there_are_is_an_error(size):
    dictionary, y = hard()
    for method in METHODS.values():
        with pytest.raises(ValueError, match=f"got k = {size} for {m} atoms; pass a k from 1 to {m}"):
            method(dictionary, y, k=size)


def test_what_does_not_fit_is_an_error(unchecked):
    dictionary, y = hard()
    with pytest.raises(ValueError, match="y of shape"):
        pursuit.omp(dictionary, y[:, 1:], k=2)
    with pytest.raises(TypeError, match="floating point"):
        pursuit.iti(dictionary, y.astype(jnp.int32), k=2)
    with pytest.raises(TypeError, match="shape \\(m, d\\)"):
        pursuit.cosamp(dictionary[0], y, k=2)
    with pytest.raises(ValueError, match="got a mask of shape"):
        pursuit.omp(dictionary, y, k=2, mask=jnp.ones(d, bool))
    with pytest.raises(ValueError, match="nonnegative=True; pass one of the same shape, and nonnegative=False"):
        pursuit.omp(dictionary, y, k=2, mask=jnp.ones(y.shape, bool), nonnegative=True)


def test_what_is_masked_may_hold_anything_and_any_batch_will_do():
    dictionary, y, _ = planted(rows=n, d=d, m=m, k=k)
    mask = jnp.asarray(np.random.default_rng(0).random((n, d)) < 0.7)
    f = jax.jit(lambda y, mask: pursuit.omp(dictionary, y, k=2, mask=mask))
    code, info = f(jnp.where(mask, y, jnp.nan), mask)
    plain = compiled(pursuit.omp, k=2)
    for row in range(3):
        alone, _ = plain(jnp.where(mask[row], dictionary, 0), jnp.where(mask[row], y[row], 0))
        np.testing.assert_array_equal(code.indices[row], alone.indices)
        np.testing.assert_allclose(code.values[row], alone.values, rtol=1e-4)
    folded = jax.tree.map(lambda x: x.reshape(n, *x.shape[2:]), f(y.reshape(4, -1, d), mask.reshape(4, -1, d)))
    assert_same_bits(folded, (code, info))
