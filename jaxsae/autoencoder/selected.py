"""Gradient through the selected pre-activations only, without a dense array."""

import jax
import jax.numpy as jnp
from jax.custom_derivatives import SymbolicZero

from jaxsae import sharding
from jaxsae._core import sparse
from jaxsae._core.linalg import result_type


@jax.custom_jvp
def _selected(values, indices, x, W_enc, b_enc, b_dec):
    """The values `(x − b_dec) W_enc[:, indices] + b_enc[indices]`, already computed, with their derivative."""
    return values


def _selected_tangent(primals, tangents):
    values, indices, x, W_enc, b_enc, b_dec = primals
    _, _, x_dot, W_dot, b_dot, b_dec_dot = tangents
    m, is_zero = b_enc.size, lambda dot: isinstance(dot, SymbolicZero)
    total = jnp.zeros_like(values, result_type(values.dtype, jnp.float32))
    if not is_zero(W_dot):
        total += sparse.form("values", W_dot.T, x - b_dec, indices, m=m)
    if not is_zero(x_dot):
        total += sparse.form("values", W_enc.T, x_dot, indices, m=m)
    if not is_zero(b_dot):
        total += sharding.automatic(sparse.take, indices)(b_dot, indices)
    if not is_zero(b_dec_dot):  # the same for all rows, so computed per latent, not per slot
        total -= sharding.automatic(sparse.take, indices)(b_dec_dot @ W_enc, indices)
    return values, total.astype(values.dtype)


_selected.defjvp(_selected_tangent, symbolic_zeros=True)
