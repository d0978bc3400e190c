"""Sparse autoencoders in JAX, and the refinement of their codes with a certificate per row.

    x ──▶ encoder ──▶ SparseCode ──refine──▶ SparseCode ──decode──▶ x̂
                           └──── shrinkage ────┘

An `SAE` is a pytree of parameters, a `SparseCode` says which latents are active and their values, and
everything else is a pure function of the two.
"""

from jaxsae import codes, sae
from jaxsae.activations import ReLU, TopK
from jaxsae.codes import SparseCode
from jaxsae.refit import Certificate, RefitInfo, Status, certify, check, refit
from jaxsae.sae import SAE, decode, encode, encode_dense, init, refine
from jaxsae.solvers import FISTA, ProjectedGradient

__all__ = [
    "FISTA",
    "SAE",
    "Certificate",
    "ProjectedGradient",
    "ReLU",
    "RefitInfo",
    "SparseCode",
    "Status",
    "TopK",
    "certify",
    "check",
    "codes",
    "decode",
    "encode",
    "encode_dense",
    "init",
    "refine",
    "refit",
    "sae",
]
