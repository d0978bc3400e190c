"""Language models in GGUF files."""

from pathlib import Path
from typing import Any

import numpy as np

from jaxsae._core.files import InputError
from jaxsae.language_model.config import Arrays, Config, _import, _stack
from jaxsae.language_model.download import _EXPECTED
from jaxsae.language_model.families import refuse, rope_turns

_GGUF_NAMES = {
    "embedding.embedding": "token_embd.weight",
    "norm.scale": "output_norm.weight",
    "head.kernel": "output.weight",
    "blocks.attention_norm.scale": "blk.{}.attn_norm.weight",
    "blocks.q.kernel": "blk.{}.attn_q.weight",
    "blocks.k.kernel": "blk.{}.attn_k.weight",
    "blocks.v.kernel": "blk.{}.attn_v.weight",
    "blocks.o.kernel": "blk.{}.attn_output.weight",
    "blocks.mlp_norm.scale": "blk.{}.ffn_norm.weight",
    "blocks.gate.kernel": "blk.{}.ffn_gate.weight",
    "blocks.up.kernel": "blk.{}.ffn_up.weight",
    "blocks.down.kernel": "blk.{}.ffn_down.weight",
}


_GGUF_READ = {  # fields that are read, or without effect
    *("attention.head_count", "attention.head_count_kv", "attention.key_length", "attention.layer_norm_rms_epsilon"),
    *("embedding_length", "feed_forward_length", "block_count", "context_length", "vocab_size", "tensor_data_layout"),
    *("rope.freq_base", "rope.scaling.type", "rope.scaling.factor", "rope.scaling.original_context_length"),
    "rope.scaling.finetuned",
}
_GGUF_SCALES = ("rope.scale_linear", "rope.scaling.attn_factor", "logit_scale", "residual_scale", "embedding_scale")


def _open_gguf(path: Path):
    gguf = _import("gguf")
    with open(path, "rb") as file:
        magic = file.read(4)
    if magic != b"GGUF":
        raise InputError(f"{path}: is not a GGUF file; {_EXPECTED}.")

    class Reader(gguf.GGUFReader):
        """Stops at the end of the file; gguf's own reader would follow a damaged length beyond it."""

        def _get(self, offset, dtype, count=1, *args, **options):
            found = super()._get(offset, dtype, count, *args, **options)
            if len(found) < count:
                raise ValueError(f"it ends before byte {offset + int(count) * found.itemsize}")
            return found

    reader = Reader(path)
    architecture = _field(reader, "general.architecture", path)
    if architecture != "llama":
        raise InputError(f"{path}: is of architecture {architecture!r}, expected 'llama'; pass a llama's GGUF file.")
    return reader


def _field(reader, name: str, path: Path, default: Any = None) -> Any:
    field = reader.get_field(name)
    if field is None and default is None:
        raise InputError(f"{path}: has no field {name}; get the file again, or convert it again.")
    return default if field is None else field.contents()


def _read_gguf(path: Path, dtype) -> tuple[Config, Arrays]:
    config, tensors = _gguf_config(path)
    dequantize = __import__("gguf.quants").quants.dequantize

    def get(parameter: str, name: str) -> np.ndarray:
        if name not in tensors:
            raise InputError(f"{path}: has no tensor {name}; get the file again.")
        tensor = tensors.pop(name)
        try:
            array = dequantize(tensor.data, tensor.tensor_type)
        except NotImplementedError as error:
            kind = f"quantised as {tensor.tensor_type.name}, which gguf cannot dequantise"
            raise InputError(f"{path}: {name} is {kind}; pass another.") from error
        if parameter in ("blocks.q.kernel", "blocks.k.kernel"):
            array = _halves(array, config.head_width)
        return array.T if parameter.endswith(".kernel") else array

    names = {parameter: name for parameter, name in _GGUF_NAMES.items() if name != "output.weight" or not config.tied}
    arrays = _stack(names, config, get, dtype)
    if unused := tensors.keys() - {"rope_freqs.weight"}:  # biases or experts, without which it would be another model
        raise InputError(f"{path}: has tensors that a llama does not use: {min(unused)}; pass another model.")
    return config, arrays


def _gguf_config(path: Path) -> tuple[Config, dict[str, Any]]:
    """Sizes, and tensors by their names, not yet read."""
    reader = _open_gguf(path)
    dequantize = __import__("gguf.quants").quants.dequantize
    tensors = {tensor.name: tensor for tensor in reader.tensors}

    def number(name, default=None) -> Any:
        return _field(reader, f"llama.{name}", path, default)

    heads, width = number("attention.head_count"), number("embedding_length")
    head_width = number("attention.key_length", width // heads)
    _refuse_unknown(reader, head_width, path)
    scaling = number("rope.scaling.type", "linear")  # llama.cpp's default if only a factor is given
    rope = {"rope_theta": number("rope.freq_base", 10000.0), "factor": number("rope.scaling.factor", 1.0)}
    rope = np.array(rope_turns(rope | {"rope_type": "default" if scaling == "none" else scaling}, head_width, path))
    if "rope_freqs.weight" in tensors:  # Llama 3's stretched context
        rope /= dequantize(tensors["rope_freqs.weight"].data, tensors["rope_freqs.weight"].tensor_type)
    config = Config(
        vocab=int(tensors["token_embd.weight"].shape[1]),
        width=width,
        layers=number("block_count"),
        heads=heads,
        kv_heads=number("attention.head_count_kv", heads),
        head_width=head_width,
        hidden=number("feed_forward_length"),
        context=number("context_length"),
        eps=number("attention.layer_norm_rms_epsilon"),
        tied="output.weight" not in tensors,
        rope=tuple(rope.tolist()),
    )
    return config, tensors


def _refuse_unknown(reader, head_width: int, path: Path) -> None:
    """Refuse fields that a llama does not have, or whose values it cannot have."""
    found = {name.removeprefix("llama."): field for name, field in reader.fields.items() if name.startswith("llama.")}
    others = {name: field.contents() for name, field in found.items() if name not in _GGUF_READ}
    heads = dict.fromkeys(("rope.dimension_count", "attention.value_length"), head_width)
    neutral = heads | {"attention.causal": True} | dict.fromkeys(_GGUF_SCALES, 1.0)
    unknown = [name for name, value in others.items() if value and name not in neutral]
    refuse(others, neutral | dict.fromkeys(unknown), path)


def _halves(rows: np.ndarray, head_width: int) -> np.ndarray:
    """Reorder rows of queries or keys: GGUF has rotated pairs side by side, the model half a head apart."""
    return rows.reshape(-1, head_width // 2, 2, rows.shape[1]).swapaxes(1, 2).reshape(rows.shape)


def _gguf_tokenizer(path: Path, reader, bos: bool):
    tokenizers = _import("tokenizers")
    from tokenizers import decoders, models, pre_tokenizers, processors

    model = _field(reader, "tokenizer.ggml.model", path)
    kind = model, _field(reader, "tokenizer.ggml.pre", path, "default")
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False)
    known = {
        ("gpt2", "gpt-2"): byte_level,
        ("gpt2", "smollm"): pre_tokenizers.Sequence([pre_tokenizers.Digits(individual_digits=True), byte_level]),
    }
    if kind not in known:
        what = f"has a tokenizer of model {kind[0]!r}, pre-tokenizer {kind[1]!r}, expected one of {sorted(known)}"
        raise InputError(f"{path}: {what}; use the model's Hugging Face directory.")
    tokens = _field(reader, "tokenizer.ggml.tokens", path)
    merges = [tuple(merge.split(" ")) for merge in _field(reader, "tokenizer.ggml.merges", path)]
    vocabulary = {token: i for i, token in enumerate(tokens)}
    for merge in merges:  # on a bad one, tokenizers would panic, past any `except`
        if len(merge) != 2 or not vocabulary.keys() >= {*merge, "".join(merge)}:
            raise InputError(
                f"{path}: has a merge that does not make a token: {' '.join(merge)!r}; get the file again."
            )
    tokenizer = tokenizers.Tokenizer(models.BPE(vocabulary, merges))
    tokenizer.pre_tokenizer, tokenizer.decoder = known[kind], decoders.ByteLevel()
    kinds = dict(zip(tokens, _field(reader, "tokenizer.ggml.token_type", path), strict=True))
    tokenizer.add_special_tokens([token for token, code in kinds.items() if code == 3])  # control
    tokenizer.add_tokens([token for token, code in kinds.items() if code == 4])  # user-defined: never split
    if bos or (
        reader.get_field("tokenizer.ggml.add_bos_token") and _field(reader, "tokenizer.ggml.add_bos_token", path)
    ):
        number = _field(reader, "tokenizer.ggml.bos_token_id", path)
        name = tokens[number]
        tokenizer.post_processor = processors.TemplateProcessing(single=f"{name} $A", special_tokens=[(name, number)])
    return tokenizer
