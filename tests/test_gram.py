"""Dictionaries that are not arrays, and the memory that a refit needs."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import struct
from problems import Int8, assert_same_bits, atoms_of, f64, nmse, objective, problem

import jaxsae
from jaxsae import SparseCode
from jaxsae.least_squares import problems


@struct.dataclass
class Factored:
    """Atoms as a product of thin factors."""

    left: jax.Array  # [m r]
    right: jax.Array  # [r d]

    def take(self, indices):
        return jnp.matmul(self.left[indices], self.right, precision=jax.lax.Precision.HIGHEST)


def factored(rank=12):
    rng = np.random.default_rng(3)
    factors = rng.normal(size=(32, rank)), rng.normal(size=(rank, 16))
    return Factored(*(jnp.asarray(factor, jnp.float32) for factor in factors))


@pytest.fixture(params=["int8", "factored"])
def free(request):
    """A dictionary without its array, and the array."""
    dictionary, y, code = problem(batch=(40,))
    dictionary = Int8.quantise(dictionary) if request.param == "int8" else factored()
    return dictionary, dictionary.take(jnp.arange(32)), y, code


def test_a_dictionary_need_not_be_an_array(free):
    dictionary, array, y, code = free
    got, expected = (jaxsae.refit(D, y, code) for D in (dictionary, array))
    np.testing.assert_allclose(got[0].values, expected[0].values, rtol=1e-4, atol=1e-5)
    for certificate in (jaxsae.certify(D, y, got[0]) for D in (dictionary, array)):
        assert np.all(np.asarray(certificate.kkt) < 2e-5)


def test_unused_slots_ask_a_dictionary_for_nothing_out_of_range(free):
    dictionary, _, y, code = free
    padded = SparseCode(
        jnp.pad(code.values, [(0, 0), (0, 3)]), jnp.pad(code.indices, [(0, 0), (0, 3)], constant_values=32), 32
    )
    assert int(padded.indices.max()) == 32
    values = jaxsae.refit(dictionary, y, padded)[0].values
    np.testing.assert_allclose(values[:, :4], jaxsae.refit(dictionary, y, code)[0].values, rtol=1e-4, atol=1e-5)
    assert not np.any(values[:, 4:])


def test_the_gradient_reaches_what_a_dictionary_is_made_of():
    dictionary, (_, y, code) = factored(), problem(batch=(40,))

    def loss(dictionary):
        return jnp.sum(jaxsae.refit(dictionary, y, code)[0].values ** 2)

    got = jax.grad(loss)(dictionary)
    array = dictionary.take(jnp.arange(32))
    _, pull_back = jax.vjp(lambda dictionary: dictionary.take(jnp.arange(32)), dictionary)
    (expected,) = pull_back(jax.grad(loss)(array))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-3), got, expected)


def test_the_gradient_passes_over_integers():
    dictionary, y, code = problem(batch=(40,))
    quantised = Int8.quantise(dictionary)

    def loss(quantised):
        return jnp.sum(jaxsae.refit(quantised, y, code)[0].values ** 2)

    bar = jax.grad(loss, allow_int=True)(quantised)
    assert bar.q.dtype == jax.dtypes.float0
    step = 1e-3 * bar.scale / jnp.linalg.norm(bar.scale)
    change = loss(quantised.replace(scale=quantised.scale + step)) - loss(
        quantised.replace(scale=quantised.scale - step)
    )
    np.testing.assert_allclose(change, 2 * jnp.sum(bar.scale * step), rtol=0.02)


def test_an_int8_dictionary_costs_the_error_of_its_atoms_alone():
    dictionary, y, code = problem(batch=(40,), d=64, k=8)
    quantised = Int8.quantise(dictionary)
    exact, rounded = (jaxsae.refit(D, y, code)[0] for D in (dictionary, quantised))
    assert np.all(nmse(quantised.take(jnp.arange(32)), y, rounded) < nmse(dictionary, y, exact) + 1e-3)


def test_bfloat16_atoms_are_accumulated_in_float32():
    dictionary, y, code = problem(batch=(40,), d=256, k=8)
    short = dictionary.astype(jnp.bfloat16)
    got, expected = (jaxsae.refit(D, y, code)[0] for D in (short, short.astype(jnp.float32)))
    assert_same_bits(got, expected)


@pytest.mark.parametrize(
    ("dictionary", "error", "message"),
    [
        ("D", TypeError, "pass an array of shape"),
        (struct.dataclass(type("Flat", (), {"take": lambda self, i: jnp.zeros(i.shape)}))(), ValueError, "shape"),
    ],
)
def test_what_is_no_dictionary_is_refused_in_a_sentence(dictionary, error, message, unchecked):
    _, y, code = problem()
    with pytest.raises(error, match=message):
        jaxsae.refit(dictionary, y, code)


def compiled_refit(B, k, *, d=768, m=16384, **options):
    code = SparseCode(
        values=jax.ShapeDtypeStruct((B, k), jnp.float32),
        indices=jax.ShapeDtypeStruct((B, k), jnp.int32),
        num_latents=m,
        num_dropped=jax.ShapeDtypeStruct((B,), jnp.int32),
    )
    arrays = (jax.ShapeDtypeStruct(shape, jnp.float32) for shape in ((m, d), (B, d)))
    return jax.jit(lambda D, y, code: jaxsae.refit(D, y, code, **options)).lower(*arrays, code).compile()


@pytest.mark.parametrize("B", [65536, 65537])
def test_scratch_is_bounded_whatever_the_batch(B):
    # The gathered atoms of all rows would take 12 GiB.
    assert compiled_refit(B, 64).memory_analysis().temp_size_in_bytes <= 256 << 20


def test_scratch_is_an_argument():
    dictionary, y, code = problem(batch=(100,), d=64, k=8)
    bound = 8 * problems.row_bytes(8, 64, 4)
    small = compiled_refit(100, 8, d=64, m=32, workspace_bytes=bound).memory_analysis().temp_size_in_bytes
    usual = compiled_refit(100, 8, d=64, m=32).memory_analysis().temp_size_in_bytes
    assert small < usual / 2
    got, expected = (
        jaxsae.refit(dictionary, y, code, workspace_bytes=workspace_bytes)[0] for workspace_bytes in (bound, 1 << 28)
    )
    np.testing.assert_allclose(got.values, expected.values, rtol=1e-4, atol=1e-5)
    with pytest.raises(ValueError, match=r"got workspace_bytes of 100.* needs \d+.*pass"):
        jaxsae.refit(dictionary, y, code, workspace_bytes=100)


@pytest.mark.parametrize("k", [3, 32, 128, 129])  # from 128 on in blocks, of which one is transposed
def test_products_are_those_of_float64(k):
    rng = np.random.default_rng(k)
    dictionary, y = jnp.asarray(rng.normal(size=(300, 200)), jnp.float32), jnp.asarray(rng.normal(size=(16, 200)), "f")
    indices = jnp.asarray(rng.integers(0, 300, size=(16, k)))
    gram, c = problems.gather_products(dictionary, y, indices, num_latents=300)
    atoms = f64(dictionary)[np.asarray(indices)]
    np.testing.assert_allclose(gram, np.einsum("nid,njd->nij", atoms, atoms), atol=1e-3)
    np.testing.assert_allclose(c, np.einsum("nid,nd->ni", atoms, f64(y)), atol=1e-3)
    np.testing.assert_array_equal(gram, np.swapaxes(gram, 1, 2))


@pytest.mark.parametrize("sizes", [{"atoms": 1e-12}, {"atoms": 1e12}, {"y": 1e-15}, {"y": 1e15}, {"ridge": 0.5}, {}])
def test_a_problem_is_free_of_units(sizes):
    """`x = z · unit` minimises `½xᵀGx − cᵀx`, whatever the size of the atoms and of the target."""
    dictionary, y, code = problem(batch=(16,))
    dictionary, y, ridge = sizes.get("atoms", 1.0) * dictionary, sizes.get("y", 1.0) * y, sizes.get("ridge", 0.0)
    m, weight = code.num_latents, jnp.float32(ridge)
    made = problems.problems(dictionary, y, code.indices, num_latents=m, ridge=weight)
    rows = problems.unit_rows(problems.take_used(dictionary, code.indices, m, y.dtype), y, weight)
    atoms, target = atoms_of(dictionary, code), f64(y)
    norm, y_norm = np.sqrt((atoms**2).sum(2) + ridge), np.linalg.norm(target, axis=1, keepdims=True)
    unit_atoms, eye = atoms / norm[:, :, None], np.eye(code.indices.shape[1])
    np.testing.assert_allclose(rows.atoms, unit_atoms, atol=1e-6)
    np.testing.assert_allclose(rows.ridge, ridge / norm**2, atol=1e-6)
    assert np.all(rows.finite)
    assert np.all(made.finite) == ("atoms" not in sizes)
    if np.all(made.finite):
        G = np.einsum("nid,njd->nij", unit_atoms, unit_atoms) + (ridge / norm**2)[:, :, None] * eye
        np.testing.assert_allclose(made.gram, G, atol=1e-6)
        np.testing.assert_allclose(made.c, np.einsum("nid,nd->ni", unit_atoms, target / y_norm), atol=1e-6)
        np.testing.assert_allclose(made.weight, rows.weight, rtol=1e-5)
        np.testing.assert_allclose(made.unit, norm / y_norm, rtol=1e-5)
    np.testing.assert_allclose(rows.unit, norm / y_norm, rtol=1e-5)


def test_objectives_of_all_solvers_agree():
    dictionary, y, code = problem(batch=(40,), d=64, k=24, coherence=0.3)
    solvers = (None, jaxsae.ConjugateGradient(), jaxsae.BlockPivoting(), jaxsae.FISTA(), jaxsae.ProjectedGradient())
    reached = np.stack([objective(dictionary, y, jaxsae.refit(dictionary, y, code, solver)[0]) for solver in solvers])
    np.testing.assert_allclose(reached, np.broadcast_to(reached.min(0), reached.shape), rtol=1e-5)


def test_indices_of_a_narrow_type_have_room_for_an_unused_slot():
    dictionary = jax.random.normal(jax.random.key(0), (300, 12))
    y, values = jax.random.normal(jax.random.key(1), (1, 12)), jnp.ones((1, 3))
    code = jaxsae.SparseCode(values, jnp.array([[100, 100, -1]]), 300)
    narrow = code.replace(indices=code.indices.astype(jnp.int8))
    for f in (jaxsae.ksvd.exact, jaxsae.ksvd.approximate, jaxsae.ksvd.mod):
        assert_same_bits(f(dictionary, y, narrow), f(dictionary, y, code))
    assert_same_bits(jaxsae.refit(dictionary, y, narrow), jaxsae.refit(dictionary, y, code))
