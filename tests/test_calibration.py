"""Thresholds of exactly the L0 asked for, and which latents fire, whatever the order and the batches of the rows."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from problems import rows, sae

import jaxsae
from jaxsae.autoencoder import calibration, metrics

D, M, K = 16, 32, 4
THRESHOLDS = jnp.linspace(0.01, 0.5, M)
WAYS = {
    "batchtopk": jaxsae.BatchTopK(K),
    "jumprelu": jaxsae.JumpReLU(THRESHOLDS),
    "far off": jaxsae.JumpReLU(THRESHOLDS + 100),
}


def active(model, x):
    return np.asarray(jaxsae.encode_dense(model, jnp.asarray(x)) != 0)


@pytest.fixture
def x():
    return rows(400)


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("l0", [1.0, 3.5, 8.0])
def test_the_l0_is_the_one_asked_for(way, l0, x):
    model = calibration.calibrate(sae(m=M, activation=WAYS[way]), [x], l0)
    found = active(model, x).sum(1).mean()
    np.testing.assert_allclose(found, l0, rtol=5e-3)


@pytest.mark.parametrize("scale", [1e-20, 1.0, 1e20])
def test_the_units_of_the_rows_do_not_matter(scale, x):
    model = sae(m=M, activation=jaxsae.BatchTopK(K))
    model = calibration.calibrate(model.replace(b_enc=scale * model.b_enc, b_dec=scale * model.b_dec), [scale * x], 4.0)
    np.testing.assert_allclose(active(model, scale * x).sum(1).mean(), 4.0, rtol=5e-3)


def test_order_and_batches_do_not_matter_and_rows_with_nan_do_not_count(x):
    model = sae(m=M, activation=WAYS["jumprelu"])
    spoilt = np.concatenate([x[::-1], np.full((3, D), np.nan, np.float32)])
    pieces = [spoilt[:150], spoilt[150:300], spoilt[300:]]
    whole, parts = (calibration.calibrate(model, each, 4.0).activation.threshold for each in ([x], pieces))
    np.testing.assert_array_equal(whole, parts)
    found = calibration.activity(model, pieces)
    assert found.rows == 400
    np.testing.assert_array_equal(found.fired, active(model, x).sum(0))


@pytest.mark.parametrize("l0", [1.0, 8.0])
def test_thresholds_of_jumprelu_are_moved_alike_and_not_below_0(l0, x):
    after = calibration.calibrate(sae(m=M, activation=WAYS["jumprelu"]), [x], l0).activation.threshold
    moved = np.asarray(after - THRESHOLDS)[np.asarray(after) > 0]
    assert len(moved) > 1 and after.min() >= 0
    np.testing.assert_allclose(moved, moved[0], atol=1e-6)


def test_more_than_ever_fire_is_all_that_fire(x):
    model = calibration.calibrate(sae(m=M, activation=jaxsae.BatchTopK(K)), [x], 32.0)
    relu = model.replace(activation=jaxsae.ReLU())
    np.testing.assert_array_equal(active(model, x), active(relu, x))


@pytest.mark.parametrize("activation", [jaxsae.TopK(K), jaxsae.ReLU()])
def test_activity_is_that_of_the_code(activation, x):
    model = sae(m=M, activation=activation)
    found = calibration.activity(model, [x[:300], x[300:]])
    np.testing.assert_array_equal(found.fired, active(model, x).sum(0))


def test_what_has_no_thresholds_is_refused(x):
    with pytest.raises(NotImplementedError, match="TopK has no threshold to move; pass BatchTopK or JumpReLU"):
        calibration.calibrate(sae(m=M, activation=jaxsae.TopK(K)), [x], 4.0)


def test_thresholds_stay_where_nothing_is_positive_and_are_finite_where_values_tie():
    model = sae(m=M, activation=jaxsae.BatchTopK(K, threshold=jnp.float32(0.5)))
    silent = model.replace(b_enc=jnp.full(M, -1e6))
    assert calibration.calibrate(silent, [np.ones((4, D), np.float32)], 4.0).activation.threshold == 0.5
    alike = model.replace(W_enc=jnp.zeros((D, M)), b_enc=jnp.ones(M))  # all or none
    found = calibration.calibrate(alike, [np.ones((1, D), np.float32)], 1.0).activation.threshold
    assert 0.99 < found < 1


@pytest.mark.parametrize("l0", [float("nan"), -1.0, 0.0, 100.0])
def test_an_l0_that_cannot_be_is_refused(l0):
    model = jaxsae.init(jax.random.key(0), d=8, m=32, activation=jaxsae.BatchTopK(4))
    with pytest.raises(ValueError, match=r"`calibrate` got l0 = .* for 32 latents; pass more than 0 and at most 32"):
        calibration.calibrate(model, [np.ones((4, 8), np.float32)], l0)
    with pytest.raises(ValueError, match="`calibrate` got no finite rows"):
        calibration.calibrate(model, [np.full((4, 8), np.nan, np.float32)], 4.0)


def test_of_no_rows_nobody_knows_which_latents_are_dead():
    model = jaxsae.init(jax.random.key(0), d=8, m=32, activation=jaxsae.TopK(4))
    assert np.isnan(metrics.activity(jaxsae.encode(model, jnp.full((3, 8), jnp.nan))).dead)


# --- Pursuits, and a factor for each latent


def pursuit(**options):
    stops = {"residual_threshold": 0.0, "stop_on_duplicate": False}
    model = sae(m=M, activation=jaxsae.MatchingPursuit(**stops, **options))
    return model.replace(W_dec=model.W_dec / jnp.linalg.norm(model.W_dec, axis=1, keepdims=True))


@pytest.mark.parametrize("l0", [1.0, 3.6, 6.0])
def test_a_pursuit_takes_the_steps_with_the_nearest_l0(l0, x):
    model = pursuit(max_steps=2)
    found = [active(pursuit(max_steps=steps), x).sum(1).mean() for steps in range(1, 16)]
    nearest = 1 + int(np.argmin(np.abs(np.array(found) - l0)))
    spoilt = np.concatenate([x[::-1], np.full((3, D), np.nan, np.float32)])
    for batches in ([x], [spoilt[:150], spoilt[150:]]):
        assert calibration.calibrate(model, batches, l0).activation.max_steps == nearest


@pytest.mark.parametrize("ridge", [0.0, 0.1])
@pytest.mark.parametrize("activation", [jaxsae.ReLU(), jaxsae.TopK(6), jaxsae.AbsTopK(6)])
def test_factors_are_the_least_squares_solution(activation, ridge, x):
    model, x = sae(m=M, activation=activation), jnp.asarray(x)
    if not activation.signed:
        model = model.replace(b_enc=model.b_enc.at[3].set(-1e6))  # never active
    code = jaxsae.encode(model, x, capacity=M if activation.slots is None else None)
    factors = calibration.latent_factors(model, x, code, ridge=ridge)
    z, D_, y = (np.asarray(a, np.float64) for a in (code.dense(), model.W_dec, x - model.b_dec))
    gram, right = (z.T @ z) * (D_ @ D_.T), (z * (y @ D_.T)).sum(0)
    weight = np.full(M, ridge * np.diag(gram).mean())
    wanted = np.linalg.lstsq(gram + np.diag(weight), right + weight, rcond=1e-10)[0]

    def error(f):
        return np.sum((y - (f * z) @ D_) ** 2) + weight @ (f - 1) ** 2

    if activation.signed is False:
        assert not (z[:, 3] != 0).any()
        assert factors[3] == 1
    assert error(np.asarray(factors, np.float64)) <= error(wanted) * (1 + 1e-5)
    assert error(wanted) < 0.995 * error(np.ones(M))
