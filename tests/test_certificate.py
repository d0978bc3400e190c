"""Certificates: what the residual alone says of a code."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from problems import (
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
    scipy_nnls,
    with_code,
)

import jaxsae
from jaxsae import SparseCode

problem = functools.partial(problem, batch=(64,), k=6)  # one shape, and so one compilation


def kkt_by_definition(dictionary, y, code: SparseCode, nonnegative: bool) -> np.ndarray:
    atoms = atoms_of(dictionary, code)
    norms = np.linalg.norm(atoms, axis=-1)
    z = f64(code.values)
    gradient = -np.einsum("nkd,nd->nk", atoms, residual(dictionary, y, code))
    violation = np.abs(gradient)
    if nonnegative:
        violation = np.where(z > 0, violation, np.maximum(-gradient, 0))
        # A negative value is itself infeasible, in the units of a gradient.
        violation = np.maximum(violation, np.where(z < 0, -z * norms**2, 0))
    return violation.max(-1) / (norms.max(-1) * np.linalg.norm(f64(y), axis=-1))


CODES_TO_CERTIFY = pytest.mark.parametrize("values", ["start", "zeros", "refitted", "overshot", "signed"])


def code_to_certify(values, dictionary, y, code, nonnegative):
    refitted, _ = jaxsae.refit(dictionary, y, code, jaxsae.FISTA(tol=1e-6), nonnegative=nonnegative)
    return {
        "start": code,
        "zeros": with_code(code, values=np.zeros_like(code.values)),
        "refitted": refitted,
        "overshot": with_code(refitted, values=1.1 * refitted.values),
        "signed": with_code(code, values=np.asarray(code.values) - 1),
    }[values]


@CODES_TO_CERTIFY
@each_sign
def test_the_certified_kkt_residual_is_its_definition(values, nonnegative):
    dictionary, y, code = problem()
    code = code_to_certify(values, dictionary, y, code, nonnegative)
    certificate = jaxsae.certify(dictionary, y, code, nonnegative=nonnegative)
    expected = kkt_by_definition(dictionary, y, code, nonnegative)
    np.testing.assert_allclose(certificate.kkt, expected, rtol=1e-4, atol=1e-6)


@CODES_TO_CERTIFY
@each_sign
@pytest.mark.parametrize("coherence", [0.0, 0.8])
def test_the_gap_bounds_the_error_that_could_be_saved(values, nonnegative, coherence):
    dictionary, y, code = problem(coherence=coherence)
    code = code_to_certify(values, dictionary, y, code, nonnegative)
    if nonnegative and values == "signed":
        code = projected(code)  # an infeasible code may have less error than the best feasible one
    gap = f64(jaxsae.certify(dictionary, y, code, nonnegative=nonnegative).gap)
    # A gap is rounded in proportion to itself; where little is to be gained, it is exact.
    assert np.all(gap * (1 + 1e-5) >= objective_gap(dictionary, y, code, nonnegative) - 1e-7)
    if values == "refitted":
        assert np.max(gap) <= 1e-5
    else:
        assert np.median(gap) > 1e-3


@pytest.mark.parametrize("spread", [1e-2, 1e-3, 1e-4, 1e-5])
def test_the_gap_bounds_the_excess_of_nearly_parallel_atoms(spread):
    """Condition numbers of up to 1e12, arguments in float32: there a dual point would be infeasible by too much."""
    rng = np.random.default_rng(0)
    n, k, d = 40, 16, 64
    atoms = (rng.normal(size=(n, 1, d)) + spread * rng.normal(size=(n, k, d))).astype(np.float32)
    y = np.einsum("nk,nkd->nd", np.maximum(rng.normal(size=(n, k)), 0), atoms) + 3 * spread * rng.normal(size=(n, d))
    y = y.astype(np.float32)
    best = np.stack([scipy_nnls(f64(row).T, f64(target)) for row, target in zip(atoms, y, strict=True)])
    even = np.ones((n, k)) * best.mean(1, keepdims=True)
    moved = np.maximum(best + 0.1 * best.max(1, keepdims=True) * rng.normal(size=best.shape), 0)
    indices = jnp.arange(n * k, dtype=jnp.int32).reshape(n, k)
    least = ((y - np.einsum("nk,nkd->nd", best, f64(atoms))) ** 2).sum(1)
    for values in (best, even, moved):
        code = SparseCode(jnp.asarray(values, jnp.float32), indices, n * k)
        error = ((y - np.einsum("nk,nkd->nd", f64(code.values), f64(atoms))) ** 2).sum(1)
        excess = (error - least) / (f64(y) ** 2).sum(1)
        gap = f64(jaxsae.certify(jnp.asarray(atoms.reshape(n * k, d)), jnp.asarray(y), code).gap)
        assert np.all(excess <= gap * (1 + 1e-9) + 1e-15)
        assert np.median(gap) <= 2 * np.median(excess) + 1e-9


@each_sign
def test_a_certificate_does_not_depend_on_units(nonnegative):
    dictionary, y, code = problem()
    expected = jaxsae.certify(dictionary, y, code, nonnegative=nonnegative)
    for atoms, data in ((1e-10, 1e-20), (1e10, 1e20), (1e-10, 1e20)):
        scaled = with_code(code, values=np.asarray(code.values) * np.float32(data / atoms))
        certificate = jaxsae.certify(atoms * dictionary, data * y, scaled, nonnegative=nonnegative)
        for a, b in zip(jax.tree.leaves(certificate), jax.tree.leaves(expected), strict=True):
            np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-5)


def dual_slack(dictionary, y, code, best) -> np.ndarray:
    """What the gap may fall short by, as `Certificate` says."""
    norms = np.linalg.norm(atoms_of(dictionary, code), axis=-1)
    values = np.maximum(np.abs(f64(code.values)), np.abs(f64(best.values)))
    eps = np.finfo(np.float64).eps
    return 2 * (32 + y.shape[-1]) * eps * (norms * values).sum(-1) / np.linalg.norm(f64(y), axis=-1)


@each_sign
@pytest.mark.parametrize("coherence", [0.9, 0.99, 0.9999])
def test_a_certificate_holds_whatever_the_order_of_sums(coherence, nonnegative, optimised):
    dictionary, y, code = problem(coherence=coherence)
    best = optimum(dictionary, y, code, nonnegative)
    rng, eps = np.random.default_rng(0), np.finfo(np.float32).eps
    for off in (0, 1e-3, 1):
        slots, turn = rng.permutation(6), rng.permutation(16)
        values = f64(best.values) * (1 + off * rng.normal(size=best.values.shape))
        values = np.maximum(values, 0) if nonnegative else values
        moved = with_code(code, values=np.float32(values[:, slots]), indices=np.asarray(code.indices)[:, slots])
        permuted = dictionary[:, turn], y[:, turn], moved
        certificate = jaxsae.certify(*permuted, nonnegative=nonnegative)
        expected = kkt_by_definition(*permuted, nonnegative)
        assert np.all(expected <= f64(certificate.kkt) * (1 + 1e-5) + y.shape[-1] * eps)
        slack = dual_slack(*permuted, best.replace(values=f64(best.values)[:, slots]))
        short = objective_gap(*permuted, nonnegative) - f64(certificate.gap) * (1 + 1e-5)
        assert np.all(short <= slack + 1e-12)


@each_sign
@pytest.mark.parametrize("ridge", [1e-3, 0.3, 100.0])
def test_the_certificate_of_a_ridge_is_that_of_its_problem(ridge, nonnegative):
    dictionary, y, code = problem()
    refitted, info = jaxsae.refit(dictionary, y, code, nonnegative=nonnegative, ridge=ridge)
    best = objective(dictionary, y, optimum(dictionary, y, code, nonnegative, ridge), ridge)
    certificate = jaxsae.certify(dictionary, y, refitted, nonnegative=nonnegative, ridge=ridge)
    assert np.max(certificate.kkt) <= 1e-5 and np.max(certificate.gap) <= 1e-5
    np.testing.assert_allclose(certificate.kkt, info.kkt, atol=2e-6)
    assert np.max(jaxsae.certify(dictionary, y, refitted, nonnegative=nonnegative).kkt) > 1e-5
    start = projected(code, nonnegative)
    gap = f64(jaxsae.certify(dictionary, y, start, nonnegative=nonnegative, ridge=ridge).gap)
    above = (objective(dictionary, y, start, ridge) - best) / (0.5 * (f64(y) ** 2).sum(-1))
    assert np.all(above <= gap * (1 + 1e-5) + 1e-7)


def test_the_solver_and_the_certificate_agree():
    dictionary, y, code = problem(coherence=0.8)
    refitted, info = jaxsae.refit(dictionary, y, code)
    certificate = jaxsae.certify(dictionary, y, refitted)
    np.testing.assert_allclose(certificate.kkt, info.kkt, atol=2e-6)


def test_a_row_that_is_not_finite_has_no_certificate_and_touches_no_other():
    dictionary, y, code = problem()
    expected = jaxsae.certify(dictionary, y, code)
    certificate = jaxsae.certify(dictionary, y.at[5, 3].set(jnp.nan), code)
    for leaf, other in zip(jax.tree.leaves(certificate), jax.tree.leaves(expected), strict=True):
        assert np.isnan(leaf[5])
        assert_same_bits(np.delete(leaf, 5), np.delete(other, 5))


def test_what_an_unused_slot_holds_is_nothing():
    dictionary, y = jnp.eye(4), jnp.ones((1, 4))
    clean = jaxsae.SparseCode(jnp.array([[0.0, 1.0]]), jnp.array([[4, 2]]), 4)
    expected = jaxsae.certify(dictionary, y, clean)
    for left in (np.nan, np.inf, 7.0):
        code = jaxsae.SparseCode(jnp.array([[left, 1.0]]), jnp.array([[-1, 2]]), 4)
        assert jaxsae.certify(dictionary, y, code) == expected


def test_a_certificate_has_no_derivative():
    dictionary, y, code = problem()

    def bound(y):
        certificate = jaxsae.certify(dictionary, y, code)
        products = jaxsae.certify_gram(dictionary[:6] @ dictionary[:6].T, dictionary[:6] @ y[0], jnp.ones(6))
        return jnp.sum(certificate.gap + certificate.kkt) + products.gap + products.kkt

    assert not np.any(jax.grad(bound)(y))
    assert not np.any(jax.jvp(bound, (y,), (y,))[1])
