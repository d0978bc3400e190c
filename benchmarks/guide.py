"""The tables of pages, each made from the JSON of one benchmark run or study."""

import json
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from benchmarks import studies, table
from benchmarks.pursuit import half_point

RESULTS = Path(__file__).parent / "results"


ROOT = Path(__file__).parents[1]
PAGES = [ROOT / page for page in ("docs/which.md", "docs/guides/studies.md", "benchmarks/README.md")]


def insert(page: str) -> str:
    """A page with the tables between its markers, `<!-- guide: name -->`, replaced."""
    for name in names(page):
        begin = f"<!-- guide: {name} -->"
        before, _, rest = page.partition(begin)
        _, end, after = rest.partition(table.END)
        if not end or name not in _TABLES:
            raise SystemExit(f"a page has {begin}, which is not made here, or has no {table.END} after it.")
        file, make = _TABLES[name]
        made = make(json.loads((RESULTS / file).read_text()))
        page = "\n\n".join([before + begin, made, table.END + after])
    return page


def names(page: str) -> list[str]:
    """The tables that a page has markers for."""
    return re.findall(r"<!-- guide: (.*?) -->", page)


def _best(values: Sequence[float | None], form: str, *, most: bool) -> list[str]:
    """Numbers as text, the best one bold; missing ones are blank."""
    shown = ["" if value is None else form.format(value) for value in values]
    best = form.format((max if most else min)(value for value in values if value is not None))
    return [f"**{text}**" if text == best else text for text in shown]


def _refits(report: dict[str, Any]) -> str:
    """Rows a second of our solvers, by case; none where the gate was not met."""
    ours = [row for row in report["rows"] if row["kind"] == "ours"]
    head, columns = ["rows a second"], []
    solvers = list(dict.fromkeys(row["solver"] for row in ours))
    for case in report["cases"]:
        head.append(f"{case['case']}; d {case['d']}, condition {case['condition'][1]:,.0f}")
        of_case = {row["solver"]: row for row in ours if row["case"] == case["case"]}
        rates = [of_case[name]["rows_per_s"] if of_case[name]["gate_met"] else None for name in solvers]
        columns.append([text or "not finished" for text in _best(rates, "{:,.0f}", most=True)])
    return studies.markdown(head, [[name, *cells] for name, *cells in zip(solvers, *columns, strict=True)])


def _selectors(report: dict[str, Any]) -> str:
    head, columns = ["selector"], []
    names = list(dict.fromkeys(row["selector"] for row in report["rows"]))
    for case in dict.fromkeys(row["case"] for row in report["rows"]):
        head += [f"NMSE, {case}", "ms a row"]
        of_case = {row["selector"]: row for row in report["rows"] if row["case"] == case}
        columns.append(_best([of_case[name]["nmse"] for name in names], "{:.4f}", most=False))
        columns.append([f"{of_case[name]['ms_a_row']:.3g}" for name in names])
    return studies.markdown(head, [[f"`{name}`", *cells] for name, *cells in zip(names, *columns, strict=True)])


def _recovery(report: dict[str, Any]) -> str:
    points, deltas = report["points"], (0.1, 0.5, 0.9)
    rhos = sorted({point["rho"] for point in points})
    names = list(dict.fromkeys(point["method"] for point in points))
    columns = []
    for delta in deltas:
        rates = {(p["method"], p["rho"]): p["recovered"] for p in points if p["delta"] == delta}
        half = [half_point(rhos, [rates[name, rho] for rho in rhos]) for name in names]
        columns.append(_best(half, "{:.2f}", most=True))
    head = ["k / d at which half are recovered", *(f"d / m = {delta}" for delta in deltas)]
    return studies.markdown(head, [[name, *cells] for name, *cells in zip(names, *columns, strict=True)])


def _lasso(report: dict[str, Any]) -> str:
    rows = [row for row in report["regressions"] if "scikit" not in row["method"]]
    head = ["tuned by cross-validation", "noise variables chosen", "relevant ones, of 5", "test error"]
    cells = [
        [row["method"], f"{row['noise_variables']:.1f}", f"{row['strong_variables']:.1f}", f"{row['test_error']:.3f}"]
        for row in rows
    ]
    return studies.markdown(head, cells)


def _ksvd(report: dict[str, Any]) -> str:
    rows = [row for row in report["rows"] if row["learner"].startswith("jaxsae")]
    noises = list(dict.fromkeys(row["snr"] for row in rows))
    head = ["atoms found again", *("no noise" if snr is None else f"{snr:g} dB" for snr in noises), "s a run"]
    found = []
    for name in dict.fromkeys(row["learner"] for row in rows):
        of_name = {row["snr"]: row for row in rows if row["learner"] == name}
        seconds = max(row["s"] for row in of_name.values())
        found.append(
            [name.removeprefix("jaxsae "), *(f"{of_name[snr]['mean']:.1%}" for snr in noises), f"{seconds:.2f}"]
        )
    return studies.markdown(head, found)


def _loading(report: dict[str, Any]) -> str:
    return studies.markdown(
        ["encoder stored as in", "load time / read time", "peak memory / file size"],
        [
            [row["format"], f"{row['load_s'] / row['read_s']:.2f}", f"{row['peak'] / row['bytes']:.2f}"]
            for row in report["rows"]
        ],
    )


def _steps(report: dict[str, Any]) -> str:
    names = {"jaxsae": "of active latents alone", "jaxsae, dense autodiff": "of all latents"}
    rows = {names[row["step"]]: row for row in report["rows"] if row["step"] in names}
    return studies.markdown(
        ["a training step of TopK", "ms"], [[name, f"{1000 * row['seconds']:.0f}"] for name, row in rows.items()]
    )


_PHOTOGRAPHS, _MODEL, _FEATURES = (f"{name}/report.json" for name in ("study", "study-smollm2", "study-synthetic"))
_TABLES: dict[str, tuple[str, Callable[[dict[str, Any]], str]]] = {
    "refits": ("refine/paper-cpu.json", _refits),
    "selectors": ("selectors/paper-cpu.json", _selectors),
    "recovery": ("transitions/paper-cpu.json", _recovery),
    "lasso": ("lasso/paper-cpu.json", _lasso),
    "ksvd": ("ksvd/paper-cpu.json", _ksvd),
    "study: values": (_PHOTOGRAPHS, studies.values),
    "study: reconstructions": (_PHOTOGRAPHS, studies.reconstructions),
    "study: lengths": (_PHOTOGRAPHS, studies.lengths),
    "study: settings": (_PHOTOGRAPHS, studies.settings),
    "study of a model: values": (_MODEL, studies.values),
    "study of a model: reconstructions": (_MODEL, studies.reconstructions),
    "study of a model: losses": (_MODEL, studies.losses),
    "study of a model: settings": (_MODEL, studies.settings),
    "study of features: values": (_FEATURES, studies.values),
    "study of features: known": (_FEATURES, studies.known),
    "steps": ("train/paper-cpu.json", _steps),
    "loading": ("load/paper-cpu.json", _loading),
}
