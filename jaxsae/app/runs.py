"""A training run: from a file of activations to a saved autoencoder, its measurements, and a log of the way there.

A run is a directory: `sae/`, the autoencoder in the units of the data; `report.json`, options and measurements;
`checkpoints/`, from which it goes on if something ended it; TensorBoard event files, and if asked for those of Weights
& Biases.
"""

import contextlib
import dataclasses
import functools
import json
import operator
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Annotated, Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import Mesh

from jaxsae import data as data_module
from jaxsae import sharding, train
from jaxsae._core import arguments
from jaxsae._core.arguments import Count, Positive, Proportion, Seed, Weight
from jaxsae._core.files import InputError, atomic_file, json_number, local_path
from jaxsae.autoencoder import calibration, metrics, stream
from jaxsae.autoencoder.activations import AbsTopK, Activation, BatchTopK, Gated, GroupMax, JumpReLU, ReLU, TopK
from jaxsae.autoencoder.metrics import DEAD_ROWS
from jaxsae.autoencoder.sae import SAE, encode, init, reconstruct, rescale
from jaxsae.data import shards
from jaxsae.formats import pretrained
from jaxsae.train import job
from jaxsae.train.checkpoint import Checkpoints, versions
from jaxsae.train.objectives import L0, L1, AuxK, Gate, MultiTopK, Objective

_SAMPLE = 10_000  # rows from which centre and scale are estimated
_REPORT_EVERY = 10  # steps
_MANY_PASSES = 10  # over the data, beyond which rows not trained on are reconstructed worse and worse
_BLAMED = 1000  # batches looked through for what is wrong with them
_NO_TENSORBOARD = "TensorBoard files need tensorboardX, which is missing; pip install 'jaxsae[study]'."
Progress = Callable[[str, int], None]
Log = Callable[[int, dict[str, float]], None]


class Options(NamedTuple):
    """What a run may be told; weights are for rows scaled to unit mean square.

    Attributes:
      activation: a name from `FAMILIES`.
      latents: `m`.
      k: latents a row, where they make the activation sparse.
      l1: weight of the penalty, where that does.
      auxk: whether idle latents learn, by `objectives.AuxK`.
      multi_topk: whether `objectives.MultiTopK` is added; for topk.
      batch: rows.
      steps: of training.
      learning_rate: `train.learning_rate(latents, steps)` if None.
      idle_after: rows without it after which a latent is idle, for `auxk`; a fiftieth of all rows trained on if None.
      heldout: rows that are measured on, the last ones.
      seed: of initialisation and shuffles.

    Example:
      >>> Options("topk", latents=4096, k=32).batch
      1024
    """

    activation: Annotated[str, arguments.ACTIVATION]
    latents: Count
    k: Count | None = None
    l1: Weight | None = None
    auxk: bool = True
    multi_topk: bool = False
    batch: Count = 1024
    steps: Count = 2000
    learning_rate: Positive | None = None
    idle_after: Count | None = None
    heldout: Count = 2048
    seed: Seed = 0


def resolved(options: Options) -> Options:
    """Options with numbers where None stands for what follows from the length of the run.

    A latent is idle after a fiftieth of the run: that costs no error and leaves hardly any latent dead, where a tenth
    comes too late to do much.

    Args:
      options: of a run.

    Example:
      >>> resolved(Options("topk", latents=4096, k=32)).idle_after
      40960
    """
    o = options
    rate = train.learning_rate(o.latents, o.steps) if o.learning_rate is None else o.learning_rate
    fiftieth = min(max(o.batch, o.steps * o.batch // 50), 2**31 - 1)  # rows are counted in int32
    idle_after = fiftieth if o.idle_after is None else o.idle_after
    return o._replace(learning_rate=rate, idle_after=idle_after)


def passes(options: Options, rows: int, warn: Callable[[str], None] = lambda text: None) -> float:
    """How often a run sees each row.

    Args:
      options: of the run.
      rows: that it is trained on.
      warn: called if that is often enough for them to be learnt by heart.

    Example:
      >>> passes(Options("topk", latents=16, k=2, batch=512, steps=600), 12_288, print)
      600 steps of 512 rows are 25 passes over 12,288 rows, fitted better than new ones; pass more rows.
      25.0
    """
    found = options.steps * options.batch / rows
    if found > _MANY_PASSES:
        warn(
            f"{options.steps} steps of {options.batch} rows are {found:.0f} passes over {rows:,} rows, fitted "
            "better than new ones; pass more rows."
        )
    return found


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
    out: Annotated[str | os.PathLike, arguments.DIRECTORY],
    *,
    data: str | os.PathLike | Sequence[str | os.PathLike] | Mapping[str, data_module.Rows],
    options: Options,
    weights: Sequence[Proportion] | None = None,
    window: Count | None = None,
    mesh: Mesh | None = None,
    save_every: Weight = 60.0,
    resume: bool = False,
    progress: Progress = lambda text, steps: None,
    warn: Callable[[str], None] = lambda text: None,
    log: contextlib.AbstractContextManager[Log] | None = None,
    resumed: Callable[[int], None] = lambda step: None,
) -> dict[str, Any]:
    """Train on activations, but the last rows; measure on those; save. What was begun in `out` is resumed.

    With the same options and data that is, to the bit, as if nothing had ended it. With more steps the run is made
    longer: from there on the learning rate, its warm-up and decay, and whatever else depends on the number of steps,
    are those of the longer run; the report has it as `lengthened`.

    Args:
      out: directory, made if missing.
      data: file or directory of activations, or several; or rows, each with a name that says where they come from.
      options: what to train, and how.
      weights: in which proportions to mix the data, whatever their lengths; by default in those of the lengths.
      window: as of `data.batches`; all rows are shuffled among themselves by default.
      mesh: of `sharding.make_mesh`, to spread rows and latents over; one device by default.
      save_every: seconds from one save of the whole state to the next.
      resume: refuse to begin anew.
      progress: called with what is going on and how many steps that took; `options.steps` in all.
      warn: told what was amiss and could be done without.
      log: opened when all is well, for example `logs(out, options)`; then called with the step and its numbers.
      resumed: called with the number of steps taken before, if there are any; `progress` then counts from there.

    Returns:
      The report.

    Raises:
      InputError: if an option or the data cannot be used, if `out` holds another run or another process writes there,
        or if training diverged; the last good autoencoder is saved.
      job.Stopped: on SIGTERM or SIGINT, with all saved.

    Example:
      >>> import tempfile
      >>> options = Options("topk", latents=16, k=2, batch=32, steps=10, heldout=32, auxk=False)
      >>> with tempfile.TemporaryDirectory() as folder:
      ...     np.save(f"{folder}/x.npy", np.random.default_rng(0).normal(size=(256, 4)).astype(np.float32))
      ...     report = run(f"{folder}/run", data=f"{folder}/x.npy", options=options)
      >>> report["steps"], report["heldout"]["rows"]
      (10, 32)
    """
    validate(options)
    arguments.check(run, {"out": out, "weights": weights, "window": window, "save_every": save_every})
    if mesh is not None and options.latents % mesh.shape["latent"]:
        ways = mesh.shape["latent"]
        raise InputError(f"got {options.latents} latents for a mesh that splits them {ways} ways; pass a multiple.")
    out = local_path(out)
    if resume and not (out / "checkpoints").is_dir():  # before a directory is made
        raise InputError(f"{out}: holds no run to resume; leave out --resume to begin one.")
    names, everything = _open(data)
    sources, heldout = _split(names, everything, options, weights)
    o, name = options, ", ".join(names)
    total = sum(map(len, sources))
    told_data = {"path": name, "rows": total, "passes": passes(o, total, warn), "heldout": len(heldout)}
    told_data |= {"width": heldout.shape[1]}
    config = o._asdict() | {"data": [*map(len, sources), heldout.shape[1]], "weights": weights and list(weights)}
    config |= {"window": window, "rows of": names if isinstance(data, Mapping) else None}  # files may have been moved
    config |= {"values of the data, by checksum": list(map(data_module.fingerprint, everything))}
    order = {"seed": o.seed, "weights": weights, "window": window, "names": names}
    read = functools.partial(data_module.batches, sources, o.batch, **order)
    centre, scale = _centre_and_scale(_sample(read(), total), name)
    with (
        jax.set_mesh(mesh) if mesh else contextlib.nullcontext(),
        Checkpoints(out / "checkpoints", config=config, grows={"steps"}, warn=warn) as checkpoints,
    ):
        if resume and not checkpoints.steps():
            raise InputError(f"{out}: holds no run to resume; leave out --resume to begin one.")
        part = sharding.rows_needed(o.batch)
        batches = read(part=part)
        objective, tx, fresh = recipe(o, centre, scale)
        counted = 0

        def resume_from(step, reached):
            nonlocal counted
            counted = step
            resumed(step)
            if reached.lengthened and reached.lengthened[-1][0] == step:
                warn(_lengthened(o, *reached.lengthened[-1]))

        def tell(step, shown):
            nonlocal counted
            if step % _REPORT_EVERY and step != o.steps:
                return {}
            numbers = {name: float(value) for name, value in shown.items()}
            write(step, numbers)
            text = f"NMSE {numbers['nmse']:.3f}  L0 {numbers['l0']:.0f}  dead {numbers['dead']:.1%}"
            progress(text, step - counted)
            counted = step
            return numbers

        diverged = None
        with log or contextlib.nullcontext(lambda step, numbers: None) as write:
            try:
                state, reached = job.run(
                    *(train.make_step(objective, tx), fresh, batches, checkpoints),
                    steps=o.steps,
                    save_every=save_every,
                    put=lambda x: sharding.place_rows(scale * x, o.batch, part.start),
                    tell=tell,
                    warn=warn,
                    resumed=resume_from,
                )
            except job.GivenUp as error:
                state, reached, diverged = error.state, error.progress, error
    sae = rescale(jax.tree.map(jnp.asarray, sharding.gathered(state.sae)), scale)
    if o.k is not None and sae.activation.slots is None:
        # On rows never trained on: those seen several times have fewer active latents at the same thresholds, by 12 %
        # after fourteen passes over activations of SmolLM2.
        sae = calibration.calibrate(sae, (x for _, x in stream.chunks(sae, heldout)), float(o.k))
    chief = jax.process_index() == 0
    if chief:
        pretrained.save(sae, out / "sae")
    trained = calibration.activity(sae, _in_order(read().source, o.batch, min(total, DEAD_ROWS)))
    bad = _rows_to_blame(sources, names, batches, reached.bad)
    report = {
        "options": resolved(o)._asdict(),
        "data": told_data,
        "steps": int(state.step),
        "skipped": int(state.skipped),
        "skipped_batches": list(reached.bad),
        "rollbacks": reached.rollbacks,
        "lengthened": [dict(zip(("at", "from", "to"), each, strict=True)) for each in reached.lengthened],
        "nonfinite_rows": bad,
        "heldout": evaluate(sae, heldout, trained),
        "trained": {"l0": json_number(trained.l0), "rows": int(trained.rows)},
        "versions": versions() | {"backend": jax.default_backend()},
    }
    if chief:
        with atomic_file(out / "report.json") as temporary:
            temporary.write_text(json.dumps(report, indent=1, allow_nan=False) + "\n")
    if diverged is not None:
        told = f"{name}: {diverged} {blame(report)} The last good autoencoder is in {out / 'sae'}."
        raise InputError(told) from diverged
    return report


def recipe(
    options: Options, centre: jax.Array, scale: float
) -> tuple[Objective, optax.GradientTransformation, Callable[[], train.TrainState]]:
    """What `run` minimises, how, and a function that makes the state it starts from.

    Args:
      options: of the run.
      centre: of the rows, `[d]`.
      scale: from rows to those of unit mean square.

    Raises:
      InputError: if an option cannot be used.

    Example:
      >>> objective, tx, fresh = recipe(Options("relu", latents=8, l1=0.1, auxk=False), jnp.zeros(4), 1.0)
      >>> [type(term).__name__ for term in objective.terms], fresh().sae.m
      (['L1'], 8)
    """
    family, o, d = validate(options), resolved(options), len(centre)
    terms = family.terms(o, _warmup(o.steps))
    terms += (MultiTopK(),) if o.multi_topk else ()
    terms += (AuxK(_auxk_latents(d, o.latents)),) if o.auxk else ()
    tx = _optimiser(o.learning_rate, o.steps)

    def fresh() -> train.TrainState:
        activation = family.activation(o)
        sae = init(jax.random.key(o.seed), d=d, m=o.latents, activation=activation, b_dec=scale * centre)
        return train.init_state(sae, tx)

    return Objective(terms, idle_after=o.idle_after), tx, fresh  # pyright: ignore[reportArgumentType]


def _lengthened(options: Options, step: int, before: int, steps: int) -> str:
    """One sentence on what is other for a run that was made longer."""
    rates = (resolved(options._replace(steps=count)).learning_rate for count in (before, steps))
    schedules = (_schedule(rate or 0.0, count) for rate, count in zip(rates, (before, steps), strict=True))
    old, new = (np.asarray(schedule(step)).item() for schedule in schedules)
    return (
        f"the run is lengthened from {before} to {steps} steps: from step {step} on, all that depends on their number "
        f"is that of {steps}, such as the learning rate ({new:.3g}, it was {old:.3g})."
    )


def _rows_to_blame(sources, names, batches: data_module.Batches, bad: Sequence[int]) -> dict[str, list[int]]:
    """Which rows of the batches that were skipped hold NaN or Inf, by file."""
    found: dict[str, set[int]] = {}
    for number in bad[-_BLAMED:]:
        for source, rows in batches.rows(number):
            wrong = rows[~np.isfinite(np.asarray(sources[source][rows], np.float32)).all(axis=1)]
            found.setdefault(names[source], set()).update(wrong.tolist())
    return {path: sorted(rows) for path, rows in found.items() if rows}


def summary(report: dict[str, Any]) -> str:
    """One line on how a run was trained: what follows from its length, where no option says otherwise.

    Args:
      report: of `run`.

    Example:
      >>> options = resolved(Options("topk", latents=4096, k=32, learning_rate=1e-3))._asdict()
      >>> summary({"options": options, "data": {"passes": 4.1, "rows": 500_000}})
      '4.1 passes over 500,000 rows, learning rate 0.001, AuxK for latents idle for 40,960 rows'
    """
    options, data = report["options"], report["data"]
    auxk = f", AuxK for latents idle for {options['idle_after']:,} rows" if options["auxk"] else ""
    return f"{data['passes']:.1f} passes over {data['rows']:,} rows, learning rate {options['learning_rate']:.3g}{auxk}"


def blame(report: dict[str, Any]) -> str:
    """One sentence on what was wrong with the batches that a run skipped.

    Args:
      report: of `run`.

    Example:
      >>> blame({"nonfinite_rows": {"x.npy": [3, 7]}})
      'NaN or Inf: rows 3, 7 of x.npy.'
    """
    parts = []
    for path, rows in report["nonfinite_rows"].items():
        shown = ", ".join(map(str, rows[:5])) + (", …" if len(rows) > 5 else "")
        parts.append(f"row{'s' * (len(rows) > 1)} {shown} of {path}")
    if not parts:
        return "No row of them holds NaN or Inf."
    return f"NaN or Inf: {' and '.join(parts)}."


def validate(options: Options) -> _Family:
    """Raise if an option cannot be used, or does not go with the others.

    Args:
      options: of a run.

    Returns:
      What the activation is trained with.

    Raises:
      InputError: what was got, and what to pass.

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
    return family


def _open(data) -> tuple[list[str], list[data_module.Rows]]:
    """Names and rows of all that is to be trained on."""
    if isinstance(data, Mapping):
        return list(data), list(data.values())
    paths = [data] if isinstance(data, str | os.PathLike) else list(data)
    return list(map(str, paths)), [data_module.open_rows(path) for path in paths]


def _split(names, everything, options: Options, weights) -> tuple[list[data_module.Rows], np.ndarray]:
    """The rows to train on, source by source, and the last ones of each, in all as many as asked for."""
    if weights is not None and len(weights) != len(names):
        raise InputError(f"got {len(weights)} weights for {len(names)} files; pass one for each.")
    total, needed = sum(map(len, everything)), options.batch + options.heldout
    if total < needed:
        raise InputError(
            f"{', '.join(names)}: holds {total} rows, but a batch and the held-out rows are {needed}; pass more rows, "
            "or less of either."
        )
    ends = np.cumsum([0, *map(len, everything)]) * options.heldout // total
    counts = np.diff(ends)
    heldout = [
        shards.cast(rows[len(rows) - count :], np.float32, name, "scale it", range(len(rows) - count, len(rows)))
        for name, rows, count in zip(names, everything, counts, strict=True)
    ]
    if len({rows.shape[1] for rows in everything}) > 1:
        raise InputError(
            f"{', '.join(names)}: have widths {', '.join(str(x.shape[1]) for x in everything)}; pass one layer's."
        )
    for name, rows in zip(names, heldout, strict=True):
        if len(rows):
            data_module.require_finite(rows, f"{name}, held-out part")
    rest = [rows[: len(rows) - count] for rows, count in zip(everything, counts, strict=True)]
    return rest, np.concatenate(heldout)


def _sample(batches: data_module.Batches, rows: int) -> np.ndarray:
    """Some of so many rows, those of the first batches."""
    first = batches.source[0]
    more = range(1, -(-min(_SAMPLE, rows) // len(first)))
    return np.concatenate([first, *(batches.source[number] for number in more)])[:_SAMPLE]


def _centre_and_scale(sample: np.ndarray, name: str) -> tuple[jax.Array, float]:
    """Geometric median of a sample, and what scales it to unit mean square about that."""
    sample = sample[np.isfinite(sample).all(1)]
    if len(sample) == 0 or (sample == sample[0]).all():
        raise InputError(f"{name}: all rows are equal, or none is finite; pass activations of varied inputs.")
    unit = float(np.abs(sample).max())  # so that nothing overflows
    centre = train.geometric_median(jnp.asarray(sample / unit))
    spread = np.mean(np.sum((np.float64(sample) / unit - np.asarray(centre, np.float64)) ** 2, axis=1))
    return unit * centre, float(1 / (unit * np.sqrt(spread)))


def _auxk_latents(d: int, m: int) -> int:
    return min(2 ** max(0, round(np.log2(d / 2))), m)


def optimiser(rate: float | jax.Array, steps: int) -> optax.GradientTransformation:
    """That of every run: `train.recipe`, warmed up over the first twentieth and decayed to 0 over the last fifth.

    Args:
      rate: the largest learning rate.
      steps: of the training.

    Example:
      >>> tx = optimiser(3e-3, steps=500)
    """
    return train.recipe(_schedule(rate, steps), clip=1.0)


def _schedule(rate: float | jax.Array, steps: int) -> optax.Schedule:
    warmup, decay = max(1, steps // 20), max(1, steps // 5)
    factor = optax.join_schedules(
        (optax.linear_schedule(1 / warmup, 1.0, warmup), optax.linear_schedule(1.0, 0.0, decay)), [steps - decay]
    )
    return lambda step: rate * factor(step)


_optimiser = functools.cache(optimiser)  # training steps that share one object share their compilation


@functools.cache
def _warmup(steps: int) -> optax.Schedule:
    """Of the weights of penalties, over the first fifth."""
    return optax.linear_schedule(0.0, 1.0, max(1, steps // 5))


def _in_order(source, size: int, count: int) -> Iterator[np.ndarray]:
    """The first rows that were trained on, in batches; NaN fills up the last one."""
    for start in range(0, count, size):
        x = np.array(source[start // size], np.float32)
        x[count - start :] = np.nan
        yield x


def evaluate(sae: SAE, rows: data_module.Rows, more: metrics.Activity | None = None) -> dict[str, Any]:
    """Measure an autoencoder on rows: `nmse`, `explained_variance`, `l0`, `dead`, `nmse_at` and `firing`.

    `nmse_at` is the NMSE with the 1, 2, 4 … largest latents of each row alone, the progressive code. `dead` is the
    share of the latents that never fire, and `firing` counts those that fire on no row, on 1, on 2 or 3, on 4 to 7 …:
    both of `dead_rows` rows, these and those of `more`.

    Args:
      sae: the autoencoder.
      rows: `[n d]`, may be memory-mapped; rows with NaN or Inf are left out, and counted as `nonfinite`.
      more: what latents do on other rows, where these are few: a latent may well rest on some thousand.

    Raises:
      InputError: if the rows are not of the autoencoder's width.

    Example:
      >>> import jaxsae
      >>> sae = jaxsae.init(jax.random.key(0), d=4, m=8, activation=jaxsae.TopK(2))
      >>> evaluate(sae, np.random.default_rng(0).normal(size=(64, 4)))["l0"]
      2.0
    """
    if rows.shape[1] != sae.d:
        raise InputError(f"got rows of width {rows.shape[1]} for an SAE of {sae.d}; pass those of its own layer.")
    if sae.transcoder:
        raise InputError("got a transcoder, whose target is not its input; measure `jaxsae.reconstruct` against that.")
    capacity = sae.activation.slots or stream.max_l0(sae, rows)
    keep = tuple(2**n for n in range(capacity.bit_length()))
    parts, nonfinite = [], 0
    for _, x in stream.chunks(sae, rows):
        parts.append(_measure(sae, x, capacity, keep))
        nonfinite += int(jnp.sum(~jnp.isfinite(x).all(1)))
    whole, active, progressive = (functools.reduce(operator.add, part) for part in zip(*parts, strict=True))
    counted = active if more is None else active + more
    numbers = {
        "nmse": whole.nmse,
        "explained_variance": whole.explained_variance,
        "l0": active.l0,
        "dead": counted.dead,
    }
    return {name: json_number(value) for name, value in numbers.items()} | {
        "nmse_at": {str(n): json_number(value) for n, value in zip(keep, progressive.nmse, strict=True)},
        "firing": counted.octaves,
        "dead_rows": int(counted.rows),
        "rows": len(rows),
        "nonfinite": nonfinite,
    }


@functools.partial(jax.jit, static_argnums=(2, 3))
def _measure(sae: SAE, x, capacity: int, keep: tuple[int, ...]):
    finite = jnp.isfinite(x).all(1, keepdims=True)
    code = encode(sae, jnp.where(finite, x, jnp.nan), capacity=capacity)
    code = dataclasses.replace(code, values=jnp.where(finite, code.values, jnp.nan))  # a threshold passes over NaN
    whole = metrics.reconstruction(x, reconstruct(sae, x, code))
    return whole, metrics.activity(code), metrics.progressive(sae, x, code, keep)


def logs(folder: str | os.PathLike, options: Options, *, wandb: bool = False) -> contextlib.AbstractContextManager[Log]:
    """Log to TensorBoard event files in a folder and, if asked, to Weights & Biases (or, `WANDB_MODE=offline`, files).

    Args:
      folder: of the event files.
      options: of the run, to be told to Weights & Biases.
      wandb: whether to log there.

    Raises:
      InputError: if what writes them is not installed; nothing is written before the block begins.

    Example:
      >>> import tempfile
      >>> with tempfile.TemporaryDirectory() as folder, logs(folder, Options("relu", 8, l1=0.1)) as log:
      ...     log(1, {"nmse": 0.5})
    """
    try:
        from tensorboardX import SummaryWriter
    except ImportError as error:
        raise InputError(_NO_TENSORBOARD) from error
    start = _wandb(folder, options) if wandb else None
    return _writing(lambda: SummaryWriter(str(local_path(folder))), start)


@contextlib.contextmanager
def _writing(open_writer: Callable[[], Any], start: Callable[[], Any] | None) -> Iterator[Log]:
    with contextlib.ExitStack() as stack:
        writer = stack.enter_context(open_writer())
        active = None if start is None else stack.enter_context(start())

        def log(step: int, numbers: dict[str, float]) -> None:
            for name, value in numbers.items():
                writer.add_scalar(name, value, step)
            if active is not None:
                active.log(numbers, step=step)

        yield log


def curves(folder: str | os.PathLike) -> dict[str, dict[int, float]]:
    """The numbers that `logs` wrote to the event files of a folder, by name and step; those of a step, as last told.

    A file ends at a record that is cut off, as the last one of a run that was killed.

    Args:
      folder: of a run, maybe one that is still going on.

    Raises:
      InputError: if what reads them is not installed.

    Example:
      >>> import tempfile
      >>> with tempfile.TemporaryDirectory() as folder:
      ...     with logs(folder, Options("relu", 8, l1=0.1)) as log:
      ...         log(10, {"nmse": 0.5})
      ...     curves(folder)
      {'nmse': {10: 0.5}}
    """
    paths = sorted(local_path(folder).glob("events.out.tfevents.*"))  # in order of time, which is in the name
    if not paths:
        return {}
    try:
        from google.protobuf.message import DecodeError
        from tensorboardX.proto.event_pb2 import Event  # pyright: ignore[reportAttributeAccessIssue]
    except ImportError as error:
        raise InputError(_NO_TENSORBOARD) from error
    found: dict[str, dict[int, float]] = {}
    for path in paths:
        with contextlib.suppress(DecodeError):
            for record in _records(path.read_bytes()):
                event = Event.FromString(record)
                for value in event.summary.value:
                    found.setdefault(value.tag, {})[event.step] = value.simple_value
    return {name: dict(sorted(curve.items())) for name, curve in found.items()}


def _records(content: bytes) -> Iterator[bytes]:
    """Of a TFRecord file, where each is a length, its checksum, the record, and its checksum."""
    at = 0
    while at + 12 <= len(content):
        start = at + 12
        end = start + int.from_bytes(content[at : at + 8], "little")
        at = end + 4
        if at <= len(content):
            yield content[start:end]


def _wandb(folder, options: Options) -> Callable[[], Any]:
    try:
        import wandb  # pyright: ignore[reportMissingImports]
    except ImportError as error:
        raise InputError("got --wandb, but wandb is missing; pip install wandb.") from error
    return functools.partial(wandb.init, dir=str(folder), project="jaxsae", config=options._asdict())
