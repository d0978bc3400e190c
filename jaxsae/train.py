"""Training: a loss, an optax transformation and a stream of batches make an SAE.

    state = train.init_state(sae, tx)
    step = train.make_step(loss, tx)
    for x in batches:
        state, metrics = step(state, x)

A loss is any callable pytree `loss(sae, x, state) -> (value, (fired, metrics))`: `fired [m]` says which latents were
active, `metrics` is a dictionary of scalars. Its numbers are leaves, so that a weight can change without a retrace.
"""

import functools
from collections.abc import Callable, Iterable
from typing import Any

import jax
import jax.numpy as jnp
import optax
from flax import struct
from jax.typing import ArrayLike
from jaxtyping import Array, Float, Int

from jaxsae import losses
from jaxsae.sae import SAE, decode, encode_dense, pre_activations


@struct.dataclass
class TrainState:
    """All that a training step reads and writes.

    Attributes:
      sae: the autoencoder.
      opt_state: the optax state.
      step: steps taken.
      idle: `[m]`, rows since each latent last fired.
    """

    sae: SAE
    opt_state: Any
    step: Int[Array, ""]
    idle: Int[Array, " m"]


Loss = Callable[[SAE, Array, TrainState], tuple[Array, tuple[Array, dict[str, Array]]]]


@struct.dataclass
class L1Loss:
    """MSE plus a decoder-norm weighted L1 penalty, warmed up linearly.

    Attributes:
      weight: of the penalty, once warm.
      warmup_steps: over how many steps the weight grows from 0.
    """

    weight: float | Array
    warmup_steps: int | Array = 0

    def __call__(self, sae: SAE, x: Float[Array, "b d"], state: TrainState) -> tuple[Array, tuple[Array, dict]]:
        """The loss, and `(fired, metrics)`."""
        z = encode_dense(sae, x)
        x_hat = decode(sae, z)
        penalty = losses.l1(z, sae.W_dec)
        weight = self.weight * jnp.minimum(1.0, (state.step + 1) / jnp.maximum(self.warmup_steps, 1))
        return losses.mse(x, x_hat) + weight * penalty, _measure(x, x_hat, z)


@struct.dataclass
class AuxKLoss:
    """MSE plus AuxK over dead latents, for activations that fix `k`.

    Attributes:
      dead_after: a latent is dead once this many rows went by without it.
      k_aux: how many dead latents to use a row; static.
      weight: of the AuxK term.

    Source: Gao et al. (2024), Appendix A.2.
    """

    dead_after: int | Array
    k_aux: int = struct.field(pytree_node=False)
    weight: float | Array = 1 / 32

    def __call__(self, sae: SAE, x: Float[Array, "b d"], state: TrainState) -> tuple[Array, tuple[Array, dict]]:
        """The loss, and `(fired, metrics)`."""
        pre = pre_activations(sae, x)
        z = sae.activation(pre)
        x_hat = decode(sae, z)
        auxiliary = losses.auxk(sae, x - x_hat, pre, state.idle >= self.dead_after, k_aux=self.k_aux)
        return losses.mse(x, x_hat) + self.weight * auxiliary, _measure(x, x_hat, z)


def _measure(x, x_hat, z) -> tuple[Array, dict[str, Array]]:
    active = z != 0
    l0 = jnp.mean(jnp.sum(active, axis=-1, dtype=x.dtype))
    return active.any(0), {"nmse": losses.nmse(x, x_hat), "l0": l0}


def unit_norm_decoder(tx: optax.GradientTransformation) -> optax.GradientTransformation:
    """Keep the atoms on the unit sphere: what `tx` sees of their gradient is tangent, and its update ends on it.

    Args:
      tx: any transformation of gradients shaped like an `SAE`.

    Returns:
      A transformation that needs the parameters, as optax passes them.

    Example:
      >>> import jax, jax.numpy as jnp, optax, jaxsae
      >>> sae = jaxsae.init(jax.random.key(0), d=4, m=8, activation=jaxsae.ReLU())
      >>> tx = jaxsae.train.unit_norm_decoder(optax.sgd(1.0))
      >>> updates, _ = tx.update(jax.tree.map(jnp.ones_like, sae), tx.init(sae), sae)
      >>> norms = jnp.linalg.norm(optax.apply_updates(sae, updates).W_dec, axis=1)
      >>> bool(jnp.allclose(norms, 1, atol=1e-6))
      True

    Source: Bricken et al. (2023), "Towards monosemanticity".
    """

    def update(updates: Any, state: Any, params: Any = None):
        if params is None:
            raise ValueError("`unit_norm_decoder` got no params; pass them, tx.update(grads, state, params).")
        atoms, slope = params.W_dec, updates.W_dec
        parallel = jnp.sum(atoms * slope, axis=-1, keepdims=True) / jnp.sum(atoms**2, axis=-1, keepdims=True)
        updates, state = tx.update(updates.replace(W_dec=slope - parallel * atoms), state, params)
        moved = atoms + updates.W_dec
        return updates.replace(W_dec=moved / jnp.linalg.norm(moved, axis=-1, keepdims=True) - atoms), state

    return optax.GradientTransformation(tx.init, update)


def init_state(sae: SAE, tx: optax.GradientTransformation) -> TrainState:
    """The state before the first step; copies `sae`, since steps take over the buffers of the state they are given.

    Args:
      sae: the autoencoder to start from.
      tx: the optax transformation of `make_step`.
    """
    sae = jax.tree.map(jnp.copy, sae)
    return TrainState(
        sae,
        tx.init(sae),  # pyright: ignore[reportArgumentType]
        jnp.zeros((), jnp.int32),
        jnp.zeros(sae.m, jnp.int32),
    )


def make_step(
    loss: Loss, tx: optax.GradientTransformation
) -> Callable[[TrainState, ArrayLike], tuple[TrainState, dict[str, Array]]]:
    """Make a training step `step(state, x) -> (state, metrics)`: jitted, the old state donated.

    Two steps made with the same `tx` and losses that differ in numbers alone share one compilation.

    Args:
      loss: see the module's docstring; a plain function will do.
      tx: optax transformation.

    Returns:
      The step. Its metrics are the loss's own, and `loss` and `dead`, the share of latents idle for longer than the
      loss's `dead_after` (0 if it has none).

    Example:
      >>> import jax, optax, jaxsae
      >>> sae = jaxsae.init(jax.random.key(0), d=8, m=32, activation=jaxsae.ReLU())
      >>> tx = optax.adam(1e-3)
      >>> step = jaxsae.train.make_step(jaxsae.train.L1Loss(weight=0.1), tx)
      >>> state = jaxsae.train.init_state(sae, tx)
      >>> state, metrics = step(state, jax.random.normal(jax.random.key(1), (16, 8)))
      >>> sorted(metrics)
      ['dead', 'l0', 'loss', 'nmse']
    """
    leaves = jax.tree.leaves(loss)
    if len(leaves) == 1 and leaves[0] is loss:
        loss = jax.tree_util.Partial(loss)
    return functools.partial(_step, tx, loss)


@functools.partial(jax.jit, static_argnums=0, donate_argnums=2)
def _step(tx: Any, loss: Any, state: TrainState, x: Array) -> tuple[TrainState, dict[str, Array]]:
    (value, (fired, metrics)), grads = jax.value_and_grad(loss, has_aux=True)(state.sae, x, state)
    updates, opt_state = tx.update(grads, state.opt_state, state.sae)
    most = jnp.iinfo(state.idle.dtype).max - x.shape[0]
    idle = jnp.where(fired, 0, jnp.minimum(state.idle, most) + x.shape[0])
    dead = jnp.mean(idle >= getattr(loss, "dead_after", jnp.inf))
    sae: Any = optax.apply_updates(state.sae, updates)  # pyright: ignore[reportArgumentType]
    state = TrainState(sae, opt_state, state.step + 1, idle)
    return state, {"loss": value, "dead": dead, **metrics}


def fit(
    sae: SAE,
    batches: Iterable[ArrayLike],
    *,
    loss: Loss,
    tx: optax.GradientTransformation,
    steps: int,
    callback: Callable[[int, dict[str, Array]], None] | None = None,
) -> TrainState:
    """Train an SAE.

    Args:
      sae: the autoencoder to start from; left as it is.
      batches: rows `[b d]`, batch after batch, of one shape.
      loss: see the module's docstring.
      tx: optax transformation; wrap it in `unit_norm_decoder` to keep atoms on the unit sphere.
      steps: how many.
      callback: called as `callback(step, metrics)` after each; the metrics are still on the device.

    Returns:
      The last `TrainState`; its `sae` is the result.

    Raises:
      ValueError: if the batches end before the steps do.

    Example:
      >>> import itertools, jax, optax, jaxsae
      >>> sae = jaxsae.init(jax.random.key(0), d=8, m=32, activation=jaxsae.TopK(4))
      >>> x = jax.random.normal(jax.random.key(1), (256, 8))
      >>> loss = jaxsae.train.AuxKLoss(dead_after=2560, k_aux=4)
      >>> tx = jaxsae.train.unit_norm_decoder(optax.adam(1e-2))
      >>> state = jaxsae.train.fit(sae, itertools.repeat(x), loss=loss, tx=tx, steps=20)
      >>> int(state.step)
      20
    """
    step = make_step(loss, tx)
    state = init_state(sae, tx)
    stream = iter(batches)
    for number in range(1, steps + 1):
        try:
            x = next(stream)
        except StopIteration:
            raise ValueError(f"`fit` got {number - 1} batches for {steps} steps; pass more batches.") from None
        state, metrics = step(state, x)
        if callback is not None:
            callback(number, metrics)
    return state
