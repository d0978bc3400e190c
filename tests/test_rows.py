"""Chunks of rows, and what a refit makes of them: each row gets what it needs, whatever its neighbours get."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from problems import assert_same_bits, atoms_of, f64, nmse, objective_gap, problem, with_code
from test_hard_set import near

import jaxsae
from jaxsae import SparseCode, Status
from jaxsae._core import chunking


@pytest.mark.parametrize("n", [1, 15, 16, 17, 100])
@pytest.mark.parametrize("share", [0.0, 0.1, 1.0])
def test_the_rows_named_are_revised_and_no_others(n, share):
    rng = np.random.default_rng(0)
    where, x = rng.random(n) < share, rng.normal(size=(n, 3)).astype(np.float32)
    old = {"square": jnp.full((n, 3), 7.0), "sum": jnp.full(n, 7.0)}

    def f(x):
        return {"square": x * x, "sum": x.sum(1)}

    new = jax.jit(lambda where, x: chunking.revise_rows(f, where, old, x, row_bytes=1 << 22))(where, x)
    np.testing.assert_array_equal(new["square"], np.where(where[:, None], x * x, 7))
    np.testing.assert_allclose(new["sum"], np.where(where, x.sum(1), 7), rtol=1e-6)


# --- rows of few atoms among many slots -------------------------------------------------------------------

SLOTS = 200


def few_of_many_slots(l0: np.ndarray, *, d=224, m=512):
    """Rows of these many atoms, anywhere among the slots."""
    p = problem(batch=l0.shape, d=d, m=m, k=SLOTS, coherence=0.1)
    on = np.random.default_rng(1).permuted(np.arange(SLOTS) < l0[:, None], axis=1)
    code = with_code(p.code, values=np.where(on, p.code.values, 0), indices=np.where(on, p.code.indices, m))
    y = np.einsum("nk,nkd->nd", f64(code.values), atoms_of(p.dictionary, code))
    noise = np.random.default_rng(2).normal(size=y.shape)
    y += noise * (np.linalg.norm(y, axis=1, keepdims=True) + 1) / np.linalg.norm(noise, axis=1, keepdims=True)
    return p._replace(y=jnp.asarray(y, jnp.float32), code=code)


L0 = np.array([0, 1, 7, 49, 50, 51, 99, 100, 101, 150, 199, 200])


@pytest.mark.parametrize("solver", [None, jaxsae.FISTA()], ids=["default", "FISTA"])
def test_rows_of_few_atoms_among_many_slots_reach_their_optimum(solver):
    p = few_of_many_slots(L0)
    refitted, info = jaxsae.refit(*p, solver)
    assert np.all(np.asarray(info.status) == Status.CONVERGED)
    assert not np.any(refitted.values[~np.asarray(p.code.mask)])
    np.testing.assert_allclose(objective_gap(p.dictionary, p.y, refitted), 0, atol=1e-7)


def test_where_the_atoms_stand_among_the_slots_is_no_matter():
    p = few_of_many_slots(L0)
    order = np.argsort(~np.asarray(p.code.mask), axis=1, kind="stable")
    packed = with_code(
        p.code, **{x: np.take_along_axis(getattr(p.code, x), order, axis=1) for x in ("values", "indices")}
    )
    answer, again = (jaxsae.refit(p.dictionary, p.y, code) for code in (p.code, packed))
    values = np.take_along_axis(np.asarray(answer[0].values), order, axis=1)
    np.testing.assert_allclose(again[0].values, values, atol=1e-5)
    np.testing.assert_array_equal(again[1].status, answer[1].status)


@pytest.mark.bits
def test_rows_of_any_number_of_atoms_are_the_same_to_the_bit_alone_and_in_a_crowd():
    l0 = np.random.default_rng(3).permutation(np.concatenate([L0, np.arange(0, 200, 3)]))
    p = few_of_many_slots(l0)
    values, info = jaxsae.refit(*p)[0].values, jaxsae.refit(*p)[1]
    for n in (0, 5, 33):
        code = SparseCode(p.code.values[n : n + 1], p.code.indices[n : n + 1], p.code.num_latents)
        alone, info_alone = jaxsae.refit(p.dictionary, p.y[n : n + 1], code)
        assert_same_bits(alone.values[0], values[n])
        assert_same_bits(jax.tree.map(lambda x: x[0], info_alone), jax.tree.map(lambda x, n=n: x[n], info))


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_a_row_of_few_atoms_that_is_not_finite_comes_back_unchanged(bad):
    p = few_of_many_slots(L0)
    y, values = np.array(p.y), np.array(p.code.values)
    y[3, 5] = bad
    values[7, np.flatnonzero(p.code.mask[7])[2]] = bad
    refitted, info = jaxsae.refit(p.dictionary, jnp.asarray(y), with_code(p.code, values=values))
    expected = jaxsae.refit(*p)[0]
    others = np.ones(len(L0), bool)
    others[[3, 7]] = False
    np.testing.assert_array_equal(np.asarray(info.status) == Status.NONFINITE, ~others)
    assert_same_bits(refitted.values[~others], values[~others])
    assert_same_bits(refitted.values[others], expected.values[others])


# --- rows that their solver leaves ------------------------------------------------------------------------


@pytest.mark.bits
def test_the_fallback_is_given_the_rows_that_were_left_and_no_others():
    p = problem(batch=(40,), d=64, k=24, coherence=0.3)
    alone, one = jaxsae.refit(*p, jaxsae.ConjugateGradient(tol=1e-6, max_steps=26, fallback=None))
    both, two = jaxsae.refit(
        *p, jaxsae.ConjugateGradient(tol=1e-6, max_steps=26, fallback=jaxsae.BlockPivoting(tol=1e-6, fallback=None))
    )
    left = np.asarray(one.status) == Status.MAX_STEPS
    assert 0 < left.sum() < 40
    assert np.all(np.asarray(two.status) == Status.CONVERGED)
    assert_same_bits(both.values[~left], alone.values[~left])
    np.testing.assert_array_equal(two.steps[~left], one.steps[~left])
    assert np.all(np.asarray(two.steps[left]) > 26)


# --- rows in which rounding shows -------------------------------------------------------------------------


def parallel_rows(cosine: float, *, d=64, k=32, batch=24):
    """Rows of free sign on atoms that are nearly parallel, all of them, with targets in all directions."""
    rng = np.random.default_rng(0)
    dictionary = near(np.tile(rng.normal(size=(1, d)), (2 * k, 1)), rng, cosine).astype(np.float32)
    indices = np.stack([rng.permutation(2 * k)[:k] for _ in range(batch)])
    y = rng.normal(size=(batch, d)) + 3 * dictionary[0]
    code = SparseCode(jnp.zeros((batch, k)), jnp.asarray(indices, jnp.int32), 2 * k)
    return jnp.asarray(dictionary), jnp.asarray(y, jnp.float32), code


def test_the_rounding_of_products_does_not_show():
    """The Gram matrix in float32 alone leaves 8.5e-7 of NMSE here."""
    dictionary, y, code = parallel_rows(0.9998)
    refitted, info = jaxsae.refit(dictionary, y, code, nonnegative=False)
    assert np.all(np.asarray(info.status) == Status.CONVERGED)
    atoms = atoms_of(dictionary, code)
    least = [np.linalg.lstsq(A.T, target)[1][0] for A, target in zip(atoms, f64(y), strict=True)]
    assert np.max(nmse(dictionary, y, refitted) - least / (f64(y) ** 2).sum(1)) < 1e-9


def test_a_row_whose_gram_matrix_rounding_makes_indefinite_is_no_worse_than_it_began():
    """In Gram space alone the error of the values is 1e13 times that of zeros."""
    dictionary, y, code = parallel_rows(0.999998, d=256, k=64)
    refitted, info = jaxsae.refit(dictionary, y, code, nonnegative=False)
    assert np.max(nmse(dictionary, y, refitted)) <= 1 + 1e-6
    certificate = jaxsae.certify(dictionary, y, refitted, nonnegative=False)
    np.testing.assert_allclose(info.kkt, certificate.kkt, rtol=0.1, atol=1e-4)
