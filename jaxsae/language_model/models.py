"""The language model of the activations: extract them at its sites, and replace them.

    ids ──embed──▶ blocks[:layer] ──▶ block[layer], its sites ──residual──▶ fn ──splice──▶ blocks[layer + 1:] ──▶ logits

Decoder-only transformers in Flax NNX; `blocks` computes, `sites` names the places. A model is a pytree, so it may be an
argument of `jit`; where `ids [b s]` are sharded over their batch, so is everything computed from them. `layer` counts
blocks: the residual of layer 0 is the output of the first block.
"""

import functools
import os
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.core import Tracer
from jaxtyping import Array, Float, Int

from jaxsae._core.files import InputError
from jaxsae.language_model import blocks, files, sites
from jaxsae.language_model.config import Config

# Of activations; what takes their place, or with `keep_error` the edited and the unedited reconstruction.
Splice = Callable[[Float[Array, "b s n"]], Float[Array, "b s n"] | tuple[Float[Array, "b s n"], Float[Array, "b s n"]]]


class LanguageModel(nnx.Module):
    """A decoder-only transformer; parameters of all blocks are stacked along a leading axis.

    Attributes:
      config: the architecture, static.
      embedding: of tokens, `[v d]`; also the head, if `head` is None.
      positions: learned, `[context d]`; None if blocks rotate by position.
      blocks: `blocks.Block`.
      norm: before the head.
      head: `[d v]`, or None.
    """

    def __init__(self, config: Config, rngs: nnx.Rngs):
        """Draw parameters at random.

        Args:
          config: the architecture, as `files` reads it.
          rngs: of flax.
        """
        c = config
        embed = functools.partial(nnx.Embed, features=c.width, param_dtype=c.dtype, rngs=rngs)
        self.config = c
        self.embedding = embed(c.vocab)
        self.positions = embed(c.context) if c.rope is None else None
        keys = jax.random.split(rngs(), c.layers)
        self.blocks = nnx.vmap(lambda key: blocks.Block(c, nnx.Rngs(key)))(keys)
        self.norm = blocks.norm(c, c.width, rngs)
        self.head = None if c.tied else nnx.Linear(c.width, c.vocab, use_bias=False, param_dtype=c.dtype, rngs=rngs)


def load(path: str | os.PathLike, *, dtype: Any = jnp.float32) -> LanguageModel:
    """Load a language model, without torch.

    Args:
      path: a GGUF file of a llama; a Hugging Face directory (`config.json`, `model.safetensors` or its shards) of a
        family in `families.FAMILIES`; or the name of a fetched model, `"smollm2"`.
      dtype: of the weights and the computation, float32 or bfloat16; norms, softmax and logits are float32.

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


def residual(
    model: LanguageModel, ids: Int[Array, "b s"], layer: int, site: str = "resid_post"
) -> Float[Array, "b s n"]:
    """The activations at a site of block `layer`, by default the residual stream after it.

    Args:
      model: the language model.
      ids: tokens `[b s]`, with `s` at most its context.
      layer: from 0 to the number of blocks less 1; static.
      site: one of `sites.SITES`; static.

    Returns:
      `[b s n]`, `n` the width of the model, or of all heads for `"hook_z"`; under `jit`, where tokens cannot be
      checked, NaN in a row with one outside the vocabulary.

    Raises:
      TypeError, ValueError: at trace time, if `ids`, `layer` or `site` does not fit the model; outside of `jit`, if a
        token is not in the vocabulary.

    Example:
      >>> import jax.numpy as jnp
      >>> residual(tiny(), jnp.array([[1, 2, 3]]), 1).shape
      (1, 3, 8)
      >>> residual(tiny(), jnp.array([[1, 2, 3]]), 1, "mlp_out").shape
      (1, 3, 8)
    """
    return residuals(model, ids, [(layer, site)])[0]


def residuals(
    model: LanguageModel, ids: Int[Array, "b s"], points: Sequence[tuple[int, str]]
) -> list[Float[Array, "b s n"]]:
    """The activations at several places, from one pass that ends with the last of them.

    Args:
      model: the language model.
      ids: as for `residual`.
      points: pairs of layer and site, as there; static.

    Returns:
      An array for each of `points`.

    Raises:
      TypeError, ValueError: as `residual`.

    Example:
      >>> import jax.numpy as jnp
      >>> found = residuals(tiny(), jnp.array([[1, 2, 3]]), [(2, "mlp_in"), (0, "resid_post"), (2, "mlp_out")])
      >>> [x.shape for x in found]
      [(1, 3, 8), (1, 3, 8), (1, 3, 8)]
    """
    _validate(model, ids, points)
    h, done, found = _embed(model, ids), 0, {}
    for layer in sorted({layer for layer, _ in points}):
        h = _run(model, h, done, layer)

        def keep(site, x, layer=layer):
            found[layer, site] = x
            return x

        h, done = _block(model, h, layer, keep), layer + 1
    return [found[layer, site] for layer, site in points]


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
    sites.require(c, layer, "resid_post")
    return _unembed(model, _run(model, h, layer + 1, c.layers))


def splice(
    model: LanguageModel,
    ids: Int[Array, "b s"],
    layer: int,
    fn: Splice,
    *,
    site: str = "resid_post",
    skip_first: int = 1,
    keep_error: bool = False,
) -> Float[Array, "b s v"]:
    """The logits of a model whose activation at a site of block `layer` is replaced by `fn` of it.

    With `keep_error`, `fn` returns a pair of reconstructions, from an edited code and from the code as it was, and only
    their difference is added, so that what the autoencoder does not reconstruct is kept:

        h' = h + decode(edit(z)) − decode(z)

    An edit that changes nothing then leaves the logits as they are, while `decode(edit(z))` alone also has the effect
    of the reconstruction's error.

    The first position keeps its own by default: it is massive in the residual of most models, and autoencoders are not
    trained on it.

    Args:
      model: the language model.
      ids: tokens `[b s]`.
      layer: as for `residual`.
      fn: from activations to activations `[b s n]`, for example an SAE's reconstruction; it sees the first positions
        too.
      site: as for `residual`.
      skip_first: how many positions at the beginning keep their activation; fewer than all.
      keep_error: whether `fn` returns a pair `(edited, unedited)`, whose difference is added.

    Raises:
      TypeError, ValueError: at trace time, if `ids`, `layer`, `site`, `skip_first` or what `fn` returns does not fit
        the model.

    Example:
      >>> import jax, jax.numpy as jnp, jaxsae
      >>> sae = jaxsae.init(jax.random.key(0), d=8, m=32, activation=jaxsae.TopK(4))
      >>> def refined(h):
      ...     return jaxsae.decode(sae, jaxsae.refine(sae, h)[0])
      >>> splice(tiny(), jnp.array([[1, 2, 3]]), 1, refined).shape
      (1, 3, 16)
      >>> def ablated(h):
      ...     z = jaxsae.encode_dense(sae, h)
      ...     return jaxsae.decode(sae, z.at[..., 7].set(0)), jaxsae.decode(sae, z)
      >>> splice(tiny(), jnp.array([[1, 2, 3]]), 1, ablated, keep_error=True).shape
      (1, 3, 16)

    Source: Marks et al. (2024), "Sparse feature circuits", Section 2, for the kept error.
    """
    _validate(model, ids, [(layer, site)])
    _require_skip(skip_first, ids.shape[1])
    h = _run(model, _embed(model, ids), 0, layer)
    edit = Edit(fn, site, skip_first, keep_error)
    return _after(model, h, layer, edit.tap())


class Edit(NamedTuple):
    """A splice: what is replaced, and where.

    Attributes:
      fn: as for `splice`; so are the others.
      site: of one block.
      skip_first: positions at the beginning that keep their activation.
      keep_error: whether `fn` returns a pair.
    """

    fn: Splice
    site: str
    skip_first: int
    keep_error: bool

    def tap(self, start: int | Int[Array, ""] = 0) -> blocks.Tap:
        """What the block calls; `start` is the first position of the activations."""
        return lambda name, x: self.at(x, start) if name == self.site else x

    def at(self, h: Float[Array, "b s n"], start: int | Int[Array, ""] = 0) -> Float[Array, "b s n"]:
        """What replaces activations, the first of them at position `start`."""
        new = self.fn(h)
        if self.keep_error:
            if not (isinstance(new, tuple) and len(new) == 2):
                what = "expected two reconstructions, the edited and the unedited"
                raise TypeError(f"`splice` got {type(new).__name__} from fn with keep_error, {what}; return (a, b).")
            edited, unedited = (_require_like(part, h) for part in new)
            wide = jnp.promote_types(h.dtype, jnp.float32)  # in which the difference is not rounded to that of h
            new = h.astype(wide) + (edited.astype(wide) - unedited.astype(wide))
        kept = (start + jnp.arange(h.shape[1]))[:, None] < self.skip_first
        return jnp.where(kept, h, _require_like(new, h).astype(h.dtype))


def _require_skip(skip_first: int, length: int) -> None:
    if not 0 <= skip_first < length:
        raise ValueError(f"`splice` got skip_first {skip_first} for {length} positions; pass 0 or more, but fewer.")


def _require_like(new, h):
    if not isinstance(new, jax.Array | np.ndarray):
        raise TypeError(f"`splice` got {type(new).__name__} from fn; return activations {h.shape}.")
    if not jnp.issubdtype(new.dtype, jnp.floating):
        raise TypeError(
            f"`splice` got {new.dtype} from fn for activations of {h.dtype}; return floating-point numbers."
        )
    if new.shape != h.shape:
        raise ValueError(f"`splice` got {new.shape} from fn for activations {h.shape}; return one for each.")
    return new


def _embed(model, ids, start=0):
    # `take` would map -1 to the last row, but maps an index beyond the end to NaN.
    h = model.embedding(jnp.where(ids < 0, jnp.iinfo(jnp.int32).max, ids.astype(jnp.int32)))
    if model.config.embedding_scale != 1:
        h = h * jnp.asarray(model.config.embedding_scale, h.dtype)
    return h if model.positions is None else h + model.positions(start + jnp.arange(ids.shape[1]))


def _layers(model, length: int):
    """The blocks, stacked, with what else differs between them: see `blocks.Block.__call__`."""
    c = model.config
    windows = c.windows or (None,) * c.layers
    local = c.rope if c.local_rope is None else c.local_rope
    ropes = [c.rope if window is None else local for window in windows]
    turns = None if c.rope is None else jnp.asarray(np.array(ropes), jnp.float32)
    if all(window is None or window >= length for window in windows):
        return model.blocks, turns, None
    return model.blocks, turns, jnp.array([length if window is None else window for window in windows], jnp.int32)


def _run(model, h, first: int, last: int):
    """The residual after blocks `first` to `last − 1`."""
    some = jax.tree.map(lambda stacked: stacked[first:last], _layers(model, h.shape[1]))
    return jax.lax.scan(lambda h, layer: (layer[0](h, *layer[1:])[0], None), h, some)[0]


def _block(model, h, layer: int, tap: blocks.Tap):
    """The residual after one block, whose sites `tap` sees."""
    block, *how = jax.tree.map(lambda stacked: stacked[layer], _layers(model, h.shape[1]))
    return block(h, *how, tap)[0]


def _after(model, h, layer: int, tap: blocks.Tap):
    """The logits that follow from the residual before a block, whose sites `tap` sees."""
    return _unembed(model, _run(model, _block(model, h, layer, tap), layer + 1, model.config.layers))


def _unembed(model, h):
    h = model.norm(h).astype(h.dtype)
    head = model.embedding.embedding[...].T if model.head is None else model.head.kernel[...]
    found = jnp.einsum("bsd,dv->bsv", h, head, preferred_element_type=jnp.float32)
    cap = model.config.logits_cap
    return found if cap is None else cap * jnp.tanh(found / cap)


def _validate(model, ids, points) -> None:
    c = model.config
    if not jnp.issubdtype(ids.dtype, jnp.integer):
        raise TypeError(f"`residual` got ids of dtype {ids.dtype}, expected integers; pass tokens, not embeddings.")
    if ids.ndim != 2 or not 1 <= ids.shape[1] <= c.context:
        raise ValueError(f"`residual` got ids of shape {ids.shape}; pass (b, s) with s from 1 to {c.context}.")
    for point in points:
        sites.require(c, *point)
    if isinstance(ids, Tracer) or not getattr(ids, "is_fully_addressable", True) or not ids.size:
        return
    tokens = np.asarray(ids)
    low, high = int(tokens.min()), int(tokens.max())
    if low < 0 or high >= c.vocab:
        do = f"pass 0 to {c.vocab - 1}, those of the vocabulary"
        raise ValueError(f"`residual` got tokens from {low} to {high}; {do}.")


def tiny() -> LanguageModel:
    """A random llama of 3 blocks, width 8 and 16 tokens, for examples.

    Example:
      >>> tiny().config.layers
      3
    """
    config = Config(16, 8, 3, 2, 1, head_width=4, hidden=16, context=32, eps=1e-5, tied=True, rope=(1.0, 0.1))
    return LanguageModel(config, nnx.Rngs(0))
