"""The C library's allocator, for a process that trains on a CPU."""

import contextlib
import ctypes
import os

# M_MMAP_MAX, M_TRIM_THRESHOLD and M_ARENA_MAX of glibc's <malloc.h>.
_NO_MAPPINGS, _NO_TRIMMING, _ONE_ARENA = (-4, 0), (-1, 2**31 - 1), (-8, 1)


def keep_freed() -> None:
    """Have glibc keep freed memory, rather than give it back, in a process that has not imported JAX yet.

    XLA allocates its temporaries anew at each step, and on a CPU a third of a training step were page faults of memory
    that was given back. Nothing changes if the environment configures the allocator, or where there is no glibc.
    """
    if any(name.startswith(("MALLOC_", "GLIBC_TUNABLES")) for name in os.environ):
        return
    with contextlib.suppress(OSError, AttributeError):
        mallopt = ctypes.CDLL(None).mallopt
        for option, value in (_NO_MAPPINGS, _NO_TRIMMING, _ONE_ARENA):
            mallopt(option, value)
