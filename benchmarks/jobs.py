"""Training jobs: killed at random moments and resumed bitwise identically; and the cost of saving and loading."""

import contextlib
import os
import random
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks.clock import say
from jaxsae import data, train
from jaxsae.app import runs
from jaxsae.app.options import Options
from jaxsae.app.units import Units
from jaxsae.data import lazy, shards
from jaxsae.train import checkpoint

SIZES = {
    "tiny": {"d": 16, "m": 64, "k": 4, "batch": 64, "rows": 4096, "steps": 30},
    "paper": {"d": 768, "m": 16384, "k": 32, "batch": 1024, "rows": 1 << 19, "steps": 12},
}
_LIMIT = 120  # time limit of one process of a job, in seconds


class Job:
    """A training by the command line, in separate processes that can be killed; it saves after every step."""

    def __init__(self, folder: Path, *, steps: int, options: Sequence[str] = ()):
        """`folder` is for its data, made here, and its runs."""
        self.folder, self.steps = folder, steps
        self._data = folder / "data"
        if not self._data.exists():
            writer = shards.Writer(self._data, width=16, dtype="float16", source="random")
            generator = np.random.default_rng(0)
            for _ in range(3):
                writer.append(generator.standard_normal((300, 16)))
            writer.finish()
        self._options = ["--steps", steps, "--batch", 64, "--latents", 64, "--k", 4, "--heldout", 100, *options]

    def start(self, out: str, *before: str) -> subprocess.Popen:
        """A process that starts the run `out`, or resumes it; `before` is put before its command."""
        command = [sys.executable, "-m", "jaxsae", "train", "--activation", "batchtopk", "--idle-after", 500]
        command += ["--data", self._data, "--out", self.folder / out, "--save-every", 0, *self._options]
        environment = {**os.environ, "JAX_PLATFORMS": "cpu", "XLA_FLAGS": ""}
        return subprocess.Popen([*before, *map(str, command)], env=environment, stdout=-1, stderr=-1, text=True)

    def finish(self, out: str) -> str:
        """Run it to its end and return its output."""
        process = self.start(out)
        said, errors = process.communicate(timeout=_LIMIT)
        if process.returncode:
            raise RuntimeError(f"the job ended with {process.returncode}: {errors}")
        return said + errors

    def end(self, out: str, signum: int, *, after: int, delay: float) -> tuple[int, int, str]:
        """Start it, and send a signal some seconds after `after` more steps; exit code, steps saved, and output."""
        before, process, began = self.saved(out), self.start(out), time.monotonic()
        while self.saved(out) < min(before + after, self.steps) and process.poll() is None:
            if time.monotonic() - began > _LIMIT:
                process.kill()
                raise RuntimeError("the job saves nothing")
            time.sleep(0.002)
        time.sleep(delay)
        with contextlib.suppress(ProcessLookupError):
            process.send_signal(signum)
        said, errors = process.communicate(timeout=_LIMIT)
        return process.returncode, self.saved(out), said + errors

    def saved(self, out: str) -> int:
        """How many batches its last checkpoint has seen."""
        return next(iter(checkpoint.steps(self.folder / out / "checkpoints")), 0)

    def unfinished(self, out: str) -> set[str]:
        """The unfinished saves."""
        return {path.name for path in (self.folder / out / "checkpoints").glob("*tmp*")}

    def outcome(self, out: str) -> dict[str, bytes]:
        """All final numbers as bits, by name: those of the autoencoder and of its last checkpoint."""
        import orbax.checkpoint as ocp

        path = self.folder / out / "checkpoints" / str(self.saved(out)) / "state"
        with ocp.StandardCheckpointer() as reader:
            tree = reader.restore(path)
        found = {
            jax.tree_util.keystr(name): np.asarray(leaf).tobytes() for name, leaf in jax.tree.leaves_with_path(tree)
        }
        return found | {"sae": (self.folder / out / "sae" / "sae.safetensors").read_bytes()}


def survive(kills: int, seed: int = 0, *, steps: int = 400) -> dict[str, Any]:
    """Kill a job at random moments, and compare its result with that of an uninterrupted one."""
    generator = random.Random(seed)
    with tempfile.TemporaryDirectory() as folder:
        job = Job(Path(folder), steps=steps)
        say("one left alone")
        job.finish("alone")
        moments = []
        while len(moments) < kills:
            left = steps - job.saved("killed")
            after, before = (
                generator.randint(1, max(1, 2 * left // (kills - len(moments) + 1))),
                job.unfinished("killed"),
            )
            code, saved, said = job.end("killed", signal.SIGKILL, after=after, delay=generator.uniform(0, 0.05))
            if code != -signal.SIGKILL:
                raise RuntimeError(
                    f"it ended with {code} before it was killed for the {len(moments) + 1}th time: {said}"
                )
            moments.append({"saved": saved, "in_mid_save": bool(job.unfinished("killed") - before)})
            say(f"killed {len(moments)} times, {saved} steps saved, in mid-save: {moments[-1]['in_mid_save']}")
        job.finish("killed")
        a, b = job.outcome("alone"), job.outcome("killed")
    differ = sorted(name for name in a.keys() | b.keys() if a.get(name) != b.get(name))
    return {"steps": steps, "moments": moments, "leaves": len(a), "differ": differ}


def costs(size: str) -> dict[str, Any]:
    """The cost of one save a minute, the speed of loading rows, and the time to resume."""
    c = SIZES[size]
    with tempfile.TemporaryDirectory() as folder:
        rows = _rows(Path(folder, "data"), c["rows"], c["d"])
        loader = _loader(rows, c["batch"])
        saving = _saving(Path(folder, "run"), rows, c)
    needed = c["batch"] / saving["step_s"]
    return {"case": c, **loader, **saving, "needed_rows_per_s": needed, "ratio": loader["loaded_rows_per_s"] / needed}


def _rows(folder: Path, n: int, d: int) -> lazy.LazyRows:
    """Activations in float16 on disk, evicted from the page cache where possible."""
    writer = shards.Writer(folder, width=d, dtype="float16", source="random")
    generator = np.random.default_rng(0)
    for start in range(0, n, 1 << 16):
        writer.append(generator.standard_normal((min(1 << 16, n - start), d), np.float32))
    writer.finish()
    for path in folder.glob("*.npy"):
        with open(path, "rb") as file:
            os.fsync(file.fileno())
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
    return shards.open_rows(folder)


def _loader(rows: lazy.LazyRows, batch: int) -> dict[str, float]:
    began = time.perf_counter()
    stream = data.batches(rows, batch, seed=0)
    next(stream)  # verifies every shard that it reads
    first = time.perf_counter() - began
    began = time.perf_counter()
    for _ in range(100):
        next(stream)
    return {"first_batch_s": first, "loaded_rows_per_s": 100 * batch / (time.perf_counter() - began)}


def _saving(folder: Path, rows: lazy.LazyRows, c: dict[str, int]) -> dict[str, float]:
    """Seconds of an undisturbed step; extra seconds of all steps after a save; seconds of a resume."""
    options = Options("topk", c["m"], c["k"], batch=c["batch"], steps=1000)
    objective, tx, init_fn = runs.recipe(options, Units(jnp.zeros(c["d"])))
    step, stream = train.make_step(objective, tx), data.batches(rows, c["batch"], seed=0)
    state = init_fn()

    def steps(count: int) -> list[float]:
        nonlocal state
        times = []
        for _ in range(count):
            began = time.perf_counter()
            state, shown = step(state, next(stream))
            jax.block_until_ready(shown)
            times.append(time.perf_counter() - began)
        return times

    steps(3)
    with checkpoint.Checkpoints(folder, config=None) as checkpoints:
        checkpoints.save(0, state, progress=None, wait=True)  # the first one compiles
        added, alone = [], []
        for number in range(1, 4):
            alone.append(statistics.median(steps(c["steps"])))
            began = time.perf_counter()
            checkpoints.save(number, state, progress=None)
            count, settled = 0, 0
            while settled < 3:  # until it is written
                (last,) = steps(1)
                count, settled = count + 1, settled + 1 if last < 1.2 * alone[-1] else 0
            added.append(time.perf_counter() - began - count * alone[-1])
            say(f"a save adds {added[-1]:.2f} s to steps of {alone[-1]:.3f} s")
    like = jax.eval_shape(init_fn)
    began = time.perf_counter()
    with checkpoint.Checkpoints(folder, config=None) as checkpoints:
        jax.block_until_ready(checkpoints.restore(like))
    resume = time.perf_counter() - began
    size = sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(like))
    return {
        "step_s": statistics.median(alone),
        "save_s": statistics.median(added),
        "overhead_at_one_a_minute": max(0.0, statistics.median(added)) / 60,
        "restore_s": resume,
        "state_bytes": size,
    }
