"""Metrics of codes, as mergeable sums: the metrics of two halves add up to the metric of the whole.

Each metric is a pytree of sums computed from a batch by one function; `a + b` merges two, and properties derive ratios.
Sums are in float32 or better with compensated rounding, so that counts are exact and a million batches are summed as
accurately as ten. Ratios are dimensionless, and NaN where they are undefined.
"""

import dataclasses
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float

from jaxsae import codes
from jaxsae._core import pytrees, sparse
from jaxsae._core.linalg import ratio, result_type, widen
from jaxsae.autoencoder.coactivation import CoActivation, co_activation
from jaxsae.autoencoder.contexts import ContextSample, TopContexts, context_sample, top_contexts
from jaxsae.autoencoder.sae import SAE, reconstruct
from jaxsae.autoencoder.sums import _added, _exact, _rest, _Sums, _two_sum, _unit
from jaxsae.codes import SparseCode

__all__ = [
    "Activity",
    "CoActivation",
    "ContextSample",
    "Matching",
    "Moments",
    "Progressive",
    "Reconstruction",
    "Recovery",
    "TopContexts",
    "activity",
    "co_activation",
    "context_sample",
    "match",
    "moments",
    "progressive",
    "reconstruction",
    "recovery",
    "top_contexts",
]


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


def progressive(
    sae: SAE,
    x: Float[Array, "*b d"],
    code: SparseCode,
    keep: Sequence[int],
    *,
    target: Float[Array, "*b d_out"] | None = None,
) -> Progressive:
    """Measure a code truncated to its largest values.

    Args:
      sae: the autoencoder.
      x: activations `[*b d]`.
      code: `[*b k]`, slots in descending order of magnitude, as from `encode`.
      keep: numbers of latents to keep.
      target: `[*b d_out]`, what to reconstruct; `x` by default, required for transcoders.

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
        return reconstruction(x if target is None else target, reconstruct(sae, x, first))

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


class Matching(NamedTuple):
    """Which atom of a dictionary stands for which atom of another.

    Attributes:
      latent: `[t]`, for each atom of the truth its latent, or −1 for none, if there are fewer latents than atoms.
      cosine: `[t]`, the cosine of the two; 0 for none.
    """

    latent: np.ndarray
    cosine: np.ndarray

    @property
    def mcc(self) -> float:
        """The mean correlation coefficient: the mean cosine over the atoms of the truth."""
        return float(self.cosine.mean())


def match(dictionary: Float[Array, "m d"], truth: Float[Array, "t d"]) -> Matching:
    """Match the atoms of a learnt dictionary to true ones, one to one, with the largest sum of cosines.

    Signs count: an atom and its negative are not the same for a code `z ≥ 0`.

    Args:
      dictionary: `[m d]`, one atom per row, any norm.
      truth: `[t d]`.

    Example:
      >>> import jax.numpy as jnp, jaxsae
      >>> found = jaxsae.metrics.match(jnp.array([[0.0, 2.0], [1.0, 0.0]]), jnp.eye(2))
      >>> found.latent.tolist(), found.mcc
      ([1, 0], 1.0)

    Source: Hungarian algorithm, by `scipy.optimize.linear_sum_assignment`; the mean correlation coefficient as in
      Sharkey, Braun & Millidge (2022), "Taking features out of superposition with sparse autoencoders".
    """
    from scipy.optimize import linear_sum_assignment  # which comes with JAX

    learnt, true = (np.asarray(widen(atoms), np.float64) for atoms in (dictionary, truth))
    learnt, true = (
        atoms / np.maximum(np.linalg.norm(atoms, axis=1, keepdims=True), 1e-300) for atoms in (learnt, true)
    )
    cosines = true @ learnt.T
    rows, columns = linear_sum_assignment(cosines, maximize=True)
    latent, cosine = np.full(len(true), -1), np.zeros(len(true))
    latent[rows], cosine[rows] = columns, cosines[rows, columns]
    return Matching(latent, cosine)


@pytrees.dataclass
class Recovery(_Sums):
    """How well codes agree with true ones: which latents fire, and their values where they rightly do.

    Attributes:
      rows: number of rows.
      true, fired, both: number of active entries in the truth, in the code, and in both.
      value, error, squares, square_error: over the entries in both, `Σ z`, `Σ (ẑ − z)`, `Σ z²` and `Σ (ẑ − z)²`.
      right: number of rows whose support is exactly the true one.
      rest: rounding errors of the fields.

    Example:
      >>> import jax.numpy as jnp, jaxsae
      >>> matching = jaxsae.metrics.match(jnp.eye(2), jnp.eye(2))
      >>> code = jaxsae.codes.from_dense(jnp.array([[1.0, 1.0], [0.0, 1.0]]), capacity=2)
      >>> found = jaxsae.metrics.recovery(matching, code, jnp.array([[2.0, 0.0], [0.0, 2.0]]))
      >>> [round(float(x), 3) for x in (found.precision, found.recall, found.f1, found.bias)]
      [0.667, 1.0, 0.8, -0.5]
    """

    rows: Float[Array, ""]
    true: Float[Array, ""]
    fired: Float[Array, ""]
    both: Float[Array, ""]
    value: Float[Array, ""]
    error: Float[Array, ""]
    squares: Float[Array, ""]
    square_error: Float[Array, ""]
    right: Float[Array, ""]
    rest: dict[str, Array] = _rest()

    def _plus(self, other: Any) -> Any:
        names = [field.name for field in dataclasses.fields(self) if field.name != "rest"]
        return Recovery(**_added(self, other, names))

    @property
    def precision(self) -> Float[Array, ""]:
        """Share of the active entries of the code that are active in the truth."""
        return ratio(self.both, self.fired)

    @property
    def recall(self) -> Float[Array, ""]:
        """Share of the active entries of the truth that are active in the code."""
        return ratio(self.both, self.true)

    @property
    def f1(self) -> Float[Array, ""]:
        """Harmonic mean of precision and recall."""
        return ratio(2 * self.both, self.true + self.fired)

    @property
    def bias(self) -> Float[Array, ""]:
        """`Σ (ẑ − z) / Σ z` where both are active; negative for values that are too small."""
        return ratio(self.error, self.value)

    @property
    def value_error(self) -> Float[Array, ""]:
        """`√(Σ (ẑ − z)² / Σ z²)` where both are active."""
        return jnp.sqrt(ratio(self.square_error, self.squares))

    @property
    def exact(self) -> Float[Array, ""]:
        """Share of the rows whose support is the true one."""
        return ratio(self.right, self.rows)


def recovery(matching: Matching, code: SparseCode, truth: Float[Array, "*b t"]) -> Recovery:
    """Compare codes with true ones.

    Args:
      matching: of the code's dictionary to the true one, by `match`.
      code: `[*b k]`, of atoms of the same norms as the true ones. A latent that is matched to none counts as wrong
        where it fires.
      truth: the true code, dense, `[*b t]`.

    Example:
      >>> import jax.numpy as jnp, jaxsae
      >>> code = jaxsae.codes.from_dense(jnp.array([[0.0, 3.0]]), capacity=1)
      >>> matching = jaxsae.metrics.match(jnp.eye(2), jnp.eye(2))
      >>> float(jaxsae.metrics.recovery(matching, code, jnp.array([[0.0, 3.0]])).exact)
      1.0

    Source: F1 and values after Chanin & Garriga-Alonso (2026), "SynthSAEBench: evaluating sparse autoencoders on
      scalable realistic synthetic data".
    """
    if truth.shape[-1] != len(matching.latent):
        raise ValueError(
            f"`recovery` got a truth of {truth.shape[-1]} features, and a matching of {len(matching.latent)}; pass "
            "the code of the dictionary that was matched."
        )
    return _recovery(jnp.asarray(matching.latent), code, truth)


@jax.jit
def _recovery(latent, code: SparseCode, truth) -> Recovery:
    z = jnp.where(latent >= 0, jnp.take(widen(code.dense()), jnp.maximum(latent, 0), axis=-1), 0)
    truth = widen(truth)
    both = (z != 0) & (truth != 0)
    fired = jnp.sum(code.mask & (code.values != 0), axis=-1)
    error, value = jnp.where(both, z - truth, 0), jnp.where(both, truth, 0)
    active, common = jnp.sum(truth != 0, axis=-1), jnp.sum(both, axis=-1)
    counts = {
        "rows": jnp.asarray(active.size),
        "true": jnp.sum(active),
        "fired": jnp.sum(fired),
        "both": jnp.sum(common),
        "right": jnp.sum((common == active) & (common == fired)),
    }
    sums = {"value": value, "error": error, "squares": value**2, "square_error": error**2}
    sums = {name: jnp.sum(x) for name, x in sums.items()}
    return Recovery(**_exact({name: x.astype(truth.dtype) for name, x in (counts | sums).items()}))


# Rows without firing after which a latent is dead (all rows, if there are fewer); on few rows most are inactive.
DEAD_ROWS = 100_000
