"""An optimiser's moments in bfloat16: right on average, in half the memory, the same on a mesh."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from problems import activations, assert_same_bits, f64, sae

import jaxsae
from jaxsae import sharding, train
from jaxsae.app import plan
from jaxsae.app.options import Options
from jaxsae.train import optim
from jaxsae.train.objectives import Objective

D, M, B = 8, 32, 16


def rounded(x, seed=0):
    return optim._rounded(x, jnp.uint32(seed))


def test_rounding_is_right_on_average_and_to_a_neighbour():
    x = np.float32(1.0) + np.float32(2**-7) * np.linspace(0, 1, 9, dtype=np.float32)  # from one bfloat16 to the next
    many = f64(rounded(jnp.asarray(np.tile(x, (40_000, 1)))))
    assert set(np.unique(many)) == {1.0, 1.0 + 2**-7}
    sigma = 2**-7 * 0.5 / np.sqrt(len(many))
    np.testing.assert_allclose(many.mean(0), x, atol=5 * sigma)
    assert np.all(many[:, 0] == 1) and np.all(many[:, -1] == x[-1])  # what bfloat16 has is kept
    up = many[:, 4] > 1
    again = f64(rounded(jnp.asarray(np.tile(x, (40_000, 1))), seed=1))[:, 4] > 1
    for other in (again, many[:, 5] > 1, np.roll(up, 1)):  # other bits for another update, column and row
        assert abs(np.corrcoef(up, other)[0, 1]) < 0.05
    assert_same_bits(rounded(-x), -rounded(x))
    # A NaN stays one, whatever its bits, and infinity stays infinite.
    odd = np.array([0x7FFFFFFF, 0xFFFFFFFF, 0x7F800000, 0xFF800000, 0], np.uint32).view(np.float32)
    np.testing.assert_array_equal(f64(rounded(jnp.asarray(np.tile(odd, (50, 1))))), np.tile(f64(odd), (50, 1)))


def test_a_second_moment_follows_slowly_where_rounding_to_nearest_would_not():
    tx, exact = train.bfloat16_adam(0.1), optax.scale_by_adam(b1=0.9, b2=0.999, eps=6.25e-10)
    update = jax.jit(tx.update)
    params = jnp.zeros((64, 64))
    state, wide, nearest = tx.init(params), exact.init(params), jnp.float32(0)
    for step in range(400):
        grads = jnp.full_like(params, 1.0 if step < 300 else 1.3)
        moved, state = update(grads, state)
        expected, wide = jax.jit(exact.update)(grads, wide)
        nearest = (0.999 * nearest + 0.001 * grads[0, 0] ** 2).astype(jnp.bfloat16).astype(jnp.float32)
    np.testing.assert_allclose(f64(moved).mean(), -0.1 * f64(expected).mean(), rtol=5e-3)
    assert abs(nearest / wide.nu[0, 0] - 1) > 0.1
    np.testing.assert_allclose(f64(state[0].nu).mean(), f64(wide.nu).mean(), rtol=2e-3)
    np.testing.assert_allclose(f64(state[0].nu), f64(wide.nu), rtol=0.25)
    np.testing.assert_allclose(f64(state[0].mu).mean(), f64(wide.mu).mean(), rtol=2e-3)


def learn(moments, shape=(1, 1), steps=30):
    tx, x = train.default_optimizer(1e-2, clip=1.0, moments=moments), np.asarray(activations(batch=(B,), d=D))
    with jax.set_mesh(sharding.make_mesh(*shape)):
        state = sharding.create(
            lambda: train.init_state(jaxsae.init(jax.random.key(0), d=D, m=M, activation=jaxsae.TopK(4)), tx)
        )
        step, losses = train.make_step(Objective(), tx), []
        for _ in range(steps):
            state, shown = step(state, sharding.make_global_batch(x, B, 0))
            losses.append(float(shown["loss"]))
    return state, np.array(losses)


def test_a_training_is_that_of_float32_nearly_and_repeats_to_the_bit():
    (narrow, losses), (_, expected) = learn("bfloat16"), learn("float32")
    assert {leaf.dtype for leaf in jax.tree.leaves(narrow.opt_state) if leaf.ndim == 2} == {jnp.dtype(jnp.bfloat16)}
    assert losses[-1] < 0.5 * losses[0]
    assert np.any(losses != expected)
    np.testing.assert_allclose(losses[:10], expected[:10], rtol=1e-2)  # later supports differ
    assert_same_bits(learn("bfloat16")[0], narrow)


def test_moments_are_split_over_a_mesh_as_parameters_are_and_rounded_alike():
    state, losses = learn("bfloat16", (2, 4))
    matrices = [leaf for leaf in jax.tree.leaves(state.opt_state) if leaf.ndim == 2]
    assert len(matrices) == 4
    assert all(leaf.addressable_shards[0].data.size == leaf.size // 4 for leaf in matrices)
    np.testing.assert_allclose(losses[:5], learn("bfloat16")[1][:5], rtol=1e-4)


def test_the_state_takes_half_the_memory():
    options = Options("topk", latents=4096, k=4, batch=64, auxk=False)
    wide, narrow = (
        plan.training_step(options._replace(moments=moments), 256, sharding.make_mesh())
        for moments in ("float32", "bfloat16")
    )
    parameters = 2 * 4096 * 256
    assert wide.arguments - narrow.arguments == pytest.approx(2 * 2 * parameters, rel=0.01)
    assert narrow.workspace_bytes < 1.02 * wide.workspace_bytes


def test_a_batch_that_is_not_finite_leaves_moments_as_they_are():
    tx = train.default_optimizer(1e-2, moments="bfloat16")
    state, x = train.init_state(sae(d=D, m=M), tx), activations(batch=(B,), d=D)
    step = train.make_step(Objective(), tx)
    state, _ = step(state, x)
    before = jax.tree.map(np.array, state.opt_state)
    state, _ = step(state, x.at[0, 0].set(jnp.nan))
    assert_same_bits(state.opt_state, before)
    assert state.skipped == 1


def test_another_dtype_is_refused():
    with pytest.raises(
        ValueError, match=r"^`default_optimizer` got moments 'float16'; pass 'float32' or 'bfloat16'\.$"
    ):
        train.default_optimizer(1e-3, moments="float16")
