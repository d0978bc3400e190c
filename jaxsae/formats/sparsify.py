"""EleutherAI's sparsify: `cfg.json` and `sae.safetensors`; ReLU, then top-k or the maximum of groups."""

from pathlib import Path

import numpy as np

from jaxsae._core.files import atomic_directory
from jaxsae.autoencoder.activations import GroupMax, TopK
from jaxsae.autoencoder.sae import SAE
from jaxsae.data.origin import Origin
from jaxsae.formats import common
from jaxsae.formats.common import Raw, Tensors, Weights
from jaxsae.formats.tensors import read_safetensors

_CONFIG, _WEIGHTS = "cfg.json", "sae.safetensors"
_ACTIVATIONS = {"topk": TopK, "groupmax": GroupMax}


def detect(path: Path) -> bool:
    """A `cfg.json` with `k`, and the arrays of an encoder layer and a decoder matrix."""
    file = common.find_weights(path, _WEIGHTS)
    known = {"encoder.weight", "W_dec"} <= common.array_names(file)
    return file is not None and known and "k" in common.find_config(file, _CONFIG)


def read(path: Path) -> Raw:
    """Both files."""
    file = common.require(path, common.find_weights(path, _WEIGHTS), f"{_CONFIG} and {_WEIGHTS}")
    return Raw(file, common.require_config(file, _CONFIG), Tensors(read_safetensors(file)))


def convert(raw: Raw) -> SAE:
    """An autoencoder or a transcoder. The decoder is `[m d]` in the file already."""
    config = raw.config
    make = _ACTIVATIONS[raw.choice("activation", config.get("activation", "topk"), _ACTIVATIONS)]
    raw.choice("signed", config.get("signed", False), [False])
    transcoder = raw.flag("transcode", False)
    W_skip = raw.take("W_skip", "skip_connection").T if raw.flag("skip_connection", "W_skip" in raw.arrays) else None
    rest = (raw.take(name) for name in ("encoder.bias", "W_dec", "b_dec"))
    weights = Weights(raw.take("encoder.weight").T, *rest)._replace(W_skip=W_skip)
    d = raw.integer(config.get("d_in", weights.W_enc.shape[0]), "d_in")
    m = config.get("num_latents") or d * raw.integer(config.get("expansion_factor", 32), "expansion_factor")
    if weights.W_enc.shape != (d, raw.integer(m, "num_latents")):
        declared = f"{m!r} latents of width {d} (num_latents or expansion_factor, and d_in)"
        raise raw.error(f"its encoder has shape {weights.W_enc.shape[::-1]}, but {_CONFIG} says {declared}")
    activation = make(raw.integer(config.get("k"), "k"))
    return common.assemble(raw, activation, weights, apply_b_dec_to_input=not transcoder, transcoder=transcoder)


def write(sae: SAE, path: Path, origin: Origin) -> None:
    """Both files; an autoencoder is converted to subtract `b_dec`."""
    common.refuse_unless("sparsify", sae, transcoder=True)
    kind = next((name for name, made in _ACTIVATIONS.items() if type(sae.activation) is made), None)
    if kind is None or sae.b_dec.size != sae.d:
        raise common.refuse("sparsify", type(sae.activation).__name__ if kind is None else "output of another width")
    sae = common.centre(sae, not sae.transcoder)
    config = {
        "activation": kind,
        "expansion_factor": 32,
        "normalize_decoder": True,
        "num_latents": sae.m,
        "k": common.fixed_k("sparsify", sae.activation),
        "multi_topk": False,
        "skip_connection": sae.W_skip is not None,
        "transcode": sae.transcoder,
        "d_in": sae.d,
    }
    arrays = {"encoder.weight": np.asarray(sae.W_enc).T, "encoder.bias": sae.b_enc, "W_dec": sae.W_dec}
    arrays |= {"b_dec": sae.b_dec} | ({} if sae.W_skip is None else {"W_skip": np.asarray(sae.W_skip).T})
    with atomic_directory(path) as folder:
        common.write_json(folder / _CONFIG, config)
        common.write_safetensors(folder / _WEIGHTS, arrays)
