"""What holds for every activation: one without a row in `problems.every_activation` fails the first test."""

import inspect

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import struct
from problems import activations, every_activation, f64, objective, sae

import jaxsae
from jaxsae._core import pytrees
from jaxsae.autoencoder import normalisation
from jaxsae.autoencoder.activations import Activation

D, M, K = 16, 32, 6


@pytrees.dataclass
class Square(Activation):
    """Somebody's own: slots that it fixes, and values that are not the pre-activations."""

    k: int = struct.field(pytree_node=False)

    @property
    def slots(self):
        return self.k

    def __call__(self, pre):
        return jaxsae.TopK(self.k)(pre) ** 2


@pytrees.dataclass
class SquareOfTopK(jaxsae.TopK):
    """The same by inheritance: what it says of the dense code is true of the sparse one."""

    def __call__(self, pre):
        return super().__call__(pre) ** 2


def of_every_kind(dtype=np.float32):
    """Every activation that there is, and some of a user's own; what has no row here fails the next test."""
    theirs = {"kept": jaxsae.TopK(K, keep=2.5), "Square": Square(K), "SquareOfTopK": SquareOfTopK(K)}
    return {**every_activation(M, K, dtype), **theirs}


by_activation = pytest.mark.parametrize("name", of_every_kind())


def test_every_activation_has_a_row():
    own = vars(jaxsae.autoencoder.activations)
    names = {name for name, thing in own.items() if inspect.isclass(thing) and name != "Activation"}
    assert names
    assert names <= every_activation().keys()


@by_activation
def test_encode_has_the_values_and_the_derivatives_of_encode_dense(name, x64):
    model = sae(d=D, m=M, activation=of_every_kind(np.float64)[name], dtype=np.float64)
    x = activations(batch=(8,), d=D, dtype=np.float64)
    weights = jnp.asarray(np.random.default_rng(2).normal(size=(8, M)))
    dots = jax.tree.map(lambda leaf: jnp.cos(jnp.arange(jnp.size(leaf))).reshape(jnp.shape(leaf)), (model, x))

    def losses(model, x):
        code = jaxsae.encode(model, x, capacity=M if model.activation.slots is None else None)
        # On the support: what is off has no slot, and may yet have a straight-through derivative.
        return tuple(jnp.sum(jnp.where(z != 0, weights * z, 0)) for z in (code.dense(), jaxsae.encode_dense(model, x)))

    @jax.jit
    def all_of_it(model, x, dots):
        values, slopes = jax.jvp(losses, (model, x), dots)
        gradients = [jax.grad(lambda m, x, i=i: losses(m, x)[i], (0, 1))(model, x) for i in (0, 1)]
        return values, slopes, gradients

    (sparse, dense), slopes, gradients = all_of_it(model, x, dots)
    np.testing.assert_allclose(sparse, dense, rtol=1e-12)
    np.testing.assert_allclose(*slopes, rtol=1e-12)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-10, atol=1e-12), *gradients)
    products = jax.tree.leaves(jax.tree.map(lambda a, b: jnp.sum(a * b), gradients[0], dots))
    np.testing.assert_allclose(sum(products), slopes[0], rtol=1e-11)


@by_activation
def test_nan_stays_visible_in_its_row_alone(name):
    model = sae(d=D, m=M, activation=of_every_kind()[name])
    x = activations(batch=(8,), d=D).at[3, 0].set(jnp.nan)

    @jax.jit
    def both(model, x):
        slots = model.activation.slots
        return jaxsae.encode_dense(model, x), jaxsae.encode(model, x, capacity=slots or M).dense()

    for z in both(model, x):
        np.testing.assert_array_equal(np.isnan(z).any(1), np.arange(8) == 3)


NORMALISATIONS = {
    "none": None,
    "LayerNorm": normalisation.LayerNorm(),
    "ConstantNorm": normalisation.ConstantNorm(),
    "AverageNorm": normalisation.AverageNorm(),
}


@by_activation
def test_rescale_keeps_the_reconstruction_or_refuses(name):
    x, scale = activations(batch=(8,), d=D), 0.25
    before = jax.jit(lambda sae, x: jaxsae.reconstruct(sae, scale * x) / scale)
    after = jax.jit(lambda sae, x: jaxsae.reconstruct(sae, x))
    for way, normalise in NORMALISATIONS.items():
        model = sae(d=D, m=M, activation=of_every_kind()[name]).replace(normalisation=normalise)
        per_row = normalise is not None and normalise.per_row
        if name.startswith("Square") and not per_row:  # it has units, and does not say which
            with pytest.raises(ValueError, match=r"does not support a change of units; define"):
                jaxsae.autoencoder.rescale(model, scale)
            continue
        rescaled = jaxsae.autoencoder.rescale(model, scale)
        np.testing.assert_allclose(after(rescaled, x), before(model, x), rtol=1e-4, atol=1e-4, err_msg=way)
        with pytest.raises(ValueError, match="`rescale` got a transcoder"):
            jaxsae.autoencoder.rescale(model.replace(transcoder=True, apply_b_dec_to_input=False), scale)
        if per_row:
            with pytest.raises(ValueError, match=r"`fold_scale` got (an SAE that normalises each row|a pursuit)"):
                jaxsae.autoencoder.fold_scale(model, scale)
        elif not model.activation.encoder_free:
            folded = jaxsae.autoencoder.fold_scale(model, scale)
            np.testing.assert_allclose(after(folded, x), before(model, x), rtol=1e-4, atol=1e-4, err_msg=way)


@by_activation
def test_bfloat16_is_float32_rounded(name):
    model = sae(d=D, m=M, activation=of_every_kind(jnp.bfloat16)[name])
    # Of norm 1, as a pursuit wants them; and numbers of the narrow type, so that both precisions start from the same.
    model = model.replace(W_dec=model.W_dec / jnp.linalg.norm(model.W_dec, axis=1, keepdims=True))
    model, x = jax.tree.map(lambda leaf: jnp.asarray(leaf, jnp.bfloat16), (model, activations(batch=(64,), d=D)))

    wide = jax.tree.map(lambda leaf: jnp.asarray(leaf, jnp.float32), (model, x))

    @jax.jit
    def encoded(model, x):
        codes = (jaxsae.encode(model, x, capacity=capacity) for capacity in (model.activation.slots or M, K))
        return jaxsae.encode_dense(model, x), *codes

    z, whole, code = encoded(model, x)
    assert z.dtype == whole.values.dtype == jnp.bfloat16
    np.testing.assert_array_equal(f64(whole.dense()), f64(z))
    # Which latents are active may change with the rounding of a few rows: the rest of the values do not.
    assert np.mean(_far(z, encoded(*wide)[0])) <= 0.2

    widened = code.replace(values=code.values.astype(jnp.float32))
    for decode in (lambda model, x, code: jaxsae.decode(model, code), jaxsae.reconstruct):
        x_hat = decode(model, x, code)
        assert x_hat.dtype == jnp.bfloat16
        assert not np.any(_far(x_hat, decode(*wide, widened)))

    refined, refined32 = jaxsae.refine(model, x, code)[0], jaxsae.refine(*wide, widened)[0]
    assert refined.values.dtype == jnp.bfloat16
    np.testing.assert_array_equal(refined.indices, code.indices)
    y = f64(x) - f64(model.b_dec)
    before, after, least = (objective(model.W_dec, y, each) for each in (code, refined, refined32))
    # The least error is flat: rounded values have more by the square of the rounding alone.
    rounding = 20 * float(jnp.finfo(jnp.bfloat16).eps) ** 2 * np.sum(y**2, axis=1)
    assert model.activation.signed or np.all(f64(refined.values) >= 0)
    assert np.all(after <= np.minimum(before, least) + rounding)


def _far(got, wanted):
    """Which rows differ by more than a few roundings to bfloat16."""
    off = np.linalg.norm(f64(got) - f64(wanted), axis=1)
    return off > 4 * float(jnp.finfo(jnp.bfloat16).eps) * np.linalg.norm(f64(wanted), axis=1)
