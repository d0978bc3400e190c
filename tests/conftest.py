"""What holds for every test: eight fake CPU devices, and shape annotations checked at run time."""

import os
import sys
from pathlib import Path

# For the benchmarks, which are not installed; last, so that the `jaxsae` under test stays the installed one.
sys.path.append(str(Path(__file__).parent.parent))

# Before jax is imported: XLA reads its flags once.
os.environ["XLA_FLAGS"] = " ".join(
    [os.environ.get("XLA_FLAGS", ""), "--xla_force_host_platform_device_count=8"]
).strip()
os.environ.setdefault("JAX_PLATFORMS", "cpu")
# The suite's time is XLA's compiling, and a third of that LLVM's optimisations; `.ci/run` has them on for slow tests.
os.environ.setdefault("JAX_DISABLE_MOST_OPTIMIZATIONS", "1")
# Commands that tests start leave nothing in the user's cache.
os.environ.setdefault("JAX_ENABLE_COMPILATION_CACHE", "0")

import jax
import jaxtyping
import pytest

# Before jaxsae is imported: every annotated function then checks shapes and dtypes.
jaxtyping.install_import_hook("jaxsae", "typechecker.check")


@pytest.fixture
def x64():
    """Float64 for one test."""
    with jax.enable_x64(True):
        yield


@pytest.fixture
def optimised():
    """Programs as users have them: LLVM's optimisations change the order of sums, and so how they are rounded."""
    before = os.environ["JAX_DISABLE_MOST_OPTIMIZATIONS"] not in ("", "0")
    jax.config.update("jax_disable_most_optimizations", False)
    jax.clear_caches()
    yield
    jax.config.update("jax_disable_most_optimizations", before)
    jax.clear_caches()


@pytest.fixture
def unchecked():
    """The library as users have it, without run-time annotations: for what is passed wrong on purpose."""
    jaxtyping.config.update("jaxtyping_disable", True)
    yield
    jaxtyping.config.update("jaxtyping_disable", False)


@pytest.fixture(autouse=True, scope="module")
def _forget_programs():
    """Drop compiled programs after each module: thousands of them use up the memory maps that Linux allows a process.

    XLA was then seen to compile for minutes, and to crash.
    """
    yield
    jax.clear_caches()
