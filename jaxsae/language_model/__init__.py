"""A language model around the activations: take residuals out of it, put other ones in, and see what that costs.

`models` computes, `files` reads GGUF files and Hugging Face directories, `harvest` goes from text to activations.
"""

from jaxsae.language_model import harvest as harvest
from jaxsae.language_model.download import cached as cached, fetch as fetch
from jaxsae.language_model.files import read_tokenizer as read_tokenizer
from jaxsae.language_model.models import (
    LanguageModel as LanguageModel,
    NextToken as NextToken,
    cross_entropy as cross_entropy,
    load as load,
    logits as logits,
    loss_recovered as loss_recovered,
    residual as residual,
    splice as splice,
    tiny as tiny,
)
