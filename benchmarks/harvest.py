"""Time a harvest beside the same forward pass, up to the same layer, that writes nothing."""

import itertools
import statistics
import tempfile
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks.clock import say, timings
from jaxsae import language_model
from jaxsae.language_model import harvest

STEPS = 12


def run(model: str, *, layer: int, context: int, batch: int) -> dict[str, Any]:
    """Tokens a second of both, on random tokens."""
    net = language_model.load(model)
    contexts = np.random.default_rng(0).integers(0, net.config.vocab, (STEPS * batch, context), np.int32)
    residual = jax.jit(language_model.residual, static_argnums=2)
    batches = [jnp.asarray(some) for some in np.split(contexts, STEPS)]

    with tempfile.TemporaryDirectory() as folder:
        places = (Path(folder, str(number)) for number in itertools.count())

        def forward():
            return [residual(net, ids, layer) for ids in batches]

        def harvested():
            harvest.run(next(places), net, contexts, points=[(layer, "resid_post")], source={}, batch=batch)
            return 0

        say(f"{model}, layer {layer}: {contexts.size:,} tokens a round")
        seconds = [statistics.median(times) for times in timings([forward, harvested])]
    names = ("forward", "harvest")
    return {
        **{"model": model, "layer": layer, "context": context, "batch": batch, "tokens": contexts.size},
        **{f"{name}_tokens_per_s": contexts.size / time for name, time in zip(names, seconds, strict=True)},
        "ratio": seconds[1] / seconds[0],
    }
