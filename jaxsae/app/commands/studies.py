"""The commands that measure shrinkage and report it: study and report."""

from pathlib import Path
from typing import Annotated, Any

from jaxsae._core import arguments
from jaxsae._core.files import InputError
from jaxsae.app import console
from jaxsae.app.commands import devices
from jaxsae.app.commands.texts import TRANSCODED


def study(
    *,
    out: arguments.OutputDirectory = Path("jaxsae-study"),
    data: arguments.Rows | None = None,
    target: arguments.Rows | None = None,
    model: arguments.Model | None = None,
    layer: arguments.Index = 8,
    site: Annotated[str, arguments.SITE] = "resid_post",
    transcode: bool = False,
    skip: bool = False,
    text: arguments.InputFiles = (),
    chat: bool = False,
    synthetic: bool = False,
    noise: arguments.Weight = 0.0,
    sae: tuple[arguments.Autoencoder, ...] = (),
    families: tuple[Annotated[str, arguments.ACTIVATION], ...] = (),
    l0: tuple[arguments.Count, ...] = (),
    seeds: arguments.Count = 1,
    halvings: arguments.Index = 0,
    grid: tuple[arguments.Positive, ...] = (),
    latents: arguments.Count | None = None,
    steps: arguments.Count | None = None,
    quick: bool = False,
    seed: arguments.Seed = 0,
    mesh: tuple[arguments.Parts, arguments.Parts] | None = None,
    json: bool = False,
) -> int:
    """Train autoencoders, refine their codes, measure the shrinkage.

    Trains several families to the same L0s, or measures the SAEs of --sae; and compares their codes with others of as
    many atoms. Writes report.json, figures and the trained SAEs; with --model also its activations, and reports how the
    codes change its next-token loss. The last 1,024 rows of --data are held out (256 with --quick), and the first of
    the others, at most 200,000, are trained on. If interrupted, the same command resumes, as it does with more
    --families, --l0, --seeds or --halvings.

    Example: jaxsae study --quick --out study

    Example: jaxsae study --families relu topk gated --l0 16 32 --seeds 3 --steps 4000 --out study

    Example: jaxsae study --sae hf://org/repository/path --data x.npy

    Args:
        out: directory for the results.
        data: file or directory of activations (rows, width), on disk or in a bucket; by default patches of two
            photographs.
        target: what transcoders reconstruct from --data, row by row.
        model: instead of --data, a language model: smollm2, a GGUF file or a Hugging Face directory.
        layer: block of the model, from 0.
        site: resid_pre, hook_z, attn_out, resid_mid, mlp_in, mlp_out or resid_post of that block.
        transcode: with --model, train transcoders, from mlp_in to mlp_out of the block; its next-token loss is then
            that with a transcoder in place of the MLP.
        skip: add a skip connection to transcoders.
        text: UTF-8 files for the model to read; by default Python's standard library.
        chat: the --text holds conversations, in a column messages, as for jaxsae harvest.
        synthetic: instead of --data, rows made of known features, with which codes are compared.
        noise: root mean square norm of the noise in them, relative to the features' part.
        sae: SAEs of these activations, on disk or on the hub, to measure instead of training.
        families: activations as for jaxsae train.
        l0: numbers of active latents per row, on average over held-out rows, to which each family is trained.
        seeds: number of seeds, from --seed on; the table then has standard errors.
        halvings: how often to halve the steps, to see what depends on the length of training.
        grid: learning rates to try for each family, relative to its default; by default that alone.
        latents: of each autoencoder.
        steps: of each training.
        quick: train few and small autoencoders.
        seed: of initialisation and shuffles, and of patches or features.
        mesh: with --sae, how many ways to split the rows, and the latents, of SAEs wider than a device.
        json: print the report as one JSON object.
    """
    given = dict(locals())
    from jaxsae.app import study as job
    from jaxsae.app.options import FAMILIES
    from jaxsae.app.summary import method

    source, plan = _source(given), _plan(given)
    if job.transcodes(source):
        plan = plan._replace(families=tuple(f for f in plan.families if FAMILIES[f].transcodes))
    own = {name: given[name] for name in ("families", "l0", "grid", "latents", "steps")}
    plan = plan._replace(**{name: value for name, value in own.items() if value})
    with devices.spread(mesh, distributed=False), console.progress(job.total_steps(plan, source, sae)) as update:
        report = job.run(out, data=source, plan=plan, seed=seed, saes=sae, progress=update, warn=console.warn)
    written = f"Written: {out / 'report.json'}, {out / 'shrinkage.png'}" + ("" if sae else f", {out / 'sae'}/")
    console.show(report, f"{console.study_table(report)}\n{written}", as_json=json)
    failed = [row for row in report["rows"] if row["certified"] < 1]
    for row in failed:
        count = round((1 - row["certified"]) * report["data"]["heldout"])
        worst = "NaN" if row["worst_kkt"] is None else f"{row['worst_kkt']:.1e}"
        console.warn(f"{method(row)}: {count} rows are not certified, the worst at KKT {worst}.")
    return 1 if failed else 0


def _source(given: dict[str, Any]) -> Any:
    """The rows of a study; refuses options that do not go together."""
    from jaxsae.app import study as job

    data, target, model, synthetic = (given[name] for name in ("data", "target", "model", "synthetic"))
    if sum((data is not None, model is not None, synthetic)) > 1:
        raise InputError("got several of --data, --model and --synthetic; pass one of them.")
    if given["text"] and model is None:
        raise InputError("got --text without --model; pass the model that is to read it.")
    if given["chat"] and not given["text"]:
        raise InputError("got --chat without --text; pass files of conversations, in JSON lines or Parquet.")
    if given["noise"] and not synthetic:
        raise InputError("got --noise without --synthetic; pass both.")
    if given["sae"] and data is None and model is None:
        raise InputError("got --sae without --data or --model; pass the activations that they are for.")
    if given["mesh"] is not None and not given["sae"]:
        raise InputError("got --mesh without --sae; a study trains on one device.")
    if given["transcode"] and (model is None or given["site"] != "resid_post"):
        raise InputError("got --transcode without --model, or with --site; it is from mlp_in to mlp_out of a model.")
    if target is not None and data is None:
        raise InputError("got --target without --data; pass the rows that it is reconstructed from.")
    if model is not None:
        places = TRANSCODED if given["transcode"] else (given["site"],)
        return job.HookPoint(model, given["layer"], given["text"] or None, *places, chat=given["chat"])
    if synthetic:
        return job.Features(noise=given["noise"])
    return data if data is None or target is None else job.Paired(data, target)


def _plan(given: dict[str, Any]) -> Any:
    """The sizes of a study, before those that are given."""
    from jaxsae.app import study as job

    full, small = (job.FULL_MODEL, job.QUICK_MODEL) if given["model"] else (job.FULL, job.QUICK)
    if given["synthetic"]:
        full, small = job.FULL_SYNTHETIC, job.QUICK_SYNTHETIC
    plan = small if given["quick"] else full
    return plan._replace(**{name: given[name] for name in ("seeds", "halvings", "skip")})


def report(run: arguments.InputPath, /, *, out: arguments.OutputFile | None = None, json: bool = False) -> int:
    """Make an HTML page of a run, a study or latents.

    It shows figures, tables, configuration and versions, needs no network, and follows the reader's choice of light or
    dark. For an unfinished run, it shows the curves so far. That of latents lets one search and sort them; the page of
    thousands of them needs the folder beside it, NAME_files.

    Example: jaxsae report jaxsae-study --out study.html

    Args:
        run: directory that jaxsae train, study or features wrote.
        out: the page to write; by default report.html in that directory.
        json: print the path as a JSON object.
    """
    from jaxsae.app import report as job

    page = run / "report.html" if out is None else out
    job.write(run, page)
    console.show({"out": page}, f"Written: {page}", as_json=json)
    return 0
