import errno
import inspect
import os
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import tokenizers
from problems import dying, full_disk, refused, sae

from jaxsae import data, language_model, pretrained, stream
from jaxsae._core import files
from jaxsae._core.files import InputError, atomic_directory, atomic_file, local_path, owned, settled
from jaxsae.app import logs, report, runs, study
from jaxsae.app.options import Options
from jaxsae.data import shards
from jaxsae.ksvd import image_files
from jaxsae.language_model import files as model_files, text
from jaxsae.train.checkpoint import Checkpoints, steps


def write(manager, path, text):
    """Write `text` as a file, or as a directory that holds it, through one of the two managers."""
    with manager(path) as temporary:
        (temporary if manager is atomic_file else temporary / "a.txt").write_text(text)


def read(manager, path):
    return (path if manager is atomic_file else path / "a.txt").read_text()


def cannot(*arguments):
    raise OSError(errno.EINVAL, "Invalid argument")


@pytest.fixture(params=["file", "directory", "directory, by two renames"])
def manager(request, monkeypatch):
    if request.param == "directory, by two renames":
        monkeypatch.setattr(files, "_exchange", cannot)
    return atomic_file if request.param == "file" else atomic_directory


def test_it_appears_whole_and_nothing_else_does(manager, tmp_path):
    write(manager, tmp_path / "out", "new")
    assert read(manager, tmp_path / "out") == "new"
    assert os.listdir(tmp_path) == ["out"]


def test_missing_parents_are_made(manager, tmp_path):
    write(manager, tmp_path / "a" / "b" / "out", "new")
    assert read(manager, tmp_path / "a" / "b" / "out") == "new"


def test_what_was_there_is_replaced(manager, tmp_path):
    write(manager, tmp_path / "out", "old")
    write(manager, tmp_path / "out", "new")
    assert read(manager, tmp_path / "out") == "new"
    assert os.listdir(tmp_path) == ["out"]


def test_what_was_there_stays_until_the_block_ends(manager, tmp_path):
    write(manager, tmp_path / "out", "old")
    with manager(tmp_path / "out") as temporary:
        (temporary if manager is atomic_file else temporary / "a.txt").write_text("new")
        assert read(manager, tmp_path / "out") == "old"


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
@pytest.mark.parametrize("before", [None, "old"])
def test_an_exception_leaves_what_was_there_and_no_other_file(manager, error, before, tmp_path):
    if before:
        write(manager, tmp_path / "out", before)
    with pytest.raises(error), manager(tmp_path / "out") as temporary:
        (temporary if manager is atomic_file else temporary / "a.txt").write_text("half")
        raise error
    assert os.listdir(tmp_path) == (["out"] if before else [])
    if before:
        assert read(manager, tmp_path / "out") == before


def test_a_rename_that_fails_leaves_what_was_there(manager, tmp_path, monkeypatch):
    write(manager, tmp_path / "out", "old")

    def fail(source, target, rename=os.rename):
        if str(target) == str(tmp_path / "out") and os.path.basename(source) in ("new", "out"):
            full_disk()
        rename(source, target)

    with pytest.raises(OSError, match="No space"), monkeypatch.context() as patch:
        patch.setattr(os, "rename", fail)
        patch.setattr(os, "replace", fail)
        patch.setattr(files, "_exchange", cannot)
        write(manager, tmp_path / "out", "new")
    assert read(manager, tmp_path / "out") == "old"


@pytest.mark.parametrize("parent", ["file", "file/deeper"])
def test_a_place_that_cannot_be_written(manager, parent, tmp_path):
    (tmp_path / "file").write_text("not a directory")
    out = tmp_path / parent / "out"
    assert str(out) in refused(r"cannot write .*; choose another place", write, manager, out, "new")
    assert os.listdir(tmp_path) == ["file"]


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
def test_a_parent_without_permission(manager, tmp_path):
    (tmp_path / "locked").mkdir(mode=0o500)
    with pytest.raises(InputError, match=r"cannot write .*Permission denied"):
        write(manager, tmp_path / "locked" / "out", "new")


def test_what_is_written_has_the_permissions_of_any_other(manager, tmp_path):
    # Temporary places are private; what comes out of them must not be.
    write(manager, tmp_path / "out", "new")
    (tmp_path / "plain").mkdir() if manager is atomic_directory else (tmp_path / "plain").touch()
    assert (tmp_path / "out").stat().st_mode == (tmp_path / "plain").stat().st_mode


# --- crashes

# Dies before or after each call that touches the disk, in a child process for each.
SWEEP = """
import errno, os, signal, sys
from pathlib import Path
sys.path.insert(0, sys.argv[1])
import files
from files import atomic_file, atomic_directory
""" + "".join(map(inspect.getsource, (write, cannot, dying)))
SWEEP += """
manager = getattr(files, sys.argv[3])
if sys.argv[4] == "cannot":
    files._exchange = cannot
for before in ("", "old"):
    for after in (0, 1):
        for at in range(10**9):
            out = Path(sys.argv[2], f"{before}-{at}-{after}", "out")
            if before:
                write(manager, out, before)
            child = os.fork()
            if not child:
                calls = [(os, name) for name in ("fsync", "replace", "rename", "mkdir", "rmdir", "unlink")]
                dying(at, after, (files, "_exchange"), *calls)
                write(manager, out, "new")
                os._exit(0)
            if os.waitpid(child, 0)[1] != signal.SIGKILL:
                break
"""


@pytest.mark.parametrize(
    ("name", "exchange"), [("atomic_file", "can"), ("atomic_directory", "can"), ("atomic_directory", "cannot")]
)
def test_a_kill_at_any_step_leaves_the_old_or_the_new(name, exchange, tmp_path):
    manager = getattr(files, name)
    command = [sys.executable, "-c", SWEEP, str(Path(files.__file__).parent), str(tmp_path), name, exchange]
    subprocess.run(command, check=True)
    found = {"": set(), "old": set()}
    for folder in tmp_path.iterdir():
        before, out = folder.name.partition("-")[0], folder / "out"
        at = settled(out)
        found[before].add(read(manager, at) if at.exists() else "")
        if exchange == "can" and before:
            assert at == out
        write(manager, out, "newer")
        assert (read(manager, out), settled(out)) == ("newer", out)
        assert [name for name in os.listdir(folder) if name != "out" and not name.endswith(".partial")] == []
    assert found == {"": {"", "new"}, "old": {"old", "new"}}
    assert len(list(tmp_path.iterdir())) > 20


@pytest.mark.skipif(not Path("/proc/self/fd").exists(), reason="needs Linux to show what a descriptor is of")
def test_all_is_on_the_disk_before_it_is_named(tmp_path, monkeypatch):
    seen = []

    def logged(call, show):
        def wrapped(*arguments):
            seen.append(show(*arguments))
            return call(*arguments)

        return wrapped

    monkeypatch.setattr(os, "fsync", logged(os.fsync, lambda fd: Path(f"/proc/self/fd/{fd}").resolve().name))
    monkeypatch.setattr(os, "replace", logged(os.replace, lambda *_: "named"))
    monkeypatch.setattr(os, "rename", logged(os.rename, lambda *_: "named"))
    write(atomic_file, tmp_path / "a", "new")
    assert seen == ["a", "named", tmp_path.name]
    seen.clear()
    with atomic_directory(tmp_path / "b") as folder:
        (folder / "inner").mkdir()
        (folder / "inner/c").touch()
    assert seen == ["new", "c", "inner", "named", tmp_path.name]


def test_an_sae_whose_replacement_was_cut_short_is_loaded(tmp_path, monkeypatch):
    model = sae()
    pretrained.save(model, tmp_path / "run/sae")
    (tmp_path / "run/sae").rename(tmp_path / "run/.sae.old")
    for path in (tmp_path / "run", tmp_path / "run/sae"):
        assert (pretrained.load(path).W_dec == model.W_dec).all()
    pretrained.save(model, tmp_path / "run/sae")
    assert os.listdir(tmp_path / "run") == ["sae"]


# --- owners


def test_a_folder_has_one_owner_at_a_time(tmp_path):
    refused = pytest.raises(InputError, match=rf"run: another process writes there \(process {os.getpid()} of ")
    with owned(tmp_path / "run"), refused, owned(tmp_path / "run"):
        pass
    with owned(tmp_path / "run"):
        pass


def test_an_owner_that_was_killed_owns_nothing(tmp_path):
    script = f"""
import sys, time
sys.path.insert(0, {str(Path(files.__file__).parent)!r})
import files
with files.owned({str(tmp_path)!r}):
    print("mine", flush=True)
    time.sleep(600)
"""
    with subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout.readline() == "mine\n"
        with pytest.raises(InputError, match=f"process {process.pid} of"), owned(tmp_path):
            pass
        process.send_signal(signal.SIGKILL)
    with owned(tmp_path):
        pass


def test_a_file_system_without_locks_is_warned_of(tmp_path, monkeypatch):
    import fcntl

    said = []
    monkeypatch.setattr(fcntl, "flock", cannot)
    with owned(tmp_path, warn=said.append):
        pass
    assert said == [f"{tmp_path}: cannot be locked (Invalid argument); start no other process on it."]


def test_of_many_that_come_and_go_one_owns_at_a_time(tmp_path):
    script = f"""
import os, sys, time
sys.path.insert(0, {str(Path(files.__file__).parent)!r})
import files
owned = 0
while owned < 40:
    try:
        with files.owned({str(tmp_path / "run")!r}):
            os.close(os.open({str(tmp_path / "mark")!r}, os.O_CREAT | os.O_EXCL))  # fails if another owns it too
            os.unlink({str(tmp_path / "mark")!r})
            owned += 1
    except files.InputError:
        pass
"""
    together = [subprocess.Popen([sys.executable, "-c", script]) for _ in range(4)]
    assert [process.wait() for process in together] == [0] * 4
    assert os.listdir(tmp_path) == []


# --- addresses

BUCKETS = ["gs://bucket/run", "s3://bucket/x.npy", "GS://bucket/run"]
ADDRESSES = [*BUCKETS, "https://host/x.npy", "abfs+ssl://a/b"]
# These take an address in a bucket too; see test_buckets.py.
IN_BUCKETS = ("pretrained.save", "pretrained.load", "pretrained.describe", "atomic_", "owned", "settled", "Checkpoints")
IN_BUCKETS += ("steps", "open_rows", "shards.", "runs.run", "study.run, data", "stream.refine_file")


def entry_points():
    """Everything that takes a path, by name."""
    rows, tokenizer = np.zeros((9, 4), np.float32), tokenizers.Tokenizer(tokenizers.models.WordLevel({"a": 0}))
    options = Options("topk", 8, k=2, batch=2, heldout=2)
    named = [pretrained.save, *(lambda model, path, to=to: pretrained.save(model, path, format=to) for to in WRITTEN)]
    return {
        **{f"pretrained.save {n}": lambda path, save=save: save(sae(), path) for n, save in enumerate(named)},
        "atomic_file": lambda path: atomic_file(path).__enter__(),
        "atomic_directory": lambda path: atomic_directory(path).__enter__(),
        "owned": lambda path: owned(path).__enter__(),
        "settled": settled,
        "Checkpoints": lambda path: Checkpoints(path, config={}),
        "steps": steps,
        "open_rows": data.open_rows,
        "shards.read": shards.read,
        "shards.open_rows": shards.open_rows,
        "shards.verify": shards.verify,
        "shards.column": lambda path: shards.column(path, "tokens"),
        "shards.Writer": lambda path: shards.Writer(path, width=4, dtype="float16", source={}),
        "pretrained.load": pretrained.load,
        "pretrained.detect": pretrained.detect,
        "pretrained.describe": pretrained.describe,
        "runs.run, out": lambda path: runs.run(path, data={"x": rows}, options=options),
        "runs.run, data": lambda path: runs.run("out", data=path, options=options),
        "report.write, run": lambda path: report.write(path, "out.html"),
        "report.write, out": lambda path: report.write("run", path),
        "runs.curves": logs.curves,
        "study.run, out": study.run,
        "study.run, data": lambda path: study.run("out", data=path),
        "images.read": image_files.read,
        "image_files.write": lambda path: image_files.write(path, np.zeros((8, 8))),
        "text.pack": lambda path: text.pack([Path(path)], tokenizer, context=8),
        "language_model.load": language_model.load,
        "model_files.read_tokenizer": model_files.read_tokenizer,
        "stream.refine_file": lambda path: stream.refine_file(sae(), rows, path),
    }


WRITTEN = [name for name, row in pretrained.FORMATS.items() if row.write]


@pytest.mark.parametrize("kind", [str, Path])
def test_an_address_is_refused_wherever_a_path_is_taken_and_nothing_is_made(kind, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for address in ADDRESSES:
        for name, call in entry_points().items():
            if address not in BUCKETS or not name.startswith(IN_BUCKETS):
                refused("is a URL, expected a local path; copy it here", call, kind(address))
    assert os.listdir(tmp_path) == []


def test_an_address_in_a_bucket_keeps_its_slashes():
    assert [files.address(kind(f"{scheme}://b/x")) for kind in (str, Path) for scheme in ("gs", "S3")] == [
        *("gs://b/x", "s3://b/x") * 2
    ]
    assert [files.address(path) for path in ("gs:x", "./gs://x", "hf://x", "https://x", "x")] == [None] * 5
    assert files.address(Path("gs://")) == "gs://"


def test_a_path_with_a_colon_is_a_path(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for path in ("a:b", "C:/x", "./gs", f"{tmp_path}/gs://x", "2024:01/x", "run 1: a/b"):
        assert local_path(path) == Path(path)
