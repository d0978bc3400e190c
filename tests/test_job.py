"""A training that is interrupted, in processes of its own, and one that meets rows that are not finite."""

import json
import signal

import numpy as np
import pytest

from benchmarks.jobs import Job
from jaxsae.cli import main


def test_a_run_that_is_interrupted_in_every_way_ends_like_one_left_alone(tmp_path):
    job = Job(tmp_path, steps=50)
    job.finish("alone")
    code, saved, said = job.end("run", signal.SIGINT, after=8, delay=0)
    assert code == 130, said
    assert f"Stopped after {saved} steps; all is saved: the same command goes on." in said
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
    assert f"step {before} is kept, and can be gone on from" in errors[-1]
    assert not any("Traceback" in line for line in errors), "\n".join(errors)
    assert job.saved("run") == before

    job.finish("run")
    assert job.outcome("run") == job.outcome("alone")
    assert len(job.outcome("run")) > 20


D = 16


@pytest.fixture
def rows():
    return np.random.default_rng(0).standard_normal((600, D)).astype(np.float32)


def train(tmp_path, rows, *more, steps=60):
    np.save(tmp_path / "x.npy", rows)
    options = ["--data", tmp_path / "x.npy", "--out", tmp_path / "run", "--activation", "topk", "--k", 4]
    options += ["--latents", 32, "--batch", 64, "--heldout", 100, "--steps", steps, *more]
    return main(["train", *map(str, options)])


def report(tmp_path):
    return json.loads((tmp_path / "run/report.json").read_text())


def test_rows_that_are_not_finite_are_named_and_the_steps_made_up_for(rows, tmp_path, capsys):
    rows[[7, 401]] = np.nan
    assert train(tmp_path, rows) == 0
    told = report(tmp_path)
    assert told["steps"] == 60
    assert told["skipped"] == len(told["skipped_batches"]) > 10
    assert told["nonfinite_rows"] == {str(tmp_path / "x.npy"): [7, 401]}
    assert f"NaN or Inf: rows 7, 401 of {tmp_path / 'x.npy'}." in capsys.readouterr().err


def test_a_training_goes_back_when_too_many_batches_fail_and_then_on(rows, tmp_path, capsys, monkeypatch):
    from jaxsae import job

    real = job.run
    spoilt = range(20, 31)

    def run(step, fresh, batches, *more, put, **options):
        def spoil(x):
            return put(x * np.nan if batches.position - 1 in spoilt else x)

        return real(step, fresh, batches, *more, put=spoil, **options)

    monkeypatch.setattr(job, "run", run)
    assert train(tmp_path, rows, "--save-every", 0.1) == 0
    told = report(tmp_path)
    assert (told["steps"], told["rollbacks"], told["skipped_batches"]) == (60, 1, list(spoilt))
    err = capsys.readouterr().err
    assert "the loss of 10 batches in a row was not finite: going back to step" in err
    assert "No row of them holds NaN or Inf." in err


def test_a_training_is_given_up_after_some_rollbacks(rows, tmp_path, capsys):
    rows[:500:3] = np.nan
    assert train(tmp_path, rows) == 2
    *_, last = capsys.readouterr().err.splitlines()
    assert "training diverged" in last
    assert f"NaN or Inf: rows 0, 3, 6, 9, 12, … of {tmp_path / 'x.npy'}." in last
    assert report(tmp_path)["rollbacks"] == 3


def test_a_run_of_other_options_is_not_gone_on_with(rows, tmp_path, capsys):
    assert train(tmp_path, rows, "--resume", steps=20) == 2
    assert "holds no run to resume; leave out --resume to begin one" in capsys.readouterr().err
    assert train(tmp_path, rows, steps=20) == 0
    before = (tmp_path / "run/sae/sae.safetensors").read_bytes()
    assert train(tmp_path, rows, "--resume", steps=20) == 0
    assert (tmp_path / "run/sae/sae.safetensors").read_bytes() == before
    capsys.readouterr()
    assert train(tmp_path, rows, steps=30) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert "run: holds another run (got steps 30, expected 20); choose another --out, or remove it." in line
    assert train(tmp_path, rows[:-1], steps=20) == 2
    assert "got data [499, 16], expected [500, 16]" in capsys.readouterr().err


def test_several_files_are_mixed_and_their_last_rows_held_out(rows, tmp_path, capsys):
    np.save(tmp_path / "x.npy", rows)
    np.save(tmp_path / "y.npy", rows[:200].astype(np.float16))
    options = ["--data", tmp_path / "x.npy", tmp_path / "y.npy", "--weights", 1, 3, "--out", tmp_path / "run", "--k", 4]
    options += ["--activation", "topk", "--latents", 32, "--batch", 64, "--heldout", 100, "--steps", 20]
    assert main(["train", *map(str, options)]) == 0
    assert report(tmp_path)["data"]["rows"] == 700
    assert main(["train", *map(str, [*options[:5], *options[6:]])]) == 2
    assert "got 1 weights for 2 files; pass one for each." in capsys.readouterr().err
