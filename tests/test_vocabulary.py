"""Greedy pursuits over dictionaries as large as a vocabulary: read a block at a time, never copied, in any storage."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import struct
from problems import Int8, f64, scipy_nnls

import jaxsae
from jaxsae import Status, pursuit
from jaxsae.pursuit import atoms, greedy as greedy_pursuits, selection

d, m, n, k = 24, 1000, 20, 8
OMP = functools.partial(pursuit.omp, k=k, nonnegative=True)
METHODS = (pursuit.omp, OMP, pursuit.matching_pursuit, pursuit.gradient_pursuit)


@pytest.fixture
def by_blocks(monkeypatch):
    """Let small dictionaries be read as large ones are: in 15 blocks here, of which the last two overlap."""
    monkeypatch.setattr(atoms, "_COPY_BYTES", 0)
    monkeypatch.setattr(atoms, "_BLOCK_BYTES", 4 * d * 70)
    jax.clear_caches()
    yield
    jax.clear_caches()


def easy(seed=0):
    rng = np.random.default_rng(seed)
    dictionary = rng.normal(size=(m, d)) * rng.gamma(2, size=(m, 1))
    return jnp.asarray(dictionary, jnp.float32), jnp.asarray(rng.normal(size=(n, d)), jnp.float32)


def crowded(seed=0):
    """Ten atoms at a time with cosines of 0.999, their negatives, and atoms of 0; rows of twelve atoms."""
    rng = np.random.default_rng(seed)
    centres = rng.normal(size=(m // 20, d))
    unit = centres / np.linalg.norm(centres, axis=1, keepdims=True)
    around = np.repeat(unit, 10, axis=0) + 0.0316 / np.sqrt(d) * rng.normal(size=(m // 2, d))
    around *= rng.gamma(2, size=(len(around), 1))
    around[::37] = 0
    dictionary = np.concatenate([around, -around])
    chosen = dictionary[rng.integers(0, m, (n, 12))]
    y = (rng.gamma(2, size=(n, 12, 1)) * chosen).sum(1)
    return jnp.asarray(dictionary, jnp.float32), jnp.asarray(y, jnp.float32)


def greedy(dictionary: np.ndarray, y: np.ndarray, k: int) -> list[tuple[list[int], np.ndarray]]:
    """Non-negative OMP in float64, all correlations at each step: the atoms in order, and their values by scipy."""
    norms = np.linalg.norm(dictionary, axis=1)
    found = []
    for row in y:
        chosen, z, r = [], np.zeros(0), row
        while len(chosen) < k:
            cosines = np.where(norms > 0, dictionary @ r / np.where(norms > 0, norms, 1), 0)
            cosines[chosen] = 0
            if np.max(cosines) <= 1e-5 * np.linalg.norm(row):
                break
            chosen.append(int(np.argmax(cosines)))
            z = scipy_nnls(dictionary[chosen].T, row)
            r = row - z @ dictionary[chosen]
        found.append((chosen, z))
    return found


def assert_is_greedy(code, info, dictionary, y):
    assert np.all(np.asarray(info.status) == Status.CONVERGED)
    for indices, values, steps, (chosen, z) in zip(
        np.asarray(code.indices), f64(code.values), info.steps, greedy(f64(dictionary), f64(y), k), strict=True
    ):
        assert indices[:steps].tolist() == chosen
        assert np.all(indices[steps:] == m)
        np.testing.assert_allclose(values[:steps], z, atol=2e-4 * max(1, np.max(z, initial=0)))


@pytest.mark.parametrize("stored", ["float32", "bfloat16", "int8"])
@pytest.mark.parametrize("make", [easy, crowded])
def test_it_chooses_what_float64_and_scipy_would(stored, make, by_blocks):
    dictionary, y = make()
    stored = Int8.quantise(dictionary) if stored == "int8" else dictionary.astype(stored)
    exact = stored.take(jnp.arange(m)) if isinstance(stored, Int8) else stored
    assert_is_greedy(*OMP(stored, y), exact, y)


def test_zero_atoms_are_never_chosen(by_blocks):
    dictionary, y = crowded()
    assert_is_greedy(*OMP(dictionary, y), dictionary, y)
    zero = np.flatnonzero(~np.any(dictionary, axis=1))
    for method in METHODS[:1] + METHODS[2:]:
        code, _ = method(dictionary, y, k=k)
        assert not np.isin(np.asarray(code.indices), zero).any()


def test_a_memory_map_is_not_copied(tmp_path, by_blocks):
    dictionary, y = easy()
    np.save(tmp_path / "D.npy", dictionary)
    mapped = np.load(tmp_path / "D.npy", mmap_mode="r")
    assert_is_greedy(*OMP(mapped, y), dictionary, y)
    if jax.default_backend() == "cpu":
        array, _ = selection._validated(mapped, y, selection.Method("omp", None, k, True, greedy=True))
        assert array.unsafe_buffer_pointer() == mapped.ctypes.data


@pytest.mark.parametrize("number", range(len(METHODS)))
def test_a_dictionary_read_by_blocks_gives_what_a_copy_of_it_does(number, monkeypatch):
    method = METHODS[number] if number == 1 else functools.partial(METHODS[number], k=k)
    dictionary, y = crowded(3)
    dictionary = dictionary * 2.0 ** jnp.linspace(-90, 90, m)[:, None]  # whose squares overflow
    if number != 1:
        dictionary = dictionary[: m // 2]  # with free signs, an atom and its negative are a tie
    whole = method(dictionary, y)
    monkeypatch.setattr(atoms, "_COPY_BYTES", 0)
    monkeypatch.setattr(atoms, "_BLOCK_BYTES", 4 * d * 70)
    jax.clear_caches()
    code, info = method(dictionary, y)
    np.testing.assert_array_equal(code.indices, whole[0].indices)
    np.testing.assert_allclose(code.values, whole[0].values, rtol=1e-4, atol=0)
    np.testing.assert_array_equal(info.status, whole[1].status)
    jax.clear_caches()


def test_few_wide_atoms_are_searched_by_their_gram_matrix(by_blocks, monkeypatch):
    dictionary, y = easy()
    code, info = pursuit.omp(dictionary[:50], y, k=3)
    assert selection._gram_fits(selection.Method("omp", None, 3, False, by_gram=len), dictionary[:50], y.dtype)
    monkeypatch.setattr(atoms, "_COPY_BYTES", 1 << 26)
    jax.clear_caches()
    whole = pursuit.omp(dictionary[:50], y, k=3)
    np.testing.assert_array_equal(code.indices, whole[0].indices)
    np.testing.assert_array_equal(info.status, whole[1].status)


def test_all_ways_to_call_it_agree(by_blocks):
    dictionary, y = crowded(1)
    for stored in (dictionary, Int8.quantise(dictionary)):
        code, info = OMP(stored, y)
        for other in (
            jax.jit(OMP)(stored, y),
            jax.vmap(OMP, (None, 0))(stored, y),
            jax.tree.map(lambda *rows: jnp.stack(rows), *[OMP(stored, row) for row in y]),
        ):
            np.testing.assert_array_equal(other[0].indices, code.indices)
            np.testing.assert_allclose(other[0].values, code.values, rtol=1e-4, atol=1e-5)
            np.testing.assert_array_equal(other[1].steps, info.steps)


def test_the_values_have_a_derivative_in_what_a_dictionary_is_made_of(by_blocks):
    dictionary, y = easy()
    stored = Int8.quantise(dictionary)

    def loss(scale, y, refit):
        return jnp.sum(refit(stored.replace(scale=scale), y).values ** 2)

    code, _ = OMP(stored, y)
    slopes = jax.grad(functools.partial(loss, refit=lambda D, y: OMP(D, y)[0]), (0, 1))(stored.scale, y)
    wanted = jax.grad(functools.partial(loss, refit=lambda D, y: jaxsae.refit(D, y, code)[0]), (0, 1))(stored.scale, y)
    for got, want in zip(slopes, wanted, strict=True):
        np.testing.assert_allclose(got, want, rtol=1e-3, atol=1e-4)
        assert np.any(want)


def test_rows_that_no_atom_resembles_have_an_empty_code(by_blocks):
    dictionary, y = easy()
    y = jnp.abs(y) * jnp.where(jnp.arange(n) == 1, -1, 1)[:, None]
    code, info = OMP(-jnp.abs(dictionary), y)
    assert np.asarray(code.mask.any(1)).tolist() == [row == 1 for row in range(n)]
    assert np.all(np.asarray(info.status) == Status.CONVERGED)
    assert np.all(np.asarray(info.steps)[np.arange(n) != 1] == 0)


def test_atoms_chosen_and_atoms_left_positive_are_told_apart():
    # The first atom chosen lies between the other two, which together are the row.
    dictionary = jnp.array([[1.0, 0.0, 0.0], [0.0, 1.0, 0.0], [1.0, 1.0, 0.4]])
    code, info = pursuit.omp(dictionary, jnp.array([1.0, 1.0, 0.0]), k=3, nonnegative=True)
    assert code.indices.tolist() == [2, 0, 1]
    assert code.mask.tolist() == [True, True, True]
    assert info.steps == 3
    assert (code.values > 0).tolist() == [False, True, True]


@pytest.mark.parametrize("nonnegative", [True, False])
def test_memory_is_that_of_a_block(nonnegative):
    """Of 256,000 atoms of width 2,304, which take 2.4 GB."""
    rows, tokens, width = 256, 256_000, 2304
    shapes = [jax.ShapeDtypeStruct(shape, jnp.float32) for shape in ((tokens, width), (rows, width))]
    method = greedy_pursuits._method(25, nonnegative)
    tol, most = jax.ShapeDtypeStruct((rows,), jnp.float32), jax.ShapeDtypeStruct((rows,), jnp.int32)
    select = jax.jit(lambda D, y, tol, most: selection._select(method, (D, {}), (y, tol, most, None)))
    memory = select.lower(*shapes, tol, most).compile().memory_analysis()
    assert memory.argument_size_in_bytes > 2.3e9
    assert memory.temp_size_in_bytes < 0.6e9


@struct.dataclass
class Takes:
    def take(self, indices):
        return jnp.zeros((*indices.shape, d))


@struct.dataclass
class Sideways(Int8):
    def correlate(self, r):
        return super().correlate(r).T


def test_what_cannot_be_searched_is_an_error(unchecked):
    dictionary, y = easy()
    wanted = r"`omp` got a dictionary of type Takes; pass an array of shape \(m, d\), or a pytree with methods take"
    with pytest.raises(TypeError, match=wanted):
        OMP(Takes(), y)
    stored = Int8.quantise(dictionary)
    with pytest.raises(TypeError, match=r"`iti` got a dictionary of type Int8; pass an array of shape \(m, d\)\."):
        pursuit.iti(stored, y, k=k)
    with pytest.raises(TypeError, match="`omp` got a mask and a dictionary of type Int8; pass an array"):
        pursuit.omp(stored, y, k=k, mask=jnp.ones((n, d), bool))
    with pytest.raises(ValueError, match=f"got k = {m + 1} for {m} atoms"):
        pursuit.omp(stored, y, k=m + 1)
    with pytest.raises(ValueError, match=r"whose correlate gives shape \(1000, 1\) for residuals of shape \(1, 24\)"):
        OMP(Sideways(stored.q, stored.scale), y)


@pytest.mark.slow
def test_a_vocabulary_of_its_real_size():
    """As that of SmolLM2, by the sizes at which blocks are meant to be read."""
    tokens, width, atoms_chosen = 49_152, 576, 25
    rng = np.random.default_rng(0)
    dictionary = rng.normal(size=(tokens, width)).astype(np.float32)
    dictionary[1::100] = 1.001 * dictionary[::100][: len(dictionary[1::100])] + 0.03 * dictionary[2::100][:492]
    y = (rng.gamma(2, size=(256, 30, 1)) * dictionary[rng.integers(0, tokens, (256, 30))]).sum(1)
    dictionary, y = jnp.asarray(dictionary), jnp.asarray(y + 3 * rng.normal(size=y.shape), jnp.float32)
    code, info = pursuit.omp(dictionary, y, k=atoms_chosen, nonnegative=True)
    assert np.all(np.asarray(info.status) == Status.CONVERGED)
    certificate = jaxsae.certify(dictionary, y, code)
    assert np.max(certificate.kkt) <= 2e-6
    for indices, values, (chosen, z) in zip(
        np.asarray(code.indices)[:50],
        f64(code.values)[:50],
        greedy(f64(dictionary), f64(y)[:50], atoms_chosen),
        strict=True,
    ):
        assert indices.tolist() == chosen
        np.testing.assert_allclose(values, z, rtol=1e-4, atol=1e-5)
