"""Charts and tables that the pages of a run and of a study share."""

from typing import Any

from jaxsae.app import html, svg
from jaxsae.app.html import form

LABELS = {
    "nmse": "NMSE of a batch",
    "l0": "L0: active latents per row",
    "dead": "dead latents, of up to 100,000 rows",
    "heldout_nmse": "NMSE on held-out rows",
    "heldout_l0": "L0 on held-out rows",
    "heldout_dead": "latents dead on held-out rows",
    "loss": "loss",
    "gradient_norm": "norm of the gradient",
    "learning_rate": "learning rate",
    "rows_per_second": "rows per second",
    "step_seconds": "seconds per step",
    "data_wait": "share of the time spent waiting for data",
    "skipped": "batches skipped so far",
}


def configuration(report: dict[str, Any], options: dict[str, Any] | None) -> str:
    """Options of a report, its data and versions."""
    beside = html.pairs("Data", report.get("data")) + html.pairs("Versions", report.get("versions"))
    return html.grid([html.pairs("Options", options), f"<div>{beside}</div>" if beside else ""])


def plain(value: svg.Real) -> str:
    """A number as a label."""
    return form(value, ",g")


def percent(value: svg.Real) -> str:
    """A share as a label."""
    return form(value, ".4g%")


def firing_note(rows: int) -> str:
    """An explanation of `firing`."""
    return html.note(
        f"Share of the latents by the number of {form(rows, ',d')} rows, held out and others, on which they are "
        "active: 0, 1, 2 or 3, 4 to 7, and so on. The grey bar, if any, shows the dead latents, active on none."
    )


def firing(counts: list[int], family: str, name: str = "") -> str:
    """A chart whose bar `n` shows the latents that fire on `2ⁿ⁻¹` to `2ⁿ − 1` rows; bar 0, the dead ones."""
    shares = [count / sum(counts) for count in counts]
    drawn = [
        svg.Bar(n + 0.08, n + 0.92, share, html.colour(family) if n else "c-other", f"{count:,}: {form(share, '.1%')}")
        for n, (count, share) in enumerate(zip(counts, shares, strict=True))
    ]
    ticks = [0, *range(1, len(counts), 2)]
    marks = tuple((n + 0.5, _short(2 ** (n - 1) if n else 0)) for n in ticks)
    x = svg.Axis("rows on which it is active", 0, len(counts), False, marks)
    y = svg.axis("" if name else "share of the latents", shares, zero=True, form=percent, ticks=3)
    note = f"{counts[0]:,} of {sum(counts):,} dead"
    box = svg.SMALL if name else svg.LARGE
    return html.figure(svg.bars(drawn, x, y, f"{name} latents: {note}.".strip(), box), name, note)


def _short(count: int) -> str:
    """A power of two, or 0, in short form."""
    thousands = max(count.bit_length() - 1, 0) // 10
    return f"{count >> 10 * thousands}{' kMGT'[thousands].strip()}"


def curve(name: str, series: list[svg.Line], box: svg.Box) -> str:
    """A chart of what was logged under a name, by step."""
    label, values = LABELS.get(name, name), [value for line in series for value in line.y if value is not None]
    if not values:
        return ""
    log = name in ("nmse", "heldout_nmse", "loss", "gradient_norm") and min(values) > 0
    x = svg.axis("step", [step for line in series for step in line.x], zero=True)
    is_share = name in ("dead", "heldout_dead", "data_wait")
    least = [0.01] if is_share else []  # for an axis if all are 0
    y = svg.axis(label, values + least, log=log, zero=not log, form=percent if is_share else plain)
    ends = "; ".join(f"{line.name} ends at {form(line.y[-1], '.4g')}".strip() for line in series if line.y)
    return html.figure(svg.lines(series, x, y, f"{label}, by training step. {ends}.", box))
