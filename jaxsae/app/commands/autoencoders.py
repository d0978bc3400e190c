"""The commands on autoencoders: eval, refine, convert, push and info."""

import functools
import tempfile
from pathlib import Path
from typing import Annotated, Any

from jaxsae._core import arguments
from jaxsae._core.files import InputError, address, shown
from jaxsae.app import console
from jaxsae.app.commands import devices

FORMATS = arguments.Choice(
    ("jaxsae", "saelens", "gemma_scope", "gemma_scope_2", "sparsify", "dictionary_learning", "openai", "llama_scope")
)
PUBLISHED = arguments.Choice(tuple(name for name in FORMATS.names if name != "openai"))  # which is a single file


def _load(path: str, *, dtype: str | None = None, revision: str | None = None) -> tuple[Any, Any]:
    """The SAE at a path, which may also be one save of a run, and where it belongs."""
    from jaxsae.app import runs
    from jaxsae.data.origin import Origin
    from jaxsae.formats import pretrained

    if not runs.is_checkpoint(path):
        return pretrained.load_with_origin(path, dtype=dtype, revision=revision)
    if dtype is not None or revision is not None:
        raise InputError(f"{path}: is a save of a run, which has neither --dtype nor --revision; convert it first.")
    return runs.load(path), Origin()


def _opened(sae: str, data: Path, target: Path | None) -> tuple[Any, Any]:
    """An SAE and rows, with a transcoder's targets beside them, which must be of its site if both say theirs."""
    from jaxsae.autoencoder import stream
    from jaxsae.data import beside, open_rows, origin

    (model, belongs), rows = _load(sae), open_rows(data)
    if model.transcoder != (target is not None):
        if target is None:
            raise InputError(f"{sae}: is a transcoder; pass --target, the rows that it reconstructs.")
        raise InputError(f"got --target for {sae}, an autoencoder, whose target is its input; leave it out.")
    if target is None:
        origin.require_same(belongs, origin.of_rows(data))
        return model, rows
    origin.require_same(belongs, origin.of_pairs(data, target))
    pairs = beside([rows, open_rows(target)], [shown(data), shown(target)])
    stream.require_width(model, pairs, rows.shape[1])
    return model, pairs


def _probe(model: str, data: Path, target: Path | None, rows: Any) -> Any:
    """The language model of a harvest, with its last contexts."""
    from jaxsae.app import loss
    from jaxsae.data import origin

    place = origin.of_rows(data) if target is None else origin.of_pairs(data, target)
    return loss.open_probe(model, data, rows, place)


def _is_same(a: Path, b: str | Path) -> bool:
    """Whether two paths, on disk or in a bucket, are the same file or directory."""
    if address(a) or address(b):
        return address(a) == address(b)
    return a.exists() and Path(b).exists() and a.samefile(b)


def evaluate(
    *,
    sae: arguments.Autoencoder,
    data: arguments.Rows,
    target: arguments.Rows | None = None,
    model: arguments.Model | None = None,
    mesh: tuple[arguments.Parts, arguments.Parts] | None = None,
    distributed: bool = False,
    json: bool = False,
) -> int:
    """Measure an autoencoder on activations.

    With the model of a harvest, also its next-token loss, on the last 16 contexts, with reconstructions in place of the
    activations: of the encoder's codes, and of the refined ones.

    Example: jaxsae eval --sae run --data x.npy

    Args:
        sae: a training run or one of its saves (RUN/checkpoints/N), or an SAE of any format, on disk, in a bucket
            or on the hub (hf://organisation/repository/path).
        data: file or directory of activations (rows, width), on disk or in a bucket.
        target: of a transcoder, the rows that it reconstructs, likewise.
        model: smollm2, a GGUF file or a Hugging Face directory, the one whose activations they are.
        mesh: how many ways to split the rows, and the latents, of an SAE wider than a device; by default one device.
        distributed: run as one of several processes, as for jaxsae train.
        json: print the measurements as one JSON object.
    """
    from jaxsae._core import processes
    from jaxsae.app import evaluation

    if model is not None and distributed:
        raise InputError("got --model with --distributed; leave out one of them.")
    with devices.spread(mesh, distributed=distributed) as first:
        with processes.all_or_none():
            autoencoder, rows = _opened(sae, data, target)
            probe = None if model is None else _probe(model, data, target, rows)
        measured = evaluation.evaluate(autoencoder, rows)
        if probe is not None:
            from jaxsae.app import loss

            measured |= loss.measure(autoencoder, rows, probe)
    if not first:
        return 0
    named = {name: measured[name] for name in ("nmse", "explained_variance", "l0", "dead")}
    lines = [f"{name:18}  {console.number(value)}" for name, value in named.items()]
    lines[-1] += f" of {measured['dead_rows']:,} rows"
    largest = ", ".join(f"{n}: {console.number(value)}" for n, value in measured["nmse_at"].items())
    lines.append(f"NMSE with only the largest latents: {largest}")
    if probe is not None:
        ce = {name: console.number(measured[f"ce_{name}"]) for name in ("before", "after", "clean", "zero")}
        own = f"the model's own {ce['clean']}, with zeros {ce['zero']}"
        lines.append(f"next-token loss {ce['before']}, refined {ce['after']}; {own}")
    console.show(measured, "\n".join(lines), as_json=json)
    if "outliers" in measured:
        found = measured["outliers"]
        what = f"{found['rows']} rows are more than thirty times as long as the median, and have"
        without = console.number(found["nmse_without"])
        console.warn(f"{what} {found['mean_square']:.0%} of the mean square; without them the NMSE is {without}.")
    if measured["nonfinite"]:
        console.warn(f"{measured['nonfinite']} of {measured['rows']} rows hold NaN or Inf and are left out.")
    return 0


def refine(
    *,
    sae: arguments.Autoencoder,
    data: arguments.Rows,
    out: arguments.AnyFile,
    target: arguments.Rows | None = None,
    capacity: arguments.Count | None = None,
    tol: Annotated[float, arguments.Range(0, 1)] | None = None,
    max_steps: arguments.Count | None = None,
    strict: bool = False,
    mesh: tuple[arguments.Parts, arguments.Parts] | None = None,
    distributed: bool = False,
    json: bool = False,
) -> int:
    """Refine the codes of activations, and write them to a file.

    Files may be of any size. Writes indices, values, kkt, status and num_dropped, with one row for each row of data.

    Example: jaxsae refine --sae run --data x.npy --out codes.npz

    Args:
        sae: a training run or one of its saves (RUN/checkpoints/N), or an SAE of any format, on disk, in a bucket
            or on the hub (hf://organisation/repository/path).
        data: file or directory of activations (rows, width), on disk or in a bucket.
        out: the .npz file to write, on disk or in a bucket.
        target: of a transcoder, the rows that it reconstructs, and that the refined codes fit.
        capacity: slots per row; by default what the densest row needs.
        tol: KKT residual at which a row has converged; 1e-5 by default.
        max_steps: maximum number of solver steps per row; by default the solver's own limit.
        strict: exit with code 1 after any warning.
        mesh: how many ways to split the rows, and the latents, of an SAE wider than a device; by default one device.
        distributed: run as one of several processes, as for jaxsae train.
        json: print the shrinkage and the status of the rows as one JSON object.
    """
    from jaxsae._core import processes
    from jaxsae.autoencoder import stream
    from jaxsae.least_squares import solvers

    solver = None  # the default one, which a kernel may replace
    if tol is not None or max_steps is not None:
        solver = lambda k, d: solvers.within(solvers.default(k, d), tol=tol, max_steps=max_steps)  # noqa: E731
    given = {"the data": data, "the SAE": sae} | ({} if target is None else {"the target": target})
    for what, path in given.items():
        if _is_same(out, path):
            raise InputError(f"{shown(out)}: is {what}; write the codes to another file.")
    with devices.spread(mesh, distributed=distributed) as first:
        with processes.all_or_none():
            model, rows = _opened(sae, data, target)
            if capacity is not None and (model.activation.slots or capacity) != capacity:
                slots = f"k={model.activation.slots}" if model.activation.slots else ""
                name = type(model.activation).__name__
                raise InputError(f"got --capacity {capacity} for {name}({slots}); leave it out.")
        with console.progress(len(rows), quiet=not first) as update:
            progress = functools.partial(update, "refining")
            summary = stream.refine_file(model, rows, out, solver, capacity=capacity, progress=progress)
    if not first:
        return 0
    written = f"{summary.rows} rows of {summary.capacity} slots, worst KKT {summary.worst_kkt:.1e}"
    found = summary._asdict() | {"out": shown(out), "shrinkage": summary.shrinkage.numbers()}
    console.show(found, f"{summary.shrinkage}\nWritten: {shown(out)}, {written}", as_json=json)
    warnings = {
        f"{summary.overflowed} rows have more active latents than slots; raise --capacity.": summary.overflowed,
        f"{summary.nonfinite} rows hold NaN or Inf and are left as encoded (status 2).": summary.nonfinite,
        f"{summary.unconverged} rows stopped at --max-steps (status 1).": summary.unconverged,
    }
    for text, count in warnings.items():
        if count:
            console.warn(text)
    return 1 if strict and any(warnings.values()) else 0


def convert(
    src: arguments.Autoencoder,
    dst: Annotated[Path, arguments.Output((Path.is_file, Path.is_dir), bucket=True)],
    /,
    *,
    to: Annotated[str, FORMATS],
    model_name: arguments.Name | None = None,
    hook_name: arguments.Site | None = None,
    context_size: arguments.Count | None = None,
    dtype: Annotated[str, arguments.Choice(("float32", "bfloat16", "float16", "float64"))] | None = None,
    revision: arguments.Revision | None = None,
    mesh: tuple[arguments.Parts, arguments.Parts] | None = None,
    distributed: bool = False,
    json: bool = False,
) -> int:
    """Write an SAE in the format of another library.

    Example: jaxsae convert run published --to saelens

    Where the format has a place for it, the copy says where the SAE belongs: what the original says, or the options.

    Args:
        src: a training run or one of its saves (RUN/checkpoints/N), or an SAE of any format, on disk, in a bucket
            or on the hub (hf://organisation/repository/path).
        dst: path to write, on disk or in a bucket; a directory, or a file for openai.
        to: jaxsae, saelens, gemma_scope, gemma_scope_2, sparsify, dictionary_learning, openai or llama_scope.
        model_name: of the language model, such as HuggingFaceTB/SmolLM2-135M-Instruct.
        hook_name: such as blocks.8.hook_resid_post.
        context_size: number of tokens in a context.
        dtype: of the weights, float32, bfloat16, float16 or float64; that of the files by default.
        revision: branch, tag or commit on the hub.
        mesh: how many ways to split rows, and the latents of an SAE wider than a device; by default one device.
        distributed: run as one of several processes, as for jaxsae train.
        json: print the path and the format as one JSON object.
    """
    from jaxsae._core import processes
    from jaxsae.formats import pretrained

    with devices.spread(mesh, distributed=distributed) as first:
        with processes.all_or_none():
            sae, known = _load(src, dtype=dtype, revision=revision)
            origin = _origin(known, model_name, hook_name, context_size)
        pretrained.save(sae, dst, format=to, origin=origin)
    if first:
        console.show({"out": shown(dst), "format": to}, f"Written: {shown(dst)}, {to}", as_json=json)
    return 0


def push(
    src: arguments.Autoencoder,
    dst: arguments.HubAddress,
    /,
    *,
    to: Annotated[str, PUBLISHED] = "jaxsae",
    eval_: Annotated[Path, arguments.Input(must_exist=True)] | None = None,
    private: bool = False,
    json: bool = False,
) -> int:
    """Publish an SAE on the Hugging Face hub, with a model card.

    One commit adds the SAE and README.md, which says where the SAE belongs, what was measured (by the report of a run,
    or --eval) and how to load it. Needs a token that may write there (hf auth login, or HF_TOKEN).

    Example: jaxsae push run hf://organisation/repository/layer_8

    Args:
        src: a training run or one of its saves (RUN/checkpoints/N), or an SAE of any format, on disk, in a bucket
            or on the hub (hf://organisation/repository/path).
        dst: a repository, hf://organisation/repository, which is created if it is missing, or a folder in it.
        to: jaxsae, saelens, gemma_scope, gemma_scope_2, sparsify, dictionary_learning or llama_scope.
        eval_: file with what jaxsae eval --json printed, for the card.
        private: create a private repository.
        json: print the addresses as one JSON object.
    """
    from jaxsae.app import card
    from jaxsae.formats import hub, pretrained

    hub.require_token(dst)
    numbers = card.of_run(src) if eval_ is None else card.measured(eval_)
    sae, origin = _load(src)
    with tempfile.TemporaryDirectory(prefix="jaxsae.") as temporary:
        folder = Path(temporary, "sae")
        pretrained.save(sae, folder, format=to, origin=origin)
        card.write(folder / "README.md", dst, sae, origin, to, numbers)
        commit = hub.push(folder, dst, message=f"{type(sae.activation).__name__} SAE, by jaxsae", private=private)
    console.show({"out": dst, "format": to, "commit": commit}, f"Published: {dst}, {to} ({commit})", as_json=json)
    return 0


def _origin(known: Any, model: str | None, hook: str | None, context: int | None) -> Any:
    """Where an SAE belongs, by its files and by options."""
    given: dict[str, Any] = {"model": model, "context": context}
    if hook is not None:
        from jaxsae.language_model import sites

        given["layer"], given["site"] = sites.parse(hook)
        if given["layer"] is None:
            raise InputError(f"got --hook-name {hook!r}, which names no layer; pass one such as blocks.8.hook_{hook}.")
    return known._replace(**{name: value for name, value in given.items() if value is not None})


def info(path: arguments.Autoencoder, /, *, revision: arguments.Revision | None = None, json: bool = False) -> int:
    """Describe an SAE of any format.

    Prints its format, its sizes, and every convention that affects what it computes.

    Example: jaxsae info run

    Args:
        path: a training run, or an SAE of any format, on disk, in a bucket or on the hub
            (hf://organisation/repository/path).
        revision: branch, tag or commit on the hub.
        json: print the description as one JSON object.
    """
    from jaxsae.formats import pretrained

    described = pretrained.describe(path, revision=revision)
    console.show(described, "\n".join(f"{name:14}{value}" for name, value in described.items()), as_json=json)
    return 0
