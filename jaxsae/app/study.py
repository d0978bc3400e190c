"""The main experiment, Section 5.1 of Gao et al. (2024): whether refinement raises activations, and for which SAEs.

Train ReLU autoencoders at several L1 weights and TopK ones at the L0s that these reached; refine the codes of held-out
rows with a certificate for each row; compare. In a language model, the rows are its residual stream, and the comparison
then measures what each code does to the next-token loss.
"""

import dataclasses
import functools
import operator
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Annotated, Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxsae import data as data_module, language_model, train
from jaxsae._core import arguments
from jaxsae._core.files import InputError, atomic_file, json_number, local_path, owned
from jaxsae.app import plots, runs
from jaxsae.app.options import Options, passes, resolved
from jaxsae.autoencoder import calibration, metrics, stream
from jaxsae.autoencoder.refinement import to_fit
from jaxsae.autoencoder.sae import SAE, reconstruct
from jaxsae.autoencoder.shrinkage import RATIO_EDGES, shrinkage
from jaxsae.autoencoder.surgery import rescale
from jaxsae.formats import pretrained
from jaxsae.language_model import harvest
from jaxsae.least_squares import certify, solvers
from jaxsae.train.checkpoint import versions

CERTIFIED = 1e-5  # the KKT residual that certifies a row
_TOL = 1e-6  # of the solver: tighter, so that the certificate does not depend on rounding
_REPORT_EVERY = 25  # steps
_WORST = 10  # rows with the largest KKT residuals in the report
_CONTEXT = 256  # tokens in a context; the first gives no row
_MEAN_ROWS = 10_000  # rows from which the mean is taken if nothing is trained
_TOGETHER = 4  # contexts whose logits are in memory together


class Plan(NamedTuple):
    """Sizes of a study.

    Attributes:
      latents: of each autoencoder.
      steps: of each training.
      batch: rows of a step.
      heldout: rows to measure on.
      l1: weights of ReLU's penalty, for rows scaled to unit mean square.
      learning_rate: of all trainings, after a warm-up; `train.learning_rate(latents, steps)` if None.
      train_rows: maximum number of rows to train on.

    Example:
      >>> QUICK._replace(steps=50).latents
      512
    """

    latents: arguments.Count
    steps: arguments.Count
    batch: arguments.Count
    heldout: arguments.Count
    l1: tuple[arguments.Weight, ...]
    learning_rate: arguments.Positive | None = None
    train_rows: arguments.Count = 100_000


FULL = Plan(latents=2048, steps=500, batch=512, heldout=2048, l1=(0.02, 0.05, 0.08, 0.15))
QUICK = Plan(latents=512, steps=200, batch=512, heldout=512, l1=(0.05, 0.15))
# In a language model; whole contexts are held out.
FULL_MODEL = Plan(4096, 600, 512, 16 * (_CONTEXT - 1), l1=(0.06, 0.1, 0.16), train_rows=200_000)
QUICK_MODEL = Plan(1024, 200, 512, 4 * (_CONTEXT - 1), l1=(0.05, 0.2), train_rows=20_000)

Progress = Callable[[str, int], None]


class HookPoint(NamedTuple):
    """Where in a language model, and on which text, rows are harvested.

    Attributes:
      model: as for `language_model.load`.
      layer: block after which, from 0.
      text: files; Python's standard library if None.

    Example:
      >>> HookPoint("smollm2").layer
      8
    """

    model: str | os.PathLike
    layer: arguments.Index = 8
    text: Sequence[Path] | None = None


def run(
    out: Annotated[str | os.PathLike, arguments.DIRECTORY],
    *,
    data: str | os.PathLike | HookPoint | None = None,
    plan: Plan = FULL,
    seed: arguments.Seed = 0,
    saes: Sequence[str] = (),
    progress: Progress = lambda text, steps: None,
    warn: Callable[[str], None] = lambda text: None,
) -> dict[str, Any]:
    """Run the study and write `report.json`, `shrinkage.png` and the SAEs under `out`, each as soon as it is done.

    Args:
      out: directory, made if missing.
      data: file or directory of activations; or a `HookPoint`, harvested to `out/activations`; by default patches of
        photographs.
      plan: sizes; `FULL` or `QUICK`, or for a `HookPoint`, `FULL_MODEL` or `QUICK_MODEL`.
      seed: of initialisation, shuffles and patches.
      saes: published or saved autoencoders of these activations, as `pretrained.load` takes them, to measure instead of
        training any.
      progress: called with a description and the number of steps just taken; `total_steps(plan, data, saes)` in all.
      warn: called with warnings.

    Returns:
      The report: `rows`, one for each SAE, with the data, the configuration and versions.

    Raises:
      InputError: if the data cannot be used, or `out` cannot be written, or another process writes there.
    """
    arguments.check(run, {"out": out, "seed": seed})
    arguments.check(Plan, plan._asdict())
    out, probe = local_path(out), None
    published = {name: pretrained.load(name) for name in saes}
    for name, sae in published.items():
        if sae.transcoder:
            raise InputError(f"{name}: is a transcoder, whose target is not its input; pass an autoencoder.")
    if saes:
        if data is None:
            raise InputError("got autoencoders and no activations; pass those of the site that they are for.")
        plan = plan._replace(batch=1)
        if isinstance(data, HookPoint):
            plan = plan._replace(train_rows=min(plan.train_rows, _MEAN_ROWS))
    rows = None if isinstance(data, HookPoint) else _load(data, plan, seed)  # before a directory is made
    with owned(out, warn=warn):
        if isinstance(data, HookPoint):
            probe = _harvest(data, out / "activations", plan, progress)
        rows = rows or _load(out / "activations", plan, seed)
        for name, sae in published.items():
            if sae.d != rows.width:
                what = f"is {sae.d} wide, and the rows {rows.width}"
                raise InputError(f"{name}: {what}; pass activations of the site that it was trained on.")
        options = _options(plan, seed)
        passed = None if saes else passes(options, len(rows.train), warn)
        report = _begun(plan, options, rows, probe, passed)
        runs._write_report(report, out)
        study = _Study(out, plan, rows, probe, progress, report)
        try:
            if published:
                for name, sae in published.items():
                    family, k = type(sae.activation).__name__.lower(), getattr(sae.activation, "k", None)
                    study.measure(sae, {"family": family, "k_or_l1": k, "sae": name}, name)
            else:
                for weight in plan.l1:
                    study.train(options._replace(activation="relu", l1=weight))
                l0 = [row["l0"] for row in report["rows"] if row["l0"] is not None]
                for k in sorted({int(np.clip(round(mean), 1, min(plan.latents, rows.width))) for mean in l0}):
                    study.train(options._replace(k=k))
            study.measure_losses()
            report["complete"] = True
        finally:  # an interruption leaves what is finished
            if report["rows"]:
                runs._write_report(report, out)
                with atomic_file(out / "shrinkage.png") as temporary:
                    plots.shrinkage(report, temporary)
        return report


class _Rows(NamedTuple):
    """Training rows scaled to unit mean square about their mean, unscaled held-out rows, the scale, and a name."""

    train: np.ndarray
    heldout: np.ndarray
    scale: float
    source: str

    @property
    def width(self) -> int:
        return self.train.shape[1]


def _begun(plan: Plan, options: Options, rows: _Rows, probe: "_Probe | None", passed: float | None) -> dict[str, Any]:
    """The report before its first row; `passed` is the number of passes over the rows, None without training."""
    trained = {} if passed is None else {"learning_rate": options.learning_rate, "idle_after": options.idle_after}
    trained |= {"seed": options.seed, "solver_tol": _TOL, "certified_at": CERTIFIED}
    return {
        "rows": [],
        "complete": False,
        "data": {
            "source": rows.source if probe is None else probe.source,
            "rows": len(rows.train),
            "passes": passed,
            "heldout": len(rows.heldout),
            "width": rows.width,
        },
        "config": {**plan._asdict(), **trained, **({} if probe is None else {"context": _CONTEXT})},
        "versions": versions() | {"backend": jax.default_backend()},
        "ratio_edges": RATIO_EDGES.tolist(),
    }


@dataclasses.dataclass
class _Study:
    """A study in progress: each autoencoder adds a row to its report, which is written at once."""

    out: Path
    plan: Plan
    rows: _Rows
    probe: "_Probe | None"
    progress: Progress
    report: dict[str, Any]
    reconstructed: dict[str, np.ndarray] = dataclasses.field(default_factory=dict)  # to put into the language model

    def train(self, options: Options) -> None:
        """Train an autoencoder, save and measure it."""
        family, value = options.activation, options.l1 if options.k is None else options.k
        name = f"TopK k={value}" if family == "topk" else f"ReLU λ={value:g}"
        sae, curve = _train(self.rows.train, options, lambda text, steps: self.progress(f"{name}  {text}", steps))
        sae = rescale(sae, self.rows.scale)
        pretrained.save(sae, self.out / "sae" / f"{family}-{value:g}")
        self.measure(sae, {"family": family, "k_or_l1": value, "curve": curve}, name)

    def measure(self, sae: SAE, row: dict[str, Any], name: str) -> None:
        """Refine the codes of the held-out rows, and add the measurements to the report as a row."""
        rows, number = self.rows, len(self.report["rows"])
        keep = {} if self.probe is None else {f"{when} {number}": when for when in ("before", "after")}
        self.reconstructed.update({name: np.empty_like(rows.heldout) for name in keep})

        def see(block: stream.Block) -> None:
            for name, when in keep.items():
                code = block.code if when == "before" else block.refined
                self.reconstructed[name][block.rows] = reconstruct(sae, block.x, code)

        self.report["rows"].append(
            {**row, **measure(sae, rows.heldout, rows.train[: metrics.DEAD_ROWS] / rows.scale, see=see)}
        )
        self.progress(f"{name}  refined", self.plan.heldout // _REPORT_EVERY)
        runs._write_report(self.report, self.out)

    def measure_losses(self) -> None:
        """Add the next-token loss of the language model with each code, if there is a model."""
        if self.probe is None:
            return
        heldout = self.rows.heldout
        mean = np.broadcast_to(self.rows.train.mean(axis=0) / self.rows.scale, heldout.shape)
        replaced = self.reconstructed | {"zero": np.zeros_like(heldout), "mean": mean}
        found = _losses(self.probe, replaced, self.progress)
        self.report |= {f"ce_{name}": json_number(found[name].cross_entropy) for name in ("clean", "zero", "mean")}
        for number, row in enumerate(self.report["rows"]):
            for when in ("before", "after"):
                spliced = found[f"{when} {number}"]
                row |= {f"ce_{when}": json_number(spliced.cross_entropy), f"kl_{when}": json_number(spliced.kl)}
                for ablation in ("zero", "mean"):
                    recovered = language_model.loss_recovered(found["clean"], spliced, found[ablation])
                    row[f"recovered_{ablation}_{when}"] = json_number(recovered)


def total_steps(plan: Plan, data: Any = None, saes: Sequence[str] = ()) -> int:
    """The total number of steps that a study reports as progress.

    Args:
      plan: as for `run`.
      data: as for `run`.
      saes: as for `run`.

    Example:
      >>> total_steps(QUICK)
      880
    """
    count = len(saes) or 2 * len(plan.l1)
    steps = count * (plan.heldout // _REPORT_EVERY + (0 if saes else plan.steps))
    if isinstance(data, HookPoint):
        harvested = min(plan.train_rows, _MEAN_ROWS) if saes else plan.train_rows
        steps += _contexts(harvested + plan.heldout) + _contexts(plan.heldout) * (2 * count + 2)
    return steps


def _contexts(rows: int) -> int:
    return -(-rows // (_CONTEXT - 1))


class _Probe(NamedTuple):
    """A language model, and the contexts of the held-out rows."""

    model: language_model.LanguageModel
    layer: int
    contexts: np.ndarray  # [n s]
    source: str


def _harvest(site: HookPoint, folder: Path, plan: Plan, progress: Progress) -> _Probe:
    arguments.check(HookPoint, site._asdict())
    harvest.check(site.model, layer=site.layer, context=_CONTEXT, out=folder)
    tokenizer = language_model.read_tokenizer(site.model)
    model = language_model.load(site.model)
    wanted = _contexts(plan.train_rows + plan.heldout)
    files = harvest.standard_library() if site.text is None else site.text
    text = harvest.pack(files, tokenizer, context=_CONTEXT, tokens=wanted * _CONTEXT)
    texts = "the sources of Python's standard library" if site.text is None else ", ".join(text.files)
    source = {"model": str(site.model), "text": texts}
    show = functools.partial(progress, f"{site.model}  harvesting")
    harvest.run(folder, model, text.contexts, layer=site.layer, source=source, progress=show)
    name = f"residual of {site.model} after block {site.layer}, on {texts}"
    name += f" ({text.replaced} characters of it not UTF-8)" if text.replaced else ""
    return _Probe(model, site.layer, text.contexts[-_contexts(plan.heldout) :], name)


def _load(path, plan: Plan, seed: int) -> _Rows:
    if path is None:
        rows, heldout = data_module.image_patches(plan.train_rows, plan.heldout, side=8, seed=seed)
        return _Rows(rows, heldout, 1.0, "8 × 8 colour patches of scikit-learn's two photographs")
    everything = data_module.open_rows(path)
    needed = plan.batch + plan.heldout
    if len(everything) < needed:
        raise InputError(f"{path}: holds {len(everything)} rows, the study needs at least {needed}; pass more.")
    data_module.require_finite(everything, str(path))
    first = len(everything) - plan.heldout
    rows = data_module.shards.cast(everything[: min(first, plan.train_rows)], np.float32, str(path), "scale it")
    heldout = data_module.shards.cast(
        everything[first:], np.float32, str(path), "scale it", range(first, len(everything))
    )
    if (rows == rows[0]).all():
        raise InputError(f"{path}: all rows are equal, there is nothing to learn; pass activations of varied inputs.")
    variance = np.sum(np.var(rows[:: max(1, len(rows) // 10_000)], axis=0, dtype=np.float64))
    scale = float(1 / np.sqrt(variance))
    return _Rows(rows * scale, heldout, scale, str(path))


def _options(plan: Plan, seed: int) -> Options:
    """Options of all trainings, except their sparsity."""
    options = Options("topk", plan.latents, learning_rate=plan.learning_rate, heldout=plan.heldout, seed=seed)
    return resolved(options._replace(batch=plan.batch, steps=plan.steps))


def _train(rows, options: Options, progress: Progress) -> tuple[SAE, dict[str, list]]:
    """Train an autoencoder as `jaxsae train` does, on scaled rows; return it with its training curves."""
    curve: dict[str, list] = {"step": [], "nmse": [], "l0": []}
    objective, tx, init_fn = runs.recipe(options, jnp.asarray(rows[:10_000].mean(axis=0)), 1.0)

    def show(step, shown):
        if step % _REPORT_EVERY == 0 or step == options.steps:
            nmse, l0 = float(shown["nmse"]), float(shown["l0"])
            for name, value in {"step": step, "nmse": json_number(nmse), "l0": json_number(l0)}.items():
                curve[name].append(value)
            progress(f"NMSE {nmse:.3f}  L0 {l0:.0f}", (step - 1) % _REPORT_EVERY + 1)

    batches = data_module.batches(rows, options.batch, seed=options.seed)
    state = train.fit(init_fn(), batches, loss=objective, tx=tx, steps=options.steps, callback=show)
    return state.sae, curve


def _solver(k: int, d: int) -> Any:
    return solvers.within(solvers.default(k, d), tol=_TOL)


def measure(
    sae: SAE,
    rows: np.ndarray,
    more: np.ndarray | None = None,
    *,
    see: Callable[[stream.Block], None] = lambda block: None,
) -> dict[str, Any]:
    """Refine the codes of rows and measure the shrinkage: one row of the report, without its name.

    Besides the numbers: `change` and `latent_change`, histograms over `RATIO_EDGES` of refined/original, for
    active values and for latents' means; `firing`, how many latents fire on no row, on 1, on 2 or 3, on 4 to 7 …, and
    `dead`, the share of those on none, both over `dead_rows` rows, these and `more`; `worst_rows`, those with the
    largest KKT residuals.

    Args:
      sae: the autoencoder.
      rows: `[n d]`, finite.
      more: other rows `[n d]` on which to count firing latents, if these are few.
      see: called with each refined block of rows.
    """

    def measure_block(block):
        see(block)
        y, _ = to_fit(sae, block.x)
        kkt = _certified_kkt(sae.W_dec, y, block.refined, nonnegative=not sae.activation.signed)
        shrunk = shrinkage(sae, block.x, block.code, block.refined)
        return (shrunk, metrics.activity(block.code)), (block.rows, np.asarray(kkt), np.asarray(block.code.l0))

    sums, columns = zip(*map(measure_block, stream.refine_blocks(sae, rows, _solver)), strict=True)
    shrunk, active = (functools.reduce(operator.add, part) for part in zip(*sums, strict=True))
    if more is not None:
        active += calibration.activity(sae, (x for _, x in stream.chunks(sae, more)))
    number, kkt, l0 = map(np.concatenate, zip(*columns, strict=True))
    worst = np.argsort(-np.nan_to_num(kkt, nan=np.inf), kind="stable")[:_WORST]
    ratio = np.asarray(shrunk.ratio)
    ratio = np.clip(ratio[np.isfinite(ratio)], RATIO_EDGES[0], RATIO_EDGES[-1])
    numbers = {**shrunk.numbers(), "worst_kkt": kkt.max(), "certified": np.mean(kkt <= CERTIFIED), "dead": active.dead}
    numbers = {name: json_number(value) for name, value in numbers.items()}
    return numbers | {
        "change": np.asarray(shrunk.ratio_histogram).tolist(),
        "latent_change": np.histogram(ratio, RATIO_EDGES)[0].tolist(),
        "firing": active.log2_histogram,
        "dead_rows": int(active.rows),
        "worst_rows": [{"row": int(number[i]), "l0": int(l0[i]), "kkt": json_number(kkt[i])} for i in worst],
    }


@functools.partial(jax.jit, static_argnames="nonnegative")
def _certified_kkt(dictionary, y, code, *, nonnegative: bool = True):
    return certify(dictionary, y, code, nonnegative=nonnegative).kkt  # the gap is not used, so not computed


def _losses(probe: _Probe, replaced: dict[str, np.ndarray], progress: Progress) -> dict[str, language_model.NextToken]:
    """Next-token losses with rows `[n d]` in place of the residual stream, by name, and `"clean"` ones."""

    def replace(rows, h):
        return h.at[:, 1:].set(rows.reshape(h.shape[0], -1, h.shape[2]))

    found = []
    for start in range(0, len(probe.contexts), _TOGETHER):
        contexts = probe.contexts[start : start + _TOGETHER]
        span = slice(start * (_CONTEXT - 1), (start + len(contexts)) * (_CONTEXT - 1))
        splices = {name: functools.partial(replace, rows[span]) for name, rows in replaced.items()}
        found.append(language_model.cross_entropy(probe.model, [jnp.asarray(contexts)], probe.layer, splices))
        progress("next-token loss", len(contexts) * len(replaced))
    return {name: functools.reduce(operator.add, (part[name] for part in found)) for name in found[0]}
