"""What several processes do together: read arrays whose parts they hold, and fail."""

import contextlib
import itertools
import json
from collections.abc import Iterator, Mapping
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils

from jaxsae._core.files import InputError

_PIECE = 64 << 20  # bytes of an array that are on the host at a time


def is_primary() -> bool:
    """Whether this is the process that writes and prints for all."""
    return jax.process_index() == 0


def of_all(value: int | bool) -> list[int]:
    """Gather a value from every process."""
    if jax.process_count() == 1:
        return [int(value)]
    return multihost_utils.process_allgather(np.array(value, np.int32)).tolist()


def gather(value: Any) -> list[Any]:
    """Gather JSON from every process, in their order.

    Args:
      value: any JSON.

    Example:
      >>> gather({"rows": 3})
      [{'rows': 3}]
    """
    if jax.process_count() == 1:
        return [value]
    content = np.frombuffer(json.dumps(value).encode(), np.uint8)
    padded = np.full(max(of_all(len(content))), ord(" "), np.uint8)  # which JSON ends with
    padded[: len(content)] = content
    return [json.loads(row.tobytes()) for row in multihost_utils.process_allgather(padded)]


def require_same(values: Mapping[str, Any]) -> None:
    """Raise in every process if they have different values.

    Args:
      values: JSON by name, the same names in each.

    Raises:
      InputError: with the names of those that differ.

    Example:
      >>> require_same({"batch": 1024})
    """
    found = gather(dict(values))
    differing = [name for name in values if any(each[name] != found[0][name] for each in found)]
    if differing:
        names = ", ".join(differing)
        raise InputError(f"the processes disagree about {names}; start all of them with the same options and data.")


def pieces(x: jax.Array | np.ndarray) -> Iterator[tuple[tuple[slice, ...], np.ndarray]]:
    """Yield an array in pieces of at most 64 MiB, each with its place: no device and no host ever holds more of it.

    If its parts are on the devices of several processes, call it in each of them, and take all pieces: each gets them.

    Args:
      x: an array, wherever its parts are.

    Example:
      >>> import jax.numpy as jnp
      >>> [(place, piece.tolist()) for place, piece in pieces(jnp.arange(2))]
      [((slice(0, 2, None),), [0, 1])]
    """
    if not isinstance(x, jax.Array):
        yield from ((place, np.asarray(x[place])) for place in _cuts((slice(None),) * x.ndim, x))
        return
    here = {_resolved(shard.index, x.shape): shard.data for shard in x.addressable_shards}
    local, owners = x.is_fully_addressable or x.is_fully_replicated, {}
    for device, index in x.sharding.devices_indices_map(x.shape).items():
        owners.setdefault(_resolved(index, x.shape), device.process_index)
    for index in owners:
        for place in _cuts(tuple(slice(*ends) for ends in index), x):
            within = [slice(cut.start - ends[0], cut.stop - ends[0]) for cut, ends in zip(place, index, strict=True)]
            piece = here[index][tuple(within)] if index in here else None
            yield place, np.asarray(piece) if local else _broadcast(piece, owners[index], place, x.dtype)


def _resolved(index: tuple[slice, ...], shape: tuple[int, ...]) -> tuple[tuple[int, int], ...]:
    """The first place and the one after the last, along each axis."""
    return tuple(cut.indices(size)[:2] for cut, size in zip(index, shape, strict=True))


def _cuts(index: tuple[slice, ...], x: Any) -> Iterator[tuple[slice, ...]]:
    """Split a part of an array into as many whole rows as fit, and rows that are too long."""
    spans = [cut.indices(size)[:2] for cut, size in zip(index, x.shape, strict=True)]
    most, steps = max(1, _PIECE // x.dtype.itemsize), []
    for start, stop in reversed(spans):
        step = min(most, max(1, stop - start))
        steps.append([slice(at, min(at + step, stop)) for at in range(start, stop, step)])
        most = max(1, most // max(1, stop - start))
    yield from itertools.product(*reversed(steps))


def _broadcast(piece: jax.Array | None, owner: int, place: tuple[slice, ...], dtype: Any) -> np.ndarray:
    """A piece that one process has, in all of them."""
    shape = tuple(cut.stop - cut.start for cut in place)
    mine = np.empty(shape, dtype) if piece is None else np.ascontiguousarray(np.asarray(piece))
    # As bytes: the exchange is a sum, which makes 0 of −0.
    sent = mine.reshape(-1).view(np.uint8)
    found = multihost_utils.broadcast_one_to_all(sent, is_source=jax.process_index() == owner)
    return np.asarray(found).view(dtype).reshape(shape)


@contextlib.contextmanager
def all_or_none() -> Iterator[None]:
    """A block that fails in every process if it fails in one of them, so that none waits for another that has ended.

    Raises:
      InputError: the block's own, or that another process failed.

    Example:
      >>> with all_or_none():
      ...     raise InputError("x.npy: no such file.")
      Traceback (most recent call last):
      jaxsae.InputError: x.npy: no such file.
    """
    failure = None
    try:
        yield
    except (InputError, OSError) as error:
        failure = error
    failed = np.flatnonzero(of_all(failure is not None))
    if len(failed) and failure is None:
        failure = InputError(f"process {failed[0]} failed, and with it all of them; see its message.")
    if failure is not None:
        raise failure
