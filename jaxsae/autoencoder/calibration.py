"""Fitted to samples of rows: how often latents fire, thresholds for a target L0, and a factor for each latent."""

import dataclasses
import functools
import math
import operator
from collections.abc import Iterable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import PartitionSpec
from jaxtyping import Array, Float

from jaxsae import codes, sharding
from jaxsae._core.linalg import divide, widen
from jaxsae.autoencoder import metrics
from jaxsae.autoencoder.activations import MatchingPursuit
from jaxsae.autoencoder.refinement import to_fit
from jaxsae.autoencoder.sae import SAE, encode, encode_dense, pre_activations
from jaxsae.codes import SparseCode

_LEFT_OUT = 11  # low bits dropped from the 32 of a float: bins have a relative width of 2⁻¹²
_BINS = 1 << (32 - _LEFT_OUT)


def activity(sae: SAE, batches: Iterable[Float[Array, "b d"] | np.ndarray]) -> metrics.Activity:
    """Count how often each latent fires, a batch at a time; nothing is decoded.

    Args:
      sae: the autoencoder.
      batches: arrays of rows `[b d]`, at least one; rows with NaN or Inf are left out.

    Example:
      >>> import jaxsae
      >>> sae = jaxsae.SAE(jnp.eye(2), jnp.zeros(2), jnp.eye(2), jnp.zeros(2), jaxsae.ReLU())
      >>> found = activity(sae, [np.array([[1.0, -1.0]]), np.array([[2.0, -3.0], [np.nan, 1.0]])])
      >>> found.rows, found.dead
      (Array(2., dtype=float32), Array(0.5, dtype=float32))
    """
    return functools.reduce(operator.add, (_activity(sae, jnp.asarray(x, jnp.float32)) for x in batches))


@jax.jit
def _activity(sae: SAE, x) -> metrics.Activity:
    finite = jnp.isfinite(x).all(-1)
    if sae.activation.slots is None:
        active = encode_dense(sae, jnp.where(finite[:, None], x, 0)) != 0
        fired = jnp.sum(active & finite[:, None], axis=0, dtype=jnp.float32)
    else:
        code = encode(sae, jnp.where(finite[:, None], x, 0))
        code = dataclasses.replace(code, values=jnp.where(finite[:, None], code.values, 0))
        fired = metrics.activity(code).fired
    return sharding.replicate(metrics.Activity(jnp.sum(finite, dtype=jnp.float32), fired))


def calibrate(sae: SAE, batches: Iterable[Float[Array, "b d"] | np.ndarray], l0: float) -> SAE:
    """Move the thresholds together so that the mean number of active latents per row is `l0`.

    One pass: the margins of all latents and rows are counted in bins of relative width 2⁻¹², and the new thresholds lie
    at the edge of a bin. So the result does not depend on the order of the rows or on how they are batched.

    Args:
      sae: with `BatchTopK`, whose threshold is replaced; `JumpReLU`, whose thresholds are shifted by one number; or
        `MatchingPursuit`, whose number of steps is, to the one with the nearest L0.
      batches: arrays of rows `[b d]`; rows with NaN or Inf are left out.
      l0: target mean number of active latents per row.

    Raises:
      NotImplementedError: if the activation has no thresholds.
      ValueError: if `l0` is not between 0 and `m`, or no row is finite.

    Example:
      >>> import jaxsae
      >>> sae = jaxsae.init(jax.random.key(0), d=16, m=64, activation=jaxsae.BatchTopK(4))
      >>> x = jax.random.normal(jax.random.key(1), (256, 16))
      >>> calibrated = calibrate(sae, [x[:100], x[100:]], 4.0)
      >>> bool(abs(jaxsae.encode(calibrated, x, capacity=64).l0.mean() - 4) < 0.01)
      True
    """
    if not 0 < l0 <= sae.m:
        raise ValueError(f"`calibrate` got l0 = {l0} for {sae.m} latents; pass more than 0 and at most {sae.m}.")
    if isinstance(sae.activation, MatchingPursuit):
        return _calibrate_steps(sae, sae.activation, batches, l0)
    counts, rows = np.zeros(_BINS, np.int64), 0
    for x in batches:
        found, finite = _count(sae, jnp.asarray(x, jnp.float32))
        counts += np.asarray(found)
        rows += int(finite)
    if not rows:
        raise ValueError("`calibrate` got no finite rows; pass at least one.")
    occupied = np.flatnonzero(counts)[::-1]
    if not len(occupied):  # no latent is active at any threshold
        return sae
    chosen = occupied[np.argmin(np.abs(np.cumsum(counts[occupied]) - l0 * rows))]
    key = np.int32((int(chosen) - _BINS // 2) << _LEFT_OUT)
    edge = (key ^ (key >> 31 & np.int32(0x7FFFFFFF))).view(np.float32)
    below = jnp.asarray(np.nextafter(edge, np.float32(-np.inf)))  # values in the bin are active too
    return dataclasses.replace(sae, activation=sae.activation.at_margin(below))


def _calibrate_steps(sae: SAE, activation: MatchingPursuit, batches: Iterable, l0: float) -> SAE:
    most = 4 * math.ceil(l0)  # atoms may be taken again
    longer = dataclasses.replace(activation, max_steps=most)
    total, rows = np.zeros(most), 0
    for x in batches:
        x = np.asarray(sharding.replicate(jnp.asarray(x)))
        x = x[np.isfinite(x).all(axis=1)]
        total += len(x) * np.asarray(_l0_by_step(dataclasses.replace(sae, activation=longer), jnp.asarray(x)))
        rows += len(x)
    if not rows:
        raise ValueError("`calibrate` got no finite rows; pass at least one.")
    steps = 1 + int(np.argmin(np.abs(total / rows - l0)))
    return dataclasses.replace(sae, activation=dataclasses.replace(longer, max_steps=steps))


@jax.jit
def _l0_by_step(sae: Any, x) -> Array:
    return sae.activation.l0_by_step(x - sae.b_dec, sae.W_dec)


@jax.jit
def _count(sae: SAE, x):
    """Histogram of the margins of finite rows, in ascending bins by sign, exponent and first bits."""
    finite = jnp.isfinite(x).all(-1)
    pre = pre_activations(sae, jnp.where(finite[:, None], x, 0))
    margin = sae.activation.margin(pre).astype(jnp.float32)
    bits = jax.lax.bitcast_convert_type(margin, jnp.int32)
    key = bits ^ (bits >> 31 & 0x7FFFFFFF)  # ordered as the floats are
    counted = finite[:, None] & (pre > 0) & jnp.isfinite(margin)
    bins = jnp.where(counted, (key >> _LEFT_OUT) + _BINS // 2, _BINS)
    return sharding.replicate((_histogram(bins), jnp.sum(finite)))


def _histogram(bins):
    """How often each bin occurs in `[n m]`, of which each device counts its own part."""
    is_split, rows = sharding.is_sharded(bins.shape[-1]), sharding.rows_spec(bins)

    def here(bins):
        counts = jnp.zeros(_BINS, jnp.int32).at[bins.ravel()].add(1, mode="drop")
        total = jax.lax.psum(counts, sharding.axis("latent")) if is_split else counts
        return sharding.sum_rows(total, rows)

    spec = PartitionSpec(*(rows or (None,)), sharding.axis("latent"))
    return sharding.shard_map(here, spec, PartitionSpec())(bins) if is_split else here(bins)


def latent_factors(
    sae: SAE,
    x: Float[Array, "n d"],
    code: SparseCode,
    *,
    target: Float[Array, "n d_out"] | None = None,
    ridge: float = 0.01,
    steps: int = 100,
) -> Float[Array, " m"]:
    """One factor for each latent, by which its values are multiplied wherever it is active: the cheap refinement.

        minimise_f Σ ‖y − Σ_j f_j z_j a_j‖² + ridge s̄ Σ_j (f_j − 1)²,   y = x − b_dec,   s̄ = mean_j Σ z_j² ‖a_j‖²

    summed over rows; without the ridge, a latent that is rare and small on these rows may get a factor of hundreds,
    which is wrong on others.

    Unlike `refine`, it needs no solve at inference: `sae.replace(W_dec=f[:, None] * sae.W_dec)` has the factors in its
    atoms. By conjugate gradient, preconditioned by the diagonal, from factors of 1; a latent that is not active on
    these rows keeps the factor 1.

    Args:
      sae: the autoencoder; if it normalises each row, errors are in the units of the normalised rows.
      x: rows `[n d]`, such as those it was trained on.
      code: their code, `[n k]`.
      target: `[n d_out]`, what to reconstruct; `x` by default, required for transcoders.
      ridge: weight of the distance from 1.
      steps: of conjugate gradient.

    Returns:
      `[m]`, in float32 or better.

    Example:
      >>> import jaxsae
      >>> sae = jaxsae.SAE(jnp.eye(2), -0.5 * jnp.ones(2), jnp.eye(2), jnp.zeros(2), jaxsae.ReLU())
      >>> x = jnp.array([[1.0, 0.0], [0.0, 2.0]])
      >>> factors = latent_factors(sae, x, jaxsae.encode(sae, x, capacity=2), ridge=0.0)
      >>> [round(float(factor), 2) for factor in factors]
      [2.0, 1.33]

    Source: Wright & Sharkey (2024), "Addressing feature suppression in SAEs", who train such factors.
    """
    return _latent_factors(sae.W_dec, to_fit(sae, x, target).y, code, ridge, steps=steps)


@functools.partial(jax.jit, static_argnames="steps")
def _latent_factors(W_dec, y, code: SparseCode, ridge, *, steps: int) -> Array:
    z = dataclasses.replace(code, values=widen(code.values))

    def scaled(f):
        return dataclasses.replace(z, values=z.values * jnp.append(f, 0)[jnp.minimum(z.indices, z.num_latents)])

    def summed(r):  # the transpose of f ↦ decode(scaled(f))
        return jnp.sum(codes.scatter_add(z, r) * W_dec, axis=1)

    squares = codes.sum_by_latent(dataclasses.replace(z, values=z.values**2)) * jnp.sum(widen(W_dec) ** 2, axis=1)
    ones = jnp.ones_like(squares)
    change, _ = jax.scipy.sparse.linalg.cg(
        lambda f: summed(codes.decode(W_dec, scaled(f))) + ridge * jnp.mean(squares) * f,
        summed(widen(y) - codes.decode(W_dec, z)),
        M=lambda r: divide(r, jnp.where(squares > 0, squares + ridge * jnp.mean(squares), 1)),
        tol=1e-6,
        maxiter=steps,
    )
    return ones + jnp.where(squares > 0, change, 0)
