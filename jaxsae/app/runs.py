"""A training run: from a file of activations to a saved autoencoder, its measurements, and a log of the training.

A run is a directory: `sae/`, the autoencoder in the units of the data; `report.json`, options and measurements;
`checkpoints/`, from which it resumes if interrupted; and files of TensorBoard and, optionally, Weights & Biases.
"""

import contextlib
import functools
import json
import os
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from jaxsae import data as data_module, sharding, train
from jaxsae._core import arguments, processes
from jaxsae._core.files import (
    AnyPath,
    InputError,
    address,
    any_path,
    atomic_directory,
    atomic_file,
    in_one_line,
    json_number,
    reached,
    shown,
)
from jaxsae.app import chips, evaluation
from jaxsae.app.logs import Log
from jaxsae.app.options import Options, _warmup, passes, resolved, validate
from jaxsae.autoencoder import calibration, metrics, stream
from jaxsae.autoencoder.sae import SAE, init
from jaxsae.autoencoder.surgery import rescale
from jaxsae.data import batching
from jaxsae.formats import pretrained
from jaxsae.train import checkpoint, job
from jaxsae.train.objectives import AuxK, MultiTopK, Objective

_SAMPLE = 10_000  # rows from which centre and scale are estimated
_REPORT_EVERY = 10  # steps
_MAX_SEARCHED = 1000  # skipped batches that are searched for NaN and Inf
Progress = Callable[[str, int], None]


def run(
    out: Annotated[str | os.PathLike, arguments.ANY_DIRECTORY],
    *,
    data: str | os.PathLike | Sequence[str | os.PathLike] | Mapping[str, data_module.Rows],
    options: Options,
    weights: Sequence[arguments.Proportion] | None = None,
    window: arguments.Count | None = None,
    reader_threads: arguments.Count = 2,
    save_every: arguments.Weight = 60.0,
    save_every_steps: arguments.Count | None = None,
    eval_every: arguments.Count | None = None,
    profile: tuple[arguments.Index, arguments.Count] | None = None,
    resume: bool = False,
    progress: Progress = lambda text, steps: None,
    warn: Callable[[str], None] = lambda text: None,
    log: contextlib.AbstractContextManager[Log] | None = None,
    resumed: Callable[[int], None] = lambda step: None,
) -> dict[str, Any]:
    """Train on activations, measure on the last rows, which are held out, and save; resume the run in `out` if any.

    On a mesh (`jax.set_mesh`), rows and latents are spread over it, and nothing is ever whole on one device. With the
    same options and data, the result is bitwise identical to that of an uninterrupted run. With more steps the
    run is extended: the learning rate, its warm-up and decay, and whatever else depends on the number of steps, are
    then those of the longer run; the report records it as `lengthened`.

    Args:
      out: directory, made if missing.
      data: file or directory of activations, or several; or rows, by names that say where they come from.
      options: of the training.
      weights: proportions in which to mix the data; by default those of their lengths.
      window: as of `data.batches`.
      reader_threads: that read ahead.
      save_every: seconds between saves of the whole state.
      save_every_steps: steps between saves, besides.
      eval_every: steps between measurements on the held-out rows, which are logged as `heldout_nmse`, `heldout_l0` and
        `heldout_dead`; thresholds are then those of the training, not yet calibrated.
      profile: the steps, from the first number to the second, of which an xplane trace is written to `profile/`.
      resume: refuse to start a new run.
      progress: called with a description and the number of steps just taken; `options.steps` in all.
      warn: called with warnings.
      log: entered when training begins, for example `logs(out, options)`; then called with the step and its metrics.
      resumed: called with the number of steps taken before, if any; `progress` then counts from there.

    Returns:
      The report.

    Raises:
      InputError: if an option or the data cannot be used, if `out` holds another run or another process writes there,
        or if training diverged; the last good autoencoder is saved.
      job.Preempted: on SIGTERM or SIGINT, after the state is saved.

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
    every: Any = {"save_every": save_every, "save_every_steps": save_every_steps, "eval_every": eval_every}
    reading: Any = {"weights": weights, "window": window, "reader_threads": reader_threads}
    arguments.check(run, {"out": out, "profile": profile} | reading | every)
    if profile is not None and not profile[0] < profile[1] <= options.steps:
        got = "{}:{}".format(*profile)
        raise InputError(
            f"got profile {got} for {options.steps} steps; pass START:STOP, of which STOP is at most that."
        )
    if options.latents % (parts := sharding.axis_size("latent")):
        raise InputError(f"got {options.latents} latents for a mesh that splits them {parts} ways; pass a multiple.")
    out = any_path(out)
    if resume and isinstance(out, Path) and not (out / "checkpoints").is_dir():  # before a directory is made
        raise InputError(f"{out}: holds no run to resume; leave out --resume to begin one.")
    rows = _prepare(data, options, **reading)
    passed = passes(options, rows.total, warn)
    centre, scale = _centre_and_scale(_sample(rows.read(), rows.total), rows.name)
    objective, tx, init_fn = recipe(options, centre, scale)
    hooks: Any = {"progress": progress, "resumed": resumed, "warn": warn}
    with checkpoint.Checkpoints(
        out / "checkpoints", config=rows.config, extra={"scale": scale}, grows={"steps"}, warn=warn
    ) as checkpoints:
        if resume and not checkpoints.steps():
            raise InputError(f"{out}: holds no run to resume; leave out --resume to begin one.")
        batches, diverged = rows.read(part=sharding.rows_needed(options.batch)), None
        with log or contextlib.nullcontext(lambda step, numbers: None) as write:
            step = train.make_step(objective, tx)
            flops = functools.partial(_flops, step, init_fn, options.batch, rows.heldout.shape[1])
            monitor = _Monitor(options, rows.heldout, scale, write, batches, flops, **hooks)
            try:
                with _traced(profile, out / "profile", warn) as before_fn:
                    every |= {"steps": options.steps, "before_fn": before_fn}
                    state, reached = job.run(step, init_fn, batches, checkpoints, **every, **monitor.hooks())
            except job.TooManyRollbacks as error:
                state, reached, diverged = error.state, error.progress, error
    sae = _finished(state, scale, options, rows)
    if processes.is_primary() or not jax.sharding.get_mesh().empty:  # then each process sends its parts
        pretrained.save(sae, out / "sae")
    report = _report(sae, state, reached, options, rows, passed, batches)
    with processes.all_or_none():
        if processes.is_primary():
            _write_report(report, out)
    if diverged is not None:
        message = f"{rows.name}: {diverged} {describe_nonfinite(report)} The last good autoencoder is in {out / 'sae'}."
        raise InputError(message) from diverged
    return report


def is_checkpoint(path: str | os.PathLike) -> bool:
    """Whether a path is one save of a run, `RUN/checkpoints/N`.

    Args:
      path: any path, or a name on the hub.

    Example:
      >>> is_checkpoint("hf://organisation/repository")
      False
    """
    where = any_path(path) if address(path) else Path(path)
    with reached(where):
        return where.name.isdecimal() and (where / "manifest").is_dir() and (where / "state").is_dir()


def load(path: str | os.PathLike) -> SAE:
    """Load the autoencoder in one save of a run, in the units of its data; its thresholds are as trained.

    On a mesh (`jax.set_mesh`), each device reads its own part.

    Args:
      path: `RUN/checkpoints/N`.

    Raises:
      InputError: if it is damaged, or was saved by another version.

    Example:
      >>> import tempfile
      >>> options, rows = Options("topk", latents=16, k=2, batch=32, steps=10, heldout=32), np.eye(128)[:, :4]
      >>> with tempfile.TemporaryDirectory() as folder:
      ...     _ = run(folder, data={"rows": rows}, options=options)
      ...     load(f"{folder}/checkpoints/10").m
      16
    """
    with in_one_line(f"{path}: is damaged", "take another step"):
        manifest = checkpoint.read_manifest(path)
        config, scale = manifest["config"], manifest["extra"]["scale"]
        options = Options(**{name: config[name] for name in Options._fields})
        _, _, init_fn = recipe(options, jnp.zeros(config["data"][-1]), 1.0)
        like = sharding.abstract(init_fn)
    return rescale(checkpoint.load(path, like, "sae"), scale)


@contextlib.contextmanager
def _traced(steps: tuple[int, int] | None, folder: AnyPath, warn) -> Iterator[Callable[[int, Any], None]]:
    """A function to call before each step, which traces some of them; the trace appears once it is whole."""
    if steps is None or not processes.is_primary():
        yield lambda taken, state: None
        return
    begun = False
    with contextlib.ExitStack() as held:

        def before(taken: int, state: Any) -> None:
            nonlocal begun
            if taken == steps[0]:
                begun = True
                jax.block_until_ready(state)
                jax.profiler.start_trace(str(held.enter_context(atomic_directory(folder))))
                held.callback(jax.profiler.stop_trace)
            elif taken == steps[1]:
                jax.block_until_ready(state)
                held.close()

        yield before
    if not begun:
        warn(f"step {steps[0]} was taken before, and is not traced.")


def _flops(step: Any, init_fn, batch: int, d: int) -> float:
    """The FLOPs of a step on all devices, as XLA counts them before it optimises; the body of a loop once."""
    x = jax.ShapeDtypeStruct((batch, d), jnp.float32)
    if not (mesh := jax.sharding.get_mesh()).empty:
        x = jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding.rows_sharding(x, mesh))
    return float(step.func.lower(*step.args, sharding.abstract(init_fn), x).cost_analysis()["flops"])


class _Data(NamedTuple):
    """The data of a run.

    Attributes:
      names: of the sources.
      sources: the rows to train on.
      heldout: those to measure on, `[n d]`.
      config: the options, and whatever else must be equal for a run to be resumed.
      read: makes the batches.
    """

    names: list[str]
    sources: list[data_module.Rows]
    heldout: np.ndarray
    config: dict[str, Any]
    read: Callable[..., data_module.Batches]

    @property
    def name(self) -> str:
        """The names of all sources."""
        return ", ".join(self.names)

    @property
    def total(self) -> int:
        """The number of rows to train on."""
        return sum(map(len, self.sources))


def _prepare(data, options: Options, weights, window: int | None, reader_threads: int) -> _Data:
    names, everything = _open(data)
    window = batching.shuffle_window(everything, window)
    sources, heldout = _split(names, everything, options, weights)
    config = options._asdict() | {"data": [*map(len, sources), heldout.shape[1]], "weights": weights and list(weights)}
    config |= {"window": window, "rows of": names if isinstance(data, Mapping) else None}  # files may have been moved
    config |= {"values of the data, by checksum": list(map(data_module.fingerprint, everything))}
    order = {"seed": options.seed, "weights": weights, "window": window, "names": names, "threads": reader_threads}
    return _Data(
        names, sources, heldout, config, functools.partial(data_module.batches, sources, options.batch, **order)
    )


class _Monitor:
    """Shows, measures and logs a training, every few steps."""

    def __init__(self, options: Options, heldout, scale: float, write: Log, batches, flops, *, progress, resumed, warn):
        self._options, self._heldout, self._scale, self._write, self._batches = options, heldout, scale, write, batches
        self._progress, self._resumed, self._warn, self._shown = progress, resumed, warn, 0
        self._schedule = _schedule(resolved(options).learning_rate or 0.0, options.steps)
        self._clock: tuple[int, float, float] | None = None  # step, time, and seconds that were waited for data
        mesh = jax.sharding.get_mesh()
        devices = jax.devices()[:1] if mesh.empty else mesh.devices.ravel()
        peak = chips.peak_flops(devices[0])
        self._ideal = None if peak is None else flops() / (peak * len(devices))  # seconds of a step

    def hooks(self) -> dict[str, Any]:
        """What `job.run` calls."""
        size = self._options.batch
        first = sharding.rows_needed(size).start
        return {
            "shard_fn": lambda x: sharding.make_global_batch(self._scale * x, size, first),
            "log_fn": self.log,
            "eval_fn": self.measure,
            "resumed": self.resume,
            "warn": self._warn,
        }

    def resume(self, step: int, reached: job.LoopState) -> None:
        """Report that `step` steps were taken before."""
        self._shown = step
        self._resumed(step)
        if reached.lengthened and reached.lengthened[-1][0] == step:
            self._warn(_lengthened(self._options, *reached.lengthened[-1]))

    def log(self, step: int, metrics: dict[str, Any]) -> dict[str, float]:
        """The metrics of a step as numbers; {} for steps that are not logged."""
        if step % _REPORT_EVERY and step != self._options.steps:
            return {}
        numbers = {name: float(value) for name, value in metrics.items()}
        numbers["learning_rate"] = np.asarray(self._schedule(step - 1)).item()
        self._write(step, numbers | {"rows": step * self._options.batch} | self._speed(step))
        text = f"NMSE {numbers['nmse']:.3f}  L0 {numbers['l0']:.0f}  dead {numbers['dead']:.1%}"
        self._progress(text, step - self._shown)
        self._shown = step
        return numbers

    def measure(self, step: int, state: train.TrainState) -> None:
        """Measure the autoencoder on the held-out rows, and log it."""
        found = evaluation.evaluate(rescale(state.sae, self._scale), self._heldout)
        numbers = {f"heldout_{name}": found[name] for name in ("nmse", "l0", "dead")}
        self._write(step, {name: value for name, value in numbers.items() if value is not None})
        self._clock = None  # the next steps are timed from their own start

    def _speed(self, step: int) -> dict[str, float]:
        """What the steps since the last call took; {} at first, since they contain compilation."""
        now, before = (step, time.perf_counter(), self._batches.waited), self._clock
        self._clock = now
        if before is None:
            return {}
        steps, seconds, waited = (b - a for a, b in zip(before, now, strict=True))
        speed = {"step_seconds": seconds / steps, "rows_per_second": steps * self._options.batch / seconds}
        if self._ideal is not None:
            speed["mfu"] = self._ideal * steps / seconds
        return speed | {"data_wait": waited / seconds}


def _finished(state: train.TrainState, scale: float, options: Options, rows: _Data) -> SAE:
    """The autoencoder for unscaled rows, with thresholds calibrated to `k` latents per row if it has any."""
    sae = rescale(state.sae, scale)
    if options.k is None or sae.activation.slots is not None:
        return sae
    # On held-out rows: at the same thresholds, rows seen several times have fewer active latents, by 12 % after
    # fourteen passes over activations of SmolLM2.
    return calibration.calibrate(sae, (x for _, x in stream.chunks(sae, rows.heldout)), float(options.k))


def _report(
    sae: SAE, state: train.TrainState, reached: job.LoopState, options: Options, rows: _Data, passed: float, batches
) -> dict[str, Any]:
    trained = calibration.activity(sae, _in_order(rows, options.batch, min(rows.total, metrics.DEAD_ROWS)))
    data = {"path": rows.name, "rows": rows.total, "passes": passed, "heldout": len(rows.heldout)}
    return {
        "options": resolved(options)._asdict(),
        "data": data | {"width": rows.heldout.shape[1]},
        "steps": int(state.step),
        "skipped": int(state.skipped),
        "skipped_batches": list(reached.bad),
        "rollbacks": reached.rollbacks,
        "lengthened": [dict(zip(("at", "from", "to"), each, strict=True)) for each in reached.lengthened],
        "nonfinite_rows": _nonfinite_rows(rows.sources, rows.names, batches, reached.bad),
        "heldout": evaluation.evaluate(sae, rows.heldout, trained),
        "trained": {"l0": json_number(trained.l0), "rows": int(trained.rows)},
        "versions": checkpoint.versions() | {"backend": jax.default_backend()},
    }


def _write_report(report: dict[str, Any], out: AnyPath) -> None:
    with atomic_file(out / "report.json") as temporary:
        temporary.write_text(json.dumps(report, indent=1, allow_nan=False) + "\n")


def recipe(
    options: Options, centre: jax.Array, scale: float
) -> tuple[Objective, optax.GradientTransformation, Callable[[], train.TrainState]]:
    """The objective and optimizer of `run`, and a function that returns its initial state.

    Args:
      options: of the run.
      centre: of the rows, `[d]`.
      scale: that gives the rows unit mean square.

    Raises:
      InputError: if an option cannot be used.

    Example:
      >>> objective, tx, init_fn = recipe(Options("relu", latents=8, l1=0.1, auxk=False), jnp.zeros(4), 1.0)
      >>> [type(term).__name__ for term in objective.terms], init_fn().sae.m
      (['L1'], 8)
    """
    family, o, d = validate(options), resolved(options), len(centre)
    terms = family.terms(o, _warmup(o.steps))
    terms += (MultiTopK(),) if o.multi_topk else ()
    activation = family.activation(o)
    if o.auxk and not activation.encoder_free:  # without an encoder, idle latents have no pre-activations
        terms += (AuxK(min(2 ** max(0, round(np.log2(d / 2))), o.latents)),)
    tx = family.transform(_optimiser(o.learning_rate, o.steps))

    def init_fn() -> train.TrainState:
        sae = init(jax.random.key(o.seed), d=d, m=o.latents, activation=activation, b_dec=scale * centre)
        return train.init_state(sae, tx)

    return Objective(terms, idle_after=o.idle_after), tx, init_fn  # pyright: ignore[reportArgumentType]


def _lengthened(options: Options, step: int, before: int, steps: int) -> str:
    """One sentence on what changes in a run that is lengthened."""
    rates = (resolved(options._replace(steps=count)).learning_rate for count in (before, steps))
    schedules = (_schedule(rate or 0.0, count) for rate, count in zip(rates, (before, steps), strict=True))
    old, new = (np.asarray(schedule(step)).item() for schedule in schedules)
    return (
        f"the run is lengthened from {before} to {steps} steps: from step {step} on, all that depends on their number "
        f"is that of {steps}, such as the learning rate ({new:.3g}, it was {old:.3g})."
    )


def _nonfinite_rows(sources, names, batches: data_module.Batches, bad: Sequence[int]) -> dict[str, list[int]]:
    """The rows with NaN or Inf in the skipped batches, by file."""
    found: dict[str, set[int]] = {}
    for number in bad[-_MAX_SEARCHED:]:
        for source, rows in batches.rows(number):
            wrong = rows[~np.isfinite(np.asarray(sources[source][rows], np.float32)).all(axis=1)]
            found.setdefault(names[source], set()).update(wrong.tolist())
    return {path: sorted(rows) for path, rows in found.items() if rows}


def summary(report: dict[str, Any]) -> str:
    """One line on how a run was trained: its passes, and the values that by default depend on its length.

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


def describe_nonfinite(report: dict[str, Any]) -> str:
    """One sentence on the rows with NaN or Inf in the batches that a run skipped.

    Args:
      report: of `run`.

    Example:
      >>> describe_nonfinite({"nonfinite_rows": {"x.npy": [3, 7]}})
      'NaN or Inf: rows 3, 7 of x.npy.'
    """
    parts = []
    for path, rows in report["nonfinite_rows"].items():
        shown = ", ".join(map(str, rows[:5])) + (", …" if len(rows) > 5 else "")
        parts.append(f"row{'s' * (len(rows) > 1)} {shown} of {path}")
    if not parts:
        return "No row of them holds NaN or Inf."
    return f"NaN or Inf: {' and '.join(parts)}."


def _open(data) -> tuple[list[str], list[data_module.Rows]]:
    """Names and rows of all sources."""
    if isinstance(data, Mapping):
        return list(data), list(data.values())
    paths = [data] if isinstance(data, str | os.PathLike) else list(data)
    return list(map(shown, paths)), [data_module.open_rows(path) for path in paths]


def _split(names, everything, options: Options, weights) -> tuple[list[data_module.Rows], np.ndarray]:
    """The rows to train on, by source, and the last rows of each, `heldout` in all."""
    if weights is not None and len(weights) != len(names):
        raise InputError(f"got {len(weights)} weights for {len(names)} files; pass one for each.")
    total, needed = sum(map(len, everything)), options.batch + options.heldout
    if total < needed:
        what = f"holds {total} rows, but a batch and the held-out rows are {needed}"
        raise InputError(f"{', '.join(names)}: {what}; pass more rows, or less of either.")
    ends = np.cumsum([0, *map(len, everything)]) * options.heldout // total
    counts = np.diff(ends)
    heldout = [
        data_module.shards.cast(
            rows[len(rows) - count :], np.float32, name, "scale it", range(len(rows) - count, len(rows))
        )
        for name, rows, count in zip(names, everything, counts, strict=True)
    ]
    if len({rows.shape[1] for rows in everything}) > 1:
        widths = ", ".join(str(rows.shape[1]) for rows in everything)
        raise InputError(f"{', '.join(names)}: have widths {widths}; pass one layer's.")
    for name, rows in zip(names, heldout, strict=True):
        if len(rows):
            data_module.require_finite(rows, f"{name}, held-out part")
    rest = [rows[: len(rows) - count] for rows, count in zip(everything, counts, strict=True)]
    return rest, np.concatenate(heldout)


def _sample(batches: data_module.Batches, rows: int) -> np.ndarray:
    """A sample of the rows: those of the first batches."""
    first = batches.source[0]
    more = range(1, -(-min(_SAMPLE, rows) // len(first)))
    return np.concatenate([first, *(batches.source[number] for number in more)])[:_SAMPLE]


def _centre_and_scale(sample: np.ndarray, name: str) -> tuple[jax.Array, float]:
    """Geometric median of a sample, and the scale that gives it unit mean square about it."""
    sample = sample[np.isfinite(sample).all(1)]
    if len(sample) == 0 or (sample == sample[0]).all():
        raise InputError(f"{name}: all rows are equal, or none is finite; pass activations of varied inputs.")
    unit = float(np.abs(sample).max())  # so that nothing overflows
    centre = train.geometric_median(jnp.asarray(sample / unit))
    variance = np.mean(np.sum((np.float64(sample) / unit - np.asarray(centre, np.float64)) ** 2, axis=1))
    return unit * centre, float(1 / (unit * np.sqrt(variance)))


def optimiser(rate: float | jax.Array, steps: int) -> optax.GradientTransformation:
    """`train.default_optimizer` at a rate that warms up over the first twentieth and decays to 0 over the last fifth.

    Args:
      rate: the largest learning rate.
      steps: of the training.

    Example:
      >>> tx = optimiser(3e-3, steps=500)
    """
    return train.default_optimizer(_schedule(rate, steps), clip=1.0)


def _schedule(rate: float | jax.Array, steps: int) -> optax.Schedule:
    warmup, decay = max(1, steps // 20), max(1, steps // 5)
    factor = optax.join_schedules(
        (optax.linear_schedule(1 / warmup, 1.0, warmup), optax.linear_schedule(1.0, 0.0, decay)), [steps - decay]
    )
    return lambda step: rate * factor(step)


_optimiser = functools.cache(optimiser)  # training steps that share an optimizer share their compilation


def _in_order(rows: _Data, size: int, count: int) -> Iterator[jax.Array]:
    """The first training rows, in batches; the last one is padded with NaN."""
    part = sharding.rows_needed(size)
    source = rows.read(part=part).source
    for start in range(0, count, size):
        x = np.array(source[start // size], np.float32)
        x[max(0, count - start - part.start) :] = np.nan
        yield sharding.make_global_batch(x, size, part.start)
