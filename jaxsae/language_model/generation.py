"""Text from a language model, token by token, as it is or with activations edited.

Each token is computed once: keys and values of those before are kept in a cache `[layers b t g n]`, in which a sliding
window is a mask, so that one mechanism serves every family. An edit is that of `splice`, at the same positions, and it
acts on each position once, when that is computed.
"""

import functools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer
from jax.tree_util import Partial
from jaxtyping import Array, Float, Int, PRNGKeyArray

from jaxsae._core.files import InputError
from jaxsae.language_model import models
from jaxsae.language_model.blocks import Cache
from jaxsae.language_model.models import LanguageModel, Splice


def generate(
    model: LanguageModel,
    ids: Int[Array, "b s"],
    tokens: int,
    *,
    temperature: float | Float[Array, ""] = 0.0,
    key: PRNGKeyArray | None = None,
    stop: Sequence[int] = (),
    layer: int | None = None,
    fn: Splice | None = None,
    site: str = "resid_post",
    skip_first: int = 1,
    keep_error: bool = False,
) -> Int[Array, "b n"]:
    """The tokens that a model appends to prompts, with its activations edited or as they are.

    The next token is the largest of `logits + temperature · g`, with `g` independent and standard Gumbel: a draw from
    `softmax(logits / temperature)`, and the most probable token where the temperature is 0.

    Args:
      model: the language model.
      ids: prompts `[b s]`, all of one length.
      tokens: how many to append; with the prompt, at most the model's context; static.
      temperature: 0 or more.
      key: PRNG key; needed unless the temperature is 0.
      stop: tokens that end a row, such as that of the end of a text; the row then repeats it.
      layer: block of an edit, as for `splice`; static.
      fn: the edit, as for `splice`, and of each position alone, since those of the prompt come together and the others
        one by one. A `jax.tree_util.Partial` of a function and arrays compiles once for all values of these.
      site: as for `splice`.
      skip_first: as for `splice`.
      keep_error: as for `splice`.

    Returns:
      `[b n]` int32, without the prompt; −1 from where logits are NaN, as under `jit` with a token outside of the
      vocabulary.

    Raises:
      InputError: if the context does not hold them.
      TypeError, ValueError: at trace time, if there is a temperature without a key, a layer without `fn` or `fn`
        without a layer, or as `splice`.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> from jaxsae.language_model import tiny
      >>> prompt = jnp.array([[1, 2, 3]])
      >>> generate(tiny(), prompt, 5).shape
      (1, 5)
      >>> steer = jax.tree_util.Partial(lambda v, h: h + v, 8.0 * jnp.eye(8)[3])
      >>> generate(tiny(), prompt, 5, layer=1, fn=steer, temperature=0.7, key=jax.random.key(0)).shape
      (1, 5)

    Source: Gumbel (1954), "Statistical theory of extreme values", for sampling by a maximum.
    """
    if (fn is None) != (layer is None):
        raise ValueError(f"`generate` got {'layer without fn' if fn is None else 'fn without layer'}; pass both.")
    models._validate(model, ids, [] if layer is None else [(layer, site)])
    _require_room(model, ids.shape[1], tokens)
    if fn is not None:
        models._require_skip(skip_first, ids.shape[1] + tokens - 1)  # the last token is not read
    _require_temperature(temperature, key)
    edit = fn if fn is None or isinstance(fn, Partial) else Partial(fn)
    where = {"layer": layer, "site": site, "skip_first": skip_first, "keep_error": keep_error}
    ends = jnp.asarray(np.asarray(stop, np.int32))
    return _generate(model, ids, temperature, key, ends, edit, tokens=tokens, **where)


def _require_room(model: LanguageModel, prompt: int, tokens: int) -> None:
    context = model.config.context
    if isinstance(tokens, bool) or not hasattr(tokens, "__index__") or tokens < 1:
        raise InputError(f"got {tokens} tokens to generate; pass a whole number of at least 1.")
    if prompt + tokens > context:
        got = f"{tokens} tokens to generate after a prompt of {prompt}, and the model's context is {context}"
        raise InputError(f"got {got}; pass at most {context} in all.")


def _require_temperature(temperature: Any, key: PRNGKeyArray | None) -> None:
    known = not isinstance(temperature, Tracer)
    if known and not 0 <= temperature < float("inf"):
        raise ValueError(f"`generate` got temperature {temperature}; pass 0 or more.")
    if key is None and not (known and temperature == 0):
        raise ValueError(f"`generate` got temperature {temperature} without a key; pass key=jax.random.key(0), say.")


@functools.partial(jax.jit, static_argnames=("tokens", "layer", "site", "skip_first", "keep_error"))
def _generate(model, ids, temperature, key, stop, fn, *, tokens: int, layer, **how):
    c, (b, s) = model.config, ids.shape
    edit = None if fn is None else models.Edit(fn, **how)
    room = jnp.zeros((c.layers, b, s + tokens - 1, c.kv_heads, c.head_width), c.dtype)
    predicted, cache = _read(model, ids, Cache(room, room), 0, layer, edit)

    def choose(number, predicted):
        if key is None:
            best = jnp.argmax(predicted, axis=-1)
        else:
            noise = jax.random.gumbel(jax.random.fold_in(key, number), predicted.shape)
            best = jnp.argmax(predicted + temperature * noise, axis=-1)
        return jnp.where(jnp.isnan(predicted).any(axis=-1), -1, best).astype(jnp.int32)

    def ended(found):
        return (found[:, None] == stop).any(axis=-1)

    def step(state):
        number, last, cache, out = state
        predicted, cache = _read(model, last[:, None], cache, s + number - 1, layer, edit)
        new = jnp.where(ended(last), last, choose(number, predicted))
        out = jnp.where(jnp.arange(tokens) >= number, new[:, None], out)  # the rest too, should the loop end
        return number + 1, new, cache, out

    def unfinished(state):
        return (state[0] < tokens) & ~ended(state[1]).all()

    first = choose(0, predicted)
    state = (jnp.ones((), jnp.int32), first, cache, jnp.broadcast_to(first[:, None], (b, tokens)))
    return jax.lax.while_loop(unfinished, step, state)[-1]


def _read(model, ids, cache: Cache, start, layer: int | None, edit: models.Edit | None):
    """The logits `[b v]` after the last of the tokens from position `start` on, and the cache with these."""

    def block(h, each):
        number, (block, *how), past = each

        def tap(name, x):
            if edit is None or name != edit.site:
                return x
            at = functools.partial(edit.at, start=start)
            return jax.lax.cond(number == layer, at, lambda x: x, x)

        return block(h, *how, tap, past, start)

    stacked = models._layers(model, cache.keys.shape[2])
    numbers = jnp.arange(model.config.layers)
    h, cache = jax.lax.scan(block, models._embed(model, ids, start), (numbers, stacked, cache))
    return models._unembed(model, h[:, -1:])[:, 0], cache
