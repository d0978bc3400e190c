"""Figures of a study, drawn from its report."""

import math
import os
from typing import Any

import numpy as np

# The displayed name of a family, and its colour on white and on black.
FAMILIES = {
    "relu": ("ReLU + L1", "#c93a4c", "#f0808c"),
    "topk": ("TopK", "#00798c", "#4cc3d4"),
    "batchtopk": ("BatchTopK", "#30638e", "#7eb2e0"),
    "jumprelu": ("JumpReLU", "#8f5d00", "#edae49"),
    "gated": ("Gated", "#6a4c93", "#b79be0"),
    "abstopk": ("AbsTopK", "#5f7d4f", "#a3c48f"),
    "groupmax": ("GroupMax", "#8d6346", "#d0a583"),
    "matchingpursuit": ("matching pursuit", "#555555", "#b5b5b5"),
}


def method(row: dict[str, Any]) -> str:
    """The name of a row of a study.

    Args:
      row: of a study's report.

    Example:
      >>> method({"family": "topk", "k_or_l1": 32}), method({"family": "relu", "k_or_l1": 0.1})
      ('TopK, k 32', 'ReLU, L1 0.1')
    """
    if "sae" in row:
        return row["sae"]
    return f"ReLU, L1 {row['k_or_l1']:g}" if row["family"] == "relu" else f"TopK, k {row['k_or_l1']:g}"


def shrinkage(report: dict[str, Any], path: str | os.PathLike) -> None:
    """Draw the figure of a study: how values change, and what that does to the error.

    Left: distribution of the relative change of active values, a thin line for each SAE and a filled one for the
    family. Right: NMSE against L0, before (open, dashed) and after refinement (filled); then, if a language model was
    studied, its next-token cross-entropy likewise.

    Args:
      report: as `study.run` returns it.
      path: a PNG file.

    Example:
      >>> import tempfile
      >>> row = {"family": "topk", "l0": 8.0, "nmse_before": 0.3, "nmse_after": 0.2, "change": [1] * 80}
      >>> edges = [2 ** (i / 8 - 4) for i in range(81)]
      >>> with tempfile.TemporaryDirectory() as folder:
      ...     shrinkage({"rows": [row], "ratio_edges": edges}, f"{folder}/shrinkage.png")
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    panels = [("nmse", "NMSE on held-out rows", "Error against sparsity, before and after")]
    clean = report.get("ce_clean")
    if clean is not None:
        panels.append(("ce", "next-token cross-entropy (nats)", "What the codes cost the language model"))
    figure = Figure(figsize=(5.5 + 5.5 * len(panels), 4.4), layout="constrained")
    FigureCanvasAgg(figure)
    left, *rights = figure.subplots(1, 1 + len(panels))
    found = {family: [row for row in report["rows"] if row["family"] == family] for family in FAMILIES}
    families = [(*FAMILIES[name][:2], sorted(rows, key=lambda row: row["l0"] or 0)) for name, rows in found.items()]
    families = [family for family in families if family[2]]
    _draw_changes(left, families, np.asarray(report["ratio_edges"]))
    for axes, (name, label, title) in zip(rights, panels, strict=True):
        axes.set(xlabel="L0: active latents per row", ylabel=label, title=title)
        _draw_errors(axes, families, name)
    if clean is not None:
        mean = "–" if report["ce_mean"] is None else f"{report['ce_mean']:.2f}"
        label = f"the model itself, {clean:.2f} (its mean instead: {mean})"
        rights[-1].axhline(clean, color="black", linewidth=0.8, label=label)
    for axes in (left, *rights):
        if axes.get_legend_handles_labels()[0]:
            axes.legend(frameon=False, fontsize=9)
    figure.savefig(path, dpi=150, format="png")


def _draw_changes(axes, families, edges) -> None:
    """How active values change, as a distribution."""
    for label, colour, rows in families:
        counts = np.array([row["change"] for row in rows])
        axes.stairs(_share(counts.sum(axis=0)), edges, fill=True, color=colour, alpha=0.3, label=label)
        for count in counts:
            axes.stairs(_share(count), edges, color=colour, linewidth=0.8)
    axes.axvline(1, color="black", linewidth=0.8)
    axes.set_xscale("log", base=2)
    ratios = [1 / 16, 1 / 4, 1, 2, 8, 64]
    axes.set_xticks(ratios, ["0" if ratio == 1 else f"{ratio - 1:+.0%}" for ratio in ratios])
    axes.set(
        xlabel="relative change of an active value under refinement (ends: and beyond)",
        ylabel="share of active values per bin (%)",
        title="Refinement raises shrunken activations",
        xlim=(edges[0], edges[-1]),
    )


def _draw_errors(axes, families, name: str) -> None:
    """An error against L0, before and after."""
    shown = []
    for label, colour, rows in families:
        rows = [row for row in rows if _positive(row["l0"])]  # an L0 of 0 cannot be shown on a logarithmic axis
        l0 = [row["l0"] for row in rows]
        before, after = ([row[f"{name}_{when}"] for row in rows] for when in ("before", "after"))
        axes.plot(l0, before, "o--", color=colour, markerfacecolor="white", label=f"{label}, encoder's values")
        axes.plot(l0, after, "o-", color=colour, label=f"{label}, refined")
        shown += before + after
    logarithmic = [axes.xaxis] if shown else []
    logarithmic += [axes.yaxis] if name == "nmse" and any(map(_positive, shown)) else []
    _set_logarithmic(axes, logarithmic)
    axes.grid(which="both", alpha=0.25)


def _set_logarithmic(axes, which) -> None:
    """Scale some axes by their logarithm, with labels at 1, 2, 3, 5, 10."""
    from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

    axes.set(**{f"{axis.axis_name}scale": "log" for axis in which})
    for axis in which:
        axis.set_major_locator(LogLocator(subs=(1, 2, 3, 5)))
        axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
        axis.set_minor_formatter(NullFormatter())
    for axis in which:
        low, high = axis.get_view_interval()
        if high < 2 * low:  # nearly equal numbers would look far apart
            middle = math.sqrt(low * high)
            axes.set(**{f"{axis.axis_name}lim": (middle / math.sqrt(2), middle * math.sqrt(2))})


def _positive(value: float | None) -> bool:
    return value is not None and 0 < value < math.inf


def _share(counts):
    return 100 * counts / max(counts.sum(), 1)
