"""Sparse autoencoders: parameters in a pytree, and pure functions that encode, decode, refine and measure.

    z = activation((x − b_dec) W_enc + b_enc)        x̂ = z W_dec + b_dec

An architecture is an activation (`activations`) and, in training, a loss. `sae` has the functions, `refinement` the
best values on a code's support, `normalisation` the scaling of inputs, `metrics` and `shrinkage` mergeable sums,
`stream` refinement of more rows than fit in memory, and `calibration` thresholds for a target L0.
"""

from jaxsae.autoencoder import (
    activations as activations,
    calibration as calibration,
    metrics as metrics,
    normalisation as normalisation,
    sae as sae,
    stream as stream,
)
from jaxsae.autoencoder.activations import (
    AbsTopK as AbsTopK,
    BatchTopK as BatchTopK,
    Gated as Gated,
    GroupMax as GroupMax,
    JumpReLU as JumpReLU,
    MatchingPursuit as MatchingPursuit,
    ReLU as ReLU,
    TopK as TopK,
)
from jaxsae.autoencoder.refinement import (
    Fit as Fit,
    certify as certify,
    refine as refine,
    to_fit as to_fit,
)
from jaxsae.autoencoder.sae import (
    SAE as SAE,
    decode as decode,
    describe as describe,
    encode as encode,
    encode_dense as encode_dense,
    init as init,
    pre_activations as pre_activations,
    reconstruct as reconstruct,
    row_width as row_width,
    split_rows as split_rows,
)
from jaxsae.autoencoder.shrinkage import Shrinkage as Shrinkage, shrinkage as shrinkage
from jaxsae.autoencoder.surgery import (
    fold_scale as fold_scale,
    rescale as rescale,
    rethreshold as rethreshold,
    steer as steer,
)
