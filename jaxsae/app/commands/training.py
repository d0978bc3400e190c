"""The command that trains: train."""

import contextlib
import logging
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any

from jaxsae._core import arguments
from jaxsae._core.files import InputError, shown
from jaxsae.app import console
from jaxsae.app.commands import devices
from jaxsae.app.commands.texts import TRANSCODED, live, token_numbers


def train(
    *,
    activation: Annotated[str, arguments.ACTIVATION],
    latents: arguments.Count,
    out: arguments.AnyDirectory,
    data: tuple[arguments.Rows, ...] = (),
    target: tuple[arguments.Rows, ...] = (),
    model: arguments.Model | None = None,
    layer: arguments.Index | None = None,
    site: arguments.Site = "resid_post",
    transcode: bool = False,
    skip: bool = False,
    from_: arguments.Autoencoder | None = None,
    text: arguments.InputFiles = (),
    column: arguments.Name | None = None,
    chat: bool = False,
    encoding: arguments.Name = "utf-8",
    add_bos: bool = False,
    tokens: arguments.Count | None = None,
    context: arguments.Context = 256,
    window: arguments.Count | None = None,
    reader_threads: arguments.Count = 2,
    skip_tokens: tuple[arguments.Token, ...] = (),
    max_norm: arguments.Positive | None = None,
    k: arguments.Count | None = None,
    l1: arguments.Weight | None = None,
    batch: arguments.Count = 1024,
    accumulate: arguments.Count = 1,
    moments: Annotated[str, arguments.MOMENTS] = "float32",
    steps: arguments.Count = 2000,
    learning_rate: arguments.Positive | None = None,
    no_auxk: bool = False,
    multi_topk: bool = False,
    idle_after: arguments.Count | None = None,
    heldout: arguments.Count = 2048,
    seed: arguments.Seed = 0,
    weights: tuple[arguments.Proportion, ...] = (),
    save_every: arguments.Weight = 60.0,
    save_every_steps: arguments.Count | None = None,
    eval_every: arguments.Count | None = None,
    profile: Annotated[str, arguments.Text(r"[0-9]{1,9}:[0-9]{1,9}", "START:STOP, two numbers of steps")] | None = None,
    resume: bool = False,
    mesh: tuple[arguments.Parts, arguments.Parts] | None = None,
    distributed: bool = False,
    wandb: bool = False,
    config: Annotated[Path, arguments.Input(bucket=True)] | None = None,
    json: bool = False,
) -> int:
    """Train an autoencoder on activations, and measure it.

    Follows the recipe of Gao et al. (2024). Writes sae/, report.json, config.json, checkpoints/ and TensorBoard event
    files. Rows are centred and scaled to unit mean square for training; the saved autoencoder takes unscaled rows. If
    interrupted, the same command, or --config OUT/config.json, resumes with bitwise identical results; on SIGTERM it
    saves and exits with 0. To extend a run, rerun it with more --steps; the schedule is then that of the longer run.

    With --model instead of --data, activations are computed during training and never written to disk. They are
    shuffled in windows of 65,536 rows unless --window is given, those in a bucket in windows of 256 MiB. --data takes
    addresses in buckets, gs://BUCKET/NAME and s3://BUCKET/NAME, --out those of gs://.

    With --target, or with --transcode and a model, it trains a transcoder, which reconstructs the rows of a target
    from those of the data: --transcode does so from mlp_in to mlp_out of a block, in place of its MLP.

    Example: jaxsae train --data x.npy --activation topk --k 32 --latents 4096 --out run

    Args:
        activation: relu, topk, abstopk, groupmax, batchtopk, jumprelu, gated, matryoshka or matchingpursuit; or
            alignedrelu, a ReLU whose encoder directions have product 1 with their atoms.
        latents: number of latents.
        out: directory for the results, on disk or in a bucket.
        data: files or directories of activations (rows, width), on disk or in a bucket.
        target: what a transcoder reconstructs, a file or directory for each of --data, row by row.
        model: instead of --data, a language model: smollm2, a GGUF file or a Hugging Face directory.
        layer: block of the model, from 0.
        site: resid_pre, hook_z, attn_out, resid_mid, mlp_in, mlp_out or resid_post of that block; or a hook that names
            its own, such as blocks.8.hook_mlp_out.
        transcode: with --model, reconstruct mlp_out of the block from its mlp_in.
        skip: add a skip connection to a transcoder.
        from_: an SAE to start from, of the same width, latents and activation: a run, one save of a run, or any format,
            on disk, in a bucket or on the hub (hf://organisation/repository/path).
        text: files for the model to read, as for jaxsae harvest; by default Python's standard library, four million
            tokens.
        column: of the text in JSON lines and Parquet; by default text, or with --chat messages.
        chat: the documents are conversations, of which the model's chat template makes text, as for jaxsae harvest.
        encoding: of plain text, unless a byte-order mark says another.
        add_bos: begin each context with the model's BOS, whatever its tokenizer does.
        tokens: number of tokens to read, rounded up to whole contexts; all by default.
        context: number of tokens in a context.
        window: rows that are shuffled together, one window after another; by default all --data on disk.
        reader_threads: that read --data ahead.
        skip_tokens: tokens whose rows of a harvest are left out: numbers, or bos, eos, pad and unk of its model.
        max_norm: leave out rows whose norm is more than so many times the median, such as 10.
        k: active latents per row; for batchtopk, matryoshka, jumprelu and matchingpursuit, on average over held-out
            rows.
        l1: weight of the L1 penalty (relu, gated, alignedrelu).
        batch: rows per step.
        accumulate: compute a batch in so many parts, which takes less memory and gives the same to rounding.
        moments: float32 or bfloat16, dtype of the optimiser's moments; bfloat16 takes half the memory.
        steps: number of steps; warns if they are more than ten passes over the data.
        learning_rate: by default from --activation, --latents and --steps, see jaxsae.train.learning_rate.
        no_auxk: train without AuxK, which revives idle latents.
        multi_topk: also reconstruct with 4k latents (topk).
        idle_after: rows without firing after which AuxK trains a latent; by default a fiftieth of all rows seen.
        heldout: number of last rows of the data to hold out for measurement.
        seed: of initialisation and shuffles.
        weights: proportions in which to mix several --data, by default those of their lengths; or several --text.
        save_every: seconds between saves.
        save_every_steps: steps between saves, besides.
        eval_every: steps between measurements on the held-out rows, which are logged.
        profile: START:STOP, the steps of which to write a trace for XProf or Perfetto, to profile/.
        resume: resume the run in --out; fail if there is none.
        mesh: how many ways to split the rows of a batch, and the latents; by default one device.
        distributed: run as one of several processes, found automatically on Cloud TPU, SLURM and Open MPI; elsewhere
            set JAX_COORDINATOR_ADDRESS (HOST:PORT of the first), JAX_NUM_PROCESSES and JAX_PROCESS_ID (from 0).
        wandb: also log to Weights & Biases (with WANDB_MODE=offline, to files).
        config: TOML or JSON file of options by these names, such as run/config.json; those of the command line win.
        json: print the report as one JSON object, or the number of steps if training was stopped.
    """
    given = dict(locals())
    from jaxsae.app.options import Options, validate

    options = Options(auxk=not no_auxk, **{name: given[name] for name in Options._fields if name != "auxk"})
    validate(options, transcoder=bool(target) or transcode)
    _require_source(given)
    logging.getLogger("absl").setLevel(logging.CRITICAL)  # orbax's errors are reported below
    how: dict[str, Any] = {name: given[name] for name in _PASSED_ON}
    how |= {"skip_tokens": token_numbers(skip_tokens, data)}
    with devices.spread(mesh, distributed=distributed) as first:
        return _train(given, options, how, first=first)


_PASSED_ON = ("data", "window", "reader_threads", "max_norm")
_PASSED_ON += ("save_every", "save_every_steps", "eval_every", "resume")
_OF_TEXT = ("tokens", "column", "chat", "encoding")


def _train(given: dict[str, Any], options, how: dict[str, Any], *, first: bool) -> int:
    """Train on files, or on what a model computes; the first process logs."""
    from jaxsae.app import logs

    out, profile, weights = given["out"], given["profile"], given["weights"] or None
    how |= {"start": given["from_"], "target": given["target"] or None}
    how["profile"] = None if profile is None else tuple(map(int, profile.split(":")))
    log = _recorded(given, options, logs.logs(out, options, wandb=given["wandb"])) if first else None
    if given["model"] is None:
        return _run(out, options, log, how | {"weights": weights}, given["json"])
    texts = {name: given[name] for name in _OF_TEXT} | {"weights": weights}
    places = TRANSCODED if given["transcode"] else (given["site"],)
    where = (given[name] for name in ("text", "context", "add_bos", "window"))
    return _run(out, options, log, how | live(given["model"], given["layer"], places, *where, **texts), given["json"])


def _require_source(given: dict[str, Any]) -> None:
    """Refuse data and a model, neither, and options of a model without one."""
    model = given["model"]
    if model is not None and (given["skip_tokens"] or given["max_norm"] is not None):
        raise InputError(
            "got --skip-tokens or --max-norm with --model, which are for --data; run jaxsae harvest first."
        )
    if bool(given["data"]) == (model is not None) or (model is None and given["layer"] is not None):
        raise InputError("pass --data, or --model and --layer.")
    if model is not None and given["target"]:
        raise InputError("got --target with --model; pass --transcode, which computes both.")
    if given["transcode"] and given["site"] != "resid_post":
        raise InputError("got --transcode and --site; leave out --site: a transcoder maps mlp_in to mlp_out.")
    usual = {"text": (), "tokens": None, "site": "resid_post", "add_bos": False, "column": None, "encoding": "utf-8"}
    usual |= {"chat": False, "transcode": False}
    names = [name for name, value in usual.items() if given[name] != value]
    if model is None and names:
        option = names[0].replace("_", "-")
        raise InputError(f"got --{option} without --model; pass the model that is to read it.")


@contextlib.contextmanager
def _recorded(given: dict[str, Any], options, log) -> Iterator[Any]:
    """The log, entered when training begins, after the options are written."""
    from jaxsae.app import config
    from jaxsae.app.options import resolved

    followed = resolved(options)
    derived = {"learning_rate": followed.learning_rate, "idle_after": followed.idle_after}
    config.write(given["out"] / "config.json", given, derived)
    with log as write:
        yield write


def _run(out, options, log, how: dict[str, Any], json: bool) -> int:
    """Train; the first process, which has the log, prints the result."""
    from jaxsae.app import runs
    from jaxsae.train import job

    try:
        with console.progress(options.steps, rows=options.batch, quiet=log is None) as update:
            how |= {"resumed": lambda step: update(f"resuming from step {step}", step, before=True)}
            report = runs.run(out, options=options, progress=update, warn=console.warn, log=log, **how)
    except job.Preempted as stopped:
        if log is not None:
            text = f"Stopped after {stopped.step} steps; the run is saved: the same command resumes."
            console.show({"stopped_after": stopped.step}, text, as_json=json)
        return 0 if stopped.signum == signal.SIGTERM else 130
    if log is None:
        return 0
    measured = report["heldout"]
    numbers = f"NMSE {console.number(measured['nmse'])}, L0 {measured['l0']:.1f}, dead {measured['dead']:.1%}"
    text = f"{options.heldout} held-out rows: {numbers} of {measured['dead_rows']:,} rows\n{runs.summary(report)}\n"
    text += f"Written: {shown(out / 'sae')}/, {shown(out / 'report.json')}"
    console.show(report, text, as_json=json)
    if report["skipped"]:
        skipped = f"{report['skipped']} batches were skipped, since their loss was not finite."
        console.warn(f"{skipped} {runs.describe_nonfinite(report)}")
    return 0
