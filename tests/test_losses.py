import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from problems import activations, f64, sae

import jaxsae
from jaxsae.train import losses

B, D, M = 6, 16, 32
DEAD = jnp.arange(M) % 4 == 0  # 8 of them


def x_and_residual():
    return activations(10, batch=(B,)), activations(11, batch=(B,))


def auxk(model, x, residual, dead=DEAD, k_aux=3):
    return losses.auxk(model, x, residual, dead, k_aux=k_aux)


value_and_grad = jax.jit(jax.value_and_grad(auxk), static_argnames="k_aux")


def test_mse_and_nmse_are_numpys():
    x, x_hat = activations(batch=(B,)) + 2, activations(1, batch=(B,))
    error, spread = f64(x) - f64(x_hat), f64(x) - f64(x).mean(0)
    np.testing.assert_allclose(losses.mse(x, x_hat), (error**2).sum() / B, rtol=1e-5)
    np.testing.assert_allclose(losses.nmse(x, x_hat), (error**2).sum() / (spread**2).sum(), rtol=1e-5)


def test_nmse_agrees_with_the_metric():
    x, x_hat = activations(batch=(B,)), activations(1, batch=(B,))
    np.testing.assert_allclose(losses.nmse(x, x_hat), jaxsae.metrics.reconstruction(x, x_hat).nmse, rtol=1e-5)


def test_l1_is_numpys():
    z, atoms = activations(batch=(B,), d=M), sae(m=M).W_dec
    expected = (np.abs(f64(z)) * np.linalg.norm(f64(atoms), axis=1)).sum() / B
    np.testing.assert_allclose(losses.l1(z, atoms), expected, rtol=1e-5)


def test_l1_gains_nothing_from_large_atoms_and_small_values():
    z, atoms = activations(batch=(B,), d=M), sae(m=M).W_dec
    c = jnp.asarray(np.random.default_rng(0).uniform(0.1, 10, M), jnp.float32)
    np.testing.assert_allclose(losses.l1(z / c, atoms * c[:, None]), losses.l1(z, atoms), rtol=1e-5)


def test_plain_l1_knows_no_atoms():
    z = activations(batch=(B,), d=M)
    np.testing.assert_allclose(losses.l1(z), np.abs(f64(z)).sum() / B, rtol=1e-5)


def test_l0_target_is_the_squared_relative_distance():
    np.testing.assert_allclose(losses.l0_target(jnp.array([10.0, 14.0]), 16.0), 0.0625)


def test_the_distance_from_no_target_is_nan():
    assert np.isnan(losses.l0_target(jnp.array([10.0, 14.0]), 0.0))


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
def test_losses_are_summed_in_float32(dtype):
    x, x_hat = (50 * activations(seed, batch=(64,), dtype=dtype) for seed in (0, 1))
    z, atoms = 100 * activations(batch=(64,), d=M, dtype=dtype), sae(m=M, dtype=dtype).W_dec
    found = {"mse": losses.mse(x, x_hat), "nmse": losses.nmse(x, x_hat), "l1": losses.l1(z, atoms)}
    error = ((f64(x) - f64(x_hat)) ** 2).sum()
    expected = {
        "mse": error / 64,
        "nmse": error / ((f64(x) - f64(x).mean(0)) ** 2).sum(),
        "l1": (np.abs(f64(z)) * np.linalg.norm(f64(atoms), axis=1)).sum() / 64,
    }
    for name, value in found.items():
        np.testing.assert_allclose(value, expected[name], rtol=1e-5, err_msg=name)
        assert value.dtype == jnp.float32


def test_an_atom_of_zero_has_a_slope_of_zero():
    z, atoms = activations(batch=(B,), d=M), sae(m=M).W_dec.at[3].set(0)
    slope = jax.grad(losses.l1, argnums=1)(z, atoms)
    assert not np.any(slope[3])
    weights = np.abs(f64(z)).mean(0)[:, None]
    expected = weights * f64(atoms) / np.maximum(np.linalg.norm(f64(atoms), axis=1, keepdims=True), 1e-30)
    np.testing.assert_allclose(slope, expected, rtol=1e-4, atol=1e-6)


def test_the_gate_cannot_move_the_decoder():
    model, x = sae(m=M), activations(batch=(B,))
    gated = activations(3, batch=(B,), d=M)
    value, (by_model, by_gate) = jax.value_and_grad(losses.gate, argnums=(0, 2))(model, x, gated)
    error = f64(x) - np.maximum(f64(gated), 0) @ f64(model.W_dec) - f64(model.b_dec)
    np.testing.assert_allclose(value, (error**2).sum() / B, rtol=1e-5)
    assert not any(np.any(leaf) for leaf in jax.tree.leaves(by_model))
    assert np.any(by_gate)


@pytest.mark.parametrize("sparse", [False, True])
def test_matryoshka_is_the_error_of_the_first_latents(sparse):
    model, x = sae(m=M), activations(batch=(B,))
    z = jaxsae.encode_dense(model, x)
    code = jaxsae.encode(model, x) if sparse else z
    expected = 0
    for p in (4, 16):
        error = f64(x) - f64(z)[:, :p] @ f64(model.W_dec)[:p] - f64(model.b_dec)
        expected += (error**2).sum() / B
    np.testing.assert_allclose(losses.matryoshka(model, x, code, (4, 16)), expected, rtol=1e-5)


@pytest.mark.parametrize("k_aux", [1, 3, 8, M, 10 * M])
def test_auxk_is_numpys(k_aux):
    model, (x, residual) = sae(m=M), x_and_residual()
    pre = (f64(x) - f64(model.b_dec)) @ f64(model.W_enc) + f64(model.b_enc)
    z = np.zeros((B, M))
    for row, values in enumerate(pre):
        dead = np.flatnonzero(DEAD)
        chosen = dead[np.argsort(-values[dead])[:k_aux]]  # more than there are dead latents takes them all
        z[row, chosen] = values[chosen]
    error = f64(residual) - z @ f64(model.W_dec)  # b_dec is in x̂ already, and is not counted again
    np.testing.assert_allclose(auxk(model, x, residual, k_aux=k_aux), (error**2).sum() / B, rtol=1e-5)


def test_auxk_is_0_when_nothing_is_dead():
    model, (x, residual) = sae(m=M), x_and_residual()
    value, grads = jax.value_and_grad(auxk)(model, x, residual, dead=jnp.zeros(M, bool))
    assert value == 0
    assert not any(np.any(leaf) for leaf in jax.tree.leaves(grads))


def test_auxk_moves_dead_latents_alone_and_never_b_dec():
    model, (x, residual) = sae(m=M), x_and_residual()
    by_model, by_x, by_residual = jax.grad(auxk, argnums=(0, 1, 2))(model, x, residual)
    moved = np.any(by_model.W_dec != 0, axis=1)
    assert moved.any()
    assert not moved[~DEAD].any()
    np.testing.assert_array_equal(np.any(by_model.W_enc != 0, axis=0), moved)
    np.testing.assert_array_equal(by_model.b_enc != 0, moved)
    assert not np.any(by_model.b_dec)
    assert not np.any(by_x)
    assert not np.any(by_residual)


def test_auxk_reaches_dead_latents_that_are_negative_on_all_rows():
    model, (x, residual) = sae(m=M), x_and_residual()
    model = dataclasses.replace(model, b_enc=jnp.full(M, -100.0))
    slope = jax.grad(auxk)(model, x, residual, k_aux=M)
    np.testing.assert_array_equal(slope.b_enc != 0, DEAD)


def test_auxk_does_not_reach_what_made_the_residual():
    x, _ = x_and_residual()

    def with_live_residual(model):
        return auxk(model, x, x - jaxsae.decode(model, jaxsae.encode_dense(model, x)))

    model = sae(m=M)
    fixed = x - jaxsae.decode(model, jaxsae.encode_dense(model, x))
    found, expected = jax.grad(with_live_residual)(model), jax.grad(auxk)(model, x, fixed)
    jax.tree.map(np.testing.assert_array_equal, found, expected)
    assert np.any(found.W_dec)


@pytest.mark.parametrize("bad", [np.nan, np.inf, 1e30])  # 1e30 squared is more than float32 holds
@pytest.mark.parametrize("where", ["residual", "x"])
@pytest.mark.parametrize("k_aux", [3, M])
def test_auxk_that_is_not_finite_is_0_and_so_is_its_gradient(k_aux, where, bad):
    given = dict(zip(("x", "residual"), x_and_residual(), strict=True))
    given[where] = given[where].at[0, 0].set(bad)
    value, grads = value_and_grad(sae(m=M), given["x"], given["residual"], k_aux=k_aux)
    assert value == 0
    assert not any(np.any(leaf) for leaf in jax.tree.leaves(grads))


def test_auxk_under_jit_with_dead_latents_known_only_then():
    model, (x, residual) = sae(m=M), x_and_residual()
    compiled = jax.jit(auxk, static_argnames="k_aux")
    np.testing.assert_allclose(compiled(model, x, residual), auxk(model, x, residual), rtol=1e-6)
    assert compiled(model, x, residual, jnp.zeros(M, bool)) == 0


@pytest.mark.parametrize(("platform", "selects"), [("tpu", "ApproxTopK"), ("cpu", "chlo.top_k")])
def test_auxk_selects_once_also_for_its_derivative(platform, selects):
    traced = value_and_grad.trace(sae(m=M), *x_and_residual(), k_aux=3)
    text = traced.lower(lowering_platforms=(platform,)).as_text()
    assert text.count(selects) == 1
