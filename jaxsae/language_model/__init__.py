"""The language model of the activations: extract its residual stream, replace it, and measure the loss.

`models` computes, `files` reads GGUF files and Hugging Face directories, `harvest` turns text into activations.
"""

from jaxsae.language_model import harvest
from jaxsae.language_model.download import cached, fetch
from jaxsae.language_model.files import read_tokenizer
from jaxsae.language_model.models import (
    LanguageModel,
    NextToken,
    cross_entropy,
    load,
    logits,
    loss_recovered,
    residual,
    splice,
    tiny,
)

__all__ = ["LanguageModel", "cached", "fetch", "harvest", "load", "logits", "read_tokenizer", "residual", "tiny"]
__all__ += ["NextToken", "cross_entropy", "loss_recovered", "splice"]
