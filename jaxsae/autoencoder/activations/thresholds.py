"""Activations that compare each latent with a threshold: 0, its own, or a gate."""

import dataclasses
import math

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from jaxsae._core import pytrees
from jaxsae._core.linalg import promote_dtypes
from jaxsae.autoencoder.activations.base import Activation, _of_any_units, _past


@pytrees.dataclass
class ReLU(Activation):
    """Keep positive pre-activations: `z = max(pre, 0)`.

    Trained with an L1 penalty, this is the sparse autoencoder of Bricken et al. (2023) and Cunningham et al. (2023).

    Example:
      >>> import jax.numpy as jnp, jaxsae
      >>> jaxsae.ReLU()(jnp.array([-1.0, 2.0]))
      Array([0., 2.], dtype=float32)
    """

    takes_largest = True
    rescale = _of_any_units

    def __call__(self, pre: Float[Array, "*b m"]) -> Float[Array, "*b m"]:
        """The dense code."""
        return jax.nn.relu(pre)


@pytrees.dataclass
class JumpReLU(Activation):
    """Keep pre-activations above their latent's threshold: `z = max(pre, 0)` where `pre > θ`, else 0.

    The step has zero slope, so thresholds are trained with straight-through derivatives:

        ∂z/∂θ ≈ −(θ/ε) K((pre − θ)/ε),   ∂‖z‖₀/∂θ ≈ −(1/ε) K((pre − θ)/ε),   K(u) = 1 where |u| < ½

    Attributes:
      threshold: `[m]`, in float32 or better whatever the dtype of the weights: updates of thresholds are too small for
        bfloat16. A latent with an infinite threshold is never active.
      bandwidth: `ε`, in the units of the pre-activations; with 0, thresholds have no derivative; static.

    Raises:
      ValueError: if the bandwidth is negative or not finite.

    Example:
      >>> import jax.numpy as jnp, jaxsae
      >>> jaxsae.JumpReLU(jnp.array([0.5, 0.5]))(jnp.array([0.4, 0.6]))
      Array([0. , 0.6], dtype=float32)

    Source: Rajamanoharan et al. (2024), "Jumping ahead: improving reconstruction fidelity with JumpReLU SAEs".
    """

    threshold: Float[Array, " m"] = pytrees.sharded("latent")
    bandwidth: float = pytrees.static(default=0.001)
    takes_largest = True

    def __post_init__(self):
        if not 0 <= self.bandwidth < math.inf:
            raise ValueError(f"JumpReLU got a bandwidth of {self.bandwidth}; pass a finite one, of at least 0.")

    def __call__(self, pre: Float[Array, "*b m"]) -> Float[Array, "*b m"]:
        """The dense code."""
        _, slope = self._step(pre)
        theta = jax.lax.stop_gradient(self._finite())
        return _past(self.threshold, pre, pre) - (theta * slope).astype(pre.dtype)

    def l0(self, pre: Float[Array, "*b m"]) -> Float[Array, "*b"]:
        """`‖z‖₀` of each row, with its straight-through derivative with respect to the thresholds."""
        on, slope = self._step(pre)
        return jnp.sum(on.astype(slope.dtype) - slope, axis=-1)

    def _step(self, pre):
        """Whether each latent is active, and a zero whose derivative with respect to `θ` is `K((pre − θ)/ε)/ε`."""
        distance = jax.lax.stop_gradient(self.margin(pre))
        near = jnp.abs(distance) < self.bandwidth / 2
        threshold = self._finite()
        moved = threshold - jax.lax.stop_gradient(threshold)  # 0, with the derivative 1
        height = 1 / self.bandwidth if self.bandwidth else 0.0  # a step of no width has no derivative
        return (distance > 0) & (pre > 0), height * near.astype(threshold.dtype) * moved

    def _finite(self):
        """Thresholds with ±∞ replaced by 0: ∞ − ∞ would be NaN in the straight-through term."""
        threshold = jnp.asarray(self.threshold)
        return jnp.where(jnp.isfinite(threshold), threshold, 0)

    def margin(self, pre: Float[Array, "*b m"]) -> Float[Array, "*b m"]:
        """`pre − θ`; latents with a margin of at most `t` are inactive in `at_margin(t)`."""
        pre, threshold = promote_dtypes(pre, self.threshold)  # which may be wider than the weights
        return pre - threshold

    def at_margin(self, t: float | Array) -> "JumpReLU":
        """The activation, thresholds moved so that exactly the positive latents with margin above `t` are active.

        All thresholds move by the same amount; scaling them by a common factor gave larger errors.
        """
        return dataclasses.replace(self, threshold=jnp.maximum(self.threshold + t, 0))

    def rescale(self, scale: float | Array) -> "JumpReLU":
        """The activation in other units; the bandwidth, used only in training, is unchanged."""
        return dataclasses.replace(self, threshold=self.threshold / scale)


@pytrees.dataclass
class Gated(Activation):
    """Choose the active latents with one bias, and compute their values with another bias and a scale.

        z = max(exp(r_mag) ∘ pre + b_mag, 0)   where pre + b_gate > 0

    Both share the encoder's weights. Only the gate is penalised, so values need not shrink. The gate has no derivative
    here; it is trained by the term `objectives.Gate`. `SAE.b_enc` is redundant with the two biases.

    Attributes:
      r_mag: `[m]`, log scale of the values relative to the gate.
      b_gate: `[m]`, bias of the gate.
      b_mag: `[m]`, bias of the values.

    Example:
      >>> import jax.numpy as jnp, jaxsae
      >>> jaxsae.Gated(jnp.zeros(2), jnp.zeros(2), jnp.ones(2))(jnp.array([-0.5, 0.5]))
      Array([0. , 1.5], dtype=float32)

    Source: Rajamanoharan et al. (2024), "Improving dictionary learning with gated sparse autoencoders".
    """

    r_mag: Float[Array, " m"] = pytrees.sharded("latent")
    b_gate: Float[Array, " m"] = pytrees.sharded("latent")
    b_mag: Float[Array, " m"] = pytrees.sharded("latent")

    def __call__(self, pre: Float[Array, "*b m"]) -> Float[Array, "*b m"]:
        """The dense code."""
        gate = self.gate(pre)
        # The derivative of an inactive latent would be 0 · exp(r_mag), which is NaN where exp overflows.
        r_mag = jnp.where(gate > 0, self.r_mag, jnp.minimum(self.r_mag, 0))
        return _past(0, gate, jnp.exp(r_mag) * pre + self.b_mag)

    def gate(self, pre: Float[Array, "*b m"]) -> Float[Array, "*b m"]:
        """The gate `pre + b_gate`: a latent is active only where it is positive."""
        return pre + self.b_gate

    def rescale(self, scale: float | Array) -> "Gated":
        """The activation in other units."""
        return dataclasses.replace(self, b_gate=self.b_gate / scale, b_mag=self.b_mag / scale)
