"""From pre-activations to a code: an architecture is one activation and, in training, one loss.

`base.Activation` has defaults for everything an SAE uses; a new activation is one class, and one line below.
"""

from jaxsae.autoencoder.activations.base import Activation as Activation
from jaxsae.autoencoder.activations.matching_pursuit import MatchingPursuit as MatchingPursuit
from jaxsae.autoencoder.activations.thresholds import Gated as Gated, JumpReLU as JumpReLU, ReLU as ReLU
from jaxsae.autoencoder.activations.top_k import (
    AbsTopK as AbsTopK,
    BatchTopK as BatchTopK,
    GroupMax as GroupMax,
    TopK as TopK,
)
