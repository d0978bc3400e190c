"""Output of the commands: results on stdout, as text or as one JSON object; progress and warnings on stderr."""

import contextlib
import json
import math
import os
import sys
import time
from typing import Any


def show(result: dict[str, Any], text: str, *, as_json: bool) -> None:
    """Print a result as text, or as one JSON object, in which NaN and Inf are null.

    A reader may close the pipe early.
    """
    encoding = sys.stdout.encoding or "utf-8"
    if as_json:
        text = json.dumps(_finite(result), allow_nan=False, default=os.fspath)
    try:
        print(text.encode(encoding, "backslashreplace").decode(encoding), flush=True)
    except OSError as error:  # what is left in the buffer would fail again when Python ends
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        if not isinstance(error, BrokenPipeError):
            raise


def _finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {name: _finite(inner) for name, inner in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(inner) for inner in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def warn(text: str) -> None:
    """Print a warning."""
    fail(f"warning: {text}")


def fail(text: str) -> None:
    """Print an error in one line; unprintable characters are escaped."""
    shown = "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)
    print(f"jaxsae: {shown}", file=sys.stderr)


def gib(size: int) -> str:
    """A number of bytes in GiB."""
    return f"{size / 2**30:.2f} GiB"


@contextlib.contextmanager
def progress(total: int, *, rows: int | None = None, unit: str = "rows", quiet: bool = False):
    """Yield `update(text, steps)`: a bar with the time left on a terminal, a plain line every tenth elsewhere.

    With `rows`, those of one step, both show the speed, without steps taken `before`.
    """
    from rich.console import Console
    from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

    console = Console(stderr=True, quiet=quiet)
    live = console.is_terminal and not console.is_dumb_terminal
    columns = (TextColumn("{task.description}"), BarColumn(), TimeElapsedColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console, transient=True, disable=not live) as bar:
        task = bar.add_task("starting", total=total)
        done: int = 0
        began: tuple[int, float] | None = None

        def update(text: str, steps: int, *, before: bool = False) -> None:
            nonlocal done, began
            if before:
                done += steps
                bar.reset(task, total=total, completed=done, description=text)
                if not quiet:
                    console.print(f"{100 * done // total:3}%  {text}", highlight=False)
                return
            if rows is not None and began is not None:
                number, since = began
                text += f"  {rows * (done + steps - number) / (time.monotonic() - since):,.0f} {unit}/s"
            bar.update(task, description=text, advance=steps)
            if not (live or quiet) and 10 * (done + steps) // total > 10 * done // total:
                print(f"{100 * (done + steps) // total:3}%  {text}", file=sys.stderr, flush=True)
            done += steps
            began = began or (done, time.monotonic())  # compilation is over

        yield update


def side_by_side(texts: dict[str, str], title: str) -> str:
    """Texts in columns, by their names, wrapped to the terminal."""
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    table = Table(*texts, title=Text(title), expand=True)
    table.add_row(*(Text(text) for text in texts.values()))
    console = Console(width=None if sys.stdout.isatty() else 120)
    with console.capture() as captured:
        console.print(table)
    return captured.get().rstrip("\n")


def study_table(report: dict[str, Any]) -> str:
    """The rows of a study's report as two tables, of values and of reconstructions, in colour on a terminal."""
    from rich.console import Console

    from jaxsae.app import summary

    data = report["data"]
    title = f"{data['heldout']} held-out rows of width {data['width']}: {data['source']}"
    shared = ("nmse_before", "nmse_after")  # of both tables
    tables = [_table(report["rows"], title, summary.VALUES)]
    tables += [
        _table(report["rows"], name, columns)
        for name, columns in (
            ("NMSE of as many atoms: the encoder's, and others on the same dictionary", summary.RECONSTRUCTIONS),
            ("next-token cross-entropy", summary.LOSSES),
            ("against the true features", summary.KNOWN),
        )
        if any(row.get(key) is not None for row in report["rows"] for _, key, _ in columns if key not in shared)
    ]
    if "ce_clean" in report:
        clean, mean, zero = (f"{report[f'ce_{name}']:.4f}" for name in ("clean", "mean", "zero"))
        tables[
            2
        ].caption = f"the model itself {clean}, with these activations replaced by the mean {mean}, by zeros {zero}"
    console = Console(width=None if sys.stdout.isatty() else 160)
    with console.capture() as captured:
        for table in tables:
            console.print(table)
    return captured.get().rstrip("\n")


def _table(rows: list[dict[str, Any]], title: str, columns) -> Any:
    """A table of means over seeds, with their standard errors if there are several."""
    from rich.table import Table

    from jaxsae.app.summary import cell, means, method

    columns = [column for column in columns if any(row.get(column[1]) is not None for row in rows)]
    table = Table("method", *(name for name, *_ in columns), title=title)
    for column in table.columns[1:]:
        column.justify = "right"
    for row in means(rows):
        cells = [cell(row, key, form) or "–" for _, key, form in columns]
        if columns and columns[-1][1] == "worst_kkt" and row["certified"] < 1:
            cells[-1] += f" ({1 - row['certified']:.1%} fail)"
        table.add_row(method(row), *cells)
    return table


def number(value: float | None) -> str:
    """A ratio as text; a dash if there is none."""
    return "–" if value is None else f"{value:.4f}"
