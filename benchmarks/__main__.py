"""Benchmarks of jaxsae: measure, then make tables and figures of what was measured."""

import argparse
import json
import os
import platform
import re
import subprocess
from collections.abc import Callable, Iterable
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import jax

from benchmarks import (
    accelerator,
    bucket,
    cases,
    clock,
    first_call,
    guide,
    harvest,
    jobs,
    judge,
    kernels,
    ksvd,
    lasso,
    load,
    moments,
    nnls,
    pictures,
    plot,
    pursuit,
    quality,
    rates,
    refine,
    selectors,
    table,
    train,
    trainers,
)
from jaxsae._core import arguments
from jaxsae.app import study

ROOT = Path(__file__).parents[1]
_PEERS = ("scipy", "jaxnnls", "jaxopt", "optax", "overcomplete", "torch", "eai-sparsify", "sae-lens")
_PEERS += ("dictionary-learning", "scikit-learn", "spams-bin", "dictlearn", "ksvd", "celer", "skglm", "qpax")


def main() -> None:
    """Parse the command line and run."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    command = commands.add_parser("refine", help="refits: rows a second, accuracy, and time relative to the encoder")
    command.add_argument("--size", choices=cases.SIZES, default="tiny")
    command.add_argument("--peers", action="store_true", help="other libraries' solvers too; pip install '.[peers]'")
    command.add_argument("--real", action="store_true", help="a trained autoencoder too")
    command.add_argument("--json", type=Path, metavar="OUT", help="write what was measured here, case by case")
    command = commands.add_parser("first-call", help="the first call of functions, with compilation, and the next ones")
    command.add_argument("--size", choices=first_call.SIZES, default="tiny")
    command.add_argument("--json", type=Path, metavar="OUT", help="write what was measured here")
    command = commands.add_parser("train", help="training steps of a TopK autoencoder: time and memory")
    command.add_argument("--size", choices=train.SIZES, default="tiny")
    command.add_argument("--peers", action="store_true", help="other libraries' steps too; pip install '.[peers]'")
    command.add_argument("--json", type=Path, metavar="OUT", help="write what was measured here")
    command = commands.add_parser("rates", help="learning rates by family, at one L0")
    command.add_argument("--data", type=Path, metavar="FILE", help="activations, instead of patches of photographs")
    command.add_argument("--families", nargs="+", default=list(study.ALL), choices=arguments.ACTIVATION.names)
    command.add_argument("--l0", type=int, default=16)
    command.add_argument("--steps", type=int, nargs="+", default=[2000])
    command.add_argument("--rates", type=float, nargs="+", default=[1e-3, 2e-3, 4e-3, 8e-3])
    command.add_argument("--latents", type=int, default=512)
    command.add_argument("--batch", type=int, default=256)
    command.add_argument("--json", type=Path, metavar="OUT", help="write what was measured here")
    command = commands.add_parser("moments", help="Adam's moments in bfloat16: loss curves beside float32's")
    command.add_argument("--families", nargs="+", default=list(moments.FAMILIES), choices=list(moments.FAMILIES))
    command.add_argument("--steps", type=int, default=1000)
    command.add_argument("--latents", type=int, default=512)
    command.add_argument("--batch", type=int, default=256)
    command.add_argument("--seeds", type=int, default=2)
    command.add_argument("--json", type=Path, metavar="OUT", help="write what was measured here")
    command = commands.add_parser(
        "quality", help="autoencoders of all trainers at one L0: error, dead latents, seconds"
    )
    command.add_argument("--size", choices=quality.SIZES, default="tiny")
    command.add_argument("--peers", action="store_true", help="other libraries' trainers too; pip install '.[peers]'")
    command.add_argument("--families", nargs="+", default=list(trainers.COMPARED), choices=trainers.COMPARED)
    command.add_argument(
        "--data", type=Path, metavar="DIR", default=Path("jaxsae-quality"), help="keeps a model's activations"
    )
    command.add_argument("--json", type=Path, metavar="OUT", help="write what was measured; add what is not there")
    command = commands.add_parser("harvest", help="a harvest and the forward pass alone; pip install '.[lm]'")
    command.add_argument("--model", default="smollm2")
    command.add_argument("--layer", type=int, default=8)
    command.add_argument("--context", type=int, default=256)
    command.add_argument("--batch", type=int, default=8)
    command.add_argument("--json", type=Path, metavar="OUT", help="write what was measured here")
    command = commands.add_parser("pursuit", help="OMP: milliseconds a row, and its objective")
    command.add_argument("--size", choices=pursuit.SIZES, default="tiny")
    command.add_argument("--peers", action="store_true", help="other libraries' OMP too; pip install '.[peers]'")
    command.add_argument("--json", type=Path, metavar="OUT", help="write what was measured here")
    command = commands.add_parser(
        "selectors", help="all selectors with equal numbers of atoms: error, and milliseconds a row"
    )
    command.add_argument("--size", choices=selectors.SIZES, default="tiny")
    command.add_argument("--json", type=Path, metavar="OUT", help="write what was measured here")
    command = commands.add_parser("transitions", help="where each pursuit recovers codes exactly")
    command.add_argument("--png", type=Path, metavar="OUT", help="write a figure here; needs matplotlib")
    command.add_argument("--json", type=Path, metavar="OUT", help="write what was measured here")
    command = commands.add_parser("pictures", help="photographs denoised and inpainted; pip install '.[peers]'")
    command.add_argument("--peers", action="store_true", help="scikit-learn's pipeline too, minutes a photograph")
    command.add_argument("--out", type=Path, metavar="DIR", help="write the pictures, before and after")
    command.add_argument("--json", type=Path, metavar="OUT", help="write what was measured here")
    command = commands.add_parser("ksvd", help="recovery of dictionaries from noisy signals")
    command.add_argument("--size", choices=ksvd.SIZES, default="tiny")
    command.add_argument("--peers", action="store_true", help="other libraries too; pip install '.[peers]'")
    command.add_argument("--json", type=Path, metavar="OUT", help="write what was measured here")
    command = commands.add_parser("lasso", help="paths of the lasso, and relaxed regressions tuned by cross-validation")
    command.add_argument("--size", choices=lasso.SIZES, default="tiny")
    command.add_argument("--peers", action="store_true", help="other libraries too; pip install '.[peers]'")
    command.add_argument("--json", type=Path, metavar="OUT", help="write what was measured here")
    command = commands.add_parser("nnls", help="large, dense non-negative least squares, in float64 and float32")
    command.add_argument("--size", choices=nnls.SIZES, default="tiny")
    command.add_argument("--peers", action="store_true", help="other libraries too; pip install '.[peers]'")
    command.add_argument("--json", type=Path, metavar="OUT", help="write what was measured here")
    command = commands.add_parser("load", help="loading a large SAE: time and memory relative to its file")
    command.add_argument("--size", choices=load.SIZES, default="tiny")
    command.add_argument("--json", type=Path, metavar="OUT", help="write what was measured here")
    command = commands.add_parser("bucket", help="rows read from a bucket on this machine; pip install '.[test-cloud]'")
    command.add_argument("--size", choices=bucket.SIZES, default="tiny")
    command.add_argument("--json", type=Path, metavar="OUT", help="write what was measured here")
    command = commands.add_parser("jobs", help="training jobs: the cost of saving and loading, and recovery from kills")
    command.add_argument("--size", choices=jobs.SIZES, default="tiny")
    command.add_argument("--kills", type=int, default=0, metavar="N", help="kill a job N times; pip install '.[study]'")
    command.add_argument("--json", type=Path, metavar="OUT", help="write what was measured here")
    command = commands.add_parser("kernels", help="gathers, Gram matrices, refits and top-k: kernels and XLA")
    command.add_argument("--size", choices=kernels.SIZES, default="tiny")
    command.add_argument(
        "--tune", action="store_true", help="first fill jaxsae/least_squares/kernels/blocks.json for this device"
    )
    command.add_argument("--json", type=Path, metavar="OUT", help="write what was measured here")
    command = commands.add_parser("accelerator", help="what can be measured in a few minutes on an accelerator")
    command.add_argument("--size", choices=accelerator.SIZES, default="full")
    command.add_argument(
        "--minutes", type=float, default=8.0, help="time limit; the most valuable measurements come first"
    )
    command.add_argument("--out", type=Path, required=True, metavar="DIR", help="for accelerator.json and blocks.json")
    command = commands.add_parser("table", help="measurements as markdown")
    command.add_argument("files", type=Path, nargs="+", metavar="FILE")
    command.add_argument("--readme", action="store_true", help="insert them into benchmarks/README.md")
    commands.add_parser("guide", help="update the tables of pages")
    command = commands.add_parser("plot", help="speed against accuracy; needs matplotlib")
    command.add_argument("file", type=Path, metavar="FILE")
    command.add_argument("out", type=Path, metavar="PNG")
    args = parser.parse_args()

    if args.command == "refine":
        _refine(args)
    elif args.command == "train":
        rows = list(train.run(args.size, with_peers=args.peers))
        _report(args, size=args.size, rows=rows, sweep=train.sweep(args.size))
    elif args.command == "first-call":
        _report(args, size=args.size, rows=list(first_call.run(args.size)))
    elif args.command == "rates":
        _rates(args)
    elif args.command == "moments":
        options = {name: getattr(args, name) for name in ("families", "latents", "batch", "steps", "seeds")}
        _grow(args, lambda there: moments.run(**options))
    elif args.command == "quality":
        _quality(args)
    elif args.command == "harvest":
        row = harvest.run(args.model, layer=args.layer, context=args.context, batch=args.batch)
        _report(args, row=row)
    elif args.command == "pursuit":
        _report(args, size=args.size, rows=list(pursuit.run(args.size, with_peers=args.peers)))
    elif args.command == "selectors":
        _report(args, size=args.size, rows=selectors.run(args.size))
    elif args.command == "transitions":
        _transitions(args)
    elif args.command == "ksvd":
        _report(args, size=args.size, rows=list(ksvd.run(args.size, with_peers=args.peers)))
    elif args.command == "pictures":
        _pictures(args)
    elif args.command == "lasso":
        _report(args, size=args.size, **lasso.run(args.size, with_peers=args.peers))
    elif args.command == "nnls":
        _report(args, size=args.size, rows=nnls.run(args.size, with_peers=args.peers))
    elif args.command == "load":
        _report(args, size=args.size, rows=load.run(args.size))
    elif args.command == "bucket":
        _report(args, size=args.size, **bucket.run(args.size))
    elif args.command == "jobs":
        survived = {"survived": jobs.survive(args.kills)} if args.kills else {}
        _report(args, size=args.size, costs=jobs.costs(args.size), **survived)
    elif args.command == "kernels":
        _kernels(args)
    elif args.command == "accelerator":
        _accelerator(args)
    elif args.command == "guide":
        for page in guide.PAGES:
            page.write_text(guide.insert(page.read_text()))
    elif args.command == "plot":
        plot.speed_against_accuracy(json.loads(args.file.read_text()), args.out)
    else:
        reports = [json.loads(path.read_text()) for path in args.files]
        if args.readme:
            readme = ROOT / "benchmarks/README.md"
            readme.write_text(table.insert(readme.read_text(), reports))
        else:
            print("\n\n".join(map(table.markdown, reports)))


def _refine(args: argparse.Namespace) -> None:
    report: dict[str, Any] = {
        **_environment("refine"),
        "size": args.size,
        "gate": {"worst_kkt": judge.KKT, "added_nmse": judge.ADDED_NMSE},
        "cases": [],
        "rows": [],
    }
    for case, rows in refine.run(args.size, with_peers=args.peers, real=args.real):
        report["cases"].append(case)
        report["rows"] += rows
        _write(args.json, report)  # after each case: an interruption keeps finished ones
    print(table.markdown(report))


def _report(args: argparse.Namespace, **measured: Any) -> None:
    """Write and print a report."""
    report = {**_environment(args.command), **measured}
    _write(args.json, report)
    print(table.markdown(report))


def _rates(args: argparse.Namespace) -> None:
    options = {name: getattr(args, name) for name in ("families", "l0", "latents", "batch", "steps", "rates")}
    _grow(args, lambda there: rates.run(args.data, **options))


def _quality(args: argparse.Namespace) -> None:
    options = {"with_peers": args.peers, "families": args.families, "folder": args.data}
    _grow(args, lambda there: quality.run(args.size, there=there, **options), size=args.size)


def _grow(args: argparse.Namespace, measure: Callable[[list[dict[str, Any]]], Iterable[dict]], **about: Any) -> None:
    """Add rows to those in the file, if there is one: of other data, say, or of an interrupted run."""
    before = json.loads(args.json.read_text()) if args.json and args.json.exists() else {"rows": [], **about}
    if any(before.get(name) != value for name, value in about.items()):
        raise SystemExit(f"{args.json}: was measured with other options than {about}; choose another --json.")
    report: dict[str, Any] = {**_environment(args.command), **about, "rows": before["rows"]}
    for row in measure(list(before["rows"])):
        report["rows"].append(row)
        _write(args.json, report)  # after each: an interruption keeps finished ones
    print(table.markdown(report))


def _transitions(args: argparse.Namespace) -> None:
    report: dict[str, Any] = {**_environment("transitions"), "trials": pursuit.TRIALS, "m": pursuit.ATOMS, "points": []}
    for point in pursuit.transitions():
        report["points"].append(point)
        _write(args.json, report)  # after each: an interruption keeps finished ones
    if args.png:
        pursuit.plot_transitions(report["points"], args.png)
    print(table.markdown(report))


def _pictures(args: argparse.Namespace) -> None:
    report = _environment("pictures")
    for part in pictures.run(with_peers=args.peers, out=args.out):
        report |= part
        _write(args.json, report)  # after each part: an interruption keeps finished ones
    print(table.markdown(report))


def _kernels(args: argparse.Namespace) -> None:
    if args.tune:
        kernels.tune(args.size)
    bandwidth, peak = clock.copy_bandwidth(), clock.matmul_peak()
    report: dict[str, Any] = {
        **_environment("kernels"),
        "copy_bandwidth": {"bytes_per_s": bandwidth, "counted": "bytes read and bytes written"},
        "matmul_peak": peak,
        "size": args.size,
        "rows": [],
    }
    for row in kernels.run(args.size, bandwidth=bandwidth, peak=peak):
        report["rows"].append(row)
        _write(args.json, report)  # after each: an interruption keeps finished ones
    print(table.markdown(report))


def _accelerator(args: argparse.Namespace) -> None:
    report: dict[str, Any] = {**_environment("accelerator"), "size": args.size, "minutes": args.minutes, "rows": []}
    for row in accelerator.run(args.size, args.minutes, args.out):
        report["rows"].append(row)
        _write(args.out / "accelerator.json", report)  # after each: one that is cut off leaves what is finished
    print(table.markdown(report))
    if accelerator.wrong(report["rows"]):
        raise SystemExit(1)


def _write(out: Path | None, report: dict[str, Any]) -> None:
    if out is not None:
        out.parent.mkdir(parents=True, exist_ok=True)
        out.write_text(json.dumps(report, indent=1, allow_nan=False) + "\n")


def _environment(benchmark: str) -> dict[str, Any]:
    return {
        "benchmark": benchmark,
        "device": _device(),
        "cores": os.cpu_count(),
        "jax": jax.__version__,
        "python": platform.python_version(),
        "commit": _commit(),
        "peers": {name: _version(name) for name in _PEERS},
    }


def _device() -> str:
    kind = jax.devices()[0].device_kind
    information = Path("/proc/cpuinfo")
    if kind == "cpu" and information.exists():  # JAX does not name the CPU's model
        models = re.findall(r"model name\s*: (.*)", information.read_text())
        kind = models[0] if models else kind
    return kind if jax.device_count() == 1 else f"{kind} x {jax.device_count()}"


def _version(name: str) -> str | None:
    try:
        return version(name)
    except PackageNotFoundError:
        return None


def _commit() -> str:
    """The commit that is checked out, `-dirty` if files differ from it; git may be missing."""
    describe = ["git", "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"]
    try:
        return subprocess.run(describe, cwd=ROOT, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return "unknown"


if __name__ == "__main__":
    main()
