import contextlib
import json
import os
import pty
import subprocess
import sys
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest
from problems import activations, cli, rows, sae

import jaxsae
from jaxsae import data, language_model, pretrained, stream
from jaxsae._core.files import InputError
from jaxsae.app import console, study
from jaxsae.app.cli import COMMANDS, main
from jaxsae.ksvd import image_files, images
from jaxsae.language_model import text as texts

D, M, K, ROWS = 16, 32, 4, 40


@pytest.fixture
def folder(tmp_path):
    """A directory with saved SAEs and data."""
    pretrained.save(sae(d=D, m=M, activation=jaxsae.TopK(K)), tmp_path / "topk")
    pretrained.save(sae(d=D, m=M, activation=jaxsae.ReLU()), tmp_path / "relu")
    np.save(tmp_path / "x.npy", rows(ROWS))
    return tmp_path


def refine(folder, *more, sae="topk", data="x.npy", out="codes.npz"):
    return cli("refine", "--sae", folder / sae, "--data", folder / data, "--out", folder / out, *more)


def snapshot(folder):
    """All paths and their contents."""
    return {path: path.read_bytes() if path.is_file() else None for path in sorted(folder.rglob("*"))}


# --- refine


def test_refine_writes_the_codes_and_prints_the_table(folder, capsys):
    assert refine(folder) == 0
    model, x = pretrained.load(folder / "topk"), activations(batch=(ROWS,), d=D)
    code = jaxsae.encode(model, x)
    refined, info = jaxsae.refine(model, x, code)
    with np.load(folder / "codes.npz") as saved:
        np.testing.assert_array_equal(saved["indices"], refined.indices)
        np.testing.assert_allclose(saved["values"], refined.values, rtol=1e-4, atol=1e-5)
        np.testing.assert_array_equal(saved["status"], info.status)
    out, err = capsys.readouterr()
    *table, written = out.splitlines()
    assert table == str(jaxsae.shrinkage(model, x, code, refined)).splitlines()
    assert written.startswith(f"Written: {folder / 'codes.npz'}, {ROWS} rows of {K} slots, worst KKT ")
    assert err == "100%  refining\n"  # progress, without a terminal, in plain lines


def spoil_rows(folder):
    x = rows(ROWS)
    x[[3, 5]] = np.nan
    np.save(folder / "x.npy", x)


WARNINGS = {
    "num_dropped": (["--capacity", K], "relu", None, "rows have more active latents than slots; raise --capacity."),
    "NaN": ([], "topk", spoil_rows, "2 rows hold NaN or Inf and are left as encoded (status 2)."),
    "steps": (["--max-steps", 1], "topk", None, "rows stopped at --max-steps (status 1)."),
}


@pytest.mark.parametrize("strict", [False, True])
@pytest.mark.parametrize("case", WARNINGS)
def test_warnings_are_printed_and_fail_only_if_asked_to(case, strict, folder, capsys):
    options, name, prepare, message = WARNINGS[case]
    if prepare:
        prepare(folder)
    assert refine(folder, *options, *(["--strict"] if strict else []), sae=name) == int(strict)
    out, err = capsys.readouterr()
    (warning,) = [line for line in err.splitlines() if "warning" in line]
    assert warning.startswith("jaxsae: warning: ")
    assert warning.endswith(message)
    assert "Written: " in out
    assert (folder / "codes.npz").exists()


def test_strict_without_a_warning_is_0(folder):
    assert refine(folder, "--strict") == 0


def test_tol_reaches_the_solver(folder):
    worst = []
    for tol in ("1e-2", "1e-6"):
        assert refine(folder, "--tol", tol) == 0
        with np.load(folder / "codes.npz") as saved:
            worst.append(saved["kkt"].max())
    assert worst[1] <= 1e-6 < worst[0] <= 1e-2


def test_an_existing_file_is_replaced(folder):
    (folder / "codes.npz").write_text("old")
    assert refine(folder) == 0
    assert np.load(folder / "codes.npz")["indices"].shape == (ROWS, K)


# --- study


def a_report(certified=1.0):
    common = {"nmse_before": 0.5, "nmse_after": 0.25, "mean_before": 1.0, "mean_after": 1.5, "mean_change": 0.5}
    common |= {"rising": 0.75, "gamma_before": 0.8125, "gamma_after": 1.0, "worst_kkt": 2e-5 if certified < 1 else 1e-6}
    found = [
        {"family": "relu", "l0_target": 20, "k_or_l1": 0.05, "l0": 20.5, "certified": 1.0, **common},
        {"family": "topk", "l0_target": 20, "k_or_l1": 20, "l0": 20.0, "certified": certified, **common},
    ]
    return {"rows": found, "complete": True, "data": {"source": "x.npy", "rows": 10, "heldout": 1000, "width": 16}}


@pytest.fixture
def fake_study(monkeypatch):
    """Replace the study by one that returns a report, or raises; and note how it was called."""
    calls = []

    def install(outcome):
        def fake(out, **options):
            calls.append({"out": out, **options})
            options["progress"]("training", study.total_steps(options["plan"]))
            if isinstance(outcome, BaseException):
                raise outcome
            return outcome

        monkeypatch.setattr(study, "run", fake)
        return calls

    return install


@pytest.mark.parametrize("quick", [False, True])
def test_study_passes_its_options_and_prints_the_table(quick, fake_study, tmp_path, capsys):
    calls = fake_study(a_report())
    options = ["--data", tmp_path / "x.npy", "--seed", 7, *(["--quick"] if quick else [])]
    assert cli("study", "--out", tmp_path / "out", *options) == 0
    (call,) = calls
    del call["progress"], call["warn"]
    plan = study.QUICK if quick else study.FULL
    assert call == {"out": tmp_path / "out", "data": tmp_path / "x.npy", "plan": plan, "seed": 7, "saes": ()}
    out, err = capsys.readouterr()
    assert "1000 held-out rows of width 16: x.npy" in out
    for text in ("ReLU + L1, L0 20", "TopK, L0 20", "20.5", "0.5000", "0.2500", "+50.0%", "75%", "0.812", "1.0e-06"):
        assert text in out, text
    assert f"Written: {tmp_path / 'out' / 'report.json'}, " in out
    assert "warning" not in err


def test_study_without_options_uses_the_photographs(fake_study):
    calls = fake_study(a_report())
    assert cli("study") == 0
    assert calls[0]["data"] is None
    assert calls[0]["seed"] == 0


def test_a_certificate_that_fails_is_exit_code_1(fake_study, tmp_path, capsys):
    fake_study(a_report(certified=0.993))
    assert cli("study", "--out", tmp_path) == 1
    out, err = capsys.readouterr()
    assert "0.7% fail" in out
    (warning,) = [line for line in err.splitlines() if "warning" in line]
    assert warning == "jaxsae: warning: TopK, L0 20: 7 rows are not certified, the worst at KKT 2.0e-05."


# --- What can go wrong


def error_line(err):
    """The one line of stderr that is no progress."""
    (line,) = [line for line in err.splitlines() if "%  " not in line]
    assert line.startswith("jaxsae: ")
    assert "Traceback" not in line
    return line


def write(name, content):
    return lambda folder: (folder / name).write_bytes(content)


def truncate(name, keep):
    return lambda folder: (folder / name).write_bytes((folder / name).read_bytes()[:keep])


def save(array):
    return lambda folder: np.save(folder / "x.npy", array)


BAD_REFINE = {
    "no sae": ({"sae": "nothing"}, [], None, "nothing: no such file or directory; expected a saved SAE"),
    "sae is a file": ({"sae": "x.npy"}, [], None, "x.npy: not an SAE of a known format"),
    "sae is a directory": ({"sae": "."}, [], None, "not an SAE of a known format"),
    "weights truncated": ({}, [], truncate("topk/sae.safetensors", 500), "topk: not a whole SAE"),
    "config damaged": ({}, [], write("topk/sae.json", b"{"), "topk: not a whole SAE"),
    "newer sae": ({}, [], write("topk/sae.json", b'{"format": "jaxsae", "version": 9}'), "version 9, expected"),
    "no data": ({"data": "nothing.npy"}, [], None, "nothing.npy: no such file"),
    "data is a directory": ({"data": "topk"}, [], None, "topk: holds sae.safetensors"),
    "data is text": ({}, [], write("x.npy", b"1 2 3\n4 5 6\n"), "x.npy: "),
    "data is empty": ({}, [], write("x.npy", b""), "x.npy: "),
    "data truncated": ({}, [], truncate("x.npy", 1000), "x.npy: "),
    "data of integers": ({}, [], save(np.ones((3, D), np.int32)), "x.npy: holds int32"),
    "data of another width": ({}, [], save(rows(ROWS, D + 1)), f"width {D + 1}, but this SAE has d = {D}"),
    "no capacity": ({"sae": "relu"}, ["--capacity", 0], None, "got --capacity 0"),
    "negative capacity": ({"sae": "relu"}, ["--capacity", -2], None, "got --capacity -2"),
    "too much capacity": ({"sae": "relu"}, ["--capacity", M + 1], None, f"got capacity {M + 1} for {M} latents"),
    "capacity for TopK": ({}, ["--capacity", K + 1], None, f"got --capacity {K + 1} for TopK(k={K})"),
    "out in a file": ({"out": "x.npy/codes.npz"}, [], None, "cannot write"),
    "out is the data": ({"out": "x.npy"}, [], None, "x.npy"),
    "out is a directory": ({"out": "topk"}, [], None, "topk"),
    "too many steps": ({}, ["--max-steps", 2**31], None, "--max-steps"),
    "negative steps": ({}, ["--max-steps", -1], None, "--max-steps"),
    "negative tolerance": ({}, ["--tol", -1], None, "--tol"),
    "tolerance is NaN": ({}, ["--tol", "nan"], None, "--tol"),
}


@pytest.mark.parametrize("case", BAD_REFINE)
def test_bad_input_to_refine_is_exit_code_2_and_one_line(case, folder, capsys):
    names, options, prepare, message = BAD_REFINE[case]
    if prepare:
        prepare(folder)
    before = snapshot(folder)
    assert refine(folder, *options, **names) == 2
    out, err = capsys.readouterr()
    assert message in error_line(err)
    assert out == ""
    assert snapshot(folder) == before  # nothing is made, and nothing lost


BAD_STUDY = {
    "no data": (["--data", "{folder}/nothing.npy"], None, "nothing.npy: no such file"),
    "too few rows": (["--data", "{folder}/x.npy"], None, "x.npy: holds 40 rows, the study needs at least 512"),
    "equal rows": (["--data", "{folder}/x.npy"], save(np.ones((1100, 2), np.float32)), "x.npy: all rows are equal"),
    "NaN": (["--data", "{folder}/x.npy"], save(np.full((1100, 2), np.nan)), "1100 of 1100 rows hold NaN or Inf"),
    "out in a file": (["--out", "{folder}/x.npy/out"], None, "cannot write"),
    "out is a file": (["--out", "{folder}/x.npy"], None, "cannot write"),
    "negative seed": (["--seed", "-1"], None, "seed"),
    "huge seed": (["--seed", str(2**70)], None, "seed"),
}


@pytest.mark.parametrize("case", BAD_STUDY)
def test_bad_input_to_study_is_exit_code_2_and_one_line(case, folder, capsys, monkeypatch):
    def never(*_):
        raise AssertionError("trained before all was checked")

    monkeypatch.setattr(study, "train_to", never)
    options, prepare, message = BAD_STUDY[case]
    if prepare:
        prepare(folder)
    before = snapshot(folder)
    options = ["--out", "{folder}/out", *options]  # the last of two counts
    assert cli("study", "--quick", *(option.format(folder=folder) for option in options)) == 2
    out, err = capsys.readouterr()
    assert message in error_line(err)
    assert out == ""
    assert snapshot(folder) == before


@pytest.mark.parametrize(
    ("error", "code", "message"),
    [
        (KeyboardInterrupt(), 130, "jaxsae: interrupted; finished results are kept."),
        (OSError(28, "No space left on device", "report.json"), 2, "report.json: No space left on device"),
        (OSError("the disk said something"), 2, "the disk said something"),
        (PermissionError(13, "Permission denied", "x.npy"), 2, "x.npy: Permission denied"),
        (MemoryError(), 2, "out of memory; use fewer"),
        (RuntimeError("RESOURCE_EXHAUSTED: Out of memory allocating 1 bytes."), 2, "out of memory; use fewer"),
        (InputError("a\nb\udcff\x1b[31m: no such file"), 2, r"a\nb\udcff\x1b[31m: no such file"),
    ],
    ids=["interrupted", "disk full", "of no number", "forbidden", "memory", "memory of a device", "odd names"],
)
def test_what_goes_wrong_in_between_is_one_line(error, code, message, fake_study, tmp_path, capsys):
    fake_study(error)
    assert cli("study", "--out", tmp_path) == code
    out, err = capsys.readouterr()
    assert message in error_line(err)
    assert out == ""


def test_an_interrupted_refine_leaves_nothing(folder, capsys, monkeypatch):
    def interrupted(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr(stream, "refine", interrupted)
    before = snapshot(folder)
    assert refine(folder) == 130
    assert error_line(capsys.readouterr().err).startswith("jaxsae: interrupted")
    assert snapshot(folder) == before


def test_a_bug_is_not_hidden(fake_study, tmp_path):
    # Only what the user can mend becomes one line.
    fake_study(ZeroDivisionError("a bug"))
    with pytest.raises(ZeroDivisionError):
        cli("study", "--out", tmp_path)


def test_without_the_extra_it_says_what_to_install(monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "tyro", None)
    assert cli("study") == 2
    assert error_line(capsys.readouterr().err).endswith("pip install 'jaxsae[study]'.")


# --- The parser


def help_of(capsys, *argv):
    with pytest.raises(SystemExit) as caught:
        main([*argv, "--help"])
    assert not caught.value.code
    return capsys.readouterr().out


def test_help_is_a_table_of_contents(capsys):
    out = help_of(capsys)
    lines = [line.strip("│ ") for line in out.splitlines()]
    contents = lines[lines.index("(required)") + 1 :][: len(COMMANDS)]
    assert [line.split()[:2] for line in contents] == [["•", name] for name in COMMANDS]  # one line each, in our order
    assert "Exit codes: 0 done; 1 done, but" in out
    assert "2 bad input; 130 interrupted." in out
    assert "Compiled programs are not kept." in out  # of a call from Python


@pytest.mark.parametrize("name", COMMANDS)
def test_help_of_a_command_has_an_example_and_json(name, capsys):
    out = help_of(capsys, name)
    assert f"Example: jaxsae {name} " in out
    assert "--json" in out


def test_completion_knows_the_commands(tmp_path):
    for shell in ("bash", "zsh"):
        with pytest.raises(SystemExit) as caught:
            main(["--tyro-write-completion", shell, str(tmp_path / shell)])
        assert not caught.value.code
        script = (tmp_path / shell).read_text()
        assert not {name for name in COMMANDS if name not in script}


@pytest.mark.parametrize(
    "argv",
    [[], ["nothing"], ["refine"], ["study", "--unknown"], ["study", "--seed", "x"], ["refine", "--sae", "a"]],
    ids=" ".join,
)
def test_what_the_parser_refuses(argv, capsys):
    with pytest.raises(SystemExit) as caught:
        main(argv)
    assert caught.value.code == 2
    assert "Traceback" not in capsys.readouterr().err


# --- For scripts


def printed(capsys):
    """The JSON that is all of stdout."""
    return json.loads(capsys.readouterr().out, parse_constant=lambda name: pytest.fail(f"{name} is not JSON"))


def test_nan_is_null(capsys):
    console.show({"a": np.nan, "b": [np.inf, 1.5, ({"c": -np.inf},)], "d": Path("x")}, "", as_json=True)
    assert printed(capsys) == {"a": None, "b": [None, 1.5, [{"c": None}]], "d": "x"}


def test_json_of_a_study(fake_study, tmp_path, capsys):
    fake_study(a_report(certified=0.993))
    assert cli("study", "--out", tmp_path, "--json") == 1
    assert printed(capsys) == a_report(certified=0.993)


def test_json_of_refine_eval_info_and_convert(folder, capsys):
    assert refine(folder, "--json") == 0
    summary = printed(capsys)
    assert (summary["rows"], summary["capacity"], summary["out"]) == (ROWS, K, str(folder / "codes.npz"))
    assert (summary["overflowed"], summary["nonfinite"], summary["unconverged"]) == (0, 0, 0)
    assert summary["shrinkage"]["l0"] == K
    assert summary["shrinkage"]["nmse_after"] <= summary["shrinkage"]["nmse_before"]
    assert cli("eval", "--sae", folder / "topk", "--data", folder / "x.npy", "--json") == 0
    assert printed(capsys)["nmse"] == pytest.approx(summary["shrinkage"]["nmse_before"], rel=1e-4)
    assert cli("info", folder / "topk", "--json") == 0
    assert printed(capsys) == pretrained.describe(folder / "topk")
    assert cli("convert", folder / "topk", folder / "other", "--to", "saelens", "--json") == 0
    assert printed(capsys) == {"out": str(folder / "other"), "format": "saelens"}


def test_json_of_fetch_and_of_pictures(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(language_model, "fetch", lambda name: tmp_path / name)
    assert cli("fetch", "smollm2", "--json") == 0
    assert printed(capsys) == {"path": str(tmp_path / "smollm2")}
    picture, atoms = np.full((8, 8), 100.0), np.ones((64, 4))
    image_files.write(tmp_path / "a.png", picture)
    image_files.write(tmp_path / "mask.png", np.full((8, 8), 255.0))
    for name, options in (("denoise", ["--sigma", 1]), ("inpaint", ["--missing", tmp_path / "mask.png"])):
        monkeypatch.setattr(images, name, lambda *_, **__: (picture, atoms))
        assert cli(name, tmp_path / "a.png", *options, "--out", tmp_path / "b.png", "--json") == 0
        assert printed(capsys) == {"out": str(tmp_path / "b.png"), "dictionary": None}


@pytest.mark.parametrize("sigma", [0, 255.5, 1e38, "nan"])
def test_noise_beyond_the_levels_of_a_picture_is_refused(sigma, tmp_path, capsys):
    image_files.write(tmp_path / "a.png", np.full((8, 8), 100.0))
    assert cli("denoise", tmp_path / "a.png", "--sigma", sigma, "--out", tmp_path / "b.png") == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.endswith("pass a number above 0 and up to 255.")


# --- As a process


def process(*argv, **environment):
    command = [sys.executable, "-m", "jaxsae", *map(str, argv)]
    return subprocess.run(command, capture_output=True, text=True, timeout=200, env=os.environ | environment)


def on_a_terminal(**environment):
    """What the help looks like there."""
    try:
        ours, theirs = pty.openpty()
    except OSError as error:
        pytest.skip(f"no terminal can be made here: {error}")
    command = [sys.executable, "-m", "jaxsae", "--help"]
    with subprocess.Popen(command, stdout=theirs, env=os.environ | {"TERM": "xterm"} | environment):
        os.close(theirs)
        found = b""
        with contextlib.suppress(OSError):  # a terminal that is closed
            while part := os.read(ours, 1 << 16):
                found += part
    os.close(ours)
    return found


def test_no_color_is_honoured():
    assert b"\x1b[" in on_a_terminal(NO_COLOR="")
    plain = on_a_terminal(NO_COLOR="1")
    assert b"Exit codes" in plain
    assert b"\x1b[" not in plain


def test_the_module_is_the_command(folder):
    options = ("--sae", folder / "topk", "--data", folder / "nothing.npy", "--out", folder / "codes.npz")
    keep = {"JAXSAE_CACHE": str(folder / "cache"), "JAX_ENABLE_COMPILATION_CACHE": "1"}
    found = process("refine", *options, **keep)
    assert found.returncode == 2
    assert found.stdout == ""
    assert error_line(found.stderr).startswith(f"jaxsae: {folder / 'nothing.npy'}: no such file")
    assert (folder / "cache/compiled").is_dir()


def test_a_reader_that_stops_is_no_error(folder):
    info = f"{sys.executable} -m jaxsae info {folder / 'topk'}"
    for reader in ("true", "head -1"):
        found = subprocess.run(
            ["bash", "-c", f"{info} | {reader}; exit ${{PIPESTATUS[0]}}"], capture_output=True, text=True
        )
        assert (found.returncode, found.stderr) == (0, "")


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="no device that is full")
def test_stdout_on_a_full_disk_is_one_line(folder):
    with open("/dev/full", "w") as full:
        command = [sys.executable, "-m", "jaxsae", "info", str(folder / "topk")]
        found = subprocess.run(command, stdout=full, stderr=subprocess.PIPE, text=True)
    assert found.returncode == 2
    assert "No space left on device" in error_line(found.stderr)


def test_what_a_stdout_of_ascii_cannot_print_is_escaped(folder):
    odd = folder / "größe"
    pretrained.save(pretrained.load(folder / "topk"), odd)
    found = process("convert", odd, folder / "größer", "--to", "jaxsae", PYTHONIOENCODING="ascii", PYTHONUTF8="0")
    assert (found.returncode, found.stderr) == (0, "")
    assert found.stdout == f"Written: {folder}/gr\\xf6\\xdfer, jaxsae\n"


BAD_TRAIN = {
    "too many parts": (["--mesh", 3, 3], "got a mesh of 3 × 3 for 8 devices; pass one of at most that many."),
    "parts that do not divide": (["--mesh", 2, 3], f"got {M} latents for a mesh that splits them 3 ways"),
    "a weight that is none": (["--weights", "1e-300"], "got --weights 1e-300; pass a number from 1e-06 to 1000000."),
    "no parts": (["--mesh", 0, 1], "got --mesh 0; pass"),
    "a rate of NaN": (["--learning-rate", "nan"], "got --learning-rate nan; pass a number above 0"),
    "an infinite rate": (["--learning-rate", "inf"], "got --learning-rate inf; pass a number above 0"),
    "a negative rate": (["--learning-rate", -1], "got --learning-rate -1; pass a number above 0"),
    "seconds of NaN": (["--save-every", "nan"], "got --save-every nan; pass a number from 0"),
    "a bucket": (["--out", "abfs://bucket/run"], "abfs:/bucket/run"),
    "nothing to resume": (["--resume"], "out: holds no run to resume; leave out --resume to begin one."),
    "a file in the way": (["--out", "{folder}/x.npy"], "cannot write {folder}/x.npy: "),
    "nothing can be written": (["--out", "/proc/run"], "cannot write /proc/run: "),
}


@pytest.mark.parametrize("case", BAD_TRAIN)
def test_bad_input_to_train_is_exit_code_2_and_one_line(case, folder, capsys, monkeypatch):
    monkeypatch.setattr(data, "open_rows", None)  # no work
    options, message = BAD_TRAIN[case]
    options = [str(option).format(folder=folder) for option in options]
    before = snapshot(folder)
    few = ["--activation", "topk", "--k", K, "--latents", M, "--data", folder / "x.npy", "--out", folder / "out"]
    assert cli("train", *few, *options) == 2
    out, err = capsys.readouterr()
    assert message.format(folder=folder) in error_line(err)
    assert out == ""
    assert snapshot(folder) == before


HERE = {"JAX_COORDINATOR_ADDRESS": "localhost:1"}
ENVIRONMENTS = {
    "one alone": ({}, "the processes do not find each other ("),
    "no number": (HERE | {"JAX_NUM_PROCESSES": "two"}, "got JAX_NUM_PROCESSES='two', expected a number"),
    "one too many": (HERE | {"JAX_NUM_PROCESSES": "2", "JAX_PROCESS_ID": "2"}, "process_id < num_processes"),
}


@pytest.mark.parametrize("case", ENVIRONMENTS)
def test_processes_that_cannot_find_each_other_are_one_line(case, folder, tmp_path):
    variables, message = ENVIRONMENTS[case]
    done = process("eval", "--sae", folder / "topk", "--data", folder / "x.npy", "--distributed", **variables)
    assert done.returncode == 2
    assert message in error_line(done.stderr)


@pytest.mark.parametrize("command", ["eval", "refine"])
def test_a_transcoder_is_one_line(command, folder, capsys):
    model = jaxsae.SAE(jnp.zeros((D, M)), jnp.zeros(M), jnp.ones((M, D)), jnp.zeros(D), jaxsae.TopK(K), transcoder=True)
    pretrained.save(model, folder / "transcoder")
    before = snapshot(folder)
    out = ["--out", folder / "codes.npz"] if command == "refine" else []
    assert cli(command, "--sae", folder / "transcoder", "--data", folder / "x.npy", *out) == 2
    assert "transcoder: is a transcoder; pass --target" in error_line(capsys.readouterr().err)
    assert snapshot(folder) == before


@pytest.mark.parametrize("options, message", [(["--layer", 3], "got layer 3"), (["--context", 1], "got --context 1")])
def test_a_harvest_looks_at_its_options_before_the_text(options, message, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(texts, "pack", None)
    model = Path(__file__).parent / "language_models/llama"
    assert cli("harvest", "--model", model, "--layer", 1, "--context", 16, *options, "--out", tmp_path / "out") == 2
    assert message in error_line(capsys.readouterr().err)
    assert not list(tmp_path.iterdir())


def test_one_row_is_held_out(tmp_path, capsys):
    # Its NMSE is not defined.
    np.save(tmp_path / "x.npy", rows(ROWS))
    few = ["--activation", "topk", "--k", K, "--latents", M, "--batch", 32, "--steps", 1, "--no-auxk"]
    assert cli("train", "--data", tmp_path / "x.npy", "--heldout", 1, *few, "--out", tmp_path / "out") == 0
    assert "1 held-out rows: NMSE –, L0 " in capsys.readouterr().out


@pytest.mark.slow
def test_study_and_refine_from_end_to_end(tmp_path):
    found = process("study", "--quick", "--out", tmp_path / "out")
    assert found.returncode == 0, found.stderr
    assert not [line for line in found.stderr.splitlines() if "%  " not in line]  # nothing but progress
    report = json.loads((tmp_path / "out" / "report.json").read_text())
    assert report["complete"]
    assert all(row["certified"] == 1 for row in report["rows"])
    x = jaxsae.data.image_patches(500, 500, side=8, seed=1)[1]
    np.save(tmp_path / "x.npy", x)
    for saved in sorted((tmp_path / "out" / "sae").iterdir()):
        codes = tmp_path / "codes.npz"
        found = process("refine", "--sae", saved, "--data", tmp_path / "x.npy", "--out", codes, "--strict")
        assert found.returncode == 0, found.stderr
        assert "Traceback" not in found.stderr
        with np.load(codes) as archive:
            assert archive["indices"].shape[0] == 500
            assert (archive["status"] == 0).all()
