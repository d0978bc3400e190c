"""Masked least squares: the values of each row's active atoms, solvers, and certificates.

    minimise ½‖y − Aᵀz‖² + ½ ridge ‖z‖²   over z ≥ 0 (or z free),   A = dictionary[indices]

`problems` makes each row's problem unit-free, `solvers` defines the steps, `refit` runs them and passes unsolved rows
to the fallback, `certificate` checks the result by independent arithmetic, `implicit` differentiates it, and `kernels`
fuses the computation into one kernel where that was measured to be faster.
"""

from jaxsae.least_squares import kernels as kernels, solvers as solvers
from jaxsae.least_squares.certificate import (
    Certificate as Certificate,
    certify as certify,
    certify_gram as certify_gram,
)
from jaxsae.least_squares.nnls import nnls as nnls, nnls_dense as nnls_dense
from jaxsae.least_squares.outcome import RefitInfo as RefitInfo, Status as Status, check as check
from jaxsae.least_squares.problems import Dictionary as Dictionary
from jaxsae.least_squares.refit import refit as refit
from jaxsae.least_squares.solvers import (
    FISTA as FISTA,
    BlockPivoting as BlockPivoting,
    ConjugateGradient as ConjugateGradient,
    InteriorPoint as InteriorPoint,
    ProjectedGradient as ProjectedGradient,
)
