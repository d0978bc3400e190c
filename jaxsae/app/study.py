"""The main experiment, Section 5.1 of Gao et al. (2024): whether refinement raises activations, and for which SAEs.

Train autoencoders of several families to the same L0s, from several seeds; refine the codes of held-out rows with a
certificate for each row; compare, also with what other values and another selection of atoms give. In a language model,
the rows are its residual stream, and what each code does to the next-token loss is measured; with known features,
whether codes and values are the true ones.
"""

import dataclasses
import functools
import json
import math
import operator
import os
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Annotated, Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxsae import data as data_module, language_model
from jaxsae._core import arguments
from jaxsae._core.files import InputError, in_one_line, json_number, local_path, owned
from jaxsae.app import plots, runs, sources
from jaxsae.app.measure import CERTIFIED, RIVALS, TOL, measure
from jaxsae.app.options import FAMILIES as TRAINED, Options, passes, resolved
from jaxsae.app.sources import CONTEXT, Features, HookPoint, Paired, Progress, Rows, Source
from jaxsae.app.summary import FAMILIES
from jaxsae.app.tuned import Trained, train_to
from jaxsae.autoencoder import calibration, metrics, stream
from jaxsae.autoencoder.activations import TopK
from jaxsae.autoencoder.sae import SAE, reconstruct
from jaxsae.autoencoder.shrinkage import RATIO_EDGES
from jaxsae.data.origin import Origin, require_same
from jaxsae.formats import pretrained
from jaxsae.train.checkpoint import versions

_LISTS = ("rows", "shorter", "tuning")  # of a report
_GROWS = ("families", "l0", "seeds", "halvings")  # what of a plan may grow when a study is resumed
_TUNED = 20_000  # rows of those trained on that decide on a learning rate
MANY_DEAD = 0.05  # share of latents
_REPORT_EVERY = 25  # rows measured between reports of progress
_MEAN_ROWS = 10_000  # rows from which the mean is taken if nothing is trained
_SPLICED = ("before", "after", "omp_nonnegative")  # reconstructions that are put into the language model


class Plan(NamedTuple):
    """Sizes of a study: an autoencoder for each family, L0 and seed.

    Attributes:
      latents: of each autoencoder.
      steps: of each training.
      batch: rows of a step.
      heldout: rows to measure on.
      families: names of activations, as for `jaxsae train`.
      l0: mean numbers of active latents per row, which every family is trained to.
      seeds: of initialisation and order of the batches, `seed`, `seed + 1`, ….
      halvings: how often the steps are halved, for how the results depend on the length of training: at the first
        seed and the first L0.
      grid: learning rates to try, relative to each family's default. Where there are several, each family is trained
        to each L0 with all of them at the first seed; that of the smallest error, of those that leave few latents
        dead, is used for all seeds and lengths.
      rivals: which of `measure.RIVALS` to compare with.
      train_rows: maximum number of rows to train on.
      skip: whether transcoders have a skip connection.

    Example:
      >>> QUICK._replace(steps=50).latents
      512
    """

    latents: arguments.Count
    steps: arguments.Count
    batch: arguments.Count
    heldout: arguments.Count
    families: tuple[Annotated[str, arguments.ACTIVATION], ...]
    l0: tuple[arguments.Count, ...]
    seeds: arguments.Count = 1
    halvings: arguments.Index = 0
    grid: tuple[arguments.Positive, ...] = (1.0,)
    rivals: tuple[Annotated[str, arguments.Choice(tuple(RIVALS))], ...] = tuple(RIVALS)
    train_rows: arguments.Count = 200_000
    skip: bool = False


_FEW = ("omp_nonnegative",)  # each takes seconds to compile
ALL = ("relu", "gated", "jumprelu", "topk", "batchtopk", "matryoshka", "matchingpursuit")
FULL = Plan(512, 1000, 256, 1024, ("relu", "topk", "batchtopk"), (16, 32))
QUICK = Plan(512, 200, 256, 256, ("relu", "topk"), (16,), rivals=_FEW)
# In a language model; whole contexts are held out.
FULL_MODEL = Plan(1024, 1500, 256, 16 * (CONTEXT - 1), ALL, (16, 32))
QUICK_MODEL = Plan(1024, 200, 256, 4 * (CONTEXT - 1), ("relu", "topk"), (32,), rivals=_FEW, train_rows=20_000)
FULL_SYNTHETIC = Plan(256, 3000, 256, 2048, ALL, (8,))
QUICK_SYNTHETIC = Plan(256, 400, 256, 512, ("relu", "topk"), (8,), rivals=_FEW, train_rows=20_000)


class _Job(NamedTuple):
    """One autoencoder of a study."""

    family: str
    l0: int
    seed: int
    steps: int

    def folder(self, plan: Plan, first: int) -> str:
        """Where it is saved."""
        seed = "" if self.seed == first else f"-seed{self.seed}"
        return f"{self.family}-{self.l0}{seed}" + ("" if self.steps == plan.steps else f"-steps{self.steps}")


def _jobs(plan: Plan, seed: int) -> Iterator[_Job]:
    for number in range(plan.seeds):
        for l0 in plan.l0:
            yield from (_Job(family, l0, seed + number, plan.steps) for family in plan.families)
        for halving in range(1, 1 + plan.halvings if number == 0 else 1):
            steps = max(1, plan.steps >> halving)
            yield from (_Job(family, plan.l0[0], seed, steps) for family in plan.families)


def run(
    out: Annotated[str | os.PathLike, arguments.DIRECTORY],
    *,
    data: Source = None,
    plan: Plan = FULL,
    seed: arguments.Seed = 0,
    saes: Sequence[str] = (),
    progress: Progress = lambda text, steps: None,
    warn: Callable[[str], None] = lambda text: None,
) -> dict[str, Any]:
    """Run the study and write `report.json`, figures and the SAEs under `out`, each as soon as it is done.

    A study that was interrupted resumes: an autoencoder that was measured is not trained again. It may also be given
    more families, L0s, seeds or halvings.

    Args:
      out: directory, made if missing.
      data: file or directory of activations; or a `HookPoint`, harvested to `out/activations`; or `Features`; by
        default patches of photographs.
      plan: sizes; `FULL` or `QUICK`, or for a `HookPoint`, `FULL_MODEL` or `QUICK_MODEL`.
      seed: of initialisation, shuffles and patches.
      saes: published or saved autoencoders of these activations, as `pretrained.load` takes them, to measure instead of
        training any.
      progress: called with a description and the number of steps just taken; `total_steps(plan, data, saes)` in all.
      warn: called with warnings.

    Returns:
      The report: `rows`, one for each SAE, with the data, the configuration and versions.

    Raises:
      InputError: if the plan or the data cannot be used, if `out` holds something else, cannot be written, or another
        process writes there.
    """
    arguments.check(run, {"out": out, "seed": seed})
    _check(plan, transcoder=transcodes(data), published=bool(saes))
    out = local_path(out)
    published = _published(saes, data)
    if saes:
        plan = plan._replace(batch=1, train_rows=min(plan.train_rows, _MEAN_ROWS) if _live(data) else plan.train_rows)
    load = functools.partial(_load, data, plan, seed, out / "activations", progress)
    ready = None if _live(data) else load()  # before a directory is made
    with owned(out, warn=warn):
        rows = ready or load()
        for name, (sae, belongs) in published.items():
            try:
                stream.require_width(sae, rows.heldout, rows.inputs)
            except InputError as error:
                raise InputError(f"{name}: {error}") from error
            require_same(belongs, rows.origin)
        if not saes:
            _require_width(plan, rows)
        passed = None if saes else passes(_options(plan, plan.families[0], seed), len(rows.train), warn)
        report = _begun(out, plan, seed, rows, passed)
        runs._write_report(report, out)
        study = _Study(out, plan, rows, progress, report)
        try:
            study.measure_model()
            progress("tuned", plan.steps * len(report["tuning"]))
            if published:
                for name, (sae, _) in published.items():
                    family, k = type(sae.activation).__name__.lower(), getattr(sae.activation, "k", None)
                    study.measure(sae, {"family": family, "k_or_l1": k, "sae": name}, name)
            else:
                for job in _jobs(plan, seed):
                    study.train(job)
                study.measure_truth()
            report["complete"] = True
        finally:  # an interruption leaves what is finished
            if report["rows"]:
                runs._write_report(report, out)
                plots.draw(report, out)
        return report


def _live(data: Source) -> bool:
    return isinstance(data, HookPoint)


def transcodes(data: Source) -> bool:
    """Whether rows are pairs, for transcoders.

    Args:
      data: as of `run`.

    Example:
      >>> transcodes(HookPoint("smollm2", site="mlp_in", target="mlp_out"))
      True
    """
    return isinstance(data, Paired) or (isinstance(data, HookPoint) and data.target is not None)


def _check(plan: Plan, *, transcoder: bool, published: bool) -> None:
    arguments.check(Plan, plan._asdict())
    if plan.skip and not transcoder:
        raise InputError("got skip without targets; it is a connection of transcoders, from their inputs.")
    wrong = [family for family in plan.families if not TRAINED[family].transcodes]
    if transcoder and wrong and not published:
        what = f"got {wrong[0]} for transcoders, whose encoder and decoder are of different spaces"
        raise InputError(f"{what}; pass other --families.")
    for name in ("families", "l0", "grid"):
        values = getattr(plan, name)
        if not values:
            raise InputError(f"got no {name}; pass at least one.")
        if len(set(values)) < len(values):
            raise InputError(f"got {name} {' '.join(map(str, values))}; pass each once.")
    if max(plan.l0) > plan.latents:
        raise InputError(f"got an L0 of {max(plan.l0)} for {plan.latents} latents; pass at most as many.")
    if "groupmax" in plan.families and any(plan.latents % l0 for l0 in plan.l0):
        raise InputError(f"got groupmax with {plan.latents} latents; pass L0s that divide them, or leave it out.")
    if plan.steps >> plan.halvings < 1:
        raise InputError(f"got {plan.halvings} halvings of {plan.steps} steps; pass fewer, so that a step is left.")


def _require_width(plan: Plan, rows: Rows) -> None:
    if max(plan.l0) > rows.width:
        what = f"got an L0 of {max(plan.l0)} for rows of width {rows.width}, which fewer atoms reconstruct exactly"
        raise InputError(f"{what}; pass smaller ones.")


def _published(names: Sequence[str], data: Source) -> dict[str, tuple[SAE, Origin]]:
    found = {name: pretrained.load_with_origin(name) for name in names}
    if names and (data is None or isinstance(data, Features)):
        raise InputError("got autoencoders and no activations; pass those of the site that they are for.")
    return found


def _load(data: Source, plan: Plan, seed: int, folder: Path, progress: Progress) -> Rows:
    if data is None:
        return sources.photographs(plan.train_rows, plan.heldout, seed)
    if isinstance(data, Features):
        return sources.synthetic(data, plan.train_rows, plan.heldout, seed)
    if isinstance(data, HookPoint):
        return sources.from_model(data, folder, plan.train_rows, plan.heldout, plan.batch, progress)
    return sources.from_file(data, plan.train_rows, plan.heldout, plan.batch)


def _options(plan: Plan, family: str, seed: int) -> Options:
    """Options of the trainings of a family, except their sparsity."""
    options = Options(family, plan.latents, heldout=plan.heldout, seed=seed, skip=plan.skip)
    return resolved(options._replace(batch=plan.batch, steps=plan.steps))


def _begun(out: Path, plan: Plan, seed: int, rows: Rows, passed: float | None) -> dict[str, Any]:
    """The report before its first row, or with those of the study in `out` that it resumes.

    `passed` is the number of passes over the rows, None without training.
    """
    context = {} if rows.probe is None else {"context": CONTEXT}
    report = {
        "rows": [],
        "shorter": [],
        "tuning": [],
        "complete": False,
        "data": {
            "source": rows.source,
            "rows": len(rows.train),
            "passes": passed,
            "heldout": len(rows.heldout),
            "width": rows.width,
            "checksum": data_module.fingerprint(rows.train),
        },
        "config": {**plan._asdict(), "seed": seed, "solver_tol": TOL, "certified_at": CERTIFIED, **context},
        "versions": versions() | {"backend": jax.default_backend()},
        "ratio_edges": RATIO_EDGES.tolist(),
    }
    report = json.loads(json.dumps(report))  # lists for tuples, as in a file
    path = out / "report.json"
    if not path.exists():
        return report
    with in_one_line(f"{path}: is not a study's", "choose another --out"):
        before = json.loads(path.read_bytes())
        parts = [(name, before[name], report[name]) for name in ("data", "config")]
        kept = {
            name: before[name] for name in before if name in ("rows", "shorter", "tuning") or name.startswith("ce_")
        }
    changed = [
        f"{name} {old.get(name)}, now {new.get(name)}"
        for part, old, new in parts
        for name in new
        if old.get(name) != new.get(name) and name not in (*_GROWS, "passes")
    ]
    if changed:
        raise InputError(f"{out}: holds another study ({'; '.join(changed)}); choose another --out, or remove it.")
    return report | kept


@dataclasses.dataclass
class _Study:
    """A study in progress: each autoencoder adds a row to its report, which is written at once."""

    out: Path
    plan: Plan
    rows: Rows
    progress: Progress
    report: dict[str, Any]

    def train(self, job: _Job) -> None:
        """Train an autoencoder, save and measure it, unless that is done."""
        named = {"family": job.family, "l0_target": job.l0, "seed": job.seed, "steps": job.steps}
        name = f"{FAMILIES[job.family][0]}, L0 {job.l0}"
        name += f", seed {job.seed}" if self.plan.seeds > 1 else ""
        full = job.steps == self.plan.steps
        name += "" if full else f", {job.steps} steps"
        rows = self.report["rows" if full else "shorter"]
        options = _options(self.plan._replace(steps=job.steps), job.family, job.seed)
        options = options._replace(learning_rate=self._factor(job.family, job.l0) * (options.learning_rate or 0.0))
        named["learning_rate"] = options.learning_rate
        if any(all(row.get(key) == value for key, value in named.items()) for row in rows):
            self.progress(f"{name}  is there", job.steps + self._cost())
            return
        start = time.monotonic()
        trained = self._train(options, job.l0, name)
        sae = self.rows.units.for_data(trained.sae)
        folder = self.out / "sae" / job.folder(self.plan, self.report["config"]["seed"])
        pretrained.save(sae, folder, origin=self.rows.origin)
        row = named | {"k_or_l1": trained.sparsity, "curve": trained.curve}
        self._add(sae, row, name, rows, time.monotonic() - start)

    def _train(self, options: Options, l0: int, name: str) -> Trained:
        rows, progress = self.rows, lambda text, n: self.progress(f"{name}  {text}", n)
        return train_to(rows.train, rows.units.scaled(rows.heldout), options, l0, progress, rows.inputs)

    def _factor(self, family: str, l0: int) -> float:
        """The learning rate of the grid that suits a family and L0 best, relative to the family's default."""
        plan, found = self.plan, self.report["tuning"]
        tried = {row["factor"]: row for row in found if (row["family"], row["l0_target"]) == (family, l0)}
        if len(plan.grid) == 1:
            return plan.grid[0]
        for factor in (factor for factor in plan.grid if factor not in tried):
            options = _options(plan, family, self.report["config"]["seed"])
            options = options._replace(learning_rate=factor * (options.learning_rate or 0.0))
            name = f"{FAMILIES[family][0]}, L0 {l0}, learning rate {options.learning_rate:.2g}"
            sae, rows = self._train(options, l0, name).sae, self.rows.train
            some = stream.chunks(sae, rows[:_TUNED])
            parts = [metrics.reconstruction(target, reconstruct(sae, x)) for _, x, target in some]
            error = functools.reduce(operator.add, parts)
            active = calibration.activity(sae, (chunk.x for chunk in stream.chunks(sae, rows[: metrics.DEAD_ROWS])))
            row = {"family": family, "l0_target": l0, "factor": factor, "learning_rate": options.learning_rate}
            tried[factor] = row | {"nmse": json_number(error.nmse), "dead": json_number(active.dead)}
            found.append(tried[factor])
            runs._write_report(self.report, self.out)
        alive = [factor for factor in plan.grid if tried[factor]["dead"] < MANY_DEAD]
        if alive:
            return min(alive, key=lambda factor: tried[factor]["nmse"] or math.inf)
        return min(plan.grid, key=lambda factor: tried[factor]["dead"])

    def measure(self, sae: SAE, row: dict[str, Any], name: str) -> None:
        """Measure an autoencoder that was not trained here, unless that is done."""
        if any(each.get("sae") == row.get("sae") and each["family"] == row["family"] for each in self.report["rows"]):
            self.progress(f"{name}  is there", self._cost())
            return
        self._add(sae, row, name, self.report["rows"], 0.0)

    def measure_truth(self) -> None:
        """Measure the true dictionary, if it is known, with the largest correlations for a code."""
        if self.rows.truth is None:
            return
        D = self.rows.truth.dictionary
        l0 = max(1, round(float((self.rows.truth.z != 0).sum(axis=1).mean())))
        sae = SAE(D.T, jnp.zeros(len(D)), D, jnp.zeros(D.shape[1]), TopK(l0))
        self.measure(sae, {"family": "truth", "l0_target": l0, "seed": 0}, FAMILIES["truth"][0])

    def measure_model(self) -> None:
        """Add the next-token loss of the language model itself, and without its residual, if there is a model."""
        if self.rows.probe is None or "ce_clean" in self.report:
            return
        targets, rows = self.rows.targets, self.rows
        mean = rows.units.unscaled(rows.train.mean(axis=0))[rows.inputs or 0 :]
        replaced = {"zero": np.zeros_like(targets), "mean": np.broadcast_to(mean, targets.shape)}
        found = sources.losses(self.rows.probe, replaced)
        self.report |= {f"ce_{name}": json_number(loss.cross_entropy) for name, loss in found.items()}
        self.progress("next-token loss", 2 * len(self.rows.probe.contexts))

    def _add(self, sae: SAE, row: dict[str, Any], name: str, rows: list[dict[str, Any]], training: float) -> None:
        start, probe, heldout = time.monotonic(), self.rows.probe, self.rows.heldout
        spliced = {} if probe is None else {name: np.empty_like(self.rows.targets) for name in _SPLICED}

        def see(name: str, numbers: np.ndarray, x_hat: jax.Array) -> None:
            if name in spliced:
                spliced[name][numbers] = x_hat

        more = self.rows.units.unscaled(self.rows.train[: metrics.DEAD_ROWS])
        row = {**row, **measure(sae, heldout, more, rivals=self.plan.rivals, truth=self.rows.truth, see=see)}
        if probe is not None:
            row |= self._losses(sources.losses(probe, spliced))
        rows.append(row | {"seconds": {"training": training, "measuring": time.monotonic() - start}})
        self.progress(f"{name}  refined", self._cost())
        runs._write_report(self.report, self.out)

    def _losses(self, found: dict[str, language_model.NextToken]) -> dict[str, float | None]:
        """Cross-entropy, divergence and loss recovered, of each reconstruction."""
        numbers: dict[str, float | None] = {}
        for name in _SPLICED:
            numbers |= {f"ce_{name}": json_number(found[name].cross_entropy), f"kl_{name}": json_number(found[name].kl)}
            for ablation in ("zero", "mean"):
                ablated = language_model.NextToken(1.0, self.report[f"ce_{ablation}"], 0.0)
                recovered = language_model.loss_recovered(found["clean"], found[name], ablated)
                numbers[f"recovered_{ablation}_{name}"] = json_number(recovered)
        return numbers

    def _cost(self) -> int:
        """The number of steps that measuring an autoencoder counts for."""
        return _cost(self.plan, self.rows.probe is not None)


def _cost(plan: Plan, spliced: bool) -> int:
    return plan.heldout // _REPORT_EVERY + (len(_SPLICED) * sources.contexts(plan.heldout) if spliced else 0)


def total_steps(plan: Plan, data: Source = None, saes: Sequence[str] = ()) -> int:
    """The total number of steps that a study reports as progress.

    Args:
      plan: as for `run`.
      data: as for `run`.
      saes: as for `run`.

    Example:
      >>> total_steps(QUICK)
      420
    """
    cost = _cost(plan, _live(data))
    steps = len(saes) * cost if saes else sum(job.steps + cost for job in _jobs(plan, 0))
    if len(plan.grid) > 1 and not saes:
        steps += len(plan.families) * len(plan.l0) * len(plan.grid) * plan.steps
    if isinstance(data, Features) and not saes:
        steps += cost  # of the true dictionary
    if _live(data):
        harvested = min(plan.train_rows, _MEAN_ROWS) if saes else plan.train_rows
        steps += sources.contexts(harvested + plan.heldout) + 2 * sources.contexts(plan.heldout)
    return steps
