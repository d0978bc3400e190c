"""Adam's moments in bfloat16 beside float32: the loss curves of trainings on the same batches of photographs."""

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from benchmarks.clock import say
from jaxsae import data as data_module, train
from jaxsae._core.linalg import widen
from jaxsae.app import runs, sources
from jaxsae.app.options import Options, resolved, schedule
from jaxsae.app.units import Units

_TRAIN, _HELDOUT, _POINTS = 100_000, 2048, 8
FAMILIES: dict[str, dict[str, Any]] = {"topk": {"k": 16}, "relu": {"l1": 0.02}}


def _nearest(tx: optax.GradientTransformation) -> optax.GradientTransformation:
    """Both moments in bfloat16, rounded to nearest."""

    def narrow(tree: Any) -> Any:
        floats = lambda x: jnp.issubdtype(x.dtype, jnp.floating)  # noqa: E731
        return jax.tree.map(lambda x: x.astype(jnp.bfloat16) if floats(x) else x, tree)

    def update(updates: Any, state: Any, params: Any = None):
        updates, state = tx.update(updates, widen(state), params)
        return updates, narrow(state)

    return optax.GradientTransformation(lambda params: narrow(tx.init(params)), update)


_ADAM: dict[str, Any] = {"b1": 0.9, "b2": 0.999, "eps": 6.25e-10}
_KINDS: dict[str, Callable[[Any], optax.GradientTransformation]] = {
    "float32": lambda rate: optax.adam(rate, **_ADAM),
    "the first in bfloat16": lambda rate: optax.adam(rate, mu_dtype=jnp.bfloat16, **_ADAM),
    "both in bfloat16, to nearest": lambda rate: _nearest(optax.adam(rate, **_ADAM)),
    "both in bfloat16, stochastically": lambda rate: train.bfloat16_adam(rate, **_ADAM),
}


def run(*, families: Sequence[str], latents: int, batch: int, steps: int, seeds: int) -> Iterator[dict[str, Any]]:
    """A row for each family, seed and kind of moments."""
    data = sources.photographs(_TRAIN, _HELDOUT, 0)
    for family in families:
        options = Options(family, latents, **FAMILIES[family], batch=batch, steps=steps)
        rate = schedule(resolved(options).learning_rate or 0.0, steps)
        for kind, make in _KINDS.items():
            tx = train.unit_norm_decoder(optax.chain(optax.clip_by_global_norm(1.0), make(rate)))
            for seed in range(seeds):
                say(f"{family}, moments {kind}, seed {seed}")
                row = {"family": family, "moments": kind, "seed": seed, "latents": latents}
                row |= {"batch": batch, "steps": steps}
                yield row | _train(options._replace(seed=seed), tx, data.train, data.heldout)


def _train(options: Options, tx, rows: np.ndarray, heldout: np.ndarray) -> dict[str, Any]:
    objective, _, init_fn = runs.recipe(options, Units(jnp.zeros(rows.shape[1])))
    step, state = train.make_step(objective, tx), train.init_state(init_fn().sae, tx)
    stream, curve, shown = iter(data_module.batches(rows, options.batch, seed=options.seed)), [], {}
    for _ in range(options.steps):
        state, shown = step(state, next(stream))
        curve.append(shown["nmse"])
    points = np.array_split(np.asarray(jnp.stack(curve)), _POINTS)
    measured = jax.jit(objective)(state.sae, jnp.asarray(heldout), state)[1].metrics
    return {
        "nmse_by_eighth": [float(np.mean(part)) for part in points],
        "heldout_nmse": float(measured["nmse"]),
        "l0": float(measured["l0"]),
        "dead": float(shown["dead"]),
        "state_bytes": sum(leaf.nbytes for leaf in jax.tree.leaves(state.opt_state)),
    }


def markdown(report: dict[str, Any], machine: str) -> list[str]:
    """The means over seeds."""
    first = report["rows"][0]
    seeds = len({row["seed"] for row in report["rows"]})
    lines = ["| | moments | NMSE in the 2nd eighth | 4th | last | held out | (seeds) | dead | state, MiB |"]
    lines.append("|---|---|--:|--:|--:|--:|--:|--:|--:|")
    for family, kind in dict.fromkeys((row["family"], row["moments"]) for row in report["rows"]):
        rows = [row for row in report["rows"] if (row["family"], row["moments"]) == (family, kind)]
        curve = np.mean([row["nmse_by_eighth"] for row in rows], axis=0)
        held = [row["heldout_nmse"] for row in rows]
        cells = [f"{curve[part]:.4f}" for part in (1, 3, -1)]
        cells += [f"{np.mean(held):.4f}", f"{min(held):.4f} to {max(held):.4f}"]
        cells += [f"{np.mean([row['dead'] for row in rows]):.1%}", f"{rows[0]['state_bytes'] / 2**20:.1f}"]
        lines.append(f"| {family} | {kind} | " + " | ".join(cells) + " |")
    about = f"{first['latents']:,} latents, {first['steps']:,} steps of {first['batch']} rows, {seeds} seeds"
    return [f"{machine}; {about}.", "\n".join(lines)]
