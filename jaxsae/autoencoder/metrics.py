"""Measurements of codes, as sums that add: the metric of two halves, added, is the metric of the whole.

Each metric is a pytree of sums made by one function of a batch; `a + b` merges, and properties turn sums into numbers.
Sums are in float32 or better, whatever is measured, and beside each is what rounding left out of it: counts are exact,
and a million batches add up as ten do. Ratios have no unit, and are NaN where they are not defined.
"""

import dataclasses
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float

from jaxsae import codes, sharding
from jaxsae._core import pytrees, sparse
from jaxsae._core.linalg import promoted, ratio, widen
from jaxsae.autoencoder.sae import SAE, Fit, reconstruct, to_fit
from jaxsae.autoencoder.sums import _added, _exact, _rest, _Sums, _two_sum, _unit
from jaxsae.codes import SparseCode


@pytrees.dataclass
class Moments(_Sums):
    """Count, mean and spread of rows; merged so that a mean far from zero costs no digits.

    Attributes:
      rows: how many rows.
      mean: `[d]`.
      spread: `Σ ‖x − mean‖²` over the rows, in units of `unit²`; exactly 0 if all are equal.
      unit: a power of two: 1, unless rows are so large or small that their squares are no numbers.
      rest: what rounding left out of each.

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
    """The moments of a batch, or of the rows of it to `keep`.

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
    # From the least of each column, so that rows that are equal have a mean which is that row exactly.
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
        """`1 − Var(x − x̂) / Var(x)`; a constant offset costs nothing here, and does in `nmse`."""
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
    """How well the largest latents of each row alone reconstruct it, for several numbers of them.

    Attributes:
      parts: a `Reconstruction` for each number.
    """

    parts: tuple[Reconstruction, ...]

    @property
    def nmse(self) -> Float[Array, " n"]:
        """As of `Reconstruction`, for each number."""
        return jnp.stack([part.nmse for part in self.parts])


def progressive(sae: SAE, x: Float[Array, "*b d"], code: SparseCode, keep: Sequence[int]) -> Progressive:
    """Measure a code cut down to its largest values.

    Args:
      sae: the autoencoder.
      x: activations `[*b d]`.
      code: `[*b k]`, its slots in descending order of magnitude, as `encode` makes them.
      keep: numbers of latents.

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
    """Which latents fire, and how often.

    Attributes:
      rows: how many rows.
      fired: `[m]`, on how many of them each latent is not zero.
      rest: what rounding left out of each.
    """

    rows: Float[Array, ""]
    fired: Float[Array, " m"]
    rest: dict[str, Array] = _rest()

    def _plus(self, other: Any) -> Any:
        return Activity(**_added(self, other, ["rows", "fired"]))

    @property
    def l0(self) -> Float[Array, ""]:
        """Mean number of active latents a row."""
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
        """How many latents fire on no row, on 1, on 2 or 3, on 4 to 7 …, each range twice as long."""
        return np.bincount(np.frexp(np.asarray(self.fired))[1]).tolist()


def activity(code: SparseCode) -> Activity:
    """Count the rows on which each latent is active. Rows with NaN or Inf are left out.

    Args:
      code: `[*b k]`, no index twice in a row.

    Example:
      >>> import jax.numpy as jnp, jaxsae
      >>> code = jaxsae.codes.from_dense(jnp.array([[0.0, 2.0, 1.0], [0.0, 3.0, 0.0]]), capacity=2)
      >>> jaxsae.metrics.activity(code).density
      Array([0. , 1. , 0.5], dtype=float32)
    """
    keep = sparse.finite_rows(code.values, code.indices, code.num_latents)
    active = code.mask & (code.values != 0) & keep[..., None]
    dtype = promoted(code.values.dtype, jnp.float32)
    fired = codes.sum_by_latent(dataclasses.replace(code, values=active.astype(dtype)))
    return Activity(**_exact({"rows": jnp.sum(keep, dtype=dtype), "fired": fired}))


def _by_latent(code: SparseCode, active: Bool[Array, "*b k"], weights: Float[Array, "*b k"]) -> Float[Array, " m"]:
    """The sum of each latent's weights, over the slots that are active."""
    return codes.sum_by_latent(dataclasses.replace(code, values=jnp.where(active, weights, 0)))


# A latent is dead if it fires on none of this many rows, or of all if there are fewer: on few rows most are inactive.
DEAD_ROWS = 100_000

# Edges of the histogram of refined/original, eight bins for each factor of two; what lies outside, zeros on the left,
# is counted in the bin at the end.
RATIO_EDGES = 2.0 ** np.linspace(-4, 6, 81)


@pytrees.dataclass
class Shrinkage(_Sums):
    """What refinement did to the active values of a code; add to merge, print as a table.

    "Before" are the encoder's values and "after" the refined ones, over the slots on the support with a value before.

    Attributes:
      data: moments of `x`.
      error_before, error_after: `Σ‖x − x̂‖²`; like the next ones in units of `data.unit²`.
      sq_norm_before, sq_norm_after: `Σ‖x̂ − b_dec‖²`.
      inner_product_before, inner_product_after: `Σ⟨x − b_dec, x̂ − b_dec⟩`.
      count: `[m]`, how many active values each latent has.
      before, after: `[m]`, their sums.
      num_increased: how many values rose.
      ratio_histogram: `[80]`, of refined/original over `RATIO_EDGES`: left of the middle falls, right of it rises.
      rest: what rounding left out of each.

    Example:
      >>> import jax.numpy as jnp, jaxsae
      >>> sae = jaxsae.SAE(jnp.eye(2), jnp.array([-1.0, 0.0]), jnp.eye(2), jnp.zeros(2), jaxsae.ReLU())
      >>> x = jnp.array([[3.0, 1.0], [2.0, 4.0]])
      >>> code = jaxsae.encode(sae, x, capacity=2)
      >>> refined = code.replace(values=code.values + (code.indices == 0))
      >>> print(jaxsae.shrinkage(sae, x, code, refined))
                          before     after    change
      mean activation     2.0000    2.5000    +25.0%
      NMSE                0.4000    0.0000   -100.0%
      γ                   0.8800    1.0000    +13.6%
      50.0% of 4 active values rise,
      2.0 a row over 2 rows
    """

    data: Moments
    error_before: Float[Array, ""]
    error_after: Float[Array, ""]
    sq_norm_before: Float[Array, ""]
    sq_norm_after: Float[Array, ""]
    inner_product_before: Float[Array, ""]
    inner_product_after: Float[Array, ""]
    count: Float[Array, " m"]
    before: Float[Array, " m"]
    after: Float[Array, " m"]
    num_increased: Float[Array, ""]
    ratio_histogram: Float[Array, " bins"]
    rest: dict[str, Array] = _rest()

    def _plus(self, other: Any) -> Any:
        data = self.data._plus(other.data)
        squares = [f"{name}_{when}" for name in ("error", "sq_norm", "inner_product") for when in ("before", "after")]
        counts = ["count", "before", "after", "num_increased", "ratio_histogram"]
        scales = (self.data.unit / data.unit) ** 2, (other.data.unit / data.unit) ** 2
        first, second = _added(self, other, squares, scales), _added(self, other, counts)
        return Shrinkage(data=data, **(first | second | {"rest": first["rest"] | second["rest"]}))

    @property
    def l0(self) -> Float[Array, ""]:
        """Mean number of active latents a row, before."""
        return ratio(jnp.sum(self.count), self.data.rows)

    @property
    def nmse_before(self) -> Float[Array, ""]:
        """`Σ‖x − x̂‖² / Σ‖x − x̄‖²` with the encoder's values."""
        return ratio(self.error_before, self.data.spread)

    @property
    def nmse_after(self) -> Float[Array, ""]:
        """`Σ‖x − x̂‖² / Σ‖x − x̄‖²` with the refined values."""
        return ratio(self.error_after, self.data.spread)

    @property
    def mean_before(self) -> Float[Array, ""]:
        """Mean active value, before."""
        return ratio(jnp.sum(self.before), jnp.sum(self.count))

    @property
    def mean_after(self) -> Float[Array, ""]:
        """Mean active value on the same slots, after."""
        return ratio(jnp.sum(self.after), jnp.sum(self.count))

    @property
    def mean_change(self) -> Float[Array, ""]:
        """Relative change of the mean active value; positive is shrinkage undone."""
        return ratio(self.mean_after, self.mean_before) - 1

    @property
    def share_increased(self) -> Float[Array, ""]:
        """Share of the active values that rise."""
        return ratio(self.num_increased, jnp.sum(self.count))

    @property
    def ratio(self) -> Float[Array, " m"]:
        """Refined over original, latent by latent; NaN for latents that never fired."""
        return ratio(self.after, self.before)

    @property
    def gamma_before(self) -> Float[Array, ""]:
        """`γ = Σ‖x̂ − b‖² / Σ⟨x − b, x̂ − b⟩`; below 1 is shrinkage."""
        return ratio(self.sq_norm_before, self.inner_product_before)

    @property
    def gamma_after(self) -> Float[Array, ""]:
        """`γ` with the refined values: 1, by complementarity, if the refit is exact."""
        return ratio(self.sq_norm_after, self.inner_product_after)

    def numbers(self) -> dict[str, float]:
        """The summary as plain numbers, NaN where nothing was active."""
        names = ("l0", "nmse_before", "nmse_after", "mean_before", "mean_after", "mean_change")
        values = {name: float(getattr(self, name)) for name in (*names, "gamma_before", "gamma_after")}
        return values | {"rising": float(self.share_increased)}

    def __str__(self) -> str:
        rows = [
            ("mean activation", self.mean_before, self.mean_after),
            ("NMSE", self.nmse_before, self.nmse_after),
            ("γ", self.gamma_before, self.gamma_after),
        ]
        lines = [f"{'':16}{'before':>10}{'after':>10}{'change':>10}"]
        lines += [f"{name:16}{float(a):10.4f}{float(b):10.4f}{float(b / a - 1):+10.1%}" for name, a, b in rows]
        lines.append(f"{float(self.share_increased):.1%} of {float(jnp.sum(self.count)):.0f} active values rise, ")
        return "\n".join(lines) + f"{float(self.l0):.1f} a row over {float(self.data.rows):.0f} rows"


def shrinkage(
    sae: SAE,
    x: Float[Array, "*b d"],
    code: SparseCode,
    refined: SparseCode,
    *,
    target: Float[Array, "*b d_out"] | None = None,
) -> Shrinkage:
    """Measure how refinement moved the values of a code. Rows with NaN or Inf are left out.

    Args:
      sae: the autoencoder.
      x: activations `[*b d]`.
      code: the encoder's code of them, `[*b k]`.
      refined: the same support, refined.
      target: `[*b d_out]`, what was to be reconstructed; `x` itself by default, but in transcoders.

    Returns:
      `Shrinkage`: add those of several batches to merge them, `print` it as a table.

    Raises:
      ValueError: at trace time, if the two codes differ in shape.

    Example:
      >>> import jax, jaxsae
      >>> sae = jaxsae.init(jax.random.key(0), d=8, m=32, activation=jaxsae.TopK(4))
      >>> x = jax.random.normal(jax.random.key(1), (64, 8))
      >>> code = jaxsae.encode(sae, x)
      >>> refined, info = jaxsae.refine(sae, x, code)
      >>> measured = jaxsae.shrinkage(sae, x, code, refined)
      >>> bool(measured.nmse_after < measured.nmse_before), bool(abs(measured.gamma_after - 1) < 1e-3)
      (True, True)

    Source: Gao et al. (2024), Section 5.1; γ is the "relative reconstruction bias" of Rajamanoharan et al. (2024).
    """
    if code.values.shape != refined.values.shape:
        raise ValueError(
            f"`shrinkage` got a code of shape {code.values.shape} and a refined one of {refined.values.shape}; pass "
            "the refinement of that very code."
        )
    x, target = widen((x, target))
    measured = sharding.automatic(_shrinkage)
    return measured(sae.W_dec, to_fit(sae, x, target), x if target is None else target, code, refined)


@jax.jit
def _shrinkage(W_dec, fit: Fit, x, code: SparseCode, refined: SparseCode) -> Shrinkage:
    keep = jnp.isfinite(x).all(-1)
    for each in (code, refined):
        keep &= sparse.finite_rows(each.values, each.indices, each.num_latents)
    code, refined = (dataclasses.replace(each, values=widen(each.values)) for each in (code, refined))
    scale = 1 if fit.scale is None else fit.scale  # errors are in the units of the rows

    def kept(x):
        return jnp.where(keep[..., None], x, 0)

    x, target = kept(x), kept(scale * fit.y)
    x_hats = [kept(scale * codes.decode(W_dec, each)) for each in (code, refined)]
    unit = _unit(x, target, *x_hats)
    squares = {}
    for when, x_hat in zip(("before", "after"), x_hats, strict=True):
        y, y_hat = target / unit, x_hat / unit
        squares[f"error_{when}"] = jnp.sum((y - y_hat) ** 2)
        squares[f"sq_norm_{when}"], squares[f"inner_product_{when}"] = jnp.sum(y_hat**2), jnp.sum(y * y_hat)
    active = code.mask & (code.values != 0) & keep[..., None]
    before, after = (jnp.where(active, each.values, 0).astype(target.dtype) for each in (code, refined))
    bins = len(RATIO_EDGES) - 1
    changes = jnp.where(active, after, 1) / jnp.where(active, before, 1)
    # `floor` keeps the edge at 1 exact: a fall, however small, is left of it.
    slot = jnp.floor(8 * jnp.log2(jnp.maximum(changes, float(RATIO_EDGES[0])))) + 32
    slot = jnp.where(active, jnp.clip(slot, 0, bins - 1), bins).astype(jnp.int32)
    counts = {
        "count": _by_latent(code, active, jnp.ones_like(before)),
        "before": _by_latent(code, active, before),
        "after": _by_latent(code, active, after),
        "num_increased": jnp.sum(after > before, dtype=before.dtype),
        "ratio_histogram": jnp.zeros(bins, before.dtype).at[slot.ravel()].add(1, mode="drop"),
    }
    data = _moments(x.reshape(-1, x.shape[-1]), keep.reshape(-1), unit)
    return Shrinkage(data=data, **_exact(squares | counts))
