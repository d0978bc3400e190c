"""Time lasso paths, ours and others', at equal duality gap; and selections of the relaxed lasso in sparse regressions.

The gap is taken from the coefficients alone, in float64, by its definition: primal less dual objective at the residual
scaled down until it is feasible, relative to `½‖y‖²`.
"""

import functools
import statistics
import time
import warnings
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks.clock import name_missing, say, timings
from jaxsae import lasso


class Case(NamedTuple):
    """Shapes of the paths, and of the regressions."""

    d: int
    m: int
    B: int  # rows
    L: int  # penalties of a path
    samples: int
    variables: int
    repeats: int
    most_rows: int  # for peers, which solve row by row


SIZES = {"tiny": Case(16, 32, 32, 10, 40, 60, 2, 4), "paper": Case(64, 256, 1000, 100, 100, 1000, 50, 50)}
EPS, GATE = 1e-3, 1e-6  # the last penalty relative to the first; the gap required of all
STRONG, FOLDS = 5, 10  # variables with a coefficient of 1 or −1, under noise of variance 1
PHIS = (1.0, 0.75, 0.5, 0.25, 0.0)
TEST = 1000  # samples


def run(size: str, *, with_peers: bool) -> dict[str, Any]:
    """Both tables of a size."""
    case = SIZES[size]
    return {"case": case._asdict(), "paths": paths(case, with_peers), "regressions": regressions(case, with_peers)}


# --- Paths

Path = Callable[[np.ndarray, np.ndarray, np.ndarray, float], np.ndarray]  # of one row: D, y, lams, tol -> [L m]


def problem(case: Case) -> tuple[np.ndarray, np.ndarray]:
    """Atoms of norm 1, and rows of eight of them with noise."""
    rng = np.random.default_rng(0)
    D = rng.normal(size=(case.m, case.d))
    D /= np.linalg.norm(D, axis=1, keepdims=True)
    z = np.zeros((case.B, case.m))
    chosen = np.argsort(rng.random(z.shape), axis=1)[:, :8]
    np.put_along_axis(z, chosen, rng.normal(size=chosen.shape), axis=1)
    return D, z @ D + 0.0125 * rng.normal(size=(case.B, case.d))


def gaps(D: np.ndarray, y: np.ndarray, z: np.ndarray, lams: np.ndarray) -> np.ndarray:
    """`[n L]` of coefficients `z [n L m]` at penalties `[n L]`."""
    r = y[:, None] - z @ D
    top = np.abs(r @ D.T).max(-1)
    u = r * np.minimum(1, lams / top)[:, :, None]
    primal = 0.5 * (r**2).sum(-1) + lams * np.abs(z).sum(-1)
    dual = (u * y[:, None]).sum(-1) - 0.5 * (u**2).sum(-1)
    return (primal - dual) / (0.5 * (y**2).sum(-1))[:, None]


def _scikit_learn(precompute: bool) -> Path:
    from sklearn.linear_model import lasso_path  # pyright: ignore[reportMissingImports]

    def path(D, y, lams, tol):
        options = {"precompute": D @ D.T, "Xy": D @ y} if precompute else {}
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return lasso_path(D.T, y, alphas=lams / y.size, tol=tol, max_iter=10**6, **options)[1].T

    return path


def _celer() -> Path:
    from celer import celer_path  # pyright: ignore[reportMissingImports]

    def path(D, y, lams, tol):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return celer_path(
                np.asfortranarray(D.T), y, pb="lasso", alphas=lams / y.size, tol=tol, max_iter=1000, max_epochs=10**6
            )[1].T

    return path


def _skglm() -> Path:
    from skglm import Lasso  # pyright: ignore[reportMissingImports]

    def path(D, y, lams, tol):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            model = Lasso(fit_intercept=False, tol=tol, max_iter=1000, max_epochs=10**6)
            return model.path(np.asfortranarray(D.T), y, alphas=lams / y.size)[1].T

    return path


PEERS: dict[str, Callable[[], Path]] = {
    "scikit-learn": lambda: _scikit_learn(False),
    "scikit-learn, with G": lambda: _scikit_learn(True),
    "celer": _celer,
    "skglm": _skglm,
}
_TOLERANCES = (1e-4, 1e-5, 1e-6, 1e-7, 1e-8, 1e-9, 1e-10, 1e-12)


def paths(case: Case, with_peers: bool) -> list[dict[str, Any]]:
    """A row of the table for each solver, the milliseconds of a path with its quartiles."""
    D, y = problem(case)
    lams = np.abs(y @ D.T).max(1)[:, None] * np.geomspace(1, EPS, case.L)
    calls, table = [], []
    for dtype in (np.float32, np.float64):
        say(f"jaxsae, {dtype.__name__}")
        call, compile_s, z = _ours(*(x.astype(dtype) for x in (D, y, lams)))
        calls.append(call)
        worst = gaps(D, y, z, lams).max()
        table.append({"solver": f"jaxsae, {dtype.__name__}", "rows": case.B, "compile_s": compile_s, "gap": worst})
    few = slice(0, case.most_rows)
    missing = []
    for name, load in PEERS.items() if with_peers else ():
        try:
            path = load()
        except ImportError as error:
            missing.append({"solver": name, "note": name_missing(error)})
            continue
        tol, worst = _tune(path, D, y[few], lams[few])
        say(f"{name}: tol {tol:g}, gap {worst:.1e}")
        calls.append(functools.partial(_row_by_row, path, D, y[few], lams[few], tol))
        table.append({"solver": name, "rows": len(y[few]), "tol": tol, "gap": worst})
    say("timing")
    for row, seconds in zip(table, timings(calls), strict=True):
        per_row = 1000 / row["rows"]
        low, median, high = statistics.quantiles(seconds, n=4)
        row |= {"ms": median * per_row, "quartiles": [low * per_row, high * per_row], "gap": float(row["gap"])}
        row["gate_met"] = row["gap"] <= GATE
    return table + missing


def _ours(D, y, lams) -> tuple[Callable[[], Any], float, np.ndarray]:
    with jax.enable_x64(D.dtype == np.float64):
        arguments = tuple(map(jnp.asarray, (D, y, lams)))
        start = time.perf_counter()
        compiled = jax.jit(lasso.path).lower(*arguments).compile()
        seconds = time.perf_counter() - start
        z = compiled(*arguments)[0].dense()
    return functools.partial(compiled, *arguments), seconds, np.asarray(z, np.float64)


def _row_by_row(path: Path, D, y, lams, tol: float) -> np.ndarray:
    return np.stack([path(D, row, at, tol) for row, at in zip(y, lams, strict=True)])


def _tune(path: Path, D, y, lams) -> tuple[float, float]:
    """The loosest tolerance whose worst gap is within the gate, and that gap."""
    tol, worst = 0.0, np.inf
    for tol in _TOLERANCES:
        worst = float(gaps(D, y, _row_by_row(path, D, y, lams, tol), lams).max())
        if worst <= GATE:
            break
    return tol, worst


# --- Regressions


class Draw(NamedTuple):
    """Training and test samples `X [n p]`, and their true coefficients."""

    X: np.ndarray
    y: np.ndarray
    X_test: np.ndarray
    y_test: np.ndarray
    truth: np.ndarray
    folds: np.ndarray  # [n]


def draw(case: Case, seed: int) -> Draw:
    """Independent normal variables, a few of which are relevant."""
    rng = np.random.default_rng(seed)
    truth = np.zeros(case.variables)
    truth[rng.permutation(case.variables)[:STRONG]] = rng.choice([-1, 1], STRONG)
    X, X_test = (rng.normal(size=(n, case.variables)).astype(np.float32) for n in (case.samples, TEST))
    y, y_test = (x @ truth + rng.normal(size=len(x)) for x in (X, X_test))
    key = jax.random.key(seed)
    folds = np.asarray(jax.random.permutation(key, jnp.arange(case.samples) % FOLDS))
    return Draw(X, y.astype(np.float32), X_test, y_test, truth, folds)


@functools.partial(jax.jit, static_argnums=0)
def _tuned(case: Case, key, D, y):
    """Coefficients of the lasso and of the relaxed lasso, each tuned by the same cross-validation; and its `φ`."""
    code, seen = lasso.cross_validate(key, D, y, phis=PHIS, folds=FOLDS, n_lambdas=case.L, eps=10 * EPS)
    lam = seen.lams[jnp.argmin(seen.error[:, 0])]
    return lasso.lasso(D, y, lam)[0].dense(), code.dense(), seen.phi


def _scikit_learn_cv() -> Callable[[Case, Draw], np.ndarray]:
    from sklearn.linear_model import LassoCV  # pyright: ignore[reportMissingImports]

    def fit(case: Case, drawn: Draw) -> np.ndarray:
        splits = [(np.flatnonzero(drawn.folds != fold), np.flatnonzero(drawn.folds == fold)) for fold in range(FOLDS)]
        top = np.abs(drawn.X.T @ drawn.y).max() / case.samples
        alphas = top * np.geomspace(1, 10 * EPS, case.L)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            model = LassoCV(alphas=alphas, cv=splits, fit_intercept=False, max_iter=10**5)
            return model.fit(np.asfortranarray(drawn.X, np.float64), drawn.y.astype(np.float64)).coef_

    return fit


def regressions(case: Case, with_peers: bool) -> list[dict[str, Any]]:
    """A row of the table for each way to tune, the mean over all draws."""
    draws = [draw(case, seed) for seed in range(case.repeats)]
    found: dict[str, list[np.ndarray]] = {"lasso": [], "relaxed lasso": []}
    seconds, phis = [], []
    say("jaxsae: cross-validation")
    for seed, drawn in enumerate(draws):
        arguments = jax.random.key(seed), jnp.asarray(drawn.X.T), jnp.asarray(drawn.y)
        start = time.perf_counter()
        plain, relaxed, phi = jax.block_until_ready(_tuned(case, *arguments))
        seconds.append(time.perf_counter() - start)
        found["lasso"].append(np.asarray(plain))
        found["relaxed lasso"].append(np.asarray(relaxed))
        phis.append(float(phi))
    both = statistics.median(seconds)
    table = [_summary(name, draws, codes) | {"seconds": both} for name, codes in found.items()]
    table[1]["mean_phi"] = float(np.mean(phis))
    plain, relaxed = (_errors(draws, codes) for codes in found.values())
    table[1]["better_than_lasso"] = int(np.sum(relaxed < plain))
    if with_peers:
        table.append(_peer_regressions("scikit-learn LassoCV", _scikit_learn_cv, case, draws))
    return table


def _peer_regressions(name: str, load: Callable[[], Any], case: Case, draws: list[Draw]) -> dict[str, Any]:
    try:
        fit = load()
    except ImportError as error:
        return {"method": name, "note": name_missing(error)}
    say(name)
    codes, seconds = [], []
    for drawn in draws:
        start = time.perf_counter()
        codes.append(fit(case, drawn))
        seconds.append(time.perf_counter() - start)
    return _summary(name, draws, codes) | {"seconds": statistics.median(seconds)}


def _errors(draws: list[Draw], codes: list[np.ndarray]) -> np.ndarray:
    return np.array([np.mean((d.y_test - d.X_test @ z) ** 2) for d, z in zip(draws, codes, strict=True)])


def _summary(method: str, draws: list[Draw], codes: list[np.ndarray]) -> dict[str, Any]:
    errors = _errors(draws, codes)
    chosen = [(z != 0, d.truth != 0) for d, z in zip(draws, codes, strict=True)]
    noise, strong = (np.array([(on & side(true)).sum() for on, true in chosen]) for side in (np.invert, np.asarray))
    return {
        "method": method,
        "noise_variables": float(noise.mean()),
        "noise_error": float(noise.std(ddof=1) / np.sqrt(len(draws))),
        "strong_variables": float(strong.mean()),
        "test_error": float(errors.mean()),
        "test_error_error": float(errors.std(ddof=1) / np.sqrt(len(draws))),
    }


def markdown(report: dict[str, Any], machine: str) -> Iterator[str]:
    """Both tables as GitHub markdown."""
    case = Case(**report["case"])
    yield (
        f"{machine}; d {case.d}, m {case.m}, paths of {case.L} penalties down to {EPS:g} λ_max, a gap of {GATE:g} at "
        f"most."
    )
    lines = ["| solver | rows | ms a path | quartiles | worst gap | |", "|---|--:|--:|--:|--:|---|"]
    for row in report["paths"]:
        if "ms" not in row:
            lines.append(f"| {row['solver']} | | | | | {row['note']} |")
            continue
        low, high = row["quartiles"]
        note = "" if row["gate_met"] else "gate not met"
        lines.append(
            f"| {row['solver']} | {row['rows']:,} | {row['ms']:.2f} | {low:.2f} to {high:.2f} | {row['gap']:.0e} | "
            f"{note} |"
        )
    yield "\n".join(lines)
    yield (
        f"n {case.samples}, p {case.variables:,}, {STRONG} variables of coefficient ±1 under noise of variance 1, "
        f"{case.repeats} draws, {FOLDS} folds; means with standard errors."
    )
    lines = [
        "| tuned by cross-validation | noise variables | relevant ones | test error | s |",
        "|---|--:|--:|--:|--:|",
    ]
    for row in report["regressions"]:
        if "test_error" not in row:
            lines.append(f"| {row['method']} | {row['note']} | | | |")
            continue
        lines.append(
            f"| {row['method']} | {row['noise_variables']:.1f} ± {row['noise_error']:.1f} | "
            f"{row['strong_variables']:.2f} | {row['test_error']:.3f} ± {row['test_error_error']:.3f} | "
            f"{row['seconds']:.2f} |"
        )
    yield "\n".join(lines)
