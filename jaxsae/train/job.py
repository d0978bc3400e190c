"""A fault-tolerant training loop: it saves checkpoints, stops on signals, and recovers from bad batches."""

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
_AGREE = 10  # batches between exchanges with the other processes


class Preempted(Exception):
    """A signal ended a training; its state is saved."""

    def __init__(self, signum: int, step: int):
        """Record the signal and the step.

        Args:
          signum: the signal.
          step: how many steps were taken.
        """
        super().__init__(f"stopped after {step} steps")
        self.signum, self.step = signum, step


class TooManyRollbacks(Diverged):
    """A training rolled back too often; `progress` is its `LoopState`."""

    def __init__(self, state: TrainState, progress: "LoopState", reason: str):
        """Describe why a training was given up.

        Args:
          state: the last good one.
          progress: the loop's state.
          reason: why it would have rolled back again.
        """
        super().__init__(state)
        self.progress = progress
        self.args = (
            f"training diverged: {reason}, after {progress.rollbacks} rollbacks; {int(state.skipped)} batches were "
            f"skipped in all, after {int(state.step)} steps; lower the learning rate or check the data.",
        )


class LoopState(NamedTuple):
    """Progress of a training, besides its `TrainState`.

    Attributes:
      position: batches taken from the data.
      rollbacks: number of rollbacks to a saved state.
      bad: numbers of the skipped batches.
      logged: the numbers last logged.
      steps: total number of steps of the training.
      lengthened: extensions of the training: (at step, from steps, to steps).
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
    start_fn: Callable[[TrainState], TrainState] = lambda state: state,
    save_every_steps: int | None = None,
    eval_every: int | None = None,
    eval_fn: Callable[[int, TrainState], None] = lambda number, state: None,
    before_fn: Callable[[int, TrainState], None] = lambda number, state: None,
    shard_fn: Callable[[np.ndarray], Any] = jnp.asarray,
    log_fn: Callable[[int, dict[str, Any]], dict[str, float]] = lambda number, metrics: {},
    warn: Callable[[str], None] = lambda text: None,
    resumed: Callable[[int, LoopState], None] = lambda number, progress: None,
) -> tuple[TrainState, LoopState]:
    """Train up to `steps` steps, resuming from the latest checkpoint.

    A batch whose loss is not finite is skipped. After ten in a row the training rolls back to the last saved state and
    continues with the next batches; after three rollbacks it is given up. It also rolls back if the state itself is not
    finite when it would be saved, except for infinite parameters of an activation, such as thresholds.

    A resumed training may be given more steps; it then follows the schedules of the new `step`. With equal `steps` it
    is bitwise identical to an uninterrupted one.

    Args:
      step: as from `train.make_step`.
      init_fn: makes the initial state.
      batches: the data; its `position` is set.
      checkpoints: where to save.
      steps: total number of steps, at least as many as before; skipped batches do not count.
      save_every: seconds between saves.
      start_fn: changes the initial state, to start from what no traced function makes.
      save_every_steps: steps between saves, besides.
      eval_every: steps between calls of `eval_fn`.
      eval_fn: called with the number of steps taken and the state, whose buffers the next step takes over.
      before_fn: called likewise before each step, and after the last.
      shard_fn: maps a host batch to a batch on the devices.
      log_fn: called for each step with its number and metrics, on the device, up to nine batches later; returns the
        numbers to keep. Step numbers increase: skipped batches and repeated steps are not logged.
      warn: called with a message on each rollback.
      resumed: called with the number of previous steps and their `LoopState`, if there are any.

    Returns:
      The final state, which is saved, and its `LoopState`.

    Raises:
      Preempted: on SIGTERM or SIGINT, with the state saved.
      TooManyRollbacks: on one more rollback than allowed.

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
    fresh = lambda: start_fn(sharding.create(init_fn))  # noqa: E731
    state, progress = _restored(checkpoints.restore(like), fresh, steps, resumed)
    batches.position = progress.position
    record, may_be_infinite = _Record(state, log_fn), _infinite(state)
    watch = _Watch(state, record.see)

    def save(wait: bool = False) -> None:
        loss = progress.logged.get("nmse")
        checkpoints.save(progress.position, state, progress=progress._asdict(), loss=loss, wait=wait)

    taken, evaluated, last = int(state.step), int(state.step), time.monotonic()
    with _signals() as received:
        while taken < steps:
            before_fn(taken, state)
            state, metrics = step(state, shard_fn(next(batches)))
            taken, progress = taken + 1, progress._replace(position=batches.position)
            watch.see(progress.position - 1, metrics)
            signum, due = _agree(progress.position, received[-1], time.monotonic() - last >= save_every)
            due, measured = due or _at(taken, save_every_steps), _at(taken, eval_every)
            if not (signum or due or measured or taken == steps or watch.in_a_row >= PATIENCE):
                continue
            watch.flush()
            taken, progress = int(state.step), record.add_to(progress)
            good = not (_infinite(state) > may_be_infinite).any()
            if watch.in_a_row >= PATIENCE or not good:
                state, progress = _back(state, good, progress, checkpoints.restore(like), fresh, warn)
                taken = record.step = int(state.step)
                watch.restart(state)
            elif signum:
                save(wait=True)
                raise Preempted(signum, taken)
            else:
                if _at(taken, eval_every) and taken > evaluated:  # skipped batches are no longer counted
                    eval_fn(taken, state)
                    evaluated = taken
                if taken < steps and due:
                    save()
                    last = time.monotonic()
    before_fn(taken, state)
    save(wait=True)
    return state, progress


def _restored(saved, fresh, steps: int, resumed) -> tuple[TrainState, LoopState]:
    """The initial or restored state and progress."""
    if saved is None:
        return fresh(), LoopState(steps=steps)
    record = LoopState(**saved.progress)  # JSON has lists in place of tuples
    progress = record._replace(bad=tuple(record.bad), lengthened=tuple(map(tuple, record.lengthened)))
    if progress.steps < steps:
        longer = (int(saved.state.step), progress.steps, steps)
        progress = progress._replace(steps=steps, lengthened=(*progress.lengthened, longer))
    if int(saved.state.step):
        resumed(int(saved.state.step), progress)
    return saved.state, progress


def _back(state, good: bool, progress: LoopState, saved, fresh, warn) -> tuple[TrainState, LoopState]:
    """Roll back to the last saved state, keeping the position in the data."""
    reason = f"the loss of {PATIENCE} batches in a row" if good else "a number of the state"
    old = fresh() if saved is None else saved.state
    if progress.rollbacks == ROLLBACKS:
        raise TooManyRollbacks(state if good else old, progress, f"{reason} was not finite")
    warn(f"{reason} was not finite: going back to step {int(old.step)}.")
    old = dataclasses.replace(old, skipped=state.skipped, skipped_last=jnp.zeros_like(state.skipped_last))
    return old, progress._replace(rollbacks=progress.rollbacks + 1)


def _infinite(state: TrainState) -> np.ndarray:
    """The worst value of each leaf: 0 for finite, 1 for infinite, 2 for NaN.

    Infinite parameters of an activation are allowed, and count as 0.
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
    """Logs the numbers of each step once, and collects the numbers of skipped batches."""

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
    """A list whose last item is the stop signal received, or 0; a second SIGINT interrupts at once."""
    received = [0]
    if threading.current_thread() is not threading.main_thread():
        yield received
        return

    def receive(signum, frame):
        if received[-1] == signal.SIGINT == signum:
            raise KeyboardInterrupt
        received.append(int(signum))

    before = {signum: signal.signal(signum, receive) for signum in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield received
    finally:
        for signum, handler in before.items():
            signal.signal(signum, handler)


def _at(taken: int, every: int | None) -> bool:
    """Whether something that is done every so many steps is due."""
    return every is not None and taken % every == 0


def _agree(position: int, signum: int, due: bool) -> tuple[int, bool]:
    """Agree across processes: stop, or save, if any of them requests it."""
    if jax.process_count() == 1:
        return signum, due
    if position % _AGREE:
        return 0, False
    wants = multihost_utils.process_allgather(np.array([signum, due], np.int32))
    signum, due = wants.max(axis=0).tolist()
    return signum, bool(due)
