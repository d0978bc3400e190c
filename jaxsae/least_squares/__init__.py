"""The values of the atoms that are active in each row: masked least squares, its solvers and its certificate.

    minimise ½‖y − Aᵀz‖² + ½ ridge ‖z‖²   over z ≥ 0 (or z free),   A = dictionary[indices]

`problems` makes each row's problem free of units, `solvers` step on it, `refit` drives them and hands on the rows that
they leave, `certificate` judges the result by independent arithmetic, `implicit` differentiates it, and `kernels` does
it all in one fused kernel where that was measured to be faster.
"""

from jaxsae.least_squares import kernels, solvers
from jaxsae.least_squares.certificate import Certificate, certify
from jaxsae.least_squares.problems import Dictionary
from jaxsae.least_squares.refit import RefitInfo, Status, check, refit
from jaxsae.least_squares.solvers import FISTA, BlockPivoting, ConjugateGradient, ProjectedGradient

__all__ = [
    "FISTA",
    "BlockPivoting",
    "Certificate",
    "ConjugateGradient",
    "Dictionary",
    "ProjectedGradient",
    "RefitInfo",
    "Status",
    "certify",
    "check",
    "kernels",
    "refit",
    "solvers",
]
