"""Time non-negative least squares on large, dense, ill-conditioned problems, those of inverting images.

Every solver gets the same `G = AᵀA` and `c = Aᵀb`, in float64 or rounded to float32, and runs at its default settings.
*Excess* is how far the error `½‖b − Az‖²` is above that of scipy's optimum, whose KKT conditions are checked, relative
to it.
"""

import functools
import statistics
import time
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

import jaxsae
from benchmarks.clock import name_missing, say, timings


class Case(NamedTuple):
    """A problem to solve, `lanes` of them at once with other noise."""

    name: str
    make: Callable[[int], tuple[np.ndarray, np.ndarray]]  # of a seed: A [d n], b [d]
    lanes: int = 1


def pixels(n: int, width: float, seed: int, noise: float = 0.02) -> tuple[np.ndarray, np.ndarray]:
    """A source of six blobs on `n` pixels, blurred by a Gaussian of this width, on a finer image with noise."""
    rng, side = np.random.default_rng(seed), int(np.ceil(np.sqrt(n)))
    places = _grid(np.arange(side))[:n]
    image = _grid(np.linspace(-0.5, side - 0.5, int(1.4 * side)))
    A = np.exp(-_squares(image, places) / (2 * width**2))
    centres, widths = rng.uniform(0, side, (6, 2)), rng.uniform(0.6, max(side / 10, 0.7), 6)
    source = np.exp(-_squares(places, centres) / (2 * widths**2)) @ rng.uniform(0.5, 2, 6)
    b = A @ np.where(source < 0.05, 0, source)
    return A, b + noise * b.max() * rng.normal(size=b.shape)


def gaussians(n: int, seed: int, noise: float = 0.01) -> tuple[np.ndarray, np.ndarray]:
    """A galaxy of `n` concentric Gaussians whose widths are nearly the same from one to the next."""
    rng = np.random.default_rng(seed)
    A = np.exp(-_squares(_grid(np.linspace(-4, 4, 50)), np.zeros((1, 2))) / (2 * np.geomspace(0.05, 4, n) ** 2))
    b = A @ np.where(rng.random(n) < 0.3, rng.uniform(0.2, 2, n), 0)
    return A, b + noise * b.max() * rng.normal(size=b.shape)


def _grid(axis: np.ndarray) -> np.ndarray:
    return np.stack(np.meshgrid(axis, axis, indexing="ij"), -1).reshape(-1, 2).astype(float)


def _squares(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Squared distances `[n m]`."""
    return ((a[:, None] - b[None]) ** 2).sum(-1)


def _pixels(n: int, width: float, lanes: int = 1) -> Case:
    name = f"{n} pixels, width {width:g}" + (f", {lanes} at once" if lanes > 1 else "")
    return Case(name, functools.partial(pixels, n, width), lanes)


SIZES = {
    "tiny": [Case("12 Gaussians", functools.partial(gaussians, 12)), _pixels(36, 0.7, lanes=2)],
    "paper": [
        Case("40 Gaussians", functools.partial(gaussians, 40)),
        _pixels(400, 1.0),
        _pixels(400, 1.5),
        _pixels(900, 1.0),
        _pixels(1581, 0.7),
        _pixels(1581, 1.0),
        _pixels(1581, 1.0, lanes=3),
    ],
}


def optimum(A: np.ndarray, b: np.ndarray) -> np.ndarray:
    """The best values by scipy in float64, if they satisfy the KKT conditions: scipy 1.15 was wrong in silence."""
    import scipy.optimize

    z, _ = scipy.optimize.nnls(A, b, maxiter=100 * A.shape[1])
    slope = A.T @ (b - A @ z) / np.linalg.norm(A, axis=0) / np.linalg.norm(b)
    wrong = max(slope.max(), np.abs(slope[z > 0]).max(initial=0))
    if wrong > 1e-9:
        raise ArithmeticError(f"scipy's nnls ended with a KKT residual of {wrong:.1e}; expected at most 1e-9.")
    return z


def error(A: np.ndarray, b: np.ndarray, z: np.ndarray) -> float:
    """`½‖b − Az‖²`."""
    return 0.5 * float(np.sum((b - A @ np.asarray(z, np.float64)) ** 2))


# --- Solvers: of G and c, the values and the number of steps

Solve = Callable[[jax.Array, jax.Array], tuple[jax.Array, Any]]


def _ours(solver: jaxsae.solvers.Solver | None, G, c) -> tuple[jax.Array, Any]:
    z, info = jaxsae.nnls(G, c, None, solver)
    return z, info.steps


def _jaxnnls() -> Solve:
    import jaxnnls  # pyright: ignore[reportMissingImports]

    def solve(G, c):
        return jaxnnls.solve_nnls_primal(G, c), jaxnnls.solve_nnls(jax.lax.stop_gradient(G), c)[-1]

    return solve


def _qpax() -> Solve:
    import qpax  # pyright: ignore[reportMissingImports]

    def solve(G, c):
        none, eye = jnp.zeros((0, c.size), c.dtype), jnp.eye(c.size, dtype=c.dtype)
        problem = G, -c, none, jnp.zeros(0, c.dtype), -eye, jnp.zeros(c.size, c.dtype)
        return qpax.solve_qp_primal(*problem), qpax.solve_qp(*jax.lax.stop_gradient(problem))[-1]

    return solve


def _jaxopt() -> Solve:
    import jaxopt  # pyright: ignore[reportMissingImports]

    descent = jaxopt.ProjectedGradient(
        lambda z, G, c: 0.5 * z @ G @ z - c @ z,
        jaxopt.projection.projection_non_negative,
        stepsize=1.0,
        maxiter=2_000,
        tol=1e-8,
    )

    def solve(G, c):
        scale = 1 / jnp.linalg.norm(jax.lax.stop_gradient(G), 2)
        result = descent.run(jnp.zeros_like(c), None, scale * G, scale * c)
        return result.params, result.state.iter_num

    return solve


_MOST_FOR_GRADIENTS = 100  # variables, for a method that takes thousands of steps on them

PEERS: dict[str, Callable[[], Solve]] = {"jaxnnls": _jaxnnls, "qpax": _qpax, "jaxopt": _jaxopt}
OURS: dict[str, jaxsae.solvers.Solver | None] = {
    "default": None,
    "interior point": jaxsae.InteriorPoint(tol=1e-12),
}
DTYPES = (np.float64, np.float32)


def run(size: str, *, with_peers: bool) -> list[dict[str, Any]]:
    """The table of a size: a row for each case and solver."""
    with jax.enable_x64(True):
        return [row for case in SIZES[size] for dtype in DTYPES for row in _case(case, dtype, with_peers)]


def _case(case: Case, dtype, with_peers: bool) -> Iterator[dict[str, Any]]:
    say(f"{case.name}, {dtype.__name__}")
    problems = [case.make(seed) for seed in range(case.lanes)]
    best = [error(A, b, optimum(A, b)) for A, b in problems]
    exact = [A.T @ A for A, _ in problems], [A.T @ b for A, b in problems]
    G, c = (jnp.asarray(np.stack(x), dtype) for x in exact)
    about = {"case": case.name, "dtype": dtype.__name__, "n": c.shape[1], "lanes": case.lanes}
    about["condition"] = float(np.linalg.cond(exact[0][0]))
    ours = OURS if dtype is np.float64 else {"default": None, "interior point": jaxsae.InteriorPoint(tol=1e-6)}
    solvers: dict[str, Solve] = {f"jaxsae, {name}": functools.partial(_ours, s) for name, s in ours.items()}
    calls, rows = [], []
    for name, load in PEERS.items() if with_peers else ():
        if name == "jaxopt" and c.shape[1] > _MOST_FOR_GRADIENTS:
            yield about | {"solver": name, "note": "not run: its steps are too many"}
            continue
        try:
            solvers[name] = load()
        except ImportError as missing:
            yield about | {"solver": name, "note": name_missing(missing)}
    for name, solve in solvers.items():
        say(f"  {name}")
        lanes = solve if name.startswith("jaxsae") else jax.vmap(solve)
        start = time.perf_counter()
        compiled = jax.jit(lambda G, c, lanes=lanes: lanes(G, c)[0]).lower(G, c).compile()
        compile_s = time.perf_counter() - start
        z, steps = (np.asarray(x) for x in jax.jit(lanes)(G, c))
        excess = max((error(A, b, x) - least) / least for (A, b), x, least in zip(problems, z, best, strict=True))
        slope = jax.jit(jax.grad(lambda G, c, lanes=lanes: jnp.sum(lanes(G, c)[0] ** 2), (0, 1)))(G, c)
        rows.append(about | {
            "solver": name,
            "steps": int(steps.max()),
            "excess": float(excess),
            "gradient_finite": all(bool(jnp.isfinite(x).all()) for x in slope),
            "compile_s": compile_s,
        })  # fmt: skip
        calls.append(functools.partial(compiled, G, c))
    for row, seconds in zip(rows, timings(calls), strict=True):
        low, median, high = statistics.quantiles(seconds, n=4)
        yield row | {"ms": 1000 * median, "quartiles": [1000 * low, 1000 * high]}
