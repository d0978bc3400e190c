"""A language model around the activations: take residuals out of it, put other ones in, and see what that costs.

    ids ──embed──▶ blocks[:layer] ──residual──▶ fn ──splice──▶ blocks[layer:] ──▶ logits ──▶ cross-entropy

The llama family and GPT-2, in Flax NNX. A model is a pytree, so it may be an argument of `jit`; where `ids [b s]` are
sharded over their batch, so is all that is computed of them. `layer` counts blocks: the residual of layer 0 is what
comes out of the first block.
"""

import functools
import math
import operator
import os
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.core import Tracer
from jaxtyping import Array, Float, Int

from jaxsae._core import linalg, pytrees
from jaxsae._core.files import InputError
from jaxsae.language_model import files
from jaxsae.language_model.config import Config

Splice = Callable[[Float[Array, "b s d"]], Float[Array, "b s d"]]


class LlamaBlock(nnx.Module):
    """Grouped attention with rotary positions, then a gated MLP, each behind an RMSNorm."""

    def __init__(self, config: Config, rngs: nnx.Rngs):
        """Draw parameters at random."""
        c = config
        linear = functools.partial(nnx.Linear, use_bias=False, param_dtype=c.dtype, rngs=rngs)
        self.config = c
        self.attention_norm = _rms_norm(c, rngs)
        self.q = linear(c.width, c.heads * c.head_width)
        self.k = linear(c.width, c.kv_heads * c.head_width)
        self.v = linear(c.width, c.kv_heads * c.head_width)
        self.o = linear(c.heads * c.head_width, c.width)
        self.mlp_norm = _rms_norm(c, rngs)
        self.gate = linear(c.width, c.hidden)
        self.up = linear(c.width, c.hidden)
        self.down = linear(c.hidden, c.width)

    def __call__(self, h: Float[Array, "b s d"]) -> Float[Array, "b s d"]:
        """The residual after the block."""
        x = self.attention_norm(h)
        q, k, v = (self._heads(project(x)) for project in (self.q, self.k, self.v))
        angles = jnp.arange(h.shape[1], dtype=jnp.float32)[:, None] * jnp.asarray(self.config.rope, jnp.float32)
        h = h + self.o(_attend(_rotate(q, angles), _rotate(k, angles), v))
        x = self.mlp_norm(h)
        return h + self.down(jax.nn.silu(self.gate(x)) * self.up(x))

    def _heads(self, x):
        return x.reshape(*x.shape[:2], -1, self.config.head_width)


class GPT2Block(nnx.Module):
    """Attention, then an MLP, each behind a LayerNorm; biases everywhere."""

    def __init__(self, config: Config, rngs: nnx.Rngs):
        """Draw parameters at random."""
        c = config
        linear = functools.partial(nnx.Linear, param_dtype=c.dtype, rngs=rngs)
        self.config = c
        self.attention_norm = _layer_norm(c, rngs)
        self.qkv = linear(c.width, 3 * c.width)
        self.o = linear(c.width, c.width)
        self.mlp_norm = _layer_norm(c, rngs)
        self.up = linear(c.width, c.hidden)
        self.down = linear(c.hidden, c.width)

    def __call__(self, h: Float[Array, "b s d"]) -> Float[Array, "b s d"]:
        """The residual after the block."""
        qkv = self.qkv(self.attention_norm(h)).reshape(*h.shape[:2], 3, self.config.heads, self.config.head_width)
        h = h + self.o(_attend(*jnp.moveaxis(qkv, 2, 0)))
        return h + self.down(jax.nn.gelu(self.up(self.mlp_norm(h)), approximate=True))


def _rms_norm(c: Config, rngs) -> nnx.RMSNorm:
    return nnx.RMSNorm(c.width, epsilon=c.eps, param_dtype=c.dtype, rngs=rngs)


def _layer_norm(c: Config, rngs) -> nnx.LayerNorm:
    # In one pass, E[x²] − E[x]² would lose digits: GPT-2's residuals have a large mean.
    return nnx.LayerNorm(c.width, epsilon=c.eps, use_fast_variance=False, param_dtype=c.dtype, rngs=rngs)


def _attend(q, k, v):
    mixed = jax.nn.dot_product_attention(q, k, v, is_causal=True)
    return mixed.reshape(*mixed.shape[:2], -1)


def _rotate(x, angles):
    """Rotate the pairs `(x_i, x_{i + n/2})` of each head by the angles `[s n/2]` of its position."""
    cos, sin = jnp.cos(angles)[:, None], jnp.sin(angles)[:, None]
    a, b = jnp.split(x.astype(jnp.float32), 2, axis=-1)
    return jnp.concatenate([a * cos - b * sin, b * cos + a * sin], axis=-1).astype(x.dtype)


BLOCKS = {"llama": (LlamaBlock, _rms_norm), "gpt2": (GPT2Block, _layer_norm)}  # by family, with the last norm


class LanguageModel(nnx.Module):
    """A decoder-only transformer; parameters of all blocks are stacked along a leading axis.

    Attributes:
      config: sizes, static.
      embedding: of tokens, `[v d]`; the head too, where there is no other.
      positions: learned, `[context d]`; None where blocks rotate by position.
      blocks: `LlamaBlock` or `GPT2Block`.
      norm: before the head.
      head: `[d v]`, or None.
    """

    def __init__(self, config: Config, rngs: nnx.Rngs):
        """Draw parameters at random.

        Args:
          config: sizes, as `files` reads them.
          rngs: of flax.
        """
        c = config
        block, norm = BLOCKS[c.family]
        embed = functools.partial(nnx.Embed, features=c.width, param_dtype=c.dtype, rngs=rngs)
        self.config = c
        self.embedding = embed(c.vocab)
        self.positions = embed(c.context) if c.rope is None else None
        keys = jax.random.split(rngs(), c.layers)
        self.blocks = nnx.vmap(lambda key: block(c, nnx.Rngs(key)))(keys)
        self.norm = norm(c, rngs)
        self.head = None if c.tied else nnx.Linear(c.width, c.vocab, use_bias=False, param_dtype=c.dtype, rngs=rngs)


def load(path: str | os.PathLike, *, dtype: Any = jnp.float32) -> LanguageModel:
    """Load a language model of the llama family or a GPT-2, without torch.

    Args:
      path: a GGUF file of a llama, a Hugging Face directory (`config.json`, `model.safetensors` or its shards), or the
        name of a fetched model, `"smollm2"`.
      dtype: of the weights and of what is computed, float32 or bfloat16; norms, softmax and logits are float32.

    Raises:
      InputError: if it is missing, damaged, or of another architecture or quantisation, or for another dtype.

    Example:
      >>> load("no-such-place")
      Traceback (most recent call last):
      jaxsae.InputError: no-such-place: no such file; expected a GGUF file, a Hugging Face directory, or ...
    """
    try:
        dtype = jnp.dtype(dtype)
    except TypeError as error:
        raise InputError(f"got dtype {dtype!r}; pass float32 or bfloat16.") from error
    if dtype not in (jnp.dtype(jnp.float32), jnp.dtype(jnp.bfloat16)):
        raise InputError(f"got dtype {dtype}; pass float32 or bfloat16.")
    config, arrays = files.read(path, dtype)
    abstract = nnx.eval_shape(lambda: LanguageModel(config, nnx.Rngs(0)))
    leaves, structure = jax.tree.flatten_with_path(abstract)
    names = [".".join(key.name for key in keys if hasattr(key, "name")).removesuffix(".value") for keys, _ in leaves]
    wrong = [
        f"{name} {arrays[name].shape if name in arrays else 'missing'}, expected {leaf.shape}"
        for name, (_, leaf) in zip(names, leaves, strict=True)
        if name not in arrays or arrays[name].shape != leaf.shape
    ]
    if wrong:
        raise InputError(f"{path}: weights do not fit its configuration: {wrong[0]}; get the file again.")
    return jax.tree.unflatten(structure, [jnp.asarray(arrays.pop(name)) for name in names])


def residual(model: LanguageModel, ids: Int[Array, "b s"], layer: int) -> Float[Array, "b s d"]:
    """The residual stream after block `layer`, counted from 0.

    Args:
      model: the language model.
      ids: tokens `[b s]`, no more than its context in a row.
      layer: from 0 to the number of blocks less 1; static.

    Returns:
      `[b s d]`; NaN in a row with a token that the vocabulary has not, where `jit` hides it from the check.

    Raises:
      TypeError, ValueError: at trace time, if `ids` or `layer` does not fit the model; outside of `jit`, if a token is
        not in the vocabulary.

    Example:
      >>> import jax.numpy as jnp
      >>> residual(tiny(), jnp.array([[1, 2, 3]]), 1).shape
      (1, 3, 8)
    """
    _validate(model, ids, layer)
    # Of -1 `take` would make the last row, of what is beyond the end NaN.
    h = model.embedding(jnp.where(ids < 0, jnp.iinfo(jnp.int32).max, ids.astype(jnp.int32)))
    if model.positions is not None:
        h = h + model.positions(jnp.arange(ids.shape[1]))
    return _run(model, h, 0, layer + 1)


def logits(model: LanguageModel, h: Float[Array, "b s d"], layer: int) -> Float[Array, "b s v"]:
    """The logits, float32, that follow from a residual stream after block `layer`.

    Args:
      model: the language model.
      h: what stands for `residual(model, ids, layer)`, `[b s d]`.
      layer: as there.

    Returns:
      `[b s v]`, before the softmax.

    Raises:
      ValueError: at trace time, if `h` or `layer` does not fit the model.

    Example:
      >>> import jax.numpy as jnp
      >>> logits(tiny(), jnp.zeros((1, 3, 8)), 1).shape
      (1, 3, 16)
    """
    c = model.config
    if jnp.ndim(h) != 3 or h.shape[-1] != c.width:
        raise ValueError(f"`logits` got residuals of shape {jnp.shape(h)}; pass (b, s, {c.width}).")
    _require_layer(c, layer)
    return _unembed(model, _run(model, h, layer + 1, c.layers))


def splice(
    model: LanguageModel, ids: Int[Array, "b s"], layer: int, fn: Splice, *, skip_first: int = 1
) -> Float[Array, "b s v"]:
    """The logits of a model whose residual after block `layer` is replaced by `fn` of it.

    The first position is left alone by default: its activation is massive in most models, and no autoencoder is made
    for it.

    Args:
      model: the language model.
      ids: tokens `[b s]`.
      layer: as for `residual`.
      fn: from residual to residual `[b s d]`, for example an SAE's reconstruction; it sees the first positions too.
      skip_first: how many positions at the beginning keep their residual; fewer than all.

    Raises:
      TypeError, ValueError: at trace time, if `ids`, `layer`, `skip_first` or what `fn` returns does not fit the model.

    Example:
      >>> import jax, jax.numpy as jnp, jaxsae
      >>> sae = jaxsae.init(jax.random.key(0), d=8, m=32, activation=jaxsae.TopK(4))
      >>> def refined(h):
      ...     return jaxsae.decode(sae, jaxsae.refine(sae, h)[0])
      >>> splice(tiny(), jnp.array([[1, 2, 3]]), 1, refined).shape
      (1, 3, 16)
    """
    h = residual(model, ids, layer)
    return logits(model, _replace(h, fn(h), skip_first), layer)


def _replace(h, new, skip_first):
    if not isinstance(new, jax.Array | np.ndarray):
        raise TypeError(f"`splice` got {type(new).__name__} from fn; return residuals {h.shape}.")
    if not 0 <= skip_first < h.shape[1]:
        raise ValueError(f"`splice` got skip_first {skip_first} for {h.shape[1]} positions; pass 0 or more, and fewer.")
    if not jnp.issubdtype(new.dtype, jnp.floating):
        raise TypeError(f"`splice` got {new.dtype} from fn for residuals of {h.dtype}; return floating-point numbers.")
    if new.shape != h.shape:
        raise ValueError(f"`splice` got {new.shape} from fn for residuals {h.shape}; return one for each.")
    return jnp.where(jnp.arange(h.shape[1])[:, None] < skip_first, h, new.astype(h.dtype))


@pytrees.dataclass
class NextToken:
    """Sums over the predicted tokens; `a + b` is the measurement of both.

    Attributes:
      tokens: how many.
      surprise: `Σ −log p(token)`, in nats.
      divergence: `Σ KL(clean ‖ this)`, in nats, from the predictions of the model left alone.
    """

    tokens: Float[Array, ""] | float
    surprise: Float[Array, ""] | float
    divergence: Float[Array, ""] | float

    def __add__(self, other: "NextToken") -> "NextToken":
        return jax.tree.map(operator.add, self, other)

    @property
    def cross_entropy(self) -> Float[Array, ""] | float:
        """Mean over tokens, in nats."""
        return _ratio(self.surprise, self.tokens)

    @property
    def kl(self) -> Float[Array, ""] | float:
        """Mean KL divergence from the clean predictions, in nats."""
        return _ratio(self.divergence, self.tokens)


def cross_entropy(
    model: LanguageModel,
    batches: Iterable[Int[Array, "b s"]],
    layer: int,
    splices: Mapping[str, Splice],
    *,
    skip_first: int = 1,
) -> dict[str, NextToken]:
    """What splices do to next-token prediction, by name, and `"clean"`, the model left alone.

    Batches are streamed, and their means are weighted by tokens, so that batches may differ in shape. Blocks up to
    `layer` run once for all splices. A splice runs outside of `jit`: one that is slow should be jitted by itself.

    Args:
      model: the language model.
      batches: of tokens `[b s]`, `s` at least 2 more than `skip_first`, so that a prediction sees the splice; the
        logits of one are in memory at a time, `4·b·s·v` bytes.
      layer: as for `residual`.
      splices: functions as for `splice`.
      skip_first: as for `splice`.

    Returns:
      `NextToken` for each name; `loss_recovered` compares three of them.

    Raises:
      ValueError: if there are no batches, or as `splice`.

    Example:
      >>> import jax.numpy as jnp
      >>> ids = jnp.arange(12).reshape(2, 6)
      >>> found = cross_entropy(tiny(), [ids], 1, {"zero": jnp.zeros_like, "same": lambda h: h})
      >>> bool(found["same"].cross_entropy == found["clean"].cross_entropy), float(found["zero"].tokens)
      (True, 10.0)
    """
    total: dict[str, NextToken] | None = None
    for ids in batches:
        _validate(model, ids, layer)
        if ids.shape[1] < 2 + skip_first:
            got = f"{ids.shape[1]} tokens in a row with skip_first {skip_first}, of which no prediction sees the splice"
            raise ValueError(f"`cross_entropy` got {got}; pass at least {2 + skip_first}.")
        h, clean = _clean(model, ids, layer)
        part = {"clean": _score(clean, ids, clean)}
        for name, fn in splices.items():
            part[name] = _score_splice(model, _replace(h, fn(h), skip_first), ids, clean, layer)
        part = jax.tree.map(float, jax.device_get(part))  # in float64 from here on
        total = part if total is None else {name: total[name] + part[name] for name in part}
    if total is None:
        raise ValueError("`cross_entropy` got no batches; pass at least one.")
    return total


def loss_recovered(clean: NextToken, spliced: NextToken, ablated: NextToken) -> Float[Array, ""] | float:
    """The share of an ablation's loss that a splice recovers: 1 is as good as the model itself, 0 as the ablation.

    NaN where the ablation loses nothing, and there is nothing to win.

    Args:
      clean: the model left alone.
      spliced: the model with a reconstruction.
      ablated: the model with zeros, or with the mean, in its place.

    Example:
      >>> clean, spliced, ablated = (NextToken(1.0, nats, 0.0) for nats in (2.0, 3.0, 6.0))
      >>> loss_recovered(clean, spliced, ablated)
      0.75
    """
    worst = ablated.cross_entropy
    return _ratio(worst - spliced.cross_entropy, worst - clean.cross_entropy)


def _ratio(a, b):
    if isinstance(b, jax.Array):
        return linalg.ratio(a, b)
    return a / b if b else math.nan


@functools.partial(jax.jit, static_argnames="layer")
def _clean(model, ids, layer):
    h = residual(model, ids, layer)
    return h, logits(model, h, layer)


@functools.partial(jax.jit, static_argnames="layer")
def _score_splice(model, h, ids, clean, layer):
    return _score(logits(model, h, layer), ids, clean)


@jax.jit
def _score(predicted, ids, clean):
    """Sums over the tokens after the first. Reductions alone: nothing as large as the logits is made."""
    predicted, clean = predicted[:, :-1], clean[:, :-1]
    normaliser, clean_normaliser = (jax.nn.logsumexp(x, axis=-1, keepdims=True) for x in (predicted, clean))
    surprise = normaliser - jnp.take_along_axis(predicted, ids[:, 1:, None], axis=-1)
    log_ratio = (clean - clean_normaliser) - (predicted - normaliser)
    divergence = jnp.exp(clean - clean_normaliser) * log_ratio
    return NextToken(jnp.asarray(surprise.size, jnp.float32), jnp.sum(surprise), jnp.sum(divergence))


def _run(model, h, first: int, last: int):
    """The residual after blocks `first` to `last − 1`."""
    some = jax.tree.map(lambda stacked: stacked[first:last], model.blocks)
    return jax.lax.scan(lambda h, block: (block(h), None), h, some)[0]


def _unembed(model, h):
    h = model.norm(h)
    if model.head is None:
        return jnp.einsum("bsd,vd->bsv", h, model.embedding.embedding[...], preferred_element_type=jnp.float32)
    return jnp.einsum("bsd,dv->bsv", h, model.head.kernel[...], preferred_element_type=jnp.float32)


def _validate(model, ids, layer) -> None:
    c = model.config
    if not jnp.issubdtype(ids.dtype, jnp.integer):
        raise TypeError(f"`residual` got ids of dtype {ids.dtype}, expected integers; pass tokens, not embeddings.")
    if ids.ndim != 2 or not 1 <= ids.shape[1] <= c.context:
        raise ValueError(f"`residual` got ids of shape {ids.shape}; pass (b, s) with s from 1 to {c.context}.")
    _require_layer(c, layer)
    if isinstance(ids, Tracer) or not getattr(ids, "is_fully_addressable", True) or not ids.size:
        return
    tokens = np.asarray(ids)
    low, high = int(tokens.min()), int(tokens.max())
    if low < 0 or high >= c.vocab:
        do = f"pass 0 to {c.vocab - 1}, those of the vocabulary"
        raise ValueError(f"`residual` got tokens from {low} to {high}; {do}.")


def _require_layer(c: Config, layer) -> None:
    if not isinstance(layer, int | np.integer) or not 0 <= layer < c.layers:
        raise ValueError(f"got layer {layer} for {c.layers} blocks; pass 0 to {c.layers - 1}.")


def tiny() -> LanguageModel:
    """A random llama of 3 blocks, width 8 and 16 tokens, for examples.

    Example:
      >>> tiny().config.layers
      3
    """
    config = Config(16, 8, 3, 2, 1, head_width=4, hidden=16, context=32, eps=1e-5, tied=True, rope=(1.0, 0.1))
    return LanguageModel(config, nnx.Rngs(0))
