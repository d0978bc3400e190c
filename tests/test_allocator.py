"""The allocator of a process that trains."""

import os
import platform
import subprocess
import sys

import pytest

SIZE = 64 << 20  # always a mapping of its own, unless there are to be none
SCRIPT = f"""
import ctypes, resource, sys
from jaxsae.app import allocator
if sys.argv[1] == "keep":
    allocator.keep_freed()
libc = ctypes.CDLL(None)
libc.malloc.restype = ctypes.c_void_p
for _ in range(8):
    array = ctypes.c_void_p(libc.malloc(ctypes.c_size_t({SIZE})))
    ctypes.memset(array, 1, {SIZE})
    libc.free(array)
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt)
"""


def faults(word, **environment):
    """Page faults of a process that allocates, writes and frees an array eight times."""
    clean = {name: value for name, value in os.environ.items() if not name.startswith(("MALLOC_", "GLIBC_"))}
    command = [sys.executable, "-c", SCRIPT, word]
    return int(subprocess.run(command, check=True, capture_output=True, env={**clean, **environment}).stdout)


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="the allocator of glibc")
def test_freed_memory_is_used_again_unless_the_environment_says_how():
    pages = SIZE // os.sysconf("SC_PAGE_SIZE")
    given_back, kept = faults("leave"), faults("keep")
    if given_back < 4 * pages:
        pytest.skip("huge pages")
    assert kept < given_back - 4 * pages
    assert faults("keep", MALLOC_ARENA_MAX="8") > given_back - 4 * pages
