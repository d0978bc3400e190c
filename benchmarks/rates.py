"""Learning rates by the length of a training: the error on held-out rows that each one reaches, by family."""

import functools
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks.clock import say
from jaxsae import data, train
from jaxsae.app import runs
from jaxsae.app.options import Options
from jaxsae.autoencoder import calibration
from jaxsae.autoencoder.sae import SAE, encode_dense, reconstruct

RATES = (1e-3, 2e-3, 4e-3, 8e-3)
FAMILIES: dict[str, dict[str, Any]] = {"topk": {"k": 20}, "relu": {"l1": 0.1}, "jumprelu": {"k": 20}}
_HELDOUT = 2048


def run(path: Path | None, *, latents: int, batch: int, steps: tuple[int, ...]) -> Iterator[dict[str, Any]]:
    """A row for each family, number of steps and rate; on photographs if no file is given."""
    rows, heldout, source = _rows(path)
    for family, sparsity in FAMILIES.items():
        for number in steps:
            say(f"{source}: {family}, {number} steps")
            options = Options(family, latents, batch=batch, steps=number, **sparsity)
            states = _train(rows, options)
            for place, rate in enumerate(RATES):
                sae = train.member(states.sae, place)
                named = {"data": source, "family": family, "latents": latents, "batch": batch, "steps": number}
                named |= {"rate": rate, "default": train.learning_rate(latents, number)}
                yield named | _measure(sae, heldout, options)


def _rows(path: Path | None) -> tuple[np.ndarray, np.ndarray, str]:
    """Rows of unit mean square about their mean, held-out rows, and the name of their source."""
    if path is None:
        return *data.image_patches(100_000, _HELDOUT, side=8, seed=0), "photographs"
    everything = np.asarray(data.open_rows(path), np.float32)
    everything *= np.float32(1 / np.sqrt(np.var(everything[:-_HELDOUT], axis=0, dtype=np.float64).sum()))
    return everything[:-_HELDOUT], everything[-_HELDOUT:], path.stem


def _train(rows: np.ndarray, options: Options) -> train.TrainState:
    """One autoencoder per rate, from the same initialisation, on the same batches."""
    objective, _, init_fn = runs.recipe(options, train.geometric_median(jnp.asarray(rows[:10_000])), 1.0)
    saes = train.stack([init_fn().sae] * len(RATES))
    batches = data.batches(rows, options.batch, seed=options.seed)
    tx = functools.partial(runs.optimiser, steps=options.steps)
    return train.sweep(saes, batches, loss=objective, tx=tx, rates=np.array(RATES, np.float32), steps=options.steps)


def _measure(sae: SAE, heldout: np.ndarray, options: Options) -> dict[str, float]:
    """NMSE at the requested L0; where a penalty sets the L0, `loss`, with the penalty, is what compares rates."""
    if options.k is not None and sae.activation.slots is None:
        sae = calibration.calibrate(sae, [heldout], float(options.k))
    error, penalty, l0, silent = map(float, _sums(sae, jnp.asarray(heldout)))
    nmse = error / float(np.var(heldout, axis=0, dtype=np.float64).sum())
    loss = nmse if options.l1 is None else error + options.l1 * penalty
    return {"nmse": nmse, "loss": loss, "l0": l0, "silent": silent}


@jax.jit
def _sums(sae: SAE, x):
    z = encode_dense(sae, x)
    error = jnp.mean(jnp.sum((x - reconstruct(sae, x, z)) ** 2, axis=1))
    penalty = jnp.mean(jnp.sum(jnp.abs(z) * jnp.linalg.norm(sae.W_dec, axis=1), axis=1))
    return error, penalty, jnp.mean(jnp.sum(z != 0, axis=1)), jnp.mean((z == 0).all(axis=0))
