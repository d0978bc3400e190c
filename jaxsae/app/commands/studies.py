"""The commands that measure shrinkage and report it: study and report."""

from pathlib import Path

from jaxsae._core import arguments
from jaxsae._core.files import InputError
from jaxsae.app import console


def study(
    *,
    out: arguments.OutputDirectory = Path("jaxsae-study"),
    data: arguments.InputPath | None = None,
    model: arguments.Model | None = None,
    layer: arguments.Index = 8,
    text: arguments.InputFiles = (),
    sae: tuple[arguments.Autoencoder, ...] = (),
    quick: bool = False,
    seed: arguments.Seed = 0,
    json: bool = False,
) -> int:
    """Train autoencoders, refine their codes, measure the shrinkage.

    Trains ReLU and TopK autoencoders, or measures those of --sae. Writes report.json, shrinkage.png and the trained
    SAEs; with --model also its activations, and reports how the codes change its next-token loss. The last 2,048 rows
    of --data are held out (512 with --quick), and the first of the others, at most 100,000, are trained on.

    Example: jaxsae study --quick --out study

    Example: jaxsae study --sae hf://org/repository/path --data x.npy

    Args:
        out: directory for the results.
        data: file or directory of activations (rows, width); by default patches of two photographs.
        model: instead of --data, a language model: smollm2, a GGUF file or a Hugging Face directory.
        layer: block of the model after which the residual is taken, from 0.
        text: UTF-8 files for the model to read; by default Python's standard library.
        sae: SAEs of these activations, on disk or on the hub, to measure instead of training.
        quick: train small autoencoders, in under a minute (with --model, in a few minutes).
        seed: of initialisation, shuffles and patches.
        json: print the report as one JSON object.
    """
    from jaxsae.app import plots, study as job

    if data is not None and model is not None:
        raise InputError("got --data and --model; pass one of them.")
    if text and model is None:
        raise InputError("got --text without --model; pass the model that is to read it.")
    if sae and data is None and model is None:
        raise InputError("got --sae without --data or --model; pass the activations that they are for.")
    site = None if model is None else job.HookPoint(model, layer, text or None)
    full, small = (job.FULL, job.QUICK) if site is None else (job.FULL_MODEL, job.QUICK_MODEL)
    plan, source = small if quick else full, site or data
    with console.progress(job.total_steps(plan, source, sae)) as update:
        report = job.run(out, data=source, plan=plan, seed=seed, saes=sae, progress=update, warn=console.warn)
    written = f"Written: {out / 'report.json'}, {out / 'shrinkage.png'}" + ("" if sae else f", {out / 'sae'}/")
    console.show(report, f"{console.study_table(report)}\n{written}", as_json=json)
    failed = [row for row in report["rows"] if row["certified"] < 1]
    for row in failed:
        count = round((1 - row["certified"]) * report["data"]["heldout"])
        worst = "NaN" if row["worst_kkt"] is None else f"{row['worst_kkt']:.1e}"
        console.warn(f"{plots.method(row)}: {count} rows are not certified, the worst at KKT {worst}.")
    return 1 if failed else 0


def report(run: arguments.InputPath, /, *, out: arguments.OutputFile | None = None, json: bool = False) -> int:
    """Make an HTML page of a run or a study.

    It shows figures, tables, configuration and versions, needs no network and no other file, and follows the reader's
    choice of light or dark. For an unfinished run, it shows the curves so far.

    Example: jaxsae report jaxsae-study --out study.html

    Args:
        run: directory that jaxsae train or jaxsae study wrote.
        out: the page to write; by default report.html in that directory.
        json: print the path as a JSON object.
    """
    from jaxsae.app import report as job

    page = run / "report.html" if out is None else out
    job.write(run, page)
    console.show({"out": page}, f"Written: {page}", as_json=json)
    return 0
