"""Transcoders end to end: rows side by side, two scales, training, evaluation, refits, a study."""

import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from problems import activations, cli, every_activation, f64, refused, scipy_nnls

import jaxsae
from jaxsae import data, language_model, pretrained, train
from jaxsae.app import evaluation, runs, study
from jaxsae.app.options import Options
from jaxsae.app.units import measured
from jaxsae.autoencoder import rescale, split_rows, stream
from jaxsae.data import batching, origin, shards
from jaxsae.language_model import harvest
from jaxsae.train import objectives

D, D_OUT, M = 6, 5, 16
MODEL = Path(__file__).parent / "language_models" / "llama"


def transcoder(activation=None, *, skip=True, m=M) -> jaxsae.SAE:
    """A transcoder with biases that matter."""
    return jaxsae.SAE(
        W_enc=activations(1, batch=(D,), d=m),
        b_enc=0.1 * activations(2, batch=(), d=m),
        W_dec=activations(3, batch=(m,), d=D_OUT),
        b_dec=activations(4, batch=(), d=D_OUT),
        activation=activation or jaxsae.TopK(3),
        W_skip=0.3 * activations(5, batch=(D,), d=D_OUT) if skip else None,
        apply_b_dec_to_input=False,
        transcoder=True,
    )


def pairs(n=640, seed=0) -> tuple[np.ndarray, np.ndarray]:
    """Inputs, and what a transcoder of three latents a row makes of them, each in units of its own."""
    x = np.random.default_rng(seed).normal(size=(n, D)).astype(np.float32)
    y = np.asarray(jaxsae.reconstruct(transcoder(), jnp.asarray(x)))
    return 3 * x + 1, 100 * y + 7


def saved(folder: Path, n=640) -> tuple[Path, Path]:
    for name, rows in zip(("x", "y"), pairs(n), strict=True):
        np.save(folder / f"{name}.npy", rows)
    return folder / "x.npy", folder / "y.npy"


# --- Rows side by side


def test_rows_side_by_side_are_those_of_both(tmp_path):
    x, y = pairs(50)
    writer = shards.Writer(tmp_path / "y", width=D_OUT, dtype="float32", source={})
    for part in (y[:20], y[20:]):
        writer.append(part)
    rows = data.beside([x, data.open_rows(tmp_path / "y")], ["x", "y"])
    whole = np.concatenate([x, y], axis=1)
    assert (rows.shape, rows.dtype) == (whole.shape, whole.dtype)
    np.testing.assert_array_equal(np.asarray(rows), whole)
    np.testing.assert_array_equal(rows[np.array([44, 3, 3])], whole[[44, 3, 3]])
    np.testing.assert_array_equal(rows[-1], whole[-1])
    np.testing.assert_array_equal(np.asarray(rows[10:40][5:]), whole[15:40])
    np.testing.assert_array_equal(rows[5:30:7], whole[5:30:7])
    np.testing.assert_array_equal(next(batching.batches(rows, 16, seed=3)), next(batching.batches(whole, 16, seed=3)))
    assert data.fingerprint(rows) != data.fingerprint(data.beside([x, y[::-1]], ["x", "y"]))
    assert data.beside([x.astype(np.float16), y], ["x", "y"]).dtype == np.float32
    refused("y: has 49 rows, and x 50; pass rows of the same", data.beside, [x, y[1:]], ["x", "y"])


def test_a_checksum_of_both():
    parts = [data.LazyRows(lambda n: np.zeros((4, 1)), np.array([0, 4]), range(4), 1, float, name) for name in "ab"]
    other = data.LazyRows(lambda n: np.zeros((4, 1)), np.array([0, 4]), range(4), 1, float, "c")
    same, changed = (data.beside(each, ["x", "y"]) for each in (parts, [parts[0], other]))
    assert data.fingerprint(same) != data.fingerprint(changed)


def test_the_rows_of_a_transcoder_are_split():
    rows = jnp.asarray(np.concatenate(pairs(7), axis=1))
    x, target = split_rows(transcoder(), rows)
    np.testing.assert_array_equal(x, rows[:, :D])
    np.testing.assert_array_equal(target, rows[:, D:])
    with pytest.raises(ValueError, match="expected 11, 6 of the input and 5 of the target"):
        split_rows(transcoder(), rows[:, :D])
    with pytest.raises(ValueError, match=r"width \(11,\), expected 6; pass"):
        split_rows(jaxsae.init(jax.random.key(0), d=D, m=M, activation=jaxsae.TopK(2)), rows)


# --- Units


@pytest.mark.parametrize("skip", [False, True])
@pytest.mark.parametrize("name", [name for name in every_activation() if name != "MatchingPursuit"])
def test_a_change_of_both_units(name, skip):
    model, x = transcoder(every_activation(M)[name], skip=skip), activations(9, batch=(20,), d=D)
    changed = rescale(model, 0.25, 4.0)
    np.testing.assert_allclose(
        jaxsae.reconstruct(changed, x), jaxsae.reconstruct(model, 0.25 * x) / 4, rtol=2e-5, atol=1e-5
    )
    np.testing.assert_array_equal(changed.W_dec, model.W_dec)
    np.testing.assert_array_equal(
        jaxsae.encode_dense(changed, x) != 0, jaxsae.encode_dense(model, jnp.float32(0.25) * x) != 0
    )


def test_a_transcoder_has_two_scales_and_an_autoencoder_one():
    with pytest.raises(ValueError, match="a transcoder and no target_scale"):
        rescale(transcoder(), 2.0)
    with pytest.raises(ValueError, match="a target_scale and an autoencoder"):
        rescale(jaxsae.init(jax.random.key(0), d=4, m=8, activation=jaxsae.ReLU()), 2.0, 2.0)


def test_inputs_and_targets_have_unit_mean_square_each():
    rows = np.concatenate(pairs(5000), axis=1)
    units = measured(rows, "x", D)
    scaled = units.scaled(rows)
    for part in (scaled[:, :D], scaled[:, D:]):
        assert abs(np.mean(np.sum((part - np.median(part, 0)) ** 2, 1)) - 1) < 0.1
    np.testing.assert_allclose(units.unscaled(scaled), rows, rtol=1e-6)
    model = transcoder()
    np.testing.assert_allclose(units.for_training(units.for_data(model)).W_enc, model.W_enc, rtol=1e-6)


# --- Training


def test_the_loss_of_rows_side_by_side_is_that_of_a_pair():
    x, y = (jnp.asarray(part) for part in pairs(32))
    model = transcoder()
    state = train.init_state(model, train.default_optimizer(1e-3))
    objective = objectives.Objective((objectives.AuxK(4),), idle_after=0)
    side_by_side, _ = objective(model, jnp.concatenate([x, y], axis=1), state)
    pair, _ = objective(model, (x, y), state)
    assert float(side_by_side) == float(pair)
    error = np.mean(np.sum((f64(y) - f64(jaxsae.reconstruct(model, x))) ** 2, axis=1))
    without = objectives.Objective()(model, (x, y), state)[0]
    np.testing.assert_allclose(without, error, rtol=1e-5)


OPTIONS = Options("topk", latents=32, k=3, batch=64, steps=150, heldout=128, learning_rate=1e-2)


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    folder = tmp_path_factory.mktemp("transcoder")
    x, y = saved(folder, 4000)
    report = runs.run(folder / "run", data=x, target=y, options=OPTIONS._replace(skip=True))
    return folder, report


def test_a_run_makes_a_transcoder_of_the_raw_rows(trained):
    folder, report = trained
    model, (x, y) = pretrained.load(folder / "run"), (part[-128:] for part in pairs(4000))
    assert model.transcoder and model.W_skip is not None and model.W_dec.shape == (32, D_OUT)
    error = np.sum((f64(y) - f64(jaxsae.reconstruct(model, jnp.asarray(x)))) ** 2) / np.sum(
        (f64(y) - f64(y).mean(0)) ** 2
    )
    np.testing.assert_allclose(report["heldout"]["nmse"], error, rtol=1e-4)
    (x0, y0), ones = pairs(4000), np.ones((4000, 1))
    linear = np.linalg.lstsq(np.concatenate([f64(x0), ones], 1), f64(y0))[1].sum() / np.sum((y0 - y0.mean(0)) ** 2)
    assert error < linear / 2, "its latents do what no skip connection alone can"
    assert report["data"]["width"] == D + D_OUT
    np.testing.assert_allclose(np.linalg.norm(model.W_dec, axis=1), 1, rtol=1e-5)
    assert 2.5 < report["heldout"]["l0"] <= 3, "TopK keeps no negative value"


def test_one_save_of_it_is_loaded_in_the_units_of_the_data(trained):
    folder, _ = trained
    x = jnp.asarray(pairs(20)[0])
    np.testing.assert_allclose(
        jaxsae.reconstruct(runs.load(folder / "run/checkpoints/150"), x),
        jaxsae.reconstruct(pretrained.load(folder / "run"), x),
        rtol=1e-5,
    )


def test_a_run_goes_on_from_another(trained, tmp_path):
    folder, _ = trained
    how = {"data": folder / "x.npy", "target": folder / "y.npy", "start": folder / "run"}
    few = OPTIONS._replace(steps=1, learning_rate=1e-9, skip=True)
    report = runs.run(tmp_path / "more", options=few, **how)
    before = evaluation.evaluate(pretrained.load(folder / "run"), np.concatenate(pairs(4000), axis=1)[-128:])
    np.testing.assert_allclose(report["heldout"]["nmse"], before["nmse"], rtol=1e-3)
    refused("of skip connection True to start from", runs.run, tmp_path / "no", options=few._replace(skip=False), **how)
    del how["target"]
    refused(r"of kind transcoder to start from|output width", runs.run, tmp_path / "no", options=OPTIONS, **how)


@pytest.mark.parametrize("family", ["relu", "batchtopk", "jumprelu", "gated", "matryoshka"])
def test_every_family_is_trained(family, tmp_path):
    x, y = saved(tmp_path)
    sparse = {"l1": 0.05} if family in ("relu", "gated") else {"k": 3}
    options = Options(family, latents=32, batch=64, steps=40, heldout=128, learning_rate=1e-2, **sparse)
    report = runs.run(tmp_path / "run", data=x, target=y, options=options)
    assert report["heldout"]["nmse"] < 0.8 and report["skipped"] == 0
    assert pretrained.load(tmp_path / "run").transcoder


@pytest.mark.parametrize("family", ["alignedrelu", "matchingpursuit"])
def test_families_whose_encoder_is_of_the_decoders_space_are_refused(family, tmp_path):
    x, y = saved(tmp_path)
    sparse = {"l1": 0.05} if family == "alignedrelu" else {"k": 3}
    options = Options(family, latents=32, batch=64, steps=40, heldout=128, **sparse)
    refused(f"got {family} for a transcoder", runs.run, tmp_path / "run", data=x, target=y, options=options)
    assert not (tmp_path / "run").exists()


def test_rows_are_left_out_of_both(tmp_path):
    x, y = pairs()
    x[[5, 70]] *= 100
    np.save(tmp_path / "x.npy", x), np.save(tmp_path / "y.npy", y)
    how = {"data": tmp_path / "x.npy", "target": tmp_path / "y.npy", "options": OPTIONS._replace(steps=3)}
    report = runs.run(tmp_path / "run", max_norm=10.0, **how)
    assert report["data"]["dropped"] == 2
    names = {"x": np.delete(x, [5, 70], 0)}, {"y": np.delete(y, [5, 70], 0)}
    clean = runs.run(tmp_path / "clean", data=names[0], target=names[1], options=OPTIONS._replace(steps=3))
    assert clean["heldout"] == report["heldout"]


# --- Refits


def test_refined_codes_fit_the_target(trained, tmp_path):
    folder, _ = trained
    model, (x, y) = pretrained.load(folder / "run"), pairs(60)
    rows = np.concatenate([x, y], axis=1)
    rows[7, -1] = np.nan
    summary = stream.refine_file(model, rows, tmp_path / "codes.npz")
    codes = np.load(tmp_path / "codes.npz")
    fit = f64(y) - f64(x) @ f64(model.W_skip) - f64(model.b_dec)
    for row in set(range(60)) - {7}:
        active = codes["indices"][row] < model.m
        if not active.any():  # scipy aborts
            continue
        best = scipy_nnls(f64(model.W_dec)[codes["indices"][row][active]].T, fit[row])
        np.testing.assert_allclose(codes["values"][row][active], best, rtol=2e-3, atol=2e-3 * np.abs(fit[row]).max())
    assert (summary.nonfinite, codes["status"][7]) == (1, 2)
    assert summary.shrinkage.nmse_after <= summary.shrinkage.nmse_before
    assert abs(float(summary.shrinkage.gamma_after) - 1) < 1e-3


def test_an_evaluation_leaves_out_rows_whose_target_is_not_finite(trained):
    folder, _ = trained
    model, rows = pretrained.load(folder / "run"), np.concatenate(pairs(60), axis=1)
    spoilt = rows.copy()
    spoilt[7, -1], spoilt[9, 0] = np.nan, np.inf
    found, expected = evaluation.evaluate(model, spoilt), evaluation.evaluate(model, np.delete(rows, [7, 9], 0))
    assert found["nonfinite"] == 2
    np.testing.assert_allclose(found["nmse"], expected["nmse"], rtol=1e-5)


# --- The command


def test_the_commands(trained, tmp_path, capsys):
    folder, report = trained
    given = ("--data", folder / "x.npy", "--target", folder / "y.npy")
    size = ("--latents", 32, "--k", 3, "--batch", 64, "--steps", 150, "--heldout", 128, "--learning-rate", 1e-2)
    assert cli("train", *given, "--activation", "topk", *size, "--skip", "--json", "--out", tmp_path / "run") == 0
    assert json.loads(capsys.readouterr().out)["heldout"] == report["heldout"]
    assert cli("eval", "--sae", tmp_path / "run", *given, "--json") == 0
    model, (x, y) = pretrained.load(tmp_path / "run"), pairs(4000)
    error = np.sum((f64(y) - f64(jaxsae.reconstruct(model, jnp.asarray(x)))) ** 2) / np.sum(
        (f64(y) - f64(y).mean(0)) ** 2
    )
    np.testing.assert_allclose(json.loads(capsys.readouterr().out)["nmse"], error, rtol=1e-4)
    assert cli("refine", "--sae", tmp_path / "run", *given, "--out", tmp_path / "codes.npz", "--strict") == 0
    assert np.load(tmp_path / "codes.npz")["values"].shape == (4000, 3)


@pytest.mark.parametrize(
    "argv, message",
    [
        (("eval", "--sae", "RUN", "--data", "X"), "RUN: is a transcoder; pass --target"),
        (("refine", "--sae", "RUN", "--data", "X", "--target", "SHORT", "--out", "Z.npz"), "SHORT: has 639 rows"),
        (("refine", "--sae", "RUN", "--data", "X", "--target", "Y", "--out", "Y"), "Y: is the target; write the codes"),
        (
            ("eval", "--sae", "RUN", "--data", "Y", "--target", "X"),
            "got inputs and targets 5 and 6 wide, but this transcoder maps 6 to 5",
        ),
        (("train", "--data", "X", "--target", "SHORT", "TRAIN"), "SHORT: has 639 rows, and X 4,000"),
        (("train", "--data", "X", "X", "--target", "Y", "TRAIN"), "got 2 inputs, 6, 6 wide, and 1 targets"),
        (("train", "--data", "X", "--skip", "TRAIN"), "got skip without a target"),
        (("train", "--data", "X", "--transcode", "TRAIN"), "got --transcode without --model"),
        (("train", "--model", "M", "--layer", "1", "--target", "Y", "TRAIN"), "got --target with --model"),
        (("study", "--target", "Y"), "got --target without --data"),
        (("study", "--data", "X", "--target", "Y", "--families", "matchingpursuit"), "got matchingpursuit for trans"),
        (("study", "--data", "X", "--skip"), "got skip without targets"),
        (("study", "--data", "X", "--transcode"), "got --transcode without --model"),
        (("study", "--data", "X", "--sae", "RUN"), "RUN: got a transcoder and no target, 5 wide; pass --target"),
    ],
)
def test_what_cannot_be_is_refused(argv, message, trained, tmp_path, capsys):
    folder, _ = trained
    np.save(tmp_path / "short.npy", pairs(639)[1])
    names = {"RUN": folder / "run", "X": folder / "x.npy", "Y": folder / "y.npy", "SHORT": tmp_path / "short.npy"}
    names |= {"M": MODEL, "Z.npz": tmp_path / "z.npz"}
    argv = [names.get(word, word) for word in argv]
    if argv[-1] == "TRAIN":
        argv[-1:] = ["--activation", "topk", "--k", 3, "--latents", 32, "--out", tmp_path / "run"]
    elif argv[0] == "study":
        argv += ["--out", tmp_path / "run"]
    assert cli(*argv) == 2
    for name, path in names.items():
        message = message.replace(name, str(path)) if message.startswith(name) or f"and {name}" in message else message
    err = capsys.readouterr().err
    assert any(err.startswith(f"jaxsae: {each}") for each in message.split("|")), err
    assert not (tmp_path / "run").exists() and not (tmp_path / "z.npz").exists()


# --- In a language model


@pytest.fixture(scope="module")
def harvested(tmp_path_factory):
    folder = tmp_path_factory.mktemp("harvest")
    (folder / "text.txt").write_bytes(np.random.default_rng(0).integers(97, 123, 4000, np.uint8).tobytes())
    argv = ("--model", MODEL, "--layer", 1, "--text", folder / "text.txt", "--context", 16)
    assert cli("harvest", *argv, "--site", "mlp_in", "mlp_out", "--dtype", "float32", "--out", folder / "rows") == 0
    return folder, argv


def test_a_live_training_is_that_of_a_harvest_and_remembers_both_places(harvested, tmp_path):
    folder, argv = harvested
    size = ("--activation", "topk", "--k", 3, "--latents", 32, "--batch", 64, "--steps", 5, "--heldout", 128)
    files = [folder / "rows" / f"layer_1_{site}" for site in ("mlp_in", "mlp_out")]
    size += ("--window", 512)  # in which both shuffle
    assert cli("train", "--data", files[0], "--target", files[1], *size, "--out", tmp_path / "files") == 0
    assert cli("train", *argv, "--transcode", *size, "--out", tmp_path / "live") == 0
    found = [json.loads((tmp_path / name / "report.json").read_text())["heldout"] for name in ("files", "live")]
    assert found[0] == found[1]
    for name in ("files", "live"):
        place = pretrained.origin(tmp_path / name / "sae")
        assert (place.layer, place.site, place.target_layer, place.target_site) == (1, "mlp_in", 1, "mlp_out")
    relu = ("--activation", "relu", "--l1", 0.05, *size[4:])
    assert cli("train", "--data", files[0], "--target", files[1], *relu, "--out", tmp_path / "relu") == 0
    pretrained.save(
        pretrained.load(tmp_path / "relu"),
        tmp_path / "lens",
        format="saelens",
        origin=pretrained.origin(tmp_path / "relu"),
    )
    metadata = json.loads((tmp_path / "lens/cfg.json").read_text())["metadata"]
    assert (metadata["hook_name"], metadata["hook_name_out"]) == ("blocks.1.mlp.hook_in", "blocks.1.hook_mlp_out")
    assert pretrained.origin(tmp_path / "lens") == pretrained.origin(tmp_path / "relu")
    assert cli("eval", "--sae", tmp_path / "lens", "--data", files[0], "--target", files[1]) == 0


def test_rows_of_another_place_or_text_are_refused(harvested, tmp_path, capsys):
    folder, _ = harvested
    files = [folder / "rows" / f"layer_1_{site}" for site in ("mlp_in", "mlp_out")]
    belongs = origin.of_pairs(*files)
    pretrained.save(transcoder_of(24), tmp_path / "sae", origin=belongs)
    assert cli("eval", "--sae", tmp_path / "sae", "--data", files[0], "--target", files[0]) == 2
    assert "is of the target mlp_out, the rows of the target mlp_in" in capsys.readouterr().err
    (folder / "other.txt").write_text("another text " * 300)
    other = tmp_path / "other"
    where = ("--model", MODEL, "--layer", 1, "--text", folder / "other.txt", "--context", 16)
    assert cli("harvest", *where, "--site", "mlp_out", "--out", other) == 0
    assert cli("eval", "--sae", tmp_path / "sae", "--data", files[0], "--target", other) == 2
    assert "pass rows of the same tokens, from one harvest" in capsys.readouterr().err


def transcoder_of(d: int) -> jaxsae.SAE:
    return jaxsae.init(
        jax.random.key(0), d=d, m=32, activation=jaxsae.TopK(3), b_dec=jnp.zeros(d), transcoder=True, skip=False
    )


def test_a_study_of_transcoders_has_the_loss_with_one_in_place_of_the_mlp(tmp_path, monkeypatch):
    for module in (study, study.sources):
        monkeypatch.setattr(module, "CONTEXT", 16)
    (tmp_path / "text.txt").write_bytes(np.random.default_rng(0).integers(97, 123, 9000, np.uint8).tobytes())
    site = study.HookPoint(MODEL, 1, [tmp_path / "text.txt"], "mlp_in", "mlp_out")
    plan = study.Plan(48, 60, 64, 8 * 15, ("relu", "topk"), (4,), rivals=("omp_nonnegative", "rescaled"), skip=True)
    report = study.run(tmp_path / "out", data=site, plan=plan)
    relu, topk = report["rows"]
    assert topk["certified"] == relu["certified"] == 1 and topk["nmse_after"] <= topk["nmse_before"] < 1
    assert report["data"]["width"] == 24
    model, net = pretrained.load(tmp_path / "out/sae/topk-4"), language_model.load(MODEL)
    contexts = shards.column(harvest.directories(tmp_path / "out/activations", site.points)[0], "tokens")[-8:]
    ids = jnp.asarray(contexts)
    x = language_model.residual(net, ids, 1, "mlp_in")

    def replaced(h):
        return h.at[:, 1:].set(jaxsae.reconstruct(model, x)[:, 1:])

    found = language_model.cross_entropy(net, [ids], 1, {"replaced": replaced}, site="mlp_out")
    np.testing.assert_allclose(report["rows"][1]["ce_before"], found["replaced"].cross_entropy, rtol=1e-5)
    np.testing.assert_allclose(report["ce_clean"], found["clean"].cross_entropy, rtol=1e-5)
    published = study.run(tmp_path / "again", data=site, plan=plan, saes=[str(tmp_path / "out/sae/topk-4")])
    np.testing.assert_allclose(published["rows"][0]["nmse_after"], topk["nmse_after"], rtol=1e-4)
