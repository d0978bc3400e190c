"""Block sizes by platform and shape, and which kernels have been measured to be worth it: a table, from a script.

`blocks.json` is written by `python -m benchmarks kernels --tune`. A row of it holds for one operation, platform and
device, `d`, `k` and dtype; a call takes that of the nearest shape. `speedup` is the kernel's over the reference, on
that device; where it is null nobody has measured it, and the reference stays the default.
"""

import contextlib
import functools
import json
import math
from collections.abc import Iterator
from contextvars import ContextVar
from pathlib import Path
from typing import Any

TABLE = Path(__file__).with_name("blocks.json")
_forced: ContextVar[dict[str, Any] | None] = ContextVar("block sizes", default=None)
WORTH = 2.0  # times the reference's speed, for a kernel to be the default


@functools.cache
def table() -> list[dict[str, Any]]:
    """The rows of the table."""
    return json.loads(TABLE.read_text())


def nearest(op: str, platform: str, device: str, *, d: int, k: int, dtype: str) -> dict[str, Any] | None:
    """The row nearest in shape, of this device if it has any, or None."""
    rows = [row for row in table() if (row["op"], row["platform"], row["dtype"]) == (op, platform, dtype)]
    rows = [row for row in rows if row["device"] == device] or rows
    if not rows:
        return None
    return min(rows, key=lambda row: abs(math.log(row["d"] / max(d, 1))) + abs(math.log(row["k"] / max(k, 1))))


@contextlib.contextmanager
def forced(options: dict[str, Any]) -> Iterator[None]:
    """Use these block sizes for what is traced in this context, not the table's: for the script that fills it."""
    before = _forced.set(options)
    try:
        yield
    finally:
        _forced.reset(before)


def options(row: dict[str, Any] | None) -> dict[str, Any]:
    """Block sizes by a row of the table."""
    chosen = _forced.get()
    if chosen is not None:
        return chosen
    return {} if row is None else row["options"]


def worth_it(row: dict[str, Any] | None, device: str) -> bool:
    """Whether the kernel was measured on this device and is enough faster than the reference."""
    return row is not None and row["device"] == device and (row["speedup"] or 0) >= WORTH
