"""Train an autoencoder of any family to a given L0, so that families can be compared."""

import dataclasses
import itertools
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np

from jaxsae import train
from jaxsae._core.files import json_number
from jaxsae.app import runs
from jaxsae.app.options import FAMILIES, Options
from jaxsae.app.units import Units
from jaxsae.autoencoder import calibration
from jaxsae.autoencoder.sae import SAE, split_rows
from jaxsae.train.objectives import Objective

EVERY = 10  # steps between changes of a penalty's weight
_POINTS = 40  # of a curve, about
_LIMITS = (1e-6, 1e2)  # of weights
_GAIN = 0.15
_SAMPLE = 1024

Progress = Callable[[str, int], None]


@dataclasses.dataclass
class Multiplier:
    """The weight of a penalty as the multiplier of a constraint on the L0: λ ← λ (L0/l0)^0.15, every 10 steps.

    In the last fifth of a training the exponent is 0.3, since the L0 moves while the learning rate falls.

    Attributes:
      l0: the target.
      steps: of the training.
      weight: λ; at first for rows of unit mean square.

    Example:
      >>> multiplier = Multiplier(l0=32, steps=100)
      >>> multiplier.move(10, 32.0), multiplier.move(20, 64.0) > 0.05
      (0.05, True)
    """

    l0: int
    steps: int
    weight: float = 0.05

    def rows(self, step: int, watched: Any) -> Any:
        """The rows to measure the L0 on after a step: all watched ones in the last fifth, else the first 1,024."""
        return watched if self._ending(step) else watched[:_SAMPLE]

    def move(self, step: int, found: float) -> float:
        """The weight after a step, where the L0 was found to be `found`."""
        gain = 2 * _GAIN if self._ending(step) else _GAIN
        self.weight = float(np.clip(self.weight * (max(found, 1e-3) / self.l0) ** gain, *_LIMITS))
        return self.weight

    def _ending(self, step: int) -> bool:
        return step > self.steps - self.steps // 5


class Trained(NamedTuple):
    """What a training gave.

    Attributes:
      sae: for the scaled rows.
      sparsity: `k`, or the final weight of the penalty.
      curve: `step`, and the `nmse` and `l0` of its batch.
    """

    sae: SAE
    sparsity: float
    curve: dict[str, list]


def train_to(
    rows: np.ndarray, watched: np.ndarray, options: Options, l0: int, progress: Progress, inputs: int | None = None
) -> Trained:
    """Train to a mean L0 on `watched` rows, as `jaxsae train` does but for the weight of a penalty.

    Families that count their active latents are trained with `k = l0`; thresholds are then calibrated. Where a penalty
    makes sparse, its weight is a `Multiplier`.

    Args:
      rows: `[n d]`, of unit mean square about their mean.
      watched: `[h d]`, in the same units, on which the L0 is to be reached.
      options: of the training, but for its sparsity.
      l0: mean number of active latents per row.
      progress: called with a description and the number of steps just taken.
      inputs: width of a transcoder's inputs, the first columns of the rows.

    Example:
      >>> rows = np.random.default_rng(0).normal(size=(512, 8)).astype(np.float32) / 8**0.5
      >>> options = Options("topk", latents=16, batch=64, steps=30, heldout=64)
      >>> trained = train_to(rows, rows[:64], options, 2, lambda text, steps: None)
      >>> trained.sparsity, trained.curve["step"]
      (2, [10, 20, 30])
    """
    penalised = FAMILIES[options.activation].needs == "l1"
    multiplier = Multiplier(l0, options.steps)
    sparsity: float = multiplier.weight if penalised else l0
    options = options._replace(**{"l1" if penalised else "k": sparsity})
    units = Units(jnp.asarray(rows[:10_000, inputs or 0 :].mean(axis=0)), 1.0, inputs and 1.0, inputs)
    objective, tx, init_fn = runs.recipe(options, units)
    batches, state = shuffled(rows, options.batch, options.seed), init_fn()
    seen, _ = split_rows(state.sae, jnp.asarray(watched))
    curve: dict[str, list] = {"step": [], "nmse": [], "l0": []}
    last: dict[str, Any] = {}
    every = max(EVERY, options.steps // _POINTS // EVERY * EVERY)
    for start in range(0, options.steps, EVERY):
        steps = min(EVERY, options.steps - start)
        done = start + steps
        state = train.fit(
            state, batches, loss=objective, tx=tx, steps=steps, callback=lambda _, measured: last.update(measured)
        )
        if done % every == 0 or done == options.steps:
            numbers = {"step": done, "nmse": json_number(last["nmse"]), "l0": json_number(last["l0"])}
            for name, value in numbers.items():
                curve[name].append(value)
            progress(f"NMSE {float(last['nmse']):.3f}  L0 {float(last['l0']):.0f}", (done - 1) % every + 1)
        if penalised and done < options.steps:
            found = float(calibration.activity(state.sae, [multiplier.rows(done, seen)]).l0)
            sparsity = multiplier.move(done, found)
            objective = _reweighted(objective, sparsity)
    sae = state.sae
    if not penalised and sae.activation.slots is None:
        sae = calibration.calibrate(sae, [seen], float(l0))
    return Trained(sae, sparsity, curve)


def _reweighted(objective: Objective, weight: float) -> Objective:
    """The objective with another weight of its first term, the penalty."""
    penalty: Any = objective.terms[0]
    return dataclasses.replace(objective, terms=(dataclasses.replace(penalty, weight=weight), *objective.terms[1:]))


def shuffled(rows: np.ndarray, size: int, seed: int) -> Iterator[np.ndarray]:
    """Batches of rows in memory, each epoch in another order; `data.batches`, for files, takes as long as a step.

    Args:
      rows: `[n d]`.
      size: rows of a batch.
      seed: of the orders.

    Example:
      >>> next(shuffled(np.zeros((5, 3)), 2, 0)).shape
      (2, 3)
    """
    generator = np.random.default_rng(seed)
    for _ in itertools.count():
        order = generator.permutation(len(rows))
        for start in range(0, len(rows) - size + 1, size):
            yield rows[order[start : start + size]]
