"""`jaxsae steer` adds a latent where the autoencoder belongs, and refuses what it could only do wrongly."""

import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.tree_util import Partial
from problems import activations, cli, f64, sae

import jaxsae
from jaxsae import autoencoder, language_model as lm, pretrained
from jaxsae.autoencoder.normalisation import AverageNorm, ConstantNorm, LayerNorm
from jaxsae.data.origin import Origin

MODEL = Path(__file__).parent / "language_models/llama"
HERE = Origin("somewhere/Llama", 1, "mlp_out")
PROMPT = "to be or not"

# --- The function


@pytest.mark.parametrize("normalisation", [None, LayerNorm(), ConstantNorm()], ids=lambda n: type(n).__name__)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_what_is_added_is_that_of_a_code_with_more_of_the_latent(normalisation, dtype):
    model, x = sae(activation=jaxsae.TopK(4)).replace(normalisation=normalisation), 3 + activations(batch=(5,))
    z = jaxsae.encode_dense(model, x)
    more = z.at[:, 7].add(2.5)
    expected = f64(x) + f64(jaxsae.reconstruct(model, x, more)) - f64(jaxsae.reconstruct(model, x, z))
    model = jax.tree.map(lambda leaf: leaf.astype(dtype), model)
    found = autoencoder.steer(model, x.astype(dtype), 7, 2.5)
    assert found.dtype == dtype
    np.testing.assert_allclose(f64(found), expected, atol=1e-4 if dtype == "float32" else 0.15)
    np.testing.assert_array_equal(autoencoder.steer(model, x.astype(dtype), 7, 0.0), x.astype(dtype))


def test_a_latent_that_there_is_not(unchecked):
    model, x = sae(), activations()
    for latent in (-1, 32):
        with pytest.raises(ValueError, match=f"got latent {latent}, this SAE has 32; pass one from 0 to 31"):
            autoencoder.steer(model, x, latent, 1.0)
        assert np.isnan(jax.jit(autoencoder.steer)(model, x, latent, 1.0)).all()
    for wrong in (x[:, :3], x.astype(int)):
        with pytest.raises(ValueError, match=r"`steer` got x of shape .* pass activations \(\*b, 16\)"):
            autoencoder.steer(model, wrong, 1, 1.0)
    transcoder = jaxsae.init(jax.random.key(0), d=16, m=32, activation=jaxsae.TopK(4), transcoder=True)
    with pytest.raises(ValueError, match="got a transcoder, whose atoms belong to its target"):
        autoencoder.steer(transcoder, x, 1, 1.0)


# --- The command


@pytest.fixture
def saved(tmp_path):
    model = sae(d=24, m=40)
    pretrained.save(model, tmp_path / "sae", origin=HERE)
    return tmp_path / "sae", model


def steer(path, *more, latent=7, scale=8, model=MODEL):
    return cli(
        *("steer", "--sae", path, "--model", model, "--latent", latent, "--scale", scale, "--prompt", PROMPT),
        *("--tokens", 12, *more),
    )


def shown(capsys):
    return json.loads(capsys.readouterr().out)


def test_it_adds_the_atom_at_the_site_of_the_autoencoder(saved, capsys):
    path, autoenc = saved
    assert steer(path, "--json") == 0
    found = shown(capsys)
    model, tokenizer = lm.load(MODEL), lm.read_tokenizer(MODEL)
    ids = jnp.array([tokenizer.encode(PROMPT).ids])
    add = Partial(lambda v, h: h + v, 8.0 * autoenc.W_dec[7])
    for name, fn in {"clean": Partial(lambda h: h), "steered": add}.items():
        expected = lm.generate(model, ids, 12, layer=1, site="mlp_out", fn=fn)[0].tolist()
        assert found[name] == tokenizer.decode(expected, skip_special_tokens=False)
    assert found["clean"] != found["steered"]
    place = {name: found[name] for name in ("prompt", "layer", "site", "latent", "scale")}
    assert place == {"prompt": PROMPT, "layer": 1, "site": "mlp_out", "latent": 7, "scale": 8.0}
    np.testing.assert_allclose(found["added"], 8 * np.linalg.norm(autoenc.W_dec[7]), rtol=1e-4)
    assert 0 < found["median_norm"] < 1e3


def test_it_prints_both_side_by_side(saved, capsys):
    assert steer(saved[0]) == 0
    out = capsys.readouterr().out
    assert all(word in out for word in ("clean", "steered", "latent 7 + 8 at layer 1, mlp_out", "Added: a vector of"))
    assert out.count(PROMPT) == 2


def test_a_scale_of_0_and_one_seed_give_the_same_text_twice(saved, capsys):
    texts = []
    for seed, scale in ((3, 0), (3, 0), (4, 0), (3, 20)):
        assert steer(saved[0], "--temperature", 1.0, "--seed", seed, "--json", scale=scale) == 0
        texts.append(shown(capsys))
    assert texts[0]["clean"] == texts[0]["steered"] == texts[1]["clean"] == texts[3]["clean"]
    assert texts[3]["steered"] != texts[3]["clean"] != texts[2]["clean"]


def test_a_text_is_shown_up_to_its_end(tmp_path, capsys, monkeypatch):
    pretrained.save(sae(d=24, m=40), tmp_path / "sae", origin=HERE)
    assert steer(tmp_path / "sae", "--json") == 0
    whole = shown(capsys)["clean"]
    third = lm.read_tokenizer(MODEL).encode(whole).ids[2]
    monkeypatch.setattr("jaxsae.language_model.files.stops", lambda *_: [third])
    assert steer(tmp_path / "sae", "--json") == 0
    found = shown(capsys)["clean"]
    assert len(found) < len(whole) and whole.startswith(found)


def test_the_tokens_that_end_a_text(tmp_path):
    tokenizer = lm.read_tokenizer(MODEL)
    assert lm.files.stops(MODEL, tokenizer) == [tokenizer.token_to_id("<|endoftext|>")]


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--latent", 40], "got --latent 40, the SAE has 40; pass one from 0 to 39."),
        (["--layer", 2], "the SAE is of layer 1, the options of layer 2; pass options of its own site."),
        (["--site", "resid_post"], "the SAE is of site mlp_out, the options of site resid_post"),
        (["--site", "nowhere"], "got site 'nowhere'; pass one of resid_pre"),
        (["--layer", 1, "--site", "blocks.2.hook_mlp_out"], "got --layer 1 and a --site of layer 2; pass one of them."),
        (["--model", MODEL.parent / "qwen2"], "the SAE is of somewhere/Llama, the options of"),
        (
            ["--tokens", 96],
            "got a prompt of 12 tokens and --tokens 96; pass a prompt of at least 1, and 3 to 96 in all",
        ),
        (["--scale", "nan"], "got --scale nan; pass a number from"),
        (["--scale", "1e38"], "got --scale 1e+38, at which activations overflow; pass one nearer to 0."),
        (["--scale", "-1e19"], "got --scale -1e+19, at which activations overflow; pass one nearer to 0."),
        (["--prompt", ""], "got --prompt ''; pass a text of at least one character, in UTF-8."),
        (["--prompt", "\udcff"], "got --prompt '\\udcff'; pass a text"),
        (["--temperature", "-1"], "got --temperature -1; pass a number from 0 to"),
    ],
)
def test_what_is_refused(saved, more, message, capsys):
    assert steer(saved[0], *more) == 2
    out, err = capsys.readouterr()
    assert message in err and err.count("\n") == 1 and not out


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({}, "sae: does not say which layer it is of; pass --layer."),
        ({"layer": 5}, "got layer 5, the model has 3; pass one from 0 to 2."),
        ({"layer": 1, "d": 16}, "the SAE is 16 wide, the model's resid_post 24; pass the model and the site"),
        ({"layer": 1, "transcoder": True}, "the SAE is a transcoder, whose atoms belong to another site; pass an"),
        ({"layer": 1, "normalisation": AverageNorm()}, "the SAE expects rows scaled to a mean norm"),
    ],
)
def test_an_autoencoder_that_does_not_fit_is_refused(change, message, tmp_path, capsys):
    change = {"d": 24, **change}
    model = jaxsae.init(
        jax.random.key(0), d=change["d"], m=40, activation=jaxsae.TopK(2), transcoder="transcoder" in change
    )
    model = model.replace(normalisation=change.get("normalisation"))
    pretrained.save(model, tmp_path / "sae")
    layer = ["--layer", change["layer"]] if "layer" in change else []
    assert steer(tmp_path / "sae", *layer) == 2
    assert message in capsys.readouterr().err


def test_an_autoencoder_that_normalises_rows_is_steered_in_their_units(tmp_path, capsys):
    model = sae(d=24, m=40).replace(normalisation=LayerNorm())
    pretrained.save(model, tmp_path / "sae", origin=HERE)
    assert steer(tmp_path / "sae", "--json") == 0
    found = shown(capsys)
    llama, prompt = lm.load(MODEL), jnp.array([lm.read_tokenizer(MODEL).encode(PROMPT).ids])
    ids = jnp.concatenate([prompt, lm.generate(llama, prompt, 12)], axis=1)
    h = jax.jit(lm.residual, static_argnums=(2, 3))(llama, ids, 1, "mlp_out")[0, 1:]
    expected = 8 * np.linalg.norm(model.W_dec[7]) * np.median(np.std(f64(h), axis=-1, ddof=1))
    np.testing.assert_allclose(found["added"], expected, rtol=1e-3)
