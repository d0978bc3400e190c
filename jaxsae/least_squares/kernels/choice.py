"""Choice of implementation: the kernel where it was measured to be faster, plain XLA elsewhere."""

import functools
import importlib
from typing import Any

import jax
import jax.numpy as jnp
from jax.extend.core import Primitive
from jax.interpreters import mlir
from jax.sharding import get_abstract_mesh

from jaxsae import sharding
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


def kernel(op: str, implementation: str | None, d: int, k: int, dtype) -> tuple[Any, dict[str, Any]] | None:
    """The module of kernels to use and its block sizes, or None for the reference."""
    platform, kind = device()
    module = PLATFORMS.get(platform)
    if module is None or implementation == "xla":
        return None
    row = _row(op, module, kind, d, k, dtype)
    if implementation is None and (sharding.is_divided() or not tuning.worth_it(row, kind)):
        return None
    return _module(module), tuning.options(row)


def _row(op: str, module: str, kind: str, d: int, k: int, dtype) -> dict[str, Any] | None:
    return tuning.nearest(op, module, kind, d=d, k=k, dtype=str(jnp.dtype(dtype)))


def _module(name: str) -> Any:
    """The kernels of a platform; Pallas is imported only when they are used."""
    return importlib.import_module(f"jaxsae.least_squares.kernels.{name}")


def choose(op: str, implementation: str | None, d: int, k: int, dtype, by_kernel, by_xla, n: Any):
    """The result of the kernel, or of the reference where no kernel applies."""
    if n == 0 or k == 0:
        return by_xla()
    if implementation == "pallas" and PLATFORMS.get(device()[0]) is None:
        return _when_lowered(op, d, k, dtype, by_kernel)
    chosen = kernel(op, implementation, d, k, dtype)
    if chosen is None:
        return by_xla()
    try:
        return by_kernel(*chosen)
    except NotImplementedError:
        if implementation == "pallas":
            raise
        return by_xla()


def _when_lowered(op: str, d: int, k: int, dtype, by_kernel):
    """The result of the kernel of the platform that the program is lowered for, which tracing does not know."""
    branches, errors, shapes = {}, [], None
    for platform in ("tpu", "cuda"):
        name = PLATFORMS[platform]
        branch = functools.partial(by_kernel, _module(name), tuning.options(_row(op, name, "", d, k, dtype)))
        try:
            shapes = jax.eval_shape(branch)
        except NotImplementedError as error:
            errors.append(error)
        else:
            branches[platform] = branch
    if not branches:
        raise errors[0]
    leaves, structure = jax.tree.flatten(shapes)
    avals = tuple(map(jax.typeof, leaves))
    return jax.lax.platform_dependent(**branches, default=lambda: structure.unflatten(_none.bind(avals=avals)))


_none = Primitive("jaxsae_no_kernel")  # arrays that no program computes
_none.multiple_results = True
_none.def_abstract_eval(lambda *, avals: avals)


def _refuse(context, *, avals):
    platforms = " or ".join(context.module_context.platforms)
    raise NotImplementedError(
        f"there are kernels for TPUs and GPUs, and this is for a {platforms}; leave out implementation='pallas'."
    )


mlir.register_lowering(_none, _refuse)
