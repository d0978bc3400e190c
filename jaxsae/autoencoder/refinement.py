"""Refinement of a code: what the decoder should fit, and the best values on the encoder's support."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from jaxsae._core.linalg import promote_dtypes
from jaxsae.autoencoder.sae import SAE, _floating, _restores, _validate, encode
from jaxsae.codes import SparseCode
from jaxsae.least_squares import certificate, problems
from jaxsae.least_squares.certificate import Certificate
from jaxsae.least_squares.outcome import RefitInfo
from jaxsae.least_squares.refit import refit
from jaxsae.least_squares.solvers import Solver


class Fit(NamedTuple):
    """The target of `z W_dec`, per row.

    Attributes:
      y: `[*b d_out]`; the reconstruction equals the target where `z W_dec = y`.
      scale: `[*b 1]`, factor from the units of `y` to those of the target, or None for 1.
    """

    y: Float[Array, "*b d_out"]
    scale: Float[Array, "*b 1"] | None = None


def to_fit(sae: SAE, x: Float[Array, "*b d"], target: Float[Array, "*b d_out"] | None = None) -> Fit:
    """Remove bias, skip connection and normalisation from a target, which leaves what `z W_dec` should fit.

        y = (target − x W_skip − shift) / scale − b_dec

    Args:
      sae: the autoencoder.
      x: activations `[*b d]`.
      target: `[*b d_out]`, what to reconstruct; `x` by default, required for transcoders.

    Raises:
      ValueError: if a transcoder gets no target.

    Example:
      >>> import jax, jax.numpy as jnp, jaxsae
      >>> sae = jaxsae.init(jax.random.key(0), d=2, m=4, activation=jaxsae.ReLU(), b_dec=jnp.ones(2))
      >>> jaxsae.autoencoder.to_fit(sae, jnp.array([3.0, 4.0])).y
      Array([2., 3.], dtype=float32)
    """
    if target is None:
        if sae.transcoder:
            raise ValueError("got a transcoder and no target; pass target, what it is to reconstruct from x.")
        target = x
    return _to_fit(sae, _validate(sae, x, "to_fit"), _floating(target, "to_fit", "a target"))


@jax.jit
def _to_fit(sae: SAE, x, target) -> Fit:
    scale = None
    if sae.W_skip is not None:
        target = target - x @ sae.W_skip
    if sae.normalisation is not None and _restores(sae):
        _, scale, shift = sae.normalisation(x)
        target = target if shift is None else target - shift
        # A row with zero spread equals its mean, whatever the code.
        target = target if scale is None else jnp.where(scale == 0, 0, target / jnp.where(scale == 0, 1, scale))
    target, b_dec = promote_dtypes(target, sae.b_dec)
    return Fit(target - b_dec, scale)


def refine(
    sae: SAE,
    x: Float[Array, "*b d"],
    code: SparseCode | None = None,
    solver: Solver | None = None,
    *,
    capacity: int | None = None,
    target: Float[Array, "*b d_out"] | None = None,
) -> tuple[SparseCode, RefitInfo]:
    """Refine a code: keep the encoder's support, and optimise the values for reconstruction with a fixed decoder.

        minimise_z ‖x − (z W_dec + b_dec)‖²   over z ≥ 0 on the support

    Increases of values measure the shrinkage of the encoder's estimates. For activations with values of both signs,
    the sign is free.

    Args:
      sae: the autoencoder.
      x: activations `[*b d]`.
      code: support and starting values; `encode(sae, x, capacity=capacity)` by default.
      solver: any pytree of `solvers.py`; `solvers.default(k, d)` if None.
      capacity: slots per row, if `code` is None and the activation does not fix it.
      target: `[*b d_out]`, what to reconstruct; `x` by default, required for transcoders.

    Returns:
      The refined code and `RefitInfo`; `jaxsae.check` raises on the host if a row failed. See `refit` for the
      guarantees per row, and for the derivative.

    Raises:
      TypeError, ValueError: at trace time, if the arguments do not fit together.

    Example:
      >>> import jax, jax.numpy as jnp, jaxsae
      >>> sae = jaxsae.init(jax.random.key(0), d=4, m=8, activation=jaxsae.TopK(2))
      >>> x = jax.random.normal(jax.random.key(1), (3, 4))
      >>> refined, info = jaxsae.refine(sae, x)
      >>> bool((info.kkt <= 1e-5).all())
      True

    Source: Gao et al. (2024), "Scaling and evaluating sparse autoencoders", Section 5.1.
    """
    x = _validate(sae, x, "refine")
    y, _ = to_fit(sae, x, target)
    if code is None:
        code = encode(sae, x, capacity=capacity)
    return refit(sae.W_dec, y, code, solver, nonnegative=not sae.activation.signed)


def certify(
    dictionary_or_sae: Float[Array, "m d"] | problems.Dictionary | SAE,
    y: Float[Array, "*b d"],
    code: SparseCode,
    *,
    nonnegative: bool | None = None,
    ridge: float | Float[Array, ""] = 0.0,
    target: Float[Array, "*b d_out"] | None = None,
) -> Certificate:
    """Certify a code's values on its support, on a dictionary or as the refinement of an autoencoder's code.

    For an autoencoder, `y` are activations as `refine` takes them: what a bias, a skip connection and a normalisation
    add is removed from the target, and the bounds are those of `least_squares.certify` on `W_dec` for the rest.

    Args:
      dictionary_or_sae: `[m d]`, one atom per row, any pytree with `take`, or an autoencoder.
      y: targets, or an autoencoder's activations, `[*b d]`.
      code: `[*b k]`.
      nonnegative: whether the constraint is `z ≥ 0`; by default it is, unless an activation has values of both signs.
      ridge: weight of `½‖z‖²`, as for `refit`.
      target: `[*b d_out]`, what a code of an autoencoder is to reconstruct; `y` by default, required for transcoders.

    Returns:
      `Certificate`, `[*b]` in float32 or better; NaN where a row is not finite.

    Raises:
      ValueError, TypeError: at trace time, if the arguments do not fit together.

    Example:
      >>> import jax, jaxsae
      >>> sae = jaxsae.init(jax.random.key(0), d=4, m=8, activation=jaxsae.TopK(2))
      >>> x = jax.random.normal(jax.random.key(1), (3, 4))
      >>> refined, info = jaxsae.refine(sae, x)
      >>> bool((jaxsae.certify(sae, x, refined).gap <= 1e-6).all())
      True

    Source: Boyd & Vandenberghe (2004), "Convex optimization", Section 5.5: duality gaps and KKT conditions.
    """
    if not isinstance(dictionary_or_sae, SAE):
        if target is not None:
            raise TypeError("`certify` got a dictionary and a target; pass the target as y.")
        nonnegative = True if nonnegative is None else nonnegative
        return certificate.certify(dictionary_or_sae, y, code, nonnegative=nonnegative, ridge=ridge)
    sae = dictionary_or_sae
    fit, _ = to_fit(sae, _validate(sae, y, "certify"), target)
    nonnegative = not sae.activation.signed if nonnegative is None else nonnegative
    return certificate.certify(sae.W_dec, fit, code, nonnegative=nonnegative, ridge=ridge)
