"""Options of a training run, their validation, and the families of autoencoders."""

import functools
from collections.abc import Callable
from typing import Annotated, Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from jaxsae import train
from jaxsae._core import arguments
from jaxsae._core.files import InputError
from jaxsae.autoencoder.activations import (
    AbsTopK,
    Activation,
    BatchTopK,
    Gated,
    GroupMax,
    JumpReLU,
    MatchingPursuit,
    ReLU,
    TopK,
)
from jaxsae.train.objectives import L0, L1, Gate, Matryoshka

_MANY_PASSES = 10  # over the data, beyond which a run overfits


class Options(NamedTuple):
    """Options of a run; weights are for rows scaled to unit mean square.

    Attributes:
      activation: a name from `FAMILIES`.
      latents: `m`.
      k: active latents per row, for activations that are sparse by it.
      l1: weight of the penalty, for activations that are sparse by it.
      auxk: whether idle latents learn, by `objectives.AuxK`.
      multi_topk: whether `objectives.MultiTopK` is added; for topk.
      batch: rows.
      accumulate: in how many parts a batch is computed, whose gradients are added up; they divide it.
      moments: dtype of the optimiser's moments.
      steps: of training.
      learning_rate: if None, `train.learning_rate(latents, steps)` times the family's factor in `FAMILIES`.
      idle_after: rows without firing after which a latent is idle, for `auxk`; a fiftieth of the rows seen if None.
      heldout: how many rows to measure on, the last ones.
      seed: of initialisation and shuffles.
      skip: whether a transcoder has a skip connection.

    Example:
      >>> Options("topk", latents=4096, k=32).batch
      1024
    """

    activation: Annotated[str, arguments.ACTIVATION]
    latents: arguments.Count
    k: arguments.Count | None = None
    l1: arguments.Weight | None = None
    auxk: bool = True
    multi_topk: bool = False
    batch: arguments.Count = 1024
    accumulate: arguments.Count = 1
    moments: Annotated[str, arguments.MOMENTS] = "float32"
    steps: arguments.Count = 2000
    learning_rate: arguments.Positive | None = None
    idle_after: arguments.Count | None = None
    heldout: arguments.Count = 2048
    seed: arguments.Seed = 0
    skip: bool = False


def resolved(options: Options) -> Options:
    """Options with each None replaced by the default that follows from the length of the run.

    A latent is idle after a fiftieth of the run: that does not raise the error and leaves hardly any latent dead,
    whereas a tenth is too late to have much effect.

    Args:
      options: of a run.

    Example:
      >>> resolved(Options("topk", latents=4096, k=32)).idle_after
      40960
    """
    o = options
    rate = o.learning_rate
    if rate is None:
        rate = FAMILIES[o.activation].rate * train.learning_rate(o.latents, o.steps)
    fiftieth = min(max(o.batch, o.steps * o.batch // 50), 2**31 - 1)  # rows are counted in int32
    idle_after = fiftieth if o.idle_after is None else o.idle_after
    return o._replace(learning_rate=rate, idle_after=idle_after)


def passes(options: Options, rows: int, warn: Callable[[str], None] = lambda text: None) -> float:
    """The number of passes of a run over its rows.

    Args:
      options: of the run.
      rows: how many it is trained on.
      warn: called if that is often enough to overfit.

    Example:
      >>> passes(Options("topk", latents=16, k=2, batch=512, steps=600), 12_288, print)
      600 steps of 512 rows are 25 passes over 12,288 rows, which overfits; pass more rows.
      25.0
    """
    found = options.steps * options.batch / rows
    if found > _MANY_PASSES:
        what = f"{options.steps} steps of {options.batch} rows are {found:.0f} passes over {rows:,} rows"
        warn(f"{what}, which overfits; pass more rows.")
    return found


class _Family(NamedTuple):
    """An activation, and the terms that it is trained with."""

    needs: str  # the option that sets its sparsity
    activation: Callable[[Options], Activation]
    terms: Callable[[Options, optax.Schedule], tuple[Any, ...]] = lambda o, warm: ()
    rate: float = 1.0  # of learning, relative to `train.learning_rate`: by `python -m benchmarks rates`
    transform: Callable[[optax.GradientTransformation], optax.GradientTransformation] = lambda tx: tx
    transcodes: bool = True  # False where the encoder is of the decoder's space


# Bandwidth and threshold of JumpReLU are for rows of unit mean square, whose pre-activations are of order 0.1.
FAMILIES = {
    "relu": _Family("l1", lambda o: ReLU(), lambda o, warm: (L1(o.l1, warm),), rate=2.5),  # pyright: ignore[reportArgumentType]
    "topk": _Family("k", lambda o: TopK(o.k)),  # pyright: ignore[reportArgumentType]
    "abstopk": _Family("k", lambda o: AbsTopK(o.k)),  # pyright: ignore[reportArgumentType]
    "groupmax": _Family("k", lambda o: GroupMax(o.k)),  # pyright: ignore[reportArgumentType]
    "batchtopk": _Family("k", lambda o: BatchTopK(o.k), rate=0.75),  # pyright: ignore[reportArgumentType]
    "jumprelu": _Family(
        "k",
        lambda o: JumpReLU(jnp.full(o.latents, 0.03), bandwidth=0.03),
        lambda o, warm: (L0(1.0, float(o.k), warm),),  # pyright: ignore[reportArgumentType]
        rate=0.5,
    ),
    "gated": _Family(
        "l1",
        lambda o: Gated(*jnp.zeros((3, o.latents))),
        lambda o, warm: (Gate(o.l1, warm),),  # pyright: ignore[reportArgumentType]
        rate=0.75,
    ),
    "matryoshka": _Family(
        "k",
        lambda o: BatchTopK(o.k),  # pyright: ignore[reportArgumentType]
        lambda o, warm: (Matryoshka(tuple(o.latents >> n for n in (4, 3, 2, 1) if o.latents >> n)),),
        rate=0.75,
    ),
    "matchingpursuit": _Family(
        "k",
        lambda o: MatchingPursuit(0.0, max_steps=o.k, stop_on_duplicate=False),
        transcodes=False,
    ),
}


FAMILIES["alignedrelu"] = FAMILIES["relu"]._replace(transform=train.aligned_encoder, transcodes=False)


def validate(options: Options, *, transcoder: bool = False) -> _Family:
    """Raise if an option is invalid, or incompatible with the others.

    Args:
      options: of a run.
      transcoder: whether its target differs from its input.

    Returns:
      The activation's family.

    Raises:
      InputError: with the value, and what to pass.

    Example:
      >>> validate(Options("topk", latents=32, k=33))
      Traceback (most recent call last):
      jaxsae.InputError: got k 33 for 32 latents; pass k from 1 to 32.
    """
    o = options
    arguments.check(Options, o._asdict())
    family = FAMILIES[o.activation]
    other = "l1" if family.needs == "k" else "k"
    if getattr(o, family.needs) is None or getattr(o, other) is not None:
        raise InputError(f"{o.activation} is made sparse by {family.needs}; pass {family.needs}, and no {other}.")
    if o.k is not None and o.k > o.latents:
        raise InputError(f"got k {o.k} for {o.latents} latents; pass k from 1 to {o.latents}.")
    if o.activation == "groupmax" and o.k is not None and o.latents % o.k:
        raise InputError(f"got k {o.k} for {o.latents} latents; groupmax needs a k that divides them.")
    if o.multi_topk and o.activation != "topk":
        raise InputError(f"got multi-topk for {o.activation}; it is for topk.")
    if transcoder and not family.transcodes:
        what = f"got {o.activation} for a transcoder, whose encoder and decoder are of different spaces"
        raise InputError(f"{what}; pass another activation.")
    if o.skip and not transcoder:
        raise InputError("got skip without a target; an autoencoder could copy its input through it.")
    _require_parts(o, 1)
    return family


def _require_parts(options: Options, ways: int) -> None:
    """Raise unless each part of a batch can be split over the devices that rows are split over."""
    accumulate = options.accumulate
    if accumulate > 1 and options.batch % (accumulate * ways):
        mesh = f" on a mesh that splits rows {ways} ways" if ways > 1 else ""
        what = f"got accumulate {accumulate} for a batch of {options.batch}{mesh}"
        raise InputError(f"{what}; pass a batch that is a multiple of {accumulate * ways}.")


@functools.cache
def _warmup(steps: int) -> optax.Schedule:
    """Warm-up of the penalties' weights over the first fifth of the steps."""
    return optax.linear_schedule(0.0, 1.0, max(1, steps // 5))


def schedule(rate: float | jax.Array, steps: int) -> optax.Schedule:
    """A learning rate that warms up over the first twentieth of the steps and decays to 0 over the last fifth.

    Args:
      rate: the largest.
      steps: of the training.

    Example:
      >>> [round(float(schedule(1.0, 100)(step)), 2) for step in (0, 5, 79, 90, 100)]
      [0.2, 1.0, 1.0, 0.5, 0.0]
    """
    warmup, decay = max(1, steps // 20), max(1, steps // 5)
    factor = optax.join_schedules(
        (optax.linear_schedule(1 / warmup, 1.0, warmup), optax.linear_schedule(1.0, 0.0, decay)), [steps - decay]
    )
    return lambda step: rate * factor(step)


def lengthened(options: Options, step: int, before: int, steps: int) -> str:
    """One sentence on what changes in a run that is lengthened.

    Args:
      options: of the run.
      step: at which it is.
      before: the number of steps that it had.
      steps: the number that it has.

    Example:
      >>> lengthened(Options("topk", 16, k=2, learning_rate=1e-3), 90, 100, 200)[:61]
      'the run is lengthened from 100 to 200 steps: from step 90 on,'
    """
    rates = (resolved(options._replace(steps=count)).learning_rate for count in (before, steps))
    schedules = (schedule(rate or 0.0, count) for rate, count in zip(rates, (before, steps), strict=True))
    old, new = (np.asarray(schedule(step)).item() for schedule in schedules)
    return (
        f"the run is lengthened from {before} to {steps} steps: from step {step} on, all that depends on their number "
        f"is that of {steps}, such as the learning rate ({new:.3g}, it was {old:.3g})."
    )
