"""JAX's persistent compilation cache, so that the second run of a command starts in seconds.

Its keys are computations and versions. On a CPU the programs are machine code, and JAX loads one that needs
instructions that this CPU lacks with no more than a line in the log (jax-ml/jax issue 38445). As machines may share a
home directory, each kind of CPU has its own cache there.
"""

import contextlib
import hashlib
import os
import platform
import warnings
from pathlib import Path

from jaxsae._core.files import InputError, cache

MAX_BYTES = 1 << 28  # the least recently used programs are evicted first


def kept() -> Path | None:
    """The directory of JAX's persistent cache, if the environment names one and does not disable it."""
    folder = os.environ.get("JAX_COMPILATION_CACHE_DIR")
    return Path(folder) if folder and _enabled() else None


def _enabled() -> bool:
    return os.environ.get("JAX_ENABLE_COMPILATION_CACHE", "1").lower() in ("1", "true", "t", "yes", "y", "on")


def size(folder: Path) -> int:
    """The size of a cache directory in bytes."""
    total = 0
    for file in folder.glob("*-cache"):
        with contextlib.suppress(FileNotFoundError):  # another command has just evicted it
            total += file.stat().st_size
    return total


def keep() -> None:
    """Enable JAX's persistent cache in the environment, for a process that has not imported JAX yet.

    Nothing changes if the environment configures it already, or if the directory cannot be used. The directory is
    private to the user, since its contents are executed.
    """
    if not _enabled() or kept():
        return
    try:
        folder = cache() / "compiled" / _machine()
        folder.mkdir(parents=True, exist_ok=True)
        folder.chmod(0o700)  # fails if another user owns it
    except (OSError, InputError):
        return
    os.environ["JAX_COMPILATION_CACHE_DIR"] = str(folder)
    os.environ.setdefault("JAX_COMPILATION_CACHE_MAX_SIZE", str(MAX_BYTES))
    os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0")
    # Entries that cannot be read are compiled again.
    warnings.filterwarnings("ignore", "Error (reading|writing) persistent compilation cache")


def _machine() -> str:
    """The kind of CPU: its architecture, and a hash of its model and features."""
    try:
        first = Path("/proc/cpuinfo").read_text().partition("\n\n")[0].splitlines()
        cpu = "\n".join(line for line in first if line.startswith(("model name", "flags", "Features", "CPU ")))
    except OSError:  # not Linux
        cpu = platform.processor()
    return f"{platform.machine()}-{hashlib.sha256(cpu.encode()).hexdigest()[:8]}"
