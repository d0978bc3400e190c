"""The outcome of a refit: a status per row, and an error for whoever wants one."""

import enum

import numpy as np
from jaxtyping import Array, Float, Int

from jaxsae._core import pytrees
from jaxsae.codes import SparseCode


class Status(enum.IntEnum):
    """The outcome of a row's refit.

    Example:
      >>> import jaxsae
      >>> jaxsae.Status(1).name
      'MAX_STEPS'
    """

    CONVERGED = 0
    MAX_STEPS = 1
    NONFINITE = 2
    INVALID = 3


@pytrees.dataclass
class RefitInfo:
    """The outcome of a refit, per row.

    Attributes:
      kkt: `[*b]` relative KKT residual of the values returned (see `certify`), as computed by the solver; NaN where
        the row is not finite.
      steps: `[*b]` int32, solver steps taken.
      status: `[*b]` int32, a `Status`: 0 converged, to the tolerance of the solver or of its last fallback; 1 stopped
        at `max_steps`; 2 not finite, or outside the dtype's normal range; 3 invalid: a ridge or penalty is negative or
        not finite, or `nnls` got a matrix that is no Gram matrix. Rows with status 2 or 3 are returned unchanged.

    Example:
      >>> import jax.numpy as jnp, jaxsae
      >>> info = jaxsae.RefitInfo(kkt=jnp.array([1e-6, 1e-2]), steps=jnp.array([4, 100]), status=jnp.array([0, 1]))
      >>> jaxsae.check(info)
      Traceback (most recent call last):
      RuntimeError: 1 of 2 rows stopped at max_steps (rows 1), the worst at KKT 1.0e-02; raise max_steps or tol.
    """

    kkt: Float[Array, "*b"]
    steps: Int[Array, "*b"]
    status: Int[Array, "*b"]


def check(info_or_code: RefitInfo | SparseCode) -> None:
    """Raise if any row of a refit failed, or if a code has dropped latents. Call it outside `jit`.

    Args:
      info_or_code: the info that `refit` or `refine` returned, or a code.

    Raises:
      RuntimeError: with the number of rows, the worst of them, and what to do.

    Example:
      >>> import jax.numpy as jnp, jaxsae
      >>> jaxsae.check(jaxsae.codes.from_dense(jnp.array([[0.0, 2.0, 1.0]]), capacity=1))
      Traceback (most recent call last):
      RuntimeError: 1 of 1 rows have more active latents than slots; row 0 lost 1. Pass a capacity of at least 2.
    """
    if isinstance(info_or_code, SparseCode):
        num_dropped = np.asarray(info_or_code.num_dropped).ravel()
        if num_dropped.any():
            worst = int(num_dropped.argmax())
            needed = info_or_code.indices.shape[-1] + num_dropped[worst]
            raise RuntimeError(
                f"{np.count_nonzero(num_dropped)} of {num_dropped.size} rows have more active latents than slots; "
                f"row {worst} lost {num_dropped[worst]}. Pass a capacity of at least {needed}."
            )
        return
    status, kkt = np.asarray(info_or_code.status).ravel(), np.asarray(info_or_code.kkt).ravel()
    failures = []
    for kind, what, do in (
        (Status.NONFINITE, "hold NaN or Inf", "fix them"),
        (
            Status.INVALID,
            "have a ridge or penalty that is negative or not finite, or a matrix that is no Gram matrix",
            "pass 0 or more, and a positive semi-definite matrix",
        ),
        (Status.MAX_STEPS, "stopped at max_steps", "raise max_steps or tol"),
    ):
        rows, worst = np.flatnonzero(status == kind), ""
        if kind == Status.MAX_STEPS and rows.size:
            rows = rows[np.argsort(-kkt[rows], kind="stable")]
            worst = f", the worst at KKT {kkt[rows[0]]:.1e}"
        shown = ", ".join(map(str, rows[:5])) + ", …" * (rows.size > 5)
        if rows.size:
            failures.append(f"{rows.size} of {status.size} rows {what} (rows {shown}){worst}; {do}.")
    if failures:
        raise RuntimeError(" ".join(failures))
