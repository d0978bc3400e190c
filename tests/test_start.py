"""Trainings that go on from an autoencoder: of a run, one of its saves, or another library."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from problems import assert_same_bits, cli, refused, sparse_rows

import jaxsae
from jaxsae import pretrained, sharding
from jaxsae.app import evaluation, runs
from jaxsae.app.options import Options
from jaxsae.autoencoder import normalisation

D, M = 32, 64
X = 3 * sparse_rows(1024, d=D)[0] + np.linspace(-1, 1, D, dtype=np.float32)  # in units and about a centre of their own
STILL = {"batch": 64, "steps": 1, "heldout": 256, "learning_rate": 1e-9, "auxk": False}


def published(activation, d=D, m=M):
    model = jaxsae.init(jax.random.key(3), d=d, m=m, activation=activation, b_dec=jnp.linspace(-1, 1, d))
    return model.replace(b_enc=jnp.linspace(-0.1, 0.1, m))


KINDS = {
    "relu": (jaxsae.ReLU(), {"l1": 0.1}),
    "topk": (jaxsae.TopK(4), {"k": 4}),
    "abstopk": (jaxsae.AbsTopK(4), {"k": 4}),
    "groupmax": (jaxsae.GroupMax(4), {"k": 4}),
    "jumprelu": (jaxsae.JumpReLU(jnp.linspace(0.1, 0.5, M), bandwidth=0.03), {"k": 4}),
    "gated": (jaxsae.Gated(*(jnp.linspace(-0.1, 0.1, M) * n for n in (1, 2, 3))), {"l1": 0.1}),
    "batchtopk": (jaxsae.BatchTopK(4, jnp.asarray(0.4)), {"k": 4}),
}


@pytest.mark.parametrize("kind", KINDS)
def test_a_training_that_hardly_moves_computes_what_it_started_from(kind, tmp_path):
    activation, sparsity = KINDS[kind]
    model = published(activation)
    pretrained.save(model, tmp_path / "sae")
    options = Options(kind, M, **sparsity, **STILL)
    runs.run(tmp_path / "run", data={"x": X}, options=options, start=tmp_path / "sae")
    found = runs.load(tmp_path / "run/checkpoints/1")  # with thresholds as trained, not yet calibrated
    x, close = X[-256:], {"rtol": 1e-3, "atol": 1e-4}
    for name in ("W_enc", "W_dec", "b_enc", "b_dec"):
        np.testing.assert_allclose(getattr(found, name), getattr(model, name), **close)
    if kind != "batchtopk":  # whose threshold follows the batches
        expected = evaluation.evaluate(model, x)
        assert evaluation.evaluate(found, x)["nmse"] == pytest.approx(expected["nmse"], rel=1e-3)


@pytest.mark.parametrize("kind", ["relu", "jumprelu"])
def test_norms_of_atoms_go_into_the_encoder(kind, tmp_path):
    activation, sparsity = KINDS[kind]
    model = published(activation)
    model = model.replace(W_dec=model.W_dec * jnp.linspace(0.5, 3, M)[:, None])
    pretrained.save(model, tmp_path / "sae", format="saelens")
    runs.run(tmp_path / "run", data={"x": X}, options=Options(kind, M, **sparsity, **STILL), start=tmp_path / "sae")
    found = runs.load(tmp_path / "run/checkpoints/1")
    np.testing.assert_allclose(jnp.linalg.norm(found.W_dec, axis=1), 1, rtol=1e-5)
    a, b = (jaxsae.reconstruct(sae, jnp.asarray(X[-256:])) for sae in (found, model))
    np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-3)


def test_a_save_of_a_run_is_gone_on_from_and_gets_better(tmp_path, capsys):
    np.save(tmp_path / "x.npy", X)
    few = ["train", "--data", tmp_path / "x.npy", "--activation", "topk", "--k", 4, "--latents", M, "--batch", 64]
    few += ["--heldout", 256, "--steps", 60, "--json"]
    assert cli(*few, "--out", tmp_path / "a") == 0
    assert cli(*few, "--out", tmp_path / "b", "--from", tmp_path / "a/checkpoints/60") == 0
    assert cli("train", "--config", tmp_path / "b/config.json", "--out", tmp_path / "c", "--json") == 0
    a, b, c = (json.loads(line)["heldout"]["nmse"] for line in capsys.readouterr().out.splitlines())
    assert b < 0.9 * a
    assert c == b
    assert_same_bits(pretrained.load(tmp_path / "b").W_dec, pretrained.load(tmp_path / "c").W_dec)
    # it resumes only as what it is
    assert cli(*few, "--out", tmp_path / "b") == 2
    assert "got start nothing, expected" in capsys.readouterr().err


def test_on_a_mesh_too(tmp_path):
    pretrained.save(published(jaxsae.TopK(4)), tmp_path / "sae")
    options, found = Options("topk", M, k=4, batch=64, steps=5, heldout=256, learning_rate=1e-3), []
    for mesh in ((1, 1), (2, 4)):
        out = tmp_path / str(mesh)
        with jax.set_mesh(sharding.make_mesh(*mesh)):
            runs.run(out, data={"x": X}, options=options, start=tmp_path / "sae")
        found.append(pretrained.load(out))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5), *found)


TOPK = published(jaxsae.TopK(4))
BAD = {
    "latents": (published(jaxsae.TopK(4), m=32), "an SAE of latents 32 to start from, expected 64"),
    "width": (published(jaxsae.TopK(4), d=8), "an SAE of width 8 to start from, expected 32"),
    "activation": (published(jaxsae.ReLU()), "an SAE of activation ReLU to start from, expected TopK"),
    "transcoder": (dataclasses.replace(TOPK, transcoder=True, apply_b_dec_to_input=False), "of kind transcoder"),
    "normalisation": (dataclasses.replace(TOPK, normalisation=normalisation.LayerNorm()), "got an SAE with LayerNorm"),
    "norms": (TOPK.replace(W_dec=2 * TOPK.W_dec), "atoms of norm 2 to 2, expected 1, without which TopK selects"),
}


@pytest.mark.parametrize("case", BAD)
def test_what_does_not_fit_is_refused_before_anything_is_written(case, tmp_path):
    model, message = BAD[case]
    pretrained.save(model, tmp_path / "sae")
    options = Options("topk", M, k=4, **STILL)
    refused(message, runs.run, tmp_path / "run", data={"x": X}, options=options, start=tmp_path / "sae")
    refused("no such file", runs.run, tmp_path / "run", data={"x": X}, options=options, start=tmp_path / "nothing")
    assert not (tmp_path / "run").exists()
