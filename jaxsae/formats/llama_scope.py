"""Llama Scope (OpenMOSS): `hyperparams.json` and `checkpoints/final.safetensors`."""

import dataclasses
import math
from pathlib import Path
from typing import Any

import numpy as np

from jaxsae._core.files import atomic_directory
from jaxsae.autoencoder.activations import Activation, BatchTopK, JumpReLU, ReLU, TopK
from jaxsae.autoencoder.normalisation import AverageNorm, ConstantNorm
from jaxsae.autoencoder.sae import SAE
from jaxsae.data.origin import Origin
from jaxsae.formats import common
from jaxsae.formats.common import Raw, Tensors, Weights
from jaxsae.formats.tensors import read_safetensors

_CONFIG, _WEIGHTS = "hyperparams.json", "final.safetensors"


def _find(path: Path) -> tuple[Path | None, dict[str, Any]]:
    folder = path if path.is_dir() else path.parent
    folder = folder.parent if folder.name == "checkpoints" else folder
    place = folder / "checkpoints" if path.is_dir() and (folder / "checkpoints").is_dir() else path
    file = common.find_weights(place, _WEIGHTS, "sae_weights.safetensors")
    return file, common.find_config(folder / _CONFIG, _CONFIG, "config.json")


def detect(path: Path) -> bool:
    """A configuration with `d_model`, and safetensors of two linear layers."""
    file, config = _find(path)
    return "d_model" in config and {"encoder.weight", "decoder.weight"} <= common.array_names(file)


def read(path: Path) -> Raw:
    """Both files; later ones are named `config.json` and `sae_weights.safetensors`."""
    file, config = _find(path)
    file = common.require(path, file if config else None, f"{_CONFIG} and checkpoints/{_WEIGHTS}")
    return Raw(file, config, Tensors(read_safetensors(file)))


def convert(raw: Raw) -> SAE:
    """Fold in the scale of the rows, `s = √d / mean ‖x‖`, and that of a transcoder's output.

    The threshold in the file is for unscaled rows, that is, for pre-activations divided by `s`.
    """
    config = raw.config
    W_enc, W_dec = raw.take("encoder.weight").T, raw.take("decoder.weight").T
    biased = raw.flag("use_decoder_bias", True)
    b_dec = raw.take("decoder.bias", "use_decoder_bias") if biased else raw.zeros(W_dec.shape[-1])
    weights = Weights(W_enc, raw.take("encoder.bias"), W_dec, b_dec)
    raw.choice("use_glu_encoder", config.get("use_glu_encoder", False), [False])
    raw.choice("sae_type", config.get("sae_type", "sae"), ["sae"])
    transcoder = raw.is_elsewhere("hook_point_in", "hook_point_out")
    kinds = {"dataset-wise": AverageNorm(), "token-wise": ConstantNorm(), "inference": None}
    kind = config.get("norm_activation")
    kind = raw.choice("norm_activation", "dataset-wise" if kind is None else kind, kinds)
    norms, width = config.get("dataset_average_activation_norm"), math.sqrt(W_enc.shape[0])
    known = kind == "dataset-wise" and isinstance(norms, dict)
    into, out = (norms.get("in"), norms.get("out", norms.get("in"))) if known else (width, width)  # pyright: ignore[reportOptionalMemberAccess]
    scale, scale_out = (width / raw.positive(norm, "dataset_average_activation_norm") for norm in (into, out))
    apply_b_dec_to_input = raw.flag("apply_decoder_bias_to_pre_encoder", False)
    if apply_b_dec_to_input and (transcoder or scale != scale_out):
        raise raw.error("apply_decoder_bias_to_pre_encoder is true for a transcoder", "jaxsae cannot compute it")
    sae = common.assemble(
        raw,
        _activation(raw, W_dec, None if kind == "dataset-wise" and not known else scale),
        weights,
        apply_b_dec_to_input=apply_b_dec_to_input,
        transcoder=transcoder,
        normalisation=None if known else kinds[kind],
    )
    if config.get("d_sae") is None and "expansion_factor" in config:
        expansion = raw.positive(config["expansion_factor"], "expansion_factor")
        raw = raw._replace(config=config | {"d_sae": int(sae.d * expansion)})
    raw.require_sizes(d_model=sae.d, d_sae=sae.m)
    folded = {"W_enc": sae.W_enc * scale, "W_dec": sae.W_dec / scale_out, "b_dec": sae.b_dec / scale_out}
    return sae if scale == scale_out == 1 else dataclasses.replace(sae, **folded)


def _activation(raw: Raw, W_dec: np.ndarray, scale: float | None) -> Activation:
    """The activation, with thresholds for pre-activations of scaled rows; `scale` is None if unknown."""
    config = raw.config
    kind = raw.choice("act_fn", config.get("act_fn", "jumprelu"), ("jumprelu", "topk", "relu"))
    wide = np.promote_types(W_dec.dtype, np.float32)
    norms = np.ones(len(W_dec), wide)
    if raw.flag("sparsity_include_decoder_norm", False):  # latents are selected by `pre · ‖atom‖`
        norms = np.linalg.norm(W_dec.astype(wide), axis=1)
    if kind == "relu":
        return ReLU()
    if kind == "topk":
        if not np.allclose(norms, 1, rtol=1e-3):
            raise raw.error(
                "sparsity_include_decoder_norm is true for topk, and its atoms are not of norm 1",
                "jaxsae cannot compute it: scale the atoms to norm 1 first",
            )
        return TopK(raw.integer(config.get("top_k"), "top_k"))
    if "log_jumprelu_threshold" in raw.arrays:
        threshold = np.exp(raw.take("log_jumprelu_threshold").astype(wide))
    else:
        threshold = raw.number(config.get("jump_relu_threshold"), "jump_relu_threshold")
        if threshold and scale is None:
            what = "has no dataset_average_activation_norm, on which its threshold depends"
            raise raw.error(what, "fix its configuration")
        threshold = np.full(len(W_dec), threshold * (scale or 1), wide)
    if threshold.shape != norms.shape:
        raise raw.error(f"has {threshold.shape} thresholds for {len(norms)} latents")
    return JumpReLU(raw.place_threshold((threshold / np.where(norms > 0, norms, 1)).astype(wide)))


def write(sae: SAE, path: Path, origin: Origin) -> None:
    """Both files, for unscaled rows; the format has a single threshold for all latents."""
    common.refuse_unless("llama_scope", sae)
    sae, activation = common.centre(sae, False), sae.activation
    thresholds = np.zeros(1) if isinstance(activation, ReLU) else np.asarray(getattr(activation, "threshold", []))
    if not isinstance(activation, ReLU | JumpReLU | BatchTopK) or np.any(thresholds != thresholds.flat[0]):
        several = "more than one threshold" if isinstance(activation, JumpReLU) else type(activation).__name__
        raise common.refuse("llama_scope", several)
    config = {
        "d_model": sae.d,
        "d_sae": sae.m,
        "act_fn": "jumprelu",
        "jump_relu_threshold": float(thresholds.flat[0]),
        "use_decoder_bias": True,
        "apply_decoder_bias_to_pre_encoder": False,
        "sparsity_include_decoder_norm": False,
        "norm_activation": "dataset-wise",
        "dataset_average_activation_norm": {"in": math.sqrt(sae.d), "out": math.sqrt(sae.d)},
        "hook_point_in": common.site_name(origin) or "input",
        "hook_point_out": common.site_name(origin) or "input",
    }
    arrays = {"encoder.weight": np.asarray(sae.W_enc).T, "encoder.bias": sae.b_enc}
    arrays |= {"decoder.weight": np.asarray(sae.W_dec).T, "decoder.bias": sae.b_dec}
    with atomic_directory(path) as folder:
        (folder / "checkpoints").mkdir()
        common.write_json(folder / _CONFIG, config)
        common.write_safetensors(folder / "checkpoints" / _WEIGHTS, arrays)
