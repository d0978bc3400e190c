"""The kernels and their reference, relative to one read of the atoms; the encoder and top-k at the same shapes.

`tune` times the block sizes of each kernel and keeps the fastest in `kernels/blocks.json`, with its speed over
the reference's. On a machine without an accelerator it writes the default block sizes, and no speed.
"""

import itertools
import json
import statistics
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks.clock import say, timings
from jaxsae import SparseCode, codes, kernels
from jaxsae.least_squares.kernels import choice, tuning


class Case(NamedTuple):
    """A shape to measure."""

    d: int
    m: int
    k: int
    B: int
    dtype: str = "float32"


SIZES = {
    "tiny": [Case(64, 1024, 8, 256)],
    "small": [Case(768, 16384, 32, 1024)],
    "paper": [
        Case(768, 131072, 32, 16384),
        Case(2304, 65536, 64, 8192),
        Case(4096, 131072, 128, 4096),
        Case(2304, 65536, 64, 8192, "bfloat16"),
    ],
}
OPS = ("gather_gram", "decode", "refit_fused", "scatter_add")
# Candidates, the default first.
CANDIDATES: dict[tuple[str, str], dict[str, list[int]]] = {
    ("tpu", "gather_gram"): {"samples": [32, 8, 16, 64]},
    ("tpu", "decode"): {"samples": [128, 32, 64, 256]},
    ("tpu", "refit_fused"): {},
    ("tpu", "scatter_add"): {"entries": [256, 128, 512, 1024]},
    ("gpu", "gather_gram"): {"block": [32, 64, 128], "warps": [4, 8], "stages": [3, 2, 4]},
    ("gpu", "decode"): {"block": [128, 256, 512], "slots": [32, 16, 64], "warps": [4, 2, 8]},
    ("gpu", "refit_fused"): {"block": [32, 64, 128], "warps": [4, 8, 2], "stages": [3, 2, 4]},
    ("gpu", "scatter_add"): {"block": [256, 512, 1024], "warps": [4, 2, 8]},
}
COLUMNS = (
    *("op", "implementation", "d", "m", "k", "rows", "dtype", "seconds", "rows_per_s", "compile_s"),
    *("bytes_per_s", "of_copy_bandwidth", "flops_per_s", "of_matmul_peak", "worst_kkt", "recall", "note"),
)


class Data(NamedTuple):
    """Arrays of a case."""

    D: jax.Array
    indices: jax.Array
    y: jax.Array
    z0: jax.Array


def data(case: Case, seed: int = 0) -> Data:
    """Random atoms and supports; targets that the supports explain, with noise."""
    D = jax.random.normal(jax.random.key(seed), (case.m, case.d)) / case.d**0.5
    return rows(case, D.astype(case.dtype), seed)


def rows(case: Case, D: jax.Array, seed: int) -> Data:
    """Other supports and targets for the same atoms."""
    keys = jax.random.split(jax.random.key(seed), 3)
    indices = jax.random.randint(keys[0], (case.B, case.k), 0, case.m)
    z = jax.random.exponential(keys[1], (case.B, case.k))
    y = codes.decode(D, SparseCode(z, indices, case.m), implementation="xla")
    return Data(D, indices, y + 0.1 * jax.random.normal(keys[2], y.shape), 0.8 * z)


def operation(op: str, case: Case, implementation: str) -> Callable[..., Any]:
    """An operation as a function of `Data`."""

    def call(x: Data):
        code = SparseCode(x.z0, x.indices, case.m)
        if op == "gather_gram":
            return kernels.gather_gram(x.D, x.indices, x.y, implementation=implementation)
        if op == "decode":
            return codes.decode(x.D, code, implementation=implementation)
        if op == "refit_fused":
            return kernels.refit_fused(x.D, x.indices, x.y, x.z0, implementation=implementation)
        return codes.scatter_add(code, x.y, implementation=implementation)

    return call


def cost(op: str, case: Case) -> tuple[int, int]:
    """Bytes of one gather of the atoms (of one write of them, for the scatter), and operations, of all rows."""
    bytes_ = case.B * case.k * case.d * jnp.dtype(case.dtype).itemsize
    flops = case.B * case.k * case.d * 2
    return bytes_, flops * (case.k + 1) if op in ("gather_gram", "refit_fused") else flops


def run(size: str, *, bandwidth: float, peak: float) -> Iterator[dict[str, Any]]:
    """Rows of the table, case by case."""
    for case in SIZES[size]:
        x = data(case)
        for op in OPS:
            say(f"{op} {case}")
            yield from _compare(op, case, x, bandwidth, peak)
        yield from _selection(case, x)


def _row(case: Case, **columns: Any) -> dict[str, Any]:
    shape = {"d": case.d, "m": case.m, "k": case.k, "rows": case.B, "dtype": case.dtype}
    return {name: columns.get(name, shape.get(name)) for name in COLUMNS}


def _compiled(f: Callable[..., Any], *arguments: Any) -> tuple[Callable[[], Any], float]:
    """A program with its arguments, and the seconds that it took to compile."""
    start = time.perf_counter()
    program = jax.jit(f).lower(*arguments).compile()
    return lambda: program(*arguments), time.perf_counter() - start


def _compare(op: str, case: Case, x: Data, bandwidth: float, peak: float) -> Iterator[dict[str, Any]]:
    calls, compile_s, names = [], [], []
    for name in ("xla", "pallas"):
        try:
            call, seconds = _compiled(operation(op, case, name), x)
        except NotImplementedError as error:
            yield _row(case, op=op, implementation=name, note=str(error))
            continue
        names.append(name)
        calls.append(call)
        compile_s.append(seconds)
    bytes_, flops = cost(op, case)
    for name, call, compiling, rounds in zip(names, calls, compile_s, timings(calls), strict=True):
        seconds = statistics.median(rounds)
        kkt = float(jnp.nanmax(call()[1])) if op == "refit_fused" else None
        yield _row(
            case, op=op, implementation=name, seconds=seconds, rows_per_s=case.B / seconds, compile_s=compiling,
            bytes_per_s=bytes_ / seconds, of_copy_bandwidth=bytes_ / seconds / bandwidth,
            flops_per_s=flops / seconds, of_matmul_peak=flops / seconds / peak, worst_kkt=kkt,
        )  # fmt: skip


def _selection(case: Case, x: Data) -> Iterator[dict[str, Any]]:
    """The encoder's product, and ways to select its `k` largest, which precede every refit."""
    rows = min(case.B, 1024)  # pre-activations of more rows may not fit
    case = case._replace(B=rows)
    y, D = x.y[:rows].astype(case.dtype), x.D
    pre = jax.jit(lambda y, D: jnp.matmul(y, D.T, preferred_element_type=jnp.float32))(y, D)
    ways: dict[str, tuple[Callable[..., Any], tuple]] = {
        "encode": (lambda y, D: codes.top_k(jnp.matmul(y, D.T, preferred_element_type=jnp.float32), case.k), (y, D)),
        "top_k": (lambda pre: jax.lax.top_k(pre, case.k), (pre,)),
        "top_k, two stages": (lambda pre: codes.top_k(pre, case.k), (pre,)),
        "approx_max_k": (lambda pre: jax.lax.approx_max_k(pre, case.k), (pre,)),
    }
    compiled = [_compiled(f, *arguments) for f, arguments in ways.values()]
    wanted = np.asarray(compiled[1][0]()[1])
    measured = timings([call for call, _ in compiled])
    for name, (call, compiling), rounds in zip(ways, compiled, measured, strict=True):
        found = np.asarray(call()[1])
        shared = [len(np.intersect1d(a, b)) for a, b in zip(found, wanted, strict=True)]
        seconds = statistics.median(rounds)
        recall = None if name == "encode" else float(np.mean(shared)) / case.k
        yield _row(
            case, op=name, implementation="xla", seconds=seconds, rows_per_s=rows / seconds, compile_s=compiling,
            recall=recall,
        )  # fmt: skip


def tune(size: str) -> list[dict[str, Any]]:
    """Write the table of block sizes: measured ones for this machine's accelerator, or the defaults."""
    platform, device = choice.default_device()
    kept = [row for row in tuning.table() if row["device"] not in (None, device)]
    if platform is None:
        rows = [entry(target, None, op, case) for (target, op) in CANDIDATES for case in SIZES[size]]
    else:
        kept += [row for row in tuning.table() if row["device"] is None and row["platform"] != platform]
        rows = [_tuned(platform, device, op, case) for case in SIZES[size] for op in OPS]
    write_table(tuning.TABLE, kept + rows)
    return tuning.table()


def write_table(path: Path, rows: list[dict[str, Any]]) -> None:
    """Write a table of block sizes, a line a row in a fixed order, and read it anew when it is next asked for."""
    rows = sorted(rows, key=lambda row: json.dumps(row, sort_keys=True))
    path.write_text("[\n" + ",\n".join(map(json.dumps, rows)) + "\n]\n")
    tuning.table.cache_clear()


def one_at_a_time(platform: str, op: str) -> Iterator[dict[str, int]]:
    """The untuned block sizes, and all that differ from them in one: a coarse search."""
    names = CANDIDATES[platform, op]
    first = {name: values[0] for name, values in names.items()}
    yield first
    yield from (first | {name: value} for name, values in names.items() for value in values[1:])


def entry(platform: str, device: str | None, op: str, case: Case, **found: Any) -> dict[str, Any]:
    """A row of the table of block sizes."""
    first = {name: values[0] for name, values in CANDIDATES[platform, op].items()}
    shape = {"d": case.d, "k": case.k, "dtype": case.dtype}
    return {"op": op, "platform": platform, "device": device, **shape, "options": first, "speedup": None} | found


def _tuned(platform: str, device: str, op: str, case: Case) -> dict[str, Any]:
    """The fastest block sizes; those that do not compile are skipped and logged."""
    x, names = data(case), CANDIDATES[platform, op]
    calls, chosen = [_compiled(operation(op, case, "xla"), x)[0]], []
    for values in itertools.product(*names.values()):
        options = dict(zip(names, values, strict=True))
        try:
            with tuning.forced(options):
                jax.clear_caches()
                calls.append(_compiled(operation(op, case, "pallas"), x)[0])
        except (NotImplementedError, jax.errors.JaxRuntimeError) as error:
            say(f"{op} {case} {options}: {str(error).splitlines()[0]}")
            continue
        chosen.append(options)
    if not chosen:
        return entry(platform, device, op, case)
    reference, *seconds = map(statistics.median, timings(calls))
    best = min(range(len(chosen)), key=seconds.__getitem__)
    say(f"{op} {case}: {chosen[best]}, {reference / seconds[best]:.2f} times the reference")
    return entry(platform, device, op, case, options=chosen[best], speedup=reference / seconds[best])


def markdown(report: dict[str, Any], machine: str) -> list[str]:
    """A table of all rows, in the order of measurement."""
    head = ("", "by", "shape", "rows/s", "GB/s of one gather", "of copies", "of matmul", "worst KKT", "recall", "")
    lines = ["| " + " | ".join(head) + " |", "|---|---|---|" + "--:|" * (len(head) - 4) + "---|"]
    for row in report["rows"]:
        shape = f"d {row['d']:,}, m {row['m']:,}, k {row['k']}, {row['rows']:,} rows, {row['dtype']}"
        forms = {
            "rows_per_s": "{:,.0f}", "bytes_per_s": "{:.2f}", "of_copy_bandwidth": "{:.1%}",
            "of_matmul_peak": "{:.1%}", "worst_kkt": "{:.1e}", "recall": "{:.3f}",
        }  # fmt: skip
        shown = {name: row[name] for name in forms}
        if shown["bytes_per_s"] is not None:
            shown["bytes_per_s"] /= 1e9
        cells = ["" if shown[name] is None else form.format(shown[name]) for name, form in forms.items()]
        lines.append("| " + " | ".join([row["op"], row["implementation"], shape, *cells, row["note"] or ""]) + " |")
    copies, peak = report["copy_bandwidth"]["bytes_per_s"] / 1e9, report["matmul_peak"] / 1e9
    return [f"{machine}; copies run at {copies:.1f} GB/s, float32 products at {peak:,.0f} GFLOP/s.", "\n".join(lines)]
