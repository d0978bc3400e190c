"""Rows read from a bucket: batches of shuffled windows, and plain requests of the same bytes, from a server here."""

import os
import socket
import subprocess
import sys
import time
from typing import Any

import numpy as np

from benchmarks.clock import say
from jaxsae import data
from jaxsae.data import shards

SIZES = {
    "tiny": {"d": 16, "rows": 4096, "batch": 64},
    "paper": {"d": 768, "rows": 6 << 16, "batch": 1024},
}
_BLOCK, _TOGETHER = 4 << 20, 32  # bytes of a plain request, and how many there are at a time


def run(size: str) -> dict[str, Any]:
    """Rows a second from a server of S3's protocol on this machine, which shares its cores."""
    c = SIZES[size]
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    os.environ |= {"AWS_ENDPOINT_URL": f"http://127.0.0.1:{port}", "AWS_DEFAULT_REGION": "us-east-1"}
    os.environ |= {"AWS_ACCESS_KEY_ID": "none", "AWS_SECRET_ACCESS_KEY": "none"}
    command = [sys.executable, "-m", "moto.server", "-H", "127.0.0.1", "-p", str(port)]
    server = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        _wait(port)
        return {"case": c, **_measure(c)}
    finally:
        server.kill()
        server.wait()


def _wait(port: int) -> None:
    for _ in range(300):
        try:
            socket.create_connection(("127.0.0.1", port), timeout=1).close()
            return
        except OSError:
            time.sleep(0.1)
    raise SystemExit("no server of S3 started; pip install '.[test-cloud]'.")


def _measure(c: dict[str, int]) -> dict[str, float]:
    import fsspec

    fsspec.filesystem("s3").mkdir("bucket")
    writer = shards.Writer("s3://bucket/x", width=c["d"], dtype="float16", source="random")
    part = np.random.default_rng(0).standard_normal((min(1 << 16, c["rows"]), c["d"]), np.float32)
    for _ in range(0, c["rows"], len(part)):
        writer.append(part)
    writer.finish()
    names = [name for name in writer.manifest.files if name.endswith(".npy")]
    plain = c["rows"] / _plain([(f"bucket/x/{name}", writer.manifest.files[name]["bytes"]) for name in names])
    say(f"plain requests: {plain:,.0f} rows/s")
    began = time.perf_counter()
    stream = data.batches(data.open_rows("s3://bucket/x"), c["batch"], seed=0)
    next(stream)
    first = time.perf_counter() - began
    for _ in range(1, c["rows"] // c["batch"]):
        next(stream)
    seconds = time.perf_counter() - began
    say(f"batches: {c['rows'] / seconds:,.0f} rows/s")
    found = {"plain_rows_per_s": plain, "rows_per_s": c["rows"] / seconds, "first_batch_s": first}
    return found | {"later_rows_per_s": (c["rows"] - c["batch"]) / (seconds - first)}


def _plain(objects: list[tuple[str, int]]) -> float:
    """Seconds to read objects by ranges, several at a time, with nothing else to do."""
    import fsspec

    store = fsspec.filesystem("s3")
    pieces = [(name, start) for name, size in objects for start in range(0, size, _BLOCK)]
    began, read = time.perf_counter(), 0
    for some in (pieces[at : at + _TOGETHER] for at in range(0, len(pieces), _TOGETHER)):
        names, starts = zip(*some, strict=True)
        read += sum(map(len, store.cat_ranges(list(names), list(starts), [start + _BLOCK for start in starts])))
    if read != sum(size for _, size in objects):
        raise SystemExit("a request returned too little.")
    return time.perf_counter() - began


def markdown(report: dict[str, Any], machine: str) -> list[str]:
    """What was measured, in a sentence."""
    c = report["case"]
    return [
        f"{machine}; {c['rows']:,} rows of float16, {c['d']} wide, in windows of 256 MiB.",
        f"{report['rows_per_s']:,.0f} rows/s, {report['rows_per_s'] / report['plain_rows_per_s']:.2f} of the "
        f"{report['plain_rows_per_s']:,.0f} of plain requests for the same bytes; the first batch, for which a "
        f"window is read, after {report['first_batch_s']:.1f} s, and {report['later_rows_per_s']:,.0f} rows/s from "
        "then on.",
    ]
