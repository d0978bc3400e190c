"""Initialisation of the decoder's bias, and resampling of latents that never fire."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, PRNGKeyArray

from jaxsae._core import chunking, pytrees
from jaxsae._core.linalg import divide, norms, power_of_two_or_one, widen
from jaxsae.autoencoder.sae import SAE, encode_dense, reconstruct
from jaxsae.train.optim import EmaState, _is_ema
from jaxsae.train.steps import TrainState


@functools.partial(jax.jit, static_argnames="iterations")
def geometric_median(x: Float[Array, "n d"], *, iterations: int = 100) -> Float[Array, " d"]:
    """The point of least mean distance to the rows, by Weiszfeld's iteration: a centre that outliers hardly move.

        c ← Σᵢ xᵢ/‖xᵢ − c‖ / Σᵢ 1/‖xᵢ − c‖

    Rows that coincide with the centre are handled as by Vardi & Zhang. Rows with NaN or Inf are ignored; if there are
    no others, the result is NaN.

    Args:
      x: `[n d]`, a sample.
      iterations: number of iterations.

    Example:
      >>> import jax.numpy as jnp
      >>> geometric_median(jnp.array([[0.0], [1.0], [1000.0]])).round(3)
      Array([1.], dtype=float32)

    Source: Weiszfeld (1937); Vardi & Zhang (2000), "The multivariate L1-median and associated data depth"; as the start
    of b_dec, Bricken et al. (2023) and Gao et al. (2024), Appendix A.
    """
    wide = widen(x)
    finite = jnp.isfinite(wide).all(axis=1)
    rows = finite[:, None]
    lowest = jnp.min(wide, axis=0, initial=jnp.inf, where=rows)  # so that equal rows give bitwise that row
    above = jnp.where(rows, wide - lowest, 0)
    scale = power_of_two_or_one(jnp.max(above, initial=0))
    scaled = above / scale
    least = jnp.finfo(scaled.dtype).eps * jnp.sqrt(jnp.mean(jnp.var(scaled, axis=0, where=rows)))

    def closer(_, centre):
        distance = norms(scaled - centre)[:, 0]
        at = finite & (distance <= least)
        weight = jnp.where(at | ~finite, 0, divide(1, distance))
        pull = weight @ (scaled - centre)
        free = jnp.maximum(1 - divide(jnp.sum(at, dtype=wide.dtype), norms(pull)), 0)
        return centre + free * divide(pull, jnp.sum(weight))

    centre = jax.lax.fori_loop(0, iterations, closer, jnp.mean(scaled, axis=0, where=rows))
    return (lowest + scale * centre).astype(x.dtype)


@jax.jit
def resample(key: PRNGKeyArray, state: TrainState, x: Float[Array, "n d"], *, idle_after: int | Array) -> TrainState:
    """Reinitialise idle latents at rows that the autoencoder reconstructs badly; for L1 models.

    Rows are drawn with probability proportional to the square of their loss `‖x − x̂‖²`. The atom becomes the error of
    the row, scaled to norm 1, and the encoder's column the same, scaled to a fifth of the mean norm of the columns that
    are not idle; the latent's bias and optimiser moments become 0. Rows with NaN or Inf are never drawn.

    Args:
      key: PRNG key.
      state: the training state.
      x: a sample of rows to draw from, `[n d]`.
      idle_after: number of rows without firing after which a latent is idle.

    Returns:
      The state to continue from; unchanged if no latent is idle, or no row has an error.

    Raises:
      ValueError: for a transcoder, whose errors do not lie in its input space; or if the activation, such as JumpReLU
        or Gated, has parameters, which might keep a latent inactive.

    Example:
      >>> import jax, jaxsae
      >>> sae = jaxsae.init(jax.random.key(0), d=4, m=8, activation=jaxsae.ReLU())
      >>> state = jaxsae.train.init_state(sae, jaxsae.train.default_optimizer(1e-3))
      >>> x = jax.random.normal(jax.random.key(1), (16, 4))
      >>> bool((resample(jax.random.key(2), state, x, idle_after=1).sae.W_dec == sae.W_dec).all())
      True

    Source: Bricken et al. (2023), "Towards monosemanticity", Appendix.
    """
    sae = state.sae
    if sae.transcoder:
        raise ValueError("`resample` got a transcoder; it is for autoencoders, whose errors are like their inputs.")
    if jax.tree.leaves(pytrees.partition(sae.activation)[0]):
        name = type(sae.activation).__name__
        raise ValueError(
            f"`resample` got {name}, whose own parameters may keep a latent closed; train with AuxK instead."
        )
    errors, loss = _errors(sae, x)
    chosen = _draw(key, loss**2, sae.m)
    idle = (state.rows_since_fired >= idle_after) & jnp.any(loss > 0)
    atoms = divide(errors[chosen], norms(errors[chosen]))
    encoder = jnp.linalg.norm(widen(sae.W_enc), axis=0)
    size = 0.2 * jnp.sum(jnp.where(idle, 0, encoder)) / jnp.maximum(jnp.sum(~idle), 1).astype(encoder.dtype)
    size = jnp.where(idle.all(), jnp.mean(encoder), size)
    sae = dataclasses.replace(
        sae,
        W_enc=jnp.where(idle, (size * atoms.T).astype(sae.W_enc.dtype), sae.W_enc),
        b_enc=jnp.where(idle, 0, sae.b_enc),
        W_dec=jnp.where(idle[:, None], atoms.astype(sae.W_dec.dtype), sae.W_dec),
    )

    def forget(moments):
        if _is_ema(moments):  # averaged weights, not moments
            return moments._replace(inner=forget_all(moments.inner))
        if not isinstance(moments, SAE):
            return moments
        return dataclasses.replace(
            moments,
            W_enc=jnp.where(idle, 0, moments.W_enc),
            b_enc=jnp.where(idle, 0, moments.b_enc),
            W_dec=jnp.where(idle[:, None], 0, moments.W_dec),
        )

    def forget_all(opt_state):
        return jax.tree.map(forget, opt_state, is_leaf=lambda node: isinstance(node, SAE | EmaState))

    opt_state = forget_all(state.opt_state)
    return dataclasses.replace(
        state, sae=sae, opt_state=opt_state, rows_since_fired=jnp.where(idle, 0, state.rows_since_fired)
    )


def _errors(sae: SAE, x: Float[Array, "n d"]) -> tuple[Float[Array, "n d"], Float[Array, " n"]]:
    """Residuals of the rows, over a power of two near their maximum, and their squared norms; 0 if not finite."""

    def left(x):
        return x - reconstruct(sae, x, encode_dense(sae, x))

    errors = chunking.map_chunks(left, widen(x), batch=x.shape[:1], row_bytes=8 * sae.m, cpu_rows=256)
    errors = jnp.where(jnp.isfinite(errors).all(axis=1, keepdims=True), errors, 0)
    errors = errors / power_of_two_or_one(jnp.max(jnp.abs(errors), initial=0))
    return errors, jnp.sum(errors**2, axis=1)


def _draw(key: PRNGKeyArray, weight: Float[Array, " n"], count: int) -> Int[Array, " count"]:
    """Draw indices with probability proportional to `weight`, by inverting the CDF, in memory `n + count`."""
    total = jnp.cumsum(weight)
    chosen = jnp.searchsorted(total, total[-1] * jax.random.uniform(key, (count,), total.dtype), side="right")
    chosen = jnp.minimum(chosen, len(weight) - 1)
    most = jnp.argmax(weight).astype(chosen.dtype)
    return jnp.where(weight[chosen] > 0, chosen, most)  # rounding may end at one of weight 0
