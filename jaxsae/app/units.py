"""The units of a training, in which rows have unit mean square about their centre, whatever those of the data."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxsae import train
from jaxsae._core.files import InputError
from jaxsae.autoencoder.sae import SAE
from jaxsae.autoencoder.surgery import rescale
from jaxsae.data import cleaning


class Units(NamedTuple):
    """How the rows of a training relate to those of the data.

    Attributes:
      centre: of what is reconstructed, `[d_out]`, in the units of the data.
      scale: factor from the units of the data to those of the training.
      target_scale: likewise of a transcoder's targets; None for an autoencoder.
      inputs: width of a transcoder's inputs, the first columns of its rows; None for an autoencoder.

    Example:
      >>> Units(jnp.zeros(2), 0.5, target_scale=2.0, inputs=1).scaled(np.ones((1, 3), np.float32)).tolist()
      [[0.5, 2.0, 2.0]]
    """

    centre: jax.Array
    scale: float = 1.0
    target_scale: float | None = None
    inputs: int | None = None

    @property
    def width(self) -> int:
        """Width of the encoder's inputs."""
        return len(self.centre) if self.inputs is None else self.inputs

    @property
    def scales(self) -> dict[str, Any]:
        """The factors, as JSON."""
        return {"scale": self.scale} | ({} if self.target_scale is None else {"target_scale": self.target_scale})

    def scaled(self, rows: Any) -> Any:
        """Rows of the data, `[n d]` or `[n d + d_out]`, in the units of the training."""
        return self._factors() * rows

    def unscaled(self, rows: Any) -> Any:
        """Rows in the units of the data."""
        return rows / self._factors()

    def _factors(self) -> Any:
        if self.inputs is None:
            return np.float32(self.scale)
        return np.repeat(np.array([self.scale, self.target_scale], np.float32), [self.inputs, len(self.centre)])

    def for_data(self, sae: SAE) -> SAE:
        """An autoencoder of the training, for rows in the units of the data."""
        return rescale(sae, self.scale, self.target_scale)

    def for_training(self, sae: SAE) -> SAE:
        """An autoencoder of the data, for rows in the units of the training."""
        return rescale(sae, 1 / self.scale, None if self.target_scale is None else 1 / self.target_scale)


def measured(
    sample: np.ndarray, name: str, inputs: int | None = None, warn: Callable[[str], None] = lambda text: None
) -> Units:
    """The units that give a sample unit mean square about its geometric median, both without its outliers.

    Warns if these are more than one in a thousand.

    Args:
      sample: rows `[n d]`, or of a transcoder `[n d + d_out]`.
      name: of the rows.
      inputs: width of a transcoder's inputs.
      warn: called with a warning.

    Raises:
      InputError: if all rows are equal, or none is finite.

    Example:
      >>> rows = np.random.default_rng(0).normal(size=(100, 3)).astype(np.float32)
      >>> round(measured(2 * rows, "x.npy").scale / measured(rows, "x.npy").scale, 5)
      0.5
    """
    if inputs is None:
        return Units(*_centre_and_scale(sample, name, warn))
    _, scale = _centre_and_scale(sample[:, :inputs], f"{name}, inputs", warn)
    centre, target_scale = _centre_and_scale(sample[:, inputs:], f"{name}, targets", warn)
    return Units(centre, scale, target_scale, inputs)


def _centre_and_scale(sample: np.ndarray, name: str, warn: Callable[[str], None]) -> tuple[jax.Array, float]:
    sample = sample[np.isfinite(sample).all(1)]
    if len(sample) == 0 or (sample == sample[0]).all():
        raise InputError(f"{name}: all rows are equal, or none is finite; pass activations of varied inputs.")
    norms = cleaning.norms(sample)
    if (far := cleaning.outliers(norms)).any():
        if far.mean() > 1e-3:
            share = np.sum(np.float64(norms[far]) ** 2) / np.sum(np.float64(norms) ** 2)
            what = f"{far.mean():.1%} of the rows are more than {cleaning.OUTLIER:g} times the median norm, and have"
            warn(f"{what} {share:.0%} of the mean square: the training is theirs. --max-norm 10 leaves them out.")
        rest = sample[~far]
        sample = sample if (rest == rest[0]).all() else rest
    unit = float(np.abs(sample).max())  # so that nothing overflows
    centre = train.geometric_median(jnp.asarray(sample / unit))
    variance = np.mean(np.sum((np.float64(sample) / unit - np.asarray(centre, np.float64)) ** 2, axis=1))
    return unit * centre, float(1 / (unit * np.sqrt(variance)))
