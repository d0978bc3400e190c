"""Time refits on random problems: gather, Gram and solve together, compile time apart, the encoder beside them."""

import dataclasses
import statistics
import time
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

import jaxsae


class Case(NamedTuple):
    """A random problem: `B` rows of `k` atoms from a dictionary `[m d]` of a given mean cosine."""

    d: int
    m: int
    k: int
    B: int
    cosine: float


SIZES = {
    "tiny": [Case(64, 512, 8, 1024, 0.0), Case(64, 512, 16, 1024, 0.3)],
    "small": [Case(256, 4096, 32, 2048, 0.0), Case(256, 4096, 64, 1024, 0.3)],
    "paper": [Case(768, 16384, 32, 4096, 0.0), Case(768, 16384, 128, 4096, 0.3)],
}
SOLVERS = {"FISTA": jaxsae.FISTA(), "ProjectedGradient": jaxsae.ProjectedGradient()}
_REPEATS = 7


def problem(case: Case, seed: int = 0) -> tuple[jaxsae.SAE, jax.Array, jaxsae.SparseCode]:
    """An SAE, rows that are noisy non-negative combinations of its atoms, and starting codes on their supports."""
    keys = jax.random.split(jax.random.key(seed), 4)
    sae = jaxsae.init(keys[0], d=case.d, m=case.m, activation=jaxsae.TopK(case.k))
    common = jnp.ones(case.d) / jnp.sqrt(case.d)
    atoms = jnp.sqrt(1 - case.cosine) * sae.W_dec + jnp.sqrt(case.cosine) * common
    _, support = jax.lax.top_k(jax.random.uniform(keys[1], (case.B, case.m)), case.k)
    z = jax.random.exponential(keys[2], (case.B, case.k))
    code = jaxsae.SparseCode(values=z, indices=support, num_latents=case.m)
    x = jaxsae.codes.combine(atoms, code)
    noise = jax.random.normal(keys[3], x.shape)
    x = x + 0.3 * noise * jnp.linalg.norm(x, axis=1, keepdims=True) / jnp.linalg.norm(noise, axis=1, keepdims=True)
    return dataclasses.replace(sae, W_dec=atoms, W_enc=atoms.T), x, dataclasses.replace(code, values=0.7 * z)


def run(size: str) -> list[dict[str, Any]]:
    """Measure every solver on every case of a size."""
    table = []
    for case in SIZES[size]:
        sae, x, code = problem(case)
        encode = jax.jit(jaxsae.encode)
        runs: dict[str, Callable] = {"encode": lambda encode=encode, sae=sae, x=x: encode(sae, x)}
        for name, solver in SOLVERS.items():
            runs[name] = lambda solver=solver, sae=sae, x=x, code=code: jaxsae.refine(sae, x, code, solver)
        first, seconds = timings(runs)
        for name in SOLVERS:
            refined, info = runs[name]()
            certificate = jaxsae.certify(sae.W_dec, x - sae.b_dec, refined)
            low, median, high = statistics.quantiles(seconds[name], n=4)
            table.append(
                {
                    **case._asdict(),
                    "solver": name,
                    "rows_per_s": case.B / median,
                    "quartiles": [case.B / high, case.B / low],
                    "compile_s": first[name] - median,
                    "worst_kkt": float(certificate.kkt.max()),
                    "worst_gap": float(certificate.gap.max()),
                    "mean_steps": float(info.steps.mean()),
                    "time_over_encode": median / statistics.median(seconds["encode"]),
                }
            )
    return table


def timings(runs: dict[str, Callable]) -> tuple[dict[str, float], dict[str, list[float]]]:
    """Seconds of the first call of each, and of repeats in turn: drift of the machine then meets all alike."""

    def clock(f) -> float:
        start = time.perf_counter()
        jax.block_until_ready(f())
        return time.perf_counter() - start

    first = {name: clock(f) for name, f in runs.items()}
    seconds: dict[str, list[float]] = {name: [] for name in runs}
    for _ in range(_REPEATS):
        for name, f in runs.items():
            seconds[name].append(clock(f))
    return first, seconds
