"""The tables of benchmarks/README.md, made from the JSON of benchmark runs."""

from typing import Any

from benchmarks import accelerator, bucket, kernels, lasso, moments, quality
from benchmarks.pursuit import half_point
from jaxsae.app.study import MANY_DEAD

END = "<!-- end -->"
_HEAD = ("solver", "rows", "rows/s", "quartiles", "compile s", "worst KKT", "99.9% KKT", "added NMSE", "scratch MiB")
_HEAD += ("time / floor", "time / encoder", "")


def markdown(report: dict[str, Any]) -> str:
    """One run as GitHub markdown: its machine, then its tables."""
    commit, *dirty = report["commit"].split("-")
    commit = "-".join([commit[:10], *dirty])
    machine = f"{report['device']}, {report['cores']} cores, jax {report['jax']}, commit `{commit}`"
    return "\n\n".join([*_TABLES[report["benchmark"]](report, machine)])


def _refine(report: dict[str, Any], machine: str) -> list[str]:
    """A table for each case, the fastest first."""
    parts = [f"{machine}."]
    for case in report["cases"]:
        rows = [row for row in report["rows"] if row["case"] == case["case"]]
        rows.sort(key=lambda row: -(row["rows_per_s"] or 0))
        lines = ["| " + " | ".join(_HEAD) + " |", "|---|" + "--:|" * (len(_HEAD) - 2) + "---|"]
        lines += ["| " + " | ".join(_cells(row)) + " |" for row in rows]
        parts += [_caption(case), "\n".join(lines)]
    return parts


def _first_call(report: dict[str, Any], machine: str) -> list[str]:
    """A line for each function."""
    head = ("function", "processor s", "wall s", "next call ms", "programs", "of the next call", "of other rows")
    lines = ["| " + " | ".join(head) + " |", "|---|" + "--:|" * (len(head) - 1)]
    for row in report["rows"]:
        seconds = f"{row['processor_s']:.1f} | {row['wall_s']:.1f} | {1000 * row['next_call_s']:.0f}"
        counts = " | ".join(str(row[name]) for name in ("programs", "programs_next", "programs_other"))
        lines.append(f"| `{row['function']}` | {seconds} | {counts} |")
    return [f"{machine}.", "\n".join(lines)]


def _nnls(report: dict[str, Any], machine: str) -> list[str]:
    """A table for each dtype: a line for each case and solver, with ratios to our default."""
    parts = [f"{machine}."]
    for dtype in dict.fromkeys(row["dtype"] for row in report["rows"]):
        parts += [f"In {dtype}:", _nnls_in([row for row in report["rows"] if row["dtype"] == dtype])]
    return parts


def _nnls_in(rows: list[dict[str, Any]]) -> str:
    head = ("case", "condition", "solver", "steps", "ms", "time / ours", "excess", "gradient", "compile s")
    lines = ["| " + " | ".join(head) + " |", "|---|--:|---|" + "--:|" * 3 + "--:|--:|--:|"]
    for row in rows:
        about = f"| {row['case']} | {row['condition']:.0e} | {row['solver']} |"
        if "note" in row:
            lines.append(f"{about} {row['note']} | | | | | |")
            continue
        ours = next(r["ms"] for r in rows if r["case"] == row["case"] and r["solver"] == "jaxsae, default")
        gradient = "finite" if row["gradient_finite"] else "NaN"
        numbers = f"{row['steps']} | {row['ms']:.3g} | {row['ms'] / ours:.2f} | {row['excess']:.0e} | {gradient}"
        lines.append(f"{about} {numbers} | {row['compile_s']:.1f} |")
    return "\n".join(lines)


def _train(report: dict[str, Any], machine: str) -> list[str]:
    """Steps, the fastest first, with ratios to our own; then the sweep."""
    rows = sorted(report["rows"], key=lambda row: row["seconds"] or float("inf"))
    (ours,) = (row["seconds"] for row in rows if row["step"] == "jaxsae")
    lines = ["| step | ms | quartiles | time / ours | NMSE | MiB |", "|---|--:|--:|--:|--:|--:|"]
    for row in rows:
        if row["seconds"] is None:
            lines.append(f"| {row['step']} | {row['note']} | | | | |")
            continue
        low, high = (f"{1000 * value:.0f}" for value in row["quartiles"])
        memory = "" if row["bytes"] is None else f"{row['bytes'] / 2**20:.0f}"
        lines.append(
            f"| {row['step']} | {1000 * row['seconds']:.0f} | {low} to {high} | {row['seconds'] / ours:.2f} | "
            f"{row['nmse']:.5f} | {memory} |"
        )
    sweep = report["sweep"]
    return [
        f"{machine}; {_sizes(rows[0]['case'])}.",
        "\n".join(lines),
        f"A sweep of {sweep['members']} ReLU members ({_sizes(sweep['case'])}): {1000 * sweep['seconds']:.0f} ms a "
        f"step of all, {sweep['seconds'] / sweep['seconds_in_turn']:.2f} of the time of as many trainings in turn, "
        f"{sweep['compile_s']:.1f} s to compile; losses of the first {sweep['steps']} steps differ by "
        f"{sweep['difference']:.0e} at most, relatively.",
    ]


def _sizes(case: dict[str, int]) -> str:
    return ", ".join(f"{name} {value:,}" for name, value in case.items())


def _rates(report: dict[str, Any], machine: str) -> list[str]:
    """The NMSE of each rate, with the dead latents where they are many, and the best one that has few in bold."""
    rates = sorted({row["rate"] for row in report["rows"]})
    head = ("data", "latents", "L0", "steps", "family", *(f"{rate:g}" for rate in rates), "default")
    lines = ["| " + " | ".join(head) + " |", "|---|--:|--:|--:|---|" + "--:|" * (len(rates) + 1)]
    keys = ("data", "latents", "l0_target", "steps", "family")
    for group in dict.fromkeys(tuple(row[key] for key in keys) for row in report["rows"]):
        rows = {row["rate"]: row for row in report["rows"] if tuple(row[key] for key in keys) == group}
        alive = [row["nmse"] for row in rows.values() if row["dead"] < MANY_DEAD]
        shown = [_rate(rows[rate], min(alive, default=0.0)) if rate in rows else "" for rate in rates]
        data, latents, l0, steps, family = group
        default = next(iter(rows.values()))["default"]
        lines.append(f"| {data} | {latents:,} | {l0} | {steps:,} | {family} | {' | '.join(shown)} | {default:.2g} |")
    return [f"{machine}; batches of {report['rows'][0]['batch']} rows.", "\n".join(lines)]


def _rate(row: dict[str, Any], best: float) -> str:
    shown = f"{row['nmse']:.4f}"
    if row["dead"] >= MANY_DEAD:
        return f"{shown} ({row['dead']:.0%} dead)"
    return f"**{shown}**" if row["nmse"] == best else shown


def _harvest(report: dict[str, Any], machine: str) -> list[str]:
    row = report["row"]
    return [
        f"{machine}: {row['model']} up to layer {row['layer']}, {row['batch']} contexts of {row['context']} tokens a "
        f"step: {_three(row['forward_tokens_per_s'])} tokens/s forward alone, {_three(row['harvest_tokens_per_s'])} "
        f"harvested to disk, {row['ratio']:.2f} times as long."
    ]


def _load(report: dict[str, Any], machine: str) -> list[str]:
    """A row for each layout of the file, in units of the file."""
    first = report["rows"][0]
    size = f"{first['m']:,} × {first['d']:,} in float32, {first['bytes'] / 1e9:.2g} GB"
    lines = ["| encoder stored as in | load time / read time | peak memory / file size |", "|---|--:|--:|"]
    lines += [
        f"| {row['format']} | {row['load_s'] / row['read_s']:.2f} | {row['peak'] / row['bytes']:.2f} |"
        for row in report["rows"]
    ]
    return [f"{machine}; {size}.", "\n".join(lines)]


def _pursuit(report: dict[str, Any], machine: str) -> list[str]:
    """A row for each library, by case."""
    parts = [f"{machine}."]
    sizes = ("d", "m", "k", "nonnegative")
    for case in dict.fromkeys(tuple(row[size] for size in sizes) for row in report["rows"]):
        lines = ["| OMP | rows | ms a row | objective | same supports as ours |", "|---|--:|--:|--:|--:|"]
        for row in report["rows"]:
            if tuple(row[size] for size in sizes) != case:
                continue
            if row["note"]:
                lines.append(f"| {row['method']} | {row['note']} | | | |")
                continue
            lines.append(
                f"| {row['method']} | {row['rows_timed']:,} | {row['ms_a_row']:.4g} | {row['objective']:.6g} | "
                f"{row['equal_supports']:.2%} |"
            )
        d, m, k, nonnegative = case
        parts += [f"d {d:,}, m {m:,}, k {k}{', non-negative' * nonnegative}:", "\n".join(lines)]
    return parts


def _selectors(report: dict[str, Any], machine: str) -> list[str]:
    """A row for each selector, the smallest error first, by case."""
    parts = [f"{machine}."]
    for case in dict.fromkeys(row["case"] for row in report["rows"]):
        rows = sorted((row for row in report["rows"] if row["case"] == case), key=lambda row: row["nmse"])
        lines = ["| selector | NMSE | ms a row | quartiles |", "|---|--:|--:|--:|"]
        for row in rows:
            low, high = (f"{value:.3g}" for value in row["quartiles"])
            lines.append(f"| {row['selector']} | {row['nmse']:.4f} | {row['ms_a_row']:.3g} | {low} to {high} |")
        parts += [f"{case[0].upper()}{case[1:]}, {rows[0]['rows']:,} rows:", "\n".join(lines)]
    return parts


def _transitions(report: dict[str, Any], machine: str) -> list[str]:
    """A row for each method: the `ρ` at which half of the trials are recovered."""
    points = report["points"]
    deltas, rhos = (sorted({point[name] for point in points}) for name in ("delta", "rho"))
    lines = ["| ρ at 50% recovery, δ = | " + " | ".join(map(str, deltas)) + " |", "|---|" + "--:|" * len(deltas)]
    for method in dict.fromkeys(point["method"] for point in points):
        rates = {(p["delta"], p["rho"]): p["recovered"] for p in points if p["method"] == method}
        half = [half_point(rhos, [rates[delta, rho] for rho in rhos]) for delta in deltas]
        lines.append(f"| {method} | " + " | ".join(f"{rho:.2f}" for rho in half) + " |")
    return [f"{machine}; {report['m']} atoms, {report['trials']} trials a point.", "\n".join(lines)]


def _ksvd(report: dict[str, Any], machine: str) -> list[str]:
    """Recovered atoms, by learner and noise."""
    lines = ["| learner | SNR (dB) | recovered | least | runs | s a run |", "|---|--:|--:|--:|--:|--:|"]
    for row in report["rows"]:
        if row["mean"] is None:
            lines.append(f"| {row['learner']} | {row['note']} | | | | |")
            continue
        snr = "none" if row["snr"] is None else f"{row['snr']:g}"
        cells = [f"{row['mean']:.1%}", f"{row['least']:.0%}", str(row["runs"]), f"{row['s']:.2f}"]
        lines.append(f"| {row['learner']} | {snr} | " + " | ".join(cells) + " |")
    return [f"{machine}.", "\n".join(lines)]


def _pictures(report: dict[str, Any], machine: str) -> list[str]:
    """Photographs denoised and inpainted, by method."""
    parts = [f"{machine}."]
    if report["denoising"]:
        lines = ["| picture | method | PSNR (dB) | s | first, s |", "|---|---|--:|--:|--:|"]
        for row in report["denoising"]:
            cells = [
                _shown(row[name], form) for name, form in (("psnr", "{:.2f}"), ("s", "{:.1f}"), ("first_s", "{:.1f}"))
            ]
            name = f"{row['picture']}, {row['height']} × {row['width']}, noisy {row['noisy']:.2f}"
            lines.append(f"| {name} | {row['method']} | " + " | ".join(cells) + " |")
        parts += [f"Noise of σ {report['sigma']:g}, {report['atoms']} atoms:", "\n".join(lines)]
    if report["inpainting"]:
        lines = ["| picture | pixels missing | atoms | PSNR (dB) |", "|---|--:|---|--:|"]
        for row in report["inpainting"]:
            lines.append(f"| {row['picture']} | {row['missing']:.0%} | {row['method']} | {row['psnr']:.2f} |")
        parts.append("\n".join(lines))
    return parts


def _jobs(report: dict[str, Any], machine: str) -> list[str]:
    """The cost of saving and loading; then the result of a job that was killed."""
    c = report["costs"]
    parts = [
        f"{machine}; {_sizes(c['case'])}.",
        f"Loading: {c['loaded_rows_per_s']:,.0f} rows/s of float16 on disk, {c['ratio']:.0f} times what a step of "
        f"{1000 * c['step_s']:.0f} ms needs; the first batch, for which every shard is read and checked (and so is in "
        f"the page cache after it), came after {c['first_batch_s']:.1f} s.",
        f"Saving {c['state_bytes'] / 2**20:,.0f} MiB adds {c['save_s']:.2f} s in all to the steps beside it, "
        f"{c['overhead_at_one_a_minute']:.1%} of the time at one save a minute; reading it back takes "
        f"{c['restore_s']:.1f} s.",
    ]
    if "survived" in report:
        s = report["survived"]
        middle = sum(moment["in_mid_save"] for moment in s["moments"])
        parts.append(
            f"A job of {s['steps']} steps, killed at {len(s['moments'])} random moments, {middle} of them in the "
            f"middle of a save: {len(s['differ'])} of {s['leaves']} arrays differ from those of an uninterrupted job."
        )
    return parts


_TABLES = {
    "accelerator": accelerator.markdown,
    "bucket": bucket.markdown,
    "jobs": _jobs,
    "refine": _refine,
    "first-call": _first_call,
    "nnls": _nnls,
    "train": _train,
    "rates": _rates,
    "moments": moments.markdown,
    "quality": quality.markdown,
    "harvest": _harvest,
    "load": _load,
    "pursuit": _pursuit,
    "selectors": _selectors,
    "transitions": _transitions,
    "ksvd": _ksvd,
    "pictures": _pictures,
    "lasso": lasso.markdown,
    "kernels": kernels.markdown,
}


def insert(readme: str, reports: list[dict[str, Any]]) -> str:
    """A README with the tables between the markers of each run replaced."""
    for report in reports:
        begin = f"<!-- benchmark: {report['benchmark']} -->"
        before, found, rest = readme.partition(begin)
        _, end, after = rest.partition(END)
        if not found or not end:
            raise SystemExit(f"benchmarks/README.md has no {begin} ... {END}; put them where the tables belong.")
        readme = "\n\n".join([before + begin, markdown(report), END + after])
    return readme


def _caption(case: dict[str, Any]) -> str:
    if "d" not in case:
        return f"**{case['case']}**"
    least, median, most = case["condition"]
    l0 = f", {case['mean_l0']:.0f} in use" if case["mean_l0"] < case["k"] else ""
    return (
        f"**{case['case']}** ({case['source']}): d {case['d']:,}, m {case['m']:,}, k {case['k']}{l0}, {case['B']:,} "
        f"rows; condition number of `G` {median:.3g} ({least:.3g} to {most:.3g}); encoder "
        f"{_three(case['encode_rows_per_s'])} rows/s, copies {case['bytes_per_s'] / 1e9:.0f} GB/s, large products "
        f"{case['flops_per_s'] / 1e9:.0f} GF/s"
    )


def _cells(row: dict[str, Any]) -> list[str]:
    solver = f"**{row['solver']}**" if row["kind"] == "ours" else row["solver"] or ""
    notes = [row["note"]] if row["note"] else []
    if row["gate_met"] is False:
        notes.insert(0, "gate not met")
    if row["rows_per_s"] is None:
        return [solver, *[""] * (len(_HEAD) - 2), "; ".join(notes)]
    return [
        solver,
        f"{row['rows']:,}",
        _three(row["rows_per_s"]),
        " to ".join(map(_three, row["quartiles"])),
        _shown(row["compile_s"], "{:.1f}"),
        *(_shown(row[name], "{:.1e}") for name in ("worst_kkt", "kkt_999", "added_nmse")),
        "" if row["scratch_bytes"] is None else f"{row['scratch_bytes'] / 2**20:.1f}",
        f"{row['time_over_floor']:.2f}",
        f"{row['time_over_encode']:.2f}",
        "; ".join(notes),
    ]


def _shown(value: float | None, form: str) -> str:
    return "" if value is None else form.format(value)


def _three(value: float) -> str:
    """Three digits, as accurate as a timing is."""
    return f"{float(f'{value:.3g}'):,.0f}"
