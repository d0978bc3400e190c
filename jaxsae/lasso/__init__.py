"""The lasso: a code chosen by an L1 penalty, its path, and what takes its shrinkage out again.

    minimise ½‖y − Σᵢ zᵢ D[i]‖² + λ‖z‖₁   over z free, or z ≥ 0

`penalised` has the functions, `homotopy` follows the path.
"""

from jaxsae.lasso.penalised import (
    CrossValidation,
    LassoInfo,
    blend,
    cross_validate,
    lambda_max,
    lasso,
    path,
    relaxed,
)

__all__ = ["CrossValidation", "LassoInfo", "blend", "cross_validate", "lambda_max", "lasso", "path", "relaxed"]
