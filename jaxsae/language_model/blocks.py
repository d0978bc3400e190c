"""One block of a decoder-only transformer, for all families: what differs between them is in `Config`."""

import functools
import math
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int

from jaxsae.language_model.config import Config

# Called with each site of `sites.SITES` and the activation there; what it returns takes its place.
Tap = Callable[[str, Float[Array, "b s n"]], Float[Array, "b s n"]]


class Cache(NamedTuple):
    """The keys and values of the tokens before, and room for those to come.

    Attributes:
      keys: `[b t g n]`, rotated.
      values: `[b t g n]`.
    """

    keys: Float[Array, "*l b t g n"]
    values: Float[Array, "*l b t g n"]


ACTIVATIONS = {
    "silu": jax.nn.silu,
    "relu": jax.nn.relu,
    "gelu": functools.partial(jax.nn.gelu, approximate=False),
    "gelu_tanh": functools.partial(jax.nn.gelu, approximate=True),
}


class Block(nnx.Module):
    """Causal attention and an MLP, each added to the residual."""

    def __init__(self, config: Config, rngs: nnx.Rngs):
        """Draw parameters at random.

        Args:
          config: the architecture.
          rngs: of flax.
        """
        c = config
        self.config = c

        def linear(name: str, n: int, m: int) -> nnx.Linear:
            return nnx.Linear(n, m, use_bias=name in c.biases, param_dtype=c.dtype, rngs=rngs)

        queries, keys = c.heads * c.head_width, c.kv_heads * c.head_width
        before, after = c.norms in ("before", "around"), c.norms in ("after", "around")
        self.attention_norm = norm(c, c.width, rngs) if before else None
        self.q = linear("q", c.width, queries)
        self.k = linear("k", c.width, keys)
        self.v = linear("v", c.width, keys)
        self.q_norm, self.k_norm = (
            norm(c, c.head_width if c.qk_norm == "head" else n, rngs) if c.qk_norm else None for n in (queries, keys)
        )
        self.o = linear("o", queries, c.width)
        self.attention_post_norm = norm(c, c.width, rngs) if after else None
        self.mlp_norm = norm(c, c.width, rngs) if before else None
        self.gate = linear("gate", c.width, c.hidden) if c.gated else None
        self.up = linear("up", c.width, c.hidden)
        self.down = linear("down", c.hidden, c.width)
        self.mlp_post_norm = norm(c, c.width, rngs) if after else None

    def __call__(
        self,
        h: Float[Array, "b s d"],
        turns: Float[Array, " r"] | None,
        window: Int[Array, ""] | None,
        tap: Tap = lambda site, x: x,
        cache: Cache | None = None,
        start: int | Int[Array, ""] = 0,
    ) -> tuple[Float[Array, "b s d"], Cache | None]:
        """The residual after the block, and the cache with these tokens.

        Args:
          h: the residual before it.
          turns: radians per position, for each rotated pair of a head; None if positions are learned.
          window: how many tokens each attends to; None if to all before it.
          tap: see `Tap`.
          cache: of the tokens before, which are attended to as well; None if there are none.
          start: how many these are.
        """
        h = tap("resid_pre", h)
        mixed, cache = self._mix(_normed(self.attention_norm, h), turns, window, cache, start)
        mixed = tap("hook_z", mixed)
        attention = tap("attn_out", _normed(self.attention_post_norm, self.o(mixed)))
        middle = h if self.config.parallel else tap("resid_mid", h + attention)
        x = tap("mlp_in", _normed(self.mlp_norm, middle))
        mlp = tap("mlp_out", _normed(self.mlp_post_norm, self._mlp(x)))
        return tap("resid_post", middle + mlp + attention if self.config.parallel else middle + mlp), cache

    def _mlp(self, x):
        activation = ACTIVATIONS[self.config.activation]
        return self.down(activation(self.up(x)) if self.gate is None else activation(self.gate(x)) * self.up(x))

    def _mix(self, x, turns, window, cache, start):
        """Values mixed by attention, heads side by side; and the cache with these."""
        q, k, v = self.q(x), self.k(x), self.v(x)
        if self.config.qk_norm == "all":
            q, k = _normed(self.q_norm, q), _normed(self.k_norm, k)
        q, k, v = (each.reshape(*x.shape[:2], -1, self.config.head_width) for each in (q, k, v))
        if self.config.qk_norm == "head":
            q, k = _normed(self.q_norm, q), _normed(self.k_norm, k)
        if turns is not None:
            angles = (start + jnp.arange(x.shape[1])).astype(jnp.float32)[:, None] * turns
            q, k = _rotate(q, angles), _rotate(k, angles)
        if cache is not None:
            put = functools.partial(jax.lax.dynamic_update_slice_in_dim, start_index=start, axis=1)
            cache = Cache(put(cache.keys, k), put(cache.values, v))
            k, v = cache
        return _attend(self.config, q, k, v, window, start), cache


def norm(c: Config, width: int, rngs: nnx.Rngs) -> nnx.RMSNorm | nnx.LayerNorm:
    """The norm of a family, computed in float32.

    Args:
      c: the architecture.
      width: of what is normalised.
      rngs: of flax.
    """
    how = {"epsilon": c.eps, "dtype": jnp.float32, "param_dtype": jnp.float32, "rngs": rngs}
    # In one pass, E[x²] − E[x]² would lose digits: GPT-2's residuals have a large mean.
    return nnx.RMSNorm(width, **how) if c.norm == "rms" else nnx.LayerNorm(width, use_fast_variance=False, **how)


def _normed(norm, x):
    return x if norm is None else norm(x).astype(x.dtype)


def _attend(c: Config, q, k, v, window, start):
    """Each token's mean of the values `[b t g n]` up to it, or of the last `window`; queries share them in groups.

    The first of the queries `[b s h n]` is at position `start`. What has no query yet is masked, as what is behind it.
    """
    b, s, heads, n = q.shape
    q = q.reshape(b, s, c.kv_heads, heads // c.kv_heads, n)
    logits = jnp.einsum("bsgrn,btgn->bgrst", q, k, preferred_element_type=jnp.float32)
    logits = logits * (1 / math.sqrt(n) if c.scale is None else c.scale)
    if c.attention_cap is not None:
        logits = c.attention_cap * jnp.tanh(logits / c.attention_cap)
    behind = (start + jnp.arange(s))[:, None] - jnp.arange(k.shape[1])
    seen = (behind >= 0) if window is None else (behind >= 0) & (behind < window)
    weights = jax.nn.softmax(jnp.where(seen, logits, -jnp.inf), axis=-1).astype(v.dtype)
    return jnp.einsum("bgrst,btgn->bsgrn", weights, v).reshape(b, s, heads * n)


def _rotate(x, angles):
    """Rotate the first pairs `(x_i, x_{i + r})` of each head by the angles `[s r]` of its position."""
    cos, sin = jnp.cos(angles)[:, None], jnp.sin(angles)[:, None]
    a, b, rest = jnp.split(x.astype(jnp.float32), [angles.shape[1], 2 * angles.shape[1]], axis=-1)
    return jnp.concatenate([a * cos - b * sin, b * cos + a * sin, rest], axis=-1).astype(x.dtype)
