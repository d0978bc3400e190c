"""Loading a large SAE: time relative to reading its file, and peak memory."""

import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import safetensors.numpy

SIZES = {"tiny": (256, 1024), "small": (1024, 16_384), "paper": (2304, 65_536)}  # width, latents
FORMATS = ("saelens", "sparsify")
_REPEATS = 5

# In a separate process, to measure its peak alone; the memory of jax itself is measured first and subtracted.
_CHILD = """
import json, resource, sys, time
import jax, jax.numpy as jnp
from jaxsae import pretrained
path, file = sys.argv[1:]
def kib(name):
    return next(int(line.split()[1]) for line in open("/proc/self/status") if line.startswith(name))
pretrained.load(sys.argv[1] + "-tiny")
jnp.zeros(1).block_until_ready()
open("/proc/self/clear_refs", "w").write("5")
before = kib("VmRSS")
start = time.perf_counter()
sae = pretrained.load(path)
jax.block_until_ready(sae)
seconds = time.perf_counter() - start
peak = (kib("VmHWM") - before) * 1024
start = time.perf_counter()
with open(file, "rb", buffering=0) as opened:
    content = opened.read()
print(json.dumps({"load_s": seconds, "read_s": time.perf_counter() - start, "peak": peak}))
"""


def run(size: str) -> list[dict[str, Any]]:
    """Measure both layouts: as used for computation, and transposed."""
    d, m = SIZES[size]
    with tempfile.TemporaryDirectory() as folder:
        return [{"format": format, **measure(Path(folder), d=d, m=m, format=format)} for format in FORMATS]


def measure(folder: Path, *, d: int, m: int, format: str = "saelens") -> dict[str, Any]:
    """Load an SAE of `m` latents and width `d` from a cached file: the fastest of several runs, and peak memory.

    Returns:
      `load_s`, `read_s`, to read the file into memory; `peak`, bytes above what the process had; `bytes` of the file.
    """
    path = folder / format
    file = write(path, d, m, format)
    write(Path(f"{path}-tiny"), 4, 8, format)
    command = [sys.executable, "-c", _CHILD, str(path), str(file)]
    runs = []
    for _ in range(_REPEATS):
        result = subprocess.run(command, capture_output=True, text=True, check=True, timeout=600)
        runs.append(json.loads(result.stdout))
        time.sleep(0.1)
    best = {name: min(run[name] for run in runs) for name in ("load_s", "read_s")}
    return {**best, "peak": max(run["peak"] for run in runs), "bytes": file.stat().st_size, "d": d, "m": m}


def write(path: Path, d: int, m: int, format: str) -> Path:
    """An SAE in float32, as its library would save it; the file of its arrays."""
    path.mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng(0)
    matrix = rng.normal(size=(m, d)).astype(np.float32)
    b_enc, b_dec = np.zeros(m, np.float32), np.zeros(d, np.float32)
    if format == "saelens":
        config = {"d_in": d, "d_sae": m, "dtype": "float32", "architecture": "standard"}
        arrays = {"W_enc": matrix.reshape(d, m), "W_dec": matrix, "b_enc": b_enc, "b_dec": b_dec}
        file = path / "sae_weights.safetensors"
    else:
        config = {"d_in": d, "num_latents": m, "k": 8}
        arrays = {"encoder.weight": matrix, "W_dec": matrix, "encoder.bias": b_enc, "b_dec": b_dec}
        file = path / "sae.safetensors"
    (path / "cfg.json").write_text(json.dumps(config))
    safetensors.numpy.save_file(arrays, file)
    return file
