"""What a run shows, logs and traces while it trains."""

import contextlib
import time
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxsae import sharding, train
from jaxsae._core import processes
from jaxsae._core.files import AnyPath, InputError, atomic_directory
from jaxsae.app import chips, evaluation
from jaxsae.app.logs import Log
from jaxsae.app.options import Options, lengthened, resolved, schedule
from jaxsae.app.units import Units
from jaxsae.train import job

_REPORT_EVERY = 10  # steps


class Monitor:
    """Shows, measures and logs a training, every few steps."""

    def __init__(self, options: Options, heldout, units: Units, write: Log, batches, flops, *, progress, resumed, warn):
        """See `hooks`.

        Args:
          options: of the run.
          heldout: rows to measure on, `[n d]`.
          units: of the training.
          write: the log.
          batches: the data.
          flops: returns the FLOPs of a step.
          progress: as of `runs.run`.
          resumed: likewise.
          warn: likewise.
        """
        self._options, self._heldout, self._units, self._write, self._batches = options, heldout, units, write, batches
        self._progress, self._resumed, self._warn, self._shown = progress, resumed, warn, 0
        self._schedule = schedule(resolved(options).learning_rate or 0.0, options.steps)
        self._clock: tuple[int, float, float] | None = None  # step, time, and seconds that were waited for data
        mesh = jax.sharding.get_mesh()
        devices = jax.devices()[:1] if mesh.empty else mesh.devices.ravel()
        peak = chips.peak_flops(devices[0])
        self._ideal = None if peak is None else flops() / (peak * len(devices))  # seconds of a step

    def hooks(self) -> dict[str, Any]:
        """What `job.run` calls."""
        size = self._options.batch
        first = sharding.rows_needed(size).start
        return {
            "shard_fn": lambda x: sharding.make_global_batch(self._units.scaled(x), size, first),
            "log_fn": self.log,
            "eval_fn": self.measure,
            "resumed": self.resume,
            "warn": self._warn,
        }

    def resume(self, step: int, reached: job.LoopState) -> None:
        """Report that `step` steps were taken before."""
        self._shown = step
        self._resumed(step)
        if reached.lengthened and reached.lengthened[-1][0] == step:
            self._warn(lengthened(self._options, *reached.lengthened[-1]))

    def log(self, step: int, metrics: dict[str, Any]) -> dict[str, float]:
        """The metrics of a step as numbers; {} for steps that are not logged."""
        if step % _REPORT_EVERY and step != self._options.steps:
            return {}
        numbers = {name: float(value) for name, value in metrics.items()}
        numbers["learning_rate"] = np.asarray(self._schedule(step - 1)).item()
        self._write(step, numbers | {"rows": step * self._options.batch} | self._speed(step))
        text = f"NMSE {numbers['nmse']:.3f}  L0 {numbers['l0']:.0f}  dead {numbers['dead']:.1%}"
        self._progress(text, step - self._shown)
        self._shown = step
        return numbers

    def measure(self, step: int, state: train.TrainState) -> None:
        """Measure the autoencoder on the held-out rows, and log it."""
        found = evaluation.evaluate(self._units.for_data(state.sae), self._heldout)
        numbers = {f"heldout_{name}": found[name] for name in ("nmse", "l0", "dead")}
        self._write(step, {name: value for name, value in numbers.items() if value is not None})
        self._clock = None  # the next steps are timed from their own start

    def _speed(self, step: int) -> dict[str, float]:
        """What the steps since the last call took; {} at first, since they contain compilation."""
        now, before = (step, time.perf_counter(), self._batches.waited), self._clock
        self._clock = now
        if before is None:
            return {}
        steps, seconds, waited = (b - a for a, b in zip(before, now, strict=True))
        speed = {"step_seconds": seconds / steps, "rows_per_second": steps * self._options.batch / seconds}
        if self._ideal is not None:
            speed["mfu"] = self._ideal * steps / seconds
        return speed | {"data_wait": waited / seconds}


def require_traceable(steps: tuple[int, int] | None, total: int) -> None:
    """Raise unless there are such steps.

    Args:
      steps: the first, and the one after the last.
      total: number of steps of the run.

    Raises:
      InputError: with what to pass.

    Example:
      >>> require_traceable((3, 6), 10)
    """
    if steps is not None and not steps[0] < steps[1] <= total:
        got = "{}:{}".format(*steps)
        raise InputError(f"got profile {got} for {total} steps; pass START:STOP, of which STOP is at most that.")


@contextlib.contextmanager
def traced(steps: tuple[int, int] | None, folder: AnyPath, warn) -> Iterator[Callable[[int, Any], None]]:
    """A function to call before each step, which traces some of them; the trace appears once it is whole."""
    if steps is None or not processes.is_primary():
        yield lambda taken, state: None
        return
    begun = False
    with contextlib.ExitStack() as held:

        def before(taken: int, state: Any) -> None:
            nonlocal begun
            if taken == steps[0]:
                begun = True
                jax.block_until_ready(state)
                jax.profiler.start_trace(str(held.enter_context(atomic_directory(folder))))
                held.callback(jax.profiler.stop_trace)
            elif taken == steps[1]:
                jax.block_until_ready(state)
                held.close()

        yield before
    if not begun:
        warn(f"step {steps[0]} was taken before, and is not traced.")


def flops_of(step: Any, init_fn, batch: int, d: int) -> float:
    """The FLOPs of a step on all devices, as XLA counts them before it optimises; the body of a loop once."""
    x = jax.ShapeDtypeStruct((batch, d), jnp.float32)
    if not (mesh := jax.sharding.get_mesh()).empty:
        x = jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding.rows_sharding(x, mesh))
    return float(step.func.lower(*step.args, sharding.abstract(init_fn), x).cost_analysis()["flops"])
