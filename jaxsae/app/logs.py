"""Metrics of a run in progress: TensorBoard event files, Weights & Biases, and reading them back."""

import contextlib
import functools
import os
import tempfile
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from jaxsae._core.files import AnyPath, InputError, any_path, local_path
from jaxsae.app.options import Options

_NO_TENSORBOARD = "TensorBoard files need tensorboardX, which is missing; pip install 'jaxsae[study]'."
_COPY_EVERY = 60.0  # seconds
Log = Callable[[int, dict[str, float]], None]


def logs(folder: str | os.PathLike, options: Options, *, wandb: bool = False) -> contextlib.AbstractContextManager[Log]:
    """Log to TensorBoard event files in a folder and, if asked, to Weights & Biases (or, `WANDB_MODE=offline`, files).

    Args:
      folder: of the event files, on disk or in a bucket.
      options: of the run, for Weights & Biases.
      wandb: whether to log there.

    Raises:
      InputError: if tensorboardX or wandb is not installed; nothing is written before the block begins.

    Example:
      >>> import tempfile
      >>> with tempfile.TemporaryDirectory() as folder, logs(folder, Options("relu", 8, l1=0.1)) as log:
      ...     log(1, {"nmse": 0.5})
    """
    try:
        from tensorboardX import SummaryWriter
    except ImportError as error:
        raise InputError(_NO_TENSORBOARD) from error
    return _writing(any_path(folder), SummaryWriter, _wandb(options) if wandb else None)


@contextlib.contextmanager
def _writing(folder: AnyPath, writer_of: Callable[[str], Any], start: Callable[..., Any] | None) -> Iterator[Log]:
    with contextlib.ExitStack() as stack:
        local = stack.enter_context(_local(folder))
        writer = stack.enter_context(writer_of(str(local)))
        active = None if start is None else stack.enter_context(start(dir=str(local)))

        def log(step: int, numbers: dict[str, float]) -> None:
            for name, value in numbers.items():
                writer.add_scalar(name, value, step)
            if active is not None:
                active.log(numbers, step=step)

        yield log


@contextlib.contextmanager
def _local(folder: AnyPath) -> Iterator[Path]:
    """A folder on disk, whose files are copied every minute, and in the end, if it stands for one in a bucket."""
    if isinstance(folder, Path):
        yield folder
        return
    from jaxsae._core import buckets

    done = threading.Event()
    with tempfile.TemporaryDirectory() as local:

        def copy() -> None:
            while not done.wait(_COPY_EVERY):
                with contextlib.suppress(InputError):  # it is tried again
                    buckets.upload(Path(local), folder)

        thread = threading.Thread(target=copy, daemon=True)
        thread.start()
        try:
            yield Path(local)
        finally:
            done.set()
            thread.join()
            buckets.upload(Path(local), folder)


def curves(folder: str | os.PathLike) -> dict[str, dict[int, float]]:
    """Read the metrics that `logs` wrote to a folder, by name and step; for each step, the last value.

    A file ends at a truncated record, such as the last one of a killed run.

    Args:
      folder: of a run, perhaps still in progress.

    Raises:
      InputError: if tensorboardX is not installed.

    Example:
      >>> import tempfile
      >>> with tempfile.TemporaryDirectory() as folder:
      ...     with logs(folder, Options("relu", 8, l1=0.1)) as log:
      ...         log(10, {"nmse": 0.5})
      ...     curves(folder)
      {'nmse': {10: 0.5}}
    """
    paths = sorted(local_path(folder).glob("events.out.tfevents.*"))  # in order of time, which is in the name
    if not paths:
        return {}
    try:
        from google.protobuf.message import DecodeError
        from tensorboardX.proto.event_pb2 import Event  # pyright: ignore[reportAttributeAccessIssue]
    except ImportError as error:
        raise InputError(_NO_TENSORBOARD) from error
    found: dict[str, dict[int, float]] = {}
    for path in paths:
        with contextlib.suppress(DecodeError):
            for record in _records(path.read_bytes()):
                event = Event.FromString(record)
                for value in event.summary.value:
                    found.setdefault(value.tag, {})[event.step] = value.simple_value
    return {name: dict(sorted(curve.items())) for name, curve in found.items()}


def _records(content: bytes) -> Iterator[bytes]:
    """The records of a TFRecord file, which has the length of each, its checksum, the record, and its checksum."""
    at = 0
    while at + 12 <= len(content):
        start = at + 12
        end = start + int.from_bytes(content[at : at + 8], "little")
        at = end + 4
        if at <= len(content):
            yield content[start:end]


def _wandb(options: Options) -> Callable[..., Any]:
    try:
        import wandb  # pyright: ignore[reportMissingImports]
    except ImportError as error:
        raise InputError("got --wandb, but wandb is missing; pip install wandb.") from error
    return functools.partial(wandb.init, project="jaxsae", config=options._asdict())
