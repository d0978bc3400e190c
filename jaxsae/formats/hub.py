"""SAEs on the Hugging Face hub: read by address or by SAELens' names, through the hub's own cache, and published."""

import contextlib
import importlib.util
import os
from collections.abc import Iterator
from pathlib import Path, PurePosixPath
from typing import Any, NamedTuple

from jaxsae._core.files import InputError, first_line, settled

SCHEME = "hf://"
_SUFFIXES = (".safetensors", ".npz", ".pt", ".pth")
_INNER = "checkpoints"  # where Llama Scope has the arrays


class Found(NamedTuple):
    """Local files, and what SAELens' list of releases adds to them.

    Attributes:
      path: directory or file.
      scale: from raw rows to those that the SAE was trained on, to be folded in; None if unknown.
      config: entries that override its configuration.
    """

    path: Path
    scale: float | None = None
    config: dict[str, Any] = {}  # noqa: RUF012


def find(path: str | os.PathLike, *, revision: str | None = None) -> Found:
    """Make files local: those at a path, at an address on the hub, or under a release and id of SAELens.

    Args:
      path: a local path; `"hf://org/repository/path"`; or `"release/id"` from the list of releases of sae-lens, if it
        is installed. (The list is read without importing sae-lens or torch.)
      revision: branch, tag or commit, on the hub; its main branch by default.

    Raises:
      InputError: if the hub has no such files, or cannot be reached and they are not cached; if the extra is missing.

    Example:
      >>> find("run/sae").path.name
      'sae'
    """
    name = os.fspath(path)
    if name.startswith(SCHEME):
        return Found(_download(name.removeprefix(SCHEME), revision))
    release = None if settled(path).exists() else _release(name)
    if release is None:
        if revision is not None:
            raise InputError(f"got revision {revision!r} for {name}, which is not on the hub; leave it out.")
        return Found(settled(path))
    address, entry, overrides = release
    key = "normalize_activations"
    config = {key: overrides[key]} if key in overrides else {}
    return Found(_download(address, revision), entry.get("norm_scaling_factor"), config)


def _release(name: str) -> tuple[str, dict[str, Any], dict[str, Any]] | None:
    """The address of a release and id, and their entries in the list; None if they are not listed."""
    release, _, sae_id = name.partition("/")
    package = importlib.util.find_spec("sae_lens")
    if not sae_id or package is None or package.origin is None:
        return None
    import yaml

    listed = Path(package.origin).with_name("pretrained_saes.yaml")
    releases = yaml.load(listed.read_bytes(), Loader=getattr(yaml, "CSafeLoader", yaml.SafeLoader))
    if release not in releases:
        return None
    entries = {entry["id"]: entry for entry in releases[release]["saes"]}
    if sae_id not in entries:
        some = ", ".join(list(entries)[:5])
        raise InputError(f"{release} has no {sae_id!r}, but {len(entries)} others, such as {some}; name one of them.")
    address = f"{releases[release]['repo_id']}/{entries[sae_id]['path']}"
    return address, entries[sae_id], releases[release].get("config_overrides") or {}


def push(folder: Path, address: str, *, message: str, private: bool = False) -> str:
    """Upload the files of a folder in one commit, after which all of them are there, or none; the commit's address.

    The repository is created if it is missing. Other files in it are left as they are.

    Args:
      folder: on disk.
      address: `"hf://organisation/repository"`, or a folder in it.
      message: of the commit.
      private: whether a new repository is private.

    Raises:
      InputError: if there is no token, if the hub refuses, or if it cannot be reached; if the extra is missing.

    Example:
      >>> push(Path("run/sae"), "hf://repository", message="An SAE")
      Traceback (most recent call last):
      jaxsae.InputError: got hf://repository, expected hf://organisation/repository/path; fix it.
    """
    require_token(address)
    huggingface_hub, errors = _client(address)
    repository, inner = _split(address.removeprefix(SCHEME))
    api = huggingface_hub.HfApi(endpoint=os.environ.get("HF_ENDPOINT"))
    with _refused_in_one_line(address, errors):
        api.create_repo(repository, private=private or None, exist_ok=True)
        how = {"path_in_repo": inner or None, "commit_message": message}
        return api.upload_folder(repo_id=repository, folder_path=folder, **how).commit_url


def require_token(address: str) -> None:
    """Raise unless there is a token, without which nothing can be uploaded.

    Args:
      address: where, `"hf://organisation/repository"`, or a folder in it.

    Raises:
      InputError: if it is no such address, if there is no token, or if the extra is missing.

    Example:
      >>> require_token("hf://repository")
      Traceback (most recent call last):
      jaxsae.InputError: got hf://repository, expected hf://organisation/repository/path; fix it.
    """
    _split(address.removeprefix(SCHEME))
    huggingface_hub, _ = _client(address)
    if huggingface_hub.get_token() is None:
        raise InputError(f"{address}: nobody is logged in, who may write there; run: hf auth login, or set HF_TOKEN.")


@contextlib.contextmanager
def _refused_in_one_line(address: str, errors: Any) -> Iterator[None]:
    """Turn what the hub's client raises while it writes into an `InputError`."""
    try:
        yield
    except (OSError, RuntimeError, ValueError, _transport(errors)) as raised:
        of_upload = isinstance(raised, RuntimeError) and raised.__cause__
        error: Any = raised.__cause__ if of_upload else raised
        said = first_line(error).rstrip(".")
        if isinstance(error, errors.HfHubHTTPError):
            status = error.response.status_code
            said = f"{status}: {(error.server_message or said).splitlines()[0].rstrip('.')}"
            if 400 <= status < 500 and status not in (408, 429):
                raise InputError(f"{address}: the hub refuses ({said}); check its name and your token.") from raised
        elif isinstance(error, ValueError):  # a name that the client does not take
            raise InputError(f"{address}: {said}; fix the address.") from raised
        what = f"cannot be reached ({said}), and nothing is published"
        raise InputError(f"{address}: the hub {what}; try again.") from raised


def _client(address: str) -> tuple[Any, Any]:
    """The hub's client, and its errors."""
    try:
        import huggingface_hub
        from huggingface_hub import errors
    except ImportError as error:
        raise InputError(f"{address}: the hub needs the extra 'hub'; pip install 'jaxsae[hub]'.") from error
    return huggingface_hub, errors


def _transport(errors: Any) -> Any:
    """The base class of the HTTP client's errors; which client that is depends on the version of the hub's package."""
    return errors.HfHubHTTPError.__mro__[1]


def _split(address: str) -> tuple[str, str]:
    """The repository, and the path in it, of `org/repository/path`."""
    parts = PurePosixPath(address).parts
    if len(parts) < 2 or ".." in parts or address.startswith("/"):
        raise InputError(f"got {SCHEME}{address}, expected {SCHEME}organisation/repository/path; fix it.")
    return "/".join(parts[:2]), "/".join(parts[2:])


def _download(address: str, revision: str | None) -> Path:
    """Download files at `org/repository/path` to the cache."""
    huggingface_hub, errors = _client(SCHEME + address)
    repository, inner = _split(address)
    absent = (errors.EntryNotFoundError, errors.RepositoryNotFoundError, errors.RevisionNotFoundError)
    try:
        return _fetch(huggingface_hub, repository, inner, revision) / inner
    except InputError:
        raise
    except (OSError, ValueError, _transport(errors)) as error:
        if isinstance(error, absent) and not isinstance(error, errors.LocalEntryNotFoundError):
            at = f" at revision {revision}" if revision else ""
            what = f"not on the hub{at} ({first_line(error)})"
            raise InputError(f"{SCHEME}{address}: {what}; fix the address, or log in.") from error
        if isinstance(error, ValueError):  # a name that the hub's client does not take
            raise InputError(f"{SCHEME}{address}: {first_line(error)}; fix the address.") from error
        folder = _cached(huggingface_hub, repository, revision)
        if folder is None or not (folder / inner).exists():
            what = f"the hub cannot be reached ({first_line(error)}), and its cache has no such files"
            raise InputError(f"{SCHEME}{address}: {what}; try again, or download the files by other means.") from error
        return folder / inner


def _fetch(huggingface_hub: Any, repository: str, inner: str, revision: str | None) -> Path:
    """Download only the configurations and weights of one SAE; return the repository's folder in the cache."""
    endpoint = os.environ.get("HF_ENDPOINT")
    api = huggingface_hub.HfApi(endpoint=endpoint)
    is_file = inner.endswith(_SUFFIXES)
    within = PurePosixPath(inner).parent if is_file else PurePosixPath(inner)
    paths = _list(api, repository, within, revision)
    if not is_file and f"{within / _INNER}/" in paths:
        paths += _list(api, repository, within / _INNER, revision)
    weights = [inner] if is_file else [path for path in paths if path.endswith(_SUFFIXES)]
    if not weights:
        folders = [path.removesuffix("/") for path in paths if path.endswith("/")]
        some = ", ".join(folders[:5]) or "no folders either"
        raise InputError(f"{SCHEME}{repository}/{inner}: has no weights, but {some}; name the folder of one SAE.")
    wanted = [*(path for path in paths if path.endswith(".json")), *weights]
    for path in wanted[:-1]:
        huggingface_hub.hf_hub_download(repository, path, revision=revision, endpoint=endpoint)
    local = huggingface_hub.hf_hub_download(repository, wanted[-1], revision=revision, endpoint=endpoint)
    return Path(local).parents[len(PurePosixPath(wanted[-1]).parts) - 1]


def _list(api: Any, repository: str, within: PurePosixPath, revision: str | None) -> list[str]:
    """The paths directly in a folder of a repository; folders end with a slash."""
    folder = None if within == PurePosixPath() else str(within)
    entries = api.list_repo_tree(repository, folder, revision=revision)
    inside = [each for each in entries if PurePosixPath(each.path).parent == within and ".." not in each.path]
    return [each.path + ("/" if hasattr(each, "tree_id") else "") for each in inside]


def _cached(huggingface_hub: Any, repository: str, revision: str | None) -> Path | None:
    try:
        return Path(huggingface_hub.snapshot_download(repository, revision=revision, local_files_only=True))
    except (OSError, ValueError):
        return None
