"""Shared by the formats: finding files, checking their contents, and converting between conventions."""

import dataclasses
import json
import math
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import ml_dtypes
import numpy as np

from jaxsae import sharding
from jaxsae._core.files import InputError
from jaxsae.autoencoder.activations import Activation, Gated, GroupMax, TopK
from jaxsae.autoencoder.normalisation import Normalisation
from jaxsae.autoencoder.sae import SAE
from jaxsae.data.origin import Origin
from jaxsae.formats import tensors, torch_pickle
from jaxsae.formats.tensors import Arrays, place, read_json, read_safetensors, ready, safetensors_file


class Tensors(dict[str, np.ndarray]):
    """Arrays by name that record which of them were used: unused ones are unknown to the format."""

    def __init__(self, arrays: Arrays):
        """Start with no array marked as used.

        Args:
          arrays: by name.
        """
        super().__init__(arrays)
        self._used: set[str] = set()

    def __getitem__(self, name: str) -> np.ndarray:
        self._used.add(name)
        return super().__getitem__(name)

    @property
    def unused(self) -> list[str]:
        """Names of the arrays that were not used."""
        return sorted(self.keys() - self._used)

    def ignore(self, *names: str) -> None:
        """Mark arrays as used that do not affect the result, such as statistics."""
        self._used |= set(names)


class Raw(NamedTuple):
    """A saved autoencoder as it is in its files.

    Attributes:
      path: the file of its arrays.
      config: its configuration, or {}.
      arrays: its arrays, by the names that its library gave them.
      dtype: of the loaded weights; that of the files if None.
    """

    path: Path
    config: dict[str, Any]
    arrays: Tensors
    dtype: Any = None

    def error(self, what: str, do: str = "download it again") -> InputError:
        """The error that states what is wrong with the file, and what to do."""
        return InputError(f"{self.path}: {what}; {do}.")

    def take(self, name: str, said: str = "") -> np.ndarray:
        """A floating-point array that must be there; `said` is the configuration entry that requires it."""
        if name not in self.arrays:
            there = ", ".join(sorted(self.arrays)) or "nothing"
            said = f", as {said} requires" if said else self._kind()
            raise self.error(f"holds {there}, expected {name} too{said}")
        array = self.arrays[name]
        if array.dtype.kind != "f" and array.dtype != ml_dtypes.bfloat16:
            raise self.error(f"{name} is {array.dtype}, expected floating point")
        return array

    def _kind(self) -> str:
        """The architecture that the configuration names, in brackets, or ""."""
        named = {name: self.config.get(name) for name in ("architecture", "activation", "act_fn", "dict_class")}
        shown = ", ".join(f"{name} {value!r}" for name, value in named.items() if isinstance(value, str))
        return f" ({shown})" if shown else ""

    def take_one(self, name: str) -> np.ndarray:
        """An array of one element that must be there, as a scalar."""
        array = self.take(name)
        if array.size != 1:
            raise self.error(f"{name} has shape {array.shape}, expected one number")
        return array.reshape(())

    def number(self, value: Any, name: str) -> float:
        """A finite number of a configuration, or of an array of one element."""
        value = value.item() if isinstance(value, np.ndarray) and value.size == 1 else value
        if isinstance(value, bool) or not isinstance(value, int | float) or not abs(value) < 2**62:
            raise self.error(f"{name} is {_shown(value)}, expected a number", "fix its configuration")
        return float(value)

    def flag(self, name: str, default: bool) -> bool:
        """A boolean of the configuration, or the default; text and numbers are refused."""
        value = self.config.get(name, default)
        if not isinstance(value, bool):
            raise self.error(f"{name} is {_shown(value)}, expected true or false", "fix its configuration")
        return value

    def positive(self, value: Any, name: str) -> float:
        """A number above 0."""
        found = self.number(value, name)
        if found <= 0:
            raise self.error(f"{name} is {found}, expected more than 0", "fix its configuration")
        return found

    def integer(self, value: Any, name: str) -> int:
        """A positive integer."""
        found = self.number(value, name)
        if found != int(found) or not 1 <= found < 2**31:
            raise self.error(f"{name} is {found:g}, expected a whole number from 1", "fix its configuration")
        return int(found)

    def choice(self, what: str, value: Any, known: Iterable[Any]) -> Any:
        """The value, which must be one of those known."""
        known = list(known)
        if isinstance(value, dict | list) or value not in known or type(value) not in map(type, known):
            names = ", ".join(map(str, known))
            raise self.error(f"its {what} is {_shown(value)}, expected one of: {names}", "jaxsae cannot compute it")
        return value

    def require_sizes(self, **sizes: int) -> None:
        """Raise if sizes in the configuration contradict those of the weights.

        Args:
          sizes: of the weights, by the names in the configuration.
        """
        for name, size in sizes.items():
            declared = self.config.get(name)
            if declared is not None and self.integer(declared, name) != size:
                what = f"its configuration says {name} {declared}, but its weights {size}"
                raise self.error(what, "fix the one that is wrong")

    def require_used(self, format: str, activation: Activation) -> None:
        """Raise if an array was not used: it would change what the autoencoder computes."""
        if unused := self.arrays.unused:
            raise self.error(
                f"holds {', '.join(unused)}, which {type(activation).__name__} of {format} does not have{self._kind()}",
                "name the architecture in its configuration, or remove the unused arrays",
            )

    def is_elsewhere(self, into: str, out: str) -> bool:
        """Whether the output site differs from the input site, by their names in the configuration."""
        there = self.config.get(out)
        if there is not None and self.config.get(into) is None:
            raise self.error(f"says {out} {_shown(there)} and no {into}", "expected both: fix its configuration")
        return there not in (None, self.config.get(into))

    def place_threshold(self, array: np.ndarray) -> jax.Array:
        """Place thresholds in float32 or better, whatever the weights; an infinite one silences a latent."""
        dtype = np.promote_types(self.dtype or array.dtype, np.float32)
        return place(array, dtype, name=f"{self.path}: threshold", infinite=True)

    def gated(self, r_mag: str, b_gate: str, b_mag: str) -> Gated:
        """`Gated` with the arrays of these names."""
        names = (r_mag, b_gate, b_mag)
        return Gated(
            *(place(self.take(name), self.dtype, name=f"{self.path}: {name}", infinite=True) for name in names)
        )

    def zeros(self, size: int) -> np.ndarray:
        """Zeros, for a bias that the format lacks."""
        return np.zeros(size, self.dtype or np.float32)

    def mean_k(self, k: Any) -> int:
        """`k` of BatchTopK, rounded if it is a fraction: it matters only in training."""
        return max(1, round(min(self.number(k, "k"), math.exp2(31))))


# --- finding


def find_file(path: Path, names: tuple[str, ...], suffix: str) -> Path | None:
    """The file at a path; in a folder, the first of the given names, or the only file with the suffix."""
    if not path.is_dir():
        return path if path.is_file() else None
    named = [path / name for name in names if (path / name).is_file()]
    of_kind = [file for file in path.glob(f"*{suffix}") if file.is_file()]
    return named[0] if named else of_kind[0] if len(of_kind) == 1 else None


def find_config(file: Path, *names: str) -> dict[str, Any]:
    """The first configuration of the given names beside a file, or {}."""
    return next((read_json(file.with_name(name)) for name in names if file.with_name(name).is_file()), {})


def require_config(file: Path, name: str) -> dict[str, Any]:
    """The configuration beside a file, which must be there."""
    if not file.with_name(name).is_file():
        raise InputError(f"{file.parent}: has no {name}, expected one beside {file.name}; download it too.")
    return read_json(file.with_name(name))


def find_weights(path: Path, *names: str) -> Path | None:
    """A safetensors file, or the index of its shards, at a path; in a folder, as `find_file` chooses."""
    if path.is_dir():
        found = [file for name in names if (file := safetensors_file(path / name))]
        return found[0] if found else find_file(path, (), ".safetensors")
    if path.name.endswith((".safetensors", ".safetensors.index.json")):
        return safetensors_file(path)
    start = first_bytes(path, 9)
    return path if start[8:] == b"{" and int.from_bytes(start[:8], "little") <= path.stat().st_size else None


def find_npz(path: Path, *names: str) -> Path | None:
    """A file of `numpy.savez` at a path; in a folder, as `find_file` chooses."""
    file = find_file(path, names, ".npz")
    return file if file is not None and is_zip(file) and not is_torch(file) else None


def find_torch(path: Path, *names: str) -> Path | None:
    """A file of `torch.save` at a path; in a folder, as `find_file` chooses."""
    file = find_file(path, names, ".pt")
    return file if file is not None and is_torch(file) else None


def is_torch(file: Path) -> bool:
    """Whether a file is a zip that torch wrote, or begins like a pickle."""
    start = first_bytes(file, 512)
    return start.startswith(b"\x80\x02") or (is_zip(file) and b"/data.pkl" in start)


def is_zip(file: Path) -> bool:
    """Whether a file begins like a zip."""
    return first_bytes(file, 4) == b"PK\x03\x04"


def first_bytes(file: Path, count: int) -> bytes:
    """The first bytes of a file."""
    with open(file, "rb") as opened:
        return opened.read(count)


def array_names(file: Path | None) -> set[str]:
    """The names of the arrays in a safetensors file."""
    return set() if file is None else set(read_safetensors(file))


def read_state(file: Path, *, check: bool) -> tuple[Arrays, dict[str, Any]]:
    """The arrays of a state dict in a torch pickle, and its other entries."""
    found = torch_pickle.read(file, check=check)
    if not isinstance(found, dict):
        raise InputError(f"{file}: holds a {type(found).__name__}, expected a state dict; save model.state_dict().")
    arrays = {str(name): value for name, value in found.items() if isinstance(value, np.ndarray)}
    return arrays, {str(name): value for name, value in found.items() if not isinstance(value, np.ndarray)}


def require(path: Path, file: Path | None, what: str) -> Path:
    """The file; raise if none was found."""
    if file is None:
        raise InputError(f"{path}: not an SAE of this format; expected {what}.")
    return file


# --- checking


def _shown(value: Any) -> str:
    return repr(value) if isinstance(value, int | float | str | None) else repr(type(value).__name__)


# --- where it belongs

_SITES = ("hook_name", "hook_point", "hook_point_in", "hf_hook_point_in", "hf_hook_name")
_TARGETS = ("hook_name_out", "hook_point_out", "hf_hook_point_out")


def origin(config: Mapping[str, Any]) -> Origin:
    """Where an autoencoder belongs, by what configurations of several libraries call it."""
    inner = [config[name] for name in ("metadata", "origin") if isinstance(config.get(name), dict)]
    known = {name: value for part in (config, *inner) for name, value in part.items() if value is not None}
    model = next((known[name] for name in ("model_name", "lm_name", "model") if isinstance(known.get(name), str)), None)
    place, target = _place(known), _target(known)
    context = next(
        (known[name] for name in ("context_size", "ctx_len", "context") if type(known.get(name)) is int), None
    )
    data = next((known[name] for name in ("dataset_path", "data") if isinstance(known.get(name), str)), None)
    # Some configurations of autoencoders name their site twice, as input and output.
    return Origin(model, *place, context, data, *(target if target != place else (None, None)))


def _target(known: Mapping[str, Any]) -> tuple[int | None, str | None]:
    """Where the target of a transcoder is."""
    ours = {name.removeprefix("target_"): value for name, value in known.items() if name.startswith("target_")}
    return _place(ours | {name: known.get(name) for name in _TARGETS}, _TARGETS)


def _place(known: Mapping[str, Any], hooks: Sequence[str] = _SITES) -> tuple[int | None, str | None]:
    from jaxsae.language_model import sites

    for name in (known[name] for name in hooks if isinstance(known.get(name), str)):
        try:
            return sites.parse(name)
        except InputError:  # a hook that ours have no name for
            continue
    layer = known.get("layer")
    found = re.fullmatch(r"(\w+)_layer_(\d+)", str(known.get("submodule_name")))
    if found and found[1] in sites.SITES:
        return int(found[2]), found[1]
    site = known.get("site")
    return layer if type(layer) is int else None, site if site in sites.SITES else None


def site_name(origin: Origin, kind: str = "hook", *, target: bool = False) -> str | None:
    """The name of a site in TransformerLens, or of a module in transformers; None if it is unknown."""
    layer, site = (origin.target_layer, origin.target_site) if target else (origin.layer, origin.site)
    if layer is None or site is None:
        return None
    from jaxsae.language_model import sites

    return (sites.hook if kind == "hook" else sites.module)(layer, site)


# --- making


class Weights(NamedTuple):
    """Arrays `[d m]`, `[m]`, `[m d_out]`, `[d_out]` and `[d d_out]`, not yet copied."""

    W_enc: np.ndarray
    b_enc: np.ndarray
    W_dec: np.ndarray
    b_dec: np.ndarray
    W_skip: np.ndarray | None = None


def assemble(
    raw: Raw,
    activation: Activation,
    weights: Weights,
    *,
    apply_b_dec_to_input: bool,
    transcoder: bool = False,
    normalisation: Normalisation | None = None,
) -> SAE:
    """Check that arrays fit together, and build the SAE."""
    W_enc, W_dec = weights.W_enc, weights.W_dec
    if W_enc.ndim != 2 or W_dec.ndim != 2:
        raise InputError(f"{raw.path}: weights of shapes {W_enc.shape} and {W_dec.shape}, expected two axes each.")
    (d, m), d_out = W_enc.shape, W_dec.shape[1] if transcoder else W_enc.shape[0]
    if apply_b_dec_to_input and d != d_out:
        raise raw.error(f"subtracts b_dec, {d_out} wide, from rows {d} wide", "jaxsae cannot compute it")
    expected = {"W_dec": (m, d_out), "b_enc": (m,), "b_dec": (d_out,), "W_skip": (d, d_out)}
    found = {name: array.shape for name, array in weights._asdict().items() if name in expected and array is not None}
    wrong = {name: shape for name, shape in found.items() if shape != expected[name]}
    parameters = [shape for leaf in jax.tree.leaves(activation) if (shape := np.shape(leaf)) not in ((), (m,))]
    wrong |= {"activation": parameters[0]} if parameters else {}
    if wrong or not d * m * d_out:
        shown = ", ".join(f"{name} {shape}" for name, shape in wrong.items()) or "nothing"
        raise raw.error(f"{shown} does not fit {m} latents, {d} to {d_out} wide")
    require_k(f"{raw.path}: ", activation, m)
    if np.any(np.asarray(weights.b_enc) == np.inf):
        raise InputError(f"{raw.path}: b_enc holds +inf, expected numbers, or -inf for a latent that is never active.")
    sae = SAE(
        **weights._asdict(),
        activation=activation,
        apply_b_dec_to_input=apply_b_dec_to_input,
        transcoder=transcoder,
        normalisation=normalisation,
    )
    where: dict[str, Any] = _where(raw, sae)
    arrays: dict[str, Any] = {
        name: place(array, raw.dtype, name=f"{raw.path}: {name}", infinite=name == "b_enc", where=where.get(name))
        for name, array in weights._asdict().items()  # a b_enc of −∞ silences a latent
        if array is not None
    }
    if where:
        arrays["activation"] = jax.tree.map(_move, activation, where["activation"])
    return dataclasses.replace(sae, **arrays)


def _where(raw: Raw, sae: SAE) -> dict[str, Any]:
    """How to split the arrays over the current mesh, by field; {} without a mesh."""
    mesh = jax.sharding.get_mesh()
    if mesh.empty:
        return {}
    try:
        return vars(sharding.shardings(sae, mesh))
    except ValueError as error:
        raise InputError(f"{raw.path}: {error}") from error


def _move(leaf: Any, where: jax.sharding.Sharding) -> jax.Array:
    """Split a small array that is on one device."""
    whole = np.asarray(leaf)
    return jax.make_array_from_callback(whole.shape, where, lambda index: whole[index])


def require_k(where: str, activation: Activation, m: int) -> None:
    """Raise if `k` exceeds the number of latents or, for GroupMax, does not divide it."""
    k = activation.slots or 1
    if k > m or (isinstance(activation, GroupMax) and m % k):
        raise InputError(f"{where}k is {k}, which does not fit {m} latents; fix its configuration.")


def fold_norms(weights: Weights) -> Weights:
    """Scale atoms to norm 1, so that selection by `pre` is the original selection by `pre · ‖atom‖`."""
    wide = np.promote_types(weights.W_dec.dtype, np.float32)
    norms = np.linalg.norm(weights.W_dec.astype(wide), axis=1)
    safe = np.where(norms > 0, norms, 1)
    return weights._replace(
        W_enc=weights.W_enc * norms, b_enc=weights.b_enc * norms, W_dec=weights.W_dec / safe[:, None]
    )


# --- writing


def refuse(format: str, what: str) -> InputError:
    """The error for an SAE that a format cannot represent."""
    return InputError(f"{format} has no {what}; save it in another format, such as jaxsae.")


def refuse_unless(format: str, sae: SAE, *, transcoder: bool = False, normalised: tuple[type, ...] = ()) -> None:
    """Refuse transcoders, skip connections and normalisations that a format does not support."""
    if sae.transcoder and not transcoder:
        raise refuse(format, "transcoders")
    if sae.W_skip is not None and not transcoder:
        raise refuse(format, "skip connections")
    if sae.normalisation is not None and not isinstance(sae.normalisation, normalised):
        raise refuse(format, type(sae.normalisation).__name__)


def fixed_k(format: str, activation: Any) -> int:
    """The number of latents kept per row; `TopK.keep` may lower it."""
    keep = getattr(activation, "keep", None) if isinstance(activation, TopK) else None
    if keep is None:
        return activation.slots
    if not keep >= 1:
        raise refuse(format, f"TopK that keeps {keep} of {activation.k}")
    return int(min(keep, activation.k))


def centre(sae: SAE, apply_b_dec_to_input: bool) -> SAE:
    """The same function with or without `b_dec` subtracted from `x`; the encoder's biases compensate."""
    if sae.apply_b_dec_to_input == apply_b_dec_to_input:
        return sae
    if sae.activation.encoder_free or (sae.normalisation is not None and sae.normalisation.per_row and sae.transcoder):
        raise InputError("this SAE cannot be written with another centre; save it in another format, such as jaxsae.")
    wide = np.promote_types(np.asarray(sae.W_enc).dtype, np.float32)
    b_enc = np.asarray(sae.b_enc)
    with np.errstate(over="ignore"):
        shift = (np.asarray(sae.b_dec, np.float64) @ np.asarray(sae.W_enc, np.float64)).astype(wide)
        bias: Any = b_enc.astype(wide) + (shift if apply_b_dec_to_input else -shift)
    return dataclasses.replace(sae, b_enc=_narrow(bias, b_enc), apply_b_dec_to_input=apply_b_dec_to_input)


def _narrow(total: np.ndarray, *biases: np.ndarray) -> np.ndarray:
    """Cast a sum of biases to their dtype; raise if finite ones overflow."""
    with np.errstate(over="ignore"):
        found = total.astype(np.result_type(*biases))
    if (np.isfinite(biases).all(axis=0) & ~np.isfinite(found)).any():
        raise InputError(f"this SAE's biases overflow {found.dtype} in this format; convert it to float32.")
    return found


def gate_biases(sae: SAE) -> tuple[np.ndarray, np.ndarray]:
    """The gate and magnitude biases of `Gated`, with `b_enc` added to them."""
    gate: Any = sae.activation
    b_enc, b_gate, b_mag = (np.asarray(bias) for bias in (sae.b_enc, gate.b_gate, gate.b_mag))
    added, scale = b_enc.astype(np.float64), np.exp(np.asarray(gate.r_mag, np.float64))
    return _narrow(b_gate + added, b_gate, b_enc), _narrow(b_mag + scale * added, b_mag, b_enc)


def write_safetensors(file: Path, arrays: Mapping[str, Any]) -> None:
    """Write arrays of this process, without metadata."""
    tensors.write_safetensors(file, {name: ready(array, name) for name, array in arrays.items()})


def write_json(file: Path, config: Mapping[str, Any]) -> None:
    """Write a configuration."""
    try:
        file.write_text(json.dumps(config, indent=2, allow_nan=False) + "\n")
    except ValueError as error:
        what = f"JSON has no NaN and no infinite numbers, got {config}"
        raise InputError(f"{file.name}: {what}; save finite ones.") from error
