"""What the kernels compute, by XLA, on every platform: what is held against them, and what answers in their place."""

import jax.numpy as jnp

from jaxsae._core import chunking, sparse
from jaxsae._core.linalg import EXACT, matmul
from jaxsae.least_squares import problems, solvers


def gather_gram(D, indices, y):
    """`G [n k k]` and `c [n k]` of `n` rows, in the dtype of `problems.accumulator`."""
    (k,), (m, d), dtype = indices.shape[1:], D.shape, problems.accumulator(D, y)

    def chunk(indices, y):
        on = sparse.used(indices, m)
        atoms = jnp.where(on[:, :, None], problems.take(D, indices, m, dtype), 0)
        G = chunking.each_row(lambda atoms: matmul(atoms, atoms.T), atoms, flops=2 * k * k * d)
        return G, jnp.einsum("nid,nd->ni", atoms, y.astype(dtype), precision=EXACT)

    row_bytes = problems.row_bytes(k, d, jnp.dtype(dtype).itemsize)
    return chunking.map_chunks(chunk, indices, y, batch=indices.shape[:1], row_bytes=row_bytes)


def solve(D, indices, y, z0, ridge, tol, max_steps, *, nonnegative: bool) -> problems.Solved:
    """Gather, Gram and FISTA of `n` rows, in the dtype of `ridge`."""
    dtype = ridge.dtype
    k, d = indices.shape[1], y.shape[1]

    def chunk(indices, y, z0):
        problem = problems.problems(D, y.astype(dtype), indices, num_latents=len(D), ridge=ridge)
        return problems.solved(solvers.FISTA(tol=tol, max_steps=max_steps), problem, z0.astype(dtype), nonnegative)

    row_bytes = 2 * problems.row_bytes(k, d, dtype.itemsize)
    return chunking.map_chunks(chunk, indices, y, z0, batch=indices.shape[:1], row_bytes=row_bytes)
