"""A language model around the activations: take residuals out of it, put other ones in, and see what that costs.

`models` computes, `files` reads GGUF files and Hugging Face directories, `harvest` goes from text to activations.
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
