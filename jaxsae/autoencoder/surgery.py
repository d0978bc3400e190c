"""Changes to a trained SAE with a known effect on what it computes, units and thresholds; and to activations by it."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer
from jaxtyping import Array, Float, Int

from jaxsae._core.linalg import result_type
from jaxsae.autoencoder.activations import JumpReLU
from jaxsae.autoencoder.sae import SAE, pre_activations


def rescale(sae: SAE, scale: float | Float[Array, ""], target_scale: float | Float[Array, ""] | None = None) -> SAE:
    """Change units: the result does to `x` what `sae` does to `scale · x`.

        reconstruct(rescale(sae, scale), x) = reconstruct(sae, scale · x) / scale

    Supports are equal, and values become `z / scale`, or stay equal if each row is normalised. Weights are unchanged,
    so atoms of unit norm keep it; only biases and thresholds change units. A transcoder's target has a scale of its
    own, in place of the one that divides above; its encoder's weights then change too.

    Args:
      sae: an autoencoder of scaled activations.
      scale: positive factor from raw to scaled activations.
      target_scale: likewise of a transcoder's target.

    Raises:
      ValueError: if a scale is not positive and finite; if a transcoder gets no `target_scale`, or an autoencoder one;
        or if the activation or normalisation does not define `rescale`.

    Example:
      >>> import jax, jax.numpy as jnp, jaxsae
      >>> sae = jaxsae.init(jax.random.key(0), d=4, m=8, activation=jaxsae.ReLU(), b_dec=jnp.ones(4))
      >>> jaxsae.autoencoder.rescale(sae, 0.5).b_dec
      Array([2., 2., 2., 2.], dtype=float32)
    """
    if sae.transcoder != (target_scale is not None):
        what = (
            "a transcoder and no target_scale; pass that of its target"
            if sae.transcoder
            else ("a target_scale and an autoencoder, whose target is its input; leave it out")
        )
        raise ValueError(f"`rescale` got {what}.")
    target_scale = scale if target_scale is None else target_scale
    for each in (scale, target_scale):
        _validate_scale(each, "rescale")
    if sae.normalisation is not None and sae.normalisation.per_row:  # weights act on normalised rows
        if sae.transcoder:
            raise ValueError("`rescale` got a transcoder that normalises each row; scale W_dec and b_dec yourself.")
        return dataclasses.replace(sae, normalisation=sae.normalisation.rescale(scale))
    changed: dict[str, Any] = {"b_enc": sae.b_enc / target_scale, "b_dec": sae.b_dec / target_scale}
    if sae.transcoder:
        changed["W_enc"] = sae.W_enc * (scale / target_scale)
        changed["W_skip"] = None if sae.W_skip is None else sae.W_skip * (scale / target_scale)
    return dataclasses.replace(sae, **changed, activation=sae.activation.rescale(target_scale))


def _validate_scale(scale, name: str) -> None:
    if isinstance(scale, Tracer):
        return
    if jnp.iscomplexobj(scale) or not np.all((np.asarray(scale) > 0) & np.isfinite(scale)):
        raise ValueError(f"`{name}` got a scale of {scale}, expected a positive number; pass √d / mean ‖x‖, say.")


def fold_scale(sae: SAE, scale: float | Float[Array, ""]) -> SAE:
    """Fold an input scale into the weights: the result takes `x` where `sae` takes `scale · x`, with equal codes.

        W_enc ← scale · W_enc,   W_dec ← W_dec / scale,   b_dec ← b_dec / scale

    `rescale`, in contrast, keeps the weights and changes the units of the codes. The output is in the units of `x`: the
    target of a transcoder is assumed to have been scaled by the same factor.

    Args:
      sae: an autoencoder of scaled activations, such as one with `AverageNorm`, which is then removed.
      scale: positive factor from raw to scaled activations, such as `√d / mean ‖x‖`.

    Raises:
      ValueError: if the scale is not positive and finite, or if the SAE has no encoder or normalises each row.

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
            "of any scale; use it unchanged, or call rescale."
        )
    weights = {"W_enc": sae.W_enc * scale, "W_dec": sae.W_dec / scale, "b_dec": sae.b_dec / scale}
    return dataclasses.replace(sae, **weights, normalisation=None)


def rethreshold(sae: SAE, x: Float[Array, "n d"], l0: float) -> SAE:
    """Replace the activation by a JumpReLU with one threshold for all latents, at which the mean L0 on `x` is `l0`.

    The L0 of a trained TopK then varies by row, and each row and latent can be computed independently. Rows with NaN or
    Inf are left out. Ties are kept together, so that the L0 may exceed `l0`; it is lower only if fewer pre-activations
    are positive.

    Args:
      sae: the autoencoder.
      x: a sample of activations `[n d]`.
      l0: target mean number of active latents per row, at most `m`.

    Returns:
      The SAE with a `JumpReLU`.

    Raises:
      ValueError: if `l0` is not between 0 and `m`, if no row is finite, or if the activation is not one that keeps
        positive pre-activations unchanged.

    Example:
      >>> import jax, jaxsae
      >>> sae = jaxsae.init(jax.random.key(0), d=16, m=64, activation=jaxsae.TopK(4))
      >>> x = jax.random.normal(jax.random.key(1), (256, 16))
      >>> float(jaxsae.encode(rethreshold(sae, x, 6.5), x, capacity=64).l0.mean())
      6.5

    Source: Gao et al. (2024), Section 5.2.
    """
    if not 0 < l0 <= sae.m:
        raise ValueError(f"`rethreshold` got l0 = {l0} for {sae.m} latents; pass more than 0 and at most {sae.m}.")
    if not sae.activation.takes_largest:
        raise ValueError(
            f"`rethreshold` got {type(sae.activation).__name__}, whose values are not the largest pre-activations; "
            "pass an SAE with ReLU, TopK or another that `takes_largest`."
        )
    pre = pre_activations(sae, x)
    finite = jnp.isfinite(pre).all(-1, keepdims=True)
    if not (rows := int(jnp.sum(finite))):
        raise ValueError("`rethreshold` got no finite rows; pass at least one.")
    largest = jnp.sort(jnp.where(finite, jax.nn.relu(pre), 0).ravel())[::-1]
    least = largest[max(round(l0 * rows), 1) - 1].astype(result_type(pre.dtype, jnp.float32))
    below = jnp.maximum(jnp.nextafter(least, -jnp.inf), 0)
    return dataclasses.replace(sae, activation=JumpReLU(jnp.full(sae.m, below)))


def steer(
    sae: SAE, x: Float[Array, "*b d"], latent: int | Int[Array, ""], scale: float | Float[Array, ""]
) -> Float[Array, "*b d"]:
    """Activations as if one latent were more active by `scale`, with what the SAE does not reconstruct kept.

        x' = x + reconstruct(z + scale e_latent) − reconstruct(z) = x + scale · W_dec[latent]

    The last equality holds unless the SAE normalises each row; atoms are then in the units of the row, and so is what
    is added. `jax.tree_util.Partial(steer, sae, latent=latent, scale=scale)` is an edit for
    `language_model.generate`, and for `language_model.splice`.

    Args:
      sae: the autoencoder.
      x: activations `[*b d]`.
      latent: its number, from 0; NaN is returned where a traced one is out of range.
      scale: in units of the latent's activation, of either sign.

    Raises:
      TypeError, ValueError: if `x` does not fit the SAE or there is no such latent, or for a transcoder, whose atoms
        belong to its target.

    Example:
      >>> import jax, jax.numpy as jnp, jaxsae
      >>> sae = jaxsae.init(jax.random.key(0), d=4, m=8, activation=jaxsae.TopK(2))
      >>> x = jnp.ones((3, 4))
      >>> bool(jnp.allclose(jaxsae.autoencoder.steer(sae, x, 5, 2.0), x + 2 * sae.W_dec[5]))
      True

    Source: Templeton et al. (2024), "Scaling monosemanticity", for steering with the error kept.
    """
    if sae.transcoder or sae.W_skip is not None:
        raise ValueError("`steer` got a transcoder, whose atoms belong to its target; pass an autoencoder.")
    if not isinstance(latent, Tracer) and not 0 <= latent < sae.m:
        raise ValueError(f"`steer` got latent {latent}, this SAE has {sae.m}; pass one from 0 to {sae.m - 1}.")
    if x.shape[-1:] != (sae.d,) or not jnp.issubdtype(x.dtype, jnp.floating):
        raise ValueError(f"`steer` got x of shape {x.shape} and {x.dtype}; pass activations (*b, {sae.d}).")
    number = jnp.where(jnp.asarray(latent) < 0, sae.m, latent)  # which would count from the end
    atom = sae.W_dec.at[number].get(mode="fill", fill_value=jnp.nan)
    wide = result_type(x.dtype, jnp.float32)
    added = jnp.asarray(scale, wide) * atom.astype(wide)
    unit = None if sae.normalisation is None else sae.normalisation(x).scale
    return (x.astype(wide) + (added if unit is None else unit.astype(wide) * added)).astype(x.dtype)
