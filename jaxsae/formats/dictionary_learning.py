"""dictionary_learning: `ae.pt`, a torch pickle of a state dict or a back-up of its training, and `config.json`."""

from pathlib import Path
from typing import Any

import numpy as np

from jaxsae import torch_pickle
from jaxsae.activations import Activation, BatchTopK, Gated, JumpReLU, ReLU, TopK
from jaxsae.files import atomic_directory
from jaxsae.formats.common import (
    Raw,
    Weights,
    assemble,
    centre,
    find_config,
    find_file,
    find_torch,
    gate_biases,
    gated,
    host,
    integer,
    is_torch,
    is_zip,
    place_threshold,
    positive,
    read_state,
    refuse,
    refuse_unless,
    require,
    take,
    take_one,
    write_json,
    zeros,
)
from jaxsae.sae import SAE, rescale
from jaxsae.tensors import Arrays, read_npz

_CONFIG, _WEIGHTS = "config.json", "ae.pt"
_BACKUP = {"ae", "step", "optimizer"}
_BIASES = ("bias", "decoder_bias", "b_dec", "decoder.bias")  # of the decoder, in its various classes


def _find(path: Path) -> Path | None:
    file = find_torch(path, _WEIGHTS)
    if file is not None:
        return file
    file = find_file(path, ("state_dict.npz",), ".npz")
    return file if file is not None and is_zip(file) and not is_torch(file) else None


def _state(file: Path, *, check: bool) -> tuple[Arrays, dict[str, Any]]:
    """Arrays, those of a back-up from within, and what else there is."""
    if not is_torch(file):
        return read_npz(file, check=check), {}
    arrays, rest = read_state(file, check=check)
    inner = rest.get("ae")
    if rest.keys() >= {"ae", "optimizer"} and isinstance(inner, dict):
        arrays = {str(name): value for name, value in inner.items() if isinstance(value, np.ndarray)}
    return arrays, rest


def detect(path: Path) -> bool:
    """A torch pickle, or an `.npz`, with the names of one of its classes."""
    file = _find(path)
    if file is None:
        return False
    names = _state(file, check=False)[0].keys()
    if "encoder.weight" in names:
        return "decoder.weight" in names and "pre_bias" not in names
    return {"W_enc", "W_dec", "threshold"} <= names and ("group_sizes" in names or is_torch(file))


def read(path: Path) -> Raw:
    """The state dict and, where there is one, the configuration."""
    file = require(path, _find(path), f"{_WEIGHTS} and {_CONFIG}")
    arrays, rest = _state(file, check=True)
    trainer = find_config(file, _CONFIG).get("trainer")
    config = dict(trainer) if isinstance(trainer, dict) else {}
    if isinstance(rest.get("ae"), dict):
        config |= rest["config"] if isinstance(rest.get("config"), dict) else {}
        config["norm_factor"] = rest.get("norm_factor")
    return Raw(file, config, arrays)


def convert(raw: Raw) -> SAE:
    """One of its classes, told by the names of its arrays.

    TopK and BatchTopK have the same arrays: without a `config.json` that names the class, top-k it is.
    """
    names = raw.arrays.keys()
    if "W_enc" in names:
        weights = Weights(*(take(raw, name) for name in ("W_enc", "b_enc", "W_dec", "b_dec")))
        matryoshka = "group_sizes" in names
        activation = _batch_topk(raw) if matryoshka else JumpReLU(place_threshold(raw, take(raw, "threshold")))
        sae = assemble(raw, activation, weights, centred=matryoshka)
    else:
        activation = _activation(raw)
        W_enc, W_dec = take(raw, "encoder.weight").T, take(raw, "decoder.weight").T
        b_enc = zeros(raw, W_enc.shape[-1]) if isinstance(activation, Gated) else take(raw, "encoder.bias")
        bias = next((name for name in _BIASES if name in names), "bias")
        sae = assemble(raw, activation, Weights(W_enc, b_enc, W_dec, take(raw, bias)), centred=bias != "decoder.bias")
    factor = raw.config.get("norm_factor")
    # In training, rows are divided by this; what is saved in the end takes them as they are.
    return sae if factor is None else rescale(sae, 1 / positive(raw, factor, "norm_factor"))


def _activation(raw: Raw) -> Activation:
    if "r_mag" in raw.arrays:
        return gated(raw, "r_mag", "gate_bias", "mag_bias")
    if "b_dec" not in raw.arrays:
        return ReLU()
    if "BatchTopK" in str(raw.config.get("dict_class")):
        return _batch_topk(raw)
    return TopK(integer(raw, raw.arrays.get("k", raw.config.get("k")), "k"))


def _batch_topk(raw: Raw) -> BatchTopK:
    k = integer(raw, raw.arrays.get("k", raw.config.get("k")), "k")
    return BatchTopK(k, place_threshold(raw, take_one(raw, "threshold")))


def write(sae: SAE, path: Path) -> None:
    """`ae.pt` and a `config.json` that names the class."""
    refuse_unless("dictionary_learning", sae)
    name, sae, state = _written(sae)
    trainer = {"dict_class": name, "activation_dim": sae.d, "dict_size": sae.m}
    trainer |= {"k": int(state["k"])} if "k" in state else {}
    with atomic_directory(path) as folder:
        write_json(folder / _CONFIG, {"trainer": trainer})
        torch_pickle.write(folder / _WEIGHTS, {name: host(array) for name, array in state.items()})


def _written(sae: SAE) -> tuple[str, SAE, dict[str, Any]]:
    """The class, the SAE with its convention, and the state dict."""
    activation = sae.activation
    layers = {"encoder.weight": np.asarray(sae.W_enc).T, "decoder.weight": np.asarray(sae.W_dec).T}
    match activation:
        case ReLU() if not sae.centred:
            state = {"encoder.bias": sae.b_enc, "decoder.bias": sae.b_dec} | layers
            return "AutoEncoderNew", sae, state
        case ReLU():
            return "AutoEncoder", sae, {"bias": sae.b_dec, "encoder.bias": sae.b_enc} | layers
        case JumpReLU():
            sae = centre(sae, False)
            names = ("W_enc", "b_enc", "W_dec", "b_dec")
            arrays = {name: getattr(sae, name) for name in names} | {"threshold": activation.threshold}
            return "JumpReluAutoEncoder", sae, arrays
        case TopK() | BatchTopK():
            sae, topk = centre(sae, True), isinstance(activation, TopK)
            threshold = np.asarray(-1.0 if isinstance(activation, TopK) else activation.threshold, np.float32)
            keep = getattr(activation, "keep", None)
            k = np.asarray(activation.k if keep is None else int(keep), np.int32)
            state = {"b_dec": sae.b_dec, "k": k, "threshold": threshold, "encoder.bias": sae.b_enc} | layers
            return "AutoEncoderTopK" if topk else "BatchTopKSAE", sae, state
        case Gated():
            sae = centre(sae, True)
            gate, magnitude = gate_biases(sae)
            state = {"decoder_bias": sae.b_dec, "r_mag": activation.r_mag, "gate_bias": gate, "mag_bias": magnitude}
            return "GatedAutoEncoder", sae, state | layers
    raise refuse("dictionary_learning", type(activation).__name__)
