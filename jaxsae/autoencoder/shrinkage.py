"""How refinement changed the active values of a code, as mergeable sums: the shrinkage of the encoder."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float

from jaxsae import codes, sharding
from jaxsae._core import pytrees, sparse
from jaxsae._core.linalg import ratio, widen
from jaxsae.autoencoder.metrics import Moments, _moments
from jaxsae.autoencoder.refinement import Fit, to_fit
from jaxsae.autoencoder.sae import SAE
from jaxsae.autoencoder.sums import _added, _exact, _rest, _Sums, _unit
from jaxsae.codes import SparseCode

# Bin edges of the histogram of refined/original, eight bins per factor of two; values outside, such as 0, are counted
# in the outermost bins.
RATIO_EDGES = 2.0 ** np.linspace(-4, 6, 81)


@pytrees.dataclass
class Shrinkage(_Sums):
    """How refinement changed the active values of a code; add to merge, print as a table.

    "Before" are the encoder's values and "after" the refined ones, over the slots whose encoder value is nonzero.

    Attributes:
      data: moments of `x`.
      error_before, error_after: `Σ‖x − x̂‖²`, in units of `data.unit²`, as the next four.
      sq_norm_before, sq_norm_after: `Σ‖x̂ − b_dec‖²`.
      inner_product_before, inner_product_after: `Σ⟨x − b_dec, x̂ − b_dec⟩`.
      count: `[m]`, number of active values of each latent.
      before, after: `[m]`, their sums.
      num_increased: number of values that increased.
      num_zeroed: number of values that became 0.
      ratio_histogram: `[80]`, histogram of refined/original over `RATIO_EDGES`; decreases are in the first 32 bins.
      rest: rounding errors of the fields.

    Example:
      >>> import jax.numpy as jnp, jaxsae
      >>> sae = jaxsae.SAE(jnp.eye(2), jnp.array([-1.0, 0.0]), jnp.eye(2), jnp.zeros(2), jaxsae.ReLU())
      >>> x = jnp.array([[3.0, 1.0], [2.0, 4.0]])
      >>> code = jaxsae.encode(sae, x, capacity=2)
      >>> refined = code.replace(values=jnp.where(code.indices == 0, code.values + 1, code.values))
      >>> print(jaxsae.shrinkage(sae, x, code, refined))
                          before     after    change
      mean activation     2.0000    2.5000    +25.0%
      NMSE                0.4000    0.0000   -100.0%
      γ                   0.8800    1.0000    +13.6%
      50.0% of 4 active values rise, 0.0% become 0,
      2.0 per row over 2 rows
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
    num_zeroed: Float[Array, ""]
    ratio_histogram: Float[Array, " bins"]
    rest: dict[str, Array] = _rest()

    def _plus(self, other: Any) -> Any:
        data = self.data._plus(other.data)
        squares = [f"{name}_{when}" for name in ("error", "sq_norm", "inner_product") for when in ("before", "after")]
        counts = ["count", "before", "after", "num_increased", "num_zeroed", "ratio_histogram"]
        scales = (self.data.unit / data.unit) ** 2, (other.data.unit / data.unit) ** 2
        first, second = _added(self, other, squares, scales), _added(self, other, counts)
        return Shrinkage(data=data, **(first | second | {"rest": first["rest"] | second["rest"]}))

    @property
    def l0(self) -> Float[Array, ""]:
        """Mean number of active latents per row, before."""
        return ratio(jnp.sum(self.count), self.data.rows)

    @property
    def l0_after(self) -> Float[Array, ""]:
        """Mean number of latents per row that are active and whose refined value is not 0."""
        return ratio(jnp.sum(self.count) - self.num_zeroed, self.data.rows)

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
        """Relative change of the mean active value; positive where refinement undoes shrinkage."""
        return ratio(self.mean_after, self.mean_before) - 1

    @property
    def share_increased(self) -> Float[Array, ""]:
        """Share of the active values that increase."""
        return ratio(self.num_increased, jnp.sum(self.count))

    @property
    def ratio(self) -> Float[Array, " m"]:
        """Refined over original values, per latent; NaN for latents that never fired."""
        return ratio(self.after, self.before)

    @property
    def gamma_before(self) -> Float[Array, ""]:
        """`γ = Σ‖x̂ − b‖² / Σ⟨x − b, x̂ − b⟩`; below 1 indicates shrinkage."""
        return ratio(self.sq_norm_before, self.inner_product_before)

    @property
    def gamma_after(self) -> Float[Array, ""]:
        """`γ` with the refined values: 1, by complementarity, if the refit is exact."""
        return ratio(self.sq_norm_after, self.inner_product_after)

    def numbers(self) -> dict[str, float]:
        """The summary as floats, NaN where nothing was active."""
        names = ("l0", "l0_after", "nmse_before", "nmse_after", "mean_before", "mean_after", "mean_change")
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
        lines.append(
            f"{float(self.share_increased):.1%} of {float(jnp.sum(self.count)):.0f} active values rise, "
            f"{float(ratio(self.num_zeroed, jnp.sum(self.count))):.1%} become 0, "
        )
        return "\n".join(lines) + f"{float(self.l0):.1f} per row over {float(self.data.rows):.0f} rows"


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
      target: `[*b d_out]`, what to reconstruct; `x` by default, required for transcoders.

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
            "the refinement of that code."
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
        "num_zeroed": jnp.sum(active & (after == 0), dtype=before.dtype),
        "ratio_histogram": jnp.zeros(bins, before.dtype).at[slot.ravel()].add(1, mode="drop"),
    }
    data = _moments(x.reshape(-1, x.shape[-1]), keep.reshape(-1), unit)
    return Shrinkage(data=data, **_exact(squares | counts))


def _by_latent(code: SparseCode, active: Bool[Array, "*b k"], weights: Float[Array, "*b k"]) -> Float[Array, " m"]:
    """The sum of each latent's weights, over the slots that are active."""
    return codes.sum_by_latent(dataclasses.replace(code, values=jnp.where(active, weights, 0)))
