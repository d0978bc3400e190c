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
from jaxsae.app import cli, plots, study
from jaxsae.app.options import FAMILIES
from jaxsae.autoencoder.shrinkage import RATIO_EDGES
from jaxsae.autoencoder.stream import refine_blocks
from jaxsae.data import shards

PLAN = study.Plan(latents=128, steps=60, batch=256, heldout=256, l1=(0.05, 0.2))
NUMBERS = [
    *("l0", "nmse_before", "nmse_after", "mean_before", "mean_after", "mean_change"),
    *("rising", "gamma_before", "gamma_after", "worst_kkt", "certified"),
]


class Study(NamedTuple):
    out: Path
    report: dict
    progress: list  # what the progress callback was called with
    rows: np.ndarray  # as they are in the file


@pytest.fixture(scope="session")
def done(tmp_path_factory):
    """A whole study, small: patches of photographs in units of thousands, about a mean ten times their size."""
    folder, progress = tmp_path_factory.mktemp("study"), []
    rows = 1e3 * (data.image_patches(4000, 2, side=8)[0] + np.linspace(-1, 1, 192, dtype=np.float32))
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


# --- The report


def test_the_report_is_what_was_returned(done):
    saved = strict(done.out / "report.json")
    assert saved == json.loads(json.dumps(done.report))
    assert saved["complete"] is True
    source = str(done.out.parent / "x.npy")
    passes = PLAN.steps * PLAN.batch / 3744
    sizes = {"rows": 3744, "passes": passes, "heldout": PLAN.heldout, "width": 192}
    assert saved["data"] == {"source": source, **sizes}
    assert saved["config"]["seed"] == 0
    assert saved["config"]["latents"] == PLAN.latents
    assert saved["config"]["learning_rate"] == train.learning_rate(PLAN.latents, PLAN.steps)
    assert saved["config"]["idle_after"] == PLAN.steps * PLAN.batch // 50
    assert {"jaxsae", "jax", "numpy", "python"} <= set(saved["versions"])


def test_every_row_has_the_fields_of_the_contract(done):
    for row in done.report["rows"]:
        assert {"family", "k_or_l1", *NUMBERS} <= set(row)
        assert all(isinstance(row[name], float) and np.isfinite(row[name]) for name in NUMBERS)


def test_topk_is_trained_at_the_l0_that_relu_reached(done):
    relu, topk = (rows_of(done.report, family) for family in ("relu", "topk"))
    assert [row["k_or_l1"] for row in relu] == list(PLAN.l1)
    assert [row["k_or_l1"] for row in topk] == sorted(round(row["l0"]) for row in relu)
    assert all(row["l0"] <= row["k_or_l1"] for row in topk)
    assert relu[0]["l0"] > relu[1]["l0"]  # the larger L1 weight is sparser


@pytest.mark.parametrize("family", ["relu", "topk"])
def test_refinement_is_certified_and_lowers_the_error(done, family):
    for row in rows_of(done.report, family):
        assert row["nmse_after"] < row["nmse_before"] < 1
        assert row["certified"] == 1.0
        assert row["worst_kkt"] <= study.CERTIFIED
        np.testing.assert_allclose(row["gamma_after"], 1, atol=1e-3)


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
        assert row["curve"]["step"] == [25, 50, 60]
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
    with PIL.Image.open(done.out / "shrinkage.png") as image:
        assert image.format == "PNG"
        assert len(image.convert("RGB").getcolors(maxcolors=2**24)) > 50


def test_numbers_all_but_equal_are_drawn_close_together(tmp_path, monkeypatch):
    drawn = []
    monkeypatch.setattr("matplotlib.figure.Figure.savefig", lambda figure, *_, **__: drawn.append(figure))
    rows = [
        {"family": "topk", "l0": l0, "nmse_before": 0.26, "nmse_after": 0.25, "change": [1] * 80} for l0 in (6.8, 6.9)
    ]
    plots.shrinkage({"rows": rows, "ratio_edges": RATIO_EDGES}, tmp_path / "a.png")
    axes = drawn[0].axes[1]
    for low, high in (axes.get_xlim(), axes.get_ylim()):
        assert high / low == pytest.approx(2)


def test_nothing_else_is_left(done):
    names = {f"{row['family']}-{row['k_or_l1']:g}" for row in done.report["rows"]}
    assert {path.name for path in done.out.iterdir()} == {"report.json", "shrinkage.png", "sae"}
    assert {path.name for path in (done.out / "sae").iterdir()} == names


def test_the_same_seed_gives_the_same_report(done, tmp_path):
    assert study.run(tmp_path, data=done.out.parent / "x.npy", plan=PLAN) == done.report


# --- The autoencoders


def saved_saes(done):
    for row in done.report["rows"]:
        yield row, pretrained.load(done.out / "sae" / f"{row['family']}-{row['k_or_l1']:g}")


def test_the_saes_load(done):
    for row, sae in saved_saes(done):
        assert (sae.d, sae.m) == (192, PLAN.latents)
        assert sae.activation.slots == (row["k_or_l1"] if row["family"] == "topk" else None)
        np.testing.assert_allclose(np.linalg.norm(sae.W_dec, axis=1), 1, atol=1e-6)


def test_the_saved_saes_reconstruct_the_raw_rows(done):
    x = f64(done.rows[-PLAN.heldout :])
    for row, sae in saved_saes(done):
        W_enc, b_enc, W_dec, b_dec = map(f64, (sae.W_enc, sae.b_enc, sae.W_dec, sae.b_dec))
        z = np.maximum((x - b_dec) @ W_enc + b_enc, 0)
        if sae.activation.slots:
            z[z < np.sort(z, axis=1)[:, [-sae.activation.slots]]] = 0
        nmse = np.sum((z @ W_dec + b_dec - x) ** 2) / np.sum((x - x.mean(0)) ** 2)
        np.testing.assert_allclose(nmse, row["nmse_before"], rtol=1e-4)
        np.testing.assert_allclose(z[z > 0].mean(), row["mean_before"], rtol=1e-4)


@pytest.mark.parametrize("solver", [study._solver, None], ids=["the study's", "the default"])
@pytest.mark.parametrize("rows", [100, pytest.param(1000, marks=pytest.mark.slow)])
def test_refined_values_are_the_best_there_are(done, rows, solver):
    worst = {"relu": [], "topk": []}
    for row, sae in saved_saes(done):
        for block in refine_blocks(sae, done.rows[-max(rows, PLAN.heldout) :], solver):
            assert (block.refined.values >= 0).all()
            some = slice(None, None, max(1, PLAN.heldout // rows))  # blocks are sorted by L0: of all sizes
            code = jax.tree.map(operator.itemgetter(some), block.refined)
            gaps = objective_gap(sae.W_dec, f64(block.x[some]) - f64(sae.b_dec), code)
            worst[row["family"]].extend(gaps)
    assert min(len(found) for found in worst.values()) >= rows
    assert max(worst["relu"]) <= 1e-6
    assert max(worst["topk"]) <= 1e-6


def test_the_certificate_does_not_take_the_solvers_word(done, monkeypatch):
    monkeypatch.setattr(study, "_solver", lambda k, d: jaxsae.FISTA(tol=1e9))  # content with anything
    _, sae = next(saved_saes(done))
    found = study.measure(sae, done.rows[-PLAN.heldout :])
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


def test_an_interruption_leaves_what_is_finished(done, tmp_path):
    with pytest.raises(KeyboardInterrupt):
        study.run(tmp_path, data=done.out.parent / "x.npy", plan=PLAN, progress=interrupt_at("refined", 1))
    report = strict(tmp_path / "report.json")
    assert report["complete"] is False
    assert report["rows"] == done.report["rows"][:1]
    with PIL.Image.open(tmp_path / "shrinkage.png") as image:
        image.verify()
    assert [path.name for path in (tmp_path / "sae").iterdir()] == [f"relu-{PLAN.l1[0]:g}"]


def test_an_interruption_before_the_first_result(tmp_path):
    with pytest.raises(KeyboardInterrupt):
        study.run(tmp_path, plan=PLAN, progress=interrupt_at("", 1))
    report = strict(tmp_path / "report.json")
    assert (report["complete"], report["rows"]) == (False, [])
    assert [path.name for path in tmp_path.iterdir()] == ["report.json"]


# --- Data

SMALL = study.Plan(latents=64, steps=60, batch=128, heldout=256, l1=(0.1,))


def raw_rows(n=1500, scale=1.0):
    return (scale * (10 + np.random.default_rng(0).normal(size=(n, 24)))).astype(np.float32)


def test_the_photographs_are_the_default():
    rows, heldout, factor, source = study._load(None, PLAN, 0)
    assert rows.shape == (100_000, 192)
    assert heldout.shape == (PLAN.heldout, 192)
    assert factor == 1
    assert "photographs" in source


@pytest.mark.parametrize("scale", [1e-12, 1.0, 1e12])
def test_training_rows_are_scaled_and_heldout_rows_are_not(scale, tmp_path):
    raw = raw_rows(scale=scale)
    np.save(tmp_path / "x.npy", raw)
    rows, heldout, factor, _ = study._load(tmp_path / "x.npy", SMALL, 0)
    np.testing.assert_allclose(np.mean(np.sum((rows - rows.mean(0)) ** 2, axis=1)), 1, rtol=1e-3)
    np.testing.assert_allclose(rows, factor * raw[: -SMALL.heldout], rtol=1e-6)
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
    monkeypatch.setattr(study, "_train", None)
    (tmp_path / "file").touch()
    with pytest.raises(InputError, match="cannot write"):
        study.run(tmp_path / "file" / "out", plan=SMALL)


def test_a_dead_autoencoder_is_reported_in_valid_json(tmp_path, monkeypatch):
    # As an L1 weight that is too large makes it.
    def dead(rows, options, *_):
        activation = FAMILIES[options.activation].activation(options)
        sae = jaxsae.init(jax.random.key(0), d=rows.shape[1], m=SMALL.latents, activation=activation)
        return sae.replace(b_enc=sae.b_enc - 1e6), {}

    monkeypatch.setattr(study, "_train", dead)
    np.save(tmp_path / "x.npy", raw_rows())
    study.run(tmp_path / "out", data=tmp_path / "x.npy", plan=SMALL)
    report = strict(tmp_path / "out" / "report.json")
    assert report["complete"] is True
    assert [row["l0"] for row in report["rows"]] == [0, 0]
    assert (tmp_path / "out" / "shrinkage.png").exists()


def test_a_diverged_autoencoder_is_reported_and_printed(tmp_path, monkeypatch, capsys):
    def diverged(rows, options, *_):
        activation = FAMILIES[options.activation].activation(options)
        sae = jaxsae.init(jax.random.key(0), d=rows.shape[1], m=SMALL.latents, activation=activation)
        return sae.replace(b_enc=sae.b_enc * np.nan), {}

    monkeypatch.setattr(study, "_train", diverged)
    monkeypatch.setattr(study, "QUICK", SMALL)
    np.save(tmp_path / "x.npy", raw_rows())
    options = ["--quick", "--data", str(tmp_path / "x.npy"), "--out", str(tmp_path / "out")]
    assert cli.main(["study", *options]) == 1
    assert "not certified" in capsys.readouterr().err
    assert strict(tmp_path / "out" / "report.json")["complete"] is True
    assert (tmp_path / "out" / "shrinkage.png").exists()


# --- A language model

MODEL = Path(__file__).parent / "language_models" / "llama"
WHEN = ("before", "after")
MODEL_PLAN = study.Plan(latents=64, steps=40, batch=64, heldout=6 * 15, l1=(0.1,), train_rows=1500)


@pytest.fixture(scope="session")
def spliced(tmp_path_factory):
    """A small study of a tiny model, in contexts of 16 tokens."""
    folder, progress, refined = tmp_path_factory.mktemp("spliced"), [], []
    (folder / "text.txt").write_text("".join(map(chr, np.random.default_rng(0).integers(32, 127, 3000))))
    site = study.HookPoint(MODEL, layer=1, text=[folder / "text.txt"])
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(study, "_CONTEXT", 16)
        patch.setattr(study.stream, "refine_blocks", lambda *args: refined.append(args) or refine_blocks(*args))
        run = partial(study.run, folder / "out", data=site, plan=MODEL_PLAN)
        report = run(progress=lambda *args: progress.append(args))
        total = study.total_steps(MODEL_PLAN, site)
        again = run()
    assert again == report  # what was harvested is there already
    assert len(refined) == 2 * len(report["rows"])  # once for all that is measured, losses among it
    return Study(folder / "out", report, progress, np.asarray(data.open_rows(folder / "out" / "activations"))), total


def test_a_study_of_a_model_has_its_losses(spliced):
    done, total = spliced
    report = done.report
    assert strict(done.out / "report.json") == json.loads(json.dumps(report))
    assert report["data"] == {
        "source": f"residual of {MODEL} after block 1, on {done.out.parent / 'text.txt'}",
        **{"rows": 1500, "passes": 40 * 64 / 1500, "heldout": 90, "width": 24},
    }
    losses = [f"{name}_{when}" for name in ("ce", "kl", "recovered_zero", "recovered_mean") for when in WHEN]
    assert all(np.isfinite(row[name]) for row in report["rows"] for name in (*NUMBERS, *losses))
    assert all(row[f"kl_{when}"] >= 0 for row in report["rows"] for when in WHEN)
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
        sae = pretrained.load(done.out / "sae" / f"{row['family']}-{row['k_or_l1']:g}")
        (block,) = refine_blocks(sae, np.asarray(heldout), study._solver)  # as compiled already
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
    with pytest.raises(InputError, match="the model takes 64"):
        study.run(tmp_path / "out", data=site, plan=MODEL_PLAN)
    with pytest.MonkeyPatch.context() as patch, pytest.raises(InputError, match="holds 405 rows, the study needs at"):
        patch.setattr(study, "_CONTEXT", 16)
        study.run(tmp_path / "out", data=site, plan=MODEL_PLAN._replace(train_rows=10_000, heldout=30 * 15))


def test_two_studies_of_one_directory_at_a_time_are_refused(tmp_path):
    with owned(tmp_path / "out"):
        with pytest.raises(InputError, match=r"out: another process writes there .*; stop it, or choose another --out"):
            study.run(tmp_path / "out", plan=PLAN)
        assert [path.name for path in (tmp_path / "out").iterdir()] == [".lock"]


@pytest.mark.slow
def test_a_longer_study_of_more_rows_compiles_no_more(tmp_path):
    """A program for each batch, block or step would show."""
    rows = data.image_patches(8000, 2, side=8)[0]

    def programs(number, steps):
        np.save(tmp_path / f"{number}.npy", rows[:number])
        plan = PLAN._replace(l1=(0.2,), steps=steps)
        jax.clear_caches()
        with compilations() as seen:
            study.run(tmp_path / str(number), data=tmp_path / f"{number}.npy", plan=plan)
        return len(seen)

    few, most = programs(4000, 60), programs(8000, 120)
    assert most <= few <= 150
