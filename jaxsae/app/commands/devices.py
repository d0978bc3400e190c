"""The devices that a command runs on: a mesh of them, perhaps of several processes."""

import contextlib
import os
import sys
from collections.abc import Iterator

from jaxsae._core.files import InputError, first_line


@contextlib.contextmanager
def spread(mesh: tuple[int, int] | None, *, distributed: bool) -> Iterator[bool]:
    """Run what is inside on a mesh of so many ways to split rows, and latents; by default on one device.

    Yields whether this is the process that prints, the first of them.

    Args:
      mesh: `(data, latent)`.
      distributed: join the other processes first.

    Raises:
      InputError: if there are fewer devices, or the processes do not find each other.
    """
    import jax

    from jaxsae import sharding

    if distributed:
        _join()
    if mesh is None:
        yield not distributed or jax.process_index() == 0
        return
    data, latent = mesh
    # Devices made of one CPU share threads; if collectives wait in all of them, jaxlib 0.10 deadlocks.
    os.environ.setdefault("PJRT_NPROC", str(max(os.cpu_count() or 1, min(8 * data * latent, 1 << 12))))
    try:
        made = sharding.make_mesh(data, latent)
    except ValueError as error:
        raise InputError(str(error)) from error
    with jax.set_mesh(made):
        yield jax.process_index() == 0


def _join() -> None:
    import jax

    # JAX reads the address itself, and finds all three on the clusters that it knows.
    count, number = _number("JAX_NUM_PROCESSES"), _number("JAX_PROCESS_ID")
    if jax.config.jax_platforms == "cpu":  # pyright: ignore[reportAttributeAccessIssue]
        jax.config.update("jax_cpu_collectives_implementation", "gloo")
        _keep_stdout_for_results()
    try:
        jax.distributed.initialize(num_processes=count, process_id=number)
    except (ValueError, RuntimeError) as error:
        what = f"the processes do not find each other ({first_line(error)})"
        do = "set JAX_COORDINATOR_ADDRESS=HOST:PORT, JAX_NUM_PROCESSES and JAX_PROCESS_ID"
        raise InputError(f"{what}; {do}.") from error


def _keep_stdout_for_results() -> None:
    """Send to stderr what libraries print: Gloo reports its connections on stdout."""
    results = os.fdopen(os.dup(sys.stdout.fileno()), "w", encoding=sys.stdout.encoding, errors=sys.stdout.errors)
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())
    sys.stdout = results


def _number(name: str) -> int | None:
    value = os.environ.get(name)
    if value is not None and not value.isdecimal():
        raise InputError(f"got {name}={value!r}, expected a number; set it.")
    return None if value is None else int(value)
