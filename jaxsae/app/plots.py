"""Figures of a study, drawn from its report."""

import math
import os
from pathlib import Path
from typing import Any

import numpy as np

from jaxsae._core.files import atomic_file
from jaxsae.app.summary import FAMILIES, means

# What is compared in the figure of reconstructions, from left to right.
_COMPARED = (
    ("nmse_before", "encoder", "o", "white"),
    ("nmse_rescaled", "a factor a latent", "d", "white"),
    ("nmse_after", "refined", "o", None),
    ("nmse_omp_nonnegative", "OMP, z ≥ 0", "s", None),
    ("nmse_omp", "OMP", "s", "white"),
)

_LONGEST = 24  # characters of a name beside an axis


def draw(report: dict[str, Any], folder: str | os.PathLike) -> list[Path]:
    """Draw all figures that a report has the data for: `shrinkage.png`, `reconstructions.png` and `steps.png`.

    Args:
      report: as `study.run` returns it.
      folder: where to write them.

    Returns:
      The files.

    Example:
      >>> import tempfile
      >>> row = {"family": "topk", "l0_target": 8, "l0": 8.0, "l0_after": 8.0, "change": [1] * 80}
      >>> row |= {"nmse_before": 0.3, "nmse_after": 0.2}
      >>> edges = [2 ** (i / 8 - 4) for i in range(81)]
      >>> with tempfile.TemporaryDirectory() as folder:
      ...     [path.name for path in draw({"rows": [row], "ratio_edges": edges}, folder)]
      ['shrinkage.png']
    """
    figures = {"shrinkage.png": shrinkage}
    if any(row.get("nmse_omp_nonnegative") is not None for row in report["rows"]):
        figures["reconstructions.png"] = reconstructions
    if report.get("shorter"):
        figures["steps.png"] = steps
    for name, figure in figures.items():
        with atomic_file(Path(folder, name)) as temporary:
            figure(report, temporary)
    return [Path(folder, name) for name in figures]


def shrinkage(report: dict[str, Any], path: str | os.PathLike) -> None:
    """Draw how values change, and what that does to the error.

    Left: distribution of the relative change of active values, a line for each family. Right: NMSE against L0, before
    (open, dashed) and after refinement (filled), where values that became 0 no longer count; then, if a language model
    was studied, its next-token cross-entropy likewise. Bars are standard errors over seeds.

    Args:
      report: as `study.run` returns it.
      path: a PNG file.

    Example:
      >>> import tempfile
      >>> row = {"family": "topk", "l0_target": 8, "l0": 8.0, "l0_after": 8.0, "change": [1] * 80}
      >>> row |= {"nmse_before": 0.3, "nmse_after": 0.2}
      >>> edges = [2 ** (i / 8 - 4) for i in range(81)]
      >>> with tempfile.TemporaryDirectory() as folder:
      ...     shrinkage({"rows": [row], "ratio_edges": edges}, f"{folder}/shrinkage.png")
    """
    panels = [("nmse", "NMSE on held-out rows", "Error against sparsity, before and after")]
    clean = report.get("ce_clean")
    if clean is not None:
        panels.append(("ce", "next-token cross-entropy (nats)", "What the codes cost the language model"))
    figure, (left, *rights) = _figure(1 + len(panels))
    families = _families(report["rows"])
    _draw_changes(left, families, np.asarray(report["ratio_edges"]))
    for axes, (name, label, title) in zip(rights, panels, strict=True):
        axes.set(xlabel="L0: active latents per row (refined: not 0)", ylabel=label, title=title)
        _draw_errors(axes, families, name)
    if clean is not None:
        mean = "–" if report["ce_mean"] is None else f"{report['ce_mean']:.2f}"
        label = f"the model itself, {clean:.2f} (its mean instead: {mean})"
        rights[-1].axhline(clean, color="black", linewidth=0.8, label=label)
    rights[0].plot([], [], "o--", color="grey", markerfacecolor="white", label="encoder's values")
    rights[0].plot([], [], "o-", color="grey", label="refined")
    _finish(figure, path)


def reconstructions(report: dict[str, Any], path: str | os.PathLike) -> None:
    """Draw what values buy and what selection buys: the NMSE of several codes of as many atoms, a panel for each L0.

    Args:
      report: as `study.run` returns it.
      path: a PNG file.

    Example:
      >>> import tempfile
      >>> row = {"family": "topk", "l0_target": 8, "nmse_before": 0.3, "nmse_after": 0.2, "nmse_omp_nonnegative": 0.1}
      >>> with tempfile.TemporaryDirectory() as folder:
      ...     reconstructions({"rows": [row]}, f"{folder}/reconstructions.png")
    """
    rows = [row for row in means(report["rows"]) if row.get("nmse_omp_nonnegative") is not None]
    groups: dict[Any, list[dict[str, Any]]] = {}
    for row in rows:
        groups.setdefault(row.get("l0_target"), []).append(row)
    figure, panels = _figure(len(groups))
    for axes, (l0, members) in zip(panels, groups.items(), strict=True):
        names = [_short(row.get("sae") or FAMILIES[row["family"]][0]) for row in members]
        for number, row in enumerate(members):
            colour = _colour(row["family"])
            shown = [row[key] for key, *_ in _COMPARED if row.get(key) is not None]
            axes.plot([min(shown), max(shown)], [number] * 2, color=colour, linewidth=0.8)
            for key, _, marker, face in (each for each in _COMPARED if row.get(each[0]) is not None):
                error = row["errors"].get(key)
                style = {"color": colour, "markerfacecolor": face or colour}
                axes.errorbar(row[key], number, xerr=error, fmt=marker, capsize=2, **style)
        for _, label, marker, face in _COMPARED:
            axes.plot([], [], marker, color="grey", markerfacecolor=face or "grey", label=label)
        axes.set_yticks(range(len(names)), names)
        axes.set(xlabel="NMSE on held-out rows", title="" if l0 is None else f"L0 {l0:g}")
        axes.invert_yaxis()
        _set_logarithmic(axes, [axes.xaxis])
        axes.grid(axis="x", which="both", alpha=0.25)
    _finish(figure, path)


def _short(name: str) -> str:
    """The end of a long name, such as a path."""
    return name if len(name) <= _LONGEST else f"…{name[1 - _LONGEST :]}"


def steps(report: dict[str, Any], path: str | os.PathLike) -> None:
    """Draw how shrinkage and error depend on the length of the training: a line for each family.

    Args:
      report: as `study.run` returns it.
      path: a PNG file.

    Example:
      >>> import tempfile
      >>> row = {"family": "topk", "l0_target": 8, "seed": 0, "mean_change": 0.1, "nmse_before": 0.3, "nmse_after": 0.2}
      >>> report = {"rows": [row | {"steps": 20}], "shorter": [row | {"steps": 10}]}
      >>> with tempfile.TemporaryDirectory() as folder:
      ...     steps(report, f"{folder}/steps.png")
    """
    first = report["shorter"][0]
    rows = [row for row in report["rows"] if _same(row, first, "l0_target", "seed")] + report["shorter"]
    figure, panels = _figure(3)
    labels = (
        ("mean_change", "change of the mean activation by refinement"),
        ("nmse_before", "NMSE, encoder's values"),
        ("nmse_after", "NMSE, refined"),
    )
    for axes, (key, label) in zip(panels, labels, strict=True):
        for family, (name, *_) in FAMILIES.items():
            some = sorted((row for row in rows if row["family"] == family), key=lambda row: row.get("steps", 0))
            if some and "steps" in some[0]:
                values = [row["steps"] for row in some], [row[key] for row in some]
                axes.plot(*values, "o-", color=_colour(family), label=name if axes is panels[0] else None)
        axes.set(xlabel="steps of training", ylabel=label, title=f"L0 {first['l0_target']:g}")
        _set_logarithmic(axes, [axes.xaxis] + [axes.yaxis] * key.startswith("nmse"))
        axes.grid(which="both", alpha=0.25)
    _finish(figure, path)


def _same(a: dict[str, Any], b: dict[str, Any], *names: str) -> bool:
    return all(a.get(name) == b.get(name) for name in names)


def _figure(panels: int):
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(5.5 * max(panels, 1), 4.4), layout="constrained")
    FigureCanvasAgg(figure)
    return figure, figure.subplots(1, panels, squeeze=False)[0]


def _finish(figure, path) -> None:
    for axes in figure.axes:
        if axes.get_legend_handles_labels()[0]:
            axes.legend(frameon=False, fontsize=8)
    figure.savefig(path, dpi=150, format="png")


def _colour(family: str) -> str:
    return FAMILIES.get(family, ("", "#555555"))[1]


def _families(rows: list[dict[str, Any]]) -> list[tuple[str, str, list[dict[str, Any]]]]:
    """Name, colour and means over seeds of each family, from sparse to dense."""
    found = means(rows)
    names = [*FAMILIES, *sorted({row["family"] for row in found} - set(FAMILIES))]
    members = {name: [row for row in found if row["family"] == name] for name in names}
    return [
        (FAMILIES.get(name, (name,))[0], _colour(name), sorted(some, key=lambda row: row["l0"] or 0))
        for name, some in members.items()
        if some
    ]


def _draw_changes(axes, families, edges) -> None:
    """How active values change, as a distribution."""
    for label, colour, rows in families:
        counts = np.array([row["change"] for row in rows]).sum(axis=0)
        axes.stairs(_share(counts), edges, color=colour, linewidth=1.4, label=label)
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
    for _, colour, rows in families:
        for when, style, face in (("before", "o--", "white"), ("after", "o-", colour)):
            key = "l0" if when == "before" else "l0_after"
            some = [row for row in rows if _positive(row[key]) and row.get(f"{name}_{when}") is not None]
            x, y = [row[key] for row in some], [row[f"{name}_{when}"] for row in some]  # on a logarithmic axis
            errors = [row["errors"].get(f"{name}_{when}", 0.0) for row in some]
            axes.errorbar(x, y, yerr=errors, fmt=style, capsize=2, color=colour, markerfacecolor=face)
            shown += y
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
