"""The text behind rows that were harvested from a language model, and what a latent does in that model."""

import os
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxsae import language_model
from jaxsae._core.files import InputError, json_number
from jaxsae.autoencoder.refinement import to_fit
from jaxsae.autoencoder.sae import SAE
from jaxsae.data import origin
from jaxsae.data.origin import Origin
from jaxsae.language_model import files, sites, text as texts

CONTEXTS = 4  # in which the effect of a latent is measured
_TOGETHER = 2  # contexts whose logits are in memory together
_WORDS = 10  # that a latent promotes, or suppresses
_RESIDUAL = ("resid_pre", "attn_out", "resid_mid", "mlp_out", "resid_post")  # sites whose vectors add to the residual

ABLATION = (
    "the rise of the next-token loss when the latent is taken away where it fires, h − z_j W_dec[j], with all the rest "
    "of the activation kept, the autoencoder's error too, and nothing refitted: summed over the later tokens of the "
    f"context, per token on which it fires, in nats; over {CONTEXTS} contexts at most, drawn in proportion to "
    "how often it fires in them"
)


class Text(NamedTuple):
    """The tokens of a harvest's contexts.

    Attributes:
      contexts: `[c s]`; row `r` is of position `1 + r mod (s − 1)` of context `r // (s − 1)`.
      tokenizer: of the model that read them; None if it is not at hand.
      ends: places in the flattened contexts of the tokens that end documents, in order; None if they are not known.
    """

    contexts: np.ndarray
    tokenizer: Any
    ends: np.ndarray | None

    def place(self, rows: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Context and position of rows."""
        context, position = np.divmod(rows, self.contexts.shape[1] - 1)
        return context, position + 1

    def documents(self, rows: np.ndarray) -> np.ndarray:
        """The documents that rows are of; their contexts, if documents are not known."""
        context, position = self.place(rows)
        if self.ends is None:
            return context
        return np.searchsorted(self.ends, context * self.contexts.shape[1] + position)


def read(
    path: str | os.PathLike, rows: int, known: Origin, model: str | None, warn: Callable[[str], None]
) -> Text | None:
    """The tokens beside the rows of a directory; None if there are none.

    Args:
      path: of the rows.
      rows: how many there are.
      known: where they come from.
      model: that is to say what the tokens are; by default the one that the rows come from.
      warn: called with what cannot be shown.

    Raises:
      InputError: if the tokens are not the model's, or not those of the rows.
    """
    contexts = origin.contexts(path, rows)
    if contexts is None:
        if model is not None:
            warn(f"{path}: has no tokens beside its rows, so examples are shown without text.")
        return None
    name = model or known.model
    if name is None:
        warn("nothing says which model the tokens are of; pass --model to see their text. Documents are not known.")
        return Text(contexts, None, None)
    try:
        tokenizer = files.read_tokenizer(name)
        end = files.end_of_text(name, tokenizer)
    except InputError as error:
        if model is not None:
            raise
        warn(f"tokens are shown without their text, and documents are not known: {error}")
        return Text(contexts, None, None)
    size = tokenizer.get_vocab_size()
    if int(contexts.max()) >= size or int(contexts.min()) < 0:
        what = f"has token {int(contexts.max())}, the tokenizer of {name} has {size}"
        raise InputError(f"{path}: {what}; pass the model that they were harvested from.")
    return Text(contexts, tokenizer, None if end is None else _ends(contexts, end))


def _ends(contexts: np.ndarray, end: int) -> np.ndarray:
    ends = contexts == end
    if (contexts[:, 0] == end).all():  # it also begins every context, wherever documents end
        ends[:, 0] = False
    return np.flatnonzero(ends)


class Lens(NamedTuple):
    """A language model, and where in it an autoencoder's activations are.

    Attributes:
      name: of the model.
      model: the model.
      tokenizer: its own.
      layer: the block.
      site: where in it.
    """

    name: str
    model: Any
    tokenizer: Any
    layer: int
    site: str


def open_lens(name: str, known: Origin, width: int, context: int | None) -> Lens:
    """Load a language model, once it is known that the activations may be its own.

    Args:
      name: as for `language_model.load`.
      known: where the activations come from.
      width: of the autoencoder.
      context: tokens in a context, if there are tokens.

    Raises:
      InputError: if nothing says the layer, or the model has no such place.
    """
    config = files.read_config(name)
    if known.layer is None:
        do = "pass rows of a harvest, or an SAE whose files say it (jaxsae convert --hook-name)"
        raise InputError(f"got --model, and neither the SAE nor the rows say which layer they are of; {do}.")
    site = known.site or "resid_post"
    sites.require(config, known.layer, site)
    if sites.width(config, site) != width:
        what = f"an SAE of width {width}, and {site} of {name} is {sites.width(config, site)} wide"
        raise InputError(f"got {what}; pass the model whose activations they are.")
    if context is not None and context > config.context:
        raise InputError(f"got contexts of {context} tokens, and {name} takes {config.context}; pass another model.")
    return Lens(name, language_model.load(name), files.read_tokenizer(name), known.layer, site)


def words(lens: Lens, atoms: np.ndarray) -> list[dict[str, Any]]:
    """For each atom the tokens whose logits it raises, `promotes`, and lowers, `suppresses`, most; None at other sites.

    Args:
      lens: the model.
      atoms: `[t d]`.
    """
    if lens.site not in _RESIDUAL:
        return [{"promotes": None, "suppresses": None} for _ in atoms]
    found = language_model.logit_lens(lens.model, jnp.asarray(atoms), k=_WORDS)
    pairs = {
        "promotes": (found.promoted, found.promoted_logits),
        "suppresses": (found.suppressed, found.suppressed_logits),
    }
    said = {
        name: [_named(lens, *each) for each in zip(*map(np.asarray, both), strict=True)] for name, both in pairs.items()
    }
    return [dict(zip(said, each, strict=True)) for each in zip(*said.values(), strict=True)]


def _named(lens: Lens, ids: np.ndarray, logits: np.ndarray) -> list[dict[str, Any]]:
    tokens = texts.pieces(lens.tokenizer, ids)
    return [
        {"id": int(number), "token": token, "logit": json_number(logit)}
        for number, token, logit in zip(ids, tokens, logits, strict=True)
    ]


def effect(lens: Lens, sae: SAE, atom: np.ndarray, contexts: np.ndarray, values: np.ndarray) -> float | None:
    """What ablating a latent does to the next-token loss, as `ABLATION` says; None where it does not fire.

    Args:
      lens: the model.
      sae: the autoencoder.
      atom: `[d]`, of the latent.
      contexts: tokens `[c s]`.
      values: `[c s]`, the encoder's value of the latent at each token, 0 where it does not fire.
    """
    fired = np.count_nonzero(values)
    if not fired:
        return None
    total = 0.0
    for at in range(0, len(contexts), _TOGETHER):
        ids, z = contexts[at : at + _TOGETHER], values[at : at + _TOGETHER]
        ids = np.pad(ids, [(0, _TOGETHER - len(ids)), (0, 0)], mode="edge")  # a context without ablation adds 0
        z = np.pad(z, [(0, _TOGETHER - len(z)), (0, 0)])
        found = language_model.cross_entropy(
            lens.model,
            [jnp.asarray(ids, jnp.int32)],
            lens.layer,
            {"ablated": lambda h, z=z: _without(sae, jnp.asarray(atom), h, jnp.asarray(z, jnp.float32))},
            site=lens.site,
        )
        total += found["ablated"].surprise - found["clean"].surprise
    return float(total / fired)


@jax.jit
def _without(sae: SAE, atom, h, z):
    scale = to_fit(sae, h.astype(jnp.float32)).scale  # of an autoencoder that gives each row units of its own
    part = z[..., None] * atom.astype(jnp.float32)
    return (h.astype(jnp.float32) - (part if scale is None else jnp.where(z[..., None] == 0, 0, scale * part))).astype(
        h.dtype
    )


def decoded(text: Text, ids: Sequence[int] | np.ndarray) -> list[str] | None:
    """The text of tokens; None if there is no tokenizer."""
    return None if text.tokenizer is None else texts.pieces(text.tokenizer, ids)
