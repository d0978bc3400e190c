"""BatchTopK: as many latents a row on average."""

import dataclasses
import math

import jax
import jax.numpy as jnp
from flax import struct
from jaxtyping import Array, Float

from jaxsae._core import pytrees
from jaxsae.autoencoder.activations.base import Activation, _past
from jaxsae.autoencoder.activations.top_k import _validate_k, dropped


@pytrees.dataclass
class BatchTopK(Activation):
    """Train on the `B·k` largest of a batch of `B` rows; infer with the threshold that this amounts to.

        training: the B·k largest positive entries of the batch;   inference: z = pre where pre > threshold

    Rows may then differ in how many latents they need. The threshold follows the smallest value kept, as a running
    mean over some hundred steps that begins at the first one.

    Attributes:
      k: mean number of active latents a row, in training; static.
      threshold: `[]`, of inference; negative until a training step has estimated it, and then nothing but ReLU.

    Raises:
      ValueError: if `k < 1`.

    Example:
      >>> import jax.numpy as jnp, jaxsae
      >>> pre = jnp.array([[4.0, 3.0], [2.0, 1.0]])
      >>> z, activation = jaxsae.BatchTopK(1).train(pre)
      >>> z.tolist(), float(activation.threshold)
      ([[4.0, 3.0], [0.0, 0.0]], 3.0)

    Source: Bussmann, Leask & Nanda (2024), "BatchTopK sparse autoencoders".
    """

    k: int = struct.field(pytree_node=False)
    threshold: float | Float[Array, ""] = pytrees.fixed(default=-1.0)

    def __post_init__(self):
        _validate_k(self)

    def __call__(self, pre: Float[Array, "*b m"]) -> Float[Array, "*b m"]:
        """The dense code of inference: each row by itself."""
        return _past(self.threshold, pre, pre)

    def train(self, pre: Float[Array, "b m"]) -> tuple[Float[Array, "b m"], "BatchTopK"]:
        """The dense code of a training batch, and the activation with its threshold moved towards it."""
        z = jax.nn.relu(pre)
        count = self.k * math.prod(pre.shape[:-1])
        if count > pre.size:
            raise ValueError(f"BatchTopK got k = {self.k} for {pre.shape[-1]} latents; pass k of at most that.")
        flat = z.reshape(-1)
        z = jnp.where(dropped(flat, count), 0, flat).reshape(pre.shape)
        least = jnp.min(jax.lax.stop_gradient(z), where=z > 0, initial=jnp.inf).astype(jnp.float32)
        threshold = jnp.where(self.threshold < 0, least, 0.99 * self.threshold + 0.01 * least)
        return z, dataclasses.replace(self, threshold=jnp.where(jnp.isfinite(least), threshold, self.threshold))

    def margin(self, pre: Float[Array, "*b m"]) -> Float[Array, "*b m"]:
        """How far past a threshold of 0 each latent is, if it is positive: `t` in `at_margin(t)` where it turns off."""
        return pre

    def at_margin(self, t: float | Array) -> "BatchTopK":
        """The activation under which positive latents of a margin beyond `t` are active, and no others."""
        return dataclasses.replace(self, threshold=jnp.asarray(t, jnp.float32))

    def rescale(self, scale: float | Array) -> "BatchTopK":
        """The activation in other units."""
        return dataclasses.replace(self, threshold=self.threshold / scale)
