"""Pursuits: against scikit-learn and float64, on hard inputs, and where theory says that they succeed and fail."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from problems import f64
from sklearn.linear_model import orthogonal_mp_gram

from jaxsae import Status, pursuit

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
    """Equal supports but for a row in a thousand, and there equal values."""
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
    best = orthogonal_mp_gram(atoms @ atoms.T, atoms @ f64(y[:4]).T, n_nonzero_coefs=32).T
    np.testing.assert_allclose(f64(code.dense())[:4], best, atol=1e-4)
