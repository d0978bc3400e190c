"""SAEs on the Hugging Face hub, by address or by SAELens' names, through the hub's own cache."""

import importlib.util
import os
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


def _download(address: str, revision: str | None) -> Path:
    """Download files at `org/repository/path` to the cache."""
    try:
        import huggingface_hub
        from huggingface_hub import errors
    except ImportError as error:
        raise InputError(f"{SCHEME}{address}: the hub needs the extra 'hub'; pip install 'jaxsae[hub]'.") from error
    parts = PurePosixPath(address).parts
    if len(parts) < 2 or ".." in parts or address.startswith("/"):
        raise InputError(f"got {SCHEME}{address}, expected {SCHEME}organisation/repository/path; fix it.")
    repository, inner = "/".join(parts[:2]), "/".join(parts[2:])
    absent = (errors.EntryNotFoundError, errors.RepositoryNotFoundError, errors.RevisionNotFoundError)
    # The base class of the HTTP client's errors; which client that is depends on the version of the hub's package.
    transport: Any = errors.HfHubHTTPError.__mro__[1]
    try:
        return _fetch(huggingface_hub, repository, inner, revision) / inner
    except InputError:
        raise
    except (OSError, ValueError, transport) as error:
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
