"""The lasso: codes selected by an L1 penalty, its path, and relaxations that undo its shrinkage.

    minimise ½‖y − Σᵢ zᵢ D[i]‖² + λ‖z‖₁   over z free, or z ≥ 0

`penalised` defines the functions; `homotopy` follows the path.
"""

from jaxsae.lasso.penalised import (
    CrossValidation as CrossValidation,
    LassoInfo as LassoInfo,
    blend as blend,
    cross_validate as cross_validate,
    lambda_max as lambda_max,
    lasso as lasso,
    path as path,
    relaxed as relaxed,
)
