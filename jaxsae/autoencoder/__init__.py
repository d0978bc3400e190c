"""Sparse autoencoders: parameters in a pytree, and pure functions that encode, decode, refine and measure.

    z = activation((x − b_dec) W_enc + b_enc)        x̂ = z W_dec + b_dec

An architecture is an activation (`activations`) and, in training, a loss. `sae` has the functions, `normalisation` what
is done to rows beforehand, `metrics` sums that can be merged, `stream` all of it over more rows than memory holds,
`calibration` the thresholds.
"""

from jaxsae.autoencoder import activations, calibration, metrics, normalisation, sae, stream
from jaxsae.autoencoder.activations import AbsTopK, BatchTopK, Gated, GroupMax, JumpReLU, MatchingPursuit, ReLU, TopK
from jaxsae.autoencoder.metrics import Shrinkage, shrinkage
from jaxsae.autoencoder.sae import (
    SAE,
    Fit,
    decode,
    describe,
    encode,
    encode_dense,
    init,
    pre_activations,
    reconstruct,
    refine,
    to_fit,
)
from jaxsae.autoencoder.surgery import fold_scale, rescale, rethreshold

__all__ = [
    "SAE",
    "AbsTopK",
    "BatchTopK",
    "Fit",
    "Gated",
    "GroupMax",
    "JumpReLU",
    "MatchingPursuit",
    "ReLU",
    "Shrinkage",
    "TopK",
    "activations",
    "calibration",
    "decode",
    "describe",
    "encode",
    "encode_dense",
    "fold_scale",
    "init",
    "metrics",
    "normalisation",
    "pre_activations",
    "reconstruct",
    "refine",
    "rescale",
    "rethreshold",
    "sae",
    "shrinkage",
    "stream",
    "to_fit",
]
