"""Training runs from the command line, and the measurement of what they made."""

import contextlib
import json
import os
import sys
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from problems import TRAINING, TRAININGS, activations, cli, compilations, f64, sae, sparse_rows, train

import jaxsae
from jaxsae import pretrained
from jaxsae._core.files import InputError
from jaxsae.app import evaluation, runs
from jaxsae.app.options import Options, resolved
from jaxsae.app.units import Units

D, M, K = 16, 32, 4
CENTRE, SIZE = 100.0, 50.0  # raw activations are neither centred nor of unit size


def raw_rows():
    return np.float32(CENTRE) + np.float32(SIZE) * sparse_rows(600, d=D, atoms=M, k=K)[0]


@pytest.fixture
def data(tmp_path):
    np.save(tmp_path / "x.npy", raw_rows())
    return tmp_path / "x.npy"


@pytest.mark.parametrize("activation", TRAININGS)
def test_a_run_makes_an_autoencoder_of_the_raw_activations(activation, data, tmp_path, capsys):
    out = tmp_path / "run"
    assert train(data, out, activation) == 0
    captured = capsys.readouterr()
    assert "100 held-out rows: NMSE 0." in captured.out
    assert "rows/s" in captured.err
    report = json.loads((out / "report.json").read_text())
    assert (report["steps"], report["skipped"], report["data"]["rows"]) == (60, 0, 500)
    model = pretrained.load(out)
    assert type(model.activation).__name__.lower() == activation.removeprefix("aligned")
    if activation.startswith("aligned"):
        np.testing.assert_allclose(np.sum(f64(model.W_enc).T * f64(model.W_dec), axis=1), 1, atol=1e-5)
    x = jnp.asarray(raw_rows()[-100:])
    z = jaxsae.encode_dense(model, x)
    error, spread = f64(x) - f64(jaxsae.decode(model, z)), f64(x) - f64(x).mean(0)
    measured = report["heldout"]
    np.testing.assert_allclose(measured["nmse"], (error**2).sum() / (spread**2).sum(), rtol=1e-3)
    np.testing.assert_allclose(measured["l0"], (f64(z) != 0).sum(1).mean(), rtol=1e-6)
    everything = jaxsae.encode_dense(model, jnp.asarray(raw_rows()))
    fires = (f64(everything) != 0).sum(0)
    assert abs(np.mean(fires == 0) - measured["dead"]) * M <= 1 and measured["dead_rows"] == 600
    log2_histogram = [np.sum(fires == 0), *(np.sum((fires >= 2**n) & (fires < 2 ** (n + 1))) for n in range(10))]
    np.testing.assert_allclose(
        measured["firing"], log2_histogram[: len(measured["firing"])], atol=1
    )  # rows at a threshold
    assert sum(measured["firing"]) == M
    assert measured["nmse"] < 0.9
    (events,) = out.glob("events.out.tfevents*")
    assert b"nmse" in events.read_bytes()


def test_eval_prints_what_the_run_measured(data, tmp_path, capsys):
    assert train(data, tmp_path / "run", "topk", "--json") == 0
    np.save(tmp_path / "heldout.npy", raw_rows()[-100:])
    assert json.loads(capsys.readouterr().out) == json.loads((tmp_path / "run" / "report.json").read_text())
    assert cli("eval", "--sae", tmp_path / "run", "--data", tmp_path / "heldout.npy", "--json") == 0
    measured = json.loads(capsys.readouterr().out)
    reported = json.loads((tmp_path / "run" / "report.json").read_text())["heldout"]
    of_more_rows = ("dead", "dead_rows", "firing")
    assert {**measured, **{name: reported[name] for name in of_more_rows}} == reported
    assert (measured["rows"], measured["dead_rows"], reported["dead_rows"]) == (100, 100, 600)
    assert cli("eval", "--sae", tmp_path / "run", "--data", tmp_path / "heldout.npy") == 0
    out = capsys.readouterr().out
    assert f"{measured['nmse']:.4f}" in out
    assert f"4: {measured['nmse_at']['4']:.4f}" in out


def test_eval_of_a_progressive_code_is_that_of_its_largest_values():
    model, x = sae(m=M), activations(batch=(50,))
    found = evaluation.evaluate(model, np.asarray(x))["nmse_at"]
    z = f64(jaxsae.encode_dense(model, x))
    for n in (1, 2, 4):
        cut = np.where(z >= np.sort(z, axis=1)[:, [-n]], z, 0)
        error = f64(x) - cut @ f64(model.W_dec) - f64(model.b_dec)
        np.testing.assert_allclose(found[str(n)], (error**2).sum() / ((f64(x) - f64(x).mean(0)) ** 2).sum(), rtol=1e-4)
    assert sorted(found) == ["1", "2", "4"]


def test_what_cannot_be_measured_during_a_training_is_not_logged(tmp_path, monkeypatch):
    original, logged = evaluation.evaluate, []
    monkeypatch.setattr(evaluation, "evaluate", lambda *args: original(*args) | {"nmse": None})
    log = contextlib.nullcontext(lambda step, numbers: logged.append((step, numbers)))
    options = Options("topk", latents=16, k=2, batch=32, steps=4, heldout=32)
    rows = np.asarray(activations(batch=(128,), d=8))
    runs.run(tmp_path / "run", data={"x": rows}, options=options, eval_every=2, log=log)
    measured = [(step, sorted(numbers)) for step, numbers in logged if "heldout_l0" in numbers]
    assert measured == [(2, ["heldout_dead", "heldout_l0"]), (4, ["heldout_dead", "heldout_l0"])]


def test_eval_leaves_out_and_counts_rows_that_are_not_finite():
    x = np.array(activations(batch=(50,)))
    clean = evaluation.evaluate(sae(m=M), x[2:])
    x[0, 3], x[1, 0] = np.nan, np.inf
    spoilt = evaluation.evaluate(sae(m=M), x)
    assert spoilt["nonfinite"] == 2
    np.testing.assert_allclose(spoilt["nmse"], clean["nmse"], rtol=1e-5)


@pytest.mark.parametrize("activation", ["batchtopk", "jumprelu"])
def test_the_l0_asked_for_is_that_of_rows_held_out(activation, data, tmp_path):
    options = Options(activation, M, k=K, batch=64, steps=60, heldout=100, learning_rate=1e-2)
    report = runs.run(tmp_path / "run", data=data, options=options)
    np.testing.assert_allclose(report["heldout"]["l0"], K, rtol=0.01)
    assert report["trained"]["rows"] == 500


def test_auxk_starts_in_a_run_of_any_length():
    for steps, batch in ((60, 64), (2000, 1024), (1, 8)):
        found = resolved(Options("topk", M, k=K, steps=steps, batch=batch))
        assert batch <= found.idle_after <= max(batch, steps * batch / 50)
    assert resolved(found._replace(idle_after=7)).idle_after == 7
    objective, _, _ = runs.recipe(Options("topk", M, k=K, steps=100, batch=64), Units(jnp.zeros(D)))
    assert objective.idle_after == 128


def test_the_weights_with_auxk_are_not_those_without(data, tmp_path):
    made = []
    for auxk in (True, False):
        options = Options("topk", M, k=1, batch=64, steps=60, heldout=100, auxk=auxk)
        runs.run(tmp_path / str(auxk), data=data, options=options)
        made.append(pretrained.load(tmp_path / str(auxk)).W_dec)
    assert not np.array_equal(*made)


def test_passes_over_the_data_are_reported_and_above_ten_warned_of(data, tmp_path, capsys):
    assert train(data, tmp_path / "few", "topk") == 0
    captured = capsys.readouterr()
    assert "7.7 passes over 500 rows, learning rate 0.01, AuxK for latents idle for 76 rows" in captured.out
    assert "passes" not in captured.err
    assert train(data, tmp_path / "many", "topk", "--steps", 100) == 0
    assert "warning: 100 steps of 64 rows are 13 passes over 500 rows" in capsys.readouterr().err
    report = json.loads((tmp_path / "many/report.json").read_text())
    assert (report["data"]["passes"], report["options"]["learning_rate"]) == (12.8, 1e-2)


def test_the_same_seed_makes_the_same_autoencoder(data, tmp_path):
    for name in ("a", "b"):
        train(data, tmp_path / name, "topk")
    weights = [(tmp_path / name / "sae/sae.safetensors").read_bytes() for name in "ab"]
    assert weights[0] == weights[1]


def test_weights_and_biases_is_told_the_numbers(data, tmp_path, monkeypatch):
    logged = {}

    @contextlib.contextmanager
    def init(**options):
        logged["options"] = options
        yield types.SimpleNamespace(log=lambda numbers, step: logged.update({step: numbers}))
        logged["closed"] = True

    monkeypatch.setitem(sys.modules, "wandb", types.SimpleNamespace(init=init))
    assert train(data, tmp_path / "run", "topk", "--wandb") == 0
    assert logged.pop("closed")
    options = logged.pop("options")
    assert (options["dir"], options["config"]["k"]) == (str(tmp_path / "run"), K)
    assert list(logged) == [10, 20, 30, 40, 50, 60]
    assert logged[60]["nmse"] < logged[10]["nmse"]


def test_weights_and_biases_that_is_not_installed_is_told(data, tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "wandb", None)
    assert train(data, tmp_path / "run", "topk", "--wandb") == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line == "jaxsae: got --wandb, but wandb is missing; pip install wandb."
    assert not (tmp_path / "run").exists()


def test_batches_with_nan_are_skipped_and_told(data, tmp_path, capsys):
    x = raw_rows()
    x[7, 3] = np.nan
    np.save(data, x)
    assert train(data, tmp_path / "run", "topk") == 0
    report = json.loads((tmp_path / "run/report.json").read_text())
    assert report["skipped"] > 0
    assert report["steps"] == 60
    assert f"warning: {report['skipped']} batches were skipped" in capsys.readouterr().err
    assert all(np.isfinite(leaf).all() for leaf in (pretrained.load(tmp_path / "run").W_enc,))


def test_a_run_that_diverges_keeps_the_last_good_autoencoder(data, tmp_path, capsys):
    x = raw_rows()
    x[:500:3] = np.nan  # in every batch
    np.save(data, x)
    assert train(data, tmp_path / "run", "topk") == 2
    err = capsys.readouterr().err.splitlines()[-1]
    assert "training diverged" in err
    assert str(tmp_path / "run/sae") in err
    assert np.isfinite(pretrained.load(tmp_path / "run").W_dec).all()


BAD = {
    "no k": (["--activation", "topk"], "topk is made sparse by k; pass k, and no l1."),
    "both": (["--activation", "topk", "--k", 4, "--l1", 1], "topk is made sparse by k; pass k, and no l1."),
    "no l1": (["--activation", "relu", "--k", 4], "relu is made sparse by l1; pass l1, and no k."),
    "k = 0": (["--activation", "topk", "--k", 0], "got --k 0; pass a whole number from 1 to 2147483647."),
    "k > m": (["--activation", "topk", "--k", 33], "got k 33 for 32 latents; pass k from 1 to 32."),
    "name": (["--activation", "softplus", "--k", 4], "got --activation 'softplus', expected one of: relu, topk,"),
    "groups": (["--activation", "groupmax", "--k", 5], "groupmax needs a k that divides them."),
    "multi": (["--activation", "batchtopk", "--k", 5, "--multi-topk"], "got multi-topk for batchtopk; it is for topk."),
    "rows": (["--activation", "topk", "--k", 4, "--batch", 501], "holds 600 rows, but a batch and the held-out rows"),
    "batch": (["--activation", "topk", "--k", 4, "--batch", 0], "got --batch 0; pass a whole number from 1 to"),
}


@pytest.mark.parametrize("case", BAD)
def test_a_bad_option_is_one_clear_line(case, data, tmp_path, capsys):
    options, message = BAD[case]
    assert cli("train", "--data", data, "--out", tmp_path / "run", *TRAINING, *options) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert message in line
    assert not (tmp_path / "run").exists()


def test_eval_of_another_width(tmp_path, capsys):
    pretrained.save(sae(m=M), tmp_path / "sae")
    np.save(tmp_path / "x.npy", np.ones((4, 7), np.float32))
    assert cli("eval", "--sae", tmp_path / "sae", "--data", tmp_path / "x.npy") == 2
    assert (
        capsys.readouterr().err
        == "jaxsae: got rows of width 7, but this SAE has d = 16; pass the data it was made for.\n"
    )


@pytest.mark.parametrize("row", [3, 590], ids=["trained on", "held out"])
def test_a_value_that_overflows_is_named_and_is_no_infinity(row, data, tmp_path, capsys):
    x = raw_rows().astype(np.float64)
    x[row, 5] = 1e39
    np.save(data, x)
    assert train(data, tmp_path / "run", "topk") == 2
    line = f"jaxsae: {data}: row {row} holds 1e+39, 1 finite values overflow float32; scale it.\n"
    assert capsys.readouterr().err == line
    pretrained.save(sae(m=M), tmp_path / "sae")
    assert cli("eval", "--sae", tmp_path / "sae", "--data", data) == 2
    assert f"row {row} holds 1e+39" in capsys.readouterr().err


def test_data_with_nothing_to_learn(tmp_path):
    np.save(tmp_path / "x.npy", np.ones((600, D), np.float32))
    options = Options("topk", M, k=K, batch=64, heldout=100)
    with pytest.raises(InputError, match="all rows are equal, or none is finite"):
        runs.run(tmp_path / "run", data=tmp_path / "x.npy", options=options)


def test_rethresholding_keeps_the_latents_and_moves_the_l0():
    model, x = sae(m=M), activations(batch=(400,))
    for l0 in (2.0, 4.0, 7.5):
        thresholded = jaxsae.autoencoder.rethreshold(model, x, l0)
        code = jaxsae.encode(thresholded, x, capacity=M)
        np.testing.assert_allclose(code.l0.mean(), l0, atol=1e-6)
    with pytest.raises(ValueError, match=r"got l0 = 33\.0 for 32 latents"):
        jaxsae.autoencoder.rethreshold(model, x, 33.0)


def test_devices_made_of_one_cpu_have_threads_for_all_to_wait(tmp_path, monkeypatch):
    monkeypatch.delenv("PJRT_NPROC")
    options = ("--activation", "topk", "--k", K, "--latents", M, "--out", tmp_path / "run", "--mesh", 2, 4)
    assert cli("train", "--data", tmp_path / "none.npy", *options) == 2
    assert int(os.environ["PJRT_NPROC"]) >= 8 * 8


@pytest.mark.parametrize("command", ["train", "refine", "eval"])
def test_a_longer_run_on_more_rows_compiles_no_more(command, data, tmp_path):
    """A program for each batch, block or step would show."""
    x = np.load(data)
    np.save(tmp_path / "more.npy", np.concatenate([x] * 5))
    assert train(data, tmp_path / "sae", "relu") == 0

    def programs(rows, steps, out):
        jax.clear_caches()
        with compilations() as seen:
            if command == "train":
                assert train(rows, out, "relu", "--steps", steps) == 0
            else:
                options = ("--out", out) if command == "refine" else ()
                assert cli(command, "--sae", tmp_path / "sae", "--data", rows, *options) == 0
        return len(seen)

    few, most = programs(data, 60, tmp_path / "a"), programs(tmp_path / "more.npy", 180, tmp_path / "b")
    assert most <= few <= {"train": 80, "refine": 80, "eval": 40}[command]
