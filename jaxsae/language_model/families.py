"""The families of language models: for each, how its config.json becomes a `Config`, and the names of its tensors.

A new family is a function and a row of `FAMILIES`.
"""

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from jaxsae._core.files import InputError
from jaxsae.language_model.config import Config

# Options of related models that must be at their neutral value, unless the family reads them.
_NEUTRAL = {
    **dict.fromkeys(("sliding_window", "no_rope_layers", "no_rope_layer_interval", "layer_types")),
    **dict.fromkeys(("final_logit_softcapping", "attn_logit_softcapping", "query_pre_attn_scalar", "clip_qkv")),
    **dict.fromkeys(("num_experts", "num_local_experts", "attention_multiplier", "quantization_config")),
    **dict.fromkeys(("use_qk_norm", "qk_layernorm", "use_parallel_residual", "attention_out_bias"), False),
    **dict.fromkeys(("use_bidirectional_attention", "add_cross_attention"), False),
    **dict.fromkeys(("partial_rotary_factor", "logit_scale", "logits_scaling"), 1),
    **dict.fromkeys(("embedding_multiplier", "residual_multiplier"), 1),
}
_ACTIVATIONS = {
    **dict.fromkeys(("silu", "swish"), "silu"),
    **dict.fromkeys(("gelu_new", "gelu_pytorch_tanh", "gelu_fast"), "gelu_tanh"),
    "gelu": "gelu",
    "relu": "relu",
}


def refuse(options: dict[str, Any], expected: dict[str, Any], path: Path) -> None:
    """Refuse options whose values differ from the expected ones.

    Args:
      options: by name.
      expected: by name; one that `options` lacks, or has as None, is as expected.
      path: for the message.

    Raises:
      InputError: naming the first.
    """
    for name, value in expected.items():
        if options.get(name) not in (None, value):
            raise InputError(f"{path}: has {name} = {options[name]!r}, expected {value!r}; pass another model.")


# --- From config.json


def rope_turns(o: dict[str, Any], head_width: int, path: Path) -> tuple[float, ...]:
    """Rotary frequencies in radians per position, for each rotated pair of a head."""
    valid = type(head_width) is int and 0 < head_width <= 1 << 16
    rotated = int(head_width * o.get("partial_rotary_factor", 1.0)) if valid else 0
    if rotated % 2 or not 0 < rotated <= head_width:
        what = f"has heads of width {head_width!r}, of which positions rotate {rotated}"
        raise InputError(f"{path}: {what}, expected an even number; get the file again.")
    turns = o["rope_theta"] ** (-np.arange(0, rotated, 2) / rotated)
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


def _merged(path: Path, *parts: dict[str, Any] | None) -> dict[str, Any]:
    """The options of rotary positions: one dictionary since transformers 5, several fields before."""
    found: dict[str, Any] = {}
    for part in parts:
        for name, value in (part or {}).items():
            name = "rope_type" if name == "type" else name
            if value is not None:
                refuse({name: value}, {name: found.setdefault(name, value)}, path)
    return found


def _rope_of(o: dict[str, Any], head_width: int, path: Path, rotated: float | None) -> tuple[float, ...]:
    """Rotary frequencies, from wherever a configuration has them.

    `rotated` is the share of a head that is rotated unless the configuration says; None if it must be all.
    """
    names = {"rope_theta": ("rope_theta", "rotary_emb_base"), "partial_rotary_factor": ("rotary_pct",)}
    fields = [{ours: o.get(name)} for ours, theirs in names.items() for name in (ours, *theirs)]
    found = _merged(path, *fields, o.get("rope_scaling"), o.get("rope_parameters"))
    if rotated is None:
        refuse(found, {"partial_rotary_factor": 1.0}, path)
    return rope_turns({"rope_theta": 10000.0, "partial_rotary_factor": rotated or 1.0} | found, head_width, path)


def _windows(o: dict[str, Any], layers: int, local: Callable[[int], bool]) -> tuple[int | None, ...]:
    """By layer, the window of attention; `local` says which have it where `layer_types` does not."""
    size = o.get("sliding_window")
    kinds = o.get("layer_types") or ["sliding_attention" if local(i) else "full_attention" for i in range(layers)]
    return () if size is None else tuple(size if kind == "sliding_attention" else None for kind in kinds)


def _decoder(
    o: dict[str, Any],
    path: Path,
    *read: str,
    eps: str = "rms_norm_eps",
    tied: bool = False,
    rotated: float | None = None,
    **changes: Any,
) -> Config:
    """The configuration of a llama, and what differs from it.

    `read` are the options that the family reads itself, `eps` is its name for that; `rotated` is as of `_rope_of`.
    """
    refuse(o, {name: value for name, value in _NEUTRAL.items() if name not in read}, path)
    heads, width = o["num_attention_heads"], o["hidden_size"]
    head_width = changes.pop("head_width", None) or o.get("head_dim")
    if head_width is None and width % heads:
        raise InputError(f"{path}: has {heads} heads for a width of {width}, which they do not divide; get it again.")
    head_width = head_width or width // heads
    activation = changes.pop("activation", None) or o.get("hidden_act", "silu")
    if activation not in _ACTIVATIONS:
        raise InputError(f"{path}: has activation {activation!r}, expected one of: {', '.join(_ACTIVATIONS)}.")
    if kinds := set(o.get("layer_types") or ()) - {"sliding_attention", "full_attention"}:
        raise InputError(f"{path}: has layers of type {min(kinds)!r}, expected sliding_attention or full_attention.")
    c = Config(
        vocab=o["vocab_size"],
        width=width,
        layers=o["num_hidden_layers"],
        heads=heads,
        kv_heads=o.get("num_key_value_heads") or heads,
        head_width=head_width,
        hidden=o["intermediate_size"],
        context=o["max_position_embeddings"],
        eps=o[eps],
        tied=o.get("tie_word_embeddings", tied),
        rope=changes.pop("rope") if "rope" in changes else _rope_of(o, head_width, path, rotated),
        activation=_ACTIVATIONS[activation],
        biases=("q", "k", "v", "o") if o.get("attention_bias") else (),
    )
    return c._replace(**changes)


def _llama(o: dict[str, Any], path: Path) -> Config:
    c = _decoder(o, path)
    return c._replace(biases=(*c.biases, *(("gate", "up", "down") if o.get("mlp_bias") else ())))


def _mistral(o: dict[str, Any], path: Path) -> Config:
    windows = _windows({"sliding_window": 4096} | o, o["num_hidden_layers"], lambda i: True)
    return _decoder(o, path, "sliding_window", windows=windows)


_QWEN = ("sliding_window", "layer_types")


def _qwen2(o: dict[str, Any], path: Path) -> Config:
    return _decoder(o, path, *_QWEN, windows=_qwen_windows(o), biases=("q", "k", "v"))


def _qwen3(o: dict[str, Any], path: Path) -> Config:
    return _decoder(o, path, *_QWEN, windows=_qwen_windows(o), head_width=o.get("head_dim", 128), qk_norm="head")


def _qwen_windows(o: dict[str, Any]) -> tuple[int | None, ...]:
    if not o.get("use_sliding_window", False):
        return ()
    return _windows({"sliding_window": 4096} | o, o["num_hidden_layers"], lambda i: i >= o.get("max_window_layers", 28))


def _gemma2(o: dict[str, Any], path: Path) -> Config:
    return _gemma(o, path, local=lambda i: i % 2 == 0, caps=(50.0, 30.0))


def _gemma3(o: dict[str, Any], path: Path) -> Config:
    head_width, pattern = o.get("head_dim", 256), o.get("sliding_window_pattern", 6)
    whole = o.get("rope_parameters") or {}
    refuse(whole, dict.fromkeys(set(whole) - {"full_attention", "sliding_attention"}), path)
    far = _merged(path, {"rope_theta": o.get("rope_theta")}, o.get("rope_scaling"), whole.get("full_attention"))
    near = _merged(path, {"rope_theta": o.get("rope_local_base_freq")}, whole.get("sliding_attention"))
    return _gemma(
        o,
        path,
        local=lambda i: (i + 1) % pattern != 0,
        caps=(None, None),
        qk_norm="head",
        rope=rope_turns({"rope_theta": 1e6} | far, head_width, path),
        local_rope=rope_turns({"rope_theta": 1e4} | near, head_width, path),
    )


def _gemma(o: dict[str, Any], path: Path, *, local, caps, **changes: Any) -> Config:
    read = ("sliding_window", "layer_types", "query_pre_attn_scalar", "attn_logit_softcapping")
    return _decoder(
        o,
        path,
        *(*read, "final_logit_softcapping"),
        tied=True,
        activation=o.get("hidden_activation") or "gelu_pytorch_tanh",
        head_width=o.get("head_dim", 256),
        norms="around",
        scale=o.get("query_pre_attn_scalar", 256) ** -0.5,
        attention_cap=o.get("attn_logit_softcapping", caps[0]),
        logits_cap=o.get("final_logit_softcapping", caps[1]),
        embedding_scale=o["hidden_size"] ** 0.5,
        windows=_windows({"sliding_window": 4096} | o, o["num_hidden_layers"], local),
        **changes,
    )


def _gpt_neox(o: dict[str, Any], path: Path) -> Config:
    attention = ("q", "k", "v", "o") if o.get("attention_bias", True) else ()
    return _decoder(
        o,
        path,
        *("use_parallel_residual", "partial_rotary_factor"),
        activation=o.get("hidden_act", "gelu"),
        eps="layer_norm_eps",
        rotated=0.25,
        norm="layer",
        gated=False,
        parallel=o.get("use_parallel_residual", True),
        biases=(*attention, "up", "down"),
    )


def _olmo2(o: dict[str, Any], path: Path) -> Config:
    return _decoder(o, path, norms="after", qk_norm="all")


def _phi3(o: dict[str, Any], path: Path) -> Config:
    windows = _windows(o, o["num_hidden_layers"], lambda i: True)
    return _decoder(o, path, "sliding_window", "partial_rotary_factor", windows=windows, rotated=1.0)


def _gpt2(o: dict[str, Any], path: Path) -> Config:
    usual = {"scale_attn_weights": True, "scale_attn_by_inverse_layer_idx": False, "tie_word_embeddings": True}
    refuse(o, usual, path)
    names = {"num_attention_heads": "n_head", "hidden_size": "n_embd", "num_hidden_layers": "n_layer"}
    names |= {"max_position_embeddings": "n_positions"}
    activation = o.get("activation_function", "gelu_new")
    o = o | {theirs: o[name] for theirs, name in names.items()}
    o["intermediate_size"] = o.get("n_inner") or 4 * o["n_embd"]
    plain = {"rope": None, "norm": "layer", "gated": False, "biases": ("q", "k", "v", "o", "up", "down")}
    return _decoder(o, path, eps="layer_norm_epsilon", tied=True, activation=activation, **plain)


# --- The tensors of each


def _names(layer: str, maps: dict[str, str], norms: dict[str, str], **outside: str) -> dict[str, str]:
    """Names in the files, by our parameters; `{}` is the number of the block, and `|` separates names of one tensor.

    Biases that a model does not have are left out by who reads (`config._has`).
    """
    names = {ours.replace("_", "."): name for ours, name in outside.items()}
    for part, name in maps.items():
        names |= {f"blocks.{part}.kernel": f"{layer}{name}.weight", f"blocks.{part}.bias": f"{layer}{name}.bias"}
    for part, name in norms.items():
        names[f"blocks.{part}_norm.scale"] = f"{layer}{name}.weight"
        names[f"blocks.{part}_norm.bias"] = f"{layer}{name}.bias"
    return names


_OUTSIDE = {
    "embedding_embedding": "embed_tokens.weight",
    "norm_scale": "norm.weight",
    "head_kernel": "lm_head.weight",
}
_ATTENTION = {part: f"self_attn.{part}_proj" for part in "qkvo"}
_MLP = {part: f"mlp.{part}_proj" for part in ("gate", "up", "down")}
_BEFORE = {"attention": "input_layernorm", "mlp": "post_attention_layernorm"}
_AFTER = {"attention_post": "post_attention_layernorm", "mlp_post": "post_feedforward_layernorm"}
_QK = {"q": "self_attn.q_norm", "k": "self_attn.k_norm"}
_AROUND = {"attention": "input_layernorm", "mlp": "pre_feedforward_layernorm"} | _AFTER
_LLAMA = _names("layers.{}.", _ATTENTION | _MLP, _BEFORE, **_OUTSIDE)
_PHI3 = _names(
    "layers.{}.",
    {**dict.fromkeys("qkv", "self_attn.qkv_proj"), "o": "self_attn.o_proj"}
    | {**dict.fromkeys(("gate", "up"), "mlp.gate_up_proj"), "down": "mlp.down_proj"},
    _BEFORE,
    **_OUTSIDE,
)
_GPT_NEOX = _names(
    "layers.{}.",
    {**dict.fromkeys("qkv", "attention.query_key_value"), "o": "attention.dense"}
    | {"up": "mlp.dense_h_to_4h", "down": "mlp.dense_4h_to_h"},
    _BEFORE,
    embedding_embedding="embed_in.weight",
    norm_scale="final_layer_norm.weight",
    norm_bias="final_layer_norm.bias",
    head_kernel="embed_out.weight|lm_head.weight",
)
_GPT2 = _names(
    "h.{}.",
    {**dict.fromkeys("qkv", "attn.c_attn"), "o": "attn.c_proj", "up": "mlp.c_fc", "down": "mlp.c_proj"},
    {"attention": "ln_1", "mlp": "ln_2"},
    embedding_embedding="wte.weight",
    positions_embedding="wpe.weight",
    norm_scale="ln_f.weight",
    norm_bias="ln_f.bias",
)


# Several maps in one tensor, side by side along the last axis.


def _side_by_side(number: int):
    """The queries, keys or values."""

    def part(array: np.ndarray, c: Config) -> np.ndarray:
        ends = np.cumsum([0, c.heads, c.kv_heads, c.kv_heads]) * c.head_width
        return array[..., ends[number] : ends[number + 1]]

    return part


def _by_head(number: int):
    """The queries, keys or values, which are side by side for each head."""

    def part(array: np.ndarray, c: Config) -> np.ndarray:
        heads = array.reshape(*array.shape[:-1], c.heads, 3, c.head_width)
        return heads[..., number, :].reshape(*array.shape[:-1], -1)

    return part


def _half(number: int):
    """The gate, or the map beside it."""
    return lambda array, c: array[..., number * c.hidden : (number + 1) * c.hidden]


_QKV = {part: _side_by_side(number) for number, part in enumerate("qkv")}


class Family(NamedTuple):
    """How directories of a `model_type` are read.

    Attributes:
      config: from the options in config.json; refuses what `blocks.Block` does not compute.
      names: of our parameters in the files, see `_names`.
      prefix: of every tensor, where the model was saved with a language-modelling head.
      transposed: kernels are stored [out in].
      parts: of a tensor that holds several maps, by the map.
      norm_offset: added to the scales of norms.
    """

    config: Callable[[dict[str, Any], Path], Config]
    names: dict[str, str]
    prefix: str = "model."
    transposed: bool = True
    parts: dict[str, Callable[[np.ndarray, Config], np.ndarray]] = {}  # noqa: RUF012
    norm_offset: float = 0.0


FAMILIES = {
    "llama": Family(_llama, _LLAMA),
    "mistral": Family(_mistral, _LLAMA),
    "qwen2": Family(_qwen2, _LLAMA),
    "qwen3": Family(_qwen3, _names("layers.{}.", _ATTENTION | _MLP, _BEFORE | _QK, **_OUTSIDE)),
    "gemma2": Family(_gemma2, _names("layers.{}.", _ATTENTION | _MLP, _AROUND, **_OUTSIDE), norm_offset=1.0),
    "gemma3_text": Family(_gemma3, _names("layers.{}.", _ATTENTION | _MLP, _AROUND | _QK, **_OUTSIDE), norm_offset=1.0),
    "olmo2": Family(_olmo2, _names("layers.{}.", _ATTENTION | _MLP, _AFTER | _QK, **_OUTSIDE)),
    "phi3": Family(_phi3, _PHI3, parts=_QKV | {"gate": _half(0), "up": _half(1)}),
    "gpt_neox": Family(_gpt_neox, _GPT_NEOX, "gpt_neox.", parts={p: _by_head(n) for n, p in enumerate("qkv")}),
    "gpt2": Family(_gpt2, _GPT2, "transformer.", transposed=False, parts=_QKV),
}
