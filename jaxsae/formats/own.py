"""Our own format, a directory: `sae.json` describes the SAE, `sae.safetensors` holds its arrays."""

import contextlib
import dataclasses
import typing
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxsae._core import processes
from jaxsae._core.files import InputError, atomic_directory, settled
from jaxsae.autoencoder import activations, normalisation
from jaxsae.autoencoder.sae import SAE
from jaxsae.data.origin import Origin
from jaxsae.formats import common
from jaxsae.formats.common import Raw, Tensors, Weights
from jaxsae.formats.tensors import place, read_json, read_safetensors, write_safetensors

_VERSION = 1
CONFIG, WEIGHTS = "sae.json", "sae.safetensors"
ACTIVATIONS = {
    cls.__name__: cls
    for cls in (
        *(activations.ReLU, activations.TopK, activations.AbsTopK, activations.BatchTopK),
        *(activations.JumpReLU, activations.Gated, activations.GroupMax, activations.MatchingPursuit),
    )
}
_KEYS = {"format", "version", "d", "m", "d_out", "apply_b_dec_to_input", "transcoder", "skip"}
_KEYS |= {"activation", "normalisation", "arrays", "origin"}
NORMALISATIONS = {
    cls.__name__: cls for cls in (normalisation.LayerNorm, normalisation.ConstantNorm, normalisation.AverageNorm)
}


def within_run(path: Path) -> Path:
    """The SAE of a run, or the path itself.

    Args:
      path: a directory.
    """
    inner = settled(path / "sae")
    return inner if (inner / CONFIG).is_file() else path


def detect(path: Path) -> bool:
    """Whether a path is such a directory, or a run with one."""
    return (within_run(path) / CONFIG).is_file()


def write(sae: SAE, path: Path | None, origin: Origin = Origin()) -> None:  # noqa: B008 - immutable
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
    if known := origin.known():
        config["origin"] = known
    arrays = {name: getattr(sae, name) for name in _shapes(config)}
    arrays |= {f"activation.{name}": value for name, value in parameters(sae.activation).items()}
    with contextlib.ExitStack() as held:
        with agreed(sae):
            folder = None if path is None else held.enter_context(atomic_directory(path))
        write_safetensors(None if folder is None else folder / WEIGHTS, arrays)
        if folder is not None:
            common.write_json(folder / CONFIG, config | {"arrays": sorted(arrays)})


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


def read(path: Path) -> Raw:
    """Read the arrays and the configuration of a directory."""
    try:
        config, arrays = read_json(path / CONFIG), read_safetensors(path / WEIGHTS)
    except InputError as error:
        raise InputError(
            f"{path}: not a whole SAE ({str(error).split('; ')[0]}); expected {CONFIG} and {WEIGHTS}: save it again."
        ) from error
    found = config.get("format"), config.get("version")
    if found != ("jaxsae", _VERSION) or type(found[1]) is not int:
        raise InputError(
            f"{path / CONFIG}: says {found[0]!r} version {found[1]!r}, expected 'jaxsae' "
            f"version {_VERSION} (format, version); load it with the version of jaxsae that wrote it."
        )
    if unknown := config.keys() - _KEYS:
        raise InputError(f"{path / CONFIG}: says {', '.join(sorted(unknown))}, which is unknown; update jaxsae.")
    return Raw(path / WEIGHTS, config, Tensors(arrays))


def convert(raw: Raw) -> SAE:
    """Make an SAE of what was read."""
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
        raise raw.error(f"holds shapes {found}, but {CONFIG} says {sizes}", "save it again")
    listed = config.get("arrays", sorted(raw.arrays))  # files of 0.1 have no list
    if listed != sorted(raw.arrays):
        raise raw.error(f"holds {sorted(raw.arrays)}, but the arrays of {CONFIG} are {listed}", "save it again")
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
    name, options = _named(raw, "normalisation", options, NORMALISATIONS)
    try:
        values = {option: raw.number(value, option) for option, value in options.items()}
        return NORMALISATIONS[name](**values)
    except TypeError as error:
        raise InputError(f"{raw.path.parent}: its normalisation does not fit ({error}); save it again.") from error


def _activation(raw: Raw) -> activations.Activation:
    name, static = _named(raw, "activation", raw.config.get("activation"), ACTIVATIONS)
    prefix = "activation."
    arrays = {each.removeprefix(prefix): raw.arrays[each] for each in raw.arrays if each.startswith(prefix)}
    try:
        for field in dataclasses.fields(ACTIVATIONS[name]):
            if field.name not in arrays | static and field.default not in (None, dataclasses.MISSING):
                raise TypeError(f"{field.name} is missing")
            if field.name in static and not _is_of(static[field.name], field.type):
                raise TypeError(f"{field.name} is {static[field.name]!r}")
        return ACTIVATIONS[name](**{each: _placed(raw, each, array) for each, array in arrays.items()}, **static)
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
        raise InputError(f"{raw.path.parent / CONFIG}: {expected}; update jaxsae.")
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


def parameters(activation: Any) -> dict[str, Any]:
    """The arrays of an activation, or numbers given in their place, by name."""
    values, static = _options(activation)
    return {name: value for name, value in values.items() if name not in static and value is not None}


def on_devices(sae: SAE) -> list[jax.Array]:
    """The arrays of an SAE that are JAX's."""
    return [leaf for leaf in jax.tree.leaves(sae) if isinstance(leaf, jax.Array)]


def is_shared(sae: SAE) -> bool:
    """Whether several processes hold parts of it."""
    return not all(leaf.is_fully_addressable for leaf in on_devices(sae))


def agreed(sae: SAE) -> contextlib.AbstractContextManager[None]:
    """A block that fails in all processes that hold parts of an SAE, or in none."""
    return processes.all_or_none() if is_shared(sae) else contextlib.nullcontext()
