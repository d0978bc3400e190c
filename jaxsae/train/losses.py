"""Loss terms of sparse autoencoders, one pure function per term.

Reconstruction and sparsity terms are means over rows of sums within a row, so that their weights do not depend on the
batch; the name or docstring of each says what it is divided by. Sums are in float32 or better.
"""

import dataclasses
import functools
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from jaxsae import codes
from jaxsae._core.linalg import norms, ratio, result_type, widen
from jaxsae.autoencoder import metrics
from jaxsae.autoencoder.activations.top_k import below, last_of
from jaxsae.autoencoder.sae import SAE, decode
from jaxsae.codes import SparseCode


def mse(x: Float[Array, "b d"], x_hat: Float[Array, "b d"]) -> Float[Array, ""]:
    """Squared error, summed over the width and averaged over rows: `mean_b ‖x − x̂‖²`.

    Args:
      x: `[b d]`.
      x_hat: its reconstruction, `[b d]`.

    Example:
      >>> import jax.numpy as jnp
      >>> mse(jnp.ones((2, 3)), jnp.zeros((2, 3)))
      Array(3., dtype=float32)
    """
    return jnp.mean(jnp.sum((widen(x) - widen(x_hat)) ** 2, axis=-1))


def nmse(x: Float[Array, "b d"], x_hat: Float[Array, "b d"]) -> Float[Array, ""]:
    """Squared error relative to predicting the batch's mean: `Σ‖x − x̂‖² / Σ‖x − x̄‖²`; NaN if all rows are equal.

    Args:
      x: `[b d]`.
      x_hat: its reconstruction, `[b d]`.

    Example:
      >>> import jax.numpy as jnp
      >>> nmse(jnp.array([[0.0], [2.0]]), jnp.ones((2, 1)))
      Array(1., dtype=float32)
    """
    return metrics.Reconstruction(metrics.moments(x), metrics.moments(widen(x) - widen(x_hat))).nmse


def l1(z: Float[Array, "b m"], W_dec: Float[Array, "m d"] | None = None) -> Float[Array, ""]:
    """L1 penalty `mean_b Σᵢ |zᵢ| ‖W_dec[i]‖`, which scaling atoms cannot reduce; without `W_dec`, `mean_b ‖z‖₁`.

    Args:
      z: dense code `[b m]`.
      W_dec: atoms `[m d]`, or None.

    Example:
      >>> import jax.numpy as jnp
      >>> l1(jnp.array([[1.0, 2.0]]), 2 * jnp.eye(2))
      Array(6., dtype=float32)

    Source: Conerly et al. (2024), "Update on how we train SAEs".
    """
    size = jnp.abs(widen(z)) if W_dec is None else jnp.abs(widen(z)) * norms(W_dec)[..., 0]
    return jnp.mean(jnp.sum(size, axis=-1))


def l0_target(l0: Float[Array, " b"], target: float | Array) -> Float[Array, ""]:
    """Squared relative distance of the mean L0 from a target: `(mean_b ‖z‖₀ / target − 1)²`.

    Args:
      l0: `‖z‖₀` of each row, `[b]`, as from `JumpReLU.l0`.
      target: latents per row; with 0 the result is NaN.

    Example:
      >>> import jax.numpy as jnp
      >>> l0_target(jnp.array([10.0, 20.0]), 10.0)
      Array(0.25, dtype=float32)

    Source: Rajamanoharan et al. (2024), "Jumping ahead: improving reconstruction fidelity with JumpReLU SAEs".
    """
    return (ratio(jnp.mean(widen(l0)), target) - 1) ** 2


def gate(sae: SAE, target: Float[Array, "b d"], gated: Float[Array, "b m"]) -> Float[Array, ""]:
    """Gated's auxiliary term: the error of reconstruction from the gate alone, with a frozen decoder.

        mean_b ‖target − (max(gated, 0) W_dec + b_dec)‖²,   W_dec and b_dec constant

    Args:
      sae: the autoencoder.
      target: what to reconstruct, `[b d]`.
      gated: `Gated.gate(pre)`, `[b m]`.

    Example:
      >>> import jax, jax.numpy as jnp, jaxsae
      >>> sae = jaxsae.SAE(jnp.eye(2), jnp.zeros(2), jnp.eye(2), jnp.zeros(2), jaxsae.ReLU())
      >>> gate(sae, jnp.array([[1.0, 2.0]]), jnp.array([[1.0, -2.0]]))
      Array(4., dtype=float32)

    Source: Rajamanoharan et al. (2024), "Improving dictionary learning with gated sparse autoencoders", Section 3.2.
    """
    W_dec, b_dec = jax.lax.stop_gradient((sae.W_dec, sae.b_dec))
    return mse(target, jax.nn.relu(gated) @ W_dec + b_dec)


def matryoshka(
    sae: SAE, target: Float[Array, "b d"], code: SparseCode | Float[Array, "b m"], prefixes: Sequence[int]
) -> Float[Array, ""]:
    """Errors of reconstruction from only the first latents, summed over several prefixes.

        Σ_p mean_b ‖target − (z[:p] W_dec[:p] + b_dec)‖²

    Added to the error of all latents, it makes the first ones learn common features, and the last ones rare features.

    Args:
      sae: the autoencoder.
      target: what to reconstruct, `[b d]`.
      code: the code, sparse or dense.
      prefixes: numbers of latents.

    Example:
      >>> import jax.numpy as jnp, jaxsae
      >>> sae = jaxsae.SAE(jnp.eye(2), jnp.zeros(2), jnp.eye(2), jnp.zeros(2), jaxsae.ReLU())
      >>> matryoshka(sae, jnp.array([[1.0, 2.0]]), jnp.array([[1.0, 2.0]]), prefixes=(1,))
      Array(4., dtype=float32)

    Source: Bussmann et al. (2025), "Learning multi-level features with matryoshka sparse autoencoders".
    """
    atoms = dataclasses.replace(sae, W_skip=None)  # the target already excludes the skip connection
    zero = jnp.zeros((), result_type(target, jnp.float32))
    return sum((mse(target, decode(atoms, _first(code, p))) for p in prefixes), zero)


def _first(code, latents: int):
    if not isinstance(code, SparseCode):
        return jnp.where(jnp.arange(code.shape[-1]) < latents, code, 0)
    return dataclasses.replace(code, values=jnp.where(code.indices < latents, code.values, 0))


@functools.partial(jax.jit, static_argnames="k_aux")
@jax.named_scope("auxk")
def auxk(
    sae: SAE, x: Float[Array, "b d"], residual: Float[Array, "b d_out"], idle: Bool[Array, " m"], *, k_aux: int
) -> Float[Array, ""]:
    """AuxK: reconstruct the residual with the `k_aux` most active idle latents, which gives them a gradient.

        mean_b ‖e − ê‖²,   ê = (the k_aux largest pre-activations of idle latents, of either sign) W_dec

    Negative pre-activations count, since otherwise a latent that is negative on all rows would get no gradient and stay
    idle. The residual is treated as constant, and `b_dec` is not added to `ê` and gets no gradient. 0 if no latent is
    idle, or if the term is not finite.

    Args:
      sae: the autoencoder.
      x: activations `[b d]`.
      residual: `e = x − x̂`, or of a transcoder `target − x̂`, `[b d_out]`.
      idle: which latents have not fired for long, `[m]`; Gao et al. call them dead.
      k_aux: number of idle latents to use per row; static.

    Example:
      >>> import jax.numpy as jnp, jaxsae
      >>> sae = jaxsae.SAE(jnp.eye(2), jnp.zeros(2), jnp.eye(2), jnp.zeros(2), jaxsae.ReLU())
      >>> auxk(sae, jnp.array([[1.0, 2.0]]), jnp.array([[0.0, 2.0]]), jnp.array([False, True]), k_aux=1)
      Array(0., dtype=float32)

    Source: Gao et al. (2024), Appendix A.2.
    """
    x = x - sae.b_dec if sae.apply_b_dec_to_input else x
    rows = jax.lax.stop_gradient((x, residual, idle))
    return _auxk(min(k_aux, sae.m), rows, (sae.W_enc, sae.b_enc, sae.W_dec))


def _of_idle(k_aux: int, rows, weights, transform: Callable):
    """`transform` of the function from weights to AuxK's error, at these weights."""
    x, residual, idle = rows

    def term(left_out):
        def value(weights):
            W_enc, b_enc, W_dec = weights
            pre = x @ W_enc + b_enc
            error = mse(residual, jnp.where(left_out(pre), 0, pre) @ W_dec)
            return jnp.where(jnp.isfinite(error), error, 0)

        return transform(value)

    def unselected(pre):
        among_idle = jnp.where(idle, pre, -jnp.inf)
        found = codes.top_k(jax.lax.stop_gradient(among_idle), k_aux, approximate=True)
        return below(among_idle, *last_of(found, k_aux))

    # Selection costs as much as a training step: skip it if all idle latents are used, and everything if none is idle.
    branches = (
        transform(lambda weights: jnp.zeros((), result_type(weights[2], jnp.float32))),
        term(lambda pre: ~idle),
        term(unselected),
    )
    finite = jnp.isfinite(residual).all() & jnp.isfinite(x).all()
    count = jnp.where(finite, jnp.sum(idle), 0)
    chosen = jnp.int32(count > 0) + jnp.int32(count > k_aux)
    return jax.lax.switch(chosen, branches, weights)


@functools.partial(jax.custom_jvp, nondiff_argnums=(0,))
def _auxk(k_aux: int, rows, weights):
    return _of_idle(k_aux, rows, weights, lambda value: value)


@_auxk.defjvp
def _auxk_tangent(k_aux: int, primals, tangents):
    """By the gradient, made with the value: residuals would be copied out of a branch, as zeros while none is idle."""
    rows, weights = primals
    value, grads = _of_idle(k_aux, rows, weights, jax.value_and_grad)
    dots = zip(*(jax.tree.leaves(widen(tree)) for tree in (grads, tangents[1])), strict=True)
    return value, sum((jnp.sum(grad * dot) for grad, dot in dots), jnp.zeros_like(value)).astype(value.dtype)
