"""Choice of implementation: the kernel where it was measured to be faster, plain XLA elsewhere."""

import importlib
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import get_abstract_mesh

from jaxsae.least_squares.kernels import tuning

PLATFORMS = {"tpu": "tpu", "gpu": "gpu", "cuda": "gpu"}  # platform to module of kernels


def check_implementation(name: str, implementation) -> None:
    """Raise unless the implementation exists."""
    if implementation not in (None, "xla", "pallas"):
        raise ValueError(f"`{name}` got implementation {implementation!r}; pass 'xla', 'pallas' or None.")


def device() -> tuple[str, str]:
    """Platform and kind of the device that tracing targets, as in Pallas: the abstract mesh's, or the default."""
    abstract = get_abstract_mesh().abstract_device
    if abstract is not None:
        return abstract.platform, abstract.device_kind
    return jax.default_backend(), jax.devices()[0].device_kind


def default_device() -> tuple[str | None, str]:
    """The module of kernels for the current device, or None, and the kind of the device."""
    platform, kind = device()
    return PLATFORMS.get(platform), kind


def _divided() -> bool:
    """Whether the compiler may have to split a batch over devices, which it cannot do for a kernel."""
    mesh = get_abstract_mesh()
    return jax.device_count() > 1 and not (mesh.axis_names and set(mesh.manual_axes) == set(mesh.axis_names))


def kernel(op: str, implementation: str | None, d: int, k: int, dtype) -> tuple[Any, dict[str, Any]] | None:
    """The module of kernels to use and its block sizes, or None for the reference."""
    if implementation == "xla":
        return None
    platform, kind = device()
    module = PLATFORMS.get(platform)
    if module is None:
        if implementation == "pallas":
            raise NotImplementedError(f"there are kernels for TPUs and GPUs, and the default device is a {platform}")
        return None
    row = tuning.nearest(op, module, kind, d=d, k=k, dtype=str(jnp.dtype(dtype)))
    if implementation is None and (_divided() or not tuning.worth_it(row, kind)):
        return None
    return _module(module), tuning.options(row)


def _module(name: str) -> Any:
    """The kernels of a platform; Pallas is imported only when they are used."""
    return importlib.import_module(f"jaxsae.least_squares.kernels.{name}")


def choose(op: str, implementation: str | None, d: int, k: int, dtype, by_kernel, by_xla, n: Any):
    """The result of the kernel, or of the reference where no kernel applies."""
    chosen = kernel(op, implementation, d, k, dtype)
    if chosen is None or n == 0 or k == 0:
        return by_xla()
    try:
        return by_kernel(*chosen)
    except NotImplementedError:
        if implementation == "pallas":
            raise
        return by_xla()
