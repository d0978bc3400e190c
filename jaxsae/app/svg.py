"""Charts as SVG text: lines and bars over two axes, in a few small functions.

Shapes have CSS classes instead of colours, so that the page decides between light and dark. Sizes are in units of about
a pixel; a chart scales with its column.
"""

import math
from collections.abc import Callable, Iterable, Sequence
from html import escape
from typing import NamedTuple

Real = int | float


class Box(NamedTuple):
    """The size of a chart, and the margins around what is drawn."""

    width: int
    height: int
    left: int
    right: int
    top: int
    bottom: int


LARGE = Box(460, 300, left=48, right=14, top=30, bottom=42)
NAMED = LARGE._replace(right=96)  # with space for names at the ends of lines
SMALL = Box(200, 134, left=32, right=8, top=12, bottom=34)


class Axis(NamedTuple):
    """A map from values to shares of a side; `ticks` are values and their labels."""

    label: str
    low: Real
    high: Real
    log: bool
    ticks: tuple[tuple[Real, str], ...]

    def __call__(self, value: Real) -> Real:
        """The position of a value: 0 at the low end, 1 at the high one."""
        scale = math.log if self.log else float
        low, high = scale(self.low), scale(self.high)
        return (scale(value) - low) / (high - low)


class Line(NamedTuple):
    """A line through points; those that cannot be shown, such as NaN, break it.

    Attributes:
      x, y: the points.
      css: classes: the colour, and `dashed`, `open` or others that the page defines.
      name: written at its end.
      titles: one for each point, which then has a mark; shown when the mouse is over it.
    """

    x: Sequence[Real]
    y: Sequence[Real | None]
    css: str
    name: str = ""
    titles: Sequence[str] = ()


class Bar(NamedTuple):
    """A bar from `low` to `high` on the x axis; one higher than the axis is cut off, and has its `note` beside it."""

    low: Real
    high: Real
    height: Real
    css: str
    title: str = ""
    note: str = ""


def axis(
    label: str,
    values: Iterable[Real | None],
    *,
    log: bool = False,
    zero: bool = False,
    form: Callable[[Real], str] = "{:,g}".format,
    ticks: int = 5,
) -> Axis:
    """An axis that covers some values with a margin, with round ticks.

    Args:
      label: what it shows, with the unit.
      values: to cover; those that are not finite, or on a logarithmic axis not positive, are ignored.
      log: logarithmic.
      zero: start at 0.
      form: how a tick is written.
      ticks: about how many ticks.

    Example:
      >>> axis("L0", [8.0, 60.0], log=True).ticks
      ((10.0, '10'), (20.0, '20'), (50.0, '50'))
      >>> [text for _, text in axis("steps", [1, 1000], zero=True).ticks]
      ['0', '200', '400', '600', '800', '1,000']
    """
    seen = [float(value) for value in values if value is not None and _shown(value, log)] or [1.0]
    low, high = min(seen), max(seen)
    if log:
        margin = (high / low) ** 0.06 if high > low else 1.5
        low, high = low / margin, high * margin
        found = _log_ticks(low, high, ticks)
    else:
        low = min(low, 0.0) if zero else low
        margin = 0.06 * (high - low) or 0.5 * abs(high) or 0.5
        low, high = low if zero else low - margin, high + margin
        found = _linear_ticks(low, high, ticks)
    return Axis(label, low, high, log, tuple((value, form(value)) for value in found))


def _shown(value: Real | None, log: bool = False) -> bool:
    return value is not None and math.isfinite(value) and (value > 0 or not log)


def _linear_ticks(low: Real, high: Real, count: int) -> list[Real]:
    least = (high - low) / count
    power = 10.0 ** math.floor(math.log10(least))
    step = next(step for step in (power, 2 * power, 5 * power, 10 * power) if step >= 0.9 * least)
    return [step * n for n in range(math.ceil(low / step), math.floor(high / step) + 1)]


def _log_ticks(low: Real, high: Real, count: int) -> list[Real]:
    powers = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    for digits in ("1", "13", "125", "1235", "12357", "123456789"):
        found = [float(f"{digit}e{power}") for power in powers for digit in digits]
        found = [value for value in found if low <= value <= high]
        if len(found) >= 3:
            return found[:: math.ceil(len(found) / (count + 1))]
    return _linear_ticks(low, high, count)


def lines(series: Sequence[Line], x: Axis, y: Axis, label: str, box: Box = LARGE) -> str:
    """A chart of lines.

    Args:
      series: what to draw, the last on top.
      x: the axis along the bottom.
      y: the axis up the side.
      label: a description for screen readers.
      box: its size.

    Example:
      >>> x, y = axis("step", [0, 1]), axis("NMSE", [0.5, 1.0])
      >>> lines([Line([0, 1], [1.0, 0.5], "loss")], x, y, "NMSE falls.")[:24]
      '<svg viewBox="0 0 460 30'
    """
    parts = [_line(line, x, y, box) for line in series]
    return _svg([_frame(x, y, box), *parts, _names(series, x, y, box)], label, box)


def bars(drawn: Iterable[Bar], x: Axis, y: Axis, label: str, box: Box = SMALL) -> str:
    """A chart of bars; arguments as for `lines`.

    Example:
      >>> bars([Bar(0, 1, 3.0, "dead")], axis("", [0, 1]), axis("", [0, 4], zero=True), "Three.")[:24]
      '<svg viewBox="0 0 200 13'
    """
    return _svg([_frame(x, y, box), *(_bar(bar, x, y, box) for bar in drawn)], label, box)


def _svg(parts: Iterable[str], label: str, box: Box) -> str:
    start = f'<svg viewBox="0 0 {box.width} {box.height}" role="img" aria-label="{escape(label)}">'
    return start + "".join(parts) + "</svg>"


def _across(x: Axis, value: Real, box: Box) -> Real:
    return round(box.left + x(value) * (box.width - box.left - box.right), 1)


def _down(y: Axis, value: Real, box: Box) -> Real:
    return round(box.height - box.bottom - y(value) * (box.height - box.top - box.bottom), 1)


def _frame(x: Axis, y: Axis, box: Box) -> str:
    """Grid, ticks and labels; that of y is above its axis, and horizontal."""
    right, bottom = box.width - box.right, box.height - box.bottom
    parts = []
    for value, text in y.ticks:
        at = _down(y, value, box)
        parts += [f'<path class="grid" d="M{box.left} {at}H{right}"/>', _text(box.left - 6, at + 4, text, "end")]
    for value, text in x.ticks:
        at = _across(x, value, box)
        parts += [f'<path class="grid" d="M{at} {box.top}V{bottom}"/>', _text(at, bottom + 15, text, "middle")]
    parts.append(f'<path class="base" d="M{box.left} {bottom}H{right}"/>')
    if x.label:
        parts.append(_text((box.left + right) / 2, box.height - 6, x.label, "middle", "label"))
    if y.label:
        parts.append(_text(2, 14, y.label, "start", "label"))
    return "".join(parts)


def _text(x: Real, y: Real, text: str, anchor: str, css: str = "tick") -> str:
    return f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}" class="{css}">{escape(text)}</text>'


def _line(line: Line, x: Axis, y: Axis, box: Box) -> str:
    path, marks, pen = "", "", "M"
    for n, (a, b) in enumerate(zip(line.x, line.y, strict=True)):
        if b is None or not (_shown(a, x.log) and _shown(b, y.log)):
            pen = "M"
            continue
        across, down = _across(x, a, box), _down(y, b, box)
        path += f"{pen}{across:g} {down:g}" + "h0" * (pen == "M")  # a point between two gaps is a dot
        pen = "L"
        if line.titles:
            title = f"<title>{escape(line.titles[n])}</title>"
            marks += f'<circle class="{line.css}" cx="{across:g}" cy="{down:g}" r="4">{title}</circle>'
    return f'<path class="line {line.css}" d="{path}"/>{marks}' if path else ""


def _names(series: Sequence[Line], x: Axis, y: Axis, box: Box) -> str:
    """Names at the ends of lines, moved apart where they would overlap."""
    ends = []
    for line in series:
        points = [(a, b) for a, b in zip(line.x, line.y, strict=True) if _shown(a, x.log) and _shown(b, y.log)]
        if line.name and points:
            ends.append((_down(y, points[-1][1] or 0.0, box) + 4, line))
    ends.sort(key=lambda end: end[0])
    room, lowest, places = 17, box.height - box.bottom, []
    for at, _ in ends:
        places.append(max(at, places[-1] + room) if places else at)
    for n in reversed(range(len(places))):  # those pushed out at the bottom push back
        places[n] = min(places[n], lowest - room * (len(places) - 1 - n))
    left = box.width - box.right + 6
    return "".join(
        _text(left, at, line.name, "start", f"name {line.css}") for at, (_, line) in zip(places, ends, strict=True)
    )


def _bar(bar: Bar, x: Axis, y: Axis, box: Box) -> str:
    if not bar.height > 0:
        return ""
    left, right = _across(x, bar.low, box), _across(x, bar.high, box)
    top, bottom = _down(y, min(bar.height, y.high), box), box.height - box.bottom
    title = f"<title>{escape(bar.title)}</title>" if bar.title else ""
    size = f'width="{right - left:.1f}" height="{bottom - top:.1f}"'
    drawn = f'<rect class="{bar.css}" x="{left:g}" y="{top:g}" {size}>{title}</rect>'
    if bar.height > y.high and bar.note:
        late = left > box.width / 2
        drawn += _text(left - 3 if late else right + 3, box.top + 9, bar.note, "end" if late else "start", "label")
    return drawn
