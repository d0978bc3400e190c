"""What holds for every format: any memory order goes in, all that is in a file counts, and the rest is refused."""

import dataclasses
import json
import tempfile
from pathlib import Path

import hypothesis
import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
import safetensors.numpy
from foreign import D, K, M, arrays
from hypothesis import strategies as st
from problems import assert_same_bits, refused

import jaxsae
from jaxsae import pretrained
from jaxsae._core import pytrees
from jaxsae._core.files import InputError
from jaxsae.autoencoder import activations, normalisation
from jaxsae.data import shards
from jaxsae.formats import torch_pickle
from jaxsae.formats.tensors import writable
from jaxsae.train import checkpoint

WRITTEN = [name for name, row in pretrained.FORMATS.items() if row.write]
per_format = pytest.mark.parametrize("format", WRITTEN)
pytestmark = pytest.mark.usefixtures("unchecked")  # numpy's arrays, where annotations want jax's


def an_sae(format, dtype=np.float32):
    """One that a format can say, its leaves numpy's, and its weights such that a permutation changes them."""
    rng = np.random.default_rng(0)
    gates = [rng.normal(size=M).astype(dtype) for _ in range(3)]
    threshold = np.linspace(0.1, 1, M).astype(np.promote_types(dtype, np.float32))
    jump, norm = jaxsae.JumpReLU(threshold), None
    activation = {
        "jaxsae": activations.Gated(*gates),
        "saelens": activations.Gated(*gates),
        "sparsify": jaxsae.TopK(K),
        "openai": jaxsae.TopK(K),
        "llama_scope": jaxsae.JumpReLU(np.full_like(threshold, 0.5)),
    }.get(format, jump)
    weights = {name: array.astype(dtype) for name, array in arrays().items() if name != "W_skip"}
    if format == "openai":
        norm = normalisation.LayerNorm()
    if format == "saelens":
        weights["b_enc"] = np.zeros(M, dtype)  # which it has in the gates' biases
    apply_b_dec_to_input = not isinstance(activation, jaxsae.JumpReLU)
    return jaxsae.SAE(**weights, activation=activation, normalisation=norm, apply_b_dec_to_input=apply_b_dec_to_input)


def save(sae, folder, format):
    path = folder / ("sae.pt" if format == "openai" else "sae")
    pretrained.save(sae, path, format=format)
    return path


# --- memory


def strided(array):
    wide = np.zeros((*array.shape[:-1], 2 * array.shape[-1]), array.dtype)
    wide[..., ::2] = array
    return wide[..., ::2]


class Tensor:
    """As torch's: an array by its protocol."""

    def __init__(self, array):
        self.array, self.dtype, self.shape = array, array.dtype, array.shape

    def __array__(self, dtype=None, copy=None):
        return self.array


LAYOUTS = {
    "row by row": np.ascontiguousarray,
    "column by column": np.asfortranarray,
    "backwards": lambda array: np.flip(np.flip(array).copy()),
    "with gaps": strided,
    "read only": lambda array: np.broadcast_to(array, (2, *array.shape))[1],
    "big-endian": lambda array: array.astype(array.dtype.newbyteorder(">")),
    "jax's": jnp.asarray,
    "another library's": Tensor,
}


@per_format
def test_every_format_writes_every_layout_of_memory(format, tmp_path):
    sae = an_sae(format)
    for layout, change in LAYOUTS.items():
        again = pretrained.load(save(jax.tree.map(change, sae), tmp_path / layout, format))
        assert jax.tree.structure(again) == jax.tree.structure(sae), layout
        for (path, got), right in zip(jax.tree.leaves_with_path(again), jax.tree.leaves(sae), strict=True):
            np.testing.assert_array_equal(got, right, err_msg=f"{layout} {jax.tree_util.keystr(path)}")


@per_format
@pytest.mark.parametrize("dtype", [np.float16, ml_dtypes.bfloat16, np.float64])
def test_every_format_writes_every_dtype(format, dtype, tmp_path, x64):
    sae = an_sae(format, dtype)
    again = pretrained.load(save(jax.tree.map(np.asfortranarray, sae), tmp_path, format))
    assert_same_bits(again, sae)
    assert again.W_dec.dtype == (np.promote_types(dtype, np.float32) if format == "gemma_scope" else dtype)


def test_what_writes_arrays_takes_every_layout(tmp_path):
    array = arrays()["W_enc"]
    for number, (layout, change) in enumerate(LAYOUTS.items()):
        state = {"W": change(array), "one": change(np.float32(2.5).reshape(1)), "number": 1.5}
        with checkpoint.Checkpoints(tmp_path / f"{number}", config={}) as checkpoints:
            checkpoints.save(1, state, progress={}, wait=True)
            found = checkpoints.restore({"W": jnp.zeros((D, M)), "one": jnp.zeros(1), "number": jnp.zeros(())})
        assert_same_bits(found.state, {"W": array, "one": [2.5], "number": 1.5})
        if layout == "another library's":
            continue
        rows = shards.Writer(tmp_path / f"rows{number}", width=M, dtype="float32", source={})
        rows.append(change(array), tokens=change(np.arange(D)))
        assert_same_bits(np.asarray(shards.open_rows(tmp_path / f"rows{number}")[np.arange(D)]), array)
        assert_same_bits(shards.column(tmp_path / f"rows{number}", "tokens"), np.arange(D))
        if isinstance(state["W"], np.ndarray):
            torch_pickle.write(tmp_path / "x.pt", {"W": state["W"]})
            assert_same_bits(torch_pickle.read(tmp_path / "x.pt")["W"], array)


def test_a_number_in_the_place_of_an_array_is_one(tmp_path):
    weights = {name: array for name, array in arrays().items() if name != "W_skip"}
    for number, activation in enumerate(
        [jaxsae.BatchTopK(3), jaxsae.BatchTopK(3, 1), activations.MatchingPursuit(), jaxsae.TopK(3, keep=2)]
    ):
        again = pretrained.load(save(jaxsae.SAE(**weights, activation=activation), tmp_path / str(number), "jaxsae"))
        assert again.activation == activation
        assert {leaf.dtype for leaf in jax.tree.leaves(again)} == {jnp.dtype("float32")}
    assert writable([[1.0, 2.0]]).dtype == np.float32


# --- what cannot be saved


@pytrees.dataclass
class Squared(jaxsae.autoencoder.activations.Activation):
    def __call__(self, pre):
        return jnp.maximum(pre, 0) ** 2


@pytrees.dataclass
class Halved(jaxsae.TopK):
    """A subclass of one of our activations, which must not be saved as that."""

    def __call__(self, pre):
        return super().__call__(pre) / 2


@pytrees.dataclass
class Doubled(normalisation.LayerNorm):
    def __call__(self, x):
        return super().__call__(2 * x)


ReLU = pytrees.dataclass(type("ReLU", (Squared,), {}))  # of the name of one of ours


def deleted():
    array = jnp.ones(M)
    array.delete()
    return array


UNSAVED = {
    "a class of the user's": ({"activation": Squared()}, "the activation Squared.*expected one of: ReLU, TopK"),
    "one made from ours": ({"activation": Halved(3)}, "the activation Halved"),
    "one named as ours": ({"activation": ReLU()}, "the activation ReLU"),
    "a normalisation of the user's": ({"normalisation": Doubled()}, "the normalisation Doubled.*LayerNorm"),
    "a bias of another size": ({"b_enc": np.zeros(M + 1, np.float32)}, r"b_enc of shape \(13,\) for 12 latents"),
    "no bias": ({"b_dec": None}, "b_dec holds object"),
    "an axis too many": ({"b_dec": np.zeros((1, D), np.float32)}, r"b_dec of shape \(1, 6\)"),
    "a threshold of another size": ({"activation": jaxsae.JumpReLU(np.ones(3))}, r"threshold of shape \(3,\)"),
    "more than there are": ({"activation": jaxsae.TopK(M + 1)}, "k is 13, which does not fit 12 latents"),
    "groups that do not fit": ({"activation": activations.GroupMax(5)}, "k is 5, which does not fit"),
    "whole numbers": ({"W_enc": np.ones((D, M), int)}, "W_enc of int64, expected floating point"),
    "truths": ({"b_enc": np.ones(M, bool)}, "b_enc of bool, expected floating point"),
    "complex numbers": ({"b_enc": np.ones(M, complex)}, "b_enc holds complex128, expected one of"),
    "long numbers": ({"b_enc": np.ones(M, np.longdouble)}, "b_enc holds"),
    "text": ({"b_enc": np.array(["a"] * M)}, "b_enc holds"),
    "a mask": ({"b_enc": np.ma.masked_array(np.ones(M), mask=np.arange(M) < 3)}, "b_enc is masked"),
    "a shape alone": ({"b_enc": jax.ShapeDtypeStruct((M,), np.float32)}, "b_enc is abstract, without values"),
    "what was given away": ({"b_enc": deleted()}, "b_enc is a .* that numpy cannot read"),
}


@pytest.mark.parametrize("case", UNSAVED)
def test_what_no_file_can_say_is_refused_by_every_format_in_one_line(case, tmp_path):
    changes, message = UNSAVED[case]
    for format in WRITTEN:
        refused(message, save, dataclasses.replace(an_sae(format), **changes), tmp_path, format)
    assert list(tmp_path.iterdir()) == []


@per_format
def test_saes_that_are_stacked_or_traced_are_refused(format, tmp_path):
    stacked = jax.tree.map(lambda leaf: np.stack([leaf, leaf]), an_sae(format))
    with pytest.raises(InputError, match=r"pass one SAE: from a stack, take jax.tree.map"):
        save(stacked, tmp_path, format)
    with pytest.raises(InputError, match="abstract, without values"):
        jax.eval_shape(lambda sae: save(sae, tmp_path, format), an_sae(format))
    with pytest.raises(InputError, match="got a dict to save, expected an SAE"):
        save({}, tmp_path, format)
    assert list(tmp_path.iterdir()) == []


def test_a_training_run_is_not_replaced_by_an_sae(tmp_path):
    pretrained.save(an_sae("jaxsae"), tmp_path / "run" / "sae")
    with pytest.raises(InputError, match="exists and is not a saved SAE"):
        pretrained.save(an_sae("jaxsae"), tmp_path / "run")
    assert_same_bits(pretrained.load(tmp_path / "run"), an_sae("jaxsae"))


def test_a_transcoder_that_subtracts_its_bias_is_written_as_it_computes(tmp_path):
    sae = dataclasses.replace(an_sae("jaxsae"), activation=jaxsae.ReLU(), transcoder=True)
    x = np.random.default_rng(1).normal(size=(5, D)).astype(np.float32)
    for format in ("jaxsae", "saelens", "sparsify", "gemma_scope_2"):
        sae = dataclasses.replace(sae, activation=jaxsae.TopK(K) if format == "sparsify" else jaxsae.ReLU())
        again = pretrained.load(save(sae, tmp_path / format, format))
        np.testing.assert_allclose(jaxsae.encode_dense(again, x), jaxsae.encode_dense(sae, x), atol=1e-5)
    wide = dataclasses.replace(sae, b_dec=np.zeros(D + 1, "f4"), W_dec=np.zeros((M, D + 1), "f4"))
    with pytest.raises(InputError, match="subtracts b_dec, 7 wide, from rows 6 wide"):
        save(wide, tmp_path / "wide", "jaxsae")


# --- what is in a file counts

WEIGHTS = {
    "jaxsae": "sae.safetensors",
    "saelens": "sae_weights.safetensors",
    "sparsify": "sae.safetensors",
    "gemma_scope": "params.npz",
    "gemma_scope_2": "params.safetensors",
    "dictionary_learning": "ae.pt",
    "llama_scope": "checkpoints/final.safetensors",
}
CONFIG = {
    "jaxsae": "sae.json",
    "saelens": "cfg.json",
    "sparsify": "cfg.json",
    "gemma_scope_2": "config.json",
    "dictionary_learning": "config.json",
    "llama_scope": "hyperparams.json",
}


OTHER = ("activation", "activation_state_dict")  # beside the arrays


def edit(path, format, change=None, **config):
    """Change the arrays of a saved SAE, and entries of its configuration; None removes one."""
    file = path if format == "openai" else path / WEIGHTS[format]
    if change:
        if file.suffix == ".pt":
            content = {
                name: np.copy(value) if name not in OTHER else value for name, value in torch_pickle.read(file).items()
            }
            torch_pickle.write(file, change(content))
        elif file.suffix == ".npz":
            with np.load(file) as stored:
                content = change(dict(stored))
            np.savez(file, **content)
        else:
            content = change(safetensors.numpy.load_file(file))
            safetensors.numpy.save_file({name: writable(array) for name, array in content.items()}, file)
    if config:
        file = path / CONFIG[format]
        outer = json.loads(file.read_text())
        inner = outer["trainer"] if format == "dictionary_learning" else outer
        inner |= config
        for name in [name for name, value in config.items() if value is None]:
            del inner[name]
        file.write_text(json.dumps(outer))


@per_format
def test_an_array_that_is_not_used_is_refused_by_name(format, tmp_path):
    path = save(an_sae(format), tmp_path, format)
    for name in ("threshold_2", "b_gate_2"):
        edit(path, format, lambda content, name=name: content | {name: np.ones(M, np.float32)})
        with pytest.raises(InputError, match=name) as caught:
            pretrained.load(path, format=format)
        assert str(caught.value).startswith(str(path))
        edit(path, format, lambda content, name=name: {each: content[each] for each in content if each != name})
    assert_same_bits(pretrained.load(path), an_sae(format))


SIZES = {
    "jaxsae": ("d", "m", "d_out"),
    "saelens": ("d_in", "d_sae", "d_out"),
    "sparsify": ("d_in", "num_latents", "k"),
    "gemma_scope_2": ("width",),
    "dictionary_learning": ("activation_dim", "dict_size"),
    "llama_scope": ("d_model", "d_sae"),
}


@pytest.mark.parametrize("format", SIZES)
def test_a_size_that_contradicts_the_weights_is_refused_by_name(format, tmp_path):
    path = save(an_sae(format), tmp_path, format)
    for name in SIZES[format]:
        for value in (M + 1, -1, 2.5, "6", True, [6]):
            edit(path, format, **{name: value})
            with pytest.raises(InputError, match=name):
                pretrained.load(path, format=format)
        pretrained.save(an_sae(format), path, format=format)


@per_format
def test_weights_that_are_no_numbers_are_refused_by_name(format, tmp_path):
    for name in ("W_enc", "W_dec", "b_enc", "b_dec"):
        sae = an_sae(format)
        if format == "saelens" and name == "b_enc":
            continue  # it is among the gates there
        broken = getattr(sae, name).copy()
        broken.flat[3] = np.nan
        path = save(dataclasses.replace(sae, **{name: broken}), tmp_path / name, format)  # a run may end so
        with pytest.raises(InputError, match=f"{name} holds NaN") as caught:
            pretrained.load(path)
        assert str(caught.value).startswith(str(path))
    path = save(an_sae(format), tmp_path / "large", format)
    large = ("W_dec", "w_dec", "decoder.weight")
    edit(
        path, format, lambda content: {each: v * np.float32(1e6) if each in large else v for each, v in content.items()}
    )
    assert np.isfinite(pretrained.load(path).W_dec).all()
    with pytest.raises(InputError, match="W_dec holds NaN or infinite numbers in float16"):
        pretrained.load(path, dtype="float16")


@pytest.mark.parametrize("format", ["jaxsae", "saelens", "gemma_scope", "gemma_scope_2", "dictionary_learning"])
def test_an_infinite_threshold_silences_a_latent(format, tmp_path):
    sae = dataclasses.replace(an_sae("gemma_scope"), activation=jaxsae.JumpReLU(np.full(M, 0.1, np.float32)))
    sae.activation.threshold[3] = np.inf
    again = pretrained.load(save(sae, tmp_path, format))
    assert_same_bits(again.activation.threshold, sae.activation.threshold)
    sae.activation.threshold[3] = np.nan
    with pytest.raises(InputError, match="threshold holds NaN"):
        pretrained.load(save(sae, tmp_path, format))
    sae.activation.threshold[:] = np.inf
    with pytest.raises(InputError, match="JSON has no NaN and no infinite numbers"):
        save(sae, tmp_path / "llama", "llama_scope")


@pytest.mark.parametrize("format", ["jaxsae", "saelens", "gemma_scope", "gemma_scope_2"])
def test_a_bias_of_minus_infinity_silences_a_latent_and_one_of_infinity_is_refused(format, tmp_path):
    sae = an_sae("gemma_scope")
    for bad in (-np.inf, np.inf):
        b_enc = np.asarray(sae.b_enc).copy()
        b_enc[3] = bad
        path = save(dataclasses.replace(sae, b_enc=b_enc), tmp_path, format)
        if bad < 0:
            assert_same_bits(pretrained.load(path).b_enc, b_enc)
        else:
            with pytest.raises(InputError, match=r"b_enc holds \+inf, expected numbers, or -inf"):
                pretrained.load(path)


@pytest.mark.parametrize("format", WEIGHTS)
def test_weights_of_another_dtype_are_refused_by_name(format, tmp_path):
    path = save(an_sae(format), tmp_path, format)
    for dtype in (np.int32, bool):
        for name in ("W_dec", "w_dec", "decoder.weight"):
            edit(
                path,
                format,
                lambda content, name=name, dtype=dtype: {
                    each: value.astype(dtype) if each == name else value for each, value in content.items()
                },
            )
        with pytest.raises(InputError, match=rf"(?i)(w_dec|decoder.weight) is {np.dtype(dtype)}"):
            pretrained.load(path, format=format)
        pretrained.save(an_sae(format), path, format=format)


@pytest.mark.parametrize(
    "format, names",
    {
        "jaxsae": ["apply_b_dec_to_input", "transcoder", "skip"],
        "saelens": ["apply_b_dec_to_input", "rescale_acts_by_decoder_norm", "finetuning_scaling_factor"],
        "sparsify": ["transcode", "skip_connection", "signed"],
        "gemma_scope_2": ["affine_connection"],
        "llama_scope": ["use_decoder_bias", "apply_decoder_bias_to_pre_encoder", "sparsity_include_decoder_norm"],
    }.items(),
)
def test_text_is_no_yes_or_no(format, names, tmp_path):
    path = save(an_sae(format), tmp_path, format)
    for name in names:
        for value in ("false", 0, 1, [], "no"):
            edit(path, format, **{name: value})
            with pytest.raises(InputError, match=name):
                pretrained.load(path, format=format)
        pretrained.save(an_sae(format), path, format=format)


# --- random alterations

SAES = {
    "jaxsae JumpReLU": jaxsae.JumpReLU(np.linspace(0.1, 1, M).astype(np.float32)),
    "jaxsae TopK": jaxsae.TopK(K, keep=2.0),
    "jaxsae BatchTopK": jaxsae.BatchTopK(K, 0.3),
    "jaxsae MatchingPursuit": activations.MatchingPursuit(max_steps=3),
    "saelens TopK": jaxsae.TopK(K),
    "saelens JumpReLU": jaxsae.JumpReLU(np.linspace(0.1, 1, M).astype(np.float32)),
    "saelens Gated": None,
    "sparsify": None,
    "gemma_scope": None,
    "gemma_scope_2": None,
    "dictionary_learning": None,
    "dictionary_learning TopK": jaxsae.TopK(K),
    "dictionary_learning BatchTopK": jaxsae.BatchTopK(K, np.float32(0.3)),
    "openai": None,
    "llama_scope": None,
}
MEANT = {  # what a configuration may say otherwise of the same weights
    "jaxsae": {"activation", "normalisation", "apply_b_dec_to_input", "transcoder"},
    "saelens": {
        *("architecture", "k", "apply_b_dec_to_input", "normalize_activations", "dtype", "activation_fn"),
        *("activation_fn_str", "activation_fn_kwargs", "rescale_acts_by_decoder_norm", "metadata"),
    },
    "sparsify": {"k", "activation", "transcode"},
    "gemma_scope": set(),
    "gemma_scope_2": {"hf_hook_point_in", "hf_hook_point_out"},
    "dictionary_learning": {"dict_class", "k"},
    "openai": set(),
    "llama_scope": {
        *("act_fn", "jump_relu_threshold", "norm_activation", "dataset_average_activation_norm", "hook_point_in"),
        *("hook_point_out", "apply_decoder_bias_to_pre_encoder", "sparsity_include_decoder_norm", "top_k"),
    },
}
KEYS = sorted(set.union(*MEANT.values(), *map(set, SIZES.values())) | {"skip", "skip_connection", "signed", "anything"})
NAMES = (
    "W_enc",
    "W_skip",
    "threshold",
    "b_gate",
    "encoder.bias",
    "bias",
    "scaling_factor",
    "k",
    "group_sizes",
    "other",
)
VALUES = st.one_of(
    st.none(), st.booleans(), st.integers(-2, 20), st.floats(), st.text(max_size=3), st.lists(st.integers(), max_size=2)
)
CHANGES = st.one_of(
    st.tuples(st.just("set"), st.integers(0, 30), VALUES),
    st.tuples(st.just("drop"), st.integers(0, 30), st.none()),
    st.tuples(st.just("add"), st.sampled_from(KEYS), VALUES),
    st.tuples(st.just("array gone"), st.integers(0, 30), st.none()),
    st.tuples(st.just("array more"), st.sampled_from(NAMES), st.sampled_from([(), (M,), (D,), (M, D)])),
    st.tuples(st.just("array named"), st.integers(0, 30), st.sampled_from(NAMES)),
    st.tuples(st.just("array shaped"), st.integers(0, 30), st.sampled_from(["turned", "flat", "deep", "short"])),
)
SHAPED = {
    "turned": lambda array: array.T,
    "flat": lambda array: array.reshape(-1),
    "deep": lambda array: array[None],
    "short": lambda array: array[..., :-1] if array.ndim else array,
}


def alter(path, format, change):
    """Do to a saved SAE what is drawn; the key of the configuration that it is about, if any."""
    kind, which, what = change
    if not kind.startswith("array"):
        if format not in CONFIG:
            return None
        file = path / CONFIG[format]
        outer = json.loads(file.read_text())
        inner = outer["trainer"] if format == "dictionary_learning" else outer
        key = which if kind == "add" else sorted(inner)[which % len(inner)]
        inner.pop(key, None)
        file.write_text(
            json.dumps(
                outer if kind == "drop" else outer | {key: what} if inner is outer else {"trainer": inner | {key: what}}
            )
        )
        return key

    def altered(content):
        arrays = sorted(name for name, value in content.items() if isinstance(value, np.ndarray))
        name = arrays[which % len(arrays)] if isinstance(which, int) else which
        if kind == "array gone":
            return {each: value for each, value in content.items() if each != name}
        if kind == "array more":
            return {name: np.full(what, 0.5, np.float32)} | content
        if kind == "array named":
            return {what if each == name else each: value for each, value in content.items()}
        return content | {name: SHAPED[what](content[name])}

    edit(path, format, altered)
    return None


@pytest.mark.parametrize("name", SAES)
@hypothesis.settings(max_examples=40, deadline=None, database=None, derandomize=True)
@hypothesis.given(change=CHANGES)
def test_an_altered_file_is_the_same_sae_or_refused_by_name(name, change):
    format = name.partition(" ")[0]
    sae = an_sae(format)
    if SAES[name] is not None:
        sae = dataclasses.replace(
            sae, activation=SAES[name], apply_b_dec_to_input=format != "dictionary_learning" or " " in name
        )
    with tempfile.TemporaryDirectory() as folder:
        path = save(sae, Path(folder), format)
        whole = jax.tree.map(np.asarray, pretrained.load(path, format=format))
        key = alter(path, format, change)
        try:
            found = pretrained.load(path, format=format)
        except InputError as error:
            assert str(path) in str(error)
            assert "\n" not in str(error)
            assert key is None or key in str(error), (change, str(error))
        else:
            if key not in MEANT[format]:
                assert jax.tree.structure(found) == jax.tree.structure(whole), change
                assert_same_bits(found, whole)
