"""`jaxsae eval --model`: the next-token loss with reconstructions in place of the last rows of a harvest."""

import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from problems import cli

import jaxsae
from jaxsae import data, language_model, pretrained
from jaxsae.data import origin, shards

MODEL = Path(__file__).parent / "language_models" / "llama"
SITES = ("mlp_in", "mlp_out")


@pytest.fixture(scope="module")
def harvested(tmp_path_factory):
    folder = tmp_path_factory.mktemp("harvest")
    (folder / "text.txt").write_bytes(np.random.default_rng(0).integers(97, 123, 500, np.uint8).tobytes())
    argv = ("--model", MODEL, "--layer", 1, "--text", folder / "text.txt", "--context", 16, "--dtype", "float32")
    assert cli("harvest", *argv, "--site", *SITES, "--out", folder / "rows") == 0
    return [folder / "rows" / f"layer_1_{site}" for site in SITES]


def evaluated(capsys, *argv) -> dict:
    assert cli("eval", *argv, "--json") == 0
    return json.loads(capsys.readouterr().out)


def losses(folder, model, fns) -> dict[str, float]:
    """By splicing functions of the input of the MLP at its output, in the last 16 contexts."""
    net, ids = language_model.load(MODEL), jnp.asarray(shards.column(folder, "tokens")[-16:])
    x = language_model.residual(net, ids, 1, "mlp_in")[:, 1:]
    fns = {name: lambda h, fn=fn: h.at[:, 1:].set(fn(x, h[:, 1:])) for name, fn in fns.items()}
    found = language_model.cross_entropy(net, [ids], 1, fns, site="mlp_out")
    return {name: each.cross_entropy for name, each in found.items()}


def test_the_loss_with_an_autoencoder(harvested, tmp_path, capsys):
    rows = data.open_rows(harvested[1])
    sae = jaxsae.init(
        jax.random.key(0), d=24, m=64, activation=jaxsae.TopK(4), b_dec=jnp.asarray(np.asarray(rows).mean(0))
    )
    pretrained.save(sae, tmp_path / "sae", origin=origin.of_rows(harvested[1]))
    found = evaluated(capsys, "--sae", tmp_path / "sae", "--data", harvested[1], "--model", MODEL)
    fns = {
        "before": lambda x, h: jaxsae.decode(sae, jaxsae.encode(sae, h)),
        "after": lambda x, h: jaxsae.decode(sae, jaxsae.refine(sae, h)[0]),
        "zero": lambda x, h: jnp.zeros_like(h),
    }
    for name, value in losses(harvested[1], sae, fns).items():
        np.testing.assert_allclose(found[f"ce_{name}"], value, rtol=1e-5)
    gap = found["ce_zero"] - found["ce_clean"]
    np.testing.assert_allclose(found["recovered_after"], (found["ce_zero"] - found["ce_after"]) / gap, rtol=1e-6)
    assert found["ce_contexts"] == 16 and found["nmse"] < 1
    assert cli("eval", "--sae", tmp_path / "sae", "--data", harvested[1], "--model", MODEL) == 0
    assert f"next-token loss {found['ce_before']:.4f}, refined {found['ce_after']:.4f}" in capsys.readouterr().out


def test_the_loss_with_a_transcoder_in_place_of_the_mlp(harvested, tmp_path, capsys):
    how = {"d": 24, "m": 64, "activation": jaxsae.TopK(4), "b_dec": jnp.zeros(24)}
    model = jaxsae.init(jax.random.key(0), **how, transcoder=True, skip=True)
    pretrained.save(model, tmp_path / "sae", origin=origin.of_pairs(*harvested))
    given = ("--sae", tmp_path / "sae", "--data", harvested[0], "--target", harvested[1], "--model", MODEL)
    found = evaluated(capsys, *given)
    fns = {
        "before": lambda x, h: jaxsae.reconstruct(model, x),
        "after": lambda x, h: jaxsae.reconstruct(model, x, jaxsae.refine(model, x, target=h)[0]),
    }
    for name, value in losses(harvested[0], model, fns).items():
        np.testing.assert_allclose(found[f"ce_{name}"], value, rtol=1e-5)


def test_rows_of_no_harvest_and_another_model_are_refused(harvested, tmp_path, capsys):
    sae = jaxsae.init(jax.random.key(0), d=24, m=64, activation=jaxsae.TopK(4))
    pretrained.save(sae, tmp_path / "sae")
    np.save(tmp_path / "x.npy", np.asarray(data.open_rows(harvested[1])))
    given = ("--sae", tmp_path / "sae", "--model", MODEL)
    for data_path, more, message in (
        (tmp_path / "x.npy", (), f"{tmp_path / 'x.npy'}: does not say of which site it is"),
        (harvested[1], ("--distributed",), "got --model with --distributed"),
        (harvested[1], ("--model", MODEL.with_name("gpt2")), f"got the model {MODEL.with_name('gpt2')}, and"),
    ):
        assert cli("eval", *given, "--data", data_path, *more) == 2
        assert capsys.readouterr().err.startswith(f"jaxsae: {message}")
