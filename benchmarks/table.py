"""The README's table of refits, made from the JSON of benchmark runs."""

from typing import Any

BEGIN, END = "<!-- benchmark: refine -->", "<!-- end -->"
_HEAD = ("solver", "rows", "rows/s", "quartiles", "compile s", "worst KKT", "99.9% KKT", "added NMSE", "scratch MiB")
_HEAD += ("roofline", "time / encoder", "")


def markdown(report: dict[str, Any]) -> str:
    """One run as GitHub markdown: what it ran on, then a table for each case, the fastest first."""
    commit, *dirty = report["commit"].split("-")
    commit = "-".join([commit[:10], *dirty])
    parts = [
        f"{report['device']}, {report['cores']} cores, jax {report['jax']}, commit `{commit}`; copies "
        f"run at {report['copy_bandwidth']['bytes_per_s'] / 1e9:.1f} GB/s."
    ]
    for case in report["cases"]:
        rows = [row for row in report["rows"] if row["case"] == case["case"]]
        rows.sort(key=lambda row: -(row["rows_per_s"] or 0))
        lines = ["| " + " | ".join(_HEAD) + " |", "|---|" + "--:|" * (len(_HEAD) - 2) + "---|"]
        lines += ["| " + " | ".join(_cells(row)) + " |" for row in rows]
        parts += [_caption(case), "\n".join(lines)]
    return "\n\n".join(parts)


def training(report: dict[str, Any]) -> str:
    """Training steps of one run as GitHub markdown, the fastest first; ratios are to our own."""
    rows = sorted(report["rows"], key=lambda row: row["seconds"] or float("inf"))
    (ours,) = (row["seconds"] for row in rows if row["step"] == "jaxsae")
    lines = ["| step | ms | quartiles | times ours | NMSE | MiB |", "|---|--:|--:|--:|--:|--:|"]
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
    case = ", ".join(f"{name} {value:,}" for name, value in rows[0]["case"].items())
    return f"{report['device']}, {report['cores']} cores, jax {report['jax']}; {case}.\n\n" + "\n".join(lines)


def insert(readme: str, reports: list[dict[str, Any]]) -> str:
    """A README with the tables of some runs between its two markers, in place of what stands there."""
    before, begin, rest = readme.partition(BEGIN)
    _, end, after = rest.partition(END)
    if not begin or not end:
        raise SystemExit(f"README.md has no {BEGIN} ... {END}; put these markers where the tables belong.")
    return "\n\n".join([before + BEGIN, *map(markdown, reports), END + after])


def _caption(case: dict[str, Any]) -> str:
    if "d" not in case:
        return f"**{case['case']}**"
    least, median, most = case["condition"]
    l0 = f", {case['mean_l0']:.0f} in use" if case["mean_l0"] < case["k"] else ""
    return (
        f"**{case['case']}** ({case['source']}): d {case['d']:,}, m {case['m']:,}, k {case['k']}{l0}, {case['B']:,} "
        f"rows; condition number of `G` {median:.3g} ({least:.3g} to {most:.3g}); encoder "
        f"{_three(case['encode_rows_per_s'])} rows/s"
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
        f"{row['roofline']:.2%}",
        f"{row['time_over_encode']:.2f}",
        "; ".join(notes),
    ]


def _shown(value: float | None, form: str) -> str:
    return "" if value is None else form.format(value)


def _three(value: float) -> str:
    """Three digits are as many as a timing is good for."""
    return f"{float(f'{value:.3g}'):,.0f}"
