"""OpenAI: one `.pt`, a torch pickle of a state dict and of the activation's name and options."""

from pathlib import Path

import numpy as np

from jaxsae._core.files import atomic_file
from jaxsae.autoencoder.activations import ReLU, TopK
from jaxsae.autoencoder.normalisation import LayerNorm
from jaxsae.autoencoder.sae import SAE
from jaxsae.data.origin import Origin
from jaxsae.formats import common, torch_pickle
from jaxsae.formats.common import Raw, Tensors, Weights

_STATISTICS = ("stats_last_nonzero", "latents_activation_frequency", "latents_mean_square")
_OPTIONS: dict[str, set[str]] = {"ReLU": set(), "TopK": {"k", "postact_fn"}}


def detect(path: Path) -> bool:
    """A torch pickle with `pre_bias` and `latent_bias`."""
    file = common.find_torch(path)
    return file is not None and {"pre_bias", "latent_bias"} <= common.read_state(file, check=False)[0].keys()


def read(path: Path) -> Raw:
    """One `.pt`."""
    file = common.require(path, common.find_torch(path), "one .pt of OpenAI's")
    arrays, config = common.read_state(file, check=True)
    return Raw(file, config, Tensors(arrays))


def convert(raw: Raw) -> SAE:
    """Rows are layer-normalised if and only if the activation is TopK."""
    named = (raw.take("encoder.weight").T, raw.take("latent_bias"), raw.take("decoder.weight").T)
    weights = Weights(*named, raw.take("pre_bias"))
    raw.arrays.ignore(*_STATISTICS)
    kind = raw.choice("activation", raw.config.get("activation", "ReLU"), _OPTIONS)
    options = raw.config.get("activation_state_dict", {})
    options = options if isinstance(options, dict) else {"activation_state_dict": options}
    there = {*map(str, options), *raw.config} - {"activation", "activation_state_dict"}
    if unused := sorted(there - _OPTIONS[kind]):
        raise raw.error(f"holds {', '.join(unused)}, which {kind} of openai does not have", "name its activation")
    if kind == "ReLU":
        return common.assemble(raw, ReLU(), weights, apply_b_dec_to_input=True)
    raw.choice("postact_fn", options.get("postact_fn", "ReLU"), ["ReLU"])
    activation = TopK(raw.integer(options.get("k"), "k"))
    return common.assemble(raw, activation, weights, apply_b_dec_to_input=True, normalisation=LayerNorm())


def write(sae: SAE, path: Path, origin: Origin) -> None:
    """One `.pt`; the statistics of its latents, which are unknown, are zeros."""
    activation = sae.activation
    common.refuse_unless("openai", sae, normalised=(LayerNorm,))
    if not isinstance(activation, ReLU | TopK) or isinstance(activation, TopK) != (sae.normalisation is not None):
        how = "on" if sae.normalisation else "without"
        raise common.refuse("openai", f"{type(activation).__name__} {how} layer norm")
    if isinstance(sae.normalisation, LayerNorm) and sae.normalisation.eps != 1e-5:
        raise common.refuse("openai", f"layer norm with eps {sae.normalisation.eps}")
    sae = common.centre(sae, True)
    state = {
        "pre_bias": sae.b_dec,
        "latent_bias": sae.b_enc,
        "stats_last_nonzero": np.zeros(sae.m, np.int64),
        "latents_activation_frequency": np.zeros(sae.m, np.float32),
        "latents_mean_square": np.zeros(sae.m, np.float32),
        "encoder.weight": np.asarray(sae.W_enc).T,
        "decoder.weight": np.asarray(sae.W_dec).T,
        "activation": type(activation).__name__,
    }
    if isinstance(activation, TopK):
        state["activation_state_dict"] = {"k": common.fixed_k("openai", activation), "postact_fn": "ReLU"}
    with atomic_file(path) as temporary:
        torch_pickle.write(temporary, state)
