"""Other solvers, each as a competent user would run it: jitted, in chunks of rows, from a warm start.

A peer is loaded by a function that imports what it needs and returns `solve(dictionary, y, indices, start, *, effort,
**variant) -> values`: the dictionary `[m + 1 d]` ends in a row of zeros for unused slots, `y [n d]` has rows of norm 1,
and indices, starting values and values are `[n k]`. An effort sets its accuracy: a number of
iterations, or a tolerance.
"""

import importlib
import importlib.util
import runpy
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

Solve = Callable[..., Any]


class Peer(NamedTuple):
    """One line of the table of peers."""

    name: str
    kind: str  # published, or a baseline of our own
    library: str  # type of its arrays: jax, torch or numpy
    load: Callable[[], Solve]
    efforts: tuple  # from cheap to expensive
    variants: tuple[dict[str, Any], ...]  # ways to run it; the fastest counts
    most_rows: int | None = None  # a slow peer is timed on fewer


def to_arrays(library: str, arrays: tuple[np.ndarray, ...]) -> tuple:
    """Arrays in the form that a library takes, on a GPU if it has one."""
    if library == "torch":
        torch = importlib.import_module("torch")
        device = "cuda" if torch.cuda.is_available() else "cpu"
        return tuple(torch.tensor(array, device=device) for array in arrays)
    return tuple(map({"jax": jnp.asarray, "numpy": np.asarray}[library], arrays))


# --- Shared by peers


def _map_rows(solve_row: Callable, chunk: int | None, *arrays: jax.Array) -> Any:
    """Solve rows in vmapped chunks, one after another; row by row if `chunk` is None."""
    return jax.lax.map(lambda row: solve_row(*row), arrays, batch_size=chunk)


def _gram_problems(dictionary, y, indices, chunk: int) -> tuple[jax.Array, jax.Array]:
    """`G [n k k]` and `c [n k]`; the diagonal is 1 for unused slots, so that `G` stays positive definite."""

    def row(y, indices):
        atoms = dictionary[indices]
        return atoms @ atoms.T + jnp.diag((indices == len(dictionary) - 1).astype(y.dtype)), atoms @ y

    # On a CPU one row at a time is four times as fast as a batch; accelerators need the batch.
    return _map_rows(row, None if jax.default_backend() == "cpu" else chunk, y, indices)


def _curvature(product: Callable, like: jax.Array) -> jax.Array:
    """A bound on the largest eigenvalue of a Gram matrix that holds in practice: power iteration, and a margin.

    `like` has the shape of what `product` takes, one vector in the last axis; never 0, for rows without support.
    """
    tiny = jnp.finfo(like.dtype).tiny

    def norm(v):
        return jnp.maximum(jnp.linalg.norm(v, axis=-1, keepdims=True), tiny)

    v = jax.lax.fori_loop(0, 20, lambda _, v: product(v / norm(v)), product(jnp.ones_like(like)))
    return 1.02 * norm(v)


def _torch_map(solve_part: Callable, chunk: int, *arrays: Any) -> Any:
    torch = importlib.import_module("torch")
    with torch.inference_mode():
        parts = zip(*(array.split(chunk) for array in arrays), strict=True)
        return torch.cat([solve_part(*part) for part in parts]).cpu()  # which waits until it is done


# --- Published solvers


def scipy_nnls() -> Solve:
    """`scipy.optimize.nnls`, Lawson and Hanson's active set, in a loop over rows."""
    nnls = importlib.import_module("scipy.optimize").nnls

    def solve(dictionary, y, indices, start, *, effort, triangular: bool):
        def row(y, indices):
            atoms = np.asarray(dictionary[indices].T, np.float64)
            if triangular:  # the same least squares in k + 1 equations instead of d
                factor: Any = np.linalg.qr(np.column_stack([atoms, y]), mode="r")
                atoms, y = factor[:, :-1], factor[:, -1]
            return nnls(atoms, y, maxiter=effort * indices.size)[0]

        return np.stack([row(*each) for each in zip(y, indices, strict=True)]).astype(np.float32)

    return solve


def jaxnnls() -> Solve:
    """`jaxnnls`, an interior point method; its tolerance is absolute and fixed, so the effort is the scale of `y`."""
    pdip = importlib.import_module("jaxnnls.pdip")

    def solve(dictionary, y, indices, start, *, effort, chunk):
        def row(gram, c):
            z, _, dual, _, _ = pdip.solve_nnls(gram, effort * c)
            return jnp.where(z > dual, z, 0) / effort  # its iterates are interior: set inactive values to the bound

        return _map_rows(row, chunk, *_gram_problems(dictionary, y, indices, chunk))

    return solve


def jaxopt_projected_gradient(on_gram: bool) -> Solve:
    """`jaxopt.ProjectedGradient`, accelerated: on `½zᵀGz − cᵀz`, or directly on `½‖y − Aᵀz‖²`."""
    jaxopt = importlib.import_module("jaxopt")

    def minimise(value_and_gradient, product, start, tolerance):
        step = 1 / _curvature(product, start)[0]
        solver = jaxopt.ProjectedGradient(
            value_and_gradient,
            jaxopt.projection.projection_non_negative,
            value_and_grad=True,
            stepsize=lambda _: step,  # its line search stalls in float32, at a KKT residual of 1e-3
            maxiter=5000,
            tol=tolerance,
            implicit_diff=False,
            unroll=False,  # else, without implicit differentiation, it runs `maxiter` steps whatever the tolerance
        )
        return solver.run(start).params

    def solve(dictionary, y, indices, start, *, effort, chunk):
        def row_on_x(y, indices, start):
            atoms = dictionary[indices]

            def objective(z):
                r = z @ atoms - y
                return 0.5 * r @ r, atoms @ r

            return minimise(objective, lambda v: atoms @ (v @ atoms), start, effort)

        def row_on_gram(gram, c, start):
            def objective(z):
                g = gram @ z - c
                return 0.5 * z @ (g - c), g

            return minimise(objective, lambda v: gram @ v, start, effort)

        if on_gram:
            return _map_rows(row_on_gram, chunk, *_gram_problems(dictionary, y, indices, chunk), start)
        return _map_rows(row_on_x, chunk, y, indices, start)

    return solve


def optax_nnls() -> Solve:
    """`optax.nnls`, fast projected gradient, a fixed number of iterations from zero."""
    optax = importlib.import_module("optax")

    def solve(dictionary, y, indices, start, *, effort, chunk):
        def row(y, indices, start):
            atoms = dictionary[indices]
            gram = atoms @ atoms.T  # computed once: the compiler sees that optax needs it too
            return optax.nnls(atoms.T, y, effort, L=_curvature(lambda v: gram @ v, start)[0])  # its own bound is looser

        return _map_rows(row, chunk, y, indices, start)

    return solve


def overcomplete_nnls() -> Solve:
    """`overcomplete`'s `batched_matrix_nnls`, projected gradient with the step `1/‖G‖_F`."""
    importlib.import_module("torch")
    spec = importlib.util.find_spec("overcomplete")
    if spec is None or spec.origin is None:
        raise ModuleNotFoundError("No module named 'overcomplete'", name="overcomplete")
    # The file alone: the package imports torchvision, timm and OpenCV, which need a display's libraries.
    nnls = runpy.run_path(str(Path(spec.origin).parent / "optimization/utils.py"))["batched_matrix_nnls"]

    def solve(dictionary, y, indices, start, *, effort, chunk):
        def part(y, indices, start):
            return nnls(dictionary[indices], y, max_iter=effort, tol=0, Z_init=start)

        return _torch_map(part, chunk, y, indices, start)

    return solve


# --- Baselines of our own


def torch_projected_gradient() -> Solve:
    """Batched Nesterov steps in Gram space with a step per row and gradient restart, in torch."""
    torch = importlib.import_module("torch")

    def solve(dictionary, y, indices, start, *, effort, chunk):
        def part(y, indices, start):
            atoms, z = dictionary[indices], start[:, :, None]
            gram, c = atoms @ atoms.mT, atoms @ y[:, :, None]
            v = torch.ones_like(c)
            for _ in range(20):
                v = gram @ torch.nn.functional.normalize(v, dim=1)
            step = 1 / (1.02 * v.norm(dim=1, keepdim=True)).clamp_min(torch.finfo(v.dtype).tiny)
            w, t = z, torch.ones_like(step)
            for _ in range(effort):
                slope = torch.baddbmm(-c, gram, w)
                moved = (w - step * slope).clamp_(min=0)
                change = moved - z
                uphill = (slope * change).sum(1, keepdim=True) > 0
                grown = torch.where(uphill, 1.0, (1 + (1 + 4 * t * t).sqrt()) / 2)
                w = moved + torch.where(uphill, 0.0, (t - 1) / grown) * change
                z, t = moved, grown
            return z[:, :, 0]

        return _torch_map(part, chunk, y, indices, start)

    return solve


def dense_projected_gradient() -> Solve:
    """Projected gradient on dense codes `[n m]` under a mask of the support, as the method is usually written."""

    def solve(dictionary, y, indices, start, *, effort):
        atoms, rows = dictionary[:-1], jnp.arange(len(y))[:, None]
        shape = (len(y), len(atoms))
        mask = jnp.zeros(shape, y.dtype).at[rows, indices].set(1, mode="drop")
        z = jnp.zeros(shape, y.dtype).at[rows, indices].set(start, mode="drop")
        step = 1 / _curvature(lambda v: mask * ((v @ atoms) @ atoms.T), mask)
        z = jax.lax.fori_loop(0, effort, lambda _, z: mask * jax.nn.relu(z - step * ((z @ atoms - y) @ atoms.T)), z)
        return z.at[rows, indices].get(mode="fill", fill_value=0)

    return solve


_STEPS = tuple(6 * 2**i for i in range(11))  # 6 ... 6144
_TOLERANCES = (1e-3, 3e-4, 1e-4, 3e-5, 1e-5, 3e-6, 1e-6)
_SCALES = (1.0, 10.0, 100.0, 1e3, 1e4, 1e5)
_CHUNKS = tuple({"chunk": chunk} for chunk in (256, 64, 16, 1024, 2**20))  # the last: all rows at once

PEERS = (
    Peer("scipy nnls", "published", "numpy", scipy_nnls, (10,), ({"triangular": True}, {"triangular": False}), 256),
    Peer("jaxnnls", "published", "jax", jaxnnls, _SCALES, _CHUNKS),
    Peer("jaxopt PG on x", "published", "jax", lambda: jaxopt_projected_gradient(False), _TOLERANCES, _CHUNKS, 512),
    Peer("jaxopt PG on G", "published", "jax", lambda: jaxopt_projected_gradient(True), _TOLERANCES, _CHUNKS),
    Peer("optax nnls", "published", "jax", optax_nnls, _STEPS, _CHUNKS),
    Peer("overcomplete nnls", "published", "torch", overcomplete_nnls, _STEPS, _CHUNKS),
    Peer("torch PG, Nesterov", "baseline", "torch", torch_projected_gradient, _STEPS, _CHUNKS),
    Peer("dense masked PG", "baseline", "jax", dense_projected_gradient, _STEPS, ({},), 64),
)
