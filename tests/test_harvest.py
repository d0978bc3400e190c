import contextlib
import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest
import tokenizers
from problems import cli, full_disk

from jaxsae import language_model
from jaxsae._core.files import InputError
from jaxsae.data import open_rows, shards
from jaxsae.data.batching import batches
from jaxsae.language_model import files, harvest, text as texts

MODEL = Path(__file__).parent / "language_models" / "llama"
END = 256  # <|endoftext|>; every byte is a token of its own


@pytest.fixture(scope="module")
def model():
    return language_model.load(MODEL)


@pytest.fixture(scope="module")
def tokenizer():
    return files.read_tokenizer(MODEL)


def contexts_of(n, length=16, seed=0):
    return np.random.default_rng(seed).integers(0, 256, (n, length), np.int32)


def run(out, model, contexts, **options):
    [rows] = harvest.run(
        out, model, contexts, **{"points": [(1, "resid_post")], "source": {"from": "a test"}} | options
    )
    return rows


# --- Text


def write(folder, *contents: bytes):
    for i, content in enumerate(contents):
        (folder / f"{i}.txt").write_bytes(content)
    return [folder / f"{i}.txt" for i in range(len(contents))]


def test_files_follow_one_another_and_a_rest_is_left_out(tmp_path, tokenizer):
    text = texts.pack(write(tmp_path, b"abcd", b"efghi"), tokenizer, context=4)
    first = tokenizer.encode("abcd").ids
    second = tokenizer.encode("efghi").ids
    np.testing.assert_array_equal(text.contexts, np.reshape([*first, END, *second, END][:8], (2, 4)))
    assert text.files == [str(tmp_path / "0.txt"), str(tmp_path / "1.txt")]
    assert (text.replaced, text.empty) == (0, 0)


def test_contexts_begin_as_the_tokenizer_begins_texts(tmp_path):
    tokenizer = files.read_tokenizer(MODEL)
    tokenizer.post_processor = tokenizers.processors.TemplateProcessing(
        single="<|endoftext|> $A", special_tokens=[("<|endoftext|>", END)]
    )
    text = texts.pack(write(tmp_path, b"abcdef"), tokenizer, context=4)
    ids = tokenizer.encode("abcdef", add_special_tokens=False).ids
    assert text.contexts.tolist() == [[END, *ids[:3]], [END, *ids[3:]]]


@pytest.mark.parametrize("tokens, contexts, read", [(1, 1, 1), (8, 2, 1), (9, 3, 2), (10**9, 5, 3), (None, 5, 3)])
def test_it_stops_after_so_many_tokens(tokens, contexts, read, tmp_path, tokenizer):
    files = write(tmp_path, b"a" * 8, b"b" * 4, b"c" * 5)
    text = texts.pack(files, tokenizer, context=4, tokens=tokens)
    assert text.contexts.shape == (contexts, 4)
    assert len(text.files) == read


def test_what_is_not_utf_8_is_counted(tmp_path, tokenizer):
    genuine = "�".encode()
    text = texts.pack(write(tmp_path, b"ab\xff\xfecd", genuine * 3, b""), tokenizer, context=4)
    assert (text.replaced, text.empty) == (2, 1)


def test_the_standard_library_is_there_and_in_one_order():
    files = texts.standard_library()
    assert len(files) > 100
    assert files == texts.standard_library()
    assert not any("site-packages" in file.parts for file in files)


@pytest.mark.parametrize(
    "contents, message",
    [([b""], "0.txt: the text is empty"), ([b"ab"], "has 3 tokens"), ([b"", b""], "2 files: the text is empty")],
)
def test_text_that_fills_no_context_is_refused(contents, message, tmp_path, tokenizer):
    with pytest.raises(InputError, match=message):
        texts.pack(write(tmp_path, *contents), tokenizer, context=4)


# --- Rows


@pytest.mark.parametrize("n, batch", [(1, 8), (8, 8), (21, 8), (21, 3), (40, 16)])
def test_rows_are_the_residuals_after_the_first_position(n, batch, tmp_path, model):
    contexts = contexts_of(n)
    rows = run(tmp_path, model, contexts, batch=batch, dtype="float32")
    wanted = language_model.residual(model, jnp.asarray(contexts), 1)[:, 1:].reshape(-1, 24)
    np.testing.assert_allclose(np.asarray(rows), wanted, rtol=1e-5, atol=1e-5)
    np.testing.assert_array_equal(shards.column(tmp_path, "tokens"), contexts)
    manifest = shards.read(tmp_path)
    assert manifest.complete
    assert (
        manifest.source | {"from": "a test", "layer": 1, "site": "resid_post", "contexts": n, "context": 16}
        == manifest.source
    )


def small_shards(monkeypatch, steps=2):
    monkeypatch.setattr(harvest, "_MAX_STEPS", steps)


def test_an_interrupted_harvest_goes_on(tmp_path, model, monkeypatch):
    small_shards(monkeypatch)
    contexts = contexts_of(60)
    whole = np.asarray(run(tmp_path / "whole", model, contexts))
    assert len(shards.read(tmp_path / "whole").shards) == 4
    for interruptions in range(3):

        def stop_at(n, seen=[]):  # noqa: B006 - counts the calls of one attempt
            seen.append(n)
            if len(seen) % 4 == 0:
                raise KeyboardInterrupt

        with pytest.raises(KeyboardInterrupt):
            run(tmp_path / "parts", model, contexts, progress=stop_at)
        assert len(shards.read(tmp_path / "parts").shards) > interruptions
    progress = []
    rows = run(tmp_path / "parts", model, contexts, batch=16, progress=progress.append)  # in other steps
    np.testing.assert_array_equal(np.asarray(rows), whole)
    np.testing.assert_array_equal(shards.column(tmp_path / "parts", "tokens"), contexts)
    assert sum(progress) == 60
    before = {path.name: path.stat().st_mtime_ns for path in (tmp_path / "parts").iterdir()}
    np.testing.assert_array_equal(np.asarray(run(tmp_path / "parts", model, contexts)), whole)
    assert before == {path.name: path.stat().st_mtime_ns for path in (tmp_path / "parts").iterdir()}


KILLED = """
import sys, numpy as np
from jaxsae import language_model
from jaxsae.language_model import harvest
harvest._MAX_STEPS = 1
contexts = np.random.default_rng(0).integers(0, 256, (400, 16), np.int32)
print("ready", flush=True)
model, points = language_model.load(sys.argv[1]), [(1, "resid_post")]
harvest.run(sys.argv[2], model, contexts, points=points, source={"from": "a test"})
"""


def test_a_killed_harvest_goes_on(tmp_path, model):
    generator = np.random.default_rng(1)
    for _ in range(3):
        process = subprocess.Popen(
            [sys.executable, "-c", KILLED, str(MODEL), str(tmp_path / "parts")],
            stdout=subprocess.PIPE,
            env=os.environ | {"XLA_FLAGS": ""},
        )
        process.stdout.readline()
        deadline, some = time.monotonic() + 60, int(generator.integers(1, 6))
        there = len(list((tmp_path / "parts").glob("*.npy")))
        while len(list((tmp_path / "parts").glob("*.npy"))) < there + some and time.monotonic() < deadline:
            time.sleep(0.001)
        process.send_signal(signal.SIGKILL)
        process.communicate()
    contexts = contexts_of(400)
    rows = run(tmp_path / "parts", model, contexts)
    wanted = language_model.residual(model, jnp.asarray(contexts), 1)[:, 1:].reshape(-1, 24)
    assert rows.shape == wanted.shape
    np.testing.assert_allclose(np.asarray(rows), wanted, rtol=1e-3, atol=1e-3)
    np.testing.assert_array_equal(shards.column(tmp_path / "parts", "tokens"), contexts)


def test_a_full_disk_leaves_whole_shards(tmp_path, model, monkeypatch):
    small_shards(monkeypatch)
    contexts = contexts_of(60)
    calls, fsync = [], os.fsync

    def full(descriptor):
        calls.append(descriptor)
        if len(calls) > 14:
            full_disk()
        fsync(descriptor)

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space"):
        run(tmp_path / "parts", model, contexts)
    monkeypatch.setattr(os, "fsync", fsync)
    whole = np.asarray(run(tmp_path / "whole", model, contexts))
    found = np.asarray(shards.open_rows(tmp_path / "parts"))
    assert 0 < len(found) < len(whole)
    np.testing.assert_array_equal(found, whole[: len(found)])
    np.testing.assert_array_equal(np.asarray(run(tmp_path / "parts", model, contexts)), whole)


POINTS = [(0, "resid_post"), (2, "mlp_out"), (1, "hook_z"), (2, "resid_pre")]


def files_of(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def test_sites_of_one_pass_are_those_of_several_to_the_bit(tmp_path, model, monkeypatch):
    small_shards(monkeypatch)
    contexts = contexts_of(40)
    rows = harvest.run(tmp_path / "many", model, contexts, points=POINTS, source={})
    found = harvest.directories(tmp_path / "many", POINTS)
    assert {path.name for path in (tmp_path / "many").iterdir()} == {"harvest.json", *(path.name for path in found)}
    for point, folder, here in zip(POINTS, found, rows, strict=True):
        alone = tmp_path / folder.name
        harvest.run(alone, model, contexts, points=[point], source={})
        assert files_of(folder) == files_of(alone)
        wanted = language_model.residual(model, jnp.asarray(contexts), *point)[:, 1:].reshape(-1, 24)
        np.testing.assert_allclose(np.asarray(here), wanted, rtol=1e-3, atol=1e-3)


def test_a_harvest_that_was_stopped_between_two_sites_goes_on(tmp_path, model, monkeypatch):
    """With other steps too, whose shards have other edges."""
    small_shards(monkeypatch)
    contexts, writing = contexts_of(60), shards.Writer.append
    for kept in (1, 5, 6, 10):
        calls = []

        def stopping(writer, rows, **columns):
            if len(calls) >= kept:  # noqa: B023 - of this attempt
                raise KeyboardInterrupt
            calls.append(writer)  # noqa: B023
            writing(writer, rows, **columns)

        monkeypatch.setattr(shards.Writer, "append", stopping)
        with pytest.raises(KeyboardInterrupt):
            harvest.run(tmp_path / str(kept), model, contexts, points=POINTS, source={})
        monkeypatch.setattr(shards.Writer, "append", writing)
        progress = []
        again = {"points": POINTS, "source": {}, "batch": 5, "progress": progress.append}
        rows = harvest.run(tmp_path / str(kept), model, contexts, **again)
        assert sum(progress) == 60
        for point, here, folder in zip(POINTS, rows, harvest.directories(tmp_path / str(kept), POINTS), strict=True):
            wanted = language_model.residual(model, jnp.asarray(contexts), *point)[:, 1:].reshape(-1, 24)
            np.testing.assert_allclose(np.asarray(here), wanted, rtol=1e-3, atol=1e-3)
            np.testing.assert_array_equal(shards.column(folder, "tokens"), contexts)


def test_the_pass_ends_with_the_last_site(model):
    compiled = [
        harvest._after_first.lower(model, jnp.asarray(contexts_of(4)), points).compile().cost_analysis()["flops"]
        for points in ([(0, "resid_pre")], [(0, "mlp_in")], [(0, "mlp_out")])
        for points in [tuple(points)]
    ]
    assert compiled == sorted(compiled)
    assert len(set(compiled)) == 3


def test_other_sites_are_not_mixed_in(tmp_path, model):
    harvest.run(tmp_path, model, contexts_of(8), points=POINTS, source={})
    for points in (POINTS[:2], POINTS[:1]):
        with pytest.raises(InputError, match=re.escape(str(tmp_path))):
            harvest.run(tmp_path, model, contexts_of(8), points=points, source={})


def test_the_directory_of_several_sites_names_them(tmp_path, model):
    harvest.run(tmp_path, model, contexts_of(8), points=POINTS, source={})
    named = r"a directory without manifest.json; pass one in it: layer_0_resid_post, layer_1_hook_z, "
    with pytest.raises(InputError, match=named):
        open_rows(tmp_path)


def test_other_text_is_not_mixed_in(tmp_path, model):
    run(tmp_path, model, contexts_of(8))
    for options in (
        {"contexts": contexts_of(8, seed=1)},
        {"points": [(0, "resid_post")]},
        {"points": [(1, "mlp_out")]},
        {"dtype": "float32"},
        {"source": {}},
    ):
        with pytest.raises(InputError, match=str(tmp_path)):
            run(tmp_path, model, **{"contexts": contexts_of(8)} | options)


# --- The command


def test_the_command_harvests_and_tells(tmp_path, capsys):
    files = write(tmp_path, b"some text\n" * 30, b"caf\xe9 " * 10, b"")
    out = tmp_path / "out"
    assert cli("harvest", "--model", MODEL, "--layer", 2, "--text", *files, "--context", 16, "--out", out) == 0
    printed, err = capsys.readouterr()
    rows = shards.open_rows(out)
    assert printed == f"Written: {out}, {len(rows)} rows of width 24, float16, from 3 files\n"
    assert "jaxsae: warning: 10 characters were not UTF-8, and were read as U+FFFD." in err
    assert "jaxsae: warning: 1 files are empty." in err
    assert "tokens/s" in err
    assert json.loads((out / "manifest.json").read_text())["source"]["text"] == [str(file) for file in files]


def test_the_command_harvests_several_sites(tmp_path, capsys):
    text = write(tmp_path, b"some text\n" * 30)
    where = ["--model", MODEL, "--text", *text, "--context", 16, "--out", tmp_path / "out"]
    assert cli("harvest", *where, "--layer", 0, 2, "--site", "mlp_out", "blocks.1.hook_resid_pre", "--json") == 0
    summary = json.loads(capsys.readouterr().out)
    names = ["layer_0_mlp_out", "layer_2_mlp_out", "layer_1_resid_pre"]
    assert [Path(each["out"]).name for each in summary["directories"]] == names
    assert [each["rows"] for each in summary["directories"]] == [len(open_rows(tmp_path / "out" / n)) for n in names]
    listed = json.loads((tmp_path / "out/harvest.json").read_text())["directories"]
    assert listed["layer_1_resid_pre"] == {"layer": 1, "site": "resid_pre"}
    sae = ["--activation", "topk", "--k", 4, "--latents", 32, "--batch", 32, "--steps", 3, "--heldout", 32]
    assert cli("train", "--data", tmp_path / "out/layer_0_mlp_out", *sae, "--out", tmp_path / "run") == 0
    live = [*where[:-2], "--site", "blocks.0.hook_mlp_out", "--out", tmp_path / "live"]
    assert cli("train", *live, *sae) == 0
    reports = [json.loads((tmp_path / name / "report.json").read_text()) for name in ("run", "live")]
    assert reports[1]["data"]["path"].startswith(f"{MODEL}, layer 0, mlp_out, text ")
    measured = [report["heldout"]["nmse"] for report in reports]  # float16 and float32, in another order
    assert abs(measured[0] - measured[1]) < 0.2


def test_what_was_harvested_can_be_trained_on(tmp_path, capsys):
    files = write(tmp_path, bytes(range(32, 127)) * 30)
    out, sae = tmp_path / "out", tmp_path / "run"
    site = ("--model", MODEL, "--layer", 1, "--text", *files, "--context", 16)
    assert cli("harvest", *site, "--out", out, "--json") == 0
    summary = json.loads(capsys.readouterr().out)
    assert (summary["rows"], summary["width"]) == shards.open_rows(out).shape
    assert (summary["out"], summary["files"]) == (str(out), [str(file) for file in files])
    options = ["--activation", "topk", "--k", 4, "--latents", 32, "--batch", 64, "--steps", 3, "--heldout", 64]
    assert cli("train", "--data", out, *options, "--out", sae) == 0
    assert cli("eval", "--sae", sae, "--data", out) == 0
    assert cli("refine", "--sae", sae, "--data", out, "--out", tmp_path / "codes.npz") == 0


# --- Live


@pytest.fixture
def steps(monkeypatch):
    """How many contexts each step was of."""
    real, taken = harvest._step, []

    def step(model, some, *more):
        taken.append(len(some))
        return real(model, some, *more)

    monkeypatch.setattr(harvest, "_step", step)
    return taken


def test_live_rows_are_those_that_are_written(tmp_path, model, steps):
    contexts = contexts_of(19)
    written = run(tmp_path / "out", model, contexts, dtype="float32", batch=8)
    steps.clear()
    [rows] = harvest.live(model, contexts, points=[(1, "resid_post")], batch=8)
    assert (rows.shape, rows.dtype, steps) == (written.shape, np.float32, [])
    np.testing.assert_array_equal(rows[[280, 3, 3]], written[[280, 3, 3]])
    assert sorted(steps) == [3, 8]
    np.testing.assert_array_equal(np.asarray(rows), np.asarray(written))


def test_a_pass_in_windows_computes_each_context_once_and_keeps_two_windows(model, steps):
    contexts = contexts_of(128)
    [rows] = harvest.live(model, contexts, points=[(1, "resid_post")], batch=8, window=480)  # four steps
    taken = batches(rows, 96, seed=0, window=480)
    a_pass = [next(taken) for _ in range(len(rows) // 96)]
    ahead = steps.count(8) - 16  # of the next pass, read ahead
    assert 0 <= ahead <= 2 * 4
    np.testing.assert_array_equal(np.sort(np.concatenate(a_pass)[:, 0]), np.sort(np.asarray(rows)[:, 0]))


def test_a_live_training_that_is_stopped_goes_on_to_the_bit(tmp_path, capsys):
    files = write(tmp_path, bytes(range(32, 127)) * 60)
    options = ["--model", MODEL, "--layer", 1, "--text", *files, "--context", 16, "--window", 500]
    options += ["--activation", "topk", "--k", 4, "--latents", 32, "--batch", 64, "--steps", 60, "--heldout", 64]
    assert cli("train", *options, "--out", tmp_path / "alone") == 0
    code, began = None, json.loads((tmp_path / "alone/report.json").read_text())
    assert began["data"]["path"].startswith(f"{MODEL}, layer 1, resid_post, text ")

    def stop(text, steps):
        if steps and not (tmp_path / "run/report.json").exists():
            os.kill(os.getpid(), signal.SIGTERM)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("jaxsae.app.console.progress", lambda *_, **__: contextlib.nullcontext(stop))
        code = cli("train", *options, "--out", tmp_path / "run")
    printed = capsys.readouterr().out
    assert (code, "Stopped after" in printed) == (0, True)
    assert not (tmp_path / "run/report.json").exists()
    assert cli("train", *options, "--out", tmp_path / "run") == 0
    of = [(tmp_path / name / "sae/sae.safetensors").read_bytes() for name in ("alone", "run")]
    assert of[0] == of[1]
    capsys.readouterr()
    options[5] = MODEL / "config.json"
    assert cli("train", *options, "--out", tmp_path / "run") == 2
    assert "holds another run (got " in capsys.readouterr().err


@pytest.mark.parametrize(
    "options, message",
    [
        ([], "pass --data, or --model and --layer."),
        (["--layer", 1, "--data", "x.npy"], "pass --data, or --model and --layer."),
        (["--model", MODEL], "got a site without a layer; pass --layer too."),
        (
            ["--site", "mlp_out", "--data", "x.npy"],
            "got --site without --model; pass the model that",
        ),
    ],
)
def test_a_training_takes_data_or_a_model(options, message, tmp_path, capsys):
    assert cli("train", *options, "--activation", "topk", "--k", 2, "--latents", 32, "--out", tmp_path / "run") == 2
    assert capsys.readouterr().err.startswith(f"jaxsae: {message}")


BAD = {
    "no text": (["--text", "no-such-file"], "no-such-file: no such file or directory"),
    "empty text": (["--text", "empty.txt"], "empty.txt: the text is empty"),
    "layer": (["--layer", 3], "got layer 3, the model has 3; pass one from 0 to 2"),
    "negative layer": (["--layer", -1], "got --layer -1; pass"),
    "no layer": (["--layer", None], "got a site without a layer; pass --layer too"),
    "no such site": (["--site", "mlp"], "got site 'mlp'; pass one of resid_pre, hook_z"),
    "layers for nothing": (["--site", "blocks.1.hook_mlp_out"], "got layers [1], and sites that name their own"),
    "a site twice": (["--site", ["mlp_out", "mlp_out"]], "got 2 places, 1 of them different; pass"),
    "long context": (["--context", 97], "got contexts of 97 tokens, the model takes 96"),
    "short context": (["--context", 1], "got --context 1; pass"),
    "no batch": (["--batch", 0], "--batch 0"),
    "no tokens": (["--tokens", 0], "--tokens 0"),
    "integers": (["--dtype", "int8"], "--dtype 'int8', expected one of: float16, float32"),
    "no such dtype": (["--dtype", "half-ish"], "--dtype 'half-ish', expected one of: float16, float32"),
    "model": (["--model", "no-such-model"], "no-such-model: no such file"),
    "not fetched": (["--model", "smollm2"], "run: jaxsae fetch smollm2"),
    "other files": (["--out", "."], "holds files but no manifest.json"),
    "out is a file": (["--out", "text.txt"], "text.txt"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input_is_one_line_and_exit_code_2(case, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("JAXSAE_CACHE", str(tmp_path / "cache"))
    (tmp_path / "text.txt").write_text("a text long enough to fill a context or two of 97 tokens. " * 5)
    (tmp_path / "empty.txt").write_text("")
    options, message = BAD[case]
    given = {"--model": MODEL, "--layer": 1, "--text": "text.txt", "--context": 16, "--out": "out"}
    given |= dict(zip(options[::2], options[1::2], strict=True))
    before = sorted(tmp_path.rglob("*"))
    given = {name: value if isinstance(value, list) else [value] for name, value in given.items() if value is not None}
    assert cli("harvest", *(part for name, values in given.items() for part in (name, *values))) == 2
    out, err = capsys.readouterr()
    (line,) = err.splitlines()
    assert line.startswith("jaxsae: ")
    assert message in line
    assert out == ""
    assert sorted(tmp_path.rglob("*")) == before


def test_a_tokenizer_of_another_vocabulary_is_told(tmp_path, capsys):
    for file in MODEL.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    other = tokenizers.Tokenizer(tokenizers.models.WordLevel({"word": 300, "?": 1}, unk_token="?"))
    other.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    other.save(str(tmp_path / "tokenizer.json"))
    (tmp_path / "text.txt").write_text("word " * 100)
    options = ["--model", tmp_path, "--layer", 1, "--text", tmp_path / "text.txt", "--context", 16]
    assert cli("harvest", *options, "--out", tmp_path / "out") == 2
    assert "made token 300, the model's vocabulary has 260" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
