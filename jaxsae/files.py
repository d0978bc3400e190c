"""Files are written whole or not at all, and what is wrong with one is said in one sentence."""

import contextlib
import math
import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any


class InputError(ValueError):
    """A file, or a choice, that the user can mend; the message says what was got, what was expected and what to do."""


def cache() -> Path:
    """Where things are kept that can be had again: `$JAXSAE_CACHE`, or else the user's cache directory.

    Raises:
      InputError: if neither is known.

    Example:
      >>> isinstance(cache(), Path)
      True
    """
    if "JAXSAE_CACHE" in os.environ:
        return Path(os.environ["JAXSAE_CACHE"])
    try:
        import platformdirs
    except ImportError as error:
        raise InputError("got no JAXSAE_CACHE, and platformdirs is missing; pip install 'jaxsae[lm]'.") from error
    return platformdirs.user_cache_path("jaxsae")


def json_number(value: Any) -> float | None:
    """A number as JSON can hold it, which has no NaN, the mean of nothing for example: that is null.

    Args:
      value: a number, or an array of one.

    Example:
      >>> json_number(0.5), json_number(float("nan"))
      (0.5, None)
    """
    return float(value) if math.isfinite(value) else None


@contextlib.contextmanager
def atomic_file(path: str | os.PathLike) -> Iterator[Path]:
    """Yield a temporary path beside `path`; it takes its name when the block ends well, else it is removed.

    Args:
      path: of the file; directories that are missing are made.

    Raises:
      InputError: if nothing can be written there.

    Example:
      >>> import tempfile
      >>> with tempfile.TemporaryDirectory() as folder:
      ...     with atomic_file(Path(folder, "a.txt")) as temporary:
      ...         _ = temporary.write_text("whole")
      ...     Path(folder, "a.txt").read_text()
      'whole'
    """
    path = Path(path)
    with _temporary_directory(path) as folder:
        yield folder / path.name
        os.replace(folder / path.name, path)


@contextlib.contextmanager
def atomic_directory(path: str | os.PathLike) -> Iterator[Path]:
    """Yield a temporary directory beside `path`; it takes its name, and its place, when the block ends well.

    Args:
      path: of the directory; those above it that are missing are made.

    Raises:
      InputError: if nothing can be written there.

    Example:
      >>> import tempfile
      >>> with tempfile.TemporaryDirectory() as folder:
      ...     with atomic_directory(Path(folder, "run")) as temporary:
      ...         _ = Path(temporary, "a.txt").write_text("whole")
      ...     Path(folder, "run", "a.txt").read_text()
      'whole'
    """
    path = Path(path)
    with _temporary_directory(path) as folder:
        new, old = folder / "new", folder / "old"
        new.mkdir()
        yield new
        if path.exists():
            os.rename(path, old)
        try:
            os.rename(new, path)
        except OSError:
            if old.exists():
                os.rename(old, path)
            raise


@contextlib.contextmanager
def _temporary_directory(path: Path) -> Iterator[Path]:
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        folder = Path(tempfile.mkdtemp(prefix=f".{path.name}.", dir=path.parent))
    except OSError as error:
        raise InputError(f"cannot write {path}: {error.strerror}; choose another place.") from error
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)
