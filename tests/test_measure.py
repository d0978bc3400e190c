"""What a study measures of one autoencoder, against loops in float64."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.optimize
from problems import f64
from sklearn.linear_model import orthogonal_mp

import jaxsae
from jaxsae.app import measure, sources

D, M, N = 16, 40, 60


@pytest.fixture(scope="module")
def rows():
    return np.random.default_rng(1).normal(size=(N, D)).astype(np.float32)


def model(activation):
    sae = jaxsae.init(jax.random.key(0), d=D, m=M, activation=activation, b_dec=jnp.full(D, 0.1))
    return sae.replace(b_enc=sae.b_enc - 0.8, W_dec=jnp.linspace(0.5, 2, M)[:, None] * sae.W_dec)


def omp_nonnegative(D, y, k):
    """Selection by positive correlations with atoms of norm 1, and a refit by scipy after each."""
    chosen, fitted, norms = [], np.zeros_like(y), np.linalg.norm(D, axis=1)
    for _ in range(k):
        scores = D @ (y - fitted) / norms
        scores[chosen] = -np.inf
        if scores.max() <= 1e-9:
            break
        chosen.append(int(np.argmax(scores)))
        fitted = scipy.optimize.nnls(D[chosen].T, y)[0] @ D[chosen]
    return fitted


@pytest.mark.parametrize("activation", [jaxsae.ReLU(), jaxsae.TopK(5)], ids=["ReLU", "TopK"])
def test_every_reconstruction_is_that_of_a_loop(activation, rows):
    sae, seen = model(activation), {}
    found = measure.measure(
        sae, rows, see=lambda name, at, x_hat: seen.setdefault(name, np.zeros((N, D))).__setitem__(at, x_hat)
    )
    atoms, b = f64(sae.W_dec), f64(sae.b_dec)
    z = f64(jaxsae.encode_dense(sae, jnp.asarray(rows)))
    equal = round(np.count_nonzero(z) / N)
    wanted = {name: np.zeros((N, D)) for name in ("before", "after", "signed", "omp", "omp_nonnegative", "omp_equal")}
    for i, (x, code) in enumerate(zip(f64(rows), z, strict=True)):
        y, on, k = x - b, code > 0, np.count_nonzero(code)
        wanted["before"][i] = code @ atoms
        wanted["after"][i] = scipy.optimize.nnls(atoms[on].T, y)[0] @ atoms[on] if k else 0
        wanted["signed"][i] = np.linalg.lstsq(atoms[on].T, y, rcond=None)[0] @ atoms[on] if k else 0
        unit = atoms / np.linalg.norm(atoms, axis=1, keepdims=True)
        wanted["omp"][i] = unit.T @ orthogonal_mp(unit.T, y, n_nonzero_coefs=k) if k else 0
        wanted["omp_nonnegative"][i] = omp_nonnegative(atoms, y, k)
        wanted["omp_equal"][i] = omp_nonnegative(atoms, y, equal)
    spread = np.sum((f64(rows) - f64(rows).mean(axis=0)) ** 2)
    assert set(seen) == {*wanted, "rescaled"}
    for name, fitted in wanted.items():
        np.testing.assert_allclose(seen[name], fitted + b, atol=2e-4, err_msg=name)
        nmse = np.sum((f64(rows) - b - fitted) ** 2) / spread
        np.testing.assert_allclose(found[f"nmse_{name}"], nmse, rtol=1e-4, atol=1e-6, err_msg=name)
    assert found["nmse_after"] < found["nmse_rescaled"] < found["nmse_before"]
    pairs = zip(f64(rows), z, strict=True)
    left = np.mean([np.count_nonzero(scipy.optimize.nnls(atoms[code > 0].T, x - b)[0]) for x, code in pairs])
    np.testing.assert_allclose(found["l0_after"], left, rtol=0.02)
    assert found["l0_after"] < found["l0"] or activation.slots
    assert set(found["milliseconds"]) <= {"refit", "omp", "omp_nonnegative", "omp_equal"}


def test_only_the_rivals_that_are_asked_for_are_computed(rows):
    found = measure.measure(model(jaxsae.TopK(5)), rows, rivals=("signed",))
    assert found["nmse_signed"] <= found["nmse_after"]
    assert not {"nmse_rescaled", "nmse_omp"} & set(found)


def test_with_the_true_dictionary_and_support_all_is_known():
    world = sources.synthetic(sources.Features(width=D, l0=2.0), 100, N, 0)
    atoms = world.truth.dictionary
    sae = jaxsae.SAE(atoms.T, jnp.zeros(len(atoms)), 2 * atoms, jnp.zeros(D), jaxsae.TopK(2))
    found = measure.measure(sae, world.heldout, truth=world.truth)
    assert found["mcc"] == pytest.approx(1)
    # Values are of atoms of norm 2, and are compared as of norm 1: those of the encoder are twice too large.
    assert found["bias_before"] > 0.9 > 0.3 > abs(found["bias_after"])
    code = jaxsae.encode(sae, jnp.asarray(world.heldout))
    fired = f64(code.dense()) != 0
    true = world.truth.z != 0
    both = np.count_nonzero(fired & true)
    assert found["f1_before"] == pytest.approx(2 * both / (np.count_nonzero(fired) + np.count_nonzero(true)))
    assert found["f1_omp_nonnegative"] > found["f1_before"]


def test_synthetic_rows_are_split_as_they_were_drawn():
    rows = sources.synthetic(sources.Features(width=8, l0=2.0), 5000, 3000, 3)
    assert rows.train.shape == (5000, 8)
    made = rows.truth.z @ f64(rows.truth.dictionary)
    np.testing.assert_allclose(rows.heldout, made, atol=1e-5)
    np.testing.assert_allclose(np.sum(np.var(rows.train, axis=0)), 1, rtol=1e-3)
    again = sources.synthetic(sources.Features(width=8, l0=2.0), 5000, 3000, 3)
    np.testing.assert_array_equal(again.heldout, rows.heldout)
