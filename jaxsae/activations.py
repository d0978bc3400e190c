"""Activations: from pre-activations to a code, each a small pytree that holds its own parameters.

An activation has three members. `k` is the number of slots it fixes, or None. Calling it gives the dense code
`[*b m]`; `code(pre, capacity)` gives the same code as a `SparseCode`.
"""

from typing import Protocol

import jax
import jax.numpy as jnp
from flax import struct
from jaxtyping import Array, Float

from jaxsae import codes
from jaxsae.codes import SparseCode


class Activation(Protocol):
    """What `SAE.activation` must offer."""

    @property
    def k(self) -> int | None:
        """Number of active latents that the activation fixes, or None."""
        ...

    def __call__(self, pre: Float[Array, "*b m"]) -> Float[Array, "*b m"]:
        """The dense code."""
        ...

    def code(self, pre: Float[Array, "*b m"], capacity: int) -> SparseCode:
        """The same code in `capacity` slots a row."""
        ...


@struct.dataclass
class ReLU:
    """Keep what is positive: `z = max(pre, 0)`.

    Trained with an L1 penalty, the sparse autoencoder of Bricken et al. (2023) and Cunningham et al. (2023).

    Example:
      >>> import jax.numpy as jnp, jaxsae
      >>> jaxsae.ReLU()(jnp.array([-1.0, 2.0]))
      Array([0., 2.], dtype=float32)
    """

    @property
    def k(self) -> None:
        """None: as many latents are active as are positive."""
        return

    def __call__(self, pre: Float[Array, "*b m"]) -> Float[Array, "*b m"]:
        """The dense code."""
        return jax.nn.relu(pre)

    def code(self, pre: Float[Array, "*b m"], capacity: int) -> SparseCode:
        """The `capacity` largest of the positive pre-activations; `overflow` counts the others."""
        return codes.from_dense(self(pre), capacity)


@struct.dataclass
class TopK:
    """Keep the `k` largest pre-activations of each row, those of them that are positive.

    Attributes:
      k: number of active latents a row; static.

    Raises:
      ValueError: if `k < 1`.

    Example:
      >>> import jax.numpy as jnp, jaxsae
      >>> jaxsae.TopK(1)(jnp.array([1.0, 3.0, 2.0]))
      Array([0., 3., 0.], dtype=float32)

    Source: Gao et al. (2024), Section 2.3; Makhzani & Frey (2013).
    """

    k: int = struct.field(pytree_node=False)

    def __post_init__(self):
        if self.k < 1:
            raise ValueError(f"TopK got k = {self.k}; pass k of at least 1.")

    def __call__(self, pre: Float[Array, "*b m"]) -> Float[Array, "*b m"]:
        """The dense code, by comparison with the k-th largest: no scatter, forwards or backwards."""
        self._validate(pre.shape[-1])
        # The barrier keeps all of the top-k in use, without which XLA's CPU backend sorts whole rows instead.
        top, indices = jax.lax.optimization_barrier(jax.lax.top_k(jax.lax.stop_gradient(pre), self.k))
        least, last = top[..., -1:], indices[..., -1:]
        # Equal values are taken in order of index, here as in `top_k`; NaN stays NaN.
        dropped = (pre < least) | ((pre == least) & (jnp.arange(pre.shape[-1]) > last))
        return jnp.where(dropped, 0, jax.nn.relu(pre))

    def _validate(self, m: int) -> None:
        if self.k > m:
            raise ValueError(f"TopK got k = {self.k} for {m} latents; pass k of at most {m}.")

    def code(self, pre: Float[Array, "*b m"], capacity: int) -> SparseCode:
        """The code in its own `k` slots, followed by empty ones up to `capacity`."""
        m = pre.shape[-1]
        self._validate(m)
        if capacity < self.k:
            raise ValueError(f"TopK fixes k = {self.k}, but got capacity {capacity}; leave capacity out.")
        code = codes.from_dense(jax.nn.relu(pre), self.k)
        # `from_dense` counts every positive latent that it leaves out; leaving them out is what TopK means.
        spare = [(0, 0)] * (pre.ndim - 1) + [(0, capacity - self.k)]
        return SparseCode(
            values=jnp.pad(code.values, spare),
            indices=jnp.pad(code.indices, spare, constant_values=m),
            num_latents=m,
        )
