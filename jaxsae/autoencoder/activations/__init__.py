"""From pre-activations to a code: an architecture is one activation and, in training, one loss.

`base.Activation` has a default for everything that an SAE asks; a new activation is one file here, and a line below.
"""

from jaxsae.autoencoder.activations.base import Activation
from jaxsae.autoencoder.activations.batch_top_k import BatchTopK
from jaxsae.autoencoder.activations.matching_pursuit import MatchingPursuit
from jaxsae.autoencoder.activations.thresholds import Gated, JumpReLU, ReLU
from jaxsae.autoencoder.activations.top_k import AbsTopK, GroupMax, TopK

__all__ = [
    "AbsTopK",
    "Activation",
    "BatchTopK",
    "Gated",
    "GroupMax",
    "JumpReLU",
    "MatchingPursuit",
    "ReLU",
    "TopK",
]
