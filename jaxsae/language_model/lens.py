"""The tokens that a direction of the residual promotes and suppresses."""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from jaxsae._core import chunking
from jaxsae.language_model.models import LanguageModel


class LogitLens(NamedTuple):
    """Tokens by their logits, for each direction.

    Attributes:
      promoted: `[m k]`, those with the largest logits, in descending order.
      promoted_logits: `[m k]`.
      suppressed: `[m k]`, those with the smallest, in ascending order.
      suppressed_logits: `[m k]`.

    Example:
      >>> import jax, jaxsae
      >>> sae = jaxsae.init(jax.random.key(0), d=8, m=32, activation=jaxsae.TopK(4))
      >>> found = jaxsae.language_model.logit_lens(jaxsae.language_model.tiny(), sae.W_dec, k=3)
      >>> found.promoted.shape, bool((found.promoted_logits > found.suppressed_logits).all())
      ((32, 3), True)
    """

    promoted: Int[Array, "m k"]
    promoted_logits: Float[Array, "m k"]
    suppressed: Int[Array, "m k"]
    suppressed_logits: Float[Array, "m k"]


def logit_lens(model: LanguageModel, directions: Float[Array, "m d"], *, k: int = 10) -> LogitLens:
    """The tokens that directions of the residual promote and suppress most, read through the final norm and the head.

        logits = (v ⊙ γ) W_U,   less their mean over the vocabulary

    A norm is not linear; its weight `γ` is, and where it is a LayerNorm, so is its centring, `v − mean(v)`. The scale
    that it gives to the whole residual is left out, so that logits of different directions compare, and their unit is
    that of the logits where the residual has unit root mean square. A softmax does not see a constant that is added to
    all logits, hence the mean. A soft cap (Gemma 2) is left out too: it does not change the order.

    What blocks behind the direction's own do with it is not seen: the deeper the layer, the more this says. Directions
    are those of the residual or of what is added to it, `resid_*`, `attn_out` and `mlp_out`; not of `mlp_in` and
    `hook_z`.

    Args:
      model: the language model.
      directions: `[m d]`, such as the atoms `sae.W_dec`.
      k: how many tokens of each kind; static.

    Returns:
      `LogitLens`; its logits are float32, and NaN for a direction that holds NaN.

    Raises:
      TypeError, ValueError: at trace time, if the directions are not floating point or of the model's width, or `k` is
        not from 1 to the size of the vocabulary.

    Example:
      >>> import jax.numpy as jnp
      >>> from jaxsae.language_model import tiny
      >>> logit_lens(tiny(), jnp.eye(8), k=2).promoted.shape
      (8, 2)

    Source: nostalgebraist (2020), "interpreting GPT: the logit lens"; Bloom & Lin (2024), "Understanding SAE features
      with the logit lens"; folded and centred as by TransformerLens, `fold_ln` and `center_unembed`.
    """
    c = model.config
    if not jnp.issubdtype(directions.dtype, jnp.floating):
        raise TypeError(f"`logit_lens` got directions of {directions.dtype}; pass floating-point numbers.")
    if directions.ndim != 2 or directions.shape[1] != c.width:
        got = f"`logit_lens` got directions of shape {directions.shape}, and the model is {c.width} wide"
        raise ValueError(f"{got}; pass (m, {c.width}), one in each row.")
    if isinstance(k, bool) or not hasattr(k, "__index__") or not 1 <= k <= c.vocab:
        raise ValueError(f"`logit_lens` got k = {k} for a vocabulary of {c.vocab}; pass 1 to {c.vocab}.")
    return _logit_lens(model, directions, k=int(k))


@functools.partial(jax.jit, static_argnames="k")
def _logit_lens(model, directions, *, k: int) -> LogitLens:
    c = model.config
    head = model.embedding.embedding[...].T if model.head is None else model.head.kernel[...]

    def read(v):
        v = v.astype(jnp.float32)
        v = v - jnp.mean(v, axis=-1, keepdims=True) if c.norm == "layer" else v
        v = (v * model.norm.scale[...]).astype(head.dtype)  # as the model's own norm
        logits = jnp.einsum("md,dv->mv", v, head, preferred_element_type=jnp.float32)
        logits = logits - jnp.mean(logits, axis=-1, keepdims=True)
        (most, promoted), (least, suppressed) = jax.lax.top_k(logits, k), jax.lax.top_k(-logits, k)
        return LogitLens(promoted, most, suppressed, -least)

    rows = (len(directions),)
    return chunking.map_chunks(read, directions, batch=rows, row_bytes=3 * 4 * c.vocab, cpu_rows=_CPU_ROWS)


_CPU_ROWS = 256  # few enough for little memory, and enough for the head to be read seldom
