"""The page of a study. Each section is a function from the report to HTML, "" if the report lacks its data."""

import math
from collections.abc import Iterable, Sequence
from html import escape
from typing import Any

from jaxsae.app import html, svg
from jaxsae.app.charts import configuration, curve, firing, firing_note, percent, plain
from jaxsae.app.html import form
from jaxsae.app.summary import FAMILIES, means, method

# Groups of columns: each column has a name, a key and a format; None chooses decimals that fit the numbers.
_RESULTS = (
    ("L0", (("encoder", "l0", ".1f"), ("refined", "l0_after", ".1f"))),
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
    (
        "cross-entropy (nats)",
        (("encoder", "ce_before", ".3f"), ("refined", "ce_after", ".3f"), ("OMP, z ≥ 0", "ce_omp_nonnegative", ".3f")),
    ),
    ("KL from the model (nats)", (("encoder", "kl_before", ".3f"), ("refined", "kl_after", ".3f"))),
    ("loss recovered", (("encoder", "recovered_mean_before", ".1%"), ("refined", "recovered_mean_after", ".1%"))),
)
_RECONSTRUCTIONS = (
    (
        "the encoder’s support",
        (
            ("encoder’s values", "nmse_before", ".4f"),
            ("a factor a latent", "nmse_rescaled", ".4f"),
            ("refined", "nmse_after", ".4f"),
            ("signed refit", "nmse_signed", ".4f"),
        ),
    ),
    ("selected again", (("OMP, z ≥ 0", "nmse_omp_nonnegative", ".4f"), ("OMP", "nmse_omp", ".4f"))),
    ("as many in every row", (("OMP, z ≥ 0", "nmse_omp_equal", ".4f"),)),
)
_KNOWN = (
    ("atoms", (("MCC", "mcc", ".3f"),)),
    (
        "F1 of supports",
        (("encoder", "f1_before", ".3f"), ("refined", "f1_after", ".3f"), ("OMP, z ≥ 0", "f1_omp_nonnegative", ".3f")),
    ),
    (
        "bias of values",
        (
            ("encoder", "bias_before", "+.1%"),
            ("refined", "bias_after", "+.1%"),
            ("OMP, z ≥ 0", "bias_omp_nonnegative", "+.1%"),
        ),
    ),
    (
        "error of values",
        (
            ("encoder", "value_error_before", ".1%"),
            ("refined", "value_error_after", ".1%"),
            ("OMP, z ≥ 0", "value_error_omp_nonnegative", ".1%"),
        ),
    ),
)
_RATIOS = ((0.25, "×¼"), (1.0, "×1"), (4.0, "×4"), (16.0, "×16"))


def page(report: dict[str, Any]) -> str:
    """The page of a report, as `study.run` returns it.

    Args:
      report: of a study, whole or of one that is still running.
    """
    data, rows, averaged = report.get("data", {}), report["rows"], means(report["rows"])
    worst = [row["worst_kkt"] for row in rows if row.get("worst_kkt") is not None]
    facts = {
        "autoencoders": f"{len(rows)}",
        "seeds": form(max((row["seeds"] for row in averaged), default=None), ",d"),
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
        "Findings": _findings(averaged),
        "Results": _results(report | {"rows": averaged}),
        "Values and selection": _reconstructions(averaged),
        "Against the truth": _known(averaged),
        "Error against sparsity": _frontier(report | {"rows": averaged}),
        "Length of training": _lengths(report),
        "Shrinkage of active values": _distributions(report | {"rows": averaged}, "change", "active values"),
        "Shrinkage, latent by latent": _distributions(report | {"rows": averaged}, "latent_change", "latents"),
        "How often latents fire": _all_firing(report | {"rows": averaged}),
        "Training": _study_curves(rows),
        "Rows furthest from optimal": _worst_rows(rows),
        "Configuration and versions": configuration(report, report.get("config")),
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
    """A sentence for each family: what refinement does, and what another selection of as many atoms would do."""
    items = ""
    for family, members in _by_family(rows).items():
        parts = [
            _changes(members, lambda row: row.get("mean_change"), "changes the mean activation by {}"),
            _changes(members, lambda row: _relative(row, "nmse_after"), "the error by {}"),
            _changes(members, lambda row: _zeroed(row), "and sets {} of the values to 0", ".0%"),
        ]
        again = _changes(
            members,
            lambda row: _relative(row, "nmse_omp_nonnegative"),
            " Selecting as many atoms by orthogonal matching pursuit, with values of at least 0, changes it by {}.",
        )
        if any(parts):
            text = f"Refinement {', '.join(filter(None, parts))}.{again}"
            items += f'<li class="{html.colour(family)}"><strong>{escape(html.label(family))}.</strong> {text}</li>'
    note = "The encoder chooses which latents are active; refinement computes the best values of these latents."
    return f'{html.note(note)}<ul class="findings">{items}</ul>' if items else ""


def _changes(rows: list[dict[str, Any]], number: Any, text: str, how: str = "+.0%") -> str:
    """The text with the range of a number over those rows that have it; "" if none has."""
    found = [value for value in map(number, rows) if value is not None]
    return escape(text.format(_range(found, how))) if found else ""


def _relative(row: dict[str, Any], key: str) -> svg.Real | None:
    """An error relative to the encoder's."""
    after, before = row.get(key), row.get("nmse_before")
    return None if after is None or not before else after / before - 1


def _zeroed(row: dict[str, Any]) -> svg.Real | None:
    after, before = row.get("l0_after"), row.get("l0")
    return None if after is None or not before else 1 - after / before


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


def _reconstructions(rows: list[dict[str, Any]]) -> str:
    note = (
        "NMSE of several codes with as many atoms in each row, on the same dictionary. From left to right on the "
        "encoder’s support: its own values, these multiplied by one factor for each latent, the best values of at "
        "least 0, and the best of any sign. Then as many atoms chosen by orthogonal "
        "matching pursuit; and the same number of them in every row, the mean L0."
    )
    there = any(row.get("nmse_omp_nonnegative") is not None for row in rows)
    return _columns(note, rows, _RECONSTRUCTIONS) if there else ""


def _known(rows: list[dict[str, Any]]) -> str:
    note = (
        "Latents are matched to the true features, one to one; MCC is the mean cosine. Bias is the relative error of "
        "the sum of values, over the entries that are active in both; the error of values is a root mean square."
    )
    return _columns(note, rows, _KNOWN) if any(row.get("mcc") is not None for row in rows) else ""


def _lengths(report: dict[str, Any]) -> str:
    """How shrinkage and error depend on the length of training."""
    shorter = report.get("shorter") or []
    if not shorter:
        return ""
    first = shorter[0]
    whole = [row for row in report["rows"] if all(row.get(key) == first[key] for key in ("l0_target", "seed"))]
    families = _by_family([*shorter, *whole])
    figures = []
    for key, how in (("mean_change", "+.1%"), ("nmse_before", ".4f"), ("nmse_after", ".4f")):
        series = []
        for family, members in families.items():
            rows = sorted((row for row in members if row.get(key) is not None), key=lambda row: row["steps"])
            titles = [f"{html.label(family)}, {row['steps']:,} steps: {form(row[key], how)}" for row in rows]
            values = [row["steps"] for row in rows], [row[key] for row in rows]
            series.append(svg.Line(*values, html.colour(family), titles=titles))
        log = key != "mean_change"
        x = svg.axis("steps of training", [value for line in series for value in line.x], log=True)
        y = svg.axis(_LENGTHS[key], [v for line in series for v in line.y], log=log, form=plain if log else percent)
        figures.append(html.figure(svg.lines(series, x, y, f"{_LENGTHS[key]} by steps of training.")))
    note = f"Trainings of several lengths, to an L0 of {first['l0_target']:g}: what is due to unfinished training."
    return html.note(note) + html.legend(families) + html.grid(figures)


_LENGTHS = {
    "mean_change": "change of the mean activation",
    "nmse_before": "NMSE, encoder’s values",
    "nmse_after": "NMSE, refined",
}


def _columns(caption: str, rows: list[dict[str, Any]], groups: Any) -> str:
    """A table of the columns that any row has a number for."""
    kept = [(name, [c for c in columns if any(row.get(c[1]) is not None for row in rows)]) for name, columns in groups]
    columns = [column for _, members in kept for column in members]
    if not columns:
        return ""
    forms = {key: how or _decimals(row.get(key) for row in rows) for _, key, how in columns}
    cells = [[method(row), *(_cell(row, key, how) for key, how in forms.items())] for row in rows]
    over = [("", 1), *((name, len(members)) for name, members in kept if members)]
    return html.table(caption, ["method", *(name for name, _, _ in columns)], cells, over)


def _cell(row: dict[str, Any], key: str, how: str) -> str:
    """A number with its standard error over seeds, if there is one."""
    error = row.get("errors", {}).get(key)
    shown = form(row.get(key), how)
    return shown if error is None or key == "worst_kkt" else f"{shown} ± {form(error, how.lstrip('+'))}"


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
            at = "l0_after" if key.endswith("_after") and all(row.get("l0_after") for row in rows) else "l0"
            titles = [f"{method(row)}: L0 {form(row[at], '.1f')}, {form(row[key], how)}{which}" for row in rows]
            css = html.colour(family) + " open dashed" * before
            series.append(svg.Line([row[at] for row in rows], [row[key] for row in rows], css, titles=titles))
            note += titles
    if not note:
        return ""
    x = svg.axis("L0: active latents per row", [value for line in series for value in line.x], log=True)
    values = [base, *(value for line in series for value in line.y)]
    y = svg.axis(label, values, log=log, form=percent if "%" in how else plain)
    across = [] if base is None else [svg.Line([x.low, x.high], [base, base], "c-other")]
    return html.figure(svg.lines(across + series, x, y, f"{label} against L0. {'; '.join(note)}."))


def _distributions(report: dict[str, Any], key: str, what: str) -> str:
    """Histograms of refined over original, a row of small figures for each family, at one scale."""
    text = ""
    for members in _by_family(row for row in report["rows"] if sum(row.get(key) or [])).values():
        shares = [[count / sum(row[key]) for count in row[key]] for row in members]
        highest = max(max(share[1:-1]) for share in shares) or 1.0  # the bins at the ends have no width
        y = svg.axis("", [highest], zero=True, form=percent, ticks=3)
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
        text += html.grid((firing(row["firing"], family, method(row)) for row in members), "small")
    rows = max((row.get("dead_rows") or 0 for row in report["rows"]), default=0)
    return firing_note(rows or report["data"]["heldout"]) + text if text else ""


def _study_curves(rows: list[dict[str, Any]]) -> str:
    families = _by_family(row for row in rows if row.get("curve"))
    figures = []
    for name in ("nmse", "l0"):
        series = [
            svg.Line(row["curve"]["step"], row["curve"][name], html.colour(family), method(row).partition(", ")[2])
            for family, members in families.items()
            for row in members
        ]
        figures.append(curve(name, series, svg.NAMED))
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
