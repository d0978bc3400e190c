"""Shared by all benchmarks: fair timings, and lines of progress."""

import functools
import sys
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

COPIED = 256 << 20  # bytes of the large array that is copied
SIDE = 2048  # of the large matrices that are multiplied
_FAST = 15.0  # seconds of a round of all calls, below which there are more rounds


def name_missing(error: ImportError) -> str:
    """A note for a table that a package is missing."""
    if isinstance(error, ModuleNotFoundError) and error.name:
        return f"{error.name.split('.')[0]}: not installed"
    return f"cannot be imported: {error}"


def say(text: str) -> None:
    """Print the time and a line of progress to stderr."""
    print(f"{time.strftime('%H:%M:%S')} {text}", file=sys.stderr, flush=True)


def clock(call: Callable[[], Any]) -> float:
    """Seconds until a call has returned and its result is ready."""
    start = time.perf_counter()
    jax.block_until_ready(call())
    return time.perf_counter() - start


def timings(calls: list[Callable[[], Any]]) -> list[list[float]]:
    """Seconds of each call, warm, in rounds over all of them, so that drift of the machine affects all equally.

    Each round has a random order, so that no call always follows the same other.
    """
    warm_up = sum(map(clock, calls))
    order = np.random.default_rng(0)
    seconds: list[list[float]] = [[] for _ in calls]
    for _ in range(7 if warm_up < _FAST else 5):
        for number in order.permutation(len(calls)):
            seconds[number].append(clock(calls[number]))
    return seconds


def copying() -> Callable[[], Any]:
    """A call that copies a large array over another: it reads `COPIED` bytes, and writes as many."""
    # A negation, since XLA's copy runs on one core; into an existing buffer, since new pages cost more than a copy.
    copy = jax.jit(lambda source, target: -source, donate_argnums=1, keep_unused=True)
    source, target = jnp.ones(COPIED // 4, jnp.float32), [jnp.zeros(COPIED // 4, jnp.float32)]

    def call():
        target.append(copy(source, target.pop()))
        return target[0]

    return call


def multiplying() -> Callable[[], Any]:
    """A call that multiplies large matrices, in float32 as Gram matrices are, by `2 SIDE³` operations."""
    a = jnp.ones((SIDE, SIDE), jnp.float32)
    multiply = jax.jit(functools.partial(jnp.matmul, precision=jax.lax.Precision.HIGHEST))
    return lambda: multiply(a, a)


def copy_bandwidth() -> float:
    """Bytes a second, read and written, at which a large array is copied over another."""
    return 2 * COPIED / min(timings([copying()])[0])


def matmul_peak() -> float:
    """Operations a second of a product of large matrices."""
    return 2 * SIDE**3 / min(timings([multiplying()])[0])
