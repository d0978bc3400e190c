"""The loop of a training that loses nothing: it saves as it goes, stops when told to, and gets over bad batches."""

import collections
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
from jaxsae.checkpoint import Checkpoints
from jaxsae.data import Batches
from jaxsae.train import PATIENCE, Diverged, TrainState

ROLLBACKS = 3  # after which a training is given up
_AGREE = 10  # batches between two questions to the other processes


class Stopped(Exception):
    """A signal ended a training; all of it is saved."""

    def __init__(self, signum: int, step: int):
        """Tell how far it came.

        Args:
          signum: the signal.
          step: how many steps were taken.
        """
        super().__init__(f"stopped after {step} steps")
        self.signum, self.step = signum, step


class GivenUp(Diverged):
    """A training that went back too often; beside the state, how it was reached."""

    def __init__(self, state: TrainState, progress: "Progress"):
        """Tell how far it came.

        Args:
          state: the last good one.
          progress: how it was reached.
        """
        super().__init__(state)
        self.progress = progress


class Progress(NamedTuple):
    """Where a training is, beside its state.

    Attributes:
      position: batches taken from the data.
      rollbacks: how often it went back to a saved state.
      bad: which batches were skipped.
      told: the numbers last told.
    """

    position: int = 0
    rollbacks: int = 0
    bad: tuple[int, ...] = ()
    told: dict[str, float] = {}  # noqa: RUF012


def run(
    step: Callable[[TrainState, Any], tuple[TrainState, dict[str, Any]]],
    fresh: Callable[[], TrainState],
    batches: Batches,
    checkpoints: Checkpoints,
    *,
    steps: int,
    save_every: float,
    put: Callable[[np.ndarray], Any] = jnp.asarray,
    tell: Callable[[int, dict[str, Any]], dict[str, float]] = lambda number, metrics: {},
    warn: Callable[[str], None] = lambda text: None,
) -> tuple[TrainState, Progress]:
    """Train until so many steps are taken, from where the checkpoints end.

    A batch whose loss is not finite is skipped. After ten in a row the training goes back to the state last saved, and
    on with the batches that come next; after three times it is given up.

    Args:
      step: of `train.make_step`.
      fresh: makes the state to begin with.
      batches: the data; `position` is set.
      checkpoints: where to save.
      steps: how many to take; skipped batches do not count.
      save_every: seconds from one save to the next.
      put: from a batch of the host to one of the devices.
      tell: called after each step with its number and metrics, on the device; gives the numbers to be kept.
      warn: told when the training goes back.

    Returns:
      The state, saved, and how it was reached.

    Raises:
      Stopped: on SIGTERM or SIGINT, with all saved.
      GivenUp: if it went back too often.

    Example:
      >>> import tempfile, jaxsae
      >>> from jaxsae import checkpoint, data, objectives, train
      >>> sae, tx = jaxsae.init(jax.random.key(0), d=4, m=8, activation=jaxsae.TopK(2)), train.recipe(1e-2)
      >>> step = train.make_step(objectives.Objective(), tx)
      >>> batches = data.batches(np.random.default_rng(0).normal(size=(64, 4)), 16, seed=0)
      >>> with tempfile.TemporaryDirectory() as folder, checkpoint.Checkpoints(folder, config={}) as checkpoints:
      ...     fresh = lambda: train.init_state(sae, tx)
      ...     state, progress = run(step, fresh, batches, checkpoints, steps=5, save_every=60)
      ...     checkpoints.steps(), progress.position
      ([5], 5)
    """
    like = sharding.abstract(fresh)
    saved = checkpoints.restore(like)
    state, progress = (
        (sharding.create(fresh), Progress()) if saved is None else (saved.state, _restored(saved.progress))
    )
    batches.position = progress.position
    watch = _Watch(state)

    def save(wait: bool = False) -> None:
        nonlocal progress
        progress = progress._replace(bad=progress.bad + tuple(watch.flush()))
        checkpoints.save(
            progress.position, state, progress=progress._asdict(), loss=progress.told.get("nmse"), wait=wait
        )

    taken, last = int(state.step), time.monotonic()
    with _signals() as asked:
        while taken < steps:
            state, metrics = step(state, put(next(batches)))
            progress = progress._replace(position=batches.position)
            taken += 1
            bad = watch.see(progress.position - 1, state)
            progress = progress._replace(bad=progress.bad + tuple(bad), told=tell(taken, metrics) or progress.told)
            if taken == steps or watch.patience_is_over:
                progress = progress._replace(bad=progress.bad + tuple(watch.flush()))
                taken = int(state.step)
            if watch.patience_is_over:
                if progress.rollbacks == ROLLBACKS:
                    raise GivenUp(state, progress)
                state, progress = _back(state, progress, checkpoints.restore(like), fresh, warn)
                taken, watch = int(state.step), _Watch(state)
            signum, due = _agree(progress.position, asked[-1], time.monotonic() - last >= save_every)
            if signum:
                save(wait=True)
                raise Stopped(signum, int(state.step))
            if due and taken < steps:
                save()
                last = time.monotonic()
    save(wait=True)
    return state, progress


def _restored(record: dict[str, Any]) -> Progress:
    return Progress(**{**record, "bad": tuple(record["bad"])})


def _back(state, progress: Progress, saved, fresh, warn) -> tuple[TrainState, Progress]:
    """The state last saved, and on with the batches that come next."""
    old = sharding.create(fresh) if saved is None else saved.state
    warn(f"the loss of {PATIENCE} batches in a row was not finite: going back to step {int(old.step)}.")
    old = dataclasses.replace(old, skipped=state.skipped, skipped_last=jnp.zeros_like(state.skipped_last))
    return old, progress._replace(rollbacks=progress.rollbacks + 1)


class _Watch:
    """Sees which batches are skipped, ten steps late: nothing waits for it."""

    def __init__(self, state: TrainState):
        self._pending: collections.deque = collections.deque()
        self._known = int(state.skipped)
        self.patience_is_over = False

    def see(self, number: int, state: TrainState) -> list[int]:
        """Batch `number` led to `state`: tells which of the batches before were skipped."""
        # The state itself is given away.
        self._pending.append((number, jnp.copy(state.skipped), jnp.copy(state.skipped_last)))
        return self._read() if len(self._pending) > PATIENCE else []

    def flush(self) -> list[int]:
        """Tells which others were."""
        return [number for _ in range(len(self._pending)) for number in self._read()]

    def _read(self) -> list[int]:
        number, skipped, in_a_row = self._pending.popleft()
        known, self._known = self._known, int(skipped)
        self.patience_is_over |= int(in_a_row) >= PATIENCE
        return [number] if self._known > known else []


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
    """What all processes do now: that which any of them wants."""
    if jax.process_count() == 1:
        return signum, due
    if position % _AGREE:
        return 0, False
    wants = multihost_utils.process_allgather(np.array([signum, due], np.int32))
    signum, due = wants.max(axis=0).tolist()
    return signum, bool(due)
