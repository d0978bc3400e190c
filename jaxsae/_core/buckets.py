"""Objects in a bucket, `gs://bucket/name` or `s3://bucket/name`, through fsspec; a failure is one sentence.

An object appears once all of it is there, and cannot be renamed: what takes several is written in an order in which
the last one, which readers open first, makes the others count.
"""

import asyncio
import contextlib
import importlib.util
from collections.abc import Iterator
from concurrent.futures import Future
from pathlib import Path
from typing import Any

from jaxsae._core.files import InputError, in_one_line

_AT_A_TIME = asyncio.Semaphore(16)  # of fsspec's one loop
_LIBRARIES = {"gs": "gcsfs", "s3": "s3fs"}


def path(address: str) -> Any:
    """A path in a bucket, with the methods of `pathlib.Path` that make sense there.

    Args:
      address: such as `"gs://bucket/name"`.

    Raises:
      InputError: if it names no bucket, or the extra `cloud` is not installed.

    Example:
      >>> path("gs:///x")
      Traceback (most recent call last):
      jaxsae.InputError: gs:///x: names no bucket; pass gs://BUCKET/NAME.
    """
    scheme, _, rest = address.partition("://")
    if not rest.strip("/") or rest.startswith("/"):
        raise InputError(f"{address}: names no bucket; pass {scheme}://BUCKET/NAME.")
    if importlib.util.find_spec(_LIBRARIES[scheme]) is None:
        raise InputError(f"{address}: needs {_LIBRARIES[scheme]}, which is missing; pip install 'jaxsae[cloud]'.")
    import fsspec.config
    from etils import epath

    # A listing from before would hide what another process, or tensorstore, has written since.
    fsspec.config.conf.setdefault(scheme, {}).setdefault("use_listings_cache", False)
    return epath.Path(address)


@contextlib.contextmanager
def reached(path: Any) -> Iterator[None]:
    """Turn any exception that an object store raises into an `InputError`.

    Args:
      path: what is read or written.

    Raises:
      InputError: for any exception in the block; for those of the network, after the store's library has tried again.

    Example:
      >>> with reached("gs://bucket/x"):
      ...     raise FileNotFoundError
      Traceback (most recent call last):
      jaxsae.InputError: gs://bucket/x: no such bucket or object; check the address.
    """
    with in_one_line(f"{path}: cannot be used", "check the network and the credentials"):
        try:
            yield
        except FileNotFoundError as error:
            raise InputError(f"{path}: no such bucket or object; check the address.") from error


def _store(path: Any) -> tuple[Any, str]:
    """The file system of a path, and its name there."""
    import fsspec

    return fsspec.url_to_fs(str(path))


def names(folder: Any) -> dict[str, int]:
    """The files in a folder by name, with their sizes in bytes; none if it is missing.

    Args:
      folder: as from `path`.
    """
    return {name: each["size"] for name, each in _listed(folder).items()}


def versions(folder: Any) -> dict[str, str]:
    """The files in a folder by name, each with what changes when it is written again.

    Args:
      folder: as from `path`.
    """
    return {name: _version(each) for name, each in _listed(folder).items()}


def _listed(folder: Any) -> dict[str, dict[str, Any]]:
    store, inside = _store(folder)
    with reached(folder):
        try:
            found = store.ls(inside, detail=True, refresh=True)
        except FileNotFoundError:
            return {}
    # A store may list the folder itself, an empty object whose name ends with a slash.
    files = [each for each in found if each["type"] == "file" and not each["name"].endswith("/")]
    return {each["name"].rpartition("/")[2]: each for each in files}


def _version(found: dict[str, Any]) -> str:
    version = next((found[name] for name in ("ETag", "etag", "md5Hash") if found.get(name)), "")
    return f"{found['size']} {version}"


def upload(local: Path, path: Any) -> None:
    """Copy a local file, or the files of a directory, those with JSON last: these say what the others are.

    Args:
      local: the file or directory.
      path: where, as from `path`.

    Raises:
      InputError: if the bucket cannot be written.
    """
    store, inside = _store(path)
    files = [file for file in local.rglob("*") if file.is_file()] if local.is_dir() else [local]
    files.sort(key=lambda file: (file.suffix == ".json", file.as_posix()))
    with reached(path):
        if local.is_dir():  # without them, what is there is no longer taken for whole
            for file in files:
                if file.suffix == ".json" and store.exists(name := f"{inside}/{file.relative_to(local).as_posix()}"):
                    store.rm_file(name)
        for file in files:
            store.put_file(str(file), inside if file == local else f"{inside}/{file.relative_to(local).as_posix()}")


def download(path: Any, folder: Path) -> Path:
    """Copy an object, or all below a name, into a local folder, and return the copy.

    Args:
      path: what, as from `path`.
      folder: where.

    Raises:
      InputError: if it is missing or cannot be read.
    """
    store, inside = _store(path)
    local = folder / path.name
    with reached(path):
        store.get(inside, str(local), recursive=store.isdir(inside))
    return local


def remove(path: Any) -> None:
    """Remove an object, or all below a name, if there is any."""
    store, inside = _store(path)
    with reached(path), contextlib.suppress(FileNotFoundError):
        store.rm(inside, recursive=True)


def require_writable(path: Any) -> None:
    """Raise unless an object can be written beside a path; leaves none behind.

    Args:
      path: as from `path`.

    Raises:
      InputError: if the bucket is missing or denies access.
    """
    store, inside = _store(f"{path}.writable")
    with reached(path):
        store.pipe_file(inside, b"")
        with contextlib.suppress(FileNotFoundError):  # another process, which asks the same, has removed it
            store.rm_file(inside)


def describe(path: Any) -> tuple[int, str]:
    """The size of an object in bytes, and what changes when it is written again.

    Args:
      path: as from `path`.

    Raises:
      InputError: if it is missing or cannot be read.
    """
    store, inside = _store(path)
    with reached(path):
        found = store.info(inside)
    return found["size"], _version(found)


def start_reading(path: Any, start: int, stop: int) -> "Future[bytes]":
    """Begin to read bytes of an object: some are read at a time, in the order in which they were asked for.

    Args:
      path: as from `path`.
      start: the first byte.
      stop: the one after the last.
    """
    import fsspec.asyn

    store, inside = _store(path)

    async def read() -> bytes:
        async with _AT_A_TIME:  # so that what was asked for first comes first
            return await store._cat_file(inside, start=start, end=stop)

    return asyncio.run_coroutine_threadsafe(read(), fsspec.asyn.get_loop())
