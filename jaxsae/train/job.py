"""The loop of a training that loses nothing: it saves as it goes, stops on a signal, and recovers from bad batches."""

import contextlib
import dataclasses
import signal
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import multihost_utils

from jaxsae import sharding
from jaxsae.data.batching import Batches
from jaxsae.train.checkpoint import Checkpoints
from jaxsae.train.steps import PATIENCE, Diverged, TrainState, _Watch

ROLLBACKS = 3  # after which a training is given up
_AGREE = 10  # batches between two questions to the other processes


class Preempted(Exception):
    """A signal ended a training; all of it is saved."""

    def __init__(self, signum: int, step: int):
        """Say how far it came.

        Args:
          signum: the signal.
          step: how many steps were taken.
        """
        super().__init__(f"stopped after {step} steps")
        self.signum, self.step = signum, step


class TooManyRollbacks(Diverged):
    """A training that rolled back too often; beside the state, how it was reached."""

    def __init__(self, state: TrainState, progress: "LoopState", reason: str):
        """Say why, and how far it came.

        Args:
          state: the last good one.
          progress: how it was reached.
          reason: of the last time that it would have gone back.
        """
        super().__init__(state)
        self.progress = progress
        self.args = (
            f"training diverged: {reason}, after {progress.rollbacks} times before; {int(state.skipped)} batches were "
            f"skipped in all, after {int(state.step)} steps; lower the learning rate or mend the data.",
        )


class LoopState(NamedTuple):
    """Where a training is, beside its state.

    Attributes:
      position: batches taken from the data.
      rollbacks: how often it went back to a saved state.
      bad: which batches were skipped.
      logged: the numbers last logged.
      steps: how many the training is to take.
      lengthened: where it was made longer: at which step, from how many steps, to how many.
    """

    position: int = 0
    rollbacks: int = 0
    bad: tuple[int, ...] = ()
    logged: dict[str, float] = {}  # noqa: RUF012
    steps: int = 0
    lengthened: tuple[tuple[int, int, int], ...] = ()


def run(
    step: Callable[[TrainState, Any], tuple[TrainState, dict[str, Any]]],
    init_fn: Callable[[], TrainState],
    batches: Batches,
    checkpoints: Checkpoints,
    *,
    steps: int,
    save_every: float,
    shard_fn: Callable[[np.ndarray], Any] = jnp.asarray,
    log_fn: Callable[[int, dict[str, Any]], dict[str, float]] = lambda number, metrics: {},
    warn: Callable[[str], None] = lambda text: None,
    resumed: Callable[[int, LoopState], None] = lambda number, progress: None,
) -> tuple[TrainState, LoopState]:
    """Train until so many steps are taken, from where the checkpoints end.

    A batch whose loss is not finite is skipped. After ten in a row the training goes back to the state last saved, and
    on with the batches that come next; after three times it is given up. So it is if a number of the state itself is
    not finite when it would be saved, but an infinite one of an activation, such as a threshold.

    A training may be made longer than it was: the state is continued by the `step` it is given now, and so with the
    schedules of the longer one. One of equal `steps` is bitwise identical to one that nothing ended.

    Args:
      step: of `train.make_step`.
      init_fn: makes the state to begin with.
      batches: the data; `position` is set.
      checkpoints: where to save.
      steps: how many to take, at least as many as before; skipped batches do not count.
      save_every: seconds from one save to the next.
      shard_fn: from a batch of the host to one of the devices.
      log_fn: called for each step with its number and metrics, on the device, up to nine batches later; returns the
        numbers to keep. Numbers increase: not called for a skipped batch, nor again for a step that is taken again.
      warn: called when the training goes back.
      resumed: called with the number of steps taken before, and how, if there are any.

    Returns:
      The state, saved, and how it was reached.

    Raises:
      Preempted: on SIGTERM or SIGINT, with all saved.
      TooManyRollbacks: if it went back too often.

    Example:
      >>> import tempfile, jaxsae
      >>> from jaxsae import data, train
      >>> from jaxsae.train import checkpoint, objectives
      >>> sae, tx = jaxsae.init(jax.random.key(0), d=4, m=8, activation=jaxsae.TopK(2)), train.default_optimizer(1e-2)
      >>> step = train.make_step(objectives.Objective(), tx)
      >>> batches = data.batches(np.random.default_rng(0).normal(size=(64, 4)), 16, seed=0)
      >>> with tempfile.TemporaryDirectory() as folder, checkpoint.Checkpoints(folder, config={}) as checkpoints:
      ...     init_fn = lambda: train.init_state(sae, tx)
      ...     state, progress = run(step, init_fn, batches, checkpoints, steps=5, save_every=60.0)
      ...     checkpoints.steps(), progress.position
      ([5], 5)
    """
    like = sharding.abstract(init_fn)
    state, progress = _restored(checkpoints.restore(like), init_fn, steps)
    if int(state.step):
        resumed(int(state.step), progress)
    batches.position = progress.position
    record, may_be_infinite = _Record(state, log_fn), _infinite(state)
    watch = _Watch(state, record.see)

    def save(wait: bool = False) -> None:
        checkpoints.save(
            progress.position, state, progress=progress._asdict(), loss=progress.logged.get("nmse"), wait=wait
        )

    taken, last = int(state.step), time.monotonic()
    with _signals() as asked:
        while taken < steps:
            state, metrics = step(state, shard_fn(next(batches)))
            taken, progress = taken + 1, progress._replace(position=batches.position)
            watch.see(progress.position - 1, metrics)
            signum, due = _agree(progress.position, asked[-1], time.monotonic() - last >= save_every)
            if not (signum or due or taken == steps or watch.in_a_row >= PATIENCE):
                continue
            watch.flush()
            taken, progress = int(state.step), record.add_to(progress)
            good = not (_infinite(state) > may_be_infinite).any()
            if watch.in_a_row >= PATIENCE or not good:
                reason = f"the loss of {PATIENCE} batches in a row" if good else "a number of the state"
                state, progress = _back(state, good, progress, checkpoints.restore(like), init_fn, reason, warn)
                taken = record.step = int(state.step)
                watch.restart(state)
            elif signum:
                save(wait=True)
                raise Preempted(signum, taken)
            elif taken < steps and due:
                save()
                last = time.monotonic()
    save(wait=True)
    return state, progress


def _restored(saved, init_fn, steps: int) -> tuple[TrainState, LoopState]:
    """Where a training begins, or resumes."""
    if saved is None:
        return sharding.create(init_fn), LoopState(steps=steps)
    record = LoopState(**saved.progress)  # of JSON, which has lists
    progress = record._replace(bad=tuple(record.bad), lengthened=tuple(map(tuple, record.lengthened)))
    if progress.steps < steps:
        longer = (int(saved.state.step), progress.steps, steps)
        progress = progress._replace(steps=steps, lengthened=(*progress.lengthened, longer))
    return saved.state, progress


def _back(state, good: bool, progress: LoopState, saved, init_fn, reason: str, warn) -> tuple[TrainState, LoopState]:
    """The last saved state, to continue with the batches that come next."""
    old = sharding.create(init_fn) if saved is None else saved.state
    if progress.rollbacks == ROLLBACKS:
        raise TooManyRollbacks(state if good else old, progress, f"{reason} was not finite")
    warn(f"{reason} was not finite: going back to step {int(old.step)}.")
    old = dataclasses.replace(old, skipped=state.skipped, skipped_last=jnp.zeros_like(state.skipped_last))
    return old, progress._replace(rollbacks=progress.rollbacks + 1)


def _infinite(state: TrainState) -> np.ndarray:
    """The worst value of each leaf: 0 for finite, 1 for infinite, 2 for NaN.

    An activation's parameters may be infinite: 0 for those.
    """
    paths = [path for path, _ in jax.tree.leaves_with_path(state)]
    excused = ["activation" in {getattr(key, "name", None) for key in path} for path in paths]
    found = np.asarray(_worst(state))
    return np.where(np.array(excused) & (found == 1), 0, found)


@jax.jit
def _worst(state):
    def worst(leaf):
        if not jnp.issubdtype(leaf.dtype, jnp.inexact):
            return jnp.zeros((), int)
        return jnp.where(jnp.isnan(leaf).any(), 2, jnp.isinf(leaf).any().astype(int))

    return jnp.stack([worst(leaf) for leaf in jax.tree.leaves(state)])


class _Record:
    """What is logged and saved of the batches: the numbers of each step, once, and which batches were skipped."""

    def __init__(self, state: TrainState, log_fn: Callable[[int, dict[str, Any]], dict[str, float]]):
        self._log_fn, self._numbers, self._bad = log_fn, {}, []
        self.step = self._logged = int(state.step)

    def see(self, number: int, skipped: bool, metrics: dict[str, Any]) -> None:
        """Record the next batch."""
        if skipped:
            self._bad.append(number)
            return
        self.step += 1
        if self.step > self._logged:
            self._logged = self.step
            self._numbers = self._log_fn(self.step, metrics) or self._numbers

    def add_to(self, progress: LoopState) -> LoopState:
        """The progress with all batches recorded since the last call."""
        progress = progress._replace(bad=progress.bad + tuple(self._bad), logged=self._numbers or progress.logged)
        self._bad.clear()
        return progress


@contextlib.contextmanager
def _signals() -> Iterator[list[int]]:
    """A list whose last item is the signal that asks to stop, or 0; a second SIGINT interrupts at once."""
    asked = [0]
    if threading.current_thread() is not threading.main_thread():
        yield asked
        return

    def ask(signum, frame):
        if asked[-1] == signal.SIGINT == signum:
            raise KeyboardInterrupt
        asked.append(int(signum))

    before = {signum: signal.signal(signum, ask) for signum in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield asked
    finally:
        for signum, handler in before.items():
            signal.signal(signum, handler)


def _agree(position: int, signum: int, due: bool) -> tuple[int, bool]:
    """What all processes do now: stop or save if any of them asks for it."""
    if jax.process_count() == 1:
        return signum, due
    if position % _AGREE:
        return 0, False
    wants = multihost_utils.process_allgather(np.array([signum, due], np.int32))
    signum, due = wants.max(axis=0).tolist()
    return signum, bool(due)
