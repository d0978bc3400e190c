"""A table of block sizes and measured speedups by platform and shape.

`blocks.json` is written by `python -m benchmarks kernels --tune`. Each row is for one operation, platform, device, `d`,
`k` and dtype; a call uses the row of the nearest shape. `speedup` is that of the kernel over the reference on that
device; where it is null it has not been measured, and the reference is the default.
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
WORTH = 2.0  # least speedup for a kernel to be the default


@functools.cache
def table() -> list[dict[str, Any]]:
    """The rows of the table."""
    return json.loads(TABLE.read_text())


def nearest(op: str, platform: str, device: str, *, d: int, k: int, dtype: str) -> dict[str, Any] | None:
    """The row nearest in shape, from this device if the table has any, or None."""
    rows = [row for row in table() if (row["op"], row["platform"], row["dtype"]) == (op, platform, dtype)]
    rows = [row for row in rows if row["device"] == device] or rows
    if not rows:
        return None
    return min(rows, key=lambda row: abs(math.log(row["d"] / max(d, 1))) + abs(math.log(row["k"] / max(k, 1))))


@contextlib.contextmanager
def forced(options: dict[str, Any]) -> Iterator[None]:
    """Override the table's block sizes for whatever is traced in this context; used to fill the table."""
    before = _forced.set(options)
    try:
        yield
    finally:
        _forced.reset(before)


def options(row: dict[str, Any] | None) -> dict[str, Any]:
    """The block sizes of a row of the table."""
    chosen = _forced.get()
    if chosen is not None:
        return chosen
    return {} if row is None else row["options"]


def worth_it(row: dict[str, Any] | None, device: str) -> bool:
    """Whether the kernel was measured on this device, with a speedup of at least `WORTH`."""
    return row is not None and row["device"] == device and (row["speedup"] or 0) >= WORTH
