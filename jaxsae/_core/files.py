"""Atomic writes, paths on disk and in buckets, and locks, with errors that are one sentence."""

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
from typing import IO, TYPE_CHECKING, Any

# A path on disk, or one in a bucket, which has the methods of `Path` that make sense there.
if TYPE_CHECKING:
    AnyPath = Path
else:
    AnyPath = Any


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


def address(path: str | os.PathLike) -> str | None:
    """The address of a path in a bucket, `gs://…` or `s3://…`, of which `Path` takes one slash; None for other paths.

    Args:
      path: any path.

    Example:
      >>> address(Path("gs://bucket/run")), address("run")
      ('gs://bucket/run', None)
    """
    found = re.match(r"(gs|s3):(//?|$)", os.fspath(path), re.IGNORECASE)
    return None if found is None else f"{found[1].lower()}://{os.fspath(path)[found.end() :]}"


def shown(path: str | os.PathLike) -> str:
    """A path as its user wrote it.

    Args:
      path: any path.

    Example:
      >>> shown(Path("gs://bucket/run"))
      'gs://bucket/run'
    """
    return address(path) or os.fspath(path)


def any_path(path: str | os.PathLike) -> AnyPath:
    """A path on a local file system, or in a bucket.

    Args:
      path: any path.

    Raises:
      InputError: if it is another URL; or in a bucket, and the extra `cloud` is not installed.

    Example:
      >>> any_path("run/sae").name
      'sae'
    """
    where = address(path)
    if where is None:
        return local_path(path)
    from jaxsae._core import buckets

    return buckets.path(where)


def reached(path: AnyPath) -> contextlib.AbstractContextManager[None]:
    """A block in which any exception of an object store is turned into an `InputError`; local ones pass through.

    Args:
      path: what is read or written, as from `any_path`.

    Example:
      >>> with reached(Path("x")):
      ...     pass
    """
    if isinstance(path, Path):
        return contextlib.nullcontext()
    from jaxsae._core import buckets

    return buckets.reached(path)


def names(folder: AnyPath) -> dict[str, int]:
    """The files in a folder by name, with their sizes in bytes; none if it is missing.

    Args:
      folder: as from `any_path`.

    Example:
      >>> names(Path("no-such-place"))
      {}
    """
    if not isinstance(folder, Path):
        from jaxsae._core import buckets

        return buckets.names(folder)
    try:
        with os.scandir(folder) as entries:
            return {entry.name: entry.stat().st_size for entry in entries if entry.is_file()}
    except (FileNotFoundError, NotADirectoryError):
        return {}


def settled(path: str | os.PathLike) -> AnyPath:
    """The path of a directory that `atomic_directory` wrote, or of the old version that a crash left beside it.

    Args:
      path: of the directory, which need not exist.

    Example:
      >>> settled("run/sae").name
      'sae'
    """
    path = any_path(path)
    if not isinstance(path, Path):
        return path
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
      path: of the file; missing directories are created. In a bucket, the temporary path is on the local disk.

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
    path = any_path(path)
    with temporary_directory(path) as folder:
        yield folder / path.name
        if not isinstance(path, Path):
            _upload(folder / path.name, path)
            return
        _flush(folder / path.name)
        os.replace(folder / path.name, path)
        flush_folder(path.parent)


@contextlib.contextmanager
def atomic_directory(path: str | os.PathLike) -> Iterator[Path]:
    """Yield a temporary directory beside `path`, which replaces `path` when the block succeeds.

    After a crash the old directory or the new one is there, whole. Where the file system cannot exchange two
    directories, the old one may have another name: `settled` finds it. In a bucket, after a crash there may be neither:
    the files of JSON, without which no reader takes it for whole, are removed first and written last.

    Args:
      path: of the directory; missing parents are created. In a bucket, the temporary one is on the local disk.

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
    path = any_path(path)
    with temporary_directory(path) as folder:
        new = folder / "new"
        new.mkdir()
        yield new
        if not isinstance(path, Path):
            _upload(new, path)
            return
        for place, _, names in os.walk(new):
            for name in names:
                _flush(Path(place, name))
            flush_folder(place)
        _put(new, path)
        flush_folder(path.parent)
        remove(_aside(path))


def _upload(local: Path, path: Any) -> None:
    from jaxsae._core import buckets

    buckets.upload(local, path)


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


def remove(path: AnyPath) -> None:
    """Remove a file, or a directory and its contents, if it exists.

    Args:
      path: of the file or directory.

    Example:
      >>> remove(Path("no-such-place"))
    """
    if not isinstance(path, Path):
        from jaxsae._core import buckets

        buckets.remove(path)
    elif path.is_dir() and not path.is_symlink():
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
      folder: created if missing; the lock file is `.lock` in it. In a bucket there are no locks.
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
    folder = any_path(folder)
    if not isinstance(folder, Path):
        yield
        return
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
def temporary_directory(path: AnyPath) -> Iterator[Path]:
    """Yield a new directory beside `path`, and remove it in the end; for a path in a bucket, one on the local disk.

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
    if not isinstance(path, Path):
        with tempfile.TemporaryDirectory(prefix="jaxsae.") as elsewhere:
            yield Path(elsewhere)
        return
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        folder = Path(tempfile.mkdtemp(prefix=f".{path.name}.", suffix=".partial", dir=path.parent))
    except OSError as error:
        raise InputError(f"cannot write {path}: {error.strerror}; choose another place.") from error
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)
