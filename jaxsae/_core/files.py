"""Atomic writes, paths and locks, with errors that are one sentence."""

import contextlib
import ctypes
import errno
import math
import os
import re
import shutil
import socket
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import IO, Any


class InputError(ValueError):
    """Invalid input that the user can correct; the message states what was got, what was expected and what to do."""

    __module__ = "jaxsae"  # where it is public


def cache() -> Path:
    """The cache directory: `$JAXSAE_CACHE`, or else the user's cache directory.

    Raises:
      InputError: if `JAXSAE_CACHE` is not set and platformdirs is not installed.

    Example:
      >>> isinstance(cache(), Path)
      True
    """
    if "JAXSAE_CACHE" in os.environ:
        return local_path(os.environ["JAXSAE_CACHE"])
    try:
        import platformdirs
    except ImportError as error:
        raise InputError("got no JAXSAE_CACHE, and platformdirs is missing; pip install 'jaxsae[lm]'.") from error
    return platformdirs.user_cache_path("jaxsae")


def json_number(value: Any) -> float | None:
    """A number for JSON, with None (null) in place of NaN and infinity.

    Args:
      value: a number, or an array with one element.

    Example:
      >>> json_number(0.5), json_number(float("nan"))
      (0.5, None)
    """
    return float(value) if math.isfinite(value) else None


def local_path(path: str | os.PathLike) -> Path:
    """A path on a local file system, or an error if it is a URL.

    Args:
      path: any path.

    Raises:
      InputError: if it is a URL, such as `gs://bucket/run`, which would create a local directory `gs:`.

    Example:
      >>> local_path("run/sae").name
      'sae'
      >>> local_path(Path("gs://bucket/run"))
      Traceback (most recent call last):
      jaxsae.InputError: gs:/bucket/run: is a URL, expected a local path; copy it here, or mount the bucket.
    """
    scheme = re.match(r"([a-z][a-z0-9+.-]+):/", os.fspath(path), re.IGNORECASE)  # `Path` makes one slash of two
    if scheme is None:
        return Path(path)
    do = {"hf": "hf:// is only for reading an SAE, as a string", "file": "leave out file://"}
    do = do.get(scheme[1].lower(), "copy it here, or mount the bucket")
    raise InputError(f"{os.fspath(path)}: is a URL, expected a local path; {do}.")


def settled(path: str | os.PathLike) -> Path:
    """The path of a directory that `atomic_directory` wrote, or of the old version that a crash left beside it.

    Args:
      path: of the directory, which need not exist.

    Example:
      >>> settled("run/sae").name
      'sae'
    """
    path = local_path(path)
    return _aside(path) if not os.path.lexists(path) and _aside(path).is_dir() else path


def first_line(error: BaseException) -> str:
    """The first line of an error's message; its type, if the message is empty.

    Args:
      error: any exception.

    Example:
      >>> first_line(KeyError("dtype")), first_line(EOFError())
      ("no 'dtype'", 'EOFError')
    """
    message = f"no {error}" if isinstance(error, KeyError) else str(error).strip()
    return (message or type(error).__name__).splitlines()[0]


@contextlib.contextmanager
def in_one_line(what: str, do: str) -> Iterator[None]:
    """Turn any exception that reading a damaged file raises into an `InputError`, "{what} ({reason}); {do}".

    Args:
      what: which file is wrong, and how.
      do: what the user can do.

    Raises:
      InputError: for any exception in the block except `InputError` and `ImportError`, which pass through.

    Example:
      >>> with in_one_line("x.json: not JSON", "download it again"):
      ...     int("x")
      Traceback (most recent call last):
      jaxsae.InputError: x.json: not JSON (invalid literal for int() with base 10: 'x'); download it again.
    """
    try:
        yield
    except (InputError, ImportError):
        raise
    except Exception as error:
        raise InputError(f"{what} ({first_line(error)}); {do}.") from error


def _aside(path: Path) -> Path:
    return path.with_name(f".{path.name}.old")


@contextlib.contextmanager
def atomic_file(path: str | os.PathLike) -> Iterator[Path]:
    """Yield a temporary path beside `path`, which is flushed and renamed to `path` when the block succeeds.

    After a crash the old file or the new one is there, whole; `.NAME.….partial` may be left beside it.

    Args:
      path: of the file; missing directories are created.

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
    path = local_path(path)
    with temporary_directory(path) as folder:
        yield folder / path.name
        _flush(folder / path.name)
        os.replace(folder / path.name, path)
        flush_folder(path.parent)


@contextlib.contextmanager
def atomic_directory(path: str | os.PathLike) -> Iterator[Path]:
    """Yield a temporary directory beside `path`, which replaces `path` when the block succeeds.

    After a crash the old directory or the new one is there, whole. Where the file system cannot exchange two
    directories, the old one may have another name: `settled` finds it.

    Args:
      path: of the directory; missing parents are created.

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
    path = local_path(path)
    with temporary_directory(path) as folder:
        new = folder / "new"
        new.mkdir()
        yield new
        for place, _, names in os.walk(new):
            for name in names:
                _flush(Path(place, name))
            flush_folder(place)
        _put(new, path)
        flush_folder(path.parent)
        remove(_aside(path))


def _put(new: Path, path: Path) -> None:
    """Move a directory to `path`; the previous one is then in the temporary folder, or set aside."""
    if not os.path.lexists(path):
        os.rename(new, path)
        return
    try:
        _exchange(new, path)
        return
    except OSError:
        pass  # fall back to two renames, which raise if they fail too
    remove(_aside(path))
    os.rename(path, _aside(path))
    flush_folder(path.parent)
    try:
        os.rename(new, path)
    except OSError:
        os.rename(_aside(path), path)
        raise


def _exchange(a: Path, b: Path) -> None:
    """Exchange two paths atomically; raise OSError where that is not supported."""
    libc, names = ctypes.CDLL(None, use_errno=True), (os.fsencode(a), os.fsencode(b))
    if hasattr(libc, "renameat2"):  # Linux
        here, exchange = -100, 2  # AT_FDCWD, RENAME_EXCHANGE
        failed = libc.renameat2(here, names[0], here, names[1], exchange)
    elif hasattr(libc, "renamex_np"):  # macOS
        failed = libc.renamex_np(*names, 2)  # RENAME_SWAP
    else:
        raise OSError(errno.ENOSYS, os.strerror(errno.ENOSYS))
    if failed:
        raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()), str(b))


def remove(path: Path) -> None:
    """Remove a file, or a directory and its contents, if it exists.

    Args:
      path: of the file or directory.

    Example:
      >>> remove(Path("no-such-place"))
    """
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)


def _flush(path: Path) -> None:
    """Flush a file to disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def flush_folder(path: str | os.PathLike) -> None:
    """Flush a folder's entries to disk. Where that is not supported, recent entries may be lost on power failure.

    Args:
      path: of the folder.

    Example:
      >>> flush_folder(".")
    """
    with contextlib.suppress(OSError):
        _flush(Path(path))


@contextlib.contextmanager
def owned(folder: str | os.PathLike, *, warn: Callable[[str], None] = lambda text: None) -> Iterator[None]:
    """Hold the lock of a folder, so that one process writes to it; the lock is released however the process ends.

    Args:
      folder: created if missing; the lock file is `.lock` in it.
      warn: called if the file system does not support locks.

    Raises:
      InputError: if another process holds the lock, or the folder is not writable.

    Example:
      >>> import tempfile
      >>> with tempfile.TemporaryDirectory() as folder, owned(folder), owned(folder):
      ...     pass
      Traceback (most recent call last):
      jaxsae.InputError: ...: another process writes there (...); stop it, or choose another --out.
    """
    folder = local_path(folder)
    with _locked(folder, warn) as file:
        file.truncate(0)
        file.write(f"process {os.getpid()} of {socket.gethostname()}")
        file.flush()
        try:
            yield
        finally:
            (folder / ".lock").unlink(missing_ok=True)
            with contextlib.suppress(OSError):
                folder.rmdir()  # if it is empty


def _locked(folder: Path, warn: Callable[[str], None]) -> IO[str]:
    """The lock file of a folder; the lock is held until it is closed."""
    import fcntl

    while True:
        try:
            folder.mkdir(parents=True, exist_ok=True)
            file = open(folder / ".lock", "a+")  # noqa: SIM115
        except FileNotFoundError:
            continue  # another process has just removed the folder
        except OSError as error:
            raise InputError(f"cannot write {folder}: {error.strerror}; choose another place.") from error
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            with file:
                file.seek(0)
                owner = file.read() or "just started"
            what = f"{folder}: another process writes there ({owner}); stop it, or choose another --out."
            raise InputError(what) from error
        except OSError as error:
            warn(f"{folder}: cannot be locked ({error.strerror}); start no other process on it.")
        try:
            if os.path.samestat(os.fstat(file.fileno()), os.stat(folder / ".lock")):
                return file
        except FileNotFoundError:
            pass
        file.close()  # its previous owner has removed the file since


@contextlib.contextmanager
def temporary_directory(path: Path) -> Iterator[Path]:
    """Yield a new directory beside `path`, and remove it in the end.

    Args:
      path: of a file or directory, which need not exist; missing parents are created.

    Raises:
      InputError: if nothing can be written there.

    Example:
      >>> import tempfile
      >>> with tempfile.TemporaryDirectory() as folder, temporary_directory(Path(folder, "a.txt")) as beside:
      ...     beside.parent == Path(folder)
      True
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        folder = Path(tempfile.mkdtemp(prefix=f".{path.name}.", suffix=".partial", dir=path.parent))
    except OSError as error:
        raise InputError(f"cannot write {path}: {error.strerror}; choose another place.") from error
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)
