"""The commands on published SAEs: what they are, what they become, and how far they shrink."""

import dataclasses
import json

import jax.numpy as jnp
import numpy as np
import pytest
from foreign import fixture, recorded
from problems import cli, rows, sae

import jaxsae
from jaxsae import pretrained
from jaxsae._core.files import InputError
from jaxsae.app import study
from jaxsae.autoencoder.normalisation import LayerNorm


def reconstructed(model, x):
    x = jnp.asarray(x)
    return np.asarray(jaxsae.autoencoder.reconstruct(model, x, jaxsae.encode_dense(model, x)))


@pytest.fixture
def data(tmp_path):
    np.save(tmp_path / "x.npy", rows(600))
    return tmp_path / "x.npy"


def test_info_says_what_decides_what_it_computes(capsys):
    assert cli("info", fixture("saelens/standard_layernorm")) == 0
    assert capsys.readouterr().out.splitlines() == [
        "format        saelens",
        "kind          autoencoder, 16 wide, 64 latents, float32",
        "activation    ReLU()",
        "input         LayerNorm(eps=1e-05) of x",
        "encoder       (input - b_dec) W_enc + b_enc",
        "decoder       z W_dec + b_dec, in the units of the row",
    ]
    assert cli("info", fixture("saelens/skip_transcoder")) == 0
    out = capsys.readouterr().out
    assert "transcoder, 16 to 12 wide" in out
    assert "z W_dec + b_dec + x W_skip" in out


def test_info_says_what_site_it_is_for(tmp_path, capsys):
    pretrained.save(sae(), tmp_path / "sae", format="saelens")
    config = json.loads((tmp_path / "sae" / "cfg.json").read_text())
    config["metadata"] |= {"model_name": "gpt2-small", "hook_name": "blocks.8.hook_resid_pre"}
    (tmp_path / "sae" / "cfg.json").write_text(json.dumps(config))
    assert cli("info", tmp_path / "sae") == 0
    assert capsys.readouterr().out.splitlines()[-1] == "site          gpt2-small, layer 8, resid_pre"


def test_convert_writes_what_computes_the_same(tmp_path, capsys):
    case = "sparsify/topk"
    assert cli("convert", fixture(case), tmp_path / "out", "--to", "saelens") == 0
    assert capsys.readouterr().out == f"Written: {tmp_path / 'out'}, saelens\n"
    io = recorded(case)
    np.testing.assert_allclose(
        jaxsae.encode_dense(pretrained.load(tmp_path / "out"), jnp.asarray(io["x"])), io["z"], atol=2e-5
    )
    assert cli("convert", tmp_path / "out", tmp_path / "half", "--to", "jaxsae", "--dtype", "bfloat16") == 0
    assert pretrained.load(tmp_path / "half").W_dec.dtype == "bfloat16"


@pytest.mark.parametrize(
    "argv, message",
    [
        (("--to", "gemma_scope"), "gemma_scope has no TopK; save it in another format"),
        (("--to", "numpy"), "got --to 'numpy', expected one of: jaxsae, saelens"),
        (("--to", "saelens", "--dtype", "int3"), "got --dtype 'int3', expected one of: float32"),
        (("--to", "saelens", "--revision", "v1"), "got revision 'v1' for"),
    ],
)
def test_convert_refuses_in_one_line(argv, message, tmp_path, capsys):
    assert cli("convert", fixture("sparsify/topk"), tmp_path / "out", *argv) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("jaxsae: ")
    assert message in line
    assert not (tmp_path / "out").exists()


def test_study_of_published_saes_is_one_command(data, tmp_path, capsys):
    # Such as OpenAI's: with layer norm; and one whose values are signed.
    normed = dataclasses.replace(pretrained.load(fixture("saelens/topk")), normalisation=LayerNorm())
    pretrained.save(normed, tmp_path / "openai.pt", format="openai")
    paths = [tmp_path / "openai.pt", fixture("saelens/abstopk")]
    assert cli("study", "--sae", *paths, "--data", data, "--out", tmp_path / "out", "--quick") == 0
    out, _ = capsys.readouterr()
    report = json.loads((tmp_path / "out" / "report.json").read_text())
    assert report["complete"]
    assert [row["family"] for row in report["rows"]] == ["topk", "abstopk"]
    x = np.load(data)[-study.QUICK.heldout :]
    for row, path in zip(report["rows"], paths, strict=True):
        assert (row["k_or_l1"], row["sae"], row["certified"]) == (8, str(path), 1)
        found = reconstructed(pretrained.load(path), x)
        nmse = np.sum((x - found) ** 2) / np.sum((x - x.mean(0)) ** 2)
        assert row["nmse_before"] == pytest.approx(nmse, rel=1e-4)
        assert row["nmse_after"] < row["nmse_before"]
    assert "abst" in out
    assert (tmp_path / "out" / "shrinkage.png").is_file()
    assert not (tmp_path / "out" / "sae").exists()


def test_eval_and_refine_take_any_format(data, tmp_path, capsys):
    for case in ("saelens/gated", "saelens/standard_layernorm", "dictionary_learning/jumprelu"):
        assert cli("eval", "--sae", fixture(case), "--data", data, "--json") == 0
        model, x = pretrained.load(fixture(case)), np.load(data)
        z = jaxsae.encode_dense(model, jnp.asarray(x))
        residual = x - reconstructed(model, x)
        measured = json.loads(capsys.readouterr().out)
        assert measured["nmse"] == pytest.approx(np.sum(residual**2) / np.sum((x - x.mean(0)) ** 2), rel=1e-4)
        assert measured["l0"] == pytest.approx(float((np.asarray(z) != 0).sum(1).mean()), rel=1e-4)
    assert cli("refine", "--sae", fixture("saelens/topk"), "--data", data, "--out", tmp_path / "codes.npz") == 0
    assert cli("eval", "--sae", fixture("saelens/transcoder"), "--data", data) == 2


@pytest.mark.parametrize(
    "case, message", [("saelens/transcoder", "a transcoder"), (None, "rows of width 16, but this SAE has d = 12")]
)
def test_study_refuses_what_is_not_for_these_rows(case, message, data, tmp_path, capsys):
    pretrained.save(sae(d=12), tmp_path / "narrow")
    path = fixture(case) if case else tmp_path / "narrow"
    assert cli("study", "--sae", path, "--data", data, "--out", tmp_path / "out", "--quick") == 2
    assert message in capsys.readouterr().err
    assert cli("study", "--sae", path, "--out", tmp_path / "out") == 2
    assert "got --sae without --data or --model" in capsys.readouterr().err
    with pytest.raises(InputError, match="no activations"):
        study.run(tmp_path / "out", saes=[str(tmp_path / "narrow")])
