"""dictionary_learning: `ae.pt`, a torch pickle of a state dict or a back-up of its training, and `config.json`."""

from pathlib import Path
from typing import Any

import numpy as np

from jaxsae._core.files import InputError, atomic_directory
from jaxsae.autoencoder.activations import Activation, BatchTopK, Gated, JumpReLU, ReLU, TopK
from jaxsae.autoencoder.sae import SAE
from jaxsae.autoencoder.surgery import rescale
from jaxsae.data.origin import Origin
from jaxsae.formats import common, torch_pickle
from jaxsae.formats.common import Raw, Tensors, Weights
from jaxsae.formats.tensors import Arrays, read_npz

_CONFIG, _WEIGHTS = "config.json", "ae.pt"
_BACKUP = {"ae", "step", "optimizer", "config", "norm_factor"}
_BIASES = {  # of the decoder, by class
    "AutoEncoder": "bias",
    "AutoEncoderNew": "decoder.bias",
    "GatedAutoEncoder": "decoder_bias",
    "AutoEncoderTopK": "b_dec",
    "BatchTopKSAE": "b_dec",
}


def _find(path: Path) -> Path | None:
    return common.find_torch(path, _WEIGHTS) or common.find_npz(path, "state_dict.npz")


def _state(file: Path, *, check: bool) -> tuple[Arrays, dict[str, Any]]:
    """The arrays, those of the autoencoder in a back-up, and the other entries."""
    if not common.is_torch(file):
        return read_npz(file, check=check), {}
    arrays, rest = common.read_state(file, check=check)
    inner = rest.get("ae")
    if rest.keys() >= {"ae", "optimizer"} and isinstance(inner, dict):
        arrays = {str(name): value for name, value in inner.items() if isinstance(value, np.ndarray)}
    return arrays, rest


def detect(path: Path) -> bool:
    """A torch pickle or `.npz` with the array names of one of the library's classes."""
    file = _find(path)
    if file is None:
        return False
    names = _state(file, check=False)[0].keys()
    if "encoder.weight" in names:
        return "decoder.weight" in names and "pre_bias" not in names
    return {"W_enc", "W_dec", "threshold"} <= names and ("group_sizes" in names or common.is_torch(file))


def read(path: Path) -> Raw:
    """The state dict and, where there is one, the configuration."""
    file = common.require(path, _find(path), f"{_WEIGHTS} and {_CONFIG}")
    arrays, rest = _state(file, check=True)
    trainer = common.find_config(file, _CONFIG).get("trainer")
    config = dict(trainer) if isinstance(trainer, dict) else {}
    backup = isinstance(rest.get("ae"), dict)
    if unknown := rest.keys() - (_BACKUP if backup else set()):
        raise InputError(f"{file}: holds {', '.join(sorted(unknown))}, expected only arrays; save its state dict.")
    if backup and isinstance(rest.get("config"), dict):
        config |= rest["config"]
    # Rows are divided by this in training; the autoencoder saved at the end takes them unscaled.
    config["norm_factor"] = rest.get("norm_factor")
    return Raw(file, config, Tensors(arrays))


def convert(raw: Raw) -> SAE:
    """A class of the library, by its array names or, where two share them, by the configuration."""
    return _convert(raw, raw.config.get("dict_class"))


def convert_topk(raw: Raw) -> SAE:
    """An `AutoEncoderTopK` whose files do not name the class."""
    return _convert(raw, "AutoEncoderTopK")


def convert_batch_topk(raw: Raw) -> SAE:
    """A `BatchTopKSAE` whose files do not name the class."""
    return _convert(raw, "BatchTopKSAE")


def _convert(raw: Raw, named: str | None) -> SAE:
    name = _class(raw, named)
    activation = _activation(raw, name)
    if "W_enc" in raw.arrays:
        weights = Weights(*(raw.take(each) for each in ("W_enc", "b_enc", "W_dec", "b_dec")))
    else:
        W_enc, W_dec = raw.take("encoder.weight").T, raw.take("decoder.weight").T
        b_enc = raw.zeros(W_enc.shape[-1]) if isinstance(activation, Gated) else raw.take("encoder.bias")
        weights = Weights(W_enc, b_enc, W_dec, raw.take(_BIASES[name]))
    centred = name not in ("JumpReluAutoEncoder", "AutoEncoderNew")
    sae = common.assemble(raw, activation, weights, apply_b_dec_to_input=centred)
    raw.require_sizes(activation_dim=sae.d, dict_size=sae.m)
    if "group_sizes" in raw.arrays and raw.arrays["group_sizes"].sum() != sae.m:
        raise raw.error(f"its group_sizes do not add up to {sae.m} latents")
    factor = raw.config.get("norm_factor")
    return sae if factor is None else rescale(sae, 1 / raw.positive(factor, "norm_factor"))


def _class(raw: Raw, named: str | None) -> str:
    """The class, by the names of the arrays; two classes share theirs."""
    names = raw.arrays.keys()
    if "W_enc" in names:
        classes = ["MatryoshkaBatchTopKSAE" if "group_sizes" in names else "JumpReluAutoEncoder"]
    elif "r_mag" in names:
        classes = ["GatedAutoEncoder"]
    elif "b_dec" in names:
        classes = ["AutoEncoderTopK", "BatchTopKSAE"]
    else:
        classes = ["AutoEncoderNew" if "decoder.bias" in names else "AutoEncoder"]
    if named is None and len(classes) > 1:
        raise raw.error(
            f"may be an {classes[0]} or a {classes[1]}, whose arrays are the same, and no {_CONFIG} has the dict_class",
            "put its own beside it, or pass format='dictionary_learning_topk' or 'dictionary_learning_batch_topk'",
        )
    # One of the trainers of AutoEncoderNew writes the name AutoEncoder.
    alike = ["AutoEncoder"] if classes == ["AutoEncoderNew"] else []
    found = raw.choice("dict_class", classes[0] if named is None else named, classes + alike)
    return found if found in classes else classes[0]


def _activation(raw: Raw, name: str) -> Activation:
    match name:
        case "GatedAutoEncoder":
            return raw.gated("r_mag", "gate_bias", "mag_bias")
        case "JumpReluAutoEncoder":
            return JumpReLU(raw.place_threshold(raw.take("threshold")))
        case "AutoEncoderTopK":
            raw.arrays.ignore("threshold")  # an estimate of the smallest value kept, for other uses
            return TopK(_k(raw))
        case "BatchTopKSAE" | "MatryoshkaBatchTopKSAE":
            return BatchTopK(_k(raw), raw.place_threshold(raw.take_one("threshold")))
    return ReLU()


def _k(raw: Raw) -> int:
    k = raw.integer(raw.arrays["k"] if "k" in raw.arrays else raw.config.get("k"), "k")
    raw.require_sizes(k=k)
    return k


def write(sae: SAE, path: Path, origin: Origin) -> None:
    """`ae.pt` and a `config.json` that names the class."""
    common.refuse_unless("dictionary_learning", sae)
    name, sae, state = _written(sae)
    trainer = {"dict_class": name, "activation_dim": sae.d, "dict_size": sae.m}
    trainer |= {"k": int(state["k"])} if "k" in state else {}
    place = {"lm_name": origin.model, "layer": origin.layer, "submodule_name": None}
    if origin.site is not None and origin.layer is not None:
        place["submodule_name"] = f"{origin.site}_layer_{origin.layer}"
    trainer |= {name: value for name, value in place.items() if value is not None}
    with atomic_directory(path) as folder:
        common.write_json(folder / _CONFIG, {"trainer": trainer})
        torch_pickle.write(folder / _WEIGHTS, {name: np.asarray(array) for name, array in state.items()})


def _written(sae: SAE) -> tuple[str, SAE, dict[str, Any]]:
    """The class, the SAE with its convention, and the state dict."""
    activation = sae.activation
    layers = {"encoder.weight": np.asarray(sae.W_enc).T, "decoder.weight": np.asarray(sae.W_dec).T}
    match activation:
        case ReLU() if not sae.apply_b_dec_to_input:
            state = {"encoder.bias": sae.b_enc, "decoder.bias": sae.b_dec} | layers
            return "AutoEncoderNew", sae, state
        case ReLU():
            return "AutoEncoder", sae, {"bias": sae.b_dec, "encoder.bias": sae.b_enc} | layers
        case JumpReLU():
            sae = common.centre(sae, False)
            names = ("W_enc", "b_enc", "W_dec", "b_dec")
            arrays = {name: getattr(sae, name) for name in names} | {"threshold": activation.threshold}
            return "JumpReluAutoEncoder", sae, arrays
        case TopK() | BatchTopK():
            sae, topk = common.centre(sae, True), isinstance(activation, TopK)
            threshold = np.float32(-1) if isinstance(activation, TopK) else np.asarray(activation.threshold)
            k = np.int32(common.fixed_k("dictionary_learning", activation) if topk else activation.k)
            state = {"b_dec": sae.b_dec, "k": k, "threshold": threshold, "encoder.bias": sae.b_enc} | layers
            return "AutoEncoderTopK" if topk else "BatchTopKSAE", sae, state
        case Gated():
            sae = common.centre(sae, True)
            gate, magnitude = common.gate_biases(sae)
            state = {"decoder_bias": sae.b_dec, "r_mag": activation.r_mag, "gate_bias": gate, "mag_bias": magnitude}
            return "GatedAutoEncoder", sae, state | layers
    raise common.refuse("dictionary_learning", type(activation).__name__)
