"""Interrupted trainings, in separate processes, and trainings on rows that are not finite."""

import dataclasses
import json
import re
import signal

import jax
import jax.numpy as jnp
import numpy as np
import optax
import problems
import pytest
from problems import cli, sae, train

import jaxsae
from benchmarks.jobs import Job
from jaxsae import data, train as training
from jaxsae._core.files import owned
from jaxsae.app import runs
from jaxsae.app.options import Options
from jaxsae.train import checkpoint, job
from jaxsae.train.steps import PATIENCE


def test_a_run_that_is_interrupted_in_every_way_ends_like_one_left_alone(tmp_path):
    job = Job(tmp_path, steps=50)
    job.finish("alone")
    code, saved, said = job.end("run", signal.SIGINT, after=8, delay=0)
    assert code == 130, said
    assert f"Stopped after {saved} steps; the run is saved: the same command resumes." in said
    assert 8 <= saved < 50
    code, saved, said = job.end("run", signal.SIGTERM, after=8, delay=0)
    assert code == 0, said
    assert f"Stopped after {saved} steps" in said
    code, saved, said = job.end("run", signal.SIGKILL, after=5, delay=0.01)  # in the middle of a save, most likely
    assert (code, "Traceback" in said) == (-signal.SIGKILL, False)

    # A disk that takes no more.
    before = job.saved("run")
    process = job.start("run", "bash", "-c", 'ulimit -f 8; exec "$@"', "bash")
    errors = process.communicate(timeout=60)[1].splitlines()
    assert process.returncode == 2, errors
    assert "cannot write" in errors[-1]
    assert f"step {before} is kept, and can be resumed from" in errors[-1]
    assert not any("Traceback" in line for line in errors), "\n".join(errors)
    assert job.saved("run") == before

    job.finish("run")
    assert job.outcome("run") == job.outcome("alone")
    assert len(job.outcome("run")) > 20


D = 16


@pytest.fixture
def rows():
    return problems.rows(600, D)


def train_on(tmp_path, rows, *more, steps=60):
    tmp_path.mkdir(exist_ok=True)
    np.save(tmp_path / "x.npy", rows)
    return train(tmp_path / "x.npy", tmp_path / "run", "topk", "--steps", steps, *more)


def report(tmp_path):
    return json.loads((tmp_path / "run/report.json").read_text())


def test_rows_that_are_not_finite_are_named_and_the_steps_made_up_for(rows, tmp_path, capsys):
    rows[[7, 401]] = np.nan
    assert train_on(tmp_path, rows) == 0
    found = report(tmp_path)
    assert found["steps"] == 60
    assert found["skipped"] == len(found["skipped_batches"]) > 10
    assert found["nonfinite_rows"] == {str(tmp_path / "x.npy"): [7, 401]}
    assert f"NaN or Inf: rows 7, 401 of {tmp_path / 'x.npy'}." in capsys.readouterr().err


def test_a_training_goes_back_when_too_many_batches_fail_and_then_on(rows, tmp_path, capsys, monkeypatch):
    real = job.run
    spoilt = range(20, 31)

    def run(step, init_fn, batches, *more, shard_fn, **options):
        def spoil(x):
            return shard_fn(x * np.nan if batches.position - 1 in spoilt else x)

        return real(step, init_fn, batches, *more, shard_fn=spoil, **options)

    monkeypatch.setattr(job, "run", run)
    assert train_on(tmp_path, rows, "--save-every", 0.1) == 0
    found = report(tmp_path)
    assert (found["steps"], found["rollbacks"], found["skipped_batches"]) == (60, 1, list(spoilt))
    err = capsys.readouterr().err
    assert "the loss of 10 batches in a row was not finite: going back to step" in err
    assert "No row of them holds NaN or Inf." in err


def test_a_training_is_given_up_after_some_rollbacks(rows, tmp_path, capsys):
    rows[:500:3] = np.nan
    assert train_on(tmp_path, rows) == 2
    *_, last = capsys.readouterr().err.splitlines()
    assert "training diverged" in last
    assert f"NaN or Inf: rows 0, 3, 6, 9, 12, … of {tmp_path / 'x.npy'}." in last
    assert report(tmp_path)["rollbacks"] == 3


def test_a_run_of_other_options_is_not_gone_on_with(rows, tmp_path, capsys):
    assert train_on(tmp_path, rows, "--resume", steps=20) == 2
    assert "holds no run to resume; leave out --resume to begin one" in capsys.readouterr().err
    assert train_on(tmp_path, rows, steps=20) == 0
    before = (tmp_path / "run/sae/sae.safetensors").read_bytes()
    assert train_on(tmp_path, rows, "--resume", steps=20) == 0
    assert (tmp_path / "run/sae/sae.safetensors").read_bytes() == before
    capsys.readouterr()
    assert train_on(tmp_path, rows, steps=10) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert "run: holds another run (got steps 10, expected 20 or more); choose another --out, or remove it." in line
    assert train_on(tmp_path, rows, "--seed", 1, steps=20) == 2
    assert "got seed 1, expected 0" in capsys.readouterr().err
    assert train_on(tmp_path, rows[:-1], steps=20) == 2
    assert "got data [499, 16], expected [500, 16]" in capsys.readouterr().err


def test_several_files_are_mixed_and_their_last_rows_held_out(rows, tmp_path, capsys):
    np.save(tmp_path / "x.npy", rows)
    np.save(tmp_path / "y.npy", rows[:200].astype(np.float16))
    options = ["--data", tmp_path / "x.npy", tmp_path / "y.npy", "--weights", 1, 3, "--out", tmp_path / "run", "--k", 4]
    options += ["--activation", "topk", "--latents", 32, "--batch", 64, "--heldout", 100, "--steps", 20]
    assert cli("train", *options) == 0
    assert report(tmp_path)["data"]["rows"] == 700
    assert cli("train", *options[:5], *options[6:]) == 2
    assert "got 1 weights for 2 files; pass one for each." in capsys.readouterr().err


# --- between one save and the next


@pytest.fixture
def loop(tmp_path):
    """`job.run` with a step that learns nothing; a batch is its number, those of `bad` are skipped."""
    model, tx = sae(), optax.sgd(0.0)
    batches = data.batches(np.ones((64, 16), np.float32), 16, seed=0)
    said, logged, seen, resumed = [], [], [], []

    def step(state, number):
        seen.append(number)
        if number in loop.bad:
            state = dataclasses.replace(state, skipped=state.skipped + 1, skipped_last=state.skipped_last + 1)
        else:
            state = dataclasses.replace(state, step=state.step + 1, skipped_last=jnp.zeros((), int))
        return loop.spoil(number, state), {"number": number, "skipped": state.skipped}

    def log_fn(step, metrics):
        logged.append((step, metrics["number"]))
        assert len(seen) - seen.index(metrics["number"]) <= PATIENCE
        return {"nmse": float(step)}

    def loop(steps, save_every=60.0, **more):
        options = more | {
            "steps": steps,
            "save_every": save_every,
            "shard_fn": lambda x: batches.position - 1,
            "log_fn": log_fn,
        }
        options |= {"warn": said.append, "resumed": lambda step, progress: resumed.append((step, progress.lengthened))}
        with checkpoint.Checkpoints(tmp_path, config={}) as checkpoints:
            return job.run(step, lambda: training.init_state(model, tx), batches, checkpoints, **options)

    loop.bad, loop.spoil, loop.folder = (), lambda number, state: state, tmp_path
    loop.said, loop.logged, loop.seen, loop.resumed, loop.model, loop.tx = said, logged, seen, resumed, model, tx
    return loop


def saved(loop):
    like = training.init_state(loop.model, loop.tx)
    return checkpoint.Checkpoints(loop.folder, config={}).restore(like)


@pytest.mark.parametrize("bad", [(), (3, 4, 9), range(4, 13)])
def test_every_so_many_steps_it_saves_and_measures(bad, loop):
    loop.bad, measured = bad, []
    loop(13, save_every_steps=5, eval_every=4, eval_fn=lambda step, state: measured.append((step, int(state.step))))
    assert measured == [(4, 4), (8, 8), (12, 12)]
    kept = [int(path.name) for path in loop.folder.iterdir() if path.name.isdecimal()]
    assert len(kept) >= 2
    state = saved(loop).state
    assert int(state.step) == 13


@pytest.mark.parametrize("bad", [(), (0,), (3, 4, 9), range(5, 14), (24, 25, 26), range(0, 50, 2)])
def test_each_step_is_logged_once_by_its_own_number(bad, loop):
    loop.bad = bad
    state, progress = loop(25)
    assert [step for step, _ in loop.logged] == list(range(1, 26))
    good = [number for number in range(progress.position) if number not in bad]
    assert [number for _, number in loop.logged] == good
    assert progress.bad == tuple(number for number in bad if number < progress.position)
    assert (int(state.step), progress.logged, loop.said) == (25, {"nmse": 25.0}, [])


def test_ten_in_a_row_are_ten(loop):
    loop.bad = range(20, 29)
    assert loop(25)[1].rollbacks == 0
    loop.bad = range(40, 50)
    _, progress = loop(45)
    assert (progress.rollbacks, progress.bad) == (1, (*range(20, 29), *range(40, 50)))
    assert loop.said == ["the loss of 10 batches in a row was not finite: going back to step 25."]
    assert [step for step, _ in loop.logged] == list(range(1, 46))  # those that are taken again are not logged again
    assert progress.position == 25 + 9 + 6 + 10 + 20  # the first run, up to the tenth of the bad, and from step 25 on


def test_ten_at_the_very_end_are_seen_and_a_training_is_given_up(loop):
    loop.bad = range(24, 1000)
    with pytest.raises(
        job.TooManyRollbacks, match="training diverged: the loss of 10 batches in a row was not finite, after 3"
    ):
        loop(25)
    assert loop.seen[-1] == 23 + 4 * 10
    assert [step for step, _ in loop.logged] == list(range(1, 25))


def spoiler(numbers, value, field="W_dec"):
    def spoil(number, state):
        if number not in numbers:
            return state
        part = state.sae.replace(**{field: getattr(state.sae, field).at[0].set(value)})
        return dataclasses.replace(state, sae=part)

    return spoil


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("save_every", [0.0, 60.0])
def test_a_state_that_is_not_finite_is_not_saved(save_every, value, loop):
    loop.spoil = spoiler({7}, value)
    state, progress = loop(12, save_every)
    assert (progress.rollbacks, int(state.step)) == (1, 12)
    assert loop.said == [f"a number of the state was not finite: going back to step {0 if save_every else 7}."]
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves((state, saved(loop).state)))


def test_a_state_that_is_never_finite_is_given_up_and_the_last_good_one_is_kept(loop):
    loop.spoil = spoiler(range(9, 1000), np.nan)
    with pytest.raises(
        job.TooManyRollbacks, match="training diverged: a number of the state was not finite, after 3"
    ) as caught:
        loop(12, save_every=0.0)
    assert int(caught.value.state.step) == saved(loop).step == 9
    assert np.isfinite(caught.value.state.sae.W_dec).all()


def test_an_infinite_threshold_is_a_number(mixed, loop):
    loop.model = sae(activation=jaxsae.JumpReLU(jnp.full(32, 0.1).at[3].set(jnp.inf)))
    state = training.init_state(loop.model, optax.adam(1.0))
    assert not job._infinite(state).any()
    ema_params = training.init_state(loop.model, training.ema(optax.sgd(0.0), decay=0.9))
    assert not job._infinite(jax.tree.map(lambda x: x, ema_params)).any()
    assert job._infinite(
        dataclasses.replace(state, opt_state=jax.tree.map(lambda x: x * jnp.inf, state.opt_state))
    ).any()
    assert job._infinite(spoiler({0}, np.nan, "b_enc")(0, state)).any()
    threshold = state.sae.activation.replace(threshold=jnp.full(32, jnp.nan))
    assert job._infinite(dataclasses.replace(state, sae=state.sae.replace(activation=threshold))).any()


def test_a_training_says_where_it_resumes_and_may_be_made_longer(loop):
    loop.bad = (2,)
    loop(12)
    loop(12)
    loop(20)
    loop(20)
    loop(30)
    longer = (12, 12, 20), (20, 20, 30)
    assert loop.resumed == [(12, ()), (12, longer[:1]), (20, longer[:1]), (20, longer)]
    assert [step for step, _ in loop.logged] == list(range(1, 31))
    assert [number for _, number in loop.logged] == [number for number in range(31) if number != 2]


# --- the command


def test_a_run_is_made_longer_with_the_schedules_of_the_longer_one(rows, tmp_path, capsys):
    assert train_on(tmp_path, rows, steps=20) == 0
    assert train_on(tmp_path, rows, steps=20) == 0
    err = capsys.readouterr().err.splitlines()
    assert err[-1] == "100%  resuming from step 20"
    assert train_on(tmp_path, rows, steps=40) == 0
    first, second, *_, last = capsys.readouterr().err.splitlines()
    assert first == " 50%  resuming from step 20"
    assert second.startswith("jaxsae: warning: the run is lengthened from 20 to 40 steps: from step 20 on, all that ")
    assert re.search(r"such as the learning rate \(0\.\d+, it was 0\)\.$", second)
    assert last.startswith("100%  NMSE")
    found = report(tmp_path)
    assert (found["steps"], found["lengthened"]) == (40, [{"at": 20, "from": 20, "to": 40}])
    before = (tmp_path / "run/sae/sae.safetensors").read_bytes()
    assert train_on(tmp_path, rows, steps=40) == 0
    assert (tmp_path / "run/sae/sae.safetensors").read_bytes() == before
    assert "lengthened" not in capsys.readouterr().err
    assert report(tmp_path) == found


def test_other_data_of_the_same_shape_is_not_trained_on(rows, tmp_path, capsys):
    assert train_on(tmp_path, rows, steps=20) == 0
    for place in (0, 300, 599):  # held-out rows too
        other = rows.copy()
        other[place, 5] += 1
        capsys.readouterr()
        assert train_on(tmp_path, other, steps=20) == 2
        (line,) = capsys.readouterr().err.splitlines()
        assert re.search(r"got values of the data, by checksum \[\"\w+\"\], expected \[.*\]\); choose another", line)
    assert train_on(tmp_path, np.asfortranarray(rows), steps=20) == 0  # the same values


def test_a_training_owns_its_directory(rows, tmp_path, capsys):
    with owned(tmp_path / "run/checkpoints"):
        assert train_on(tmp_path, rows, steps=20) == 2
        (line,) = capsys.readouterr().err.splitlines()
        assert re.search(
            r"run/checkpoints: another process writes there \(process \d+ of .*\); stop it, or choose", line
        )
        assert [path.name for path in (tmp_path / "run").iterdir()] == ["checkpoints"]
    assert train_on(tmp_path, rows, steps=20) == 0


def test_a_window_is_for_files_too(rows, tmp_path, capsys):
    found = []
    for number, window in enumerate([(), ("--window", 500), ("--window", 64)]):
        assert train_on(tmp_path / str(number), rows, *window, steps=10) == 0
        found.append((tmp_path / str(number) / "run/sae/sae.safetensors").read_bytes())
    assert found[0] == found[1] != found[2]
    capsys.readouterr()
    assert train_on(tmp_path / "3", rows, "--window", 0, steps=10) == 2
    assert capsys.readouterr().err == "jaxsae: got --window 0; pass a whole number from 1 to 2147483647.\n"


def test_the_progress_of_a_resumed_run_ends_where_it_should(rows, tmp_path):
    options, counts = Options("topk", 32, k=4, batch=64, steps=24, heldout=100), []
    for steps in (17, 24):
        said: list[int] = []
        log = {"progress": lambda text, steps, said=said: said.append(steps), "resumed": said.append}
        runs.run(tmp_path / "run", data={"x": rows}, options=options._replace(steps=steps), **log)
        counts.append(said)
    assert counts == [[10, 7], [17, 3, 4]]
