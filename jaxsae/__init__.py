"""Sparse autoencoders in JAX, and the refinement of their codes with a certificate per row.

    x ──▶ encoder ──▶ SparseCode ──refine──▶ SparseCode ──decode──▶ x̂
                           └──── shrinkage ────┘

An `SAE` is a pytree of parameters, a `SparseCode` says which latents are active and their values, and
everything else is a pure function of the two. Packages, from the bottom up: `least_squares` (the refit and its
solvers), `pursuit` and `lasso` (which atoms, without an encoder), `autoencoder`, `ksvd`, `formats` (files of other
libraries), `train`; beside them `data` and `language_model`.
"""

from jaxsae import autoencoder, codes, data, formats, ksvd, lasso, least_squares, pursuit, sharding, train
from jaxsae._core import lazy, pytrees
from jaxsae._core.files import InputError
from jaxsae.autoencoder import (
    SAE,
    AbsTopK,
    BatchTopK,
    Gated,
    GroupMax,
    JumpReLU,
    MatchingPursuit,
    ReLU,
    Shrinkage,
    TopK,
    decode,
    encode,
    encode_dense,
    init,
    metrics,
    reconstruct,
    refine,
    shrinkage,
    stream,
)
from jaxsae.codes import SparseCode
from jaxsae.formats import pretrained
from jaxsae.least_squares import (
    FISTA,
    BlockPivoting,
    Certificate,
    ConjugateGradient,
    ProjectedGradient,
    RefitInfo,
    Status,
    certify,
    check,
    kernels,
    refit,
    solvers,
)

__all__ = [
    "FISTA",
    "SAE",
    "AbsTopK",
    "BatchTopK",
    "BlockPivoting",
    "Certificate",
    "ConjugateGradient",
    "Gated",
    "GroupMax",
    "InputError",
    "JumpReLU",
    "MatchingPursuit",
    "ProjectedGradient",
    "ReLU",
    "RefitInfo",
    "Shrinkage",
    "SparseCode",
    "Status",
    "TopK",
    "app",
    "autoencoder",
    "certify",
    "check",
    "codes",
    "data",
    "decode",
    "encode",
    "encode_dense",
    "formats",
    "init",
    "kernels",
    "ksvd",
    "language_model",
    "lasso",
    "least_squares",
    "metrics",
    "pretrained",
    "pursuit",
    "pytrees",
    "reconstruct",
    "refine",
    "refit",
    "sharding",
    "shrinkage",
    "solvers",
    "stream",
    "train",
]


# With the modules of Flax, and what the command needs.
__getattr__ = lazy.submodules(__name__, "app", "language_model")


def __dir__() -> list[str]:
    return __all__
