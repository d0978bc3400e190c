"""SAEs on disk and on the hub: our own format, and those of other libraries, in one table.

Our own is a directory: `sae.json` says what it is, `sae.safetensors` holds the arrays.
"""

import dataclasses
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import safetensors.flax

from jaxsae import activations, hub, normalisation
from jaxsae.files import InputError, atomic_directory, local_path, settled
from jaxsae.formats import dictionary_learning, gemma_scope, llama_scope, openai, saelens, sparsify
from jaxsae.formats.common import Raw
from jaxsae.sae import SAE, fold_scale
from jaxsae.sae import describe as describe_sae
from jaxsae.tensors import place, read_json, read_safetensors

_VERSION = 1
_CONFIG, _WEIGHTS = "sae.json", "sae.safetensors"
_ACTIVATIONS = {
    cls.__name__: cls
    for cls in (
        *(activations.ReLU, activations.TopK, activations.AbsTopK, activations.BatchTopK),
        *(activations.JumpReLU, activations.Gated, activations.GroupMax, activations.MatchingPursuit),
    )
}
_NORMALISATIONS = {
    cls.__name__: cls for cls in (normalisation.LayerNorm, normalisation.ConstantNorm, normalisation.AverageNorm)
}


class _Format(NamedTuple):
    detect: Callable[[Path], bool]
    read: Callable[[Path], Raw]
    convert: Callable[[Raw], SAE]
    write: Callable[[SAE, Path], None] | None


def load(path: str | os.PathLike, *, format: str | None = None, dtype: Any = None, revision: str | None = None) -> SAE:
    """Load an SAE from disk, or from the Hugging Face hub: one that computes what its origin computes.

    Large arrays are mapped and copied piece by piece, so that hardly more than the SAE itself is in memory. Torch
    pickles are read without torch, and without running what is in them.

    Args:
      path: what `save` wrote, a training run, or a directory or file of another library; on the hub,
        `"hf://org/repository/path"`, or a release and id of SAELens', `"gpt2-small-res-jb/blocks.8.hook_resid_pre"`, if
        sae-lens is installed.
      format: a name from `FORMATS`; found out from the contents by default.
      dtype: of the weights, such as `"float32"`; that of the files by default. Thresholds stay in float32 or better.
      revision: branch, tag or commit, on the hub.

    Raises:
      InputError: if nothing is there, or it is of no known format, of a newer version, truncated, inconsistent, or
        wants to run code.

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
    """What is at a path, in words: its format, what it computes, and the site that it is for, where that is written.

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
      ...     told = jaxsae.pretrained.describe(f"{folder}/sae")
      >>> told["format"], told["kind"]
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
        with np.errstate(all="ignore"):  # numbers that overflow are what is in the file
            sae = row.convert(raw._replace(config=config, dtype=wanted))
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
    return found


def detect(path: str | os.PathLike) -> str:
    """The name of the format that files are in, found out from their contents.

    Args:
      path: a directory or file.

    Raises:
      InputError: if there is nothing, or nothing known.

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
    for name, row in FORMATS.items():
        try:
            if row.detect(path):
                return name
        except InputError as error:
            damaged = damaged or error
    raise damaged or InputError(f"{path}: not an SAE of a known format; expected one of: {', '.join(FORMATS)}.")


def save(sae: SAE, path: str | os.PathLike, *, format: str = "jaxsae") -> None:
    """Save an SAE, whole or not at all; what was at `path` is replaced, if it is an SAE of the same format.

    Args:
      sae: the autoencoder.
      path: where to; a directory, but a file for `"openai"`.
      format: a name from `FORMATS` that is written.

    Raises:
      InputError: if the format is unknown or cannot say what this SAE computes, or the place cannot be written.

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
    if path.exists() and not _is(row, path):
        raise InputError(f"{path}: exists and is not a saved SAE; choose another place, or remove it.")
    row.write(sae, path)


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


def _write_own(sae: SAE, path: Path) -> None:
    values, static = _options(sae.activation)
    unset = {name for name, value in values.items() if value is None} - static
    config = {
        "format": "jaxsae",
        "version": _VERSION,
        "d": sae.d,
        "m": sae.m,
        "d_out": sae.b_dec.size,
        "centred": sae.centred,
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
    arrays |= {f"activation.{name}": jnp.asarray(v) for name, v in values.items() if name not in static | unset}
    with atomic_directory(path) as folder:
        safetensors.flax.save_file(arrays, folder / _WEIGHTS)
        (folder / _CONFIG).write_text(json.dumps(config, indent=2) + "\n")


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
    if (config.get("format"), config.get("version")) != ("jaxsae", _VERSION):
        raise InputError(
            f"{path / _CONFIG}: says {config.get('format')!r} version {config.get('version')!r}, expected 'jaxsae' "
            f"version {_VERSION}; load it with the version of jaxsae that wrote it."
        )
    return Raw(path / _WEIGHTS, config, arrays)


def _convert_own(raw: Raw) -> SAE:
    arrays, centred = raw.arrays, raw.config.get("centred", True)
    # As those of 0.1 before transcoders, and before autoencoders that subtract nothing.
    config = {"d_out": raw.config.get("d"), "centred": centred, "transcoder": not centred} | raw.config
    shapes = _shapes(config)
    found = {name: arrays[name].shape if name in arrays else None for name in shapes}
    if found != shapes:
        raise InputError(f"{raw.path}: holds shapes {found}, but {_CONFIG} says {shapes}; save it again.")
    dtypes = {str(arrays[name].dtype) for name in shapes if not jnp.issubdtype(arrays[name].dtype, jnp.floating)}
    if dtypes:
        raise InputError(f"{raw.path}: holds {', '.join(dtypes)}, expected floating point; save it again.")
    parameters = {name: _placed(raw, name, array) for name, array in arrays.items() if name not in shapes}
    return SAE(
        **{name: place(arrays[name], raw.dtype) for name in shapes},
        activation=_activation(config, parameters, raw.path.parent),
        normalisation=_normalisation(config, raw.path.parent),
        centred=bool(config["centred"]),
        transcoder=bool(config["transcoder"]),
    )


def _placed(raw: Raw, name: str, array: np.ndarray) -> jax.Array:
    if raw.dtype is not None and "threshold" in name:
        return place(array, np.promote_types(raw.dtype, np.float32))
    return place(array, raw.dtype)


def _normalisation(config: dict[str, Any], path: Path) -> normalisation.Normalisation | None:
    options = config.get("normalisation")
    if options is None:
        return None
    name = options.get("name") if isinstance(options, dict) else options
    if not isinstance(name, str) or name not in _NORMALISATIONS:
        raise InputError(
            f"{path / _CONFIG}: normalisation {name!r} is unknown, expected one of {', '.join(_NORMALISATIONS)}; "
            "update jaxsae."
        )
    try:
        return _NORMALISATIONS[name](**{option: float(value) for option, value in options.items() if option != "name"})
    except (TypeError, ValueError) as error:
        raise InputError(f"{path}: its normalisation does not fit ({error}); save it again.") from error


def _activation(config: dict[str, Any], parameters: dict[str, Any], path: Path):
    options = config.get("activation")
    if not isinstance(options, dict) or options.get("name") not in _ACTIVATIONS:
        name = options.get("name") if isinstance(options, dict) else options
        raise InputError(
            f"{path / _CONFIG}: activation {name!r} is unknown, expected one of {', '.join(_ACTIVATIONS)}; "
            "update jaxsae."
        )
    static = {name: value for name, value in options.items() if name != "name"}
    try:
        parameters = {name.removeprefix("activation."): array for name, array in parameters.items()}
        activation = _ACTIVATIONS[options["name"]](**parameters, **static)
        if activation.slots is not None and activation.slots > config["m"]:
            raise ValueError(f"k = {activation.slots} for {config['m']} latents")
    except (TypeError, ValueError) as error:
        raise InputError(f"{path}: its activation does not fit ({str(error).rstrip('.')}); save it again.") from error
    return activation


FORMATS = {
    "jaxsae": _Format(_detect_own, _read_own, _convert_own, _write_own),
    "saelens": _Format(saelens.detect, saelens.read, saelens.convert, saelens.write),
    "gemma_scope_embedding": _Format(
        gemma_scope.detect_embedding, gemma_scope.read, gemma_scope.convert_embedding, None
    ),
    "gemma_scope_transcoder": _Format(
        gemma_scope.detect_transcoder, gemma_scope.read, gemma_scope.convert_transcoder, None
    ),
    "gemma_scope": _Format(gemma_scope.detect, gemma_scope.read, gemma_scope.convert, gemma_scope.write),
    "gemma_scope_2": _Format(gemma_scope.detect_2, gemma_scope.read_2, gemma_scope.convert_2, gemma_scope.write_2),
    "sparsify": _Format(sparsify.detect, sparsify.read, sparsify.convert, sparsify.write),
    "dictionary_learning": _Format(
        dictionary_learning.detect, dictionary_learning.read, dictionary_learning.convert, dictionary_learning.write
    ),
    "openai": _Format(openai.detect, openai.read, openai.convert, openai.write),
    "llama_scope": _Format(llama_scope.detect, llama_scope.read, llama_scope.convert, llama_scope.write),
}
