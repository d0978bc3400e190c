"""Metrics of codes, as mergeable sums: the metrics of two halves add up to the metric of the whole.

Each metric is a pytree of sums computed from a batch by one function; `a + b` merges two, and properties derive ratios.
Sums are in float32 or better with compensated rounding, so that counts are exact and a million batches are summed as
accurately as ten. Ratios are dimensionless, and NaN where they are undefined.
"""

import dataclasses
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float

from jaxsae import codes
from jaxsae._core import pytrees, sparse
from jaxsae._core.linalg import ratio, result_type, widen
from jaxsae.autoencoder.sae import SAE, reconstruct
from jaxsae.autoencoder.sums import _added, _exact, _rest, _Sums, _two_sum, _unit
from jaxsae.codes import SparseCode


@pytrees.dataclass
class Moments(_Sums):
    """Count, mean and spread of rows, merged without loss of precision where the mean is far from zero.

    Attributes:
      rows: number of rows.
      mean: `[d]`.
      spread: `Σ ‖x − mean‖²` over the rows, in units of `unit²`; exactly 0 if all are equal.
      unit: a power of two: 1, unless rows are so large or small that their squares overflow or underflow.
      rest: rounding errors of the fields.

    Source: Chan, Golub & LeVeque (1979), "Updating formulae and a pairwise algorithm for computing sample variances".
    """

    rows: Float[Array, ""]
    mean: Float[Array, " d"]
    spread: Float[Array, ""]
    unit: Float[Array, ""] | float = 1.0
    rest: dict[str, Array] = _rest()

    def _plus(self, other: Any) -> Any:
        unit = jnp.maximum(self.unit, other.unit)
        rows = self.rows + other.rows
        step = (other.mean - self.mean) + (other.rest.get("mean", 0.0) - self.rest.get("mean", 0.0))
        share = other.rows / jnp.maximum(rows, 1)
        mean, mean_rest = _two_sum(self.mean, share * step, self.rest.get("mean", 0.0))
        count = _added(self, other, ["rows"])
        within = _added(self, other, ["spread"], ((self.unit / unit) ** 2, (other.unit / unit) ** 2))
        between = self.rows * share * jnp.sum((step / unit) ** 2)
        spread, spread_rest = _two_sum(within["spread"], between, within["rest"]["spread"])
        rest = count["rest"] | {"mean": mean_rest, "spread": spread_rest}
        return Moments(count["rows"], mean, spread, unit, rest)

    @property
    def squares(self) -> Float[Array, ""]:
        """`Σ ‖x‖²` over the rows, in units of `unit²`."""
        return self.spread + self.rows * jnp.sum((self.mean / self.unit) ** 2)


def moments(x: Float[Array, "*b d"], keep: Bool[Array, "*b"] | None = None) -> Moments:
    """Compute the moments of a batch, or of its rows marked by `keep`.

    Args:
      x: `[*b d]`.
      keep: `[*b]`, which rows count; all by default.

    Example:
      >>> import jax.numpy as jnp, jaxsae
      >>> jaxsae.metrics.moments(jnp.array([[0.0], [2.0]])).spread
      Array(2., dtype=float32)
    """
    x = widen(x.reshape(-1, x.shape[-1]))
    keep = jnp.ones(x.shape[0], bool) if keep is None else keep.reshape(-1)
    return _moments(x, keep, _unit(jnp.where(keep[:, None], x, 0)))


def _moments(x: Float[Array, "n d"], keep: Bool[Array, " n"], unit: Float[Array, ""]) -> Moments:
    rows = jnp.sum(keep, dtype=x.dtype)
    keep = keep[:, None]
    # Relative to the minimum of each column, so that the mean of equal rows is exactly that row.
    least = jnp.min(x, axis=0, where=keep, initial=jnp.inf)
    least = jax.lax.stop_gradient(jnp.where(rows > 0, least, 0))
    x = jnp.where(keep, (x - least) / unit, 0)
    mean = jnp.sum(x, axis=0) / jnp.maximum(rows, 1)
    spread = jnp.sum(jnp.where(keep, x - mean, 0) ** 2)
    return Moments(unit=unit, **_exact({"rows": rows, "mean": least + unit * mean, "spread": spread}))


@pytrees.dataclass
class Reconstruction(_Sums):
    """How well `x̂` reconstructs `x`.

    Attributes:
      data: moments of `x`.
      residual: moments of `x − x̂`.
    """

    data: Moments
    residual: Moments

    @property
    def nmse(self) -> Float[Array, ""]:
        """`Σ‖x − x̂‖² / Σ‖x − x̄‖²`: the error relative to predicting the mean `x̄` of the rows measured."""
        return ratio(self.residual.squares, self.data.spread) * self._units

    @property
    def explained_variance(self) -> Float[Array, ""]:
        """`1 − Var(x − x̂) / Var(x)`; ignores a constant offset, unlike `nmse`."""
        return 1 - ratio(self.residual.spread, self.data.spread) * self._units

    @property
    def _units(self) -> Float[Array, ""]:
        return jnp.square(self.residual.unit / self.data.unit)


def reconstruction(x: Float[Array, "*b d"], x_hat: Float[Array, "*b d"]) -> Reconstruction:
    """Measure a reconstruction; rows with NaN or Inf are left out.

    Args:
      x: activations `[*b d]`.
      x_hat: their reconstruction `[*b d]`.

    Returns:
      `Reconstruction`, with `nmse` and `explained_variance`.

    Example:
      >>> import jax.numpy as jnp, jaxsae
      >>> x = jnp.array([[0.0, 1.0], [2.0, 1.0]])
      >>> jaxsae.metrics.reconstruction(x, 0.5 * x).nmse
      Array(0.75, dtype=float32)
    """
    keep = jnp.isfinite(x).all(-1) & jnp.isfinite(x_hat).all(-1)
    return Reconstruction(moments(x, keep), moments(widen(x) - widen(x_hat), keep))


@pytrees.dataclass
class Progressive(_Sums):
    """How well only the largest latents of each row reconstruct it, for several numbers of latents.

    Attributes:
      parts: a `Reconstruction` for each number of latents.
    """

    parts: tuple[Reconstruction, ...]

    @property
    def nmse(self) -> Float[Array, " n"]:
        """`Reconstruction.nmse` for each number of latents."""
        return jnp.stack([part.nmse for part in self.parts])


def progressive(sae: SAE, x: Float[Array, "*b d"], code: SparseCode, keep: Sequence[int]) -> Progressive:
    """Measure a code truncated to its largest values.

    Args:
      sae: the autoencoder.
      x: activations `[*b d]`.
      code: `[*b k]`, slots in descending order of magnitude, as from `encode`.
      keep: numbers of latents to keep.

    Example:
      >>> import jax, jaxsae
      >>> sae = jaxsae.init(jax.random.key(0), d=4, m=16, activation=jaxsae.TopK(4))
      >>> x = jax.random.normal(jax.random.key(1), (64, 4))
      >>> nmse = jaxsae.metrics.progressive(sae, x, jaxsae.encode(sae, x), (1, 4)).nmse
      >>> nmse.shape
      (2,)

    Source: Gao et al. (2024), Section 5.2.
    """
    slots = jnp.arange(code.values.shape[-1])

    def cut(n: int) -> Reconstruction:
        first = dataclasses.replace(code, values=jnp.where(slots < n, code.values, 0))
        return reconstruction(x, reconstruct(sae, x, first))

    return Progressive(tuple(cut(n) for n in keep))


@pytrees.dataclass
class Activity(_Sums):
    """How often each latent fires.

    Attributes:
      rows: number of rows.
      fired: `[m]`, number of rows on which each latent is nonzero.
      rest: rounding errors of the fields.
    """

    rows: Float[Array, ""]
    fired: Float[Array, " m"]
    rest: dict[str, Array] = _rest()

    def _plus(self, other: Any) -> Any:
        return Activity(**_added(self, other, ["rows", "fired"]))

    @property
    def l0(self) -> Float[Array, ""]:
        """Mean number of active latents per row."""
        return ratio(jnp.sum(self.fired), self.rows)

    @property
    def density(self) -> Float[Array, " m"]:
        """Share of the rows on which each latent fires."""
        return ratio(self.fired, self.rows)

    @property
    def dead(self) -> Float[Array, ""]:
        """Share of the latents that never fire; NaN without rows."""
        return jnp.where(self.rows > 0, jnp.mean(self.fired == 0), jnp.nan)

    @property
    def log2_histogram(self) -> list[int]:
        """Number of latents that fire on 0 rows, 1, 2–3, 4–7 …, each range twice as long."""
        return np.bincount(np.frexp(np.asarray(self.fired))[1]).tolist()


def activity(code: SparseCode) -> Activity:
    """Count the rows on which each latent is active. Rows with NaN or Inf are left out.

    Args:
      code: `[*b k]`, with no index repeated within a row.

    Example:
      >>> import jax.numpy as jnp, jaxsae
      >>> code = jaxsae.codes.from_dense(jnp.array([[0.0, 2.0, 1.0], [0.0, 3.0, 0.0]]), capacity=2)
      >>> jaxsae.metrics.activity(code).density
      Array([0. , 1. , 0.5], dtype=float32)
    """
    keep = sparse.finite_rows(code.values, code.indices, code.num_latents)
    active = code.mask & (code.values != 0) & keep[..., None]
    dtype = result_type(code.values.dtype, jnp.float32)
    fired = codes.sum_by_latent(dataclasses.replace(code, values=active.astype(dtype)))
    return Activity(**_exact({"rows": jnp.sum(keep, dtype=dtype), "fired": fired}))


# Rows without firing after which a latent is dead (all rows, if there are fewer); on few rows most are inactive.
DEAD_ROWS = 100_000
