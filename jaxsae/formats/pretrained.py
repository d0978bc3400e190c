"""SAEs on disk and on the hub: our own format, and those of other libraries, in one table.

Our own is a directory: `sae.json` describes the SAE, `sae.safetensors` holds its arrays.
"""

import contextlib
import dataclasses
import os
import typing
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxsae._core import processes
from jaxsae._core.files import InputError, atomic_directory, local_path, settled, temporary_directory
from jaxsae.autoencoder import activations, normalisation
from jaxsae.autoencoder.sae import SAE, describe as describe_sae
from jaxsae.autoencoder.surgery import fold_scale
from jaxsae.formats import common, dictionary_learning, gemma_scope, hub, llama_scope, openai, saelens, sparsify
from jaxsae.formats.common import Raw, Tensors, Weights
from jaxsae.formats.tensors import place, read_json, read_safetensors, ready, writable, write_safetensors

_VERSION = 1
_CONFIG, _WEIGHTS = "sae.json", "sae.safetensors"
_ACTIVATIONS = {
    cls.__name__: cls
    for cls in (
        *(activations.ReLU, activations.TopK, activations.AbsTopK, activations.BatchTopK),
        *(activations.JumpReLU, activations.Gated, activations.GroupMax, activations.MatchingPursuit),
    )
}
_KEYS = {"format", "version", "d", "m", "d_out", "apply_b_dec_to_input", "transcoder", "skip"}
_KEYS |= {"activation", "normalisation", "arrays"}
_NORMALISATIONS = {
    cls.__name__: cls for cls in (normalisation.LayerNorm, normalisation.ConstantNorm, normalisation.AverageNorm)
}


class _Format(NamedTuple):
    detect: Callable[[Path], bool]
    read: Callable[[Path], Raw]
    convert: Callable[[Raw], SAE]
    write: Callable[[SAE, Any], None] | None = None


def load(path: str | os.PathLike, *, format: str | None = None, dtype: Any = None, revision: str | None = None) -> SAE:
    """Load an SAE from disk or the Hugging Face hub; it computes the same function as the original.

    Large arrays are mapped and copied piece by piece, so that memory holds little more than the SAE itself; on a mesh
    (`jax.set_mesh`) each device gets its part of them. Torch pickles are read without torch, and without executing
    them.

    Args:
      path: what `save` wrote, a training run, or a directory or file of another library; on the hub,
        `"hf://org/repository/path"`, or a release and id of SAELens', `"gpt2-small-res-jb/blocks.8.hook_resid_pre"`, if
        sae-lens is installed.
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
    names = ("model_name", "lm_name", "hook_name", "hf_hook_point_in", "hook_point_in", "layer")
    site = ", ".join(str(known[name]) for name in names if known.get(name) is not None)
    return {"format": format, **describe_sae(sae)} | ({"site": site} if site else {})


def _load(
    path: str | os.PathLike, format: str | None, dtype: Any, revision: str | None
) -> tuple[SAE, str, dict[str, Any]]:
    """The SAE, its format, and its configuration."""
    found = hub.find(path, revision=revision)
    local = found.path
    name = detect(local) if format is None else format
    row = _row(name)
    local = _within_run(local) if name == "jaxsae" else local
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
    path = settled(path)
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


def save(sae: SAE, path: str | os.PathLike, *, format: str = "jaxsae") -> None:
    """Save an SAE atomically, replacing an SAE of the same format at `path`.

    Arrays that are split over devices are written piece by piece: no device and no host ever holds more of them. If
    they are split over several processes, call it in all of them; the first one writes.

    Args:
      sae: the autoencoder; its arrays may be numpy's, of any memory order.
      path: to write; a directory, or a file for `"openai"`.
      format: a name from `FORMATS` that can be written.

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
    path, row = local_path(path), _row(format)
    if row.write is None:
        written = ", ".join(name for name, row in FORMATS.items() if row.write)
        raise InputError(f"{format} is read, not written; expected one of: {written}.")
    sae = _checked(sae)
    target = path if processes.is_primary() or not _is_shared(sae) else None
    with _agreed(sae):
        if target is not None and path.exists() and (_within_run(path) != path or not _is(row, path)):
            raise InputError(f"{path}: exists and is not a saved SAE; choose another place, or remove it.")
    with _agreed(sae):
        if row.write is _write_own:
            _write_own(sae, target)
        elif any(len(leaf.sharding.device_set) > 1 for leaf in _on_devices(sae)):
            _write_through_own(sae, row.write, target)
        else:
            row.write(jax.tree.map(lambda leaf: writable(leaf) if isinstance(leaf, jax.Array) else leaf, sae), path)


def _on_devices(sae: SAE) -> list[jax.Array]:
    return [leaf for leaf in jax.tree.leaves(sae) if isinstance(leaf, jax.Array)]


def _is_shared(sae: SAE) -> bool:
    """Whether several processes hold parts of it."""
    return not all(leaf.is_fully_addressable for leaf in _on_devices(sae))


def _agreed(sae: SAE) -> contextlib.AbstractContextManager[None]:
    """A block that fails in all processes that hold parts of an SAE, or in none."""
    return processes.all_or_none() if _is_shared(sae) else contextlib.nullcontext()


def _write_through_own(sae: SAE, write: Callable[[SAE, Path], None], path: Path | None) -> None:
    """Write an SAE that is split over devices from files in our own format, of which little is in memory at a time."""
    with contextlib.ExitStack() as held:
        with _agreed(sae):
            own = None if path is None else held.enter_context(temporary_directory(path)) / "own"
        _write_own(sae, own)
        if own is None or path is None:
            return
        arrays = read_safetensors(own / _WEIGHTS)
        parameters = {name: arrays.pop(f"activation.{name}") for name in _parameters(sae.activation)}
        activation = dataclasses.replace(sae.activation, **parameters)  # pyright: ignore[reportArgumentType]
        write(dataclasses.replace(sae, **arrays, activation=activation), path)


def _checked(sae: SAE) -> SAE:
    """The SAE with arrays that can be written; raise if it cannot be saved."""
    if not isinstance(sae, SAE):
        raise InputError(f"got a {type(sae).__name__} to save, expected an SAE; pass one.")
    _require_known("activation", sae.activation, _ACTIVATIONS)
    _require_known("normalisation", sae.normalisation, _NORMALISATIONS)
    names = ("W_enc", "b_enc", "W_dec", "b_dec", *(() if sae.W_skip is None else ("W_skip",)))
    arrays = {name: ready(getattr(sae, name), name) for name in names}
    d, m, d_out = arrays["W_enc"].shape[:1], arrays["W_dec"].shape[:1], arrays["W_dec"].shape[1:]
    shapes = {"W_enc": (*d, *m), "b_enc": m, "W_dec": (*m, *d_out), "b_dec": d_out, "W_skip": (*d, *d_out)}
    parameters = {
        name: float(p) if isinstance(p, int | float) else p for name, p in _parameters(sae.activation).items()
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


def _parameters(activation: Any) -> dict[str, Any]:
    """The arrays of an activation, or numbers given in their place, by name."""
    values, static = _options(activation)
    return {name: value for name, value in values.items() if name not in static and value is not None}


def _is(row: _Format, path: Path) -> bool:
    try:
        return row.detect(path)
    except InputError:
        return False


def _row(format: str) -> _Format:
    if format not in FORMATS:
        raise InputError(f"got format {format!r}, expected one of: {', '.join(FORMATS)}.")
    return FORMATS[format]


# --- our own


def _within_run(path: Path) -> Path:
    inner = settled(path / "sae")
    return inner if (inner / _CONFIG).is_file() else path


def _detect_own(path: Path) -> bool:
    return (_within_run(path) / _CONFIG).is_file()


def _write_own(sae: SAE, path: Path | None) -> None:
    """Write an SAE; processes that only send their parts of it pass None."""
    values, static = _options(sae.activation)
    config = {
        "format": "jaxsae",
        "version": _VERSION,
        "d": sae.d,
        "m": sae.m,
        "d_out": sae.b_dec.size,
        "apply_b_dec_to_input": sae.apply_b_dec_to_input,
        "transcoder": sae.transcoder,
        "skip": sae.W_skip is not None,
        "activation": {
            "name": type(sae.activation).__name__,
            **{name: value for name, value in values.items() if name in static},
        },
    }
    if sae.normalisation is not None:
        config["normalisation"] = {"name": type(sae.normalisation).__name__, **_options(sae.normalisation)[0]}
    arrays = {name: getattr(sae, name) for name in _shapes(config)}
    arrays |= {f"activation.{name}": value for name, value in _parameters(sae.activation).items()}
    with contextlib.ExitStack() as held:
        with _agreed(sae):
            folder = None if path is None else held.enter_context(atomic_directory(path))
        write_safetensors(None if folder is None else folder / _WEIGHTS, arrays)
        if folder is not None:
            common.write_json(folder / _CONFIG, config | {"arrays": sorted(arrays)})


def _options(part: Any) -> tuple[dict[str, Any], set[str]]:
    """The fields of an activation or normalisation, and the names of those that are static."""
    fields = dataclasses.fields(part)
    static = {field.name for field in fields if not field.metadata.get("pytree_node", True)}
    return {field.name: getattr(part, field.name) for field in fields}, static


def _shapes(config: dict[str, Any]) -> dict[str, tuple]:
    """The arrays of an SAE and their shapes."""
    d, m, d_out = config.get("d"), config.get("m"), config.get("d_out")
    shapes = {"W_enc": (d, m), "b_enc": (m,), "W_dec": (m, d_out), "b_dec": (d_out,)}
    return shapes | {"W_skip": (d, d_out)} if config.get("skip") else shapes


def _read_own(path: Path) -> Raw:
    try:
        config, arrays = read_json(path / _CONFIG), read_safetensors(path / _WEIGHTS)
    except InputError as error:
        raise InputError(
            f"{path}: not a whole SAE ({str(error).split('; ')[0]}); expected {_CONFIG} and {_WEIGHTS}: save it again."
        ) from error
    found = config.get("format"), config.get("version")
    if found != ("jaxsae", _VERSION) or type(found[1]) is not int:
        raise InputError(
            f"{path / _CONFIG}: says {found[0]!r} version {found[1]!r}, expected 'jaxsae' "
            f"version {_VERSION} (format, version); load it with the version of jaxsae that wrote it."
        )
    if unknown := config.keys() - _KEYS:
        raise InputError(f"{path / _CONFIG}: says {', '.join(sorted(unknown))}, which is unknown; update jaxsae.")
    return Raw(path / _WEIGHTS, config, Tensors(arrays))


def _convert_own(raw: Raw) -> SAE:
    # Defaults for files of 0.1 from before transcoders, and from before autoencoders that do not subtract `b_dec`.
    apply_b_dec_to_input = raw.flag("apply_b_dec_to_input", True)
    config = {
        "d_out": raw.config.get("d"),
        "apply_b_dec_to_input": apply_b_dec_to_input,
        "transcoder": not apply_b_dec_to_input,
        "skip": False,
    } | raw.config
    raw = raw._replace(config=config)
    skip, shapes = raw.flag("skip", False), _shapes(config)
    found = {name: raw.arrays[name].shape if name in raw.arrays else None for name in shapes}
    if found != shapes:
        sizes = ", ".join(f"{name} {config.get(name)!r}" for name in ("d", "m", "d_out"))
        raise raw.error(f"holds shapes {found}, but {_CONFIG} says {sizes}", "save it again")
    listed = config.get("arrays", sorted(raw.arrays))  # files of 0.1 have no list
    if listed != sorted(raw.arrays):
        raise raw.error(f"holds {sorted(raw.arrays)}, but the arrays of {_CONFIG} are {listed}", "save it again")
    weights = Weights(*(raw.take(name) for name in ("W_enc", "b_enc", "W_dec", "b_dec")))
    return common.assemble(
        raw,
        _activation(raw),
        weights._replace(W_skip=raw.take("W_skip")) if skip else weights,
        apply_b_dec_to_input=apply_b_dec_to_input,
        transcoder=raw.flag("transcoder", False),
        normalisation=_normalisation(raw),
    )


def _normalisation(raw: Raw) -> normalisation.Normalisation | None:
    options = raw.config.get("normalisation")
    if options is None:
        return None
    name, options = _named(raw, "normalisation", options, _NORMALISATIONS)
    try:
        values = {option: raw.number(value, option) for option, value in options.items()}
        return _NORMALISATIONS[name](**values)
    except TypeError as error:
        raise InputError(f"{raw.path.parent}: its normalisation does not fit ({error}); save it again.") from error


def _activation(raw: Raw) -> activations.Activation:
    name, static = _named(raw, "activation", raw.config.get("activation"), _ACTIVATIONS)
    prefix = "activation."
    arrays = {each.removeprefix(prefix): raw.arrays[each] for each in raw.arrays if each.startswith(prefix)}
    try:
        for field in dataclasses.fields(_ACTIVATIONS[name]):
            if field.name not in arrays | static and field.default not in (None, dataclasses.MISSING):
                raise TypeError(f"{field.name} is missing")
            if field.name in static and not _is_of(static[field.name], field.type):
                raise TypeError(f"{field.name} is {static[field.name]!r}")
        return _ACTIVATIONS[name](**{each: _placed(raw, each, array) for each, array in arrays.items()}, **static)
    except InputError:
        raise
    except (TypeError, ValueError) as error:
        reason = str(error).rstrip(".")
        raise InputError(f"{raw.path.parent}: its activation does not fit ({reason}); save it again.") from error


def _named(raw: Raw, what: str, options: Any, known: dict[str, Any]) -> tuple[str, dict[str, Any]]:
    """The name of an activation or normalisation, which must be known, and its options."""
    name = options.get("name") if isinstance(options, dict) else options
    if not isinstance(options, dict) or not isinstance(name, str) or name not in known:
        expected = f"{what} {name!r} is unknown, expected one of {', '.join(known)}"
        raise InputError(f"{raw.path.parent / _CONFIG}: {expected}; update jaxsae.")
    return name, {option: value for option, value in options.items() if option != "name"}


def _is_of(value: Any, kind: Any) -> bool:
    """Whether a JSON value has the type of a field: text is not a number, and 1 is not true."""
    kinds = typing.get_args(kind) or (kind,)
    return type(value) in kinds or (type(value) is int and float in kinds)


def _placed(raw: Raw, name: str, array: np.ndarray) -> jax.Array:
    if array.dtype == bool:
        raise TypeError(f"{name} is of {array.dtype}")
    whole = not jnp.issubdtype(array.dtype, jnp.floating)
    dtype = None if whole or raw.dtype is None else raw.dtype
    if dtype is not None and "threshold" in name:
        dtype = np.promote_types(dtype, np.float32)
    return place(array, dtype, name=f"{raw.path}: {name}", infinite=True)


FORMATS = {
    "jaxsae": _Format(_detect_own, _read_own, _convert_own, _write_own),
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
}
