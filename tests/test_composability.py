"""Ten things a researcher does with a library of JAX, each against the plain way of doing the same."""

import functools

import jax
import jax.export
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from jax.sharding import Mesh, PartitionSpec
from problems import activations, assert_same_bits, every_activation, f64, optimum, sae, with_code

import jaxsae
from jaxsae import train

D, M, K, ROWS = 16, 32, 6, 64
# Most of the time here is compilation, and a solver without a fallback has less to compile.
refine = functools.partial(jaxsae.refine, solver=jaxsae.ConjugateGradient(tol=1e-6))
MESH = Mesh(np.array(jax.devices()), ("rows",))
WHOLE, ROW = PartitionSpec(), PartitionSpec("rows")


@pytest.fixture(scope="module")
def model():
    return sae(d=D, m=M, activation=jaxsae.TopK(K))


@pytest.fixture(scope="module")
def x():
    return activations(batch=(ROWS,), d=D)


@pytest.fixture(scope="module")
def refined(model, x):
    """The code and the refined one of all rows at once."""
    return jax.jit(refine)(model, x)


def norm(model, x):
    code, info = refine(model, x)
    return jnp.sum(code.values**2), (code, info)


@pytest.fixture(scope="module")
def slopes(model, x):
    """Of each row's norm, the derivative in the autoencoder; and the refined codes."""
    return jax.jit(jax.vmap(jax.grad(norm, has_aux=True), in_axes=(None, 0)))(model, x)


def test_jit_of_vmap_of_grad_of_refine(model, x, slopes):
    # In the dictionary it is u rᵀ − z (Aᵀu)ᵀ on the active set, u = G⁻¹ z̄; in float64.
    slopes, (code, _) = slopes
    code = optimum(model.W_dec, x - model.b_dec, code)
    for row in range(ROWS):
        z, at = f64(code.values[row]), np.asarray(code.indices[row])
        on, atoms, y = z > 0, f64(model.W_dec)[at], f64(x[row]) - f64(model.b_dec)
        u = np.zeros(K)
        u[on] = np.linalg.solve(atoms[on] @ atoms[on].T, 2 * z[on])
        expected = np.zeros((M, D))
        expected[at] = np.outer(u, y - z @ atoms) - np.outer(z, u @ atoms)
        np.testing.assert_allclose(slopes.W_dec[row], expected, atol=2e-4 * np.abs(expected).max())


@pytest.mark.bits
def test_scan_over_batches(model, x, refined):
    def body(total, batch):
        code, info = refine(model, batch)
        return total + jnp.sum(code.values), (code, info)

    total, found = jax.jit(lambda x: jax.lax.scan(body, jnp.zeros(()), x))(x.reshape(4, -1, D))
    assert_same_bits(jax.tree.map(lambda leaf: leaf.reshape(ROWS, *leaf.shape[2:]), found), refined)
    np.testing.assert_allclose(total, f64(refined[0].values).sum(), rtol=1e-5)


@pytest.mark.bits
@pytest.mark.skipif(jax.device_count() < 8, reason="needs eight devices, as tests/conftest.py makes them")
def test_refine_and_its_derivative_inside_a_shard_map(model, x, refined, slopes):
    def total(model, x):  # over the rows of all devices
        part, found = norm(model, x)
        return jax.lax.psum(part, "rows"), found

    split = jax.shard_map(total, mesh=MESH, in_specs=(WHOLE, ROW), out_specs=(WHOLE, ROW))
    slope, found = jax.jit(jax.grad(split, has_aux=True))(model, x)
    assert_same_bits(found, refined)
    expected = jax.tree.map(lambda each: each.sum(0), slopes[0])
    jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=1e-3, atol=1e-3), slope, expected)


class Probe(nnx.Module):
    """A module of somebody else's, that reads the codes of a frozen or trained autoencoder."""

    def __init__(self, model: jaxsae.SAE, rngs: nnx.Rngs):
        self.sae = nnx.Param(model)
        self.head = nnx.Linear(M, 2, rngs=rngs)

    def __call__(self, x):
        return self.head(jaxsae.encode_dense(self.sae.get_value(), x))


def test_an_sae_in_the_state_of_an_nnx_module(model, x):
    probe = Probe(model, nnx.Rngs(0))
    assert_same_bits(nnx.state(probe)["sae"].get_value(), model)
    slope = nnx.jit(nnx.grad(lambda probe, x: jnp.sum(probe(x) ** 2)))(probe, x)
    kernel, bias = probe.head.kernel[...], probe.head.bias[...]
    plain = jax.grad(lambda model: jnp.sum((jaxsae.encode_dense(model, x) @ kernel + bias) ** 2))(model)
    jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=1e-4, atol=1e-3), slope["sae"].get_value(), plain)
    optimiser = nnx.Optimizer(probe, optax.sgd(0.1), wrt=nnx.Param)
    optimiser.update(probe, slope)
    np.testing.assert_allclose(
        probe.sae.get_value().W_dec, model.W_dec - 0.1 * slope["sae"].get_value().W_dec, rtol=1e-6
    )
    definition, state = nnx.split(probe)
    np.testing.assert_array_equal(nnx.merge(definition, state)(x), probe(x))


def test_tree_map_over_autoencoders(model):
    other = sae(1, d=D, m=M, activation=jaxsae.TopK(K))
    mean = jax.tree.map(lambda a, b: (a + b) / 2, model, other)
    assert isinstance(mean, jaxsae.SAE)
    assert mean.activation == jaxsae.TopK(K)
    np.testing.assert_array_equal(mean.W_enc, (model.W_enc + other.W_enc) / 2)
    assert sum(leaf.size for leaf in jax.tree.leaves(model)) == 2 * M * D + M + D
    with pytest.raises(ValueError, match="metadata"):  # of another k, it is another function
        jax.tree.map(jnp.add, model, sae(d=D, m=M, activation=jaxsae.TopK(K + 1)))


def test_stacked_autoencoders(model, x, refined):
    others = [model, *(sae(seed, d=D, m=M, activation=jaxsae.TopK(K)) for seed in (1, 2))]
    stacked = jax.tree.map(lambda *leaves: jnp.stack(leaves), *others)
    assert (stacked.d, stacked.m) == (D, M)
    encode = jax.jit(jaxsae.encode)
    found, _ = jax.jit(jax.vmap(refine, in_axes=(0, None)))(stacked, x)
    np.testing.assert_allclose(found.values[0], refined[0].values, rtol=1e-4, atol=1e-5)
    for number, other in enumerate(others):
        np.testing.assert_array_equal(found.indices[number], encode(other, x).indices)
        code = jax.tree.map(lambda leaf, number=number: leaf[number], found)
        best = optimum(other.W_dec, x - other.b_dec, code)
        np.testing.assert_allclose(code.values, best.values, rtol=1e-3, atol=1e-3)


def test_refine_is_exported_and_loaded_back(model, x, refined):
    data = jax.export.export(jax.jit(refine))(model, x).serialize()
    assert_same_bits(jax.export.deserialize(data).call(model, x), refined)


# A pursuit asks for `len` of its rows, and of a number of them that is not known there is none.
WITH_ENCODER = [name for name, each in every_activation(M, K).items() if not each.encoder_free]


@pytest.mark.parametrize("name", WITH_ENCODER)
def test_encode_is_exported_for_any_batch_and_loaded_back(name, x):
    activation = every_activation(M, K)[name]
    model = sae(d=D, m=M, activation=activation)
    capacity = activation.slots or 12

    def encode(model, x):
        return jaxsae.encode(model, x, capacity=capacity)

    (b,) = jax.export.symbolic_shape("b")
    shapes = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(jnp.shape(leaf), jnp.result_type(leaf)), model)
    exported = jax.export.export(jax.jit(encode))(shapes, jax.ShapeDtypeStruct((b, D), x.dtype))
    loaded = jax.export.deserialize(exported.serialize())
    assert_same_bits(loaded.call(model, x[:5]), jax.jit(encode)(model, x[:5]))


@pytest.mark.bits
def test_donated_arguments(model, x, refined):
    values = jax.jit(jaxsae.encode)(model, x).values + 0
    again = jax.jit(lambda values: refine(model, x, with_code(refined[0], values=values))[0], donate_argnums=0)
    assert_same_bits(again(values), refined[0])
    assert values.is_deleted()  # its memory is that of the result

    copy = jax.tree.map(jnp.copy, model)
    tx = train.default_optimizer(1e-3)
    state, _ = train.make_step(jaxsae.train.objectives.Objective(), tx)(train.init_state(copy, tx), x)
    assert not np.array_equal(state.sae.W_dec, model.W_dec)
    assert_same_bits(copy, model)  # what the caller made is the caller's


def test_bfloat16_weights_and_float32_sums(mixed, model, x):
    half = jax.tree.map(lambda leaf: leaf.astype(jnp.bfloat16), model)
    same = jax.tree.map(lambda leaf: leaf.astype(jnp.float32), half)  # the same numbers
    found, info = jax.jit(refine)(half, x)
    assert found.values.dtype == jnp.float32
    assert np.all(info.kkt <= 1e-5)
    best = optimum(same.W_dec, x - same.b_dec, found)
    np.testing.assert_allclose(found.values, best.values, rtol=1e-3, atol=1e-4)


def test_float64_all_the_way(x64):
    wide = {"d": D, "dtype": np.float64}
    model, x = sae(m=M, activation=jaxsae.TopK(K), **wide), activations(batch=(8,), **wide)
    code, info = jax.jit(jaxsae.refine)(model, x, None, jaxsae.ConjugateGradient(tol=1e-13))
    floats = {leaf.dtype for leaf in jax.tree.leaves((code, info)) if jnp.issubdtype(leaf.dtype, jnp.floating)}
    assert floats == {np.dtype(np.float64)}
    best = optimum(model.W_dec, x - model.b_dec, code)
    np.testing.assert_allclose(code.values, best.values, rtol=1e-10, atol=1e-11)
