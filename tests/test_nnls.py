"""Non-negative least squares from a Gram or a dense matrix: optima, derivatives, starts, certificates, bad input."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.optimize
from problems import compilations

import jaxsae
from benchmarks.nnls import error, gaussians, optimum, pixels
from jaxsae import Status

SOLVERS = {
    "default": None,
    "BlockPivoting": jaxsae.BlockPivoting(),
    "ConjugateGradient": jaxsae.ConjugateGradient(),
    "FISTA": jaxsae.FISTA(),
    "InteriorPoint": jaxsae.InteriorPoint(),
    "ProjectedGradient": jaxsae.ProjectedGradient(),
}
every_solver = pytest.mark.parametrize("solver", SOLVERS.values(), ids=SOLVERS)


def gram(A, b, dtype=np.float64):
    return jnp.asarray(A.T @ A, dtype), jnp.asarray(A.T @ b, dtype)


def excess(A, b, z) -> float:
    """How far the error is above the least, relative to it."""
    least = error(A, b, optimum(A, b))
    return (error(A, b, z) - least) / least


@pytest.fixture(scope="module")
def random():
    rng = np.random.default_rng(0)
    return rng.normal(size=(30, 12)), rng.normal(size=30)


def test_the_oracle_refuses_what_is_no_optimum(monkeypatch, random):
    # As scipy 1.15 returned: its first passive set, and no error.
    monkeypatch.setattr("scipy.optimize.nnls", lambda A, b, maxiter: (np.ones(A.shape[1]), 0.0))
    with pytest.raises(ArithmeticError, match="KKT residual"):
        optimum(*random)


@every_solver
def test_it_is_scipys_optimum(solver, random, x64):
    z, info = jaxsae.nnls(*gram(*random), None, solver)
    assert info.status == Status.CONVERGED
    assert z.min() >= 0
    assert excess(*random, z) <= 1e-9


def test_without_the_constraint_it_is_the_solution_of_equations(random, x64):
    G, c = gram(*random)
    for solver in (None, jaxsae.InteriorPoint(tol=1e-12)):
        z, info = jaxsae.nnls(G, c, None, solver, nonnegative=False)
        assert (int(info.steps), int(info.status)) == (1, Status.CONVERGED)
        np.testing.assert_allclose(z, np.linalg.solve(G, c), rtol=1e-10)


# Conditions of 1e7 and 1e16; pivoting cycles on the second.
@pytest.mark.parametrize("width", [1.0, 1.5])
def test_blurred_pixels_in_double_precision(width, x64):
    A, b = pixels(400, width, 0)
    G, c = gram(A, b)
    z, info = jaxsae.nnls(G, c)
    assert int(info.status) == Status.CONVERGED
    assert excess(A, b, z) <= 1e-10
    certificate = jaxsae.certify_gram(G, c, z)
    assert certificate.kkt <= 1e-11
    z, info = jaxsae.nnls(*gram(A, b, np.float32))
    assert int(info.status) == Status.CONVERGED
    assert excess(A, b, z) <= 1e-6


@pytest.mark.slow
@pytest.mark.parametrize("width", [0.7, 1.0])
def test_a_large_problem_takes_few_factorisations(width, x64):
    A, b = pixels(1581, width, 0)
    z, info = jaxsae.nnls(*gram(A, b))
    assert int(info.status) == Status.CONVERGED
    assert int(info.steps) <= 25
    assert excess(A, b, z) <= 1e-10


@every_solver
def test_as_many_blurred_sources_as_pixels(solver):
    n = 400
    side = np.stack(np.meshgrid(np.arange(20.0), np.arange(20.0)), -1).reshape(-1, 2)
    A = np.exp(-((side[:, None] - side[None]) ** 2).sum(-1) / 2)
    b = A @ np.maximum(np.random.default_rng(0).normal(size=n) - 1, 0)
    x, info = jaxsae.nnls_dense(jnp.asarray(A, jnp.float32), jnp.asarray(b, jnp.float32), None, solver)
    code = jaxsae.SparseCode(x, jnp.arange(n), n)
    kkt = jaxsae.certify(jnp.asarray(A.T, jnp.float32), jnp.asarray(b, jnp.float32), code).kkt
    if int(info.status) == Status.CONVERGED:
        assert kkt <= 1.1e-5  # from the residual: that of the solver is from a Gram matrix that was rounded
    else:
        assert (int(info.status), bool(kkt > 1e-5)) == (Status.MAX_STEPS, True)
    if solver is None:
        assert int(info.status) == Status.CONVERGED
        assert 2 * error(A, b, x) <= 1e-6 * b @ b
    most = 0
    while solver is not None:
        most, solver = most + solver.max_steps, solver.fallback
    assert most == 0 or int(info.steps) <= most


@pytest.mark.parametrize("start", [(0.0, 0.0), (0.824, 0.394), (1.0, 1.0)], ids=str)
def test_two_atoms_of_which_one_is_best_alone(start):
    D, y = jnp.array([[1.0, 3.0], [1.0, 2.0]]), jnp.array([2.0, 3.0])
    code = jaxsae.SparseCode(jnp.array(start), jnp.arange(2), 2)
    best, info = jaxsae.refit(D, y, code)
    z, _ = jaxsae.nnls(D @ D.T, D @ y, jnp.array(start))
    x, _ = jaxsae.nnls_dense(D.T, y, jnp.array(start))
    assert int(info.status) == Status.CONVERGED
    np.testing.assert_allclose(optimum(np.asarray(D.T, float), np.asarray(y, float)), [0, 1.6], atol=1e-12)
    for values in (best.values, z, x):
        np.testing.assert_allclose(values, [0, 1.6], atol=1e-5)
        np.testing.assert_allclose(np.linalg.norm(y - values @ D), 0.2**0.5, rtol=1e-5)
    assert jaxsae.certify(D, y, jaxsae.SparseCode(jnp.array([0.824, 0.394]), jnp.arange(2), 2)).kkt > 1e-3


# --- Derivatives


def test_forwards_backwards_and_finite_differences_agree(x64):
    rng = np.random.default_rng(1)
    A, b = rng.normal(size=(20, 8)), rng.normal(size=20)
    G, c = gram(A, b)

    def solve(G, c):
        return jaxsae.nnls(G, c, None, jaxsae.BlockPivoting(tol=1e-14))[0]

    def loss(c):
        return jnp.sum(jnp.sin(solve(G, c)))

    half = rng.normal(size=G.shape)
    dots, bar, h = (jnp.asarray(half + half.T), jnp.asarray(rng.normal(size=8))), jnp.asarray(rng.normal(size=8)), 1e-6
    z, slope = jax.jvp(solve, (G, c), dots)
    assert 0 < np.sum(np.asarray(z) > 0) < 8
    ahead, behind = (solve(*(x + s * h * dot for x, dot in zip((G, c), dots, strict=True))) for s in (1, -1))
    np.testing.assert_allclose(slope, (ahead - behind) / (2 * h), atol=1e-8)
    bars = jax.vjp(solve, G, c)[1](bar)
    np.testing.assert_allclose(sum(jnp.vdot(*pair) for pair in zip(bars, dots, strict=True)), bar @ slope, rtol=1e-12)
    np.testing.assert_allclose(jax.jacfwd(solve, 1)(G, c), jax.jacrev(solve, 1)(G, c), atol=1e-12)
    turn = (jax.grad(loss)(c + h * dots[1]) - jax.grad(loss)(c - h * dots[1])) / (2 * h)
    np.testing.assert_allclose(jax.hessian(loss)(c) @ dots[1], turn, atol=1e-7)


def least_error(D, y, solver=None):
    code = jaxsae.SparseCode(jnp.zeros(len(D), D.dtype), jnp.arange(len(D)), len(D))
    z, info = jaxsae.refit(D, y, code, solver)
    return 0.5 * jnp.sum((y - z.values @ D) ** 2), (z.values, info.status)


def test_the_derivative_of_the_least_error_is_that_of_the_envelope_theorem(x64):
    A, b = gaussians(40, 0)
    D, y = jnp.asarray(A.T), jnp.asarray(b)
    assert np.linalg.cond(A.T @ A) >= 1e10
    solver = jaxsae.BlockPivoting(tol=1e-13, fallback=jaxsae.InteriorPoint(tol=1e-13))
    slope = jax.jit(jax.value_and_grad(functools.partial(least_error, solver=solver), (0, 1), has_aux=True))
    (_, (z, status)), (D_bar, y_bar) = slope(D, y)
    assert int(status) == Status.CONVERGED
    r = y - z @ D
    np.testing.assert_allclose(y_bar, r, atol=1e-8 * np.abs(r).max())
    np.testing.assert_allclose(D_bar, -z[:, None] * r, atol=1e-8 * np.abs(z[:, None] * r).max())
    # In single precision they are finite, and the status is honest.
    (_, (z, status)), bars = jax.jit(jax.value_and_grad(least_error, (0, 1), has_aux=True))(
        D.astype(jnp.float32), y.astype(jnp.float32)
    )
    assert all(np.isfinite(bar).all() for bar in bars)
    code = jaxsae.SparseCode(z, jnp.arange(40), 40)
    kkt = jaxsae.certify(D.astype(jnp.float32), y.astype(jnp.float32), code).kkt
    assert (int(status) == Status.CONVERGED) == bool(kkt <= 1e-5)


@every_solver
def test_derivatives_are_finite_at_a_degenerate_point(solver):
    # The second value is 0, and so is its gradient.
    G, c = jnp.eye(2), jnp.array([1.0, 0.0])

    def solve(G, c):
        return jaxsae.nnls(G, c, None, solver)[0]

    np.testing.assert_allclose(solve(G, c), [1, 0], atol=1e-4)
    for jacobian in (jax.jacfwd, jax.jacrev):
        assert all(np.isfinite(x).all() for x in jacobian(solve, (0, 1))(G, c))


@pytest.mark.parametrize("differentiate", [jax.grad, jax.jacfwd, jax.hessian])
def test_a_second_derivative_call_compiles_nothing(differentiate):
    G, c = 2 * jnp.eye(4) + 0.1, jnp.array([1.0, -1.0, 2.0, 0.5])
    slope = differentiate(lambda c: jnp.sum(jnp.sin(jaxsae.nnls(G, c)[0])))
    slope(c)
    other = c + 0.1
    with compilations() as seen:
        jax.block_until_ready(slope(other))
    assert not seen


# --- Batches, starts, scales


def test_rows_do_not_depend_on_their_batch(random, x64):
    A, b = random
    rng = np.random.default_rng(2)
    c = jnp.asarray((b + rng.normal(size=(5, 30))) @ A)
    G = jnp.broadcast_to(A.T @ A, (5, 12, 12))
    z, info = jaxsae.nnls(G, c)
    mapped, _ = jax.vmap(jaxsae.nnls)(G, c)
    np.testing.assert_array_equal(mapped, z)
    for row in range(5):
        alone, about = jaxsae.nnls(G[row], c[row])
        np.testing.assert_array_equal(alone, z[row])
        assert about.steps == info.steps[row]


def test_rows_are_split_over_an_explicit_mesh(random):
    A, b = random
    c = jnp.asarray((b + np.random.default_rng(2).normal(size=(8, 30))) @ A, jnp.float32)
    G = jnp.asarray(np.broadcast_to(A.T @ A, (8, 12, 12)), jnp.float32)
    z, _ = jaxsae.nnls(G, c)
    slope = jax.grad(lambda c: jaxsae.nnls(G, c)[0].sum())(c)
    mesh = jax.make_mesh((8,), ("rows",), axis_types=(jax.sharding.AxisType.Explicit,))
    with jax.set_mesh(mesh):
        G, c = (jax.device_put(x, jax.NamedSharding(mesh, jax.P("rows"))) for x in (G, c))
        found, _ = jaxsae.nnls(G, c)
        np.testing.assert_allclose(found, z, rtol=1e-5, atol=1e-6)
        assert jax.typeof(found).sharding.spec[0] == "rows"
        assert np.all(jaxsae.certify_gram(G, c, found).kkt <= 1e-5)
        split = jax.jit(jax.grad(lambda c: jaxsae.nnls(G, c)[0].sum()))(c)
        np.testing.assert_allclose(split, slope, rtol=1e-4, atol=1e-5)


def test_the_solution_of_a_problem_nearby_saves_factorisations(x64):
    A, b = pixels(400, 1.0, 0)
    G, c = gram(A, b)
    z, cold = jaxsae.nnls(G, c)
    nearby = c * (1 + 1e-4 * np.random.default_rng(0).normal(size=c.shape))
    _, warm = jaxsae.nnls(G, nearby, z)
    assert warm.steps <= cold.steps // 2
    again, info = jaxsae.nnls(G, c, z)
    assert info.steps == 0
    np.testing.assert_array_equal(again, z)


@pytest.mark.parametrize("scale", [1e-30, 1e-12, 1e12, 1e30])
def test_units_do_not_matter(scale, random):
    A, b = random
    G, c = gram(A, b, np.float32)
    z, _ = jaxsae.nnls(G, c)
    scaled, of_scaled = jaxsae.nnls(G * scale, c * scale)
    assert int(of_scaled.status) == Status.CONVERGED
    np.testing.assert_allclose(scaled, z, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("size", [1e19, 1e38])
def test_a_start_whose_objective_overflows_is_replaced(size, random):
    A, b = random
    G, c = gram(A, b, np.float32)
    z, info = jaxsae.nnls(G, c, jnp.full(12, size, jnp.float32))
    x, of_dense = jaxsae.nnls_dense(*(jnp.asarray(v, jnp.float32) for v in (A, b)), jnp.full(12, size, jnp.float32))
    assert (int(info.status), int(of_dense.status)) == (Status.CONVERGED, Status.CONVERGED)
    assert max(excess(A, b, z), excess(A, b, x)) <= 1e-6


def test_a_product_that_underflows_is_not_called_solved(random):
    A, b = (jnp.asarray(x, jnp.float32) for x in random)
    A = A * 1e-25
    assert int(jaxsae.nnls(A.T @ A, A.T @ b)[1].status) == Status.INVALID
    x, info = jaxsae.nnls_dense(A, b)
    assert int(info.status) == Status.CONVERGED
    assert excess(*random, np.asarray(x, float) * 1e-25) <= 1e-6


def test_more_columns_than_rows_and_repeated_columns(x64):
    rng = np.random.default_rng(3)
    A, b = rng.normal(size=(10, 25)), rng.normal(size=10)
    A[:, 3] = A[:, 4] = 0
    A[:, 5] = A[:, 6]
    x, info = jaxsae.nnls_dense(jnp.asarray(A), jnp.asarray(b))
    assert int(info.status) == Status.CONVERGED
    z, _ = jaxsae.nnls(*gram(A, b))
    least = error(A, b, optimum(A[:, 5:], b) @ np.eye(25)[5:])
    for values in (x, z):
        assert error(A, b, values) <= least + 1e-9


# --- Certificates


def test_the_certificate_from_the_gram_matrix_bounds_the_excess(random, x64):
    A, b = random
    G, c = gram(A, b)
    best = optimum(A, b)
    rng = np.random.default_rng(4)
    for z in (best, np.maximum(best + 0.1 * rng.normal(size=best.shape), 0), np.zeros_like(best)):
        certificate = jaxsae.certify_gram(G, c, jnp.asarray(z))
        scale = np.max(np.abs(c) / np.sqrt(np.diagonal(G)))
        above = (error(A, b, z) - error(A, b, best)) / (0.5 * scale**2)
        assert above - 1e-12 <= certificate.gap
        full = jaxsae.certify(jnp.asarray(A.T), jnp.asarray(b), jaxsae.SparseCode(jnp.asarray(z), jnp.arange(12), 12))
        assert full.gap <= certificate.gap * (1 + 1e-9) + 1e-12
        assert full.kkt <= certificate.kkt * (1 + 1e-9) + 1e-12
    assert jaxsae.certify_gram(G, c, jnp.asarray(best)).kkt <= 1e-12


def test_a_solution_with_negative_values_is_not_certified(random, x64):
    G, c = gram(*random)
    free = jnp.linalg.solve(G, c)
    assert jaxsae.certify_gram(G, c, free).kkt > 1e-2
    assert jaxsae.certify_gram(G, c, free, nonnegative=False).kkt <= 1e-12


# --- Bad input


@pytest.mark.parametrize(
    ("G", "c", "match"),
    [
        (np.eye(3)[:2], np.ones(3), "square"),
        (np.eye(3), np.ones(2), "shape"),
        (np.ones(3), np.ones(3), "square"),
        (np.eye(3, dtype=int), np.ones(3), "dtype"),
    ],
    ids=["not square", "c of another length", "a vector", "integers"],
)
def test_what_does_not_fit_together_is_refused(G, c, match, unchecked):
    for call in (jaxsae.nnls, lambda G, c: jaxsae.certify_gram(G, c, c)):
        with pytest.raises((ValueError, TypeError), match=match):
            call(G, c)


def test_rows_that_are_no_problem_have_a_status_and_touch_no_other():
    good = jnp.eye(3) + 0.1
    rows = {
        "good": (good, jnp.ones(3), Status.CONVERGED),
        "nan": (good.at[0, 1].set(jnp.nan), jnp.ones(3), Status.NONFINITE),
        "inf": (good, jnp.array([1.0, jnp.inf, 0.0]), Status.NONFINITE),
        "asymmetric": (good.at[0, 1].set(0.5), jnp.ones(3), Status.INVALID),
        "negative diagonal": (good.at[0, 0].set(-1.0), jnp.ones(3), Status.INVALID),
        "beyond Cauchy and Schwarz": (good.at[0, 1].set(2.0).at[1, 0].set(2.0), jnp.ones(3), Status.INVALID),
        "without limit": (good.at[2].set(0).at[:, 2].set(0), jnp.ones(3), Status.INVALID),
        "nan at a zero": (good.at[2].set(0).at[:, 2].set(0), jnp.array([1, 1, jnp.nan]), Status.NONFINITE),
        "best at 0": (good.at[2].set(0).at[:, 2].set(0), jnp.array([1.0, 1.0, -1.0]), Status.CONVERGED),
        "nothing": (jnp.zeros((3, 3)), jnp.zeros(3), Status.CONVERGED),
    }
    G, c = (jnp.stack(x) for x in zip(*[row[:2] for row in rows.values()], strict=True))
    z0 = jnp.full((len(rows), 3), 0.25)
    z, info = jaxsae.nnls(G, c, z0)
    assert info.status.tolist() == [row[2] for row in rows.values()]
    with pytest.raises(RuntimeError, match=r"4 of 10 rows .* no Gram matrix \(rows 3, 4, 5, 6\)"):
        jaxsae.check(info)
    alone, _ = jaxsae.nnls(good, jnp.ones(3), z0[0])
    np.testing.assert_array_equal(z[0], alone)
    bad = info.status >= Status.NONFINITE
    np.testing.assert_array_equal(z[bad], z0[bad])
    np.testing.assert_array_equal(z[-1], 0)
    certificate = jaxsae.certify_gram(G, c, jnp.nan_to_num(z))
    np.testing.assert_array_equal(np.isnan(certificate.kkt), bad)


@pytest.mark.parametrize("solver", ["cg", jaxsae.FISTA, jaxsae.FISTA(tol=None)], ids=str)
def test_what_is_no_solver_is_refused(solver, unchecked):
    for call in (jaxsae.nnls, jaxsae.nnls_dense):
        with pytest.raises((TypeError, ValueError), match=r"pass an instance|pass a number"):
            call(jnp.eye(2), jnp.ones(2), None, solver)


def test_steps_are_counted_by_integers(random, unchecked):
    with pytest.raises(TypeError, match=r"`FISTA` got max_steps 10.0; pass an integer"):
        jaxsae.nnls(*gram(*random, np.float32), None, jaxsae.InteriorPoint(fallback=jaxsae.FISTA(max_steps=10.0)))


def test_an_indefinite_matrix_ends_and_says_so():
    # Every pair of atoms is possible, but not all three: the objective has no minimum.
    G, c = jnp.full((3, 3), -0.9) + 1.9 * jnp.eye(3), jnp.ones(3)
    assert np.linalg.eigvalsh(G)[0] < -0.5
    _, info = jaxsae.nnls(G, c)
    assert int(info.status) == Status.MAX_STEPS


@pytest.mark.parametrize("n", [0, 1])
def test_no_values_and_one(n):
    z, info = jaxsae.nnls(2 * jnp.eye(n), jnp.ones(n))
    np.testing.assert_allclose(z, np.full(n, 0.5))
    assert int(info.status) == Status.CONVERGED


# --- Bounds


def boxed(seed=0, n=30, m=25):
    """A singular problem with bounds of which some are infinite, some are equal, and some exclude 0."""
    rng = np.random.default_rng(seed)
    A, b = rng.normal(size=(m, n)), 3 * rng.normal(size=m)
    lower = np.where(rng.random(n) < 0.3, -np.inf, 0.3 * rng.normal(size=n) - 0.1)
    upper = np.where(rng.random(n) < 0.3, np.inf, np.where(np.isfinite(lower), lower, 0) + 0.4 * rng.random(n))
    lower[:3] = upper[:3] = [0.2, -0.1, 0.0]
    return A, b, lower, upper


def scipy_bounded(A, b, lower, upper):
    """The answer of scipy, which asks for bounds that are apart."""
    apart = 1e-13 * (lower == upper)
    return scipy.optimize.lsq_linear(A, b, (lower - apart, upper + apart), tol=1e-15, method="bvls", max_iter=9999).x


def kkt(A, b, z, lower, upper) -> float:
    """By how much a gradient in float64 allows to descend: where it does not, a convex problem is solved."""
    gradient = A.T @ (A @ z - b)
    return max(np.max(gradient[z > lower], initial=0), np.max(-gradient[z < upper], initial=0))


TIGHT = {
    "default": None,
    "BlockPivoting": jaxsae.BlockPivoting(tol=1e-11, max_steps=60, fallback=None),
    "ConjugateGradient": jaxsae.ConjugateGradient(tol=1e-11, fallback=None),
    "FISTA": jaxsae.FISTA(tol=1e-11, max_steps=20_000),
    "InteriorPoint": jaxsae.InteriorPoint(tol=1e-11),
    "ProjectedGradient": jaxsae.ProjectedGradient(tol=1e-11, max_steps=100_000),
}


@pytest.mark.parametrize("solver", TIGHT.values(), ids=TIGHT)
@pytest.mark.parametrize("size", [(12, 30), (30, 25), (300, 320)], ids=str)
def test_bounded_values_are_scipys(solver, size, x64):
    A, b, lower, upper = boxed(n=size[0], m=size[1])
    G, c = gram(A, b)
    z, info = jaxsae.nnls(G, c, None, solver, bounds=(jnp.asarray(lower), jnp.asarray(upper)))
    z = np.asarray(z)
    assert info.status == Status.CONVERGED
    assert np.all((z >= lower) & (z <= upper))
    assert kkt(A, b, z, lower, upper) <= 1e-8
    best = scipy_bounded(A, b, lower, upper)  # which may stop a little early
    assert error(A, b, z) <= error(A, b, best) * (1 + 1e-12) + 1e-16
    if size[0] < size[1]:
        np.testing.assert_allclose(z, best, atol=1e-6)


@pytest.mark.parametrize("size", [(12, 30), (30, 25)], ids=str)
def test_the_certificate_knows_bounds(size, x64):
    A, b, lower, upper = boxed(n=size[0], m=size[1])
    G, c = gram(A, b)
    limits = jnp.asarray(lower), jnp.asarray(upper)
    z, info = jaxsae.nnls(G, c, bounds=limits)
    least = float(0.5 * z @ G @ z - c @ z)
    unit = float(jnp.max(jnp.abs(c) / jnp.sqrt(jnp.diagonal(G)))) ** 2 / 2
    certificate = jaxsae.certify_gram(G, c, z, bounds=limits)
    np.testing.assert_allclose(certificate.kkt, info.kkt, atol=1e-12)
    assert certificate.gap <= 1e-12
    rng = np.random.default_rng(1)
    for size in (1e-6, 1e-3, 1e-1, 1):
        moved = jnp.clip(z + size * rng.normal(size=z.shape), *limits)
        above = float(0.5 * moved @ G @ moved - c @ moved) - least
        gap = float(jaxsae.certify_gram(G, c, moved, bounds=limits).gap) * unit
        assert above <= gap * (1 + 1e-9) + 1e-14
    outside = z.at[0].add(1e-3)
    assert jaxsae.certify_gram(G, c, outside, bounds=limits).gap == np.inf


@pytest.mark.parametrize("limits", [(-0.1, 0.1), (-10.0, 10.0), (0.0, 1e3), (0.0, np.inf), (-np.inf, 0.0)], ids=str)
def test_a_singular_matrix_in_single_precision_has_a_certificate(limits):
    """Rounded, its least eigenvalue is negative."""
    rng = np.random.default_rng(0)
    A, b = rng.normal(size=(30, 50)), rng.normal(size=30)
    G, c = gram(A, b, np.float32)
    z, info = jaxsae.nnls(G, c, bounds=limits)
    assert info.status == Status.CONVERGED
    assert 0 <= jaxsae.certify_gram(G, c, z, bounds=limits).gap <= 1e-4
    moved = jnp.clip(z + 0.05, *limits)
    unit = float(jnp.max(jnp.abs(c) / jnp.sqrt(jnp.diagonal(G)))) ** 2 / 2
    saved = error(A, b, moved) - error(A, b, z)
    assert saved <= 1.001 * unit * float(jaxsae.certify_gram(G, c, moved, bounds=limits).gap) + 1e-4


def test_bounds_move_the_values(x64):
    A, b, lower, upper = boxed(n=12, m=30)
    G, c = gram(A, b)
    rng = np.random.default_rng(2)

    def solve(c, lower, upper):
        return jaxsae.nnls(G, c, bounds=(lower, upper))[0]

    at = c, jnp.asarray(lower), jnp.asarray(upper)
    step = [jnp.where(jnp.isfinite(x), rng.normal(size=x.shape), 0) for x in at]
    step[2] = step[2].at[:3].set(step[1][:3])  # what is fixed stays so
    z, z_dot = jax.jvp(solve, at, tuple(step))
    moved = [solve(*(x + h * dx for x, dx in zip(at, step, strict=True))) for h in (1e-7, -1e-7)]
    np.testing.assert_allclose(z_dot, (moved[0] - moved[1]) / 2e-7, atol=1e-6)
    assert np.any((np.asarray(z) == lower)[3:]) and np.any((np.asarray(z) == upper)[3:])
    weight = jnp.asarray(rng.normal(size=z.shape))
    back = jax.vjp(solve, *at)[1](weight)
    forwards = sum(float(jnp.sum(bar * dx)) for bar, dx in zip(back, step, strict=True))
    np.testing.assert_allclose(forwards, float(weight @ z_dot), rtol=1e-9)


def test_bounds_may_be_numbers_and_rows_may_have_their_own(random):
    A, b = random
    G, c = gram(A, b, np.float32)
    both = jnp.stack([c, -c]), jnp.stack([G, G])
    upper = jnp.asarray([[0.1], [np.inf]])
    z, info = jaxsae.nnls(both[1], both[0], bounds=(-0.2, upper))
    assert np.all(np.asarray(info.status) == Status.CONVERGED)
    for row in range(2):
        alone = jaxsae.nnls(both[1][row], both[0][row], bounds=(-0.2, upper[row]))[0]
        jitted = jax.jit(lambda G, c, upper: jaxsae.nnls(G, c, bounds=(-0.2, upper))[0])
        np.testing.assert_allclose(alone, z[row], rtol=1e-5, atol=1e-6)
        np.testing.assert_allclose(jitted(both[1][row], both[0][row], upper[row]), z[row], rtol=1e-5, atol=1e-6)
    mapped = jax.vmap(lambda G, c, upper: jaxsae.nnls(G, c, bounds=(-0.2, upper))[0])(both[1], both[0], upper)
    np.testing.assert_allclose(mapped, z, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(jaxsae.nnls(G, c, bounds=(0.0, np.inf))[0], jaxsae.nnls(G, c)[0], rtol=1e-5, atol=1e-6)


@every_solver
def test_a_box_far_from_zero_and_a_value_without_curvature(solver):
    G = jnp.diag(jnp.array([1.0, 4.0, 0.0, 0.0, 0.0]))
    c = jnp.array([103.0, 0.0, 1.0, -1.0, 0.0])
    lower = jnp.array([100.0, 100.0, -1.0, -2.0, 5.0])
    z, info = jaxsae.nnls(G, c, None, solver, bounds=(lower, lower + 7))
    assert info.status == Status.CONVERGED
    np.testing.assert_allclose(z, [103.0, 100.0, 6.0, -2.0, 5.0], rtol=1e-4)
    certificate = jaxsae.certify_gram(G, c, z, bounds=(lower, lower + 7))
    assert certificate.gap <= 1e-6
    assert jaxsae.certify_gram(G, c, z.at[2].set(0.0), bounds=(lower, lower + 7)).gap == np.inf


@every_solver
@pytest.mark.parametrize("double", [False, True])
def test_a_row_without_a_linear_term_goes_where_its_bounds_send_it(solver, double):
    with jax.enable_x64(double):
        G, c = jnp.array([[1.0, -0.9], [-0.9, 1.0]]), jnp.zeros(2)
        limits = jnp.array([1.0, -5.0]), jnp.array([2.0, 5.0])
        z, info = jaxsae.nnls(G, c, None, solver, bounds=limits)
        assert info.status == Status.CONVERGED
        np.testing.assert_allclose(z, [1.0, 0.9], atol=1e-4)
        assert jaxsae.certify_gram(G, c, jnp.array([1.0, 0.0]), bounds=limits).gap >= 0.4
        assert jaxsae.certify_gram(G, c, jnp.ones(2)).gap == np.inf  # the best values are 0
        assert jaxsae.certify_gram(G, c, c).gap == 0


@every_solver
@pytest.mark.parametrize("limits", [(1e6, 1e6 + 1), (1e6, 2e6), (-np.inf, -1e6), (-1e-20, 1e-20)], ids=str)
def test_the_solver_and_the_certificate_agree_on_bounds_of_any_size(solver, limits):
    rng = np.random.default_rng(0)
    G, c = gram(rng.normal(size=(20, 12)), 5 * rng.normal(size=20), np.float32)
    z, info = jaxsae.nnls(G, c, None, solver, bounds=limits)
    certificate = jaxsae.certify_gram(G, c, z, bounds=limits)
    assert info.status == Status.CONVERGED
    assert np.all((z >= np.float32(limits[0])) & (z <= np.float32(limits[1])))
    np.testing.assert_allclose(certificate.kkt, info.kkt, atol=1e-6)
    assert certificate.kkt <= 2e-5
    if limits == (1e6, 1e6 + 1):
        other = jaxsae.certify_gram(G, c, z.at[0].set(1e6 if z[0] > 1e6 else 1e6 + 1), bounds=limits)
        assert other.kkt > 1e-8  # a bound apart by 16 of what float32 tells apart is no fixed value


def test_bounds_that_cross_are_refused(random, unchecked):
    G, c = gram(*random, np.float32)
    low = jnp.zeros(12).at[3].set(2.0)
    with pytest.raises(ValueError, match=r"cross, or are NaN, in 1 of 12 places, the first of them \(3,\): 2.0 and"):
        jaxsae.nnls(G, c, bounds=(low, 1.0))
    with pytest.raises(ValueError, match="cross, or are NaN, in 12 of 12"):
        jaxsae.certify_gram(G, c, c, bounds=(np.nan, 1.0))
    with pytest.raises(ValueError, match=r"of which the upper has shape \(5,\); pass what broadcasts to \(12,\)"):
        jaxsae.nnls(G, c, bounds=(0.0, jnp.ones(5)))
    with pytest.raises(TypeError, match=r"got 3.0 as bounds; pass \(lower, upper\)"):
        jaxsae.nnls(G, c, bounds=3.0)
    with pytest.raises(TypeError, match=r"got \(None, 1.0\) as bounds; pass \(lower, upper\)"):
        jaxsae.nnls(G, c, bounds=(None, 1.0))
    lows = jnp.stack([low, jnp.zeros(12), jnp.full(12, jnp.nan)])
    start = jnp.full(12, 0.25)
    solve = jax.jit(jax.vmap(lambda low: jaxsae.nnls(G, c, start, bounds=(low, 1.0))))
    z, info = solve(lows)
    assert info.status.tolist() == [Status.INVALID, Status.CONVERGED, Status.INVALID]
    np.testing.assert_array_equal(z[0], start)
    np.testing.assert_array_equal(z[2], start)
