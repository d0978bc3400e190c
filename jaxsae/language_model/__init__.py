"""The language model of the activations: extract its residual stream, replace or edit it, and measure what follows.

`models` computes, from the block in `blocks`; `sites` names where activations are taken; `next_token` measures the
loss, `generation` writes text, `lens` reads directions as tokens; `files` reads GGUF files and Hugging Face
directories, of the `families` that are known; `documents`, `chat` and `text` turn files into tokens, `harvest` these
into activations.
"""

from jaxsae.language_model import chat as chat, harvest as harvest, sites as sites, text as text
from jaxsae.language_model.config import SITES as SITES
from jaxsae.language_model.download import cached as cached, fetch as fetch
from jaxsae.language_model.files import read_tokenizer as read_tokenizer
from jaxsae.language_model.generation import generate as generate
from jaxsae.language_model.lens import LogitLens as LogitLens, logit_lens as logit_lens
from jaxsae.language_model.models import (
    LanguageModel as LanguageModel,
    load as load,
    logits as logits,
    residual as residual,
    residuals as residuals,
    splice as splice,
    tiny as tiny,
)
from jaxsae.language_model.next_token import (
    NextToken as NextToken,
    cross_entropy as cross_entropy,
    loss_recovered as loss_recovered,
)
