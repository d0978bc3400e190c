"""The problems that refits are timed on, from random dictionaries to a trained autoencoder."""

import dataclasses
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

import jaxsae
from jaxsae import stream, train
from jaxsae.train import objectives

_MOST = 256  # slots: on patches a few rows use half of all latents, and would dominate the case
DATA = Path(__file__).parents[2] / "shared/data/smollm2_layer8_shakespeare.npy"


class Case(NamedTuple):
    """A random problem: `B` rows of `k` atoms from a dictionary `[m d]` whose atoms have a given mean cosine."""

    name: str
    d: int
    m: int
    k: int
    B: int
    cosine: float


class Real(NamedTuple):
    """A ReLU + L1 autoencoder to train, and `B` held-out rows of its data to refit; `k` is the largest of their L0s."""

    m: int
    B: int
    steps: int
    l1: float


SIZES = {
    "tiny": [Case("random, k 8", 64, 512, 8, 1024, 0.0), Case("cosine 0.3, k 16", 64, 512, 16, 1024, 0.3)],
    "small": [Case("random, k 32", 256, 4096, 32, 2048, 0.0), Case("cosine 0.3, k 64", 256, 4096, 64, 1024, 0.3)],
    "paper": [
        Case("random, k 32", 768, 16384, 32, 4096, 0.0),
        Case("cosine 0.3, k 24", 768, 16384, 24, 4096, 0.3),
        Case("cosine 0.3, k 128", 768, 16384, 128, 1024, 0.3),
        Case("cosine 0.99, k 64", 768, 16384, 64, 1024, 0.99),
    ],
}
REAL = {
    "tiny": Real(m=256, B=256, steps=100, l1=0.2),
    "small": Real(m=1024, B=1024, steps=200, l1=0.1),
    "paper": Real(m=2048, B=1024, steps=2000, l1=0.07),
}


class Problem(NamedTuple):
    """Rows to refit, each with `‖y‖ = 1`, so that a solver's absolute tolerance means the same for each."""

    name: str
    source: str
    sae: jaxsae.SAE  # a refit's time is compared with its encoder's
    x: jax.Array  # [B d] the encoder's input
    y: jax.Array  # [B d] targets of the refit
    code: jaxsae.SparseCode  # [B k] supports and starting values

    def describe(self) -> dict:
        """Its sizes and conditioning, for the report."""
        (B, d), (m, k) = self.y.shape, (self.sae.m, self.code.indices.shape[1])
        kappa = condition(np.asarray(self.sae.W_dec), np.asarray(self.code.indices)[evenly(B, 64)])
        l0 = float(self.code.mask.sum(1).mean())
        sizes = {"d": d, "m": m, "k": k, "B": B, "mean_l0": l0}
        return {
            "case": self.name,
            "source": self.source,
            **sizes,
            "condition": np.quantile(kappa, (0, 0.5, 1)).tolist(),
        }


def evenly(n: int, most: int) -> np.ndarray:
    """At most `most` of `n` row numbers, evenly spread."""
    return np.arange(n) if n <= most else np.linspace(0, n - 1, most).round().astype(int)


def condition(dictionary: np.ndarray, indices: np.ndarray) -> np.ndarray:
    """The condition number of each row's Gram matrix, over its support alone, in float64."""
    supports = [dictionary[row[row < len(dictionary)]].astype(np.float64) for row in indices]
    # For a singular matrix float64 cannot resolve more than that.
    return np.array([min(np.linalg.cond(atoms), 1e16) ** 2 for atoms in supports if len(atoms)])


def problems(size: str, *, real: bool) -> Iterator[Callable[[], Problem]]:
    """A function that makes each problem of a size, so that large ones are not in memory together."""
    yield from (lambda case=case: random_problem(case) for case in SIZES[size])
    if real:
        yield lambda: real_problem(REAL[size], DATA)


def random_problem(case: Case, seed: int = 0) -> Problem:
    """Rows that are noisy non-negative combinations of atoms; they start from shrunken values, like a lasso's."""
    keys = jax.random.split(jax.random.key(seed), 4)
    sae = jaxsae.init(keys[0], d=case.d, m=case.m, activation=jaxsae.TopK(case.k))
    common = jnp.ones(case.d) / jnp.sqrt(case.d)
    atoms = jnp.sqrt(1 - case.cosine) * sae.W_dec + jnp.sqrt(case.cosine) * common
    _, support = jax.lax.top_k(jax.random.uniform(keys[1], (case.B, case.m)), case.k)
    z = jax.random.exponential(keys[2], (case.B, case.k))
    x = jaxsae.codes.decode(atoms, jaxsae.SparseCode(z, support, case.m))
    noise = jax.random.normal(keys[3], x.shape)
    x = x + 0.3 * noise * jnp.linalg.norm(x, axis=1, keepdims=True) / jnp.linalg.norm(noise, axis=1, keepdims=True)
    sae = dataclasses.replace(sae, W_dec=atoms, W_enc=atoms.T)
    return _problem(case.name, "random", sae, x, jaxsae.SparseCode(0.7 * z, support, case.m))


def real_problem(real: Real, path: Path, seed: int = 0) -> Problem:
    """Held-out rows of a ReLU autoencoder: of a language model's activations if available, else of patches."""
    rows, heldout, source = _activations(path, real.B, seed)
    # Unit mean square about the mean: one L1 weight then fits any data.
    scale = 1 / np.sqrt(np.var(rows, axis=0, dtype=np.float64).sum())
    rows, heldout = np.float32(scale) * rows, np.float32(scale) * heldout
    sae = jaxsae.init(
        jax.random.key(seed),
        d=rows.shape[1],
        m=real.m,
        activation=jaxsae.ReLU(),
        b_dec=jnp.asarray(rows.mean(axis=0)),
    )
    batches = jaxsae.data.batches(rows, 512, seed=seed)
    warmup = optax.linear_schedule(0.0, 1.0, real.steps // 5)
    loss = objectives.Objective((objectives.L1(real.l1, warmup),))
    sae = train.fit(sae, batches, loss=loss, tx=train.default_optimizer(1e-3), steps=real.steps).sae
    capacity = min(stream.max_l0(sae, heldout), _MOST)
    x = jnp.asarray(heldout)
    return _problem(f"trained ReLU, L0 ≤ {capacity}", source, sae, x, jaxsae.encode(sae, x, capacity=capacity))


def _activations(path: Path, heldout: int, seed: int) -> tuple[np.ndarray, np.ndarray, str]:
    if path.exists():
        rows = jaxsae.data.open_rows(path)
        return np.asarray(rows[:-heldout], np.float32), np.asarray(rows[-heldout:], np.float32), path.stem
    return *jaxsae.data.image_patches(20_000, heldout, seed=seed), "10 × 10 colour patches of two photographs"


def _problem(name: str, source: str, sae: jaxsae.SAE, x: jax.Array, code: jaxsae.SparseCode) -> Problem:
    y = x - sae.b_dec
    norm = jnp.linalg.norm(y, axis=1, keepdims=True)
    norm = jnp.where(norm > 0, norm, 1)
    return Problem(name, source, sae, x, y / norm, dataclasses.replace(code, values=code.values / norm))
