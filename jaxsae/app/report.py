"""One HTML page of a training run or a study, without scripts, network or other files.

Each section is a function from the report to HTML, and returns "" if the report lacks its data: autoencoders that were
trained elsewhere have no curves.
"""

import json
import math
import os
import shlex
from collections.abc import Iterable, Sequence
from html import escape
from pathlib import Path
from typing import Any

from jaxsae._core.files import InputError, atomic_file, local_path
from jaxsae.app import html, logs, runs, svg
from jaxsae.app.html import form
from jaxsae.app.plots import FAMILIES, method

_BINS = 300  # of a long curve
_LABELS = {
    "nmse": "NMSE of a batch",
    "l0": "L0: active latents per row",
    "dead": "dead latents, of up to 100,000 rows",
    "loss": "loss",
    "skipped": "batches skipped so far",
}
# Groups of columns: each column has a name, a key and a format; None chooses decimals that fit the numbers.
_RESULTS = (
    ("", (("L0", "l0", ".1f"),)),
    ("NMSE", (("encoder", "nmse_before", ".4f"), ("refined", "nmse_after", ".4f"))),
    (
        "mean activation",
        (("encoder", "mean_before", None), ("refined", "mean_after", None), ("change", "mean_change", "+.1%")),
    ),
    ("values", (("rising", "rising", ".0%"),)),
    ("γ", (("encoder", "gamma_before", ".4f"), ("refined", "gamma_after", ".4f"))),
    ("latents", (("dead", "dead", ".1%"), ("of rows", "dead_rows", ",d"))),
    ("rows", (("certified", "certified", ".4g%"), ("worst KKT", "worst_kkt", ".1e"))),
)
_LOSSES = (
    ("cross-entropy (nats)", (("encoder", "ce_before", ".3f"), ("refined", "ce_after", ".3f"))),
    ("KL from the model (nats)", (("encoder", "kl_before", ".3f"), ("refined", "kl_after", ".3f"))),
    ("loss recovered", (("encoder", "recovered_mean_before", ".1%"), ("refined", "recovered_mean_after", ".1%"))),
)
_RATIOS = ((0.25, "×¼"), (1.0, "×1"), (4.0, "×4"), (16.0, "×16"))


def write(run: str | os.PathLike, out: str | os.PathLike) -> None:
    """Write the page of a run or a study.

    Args:
      run: directory that `runs.run` or `study.run` wrote.
      out: the file to write.

    Raises:
      InputError: if the directory has nothing to show, or the file cannot be written.

    Example:
      >>> import tempfile
      >>> from jaxsae.app.options import Options
      >>> with tempfile.TemporaryDirectory() as run:
      ...     with logs.logs(run, Options("topk", 8, k=2)) as log:
      ...         log(10, {"nmse": 0.5})
      ...     write(run, f"{run}/report.html")
    """
    run, out = local_path(run), local_path(out)
    if out.resolve() == (run / "report.json").resolve():
        raise InputError(f"{out}: is the report itself; write the page to another file.")
    text = page(run)
    with atomic_file(out) as temporary:
        temporary.write_text(text, encoding="utf-8")


def page(run: str | os.PathLike) -> str:
    """The page of a run or a study, as `write` writes it.

    Args:
      run: directory that `runs.run` or `study.run` wrote, or is writing.

    Raises:
      InputError: if the directory has nothing to show.

    Example:
      >>> import tempfile
      >>> from jaxsae.app.options import Options
      >>> with tempfile.TemporaryDirectory() as run:
      ...     with logs.logs(run, Options("topk", 8, k=2)) as log:
      ...         log(10, {"nmse": 0.5})
      ...     page(run).lower().startswith("<!doctype html>")
      True
    """
    run = local_path(run)
    path = run / "report.json"
    if not run.is_dir():
        what = "not a directory" if run.exists() else "no such directory"
        raise InputError(f"{run}: {what}; pass one that jaxsae train or jaxsae study wrote.")
    report, curves = _read(path), logs.curves(run)
    if not report and not curves:
        raise InputError(f"{run}: holds no report.json and no curves; pass what jaxsae train or jaxsae study wrote.")
    if report and not {"rows", "options"} & set(report):
        raise InputError(f"{path}: is not of jaxsae train or jaxsae study; pass a directory that one of them wrote.")
    try:
        return _study(report) if "rows" in report else _run(report, curves, run)
    except (TypeError, ValueError, LookupError, AttributeError, ArithmeticError) as error:
        reason = str(error).partition("\n")[0]
        raise InputError(f"{path}: is damaged ({type(error).__name__}: {reason}); make it again.") from error


def _read(path: Path) -> dict[str, Any]:
    """A report, or `{}` if there is none."""
    if not path.exists():
        return {}
    try:
        found = json.loads(path.read_bytes(), parse_constant=lambda name: None)
    except ValueError as error:
        raise InputError(f"{path}: is not JSON ({error}); make it again.") from error
    if not isinstance(found, dict):
        raise InputError(f"{path}: holds {type(found).__name__}, expected a JSON object; make it again.")
    return found


def _configuration(report: dict[str, Any], options: dict[str, Any] | None) -> str:
    beside = html.pairs("Data", report.get("data")) + html.pairs("Versions", report.get("versions"))
    return html.grid([html.pairs("Options", options), f"<div>{beside}</div>" if beside else ""])


# --- A study


def _study(report: dict[str, Any]) -> str:
    data, rows = report.get("data", {}), report["rows"]
    worst = [row["worst_kkt"] for row in rows if row.get("worst_kkt") is not None]
    facts = {
        "autoencoders": f"{len(rows)}",
        "held-out rows": form(data.get("heldout"), ",d"),
        "width": form(data.get("width"), ",d"),
        "rows certified": form(min((row.get("certified") or 0 for row in rows), default=None), ".4g%"),
        "worst KKT residual": form(max(worst, default=None), ".1e"),
    }
    warnings = [
        f"{method(row)}: only {form(row.get('certified'), '.4g%')} of the rows are certified to be optimal."
        for row in rows
        if (row.get("certified") or 0) < 1
    ]
    if not report.get("complete", True):
        warnings.insert(0, "This study is not complete: it is still running, or was interrupted.")
    sections = {
        "Findings": _findings(rows),
        "Results": _results(report),
        "Error against sparsity": _frontier(report),
        "Shrinkage of active values": _distributions(report, "change", "active values"),
        "Shrinkage, latent by latent": _distributions(report, "latent_change", "latents"),
        "How often latents fire": _all_firing(report),
        "Training": _study_curves(rows),
        "Rows furthest from optimal": _worst_rows(rows),
        "Configuration and versions": _configuration(report, report.get("config")),
    }
    return html.document("Refinement study", str(data.get("source", "")), facts, warnings, sections)


def _by_family(rows: Iterable[dict[str, Any]]) -> dict[str, list[dict[str, Any]]]:
    """Rows by family, in the order of the figures, each family from sparse to dense."""
    found: dict[str, list[dict[str, Any]]] = {}
    for row in sorted(rows, key=lambda row: row.get("l0") or 0):
        found.setdefault(str(row["family"]), []).append(row)
    known = [name for name in FAMILIES if name in found]
    return {name: found[name] for name in (*known, *(name for name in found if name not in known))}


def _findings(rows: list[dict[str, Any]]) -> str:
    items = ""
    for family, members in _by_family(rows).items():
        measured = [
            (row["mean_change"], row["nmse_after"] / row["nmse_before"] - 1)
            for row in members
            if row.get("mean_change") is not None and row.get("nmse_before") and row.get("nmse_after") is not None
        ]
        if measured:
            activations, errors = (_range(values, "+.0%") for values in zip(*measured, strict=True))
            items += (
                f'<li class="{html.colour(family)}"><strong>{escape(html.label(family))}.</strong> Refinement '
                f"changes the mean activation by {activations}, and the error by {errors}.</li>"
            )
    note = "The encoder chooses which latents are active; refinement computes the best values of these latents."
    return f'{html.note(note)}<ul class="findings">{items}</ul>' if items else ""


def _range(values: Sequence[svg.Real], how: str) -> str:
    low, high = form(min(values), how), form(max(values), how)
    return low if low == high else f"{low} to {high}"


def _results(report: dict[str, Any]) -> str:
    note = "On the held-out rows, with the encoder’s own values and with refined ones. γ below 1 is shrinkage."
    text = _columns(note, report["rows"], _RESULTS)
    if report.get("ce_clean") is not None:
        clean, mean, zero = (form(report.get(f"ce_{name}"), ".3f") for name in ("clean", "mean", "zero"))
        note = (
            f"Next-token loss with the reconstruction in place of the residual: {clean} nats per token for the model "
            f"itself, {mean} with the mean instead, {zero} with zeros. Recovered: share of what the mean loses."
        )
        text += _columns(note, report["rows"], _LOSSES)
    return text


def _columns(caption: str, rows: list[dict[str, Any]], groups: Any) -> str:
    """A table of the columns that any row has a number for."""
    kept = [(name, [c for c in columns if any(row.get(c[1]) is not None for row in rows)]) for name, columns in groups]
    columns = [column for _, members in kept for column in members]
    if not columns:
        return ""
    forms = {key: how or _decimals(row.get(key) for row in rows) for _, key, how in columns}
    cells = [[method(row), *(form(row.get(key), how) for key, how in forms.items())] for row in rows]
    over = [("", 1), *((name, len(members)) for name, members in kept if members)]
    return html.table(caption, ["method", *(name for name, _, _ in columns)], cells, over)


def _decimals(values: Iterable[svg.Real | None]) -> str:
    """The format that shows four digits of the largest value."""
    largest = max((abs(value) for value in values if value), default=1.0)
    return f",.{min(max(3 - math.floor(math.log10(largest)), 0), 12)}f"


def _frontier(report: dict[str, Any]) -> str:
    families, clean = _by_family(row for row in report["rows"] if row.get("l0")), report.get("ce_clean")
    figures = [
        _against_l0(families, ("nmse_before", "nmse_after"), "NMSE on held-out rows", ".4f", log=True),
        _against_l0(families, ("mean_change",), "change of the mean activation", "+.1%"),
        _against_l0(families, ("ce_before", "ce_after"), "next-token cross-entropy (nats)", ".3f", base=clean),
    ]
    note = "Open marks: the encoder’s values. Full marks: the same latents, refined."
    note += "" if clean is None else " Grey: the model itself."
    return html.note(note) + html.legend(families) + html.grid(figures) if any(figures) else ""


def _against_l0(
    families: dict[str, list[dict[str, Any]]],
    keys: Sequence[str],
    label: str,
    how: str,
    *,
    log: bool = False,
    base: svg.Real | None = None,
) -> str:
    """A chart of the rows' numbers against their L0: a line for each family and key, and one at `base`."""
    series, note = [], []
    for family, members in families.items():
        for key in keys:
            rows = [row for row in members if row.get(key) is not None]
            before = key.endswith("_before")
            which = ", encoder" * before + ", refined" * key.endswith("_after")
            titles = [f"{method(row)}: L0 {form(row['l0'], '.1f')}, {form(row[key], how)}{which}" for row in rows]
            css = html.colour(family) + " open dashed" * before
            series.append(svg.Line([row["l0"] for row in rows], [row[key] for row in rows], css, titles=titles))
            note += titles
    if not note:
        return ""
    x = svg.axis("L0: active latents per row", [value for line in series for value in line.x], log=True)
    values = [base, *(value for line in series for value in line.y)]
    y = svg.axis(label, values, log=log, form=_percent if "%" in how else _plain)
    across = [] if base is None else [svg.Line([x.low, x.high], [base, base], "c-other")]
    return html.figure(svg.lines(across + series, x, y, f"{label} against L0. {'; '.join(note)}."))


def _plain(value: svg.Real) -> str:
    return form(value, ",g")


def _percent(value: svg.Real) -> str:
    return form(value, ".4g%")


def _distributions(report: dict[str, Any], key: str, what: str) -> str:
    """Histograms of refined over original, a row of small figures for each family, at one scale."""
    text = ""
    for members in _by_family(row for row in report["rows"] if sum(row.get(key) or [])).values():
        shares = [[count / sum(row[key]) for count in row[key]] for row in members]
        highest = max(max(share[1:-1]) for share in shares) or 1.0  # the bins at the ends have no width
        y = svg.axis("", [highest], zero=True, form=_percent, ticks=3)
        pairs = zip(members, shares, strict=True)
        text += html.grid((_ratios(row, share, report["ratio_edges"], y, what) for row, share in pairs), "small")
    ratio = (
        "their mean refined value to that of the encoder" if what == "latents" else "the refined value to the encoder’s"
    )
    note = (
        f"Share of the {what} by the ratio of {ratio}. Pale bars fall, full ones rise. Bars at the ends include all "
        "values beyond; the height of a bar that is cut off is written beside it."
    )
    return html.note(note) + text if text else ""


def _ratios(row: dict[str, Any], shares: list[svg.Real], edges: list[svg.Real], y: svg.Axis, what: str) -> str:
    css = html.colour(row["family"])
    bins = list(zip(edges[:-1], edges[1:], shares, strict=True))
    drawn = [
        svg.Bar(low, high, share, css + " pale" * (high <= 1), form(share, ".1%"), form(share, ".0%"))
        for low, high, share in bins
    ]
    note = f"{form(sum(share for low, _, share in bins if low >= 1), '.0%')} rise"
    if what == "active values":
        note += f", mean {form(row.get('mean_change'), '+.1%')}"
    x = svg.Axis("refined ÷ encoder’s", edges[0], edges[-1], True, _RATIOS)
    return html.figure(svg.bars(drawn, x, y, f"{method(row)}: of the {what} {note}."), method(row), note)


def _all_firing(report: dict[str, Any]) -> str:
    text = ""
    for family, members in _by_family(row for row in report["rows"] if sum(row.get("firing") or [])).items():
        text += html.grid((_firing(row["firing"], family, method(row)) for row in members), "small")
    rows = max((row.get("dead_rows") or 0 for row in report["rows"]), default=0)
    return _firing_note(rows or report["data"]["heldout"]) + text if text else ""


def _firing_note(rows: int) -> str:
    return html.note(
        f"Share of the latents by the number of {form(rows, ',d')} rows, held out and others, on which they are "
        "active: 0, 1, 2 or 3, 4 to 7, and so on. The grey bar, if any, shows the dead latents, active on none."
    )


def _firing(counts: list[int], family: str, name: str = "") -> str:
    """A chart whose bar `n` shows the latents that fire on `2ⁿ⁻¹` to `2ⁿ − 1` rows; bar 0, the dead ones."""
    shares = [count / sum(counts) for count in counts]
    drawn = [
        svg.Bar(n + 0.08, n + 0.92, share, html.colour(family) if n else "c-other", f"{count:,}: {form(share, '.1%')}")
        for n, (count, share) in enumerate(zip(counts, shares, strict=True))
    ]
    ticks = [0, *range(1, len(counts), 2)]
    marks = tuple((n + 0.5, _short(2 ** (n - 1) if n else 0)) for n in ticks)
    x = svg.Axis("rows on which it is active", 0, len(counts), False, marks)
    y = svg.axis("" if name else "share of the latents", shares, zero=True, form=_percent, ticks=3)
    note = f"{counts[0]:,} of {sum(counts):,} dead"
    box = svg.SMALL if name else svg.LARGE
    return html.figure(svg.bars(drawn, x, y, f"{name} latents: {note}.".strip(), box), name, note)


def _short(count: int) -> str:
    """A power of two, or 0, in short form."""
    thousands = max(count.bit_length() - 1, 0) // 10
    return f"{count >> 10 * thousands}{' kMGT'[thousands].strip()}"


def _study_curves(rows: list[dict[str, Any]]) -> str:
    families = _by_family(row for row in rows if row.get("curve"))
    figures = []
    for name in ("nmse", "l0"):
        series = [
            svg.Line(row["curve"]["step"], row["curve"][name], html.colour(family), method(row).partition(", ")[2])
            for family, members in families.items()
            for row in members
        ]
        figures.append(_curve(name, series, svg.NAMED))
    return html.legend(families) + html.grid(figures) if any(figures) else ""


def _worst_rows(rows: list[dict[str, Any]]) -> str:
    found = [(row, worst) for row in rows for worst in row.get("worst_rows") or []]
    found.sort(key=lambda pair: -math.inf if pair[1]["kkt"] is None else -pair[1]["kkt"])
    count = max((len(row.get("worst_rows") or []) for row in rows), default=0)
    cells = [
        [method(row), form(worst["row"], ",d"), form(worst["l0"], ",d"), form(worst["kkt"], ".2e")]
        for row, worst in found[:count]
    ]
    note = "The refined codes with the largest relative KKT residuals. Held-out rows are numbered from 0."
    table = html.table("Largest KKT residuals", ["method", "row", "L0", "KKT residual"], cells)
    return html.note(note) + table if cells else ""


# --- A training run


def _run(report: dict[str, Any], curves: dict[str, dict[int, float]], path: Path) -> str:
    options, heldout = report.get("options", {}), report.get("heldout", {})
    family, firing = str(options.get("activation", "")), heldout.get("firing") or []
    reached = report.get("steps", max((step for curve in curves.values() for step in curve), default=None))
    facts = {
        "NMSE": form(heldout.get("nmse"), ".4f"),
        "explained variance": form(heldout.get("explained_variance"), ".4f"),
        "L0": form(heldout.get("l0"), ".1f"),
        "dead latents": form(heldout.get("dead"), ".1%"),
        "rows counted for these": form(heldout.get("dead_rows"), ",d"),
        "held-out rows": form(heldout.get("rows"), ",d"),
        "steps": form(reached, ",d"),
        "passes over the data": form(report.get("data", {}).get("passes"), ".1f"),
    }
    warnings = []
    if not report:
        warnings.append("This training has not ended: it is still running, or was interrupted.")
    if report.get("skipped"):
        note = f"{report['skipped']:,} batches were skipped, since their loss was not finite."
        warnings.append(f"{note} {runs.describe_nonfinite(report)}")
    if heldout.get("nonfinite"):
        warnings.append(f"{heldout['nonfinite']:,} held-out rows hold NaN or Inf, and are left out.")
    latents = (
        _firing_note(heldout.get("dead_rows", heldout["rows"])) + html.grid([_firing(firing, family)])
        if sum(firing)
        else ""
    )
    sections = {
        "Training": _run_curves(curves, family),
        "Error against sparsity": _progressive(heldout, family),
        "How often latents fire": latents,
        "Shrinkage": _hint(path) if report else "",
        "Configuration and versions": _configuration(report, options),
    }
    named = {"k": "k", "l1": "L1 weight", "latents": "latents"}
    sizes = [f"{name} {form(options[key], ',g')}" for key, name in named.items() if options.get(key) is not None]
    subtitle = ", ".join([html.label(family) or path.name, *sizes])
    return html.document("Training run", subtitle, facts, warnings, sections)


def _run_curves(curves: dict[str, dict[int, float]], family: str) -> str:
    names = [*(name for name in _LABELS if name in curves), *sorted(set(curves) - set(_LABELS))]
    shown = [name for name in names if name != "dead_rows" and (name != "skipped" or any(curves[name].values()))]
    return html.grid(
        _curve(name, [svg.Line(*_thinned(curves[name]), html.colour(family))], svg.LARGE) for name in shown
    )


def _thinned(curve: dict[int, float]) -> tuple[list[int], list[float]]:
    """The least and the greatest value in each bin of a long curve, in order, so that spikes are kept."""
    points = [(step, value) for step, value in curve.items() if math.isfinite(value)]
    size = math.ceil(len(points) / _BINS)
    if size > 2:
        bins = [points[start : start + size] for start in range(0, len(points), size)]
        ends = [{min(part, key=lambda p: p[1]), max(part, key=lambda p: p[1])} for part in bins]
        points = [point for part in ends for point in sorted(part)]
    return [step for step, _ in points], [value for _, value in points]


def _curve(name: str, series: list[svg.Line], box: svg.Box) -> str:
    label, values = _LABELS.get(name, name), [value for line in series for value in line.y if value is not None]
    if not values:
        return ""
    log = name in ("nmse", "loss") and min(values) > 0
    x = svg.axis("step", [step for line in series for step in line.x], zero=True)
    least = [0.01] if name == "dead" else []  # for an axis if all are 0
    y = svg.axis(label, values + least, log=log, zero=not log, form=_percent if name == "dead" else _plain)
    ends = "; ".join(f"{line.name} ends at {form(line.y[-1], '.4g')}".strip() for line in series if line.y)
    return html.figure(svg.lines(series, x, y, f"{label}, by training step. {ends}.", box))


def _progressive(heldout: dict[str, Any], family: str) -> str:
    found = {int(n): value for n, value in (heldout.get("nmse_at") or {}).items() if value is not None}
    if not found:
        return ""
    x = svg.axis("latents kept in each row", found, log=True)
    y = svg.axis("NMSE on held-out rows", found.values(), log=True)
    cells = [[f"{n:,}", form(value, ".4f")] for n, value in found.items()]
    titles = [f"{n} kept: NMSE {value}" for n, value in cells]
    line = svg.Line(list(found), list(found.values()), html.colour(family), titles=titles)
    note = "The error with only the largest latents of each row, as for a sparser code of the same autoencoder."
    drawn = html.figure(svg.lines([line], x, y, f"NMSE by latents kept. {'; '.join(titles)}."))
    return html.note(note) + html.grid([drawn, html.table("The same numbers", ["latents kept", "NMSE"], cells)])


def _hint(path: Path) -> str:
    note = "Training does not refine codes. A study measures how far this encoder shrinks its values:"
    command = escape(f"jaxsae study --sae {shlex.quote(str(path))} --data DATA.npy --out DIRECTORY")
    return f'{html.note(note)}<pre tabindex="0"><code>{command}</code></pre>'
