"""Loss terms of sparse autoencoders, one pure function a term.

Reconstruction and sparsity terms are means over rows of sums over the row, so that their weights do not depend on the
batch; each says in its name or its docstring what it is divided by.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from jaxsae.activations import TopK
from jaxsae.sae import SAE


def mse(x: Float[Array, "b d"], x_hat: Float[Array, "b d"]) -> Float[Array, ""]:
    """Squared error, summed over the width and averaged over rows: `mean_b ‖x − x̂‖²`.

    Example:
      >>> import jax.numpy as jnp
      >>> mse(jnp.ones((2, 3)), jnp.zeros((2, 3)))
      Array(3., dtype=float32)
    """
    return jnp.mean(jnp.sum((x - x_hat) ** 2, axis=-1))


def nmse(x: Float[Array, "b d"], x_hat: Float[Array, "b d"]) -> Float[Array, ""]:
    """Squared error relative to predicting the batch's mean: `Σ‖x − x̂‖² / Σ‖x − x̄‖²`.

    Example:
      >>> import jax.numpy as jnp
      >>> nmse(jnp.array([[0.0], [2.0]]), jnp.ones((2, 1)))
      Array(1., dtype=float32)
    """
    return mse(x, x_hat) / mse(x, jnp.broadcast_to(jnp.mean(x, axis=0), x.shape))


def l1(z: Float[Array, "b m"], W_dec: Float[Array, "m d"]) -> Float[Array, ""]:
    """Decoder-norm weighted L1 penalty: `mean_b Σᵢ |zᵢ| ‖W_dec[i]‖`; no gain from large atoms and small values.

    Example:
      >>> import jax.numpy as jnp
      >>> l1(jnp.array([[1.0, 2.0]]), 2 * jnp.eye(2))
      Array(6., dtype=float32)

    Source: Conerly et al. (2024), "Update on how we train SAEs".
    """
    return jnp.mean(jnp.sum(jnp.abs(z) * jnp.linalg.norm(W_dec, axis=-1), axis=-1))


def auxk(
    sae: SAE, residual: Float[Array, "b d"], pre: Float[Array, "b m"], dead: Bool[Array, " m"], *, k_aux: int
) -> Float[Array, ""]:
    """AuxK: reconstruct the residual with the `k_aux` most active dead latents, so that they learn something.

        mean_b ‖e − ê‖²,   ê = ReLU(top-k_aux of pre over dead latents) W_dec

    The residual is a constant here and `b_dec` takes no part. 0 if nothing is dead, or if the term is not finite.

    Args:
      sae: the autoencoder.
      residual: `e = x − x̂`, `[b d]`.
      pre: pre-activations `[b m]`.
      dead: which latents are dead, `[m]`.
      k_aux: how many dead latents to use a row; static.

    Source: Gao et al. (2024), Appendix A.2.
    """
    residual = jax.lax.stop_gradient(residual)
    k_aux = min(k_aux, sae.m)

    def term(select):
        def value(pre, W_dec):
            error = mse(residual, select(jnp.where(dead, pre, -jnp.inf)) @ W_dec)
            return jnp.where(jnp.isfinite(error), error, 0)

        return value

    # Selecting costs as much as a training step: skip it where all that is dead is taken, and all where nothing is.
    branches = (lambda pre, W_dec: jnp.zeros((), W_dec.dtype), term(jax.nn.relu), term(TopK(k_aux)))
    usable = jnp.isfinite(residual).all() & jnp.isfinite(pre).all()
    count = jnp.where(usable, jnp.sum(dead), 0)
    return jax.lax.switch((count > 0).astype(jnp.int32) + (count > k_aux), branches, pre, sae.W_dec)
