"""Options in a file: the same run as on the command line, which wins over them."""

import json

import numpy as np
import pytest
from problems import activations, cli

from jaxsae.app import cli as application, config

FEW = {"activation": "topk", "k": 4, "latents": 64, "batch": 32, "heldout": 64, "steps": 12, "learning-rate": 1e-3}
OPTIONS = [word for name, value in FEW.items() for word in (f"--{name}", value)]


@pytest.fixture
def folder(tmp_path):
    np.save(tmp_path / "x.npy", activations(batch=(300,), d=8))
    np.save(tmp_path / "y.npy", activations(1, batch=(300,), d=8))
    return tmp_path


def weights(path):
    return (path / "sae/sae.safetensors").read_bytes()


def toml(options):
    return "".join(f"{name} = {json.dumps(value)}\n" for name, value in options.items())


@pytest.mark.parametrize("suffix", ["toml", "json"])
def test_a_file_gives_the_run_of_its_options(suffix, folder):
    data = [str(folder / "x.npy"), str(folder / "y.npy")]
    options = {**FEW, "data": data, "weights": [1, 3], "no-auxk": True, "multi_topk": False}
    text = toml(options) if suffix == "toml" else json.dumps(options | {"window": None})
    (folder / f"few.{suffix}").write_text(text)
    assert cli("train", "--config", folder / f"few.{suffix}", "--out", folder / "file") == 0
    assert cli("train", "--data", *data, *OPTIONS, "--weights", 1, 3, "--no-auxk", "--out", folder / "line") == 0
    assert weights(folder / "file") == weights(folder / "line")


def test_the_command_line_wins(folder):
    (folder / "few.toml").write_text(toml({**FEW, "data": ["missing.npy"], "steps": 999}))
    more = ["--data", folder / "x.npy", "--steps", 5, "--out", folder / "run"]
    assert cli("train", *more, f"--config={folder / 'few.toml'}") == 0
    assert json.loads((folder / "run/report.json").read_text())["steps"] == 5


def test_what_a_run_writes_repeats_and_resumes_it(folder, monkeypatch):
    assert cli("train", "--data", folder / "x.npy", *OPTIONS, "--eval-every", 4, "--out", folder / "run") == 0
    written = json.loads((folder / "run/config.json").read_text())
    assert (written["version"], written["eval_every"], written["derived"]["learning_rate"]) == (1, 4, 1e-3)
    assert cli("train", "--config", folder / "run/config.json", "--out", folder / "again") == 0
    assert weights(folder / "again") == weights(folder / "run")
    assert cli("train", "--config", folder / "run/config.json", "--resume", "--steps", 20) == 0
    assert json.loads((folder / "run/report.json").read_text())["steps"] == 20


def test_it_is_written_when_training_begins(folder, monkeypatch):
    monkeypatch.setattr("jaxsae.train.job.run", lambda *args, **kwargs: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        cli("train", "--data", folder / "x.npy", *OPTIONS, "--out", folder / "run")
    assert json.loads((folder / "run/config.json").read_text())["latents"] == 64


BAD = {
    "missing": (None, "No such file"),
    "no TOML": ("latents = ", "not a file of options"),
    "an unknown key": ("latnets = 4", "has latnets, expected one of: activation, latents"),
    "another version": ("version = 2", "is of version 2, expected 1"),
    "true as a version": ("version = true", "is of version True"),
    "a table": ("[data]\nx = 1", "its data is a table"),
    "of one call": ("resume = true", "has resume, expected one of"),
    "a wrong value": ("latents = 0", "got --latents 0; pass a whole number from 1"),
    "text for a number": ('latents = "many"', "many"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_files_are_one_line_before_any_work(case, folder, capsys):
    text, message = BAD[case]
    if text is not None:
        (folder / "bad.toml").write_text(text)
    few = OPTIONS[:4] + OPTIONS[6:] if text and text.startswith("latents") else OPTIONS
    before = sorted(folder.iterdir())
    argv = ["train", *few, "--data", folder / "x.npy", "--out", folder / "out", "--config", folder / "bad.toml"]
    if case == "text for a number":  # as on the command line
        with pytest.raises(SystemExit, match="2"):
            cli(*argv)
    else:
        assert cli(*argv) == 2
    assert message in capsys.readouterr().err
    assert sorted(folder.iterdir()) == before


def test_a_command_line_without_a_file_is_left_as_it_is():
    for argv in ([], ["train"], ["train", "--latents", "4"], ["study", "--config", "x"], ["nothing", "--config"]):
        assert config.expanded(argv, application.COMMANDS) == argv
    assert config.expanded(["train", "--config"], application.COMMANDS) == ["train", "--config"]
