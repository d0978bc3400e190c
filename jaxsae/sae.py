"""The sparse autoencoder: its parameters, and the pure functions that act on them."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from flax import struct
from jaxtyping import Array, Float, PRNGKeyArray

from jaxsae import codes
from jaxsae.activations import Activation
from jaxsae.codes import SparseCode
from jaxsae.refit import RefitInfo, refit


@struct.dataclass
class SAE:
    """Parameters of a sparse autoencoder, a pytree.

        z = activation((x − b_dec) W_enc + b_enc),   x̂ = z W_dec + b_dec

    Attributes:
      W_enc: `[d m]`.
      b_enc: `[m]`.
      W_dec: `[m d]`, the dictionary: one latent's atom a row.
      b_dec: `[d]`.
      activation: a pytree of `activations.py`.
    """

    W_enc: Float[Array, "d m"]
    b_enc: Float[Array, " m"]
    W_dec: Float[Array, "m d"]
    b_dec: Float[Array, " d"]
    activation: Activation

    @property
    def d(self) -> int:
        """Width of the activations that it codes."""
        return self.W_dec.shape[-1]

    @property
    def m(self) -> int:
        """Number of latents."""
        return self.W_dec.shape[-2]


def init(key: PRNGKeyArray, *, d: int, m: int, activation: Activation, b_dec: Float[Array, " d"] | None = None) -> SAE:
    """Make an SAE with random unit-norm atoms and an encoder that is the decoder's transpose.

    Args:
      key: PRNG key.
      d: width of the activations.
      m: number of latents.
      activation: for example `ReLU()` or `TopK(32)`.
      b_dec: `[d]`, a centre of the data (its mean or median); zeros by default.

    Returns:
      `SAE`; `b_enc` is zero.

    Raises:
      ValueError: if a size is not positive, if `b_dec` is not `[d]`, or if the activation wants more latents than `m`.

    Example:
      >>> import jax, jaxsae
      >>> sae = jaxsae.init(jax.random.key(0), d=64, m=512, activation=jaxsae.TopK(8))
      >>> sae.W_dec.shape
      (512, 64)

    Source: Gao et al. (2024), Section 2 and Appendix A.
    """
    if d < 1 or m < 1:
        raise ValueError(f"`init` got d = {d} and m = {m}; pass sizes of at least 1.")
    if activation.k is not None and activation.k > m:
        raise ValueError(f"`init` got k = {activation.k} for m = {m} latents; pass k of at most {m}.")
    b_dec = jnp.zeros(d) if b_dec is None else jnp.asarray(b_dec)
    if b_dec.shape != (d,):
        raise ValueError(f"`init` got b_dec of shape {b_dec.shape}, expected ({d},); pass one value for each input.")
    atoms = jax.random.normal(key, (m, d), b_dec.dtype)
    atoms = atoms / jnp.linalg.norm(atoms, axis=1, keepdims=True)
    return SAE(W_enc=atoms.T, b_enc=jnp.zeros(m, b_dec.dtype), W_dec=atoms, b_dec=b_dec, activation=activation)


def pre_activations(sae: SAE, x: Float[Array, "*b d"]) -> Float[Array, "*b m"]:
    """What the activation acts on: `(x − b_dec) W_enc + b_enc`.

    Args:
      sae: the autoencoder.
      x: activations `[*b d]`.

    Raises:
      TypeError, ValueError: at trace time, if `x` is not floating point or not of width `d`.

    Example:
      >>> import jax, jax.numpy as jnp, jaxsae
      >>> sae = jaxsae.init(jax.random.key(0), d=4, m=8, activation=jaxsae.ReLU())
      >>> jaxsae.sae.pre_activations(sae, jnp.ones((3, 4))).shape
      (3, 8)
    """
    _validate(sae, x, "encode")
    return (x - sae.b_dec) @ sae.W_enc + sae.b_enc


def encode(sae: SAE, x: Float[Array, "*b d"], *, capacity: int | None = None) -> SparseCode:
    """Encode activations into a sparse code.

    Args:
      sae: the autoencoder.
      x: activations `[*b d]`.
      capacity: slots `k` a row, at most `m`; required unless the activation fixes it. Active latents beyond it are
        left out, smallest first, and counted in `code.overflow`.

    Returns:
      `SparseCode` `[*b k]`, in descending order of value.

    Raises:
      TypeError, ValueError: at trace time, if `x` or `capacity` does not fit the SAE.

    Example:
      >>> import jax, jax.numpy as jnp, jaxsae
      >>> sae = jaxsae.init(jax.random.key(0), d=4, m=8, activation=jaxsae.TopK(2))
      >>> jaxsae.encode(sae, jnp.ones((3, 4))).indices.shape
      (3, 2)
    """
    pre = pre_activations(sae, x)
    capacity = sae.activation.k if capacity is None else capacity
    if capacity is None:
        raise ValueError(
            f"`encode` got no capacity, and {type(sae.activation).__name__} does not fix how many latents are active; "
            "pass capacity, the number of slots a row."
        )
    return sae.activation.code(pre, capacity)


def encode_dense(sae: SAE, x: Float[Array, "*b d"]) -> Float[Array, "*b m"]:
    """Encode activations into a dense code `[*b m]`.

    Args:
      sae: the autoencoder.
      x: activations `[*b d]`.

    Raises:
      TypeError, ValueError: at trace time, if `x` does not fit the SAE.

    Example:
      >>> import jax, jax.numpy as jnp, jaxsae
      >>> sae = jaxsae.init(jax.random.key(0), d=4, m=8, activation=jaxsae.ReLU())
      >>> jaxsae.encode_dense(sae, jnp.ones((3, 4))).shape
      (3, 8)
    """
    return sae.activation(pre_activations(sae, x))


def decode(sae: SAE, code: SparseCode | Float[Array, "*b m"]) -> Float[Array, "*b d"]:
    """Reconstruct activations from a code: `x̂ = z W_dec + b_dec`.

    Args:
      sae: the autoencoder.
      code: a `SparseCode` `[*b k]`, or a dense code `[*b m]`.

    Returns:
      Reconstruction `[*b d]`.

    Raises:
      ValueError: at trace time, if the code has another number of latents.

    Example:
      >>> import jax, jax.numpy as jnp, jaxsae
      >>> sae = jaxsae.init(jax.random.key(0), d=4, m=8, activation=jaxsae.TopK(2))
      >>> jaxsae.decode(sae, jaxsae.encode(sae, jnp.ones((3, 4)))).shape
      (3, 4)
    """
    m = code.num_latents if isinstance(code, SparseCode) else code.shape[-1]
    if m != sae.m:
        raise ValueError(f"`decode` got a code of {m} latents for an SAE of {sae.m}; pass a code that this SAE made.")
    return (codes.combine(sae.W_dec, code) if isinstance(code, SparseCode) else code @ sae.W_dec) + sae.b_dec


def refine(
    sae: SAE,
    x: Float[Array, "*b d"],
    code: SparseCode | None = None,
    solver: Any = None,
    *,
    capacity: int | None = None,
) -> tuple[SparseCode, RefitInfo]:
    """Refine a code: keep the encoder's support, and optimise its values for reconstruction, the decoder fixed.

        minimise_z ‖x − (z W_dec + b_dec)‖²   over z ≥ 0 on the support

    Values that rise measure the shrinkage of the encoder's own estimates.

    Args:
      sae: the autoencoder.
      x: activations `[*b d]`.
      code: support and starting values; `encode(sae, x, capacity=capacity)` by default.
      solver: any pytree of `solvers.py`; `solvers.default(k, d)` if None.
      capacity: slots a row, if the code is to be made here and the activation does not fix it.

    Returns:
      The refined code and `RefitInfo`; `jaxsae.check` raises on the host if a row failed. See `refit` for what
      holds row by row, and for the derivative.

    Raises:
      TypeError, ValueError: at trace time, if the arguments do not fit together.

    Example:
      >>> import jax, jax.numpy as jnp, jaxsae
      >>> sae = jaxsae.init(jax.random.key(0), d=4, m=8, activation=jaxsae.TopK(2))
      >>> x = jax.random.normal(jax.random.key(1), (3, 4))
      >>> refined, info = jaxsae.refine(sae, x)
      >>> bool((info.kkt <= 1e-5).all())
      True

    Source: Gao et al. (2024), "Scaling and evaluating sparse autoencoders", Section 5.1.
    """
    _validate(sae, x, "refine")
    if code is None:
        code = encode(sae, x, capacity=capacity)
    return refit(sae.W_dec, x - sae.b_dec, code, solver)


def rescale(sae: SAE, scale: float | Float[Array, ""]) -> SAE:
    """The SAE that does to `x` what `sae` does to `scale · x`, in the units of `x`.

    If `sae` was trained on `scale · x`, then `decode(rescale(sae, scale), z/scale) = decode(sae, z)/scale`, with
    the same supports. Weights stay as they are, so atoms of unit norm keep it; only the biases change units, since
    ReLU and TopK are positively homogeneous.

    Args:
      sae: an autoencoder of scaled activations.
      scale: positive factor from raw to scaled activations.

    Example:
      >>> import jax, jax.numpy as jnp, jaxsae
      >>> sae = jaxsae.init(jax.random.key(0), d=4, m=8, activation=jaxsae.ReLU(), b_dec=jnp.ones(4))
      >>> jaxsae.sae.rescale(sae, 0.5).b_dec
      Array([2., 2., 2., 2.], dtype=float32)
    """
    return dataclasses.replace(sae, b_enc=sae.b_enc / scale, b_dec=sae.b_dec / scale)


def _validate(sae: SAE, x, name: str) -> None:
    if not jnp.issubdtype(x.dtype, jnp.floating):
        raise TypeError(f"`{name}` got x of dtype {x.dtype}, expected floating point; convert it, x.astype('float32').")
    if x.shape[-1:] != (sae.d,):
        raise ValueError(
            f"`{name}` got x of shape {x.shape}, but this SAE has d = {sae.d}; pass activations (*b, {sae.d}) of the "
            "layer the SAE was made for."
        )
