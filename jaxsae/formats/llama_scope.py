"""Llama Scope (OpenMOSS): `hyperparams.json` and `checkpoints/final.safetensors`."""

import dataclasses
import math
from pathlib import Path
from typing import Any

import numpy as np

from jaxsae.activations import Activation, BatchTopK, JumpReLU, ReLU, TopK
from jaxsae.files import atomic_directory
from jaxsae.formats.common import (
    Raw,
    Weights,
    array_names,
    assemble,
    centre,
    choice,
    find_config,
    find_weights,
    integer,
    number,
    place_threshold,
    positive,
    refuse,
    refuse_unless,
    require,
    take,
    write_json,
    write_safetensors,
    zeros,
)
from jaxsae.normalisation import AverageNorm, ConstantNorm
from jaxsae.sae import SAE
from jaxsae.tensors import read_safetensors

_CONFIG, _WEIGHTS = "hyperparams.json", "final.safetensors"


def _find(path: Path) -> tuple[Path | None, dict[str, Any]]:
    folder = path if path.is_dir() else path.parent
    folder = folder.parent if folder.name == "checkpoints" else folder
    place = folder / "checkpoints" if path.is_dir() and (folder / "checkpoints").is_dir() else path
    file = find_weights(place, _WEIGHTS, "sae_weights.safetensors")
    return file, find_config(folder / _CONFIG, _CONFIG, "config.json")


def detect(path: Path) -> bool:
    """A configuration with `d_model`, and safetensors of two linear layers."""
    file, config = _find(path)
    return "d_model" in config and {"encoder.weight", "decoder.weight"} <= array_names(file)


def read(path: Path) -> Raw:
    """Both files; later ones are named `config.json` and `sae_weights.safetensors`."""
    file, config = _find(path)
    file = require(path, file if config else None, f"{_CONFIG} and checkpoints/{_WEIGHTS}")
    return Raw(file, config, read_safetensors(file))


def convert(raw: Raw) -> SAE:
    """Rows are scaled by `s = √d / mean ‖x‖`, which is folded in, and a transcoder's output by another.

    The threshold in the file is for rows as they are, that is for pre-activations divided by `s`.
    """
    config = raw.config
    W_enc, W_dec = take(raw, "encoder.weight").T, take(raw, "decoder.weight").T
    b_dec = take(raw, "decoder.bias") if config.get("use_decoder_bias", True) else zeros(raw, W_dec.shape[-1])
    weights = Weights(W_enc, take(raw, "encoder.bias"), W_dec, b_dec)
    transcoder = config.get("hook_point_out") not in (None, config.get("hook_point_in"))
    centred = bool(config.get("apply_decoder_bias_to_pre_encoder")) and not transcoder
    kinds = {"dataset-wise": AverageNorm(), "token-wise": ConstantNorm(), "inference": None}
    kind = choice(raw, "norm_activation", config.get("norm_activation") or "dataset-wise", kinds)
    norms, width = config.get("dataset_average_activation_norm"), math.sqrt(W_enc.shape[0])
    known = kind == "dataset-wise" and isinstance(norms, dict)
    into, out = (norms.get("in"), norms.get("out", norms.get("in"))) if known else (width, width)  # pyright: ignore[reportOptionalMemberAccess]
    scale, scale_out = (width / positive(raw, norm, "dataset_average_activation_norm") for norm in (into, out))
    sae = assemble(
        raw,
        _activation(raw, W_dec, scale),
        weights,
        centred=centred,
        transcoder=transcoder,
        normalisation=None if known else kinds[kind],
    )
    folded = {"W_enc": sae.W_enc * scale, "W_dec": sae.W_dec / scale_out, "b_dec": sae.b_dec / scale_out}
    return sae if scale == scale_out == 1 else dataclasses.replace(sae, **folded)


def _activation(raw: Raw, W_dec: np.ndarray, scale: float) -> Activation:
    config = raw.config
    kind = choice(raw, "act_fn", config.get("act_fn", "jumprelu"), ("jumprelu", "topk", "relu"))
    if kind == "relu":
        return ReLU()
    if kind == "topk":
        return TopK(integer(raw, config.get("top_k"), "top_k"))
    if "log_jumprelu_threshold" in raw.arrays:
        return JumpReLU(place_threshold(raw, np.exp(take(raw, "log_jumprelu_threshold").astype(np.float32))))
    threshold = scale * number(raw, config.get("jump_relu_threshold"), "jump_relu_threshold")
    thresholds = np.full(len(W_dec), threshold, np.float32)
    if config.get("sparsity_include_decoder_norm"):  # what is compared is `pre · ‖atom‖`
        norms = np.linalg.norm(W_dec.astype(np.float32), axis=1)
        thresholds = (thresholds / np.where(norms > 0, norms, 1)).astype(np.float32)
    return JumpReLU(place_threshold(raw, thresholds))


def write(sae: SAE, path: Path) -> None:
    """For rows as they are: scaled by 1. One threshold for all latents is all that the format has."""
    refuse_unless("llama_scope", sae)
    sae, activation = centre(sae, False), sae.activation
    thresholds = np.zeros(1) if isinstance(activation, ReLU) else np.asarray(getattr(activation, "threshold", []))
    if not isinstance(activation, ReLU | JumpReLU | BatchTopK) or np.any(thresholds != thresholds.flat[0]):
        several = "more than one threshold" if isinstance(activation, JumpReLU) else type(activation).__name__
        raise refuse("llama_scope", several)
    config = {
        "d_model": sae.d,
        "d_sae": sae.m,
        "act_fn": "jumprelu",
        "jump_relu_threshold": float(thresholds.flat[0]),
        "use_decoder_bias": True,
        "apply_decoder_bias_to_pre_encoder": False,
        "norm_activation": "dataset-wise",
        "dataset_average_activation_norm": {"in": math.sqrt(sae.d), "out": math.sqrt(sae.d)},
        "hook_point_in": "input",
        "hook_point_out": "input",
    }
    arrays = {"encoder.weight": np.asarray(sae.W_enc).T, "encoder.bias": sae.b_enc}
    arrays |= {"decoder.weight": np.asarray(sae.W_dec).T, "decoder.bias": sae.b_dec}
    with atomic_directory(path) as folder:
        (folder / "checkpoints").mkdir()
        write_json(folder / _CONFIG, config)
        write_safetensors(folder / "checkpoints" / _WEIGHTS, arrays)
