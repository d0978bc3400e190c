"""JAX's persistent compilation cache, so that the second run of a command starts in seconds.

Its keys are computations and versions. On a CPU the programs are machine code, and JAX loads one that needs
instructions that this CPU lacks with no more than a line in the log (jax-ml/jax issue 38445). As machines may share a
home directory, each kind of CPU has its own cache there.
"""

import contextlib
import hashlib
import platform
import warnings
from pathlib import Path
from typing import Any

import jax

from jaxsae._core.files import InputError, cache

MAX_BYTES = 1 << 28  # the least recently used programs are evicted first
_config: Any = jax.config  # whose options are not annotated


def kept() -> Path | None:
    """The directory of JAX's persistent cache, if it is enabled."""
    folder = _config.jax_compilation_cache_dir
    return Path(folder) if folder and _config.jax_enable_compilation_cache else None


def size(folder: Path) -> int:
    """The size of a cache directory in bytes."""
    total = 0
    for file in folder.glob("*-cache"):
        with contextlib.suppress(FileNotFoundError):  # another command has just evicted it
            total += file.stat().st_size
    return total


def keep() -> None:
    """Enable JAX's persistent cache, unless JAX is configured already or the directory cannot be used.

    The directory is private to the user, since its contents are executed.
    """
    if not _config.jax_enable_compilation_cache or _config.jax_compilation_cache_dir:
        return
    try:
        folder = cache() / "compiled" / _machine()
        folder.mkdir(parents=True, exist_ok=True)
        folder.chmod(0o700)  # fails if another user owns it
    except (OSError, InputError):
        return
    _config.update("jax_compilation_cache_dir", str(folder))
    _config.update("jax_compilation_cache_max_size", MAX_BYTES)
    _config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
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
