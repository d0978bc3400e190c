"""SAEs on disk. Our own format is a directory: `sae.json` says what it is, `sae.safetensors` holds the arrays."""

import dataclasses
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import jax.numpy as jnp
import safetensors.flax
from safetensors import SafetensorError

from jaxsae import activations
from jaxsae.files import InputError, atomic_directory
from jaxsae.sae import SAE

_VERSION = 1
_CONFIG, _WEIGHTS = "sae.json", "sae.safetensors"
_ACTIVATIONS = {
    cls.__name__: cls
    for cls in (
        *(activations.ReLU, activations.TopK, activations.AbsTopK, activations.BatchTopK),
        *(activations.JumpReLU, activations.Gated, activations.GroupMax),
    )
}


class _Format(NamedTuple):
    detect: Callable[[Path], bool]
    read: Callable[[Path], SAE]
    write: Callable[[SAE, Path], None]


def load(path: str | os.PathLike, *, format: str | None = None) -> SAE:
    """Load an SAE from disk.

    Args:
      path: what `save` wrote, or a training run.
      format: `"jaxsae"`; found out from the contents by default.

    Raises:
      InputError: if nothing is there, or it is of no known format, of a newer version, truncated or inconsistent.

    Example:
      >>> import tempfile, jax, jaxsae
      >>> sae = jaxsae.init(jax.random.key(0), d=4, m=8, activation=jaxsae.TopK(2))
      >>> with tempfile.TemporaryDirectory() as folder:
      ...     jaxsae.pretrained.save(sae, f"{folder}/sae")
      ...     jaxsae.pretrained.load(f"{folder}/sae").activation.k
      2
    """
    path = Path(path)
    if not path.exists():
        raise InputError(f"{path}: no such file or directory; expected a saved SAE ({', '.join(_FORMATS)}).")
    if (path / "sae" / _CONFIG).is_file():  # a training run
        path = path / "sae"
    names = [format] if format else [name for name, row in _FORMATS.items() if row.detect(path)]
    if not names:
        raise InputError(f"{path}: not an SAE of a known format; expected one of: {', '.join(_FORMATS)}.")
    return _row(names[0]).read(path)


def save(sae: SAE, path: str | os.PathLike, *, format: str = "jaxsae") -> None:
    """Save an SAE, whole or not at all; what was at `path` is replaced.

    Args:
      sae: the autoencoder.
      path: where to; for the format `"jaxsae"` a directory.
      format: `"jaxsae"`.

    Raises:
      InputError: if the format is unknown or the place cannot be written.
    """
    _row(format).write(sae, Path(path))


def _row(format: str) -> _Format:
    if format not in _FORMATS:
        raise InputError(f"got format {format!r}, expected one of: {', '.join(_FORMATS)}.")
    return _FORMATS[format]


def _detect_own(path: Path) -> bool:
    return (path / _CONFIG).is_file()


def _write_own(sae: SAE, path: Path) -> None:
    if path.exists() and not _detect_own(path):
        raise InputError(f"{path}: exists and is not a saved SAE; choose another place, or remove it.")
    fields = dataclasses.fields(sae.activation)  # pyright: ignore[reportArgumentType]
    values = {field.name: getattr(sae.activation, field.name) for field in fields}
    static = {f.name for f in fields if not f.metadata.get("pytree_node", True)}
    unset = {name for name, value in values.items() if value is None}
    config = {
        "format": "jaxsae",
        "version": _VERSION,
        "d": sae.d,
        "m": sae.m,
        "d_out": sae.b_dec.size,
        "centred": sae.centred,
        "skip": sae.W_skip is not None,
        "activation": {
            "name": type(sae.activation).__name__,
            **{name: value for name, value in values.items() if name in static},
        },
    }
    arrays = {name: getattr(sae, name) for name in _shapes(config)}
    arrays |= {f"activation.{name}": jnp.asarray(v) for name, v in values.items() if name not in static | unset}
    with atomic_directory(path) as folder:
        safetensors.flax.save_file(arrays, folder / _WEIGHTS)
        (folder / _CONFIG).write_text(json.dumps(config, indent=2) + "\n")


def _shapes(config: dict[str, Any]) -> dict[str, tuple]:
    """The arrays of an SAE and their shapes."""
    d, m, d_out = config.get("d"), config.get("m"), config.get("d_out")
    shapes = {"W_enc": (d, m), "b_enc": (m,), "W_dec": (m, d_out), "b_dec": (d_out,)}
    return shapes | {"W_skip": (d, d_out)} if config.get("skip") else shapes


def _read_own(path: Path) -> SAE:
    try:
        config = json.loads((path / _CONFIG).read_text())
        arrays = safetensors.flax.load_file(path / _WEIGHTS)
    except (OSError, ValueError, SafetensorError) as error:
        raise InputError(
            f"{path}: not a whole SAE ({str(error).splitlines()[0]}); expected {_CONFIG} and {_WEIGHTS}: save it again."
        ) from error
    if not isinstance(config, dict) or (config.get("format"), config.get("version")) != ("jaxsae", _VERSION):
        says = [config.get("format"), config.get("version")] if isinstance(config, dict) else [config, None]
        raise InputError(
            f"{path / _CONFIG}: says {says[0]!r} version {says[1]!r}, expected 'jaxsae' version {_VERSION}; load it "
            "with the version of jaxsae that wrote it."
        )
    config = {"d_out": config.get("d"), "centred": True} | config  # as those of 0.1 before transcoders
    shapes = _shapes(config)
    found = {name: arrays[name].shape if name in arrays else None for name in shapes}
    if found != shapes:
        raise InputError(f"{path / _WEIGHTS}: holds shapes {found}, but {_CONFIG} says {shapes}; save it again.")
    dtypes = {str(arrays[name].dtype) for name in shapes if not jnp.issubdtype(arrays[name].dtype, jnp.floating)}
    if dtypes:
        raise InputError(f"{path / _WEIGHTS}: holds {', '.join(dtypes)}, expected floating point; save it again.")
    parameters = {name: array for name, array in arrays.items() if name not in shapes}
    activation = _activation(config, parameters, path)
    return SAE(**{name: arrays[name] for name in shapes}, activation=activation, centred=bool(config["centred"]))


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


_FORMATS = {"jaxsae": _Format(_detect_own, _read_own, _write_own)}
