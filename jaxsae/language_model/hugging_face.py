"""Language models in Hugging Face directories."""

import json
import math
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from jaxsae._core.files import InputError
from jaxsae.language_model.config import Arrays, Config, _stack
from jaxsae.language_model.download import _EXPECTED

# Options of related models that must be at their neutral value.
_NEUTRAL = {
    **dict.fromkeys(("sliding_window", "no_rope_layers", "no_rope_layer_interval")),
    **dict.fromkeys(("final_logit_softcapping", "attn_logit_softcapping", "query_pre_attn_scalar", "clip_qkv")),
    **dict.fromkeys(("num_experts", "num_local_experts", "attention_multiplier", "quantization_config")),
    **dict.fromkeys(("use_qk_norm", "qk_layernorm", "use_parallel_residual", "attention_out_bias"), False),
    **dict.fromkeys(("partial_rotary_factor", "logit_scale", "logits_scaling"), 1),
    **dict.fromkeys(("embedding_multiplier", "residual_multiplier"), 1),
}
# Masks and frequencies, which are computed instead; the head, where it is the embedding.
_WITHOUT_EFFECT = re.compile(r"(.*\.)?(rotary_emb\.inv_freq|attn\.(masked_)?bias)|lm_head\.weight")
_LLAMA_NAMES = {
    "embedding.embedding": "model.embed_tokens.weight",
    "norm.scale": "model.norm.weight",
    "head.kernel": "lm_head.weight",
    "blocks.attention_norm.scale": "model.layers.{}.input_layernorm.weight",
    "blocks.q.kernel": "model.layers.{}.self_attn.q_proj.weight",
    "blocks.k.kernel": "model.layers.{}.self_attn.k_proj.weight",
    "blocks.v.kernel": "model.layers.{}.self_attn.v_proj.weight",
    "blocks.o.kernel": "model.layers.{}.self_attn.o_proj.weight",
    "blocks.mlp_norm.scale": "model.layers.{}.post_attention_layernorm.weight",
    "blocks.gate.kernel": "model.layers.{}.mlp.gate_proj.weight",
    "blocks.up.kernel": "model.layers.{}.mlp.up_proj.weight",
    "blocks.down.kernel": "model.layers.{}.mlp.down_proj.weight",
}


def _directory_config(path: Path) -> Config:
    """Sizes, and the family: the `model_type` of its config.json."""
    if not (path / "config.json").is_file():
        raise InputError(f"{path}: has no config.json; {_EXPECTED}.")
    options = json.loads((path / "config.json").read_text())
    kind = options.get("model_type")
    if kind not in FAMILIES:
        raise InputError(
            f"{path}: is of model type {kind!r}, expected {' or '.join(map(repr, FAMILIES))}; pass one of those."
        )
    try:
        config = FAMILIES[kind].config(options, path)._replace(family=kind)
    except KeyError as error:
        raise InputError(f"{path}: its config.json has no {error}; save the model again.") from error
    return config


def _read_directory(path: Path, dtype) -> tuple[Config, Arrays]:
    config = _directory_config(path)
    family = FAMILIES[config.family]
    files = {name.removeprefix(family.prefix): file for name, file in _open_shards(path).items()}
    names = {ours: name for ours, name in family.names.items() if ours != "head.kernel" or not config.tied}
    unused = set(files)

    def get(parameter: str, name: str) -> np.ndarray:
        if name not in files:
            raise InputError(f"{path}: has no tensor {name}; save the model again.")
        file = files[name]
        unused.discard(name)
        array = np.asarray(file.get_tensor(name if name in file.keys() else family.prefix + name))  # noqa: SIM118
        return array.T if parameter.endswith(".kernel") and family.transposed else array

    arrays = _stack(names, config.layers, get, dtype)
    if unused := {name for name in unused if not _WITHOUT_EFFECT.fullmatch(name)}:  # of further blocks, for example
        what = f"has tensors that a {config.family} of its config.json does not use: {min(unused)}"
        raise InputError(f"{path}: {what}; save it again.")
    return config, arrays


def _open_shards(path: Path) -> dict[str, Any]:
    """Open safetensors files, by the name of each tensor."""
    from safetensors import safe_open

    index = path / "model.safetensors.index.json"
    if index.is_file():
        if (path / "model.safetensors").is_file():
            raise InputError(f"{path}: has model.safetensors and {index.name}; remove the outdated one.")
        names = sorted(set(json.loads(index.read_text())["weight_map"].values()))
    else:
        names = ["model.safetensors"]
    opened = {}
    for name in names:
        if Path(name).name != name or not (path / name).is_file():
            raise InputError(f"{path / name}: no such file; a model has model.safetensors, or the shards of its index.")
        file = safe_open(path / name, framework="flax")  # which supports bfloat16
        if twice := opened.keys() & set(file.keys()):
            raise InputError(f"{path}: has {min(twice)} in two of its files; get the files again.")
        opened |= dict.fromkeys(file.keys(), file)
    return opened


def _refuse(options: dict[str, Any], expected: dict[str, Any], path: Path) -> None:
    """Refuse options whose values differ from the expected ones."""
    for name, value in expected.items():
        if options.get(name, value) != value:
            raise InputError(f"{path}: has {name} = {options[name]!r}, expected {value!r}; pass another model.")


def _llama_config(o: dict[str, Any], path: Path) -> Config:
    _refuse(o, {"hidden_act": "silu", "attention_bias": False, "mlp_bias": False} | _NEUTRAL, path)
    heads, width = o["num_attention_heads"], o["hidden_size"]
    head_width = o.get("head_dim") or width // heads
    # One dictionary since transformers 5, two fields before.
    rope: dict[str, Any] = {}
    for part in ({"rope_theta": o.get("rope_theta")}, o.get("rope_scaling") or {}, o.get("rope_parameters") or {}):
        for name, value in part.items():
            name = "rope_type" if name == "type" else name
            if value is not None:
                _refuse({name: value}, {name: rope.setdefault(name, value)}, path)
    rope = {"rope_theta": 10000.0} | rope
    return Config(
        vocab=o["vocab_size"],
        width=width,
        layers=o["num_hidden_layers"],
        heads=heads,
        kv_heads=o.get("num_key_value_heads") or heads,
        head_width=head_width,
        hidden=o["intermediate_size"],
        context=o["max_position_embeddings"],
        eps=o["rms_norm_eps"],
        tied=o.get("tie_word_embeddings", False),
        rope=_rope(rope, head_width, path),
    )


def _rope(o: dict[str, Any], head_width: int, path: Path) -> tuple[float, ...]:
    """Rotary frequencies in radians per position, for each pair of a head."""
    _refuse(o, {"partial_rotary_factor": 1.0}, path)
    if type(head_width) is not int or head_width % 2 or not 0 < head_width <= 1 << 16:
        raise InputError(f"{path}: has heads of width {head_width!r}, expected an even number; get the file again.")
    turns = o["rope_theta"] ** (-np.arange(0, head_width, 2) / head_width)
    kind = o.get("rope_type", o.get("type", "default"))
    if kind == "linear":
        turns /= o["factor"]
    elif kind == "llama3":  # slow pairs are stretched, fast ones are not, those in between are blended
        trained = o["original_max_position_embeddings"]
        low, high = o["low_freq_factor"], o["high_freq_factor"]
        blend = np.clip((trained * turns / (2 * math.pi) - low) / (high - low), 0, 1)
        turns = (1 - blend) * turns / o["factor"] + blend * turns
    elif kind != "default":
        raise InputError(f"{path}: has rotary positions of type {kind!r}, expected default, linear or llama3.")
    return tuple(turns.tolist())


def _gpt2_config(o: dict[str, Any], path: Path) -> Config:
    usual = {"activation_function": "gelu_new", "scale_attn_weights": True, "scale_attn_by_inverse_layer_idx": False}
    _refuse(o, usual | {"tie_word_embeddings": True, "add_cross_attention": False} | _NEUTRAL, path)
    width, heads = o["n_embd"], o["n_head"]
    return Config(
        vocab=o["vocab_size"],
        width=width,
        layers=o["n_layer"],
        heads=heads,
        kv_heads=heads,
        head_width=width // heads,
        hidden=o.get("n_inner") or 4 * width,
        context=o["n_positions"],
        eps=o["layer_norm_epsilon"],
        tied=True,
        rope=None,
    )


_GPT2_NAMES = {
    "embedding.embedding": "wte.weight",
    "positions.embedding": "wpe.weight",
    "norm.scale": "ln_f.weight",
    "norm.bias": "ln_f.bias",
    "blocks.attention_norm.scale": "h.{}.ln_1.weight",
    "blocks.attention_norm.bias": "h.{}.ln_1.bias",
    "blocks.qkv.kernel": "h.{}.attn.c_attn.weight",
    "blocks.qkv.bias": "h.{}.attn.c_attn.bias",
    "blocks.o.kernel": "h.{}.attn.c_proj.weight",
    "blocks.o.bias": "h.{}.attn.c_proj.bias",
    "blocks.mlp_norm.scale": "h.{}.ln_2.weight",
    "blocks.mlp_norm.bias": "h.{}.ln_2.bias",
    "blocks.up.kernel": "h.{}.mlp.c_fc.weight",
    "blocks.up.bias": "h.{}.mlp.c_fc.bias",
    "blocks.down.kernel": "h.{}.mlp.c_proj.weight",
    "blocks.down.bias": "h.{}.mlp.c_proj.bias",
}


class Family(NamedTuple):
    """How directories of a `model_type` are read."""

    config: Callable[[dict[str, Any], Path], Config]  # from config.json; refuses what our block does not compute
    names: dict[str, str]  # of our parameters in the files, `{}` the number of the block
    prefix: str = ""  # of every tensor, where the model was saved with a language-modelling head
    transposed: bool = True  # kernels are stored [out in]


FAMILIES = {
    "llama": Family(_llama_config, _LLAMA_NAMES),
    "gpt2": Family(_gpt2_config, _GPT2_NAMES, prefix="transformer.", transposed=False),
}
