"""k-SVD on its authors' experiment: recovery of dictionaries from noisy signals, by us and others."""

import time
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks.clock import name_missing, say
from jaxsae import ksvd as learning

N, D, M, K = 1500, 20, 50, 3  # of the synthetic experiment of Aharon, Elad & Bruckstein (2006)


class Size(NamedTuple):
    """Sizes of the experiment."""

    runs: int
    steps: int
    snrs: tuple[float | None, ...]  # dB; None means no noise
    peer_runs: int


SIZES = {
    "tiny": Size(2, 30, (20.0,), 1),
    "paper": Size(50, 80, (20.0, 10.0, 30.0, None), 10),
}


def synthetic(seed: int, snr: float | None) -> tuple[np.ndarray, np.ndarray]:
    """A dictionary `[m d]`, and signals `[n d]` of `k` of its atoms each, with white noise."""
    rng = np.random.default_rng(seed)
    atoms = rng.normal(size=(M, D))
    atoms /= np.linalg.norm(atoms, axis=1, keepdims=True)
    chosen = np.argsort(rng.random((N, M)), axis=1)[:, :K]
    y = np.einsum("nk,nkd->nd", rng.normal(size=(N, K)), atoms[chosen])
    if snr is not None:
        noise = rng.normal(size=y.shape)
        y += noise * np.linalg.norm(y) / np.linalg.norm(noise) * 10 ** (-snr / 20)
    return atoms, y


def recovered(true: np.ndarray, found: np.ndarray) -> float:
    """The share of atoms for which a learnt one is within `1 − |dᵀd̂| < 0.01`."""
    found = found / np.maximum(np.linalg.norm(found, axis=1, keepdims=True), 1e-12)
    return float(np.mean(np.min(1 - np.abs(true @ found.T), axis=1) < 0.01))


Learner = Callable[[int, np.ndarray, int], np.ndarray]  # (seed, y, steps) -> D


def _ours(update) -> Learner:
    def learn(seed, y, steps):
        y = jnp.asarray(y, jnp.float32)
        return np.asarray(learning.fit(jax.random.key(seed), y, m=M, k=K, steps=steps, update=update)[0], np.float64)

    return learn


def _dictlearn(algorithm: str) -> Callable[[], Learner]:
    def load():
        from dictlearn import DictionaryLearning  # pyright: ignore[reportMissingImports]

        def learn(seed, y, steps):
            model = DictionaryLearning(M, fit_algorithm=algorithm, n_nonzero_coefs=K, max_iter=steps, random_state=seed)
            return np.asarray(model.fit(y).components_)

        return learn

    return load


def _ksvd_package() -> Learner:
    from ksvd import ApproximateKSVD  # pyright: ignore[reportMissingImports, reportAttributeAccessIssue]

    def learn(seed, y, steps):
        np.random.seed(seed)  # the package draws from the global generator
        return np.asarray(ApproximateKSVD(M, max_iter=steps, transform_n_nonzero_coefs=K).fit(y).components_)

    return learn


OURS: dict[str, Callable[[], Learner]] = {
    "jaxsae exact": lambda: _ours(learning.exact),
    "jaxsae approximate": lambda: _ours(learning.approximate),
    "jaxsae MOD": lambda: _ours(learning.mod),
}
PEERS: dict[str, Callable[[], Learner]] = {
    "dictlearn ksvd": _dictlearn("ksvd"),
    "dictlearn aksvd": _dictlearn("aksvd"),
    "dictlearn mod": _dictlearn("mod"),
    "ksvd": _ksvd_package,
}


def run(size: str, *, with_peers: bool) -> Iterator[dict[str, Any]]:
    """Share of atoms recovered, by learner and noise: mean and least of the runs, and seconds of a run, warm."""
    case = SIZES[size]
    for name, load in (OURS | PEERS if with_peers else OURS).items():
        row: dict[str, Any] = {"learner": name, "steps": case.steps, "note": None}
        try:
            learn = load()
        except ImportError as error:
            yield {**row, "snr": None, "runs": 0, "mean": None, "least": None, "s": None, "note": name_missing(error)}
            continue
        runs = case.runs if name in OURS else case.peer_runs
        for snr in case.snrs:
            say(f"{name}, SNR {snr or 'infinite'}")
            learn(0, synthetic(0, snr)[1], case.steps)
            shares, start = [], time.perf_counter()
            for seed in range(runs):
                true, y = synthetic(seed, snr)
                shares.append(recovered(true, learn(seed, y, case.steps)))
            seconds = (time.perf_counter() - start) / runs
            yield {
                **row,
                "snr": snr,
                "runs": runs,
                "mean": float(np.mean(shares)),
                "least": min(shares),
                "s": seconds,
            }
