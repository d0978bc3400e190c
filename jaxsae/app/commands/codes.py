"""The commands that encode rows: measured, or refined."""

from pathlib import Path
from typing import Annotated

from jaxsae._core import arguments
from jaxsae._core.arguments import Count, InputPath, OutputFile
from jaxsae._core.files import InputError
from jaxsae.app import console
from jaxsae.app.commands.types import Autoencoder


def evaluate(*, sae: Autoencoder, data: InputPath, json: bool = False) -> int:
    """Measure an autoencoder on activations.

    Example: jaxsae eval --sae run --data x.npy

    Args:
        sae: a training run, or an SAE of any format, on disk or on the hub (hf://organisation/repository/path).
        data: .npy or .npz file of activations (rows, width).
        json: print the measurements as one JSON object.
    """
    from jaxsae import data as data_module
    from jaxsae.app import evaluate
    from jaxsae.formats import pretrained

    measured = evaluate.evaluate(pretrained.load(sae), data_module.open_rows(data))
    shown = {name: measured[name] for name in ("nmse", "explained_variance", "l0", "dead")}
    lines = [f"{name:18}  {console.number(value)}" for name, value in shown.items()]
    lines[-1] += f" of {measured['dead_rows']:,} rows"
    largest = ", ".join(f"{n}: {console.number(value)}" for n, value in measured["nmse_at"].items())
    console.show(measured, "\n".join([*lines, f"NMSE with the largest latents alone: {largest}"]), as_json=json)
    if measured["nonfinite"]:
        console.warn(f"{measured['nonfinite']} of {measured['rows']} rows hold NaN or Inf and are left out.")
    return 0


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

    Of files of any size. Writes indices, values, kkt, status and num_dropped, a row each for a row of the data.

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
            model, rows, out, solver, capacity=capacity, progress=lambda n: advance("refining", n)
        )
    written = f"{summary.rows} rows of {summary.capacity} slots, worst KKT {summary.worst_kkt:.1e}"
    shown = summary._asdict() | {"out": out, "shrinkage": summary.shrinkage.numbers()}
    console.show(shown, f"{summary.shrinkage}\nWritten: {out}, {written}", as_json=json)
    warnings = {
        f"{summary.overflowed} rows have more active latents than slots; raise --capacity.": summary.overflowed,
        f"{summary.nonfinite} rows hold NaN or Inf and are left as encoded (status 2).": summary.nonfinite,
        f"{summary.unconverged} rows stopped at --max-steps (status 1).": summary.unconverged,
    }
    for text, count in warnings.items():
        if count:
            console.warn(text)
    return 1 if strict and any(warnings.values()) else 0
