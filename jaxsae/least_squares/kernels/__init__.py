"""Gather, Gram matrix and solve in one pass over the atoms of each row: Pallas kernels beside an XLA reference.

    gather_gram    G = AAᵀ, c = Ay of each row, with A = D[indices]
    gather_decode  Aᵀz of each row
    scatter_rows   the gradient of D: the sum of left · right in the row of each latent
    refit_fused    argmin ½‖y − Aᵀz‖² + ½ ridge ‖z‖² over z ≥ 0, by FISTA

`ops` defines them, and `choice` selects the implementation from the measurements in `tuning`. `codes.decode` and
`codes.scatter_add`, and so encoders and training, run the same kernels as `gather_decode` and `scatter_rows`.
"""

from jaxsae.least_squares.kernels.ops import (
    gather_decode as gather_decode,
    gather_gram as gather_gram,
    refit_fused as refit_fused,
    scatter_rows as scatter_rows,
)
