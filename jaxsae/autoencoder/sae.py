"""The sparse autoencoder: its parameters, and the pure functions that act on them."""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax.core import Tracer
from jaxtyping import Array, Float, PRNGKeyArray

from jaxsae import codes, sharding
from jaxsae._core import pytrees
from jaxsae._core.linalg import as_array, promote_dtypes, result_type
from jaxsae.autoencoder.activations import Activation, base
from jaxsae.autoencoder.normalisation import Normalisation
from jaxsae.autoencoder.selected import _selected
from jaxsae.codes import SparseCode


@pytrees.dataclass
class SAE:
    """Parameters of a sparse autoencoder, a pytree.

        z = activation((x − b_dec) W_enc + b_enc),   x̂ = z W_dec + b_dec

    Conventions differ in whether `b_dec` is subtracted from `x`, and in whether each row of `x` is normalised first
    (and `x̂` put back into its units). A transcoder maps to a target other than its input: `W_dec` and `b_dec` then have
    the target's width, nothing is subtracted from `x`, `x̂` is in units of the target, and a skip connection may add
    `x W_skip` to it. A crosscoder is an SAE of rows that concatenate several sites: `W_dec.reshape(m, sites, -1)` has
    its atoms by site. `print(sae)` shows these conventions.

    Attributes:
      W_enc: `[d m]`.
      b_enc: `[m]`.
      W_dec: `[m d_out]`, the dictionary, one atom per row; `d_out = d` except in transcoders.
      b_dec: `[d_out]`.
      activation: an `Activation`, a pytree.
      W_skip: `[d d_out]`, or None.
      normalisation: a `Normalisation`, a pytree, or None; not trained.
      apply_b_dec_to_input: whether `b_dec` is subtracted from `x`; False for transcoders; static.
      transcoder: whether the target differs from the input; static.

    Example:
      >>> import jax.numpy as jnp, jaxsae
      >>> sae = jaxsae.SAE(
      ...     W_enc=jnp.eye(2), b_enc=jnp.zeros(2), W_dec=jnp.eye(2), b_dec=jnp.ones(2), activation=jaxsae.ReLU()
      ... )
      >>> jaxsae.encode_dense(sae, jnp.array([3.0, 0.0]))
      Array([2., 0.], dtype=float32)

    Source: Bricken et al. (2023), "Towards monosemanticity"; Cunningham et al. (2023), "Sparse autoencoders find
      highly interpretable features in language models".
    """

    W_enc: Float[Array, "d m"] = pytrees.sharded(None, "latent")
    b_enc: Float[Array, " m"] = pytrees.sharded("latent")
    W_dec: Float[Array, "m d_out"] = pytrees.sharded("latent", None)
    b_dec: Float[Array, " d_out"]
    activation: Activation
    W_skip: Float[Array, "d d_out"] | None = None
    normalisation: Normalisation | None = pytrees.fixed(default=None)
    apply_b_dec_to_input: bool = pytrees.static(default=True)
    transcoder: bool = pytrees.static(default=False)

    def __post_init__(self):
        # JAX rebuilds pytrees around placeholders (axes, specs, None), which are not validated.
        if callable(self.activation):
            base.validate(self.activation, "SAE")

    @property
    def d(self) -> int:
        """Width of the activations."""
        return self.W_enc.shape[-2]

    @property
    def m(self) -> int:
        """Number of latents."""
        return self.W_dec.shape[-2]

    def __str__(self) -> str:
        return "\n".join(f"{name:14}{value}" for name, value in describe(self).items())


def describe(sae: SAE) -> dict[str, str]:
    """Describe an SAE in words: its kind, sizes, and every convention that determines what it computes.

    Args:
      sae: the autoencoder.

    Example:
      >>> import jax, jaxsae
      >>> print(jaxsae.init(jax.random.key(0), d=64, m=512, activation=jaxsae.TopK(8)))
      kind          autoencoder, 64 wide, 512 latents, float32
      activation    TopK(k=8)
      input         x
      encoder       (input - b_dec) W_enc + b_enc
      decoder       z W_dec + b_dec
    """
    d_out = sae.W_dec.shape[-1]
    kind = f"transcoder, {sae.d} to {d_out} wide" if sae.transcoder else f"autoencoder, {sae.d} wide"
    decoder = "z W_dec + b_dec" + (" + x W_skip" if sae.W_skip is not None else "")
    inputs = "(input - b_dec)" if sae.apply_b_dec_to_input else "input"
    return {
        "kind": f"{kind}, {sae.m} latents, {sae.W_dec.dtype}",
        "activation": _shown(sae.activation),
        "input": "x" if sae.normalisation is None else f"{_shown(sae.normalisation)} of x",
        "encoder": f"none: {inputs} is pursued on W_dec" if sae.activation.encoder_free else f"{inputs} W_enc + b_enc",
        "decoder": f"{decoder}, in the units of the row" if _restores(sae) else decoder,
    }


def _shown(options: Any) -> str:
    """Format options as in `TopK(k=8)`, arrays by their range."""

    def shown(value) -> str:
        if getattr(value, "size", 1) == 1:
            return f"{float(value):.4g}" if hasattr(value, "dtype") else f"{value}"
        return f"{float(jnp.min(value)):.4g} to {float(jnp.max(value)):.4g}"

    values = {field.name: getattr(options, field.name) for field in dataclasses.fields(options)}
    return f"{type(options).__name__}({', '.join(f'{n}={shown(v)}' for n, v in values.items() if v is not None)})"


def init(
    key: PRNGKeyArray,
    *,
    d: int,
    m: int,
    activation: Activation,
    b_dec: Float[Array, " d_out"] | None = None,
    transcoder: bool = False,
    skip: bool = False,
) -> SAE:
    """Make an SAE with random unit-norm atoms and an encoder that is the decoder's transpose.

    Args:
      key: PRNG key.
      d: width of the activations.
      m: number of latents.
      activation: for example `ReLU()` or `TopK(32)`.
      b_dec: `[d_out]`, a centre (mean or median) of the data or, in a transcoder, of the target; `zeros(d)` by default.
      transcoder: whether the target differs from the input; nothing is then subtracted from `x`, and the decoder is
        drawn independently of the encoder.
      skip: whether to add a skip connection, initialised to zero; transcoders only.

    Returns:
      `SAE`; `b_enc` is zero.

    Raises:
      TypeError: if the activation is not an `Activation`, or `b_dec` is not floating point.
      ValueError: if a size is not positive, if `b_dec` does not fit, if the activation needs more latents than `m`, or
        if there is a skip connection without a transcoder.

    Example:
      >>> import jax, jaxsae
      >>> sae = jaxsae.init(jax.random.key(0), d=64, m=512, activation=jaxsae.TopK(8))
      >>> sae.W_dec.shape
      (512, 64)

    Source: Gao et al. (2024), Section 2 and Appendix A; Dunefsky, Chlenski & Nanda (2024), "Transcoders find
    interpretable LLM feature circuits"; Paulo, Shabalin & Belrose (2025), "Transcoders beat sparse autoencoders".
    """
    base.validate(activation, "init")
    if d < 1 or m < 1:
        raise ValueError(f"`init` got d = {d} and m = {m}; pass sizes of at least 1.")
    if activation.slots is not None and activation.slots > m:
        raise ValueError(f"`init` got k = {activation.slots} for m = {m} latents; pass k of at most {m}.")
    if skip and not transcoder:
        raise ValueError("`init` got skip without transcoder; an autoencoder could copy its input through it.")
    b_dec = jnp.zeros(d) if b_dec is None else _floating(b_dec, "init", "b_dec")
    if b_dec.ndim != 1 or (b_dec.shape != (d,) and not transcoder):
        raise ValueError(f"`init` got b_dec of shape {b_dec.shape}, expected ({d},); pass one value for each input.")
    atoms = _unit_rows(key, m, d, b_dec.dtype)
    return SAE(
        W_enc=atoms.T,
        b_enc=jnp.zeros(m, b_dec.dtype),
        W_dec=_unit_rows(jax.random.fold_in(key, 1), m, b_dec.size, b_dec.dtype) if transcoder else atoms,
        b_dec=b_dec,
        activation=activation,
        W_skip=jnp.zeros((d, b_dec.size), b_dec.dtype) if skip else None,
        apply_b_dec_to_input=not transcoder,
        transcoder=transcoder,
    )


def _unit_rows(key, m: int, d: int, dtype):
    rows = jax.random.normal(key, (m, d), result_type(dtype, jnp.float32))  # in bfloat16 norms would be rounded
    return (rows / jnp.linalg.norm(rows, axis=1, keepdims=True)).astype(dtype)


@jax.named_scope("encode")
def pre_activations(sae: SAE, x: Float[Array, "*b d"]) -> Float[Array, "*b m"]:
    """Compute `(x − b_dec) W_enc + b_enc`, with `x` normalised if the SAE has a normalisation.

    `b_dec` is omitted unless `apply_b_dec_to_input`.

    Args:
      sae: the autoencoder.
      x: activations `[*b d]`.

    Raises:
      TypeError, ValueError: at trace time, if `x` is not floating point or not of width `d`.

    Example:
      >>> import jax, jax.numpy as jnp, jaxsae
      >>> sae = jaxsae.init(jax.random.key(0), d=4, m=8, activation=jaxsae.ReLU())
      >>> jaxsae.autoencoder.pre_activations(sae, jnp.ones((3, 4))).shape
      (3, 8)
    """
    x, W_enc, b_enc = promote_dtypes(_inputs(sae, x), sae.W_enc, sae.b_enc)
    return x @ W_enc + b_enc


def _inputs(sae: SAE, x):
    """The encoder's inputs: rows normalised and centred as the SAE specifies."""
    x = _validate(sae, x, "encode")
    x = x if sae.normalisation is None else sae.normalisation(x).inputs
    if not sae.apply_b_dec_to_input:
        return x
    x, b_dec = promote_dtypes(x, sae.b_dec)
    return x - b_dec


def encode(sae: SAE, x: Float[Array, "*b d"], *, capacity: int | None = None) -> SparseCode:
    """Encode activations into a sparse code.

    For activations that select pre-activations and return them unchanged (`TopK`, `AbsTopK`, `GroupMax`), the
    derivative involves only the weights of active latents.

    Args:
      sae: the autoencoder.
      x: activations `[*b d]`.
      capacity: slots `k` per row, at most `m`; required unless the activation fixes it. Active latents beyond it are
        dropped, smallest first, and counted in `code.num_dropped`.

    Returns:
      `SparseCode` `[*b k]`, in descending order of magnitude.

    Raises:
      TypeError, ValueError: at trace time, if `x` or `capacity` does not fit the SAE.

    Example:
      >>> import jax, jax.numpy as jnp, jaxsae
      >>> sae = jaxsae.init(jax.random.key(0), d=4, m=8, activation=jaxsae.TopK(2))
      >>> jaxsae.encode(sae, jnp.ones((3, 4))).indices.shape
      (3, 2)
    """
    capacity = sae.activation.slots if capacity is None else capacity
    if capacity is None:
        raise ValueError(
            f"`encode` got no capacity, and {type(sae.activation).__name__} does not fix how many latents are active; "
            "pass capacity, the number of slots per row."
        )
    if isinstance(capacity, Tracer):
        raise TypeError("`encode` got a traced capacity; make it static, jax.jit(encode, static_argnames='capacity').")
    return _encode(capacity, sae, _validate(sae, x, "encode"))


@functools.partial(jax.jit, static_argnums=0)
def _encode(capacity: int, sae: SAE, x) -> SparseCode:
    if sae.activation.encoder_free:
        return codes.from_dense(encode_dense(sae, x), capacity)
    if not sae.activation.selects:
        return sae.activation.code(pre_activations(sae, x), capacity)
    code = sae.activation.code(jax.lax.stop_gradient(pre_activations(sae, x)), capacity)
    b_dec = sae.b_dec if sae.apply_b_dec_to_input else jnp.zeros(sae.d, sae.b_dec.dtype)
    x = x if sae.normalisation is None else sae.normalisation(x).inputs
    arguments = code.values, code.indices, x, sae.W_enc, sae.b_enc, b_dec
    values = _selected(*sharding.vary_alike(arguments))
    return dataclasses.replace(code, values=values)


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
    if sae.activation.encoder_free:
        return sae.activation.pursue(_inputs(sae, x), sae.W_dec)
    return sae.activation(pre_activations(sae, x))


def decode(sae: SAE, code: SparseCode | Float[Array, "*b m"]) -> Float[Array, "*b d"]:
    """Reconstruct activations from a code alone: `x̂ = z W_dec + b_dec`. `reconstruct` works for any SAE.

    Args:
      sae: the autoencoder.
      code: a `SparseCode` `[*b k]`, or a dense code `[*b m]`.

    Returns:
      Reconstruction `[*b d]`.

    Raises:
      TypeError, ValueError: at trace time, if the code does not fit the SAE, or if `x̂` depends on more than the code:
        the SAE normalises each row, or has a skip connection. Use `reconstruct` then.

    Example:
      >>> import jax, jax.numpy as jnp, jaxsae
      >>> sae = jaxsae.init(jax.random.key(0), d=4, m=8, activation=jaxsae.TopK(2))
      >>> jaxsae.decode(sae, jaxsae.encode(sae, jnp.ones((3, 4)))).shape
      (3, 4)
    """
    if _restores(sae):
        raise ValueError(
            f"`decode` got a code alone, but this SAE normalises each row ({type(sae.normalisation).__name__}) and its "
            "output is in the row's units; call jaxsae.reconstruct(sae, x, code)."
        )
    if sae.W_skip is not None:
        raise ValueError(
            "`decode` got a code alone, but this transcoder adds x W_skip to its output; call "
            "jaxsae.reconstruct(sae, x, code)."
        )
    return _decode("decode", sae, code)


def _restores(sae: SAE) -> bool:
    """Whether the output is put back into the units of each row."""
    return sae.normalisation is not None and sae.normalisation.per_row and not sae.transcoder


@functools.partial(jax.jit, static_argnums=0)
@jax.named_scope("decode")
def _decode(name: str, sae: SAE, code):
    z: Any = code if isinstance(code, SparseCode) else _floating(code, name, "a code")
    m = z.num_latents if isinstance(z, SparseCode) else z.shape[-1] if z.ndim else 0
    if m != sae.m:
        raise ValueError(f"`{name}` got a code of {m} latents for an SAE of {sae.m}; pass a code that this SAE made.")
    x_hat = codes.decode(sae.W_dec, z) if isinstance(z, SparseCode) else jnp.matmul(*promote_dtypes(z, sae.W_dec))
    x_hat, b_dec = promote_dtypes(x_hat, sae.b_dec)
    return x_hat + b_dec


def reconstruct(
    sae: SAE, x: Float[Array, "*b d"], code: SparseCode | Float[Array, "*b m"] | None = None
) -> Float[Array, "*b d_out"]:
    """Reconstruct an input: `decode` in the units of the row, plus the skip connection, if any.

        x̂ = scale (z W_dec + b_dec) + shift + x W_skip

    Args:
      sae: the autoencoder or transcoder.
      x: activations `[*b d]`.
      code: a `SparseCode` `[*b k]`, or a dense code `[*b m]`, such as a refined one; the encoder's by default.

    Raises:
      TypeError, ValueError: at trace time, if `x` or the code does not fit the SAE, or they do not fit each other.

    Example:
      >>> import jax, jax.numpy as jnp, jaxsae
      >>> sae = jaxsae.init(
      ...     jax.random.key(0), d=4, m=8, activation=jaxsae.TopK(2), b_dec=jnp.ones(6), transcoder=True, skip=True
      ... )
      >>> jaxsae.reconstruct(sae, jnp.ones((3, 4))).shape
      (3, 6)
    """
    x = _validate(sae, x, "reconstruct")
    if code is None:
        code = encode_dense(sae, x) if sae.activation.slots is None else encode(sae, x)
    return _reconstruct(sae, x, code)


@jax.jit
def _reconstruct(sae: SAE, x, code):
    x_hat = _decode("reconstruct", sae, code)
    if x_hat.shape[:-1] != x.shape[:-1]:
        raise ValueError(
            f"`reconstruct` got x of shape {x.shape} and a code of rows {x_hat.shape[:-1]}; pass the x of that code."
        )
    if sae.normalisation is not None and _restores(sae):
        _, scale, shift = sae.normalisation(x)
        x_hat = x_hat if scale is None else x_hat * scale
        x_hat = x_hat if shift is None else x_hat + shift
    if sae.W_skip is None:
        return x_hat
    x_hat, x, W_skip = promote_dtypes(x_hat, x, sae.W_skip)
    return x_hat + x @ W_skip


def split_rows(sae: SAE, rows: Float[Array, "*b n"]) -> tuple[Float[Array, "*b d"], Float[Array, "*b d_out"]]:
    """The inputs and the targets in rows: of a transcoder, rows hold both side by side; of an autoencoder, one is both.

    Args:
      sae: the autoencoder or transcoder.
      rows: `[*b d]`, or `[*b d + d_out]` for a transcoder.

    Raises:
      ValueError: at trace time, if the rows are of another width.

    Example:
      >>> import jax, jax.numpy as jnp, jaxsae
      >>> sae = jaxsae.init(
      ...     jax.random.key(0), d=4, m=8, activation=jaxsae.TopK(2), b_dec=jnp.ones(6), transcoder=True
      ... )
      >>> x, target = jaxsae.autoencoder.split_rows(sae, jnp.ones((3, 10)))
      >>> x.shape, target.shape
      ((3, 4), (3, 6))
    """
    width = row_width(sae)
    if rows.shape[-1:] != (width,):
        pair = f", {sae.d} of the input and {width - sae.d} of the target" if sae.transcoder else ""
        raise ValueError(f"got rows of width {rows.shape[-1:]}, expected {width}{pair}; pass those of its site.")
    return (rows[..., : sae.d], rows[..., sae.d :]) if sae.transcoder else (rows, rows)


def row_width(sae: SAE) -> int:
    """The width of the rows that `split_rows` takes: `d`, or `d + d_out` for a transcoder.

    Args:
      sae: the autoencoder or transcoder.

    Example:
      >>> import jax, jaxsae
      >>> row_width(jaxsae.init(jax.random.key(0), d=4, m=8, activation=jaxsae.TopK(2)))
      4
    """
    return sae.d + (sae.W_dec.shape[-1] if sae.transcoder else 0)


def _floating(x, name: str, what: str) -> Array:
    """An array; raise if it is not floating point."""
    x = as_array(x)
    if not jnp.issubdtype(x.dtype, jnp.floating):
        raise TypeError(
            f"`{name}` got {what} of dtype {x.dtype}, expected floating point; convert it, "
            f"{what.split()[-1]}.astype('float32')."
        )
    return x


def _validate(sae: SAE, x, name: str) -> Array:
    """Activations as an array; raise if they do not fit the SAE."""
    x = _floating(x, name, "x")
    if x.shape[-1:] != (sae.d,):
        raise ValueError(
            f"`{name}` got x of shape {x.shape}, but this SAE has d = {sae.d}; pass activations (*b, {sae.d}) of the "
            "layer the SAE was made for."
        )
    return x
