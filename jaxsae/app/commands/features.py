"""The command that shows what latents stand for: features."""

from typing import Annotated

from jaxsae._core import arguments
from jaxsae._core.files import shown
from jaxsae.app import console
from jaxsae.app.commands import autoencoders, devices

_LINES = 20  # latents printed


def features(
    sae: arguments.Autoencoder,
    /,
    *,
    data: arguments.Rows,
    out: arguments.OutputDirectory,
    latents: tuple[arguments.Index, ...] = (),
    random: arguments.Count | None = None,
    by: Annotated[str, arguments.FEATURES_BY] | None = None,
    count: arguments.Count | None = None,
    seed: arguments.Seed = 0,
    model: arguments.Model | None = None,
    patch: tuple[arguments.Count, arguments.Count, arguments.Count] | None = None,
    mesh: tuple[arguments.Parts, arguments.Parts] | None = None,
    distributed: bool = False,
    json: bool = False,
) -> int:
    """Describe latents by the rows that activate them.

    Writes features.json, features.parquet and a page, report.html. If interrupted, the same command resumes. Rows of a
    harvest are shown as text, those of --patch as pictures, and others by their numbers.

    Example: jaxsae features run --data activations --random 100 --model smollm2 --out features

    Args:
        sae: a training run or one of its saves (RUN/checkpoints/N), or an SAE of any format, on disk, in a bucket
            or on the hub (hf://organisation/repository/path).
        data: file or directory of activations (rows, width), on disk or in a bucket.
        out: directory to write.
        latents: numbers of the latents.
        random: how many latents, drawn at random.
        by: those that come first by shrinkage (whose values refinement raises most), density or max; by default
            shrinkage.
        count: how many of these; 20 by default.
        seed: of --random.
        model: smollm2, a GGUF file or a Hugging Face directory, the one whose activations they are: adds the tokens
            that each latent promotes, and what its ablation costs.
        patch: height, width and channels (1 or 3) of rows that are patches of pictures.
        mesh: how many ways to split the rows, and the latents, of an SAE wider than a device; by default one device.
        distributed: run as one of several processes, as for jaxsae train.
        json: print the numbers of the latents as one JSON object.
    """
    from jaxsae._core import processes
    from jaxsae.app import features as job
    from jaxsae.data import open_rows, origin

    with devices.spread(mesh, distributed=distributed) as here:
        with processes.all_or_none():
            autoencoder, belongs = autoencoders._load(sae)
            rows, known = open_rows(data), origin.of_rows(data)
            origin.require_same(belongs, known)
        sources = job.Sources(sae, data, belongs, known, model, patch)
        choice = job.Choice(latents, random, by, count, seed)
        with console.progress(len(rows), quiet=not here) as update:
            progress = lambda done: update("encoding and refining", done)  # noqa: E731
            warn = console.warn if here else lambda text: None
            found = job.run(out, autoencoder, rows, sources=sources, choice=choice, progress=progress, warn=warn)
    if found is None:
        return 0
    names = ("index", "count", "density", "mean", "max", "shrinkage", "loss_effect")
    numbers = [{name: latent[name] for name in names} for latent in found["latents"]]
    cell = lambda value: f"{value:,}" if isinstance(value, int) else console.number(value)  # noqa: E731
    lines = ["".join(f"{cell(each[name]):>12}" for name in names) for each in numbers[:_LINES]]
    lines = ["".join(f"{name:>12}" for name in names), *lines]
    lines += [f"… {len(numbers) - _LINES} more"] if len(numbers) > _LINES else []
    counts = {name: found["data"][name] for name in ("rows", "nonfinite")}
    summary = {"out": shown(out), **counts, "rows_are": found["rows_are"], "latents": numbers}
    console.show(
        summary,
        "\n".join([*lines, f"Written: {shown(out / 'features.json')}, {shown(out / 'report.html')}"]),
        as_json=json,
    )
    if counts["nonfinite"]:
        console.warn(f"{counts['nonfinite']} of {counts['rows']} rows hold NaN or Inf and are left out.")
    return 0
