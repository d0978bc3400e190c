"""The benchmarks start on a bare machine, judge all solvers alike, and name what is missing."""

import dataclasses
import itertools
import json
import math
import os
import re
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxsae
from benchmarks import (
    accelerator,
    cases,
    judge,
    kernels,
    moments,
    peers,
    pursuit,
    quality,
    rates,
    refine,
    selectors,
    table,
    train,
    trainers,
)
from jaxsae.app import sources
from jaxsae.autoencoder import calibration
from jaxsae.autoencoder.sae import reconstruct

ROOT = Path(__file__).parent.parent


@pytest.fixture(scope="module")
def problem():
    """Some rows with short supports, one of them empty."""
    made = cases.random_problem(cases.Case("test", d=12, m=40, k=4, B=24, cosine=0.2))
    indices, values = np.array(made.code.indices), np.array(made.code.values)
    for row, used in ((0, 0), (1, 1), (2, 3)):
        indices[row, used:], values[row, used:] = made.sae.m, 0
    return made._replace(code=made.code.replace(indices=jnp.asarray(indices), values=jnp.asarray(values)))


def brute_force(atoms, y):
    """The least squared error over `z ≥ 0` and values that reach it, from all active sets in turn."""
    best = y @ y, np.zeros(len(atoms))
    for used in itertools.product([False, True], repeat=len(atoms)):
        z = np.zeros(len(atoms))
        z[list(used)] = np.linalg.lstsq(atoms[list(used)].T, y, rcond=None)[0]
        if (z >= 0).all():
            best = min(best, (((y - z @ atoms) ** 2).sum(), z), key=lambda pair: pair[0])
    return best


def supports(problem):
    """Each row's target and atoms, in float64, without the unused slots."""
    dictionary, y = np.asarray(problem.sae.W_dec, np.float64), np.asarray(problem.y, np.float64)
    return [(y[row], dictionary[at[at < len(dictionary)]]) for row, at in enumerate(np.asarray(problem.code.indices))]


# --- The judge


def test_the_optimum_is_that_of_brute_force(problem):
    best = judge.Judge(problem).best
    np.testing.assert_allclose(best, [brute_force(atoms, y)[0] for y, atoms in supports(problem)], atol=1e-12)


def test_the_measures_are_those_of_the_definition(problem):
    values = np.asarray(problem.code.values).copy()
    values[3, 0] = values[5] = 0
    verdict = judge.Judge(problem)(values, np.arange(24))
    kkt, added = np.zeros(24), np.zeros(24)
    for row, (y, atoms) in enumerate(supports(problem)):
        z = values[row, : len(atoms)].astype(np.float64)
        slopes = atoms @ (z @ atoms - y)
        violations = [abs(g) if each > 0 else max(-g, 0) for each, g in zip(z, slopes, strict=True)]
        if violations:
            kkt[row] = max(violations) / max(np.linalg.norm(a) for a in atoms) / np.linalg.norm(y)
        added[row] = (((y - z @ atoms) ** 2).sum() - brute_force(atoms, y)[0]) / (y @ y)
    np.testing.assert_allclose(verdict.worst_kkt, kkt.max(), rtol=1e-10)
    np.testing.assert_allclose(verdict.added_nmse, added.max(), rtol=1e-10)
    assert verdict.kkt_999 == verdict.worst_kkt
    assert verdict.added_nmse_rows == 24


def test_some_rows_are_judged_as_they_are_among_all(problem):
    values, rows = np.asarray(problem.code.values), np.array([2, 7, 11])
    of_all, of_some = (judge.Judge(problem).measure(values[at], at) for at in (np.arange(24), rows))
    for all_rows, some in zip(of_all, of_some, strict=True):
        np.testing.assert_array_equal(all_rows[rows], some)


@pytest.mark.parametrize("bad", [-1e-9, np.nan, np.inf])
def test_a_value_that_is_negative_or_not_finite_fails_the_gate(problem, bad):
    values = np.array([np.pad(brute_force(atoms, y)[1], (0, 4 - len(atoms))) for y, atoms in supports(problem)])
    best = judge.Judge(problem)
    assert best(values, np.arange(24)).met
    values[4, 0] = bad
    assert not best(values, np.arange(24)).met


def test_the_gate_needs_both_measures():
    def met(kkt, nmse):
        return judge.Verdict(kkt, kkt, nmse, 1).met

    assert met(1e-4, 1e-6) and met(1e-4, -1e-17)
    assert not met(1.01e-4, 0.0) and not met(0.0, 1.01e-6)
    assert not met(np.inf, 0.0) and not met(0.0, np.nan)
    assert met(1e-4, None) and not met(1e-3, None)


# --- Peers


@pytest.mark.filterwarnings("default")  # theirs
@pytest.mark.parametrize("peer", peers.PEERS, ids=lambda peer: peer.name)
def test_a_peer_solves_the_problem(peer, problem):
    try:
        solve = peer.load()
    except ImportError as error:
        pytest.skip(str(error))
    arrays = (problem.y, problem.code.indices, problem.code.values)
    arrays = (judge.padded(np.asarray(problem.sae.W_dec)), *map(np.asarray, arrays))
    setting = peer.variants[0] | ({"chunk": 8} if "chunk" in peer.variants[0] else {})
    effort = peer.efforts[len(peer.efforts) // 2]
    values = solve(*peers.to_arrays(peer.library, arrays), effort=effort, **setting)
    assert judge.Judge(problem)(np.asarray(values), np.arange(24)).met


def ladder(problem, errors):
    """A peer whose rungs add these errors to the optimum."""
    exact = np.array([np.pad(brute_force(atoms, y)[1], (0, 4 - len(atoms))) for y, atoms in supports(problem)])

    def solve(dictionary, y, indices, start, *, effort):
        return exact * (1 + errors[effort])

    return peers.Peer("ladder", "published", "numpy", lambda: solve, tuple(range(len(errors))), ({},))


def test_a_peer_is_tuned_no_further_than_to_the_gate(problem):
    tuned = refine.tune(ladder(problem, [1e-1, 1e-2, 1e-6, 0.0]), problem, judge.Judge(problem))
    assert tuned.setting == {"effort": 2}
    assert tuned.verdict.met
    assert {trial["effort"] for trial in tuned.tried} == {0, 1, 2}


def test_a_peer_that_cannot_meet_the_gate_shows_its_best(problem):
    tuned = refine.tune(ladder(problem, [1e-1, np.nan, 1e-2, 1e-1]), problem, judge.Judge(problem))
    assert tuned.setting == {"effort": 2}
    assert not tuned.verdict.met


def test_what_is_missing_is_named(problem, monkeypatch):
    absent = [peer for peer in peers.PEERS if peer.name in ("jaxnnls", "jaxopt PG on x", "torch PG, Nesterov")]
    monkeypatch.setattr(peers, "PEERS", absent)
    for name in ("jaxnnls.pdip", "jaxopt", "torch", "scipy.optimize"):
        monkeypatch.setitem(sys.modules, name, None)
    case, rows = refine.measure(problem, with_peers=True)
    ours, theirs = rows[: len(refine.SOLVERS)], rows[len(refine.SOLVERS) :]
    assert [row["note"] for row in theirs] == [f"{name}: not installed" for name in ("jaxnnls", "jaxopt", "torch")]
    assert all(row["note"] == "scipy: not installed" and row["added_nmse"] is None for row in ours)
    text = table.markdown(report(case, rows))
    assert "jaxopt: not installed" in text


def test_the_floor_is_a_copy_of_the_atoms_and_their_products():
    active, speeds = np.array([2, 3]), refine.Speeds(bytes_per_s=10.0, flops_per_s=100.0)
    assert refine.floor(active, 7, speeds) == 2 * 4 * 7 * 5 / 10 + 2 * 7 * (4 + 9) / 100


# --- Cases


def test_a_trained_case_reads_the_activations_where_there_are_any(tmp_path):
    real = cases.Real(m=32, B=16, steps=3, l1=0.1)
    np.save(tmp_path / "x.npy", np.random.default_rng(0).normal(size=(600, 8)).astype(np.float16))
    made = cases.real_problem(real, tmp_path / "x.npy")
    assert made.y.shape == (16, 8)
    assert made.source == "x"
    assert int(made.code.num_dropped.max()) == 0
    assert int(made.code.l0.max()) == made.code.indices.shape[1]
    np.testing.assert_allclose(jnp.linalg.norm(made.y, axis=1), 1, rtol=1e-6)


def test_a_trained_case_without_data_is_named(tmp_path, monkeypatch):
    monkeypatch.setattr(cases, "DATA", tmp_path / "none.npy")
    monkeypatch.setitem(cases.SIZES, "tiny", [])
    monkeypatch.setitem(sys.modules, "sklearn.datasets", None)
    ((case, rows),) = refine.run("tiny", with_peers=False, real=True)
    assert "scikit-learn" in rows[0]["note"]
    assert "scikit-learn" in table.markdown(report(case, rows))


def test_the_condition_number_is_that_of_the_support():
    dictionary = np.array([[1.0, 0], [1, 1], [1, -1]])
    np.testing.assert_allclose(
        cases.condition(dictionary, np.array([[1, 2], [0, 3], [3, 3], [0, 1]])), [1, 1, (3 + 5**0.5) / (3 - 5**0.5)]
    )


# --- The command and what it writes


def report(case, rows):
    machine = {"benchmark": "refine", "device": "abacus", "cores": 1, "jax": "0", "commit": "0123456789abcdef-dirty"}
    return {**machine, "copy_bandwidth": {"bytes_per_s": 1e9}, "cases": [case], "rows": rows}


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    """The tiny size, as a bare machine runs it: without what is not a core dependency."""
    out = tmp_path_factory.mktemp("benchmarks") / "results/tiny.json"
    barred = ("jaxnnls", "jaxopt", "torch", "overcomplete", "matplotlib", "sklearn", "tyro")
    script = f"""
import runpy, sys
sys.modules.update(dict.fromkeys({barred}))
sys.argv[1:] = ["refine", "--json", {str(out)!r}]
runpy.run_module("benchmarks", run_name="__main__")
"""
    environment = {**os.environ, "XLA_FLAGS": "", "JAX_PLATFORMS": "cpu"}
    command = [sys.executable, "-c", script]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=True)
    return done.stdout, json.loads(out.read_text())


@pytest.mark.slow
def test_the_tiny_size_runs_on_a_bare_machine(tiny):
    stdout, measured = tiny
    assert stdout.strip() == table.markdown(measured)
    assert [case["case"] for case in measured["cases"]] == [case.name for case in cases.SIZES["tiny"]]
    assert len(measured["rows"]) == len(refine.SOLVERS) * len(measured["cases"])
    assert {"device", "cores", "jax", "commit", "size", "gate", "peers"} <= set(measured)
    assert all(case["bytes_per_s"] > 0 and case["flops_per_s"] > 0 for case in measured["cases"])


@pytest.mark.slow
def test_every_row_has_every_column(tiny):
    for row in tiny[1]["rows"]:
        assert tuple(row) == refine.COLUMNS
        unknown = {"setting", "tried", "note"}  # nothing to tune, nothing missing
        assert all(row[name] is not None for name in set(row) - unknown)
        assert row["gate_met"] == (row["worst_kkt"] <= judge.KKT and row["added_nmse"] <= judge.ADDED_NMSE)
        low, high = row["quartiles"]
        assert 0 < low <= row["rows_per_s"] <= high


@pytest.mark.slow
def test_the_readme_is_filled_between_its_markers(tiny):
    empty = f"above\n<!-- benchmark: refine -->\n{table.END}\nbelow"
    filled = table.insert(empty, [tiny[1]])
    assert filled.startswith("above") and filled.endswith("below")
    assert table.markdown(tiny[1]) in filled
    assert table.insert(filled, [tiny[1]]) == filled
    with pytest.raises(SystemExit, match="has no <!-- benchmark"):
        table.insert("no place", [tiny[1]])


@pytest.mark.slow
def test_a_gate_that_is_not_met_is_said(tiny):
    row = {**tiny[1]["rows"][0], "gate_met": False, "worst_kkt": None}
    text = table.markdown(report(tiny[1]["cases"][0], [row]))
    assert "gate not met" in text
    assert "0123456789-dirty" in text


def test_training_steps_agree_and_are_told():
    rows = list(train.run("tiny", with_peers=False))
    assert [row["step"] for row in rows] == ["jaxsae", "jaxsae, dense autodiff"]
    np.testing.assert_allclose(rows[0]["nmse"], rows[1]["nmse"], rtol=1e-5)
    sweep = train.sweep("tiny")
    assert sweep["difference"] <= 1e-4
    machine = {"benchmark": "train", "device": "a", "cores": 2, "jax": "0", "commit": "0123456789abc-dirty"}
    text = table.markdown({**machine, "rows": rows, "sweep": sweep})
    assert "| jaxsae, dense autodiff |" in text and "A sweep of 8" in text


def test_a_peer_that_is_missing_has_a_row(monkeypatch):
    def missing(*args):
        raise ModuleNotFoundError(name="torch.nn")

    monkeypatch.setattr(train, "PEERS", {"other": missing})
    *_, row = train.run("tiny", with_peers=True)
    assert row["note"] == "torch: not installed" and row["seconds"] is None


def test_rates_are_compared_and_tabulated(tmp_path):
    np.save(tmp_path / "x.npy", np.random.default_rng(0).normal(size=(2200, 8)).astype(np.float32))
    options = {"families": ("batchtopk", "relu"), "l0": 4, "latents": 32, "batch": 64, "steps": (20,)}
    rows = list(rates.run(tmp_path / "x.npy", rates=(1e-3, 1e-1), **options))
    assert [(row["family"], row["rate"]) for row in rows[::3]] == [("batchtopk", 1e-3), ("relu", 1e-1)]
    np.testing.assert_allclose([row["l0"] for row in rows[:2]], 4, rtol=0.02)
    rows[0] |= {"dead": 0.25}
    rows[1] |= {"nmse": 0.5, "dead": 0.0}
    machine = {"benchmark": "rates", "device": "a", "cores": 2, "jax": "0", "commit": "0123456789abc"}
    (line,) = [line for line in table.markdown({**machine, "rows": rows}).splitlines() if "batchtopk" in line]
    assert (
        line
        == f"| x | 32 | 4 | 20 | batchtopk | {rows[0]['nmse']:.4f} (25% dead) | **0.5000** | {rows[0]['default']:.2g} |"
    )


def test_moments_are_compared_on_the_same_batches_and_tabulated(monkeypatch):
    kind = "both in bfloat16, stochastically"
    monkeypatch.setattr(moments, "_KINDS", {kind: moments._KINDS[kind], "again": moments._KINDS[kind]})
    rows = list(moments.run(families=("relu",), latents=16, batch=32, steps=16, seeds=1))
    assert rows[0] | {"moments": "again"} == rows[1]
    assert rows[0]["nmse_by_eighth"][-1] < rows[0]["nmse_by_eighth"][0]
    assert rows[0]["state_bytes"] == pytest.approx(2 * 2 * 2 * 16 * 192, rel=0.1)
    *_, line = moments.markdown({"rows": [rows[0], rows[0] | {"seed": 1, "heldout_nmse": 0.0}]}, "a")[1].splitlines()
    held = rows[0]["heldout_nmse"]
    assert f"| {held / 2:.4f} | 0.0000 to {held:.4f} | {rows[0]['dead']:.1%} | 0.0 |" in line


def trainer_of(calls, package="jaxsae"):
    """A trainer whose autoencoders are the worse the further the learning rate is from 0.4."""

    def train(job):
        calls.append((job.family, job.rate, job.seed, job.steps))
        sae = jaxsae.init(jax.random.key(job.seed), d=job.rows.shape[1], m=job.latents, activation=jaxsae.TopK(job.l0))
        return dataclasses.replace(sae, b_dec=sae.b_dec + abs(job.rate - 0.4))

    return trainers.Trainer(package, lambda *sizes: 1.0, train)


def test_trainers_are_compared_at_their_best_rates_and_tabulated(monkeypatch, tmp_path, capsys):
    case = quality.Case(None, 300, 64, 32, 50, 64, 4, seeds=2, rates=(0.2, 0.5, 0.9, 3.0))
    monkeypatch.setitem(quality.SIZES, "tiny", case)
    ours, theirs = [], []
    each = {
        trainers.OURS: trainer_of(ours),
        "theirs": trainer_of(theirs),
        "other": trainer_of([], "torch_of_another_world"),
    }
    monkeypatch.setattr(trainers, "TRAINERS", each)
    options = {"with_peers": True, "families": ("topk", "relu"), "folder": tmp_path}
    rows = list(quality.run("tiny", there=(), **options))
    assert "other: not installed" in capsys.readouterr().err
    measured = [call[:3] for call in theirs if call[3] == case.steps]
    tried = [(1.0, 0), (0.2, 0), (0.5, 0), (0.9, 0)]  # and the next would be worse still
    assert measured[:8] == [(family, *one) for family in ("topk", "relu") for one in tried]
    assert measured[8:] == [(family, rate, 1) for family in ("topk", "relu") for rate in (1.0, 0.5)]
    assert [call[:3] for call in ours if call[3] == case.steps] == measured
    assert [(row["family"], row["rate"], row["seed"]) for row in rows if row["library"] == "theirs"] == measured
    again = [row for row in rows if row["seed"] == 0]  # an interrupted run goes on
    assert list(map(without_seconds, quality.run("tiny", there=again, **options))) == [
        without_seconds(row) for row in rows if row["seed"] == 1
    ]
    heldout = jnp.asarray(sources.photographs(300, 64, 0).heldout)
    sae = each["theirs"].train(trainers.Job(heldout, heldout, "topk", 4, 32, 50, 64, 0.5, 1))
    error = ((heldout - jaxsae.decode(sae, jaxsae.encode(sae, heldout))) ** 2).sum()
    (row,) = [row for row in rows if [row[name] for name in quality._KEY] == ["theirs", "topk", 1, 0.5]]
    np.testing.assert_allclose(row["nmse"], error / ((heldout - heldout.mean(0)) ** 2).sum(), rtol=1e-5)
    machine = {"benchmark": "quality", "device": "a", "cores": 2, "jax": "0", "commit": "0123456789abc"}
    text = table.markdown({**machine, "size": "tiny", "rows": rows})
    assert re.search(r"\| topk \| theirs \| 2 \| 1 \| \*\*.* \| 0\.5 \| \*\*.* \| 4\.0 ± 0\.0 \|", text)


def without_seconds(row):
    return {name: value for name, value in row.items() if name != "seconds"}


@pytest.mark.parametrize("family", trainers.COMPARED)
@pytest.mark.parametrize("library", trainers.TRAINERS)
def test_trainers_learn_and_reach_the_l0(library, family):
    rows = sources.photographs(2000, 256, 0)
    job = trainers.Job(rows.train, rows.heldout, family, 8, 64, 200, 64, 3e-3, 0)
    try:
        sae = trainers.TRAINERS[library].train(job)
    except ImportError as error:
        pytest.skip(str(error))
    x = jnp.asarray(rows.heldout)
    if family in ("jumprelu", "batchtopk", "matryoshka"):
        sae = calibration.calibrate(sae, [x], 8.0)
    z = jaxsae.encode_dense(sae, x)
    np.testing.assert_allclose((z != 0).sum(1).mean(), 8, rtol=0.3)  # a weight is moved twenty times only
    start = jaxsae.init(jax.random.key(0), d=192, m=64, activation=jaxsae.TopK(8))
    errors = [float(((x - reconstruct(one, x)) ** 2).sum()) for one in (sae, start)]
    assert errors[0] < 0.5 * errors[1]


@pytest.mark.slow
def test_the_figure_has_a_panel_for_each_case(tiny, tmp_path):
    from benchmarks import plot

    plot.speed_against_accuracy(tiny[1], tmp_path / "speed.png")
    assert (tmp_path / "speed.png").read_bytes().startswith(b"\x89PNG")


def test_a_phase_transition_is_where_half_the_trials_recover():
    assert pursuit.half_point([0.1, 0.2, 0.3], [1.0, 0.75, 0.25]) == pytest.approx(0.25)
    assert pursuit.half_point([0.1, 0.2], [0.2, 0.0]) == 0.1
    assert pursuit.half_point([0.1, 0.2], [1.0, 0.9]) == 0.2


@pytest.mark.slow
def test_selectors_are_compared_and_tabulated(monkeypatch):
    monkeypatch.setattr(selectors, "SELECTORS", {n: selectors.SELECTORS[n] for n in ("largest correlations", "omp")})
    once, omp = selectors._run(next(selectors.cases("tiny")))
    assert 0 < omp["nmse"] < once["nmse"] < 1
    report = {"benchmark": "selectors", "device": "d", "cores": 2, "jax": "j", "commit": "c", "rows": [once, omp]}
    assert table.markdown(report).splitlines()[-2].startswith("| omp |")


# --- A few minutes on an accelerator


def test_the_checks_of_an_accelerator_pass_and_find_what_is_wrong(monkeypatch):
    case = accelerator.SIZES["tiny"][0]
    rows = {row["what"]: row for row in accelerator.checks(case)}
    judged = {name: row for name, row in rows.items() if "ok" in row}
    assert len(judged) == len(kernels.OPS) + 5 and all(row["ok"] for row in judged.values())
    assert "cpu" in rows["decode, pallas"]["note"]

    right = kernels.operation

    def wrong(op, case, implementation):
        """The first number is not written, or is off by a thousandth."""

        def call(x):
            first, *others = jax.tree.leaves(right(op, case, implementation)(x))
            spoiled = first.at[(0,) * first.ndim].set(jnp.nan) if op == "decode" else first * 1.001
            return (spoiled, *others) if others else spoiled

        return call

    monkeypatch.setattr(kernels, "operation", wrong)
    found = {row["what"]: row for row in accelerator.checks(case) if row["what"].endswith("xla") and "error" in row}
    assert len(found) == len(kernels.OPS) and not any(row["ok"] for row in found.values())


def test_a_part_that_fails_or_is_late_is_named_and_the_next_begins(monkeypatch, tmp_path):
    def broken():
        yield {"what": "first", "error": math.nan}
        raise RuntimeError("RESOURCE_EXHAUSTED: no memory\nand more")

    each = [accelerator.Part("broken", 1, broken), accelerator.Part("long", 999, broken)]
    each += [accelerator.Part("last", 1, lambda: iter([{"what": "done", "seconds": 0.5}]))]
    monkeypatch.setattr(accelerator, "parts", lambda *_: each)
    rows = list(accelerator.run("full", 1, tmp_path))
    assert [row["part"] for row in rows] == ["broken", "broken", "long", "last"]
    assert rows[0]["error"] is None and rows[0]["ok"] is False
    assert rows[1]["failed"] and rows[1]["note"] == "RuntimeError: RESOURCE_EXHAUSTED: no memory"
    assert "skipped" in rows[2]["note"]
    machine = {"benchmark": "accelerator", "device": "abacus", "cores": 1, "jax": "0", "commit": "0123456789abcdef"}
    text = table.markdown({**machine, "rows": rows})
    assert "2 of 4 lines failed" in text and "| last | done | 500.000 |" in text
