"""Training: an objective, an optax transformation and a stream of batches make an SAE.

    tx = train.default_optimizer(train.learning_rate(sae.m, steps))
    state = train.init_state(sae, tx)
    step = train.make_step(objective, tx)
    for x in batches:
        state, metrics = step(state, x)

`losses` and `objectives` define what is minimised, `optim` the optimiser, `steps` the training step and loop, and
`startup` the heuristics for biases and dead latents. `checkpoint` and `job`, for interruptible runs, are imported on
first access.
"""

from jaxsae._core import lazy
from jaxsae.train import losses, objectives
from jaxsae.train.optim import default_optimizer, ema, ema_params, learning_rate, unit_norm_decoder
from jaxsae.train.startup import geometric_median, resample
from jaxsae.train.steps import Diverged, TrainState, fit, init_state, make_step, member, stack, sweep

__all__ = ["Diverged", "TrainState", "fit", "init_state", "make_step", "member", "stack", "sweep"]
__all__ += ["default_optimizer", "ema", "ema_params", "learning_rate", "unit_norm_decoder"]
__all__ += ["checkpoint", "geometric_median", "job", "losses", "objectives", "resample"]


__getattr__ = lazy.submodules(__name__, "checkpoint", "job")
