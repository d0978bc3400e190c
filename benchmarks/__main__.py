"""Run a benchmark, print its table, and write it as JSON if asked to."""

import argparse
import json
import os
import platform
import subprocess
from importlib.metadata import version
from pathlib import Path

import jax

from benchmarks import refine


def main() -> None:
    """Parse the command line and run."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    command = commands.add_parser("refine", help="refits: rows a second, accuracy, and time beside the encoder's")
    command.add_argument("--size", choices=refine.SIZES, default="tiny")
    command.add_argument("--json", type=Path, metavar="OUT", help="write the table here too")
    args = parser.parse_args()

    rows = refine.run(args.size)
    columns = list(rows[0])
    print(" | ".join(columns))
    for row in rows:
        print(" | ".join(f"{value:.3g}" if isinstance(value, float) else str(value) for value in row.values()))
    if args.json:
        args.json.write_text(json.dumps({"rows": rows, **_environment()}, indent=1) + "\n")


def _environment() -> dict[str, str]:
    commit = subprocess.run(["git", "rev-parse", "HEAD"], capture_output=True, text=True, check=False).stdout.strip()
    return {
        "device": f"{jax.devices()[0].device_kind} x {jax.device_count()}",
        "cores": str(os.cpu_count()),
        "jax": jax.__version__,
        "jaxsae": version("jaxsae"),
        "python": platform.python_version(),
        "commit": commit,
    }


if __name__ == "__main__":
    main()
