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

from typing import TYPE_CHECKING

from jaxsae._core import lazy

if TYPE_CHECKING:
    from jaxsae.train import checkpoint as checkpoint, job as job, losses as losses, objectives as objectives
    from jaxsae.train.optim import (
        aligned_encoder as aligned_encoder,
        bfloat16_adam as bfloat16_adam,
        default_optimizer as default_optimizer,
        ema as ema,
        ema_params as ema_params,
        learning_rate as learning_rate,
        unit_norm_decoder as unit_norm_decoder,
    )
    from jaxsae.train.startup import geometric_median as geometric_median, resample as resample
    from jaxsae.train.steps import (
        Diverged as Diverged,
        TrainState as TrainState,
        fit as fit,
        init_state as init_state,
        make_step as make_step,
        member as member,
        stack as stack,
        sweep as sweep,
    )

__getattr__, __dir__ = lazy.attach(__name__, __file__)
