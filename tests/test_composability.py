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
from problems import activations, assert_same_bits, f64, optimum, sae, with_code

import jaxsae
from jaxsae import train

D, M, K, ROWS = 16, 32, 6, 64
TIGHT = jaxsae.ConjugateGradient(tol=1e-6)


@pytest.fixture(scope="module")
def model():
    return sae(d=D, m=M, activation=jaxsae.TopK(K))


@pytest.fixture(scope="module")
def x():
    return activations(batch=(ROWS,), d=D)


@functools.cache
def refined():
    """The code and the refined one of all rows at once."""
    model, x = sae(d=D, m=M, activation=jaxsae.TopK(K)), activations(batch=(ROWS,), d=D)
    return jax.jit(jaxsae.refine)(model, x)


def norm_of_refined(model, x):
    return jnp.sum(jaxsae.refine(model, x, solver=TIGHT)[0].values ** 2)


def test_jit_of_vmap_of_grad_of_refine(model, x):
    # Of each row, the derivative in the dictionary: u rᵀ − z (Aᵀu)ᵀ on the active set, u = G⁻¹ z̄, in float64.
    slopes = jax.jit(jax.vmap(jax.grad(norm_of_refined), in_axes=(None, 0)))(model, x[:8])
    code = optimum(model.W_dec, x - model.b_dec, jaxsae.encode(model, x))
    for row in range(8):
        z, at = f64(code.values[row]), np.asarray(code.indices[row])
        on, atoms, y = z > 0, f64(model.W_dec)[at], f64(x[row]) - f64(model.b_dec)
        u = np.zeros(K)
        u[on] = np.linalg.solve(atoms[on] @ atoms[on].T, 2 * z[on])
        expected = np.zeros((M, D))
        expected[at] = np.outer(u, y - z @ atoms) - np.outer(z, u @ atoms)
        np.testing.assert_allclose(slopes.W_dec[row], expected, atol=2e-4 * np.abs(expected).max())


def test_scan_over_batches(model, x):
    def body(total, batch):
        code, info = jaxsae.refine(model, batch)
        return total + jnp.sum(code.values), (code, info)

    total, found = jax.jit(lambda x: jax.lax.scan(body, jnp.zeros(()), x))(x.reshape(4, -1, D))
    assert_same_bits(jax.tree.map(lambda leaf: leaf.reshape(ROWS, *leaf.shape[2:]), found), refined())
    np.testing.assert_allclose(total, f64(refined()[0].values).sum(), rtol=1e-5)


def test_refine_inside_a_shard_map(model, x):
    mesh = Mesh(np.array(jax.devices()), ("rows",))
    assert mesh.size == 8
    row = PartitionSpec("rows")
    split = jax.shard_map(jaxsae.refine, mesh=mesh, in_specs=(PartitionSpec(), row), out_specs=row)
    assert_same_bits(jax.jit(split)(model, x), refined())

    def norm(model, x):  # of all rows, on every device; the derivative sums over the devices too
        return jax.lax.psum(norm_of_refined(model, x), "rows")

    split = jax.shard_map(norm, mesh=mesh, in_specs=(PartitionSpec(), row), out_specs=PartitionSpec())
    slopes, expected = (jax.jit(jax.grad(f))(model, x).W_dec for f in (split, norm_of_refined))
    np.testing.assert_allclose(slopes, expected, rtol=1e-3, atol=1e-4 * float(jnp.abs(expected).max()))


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
    np.testing.assert_allclose(probe.sae.get_value().W_dec, model.W_dec - 0.1 * slope["sae"].get_value().W_dec, rtol=1e-6)
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


def test_stacked_autoencoders(model, x):
    others = [model, *(sae(seed, d=D, m=M, activation=jaxsae.TopK(K)) for seed in (1, 2))]
    stacked = jax.tree.map(lambda *leaves: jnp.stack(leaves), *others)
    assert (stacked.d, stacked.m) == (D, M)
    found, info = jax.jit(jax.vmap(jaxsae.refine, in_axes=(0, None)))(stacked, x)
    assert np.all(info.status == 0)
    for number, other in enumerate(others):
        code, _ = jaxsae.refine(other, x)
        np.testing.assert_array_equal(found.indices[number], code.indices)
        np.testing.assert_allclose(found.values[number], code.values, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("function", [jaxsae.encode, jaxsae.refine])
def test_what_is_exported_is_loaded_back(function, model, x):
    compiled = jax.jit(function)
    data = jax.export.export(compiled)(model, x).serialize()
    assert_same_bits(jax.export.deserialize(data).call(model, x), compiled(model, x))


def test_an_export_of_any_batch(model, x):
    (b,) = jax.export.symbolic_shape("b")
    shapes = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype), model)
    exported = jax.export.export(jax.jit(jaxsae.encode))(shapes, jax.ShapeDtypeStruct((b, D), x.dtype))
    for n in (1, 5):
        assert_same_bits(exported.call(model, x[:n]), jax.jit(jaxsae.encode)(model, x[:n]))


def test_donated_arguments(model, x):
    code = jax.jit(jaxsae.encode)(model, x)
    expected = jax.jit(jaxsae.refine)(model, x, code)
    values = code.values + 0
    found = jax.jit(jaxsae.refine, donate_argnums=2)(model, x, with_code(code, values=values))
    assert_same_bits(found, expected)
    assert values.is_deleted()

    copy = jax.tree.map(jnp.copy, model)
    tx = train.recipe(1e-3)
    state, _ = train.make_step(jaxsae.objectives.Objective(), tx)(train.init_state(copy, tx), x)
    assert not state.sae.W_dec.is_deleted()
    assert_same_bits(copy, model)  # what the caller made is the caller's


def test_bfloat16_weights_and_float32_sums(model, x):
    half = jax.tree.map(lambda leaf: leaf.astype(jnp.bfloat16), model)
    exact = jax.tree.map(lambda leaf: leaf.astype(jnp.float32), half)  # the same numbers
    code = jaxsae.encode(exact, x)
    expected, _ = jaxsae.refine(exact, x, code)
    found, info = jaxsae.refine(half, x, code)
    assert found.values.dtype == jnp.float32
    assert np.all(info.kkt <= 1e-5)
    np.testing.assert_allclose(found.values, expected.values, rtol=1e-4, atol=1e-5)
    short, _ = jaxsae.refine(half, x.astype(jnp.bfloat16))
    assert short.values.dtype == jnp.bfloat16
    y = x.astype(jnp.bfloat16) - half.b_dec
    best = optimum(half.W_dec, y, short)
    np.testing.assert_allclose(f64(short.values), best.values, rtol=2**-8, atol=1e-2)


def test_float64_all_the_way(x64):
    model, x = sae(d=D, m=M, activation=jaxsae.TopK(K), dtype=np.float64), activations(batch=(8,), d=D, dtype=np.float64)
    code, info = jax.jit(jaxsae.refine)(model, x, None, jaxsae.ConjugateGradient(tol=1e-13))
    floats = {leaf.dtype for leaf in jax.tree.leaves((code, info)) if jnp.issubdtype(leaf.dtype, jnp.floating)}
    assert floats == {np.dtype(np.float64)}
    best = optimum(model.W_dec, x - model.b_dec, code)
    np.testing.assert_allclose(code.values, best.values, rtol=1e-10, atol=1e-11)
