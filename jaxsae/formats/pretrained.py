"""SAEs on disk, in buckets and on the hub: our own format, and those of other libraries, in one table."""

import contextlib
import dataclasses
import os
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxsae._core import processes
from jaxsae._core.files import (
    InputError,
    address,
    any_path,
    local_path,
    names,
    reached,
    settled,
    temporary_directory,
)
from jaxsae.autoencoder import normalisation
from jaxsae.autoencoder.sae import SAE, describe as describe_sae
from jaxsae.autoencoder.surgery import fold_scale
from jaxsae.data.origin import Origin
from jaxsae.formats import (
    circuit_tracer,
    common,
    dictionary_learning,
    gemma_scope,
    goodfire,
    hub,
    llama_scope,
    openai,
    own,
    qwen_scope,
    saelens,
    sparsify,
)
from jaxsae.formats.common import Raw
from jaxsae.formats.tensors import read_safetensors, ready, writable


class _Format(NamedTuple):
    detect: Callable[[Path], bool]
    read: Callable[[Path], Raw]
    convert: Callable[[Raw], SAE]
    write: Callable[[SAE, Any, Origin], None] | None = None


def load(path: str | os.PathLike, *, format: str | None = None, dtype: Any = None, revision: str | None = None) -> SAE:
    """Load an SAE from disk or the Hugging Face hub; it computes the same function as the original.

    Large arrays are mapped and copied piece by piece, so that memory holds little more than the SAE itself; on a mesh
    (`jax.set_mesh`) each device gets its part of them. Torch pickles are read without torch, and without executing
    them.

    Args:
      path: what `save` wrote, a training run, or a directory or file of another library; on disk, in a bucket, from
        which it is copied to a temporary folder, or on the hub, `"hf://org/repository/path"`, or as a release and id of
        SAELens', `"gpt2-small-res-jb/blocks.8.hook_resid_pre"`, if sae-lens is installed.
      format: a name from `FORMATS`; detected from the contents by default.
      dtype: of the weights, such as `"float32"`; that of the files by default. Thresholds stay in float32 or better.
      revision: branch, tag or commit, on the hub.

    Raises:
      InputError: if the path is missing, of an unknown or ambiguous format, of a newer version, truncated, or would
        run code; if arrays and configuration disagree, or an array is unused or holds NaN.

    Example:
      >>> import tempfile, jax, jaxsae
      >>> sae = jaxsae.init(jax.random.key(0), d=4, m=8, activation=jaxsae.TopK(2))
      >>> with tempfile.TemporaryDirectory() as folder:
      ...     jaxsae.pretrained.save(sae, f"{folder}/sae", format="saelens")
      ...     jaxsae.pretrained.load(f"{folder}/sae").activation.k
      2
    """
    return _load(path, format, dtype, revision)[0]


def describe(path: str | os.PathLike, *, revision: str | None = None) -> dict[str, str]:
    """Describe the SAE at a path: its format, what it computes, and its site in the model if recorded.

    Args:
      path: as for `load`.
      revision: branch, tag or commit, on the hub.

    Raises:
      InputError: as for `load`.

    Example:
      >>> import tempfile, jax, jaxsae
      >>> sae = jaxsae.init(jax.random.key(0), d=4, m=8, activation=jaxsae.TopK(2))
      >>> with tempfile.TemporaryDirectory() as folder:
      ...     jaxsae.pretrained.save(sae, f"{folder}/sae", format="sparsify")
      ...     described = jaxsae.pretrained.describe(f"{folder}/sae")
      >>> described["format"], described["kind"]
      ('sparsify', 'autoencoder, 4 wide, 8 latents, float32')
    """
    sae, format, config = _load(path, None, None, revision)
    metadata = config.get("metadata")
    known = config | (metadata if isinstance(metadata, dict) else {})
    names = ("model_name", "lm_name", "hook_name", "hf_hook_point_in", "hook_point_in", "feature_input_hook", "layer")
    written = ", ".join(str(known[name]) for name in names if known.get(name) is not None)
    found = common.origin(config)
    site = written if found.site is None else str(found)
    return {"format": format, **describe_sae(sae)} | ({"site": site} if site else {})


def origin(path: str | os.PathLike, *, revision: str | None = None) -> Origin:
    """Where the SAE at a path belongs: model, layer, site, context and text, as far as its files say.

    Args:
      path: as for `load`.
      revision: likewise.

    Raises:
      InputError: likewise.

    Example:
      >>> import tempfile, jax, jaxsae
      >>> sae = jaxsae.init(jax.random.key(0), d=4, m=8, activation=jaxsae.TopK(2))
      >>> with tempfile.TemporaryDirectory() as folder:
      ...     jaxsae.pretrained.save(sae, f"{folder}/sae", format="saelens", origin=Origin("gpt2", 8, "mlp_out"))
      ...     str(jaxsae.pretrained.origin(f"{folder}/sae"))
      'gpt2, layer 8, mlp_out'
    """
    return load_with_origin(path, revision=revision)[1]


def load_with_origin(path: str | os.PathLike, *, dtype: Any = None, revision: str | None = None) -> tuple[SAE, Origin]:
    """An SAE, and where it belongs, from one reading of its files.

    Args:
      path: as for `load`.
      dtype: likewise.
      revision: likewise.

    Raises:
      InputError: likewise.

    Example:
      >>> import tempfile, jax, jaxsae
      >>> sae = jaxsae.init(jax.random.key(0), d=4, m=8, activation=jaxsae.TopK(2))
      >>> with tempfile.TemporaryDirectory() as folder:
      ...     jaxsae.pretrained.save(sae, f"{folder}/sae", origin=Origin("gpt2", 8, "mlp_out"))
      ...     str(load_with_origin(f"{folder}/sae")[1])
      'gpt2, layer 8, mlp_out'
    """
    sae, _, config = _load(path, None, dtype, revision)
    return sae, common.origin(config)


def _load(
    path: str | os.PathLike, format: str | None, dtype: Any, revision: str | None
) -> tuple[SAE, str, dict[str, Any]]:
    """The SAE, its format, and its configuration."""
    if address(path) is not None:
        if revision is not None:
            raise InputError(f"got revision {revision!r} for {path}, which is not on the hub; leave it out.")
        with _copied(any_path(path)) as local:
            return _load(local, format, dtype, None)
    found = hub.find(path, revision=revision)
    local = found.path
    name = detect(local) if format is None else format
    row = _row(name)
    local = own.within_run(local) if name == "jaxsae" else local
    try:
        raw = row.read(local)
        config = raw.config | (found.config if name == "saelens" else {})
        wanted = None if dtype is None else _dtype(dtype)
        with np.errstate(all="ignore"):  # values in the file may overflow
            raw = raw._replace(config=config, dtype=wanted)
            sae = row.convert(raw)
        raw.require_used(name, sae.activation)
    except OSError as error:
        raise InputError(f"{local}: {error.strerror or error}; expected files of format {name}.") from error
    averaged = isinstance(sae.normalisation, normalisation.AverageNorm)
    return (fold_scale(sae, found.scale) if averaged and found.scale is not None else sae), name, config


@contextlib.contextmanager
def _copied(path: Any) -> Iterator[Path]:
    """A temporary copy of an SAE in a bucket, of a run only the SAE; messages name the original."""
    from jaxsae._core import buckets

    with tempfile.TemporaryDirectory() as folder:
        with reached(path):
            inner = path / "sae" if (path / "sae" / own.CONFIG).exists() else path
        local = buckets.download(inner, Path(folder))
        try:
            yield local
        except InputError as error:
            raise InputError(str(error).replace(str(local), str(inner))) from error


def _dtype(dtype: Any) -> np.dtype:
    known = ("float32", "bfloat16", "float16", "float64")
    try:
        found = np.dtype(jnp.dtype(dtype))
    except TypeError:
        found = None
    if found is None or found.name not in known:
        raise InputError(f"got dtype {dtype!r}, expected one of: {', '.join(known)}.")
    if jax.dtypes.canonicalize_dtype(found) != found:
        raise InputError(f"got dtype {found.name!r}, which needs jax_enable_x64; set it first.")
    return found


def detect(path: str | os.PathLike) -> str:
    """Detect the format of files from their contents.

    Args:
      path: a directory or file.

    Raises:
      InputError: if the path is missing, or of no known format or of several.

    Example:
      >>> import tempfile, jax, jaxsae
      >>> sae = jaxsae.init(jax.random.key(0), d=4, m=8, activation=jaxsae.TopK(2))
      >>> with tempfile.TemporaryDirectory() as folder:
      ...     jaxsae.pretrained.save(sae, f"{folder}/sae", format="dictionary_learning")
      ...     jaxsae.pretrained.detect(f"{folder}/sae")
      'dictionary_learning'
    """
    path = settled(local_path(path))
    if not path.exists():
        raise InputError(f"{path}: no such file or directory; expected a saved SAE ({', '.join(FORMATS)}).")
    damaged: InputError | None = None
    found: dict[Callable[[Path], Raw], str] = {}  # by reader: some formats are variants of another
    for name, row in FORMATS.items():
        try:
            if row.detect(path):
                found.setdefault(row.read, name)
        except InputError as error:
            damaged = damaged or error
    if len(found) > 1:
        what = f"holds SAEs of several formats ({', '.join(found.values())})"
        raise InputError(f"{path}: {what}; pass format, one of them.")
    if found:
        return next(iter(found.values()))
    if path.is_dir() and not any(path.iterdir()):
        raise InputError(f"{path}: the directory is empty; expected a saved SAE ({', '.join(FORMATS)}).")
    raise damaged or InputError(f"{path}: not an SAE of a known format; expected one of: {', '.join(FORMATS)}.")


def save(
    sae: SAE,
    path: str | os.PathLike,
    *,
    format: str = "jaxsae",
    origin: Origin = Origin(),  # noqa: B008 - immutable
) -> None:
    """Save an SAE atomically, replacing an SAE of the same format at `path`.

    Arrays that are split over devices are written piece by piece: no device and no host ever holds more of them. If
    they are split over several processes, call it in all of them; the first one writes.

    Args:
      sae: the autoencoder; its arrays may be numpy's, of any memory order.
      path: to write, on disk or in a bucket; a directory, or a file for `"openai"`.
      format: a name from `FORMATS` that can be written.
      origin: where the SAE belongs; written where the format has a place for it.

    Raises:
      InputError: if the format is unknown or cannot represent this SAE, for example a custom activation; if its arrays
        do not fit together or hold several stacked SAEs; or if the path cannot be written.

    Example:
      >>> import tempfile, jax, jaxsae
      >>> sae = jaxsae.init(jax.random.key(0), d=4, m=8, activation=jaxsae.TopK(2))
      >>> with tempfile.TemporaryDirectory() as folder:
      ...     jaxsae.pretrained.save(sae, f"{folder}/sae")
      ...     bool((jaxsae.pretrained.load(f"{folder}/sae").W_dec == sae.W_dec).all())
      True
    """
    row = _row(format)
    if row.write is None:
        written = ", ".join(name for name, row in FORMATS.items() if row.write)
        raise InputError(f"{format} is read, not written; expected one of: {written}.")
    if address(path) is not None:
        _save_in_bucket(sae, any_path(path), format, origin)
        return
    path, sae = local_path(path), _checked(sae)
    target = path if processes.is_primary() or not own.is_shared(sae) else None
    with own.agreed(sae):
        if target is not None and path.exists() and (own.within_run(path) != path or not _is(row, path)):
            raise InputError(f"{path}: exists and is not a saved SAE; choose another place, or remove it.")
    with own.agreed(sae):
        if row.write is own.write:
            own.write(sae, target, origin)
        elif any(len(leaf.sharding.device_set) > 1 for leaf in own.on_devices(sae)):
            _write_through_own(sae, row.write, target, origin)
        else:
            whole = jax.tree.map(lambda leaf: writable(leaf) if isinstance(leaf, jax.Array) else leaf, sae)
            row.write(whole, path, origin)


def _save_in_bucket(sae: SAE, path: Any, format: str, origin: Origin) -> None:
    """Save an SAE on disk, and copy it, unless other files are there."""
    from jaxsae._core import buckets

    with temporary_directory(path) as folder:
        local = folder / path.name
        save(sae, local, format=format, origin=origin)
        with own.agreed(sae):
            if not processes.is_primary() and own.is_shared(sae):
                return
            with reached(path):
                other = path.is_dir() if local.is_file() else path.is_file()
            if other or (local.is_dir() and not names(path).keys() <= names(local).keys()):
                raise InputError(f"{path}: exists and is not a saved SAE; choose another place, or remove it.")
            buckets.upload(local, path)


def _write_through_own(sae: SAE, write: Callable[[SAE, Path, Origin], None], path: Path | None, origin: Origin) -> None:
    """Write an SAE that is split over devices from files in our own format, of which little is in memory at a time."""
    with contextlib.ExitStack() as held:
        with own.agreed(sae):
            whole = None if path is None else held.enter_context(temporary_directory(path)) / "own"
        own.write(sae, whole)
        if whole is None or path is None:
            return
        arrays = read_safetensors(whole / own.WEIGHTS)
        parameters = {name: arrays.pop(f"activation.{name}") for name in own.parameters(sae.activation)}
        activation = dataclasses.replace(sae.activation, **parameters)  # pyright: ignore[reportArgumentType]
        write(dataclasses.replace(sae, **arrays, activation=activation), path, origin)


def _checked(sae: SAE) -> SAE:
    """The SAE with arrays that can be written; raise if it cannot be saved."""
    if not isinstance(sae, SAE):
        raise InputError(f"got a {type(sae).__name__} to save, expected an SAE; pass one.")
    _require_known("activation", sae.activation, own.ACTIVATIONS)
    _require_known("normalisation", sae.normalisation, own.NORMALISATIONS)
    names = ("W_enc", "b_enc", "W_dec", "b_dec", *(() if sae.W_skip is None else ("W_skip",)))
    arrays = {name: ready(getattr(sae, name), name) for name in names}
    d, m, d_out = arrays["W_enc"].shape[:1], arrays["W_dec"].shape[:1], arrays["W_dec"].shape[1:]
    shapes = {"W_enc": (*d, *m), "b_enc": m, "W_dec": (*m, *d_out), "b_dec": d_out, "W_skip": (*d, *d_out)}
    parameters = {
        name: float(p) if isinstance(p, int | float) else p for name, p in own.parameters(sae.activation).items()
    }
    parameters = {name: ready(value, name) for name, value in parameters.items()}
    shapes |= {name: m if value.ndim else () for name, value in parameters.items()}
    for name, array in (arrays | parameters).items():
        if array.shape != shapes[name] or arrays["W_dec"].ndim != 2:
            raise InputError(
                f"got {name} of shape {array.shape} for {m[0] if m else 1} latents; pass one SAE: from a stack, take "
                "jax.tree.map(lambda leaf: leaf[i], sae)."
            )
        if array.dtype == bool or (name in arrays and not jnp.issubdtype(array.dtype, jnp.floating)):
            raise InputError(f"got {name} of {array.dtype}, expected floating point; convert it.")
    if sae.apply_b_dec_to_input and d != d_out:
        raise InputError(
            f"got an SAE that subtracts b_dec, {d_out[0]} wide, from rows {d[0]} wide; pass apply_b_dec_to_input=False."
        )
    activation = dataclasses.replace(sae.activation, **parameters)  # pyright: ignore[reportArgumentType]
    common.require_k("got an SAE whose ", activation, m[0])
    return dataclasses.replace(sae, **arrays, activation=activation)


def _require_known(what: str, part: Any, known: dict[str, type]) -> None:
    # By class, not by name: a user's class may share the name of ours, or derive from it.
    if part is not None and known.get(type(part).__name__) is not type(part):
        raise InputError(
            f"got the {what} {type(part).__name__} to save, which no file format describes; expected one of: "
            f"{', '.join(known)}: save the SAE with one of these, or save its arrays yourself."
        )


def _is(row: _Format, path: Path) -> bool:
    try:
        return row.detect(path)
    except InputError:
        return False


def _row(format: str) -> _Format:
    if format not in FORMATS:
        raise InputError(f"got format {format!r}, expected one of: {', '.join(FORMATS)}.")
    return FORMATS[format]


FORMATS = {
    "jaxsae": _Format(own.detect, own.read, own.convert, own.write),
    "saelens": _Format(saelens.detect, saelens.read, saelens.convert, saelens.write),
    "gemma_scope_embedding": _Format(gemma_scope.detect_embedding, gemma_scope.read, gemma_scope.convert_embedding),
    "gemma_scope_transcoder": _Format(gemma_scope.detect_transcoder, gemma_scope.read, gemma_scope.convert_transcoder),
    "gemma_scope": _Format(gemma_scope.detect, gemma_scope.read, gemma_scope.convert, gemma_scope.write),
    "gemma_scope_2": _Format(gemma_scope.detect_2, gemma_scope.read_2, gemma_scope.convert_2, gemma_scope.write_2),
    "sparsify": _Format(sparsify.detect, sparsify.read, sparsify.convert, sparsify.write),
    "dictionary_learning": _Format(
        dictionary_learning.detect, dictionary_learning.read, dictionary_learning.convert, dictionary_learning.write
    ),
    "dictionary_learning_topk": _Format(
        dictionary_learning.detect, dictionary_learning.read, dictionary_learning.convert_topk
    ),
    "dictionary_learning_batch_topk": _Format(
        dictionary_learning.detect, dictionary_learning.read, dictionary_learning.convert_batch_topk
    ),
    "openai": _Format(openai.detect, openai.read, openai.convert, openai.write),
    "llama_scope": _Format(llama_scope.detect, llama_scope.read, llama_scope.convert, llama_scope.write),
    "qwen_scope": _Format(qwen_scope.detect, qwen_scope.read, qwen_scope.convert),
    "circuit_tracer": _Format(circuit_tracer.detect, circuit_tracer.read, circuit_tracer.convert),
    "goodfire": _Format(goodfire.detect, goodfire.read, goodfire.convert),
}
