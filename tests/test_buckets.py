"""Buckets: what is read from and written to object stores on loopback is what it is on disk, or one line."""

import contextlib
import http.server
import io
import json
import os
import random
import signal
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path

import jax
import numpy as np
import pytest
from problems import assert_same_bits, cli, every_activation, refused, rows, sae

import jaxsae
from jaxsae import data, pretrained
from jaxsae._core import buckets
from jaxsae._core.files import any_path, atomic_directory, atomic_file, names
from jaxsae.app import runs
from jaxsae.app.options import Options
from jaxsae.autoencoder import stream
from jaxsae.data import batching, lazy, remote, shards
from jaxsae.train import checkpoint

# Before gcsfs is imported: else it asks a server for its kind of buckets in a protocol that only Google's own speaks.
os.environ.setdefault("GCSFS_EXPERIMENTAL_ZB_HNS_SUPPORT", "false")
for module in ("gcsfs", "s3fs", "moto", "gcp_storage_emulator"):
    pytest.importorskip(module)
N, D = 640, 16


def _free_port():
    """One that no client is given for its own end, who could then connect to itself while the server is down."""
    while True:
        port = random.randrange(20_000, 32_000)
        with contextlib.suppress(OSError), socket.socket() as free:
            free.bind(("127.0.0.1", port))
            return port


class Server:
    """A server in a process of its own, that can be killed and started again."""

    def __init__(self, *command, environment=None):
        self.port = _free_port()
        self.url, self._command = f"http://127.0.0.1:{self.port}", [sys.executable, *command, str(self.port)]
        self._environment = os.environ | (environment or {})
        self.start()

    def start(self):
        self._process = subprocess.Popen(
            self._command, env=self._environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
        )
        for _ in range(600):
            try:
                socket.create_connection(("127.0.0.1", self.port), timeout=1).close()
                return
            except OSError:
                time.sleep(0.05)
        raise TimeoutError(self._command)

    def kill(self):
        self._process.send_signal(signal.SIGKILL)
        self._process.wait()


@pytest.fixture(scope="session")
def google(tmp_path_factory):
    """A server of Google's protocol, which keeps objects on disk."""
    folder = tmp_path_factory.mktemp("google")
    command = (
        str(Path(__file__).with_name("google_storage.py")),
        "start",
        "--host",
        "127.0.0.1",
        "--default-bucket",
        "bucket",
        "--port",
    )
    server = Server(*command, environment={"STORAGE_BASE": str(folder)})
    yield server
    server.kill()


@pytest.fixture(scope="session")
def amazon():
    """A server of Amazon's protocol."""
    server = Server("-m", "moto.server", "-H", "127.0.0.1", "-p")
    yield server
    server.kill()


@pytest.fixture(scope="session", autouse=True)
def environment(google, amazon):
    """What a user sets for servers other than Google's and Amazon's own; for the session, as stores keep addresses."""
    patch = pytest.MonkeyPatch()
    for name, value in {
        "STORAGE_EMULATOR_HOST": google.url,
        "TENSORSTORE_GCS_HTTP_URL": google.url,
        "GOOGLE_CLOUD_PROJECT": "none",
        "FSSPEC_GCS_TOKEN": "anon",
        "AWS_ENDPOINT_URL": amazon.url,
        "AWS_ACCESS_KEY_ID": "none",
        "AWS_SECRET_ACCESS_KEY": "none",
        "AWS_DEFAULT_REGION": "us-east-1",
    }.items():
        patch.setenv(name, value)
    import fsspec
    import fsspec.config

    fsspec.config.set_conf_env(fsspec.config.conf)
    fsspec.filesystem("s3").mkdir("bucket")
    yield
    patch.undo()


@pytest.fixture(params=["gs", "s3"])
def place(request):
    """An address of which nothing is there yet."""
    place.count += 1
    return f"{request.param}://bucket/{place.count}"


place.count = 0


@pytest.fixture
def here(tmp_path, monkeypatch):
    """An empty directory to work in, which stays empty: no local directory is named `gs:`."""
    monkeypatch.chdir(tmp_path)
    yield tmp_path
    assert not [path.name for path in tmp_path.iterdir() if ":" in path.name]


def write_shards(folder, sizes, width=D, dtype="float16"):
    writer = shards.Writer(folder, width=width, dtype=dtype, source={"seed": 0})
    everything = rows(sum(sizes), width)
    for start, size in zip(np.cumsum([0, *sizes]), sizes, strict=False):
        writer.append(everything[start : start + size], tokens=np.arange(start, start + size))
    writer.finish()


def content(folder):
    return {name: (any_path(folder) / name).read_bytes() for name in names(any_path(folder))}


# --- Rows


def test_shards_in_a_bucket_are_those_on_disk(place, here):
    sizes = [100, 1, 300, 239]
    for folder in (here / "x", place):
        write_shards(folder, sizes)
    assert content(place) == content(here / "x")
    there, local = data.open_rows(place), data.open_rows(here / "x")
    assert (there.shape, there.dtype, there.checksum) == (local.shape, local.dtype, local.checksum)
    some = np.random.default_rng(0).integers(0, N, 77)
    slices = slice(None), slice(90, 110), slice(0, 0), slice(None, None, 7)
    for index in (*slices, some, some[:0], 5, some.reshape(7, 11)):
        assert_same_bits(np.asarray(there[index]), np.asarray(local[index]))
    assert_same_bits(shards.column(place, "tokens"), np.arange(N))
    shards.verify(place)
    assert data.fingerprint(there) == data.fingerprint(local)


def test_a_directory_in_a_bucket_is_written_on(place):
    write_shards(place, [10])
    refused("is complete", shards.Writer(place, width=D, dtype="float16", source={"seed": 0}).append, rows(3, D))
    refused("got width 8, expected 16", shards.Writer, place, width=8, dtype="float16", source={"seed": 0})
    begun = shards.Writer(f"{place}/b", width=D, dtype="float16", source={})
    begun.append(rows(4, D))
    (any_path(f"{place}/b") / "00001.npy").write_bytes(b"half a shard, of a writer that was killed")
    resumed = shards.Writer(f"{place}/b", width=D, dtype="float16", source={})
    assert (resumed.rows, sorted(names(any_path(f"{place}/b")))) == (4, ["00000.npy", "manifest.json"])
    refused("another process has written there", lambda: (resumed.append(rows(4, D)), begun.append(rows(4, D))))
    (any_path(f"{place}/c") / "notes.txt").write_text("mine")
    refused("holds files but no manifest", shards.Writer, f"{place}/c", width=D, dtype="float16", source={})


def test_what_is_damaged_in_a_bucket_is_refused(place):
    write_shards(place, [10, 20])
    first, second = (any_path(place) / name for name in ("00000.npy", "00001.npy"))
    whole = first.read_bytes()
    first.write_bytes(whole[:-1])
    refused("00000.npy: has 447 bytes, expected 448", data.open_rows, place)
    first.write_bytes(whole)
    opened = data.open_rows(place)
    first.write_bytes(whole[:-1] + b"x")
    refused("00000.npy: is damaged, its CRC-32", shards.verify, place)
    second.write_bytes(second.read_bytes().replace(b"'<f2'", b"'<i2'"))
    refused("00001.npy: does not hold an array", lambda: np.asarray(opened))
    opened = data.open_rows(place)
    second.unlink()
    refused("00001.npy: no such bucket or object", lambda: opened[15])
    refused("00001.npy: no such file", data.open_rows, place)
    (any_path(place) / shards.MANIFEST).write_text("{}")
    refused("is damaged or no manifest", data.open_rows, place)


NPY = {
    "float16": np.arange(12, dtype=np.float16).reshape(4, 3),
    "float32, more axes": np.arange(24, dtype=np.float32).reshape(2, 4, 3),
    "float64": np.arange(12.0).reshape(4, 3),
}
NOT_ROWS = {
    "one axis": (np.zeros(3), "has shape"),
    "none": (np.zeros((0, 3)), "has shape"),
    "whole numbers": (np.zeros((4, 3), int), "holds int64"),
    "big-endian": (np.zeros((4, 3), ">f4"), "holds >f4"),
    "Fortran order": (np.asfortranarray(np.zeros((4, 3))), "in Fortran order"),
    "truncated": (np.zeros((4, 3)), "too few or too many"),
    "no array": (None, "not a .npy file"),
}


@pytest.mark.parametrize("case", [*NPY, *NOT_ROWS])
def test_a_npy_file_in_a_bucket(case, place):
    path = any_path(f"{place}/x.npy")
    if case in NPY:
        np.save(buffer := io.BytesIO(), NPY[case])
        path.write_bytes(buffer.getvalue())
        found = data.open_rows(str(path))
        assert found.dtype == NPY[case].dtype
        assert_same_bits(np.asarray(found), NPY[case].reshape(-1, 3))
        assert data.fingerprint(found) != data.fingerprint(np.asarray(found) + 1)
    else:
        array, message = NOT_ROWS[case]
        np.save(buffer := io.BytesIO(), array) if array is not None else (buffer := io.BytesIO(b"some text"))
        path.write_bytes(buffer.getvalue()[: -1 if case == "truncated" else None])
        refused(message, data.open_rows, str(path))


def _save(path, array):
    np.save(buffer := io.BytesIO(), array)
    path.write_bytes(buffer.getvalue())


def test_a_directory_of_npy_files_in_a_bucket(place, small_blocks):
    folder, everything = any_path(f"{place}/x"), rows(N, D).astype(np.float16)
    for name, part in {"x_10": everything[300:], "x_2": everything[:300], "x_3": everything[:0]}.items():
        _save(folder / f"{name}.npy", part)
    found = data.open_rows(str(folder))
    small_blocks.clear()
    assert_same_bits(np.asarray(found), everything)
    assert_same_bits(found[[639, 0, 300]], everything[[639, 0, 300]])
    read = {(path, start) for path, start, _ in small_blocks}
    assert len(read) == 19 + 22, "each block of 16 rows, from the beginning of its file"
    before = data.fingerprint(found)
    assert data.fingerprint(data.open_rows(str(folder))) == before
    _save(folder / "x_2.npy", everything[1:301])
    assert data.fingerprint(data.open_rows(str(folder))) != before
    _save(folder / "x_2.npy", everything[:300, 1:])
    refused("x_3.npy: has width 16 of float16, x_2.npy has width 15", data.open_rows, str(folder))
    _save(folder / "x_2.npy", np.asfortranarray(everything[:300]))
    refused("x_2.npy: holds <f2 in Fortran order, which is not read from a bucket", data.open_rows, str(folder))
    (folder / "x_2.npy").write_bytes(b"")
    refused("x_2.npy: not a .npy file", data.open_rows, str(folder))


def test_other_files_in_a_bucket_are_refused(place):
    (any_path(place) / "x.npz").write_bytes(b"PK")
    refused("neither a .npy file nor a directory", data.open_rows, f"{place}/x.npz")
    refused("no such bucket or object", data.open_rows, f"{place}/y.npy")
    refused("no such bucket", data.open_rows, f"{place[:5]}elsewhere/x")


# --- Batches


@pytest.fixture
def small_blocks(monkeypatch):
    """Blocks of 16 rows, and the list of those that are read."""
    monkeypatch.setattr(remote, "_BLOCK", 16 * D * 2)
    start, read = buckets.start_reading, []
    monkeypatch.setattr(buckets, "start_reading", lambda *of: read.append((str(of[0]), *of[1:])) or start(*of))
    return read


@pytest.mark.parametrize("threads", [1, 2, 5])
def test_batches_are_those_from_disk_and_each_row_is_read_once_an_epoch(threads, place, here, small_blocks):
    for folder in (here / "x", place):
        write_shards(folder, [100, 300, 240])
    (there, local), how = map(data.open_rows, (place, here / "x")), {"seed": 3, "window": 64, "threads": threads}
    left, right = (data.batches(source, 8, **how) for source in (there, local))
    for _ in range(N // 8):
        assert_same_bits(next(left), next(right))
    read = [block for block in small_blocks if block[0].startswith(f"{place}/")]
    assert len(set(read)) == 7 + 19 + 15  # all blocks
    assert len(read) - len(set(read)) <= 2 * 5  # where the next epoch begins
    left.position = right.position = 31
    assert_same_bits(next(left), next(right))


def test_what_is_kept_is_bounded(place, small_blocks, monkeypatch):
    write_shards(place, [N])
    opened = data.open_rows(place)
    kept = opened._load(0)._kept
    for batch in range(N // 8):
        opened[batch // 8 * 64 + np.arange(8) * 8]
        assert len(kept) <= 3 * 5
    monkeypatch.setattr(remote, "_IN_ORDER", 5)
    assert_same_bits(np.asarray(opened), rows(N, D).astype(np.float16))
    assert len(kept) <= 3 * 5


def test_windows_are_the_default_in_a_bucket(place, monkeypatch):
    write_shards(place, [N])
    opened = data.open_rows(place)
    assert opened.shuffled == (64 * 2**22 // 32, 256 * 2**22 // 32)
    assert opened[3:].shuffled == opened.shuffled
    assert batching.shuffle_window([opened, rows(3)], None) == opened.shuffled.best
    assert batching.shuffle_window([rows(3)], None) is None
    few = opened[:]
    few.shuffled = lazy.Windows(5, 5)  # as those of a model
    assert batching.shuffle_window([opened, few], None) == batching.shuffle_window([few, opened], None) == 5
    refused("got window 6; pass at most 5", batching.shuffle_window, [opened, few], 6)
    refused("got window 33554433; pass at most 33554432", data.batches, opened, 8, seed=0, window=2**25 + 1)


# --- Files and autoencoders


def test_files_appear_whole(place):
    with pytest.raises(ZeroDivisionError), atomic_file(f"{place}/a.txt") as temporary:
        temporary.write_text("half")
        raise ZeroDivisionError
    with pytest.raises(ZeroDivisionError), atomic_directory(f"{place}/b") as folder:
        (folder / "a.txt").write_text("half")
        raise ZeroDivisionError
    assert not any_path(place).exists()
    with atomic_file(f"{place}/a.txt") as temporary:
        temporary.write_text("whole")
    assert content(place) == {"a.txt": b"whole"}


def test_a_directory_is_readable_only_once_it_is_whole(place, monkeypatch):
    for old in (False, True):  # a first version, and one that replaces it
        put, present = buckets._store(any_path(place))[0].put_file, []

        def watched(local, name, put=put, present=present):
            put(local, name)
            present.append("sae.json" in names(any_path(f"{place}/sae")))

        monkeypatch.setattr(buckets._store(any_path(place))[0], "put_file", watched)
        pretrained.save(sae(old), f"{place}/sae")
        monkeypatch.undo()
        assert present == [False, True]
    assert_same_bits(pretrained.load(f"{place}/sae").W_dec, sae(1).W_dec)


WRITTEN = [name for name, row in pretrained.FORMATS.items() if row.write]
KNOWN = {name: jaxsae.JumpReLU(0.5) for name in ("gemma_scope", "gemma_scope_2", "llama_scope")} | {
    "openai": jaxsae.ReLU()
}


@pytest.mark.parametrize("format", WRITTEN)
def test_autoencoders_in_a_bucket_are_those_on_disk(format, place, here):
    activation = KNOWN.get(format, jaxsae.TopK(4))
    if format.startswith("gemma"):
        activation = every_activation()["JumpReLU"]
    model, address = sae(activation=activation), f"{place}/sae.pt" if format == "openai" else f"{place}/sae"
    pretrained.save(model, address, format=format)
    pretrained.save(model, here / "sae", format=format)
    jax.tree.map(assert_same_bits, pretrained.load(address), pretrained.load(here / "sae"))
    assert pretrained.describe(address) == pretrained.describe(here / "sae")
    pretrained.save(model, address, format=format)  # over the same


def test_other_objects_are_not_overwritten(place):
    pretrained.save(sae(), f"{place}/sae")
    (any_path(place) / "sae" / "notes.txt").write_text("mine")
    before = content(f"{place}/sae")
    refused("exists and is not a saved SAE", pretrained.save, sae(1), f"{place}/sae")
    model = sae(1, activation=jaxsae.ReLU())
    refused("exists and is not a saved SAE", pretrained.save, model, f"{place}/sae", format="openai")
    refused("exists and is not a saved SAE", pretrained.save, sae(1), f"{place}/sae/notes.txt")
    assert content(f"{place}/sae") == before
    found = refused("sae: not a whole SAE|is damaged", lambda: damage(place) or pretrained.load(f"{place}/sae"))
    assert found.startswith(f"{place}/sae")  # and not the copy
    refused("which is not on the hub", pretrained.load, f"{place}/sae", revision="main")


def damage(place):
    path = any_path(place) / "sae" / "sae.safetensors"
    path.write_bytes(path.read_bytes()[:50])


def test_refined_codes_are_written_into_a_bucket(place, here):
    for out in (f"{place}/codes.npz", here / "codes.npz"):
        stream.refine_file(sae(), rows(64), out)
    there, local = (np.load(io.BytesIO(any_path(base / "codes.npz").read_bytes())) for base in (any_path(place), here))
    assert there.files == local.files
    for name in local.files:
        assert_same_bits(there[name], local[name])


# --- Training

OPTIONS = Options("topk", 32, k=4, batch=32, steps=20, heldout=64)
TRAIN = ["--activation", "topk", "--k", 4, "--latents", 32, "--batch", 32, "--heldout", 64, "--window", 128]


@pytest.fixture
def both(here):
    """Rows on disk and in a bucket that is Google's, which checkpoints need."""
    place.count += 1
    address = f"gs://bucket/{place.count}"
    for folder in (here / "x", f"{address}/x"):
        write_shards(folder, [200, 440])
    return here, address


def test_training_from_and_into_a_bucket_is_that_on_disk(both, capsys):
    local, there = both
    for base in both:
        assert cli("train", "--data", f"{base}/x", "--out", f"{base}/run", "--steps", 20, *TRAIN, "--json") == 0
    reports = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    for report in reports:
        report["data"].pop("path")
    assert reports[0] == reports[1]
    assert {*names(any_path(f"{there}/run"))} >= {"report.json", "config.json"}
    assert any(name.startswith("events.out.tfevents") for name in names(any_path(f"{there}/run")))
    assert checkpoint.steps(f"{there}/run/checkpoints") == checkpoint.steps(local / "run/checkpoints") == [20]

    # longer, from the options that it wrote
    for base in both:
        assert cli("train", "--config", f"{base}/run/config.json", "--steps", 30, "--json") == 0
    reports = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert reports[0]["heldout"] == reports[1]["heldout"]
    assert (reports[1]["steps"], reports[1]["lengthened"]) == (30, [{"at": 20, "from": 20, "to": 30}])
    jax.tree.map(assert_same_bits, pretrained.load(f"{there}/run"), pretrained.load(local / "run"))
    jax.tree.map(assert_same_bits, runs.load(f"{there}/run/checkpoints/30"), runs.load(local / "run/checkpoints/30"))

    # and what others do with it
    for command in (
        ["eval", "--sae", "{}/run", "--data", "{}/x", "--json"],
        ["eval", "--sae", "{}/run/checkpoints/30", "--data", "{}/x", "--json"],
        ["info", "{}/run", "--json"],
    ):
        for base in both:
            assert cli(*(word.format(base) for word in command)) == 0
        found, expected = capsys.readouterr().out.splitlines()
        assert found == expected
    assert cli("refine", "--sae", f"{there}/run", "--data", f"{there}/x", "--out", f"{there}/codes.npz") == 0
    assert cli("convert", f"{there}/run", f"{there}/published", "--to", "saelens") == 0
    assert cli("convert", f"{there}/run", f"s3://bucket/{there[-3:]}/published", "--to", "saelens") == 0
    converted = pretrained.load(f"{there}/published")
    assert_same_bits(converted.W_dec, pretrained.load(f"s3://bucket/{there[-3:]}/published").W_dec)


@pytest.mark.slow
def test_a_harvest_into_a_bucket_is_that_on_disk(here):
    from jaxsae.language_model import harvest, tiny

    contexts = np.random.default_rng(0).integers(0, 16, (6, 8), dtype=np.int32)
    place.count += 1
    for out in (here / "h", f"gs://bucket/{place.count}", f"s3://bucket/{place.count}"):
        harvest.run(out, tiny(), contexts, points=[(1, "resid_post")], source={})
    assert content(here / "h") == content(f"gs://bucket/{place.count}") == content(f"s3://bucket/{place.count}")


@pytest.mark.slow
def test_a_damaged_step_in_a_bucket_is_passed_over(here):
    place.count += 1
    run = f"gs://bucket/{place.count}"
    how = {"data": {"x": rows(N, D)}, "options": OPTIONS}
    runs.run(run, **how, save_every_steps=10)
    (any_path(run) / "checkpoints/20/commit_success.txt").unlink()  # as if it was killed before
    assert checkpoint.steps(f"{run}/checkpoints") == [10]
    expected = runs.run(here / "run", **how)
    found = runs.run(run, **how)
    assert found["heldout"] == expected["heldout"]


# --- What cannot be done


@pytest.mark.parametrize("scheme", ["gs", "s3"])
def test_a_bucket_that_is_missing_is_one_line_before_any_work(scheme, both, capsys, monkeypatch):
    local, _ = both
    monkeypatch.setattr(runs, "run", None)  # no work
    for options in (["--out", f"{scheme}://elsewhere/run", "--data", local / "x"],):
        assert cli("train", *options, *TRAIN) == 2
        (line,) = capsys.readouterr().err.splitlines()
        assert "no such bucket" in line
    assert cli("eval", "--sae", f"{scheme}://elsewhere/run", "--data", local / "x") == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line == f"jaxsae: {scheme}://elsewhere/run: no such bucket or object; check the address."


def test_what_no_bucket_can_be_is_one_line(both, capsys, monkeypatch):
    local, there = both
    few = ["train", "--data", local / "x", "--steps", 2, *TRAIN]
    for words, message in (
        ([*few, "--out", "s3://bucket/run"], "orbax saves on disks and in gs://, not in s3://"),
        ([*few, "--out", "gs://"], "names no bucket; pass gs://BUCKET/NAME."),
        ([*few, "--out", "abfs://bucket/run"], "abfs:/bucket/run: is a URL, expected a local path"),
        (["study", "--out", f"{there}/study"], "is a URL, expected a local path"),
        (["refine", "--sae", there, "--data", there, "--out", there], "is the data; write the codes to another file"),
    ):
        assert cli(*words) == 2
        (line,) = capsys.readouterr().err.splitlines()
        assert message in line
    monkeypatch.setattr(buckets.importlib.util, "find_spec", lambda name: None)
    assert cli(*few, "--out", f"{there}/run") == 2
    assert "needs gcsfs, which is missing; pip install 'jaxsae[cloud]'." in capsys.readouterr().err
    assert {path.name for path in local.iterdir()} == {"x"}


class Denying(http.server.BaseHTTPRequestHandler):
    """A server that denies all access."""

    def deny(self):
        self.send_response(403)
        self.end_headers()

    do_GET = do_PUT = do_POST = do_HEAD = do_DELETE = deny

    def log_message(self, *of):
        pass


def test_denied_access_is_one_line(monkeypatch):
    import gcsfs
    import s3fs

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Denying)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    url = f"http://127.0.0.1:{server.server_port}"
    stores = {
        "gs": gcsfs.GCSFileSystem(token="anon", endpoint_url=url, skip_instance_cache=True),
        "s3": s3fs.S3FileSystem(endpoint_url=url, key="k", secret="s", skip_instance_cache=True),
    }
    for scheme, store in stores.items():
        monkeypatch.setattr(buckets, "_store", lambda path, store=store: (store, str(path).partition("://")[2]))
        refused("Forbidden|denied", buckets.require_writable, any_path(f"{scheme}://bucket/x"))
        refused("Forbidden|denied", names, any_path(f"{scheme}://bucket/x"))
    server.shutdown()
    server.server_close()


# --- Servers and jobs that are killed


def outage(server, after: float, lasting: float) -> threading.Thread:
    """Kill a server soon, and start it again."""

    def happen():
        time.sleep(after)
        server.kill()
        time.sleep(lasting)
        server.start()

    thread = threading.Thread(target=happen)
    thread.start()
    return thread


@pytest.mark.slow
def test_a_server_that_is_killed_while_rows_are_read_loses_none(both, google):
    local, there = both
    left, right = (data.batches(data.open_rows(f"{base}/x"), 16, seed=1, window=64) for base in (there, local))
    for number in range(60):
        down = outage(google, 0, 0.5) if number in (10, 40) else None
        assert_same_bits(next(left), next(right))
        if down is not None:
            down.join()


@pytest.mark.slow
def test_a_server_that_is_killed_while_shards_are_written_loses_none(both, google):
    local, there = both
    for base in both:
        writer = shards.Writer(f"{base}/y", width=D, dtype="float16", source={})
        for number in range(12):
            down = outage(google, 0, 0.5) if number % 4 == 1 and base == there else None
            writer.append(rows(20, D) + number)
            if down is not None:
                down.join()
        writer.finish()
    assert content(f"{there}/y") == content(local / "y")


@pytest.mark.slow
def test_jobs_and_servers_that_are_killed_lose_nothing(both, google):
    local, there = both
    how = ["train", "--steps", 400, "--save-every-steps", 20, *TRAIN]
    assert cli(*how, "--data", local / "x", "--out", local / "run") == 0
    command = [sys.executable, "-m", "jaxsae", *map(str, how), "--data", f"{there}/x", "--out", f"{there}/run"]
    errors = (local / "errors").open("w+")  # a pipe would fill
    start = lambda: subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=errors)  # noqa: E731
    kills, outages, latest = 0, 0, lambda: next(iter(checkpoint.steps(f"{there}/run/checkpoints")), 0)
    process, before = start(), 0
    since, seen = time.monotonic(), 0
    while process.poll() is None:
        time.sleep(0.2)
        since, seen = (since, seen) if latest() == seen else (time.monotonic(), latest())
        # A request to a server that was killed may never end: that job is killed too.
        stuck = time.monotonic() - since > 40
        if not stuck and (kills >= 10 or latest() == before):
            continue  # until it gets on
        if not stuck and outages < 5 and outages <= kills:
            outage(google, 0, 0.2).join()
            before, outages = latest(), outages + 1
            continue
        process.kill()
        process.wait()
        kills, before, since = kills + 1, latest(), time.monotonic()
        process = start()
    with errors:
        errors.seek(0)
        assert (process.returncode, min(kills, 10), outages) == (0, 10, 5), errors.read()[-5000:]
    jax.tree.map(assert_same_bits, pretrained.load(f"{there}/run"), pretrained.load(local / "run"))


def test_a_lost_connection_is_one_line_in_the_end(monkeypatch):
    class Lost:
        def ls(self, *of, **named):
            raise ConnectionError("Connection lost")

    monkeypatch.setattr(buckets, "_store", lambda path: (Lost(), "x"))
    refused(r"gs://bucket/x: cannot be used \(Connection lost\); check the network", names, any_path("gs://bucket/x"))
