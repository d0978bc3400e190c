"""Sparse autoencoders in JAX, and the refinement of their codes with a certificate per row.

    x ──▶ encoder ──▶ SparseCode ──refine──▶ SparseCode ──decode──▶ x̂
                           └──── shrinkage ────┘

An `SAE` is a pytree of parameters, a `SparseCode` says which latents are active and their values, and
everything else is a pure function of the two.
"""

from jaxsae import (
    codes,
    data,
    kernels,
    ksvd,
    lasso,
    losses,
    metrics,
    objectives,
    pretrained,
    pursuit,
    sae,
    solvers,
    stream,
    train,
)
from jaxsae import exports as exports  # so that `jax.export` knows our pytrees
from jaxsae.activations import AbsTopK, BatchTopK, Gated, GroupMax, JumpReLU, ReLU, TopK
from jaxsae.certificate import Certificate, certify
from jaxsae.codes import SparseCode
from jaxsae.metrics import Shrinkage, shrinkage
from jaxsae.refit import RefitInfo, Status, check, refit
from jaxsae.sae import SAE, decode, encode, encode_dense, init, reconstruct, refine
from jaxsae.solvers import FISTA, BlockPivoting, ConjugateGradient, ProjectedGradient

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
    "JumpReLU",
    "ProjectedGradient",
    "ReLU",
    "RefitInfo",
    "Shrinkage",
    "SparseCode",
    "Status",
    "TopK",
    "certify",
    "check",
    "codes",
    "data",
    "decode",
    "encode",
    "encode_dense",
    "init",
    "kernels",
    "ksvd",
    "lasso",
    "losses",
    "metrics",
    "objectives",
    "pretrained",
    "pursuit",
    "reconstruct",
    "refine",
    "refit",
    "sae",
    "shrinkage",
    "solvers",
    "stream",
    "train",
]
