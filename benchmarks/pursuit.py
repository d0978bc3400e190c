"""Pursuits: the speed of OMP compared with other libraries, and where each method recovers sparse codes exactly."""

import functools
import importlib
import os
import statistics
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks.clock import name_missing, say, timings
from jaxsae import pursuit

SIZES = {
    "tiny": (
        {"d": 16, "m": 64, "k": 4, "rows": 64, "few": 8},
        {"d": 32, "m": 1024, "k": 4, "rows": 16, "few": 2, "nonnegative": True},
    ),
    # Few rows for scikit-learn: it solves each alone, and copies a large Gram matrix for each.
    "paper": (
        {"d": 64, "m": 256, "k": 8, "rows": 10_000, "few": 2000},
        {"d": 768, "m": 16384, "k": 32, "rows": 500, "few": 2},
        {"d": 576, "m": 49152, "k": 25, "rows": 256, "few": 4, "nonnegative": True},  # the vocabulary of SmolLM2
    ),
}


def problem(d: int, m: int, k: int, rows: int, *, nonnegative: bool = False) -> tuple[np.ndarray, np.ndarray]:
    """Unit atoms `[m d]`, and rows of `k` of them with noise of a tenth `[n d]`, in float32."""
    rng = np.random.default_rng(0)
    atoms = rng.normal(size=(m, d))
    atoms /= np.linalg.norm(atoms, axis=1, keepdims=True)
    support = np.argsort(rng.random((rows, m)), axis=1)[:, :k]
    z = rng.normal(size=(rows, k))
    z = np.abs(z) if nonnegative else z
    y = np.einsum("nk,nkd->nd", z, atoms[support]) + 0.1 * rng.normal(size=(rows, d))
    return atoms.astype(np.float32), y.astype(np.float32)


# --- Speed


def ours(D: np.ndarray, y: np.ndarray, k: int, *, nonnegative: bool = False) -> Callable[[], np.ndarray]:
    """The dense codes of `jaxsae.pursuit.omp`."""
    run = jax.jit(functools.partial(pursuit.omp, k=k, nonnegative=nonnegative)).lower(D, y).compile()
    if memory := run.memory_analysis():
        say(f"ours needs {memory.temp_size_in_bytes / 2**20:.0f} MiB beside its arguments")
    arrays = jnp.asarray(D), jnp.asarray(y)
    return lambda: run(*arrays)[0]


def scikit_learn(D: np.ndarray, y: np.ndarray, k: int) -> Callable[[], np.ndarray]:
    """`sklearn.linear_model.orthogonal_mp_gram`; the Gram matrix is not counted."""
    solve = importlib.import_module("sklearn.linear_model").orthogonal_mp_gram
    gram = np.asfortranarray(D @ D.T)
    return lambda: solve(gram, D @ y.T, n_nonzero_coefs=k).T


def spams(D: np.ndarray, y: np.ndarray, k: int) -> Callable[[], np.ndarray]:
    """`spams.omp` on all cores; it is optimised OMP, and may select other atoms."""
    solve = importlib.import_module("spams").omp
    atoms, targets = np.asfortranarray(D.T), np.asfortranarray(y.T)
    return lambda: solve(targets, atoms, L=k, eps=0.0, numThreads=os.cpu_count()).T


def loop(D: np.ndarray, y: np.ndarray, k: int) -> Callable[[], np.ndarray]:
    """Non-negative OMP in NumPy and float64, with a refit by `scipy.optimize.nnls` after each selection."""
    solve = importlib.import_module("scipy.optimize").nnls
    atoms, targets = D.astype(np.float64), y.astype(np.float64)

    def run():
        z = np.zeros((len(targets), len(atoms)))
        for row, target in enumerate(targets):
            chosen, values, r = [], 0.0, target
            for _ in range(k):
                correlations = atoms @ r
                correlations[chosen] = 0
                chosen.append(int(np.argmax(correlations)))
                values, _ = solve(atoms[chosen].T, target)
                r = target - values @ atoms[chosen]
            z[row, chosen] = values
        return z

    return run


PEERS = {"scikit-learn orthogonal_mp_gram": scikit_learn, "spams omp": spams}


def run(size: str, *, with_peers: bool) -> Iterator[dict[str, Any]]:
    """Rows of the tables: milliseconds a row, and the mean objective, of each case."""
    for case in SIZES[size]:
        yield from _run(**case, with_peers=with_peers)


def _run(
    *, d: int, m: int, k: int, rows: int, few: int, nonnegative: bool = False, with_peers: bool
) -> Iterator[dict[str, Any]]:
    D, y = problem(d, m, k, rows, nonnegative=nonnegative)
    case = {"d": d, "m": m, "k": k, "nonnegative": nonnegative}
    makers = {"jaxsae omp": functools.partial(ours, nonnegative=nonnegative)}
    if with_peers:
        makers |= {"NumPy and scipy, a loop": loop} if nonnegative else PEERS
    calls, taken, missing = {}, {}, {}
    for who, make in makers.items():
        taken[who] = few if make in (scikit_learn, loop) else rows
        try:
            calls[who] = make(D, y[: taken[who]], k)
        except ImportError as error:
            missing[who] = name_missing(error)
        say(f"d {d}, m {m}, k {k}: {who}")
    seconds = dict(zip(calls, timings(list(calls.values())), strict=True))
    reference = _dense(calls["jaxsae omp"]())
    for who, call in calls.items():
        z = _dense(call())
        left = y[: taken[who]] - z @ D
        yield {
            **case,
            "method": who,
            "rows_timed": taken[who],
            "note": "",
            "ms_a_row": 1e3 * statistics.median(seconds[who]) / taken[who],
            "quartiles": [1e3 * q / taken[who] for q in statistics.quantiles(seconds[who], n=4)[::2]],
            "objective": float(0.5 * np.mean(np.sum(left**2, axis=1))),
            "equal_supports": float(np.mean(np.all((z != 0) == (reference[: taken[who]] != 0), axis=1))),
        }
    for who, note in missing.items():
        yield {**case, "method": who, "note": note}


def _dense(codes: Any) -> np.ndarray:
    """Codes of ours, or arrays, sparse or not, as an array `[n m]`."""
    for convert in ("dense", "toarray"):
        codes = getattr(codes, convert)() if hasattr(codes, convert) else codes
    return np.asarray(codes)


# --- Phase transitions

ATOMS, TRIALS = 400, 50
DELTAS = tuple(round(0.1 * i, 1) for i in range(1, 10))  # d / m
RHOS = tuple(round(0.05 * i, 2) for i in range(1, 14))  # k / d
_WIDEST = round(DELTAS[-1] * ATOMS)
_SLOTS = (80, round(RHOS[-1] * _WIDEST))
SUCCESS = 1e-2  # relative error of the code, as Maleki and Donoho count
METHODS: dict[str, Callable] = {
    "OMP": pursuit.omp,
    "ITI": functools.partial(pursuit.iti, max_steps=30),
    "NIHT": pursuit.niht,
    "IHT, κ = 0.65": functools.partial(pursuit.iht, relaxation=0.65),
}


def transitions() -> Iterator[dict[str, Any]]:
    """The share of exact recoveries of each method at each `(δ, ρ) = (d/m, k/d)`, up to where none is recovered.

    Each point has a Gaussian matrix of its own and `TRIALS` codes of `k` random signs. Narrower matrices are padded
    with columns of zeros, which change no product: one program then serves all points. OMP takes `k` steps, so that one
    wrong atom is a failure, and signs are its hardest codes: it ends at about the same `ρ` for every `δ`.
    """
    programs = {
        (name, k): jax.jit(
            lambda D, y, max_atoms, method=method, k=k: method(D, y, k=k, max_atoms=max_atoms)[0].dense()
        )
        for name, method in METHODS.items()
        for k in _SLOTS
    }
    for name in METHODS:
        say(f"phase transition of {name}")
        for delta in DELTAS:
            rate = 1.0
            for rho in RHOS:
                rate = _recovered(programs, name, delta, rho) if rate > 0 else 0.0  # more atoms are no easier
                yield {"method": name, "delta": delta, "rho": rho, "recovered": rate}


def _recovered(programs: dict, name: str, delta: float, rho: float) -> float:
    """The share of trials whose code is recovered."""
    d = round(delta * ATOMS)
    k = max(1, round(rho * d))
    rng = np.random.default_rng([round(100 * delta), round(100 * rho)])
    D = np.zeros((ATOMS, _WIDEST))
    D[:, :d] = rng.normal(size=(ATOMS, d)) / np.sqrt(d)
    z = np.zeros((TRIALS, ATOMS))
    support = np.argsort(rng.random(z.shape), axis=1)[:, :k]
    np.put_along_axis(z, support, rng.choice([-1.0, 1.0], support.shape), axis=1)
    slots = next(slots for slots in _SLOTS if slots >= k)
    found = programs[name, slots](*(jnp.asarray(x, jnp.float32) for x in (D, z @ D)), jnp.full(TRIALS, k))
    error = np.linalg.norm(np.asarray(found) - z, axis=1) / np.sqrt(k)
    return float(np.mean(error < SUCCESS))


def plot_transitions(points: list[dict[str, Any]], path: str | os.PathLike) -> None:
    """Plot the rate of recovery, a panel per method, and in the last panel the `ρ` at which it is one half."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    names = list(dict.fromkeys(point["method"] for point in points))
    figure = Figure(figsize=(3.2 * (len(names) + 1), 3.6), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots(1, len(names) + 1, sharey=True)
    for panel, name in zip(axes, names, strict=False):
        rates = {(p["delta"], p["rho"]): p["recovered"] for p in points if p["method"] == name}
        deltas, rhos = (sorted({key[i] for key in rates}) for i in (0, 1))
        grid = [[rates[delta, rho] for delta in deltas] for rho in rhos]
        panel.pcolormesh(deltas, rhos, grid, shading="nearest", vmin=0, vmax=1, cmap="viridis")
        half = [half_point(rhos, [rates[delta, rho] for rho in rhos]) for delta in deltas]
        panel.plot(deltas, half, color="white", linewidth=1)
        panel.set(title=name, xlabel="δ = d / m")
        axes[-1].plot(deltas, half, marker="o", markersize=3, label=name)
    axes[0].set_ylabel("ρ = k / d")
    axes[-1].set(title="half of the trials recovered", xlabel="δ = d / m")
    axes[-1].legend(fontsize=8)
    axes[-1].grid(alpha=0.25)
    figure.colorbar(axes[0].collections[0], ax=list(axes[:-1]), label=f"share of {TRIALS} trials recovered")
    figure.savefig(path, dpi=130, format="png")


def half_point(rhos: list[float], rates: list[float]) -> float:
    """The `ρ` at which a falling rate of recovery passes ½, by interpolation; the first or last if it never passes."""
    for number, rate in enumerate(rates):
        if rate < 0.5:
            if number == 0:
                return rhos[0]
            before = rates[number - 1]
            return rhos[number - 1] + (before - 0.5) / (before - rate) * (rhos[number] - rhos[number - 1])
    return rhos[-1]
