"""Against other people's solvers: scipy, lapack, and trying every support."""

import itertools

import numpy as np
import problems
import pytest
from problems import atoms_of, f64, nmse, objective, problem, with_code

import jaxsae
from jaxsae import SparseCode, Status


def scipy_nnls(dictionary, y, code: SparseCode) -> SparseCode:
    rows = zip(atoms_of(dictionary, code), f64(y), strict=True)
    return code.replace(values=np.stack([problems.scipy_nnls(atoms.T, row) for atoms, row in rows]))


def lapack(dictionary, y, code: SparseCode) -> SparseCode:
    rows = zip(atoms_of(dictionary, code), f64(y), strict=True)
    return code.replace(values=np.stack([np.linalg.lstsq(atoms.T, row)[0] for atoms, row in rows]))


ORACLES = [(True, scipy_nnls), (False, lapack)]


# The coherence of the atoms sets the condition number of the Gram matrices: at k = 6 about 10, 1e3 and 1e4.
@pytest.mark.parametrize(("d", "m", "k"), [(16, 32, 6), (64, 256, 32)])
@pytest.mark.parametrize("coherence", [0.0, 0.8, 0.9])
@pytest.mark.parametrize(("nonnegative", "oracle"), ORACLES)
def test_no_row_has_measurably_more_error_than_the_oracle_leaves(d, m, k, coherence, nonnegative, oracle):
    dictionary, y, code = problem(batch=(64,), d=d, m=m, k=k, coherence=coherence)
    refitted, info = jaxsae.refit(dictionary, y, code, nonnegative=nonnegative)
    assert np.all(np.asarray(info.status) == Status.CONVERGED)
    best = oracle(dictionary, y, code)
    added = nmse(dictionary, y, refitted) - nmse(dictionary, y, best)
    assert np.max(added) <= 1e-6
    assert np.min(added) >= -1e-9, "the oracle should not lose"


@pytest.mark.parametrize("coherence", [0.0, 0.5])
def test_more_atoms_than_dimensions(coherence):
    dictionary, y, code = problem(batch=(64,), d=4, m=32, k=9, coherence=coherence)
    # Singular, so that the same residual leaves more error: 4e-6 at the default tolerance.
    refitted, _ = jaxsae.refit(dictionary, y, code, jaxsae.FISTA(tol=1e-6))
    added = nmse(dictionary, y, refitted) - nmse(dictionary, y, scipy_nnls(dictionary, y, code))
    assert np.max(added) <= 1e-6


def test_projected_gradient_agrees_with_scipy_too():
    dictionary, y, code = problem(batch=(64,), k=6, coherence=0.5)
    refitted, _ = jaxsae.refit(dictionary, y, code, jaxsae.ProjectedGradient())
    added = nmse(dictionary, y, refitted) - nmse(dictionary, y, scipy_nnls(dictionary, y, code))
    assert np.max(added) <= 1e-6


@pytest.mark.parametrize("slots", [1, 3, 6])
def test_no_choice_of_active_set_does_better(slots):
    dictionary, y, code = problem(batch=(64,), k=6, coherence=0.5)
    unused = np.arange(6) >= slots
    code = with_code(
        code,
        values=np.where(unused, 0, code.values),
        indices=np.where(unused, code.num_latents, code.indices),
    )
    refitted, _ = jaxsae.refit(dictionary, y, code)
    atoms = atoms_of(dictionary, code)
    best = 0.5 * (f64(y) ** 2).sum(-1)
    for size in range(1, slots + 1):
        for chosen in itertools.combinations(range(slots), size):
            A = atoms[:, chosen]
            z = np.linalg.solve(A @ A.swapaxes(1, 2), np.einsum("nkd,nd->nk", A, f64(y))[..., None])[..., 0]
            left = 0.5 * ((f64(y) - np.einsum("nk,nkd->nd", z, A)) ** 2).sum(-1)
            best = np.where(np.all(z >= 0, axis=-1), np.minimum(best, left), best)
    added = (objective(dictionary, y, refitted) - best) / (0.5 * (f64(y) ** 2).sum(-1))
    assert np.max(np.abs(added)) <= 1e-6


@pytest.mark.parametrize(("nonnegative", "oracle"), ORACLES)
def test_the_certificate_accepts_the_oracle_and_not_its_neighbour(nonnegative, oracle):
    dictionary, y, code = problem(batch=(64,), k=6, coherence=0.8)
    best = with_code(code, values=np.asarray(oracle(dictionary, y, code).values, np.float32))
    certificate = jaxsae.certify(dictionary, y, best, nonnegative=nonnegative)
    assert np.max(certificate.kkt) <= 1e-5
    assert np.max(certificate.gap) <= 1e-6
    shrunk = jaxsae.certify(dictionary, y, with_code(best, values=0.9 * best.values), nonnegative=nonnegative)
    assert np.median(shrunk.kkt) > 1e-3
    assert np.median(shrunk.gap) > 1e-3
