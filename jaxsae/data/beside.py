"""Rows side by side: the inputs and the targets of a transcoder."""

import functools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxsae._core.files import InputError
from jaxsae.data.lazy import LazyRows, Windows
from jaxsae.data.rows import Rows


class _Beside(LazyRows):
    """Rows that concatenate those of others."""

    def __init__(self, parts: Sequence[Rows]):
        lazy = [part for part in parts if isinstance(part, LazyRows)]
        known = [part.checksum for part in lazy if part.checksum is not None]
        windows = [part.shuffled for part in lazy if part.shuffled is not None]
        n = len(parts[0])
        with jax.numpy_dtype_promotion("standard"):
            dtype = functools.reduce(jnp.promote_types, (part.dtype for part in parts))
        super().__init__(
            load=parts[0].__getitem__,  # never called: `_take` reads all parts
            edges=np.array([0, n]),
            window=range(n),
            width=sum(part.shape[1] for part in parts),
            dtype=dtype,
            checksum=" ".join(known) if len(known) == len(parts) else None,
            shuffled=Windows(*map(min, zip(*windows, strict=True))) if windows else None,
            together=any(part.together for part in lazy),
        )
        self._parts = parts

    def load(self, numbers: np.ndarray) -> None:
        for part in self._parts:
            if isinstance(part, LazyRows):
                part.load(self._window.start + numbers)

    def _take(self, numbers: Any, dtype: Any) -> np.ndarray:
        numbers = np.asarray(numbers, np.intp)
        return np.concatenate([np.asarray(part[numbers], dtype) for part in self._parts], axis=-1)


def beside(parts: Sequence[Rows], names: Sequence[str]) -> Rows:
    """Rows side by side, `[n Σd]`, read on access.

    Args:
      parts: rows `[n d]` each, the same number of them.
      names: of the parts, in errors.

    Raises:
      InputError: if they are not as many.

    Example:
      >>> beside([np.zeros((5, 2)), np.ones((5, 3))], ["x.npy", "y.npy"])[1].tolist()
      [0.0, 0.0, 1.0, 1.0, 1.0]
    """
    for part, name in zip(parts, names, strict=True):
        if len(part) != len(parts[0]):
            what = f"has {len(part):,} rows, and {names[0]} {len(parts[0]):,}"
            raise InputError(f"{name}: {what}; pass rows of the same tokens, from one harvest.")
    return _Beside(parts)
