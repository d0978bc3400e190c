"""Next-token prediction of a language model, with activations replaced.

A splice of an autoencoder costs the model some cross-entropy; the share of an ablation's cost that it saves is
`loss_recovered`.
"""

import functools
import math
import operator
from collections.abc import Iterable, Mapping

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from jaxsae._core import linalg, pytrees
from jaxsae.language_model import models
from jaxsae.language_model.models import LanguageModel, Splice


@pytrees.dataclass
class NextToken:
    """Sums over the predicted tokens; `a + b` is the measurement of both.

    Attributes:
      tokens: how many.
      surprise: `Σ −log p(token)`, in nats.
      divergence: `Σ KL(clean ‖ this)`, in nats, from the predictions of the unmodified model.
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
    site: str = "resid_post",
    skip_first: int = 1,
    keep_error: bool = False,
) -> dict[str, NextToken]:
    """Measure next-token prediction under splices, by name, and `"clean"`, of the unmodified model.

    Batches are streamed, and their means are weighted by tokens, so that batches may differ in shape. Blocks up to
    `layer` run once for all splices. A splice runs outside of `jit`: one that is slow should be jitted.

    Args:
      model: the language model.
      batches: of tokens `[b s]`, `s` at least 2 more than `skip_first`, so that a prediction sees the splice; the
        logits of one are in memory at a time, `4·b·s·v` bytes.
      layer: as for `residual`.
      splices: functions as for `splice`.
      site: as for `splice`.
      skip_first: as for `splice`.
      keep_error: as for `splice`, and for all of `splices`; `lambda h: (jnp.zeros_like(h), h)` then ablates.

    Returns:
      `NextToken` for each name; `loss_recovered` compares three of them.

    Raises:
      ValueError: if there are no batches, or as `splice`.

    Example:
      >>> import jax.numpy as jnp
      >>> from jaxsae.language_model import tiny
      >>> ids = jnp.arange(12).reshape(2, 6)
      >>> found = cross_entropy(tiny(), [ids], 1, {"zero": jnp.zeros_like, "same": lambda h: h})
      >>> bool(found["same"].cross_entropy == found["clean"].cross_entropy), float(found["zero"].tokens)
      (True, 10.0)
    """
    total: dict[str, NextToken] | None = None
    for ids in batches:
        models._validate(model, ids, [(layer, site)])
        if ids.shape[1] < 2 + skip_first:
            got = f"{ids.shape[1]} tokens in a row with skip_first {skip_first}, so that no prediction sees the splice"
            raise ValueError(f"`cross_entropy` got {got}; pass at least {2 + skip_first}.")
        models._require_skip(skip_first, ids.shape[1])
        h, x, clean = _clean(model, ids, layer, site)
        part = {"clean": _score(clean, ids, clean)}
        for name, fn in splices.items():
            new = models.Edit(fn, site, skip_first, keep_error).at(x)
            part[name] = _score_splice(model, h, new, ids, clean, layer, site)
        part = jax.tree.map(float, jax.device_get(part))  # in float64 from here on
        total = part if total is None else {name: total[name] + part[name] for name in part}
    if total is None:
        raise ValueError("`cross_entropy` got no batches; pass at least one.")
    return total


def loss_recovered(clean: NextToken, spliced: NextToken, ablated: NextToken) -> Float[Array, ""] | float:
    """The share of an ablation's loss that a splice recovers: 1 is as good as the model itself, 0 as the ablation.

    NaN where the ablation loses nothing.

    Args:
      clean: the unmodified model.
      spliced: the model with a reconstruction.
      ablated: the model with zeros, or the mean, in place of the reconstruction.

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


@functools.partial(jax.jit, static_argnames=("layer", "site"))
def _clean(model, ids, layer, site):
    """The residual before a block, the activation at a site of it, and the logits."""
    h, found = models._run(model, models._embed(model, ids), 0, layer), {}

    def keep(name, x):
        found[name] = x
        return x

    predicted = models._after(model, h, layer, keep)
    return h, found[site], predicted


@functools.partial(jax.jit, static_argnames=("layer", "site"))
def _score_splice(model, h, new, ids, clean, layer, site):
    predicted = models._after(model, h, layer, lambda name, x: new if name == site else x)
    return _score(predicted, ids, clean)


@jax.jit
def _score(predicted, ids, clean):
    """Sums over the tokens after the first, by reductions only: no array as large as the logits is made."""
    predicted, clean = predicted[:, :-1], clean[:, :-1]
    normaliser, clean_normaliser = (jax.nn.logsumexp(x, axis=-1, keepdims=True) for x in (predicted, clean))
    surprise = normaliser - jnp.take_along_axis(predicted, ids[:, 1:, None], axis=-1)
    log_ratio = (clean - clean_normaliser) - (predicted - normaliser)
    divergence = jnp.exp(clean - clean_normaliser) * log_ratio
    return NextToken(jnp.asarray(surprise.size, jnp.float32), jnp.sum(surprise), jnp.sum(divergence))
