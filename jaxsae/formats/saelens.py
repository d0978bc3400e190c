"""SAELens: `cfg.json` and `sae_weights.safetensors`, of version 6 and earlier."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import ml_dtypes
import numpy as np

from jaxsae._core.files import atomic_directory
from jaxsae.autoencoder.activations import AbsTopK, Activation, BatchTopK, Gated, JumpReLU, MatchingPursuit, ReLU, TopK
from jaxsae.autoencoder.normalisation import AverageNorm, ConstantNorm, LayerNorm, Normalisation
from jaxsae.autoencoder.sae import SAE
from jaxsae.data.origin import Origin
from jaxsae.formats import common
from jaxsae.formats.common import Raw, Tensors, Weights
from jaxsae.formats.tensors import read_safetensors

_CONFIG, _WEIGHTS = "cfg.json", "sae_weights.safetensors"
_VERSION = "6.54.12"  # whose format is written
_NORMALISATIONS: dict[Any, Normalisation | None] = {
    "none": None,
    "expected_average_only_in": AverageNorm(),
    "constant_norm_rescale": ConstantNorm(),
    "layer_norm": LayerNorm(),
}
_DTYPES = {"float32": np.float32, "float64": np.float64, "float16": np.float16, "bfloat16": ml_dtypes.bfloat16}


def detect(path: Path) -> bool:
    """A `cfg.json` with `d_in` beside arrays that include `W_dec`, but not `encoder.weight`."""
    file = common.find_weights(path, _WEIGHTS)
    known = {"W_dec", "encoder.weight"} & common.array_names(file) == {"W_dec"}
    return file is not None and known and "d_in" in common.find_config(file, _CONFIG)


def read(path: Path) -> Raw:
    """Both files; entries of configurations before version 6 are renamed to those of later ones."""
    file = common.require(path, common.find_weights(path, _WEIGHTS), f"{_CONFIG} and {_WEIGHTS}")
    renamed = {"hook_point": "hook_name", "activation_fn_str": "activation_fn"}
    config = {renamed.get(name, name): value for name, value in common.require_config(file, _CONFIG).items()}
    if isinstance(config.get("normalize_activations"), bool | None):
        config["normalize_activations"] = "expected_average_only_in" if config.get("normalize_activations") else "none"
    raw = Raw(file, config, Tensors(read_safetensors(file)))
    return raw._replace(config={"architecture": "standard"} | config | _activation_fn(raw))


def _activation_fn(raw: Raw) -> dict[str, Any]:
    """The architecture, which configurations before version 6 give as an activation function."""
    config, options = raw.config, raw.config.get("activation_fn_kwargs") or {}
    name = raw.choice("activation_fn", config.get("activation_fn") or "relu", ("relu", "topk"))
    known = {"k", "signed"} if name == "topk" else set()
    if not isinstance(options, dict) or options.keys() - known or options.get("signed"):
        raise raw.error(f"activation_fn_kwargs is {options} for {name}", "jaxsae cannot compute it")
    if name == "relu":
        return {}
    raw.choice("architecture", config.get("architecture", "standard"), ("standard", "topk"))
    k = raw.integer(options.get("k", config.get("k")), "k")
    raw.require_sizes(k=k)
    return {"architecture": "topk", "k": k}


def convert(raw: Raw) -> SAE:
    """An autoencoder or a transcoder."""
    config = raw.config
    kind = raw.choice("architecture", config["architecture"], _ACTIVATIONS)
    _require_known_options(raw, kind)
    dtype = raw.choice("dtype", str(config.get("dtype", "float32")).removeprefix("torch."), _DTYPES)
    raw = raw._replace(dtype=raw.dtype or _DTYPES[dtype])
    raw.choice("reshape_activations", config.get("reshape_activations") or "none", ("none", "hook_z"))
    norm = raw.choice("normalize_activations", config["normalize_activations"], _NORMALISATIONS)
    transcoder = kind.endswith("transcoder")
    apply_b_dec_to_input = raw.flag("apply_b_dec_to_input", not transcoder)
    if apply_b_dec_to_input and transcoder:
        raise raw.error("apply_b_dec_to_input is true for a transcoder", "set it to false")
    weights = _weights(raw, kind)
    if raw.flag("rescale_acts_by_decoder_norm", False):
        weights = common.fold_norms(weights)
    if kind == "matching_pursuit" and not apply_b_dec_to_input:  # b_dec is added only if it was subtracted
        weights = weights._replace(b_dec=np.zeros_like(weights.b_dec))
    conventions = {"apply_b_dec_to_input": apply_b_dec_to_input, "transcoder": transcoder}
    sae = common.assemble(raw, _ACTIVATIONS[kind](raw), weights, **conventions, normalisation=_NORMALISATIONS[norm])
    raw.require_sizes(d_in=sae.d, d_sae=sae.m, d_out=sae.b_dec.size)
    return sae


def _require_known_options(raw: Raw, kind: str) -> None:
    """Refuse options of other architectures: dropping them would change the result."""
    known = next((options for name, options in _OPTIONS.items() if name in kind), ())
    for name in {each for options in _OPTIONS.values() for each in options}.difference(known):
        if raw.config.get(name) not in (None, False):
            do = f"name its architecture, or remove {name}"
            raise raw.error(f"has {name}, which the architecture {kind!r} does not have", do)


def _weights(raw: Raw, kind: str) -> Weights:
    W_dec = raw.take("W_dec")
    if W_dec.ndim != 2:
        raise raw.error(f"W_dec has shape {W_dec.shape}, expected two axes")
    W_enc = W_dec.T if kind == "matching_pursuit" else raw.take("W_enc")
    b_enc = raw.zeros(len(W_dec)) if kind in ("gated", "matching_pursuit") else raw.take("b_enc")
    W_skip = raw.take("W_skip").T if "skip" in kind else None
    finetuned = raw.flag("finetuning_scaling_factor", False)
    if "scaling_factor" in raw.arrays:  # ones if it was added without finetuning
        factor = raw.take("scaling_factor")
        if factor.shape != (len(W_dec),) or not (finetuned or np.all(factor == 1)):
            do = "set finetuning_scaling_factor, or remove it"
            raise raw.error("has a scaling_factor that its configuration does not use", do)
        W_dec = W_dec if np.all(factor == 1) else W_dec * factor[:, None]
    elif finetuned:
        raw.take("scaling_factor", "finetuning_scaling_factor")
    return Weights(W_enc, b_enc, W_dec, raw.take("b_dec"), W_skip)


def _jumprelu(raw: Raw) -> Activation:
    """JumpReLU, or BatchTopK if it was trained as such and has the same threshold for all latents."""
    log = "threshold" not in raw.arrays and "log_threshold" in raw.arrays  # as during training
    threshold = np.exp(raw.take("log_threshold")) if log else raw.take("threshold")
    metadata = raw.config.get("metadata")
    metadata = metadata if isinstance(metadata, dict) else {}
    details = metadata.get("training_architecture_details")
    k = details.get("k") if isinstance(details, dict) else None
    trained = k is not None and "batchtopk" in str(metadata.get("training_architecture"))
    whole = threshold.size and threshold.shape == raw.take("b_enc").shape
    if trained and whole and np.all(threshold == threshold[0]):
        return BatchTopK(raw.mean_k(k), raw.place_threshold(threshold[:1].reshape(())))
    return JumpReLU(raw.place_threshold(threshold))


def _batch_topk(raw: Raw) -> Activation:
    return BatchTopK(raw.mean_k(raw.config.get("k")), raw.place_threshold(raw.take_one("topk_threshold")))


def _matching_pursuit(raw: Raw) -> Activation:
    steps = raw.config.get("max_iterations")
    return MatchingPursuit(
        jnp.asarray(raw.number(raw.config.get("residual_threshold", 0.01), "residual_threshold"), jnp.float32),
        None if steps is None else raw.integer(steps, "max_iterations"),
        raw.flag("stop_on_duplicate_support", True),
    )


_ACTIVATIONS: dict[str, Callable[[Raw], Activation]] = {
    "standard": lambda raw: ReLU(),
    "topk": lambda raw: TopK(raw.integer(raw.config.get("k"), "k")),
    "abstopk": lambda raw: AbsTopK(raw.integer(raw.config.get("k"), "k")),
    "jumprelu": _jumprelu,
    "gated": lambda raw: raw.gated("r_mag", "b_gate", "b_mag"),
    "batchtopk": _batch_topk,
    "matryoshka_batchtopk": _batch_topk,
    "transcoder": lambda raw: ReLU(),
    "skip_transcoder": lambda raw: ReLU(),
    "jumprelu_transcoder": _jumprelu,
    "jumprelu_skip_transcoder": _jumprelu,
    "matching_pursuit": _matching_pursuit,
}


# Options of some architectures only, by a part of their names; the first match counts.
_OPTIONS = {
    "abstopk": ("k", "rescale_acts_by_decoder_norm"),
    "batchtopk": ("k", "rescale_acts_by_decoder_norm"),
    "topk": ("k", "rescale_acts_by_decoder_norm"),
    "jumprelu": ("k",),  # of one trained as BatchTopK
    "matching_pursuit": ("residual_threshold", "max_iterations", "stop_on_duplicate_support"),
}


def write(sae: SAE, path: Path, origin: Origin) -> None:
    """As SAELens saves for inference: BatchTopK is a JumpReLU whose metadata name its training architecture."""
    if isinstance(sae.normalisation, LayerNorm) and sae.normalisation.eps != 1e-5:
        raise common.refuse("saelens", f"layer norm with eps {sae.normalisation.eps}")
    if sae.W_skip is not None and not sae.transcoder:
        raise common.refuse("saelens", "skip connection outside transcoders")
    sae = common.centre(sae, False) if sae.transcoder else sae
    kind, options, arrays = _written_activation(sae)
    place = {"model_name": origin.model, "hook_name": common.site_name(origin), "context_size": origin.context}
    place |= {"dataset_path": origin.data, "hook_name_out": common.site_name(origin, target=True)}
    metadata = options.pop("metadata", {}) | {name: value for name, value in place.items() if value is not None}
    metadata |= {"sae_lens_version": _VERSION, "sae_lens_training_version": None}
    normalisation = next(name for name, value in _NORMALISATIONS.items() if type(value) is type(sae.normalisation))
    config = {
        "d_in": sae.d,
        "d_sae": sae.m,
        "dtype": str(sae.W_dec.dtype),
        "device": "cpu",
        "apply_b_dec_to_input": sae.apply_b_dec_to_input,
        "normalize_activations": normalisation,
        "reshape_activations": "none",
        "metadata": metadata,
        **options,
        "architecture": kind,
    }
    weights = {"W_enc": sae.W_enc, "b_enc": sae.b_enc, "W_dec": sae.W_dec, "b_dec": sae.b_dec} | arrays
    weights = {name: value for name, value in weights.items() if value is not None}
    with atomic_directory(path) as folder:
        common.write_json(folder / _CONFIG, config)
        common.write_safetensors(folder / _WEIGHTS, weights)


def _written_activation(sae: SAE) -> tuple[str, dict[str, Any], dict[str, Any]]:
    """Architecture, options, and arrays to add or, where None, to leave out."""
    activation, transcoder = sae.activation, sae.transcoder
    threshold = np.zeros(sae.m, np.float32)
    match activation:
        case ReLU():
            kind, options, arrays = "standard", {}, {}
        case TopK() if not transcoder:
            k = common.fixed_k("saelens", activation)
            kind, options, arrays = "topk", {"k": k, "rescale_acts_by_decoder_norm": False}, {}
        case AbsTopK() if not transcoder:
            kind, options, arrays = "abstopk", {"k": activation.k, "rescale_acts_by_decoder_norm": False}, {}
        case JumpReLU():
            kind, options, arrays = "jumprelu", {}, {"threshold": activation.threshold}
        case BatchTopK():
            details = {"k": activation.k}
            trained = {"training_architecture": "batchtopk", "training_architecture_details": details}
            arrays = {"threshold": threshold + np.asarray(activation.threshold)}
            kind, options = "jumprelu", {"metadata": trained}
        case Gated() if not transcoder:
            b_gate, b_mag = common.gate_biases(sae)
            arrays = {"r_mag": activation.r_mag, "b_gate": b_gate, "b_mag": b_mag, "b_enc": None}
            kind, options = "gated", {}
        case MatchingPursuit() if not transcoder:
            options = {
                "residual_threshold": float(activation.residual_threshold),
                "max_iterations": activation.max_steps,
                "stop_on_duplicate_support": activation.stop_on_duplicate,
            }
            kind, arrays = "matching_pursuit", {"W_enc": None, "b_enc": None}
        case _:
            kind = "transcoders" if transcoder else "autoencoders"
            raise common.refuse("saelens", f"{kind} of {type(activation).__name__}")
    if not transcoder:
        return kind, options, arrays
    kind = ("" if kind == "standard" else f"{kind}_") + ("" if sae.W_skip is None else "skip_") + "transcoder"
    skip = {} if sae.W_skip is None else {"W_skip": np.asarray(sae.W_skip).T}
    return kind, options | {"d_out": sae.b_dec.size}, arrays | skip
