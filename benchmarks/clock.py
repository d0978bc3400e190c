"""What every benchmark needs: a clock that is fair to all, and a line that says what is going on."""

import sys
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

_FAST = 15.0  # seconds of a round of all calls, up to which there are more rounds


def name_missing(error: ImportError) -> str:
    """What is not installed, for a note in a table."""
    if isinstance(error, ModuleNotFoundError) and error.name:
        return f"{error.name.split('.')[0]}: not installed"
    return f"cannot be imported: {error}"


def say(text: str) -> None:
    """Tell the time and what is going on."""
    print(f"{time.strftime('%H:%M:%S')} {text}", file=sys.stderr, flush=True)


def clock(call: Callable[[], Any]) -> float:
    """Seconds until a call is done, and what it returned is there."""
    start = time.perf_counter()
    jax.block_until_ready(call())
    return time.perf_counter() - start


def timings(calls: list[Callable[[], Any]]) -> list[list[float]]:
    """Seconds of each, warm, in rounds over all of them: the machine's drift then meets all alike.

    Each round has an order of its own, so that nobody always follows the same other.
    """
    warm_up = sum(map(clock, calls))
    order = np.random.default_rng(0)
    seconds: list[list[float]] = [[] for _ in calls]
    for _ in range(7 if warm_up < _FAST else 5):
        for number in order.permutation(len(calls)):
            seconds[number].append(clock(calls[number]))
    return seconds


def copy_bandwidth(size: int = 256 << 20) -> float:
    """Bytes a second, read and written ones both counted, at which a large array is copied over another."""
    # A negation, since XLA's copy runs on one core; into a buffer that exists, since new pages cost more than a copy.
    copy = jax.jit(lambda source, target: -source, donate_argnums=1, keep_unused=True)
    source, target = jnp.ones(size // 4, jnp.float32), jnp.zeros(size // 4, jnp.float32)
    seconds = []
    for _ in range(8):
        start = time.perf_counter()
        target = jax.block_until_ready(copy(source, target))
        seconds.append(time.perf_counter() - start)
    return 2 * size / min(seconds)
