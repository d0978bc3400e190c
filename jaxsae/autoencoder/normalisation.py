"""Normalisation of an autoencoder's inputs: small pytrees that act row by row, before `b_dec` is subtracted.

Each maps rows `x [*b d]` to the encoder's inputs and their inverse, `x = scale · inputs + shift`, where a `scale` of 1
or a `shift` of 0 is None.
"""

import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.core import Tracer
from jaxtyping import Array, Float

from jaxsae._core import pytrees
from jaxsae._core.linalg import norms, power_of_two_or_one, widen


class Normalised(NamedTuple):
    """Rows in the units of an autoencoder.

    Attributes:
      inputs: `[*b d]`, the encoder's inputs.
      scale: `[*b 1]`, factor from these units to those of the rows, or None.
      shift: `[*b 1]`, added after scaling, or None.

    Example:
      >>> import jax.numpy as jnp
      >>> inputs, scale, shift = LayerNorm()(jnp.array([1.0, 3.0]))
      >>> bool(jnp.allclose(inputs * scale + shift, jnp.array([1.0, 3.0]), atol=1e-4))
      True
    """

    inputs: Float[Array, "*b d"]
    scale: Float[Array, "*b 1"] | None = None
    shift: Float[Array, "*b 1"] | None = None


class Normalisation:
    """Base class of normalisations; decorate subclasses with `pytrees.dataclass`.

    Attributes:
      per_row: whether the inverse depends on the row, so that a code alone does not determine its reconstruction.

    Example:
      >>> import jax.numpy as jnp
      >>> from jaxsae import pytrees
      >>> @pytrees.dataclass
      ... class Centred(Normalisation):
      ...     def __call__(self, x):
      ...         mean = jnp.mean(x, axis=-1, keepdims=True)
      ...         return Normalised(x - mean, shift=mean)
      >>> Centred()(jnp.array([1.0, 3.0])).inputs
      Array([-1.,  1.], dtype=float32)
    """

    per_row: bool = True

    def __call__(self, x: Float[Array, "*b d"]) -> Normalised:
        """Normalise rows."""
        raise NotImplementedError(f"{type(self).__name__} has no __call__; define what it does to rows.")

    def rescale(self, scale: float | Array) -> "Normalisation":
        """The normalisation in other units: it maps `x` to the inputs that this one gives for `scale · x`."""
        raise ValueError(f"{type(self).__name__} does not support a change of units; define rescale(self, scale).")


def _row(x):
    """Rows in float32 or better, each over a power of two that keeps squares in range, and the powers `[*b 1]`."""
    wide = widen(x)
    unit = power_of_two_or_one(jax.lax.stop_gradient(jnp.max(jnp.abs(wide), axis=-1, keepdims=True)))
    return wide / unit, unit


@pytrees.dataclass
class LayerNorm(Normalisation):
    """Subtract each row's mean and divide by its standard deviation: `(x − μ) / (σ + ε)`, inverted by `σ · x̂ + μ`.

    `σ` is the unbiased estimate (`d − 1` in the denominator), and `ε` is added to it, not to its square.

    Attributes:
      eps: `ε`; static.

    Example:
      >>> import jax.numpy as jnp
      >>> LayerNorm()(jnp.array([1.0, 3.0])).scale
      Array([1.4142135], dtype=float32)

    Source: Gao et al. (2024), Section 2.1; SAELens' `layer_norm`.
    """

    eps: float = pytrees.static(default=1e-5)

    def __call__(self, x: Float[Array, "*b d"]) -> Normalised:
        """Normalise rows."""
        row, unit = _row(x)
        least = jax.lax.stop_gradient(jnp.min(row, axis=-1, keepdims=True))  # so that equal numbers have spread 0
        mean = jnp.mean(row - least, axis=-1, keepdims=True)
        centred = row - least - mean
        deviation = norms(centred) / math.sqrt(max(x.shape[-1] - 1, 1))
        inputs = centred / (deviation + self.eps / unit)
        return Normalised(*(part.astype(x.dtype) for part in (inputs, deviation * unit, (least + mean) * unit)))

    def rescale(self, scale: float | Array) -> "LayerNorm":
        """The same with `ε / scale`, since `ε` is in the units of the rows."""
        if isinstance(scale, Tracer):
            raise ValueError("LayerNorm got a traced scale, but its eps is static; rescale outside of jit.")
        return LayerNorm(self.eps / float(scale))


@pytrees.dataclass
class ConstantNorm(Normalisation):
    """Each row scaled to norm `√d`: `x · √d / ‖x‖`. A row of zeros becomes NaN.

    Example:
      >>> import jax.numpy as jnp
      >>> ConstantNorm()(jnp.array([3.0, 4.0, 0.0, 0.0])).inputs
      Array([1.2, 1.6, 0. , 0. ], dtype=float32)

    Source: SAELens' `constant_norm_rescale`; OpenMOSS' `token-wise`.
    """

    def __call__(self, x: Float[Array, "*b d"]) -> Normalised:
        """Normalise rows."""
        row, unit = _row(x)
        scale = norms(row) / math.sqrt(x.shape[-1])
        return Normalised((row / scale).astype(x.dtype), (scale * unit).astype(x.dtype))

    def rescale(self, scale: float | Array) -> "ConstantNorm":
        """Return self: the result does not depend on the scale of the row."""
        del scale
        return self


@pytrees.dataclass
class AverageNorm(Normalisation):
    """Expect rows already scaled to a mean norm of `√d`; leave them unchanged.

    The scale depends on the data: `surgery.fold_scale(sae, √d / mean ‖x‖)` makes an SAE for unscaled rows.

    Example:
      >>> import jax.numpy as jnp
      >>> AverageNorm()(jnp.array([3.0, 4.0])).inputs
      Array([3., 4.], dtype=float32)

    Source: SAELens' `expected_average_only_in`.
    """

    per_row = False

    def __call__(self, x: Float[Array, "*b d"]) -> Normalised:
        """Return rows unchanged."""
        return Normalised(x)
