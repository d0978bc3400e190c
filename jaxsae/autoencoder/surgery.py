"""Changes to a trained SAE that keep what it computes, or change it by a known amount: units, norms, thresholds."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer
from jaxtyping import Array, Float

from jaxsae._core.linalg import promoted
from jaxsae.autoencoder.activations import JumpReLU
from jaxsae.autoencoder.sae import SAE, pre_activations


def rescale(sae: SAE, scale: float | Float[Array, ""]) -> SAE:
    """The SAE that does to `x` what `sae` does to `scale · x`, in the units of `x`.

        reconstruct(rescale(sae, scale), x) = reconstruct(sae, scale · x) / scale

    The supports are the same, and values are in the units of `x` too, `z / scale`, but where each row is normalised.
    Weights stay as they are, so atoms of unit norm keep it; only biases and thresholds change units.

    Args:
      sae: an autoencoder of scaled activations.
      scale: positive factor from raw to scaled activations.

    Raises:
      ValueError: if the scale is not positive and finite; if it is a transcoder, whose target may have units of its
        own; or if its activation or normalisation is one that does not say how it changes units.

    Example:
      >>> import jax, jax.numpy as jnp, jaxsae
      >>> sae = jaxsae.init(jax.random.key(0), d=4, m=8, activation=jaxsae.ReLU(), b_dec=jnp.ones(4))
      >>> jaxsae.autoencoder.rescale(sae, 0.5).b_dec
      Array([2., 2., 2., 2.], dtype=float32)
    """
    _validate_scale(scale, "rescale")
    if sae.transcoder or sae.W_skip is not None:
        raise ValueError(
            "`rescale` got a transcoder, whose target may have units of its own; scale what it reads, "
            "sae.replace(W_enc=scale * sae.W_enc), and W_skip likewise if it has one."
        )
    if sae.normalisation is not None and sae.normalisation.per_row:  # inside, the units are the row's own
        return dataclasses.replace(sae, normalisation=sae.normalisation.rescale(scale))
    activation = sae.activation.rescale(scale)
    return dataclasses.replace(sae, b_enc=sae.b_enc / scale, b_dec=sae.b_dec / scale, activation=activation)


def _validate_scale(scale, name: str) -> None:
    if isinstance(scale, Tracer):
        return
    if jnp.iscomplexobj(scale) or not np.all((np.asarray(scale) > 0) & np.isfinite(scale)):
        raise ValueError(f"`{name}` got a scale of {scale}, expected a positive number; pass √d / mean ‖x‖, say.")


def fold_scale(sae: SAE, scale: float | Float[Array, ""]) -> SAE:
    """The SAE that takes `x` as it is, of one that wants `scale · x`; codes keep their values.

        W_enc ← scale · W_enc,   W_dec ← W_dec / scale,   b_dec ← b_dec / scale

    Unlike `rescale`, which keeps the weights and changes the units of the codes. What comes out is in the units of `x`:
    the target of a transcoder is taken to have come scaled too.

    Args:
      sae: an autoencoder of scaled activations, as one with `AverageNorm`, which is then dropped.
      scale: positive factor from raw to scaled activations, such as `√d / mean ‖x‖`.

    Raises:
      ValueError: if the scale is not positive and finite, if it has no encoder, or if it normalises each row.

    Example:
      >>> import jax, jax.numpy as jnp, jaxsae
      >>> sae = jaxsae.init(jax.random.key(0), d=4, m=8, activation=jaxsae.ReLU(), b_dec=jnp.ones(4))
      >>> jaxsae.autoencoder.fold_scale(sae, 0.5).b_dec
      Array([2., 2., 2., 2.], dtype=float32)

    Source: SAELens, `fold_activation_norm_scaling_factor`.
    """
    if sae.activation.encoder_free:
        raise ValueError("`fold_scale` got a pursuit, which has no encoder to fold into; scale its rows instead.")
    _validate_scale(scale, "fold_scale")
    if sae.normalisation is not None and sae.normalisation.per_row:
        raise ValueError(
            f"`fold_scale` got an SAE that normalises each row ({type(sae.normalisation).__name__}), which takes rows "
            "of any scale; leave it as it is, or call rescale."
        )
    weights = {"W_enc": sae.W_enc * scale, "W_dec": sae.W_dec / scale, "b_dec": sae.b_dec / scale}
    return dataclasses.replace(sae, **weights, normalisation=None)


def rethreshold(sae: SAE, x: Float[Array, "n d"], l0: float) -> SAE:
    """The SAE with one threshold for all latents in place of its activation, such that its mean L0 on `x` is `l0`.

    A trained TopK then spends its latents where they are needed, and each row and latent can be computed alone. Rows
    with NaN or Inf are left out. Values that are equal stay together, so that the L0 may be more than `l0`; it is less
    only where fewer pre-activations are positive.

    Args:
      sae: the autoencoder.
      x: a sample of activations `[n d]`.
      l0: mean number of active latents a row to aim at, at most `m`.

    Returns:
      The SAE with a `JumpReLU`.

    Raises:
      ValueError: if `l0` is not between 0 and `m`, if no row is finite, or if the values of its activation are not the
        pre-activations that are large enough, so that another activation cannot stand in its place.

    Example:
      >>> import jax, jaxsae
      >>> sae = jaxsae.init(jax.random.key(0), d=16, m=64, activation=jaxsae.TopK(4))
      >>> x = jax.random.normal(jax.random.key(1), (256, 16))
      >>> float(jaxsae.encode(rethreshold(sae, x, 6.5), x, capacity=64).l0.mean())
      6.5

    Source: Gao et al. (2024), Section 5.2.
    """
    if not 0 < l0 <= sae.m:
        raise ValueError(f"`rethreshold` got l0 = {l0} for {sae.m} latents; pass more than 0, and at most that.")
    if not sae.activation.takes_largest:
        raise ValueError(
            f"`rethreshold` got {type(sae.activation).__name__}, whose values are not the largest pre-activations; "
            "pass an SAE with ReLU, TopK or another that `takes_largest`."
        )
    pre = pre_activations(sae, x)
    finite = jnp.isfinite(pre).all(-1, keepdims=True)
    if not (rows := int(jnp.sum(finite))):
        raise ValueError("`rethreshold` got no row without NaN or Inf; pass some.")
    largest = jnp.sort(jnp.where(finite, jax.nn.relu(pre), 0).ravel())[::-1]
    least = largest[max(round(l0 * rows), 1) - 1].astype(promoted(pre.dtype, jnp.float32))
    below = jnp.maximum(jnp.nextafter(least, -jnp.inf), 0)
    return dataclasses.replace(sae, activation=JumpReLU(jnp.full(sae.m, below)))
