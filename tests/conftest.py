"""What holds for every test: eight fake CPU devices, and shape annotations checked at run time."""

import os
import sys
from importlib.metadata import version
from pathlib import Path

# For the benchmarks, which are not installed; last, so that the `jaxsae` under test stays the installed one.
sys.path.append(str(Path(__file__).parent.parent))

# The suite's time is XLA's compiling, and a third of that LLVM's optimisations; `.ci/run` has them on for slow tests.
os.environ.setdefault("JAX_DISABLE_MOST_OPTIMIZATIONS", "1")
# Before jax is imported: XLA reads its flags once, and ends the process at one that it does not know. Half of what is
# left is MLIR's, of which jaxlib 0.10 can do without (later ones cannot); see `pytest_collection_modifyitems`.
os.environ["XLA_FLAGS"] = " ".join(
    ["--xla_force_host_platform_device_count=8"]  # the last word is that of the environment
    + ["--xla_cpu_use_fusion_emitters=false"]
    * (os.environ["JAX_DISABLE_MOST_OPTIMIZATIONS"] == "1" and version("jaxlib").startswith("0.10."))
    + os.environ.get("XLA_FLAGS", "").split()
)
os.environ.setdefault("PJRT_NPROC", "64")  # threads that devices made of one CPU share: not to run out of them
os.environ.setdefault("JAX_PLATFORMS", "cpu")
# Commands that tests start leave nothing in the user's cache; `.ci/run` shares one among the slow tests.
if os.environ.setdefault("JAX_ENABLE_COMPILATION_CACHE", "0") == "0":
    os.environ.pop("JAX_COMPILATION_CACHE_DIR", None)
# For programs compiled for TPUs that are not here, as in `jaxsae.app.plan.LIBTPU`.
os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")
os.environ.setdefault("TPU_ACCELERATOR_TYPE", "v5litepod-16")
os.environ.setdefault("TPU_WORKER_HOSTNAMES", "localhost")

import jax
import jaxtyping
import optax
import pytest

# A dtype that two arrays have together by accident is an error; optax mixes them as it goes.
jax.config.update("jax_numpy_dtype_promotion", "strict")
standard = jax.numpy_dtype_promotion("standard")
optax.apply_updates, optax.tree.bias_correction = map(standard, (optax.apply_updates, optax.tree.bias_correction))

# Before jaxsae is imported: every annotated function then checks shapes and dtypes.
jaxtyping.install_import_hook("jaxsae", "typechecker.check")


def pytest_collection_modifyitems(items):
    """Where MLIR does not make the fusions, they may round otherwise in a batch, say, than in a row alone."""
    if "--xla_cpu_use_fusion_emitters=false" in os.environ["XLA_FLAGS"]:
        for item in (item for item in items if item.get_closest_marker("bits")):
            item.add_marker(pytest.mark.skip(reason="needs XLA's own fusions; set JAX_DISABLE_MOST_OPTIMIZATIONS=0"))


@pytest.fixture
def x64():
    """Float64 for one test."""
    with jax.enable_x64(True):
        yield


@pytest.fixture
def mixed():
    """For what mixes dtypes on purpose, as parameters in bfloat16 and rows in float32."""
    with standard:
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


@pytest.fixture(scope="session")
def smollm2():
    """The name of the small language model, if it was fetched."""
    from jaxsae.language_model import download

    if not download.cached("smollm2").is_file():
        pytest.skip("SmolLM2 is not in the cache; run: jaxsae fetch smollm2")
    return "smollm2"


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
