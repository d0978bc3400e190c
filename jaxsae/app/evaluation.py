"""What an autoencoder reconstructs, and which of its latents fire, on rows of any number."""

import dataclasses
import functools
import operator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxsae import data as data_module, sharding
from jaxsae._core.files import json_number
from jaxsae.autoencoder import metrics, stream
from jaxsae.autoencoder.sae import SAE, encode, reconstruct
from jaxsae.data import cleaning


def evaluate(sae: SAE, rows: data_module.Rows, more: metrics.Activity | None = None) -> dict[str, Any]:
    """Measure an autoencoder on rows: `nmse`, `explained_variance`, `l0`, `dead`, `nmse_at` and `firing`.

    `nmse_at` is the NMSE with only the 1, 2, 4 … largest latents of each row, the progressive code. `dead` is the share
    of the latents that never fire, and `firing` counts those that fire on no row, on 1, on 2 or 3, on 4 to 7 …: both
    over `dead_rows` rows, these and those of `more`. Where norms are more than thirty times the median, `outliers` has
    the share of these rows, theirs of the mean square, and the NMSE without them.

    Args:
      sae: the autoencoder.
      rows: `[n d]`, may be memory-mapped, as `stream.chunks` takes them; rows with NaN or Inf are left out, and counted
        as `nonfinite`.
      more: activity on other rows, if these are few: a latent may be inactive on thousands of rows without being dead.

    Raises:
      InputError: if the rows are not of the autoencoder's width.

    Example:
      >>> import numpy as np, jaxsae
      >>> sae = jaxsae.init(jax.random.key(0), d=4, m=8, activation=jaxsae.TopK(2))
      >>> evaluate(sae, np.random.default_rng(0).normal(size=(64, 4)))["l0"]
      2.0
    """
    stream.require_width(sae, rows)
    capacity = sae.activation.slots or stream.max_l0(sae, rows)
    keep = tuple(2**n for n in range(capacity.bit_length()))
    parts, norms, nonfinite = [], [], 0
    for _, x, target in stream.chunks(sae, rows):
        *sums, lengths = _measure(sae, x, target, capacity, keep)
        parts.append(sums)
        norms.append(np.asarray(lengths))
        nonfinite += int(np.sum(~np.isfinite(norms[-1])))
    whole, active, progressive = (functools.reduce(operator.add, part) for part in zip(*parts, strict=True))
    counted = active if more is None else active + more
    far = cleaning.outliers(lengths := np.concatenate(norms))
    numbers = {
        "nmse": whole.nmse,
        "explained_variance": whole.explained_variance,
        "l0": active.l0,
        "dead": counted.dead,
    }
    return {name: json_number(value) for name, value in numbers.items()} | {
        "nmse_at": {str(n): json_number(value) for n, value in zip(keep, progressive.nmse, strict=True)},
        "firing": counted.log2_histogram,
        "dead_rows": int(counted.rows),
        "rows": len(rows),
        "nonfinite": nonfinite,
        **(_without(sae, rows, far, lengths, capacity) if far.any() else {}),
    }


def _without(sae: SAE, rows: data_module.Rows, far: np.ndarray, norms: np.ndarray, capacity: int) -> dict[str, Any]:
    """What outliers are, and the NMSE of the other rows."""
    squares = np.where(np.isfinite(norms), np.float64(norms) ** 2, 0)
    rest = stream.chunks(sae, cleaning.keep(rows, ~far))
    parts = [_measure(sae, x, target, capacity, (1,))[0] for _, x, target in rest]
    nmse = functools.reduce(operator.add, parts).nmse
    share = np.sum(squares[far]) / np.sum(squares)
    return {"outliers": {"rows": int(far.sum()), "mean_square": share, "nmse_without": json_number(nmse)}}


@functools.partial(jax.jit, static_argnums=(3, 4))
def _measure(sae: SAE, x, target, capacity: int, keep: tuple[int, ...]):
    finite = (jnp.isfinite(x).all(1) & jnp.isfinite(target).all(1))[:, None]
    code = encode(sae, jnp.where(finite, x, jnp.nan), capacity=capacity)
    code = dataclasses.replace(code, values=jnp.where(finite, code.values, jnp.nan))  # a threshold passes over NaN
    whole = metrics.reconstruction(target, reconstruct(sae, x, code))
    progressive = metrics.progressive(sae, x, code, keep, target=target)
    norms = jnp.where(finite[:, 0], jnp.linalg.norm(target.astype(jnp.float32), axis=1), jnp.nan)
    return sharding.replicate((whole, metrics.activity(code), progressive, norms))
