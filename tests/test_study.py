import json
import operator
from functools import partial
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import PIL.Image
import pytest
import scipy.optimize
import scipy.special
from problems import compilations, f64, objective_gap

import jaxsae
from jaxsae import data, language_model, pretrained, train
from jaxsae._core.files import InputError, owned
from jaxsae.app import cli, measure, plots, sources, study
from jaxsae.app.options import FAMILIES, Options
from jaxsae.app.tuned import Trained, train_to
from jaxsae.autoencoder.shrinkage import RATIO_EDGES
from jaxsae.autoencoder.stream import refine_blocks
from jaxsae.data import shards

PLAN = study.Plan(latents=128, steps=60, batch=256, heldout=256, families=("relu", "topk", "batchtopk"), l0=(4, 8))
NUMBERS = [
    *("l0", "l0_after", "nmse_before", "nmse_after", "mean_before", "mean_after", "mean_change"),
    *("rising", "gamma_before", "gamma_after", "worst_kkt", "certified"),
    "nmse_omp_nonnegative",
]
OF_RIVALS = [f"nmse_{name}" for name in measure.RIVALS]
TIMES = ("seconds", "milliseconds")


class Study(NamedTuple):
    out: Path
    report: dict
    progress: list  # what the progress callback was called with
    rows: np.ndarray  # as they are in the file


@pytest.fixture(scope="session")
def done(tmp_path_factory):
    """A whole study, small: patches of photographs in units of thousands, about a mean ten times their size."""
    folder, progress = tmp_path_factory.mktemp("study"), []
    rows = 1e3 * (data.image_patches(4000, 2, side=4)[0] + np.linspace(-1, 1, 48, dtype=np.float32))
    np.save(folder / "x.npy", rows)
    report = study.run(folder / "out", data=folder / "x.npy", plan=PLAN, progress=lambda *args: progress.append(args))
    return Study(folder / "out", report, progress, rows)


def strict(path):
    """A JSON file, without the NaN and Infinity that Python alone reads."""

    def refuse(name):
        raise ValueError(f"{name} is not JSON")

    return json.loads(path.read_text(), parse_constant=refuse)


def rows_of(report, family):
    return [row for row in report["rows"] if row["family"] == family]


def untimed(report):
    """A report without what differs from run to run."""
    rows = {
        name: [{key: value for key, value in row.items() if key not in TIMES} for row in report[name]]
        for name in ("rows", "shorter")
    }
    return report | rows


# --- The report


def test_the_report_is_what_was_returned(done):
    saved = strict(done.out / "report.json")
    assert saved == json.loads(json.dumps(done.report))
    assert saved["complete"] is True
    source = str(done.out.parent / "x.npy")
    passes = PLAN.steps * PLAN.batch / 3744
    sizes = {"rows": 3744, "passes": passes, "heldout": PLAN.heldout, "width": 48}
    assert {name: saved["data"][name] for name in ("source", *sizes)} == {"source": source, **sizes}
    assert saved["config"]["seed"] == 0
    assert saved["config"]["latents"] == PLAN.latents
    assert {"jaxsae", "jax", "numpy", "python"} <= set(saved["versions"])


def test_every_row_has_the_fields_of_the_contract(done):
    for row in done.report["rows"]:
        assert {"family", "k_or_l1", "seed", *NUMBERS, *OF_RIVALS} <= set(row)
        assert all(isinstance(row[name], float) and np.isfinite(row[name]) for name in (*NUMBERS, *OF_RIVALS))
        rate = FAMILIES[row["family"]].rate * train.learning_rate(PLAN.latents, PLAN.steps)
        assert row["learning_rate"] == pytest.approx(rate)
        assert row["seconds"]["training"] > 0 < row["seconds"]["measuring"]


def test_there_is_a_row_for_each_family_and_l0(done):
    found = [(row["l0_target"], row["family"], row["seed"], row["steps"]) for row in done.report["rows"]]
    assert found == [(l0, family, 0, 60) for l0 in PLAN.l0 for family in PLAN.families]
    assert done.report["shorter"] == []


def test_every_family_has_the_l0_that_was_asked_for(done):
    for row in done.report["rows"]:
        if row["family"] != "relu":  # sixty steps are few for a penalty's weight to settle
            assert row["l0"] == pytest.approx(row["l0_target"], rel=1e-3)
        assert row["l0_after"] <= row["l0"]
    weights = [row["k_or_l1"] for row in rows_of(done.report, "relu")]
    assert weights[0] > weights[1] > 0  # the larger weight is sparser


@pytest.mark.parametrize("family", PLAN.families)
def test_refinement_is_certified_and_lowers_the_error(done, family):
    for row in rows_of(done.report, family):
        assert row["nmse_after"] < row["nmse_before"] < 1
        assert row["certified"] == 1.0
        assert row["worst_kkt"] <= study.CERTIFIED
        np.testing.assert_allclose(row["gamma_after"], 1, atol=1e-3)
        assert row["nmse_signed"] <= row["nmse_after"] * (1 + 1e-5)
        assert row["nmse_omp"] < row["nmse_signed"]
        assert row["nmse_omp_nonnegative"] < row["nmse_after"]


def test_relu_shrinks_and_topk_does_not(done):
    relu, topk = (rows_of(done.report, family) for family in ("relu", "topk"))
    assert min(row["mean_change"] for row in relu) > 0.1 > max(abs(row["mean_change"]) for row in topk)
    assert max(row["gamma_before"] for row in relu) < 0.97 < min(row["gamma_before"] for row in topk)
    assert min(row["rising"] for row in relu) > 0.7


def test_the_histogram_counts_every_active_value(done):
    for row in done.report["rows"]:
        assert len(row["change"]) == len(done.report["ratio_edges"]) - 1
        np.testing.assert_allclose(sum(row["change"]), row["l0"] * PLAN.heldout, rtol=1e-5)


def test_the_numbers_agree_with_one_another(done):
    for row in done.report["rows"]:
        np.testing.assert_allclose(row["mean_change"], row["mean_after"] / row["mean_before"] - 1, rtol=1e-4, atol=1e-5)


def test_latents_and_rows_are_told(done):
    for row in done.report["rows"]:
        assert sum(row["firing"]) == PLAN.latents
        np.testing.assert_allclose(row["firing"][0] / PLAN.latents, row["dead"], rtol=1e-6)
        assert row["dead_rows"] == 4000
        assert sum(row["latent_change"]) <= PLAN.latents - row["firing"][0]  # which are of more rows
        kkt = [worst["kkt"] for worst in row["worst_rows"]]
        assert len({worst["row"] for worst in row["worst_rows"]}) == len(kkt) == 10
        assert kkt == sorted(kkt, reverse=True)
        assert kkt[0] == row["worst_kkt"]
        assert row["curve"]["step"] == [10, 20, 30, 40, 50, 60]
        assert row["curve"]["nmse"][0] > row["curve"]["nmse"][-1]


def test_the_rows_that_are_told_have_their_numbers_in_the_file(done):
    row, sae = next(saved_saes(done))
    l0_of = {worst["row"]: worst["l0"] for worst in row["worst_rows"]}
    x = done.rows[-PLAN.heldout :][list(l0_of)]
    np.testing.assert_allclose(
        (f64(jaxsae.encode_dense(sae, jnp.asarray(x))) > 0).sum(axis=1), list(l0_of.values()), atol=1
    )


def test_progress_adds_up(done):
    assert sum(steps for _, steps in done.progress) == study.total_steps(PLAN)
    assert all(isinstance(text, str) for text, _ in done.progress)


def test_the_figure(done):
    for name in ("shrinkage.png", "reconstructions.png"):
        with PIL.Image.open(done.out / name) as image:
            assert image.format == "PNG"
            assert len(image.convert("RGB").getcolors(maxcolors=2**24)) > 50


def test_numbers_all_but_equal_are_drawn_close_together(tmp_path, monkeypatch):
    drawn = []
    monkeypatch.setattr("matplotlib.figure.Figure.savefig", lambda figure, *_, **__: drawn.append(figure))
    rows = [
        {"family": "topk", "l0_target": l0, "l0": l0, "l0_after": l0, "nmse_before": 0.26, "nmse_after": 0.25}
        | {"change": [1] * 80}
        for l0 in (6.8, 6.9)
    ]
    plots.shrinkage({"rows": rows, "ratio_edges": RATIO_EDGES}, tmp_path / "a.png")
    axes = drawn[0].axes[1]
    for low, high in (axes.get_xlim(), axes.get_ylim()):
        assert high / low == pytest.approx(2)


def test_nothing_else_is_left(done):
    names = {f"{row['family']}-{row['l0_target']}" for row in done.report["rows"]}
    assert {path.name for path in done.out.iterdir()} == {"report.json", "shrinkage.png", "reconstructions.png", "sae"}
    assert {path.name for path in (done.out / "sae").iterdir()} == names


def test_the_same_seed_gives_the_same_report(done, tmp_path):
    assert untimed(study.run(tmp_path, data=done.out.parent / "x.npy", plan=PLAN)) == untimed(done.report)


# --- The autoencoders


def saved_saes(done):
    for row in done.report["rows"]:
        yield row, pretrained.load(done.out / "sae" / f"{row['family']}-{row['l0_target']}")


def test_the_saes_load(done):
    for row, sae in saved_saes(done):
        assert (sae.d, sae.m) == (48, PLAN.latents)
        assert sae.activation.slots == (row["k_or_l1"] if row["family"] == "topk" else None)
        np.testing.assert_allclose(np.linalg.norm(sae.W_dec, axis=1), 1, atol=1e-6)


def test_the_saved_saes_reconstruct_the_raw_rows(done):
    x = f64(done.rows[-PLAN.heldout :])
    for row, sae in saved_saes(done):
        W_enc, b_enc, W_dec, b_dec = map(f64, (sae.W_enc, sae.b_enc, sae.W_dec, sae.b_dec))
        z = np.maximum((x - b_dec) @ W_enc + b_enc, 0)
        if sae.activation.slots:
            z[z < np.sort(z, axis=1)[:, [-sae.activation.slots]]] = 0
        if row["family"] == "batchtopk":
            z[z <= float(sae.activation.threshold)] = 0
        nmse = np.sum((z @ W_dec + b_dec - x) ** 2) / np.sum((x - x.mean(0)) ** 2)
        np.testing.assert_allclose(nmse, row["nmse_before"], rtol=1e-4)
        np.testing.assert_allclose(z[z > 0].mean(), row["mean_before"], rtol=1e-4)


@pytest.mark.parametrize("solver", [measure._solver, None], ids=["the study's", "the default"])
@pytest.mark.parametrize("rows", [100, pytest.param(1000, marks=pytest.mark.slow)])
def test_refined_values_are_the_best_there_are(done, rows, solver):
    worst = {family: [] for family in PLAN.families}
    for row, sae in saved_saes(done):
        for block in refine_blocks(sae, done.rows[-max(rows, PLAN.heldout) :], solver):
            assert (block.refined.values >= 0).all()
            some = slice(None, None, max(1, PLAN.heldout // rows))  # blocks are sorted by L0: of all sizes
            code = jax.tree.map(operator.itemgetter(some), block.refined)
            gaps = objective_gap(sae.W_dec, f64(block.x[some]) - f64(sae.b_dec), code)
            worst[row["family"]].extend(gaps)
    assert min(len(found) for found in worst.values()) >= rows
    assert max(max(found) for found in worst.values()) <= 1e-6


def test_the_certificate_does_not_take_the_solvers_word(done, monkeypatch):
    monkeypatch.setattr(measure, "_solver", lambda k, d: jaxsae.FISTA(tol=1e9))  # content with anything
    _, sae = next(saved_saes(done))
    found = measure.measure(sae, done.rows[-PLAN.heldout :])
    assert found["certified"] < 0.1
    assert found["worst_kkt"] > 100 * study.CERTIFIED


# --- Interruption


def interrupt_at(text_end, count):
    """A progress callback that raises at the `count`-th text with this end."""
    seen = []

    def progress(text, steps):
        if text.endswith(text_end):
            seen.append(text)
            if len(seen) == count:
                raise KeyboardInterrupt

    return progress


def test_an_interruption_leaves_what_is_finished_and_the_same_command_resumes(done, tmp_path, monkeypatch):
    with pytest.raises(KeyboardInterrupt):
        study.run(tmp_path, data=done.out.parent / "x.npy", plan=PLAN, progress=interrupt_at("refined", 2))
    report = strict(tmp_path / "report.json")
    assert report["complete"] is False
    assert untimed(report)["rows"] == untimed(done.report)["rows"][:2]
    with PIL.Image.open(tmp_path / "shrinkage.png") as image:
        image.verify()
    assert {path.name for path in (tmp_path / "sae").iterdir()} == {"relu-4", "topk-4"}
    trained, progress = [], []
    train_to = study.train_to
    monkeypatch.setattr(study, "train_to", lambda *args: trained.append(args[2].activation) or train_to(*args))
    resumed = partial(study.run, tmp_path, data=done.out.parent / "x.npy", plan=PLAN)
    assert untimed(resumed(progress=lambda *args: progress.append(args))) == untimed(done.report)
    assert trained == ["batchtopk", "relu", "topk", "batchtopk"]
    assert sum(steps for _, steps in progress) == study.total_steps(PLAN)
    finished = (tmp_path / "report.json").read_bytes()
    resumed()
    assert len(trained) == 4  # nothing is left to do
    assert (tmp_path / "report.json").read_bytes() == finished


def test_a_study_grows_by_families_l0s_seeds_and_halvings(tmp_path):
    np.save(tmp_path / "x.npy", raw_rows())
    plan = SMALL._replace(families=("topk",), l0=(4,))
    grow = partial(study.run, tmp_path / "out", data=tmp_path / "x.npy")
    first = grow(plan=plan)
    assert [row["family"] for row in first["rows"]] == ["topk"]
    report = grow(plan=plan._replace(families=("topk", "relu"), seeds=2, halvings=2))
    assert report["rows"][0] == first["rows"][0]
    found = [(row["family"], row["seed"]) for row in report["rows"]]
    assert found == [("topk", 0), ("relu", 0), ("topk", 1), ("relu", 1)]
    shorter = [(row["family"], row["seed"], row["steps"]) for row in report["shorter"]]
    assert shorter == [("topk", 0, 30), ("relu", 0, 30), ("topk", 0, 15), ("relu", 0, 15)]
    names = {"topk-4", "topk-4-seed1", "topk-4-steps30", "topk-4-steps15"}
    assert names < {path.name for path in (tmp_path / "out" / "sae").iterdir()}
    assert report["rows"][0]["nmse_before"] != report["rows"][2]["nmse_before"]
    with PIL.Image.open(tmp_path / "out" / "steps.png") as image:
        image.verify()


@pytest.mark.parametrize(
    "change, message",
    [
        ({"steps": 61}, "steps 60, now 61"),
        ({"latents": 65, "heldout": 255}, "latents 64, now 65; heldout 256, now 255"),
    ],
)
def test_another_study_is_not_written_over(change, message, tmp_path):
    np.save(tmp_path / "x.npy", raw_rows())
    study.run(tmp_path / "out", data=tmp_path / "x.npy", plan=SMALL._replace(families=("topk",)))
    before = (tmp_path / "out" / "report.json").read_bytes()
    with pytest.raises(InputError, match=rf"out: holds another study \(.*{message}.*\); choose another --out"):
        study.run(tmp_path / "out", data=tmp_path / "x.npy", plan=SMALL._replace(**change))
    np.save(tmp_path / "y.npy", raw_rows() + 1)
    with pytest.raises(InputError, match="checksum"):
        study.run(tmp_path / "out", data=tmp_path / "y.npy", plan=SMALL)
    assert (tmp_path / "out" / "report.json").read_bytes() == before


@pytest.mark.parametrize("text", ["", "{", "[]", '{"options": {}}'])
def test_a_file_that_is_no_study_is_not_written_over(text, tmp_path):
    np.save(tmp_path / "x.npy", raw_rows())
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "report.json").write_text(text)
    with pytest.raises(InputError, match=r"report.json: is not a study's"):
        study.run(tmp_path / "out", data=tmp_path / "x.npy", plan=SMALL)
    assert (tmp_path / "out" / "report.json").read_text() == text


def test_an_interruption_before_the_first_result(tmp_path):
    with pytest.raises(KeyboardInterrupt):
        study.run(tmp_path, plan=PLAN, progress=interrupt_at("", 1))
    report = strict(tmp_path / "report.json")
    assert (report["complete"], report["rows"]) == (False, [])
    assert [path.name for path in tmp_path.iterdir()] == ["report.json"]


# --- Data

SMALL = study.Plan(64, 60, 128, 256, ("relu", "topk"), (4,), rivals=())


def raw_rows(n=1500, scale=1.0):
    return (scale * (10 + np.random.default_rng(0).normal(size=(n, 24)))).astype(np.float32)


def test_the_photographs_are_the_default():
    rows, heldout, units, source, *_ = sources.photographs(100_000, PLAN.heldout, 0)
    assert rows.shape == (100_000, 192)
    assert heldout.shape == (PLAN.heldout, 192)
    assert units.scale == 1
    assert "photographs" in source


@pytest.mark.parametrize("scale", [1e-12, 1.0, 1e12])
def test_training_rows_are_scaled_and_heldout_rows_are_not(scale, tmp_path):
    raw = raw_rows(scale=scale)
    np.save(tmp_path / "x.npy", raw)
    rows, heldout, units, *_ = sources.from_file(tmp_path / "x.npy", 100_000, SMALL.heldout, SMALL.batch)
    np.testing.assert_allclose(np.mean(np.sum((rows - rows.mean(0)) ** 2, axis=1)), 1, rtol=1e-3)
    np.testing.assert_allclose(rows, units.scale * raw[: -SMALL.heldout], rtol=1e-6)
    np.testing.assert_array_equal(heldout, raw[-SMALL.heldout :])


def spoiled(row, value=np.nan):
    rows = raw_rows()
    rows[row, 3] = value
    return rows


REFUSED = {
    "too few rows": (raw_rows(SMALL.batch + SMALL.heldout - 1), "holds 383 rows, the study needs at least 384"),
    "rows of zeros": (np.zeros((500, 4), np.float32), "all rows are equal"),
    # The mean of many equal numbers is not quite that number, in float32.
    "equal rows": (np.full((500, 4), 0.1, np.float32), "all rows are equal"),
    "NaN in training rows": (spoiled(7), "1 of 1500 rows hold NaN or Inf, the first is row 7"),
    "Inf in heldout rows": (spoiled(1400, np.inf), "1 of 1500 rows hold NaN or Inf, the first is row 1400"),
    "integers": (np.ones((500, 4), np.int32), "holds int32"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_data_that_cannot_be_used(case, tmp_path):
    rows, message = REFUSED[case]
    np.save(tmp_path / "x.npy", rows)
    with pytest.raises(InputError, match=message) as caught:
        study.run(tmp_path / "out", data=tmp_path / "x.npy", plan=SMALL)
    assert str(caught.value).startswith(str(tmp_path / "x.npy"))
    assert not (tmp_path / "out").exists()


def test_rows_that_are_not_finite_are_named_by_their_place_in_the_file(tmp_path):
    plan = SMALL._replace(train_rows=300)  # of a long file the middle is not trained on
    np.save(tmp_path / "x.npy", spoiled(1400))
    with pytest.raises(InputError, match="the first is row 1400"):
        study.run(tmp_path / "out", data=tmp_path / "x.npy", plan=plan)


def test_a_place_that_cannot_be_written_is_said_before_the_training(tmp_path, monkeypatch):
    monkeypatch.setattr(study, "train_to", None)
    (tmp_path / "file").touch()
    with pytest.raises(InputError, match="cannot write"):
        study.run(tmp_path / "file" / "out", plan=SMALL)


def test_a_dead_autoencoder_is_reported_in_valid_json(tmp_path, monkeypatch):
    # As an L1 weight that is too large makes it.
    def dead(rows, heldout, options, l0, progress, inputs):
        activation = FAMILIES[options.activation].activation(options._replace(k=l0))
        sae = jaxsae.init(jax.random.key(0), d=rows.shape[1], m=SMALL.latents, activation=activation)
        return Trained(sae.replace(b_enc=sae.b_enc - 1e6), 0.1, {})

    monkeypatch.setattr(study, "train_to", dead)
    np.save(tmp_path / "x.npy", raw_rows())
    study.run(tmp_path / "out", data=tmp_path / "x.npy", plan=SMALL)
    report = strict(tmp_path / "out" / "report.json")
    assert report["complete"] is True
    assert [row["l0"] for row in report["rows"]] == [0, 0]
    assert (tmp_path / "out" / "shrinkage.png").exists()


def test_a_diverged_autoencoder_is_reported_and_printed(tmp_path, monkeypatch, capsys):
    def diverged(rows, heldout, options, l0, progress, inputs):
        activation = FAMILIES[options.activation].activation(options._replace(k=l0))
        sae = jaxsae.init(jax.random.key(0), d=rows.shape[1], m=SMALL.latents, activation=activation)
        return Trained(sae.replace(b_enc=sae.b_enc * np.nan), 0.1, {})

    monkeypatch.setattr(study, "train_to", diverged)
    monkeypatch.setattr(study, "QUICK", SMALL)
    np.save(tmp_path / "x.npy", raw_rows())
    options = ["--quick", "--data", str(tmp_path / "x.npy"), "--out", str(tmp_path / "out")]
    assert cli.main(["study", *options]) == 1
    assert "not certified" in capsys.readouterr().err
    assert strict(tmp_path / "out" / "report.json")["complete"] is True
    assert (tmp_path / "out" / "shrinkage.png").exists()


# --- Bad plans

BAD_PLANS = {
    "a family that does not exist": (
        ["--families", "relu", "swish"],
        "got --families 'swish', expected one of: relu, topk",
    ),
    "a family twice": (["--families", "relu", "relu"], "got families relu relu; pass each once."),
    "no seed": (["--seeds", "0"], "got --seeds 0; pass a whole number from 1"),
    "an L0 of nothing": (["--l0", "0"], "got --l0 0; pass a whole number from 1"),
    "more latents per row than there are": (["--l0", "600"], "got an L0 of 600 for 512 latents; pass at most as many."),
    "more latents per row than dimensions": (
        ["--l0", "193"],
        "got an L0 of 193 for rows of width 192, which fewer atoms reconstruct exactly; pass smaller ones.",
    ),
    "groups that do not divide": (["--families", "groupmax", "--l0", "3"], "got groupmax with 512 latents; pass L0s"),
    "too many halvings": (["--halvings", "9"], "got 9 halvings of 200 steps; pass fewer, so that a step is left."),
    "a rate of 0": (["--grid", "0"], "got --grid 0; pass a number above 0"),
    "two kinds of rows": (["--synthetic", "--data", "x.npy"], "got several of --data, --model and --synthetic"),
    "noise of nothing": (["--noise", "0.1"], "got --noise without --synthetic; pass both."),
    "autoencoders of features": (["--synthetic", "--sae", "x"], "got --sae without --data or --model"),
}


@pytest.mark.parametrize("case", BAD_PLANS)
def test_a_plan_that_cannot_be_carried_out_is_one_line(case, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    options, message = BAD_PLANS[case]
    assert cli.main(["study", "--quick", "--out", "out", *options]) == 2
    said = capsys.readouterr().err
    assert message in said
    assert said.count("\n") == 1
    assert not list(tmp_path.iterdir())


# --- Known features


def test_a_study_of_known_features(tmp_path):
    plan = study.Plan(32, 60, 64, 128, ("relu", "topk"), (2,), rivals=("omp_nonnegative",), train_rows=2000)
    progress, features = [], sources.Features(width=8, l0=2.0)
    report = study.run(tmp_path, data=features, plan=plan, progress=lambda *args: progress.append(args))
    assert [row["family"] for row in report["rows"]] == ["relu", "topk", "truth"]
    for row in report["rows"]:
        assert 0 < row["f1_before"] <= row["f1_after"] + 0.05 <= 1.05
        assert {"mcc", "exact", "bias_before", "bias_after", "value_error_after", "f1_omp_nonnegative"} <= set(row)
    assert report["rows"][2]["mcc"] == pytest.approx(1)
    assert report["rows"][0]["bias_before"] < -0.1
    assert "32 known features in 8 dimensions, 2 per row" in report["data"]["source"]
    assert sum(steps for _, steps in progress) == study.total_steps(plan, features)
    assert untimed(study.run(tmp_path, data=features, plan=plan)) == untimed(report)


def test_features_that_cannot_be_are_refused(tmp_path):
    with pytest.raises(InputError, match=r"got l0 = 20\.0 for 32 features"):
        study.run(tmp_path / "out", data=sources.Features(width=8, l0=20.0), plan=SMALL)
    assert not (tmp_path / "out").exists()


# --- Training to an L0


@pytest.mark.parametrize("family", ["relu", "gated", "jumprelu", "matchingpursuit"])
def test_a_family_is_trained_to_the_l0_that_is_asked_for(family):
    rows = raw_rows(2048) - 10
    rows /= np.sqrt(np.sum(np.var(rows, axis=0)))
    options = Options(family, 64, batch=128, steps=300, heldout=512)
    trained = train_to(rows[:1536], rows[1536:], options, 4, lambda text, steps: None)
    # A pursuit takes a whole number of steps.
    found = (np.asarray(jaxsae.encode_dense(trained.sae, jnp.asarray(rows[1536:]))) != 0).sum(axis=1).mean()
    assert found == pytest.approx(4, rel=0.1 if family == "matchingpursuit" else 0.03)


# --- Learning rates


def test_the_learning_rate_of_the_least_error_with_few_dead_latents_is_used(tmp_path):
    np.save(tmp_path / "x.npy", raw_rows())
    plan = SMALL._replace(families=("topk",), grid=(0.01, 1.0, 300.0))
    run = partial(study.run, tmp_path / "out", data=tmp_path / "x.npy", plan=plan)
    progress = []
    report = run(progress=lambda *args: progress.append(args))
    assert sum(steps for _, steps in progress) == study.total_steps(plan)
    default = train.learning_rate(plan.latents, plan.steps)
    tuned = {row["factor"]: row for row in report["tuning"] if row["l0_target"] == 4}
    assert len(tuned) == len(report["tuning"]) == 3
    assert {factor: row["learning_rate"] for factor, row in tuned.items()} == {
        factor: pytest.approx(factor * default) for factor in plan.grid
    }
    assert tuned[1.0]["nmse"] < tuned[0.01]["nmse"]
    assert report["rows"][0]["learning_rate"] == pytest.approx(default)
    assert run() == report


# --- A language model

MODEL = Path(__file__).parent / "language_models" / "llama"
WHEN = ("before", "after")
MODEL_PLAN = study.Plan(64, 40, 64, 6 * 15, ("relu", "topk"), (6,), rivals=("omp_nonnegative",), train_rows=1500)


@pytest.fixture(scope="session")
def spliced(tmp_path_factory):
    """A small study of a tiny model, in contexts of 16 tokens."""
    folder, progress, refined = tmp_path_factory.mktemp("spliced"), [], []
    (folder / "text.txt").write_text("".join(map(chr, np.random.default_rng(0).integers(32, 127, 3000))))
    site = study.HookPoint(MODEL, layer=1, text=[folder / "text.txt"])
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sources, "CONTEXT", 16)
        patch.setattr(measure.stream, "refine_blocks", lambda *args: refined.append(args) or refine_blocks(*args))
        run = partial(study.run, folder / "out", data=site, plan=MODEL_PLAN)
        report = run(progress=lambda *args: progress.append(args))
        total = study.total_steps(MODEL_PLAN, site)
        again = run()
    assert again == report  # what was harvested and measured is there already
    assert len(refined) == len(report["rows"])  # once for all that is measured, losses among it
    return Study(folder / "out", report, progress, np.asarray(data.open_rows(folder / "out" / "activations"))), total


def test_a_study_of_a_model_has_its_losses(spliced):
    done, total = spliced
    report = done.report
    assert strict(done.out / "report.json") == json.loads(json.dumps(report))
    assert {name: value for name, value in report["data"].items() if name != "checksum"} == {
        "source": f"residual of {MODEL} after block 1, on {done.out.parent / 'text.txt'}",
        **{"rows": 1500, "passes": 40 * 64 / 1500, "heldout": 90, "width": 24},
    }
    belongs = {pretrained.origin(path) for path in (done.out / "sae").iterdir()}
    assert belongs == {data.Origin(str(MODEL), 1, "resid_post", 16, str(done.out.parent / "text.txt"))}
    when = (*WHEN, "omp_nonnegative")
    losses = [f"{name}_{each}" for name in ("ce", "kl", "recovered_zero", "recovered_mean") for each in when]
    assert all(np.isfinite(row[name]) for row in report["rows"] for name in (*NUMBERS, *losses))
    assert all(row[f"kl_{each}"] >= 0 for row in report["rows"] for each in when)
    assert sum(steps for _, steps in done.progress) == total
    with PIL.Image.open(done.out / "shrinkage.png") as image:
        assert image.width > 2 * image.height  # three panels


def test_the_losses_are_those_of_spliced_reconstructions(spliced):
    done, _ = spliced
    model = language_model.load(MODEL)
    contexts = jnp.asarray(shards.column(done.out / "activations", "tokens")[-6:])
    heldout = jnp.asarray(done.rows[-90:], jnp.float32)

    def loss(rows):
        def put(h):
            return h.at[:, 1:].set(jnp.asarray(rows).reshape(6, 15, 24))

        logits = f64(language_model.splice(model, contexts, 1, put))
        log_p = scipy.special.log_softmax(logits[:, :-1], axis=-1)
        return -np.take_along_axis(log_p, np.asarray(contexts)[:, 1:, None], -1).mean()

    mean = done.rows[:1500].astype(np.float64).mean(axis=0)
    np.testing.assert_allclose(done.report["ce_zero"], loss(jnp.zeros_like(heldout)), rtol=1e-5)
    np.testing.assert_allclose(done.report["ce_mean"], loss(np.broadcast_to(mean, heldout.shape)), rtol=1e-5)
    for row in done.report["rows"]:
        sae = pretrained.load(done.out / "sae" / f"{row['family']}-{row['l0_target']}")
        (block,) = refine_blocks(sae, np.asarray(heldout), measure._solver)  # as compiled already
        for when, code in zip(WHEN, (block.code, block.refined), strict=True):
            wanted = loss(heldout.at[block.rows].set(jaxsae.decode(sae, code)))
            np.testing.assert_allclose(row[f"ce_{when}"], wanted, rtol=1e-4)
            for name in ("zero", "mean"):
                ablated, clean = done.report[f"ce_{name}"], done.report["ce_clean"]
                share = (ablated - wanted) / (ablated - clean)
                np.testing.assert_allclose(row[f"recovered_{name}_{when}"], share, atol=1e-3)


def test_too_little_text_is_told(tmp_path):
    (tmp_path / "text.txt").write_text("a short text of a line or two, and no more than that. " * 8)
    site = study.HookPoint(MODEL, layer=1, text=[tmp_path / "text.txt"])
    with pytest.raises(InputError, match="the model takes 96"):
        study.run(tmp_path / "out", data=site, plan=MODEL_PLAN)
    with pytest.MonkeyPatch.context() as patch, pytest.raises(InputError, match="holds 405 rows, the study needs at"):
        patch.setattr(sources, "CONTEXT", 16)
        study.run(tmp_path / "out", data=site, plan=MODEL_PLAN._replace(train_rows=10_000, heldout=30 * 15))


def test_two_studies_of_one_directory_at_a_time_are_refused(tmp_path):
    with owned(tmp_path / "out"):
        with pytest.raises(InputError, match=r"out: another process writes there .*; stop it, or choose another --out"):
            study.run(tmp_path / "out", plan=PLAN)
        assert [path.name for path in (tmp_path / "out").iterdir()] == [".lock"]


@pytest.mark.slow
def test_a_longer_study_of_more_rows_compiles_no_more(tmp_path):
    """A program for each batch, block or step would show."""
    rows = data.image_patches(10_000, 2, side=4)[0]

    def programs(number, steps):
        np.save(tmp_path / f"{number}.npy", rows[:number])
        plan = PLAN._replace(families=("topk",), l0=(8,), steps=steps)  # others have codes of other shapes
        jax.clear_caches()
        with compilations() as seen:
            study.run(tmp_path / str(number), data=tmp_path / f"{number}.npy", plan=plan)
        return len(seen)

    few, most = programs(5000, 60), programs(10_000, 120)  # factors of latents are fitted to 4,096
    assert most <= few <= 150
