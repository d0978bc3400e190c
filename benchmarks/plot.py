"""Speed against accuracy, one panel per case."""

import os
from typing import Any

from benchmarks.judge import ADDED_NMSE

_FLOOR = 1e-16  # float64 resolves no smaller excess, and a logarithmic axis has no 0


def speed_against_accuracy(report: dict[str, Any], path: str | os.PathLike) -> None:
    """Draw rows a second against the worst added NMSE: open where the gate is not met, dots for what tuning tried.

    Args:
      report: as the benchmark's JSON holds it.
      path: a PNG file.
    """
    from matplotlib import colormaps
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    cases = [case["case"] for case in report["cases"]]
    figure = Figure(figsize=(5.2 * len(cases), 5.6), layout="constrained")
    FigureCanvasAgg(figure)
    solvers = list(dict.fromkeys(row["solver"] for row in report["rows"] if row["rows_per_s"]))
    for axes, case in zip(figure.subplots(1, len(cases), squeeze=False)[0], cases, strict=True):
        for row in report["rows"]:
            if row["case"] != case or row["added_nmse"] is None:
                continue
            number = solvers.index(row["solver"])
            colour = colormaps["tab20"](2 * number % 20 + number // 10)  # its strong colours first
            tried = [_point(trial) for trial in row["tried"] if trial["added_nmse"] is not None]
            axes.plot([x for x, _ in tried], [y for _, y in tried], ".", color=colour, alpha=0.4, markersize=4)
            axes.plot(
                *_point(row),
                "D" if row["kind"] == "ours" else "o",
                color=colour,
                markerfacecolor=colour if row["gate_met"] else "white",
                markersize=8,
                linestyle="",
                label=row["solver"],
            )
        axes.axvline(ADDED_NMSE, color="black", linewidth=0.8)
        axes.set(xscale="log", yscale="log", title=case, xlabel="worst added NMSE (line: the gate; open: not met)")
        axes.invert_xaxis()
        axes.grid(which="major", alpha=0.25)
    figure.axes[0].set_ylabel(f"rows a second on {report['device']}, {report['cores']} cores")
    handles = {}
    for axes in figure.axes:
        handles |= dict(zip(*reversed(axes.get_legend_handles_labels()), strict=True))
    figure.legend(handles.values(), handles.keys(), loc="outside lower center", ncols=5, frameon=False, fontsize=9)
    figure.savefig(path, dpi=150, format="png")


def _point(row: dict[str, Any]) -> tuple[float, float]:
    return max(row["added_nmse"], _FLOOR), row["rows_per_s"]
