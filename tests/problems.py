"""Random problems that the tests share, and what they are judged by: plain numpy in float64."""

import contextlib
import errno
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.optimize
from flax import struct

import jaxsae
from jaxsae import SparseCode
from jaxsae._core.files import InputError
from jaxsae.app.cli import main


class Problem(NamedTuple):
    """Rows to refit: a dictionary `[m d]`, targets `[*b d]`, and supports with random starting values `[*b k]`."""

    dictionary: jax.Array
    y: jax.Array
    code: SparseCode


def problem(seed=0, *, batch=(8,), d=16, m=32, k=4, coherence=0.0, start="random", dtype=np.float32) -> Problem:
    """Atoms of unequal norm with `coherence` between them, and targets that leave some bounds active."""
    rng = np.random.default_rng(seed)
    atoms = (1 - coherence) * rng.normal(size=(m, d)) + coherence * rng.normal(size=d)
    atoms *= rng.uniform(0.5, 2.0, (m, 1))
    indices = np.argsort(rng.random((*batch, m)), axis=-1)[..., :k]
    z = rng.exponential(size=indices.shape) * (rng.random(indices.shape) < 0.8)
    y = np.einsum("...k,...kd->...d", z, atoms[indices]) + 0.5 * rng.normal(size=(*batch, d))
    values = rng.exponential(size=indices.shape) if start == "random" else np.zeros(indices.shape)
    code = SparseCode(jnp.asarray(values, dtype), jnp.asarray(indices, jnp.int32), m)
    return Problem(jnp.asarray(atoms, dtype), jnp.asarray(y, dtype), code)


def with_code(code: SparseCode, **arrays) -> SparseCode:
    """The code with other values or indices, as numpy or JAX arrays."""
    return code.replace(**{name: jnp.asarray(array) for name, array in arrays.items()})


def f64(array) -> np.ndarray:
    return np.asarray(array).astype(np.float64)


def atoms_of(dictionary, code: SparseCode) -> np.ndarray:
    """`[*b k d]`, zero for unused slots."""
    padded = np.concatenate([f64(dictionary), np.zeros((1, dictionary.shape[1]))])
    return padded[np.asarray(code.indices)]


def residual(dictionary, y, code: SparseCode) -> np.ndarray:
    return f64(y) - np.einsum("...k,...kd->...d", f64(code.values), atoms_of(dictionary, code))


def objective(dictionary, y, code: SparseCode, ridge=0.0) -> np.ndarray:
    """`½‖y − Aᵀz‖² + ½ ridge ‖z‖²` of each row."""
    penalty = ridge * (f64(code.values) ** 2).sum(-1)
    return 0.5 * ((residual(dictionary, y, code) ** 2).sum(-1) + penalty)


def nmse(dictionary, y, code: SparseCode) -> np.ndarray:
    """Squared error relative to that of a code of zeros, per row."""
    return (residual(dictionary, y, code) ** 2).sum(-1) / (f64(y) ** 2).sum(-1)


def projected(code: SparseCode, nonnegative=True) -> SparseCode:
    return with_code(code, values=np.maximum(code.values, 0)) if nonnegative else code


def optimum(dictionary, y, code: SparseCode, nonnegative=True, ridge=0.0) -> SparseCode:
    """The best values, row by row, by scipy or lapack in float64; a ridge is k more equations."""
    z = np.zeros(code.values.shape)
    if z.size == 0:  # scipy 1.17 aborts the process on a system of no columns
        return code
    for row in np.ndindex(z.shape[:-1]):
        atoms = atoms_of(dictionary, code)[row]
        system = np.concatenate([atoms.T, np.sqrt(ridge) * np.eye(len(atoms))])
        target = np.concatenate([f64(y)[row], np.zeros(len(atoms))])
        z[row] = scipy_nnls(system, target) if nonnegative else np.linalg.lstsq(system, target)[0]
    return code.replace(values=z)


def scipy_nnls(A: np.ndarray, b: np.ndarray) -> np.ndarray:
    """`min ‖Ax − b‖` over `x ≥ 0` by scipy, or an error where its answer is no optimum: scipy 1.15 gave such answers.

    The gradient may be rounding: of sums whose terms are as large as `‖a_i‖ (‖b‖ + Σ_j x_j ‖a_j‖)`.
    """
    # Rows of zeros change no solution, and scipy 1.17 aborts the process on a matrix wider than it is high.
    n = A.shape[1]
    x, _ = scipy.optimize.nnls(np.pad(A, ((0, n), (0, 0))), np.pad(b, (0, n)))
    norms, gradient = np.linalg.norm(A, axis=0), A.T @ (A @ x - b)
    violation = np.where(x > 0, np.abs(gradient), np.maximum(-gradient, 0))
    allowed = 1e-10 * norms * (np.linalg.norm(b) + x @ norms)
    if not (np.all(x >= 0) and np.all(violation <= allowed)):
        raise ArithmeticError(f"scipy's answer is no optimum: its gradient violates the KKT conditions by {violation}")
    return x


def objective_gap(dictionary, y, code: SparseCode, nonnegative=True) -> np.ndarray:
    """How much more normalised error each row has than the best possible."""
    return nmse(dictionary, y, code) - nmse(dictionary, y, optimum(dictionary, y, code, nonnegative))


def assert_same_bits(a, b):
    """Two pytrees of the same structure, bitwise equal, NaN equal to NaN."""
    jax.tree.map(np.testing.assert_array_equal, jax.tree.map(np.asarray, a), jax.tree.map(np.asarray, b))


def activations(seed=0, *, batch=(8,), d=16, dtype=np.float32) -> jax.Array:
    return jnp.asarray(np.random.default_rng(1000 + seed).normal(size=(*batch, d)), dtype)


def every_activation(m=32, k=4, dtype=np.float32) -> dict[str, jaxsae.autoencoder.activations.Activation]:
    """One of each, by name, with parameters that matter. A new one has its row here, and so all laws and losses."""
    each = [0.1 * activations(seed, batch=(), d=m, dtype=dtype) for seed in range(4)]
    return {
        "ReLU": jaxsae.ReLU(),
        "TopK": jaxsae.TopK(k),
        "AbsTopK": jaxsae.AbsTopK(k),
        "GroupMax": jaxsae.GroupMax(4),  # has to divide m
        "BatchTopK": jaxsae.BatchTopK(k, jnp.asarray(0.1, dtype)),
        "JumpReLU": jaxsae.JumpReLU(0.1 + jnp.abs(each[0]), bandwidth=0.5),
        "Gated": jaxsae.Gated(*each[1:]),
        "MatchingPursuit": jaxsae.MatchingPursuit(max_steps=k),
    }


def sae(seed=0, *, d=16, m=32, activation=None, dtype=np.float32) -> jaxsae.SAE:
    """An SAE with biases that matter, and an encoder that is not quite the decoder's transpose."""
    atoms = activations(seed + 1, batch=(m,), d=d, dtype=dtype)
    return jaxsae.SAE(
        W_enc=atoms.T + 0.1 * activations(seed + 2, batch=(d,), d=m, dtype=dtype),
        b_enc=0.1 * activations(seed + 3, batch=(), d=m, dtype=dtype),
        W_dec=atoms,
        b_dec=activations(seed + 4, batch=(), d=d, dtype=dtype),
        activation=activation or jaxsae.TopK(4),
    )


def rows(n, d=16) -> np.ndarray:
    """Rows to be changed or saved."""
    return np.array(activations(batch=(n,), d=d))


def sparse_rows(n=4096, *, d=32, atoms=32, k=3, seed=0):
    """Rows that are sums of `k` of the atoms, and the atoms: a problem with a known solution."""
    rng = np.random.default_rng(seed)
    dictionary = rng.normal(size=(atoms, d))
    dictionary /= np.linalg.norm(dictionary, axis=1, keepdims=True)
    z = np.zeros((n, atoms))
    np.put_along_axis(z, np.argsort(rng.random(z.shape), axis=1)[:, :k], rng.uniform(0.5, 1.5, (n, k)), axis=1)
    return (z @ dictionary).astype(np.float32), dictionary


each_sign = pytest.mark.parametrize("nonnegative", [True, False], ids=["nonnegative", "free"])


def refused(match, call, *arguments, **options) -> str:
    """What is said in one line, of an `InputError` that matches."""
    with pytest.raises(InputError, match=match) as caught:
        call(*arguments, **options)
    assert "\n" not in str(caught.value)
    assert str(caught.value).endswith(".")
    return str(caught.value)


def cli(*argv) -> int:
    """The exit code of a command line."""
    return main([str(argument) for argument in argv])


TRAINING = ("--latents", 32, "--batch", 64, "--steps", 60, "--heldout", 100, "--learning-rate", 1e-2)
TRAININGS = {
    "relu": ("--l1", 0.05),
    "alignedrelu": ("--l1", 0.05),
    "topk": ("--k", 4, "--multi-topk"),
    "abstopk": ("--k", 4),
    "groupmax": ("--k", 4),
    "batchtopk": ("--k", 4, "--idle-after", 200),
    "jumprelu": ("--k", 4),
    "gated": ("--l1", 0.05, "--no-auxk"),
}


def train(data, out, activation, *more) -> int:
    """The exit code of a small training; what is in `more` goes before."""
    sparse = TRAININGS[activation]
    return cli("train", "--data", data, "--out", out, "--activation", activation, *TRAINING, *sparse, *more)


def full_disk(*arguments, **options):
    raise OSError(errno.ENOSPC, "No space left on device")


def dying(at, after, *functions):
    """From now on the process is killed before or after call number `at` of these functions, `(where, name)`.

    Its source is run in processes of their own, so all that it needs is in it.
    """
    import itertools
    import os
    import signal

    numbers = itertools.count()

    def wrap(call):
        def wrapped(*arguments, **options):
            due = next(numbers) == at
            if due and not after:
                os.kill(os.getpid(), signal.SIGKILL)
            result = call(*arguments, **options)
            if due:
                os.kill(os.getpid(), signal.SIGKILL)
            return result

        return wrapped

    for where, name in functions:
        setattr(where, name, wrap(getattr(where, name)))


@contextlib.contextmanager
def compilations():
    """The number of programs that XLA compiles meanwhile."""
    seen: list[str] = []

    def count(event, duration, **_):
        if event == "/jax/core/compile/backend_compile_duration":
            seen.append(event)

    jax.monitoring.register_event_duration_secs_listener(count)
    try:
        yield seen
    finally:
        jax.monitoring.unregister_event_duration_listener(count)


@struct.dataclass
class Int8:
    """A dictionary that is not an array: atoms as int8, with a scale each."""

    q: jax.Array  # [m d]
    scale: jax.Array  # [m 1]

    def take(self, indices):
        return self.q[indices].astype(jnp.float32) * self.scale[indices]

    def correlate(self, r):
        products = jnp.matmul(r, self.q.astype(r.dtype).T, precision=jax.lax.Precision.HIGHEST)
        return products * self.scale[:, 0]

    @classmethod
    def quantise(cls, dictionary):
        scale = jnp.max(jnp.abs(dictionary), axis=1, keepdims=True) / 127
        return cls(jnp.round(dictionary / jnp.where(scale > 0, scale, 1)).astype(jnp.int8), scale)
