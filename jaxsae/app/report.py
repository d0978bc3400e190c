"""The HTML page of a training run, a study or latents, which needs no network."""

import json
import math
import os
import shlex
from html import escape
from pathlib import Path
from typing import Any

from jaxsae._core.files import InputError, atomic_file, local_path
from jaxsae.app import features_page, html, logs, runs, study_page, svg
from jaxsae.app.charts import LABELS, configuration, curve, firing, firing_note
from jaxsae.app.html import form

_BINS = 300  # of a long curve


def write(run: str | os.PathLike, out: str | os.PathLike) -> None:
    """Write the page of a run, a study or latents.

    Args:
      run: directory that `runs.run` or `study.run` wrote, or that has the features.json of `features_page`.
      out: the file to write; beside that of many latents is a folder for its scripts.

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
    if (run / features_page.NAME).exists():
        if (run / "report.json").exists():
            have = f"report.json and {features_page.NAME}, expected one of them"
            raise InputError(f"{run}: holds {have}; move {features_page.NAME} to a directory of its own.")
        return features_page.write(run, out)
    text = page(run)
    with atomic_file(out) as temporary:
        temporary.write_text(text, encoding="utf-8")


def page(run: str | os.PathLike) -> str:
    """The page of a run or a study, as `write` writes it; that of latents may be several files.

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
        raise InputError(f"{run}: {what}; pass one that jaxsae train, study or features wrote.")
    report, curves = _read(path), logs.curves(run)
    if not report and not curves:
        have = "no report.json, features.json or curves"
        raise InputError(f"{run}: holds {have}; pass what jaxsae train, study or features wrote.")
    if report and not {"rows", "options"} & set(report):
        raise InputError(f"{path}: is not of jaxsae train or jaxsae study; pass a directory that one of them wrote.")
    try:
        return study_page.page(report) if "rows" in report else _run(report, curves, run)
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


# --- A training run


def _run(report: dict[str, Any], curves: dict[str, dict[int, float]], path: Path) -> str:
    options, heldout = report.get("options", {}), report.get("heldout", {})
    family, counts = str(options.get("activation", "")), heldout.get("firing") or []
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
        firing_note(heldout.get("dead_rows", heldout["rows"])) + html.grid([firing(counts, family)])
        if sum(counts)
        else ""
    )
    sections = {
        "Training": _run_curves(curves, family),
        "Error against sparsity": _progressive(heldout, family),
        "How often latents fire": latents,
        "Shrinkage": _hint(path) if report else "",
        "Configuration and versions": configuration(report, options),
    }
    named = {"k": "k", "l1": "L1 weight", "latents": "latents"}
    sizes = [f"{name} {form(options[key], ',g')}" for key, name in named.items() if options.get(key) is not None]
    subtitle = ", ".join([html.label(family) or path.name, *sizes])
    return html.document("Training run", subtitle, facts, warnings, sections)


def _run_curves(curves: dict[str, dict[int, float]], family: str) -> str:
    names = [*(name for name in LABELS if name in curves), *sorted(set(curves) - set(LABELS))]
    shown = [name for name in names if name != "dead_rows" and (name != "skipped" or any(curves[name].values()))]
    return html.grid(curve(name, [svg.Line(*_thinned(curves[name]), html.colour(family))], svg.LARGE) for name in shown)


def _thinned(curve: dict[int, float]) -> tuple[list[int], list[float]]:
    """The least and the greatest value in each bin of a long curve, in order, so that spikes are kept."""
    points = [(step, value) for step, value in curve.items() if math.isfinite(value)]
    size = math.ceil(len(points) / _BINS)
    if size > 2:
        bins = [points[start : start + size] for start in range(0, len(points), size)]
        ends = [{min(part, key=lambda p: p[1]), max(part, key=lambda p: p[1])} for part in bins]
        points = [point for part in ends for point in sorted(part)]
    return [step for step, _ in points], [value for _, value in points]


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
