"""What the first eager call of a function costs, in a process of its own, and what later calls still compile."""

import json
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

import jaxsae
from benchmarks.clock import say
from jaxsae import SparseCode

D, M, K, ROWS, OTHER = 64, 256, 8, 512, 500
_EVENT = "/jax/core/compile/backend_compile_duration"


class Rows(NamedTuple):
    """What the functions are called with."""

    sae: jaxsae.SAE
    D: jax.Array  # [m d]
    y: jax.Array  # [n d]
    code: SparseCode  # [n k]


def _nnls(rows: Rows):
    return jax.vmap(lambda indices, y: optax.nnls(rows.D[indices].T, y, 100))(rows.code.indices, rows.y)


def _slope(rows: Rows):
    return jax.grad(lambda D: jnp.sum(jaxsae.refit(D, rows.y, rows.code)[0].values))(rows.D)


CALLS: dict[str, Callable[[Rows], Any]] = {
    "optax.nnls, 100 steps": _nnls,
    "encode": lambda rows: jaxsae.encode(rows.sae, rows.y),
    "decode": lambda rows: jaxsae.decode(rows.sae, rows.code),
    "refine": lambda rows: jaxsae.refine(rows.sae, rows.y),
    "refit": lambda rows: jaxsae.refit(rows.D, rows.y, rows.code),
    "gradient of refit": _slope,
    "certify": lambda rows: jaxsae.certify(rows.D, rows.y, rows.code),
    "codes.scatter_add": lambda rows: jaxsae.codes.scatter_add(rows.code, rows.y),
    "pursuit.omp": lambda rows: jaxsae.pursuit.omp(rows.D, rows.y, k=K),
    "pursuit.iti": lambda rows: jaxsae.pursuit.iti(rows.D, rows.y, k=K),
    "lasso.lambda_max": lambda rows: jaxsae.lasso.lambda_max(rows.D, rows.y),
    "lasso.lasso": lambda rows: jaxsae.lasso.lasso(rows.D, rows.y, 0.1, capacity=K),
    "lasso.path": lambda rows: jaxsae.lasso.path(rows.D, rows.y, capacity=K),
    "lasso.relaxed": lambda rows: jaxsae.lasso.relaxed(rows.D, rows.y, 0.1, 0.5, capacity=K),
    "ksvd.fit": lambda rows: jaxsae.ksvd.fit(jax.random.key(0), rows.y, m=32, k=3, steps=2),
}
SIZES = {"tiny": ("encode", "decode"), "paper": tuple(CALLS)}


def run(size: str) -> Iterator[dict[str, Any]]:
    """A row for each function."""
    for name in SIZES[size]:
        say(name)
        command = [sys.executable, "-m", "benchmarks.first_call", name]
        yield json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)


def measure(name: str) -> dict[str, Any]:
    """Seconds of the first call, and the programs compiled by it, by the next, and by one of another number of rows."""
    rng = np.random.default_rng(0)
    dictionary = rng.normal(size=(M, D)).astype(np.float32)
    sae = jaxsae.init(jax.random.key(0), d=D, m=M, activation=jaxsae.TopK(K))
    first, next_, other = (_rows(rng, sae, dictionary, n) for n in (ROWS, ROWS, OTHER))
    compiled: list[str] = []
    jax.monitoring.register_event_duration_secs_listener(lambda event, *_, **__: compiled.append(event))

    def programs(rows: Rows) -> int:
        compiled.clear()
        jax.block_until_ready(CALLS[name](rows))
        return compiled.count(_EVENT)

    processor, wall = time.process_time(), time.perf_counter()
    programs_first = programs(first)
    processor, wall = time.process_time() - processor, time.perf_counter() - wall
    start = time.perf_counter()
    programs_next = programs(next_)
    return {
        **{"function": name, "processor_s": processor, "wall_s": wall, "next_call_s": time.perf_counter() - start},
        **{"programs": programs_first, "programs_next": programs_next, "programs_other": programs(other)},
    }


def _rows(rng: np.random.Generator, sae: jaxsae.SAE, dictionary: np.ndarray, n: int) -> Rows:
    indices = np.argsort(rng.random((n, M)), axis=1)[:, :K].astype(np.int32)
    z = rng.exponential(size=(n, K)).astype(np.float32)
    y = np.einsum("nk,nkd->nd", z, dictionary[indices]) + 0.1 * rng.normal(size=(n, D)).astype(np.float32)
    code = SparseCode(jnp.asarray(0.8 * z, np.float32), jnp.asarray(indices, np.int32), M)
    return jax.block_until_ready(Rows(sae, jnp.asarray(dictionary, np.float32), jnp.asarray(y, np.float32), code))


if __name__ == "__main__":
    print(json.dumps(measure(sys.argv[1])))
