"""A training run: from a file of activations to a saved autoencoder, its measurements, and a log of the way there.

A run is a directory: `sae/`, the autoencoder in the units of the data; `report.json`, options and measurements;
TensorBoard event files, and if asked for those of Weights & Biases.
"""

import contextlib
import functools
import json
import operator
import os
import platform
from collections.abc import Callable, Iterator
from importlib.metadata import version
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from jaxsae import data as data_module
from jaxsae import metrics, pretrained, stream, train
from jaxsae.activations import AbsTopK, Activation, BatchTopK, Gated, GroupMax, JumpReLU, ReLU, TopK
from jaxsae.files import InputError, atomic_file
from jaxsae.objectives import L0, L1, AuxK, Gate, MultiTopK, Objective
from jaxsae.sae import SAE, encode, init, reconstruct, rescale

_SAMPLE = 10_000  # rows from which centre and scale are estimated
_REPORT_EVERY = 10  # steps
Progress = Callable[[str, int], None]
Log = Callable[[int, dict[str, float]], None]


class Options(NamedTuple):
    """What a run may be told; weights are for rows scaled to unit mean square."""

    activation: str
    latents: int
    k: int | None = None
    l1: float | None = None
    auxk: bool = True
    multi_topk: bool = False
    batch: int = 1024
    steps: int = 2000
    learning_rate: float | None = None
    dead_after: int = 10_000_000
    heldout: int = 2048
    seed: int = 0


class _Family(NamedTuple):
    """An activation, and the terms that it is trained with."""

    needs: str  # the option that sets its sparsity
    activation: Callable[[Options], Activation]
    terms: Callable[[Options, optax.Schedule], tuple[Any, ...]]


def _none(options: Options, warm: optax.Schedule) -> tuple[Any, ...]:
    return ()


def _zeros(options: Options):
    return jnp.zeros(options.latents)


# Bandwidth and threshold of JumpReLU are for rows of unit mean square, whose pre-activations are some tenths.
FAMILIES = {
    "relu": _Family("l1", lambda o: ReLU(), lambda o, warm: (L1(o.l1, warm),)),  # pyright: ignore[reportArgumentType]
    "topk": _Family("k", lambda o: TopK(o.k), _none),  # pyright: ignore[reportArgumentType]
    "abstopk": _Family("k", lambda o: AbsTopK(o.k), _none),  # pyright: ignore[reportArgumentType]
    "groupmax": _Family("k", lambda o: GroupMax(o.k), _none),  # pyright: ignore[reportArgumentType]
    "batchtopk": _Family("k", lambda o: BatchTopK(o.k), _none),  # pyright: ignore[reportArgumentType]
    "jumprelu": _Family(
        "k",
        lambda o: JumpReLU(jnp.full(o.latents, 0.03), bandwidth=0.03),
        lambda o, warm: (L0(1.0, float(o.k), warm),),  # pyright: ignore[reportArgumentType]
    ),
    "gated": _Family(
        "l1",
        lambda o: Gated(_zeros(o), _zeros(o), _zeros(o)),
        lambda o, warm: (Gate(o.l1, warm),),  # pyright: ignore[reportArgumentType]
    ),
}


def run(
    out: str | os.PathLike,
    *,
    data: str | os.PathLike,
    options: Options,
    progress: Progress = lambda text, steps: None,
    log: contextlib.AbstractContextManager[Log] | None = None,
) -> dict[str, Any]:
    """Train on a file of activations, but its last rows; measure on those; save.

    Args:
      out: directory, made if missing.
      data: file of activations.
      options: what to train, and how.
      progress: called with what is going on and how many steps that took; `options.steps` in all.
      log: opened when all is well, for example `logs(out, options)`; then called with the step and its numbers.

    Returns:
      The report.

    Raises:
      InputError: if an option or the data cannot be used, or if training diverged; the last good autoencoder is saved.
    """
    family = _validate(options)
    rows, heldout = _load(data, options)
    centre, scale = _centre_and_scale(rows, str(data))
    d, o = rows.shape[1], options
    activation = family.activation(o)
    sae = init(jax.random.key(o.seed), d=d, m=o.latents, activation=activation, b_dec=scale * centre)
    warm = optax.linear_schedule(0.0, 1.0, max(1, o.steps // 5))
    terms = family.terms(o, warm)
    terms += (MultiTopK(),) if o.multi_topk else ()
    terms += (AuxK(_auxk_latents(d, o.latents)),) if o.auxk else ()
    told = {}

    def tell(step, shown):
        if step % _REPORT_EVERY == 0 or step == o.steps:
            numbers = {name: float(value) for name, value in shown.items()}
            write(step, numbers)
            told.update(numbers)
            text = f"NMSE {numbers['nmse']:.3f}  L0 {numbers['l0']:.0f}  dead {numbers['dead']:.1%}"
            progress(text, (step - 1) % _REPORT_EVERY + 1)

    batches = (scale * x for x in data_module.batches(rows, o.batch, seed=o.seed))
    objective = Objective(terms, dead_after=o.dead_after)
    tx = train.recipe(_schedule(o), clip=1.0)
    diverged = None
    with log or contextlib.nullcontext(lambda step, numbers: None) as write:
        try:
            state = train.fit(sae, batches, loss=objective, tx=tx, steps=o.steps, callback=tell)
        except train.Diverged as error:
            state, diverged = error.state, error
    sae = rescale(state.sae, scale)
    out = Path(out)
    pretrained.save(sae, out / "sae")
    report = {
        "options": options._asdict(),
        "data": {"path": str(data), "rows": len(rows), "heldout": len(heldout), "width": d},
        "steps": int(state.step),
        "skipped": int(state.skipped),
        "dead_in_training": told.get("dead"),
        "heldout": evaluate(sae, heldout),
        "versions": {name: version(name) for name in ("jaxsae", "jax", "flax", "optax", "numpy")}
        | {"python": platform.python_version(), "backend": jax.default_backend()},
    }
    with atomic_file(out / "report.json") as temporary:
        temporary.write_text(json.dumps(report, indent=1, allow_nan=False) + "\n")
    if diverged is not None:
        raise InputError(f"{data}: {diverged} The last good autoencoder is in {out / 'sae'}.") from diverged
    return report


def _validate(options: Options) -> _Family:
    o = options
    if o.activation not in FAMILIES:
        raise InputError(f"got activation {o.activation!r}, expected one of: {', '.join(FAMILIES)}.")
    family = FAMILIES[o.activation]
    other = "l1" if family.needs == "k" else "k"
    if getattr(o, family.needs) is None or getattr(o, other) is not None:
        raise InputError(f"{o.activation} is made sparse by {family.needs}; pass {family.needs}, and no {other}.")
    for name in ("latents", "batch", "steps", "heldout", "dead_after"):
        if getattr(o, name) < 1:
            raise InputError(f"got {name} {getattr(o, name)}; pass at least 1.")
    if o.k is not None and not 1 <= o.k <= o.latents:
        raise InputError(f"got k {o.k} for {o.latents} latents; pass k from 1 to {o.latents}.")
    if o.activation == "groupmax" and o.k is not None and o.latents % o.k:
        raise InputError(f"got k {o.k} for {o.latents} latents; groupmax needs a k that divides them.")
    if o.multi_topk and o.activation != "topk":
        raise InputError(f"got multi-topk for {o.activation}; it is for topk.")
    if not 0 <= o.seed < 2**32:
        raise InputError(f"got seed {o.seed}, expected one from 0 to 2³² − 1; pass another.")
    return family


def _load(path, options: Options) -> tuple[data_module.Rows, data_module.Rows]:
    everything = data_module.open_rows(path)
    needed = options.batch + options.heldout
    if len(everything) < needed:
        raise InputError(
            f"{path}: holds {len(everything)} rows, but a batch and the held-out rows are {needed}; pass more rows, or "
            "less of either."
        )
    heldout = np.asarray(everything[-options.heldout :], np.float32)
    data_module.require_finite(heldout, f"{path}, held-out part")
    return everything[: -options.heldout], heldout


def _centre_and_scale(rows: data_module.Rows, name: str) -> tuple[jax.Array, float]:
    """Geometric median of a sample, and what scales it to unit mean square about that."""
    sample = np.asarray(rows[:: max(1, len(rows) // _SAMPLE)][:_SAMPLE], np.float32)
    sample = sample[np.isfinite(sample).all(1)]
    if len(sample) == 0 or (sample == sample[0]).all():
        raise InputError(f"{name}: all rows are equal, or none is finite; pass activations of varied inputs.")
    unit = float(np.abs(sample).max())  # so that nothing overflows
    centre = train.geometric_median(jnp.asarray(sample / unit))
    spread = np.mean(np.sum((np.float64(sample) / unit - np.asarray(centre, np.float64)) ** 2, axis=1))
    return unit * centre, float(1 / (unit * np.sqrt(spread)))


def _auxk_latents(d: int, m: int) -> int:
    return min(2 ** max(0, round(np.log2(d / 2))), m)


def _schedule(options: Options) -> optax.Schedule:
    """Warm-up over the first twentieth, decay to 0 over the last fifth."""
    rate = options.learning_rate or train.learning_rate(options.latents)
    warmup, decay = max(1, options.steps // 20), max(1, options.steps // 5)
    parts = (optax.linear_schedule(rate / warmup, rate, warmup), optax.linear_schedule(rate, 0.0, decay))
    return optax.join_schedules(parts, [options.steps - decay])


def evaluate(sae: SAE, rows: data_module.Rows) -> dict[str, Any]:
    """Measure an autoencoder on rows: `nmse`, `explained_variance`, `l0`, `dead`, and `nmse_at`.

    `nmse_at` is the NMSE with the 1, 2, 4 … largest latents of each row alone, the progressive code.

    Args:
      sae: the autoencoder.
      rows: `[n d]`, may be memory-mapped; rows with NaN or Inf are left out, and counted as `nonfinite`.

    Raises:
      InputError: if the rows are not of the autoencoder's width.
    """
    if rows.shape[1] != sae.d:
        raise InputError(f"got rows of width {rows.shape[1]} for an SAE of {sae.d}; pass those of its own layer.")
    if sae.transcoder:
        raise InputError("got a transcoder, whose target is not its input; measure it with `sae.reconstruct`.")
    capacity = sae.activation.slots or stream.max_l0(sae, rows)
    keep = tuple(2**n for n in range(capacity.bit_length()))
    parts, nonfinite = [], 0
    for _, x in stream.chunks(sae, rows):
        parts.append(_measure(sae, x, capacity, keep))
        nonfinite += int(jnp.sum(~jnp.isfinite(x).all(1)))
    whole, active, progressive = (functools.reduce(operator.add, part) for part in zip(*parts, strict=True))
    numbers = {
        "nmse": whole.nmse,
        "explained_variance": whole.explained_variance,
        "l0": active.l0,
        "dead": active.dead,
    }
    return {name: _number(value) for name, value in numbers.items()} | {
        "nmse_at": {str(n): _number(value) for n, value in zip(keep, progressive.nmse, strict=True)},
        "rows": len(rows),
        "nonfinite": nonfinite,
    }


def _number(value) -> float | None:
    """JSON has no NaN."""
    return float(value) if np.isfinite(value) else None


@functools.partial(jax.jit, static_argnums=(2, 3))
def _measure(sae: SAE, x, capacity: int, keep: tuple[int, ...]):
    code = encode(sae, jnp.where(jnp.isfinite(x).all(1, keepdims=True), x, jnp.nan), capacity=capacity)
    whole = metrics.reconstruction(x, reconstruct(sae, x, code))
    return whole, metrics.activity(code), metrics.progressive(sae, x, code, keep)


@contextlib.contextmanager
def logs(folder: str | os.PathLike, options: Options, *, wandb: bool = False) -> Iterator[Log]:
    """Log to TensorBoard event files in a folder and, if asked, to Weights & Biases (or, `WANDB_MODE=offline`, files).

    Raises:
      InputError: if what writes them is not installed.
    """
    try:
        from tensorboardX import SummaryWriter
    except ImportError as error:
        raise InputError(
            "TensorBoard files need tensorboardX, which is missing; pip install 'jaxsae[study]'."
        ) from error
    with contextlib.ExitStack() as stack:
        writer = stack.enter_context(SummaryWriter(str(folder)))
        active = stack.enter_context(_wandb(folder, options)) if wandb else None

        def log(step: int, numbers: dict[str, float]) -> None:
            for name, value in numbers.items():
                writer.add_scalar(name, value, step)
            if active is not None:
                active.log(numbers, step=step)

        yield log


def _wandb(folder, options: Options):
    try:
        import wandb  # pyright: ignore[reportMissingImports]
    except ImportError as error:
        raise InputError("got --wandb, but wandb is missing; pip install wandb.") from error
    return wandb.init(dir=str(folder), project="jaxsae", config=options._asdict())
