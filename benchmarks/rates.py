"""Learning rates by family and length of training: the error on held-out rows that each one reaches at one L0."""

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks.clock import say
from jaxsae.app import sources
from jaxsae.app.options import Options, resolved
from jaxsae.app.tuned import train_to
from jaxsae.autoencoder import calibration, metrics, stream
from jaxsae.autoencoder.sae import SAE, encode_dense, reconstruct

_HELDOUT, _TRAIN = 2048, 200_000


def run(
    path: Path | None,
    *,
    families: Sequence[str],
    l0: int,
    latents: int,
    batch: int,
    steps: Sequence[int],
    rates: Sequence[float],
) -> Iterator[dict[str, Any]]:
    """A row for each family, number of steps and rate; on photographs if no file is given."""
    if path is None:
        rows, name = sources.photographs(_TRAIN, _HELDOUT, 0), "photographs"
    else:
        rows, name = sources.from_file(path, _TRAIN, _HELDOUT, batch), path.stem
    heldout = rows.units.scaled(rows.heldout)
    for family in families:
        for number in steps:
            for rate in rates:
                say(f"{name}: {family}, {number} steps, rate {rate:g}")
                options = Options(family, latents, batch=batch, steps=number, learning_rate=rate)
                trained = train_to(rows.train, heldout, options, l0, lambda text, steps: None)
                row = {"data": name, "family": family, "l0_target": l0, "latents": latents, "batch": batch}
                row |= {
                    "steps": number,
                    "rate": rate,
                    "default": resolved(options._replace(learning_rate=None)).learning_rate,
                }
                yield row | _measure(trained.sae, heldout, rows.train)


def _measure(sae: SAE, heldout: np.ndarray, trained: np.ndarray) -> dict[str, float]:
    nmse, l0 = map(float, _numbers(sae, jnp.asarray(heldout)))
    active = calibration.activity(sae, (chunk.x for chunk in stream.chunks(sae, trained[: metrics.DEAD_ROWS])))
    return {"nmse": nmse, "l0": l0, "dead": float(active.dead)}


@jax.jit
def _numbers(sae: SAE, x):
    z = encode_dense(sae, x)
    return metrics.reconstruction(x, reconstruct(sae, x, z)).nmse, jnp.mean(jnp.sum(z != 0, axis=1))
