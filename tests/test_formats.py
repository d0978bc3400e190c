import dataclasses
import json

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from foreign import (
    CASES,
    FIXTURES,
    NAMED,
    D,
    K,
    M,
    X,
    arrays,
    fixture,
    pre,
    published,
    recorded,
    relu,
    top_k,
    training_form,
    write,
)
from problems import activations, assert_same_bits, refused, sae

import jaxsae
from jaxsae import pretrained
from jaxsae._core.files import InputError
from jaxsae.autoencoder import normalisation
from jaxsae.formats import torch_pickle

per_case = pytest.mark.parametrize("case", CASES)
WRITTEN = [name for name, row in pretrained.FORMATS.items() if row.write]


@jax.jit
def coded(model, x):
    """The code of rows, and what is made of it."""
    z = jaxsae.encode_dense(model, x)
    return z, jaxsae.autoencoder.reconstruct(model, x, z)


reconstruct = jax.jit(jaxsae.autoencoder.reconstruct)


def assert_computes(model, x, z, x_hat=None):
    found, made = coded(model, jnp.asarray(x, jnp.float32))
    np.testing.assert_allclose(found, z, rtol=1e-6, atol=2e-5)
    if x_hat is not None:
        np.testing.assert_allclose(made, x_hat, rtol=1e-6, atol=5e-5)


# --- what the libraries wrote


def test_every_fixture_is_among_the_cases():
    fixture("")
    there = {f"{path.parent.parent.name}/{path.parent.name}" for path in FIXTURES.glob("*/*/io.npz")}
    assert there == set(CASES)


@per_case
def test_a_published_sae_computes_what_its_library_computes(case):
    model, io = published(case), recorded(case)
    assert pretrained.detect(fixture(case)) == case.split("/")[0]
    assert np.abs(io["x"][5]).max() == 0  # rows that were made to be awkward
    assert_computes(model, io["x"], io["z"], io.get("forward"))
    if model.W_skip is not None:  # which decode leaves out, and forward has
        model = dataclasses.replace(model, W_skip=None)
    np.testing.assert_allclose(reconstruct(model, io["x"], io["z"]), io["xhat"], rtol=1e-6, atol=5e-5)


@pytest.mark.parametrize("case", ["saelens/train_batchtopk", "saelens/train_topk"])
def test_the_form_saved_in_training_infers_as_the_other(case, tmp_path):
    io = recorded(case)
    model = pretrained.load(training_form(case, tmp_path / "sae"))
    assert_computes(model, io["x"], io["z"], io["xhat"])
    assert type(model.activation) is type(published(case).activation)


@per_case
def test_loaded_saved_and_loaded_again_it_is_the_same_to_the_bit(case, tmp_path):
    model, format = published(case), case.split("/")[0]
    for name in (format, "jaxsae"):
        pretrained.save(model, tmp_path / name, format=name)
        again = pretrained.load(tmp_path / name)
        assert jax.tree.structure(again) == jax.tree.structure(model)
        assert_same_bits(again, model)


@per_case
def test_saved_in_any_other_format_it_computes_the_same_or_is_refused(case, tmp_path):
    model, io = published(case), recorded(case)
    z, x_hat = coded(model, io["x"])
    said = {}
    for format in WRITTEN:
        path = tmp_path / (f"{format}.pt" if format == "openai" else format)
        try:
            pretrained.save(model, path, format=format)
        except InputError as error:
            said[format] = str(error)
            assert not path.exists()
            continue
        assert pretrained.detect(path) == format
        assert_computes(pretrained.load(path), io["x"], z, x_hat)
    assert not {"jaxsae", case.split("/")[0]} & said.keys()
    assert len(said) < len(WRITTEN) - 1 or "abstopk" in case or "layernorm" in case
    assert all("save it in another format" in text or "has no" in text for text in said.values())


# --- SAELens, to the facts


def saelens(folder, tensors, **config):
    base = {"d_in": D, "d_sae": M, "dtype": "float32", "apply_b_dec_to_input": True, "normalize_activations": "none"}
    return pretrained.load(write(folder, "sae_weights.safetensors", tensors, base | config))


def plain(names=("W_enc", "b_enc", "W_dec", "b_dec"), **more):
    return {name: array for name, array in arrays().items() if name in names} | more


W = arrays()
FLAT = {  # before version 6
    "hook_point": {"hook_point": "blocks.8.hook_resid_pre", "activation_fn_str": "relu"},
    "nothing but sizes": {},
    "torch's dtype": {"dtype": "torch.float32"},
    "no normalisation": {"normalize_activations": False},
    "null": {"normalize_activations": None},
    "ones": {"finetuning_scaling_factor": False},
}


@pytest.mark.parametrize("case", FLAT)
def test_flat_configurations(case, tmp_path):
    config = {"d_in": D, "d_sae": M} | FLAT[case]
    more = {"scaling_factor": np.ones(M, np.float32)} if case == "ones" else {}
    model = pretrained.load(write(tmp_path / "sae", "sae_weights.safetensors", plain(**more), config))
    z = relu(pre(X, W))
    assert_computes(model, X, z, z @ W["W_dec"] + W["b_dec"])
    assert model.normalisation is None


def test_flat_topk_and_normalisation_as_a_bool(tmp_path):
    config = {"activation_fn_str": "topk", "activation_fn_kwargs": {"k": K}, "normalize_activations": True}
    model = saelens(tmp_path / "sae", plain(), **config)
    assert model.activation == jaxsae.TopK(K)
    assert model.normalisation == normalisation.AverageNorm()
    z = top_k(relu(pre(X, W)), K)
    assert_computes(model, X, z, z @ W["W_dec"] + W["b_dec"])  # it does nothing at run time
    folded = jaxsae.autoencoder.fold_scale(model, 4.0)
    assert folded.normalisation is None
    scaled, raw = coded(model, 4 * X), coded(folded, X)
    np.testing.assert_allclose(raw[0], scaled[0], rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(raw[1], scaled[1] / 4, rtol=1e-5, atol=1e-5)


def test_a_scaling_factor_is_used_or_refused(tmp_path):
    factor = np.linspace(0.5, 2, M).astype(np.float32)
    tensors = plain(scaling_factor=factor)
    z = relu(pre(X, W))
    model = saelens(tmp_path / "used", tensors, finetuning_scaling_factor=True)
    assert_computes(model, X, z, (z * factor) @ W["W_dec"] + W["b_dec"])
    with pytest.raises(InputError, match="scaling_factor that its configuration does not use"):
        saelens(tmp_path / "unused", tensors)


def test_constant_norm(tmp_path):
    model = saelens(tmp_path / "sae", plain(), normalize_activations="constant_norm_rescale")
    x = X[[0, 1, 3]]
    scale = np.sqrt(D) / np.linalg.norm(x, axis=1, keepdims=True)
    z = relu(pre(x * scale, W))
    assert_computes(model, x, z, (z @ W["W_dec"] + W["b_dec"]) / scale)
    assert np.isnan(np.asarray(coded(model, X)[0][2])).all()  # a row of zeros has no norm to give it: as there


def test_without_centre_and_gated_without_b_enc(tmp_path):
    z = relu(pre(X, W, apply_b_dec_to_input=False))
    model = saelens(tmp_path / "a", plain(), apply_b_dec_to_input=False)
    assert_computes(model, X, z, z @ W["W_dec"] + W["b_dec"])
    assert not model.transcoder
    gates = dict(zip(("r_mag", "b_gate", "b_mag"), np.random.default_rng(1).normal(size=(3, M)), strict=True))
    gates = {name: array.astype(np.float32) for name, array in gates.items()}
    model = saelens(tmp_path / "b", plain(("W_enc", "W_dec", "b_dec"), **gates), architecture="gated")
    linear = (np.float64(X) - W["b_dec"]) @ W["W_enc"]
    z = (linear + gates["b_gate"] > 0) * relu(np.exp(gates["r_mag"]) * linear + gates["b_mag"])
    assert_computes(model, X, z, z @ W["W_dec"] + W["b_dec"])
    # One of ours may have a bias that the format lacks: it goes into the two that there are.
    ours = dataclasses.replace(model, b_enc=jnp.asarray(W["b_enc"]))
    pretrained.save(ours, tmp_path / "c", format="saelens")
    assert "b_enc" not in pretrained.FORMATS["saelens"].read(tmp_path / "c").arrays
    assert_computes(pretrained.load(tmp_path / "c"), X, *coded(ours, X))


@pytest.mark.parametrize("jump, skip", [(False, False), (False, True), (True, False), (True, True)])
def test_transcoders(jump, skip, tmp_path):
    w = arrays(d_out=4)
    kind = ("jumprelu_" if jump else "") + ("skip_" if skip else "") + "transcoder"
    threshold = np.full(M, 0.5, np.float32) + np.arange(M, dtype=np.float32) / 10
    tensors = {name: w[name] for name in ("W_enc", "b_enc", "W_dec", "b_dec")}
    tensors |= ({"threshold": threshold} if jump else {}) | ({"W_skip": w["W_skip"].T} if skip else {})
    model = saelens(tmp_path / "sae", tensors, architecture=kind, d_out=4, apply_b_dec_to_input=False)
    linear = np.float64(X) @ w["W_enc"] + w["b_enc"]
    z = np.where(linear > threshold, relu(linear), 0) if jump else relu(linear)
    assert_computes(model, X, z, z @ w["W_dec"] + w["b_dec"] + (X @ w["W_skip"] if skip else 0))
    assert model.transcoder
    pretrained.save(model, tmp_path / "again", format="saelens")
    assert_same_bits(pretrained.load(tmp_path / "again"), model)


def pursued(x, W_dec, threshold, steps, duplicate):
    codes = []
    for r in np.float64(x):
        z, done = np.zeros(len(W_dec)), False
        for _ in range(steps):
            if done:
                break
            j = np.argmax(relu(W_dec @ r))
            value, before = max(W_dec[j] @ r, 0), z != 0
            z[j] += value
            r = r - value * W_dec[j]
            done = (duplicate and np.array_equal(before, z != 0)) or (threshold > 0 and np.linalg.norm(r) < threshold)
        codes.append(z)
    return np.array(codes)


@pytest.mark.parametrize(
    "duplicate, steps, apply_b_dec_to_input", [(True, None, True), (False, 4, True), (True, 3, False)]
)
def test_matching_pursuit_is_a_pursuit_encoder(duplicate, steps, apply_b_dec_to_input, tmp_path):
    W_dec = W["W_dec"] / np.linalg.norm(W["W_dec"], axis=1, keepdims=True)
    options = {"residual_threshold": 0.5, "max_iterations": steps, "stop_on_duplicate_support": duplicate}
    options |= {"architecture": "matching_pursuit", "apply_b_dec_to_input": apply_b_dec_to_input}
    model = saelens(tmp_path / "sae", {"W_dec": W_dec, "b_dec": W["b_dec"]}, **options)
    b_dec = W["b_dec"] if apply_b_dec_to_input else 0
    z = pursued(X - b_dec, W_dec, 0.5, steps or D, duplicate)
    assert (z != 0).sum(1).max() > 2
    assert_computes(model, X, z, z @ W_dec + b_dec)
    code = jaxsae.encode(model, jnp.asarray(X), capacity=M)
    np.testing.assert_allclose(code.dense(), z, atol=2e-5)
    pretrained.save(model, tmp_path / "again", format="saelens")
    assert_same_bits(pretrained.load(tmp_path / "again"), model)


def test_matryoshka_saved_for_inference_says_what_it_was(tmp_path):
    details = {"training_architecture": "matryoshka_batchtopk", "training_architecture_details": {"k": 2.5}}
    threshold = np.full(M, 0.25, np.float32)
    model = saelens(tmp_path / "a", plain(threshold=threshold), architecture="jumprelu", metadata=details)
    assert isinstance(model.activation, jaxsae.BatchTopK)
    linear = pre(X, W)
    assert_computes(model, X, np.where(linear > 0.25, relu(linear), 0))
    uneven = plain(threshold=threshold + np.arange(M, dtype=np.float32))
    assert isinstance(
        saelens(tmp_path / "b", uneven, architecture="jumprelu", metadata=details).activation, jaxsae.JumpReLU
    )


@pytest.mark.parametrize(
    "config, message",
    [
        ({"architecture": "temporal"}, "its architecture is 'temporal', expected one of: standard, topk"),
        ({"activation_fn": "tanh-relu"}, "its activation_fn is 'tanh-relu'"),
        ({"dtype": "int8"}, "its dtype is 'int8'"),
        ({"normalize_activations": "covariance_whitening"}, "its normalize_activations is 'covariance_whitening'"),
        ({"normalize_activations": ["layer_norm"]}, "its normalize_activations is 'list'"),
        ({"architecture": "topk"}, "k is None, expected a number"),
        ({"architecture": "topk", "k": 2.5}, "k is 2.5, expected a whole number"),
        ({"architecture": "topk", "k": M + 1}, "k is 13, which does not fit 12 latents"),
        ({"architecture": "jumprelu"}, "holds W_dec, W_enc, b_dec, b_enc, expected threshold too"),
    ],
)
def test_what_saelens_saves_and_nobody_can_compute_is_named(config, message, tmp_path):
    assert str(tmp_path / "sae") in refused(message, saelens, tmp_path / "sae", plain(), **config)


THRESHOLDS = np.linspace(0.1, 1, M).astype(np.float32)
GATES = {name: np.ones(M, np.float32) for name in ("r_mag", "b_gate", "b_mag")}
DROPPED = {  # of these, the configuration says another autoencoder than the arrays
    "a threshold without an architecture": (plain(threshold=THRESHOLDS), {}, "holds threshold, which ReLU of saelens"),
    "a threshold of ReLU": (plain(threshold=THRESHOLDS), {"architecture": "standard"}, "holds threshold"),
    "a threshold of TopK": (plain(threshold=THRESHOLDS), {"architecture": "topk", "k": K}, "holds threshold"),
    "two thresholds": (
        plain(threshold=THRESHOLDS, log_threshold=THRESHOLDS),
        {"architecture": "jumprelu"},
        "holds log_threshold",
    ),
    "gates without an architecture": (plain(**GATES), {}, "holds b_gate, b_mag, r_mag"),
    "a bias of a gated one": (plain(**GATES), {"architecture": "gated"}, "holds b_enc"),
    "a skip connection": (plain() | {"W_skip": np.ones((D, D), np.float32)}, {}, "holds W_skip"),
    "an encoder of a pursuit": (plain(), {"architecture": "matching_pursuit"}, "holds W_enc, b_enc"),
    "k without an architecture": (plain(), {"k": K}, "has k, which the architecture 'standard' does not have"),
    "k of ReLU": (plain(), {"k": K, "architecture": "standard"}, "has k"),
    "norms of ReLU": (plain(), {"rescale_acts_by_decoder_norm": True}, "has rescale_acts_by_decoder_norm"),
    "norms of JumpReLU": (
        plain(threshold=THRESHOLDS),
        {"rescale_acts_by_decoder_norm": True, "architecture": "jumprelu"},
        "has rescale_acts_by_decoder_norm",
    ),
    "a pursuit's threshold": (plain(), {"residual_threshold": 0.1}, "has residual_threshold"),
    "top-k without k": (plain(), {"activation_fn_str": "topk"}, "k is None, expected a number"),
    "top-k of JumpReLU": (
        plain(threshold=THRESHOLDS),
        {"activation_fn": "topk", "activation_fn_kwargs": {"k": K}, "architecture": "jumprelu"},
        "its architecture is 'jumprelu', expected one of: standard, topk",
    ),
    "signed top-k": (plain(), {"activation_fn": "topk", "activation_fn_kwargs": {"k": K, "signed": True}}, "signed"),
    "two values of k": (plain(), {"activation_fn": "topk", "activation_fn_kwargs": {"k": K}, "k": 2}, "says k 2"),
    "options of ReLU": (plain(), {"activation_fn_kwargs": {"k": K}}, "activation_fn_kwargs is"),
    "no scaling factor": (plain(), {"finetuning_scaling_factor": True}, "expected scaling_factor too"),
    "a transcoder with a centre": (plain(), {"architecture": "transcoder"}, "apply_b_dec_to_input is true"),
    "heads of another kind": (plain(), {"reshape_activations": "hook_q"}, "its reshape_activations is 'hook_q'"),
    "another width": (plain(), {"d_in": D + 1}, "says d_in 7, but its weights 6"),
    "another number of latents": (plain(), {"d_sae": 99}, "says d_sae 99, but its weights 12"),
    "another output": (plain(), {"d_out": 5}, "says d_out 5, but its weights 6"),
}


@pytest.mark.parametrize("case", DROPPED)
def test_what_a_saelens_file_says_twice_and_differently_is_refused(case, tmp_path):
    tensors, config, message = DROPPED[case]
    assert refused(message, saelens, tmp_path / "sae", tensors, **config).startswith(str(tmp_path / "sae"))


def test_what_changes_nothing_is_no_reason_to_refuse(tmp_path):
    none = {"k": None, "rescale_acts_by_decoder_norm": False, "activation_fn_kwargs": {}, "reshape_activations": None}
    more = {"hook_layer": 8, "prepend_bos": True, "model_from_pretrained_kwargs": {}, "reshape_activations": "hook_z"}
    for number, config in enumerate((none, more, {"d_sae": float(M)})):
        assert_computes(saelens(tmp_path / f"{number}", plain(), **config), X, relu(pre(X, W)))


@pytest.mark.parametrize("kind", ["topk", "abstopk"])
def test_top_k_by_pre_activations_times_norms(kind, tmp_path):
    model = saelens(tmp_path / "a", plain(), architecture=kind, k=K, rescale_acts_by_decoder_norm=True)
    norms = np.linalg.norm(W["W_dec"], axis=1)
    scaled = pre(X, W) * norms
    z = top_k(relu(scaled), K) if kind == "topk" else np.where(top_k(np.abs(scaled), K) > 0, scaled, 0)
    assert_computes(model, X, z, (z / norms) @ W["W_dec"] + W["b_dec"])


def test_an_entry_that_is_there_twice_is_refused(tmp_path):
    folder = write(tmp_path / "sae", "sae_weights.safetensors", plain(), {"d_in": D})
    (folder / "cfg.json").write_text('{"d_in": 6, "architecture": "standard", "architecture": "topk"}')
    with pytest.raises(InputError, match="it has 'architecture' twice"):
        pretrained.load(folder)


# --- Gemma Scope

THRESHOLD = np.linspace(0.1, 1, M).astype(np.float32)


@pytest.mark.parametrize("names", [("W_enc", "W_dec"), ("w_enc", "w_dec")])
def test_gemma_scope_in_either_case_and_compressed(names, tmp_path):
    tensors = plain(("b_enc", "b_dec"), threshold=THRESHOLD) | {names[0]: W["W_enc"], names[1]: W["W_dec"]}
    linear = pre(X, W, apply_b_dec_to_input=False)
    z = np.where(linear > THRESHOLD, relu(linear), 0)
    for save, file in ((np.savez, "params.npz"), (np.savez_compressed, "other.npz")):
        save(tmp_path / file, **tensors)
        model = pretrained.load(tmp_path / file)
        assert_computes(model, X, z, z @ W["W_dec"] + W["b_dec"])
        assert not (model.apply_b_dec_to_input or model.transcoder)


def test_gemma_scope_of_embeddings_and_transcoders(tmp_path):
    tensors = plain(threshold=THRESHOLD)
    folder = tmp_path / "embedding" / "width_4k" / "average_l0_6"
    folder.mkdir(parents=True)
    np.savez(folder / "params.npz", **tensors)
    assert pretrained.detect(folder) == pretrained.detect(folder / "params.npz") == "gemma_scope_embedding"
    linear = pre(X, W | {"W_enc": W["W_enc"] / np.sqrt(D)}, apply_b_dec_to_input=False)
    z = np.where(linear > THRESHOLD, relu(linear), 0)
    assert_computes(pretrained.load(folder), X, z, z @ (W["W_dec"] * np.sqrt(D)) + W["b_dec"])
    assert_same_bits(pretrained.load(folder, format="gemma_scope").W_enc, W["W_enc"])
    folder = tmp_path / "models--google--gemma-scope-2b-pt-transcoders" / "layer_3"
    folder.mkdir(parents=True)
    np.savez(folder / "params.npz", **tensors)
    assert pretrained.load(folder).transcoder


def test_gemma_scope_2(tmp_path):
    w = arrays(d_out=4)
    tensors = {name.lower(): w[name] for name in ("W_enc", "b_enc", "W_dec", "b_dec")} | {"threshold": THRESHOLD}
    config = {"architecture": "jump_relu", "hf_hook_point_in": "a", "hf_hook_point_out": "b"}
    affine = tensors | {"affine_skip_connection": w["W_skip"]}
    folder = write(tmp_path / "a", "params.safetensors", affine, config, "config.json")
    assert pretrained.detect(folder) == "gemma_scope_2"
    linear = np.float64(X) @ w["W_enc"] + w["b_enc"]
    z = np.where(linear > THRESHOLD, relu(linear), 0)
    model = pretrained.load(folder)
    assert_computes(model, X, z, z @ w["W_dec"] + w["b_dec"] + X @ w["W_skip"])
    pretrained.save(model, tmp_path / "again", format="gemma_scope_2")
    assert_same_bits(pretrained.load(tmp_path / "again"), model)
    half = {name: value for name, value in config.items() if name != "hf_hook_point_in"}
    with pytest.raises(InputError, match="says hf_hook_point_out 'b' and no hf_hook_point_in; expected both"):
        pretrained.load(write(tmp_path / "half", "params.safetensors", affine, half, "config.json"))
    several = tensors | {"w_dec": np.zeros((M, 3, 4), np.float32)}
    with pytest.raises(InputError, match=r"w_dec has shape \(12, 3, 4\), of a cross-layer transcoder"):
        pretrained.load(write(tmp_path / "clt", "params.safetensors", several, config, "config.json"))


def test_gemma_scope_files_that_say_more_than_is_used(tmp_path):
    both = plain(threshold=THRESHOLD) | {"w_dec": W["W_dec"]}
    np.savez(tmp_path / "both.npz", **both)
    with pytest.raises(InputError, match="holds W_dec and w_dec"):
        pretrained.load(tmp_path / "both.npz")
    np.savez(tmp_path / "more.npz", **plain(threshold=THRESHOLD, scaling_factor=THRESHOLD))
    with pytest.raises(InputError, match="holds scaling_factor, which JumpReLU of gemma_scope does not have"):
        pretrained.load(tmp_path / "more.npz")
    tensors = {name.lower(): array for name, array in plain(threshold=THRESHOLD).items()}
    for number, (more, config, message) in enumerate(
        [
            ({}, {"affine_connection": True}, "expected affine_skip_connection too"),
            ({"affine_skip_connection": np.eye(D, dtype="f4")}, {"affine_connection": False}, "affine_skip_connection"),
            ({}, {"width": 16_384}, "says width 16384, but its weights 12"),
            ({}, {"architecture": "topk"}, "its architecture is 'topk'"),
        ]
    ):
        with pytest.raises(InputError, match=message):
            pretrained.load(write(tmp_path / f"{number}", "params.safetensors", tensors | more, config, "config.json"))


# --- sparsify


def sparsify(folder, tensors=None, **config):
    base = {"activation": "topk", "expansion_factor": 2, "normalize_decoder": True, "num_latents": 0, "k": K, "d_in": D}
    layer = {"encoder.weight": W["W_enc"].T, "encoder.bias": W["b_enc"]} | plain(("W_dec", "b_dec"))
    return pretrained.load(write(folder, "sae.safetensors", tensors or layer, base | config))


def test_sparsify_decoder_is_not_transposed_and_relu_comes_before_top_k(tmp_path):
    square = {name: array for name, array in arrays(d=M).items() if name != "W_skip"}  # where a transpose would fit
    low = {"encoder.weight": square["W_enc"].T, "encoder.bias": square["b_enc"] - 8, "W_dec": square["W_dec"]}
    model = sparsify(tmp_path / "a", low | {"b_dec": square["b_dec"]}, d_in=M, num_latents=M)
    x = np.random.default_rng(3).normal(size=(4, M)).astype(np.float32)
    linear = pre(x, square | {"b_enc": low["encoder.bias"]})
    z = top_k(relu(linear), K)
    assert ((linear > 0).sum(1) < K).any(), "some row must have fewer positive latents than k"
    assert_computes(model, x, z, z @ square["W_dec"] + square["b_dec"])
    assert (np.asarray(coded(model, x)[0]) >= 0).all()


def test_sparsify_without_num_latents(tmp_path):
    z = top_k(relu(pre(X, W)), K)
    assert_computes(sparsify(tmp_path / "a"), X, z, z @ W["W_dec"] + W["b_dec"])  # num_latents is 0 here
    with pytest.raises(InputError, match=r"its encoder has shape \(12, 6\), but cfg.json says 18 latents of width 6"):
        sparsify(tmp_path / "b", expansion_factor=3)


def test_sparsify_groups_skip_and_bfloat16(tmp_path):
    w = {name: array.astype(ml_dtypes.bfloat16) for name, array in arrays().items()}
    tensors = {"encoder.weight": w["W_enc"].T, "encoder.bias": w["b_enc"], "W_dec": w["W_dec"], "b_dec": w["b_dec"]}
    tensors |= {"W_skip": w["W_skip"].T}
    model = sparsify(tmp_path / "a", tensors, activation="groupmax", transcode=True, skip_connection=True)
    assert {leaf.dtype for leaf in jax.tree.leaves(model)} == {jnp.dtype("bfloat16")}
    model = pretrained.load(tmp_path / "a", dtype="float32")
    assert {leaf.dtype for leaf in jax.tree.leaves(model)} == {jnp.dtype("float32")}
    w = {name: array.astype(np.float64) for name, array in w.items()}
    groups = relu(np.float64(X) @ w["W_enc"] + w["b_enc"]).reshape(len(X), K, -1)
    z = np.where(groups == groups.max(-1, keepdims=True), groups, 0).reshape(len(X), M)
    assert_computes(model, X, z, z @ w["W_dec"] + w["b_dec"] + X @ w["W_skip"])
    with pytest.raises(InputError, match="its activation is 'relu'"):
        sparsify(tmp_path / "b", activation="relu")
    with pytest.raises(InputError, match="its signed is True"):
        sparsify(tmp_path / "c", signed=True)
    with pytest.raises(InputError, match="k is 5, which does not fit 12 latents"):
        sparsify(tmp_path / "d", activation="groupmax", k=5)


def test_a_skip_connection_is_there_if_the_configuration_says_so(tmp_path):
    layer = {"encoder.weight": W["W_enc"].T, "encoder.bias": W["b_enc"]} | plain(("W_dec", "b_dec"))
    skip = layer | {"W_skip": np.ones((D, D), np.float32)}
    assert sparsify(tmp_path / "a", skip, skip_connection=True).W_skip is not None
    assert sparsify(tmp_path / "b", skip).W_skip is not None
    with pytest.raises(InputError, match="expected W_skip too"):
        sparsify(tmp_path / "c", layer, skip_connection=True)
    with pytest.raises(InputError, match="holds W_skip, which TopK of sparsify does not have"):
        sparsify(tmp_path / "d", skip, skip_connection=False)


# --- dictionary_learning

LAYERS = {"encoder.weight": W["W_enc"].T, "encoder.bias": W["b_enc"], "decoder.weight": W["W_dec"].T}


def dictionary_learning(folder, state, dict_class=None):
    folder.mkdir()
    torch_pickle.write(folder / "ae.pt", state)
    if dict_class:
        (folder / "config.json").write_text(json.dumps({"trainer": {"dict_class": dict_class, "k": K}}))
    return pretrained.load(folder)


def test_the_april_update_subtracts_nothing(tmp_path):
    z = relu(pre(X, W, apply_b_dec_to_input=False))
    model = dictionary_learning(tmp_path / "a", LAYERS | {"decoder.bias": W["b_dec"]})
    assert_computes(model, X, z, z @ W["W_dec"] + W["b_dec"])


@pytest.mark.parametrize("threshold", [-1.0, 0.5])
def test_batch_topk_infers_by_threshold_and_topk_by_count(threshold, tmp_path):
    numbers = {"k": np.array(K, np.int32), "threshold": np.array(threshold, np.float32), "b_dec": W["b_dec"]}
    batch = dictionary_learning(tmp_path / "a", LAYERS | numbers, "BatchTopKSAE")
    linear = pre(X, W)
    z = np.where(linear > threshold, relu(linear), 0)  # where it is unset, −1, nothing but ReLU
    assert_computes(batch, X, z, z @ W["W_dec"] + W["b_dec"])
    topk = dictionary_learning(tmp_path / "b", LAYERS | numbers, "AutoEncoderTopK")
    assert_computes(topk, X, top_k(relu(linear), K))
    for number, model in enumerate((batch, topk)):
        pretrained.save(model, tmp_path / str(number), format="dictionary_learning")
        assert_same_bits(pretrained.load(tmp_path / str(number)), model)


def test_matryoshka_and_jumprelu_have_raw_weights(tmp_path):
    numbers = {"k": np.array(K, np.int32), "threshold": np.array(0.5, np.float32), "group_sizes": np.array([4, 8])}
    model = dictionary_learning(tmp_path / "a", plain() | numbers)
    linear = pre(X, W)
    assert_computes(model, X, np.where(linear > 0.5, relu(linear), 0))
    model = dictionary_learning(tmp_path / "b", plain(threshold=THRESHOLD))
    linear = pre(X, W, apply_b_dec_to_input=False)
    assert_computes(model, X, np.where(linear > THRESHOLD, relu(linear), 0))


def test_a_back_up_is_told_from_a_state_dict(tmp_path):
    numbers = {"k": np.array(K, np.int32), "threshold": np.array(0.5, np.float32), "b_dec": W["b_dec"]}
    backup = {
        "step": 100,
        "ae": LAYERS | numbers,
        "optimizer": {"state": {0: {"step": np.array(3.0, np.float32)}}, "param_groups": [{"lr": 1e-3}]},
        "config": {"dict_class": "BatchTopKSAE", "lr": 1e-3, "seed": None},
        "norm_factor": 2.0,
    }
    model = dictionary_learning(tmp_path / "a", backup)
    # In training it saw rows divided by the factor.
    linear = pre(X / 2, W)
    z = np.where(linear > 0.5, relu(linear), 0)
    assert_computes(model, X, 2 * z, 2 * (z @ W["W_dec"] + W["b_dec"]))
    plainly = dictionary_learning(tmp_path / "b", backup | {"norm_factor": None})
    assert_computes(plainly, X / 2, z)


NUMBERS = {"k": np.array(K, np.int32), "threshold": np.array(0.5, np.float32)}


def test_what_is_either_topk_or_batch_topk_must_be_told(tmp_path):
    (tmp_path / "sae").mkdir()
    torch_pickle.write(tmp_path / "sae" / "ae.pt", LAYERS | NUMBERS | {"b_dec": W["b_dec"]})
    assert pretrained.detect(tmp_path / "sae") == "dictionary_learning"
    with pytest.raises(InputError, match="may be an AutoEncoderTopK or a BatchTopKSAE") as caught:
        pretrained.load(tmp_path / "sae")
    linear = pre(X, W)
    kinds = {"topk": top_k(relu(linear), K), "batch_topk": np.where(linear > 0.5, relu(linear), 0)}
    for kind, z in kinds.items():
        name = f"dictionary_learning_{kind}"
        assert name in str(caught.value)
        assert_computes(pretrained.load(tmp_path / "sae", format=name), X, z)
        with pytest.raises(InputError, match=f"{name} is read, not written"):
            pretrained.save(sae(), tmp_path / "new", format=name)
    (tmp_path / "sae" / "config.json").write_text('{"trainer": {"dict_class": "BatchTopKSAE"}}')
    assert_computes(pretrained.load(tmp_path / "sae"), X, kinds["batch_topk"])


CONTRADICTED = {
    "a class that is unknown": ({"bias": W["b_dec"]}, {"dict_class": "CrossCoder"}, "dict_class is 'CrossCoder'"),
    "another class": ({"bias": W["b_dec"]}, {"dict_class": "AutoEncoderTopK"}, "dict_class is 'AutoEncoderTopK'"),
    "another k": (
        NUMBERS | {"b_dec": W["b_dec"]},
        {"dict_class": "BatchTopKSAE", "k": 2},
        "says k 2, but its weights 3",
    ),
    "another width": ({"bias": W["b_dec"]}, {"activation_dim": 7}, "says activation_dim 7"),
    "another size": ({"bias": W["b_dec"]}, {"dict_size": 7}, "says dict_size 7"),
    "two biases": ({"bias": W["b_dec"], "decoder.bias": W["b_dec"]}, {}, "holds bias, which ReLU"),
    "a threshold": ({"bias": W["b_dec"], "threshold": NUMBERS["threshold"]}, {}, "holds threshold, which ReLU"),
    "what is no array": ({"bias": W["b_dec"], "apply_b_dec_to_input": True}, {}, "holds apply_b_dec_to_input"),
}


@pytest.mark.parametrize("case", CONTRADICTED)
def test_what_a_dictionary_learning_file_says_twice_and_differently_is_refused(case, tmp_path):
    state, trainer, message = CONTRADICTED[case]
    (tmp_path / "sae").mkdir()
    torch_pickle.write(tmp_path / "sae" / "ae.pt", LAYERS | state)
    (tmp_path / "sae" / "config.json").write_text(json.dumps({"trainer": trainer}))
    with pytest.raises(InputError, match=message):
        pretrained.load(tmp_path / "sae")


def test_raw_weights_with_more_than_is_used(tmp_path):
    numbers = NUMBERS | {"group_sizes": np.array([4, 9])}
    with pytest.raises(InputError, match="group_sizes do not add up to 12 latents"):
        dictionary_learning(tmp_path / "a", plain() | numbers)
    with pytest.raises(InputError, match="holds k, which JumpReLU"):
        dictionary_learning(tmp_path / "b", plain() | NUMBERS)
    # The trainer of both writes one name for both; a factor in the configuration is in the weights already.
    (tmp_path / "c").mkdir()
    torch_pickle.write(tmp_path / "c" / "ae.pt", LAYERS | {"decoder.bias": W["b_dec"]})
    (tmp_path / "c" / "config.json").write_text('{"trainer": {"dict_class": "AutoEncoder", "norm_factor": 2.0}}')
    assert_computes(pretrained.load(tmp_path / "c"), X, relu(pre(X, W, apply_b_dec_to_input=False)))


# --- OpenAI


def openai(path, **more):
    state = {"pre_bias": W["b_dec"], "latent_bias": W["b_enc"], "encoder.weight": W["W_enc"].T}
    state |= {"decoder.weight": W["W_dec"].T, "stats_last_nonzero": np.zeros(M, np.int64)} | more
    torch_pickle.write(path, state)
    return pretrained.load(path)


def test_openai_normalises_rows_exactly_for_topk(tmp_path):
    model = openai(tmp_path / "a.pt", activation="ReLU", activation_state_dict={})
    z = relu(pre(X, W))
    assert_computes(model, X, z, z @ W["W_dec"] + W["b_dec"])
    options = {"k": K, "postact_fn": "ReLU"}
    model = openai(tmp_path / "b.pt", activation="TopK", activation_state_dict=options)
    mean, std = X.mean(1, keepdims=True), X.std(1, ddof=1, keepdims=True)
    z = top_k(relu(pre((X - mean) / (std + 1e-5), W)), K)
    assert_computes(model, X, z, (z @ W["W_dec"] + W["b_dec"]) * std + mean)
    pretrained.save(model, tmp_path / "c.pt", format="openai")
    assert_same_bits(pretrained.load(tmp_path / "c.pt"), model)
    with pytest.raises(InputError, match="its postact_fn is 'Identity'"):
        openai(tmp_path / "d.pt", activation="TopK", activation_state_dict={"k": K, "postact_fn": "Identity"})
    with pytest.raises(InputError, match="its activation is 'Softmax'"):
        openai(tmp_path / "e.pt", activation="Softmax")


def test_openai_files_that_say_more_than_is_used(tmp_path):
    with pytest.raises(
        InputError, match="holds k, postact_fn, which ReLU of openai does not have; name its activation"
    ):
        openai(tmp_path / "a.pt", activation_state_dict={"k": K, "postact_fn": "ReLU"})
    with pytest.raises(InputError, match="holds tied, which ReLU of openai does not have"):
        openai(tmp_path / "b.pt", activation="ReLU", tied=True)
    with pytest.raises(InputError, match=r"holds decoder\.bias, which ReLU of openai does not have"):
        openai(tmp_path / "c.pt", **{"decoder.bias": W["b_dec"]})


# --- Llama Scope


def llama_scope(folder, **config):
    base = {"d_model": D, "d_sae": M, "act_fn": "jumprelu", "jump_relu_threshold": 0.2, "use_decoder_bias": True}
    base |= {"apply_decoder_bias_to_pre_encoder": False, "norm_activation": "dataset-wise"}
    base |= {"dataset_average_activation_norm": {"in": 3.0, "out": 5.0}, "hook_point_in": "a", "hook_point_out": "b"}
    tensors = {**LAYERS, "decoder.bias": W["b_dec"]}
    write(folder / "checkpoints", "final.safetensors", tensors)
    (folder / "hyperparams.json").write_text(json.dumps(base | config))
    return pretrained.load(folder)


def test_llama_scope_has_two_scales_and_a_threshold_for_rows_as_they_are(tmp_path):
    model = llama_scope(tmp_path / "a")
    into, out = np.sqrt(D) / 3, np.sqrt(D) / 5
    linear = pre(into * X, W, apply_b_dec_to_input=False)
    z = np.where(linear / into > 0.2, relu(linear), 0)
    assert_computes(model, X, z, (z @ W["W_dec"] + W["b_dec"]) / out)
    assert model.transcoder
    one_site = {"hook_point_out": "a", "dataset_average_activation_norm": {"in": 3.0, "out": 3.0}}
    model = llama_scope(tmp_path / "b", **one_site, sparsity_include_decoder_norm=True)
    norms = np.linalg.norm(W["W_dec"], axis=1)
    z = np.where(linear * norms / into > 0.2, relu(linear), 0)
    assert_computes(model, X, z, (z @ W["W_dec"] + W["b_dec"]) / into)
    assert not model.transcoder
    assert llama_scope(tmp_path / "c", act_fn="topk", top_k=K).activation == jaxsae.TopK(K)
    with pytest.raises(InputError, match="its act_fn is 'gelu'"):
        llama_scope(tmp_path / "d", act_fn="gelu")
    with pytest.raises(InputError, match=r"dataset_average_activation_norm is 0\.0, expected more than 0"):
        llama_scope(tmp_path / "e", dataset_average_activation_norm={"in": 0})


def test_llama_scope_files_that_say_more_than_is_used(tmp_path):
    for number, (config, message) in enumerate(
        [
            ({"use_decoder_bias": False}, "holds decoder.bias, which JumpReLU of llama_scope does not have"),
            ({"use_glu_encoder": True}, "its use_glu_encoder is True"),
            ({"sae_type": "crosscoder"}, "its sae_type is 'crosscoder'"),
            ({"apply_decoder_bias_to_pre_encoder": True}, "apply_decoder_bias_to_pre_encoder is true for a transcoder"),
            (
                {"dataset_average_activation_norm": None},
                "has no dataset_average_activation_norm, on which its threshold",
            ),
            ({"act_fn": "topk", "top_k": K, "sparsity_include_decoder_norm": True}, "atoms are not of norm 1"),
            ({"d_sae": None, "expansion_factor": 8}, "says d_sae 48, but its weights 12"),
            ({"d_model": 4096}, "says d_model 4096, but its weights 6"),
            ({"norm_activation": "batch-wise"}, "its norm_activation is 'batch-wise'"),
            ({"norm_activation": 0}, "its norm_activation is 0"),
            ({"norm_activation": False}, "its norm_activation is False"),
            ({"hook_point_in": None}, "says hook_point_out 'b' and no hook_point_in"),
        ]
    ):
        with pytest.raises(InputError, match=message):
            llama_scope(tmp_path / f"{number}", **config)


def test_llama_scopes_learned_thresholds_are_for_pre_activations_times_norms(tmp_path):
    llama_scope(tmp_path / "a", norm_activation="inference", sparsity_include_decoder_norm=True, hook_point_out="a")
    log = {"log_jumprelu_threshold": np.log(THRESHOLD)}
    write(tmp_path / "a" / "checkpoints", "final.safetensors", {**LAYERS, "decoder.bias": W["b_dec"], **log})
    linear = pre(X, W, apply_b_dec_to_input=False)
    z = np.where(linear * np.linalg.norm(W["W_dec"], axis=1) > THRESHOLD, relu(linear), 0)
    assert_computes(pretrained.load(tmp_path / "a"), X, z, z @ W["W_dec"] + W["b_dec"])


# --- Qwen-Scope, circuit-tracer and Goodfire, to the facts


def qwen_scope(folder, name="SAE-Res-Qwen3-1.7B-Base-W32K-L0_3", **more):
    state = {"W_enc": W["W_enc"].T, "W_dec": W["W_dec"].T, "b_enc": W["b_enc"], "b_dec": W["b_dec"]} | more
    (folder / name).mkdir(parents=True)
    torch_pickle.write(folder / name / "layer4.sae.pt", state)
    return folder / name / "layer4.sae.pt"


def test_qwen_scopes_k_is_in_the_name_of_its_directory(tmp_path):
    z = top_k(pre(X, W, apply_b_dec_to_input=False), 3)
    for path in (
        qwen_scope(tmp_path),
        qwen_scope(tmp_path, "models--Qwen--SAE-Res-Qwen3-8B-Base-W64K-L0_3/snapshots/1"),
    ):
        assert pretrained.detect(path) == "qwen_scope"
        assert_computes(pretrained.load(path), X, z, z @ W["W_dec"] + W["b_dec"])
    assert pretrained.load(tmp_path / "SAE-Res-Qwen3-1.7B-Base-W32K-L0_3").activation.k == 3
    moved = tmp_path / "layer4.sae.pt"
    moved.write_bytes(path.read_bytes())
    refused("its k is in no file, but in the name of its directory", pretrained.load, moved)
    refused("not an SAE of a known format", pretrained.load, qwen_scope(tmp_path / "a", bias=W["b_dec"]))
    refused("k 99 of 12 latents|99", pretrained.load, qwen_scope(tmp_path, "x-L0_99"))


def circuit_tracer(folder, config=None, **more):
    state = {"W_enc": W["W_enc"].T, "W_dec": W["W_dec"], "b_enc": W["b_enc"], "b_dec": W["b_dec"]} | more
    write(folder, "layer_2.safetensors", {name: np.ascontiguousarray(array) for name, array in state.items()})
    if config is not None:
        (folder / "config.yaml").write_text(config)
    return folder


HOOKS = "model_name: Qwen/Qwen3-4B\nfeature_input_hook: mlp.hook_in\nfeature_output_hook: mlp.hook_out\n"


def test_a_transcoder_of_circuit_tracer(tmp_path):
    pytest.importorskip("yaml")
    linear, skip = (
        pre(X, W, apply_b_dec_to_input=False),
        np.random.default_rng(3).normal(size=(D, D)).astype(np.float32),
    )
    z = relu(linear)
    model = pretrained.load(circuit_tracer(tmp_path / "a", HOOKS))
    assert model.transcoder
    assert_computes(model, X, z, z @ W["W_dec"] + W["b_dec"])
    assert pretrained.describe(tmp_path / "a")["site"] == "Qwen/Qwen3-4B, mlp.hook_in"
    model = pretrained.load(circuit_tracer(tmp_path / "b", W_skip=skip) / "layer_2.safetensors")
    np.testing.assert_allclose(
        jaxsae.reconstruct(model, jnp.asarray(X)), z @ W["W_dec"] + W["b_dec"] + X @ skip.T, rtol=2e-5, atol=2e-5
    )
    jump = circuit_tracer(tmp_path / "c", **{"activation_function.threshold": THRESHOLD})
    z = np.where(linear > THRESHOLD, relu(linear), 0)
    assert_computes(pretrained.load(jump), X, z, z @ W["W_dec"] + W["b_dec"])


def test_a_transcoder_of_circuit_tracer_that_is_another_is_refused(tmp_path):
    pytest.importorskip("yaml")
    refused(
        "its activation is 'topk', expected one of",
        pretrained.load,
        circuit_tracer(tmp_path / "a", "activation: topk\nk: 3\n"),
    )
    refused(
        "has no activation_function.threshold",
        pretrained.load,
        circuit_tracer(tmp_path / "b", "activation: jump_relu\n"),
    )
    refused(
        "holds .*k, which ReLU of circuit_tracer|holds k",
        pretrained.load,
        circuit_tracer(tmp_path / "c", k=np.float32([3])),
    )
    negative = circuit_tracer(tmp_path / "d", **{"activation_function.threshold": -THRESHOLD})
    refused("has negative thresholds", pretrained.load, negative)
    refused("is damaged", pretrained.load, circuit_tracer(tmp_path / "e", "a: [\n"))
    several = circuit_tracer(tmp_path / "f")
    (several / "layer_3.safetensors").write_bytes((several / "layer_2.safetensors").read_bytes())
    refused("for each of several layers; pass the file of one", pretrained.load, several)


def test_goodfires_two_linear_layers(tmp_path):
    layers = {"encoder_linear.weight": W["W_enc"].T, "encoder_linear.bias": W["b_enc"]}
    layers |= {"decoder_linear.weight": W["W_dec"].T, "decoder_linear.bias": W["b_dec"]}
    torch_pickle.write(tmp_path / "sae.pth", layers)
    z = relu(pre(X, W, apply_b_dec_to_input=False))
    assert pretrained.detect(tmp_path / "sae.pth") == "goodfire"
    assert_computes(pretrained.load(tmp_path / "sae.pth"), X, z, z @ W["W_dec"] + W["b_dec"])
    torch_pickle.write(tmp_path / "sae.pth", layers | {"more": W["b_dec"]})
    refused("holds more, which ReLU of goodfire", pretrained.load, tmp_path / "sae.pth")


# --- any format


def test_a_directory_of_two_formats_must_be_told(tmp_path):
    pretrained.save(sae(), tmp_path / "sae")
    pretrained.save(sae(2, activation=jaxsae.ReLU()), tmp_path / "third", format="dictionary_learning")
    for file in (tmp_path / "third").iterdir():
        (tmp_path / "sae" / file.name).write_bytes(file.read_bytes())
    with pytest.raises(InputError, match=r"holds SAEs of several formats \(jaxsae, dictionary_learning\); pass format"):
        pretrained.load(tmp_path / "sae")
    assert_same_bits(pretrained.load(tmp_path / "sae", format="jaxsae"), sae())
    assert_same_bits(pretrained.load(tmp_path / "sae", format="dictionary_learning"), sae(2, activation=jaxsae.ReLU()))


def test_what_is_no_sae_is_refused_in_one_line(tmp_path):
    (tmp_path / "empty").mkdir()
    with pytest.raises(InputError, match="the directory is empty; expected a saved SAE"):
        pretrained.load(tmp_path / "empty")
    code = {"indices": np.zeros((4, 2), np.int32), "values": np.ones((4, 2), np.float32)}
    np.savez(tmp_path / "codes.npz", **code)
    np.save(tmp_path / "x.npy", X)
    write(tmp_path / "rows", "x.safetensors", {"x": X})
    (tmp_path / "notes.txt").write_text("mine")
    for name in ("codes.npz", "x.npy", "rows", "rows/x.safetensors", "notes.txt"):
        with pytest.raises(InputError, match="not an SAE of a known format; expected one of: jaxsae") as caught:
            pretrained.load(tmp_path / name)
        assert str(caught.value).startswith(str(tmp_path / name))


def test_float64_is_asked_for_where_it_can_be_had(tmp_path, x64):
    pretrained.save(sae(), tmp_path / "sae")
    assert pretrained.load(tmp_path / "sae", dtype="float64").W_dec.dtype == np.float64
    with jax.enable_x64(False), pytest.raises(InputError, match="got dtype 'float64', which needs jax_enable_x64"):
        pretrained.load(tmp_path / "sae", dtype="float64")


def test_a_format_is_told_by_contents_and_not_by_names(tmp_path):
    fixture("")
    for case in CASES:
        for file in ("sae_weights.safetensors", "sae.safetensors", "ae.pt"):
            if (source := fixture(case) / file).is_file():
                folder = tmp_path / case
                folder.mkdir(parents=True)
                target = folder / ("renamed" + source.suffix)
                target.write_bytes(source.read_bytes())
                if (config := fixture(case) / "cfg.json").is_file():
                    (folder / "cfg.json").write_bytes(config.read_bytes())
                assert pretrained.detect(folder) == pretrained.detect(target) == case.split("/")[0]
                assert_same_bits(pretrained.load(target, format=NAMED.get(case)), published(case))
    # The name of one format, the contents of another.
    (tmp_path / "x").mkdir()
    np.savez(tmp_path / "x" / "params.npz", x=X)
    with pytest.raises(InputError, match="not an SAE of a known format"):
        pretrained.load(tmp_path / "x")


def test_a_format_that_is_named_must_be_there(tmp_path):
    pretrained.save(sae(), tmp_path / "sae")
    for format in pretrained.FORMATS.keys() - {"jaxsae"}:
        with pytest.raises(InputError, match="expected") as caught:
            pretrained.load(tmp_path / "sae", format=format)
        assert str(tmp_path / "sae") in str(caught.value)


def test_dtype_is_chosen_and_thresholds_stay_wide(tmp_path):
    model = sae(m=12, d=6, activation=jaxsae.JumpReLU(jnp.asarray(THRESHOLD)))
    for format in ("jaxsae", "saelens", "gemma_scope_2"):
        pretrained.save(model, tmp_path / format, format=format)
        loaded = pretrained.load(tmp_path / format, dtype="bfloat16")
        assert {leaf.dtype for leaf in (loaded.W_enc, loaded.W_dec, loaded.b_enc)} == {jnp.dtype("bfloat16")}
        assert_same_bits(loaded.activation.threshold, THRESHOLD)


def test_conventions_survive_our_own_format_and_are_printed(tmp_path):
    model = dataclasses.replace(sae(), normalisation=normalisation.LayerNorm(1e-3), apply_b_dec_to_input=False)
    pretrained.save(model, tmp_path / "sae")
    loaded = pretrained.load(tmp_path / "sae")
    assert jax.tree.structure(loaded) == jax.tree.structure(model)
    assert str(loaded).splitlines() == [
        "kind          autoencoder, 16 wide, 32 latents, float32",
        "activation    TopK(k=4)",
        "input         LayerNorm(eps=0.001) of x",
        "encoder       input W_enc + b_enc",
        "decoder       z W_dec + b_dec, in the units of the row",
    ]
    pursuit = dataclasses.replace(sae(), activation=jaxsae.autoencoder.activations.MatchingPursuit())
    pretrained.save(pursuit, tmp_path / "pursuit")
    assert pretrained.load(tmp_path / "pursuit").activation.max_steps is None
    assert "none: (input - b_dec) is pursued on W_dec" in str(pursuit)


@pytest.mark.parametrize(
    "format, model, message",
    [
        ("saelens", sae(activation=jaxsae.GroupMax(4)), "saelens has no autoencoders of GroupMax"),
        ("openai", sae(), "openai has no TopK without layer norm"),
        ("gemma_scope", sae(), "gemma_scope has no TopK"),
        ("sparsify", sae(activation=jaxsae.ReLU()), "sparsify has no ReLU"),
        ("dictionary_learning", dataclasses.replace(sae(), transcoder=True), "has no transcoders"),
        ("llama_scope", sae(activation=jaxsae.JumpReLU(jnp.arange(32.0))), "has no more than one threshold"),
        ("gemma_scope_embedding", sae(), "is read, not written; expected one of: jaxsae, saelens"),
        ("sparsify", dataclasses.replace(sae(), normalisation=normalisation.LayerNorm()), "sparsify has no LayerNorm"),
    ],
)
def test_what_a_format_cannot_say_is_refused(format, model, message, tmp_path):
    with pytest.raises(InputError, match=message):
        pretrained.save(model, tmp_path / "sae", format=format)
    assert list(tmp_path.iterdir()) == []


HALF = [("float16", 6e4), ("bfloat16", 3e38)]


@pytest.mark.parametrize("dtype, large", HALF)
@pytest.mark.parametrize("kind", ["centre", "gate"])
def test_biases_that_overflow_are_refused(kind, dtype, large, tmp_path):
    model = jax.tree.map(lambda leaf: jnp.asarray(leaf, dtype), sae())
    if kind == "gate":
        biases = (jnp.full(model.m, value, dtype) for value in (0.0, large, 0.0))
        model = model.replace(activation=jaxsae.Gated(*biases), b_enc=jnp.full(model.m, large, dtype))
        format = "saelens"
    else:
        model = model.replace(activation=jaxsae.ReLU(), b_enc=jnp.full(model.m, large, dtype))
        W = np.asarray(model.W_enc, np.float64)[:, 0]
        model = model.replace(b_dec=jnp.asarray(-large / 4 * W / np.abs(W).max(), dtype))
        format = "gemma_scope"
    with pytest.raises(InputError, match=f"biases overflow {dtype} in this format; convert it to float32"):
        pretrained.save(model, tmp_path / "sae", format=format)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("dtype, large", HALF)
def test_a_silenced_latent_stays_so_about_another_centre(dtype, large, tmp_path):
    model = jax.tree.map(lambda leaf: jnp.asarray(leaf, dtype), sae(activation=jaxsae.ReLU()))
    model = model.replace(b_enc=model.b_enc.at[3].set(-jnp.inf))
    pretrained.save(model, tmp_path / "sae", format="gemma_scope")
    assert np.flatnonzero(~np.isfinite(pretrained.load(tmp_path / "sae").b_enc)).tolist() == [3]


# --- what else knows the conventions


def test_refining_and_shrinkage_are_in_the_units_of_the_rows():
    model = dataclasses.replace(sae(), normalisation=normalisation.LayerNorm())
    x = 5 + 3 * activations(batch=(64,))
    code = jaxsae.encode(model, x)
    refined, info = jaxsae.refine(model, x, code)
    assert float(info.kkt.max()) < 1e-4
    before, after = (np.sum((x - jaxsae.autoencoder.reconstruct(model, x, c)) ** 2) for c in (code, refined))
    assert after < before
    measured = jaxsae.shrinkage(model, x, code, refined)
    np.testing.assert_allclose([measured.error_before, measured.error_after], [before, after], rtol=1e-4)
    np.testing.assert_allclose(measured.gamma_after, 1, atol=1e-4)
    with pytest.raises(ValueError, match="this SAE normalises each row"):
        jaxsae.decode(model, code)


def test_an_autoencoder_without_centre_is_refined_for_its_input_and_a_transcoder_asks():
    model = dataclasses.replace(sae(), apply_b_dec_to_input=False)
    x = activations(batch=(64,))
    refined, _ = jaxsae.refine(model, x)
    assert float(jaxsae.shrinkage(model, x, jaxsae.encode(model, x), refined).gamma_after) == pytest.approx(1, abs=1e-4)
    with pytest.raises(ValueError, match="transcoder and no target"):
        jaxsae.refine(dataclasses.replace(model, transcoder=True), x)


def test_a_row_without_spread_is_its_own_mean():
    model = dataclasses.replace(sae(), normalisation=normalisation.LayerNorm())
    x = jnp.full((64, 16), 3.0)
    code = jaxsae.encode(model, x)
    np.testing.assert_allclose(jaxsae.autoencoder.reconstruct(model, x, code), x)
    refined, _ = jaxsae.refine(model, x, code)
    assert np.isfinite(np.asarray(refined.values)).all()


def test_layer_norm_of_float64_is_numpys(x64):
    x = np.random.default_rng(0).normal(size=(3, 7))
    inputs, scale, shift = normalisation.LayerNorm()(jnp.asarray(x))
    np.testing.assert_allclose(scale[:, 0], x.std(1, ddof=1), rtol=1e-12)
    np.testing.assert_allclose(inputs, (x - x.mean(1, keepdims=True)) / (x.std(1, ddof=1, keepdims=True) + 1e-5))
    np.testing.assert_allclose(shift[:, 0], x.mean(1))
