"""An SAE remembers where it belongs, in every format that has a place for it, and is not measured elsewhere."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from problems import cli, refused, sae

import jaxsae
from jaxsae import pretrained
from jaxsae.data import origin, shards
from jaxsae.data.origin import Origin
from jaxsae.language_model import sites

HERE = Origin("org/gpt2", 8, "mlp_out", 256, "a.txt")
JUMP = jaxsae.JumpReLU(np.full(16, 0.5, np.float32))
# What each format has a place for.
KEPT = {
    "jaxsae": HERE,
    "saelens": HERE,
    "dictionary_learning": HERE._replace(context=None, data=None),
    "gemma_scope_2": HERE._replace(context=None, data=None),
    "llama_scope": HERE._replace(model=None, context=None, data=None),
    "gemma_scope": Origin(),
    "sparsify": Origin(),
    "openai": Origin(),
}


def an_sae(format):
    if format == "openai":
        return sae(activation=jaxsae.ReLU())
    return sae(
        activation=jaxsae.TopK(2) if format == "sparsify" else jaxsae.JumpReLU(np.full(sae().m, 0.5, np.float32))
    )


def test_every_format_that_is_written_is_here():
    assert KEPT.keys() == {name for name, row in pretrained.FORMATS.items() if row.write}


@pytest.mark.parametrize("format", KEPT)
def test_where_an_sae_belongs_is_in_its_files(format, tmp_path, unchecked):
    path = tmp_path / ("sae.pt" if format == "openai" else "sae")
    pretrained.save(an_sae(format), path, format=format, origin=HERE)
    assert pretrained.origin(path) == KEPT[format]
    assert (str(KEPT[format]) in pretrained.describe(path).get("site", "")) or KEPT[format] == Origin()
    pretrained.save(an_sae(format), path, format=format)
    assert pretrained.origin(path) == Origin()


def test_saelens_has_its_own_names(tmp_path, unchecked):
    pretrained.save(an_sae("saelens"), tmp_path / "sae", format="saelens", origin=HERE._replace(site="hook_z"))
    metadata = json.loads((tmp_path / "sae/cfg.json").read_text())["metadata"]
    expected = {"model_name": "org/gpt2", "hook_name": "blocks.8.attn.hook_z", "context_size": 256}
    assert expected.items() <= metadata.items()


@pytest.mark.parametrize("site", sites.SITES)
def test_names_of_sites_are_read_as_they_are_written(site):
    assert sites.parse(sites.hook(3, site)) == (3, site)
    module = sites.module(3, site)
    assert (module is None) == (site in ("resid_pre", "resid_mid", "attn_out"))
    assert module is None or sites.parse(module) == (3, site)


def test_a_hook_that_has_no_name_here_leaves_the_site_unknown(tmp_path, unchecked):
    pretrained.save(an_sae("saelens"), tmp_path / "sae", format="saelens", origin=HERE)
    config = json.loads((tmp_path / "sae/cfg.json").read_text())
    config["metadata"]["hook_name"] = "hook_embed"
    (tmp_path / "sae/cfg.json").write_text(json.dumps(config))
    assert pretrained.origin(tmp_path / "sae") == HERE._replace(layer=None, site=None)
    assert "hook_embed" in pretrained.describe(tmp_path / "sae")["site"]


def rows(folder, **source):
    writer = shards.Writer(folder, width=16, dtype="float32", source=source)
    writer.append(np.random.default_rng(0).normal(size=(200, 16)))
    writer.finish()
    return folder


SAE = ["--activation", "topk", "--k", 2, "--latents", 32, "--batch", 32, "--steps", 3, "--heldout", 32, "--no-auxk"]
FROM = {"model": "org/gpt2", "layer": 8, "site": "mlp_out", "context": 256, "text": ["a.txt"]}


def test_from_rows_to_another_library(tmp_path, capsys):
    data = rows(tmp_path / "x", **FROM)
    assert origin.of_rows(data) == HERE
    assert cli("train", "--data", data, *SAE, "--out", tmp_path / "run") == 0
    assert pretrained.origin(tmp_path / "run") == HERE
    capsys.readouterr()
    assert cli("info", tmp_path / "run") == 0
    assert "site          org/gpt2, layer 8, mlp_out, contexts of 256 tokens, on a.txt" in capsys.readouterr().out
    assert cli("convert", tmp_path / "run", tmp_path / "a", "--to", "saelens") == 0
    assert pretrained.origin(tmp_path / "a") == HERE
    more = ["--model-name", "b", "--hook-name", "blocks.3.hook_resid_pre", "--context-size", 64]
    assert cli("convert", tmp_path / "a", tmp_path / "b", "--to", "jaxsae", *more) == 0
    assert pretrained.origin(tmp_path / "b") == Origin("b", 3, "resid_pre", 64, "a.txt")
    capsys.readouterr()
    assert cli("convert", tmp_path / "a", tmp_path / "c", "--to", "jaxsae", "--hook-name", "mlp_out") == 2
    assert "got --hook-name 'mlp_out', which names no layer" in capsys.readouterr().err
    assert not (tmp_path / "c").exists()


def test_rows_of_several_places_leave_unknown_what_differs(tmp_path):
    data = [rows(tmp_path / "x", **FROM), rows(tmp_path / "y", **FROM | {"layer": 9, "text": ["b.txt"]})]
    assert cli("train", "--data", *data, *SAE, "--out", tmp_path / "run") == 0
    assert pretrained.origin(tmp_path / "run") == HERE._replace(layer=None, data=None)


@pytest.mark.parametrize(
    ("other", "message"),
    [
        ({"layer": 4}, "the SAE is of layer 8, the rows of layer 4; pass rows of its own site."),
        ({"site": "resid_post"}, "the SAE is of site mlp_out, the rows of site resid_post"),
        ({"model": "/models/pythia"}, "the SAE is of org/gpt2, the rows of /models/pythia"),
        ({"model": "/models/GPT2/", "context": 64, "text": ["b.txt"]}, None),
    ],
)
def test_rows_of_another_site_are_refused(other, message, tmp_path, capsys, unchecked):
    path = Path(shutil.copytree(rows(tmp_path / "y", **FROM | other), tmp_path / "x"))
    pretrained.save(sae(d=16), tmp_path / "sae", origin=HERE)
    for command in (["eval"], ["refine", "--out", tmp_path / "codes.npz"]):
        code = cli(command[0], "--sae", tmp_path / "sae", "--data", path, *command[1:])
        assert code == (0 if message is None else 2)
        assert (message or "") in capsys.readouterr().err
        assert (tmp_path / "codes.npz").exists() == (message is None and command[0] == "refine")


def test_a_file_says_nothing_and_a_manifest_may_say_anything(tmp_path):
    np.save(tmp_path / "x.npy", np.zeros((3, 4)))
    assert origin.of_rows(tmp_path / "x.npy") == Origin()
    assert origin.of_rows(rows(tmp_path / "a")) == Origin()
    assert origin.of_rows(rows(tmp_path / "b", model=3, layer="8", site="mlp_out")) == Origin(site="mlp_out")
    refused("damaged or no manifest", origin.of_rows, _damaged(rows(tmp_path / "c")))


def _damaged(folder):
    (folder / shards.MANIFEST).write_text("{")
    return folder
