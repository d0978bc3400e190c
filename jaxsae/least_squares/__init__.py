"""The values of the atoms that are active in each row: masked least squares, its solvers and its certificate.

    minimise ½‖y − Aᵀz‖² + ½ ridge ‖z‖²   over z ≥ 0 (or z free),   A = dictionary[indices]

`problems` makes each row's problem free of units, `solvers` step on it, `refit` drives them and hands on the rows that
they leave, `certificate` judges the result by independent arithmetic, `implicit` differentiates it, and `kernels` does
it all in one fused kernel where that was measured to be faster.
"""

from jaxsae.least_squares import kernels as kernels, solvers as solvers
from jaxsae.least_squares.certificate import Certificate as Certificate, certify as certify
from jaxsae.least_squares.problems import Dictionary as Dictionary
from jaxsae.least_squares.refit import RefitInfo as RefitInfo, Status as Status, check as check, refit as refit
from jaxsae.least_squares.solvers import (
    FISTA as FISTA,
    BlockPivoting as BlockPivoting,
    ConjugateGradient as ConjugateGradient,
    ProjectedGradient as ProjectedGradient,
)
