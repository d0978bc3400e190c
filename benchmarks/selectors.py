"""Selectors compared: the same number of atoms of the same dictionary, refitted; error and time per row."""

import functools
import statistics
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from benchmarks.clock import say, timings
from benchmarks.pursuit import problem
from jaxsae import codes, data, ksvd, lasso, pursuit, refit
from jaxsae.codes import SparseCode

SIZES = {
    "tiny": {"random": (16, 64, 4, 64), "patches": (3, 32, 4, 64)},
    "paper": {"random": (64, 256, 8, 1024), "patches": (6, 512, 16, 256)},
}


class Case(NamedTuple):
    """A dictionary `[m d]`, rows `[n d]`, the number of atoms per row, and a description."""

    D: np.ndarray
    y: np.ndarray
    k: int
    name: str


def cases(size: str) -> Iterator[Case]:
    """Random atoms and rows made of them, with noise; patches of photographs and atoms learnt from others."""
    d, m, k, rows = SIZES[size]["random"]
    yield Case(*problem(d, m, k, rows), k, f"random atoms, d {d}, m {m}, k {k}")
    side, m, k, rows = SIZES[size]["patches"]
    train, y = data.image_patches(16 * m, rows, side=side)
    D, _ = ksvd.fit(jax.random.key(0), jnp.asarray(train), m=m, k=k, steps=10)
    d = y.shape[1]
    yield Case(np.asarray(D), y, k, f"learnt atoms, patches of photographs, d {d}, m {m}, k {k}")


def _largest(D: Array, y: Array, k: int) -> SparseCode:
    """The largest correlations, once: the selection of an encoder tied to the dictionary."""
    return codes.from_dense(y @ D.T, k)


def _lasso(D: Array, y: Array, k: int) -> SparseCode:
    """The first atoms on the lasso's path."""
    return lasso.lasso(D, y, 1e-3 * lasso.lambda_max(D, y), capacity=k)[0]


def _pursuit(method: Callable, D: Array, y: Array, k: int) -> SparseCode:
    return method(D, y, k=k)[0]


_PURSUITS = "cosamp", "gradient_pursuit", "iht", "iti", "matching_pursuit", "niht", "omp"
SELECTORS: dict[str, Callable[[Array, Array, int], SparseCode]] = {
    "largest correlations": _largest,
    **{name: functools.partial(_pursuit, getattr(pursuit, name)) for name in _PURSUITS},
    "lasso": _lasso,
}


def run(size: str) -> list[dict[str, Any]]:
    """A row for each selector in each case."""
    return [row for case in cases(size) for row in _run(case)]


def _run(case: Case) -> Iterator[dict[str, Any]]:
    D, y = jnp.asarray(case.D), jnp.asarray(case.y)
    say(case.name)

    again = jax.jit(functools.partial(refit, nonnegative=False))

    def program(select):
        choose = jax.jit(functools.partial(select, k=case.k))
        return lambda: again(D, y, choose(D, y))[0]

    calls = {name: program(select) for name, select in SELECTORS.items()}
    seconds = dict(zip(calls, timings(list(calls.values())), strict=True))
    for name, call in calls.items():
        left = y - codes.decode(D, call())
        yield {
            "case": case.name,
            "selector": name,
            "rows": len(y),
            "nmse": float(jnp.sum(left**2) / jnp.sum(y**2)),
            "ms_a_row": 1e3 * statistics.median(seconds[name]) / len(y),
            "quartiles": [1e3 * q / len(y) for q in statistics.quantiles(seconds[name], n=4)[::2]],
        }
