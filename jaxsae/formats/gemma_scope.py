"""Gemma Scope (`params.npz`) and Gemma Scope 2 (`config.json` and `params.safetensors`): JumpReLU, `x` not centred."""

import dataclasses
import re
from pathlib import Path

import numpy as np

from jaxsae._core.files import InputError, atomic_directory
from jaxsae.autoencoder.activations import Activation, BatchTopK, JumpReLU, ReLU
from jaxsae.autoencoder.sae import SAE
from jaxsae.autoencoder.surgery import fold_scale
from jaxsae.data.origin import Origin
from jaxsae.formats import common
from jaxsae.formats.common import Raw, Tensors, Weights
from jaxsae.formats.tensors import read_npz, read_safetensors, writable

_NPZ, _CONFIG, _WEIGHTS = "params.npz", "config.json", "params.safetensors"


def detect(path: Path) -> bool:
    """An `.npz` of encoder, decoder and threshold."""
    file = common.find_npz(path, _NPZ)
    if file is None:
        return False
    names = {name.lower() for name in read_npz(file, check=False)}
    return {"w_enc", "w_dec", "threshold"} <= names and "group_sizes" not in names


def detect_embedding(path: Path) -> bool:
    """The same, at a path of Gemma Scope's SAEs of the embedding, whose files do not say so."""
    layout = re.search(r"(^|/)embedding/width_[^/]+/average_l0_[^/]+(/[^/]*\.npz)?$", path.absolute().as_posix())
    return layout is not None and detect(path)


def detect_transcoder(path: Path) -> bool:
    """The same, in a repository of Gemma Scope's transcoders, whose files do not say so."""
    return re.search(r"gemma-scope[^/]*transcoder", path.absolute().as_posix()) is not None and detect(path)


def read(path: Path) -> Raw:
    """`params.npz`; some files have names in lower case."""
    file = common.require(path, common.find_npz(path, _NPZ), _NPZ)
    names, arrays = {"w_enc": "W_enc", "w_dec": "W_dec"}, read_npz(file)
    if twice := sorted(name for name in names.keys() & arrays.keys() if names[name] in arrays):
        raise InputError(f"{file}: holds {names[twice[0]]} and {twice[0]}; remove the one that is wrong.")
    return Raw(file, {}, Tensors({names.get(name, name): array for name, array in arrays.items()}))


def convert(raw: Raw) -> SAE:
    """An autoencoder, unless input and output differ in width."""
    weights = Weights(*(raw.take(name) for name in ("W_enc", "b_enc", "W_dec", "b_dec")))
    transcoder = weights.W_dec.shape[-1:] != weights.W_enc.shape[:1]
    return common.assemble(raw, _activation(raw), weights, apply_b_dec_to_input=False, transcoder=transcoder)


def convert_embedding(raw: Raw) -> SAE:
    """An autoencoder of embeddings before the model multiplies them by `√d`."""
    sae = convert(raw)
    return dataclasses.replace(fold_scale(sae, float(1 / np.sqrt(sae.d))), b_dec=sae.b_dec)


def convert_transcoder(raw: Raw) -> SAE:
    """A transcoder."""
    return dataclasses.replace(convert(raw), transcoder=True)


def _activation(raw: Raw) -> Activation:
    return JumpReLU(raw.place_threshold(raw.take("threshold")))


def write(sae: SAE, path: Path, origin: Origin) -> None:
    """`params.npz`, in float32 or better."""
    if sae.W_skip is not None:
        raise common.refuse("gemma_scope", "skip connections")
    if sae.transcoder and sae.b_dec.size == sae.d:
        raise common.refuse("gemma_scope", "way to tell a transcoder to the same width from an autoencoder")
    sae, threshold = _written(sae, "gemma_scope")
    arrays = {name: getattr(sae, name) for name in ("W_enc", "W_dec", "b_enc", "b_dec")} | {"threshold": threshold}
    wide = {name: writable(array.astype(_wide(array)), name) for name, array in arrays.items()}
    with atomic_directory(path) as folder:
        # Without `allow_pickle`, which numpy 2.0 takes for one more array.
        np.savez(folder / _NPZ, **wide)  # pyright: ignore[reportArgumentType]


def _written(sae: SAE, format: str) -> tuple[SAE, np.ndarray]:
    """The SAE converted not to subtract `b_dec`, and a threshold for each latent."""
    common.refuse_unless(format, sae, transcoder=True)
    sae = common.centre(sae, False)
    match sae.activation:
        case JumpReLU() | BatchTopK():
            threshold = np.asarray(sae.activation.threshold)
            return sae, np.broadcast_to(threshold.astype(_wide(threshold)), (sae.m,))
        case ReLU():
            return sae, np.zeros(sae.m, np.float32)
    raise common.refuse(format, type(sae.activation).__name__)


def _wide(array: np.ndarray) -> np.dtype:
    """Float32 or better."""
    return np.promote_types(array.dtype, np.float32)


# --- Gemma Scope 2


def detect_2(path: Path) -> bool:
    """Safetensors with `w_enc`, `w_dec` and `threshold`."""
    return {"w_enc", "w_dec", "threshold"} <= common.array_names(common.find_weights(path, _WEIGHTS))


def read_2(path: Path) -> Raw:
    """`params.safetensors` and, where there is one, `config.json`."""
    file = common.require(path, common.find_weights(path, _WEIGHTS), f"{_CONFIG} and {_WEIGHTS}")
    return Raw(file, common.find_config(file, _CONFIG), Tensors(read_safetensors(file)))


def convert_2(raw: Raw) -> SAE:
    """An autoencoder, or a transcoder to another site, perhaps with a skip connection."""
    raw.choice("architecture", raw.config.get("architecture", "jump_relu"), ["jump_relu"])
    if raw.take("w_dec").ndim == 3:
        raise raw.error(
            f"w_dec has shape {raw.arrays['w_dec'].shape}, of a cross-layer transcoder, which writes to several layers",
            "expected one layer: choose another",
        )
    affine = raw.flag("affine_connection", "affine_skip_connection" in raw.arrays)
    skip = raw.take("affine_skip_connection", "affine_connection") if affine else None
    weights = Weights(*(raw.take(name) for name in ("w_enc", "b_enc", "w_dec", "b_dec")))._replace(W_skip=skip)
    elsewhere = raw.is_elsewhere("hf_hook_point_in", "hf_hook_point_out")
    transcoder = elsewhere or skip is not None or weights.W_dec.shape[-1:] != weights.W_enc.shape[:1]
    raw.require_sizes(width=len(weights.W_dec))
    return common.assemble(raw, _activation(raw), weights, apply_b_dec_to_input=False, transcoder=transcoder)


def write_2(sae: SAE, path: Path, origin: Origin) -> None:
    """`config.json` and `params.safetensors`."""
    sae, threshold = _written(sae, "gemma_scope_2")
    config = {"architecture": "jump_relu", "width": sae.m, "affine_connection": sae.W_skip is not None}
    place, target = (common.site_name(origin, "module", target=target) for target in (False, True))
    config |= {} if origin.model is None else {"model_name": origin.model}
    config |= {} if place is None else {"hf_hook_point_in": place}
    # That two names differ is what makes it a transcoder.
    config |= {"hf_hook_point_in": place or "input", "hf_hook_point_out": target or "output"} if sae.transcoder else {}
    arrays = {"w_enc": sae.W_enc, "w_dec": sae.W_dec, "b_enc": sae.b_enc, "b_dec": sae.b_dec, "threshold": threshold}
    arrays |= {} if sae.W_skip is None else {"affine_skip_connection": sae.W_skip}
    with atomic_directory(path) as folder:
        common.write_json(folder / _CONFIG, config)
        common.write_safetensors(folder / _WEIGHTS, arrays)
