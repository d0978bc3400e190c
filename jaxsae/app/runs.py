"""A training run: from a file of activations to a saved autoencoder, its measurements, and a log of the training.

A run is a directory: `sae/`, the autoencoder in the units of the data; `report.json`, options and measurements;
`checkpoints/`, from which it resumes if interrupted; and files of TensorBoard and, optionally, Weights & Biases.
"""

import contextlib
import dataclasses
import functools
import json
import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any

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
    atomic_file,
    in_one_line,
    json_number,
    reached,
)
from jaxsae.app import evaluation, monitor, run_data
from jaxsae.app.logs import Log
from jaxsae.app.options import Options, _require_parts, _warmup, passes, resolved, schedule, validate
from jaxsae.app.start import prepared
from jaxsae.app.units import Units, measured
from jaxsae.autoencoder import calibration, metrics, stream
from jaxsae.autoencoder.sae import SAE, init, split_rows
from jaxsae.data.origin import Origin
from jaxsae.formats import pretrained
from jaxsae.train import checkpoint, job
from jaxsae.train.objectives import AuxK, MultiTopK, Objective

Progress = Callable[[str, int], None]
_READING = ("weights", "window", "reader_threads", "skip_tokens", "max_norm")  # options of the data


def run(
    out: Annotated[str | os.PathLike, arguments.ANY_DIRECTORY],
    *,
    data: str | os.PathLike | Sequence[str | os.PathLike] | Mapping[str, data_module.Rows],
    options: Options,
    target: str | os.PathLike | Sequence[str | os.PathLike] | Mapping[str, data_module.Rows] | None = None,
    start: str | os.PathLike | None = None,
    origin: Origin | None = None,
    weights: Sequence[arguments.Proportion] | None = None,
    window: arguments.Count | None = None,
    reader_threads: arguments.Count = 2,
    skip_tokens: Sequence[arguments.Index] = (),
    max_norm: arguments.Positive | None = None,
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
      target: what a transcoder reconstructs from the data, row by row: as many files or directories, or rows by the
        same names. By default an autoencoder is trained, whose target is its input.
      start: an autoencoder to start from, as for `load_any`; its parameters replace the initial ones.
      origin: where the rows come from, written beside the autoencoder; by default what their manifests say.
      weights: proportions in which to mix the data; by default those of their lengths.
      window: as of `data.batches`.
      reader_threads: that read ahead.
      skip_tokens: leave out the rows of these tokens of a harvest.
      max_norm: leave out rows whose norm is more than so many times the median.
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
    given = dict(locals())
    every: Any = {name: given[name] for name in ("save_every", "save_every_steps", "eval_every")}
    reading: Any = {name: given[name] for name in _READING}
    checked = {"out": out, "profile": profile} | reading | every
    out = _checked(options, checked, resume=resume, transcoder=target is not None)
    rows = run_data.prepare(data, options, start, target=target, **reading)
    processes.require_same({"start": None} | rows.config)
    passed = passes(options, rows.total, warn)
    units = measured(run_data.sample(rows.read(), rows.total), rows.name, rows.inputs, warn)
    objective, tx, init_fn = recipe(options, units)
    start_fn = _start_from(start, options, units)
    made = (train.make_step(objective, tx, accumulate=options.accumulate), init_fn)
    saved: Any = {"config": rows.config, "extra": units.scales, "grows": {"steps"}, "warn": warn}
    hooks: Any = {"progress": progress, "resumed": resumed, "warn": warn}
    with checkpoint.Checkpoints(out / "checkpoints", **saved) as checkpoints:
        if resume and not checkpoints.steps():
            raise InputError(f"{out}: holds no run to resume; leave out --resume to begin one.")
        batches = rows.read(part=sharding.rows_needed(options.batch))
        with (
            log or contextlib.nullcontext(lambda step, numbers: None) as write,
            monitor.traced(profile, out / "profile", warn) as before_fn,
        ):
            flops = functools.partial(monitor.flops_of, *made, options.batch, rows.heldout.shape[1])
            watch = monitor.Monitor(options, rows.heldout, units, write, batches, flops, **hooks)
            every |= {"steps": options.steps, "before_fn": before_fn, "start_fn": start_fn}
            state, reached, diverged = _trained(*made, batches, checkpoints, **every, **watch.hooks())
    sae = _finished(state, units, options, rows)
    if processes.is_primary() or not jax.sharding.get_mesh().empty:  # then each process sends its parts
        pretrained.save(sae, out / "sae", origin=rows.origin if origin is None else origin)
    report = _report(sae, state, reached, options, rows, passed, batches)
    _write_report(report, out)
    if diverged is not None:
        what = f"{rows.name}: {diverged} {describe_nonfinite(report)}"
        raise InputError(f"{what} The last good autoencoder is in {out / 'sae'}.") from diverged
    return report


def _checked(options: Options, given: dict[str, Any], *, resume: bool, transcoder: bool) -> AnyPath:
    """The directory of a run; refuse what can be refused before it is made."""
    validate(options, transcoder=transcoder)
    arguments.check(run, given)
    monitor.require_traceable(given["profile"], options.steps)
    if options.latents % (parts := sharding.axis_size("latent")):
        raise InputError(f"got {options.latents} latents for a mesh that splits them {parts} ways; pass a multiple.")
    _require_parts(options, sharding.axis_size("data"))
    out = any_path(given["out"])
    if resume and isinstance(out, Path) and not (out / "checkpoints").is_dir():
        raise InputError(f"{out}: holds no run to resume; leave out --resume to begin one.")
    return out


def _trained(*what: Any, **how: Any) -> tuple[train.TrainState, job.LoopState, job.TooManyRollbacks | None]:
    """The last good state of `job.run`, and why it was given up, if it was."""
    try:
        return *job.run(*what, **how), None
    except job.TooManyRollbacks as error:
        return error.state, error.progress, error


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
        config, scales, inputs = manifest["config"], manifest["extra"], manifest["config"].get("inputs")
        options = Options(**{name: config[name] for name in Options._fields})
        units = Units(jnp.zeros(config["data"][-1] - (inputs or 0)), **scales, inputs=inputs)
        _, _, init_fn = recipe(options, units)
        like = sharding.abstract(init_fn)
    return units.for_data(checkpoint.load(path, like, "sae"))


def load_any(path: str | os.PathLike, *, dtype: str | None = None, revision: str | None = None) -> SAE:
    """Load an autoencoder: of any format, as `pretrained.load`, a run's, or one save of a run, as `load`.

    Args:
      path: of it.
      dtype: as of `pretrained.load`; not for a save of a run.
      revision: likewise.

    Raises:
      InputError: as those functions.

    Example:
      >>> import tempfile
      >>> import jaxsae
      >>> with tempfile.TemporaryDirectory() as folder:
      ...     pretrained.save(init(jax.random.key(0), d=4, m=8, activation=jaxsae.ReLU()), f"{folder}/sae")
      ...     load_any(f"{folder}/sae").m
      8
    """
    return load(path) if is_checkpoint(path) else pretrained.load(path, dtype=dtype, revision=revision)


def _start_from(start, options: Options, units: Units) -> Callable[[train.TrainState], train.TrainState]:
    """A function that puts an autoencoder in the place of the initial one."""
    if start is None:
        return lambda state: state
    sae = prepared(load_any(start, dtype="float32"), options, units)

    def start_fn(state: train.TrainState) -> train.TrainState:
        place = lambda new, old: jax.device_put(new.astype(old.dtype), old.sharding)  # noqa: E731
        return dataclasses.replace(state, sae=jax.tree.map(place, sae, state.sae))

    return start_fn


def _finished(state: train.TrainState, units: Units, options: Options, rows: run_data.RunData) -> SAE:
    """The autoencoder for unscaled rows, with thresholds calibrated to `k` latents per row if it has any."""
    sae = units.for_data(state.sae)
    if options.k is None or sae.activation.slots is not None:
        return sae
    # On held-out rows: at the same thresholds, rows seen several times have fewer active latents, by 12 % after
    # fourteen passes over activations of SmolLM2.
    return calibration.calibrate(sae, (chunk.x for chunk in stream.chunks(sae, rows.heldout)), float(options.k))


def _report(
    sae: SAE,
    state: train.TrainState,
    reached: job.LoopState,
    options: Options,
    rows: run_data.RunData,
    passed: float,
    batches,
) -> dict[str, Any]:
    some = run_data.in_order(rows, options.batch, min(rows.total, metrics.DEAD_ROWS))
    trained = calibration.activity(sae, (split_rows(sae, x)[0] for x in some))
    data = {"path": rows.name, "rows": rows.total, "passes": passed, "heldout": len(rows.heldout)}
    data |= {"dropped": rows.dropped} if rows.dropped else {}
    return {
        "options": resolved(options)._asdict(),
        "data": data | {"width": rows.heldout.shape[1]},
        "steps": int(state.step),
        "skipped": int(state.skipped),
        "skipped_batches": list(reached.bad),
        "rollbacks": reached.rollbacks,
        "lengthened": [dict(zip(("at", "from", "to"), each, strict=True)) for each in reached.lengthened],
        "nonfinite_rows": run_data.nonfinite_rows(rows.sources, rows.names, batches, reached.bad),
        "heldout": evaluation.evaluate(sae, rows.heldout, trained),
        "trained": {"l0": json_number(trained.l0), "rows": int(trained.rows)},
        "versions": checkpoint.versions() | {"backend": jax.default_backend()},
    }


def _write_report(report: dict[str, Any], out: AnyPath) -> None:
    """Write it, through the first of several processes."""
    with processes.all_or_none():
        if processes.is_primary():
            with atomic_file(out / "report.json") as temporary:
                temporary.write_text(json.dumps(report, indent=1, allow_nan=False) + "\n")


def recipe(
    options: Options, units: Units
) -> tuple[Objective, optax.GradientTransformation, Callable[[], train.TrainState]]:
    """The objective and optimizer of `run`, and a function that returns its initial state.

    Args:
      options: of the run.
      units: of its rows.

    Raises:
      InputError: if an option cannot be used.

    Example:
      >>> objective, tx, init_fn = recipe(Options("relu", latents=8, l1=0.1, auxk=False), Units(jnp.zeros(4)))
      >>> [type(term).__name__ for term in objective.terms], init_fn().sae.m
      (['L1'], 8)
    """
    transcoder = units.inputs is not None
    family, o = validate(options, transcoder=transcoder), resolved(options)
    terms = family.terms(o, _warmup(o.steps))
    terms += (MultiTopK(),) if o.multi_topk else ()
    activation = family.activation(o)
    if o.auxk and not activation.encoder_free:  # without an encoder, idle latents have no pre-activations
        terms += (AuxK(min(2 ** max(0, round(np.log2(len(units.centre) / 2))), o.latents)),)
    tx = family.transform(_optimiser(o.learning_rate, o.steps, o.moments))

    def init_fn() -> train.TrainState:
        b_dec = (units.scale if units.target_scale is None else units.target_scale) * units.centre
        how: Any = {"d": units.width, "m": o.latents, "activation": activation, "b_dec": b_dec}
        return train.init_state(init(jax.random.key(o.seed), **how, transcoder=transcoder, skip=o.skip), tx)

    return Objective(terms, idle_after=o.idle_after), tx, init_fn  # pyright: ignore[reportArgumentType]


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


def optimiser(rate: float | jax.Array, steps: int, moments: str = "float32") -> optax.GradientTransformation:
    """`train.default_optimizer` at a rate that warms up over the first twentieth and decays to 0 over the last fifth.

    Args:
      rate: the largest learning rate.
      steps: of the training.
      moments: as of `train.default_optimizer`.

    Example:
      >>> tx = optimiser(3e-3, steps=500)
    """
    return train.default_optimizer(schedule(rate, steps), clip=1.0, moments=moments)


_optimiser = functools.cache(optimiser)  # training steps that share an optimizer share their compilation
