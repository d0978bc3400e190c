import jax
import jax.numpy as jnp
import numpy as np
import pytest
from problems import activations, f64, sae

import jaxsae
from jaxsae import losses

B, D, M = 6, 16, 32
DEAD = jnp.arange(M) % 4 == 0  # 8 of them


def pre_and_residual():
    return activations(10, batch=(B,), d=M), activations(11, batch=(B,))


def auxk(model, residual, pre, dead=DEAD, k_aux=3):
    return losses.auxk(model, residual, pre, dead, k_aux=k_aux)


value_and_grad = jax.jit(jax.value_and_grad(auxk, argnums=(0, 2)), static_argnames="k_aux")


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


@pytest.mark.parametrize("k_aux", [1, 3, 8, M, 10 * M])
def test_auxk_is_numpys(k_aux):
    model, (pre, residual) = sae(m=M), pre_and_residual()
    z = np.zeros((B, M))
    for row, values in enumerate(f64(pre)):
        dead = np.flatnonzero(DEAD)
        chosen = dead[np.argsort(-values[dead])[:k_aux]]  # more than there are dead latents takes them all
        z[row, chosen] = np.maximum(values[chosen], 0)
    error = f64(residual) - z @ f64(model.W_dec)
    np.testing.assert_allclose(auxk(model, residual, pre, k_aux=k_aux), (error**2).sum() / B, rtol=1e-5)


def test_auxk_is_0_when_nothing_is_dead():
    model, (pre, residual) = sae(m=M), pre_and_residual()
    value, grads = jax.value_and_grad(auxk)(model, residual, pre, dead=jnp.zeros(M, bool))
    assert value == 0
    assert not any(np.any(leaf) for leaf in jax.tree.leaves(grads))


def test_auxk_moves_the_atoms_and_pre_activations_of_dead_latents_alone():
    model, (pre, residual) = sae(m=M), pre_and_residual()
    by_model, by_residual, by_pre = jax.grad(auxk, argnums=(0, 1, 2))(model, residual, pre)
    used = np.asarray(by_pre != 0)
    assert not used[:, ~DEAD].any()
    assert (used.sum(1) <= 3).all()
    moved = np.any(by_model.W_dec != 0, axis=1)
    np.testing.assert_array_equal(moved, used.any(0))
    assert moved.any()
    assert not np.any(by_residual)
    for name in ("W_enc", "b_enc", "b_dec"):  # these act through `pre` and the residual, given here
        assert not np.any(getattr(by_model, name)), name


def test_auxk_does_not_reach_what_made_the_residual():
    x, (pre, _) = activations(batch=(B,)), pre_and_residual()

    def with_live_residual(model):
        return auxk(model, x - jaxsae.decode(model, jaxsae.encode_dense(model, x)), pre)

    model = sae(m=M)
    fixed = x - jaxsae.decode(model, jaxsae.encode_dense(model, x))
    found, expected = jax.grad(with_live_residual)(model), jax.grad(auxk)(model, fixed, pre)
    jax.tree.map(np.testing.assert_array_equal, found, expected)
    assert np.any(found.W_dec)


@pytest.mark.parametrize("bad", [np.nan, np.inf, 1e30])  # 1e30 squared is more than float32 holds
@pytest.mark.parametrize("where", ["residual", "pre"])
@pytest.mark.parametrize("k_aux", [3, M])
def test_auxk_that_is_not_finite_is_0_and_so_is_its_gradient(k_aux, where, bad):
    given = dict(zip(("pre", "residual"), pre_and_residual(), strict=True))
    given[where] = given[where].at[0, 0].set(bad)  # latent 0 is dead, so its `pre` counts
    value, grads = value_and_grad(sae(m=M), given["residual"], given["pre"], k_aux=k_aux)
    assert value == 0
    assert not any(np.any(leaf) for leaf in jax.tree.leaves(grads))


def test_auxk_under_jit_with_dead_latents_known_only_then():
    model, (pre, residual) = sae(m=M), pre_and_residual()
    compiled = jax.jit(auxk, static_argnames="k_aux")
    np.testing.assert_allclose(compiled(model, residual, pre), auxk(model, residual, pre), rtol=1e-6)
    assert compiled(model, residual, pre, jnp.zeros(M, bool)) == 0
