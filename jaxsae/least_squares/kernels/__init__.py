"""Gather, Gram matrix and solve in one pass over the atoms of each row: Pallas kernels beside an XLA reference.

    gather_gram    G = AAᵀ, c = Ay of each row, with A = D[indices]
    refit_fused    argmin ½‖y − Aᵀz‖² + ½ ridge ‖z‖² over z ≥ 0, by FISTA

`ops` has them, `choice` says which implementation answers, by what `tuning` measured. Kernels for `Aᵀz` and for the
gradient of the dictionary, `Σ z x̄ᵀ`, are there too: `codes.decode` and `codes.scatter_add` run them.
"""

from jaxsae.least_squares.kernels.ops import gather_gram, refit_fused

__all__ = ["gather_gram", "refit_fused"]
