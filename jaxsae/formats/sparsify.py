"""EleutherAI's sparsify: `cfg.json` and `sae.safetensors`; ReLU, then top-k or the maximum of groups."""

from pathlib import Path

import numpy as np

from jaxsae._core.files import InputError, atomic_directory
from jaxsae.autoencoder.activations import GroupMax, TopK
from jaxsae.autoencoder.sae import SAE
from jaxsae.formats.common import (
    Raw,
    Tensors,
    Weights,
    array_names,
    assemble,
    centre,
    choice,
    find_config,
    find_weights,
    fixed_k,
    flag,
    integer,
    refuse,
    refuse_unless,
    require,
    require_config,
    take,
    write_json,
    write_safetensors,
)
from jaxsae.formats.tensors import read_safetensors

_CONFIG, _WEIGHTS = "cfg.json", "sae.safetensors"
_ACTIVATIONS = {"topk": TopK, "groupmax": GroupMax}


def detect(path: Path) -> bool:
    """A `cfg.json` with `k`, and the arrays of an encoder layer and a decoder matrix."""
    file = find_weights(path, _WEIGHTS)
    return file is not None and {"encoder.weight", "W_dec"} <= array_names(file) and "k" in find_config(file, _CONFIG)


def read(path: Path) -> Raw:
    """Both files."""
    file = require(path, find_weights(path, _WEIGHTS), f"{_CONFIG} and {_WEIGHTS}")
    return Raw(file, require_config(file, _CONFIG), Tensors(read_safetensors(file)))


def convert(raw: Raw) -> SAE:
    """An autoencoder or a transcoder. The decoder is `[m d]` in the file already."""
    config = raw.config
    make = _ACTIVATIONS[choice(raw, "activation", config.get("activation", "topk"), _ACTIVATIONS)]
    choice(raw, "signed", config.get("signed", False), [False])
    transcoder = flag(raw, "transcode", False)
    W_skip = take(raw, "W_skip", "skip_connection").T if flag(raw, "skip_connection", "W_skip" in raw.arrays) else None
    rest = (take(raw, name) for name in ("encoder.bias", "W_dec", "b_dec"))
    weights = Weights(take(raw, "encoder.weight").T, *rest)._replace(W_skip=W_skip)
    d = integer(raw, config.get("d_in", weights.W_enc.shape[0]), "d_in")
    m = config.get("num_latents") or d * integer(raw, config.get("expansion_factor", 32), "expansion_factor")
    if weights.W_enc.shape != (d, integer(raw, m, "num_latents")):
        raise InputError(
            f"{raw.path}: its encoder has shape {weights.W_enc.shape[::-1]}, but {_CONFIG} says {m!r} latents of width "
            f"{d} (num_latents or expansion_factor, and d_in); download it again."
        )
    activation = make(integer(raw, config.get("k"), "k"))
    return assemble(raw, activation, weights, apply_b_dec_to_input=not transcoder, transcoder=transcoder)


def write(sae: SAE, path: Path) -> None:
    """Both files; an autoencoder gets the biases of one that subtracts `b_dec`."""
    refuse_unless("sparsify", sae, transcoder=True)
    kind = next((name for name, made in _ACTIVATIONS.items() if type(sae.activation) is made), None)
    if kind is None or sae.b_dec.size != sae.d:
        raise refuse("sparsify", type(sae.activation).__name__ if kind is None else "output of another width")
    sae = centre(sae, not sae.transcoder)
    config = {
        "activation": kind,
        "expansion_factor": 32,
        "normalize_decoder": True,
        "num_latents": sae.m,
        "k": fixed_k("sparsify", sae.activation),
        "multi_topk": False,
        "skip_connection": sae.W_skip is not None,
        "transcode": sae.transcoder,
        "d_in": sae.d,
    }
    arrays = {"encoder.weight": np.asarray(sae.W_enc).T, "encoder.bias": sae.b_enc, "W_dec": sae.W_dec}
    arrays |= {"b_dec": sae.b_dec} | ({} if sae.W_skip is None else {"W_skip": np.asarray(sae.W_skip).T})
    with atomic_directory(path) as folder:
        write_json(folder / _CONFIG, config)
        write_safetensors(folder / _WEIGHTS, arrays)
