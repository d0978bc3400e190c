"""Rows that poison a training are told, and can be left out."""

import json
import shutil
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest
from problems import cli, refused

import jaxsae
from jaxsae import data
from jaxsae.app import evaluation, units
from jaxsae.app.commands import texts
from jaxsae.data import cleaning, shards

RNG = np.random.default_rng(0)
ROWS = RNG.normal(size=(400, 6)).astype(np.float32)
SINKS = np.arange(7, 400, 100)  # one in a hundred
POISONED = ROWS.copy()
POISONED[SINKS] *= 100


@pytest.mark.parametrize("chunk", [1, 7, 1 << 14])
def test_norms_and_outliers(chunk, monkeypatch):
    monkeypatch.setattr(cleaning, "_CHUNK", chunk)
    np.testing.assert_allclose(cleaning.norms(POISONED), np.linalg.norm(POISONED, axis=1), rtol=1e-6)
    np.testing.assert_array_equal(np.flatnonzero(cleaning.outliers(cleaning.norms(POISONED))), SINKS)
    assert not cleaning.outliers(cleaning.norms(ROWS)).any()
    odd = np.array([np.nan, np.inf, 1.0, 1.0, 40.0])
    assert cleaning.outliers(odd).tolist() == [False] * 4 + [True]
    for none in ([np.nan], [0.0, 0.0, 0.0, 7.0]):
        assert not cleaning.outliers(np.array(none)).any()


def test_kept_rows_are_rows():
    mask = RNG.random(400) < 0.5
    kept, expected = cleaning.keep(POISONED, mask), POISONED[mask]
    assert (kept.shape, kept.dtype, len(kept)) == (expected.shape, expected.dtype, len(expected))
    np.testing.assert_array_equal(np.asarray(kept), expected)
    np.testing.assert_array_equal(kept[[3, 1, 1]], expected[[3, 1, 1]])
    np.testing.assert_array_equal(np.asarray(kept[10:][5:20]), expected[15:30])
    np.testing.assert_array_equal(kept[::7], expected[::7])
    assert cleaning.keep(POISONED, np.ones(400, bool)) is POISONED
    batches = data.batches(kept, 16, seed=0)
    seen = np.concatenate([next(batches) for _ in range(len(expected) // 16)])
    assert {row.tobytes() for row in seen} <= {row.tobytes() for row in expected}


def harvested(folder, rows=POISONED, contexts=50, norms=True, source=None):
    """As a harvest writes it, contexts of 9 tokens, of which token 3 begins every fourth."""
    tokens = RNG.integers(4, 9, (contexts, 9)).astype(np.int32)
    tokens[::4, 1] = 3
    writer = shards.Writer(folder, width=6, dtype="float32", source=source or {})
    for half in (slice(0, contexts // 2), slice(contexts // 2, contexts)):
        part = rows[8 * half.start : 8 * half.stop]
        writer.append(part, tokens=tokens[half], **({"norms": cleaning.norms(part)} if norms else {}))
    writer.finish()
    return folder, tokens[:, 1:].ravel()


def test_norms_and_tokens_beside_the_rows(tmp_path, monkeypatch):
    folder, tokens = harvested(tmp_path / "x")
    rows = data.open_rows(folder)
    monkeypatch.setattr(cleaning, "norms", lambda rows: pytest.fail("they are beside the rows"))
    np.testing.assert_array_equal(
        np.asarray(rows)[cleaning.mask(folder, rows, max_norm=10.0)], np.delete(POISONED, SINKS, 0)
    )
    np.testing.assert_array_equal(np.asarray(rows)[cleaning.mask(folder, rows, skip_tokens=[3])], POISONED[tokens != 3])
    both = np.asarray(rows)[cleaning.mask(folder, rows, skip_tokens=[3, 5], max_norm=10.0)]
    mask = (tokens != 3) & (tokens != 5)
    mask[SINKS] = False
    np.testing.assert_array_equal(both, POISONED[mask])
    assert cleaning.keep(rows, cleaning.mask(folder, rows)) is rows


def test_norms_of_a_file_are_computed(tmp_path):
    np.save(tmp_path / "x.npy", POISONED)
    rows = data.open_rows(tmp_path / "x.npy")
    assert cleaning.mask(tmp_path / "x.npy", rows, max_norm=10.0).sum() == 396
    refused("nothing says the tokens of its rows", cleaning.mask, tmp_path / "x.npy", rows, skip_tokens=[3])
    folder, _ = harvested(tmp_path / "y", norms=False)
    assert cleaning.mask(folder, data.open_rows(folder), max_norm=10.0).sum() == 396
    refused("no row is left of 400", cleaning.mask, folder, data.open_rows(folder), skip_tokens=range(9))
    refused("no row is left of 400", cleaning.mask, folder, data.open_rows(folder), max_norm=1e-6)


def test_centre_and_scale_are_those_of_the_other_rows():
    said = []
    found = units.measured(POISONED, "x", warn=said.append)
    expected = units.measured(np.delete(POISONED, SINKS, 0), "x", warn=said.append)
    assert found.scale == expected.scale
    np.testing.assert_array_equal(found.centre, expected.centre)
    (line,) = said
    assert line.startswith("1.0% of the rows are more than 30 times the median norm, and have 99% of the mean square")
    rare = np.concatenate([ROWS] * 5)
    rare[3] *= 100
    units.measured(rare, "x", warn=said.append)
    assert len(said) == 1, "one in two thousand is not worth a warning"
    equal = np.ones((400, 6), np.float32)
    equal[SINKS] *= 100
    assert np.isfinite(units.measured(equal, "x", warn=said.append).scale), "the outliers are all that varies"


def test_an_evaluation_with_and_without_them():
    sae = jaxsae.SAE(jnp.eye(6), jnp.zeros(6), 0.5 * jnp.eye(6), jnp.zeros(6), jaxsae.ReLU())
    found, clean = evaluation.evaluate(sae, POISONED), evaluation.evaluate(sae, np.delete(POISONED, SINKS, 0))
    assert "outliers" not in clean
    assert found["outliers"]["rows"] == 4
    assert found["outliers"]["nmse_without"] == pytest.approx(clean["nmse"], rel=1e-6)
    squares = np.sum(np.float64(POISONED) ** 2, axis=1)
    assert found["outliers"]["mean_square"] == pytest.approx(squares[SINKS].sum() / squares.sum(), rel=1e-6)
    with_nan = POISONED.copy()
    with_nan[0] = np.nan
    assert evaluation.evaluate(sae, with_nan)["outliers"]["rows"] == 4


SAE = ["--activation", "topk", "--k", 2, "--latents", 16, "--batch", 32, "--steps", 20, "--heldout", 50, "--no-auxk"]


def test_a_training_leaves_them_out_and_says_how_many(tmp_path, capsys):
    folder, tokens = harvested(tmp_path / "x")
    kept = (tokens != 3) & ~np.isin(np.arange(400), SINKS)
    np.save(tmp_path / "clean.npy", POISONED[kept])
    assert cli("train", "--data", tmp_path / "clean.npy", *SAE, "--out", tmp_path / "a") == 0
    capsys.readouterr()
    assert cli("train", "--data", folder, *SAE, "--skip-tokens", 3, "--max-norm", 10, "--out", tmp_path / "b") == 0
    assert "times the median norm" not in capsys.readouterr().err
    reports = [json.loads((tmp_path / name / "report.json").read_text()) for name in "ab"]
    assert reports[1]["data"]["dropped"] == 400 - kept.sum()
    assert reports[0]["heldout"] == reports[1]["heldout"]
    weights = [(tmp_path / name / "sae/sae.safetensors").read_bytes() for name in "ab"]
    assert weights[0] == weights[1]
    assert cli("train", "--data", folder, *SAE, "--out", tmp_path / "b") == 2
    assert "holds another run" in capsys.readouterr().err
    assert cli("train", "--data", folder, *SAE, "--out", tmp_path / "c") == 0
    assert "% of the rows are more than 30 times the median norm" in capsys.readouterr().err


LLAMA = Path(__file__).parent / "language_models" / "llama"


def test_tokens_by_their_names_in_the_model_of_the_harvest(tmp_path):
    model = tmp_path / "model"
    shutil.copytree(LLAMA, model)
    (model / "config.json").write_text(
        json.dumps(json.loads((model / "config.json").read_text()) | {"eos_token_id": [3, 5]})
    )
    rows = [harvested(tmp_path / name, source={"model": str(model)})[0] for name in "ab"]
    assert texts.token_numbers(["7", "eos", "5"], rows) == [7, 3, 5]
    assert texts.token_numbers(["7", "0", "7"], [tmp_path / "x.npy"]) == [7, 0]
    refused("a: its model has no pad token", texts.token_numbers, ["eos", "pad"], rows)
    other, _ = harvested(tmp_path / "c", source={"model": str(LLAMA)})
    refused("c: eos are other tokens there than in", texts.token_numbers, ["eos"], [*rows, other])
    refused("nothing says which model", texts.token_numbers, ["bos"], [tmp_path / "x.npy"])
    gone, _ = harvested(tmp_path / "d", source={"model": "models/gone"})
    said = refused("d: its model cannot be read here", texts.token_numbers, ["bos"], [gone])
    assert "models/gone: no such file" in said and said.endswith("; pass the numbers of tokens.")
    assert cli("train", "--data", gone, *SAE, "--skip-tokens", "bos", "--out", tmp_path / "z") == 2
    assert cli("train", "--data", *rows, *SAE, "--steps", 1, "--skip-tokens", "eos", "--out", tmp_path / "z") == 0
    tokens = np.concatenate([shards.column(path, "tokens")[:, 1:].ravel() for path in rows])
    report = json.loads((tmp_path / "z" / "report.json").read_text())
    assert report["data"]["dropped"] == np.isin(tokens, [3, 5]).sum()
    assert json.loads((tmp_path / "z" / "config.json").read_text())["skip_tokens"] == ["eos"]


def test_the_command_says_what_outliers_are(tmp_path, capsys):
    from problems import sae

    from jaxsae import pretrained

    np.save(tmp_path / "x.npy", POISONED)
    pretrained.save(sae(d=6), tmp_path / "sae")
    assert cli("eval", "--sae", tmp_path / "sae", "--data", tmp_path / "x.npy") == 0
    assert (
        "4 rows are more than thirty times as long as the median, and have 99% of the mean" in capsys.readouterr().err
    )
