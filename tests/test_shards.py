import errno
import inspect
import itertools
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest
from problems import dying, full_disk, refused

import jaxsae
from jaxsae import data
from jaxsae._core.files import InputError
from jaxsae.data import lazy, shards

WIDTH, SOURCE = 6, {"model": "none", "layer": 2}


@pytest.fixture(autouse=True)
def _quick(monkeypatch):
    # Not in the processes that are killed; and when it is called has a test of its own.
    monkeypatch.setattr(os, "fsync", lambda descriptor: None)


def part(number, rows=5):
    """What is written as shard `number`, and its tokens."""
    generator = np.random.default_rng(number)
    return generator.normal(size=(rows, WIDTH)).astype(np.float16), generator.integers(100, size=(number % 3, 7))


def writer(folder, **changes):
    return shards.Writer(folder, **{"width": WIDTH, "dtype": "float16", "source": SOURCE} | changes)


def fill(folder, count, finish=False):
    """Go on until there are `count` shards."""
    into = writer(folder)
    for number in range(into.shards, count):
        rows, tokens = part(number)
        into.append(rows, tokens=tokens)
    if finish:
        into.finish()
    return into


def check(folder, count):
    """The directory holds `count` shards, each once and in order, and no other file."""
    parts = [part(number) for number in range(count)]
    found = shards.open_rows(folder)
    np.testing.assert_array_equal(found, np.concatenate([np.zeros((0, WIDTH)), *(rows for rows, _ in parts)]))
    if count:
        tokens = np.concatenate([tokens for _, tokens in parts])
        np.testing.assert_array_equal(shards.column(folder, "tokens"), tokens)
    shards.verify(folder)
    names = {f"{number:05d}{end}" for number in range(count) for end in (".npy", ".tokens.npy")}
    assert set(os.listdir(folder)) == {"manifest.json", *names}


# --- what is written


@pytest.mark.parametrize("dtype", ["float16", np.float32])
def test_round_trip(dtype, tmp_path):
    rows = [np.float32(part(number, size)[0]) for number, size in enumerate((3, 1, 4))]
    into = writer(tmp_path / "a" / "b", dtype=dtype)
    for number, block in enumerate(rows):
        assert (into.shards, into.rows) == (number, sum(map(len, rows[:number])))
        into.append(block.astype(np.float64), tokens=part(number)[1], score=np.float32(number), name=np.array(["é"]))
    assert not shards.read(into.folder).complete
    into.finish()
    into.finish()
    found = shards.open_rows(str(into.folder))
    assert (found.shape, found.dtype, found.ndim) == ((8, WIDTH), np.dtype(dtype), 2)
    np.testing.assert_array_equal(found, np.concatenate(rows).astype(dtype))
    np.testing.assert_array_equal(shards.column(into.folder, "score"), [0, 1, 2])
    np.testing.assert_array_equal(shards.column(into.folder, "name"), 3 * ["é"])
    manifest = shards.read(into.folder)
    assert (manifest.rows, manifest.complete, manifest.source, manifest) == (8, True, SOURCE, into.manifest)


def test_others_can_read_it(tmp_path):
    fill(tmp_path, 2, finish=True)
    manifest = json.loads((tmp_path / "manifest.json").read_text())
    assert {name: manifest[name] for name in ("format", "version", "width", "dtype", "rows", "complete")} == {
        **{"format": "jaxsae-activations", "version": 1},
        **{"width": WIDTH, "dtype": "float16", "rows": 10, "complete": True},
    }
    assert [shard["rows"] for shard in manifest["shards"]] == [5, 5]
    for number, shard in enumerate(manifest["shards"]):
        assert list(shard["files"]) == [f"{number:05d}.npy", f"{number:05d}.tokens.npy"]
        assert all(file["bytes"] == (tmp_path / name).stat().st_size for name, file in shard["files"].items())
        np.testing.assert_array_equal(np.load(tmp_path / f"{number:05d}.npy"), part(number)[0])


ORDERS = {
    "Fortran": np.asfortranarray,
    "big-endian": lambda x: x.astype(x.dtype.newbyteorder(">")),
    "strided": lambda x: np.repeat(x, 2, axis=1)[:, ::2],
    "backwards": lambda x: x[::-1].copy()[::-1],
    "read-only": lambda x: np.frombuffer(x.tobytes(), x.dtype).reshape(x.shape),
    "of JAX": jnp.asarray,
    "a list": lambda x: x.tolist(),
}


@pytest.mark.parametrize("dtype", ["float16", "float32", "bfloat16"])
@pytest.mark.parametrize("order", ORDERS)
def test_rows_and_columns_may_lie_in_memory_in_any_order(order, dtype, tmp_path):
    rows, tokens = np.arange(30, dtype=np.float32).reshape(5, WIDTH), np.arange(35, dtype=np.int32).reshape(5, 7)
    writer(tmp_path, dtype=dtype).append(ORDERS[order](rows), tokens=ORDERS[order](tokens))
    np.testing.assert_array_equal(np.asarray(shards.open_rows(tmp_path), np.float32), rows)
    np.testing.assert_array_equal(shards.column(tmp_path, "tokens"), tokens)


@pytest.mark.parametrize("rows", [np.ones((2, WIDTH), complex), np.full((2, WIDTH), None), np.full((2, WIDTH), "1")])
def test_what_are_no_real_numbers_is_refused(rows, tmp_path):
    refused(f"holds {rows.dtype}; expected real numbers", writer(tmp_path).append, rows)


@pytest.mark.parametrize("order", ["Fortran", "big-endian"])
def test_a_shard_of_another_program_in_another_order_is_refused(order, tmp_path):
    rows = part(0)[0]
    writer(tmp_path).append(rows)
    np.save(tmp_path / "00000.npy", ORDERS[order](rows))
    content = (tmp_path / "00000.npy").read_bytes()
    manifest = json.loads((tmp_path / "manifest.json").read_text())
    manifest["shards"][0]["files"]["00000.npy"] = {"bytes": len(content), "crc32": shards._crc32(content)}
    (tmp_path / "manifest.json").write_text(json.dumps(manifest))
    shards.verify(tmp_path)
    refused(r"00000\.npy: does not hold an array \(5, 6\) of float16 in C order", shards.open_rows, tmp_path)


@pytest.mark.parametrize("bad", [1e5, -1e5])
def test_overflow_is_refused_and_what_was_infinite_is_kept(bad, tmp_path):
    rows = np.array([[1.0, bad, np.inf, np.nan, -np.inf, 65504]])
    into = writer(tmp_path / "half")
    refused("1 finite values overflow float16; pass --dtype float32", into.append, rows)
    assert os.listdir(into.folder) == ["manifest.json"]
    whole = writer(tmp_path / "single", dtype="float32")
    whole.append(rows)
    np.testing.assert_array_equal(shards.open_rows(whole.folder), rows)
    into.append(np.where(rows == bad, 0, rows))
    np.testing.assert_array_equal(shards.open_rows(into.folder), np.where(rows == bad, 0, rows))


@pytest.mark.parametrize("shape", [(0, WIDTH), (WIDTH,), (2, WIDTH + 1), (1, 2, WIDTH)])
def test_rows_of_another_shape_are_refused(shape, tmp_path):
    refused(r"got rows of shape \(.*\); pass at least one, 6 wide", writer(tmp_path).append, np.zeros(shape))


@pytest.mark.parametrize("name", ["", "a.b", "../x", "a/b", "npy.", "é", " "])
def test_a_column_with_an_odd_name_is_refused(name, tmp_path):
    refused("pass plain names", writer(tmp_path / "x").append, part(0)[0], **{name: np.zeros(1)})
    assert os.listdir(tmp_path / "x") == ["manifest.json"]


def test_columns_are_the_same_in_every_shard(tmp_path):
    into = fill(tmp_path, 1)
    refused(r"got columns \[\]; .* the same in every shard", into.append, part(1)[0])
    refused(r"got columns \['a', 'tokens'\]", into.append, part(1)[0], a=np.zeros(1), tokens=np.zeros(1))
    check(tmp_path, 1)


@pytest.mark.parametrize("column", [np.array([None]), np.zeros(2, "i4,f4")])
def test_a_column_that_npy_cannot_hold_is_refused(column, tmp_path):
    refused("column a: holds", writer(tmp_path).append, part(0)[0], a=column)


def test_shards_of_a_column_that_do_not_fit_together(tmp_path):
    into = writer(tmp_path)
    for number in range(2):
        into.append(part(number)[0], a=np.zeros((1, number)))
    refused("the column 'a' does not fit together", shards.column, tmp_path, "a")


@pytest.mark.parametrize("name", ["other", "", "../x"])
def test_a_column_that_is_not_there(name, tmp_path):
    refused("not every shard has a column", shards.column, fill(tmp_path, 1).folder, name)
    refused("not every shard has a column", shards.column, writer(tmp_path / "empty").folder, "tokens")


# --- where it is written


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"width": 7}, "got width 7, expected 6"),
        ({"dtype": "float32"}, 'got dtype "float32", expected "float16"'),
        ({"source": {**SOURCE, "layer": 3}}, "got source layer 3, expected 2"),
        ({"source": {"model": "none"}}, "got source layer nothing, expected 2"),
        ({"source": {**SOURCE, "text": "a\nb"}}, r'got source text "a\\nb", expected nothing'),
        ({"source": "none"}, 'got source "none", expected nothing'),
    ],
)
@pytest.mark.parametrize("count", [0, 2])
def test_a_directory_made_with_other_arguments_is_refused(changes, message, count, tmp_path):
    fill(tmp_path, count)
    refused(f"{tmp_path}: {message}; choose another --out, or remove it", writer, tmp_path, **changes)
    check(tmp_path, count)


def test_a_source_may_be_any_json_and_equal_ones_are_equal(tmp_path):
    for number, source in enumerate([None, [1, (2, 3)], "x", {"b": 1, "a": {"d": None, "c": [True]}}]):
        writer(tmp_path / str(number), source=source).append(part(0)[0])
        assert writer(tmp_path / str(number), source=json.loads(json.dumps(source, sort_keys=True))).shards == 1


@pytest.mark.parametrize("changes", [{"width": 0}, {"dtype": "float64"}, {"dtype": "int8"}])
def test_widths_and_dtypes_that_are_none(changes, tmp_path):
    refused("pass at least 1, and one of float16, float32, bfloat16", writer, tmp_path / "x", **changes)
    assert not os.listdir(tmp_path)


@pytest.mark.parametrize("width", [4.7, 4.0, True, "6"])
def test_a_width_is_a_whole_number(width, tmp_path):
    refused("got width .*; pass a whole number", writer, tmp_path / "x", width=width)
    assert not os.listdir(tmp_path)


@pytest.mark.parametrize("name", ["notes.txt", "00000.npy", ".hidden"])
def test_a_folder_of_other_files_is_refused(name, tmp_path):
    (tmp_path / name).touch()
    refused(r"holds files but no manifest.json; choose another --out, or remove it", writer, tmp_path)
    assert os.listdir(tmp_path) == [name]


@pytest.mark.parametrize("place", ["file", "file/deeper"])
def test_a_place_that_cannot_be_a_folder(place, tmp_path):
    (tmp_path / "file").touch()
    refused("cannot write .*; choose another --out", writer, tmp_path / place)


def test_a_complete_directory_takes_no_more(tmp_path):
    for into in (fill(tmp_path, 2, finish=True), writer(tmp_path)):
        refused("is complete; choose another --out", into.append, part(2)[0], tokens=np.zeros(1))
    check(tmp_path, 2)


def test_a_second_writer_is_noticed(tmp_path):
    first = fill(tmp_path, 1)
    fill(tmp_path, 2)
    refused("another process has written there", first.append, part(9)[0], tokens=np.zeros(1))
    refused("another process has written there", first.finish)
    check(tmp_path, 2)


def test_only_what_a_writer_leaves_is_removed_on_continuing(tmp_path):
    fill(tmp_path, 2)
    left = [
        "00002.npy",
        "00003.tokens.npy",
        ".00002.npy.partial",
        ".00002.tokens.npy.partial",
        ".manifest.json.partial",
        ".00002.npy.x7_a2kq9.partial/00002.npy",
        ".manifest.json.x7_a2kq9.partial/manifest.json",
    ]
    others = ["notes.txt", "00002.txt", "x.npy", ".x.npy.partial", "2.npy", "00001.a.b.npy"]
    for name in left + others:
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
    assert writer(tmp_path).shards == 2
    assert set(os.listdir(tmp_path)) == {
        *("manifest.json", "00000.npy", "00000.tokens.npy", "00001.npy", "00001.tokens.npy"),
        *others,
    }


# --- interruptions

# Without jax, which takes seconds to import: only numpy and the two modules.
SCRIPT = f"""
import os, signal, sys, types
from pathlib import Path
sys.modules["jaxsae"] = package = types.ModuleType("jaxsae")
package.__path__ = [sys.argv[1]]
import numpy as np
from jaxsae.data import lazy, shards
WIDTH, SOURCE = {WIDTH}, {SOURCE}
""" + "".join(map(inspect.getsource, (part, writer, fill, dying)))
RUN = f"{SCRIPT}\nprint('ready', flush=True)\nfill(sys.argv[2], 10**6)"
# Dies before or after each call that touches the disk, in a child process for each.
SWEEP = (
    SCRIPT
    + """
for after in (0, 1):
    for at in range(10**9):
        child = os.fork()
        if not child:
            calls = [(os, "fsync"), (os, "replace"), (os, "mkdir"), (Path, "write_bytes")]
            dying(at, after, *calls)
            fill(f"{sys.argv[2]}/{at}-{after}", 2, finish=True)
            os._exit(0)
        if os.waitpid(child, 0)[1] != signal.SIGKILL:
            break
"""
)


def start(script, *arguments):
    command = [sys.executable, "-c", script, str(Path(jaxsae.__file__).parent), *map(str, arguments)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def test_a_kill_at_any_step_leaves_whole_shards(tmp_path):
    _, errors = start(SWEEP, tmp_path).communicate()
    assert not errors
    found = []
    for folder in tmp_path.iterdir():
        if (folder / "manifest.json").exists():
            rows = shards.open_rows(folder)
            np.testing.assert_array_equal(rows, np.concatenate([part(n)[0] for n in range(2)])[: len(rows)])
            shards.verify(folder)
            found.append(len(rows))
        fill(folder, 2, finish=True)
        check(folder, 2)
    assert len(found) > 40
    assert set(found) == {0, 5, 10}


def test_five_kills_at_random_lose_and_repeat_nothing(tmp_path):
    chance, kills = random.Random(0), []
    while len(kills) < 5 or not kills[-1]:
        with start(RUN, tmp_path) as process:
            assert process.stdout.readline() == "ready\n", process.stderr.read()
            time.sleep(chance.uniform(0, 0.1))
            process.send_signal(signal.SIGKILL)
        assert process.returncode == -signal.SIGKILL
        if not (tmp_path / "manifest.json").exists():
            continue
        kills.append(len(shards.read(tmp_path).shards))
        shards.verify(tmp_path)
    assert kills == sorted(kills)
    fill(tmp_path, kills[-1] + 5, finish=True)
    check(tmp_path, kills[-1] + 5)


@pytest.mark.skipif(not Path("/proc/self/fd").exists(), reason="needs Linux to tell what a descriptor is of")
def test_files_are_on_the_disk_before_they_are_named(tmp_path, monkeypatch):
    into, calls = fill(tmp_path, 1), []

    def replace(source, target, call=os.replace):
        call(source, target)
        calls.append(f"name {target.name}")

    monkeypatch.setattr(os, "replace", replace)
    monkeypatch.setattr(os, "fsync", lambda fd: calls.append(f"flush {Path(f'/proc/self/fd/{fd}').resolve().name}"))
    into.append(part(1)[0], tokens=part(1)[1])
    files = ["00001.npy", "00001.tokens.npy"]
    folder = f"flush {tmp_path.name}"
    steps = [(f"flush {name}", f"name {name}", folder) for name in [*files, "manifest.json"]]
    assert calls == [call for step in steps for call in step]


class Disk:
    """Lets a number of calls through, and is full at the next; then `times` more of them fail."""

    def __init__(self, monkeypatch, calls, times=1):
        self.calls, self.times, self.failed = calls, times, 0
        for module, name in ((os, "fsync"), (os, "replace"), (Path, "write_bytes")):
            monkeypatch.setattr(module, name, self.wrap(getattr(module, name)))

    def wrap(self, call):
        def wrapped(*arguments, **options):
            self.calls -= 1
            if -self.times <= self.calls < 0:
                self.failed += 1
                full_disk()
            return call(*arguments, **options)

        return wrapped


@pytest.mark.parametrize("times", [1, 100])
@pytest.mark.parametrize("again", ["the same writer", "another"])
def test_a_full_disk_leaves_what_was_there(times, again, tmp_path, monkeypatch):
    outcomes = []
    for calls in itertools.count():
        folder = tmp_path / str(calls)
        into = fill(folder, 2)
        rows, tokens = part(2)
        with monkeypatch.context() as patch:
            disk = Disk(patch, calls, times)
            try:
                into.append(rows, tokens=tokens)
                outcomes.append("written")
            except OSError as error:
                assert error.errno == errno.ENOSPC
                outcomes.append("refused")
        check(folder, into.shards)
        assert into.shards == (3 if outcomes[-1] == "written" else 2)
        into = into if again == "the same writer" else writer(folder)
        for number in range(into.shards, 4):
            into.append(part(number)[0], tokens=part(number)[1])
        into.finish()
        check(folder, 4)
        if not disk.failed:
            break
    # What flushes a folder may fail, since some file systems cannot do that.
    assert outcomes.count("refused") >= 9
    assert outcomes[-1] == "written"


@pytest.mark.parametrize("calls", range(3))
def test_a_disk_that_is_full_at_once(calls, tmp_path, monkeypatch):
    with monkeypatch.context() as patch, pytest.raises(OSError, match="No space"):
        Disk(patch, calls + 1)  # the first call flushes the folder above
        writer(tmp_path / "x")
    assert os.listdir(tmp_path / "x") == []
    fill(tmp_path / "x", 1)
    check(tmp_path / "x", 1)


@pytest.mark.parametrize("calls", range(12))
def test_an_interrupt_leaves_whole_shards(calls, tmp_path, monkeypatch):
    into = fill(tmp_path, 2)
    with monkeypatch.context() as patch:
        for name, call in (("fsync", os.fsync), ("replace", os.replace)):

            def after(*arguments, call=call):
                nonlocal calls
                call(*arguments)
                calls -= 1
                if calls == -1:
                    raise KeyboardInterrupt

            patch.setattr(os, name, after)
        try:
            into.append(part(2)[0], tokens=part(2)[1])
        except KeyboardInterrupt:
            check(tmp_path, len(shards.read(tmp_path).shards))
    fill(tmp_path, 4, finish=True)
    check(tmp_path, 4)


# --- damage

FILES = ["00000.npy", "00000.tokens.npy", "00001.npy", "00001.tokens.npy", "manifest.json"]


@pytest.mark.parametrize("name", FILES)
def test_damage_is_told(name, tmp_path):
    path = fill(tmp_path, 2, finish=True).folder / name
    whole = path.read_bytes()
    for at in range(0, len(whole), 7):
        path.write_bytes(whole[:at] + bytes([whole[at] ^ 0xFF]) + whole[at + 1 :])
        assert str(path) in refused("is damaged|has .* bytes", shards.verify, tmp_path)
    for keep in (0, 1, 50, len(whole) // 2, len(whole) - 1):
        path.write_bytes(whole[:keep])
        for call in (shards.read, shards.open_rows, shards.verify, data.open_rows, writer):
            if keep < len(whole) - 1 or name != "manifest.json":
                assert str(path) in refused("is damaged|has .* bytes, expected .* bytes; ", call, tmp_path)
    path.unlink()
    for call in (shards.read, shards.open_rows, shards.verify):
        assert str(path) in refused("[Nn]o such file.*; ", call, tmp_path)
    if name != "manifest.json":
        refused("[Nn]o such file.*; ", writer, tmp_path)


def test_a_manifest_that_differs_by_a_bit_is_refused_or_gives_the_same_rows(tmp_path):
    path = fill(tmp_path, 2).folder / "manifest.json"
    whole, expected = path.read_bytes(), np.concatenate([part(0)[0], part(1)[0]])
    opened = 0
    for at, bit in itertools.product(range(len(whole)), (1, 4)):
        path.write_bytes(whole[:at] + bytes([whole[at] ^ bit]) + whole[at + 1 :])
        try:
            found = np.asarray(shards.open_rows(tmp_path))
        except InputError as error:
            assert "\n" not in str(error)
            continue
        np.testing.assert_array_equal(found, expected)
        opened += 1
    assert 0 < opened < len(whole)


def changed(path, change):
    record = json.loads(path.read_text())
    change(record)
    path.write_text(json.dumps(record))


MANIFESTS = {
    "format": lambda record: record.update(format="other"),
    "version": lambda record: record.update(version=2),
    "width is text": lambda record: record.update(width="6"),
    "width is zero": lambda record: record.update(width=0),
    "width is true": lambda record: record.update(width=True),
    "dtype": lambda record: record.update(dtype="float64"),
    "dtype is a list": lambda record: record.update(dtype=["float16"]),
    "complete": lambda record: record.update(complete=1),
    "total": lambda record: record.update(rows=11),
    "no source": lambda record: record.pop("source"),
    "no shards": lambda record: record.pop("shards"),
    "shards is null": lambda record: record.update(shards=None),
    "shard is null": lambda record: record["shards"].append(None),
    "shards in another order": lambda record: record["shards"].reverse(),
    "shard without rows": lambda record: record["shards"][0].pop("rows"),
    "shard of no rows": lambda record: (record["shards"][0].update(rows=0), record.update(rows=5)),
    "shard without files": lambda record: record["shards"][0].update(files={}),
    "shard of files in a list": lambda record: record["shards"][0].update(files=["00000.npy"]),
    "a file elsewhere": lambda record: record["shards"][0]["files"].update({"../x.npy": {"bytes": 1, "crc32": ""}}),
    "size is text": lambda record: record["shards"][0]["files"]["00000.npy"].update(bytes="1"),
    "no crc32": lambda record: record["shards"][0]["files"]["00000.npy"].pop("crc32"),
}


@pytest.mark.parametrize("case", MANIFESTS)
def test_a_manifest_that_is_none_is_refused(case, tmp_path):
    path = fill(tmp_path, 2).folder / "manifest.json"
    changed(path, MANIFESTS[case])
    for call in (shards.read, shards.open_rows, shards.verify, writer, data.open_rows):
        message = refused(r"is damaged or no manifest of activations \(.+\); copy or make", call, tmp_path)
        assert message.startswith(f"{path}: ")


@pytest.mark.parametrize("text", ["", "[]", "{}", "null", "3", '"x"', "[" * 100_000, "1" * 10_000, "{'a': 1}"])
def test_a_text_that_is_no_manifest_is_refused(text, tmp_path):
    (tmp_path / "manifest.json").write_text(text)
    refused("is damaged or no manifest of activations", shards.read, tmp_path)


def test_a_shard_of_another_dtype_is_refused(tmp_path):
    path = fill(tmp_path, 1).folder / "manifest.json"
    changed(path, lambda record: record.update(dtype="float32"))
    refused(r"00000\.npy: does not hold an array \(5, 6\) of float32", shards.open_rows, tmp_path)


# --- views

SIZES = (3, 1, 4, 2)
ROWS = np.concatenate([part(number, size)[0] for number, size in enumerate(SIZES)])


@pytest.fixture(scope="module")
def opened(tmp_path_factory):
    into = writer(tmp_path_factory.mktemp("rows"))
    for number, size in enumerate(SIZES):
        into.append(part(number, size)[0])
    return shards.open_rows(into.folder)


def test_a_view_slices_as_numpy_does(opened):
    bounds = [None, *range(-12, 13)]
    for begin, end in itertools.product(bounds, bounds):
        view, expected = opened[begin:end], ROWS[begin:end]
        assert isinstance(view, lazy.LazyRows)
        assert (view.shape, len(view), view.size, view.nbytes) == (
            *(expected.shape, len(expected)),
            *(expected.size, expected.nbytes),
        )
        np.testing.assert_array_equal(view, expected)
        for at in range(-len(expected) - 1, len(expected) + 1):
            if -len(expected) <= at < len(expected):
                np.testing.assert_array_equal(view[at], expected[at])
            else:
                with pytest.raises(IndexError):
                    view[at]


@pytest.mark.parametrize("seed", range(5))
def test_views_of_views(seed, opened):
    chance = random.Random(seed)
    for _ in range(100):
        view, expected = opened, ROWS
        for _ in range(3):
            bounds = slice(*(chance.choice([None, chance.randint(-11, 11)]) for _ in range(2)))
            view, expected = view[bounds], expected[bounds]
        step = chance.choice([-3, -2, -1, 2, 3])
        np.testing.assert_array_equal(view, expected)
        np.testing.assert_array_equal(view[::step], expected[::step])
        if len(expected):
            index = np.random.default_rng(seed).integers(-len(expected), len(expected), size=7)
            np.testing.assert_array_equal(view[index], expected[index])


INDICES = {
    "in order": np.arange(10),
    "backwards": np.arange(10)[::-1],
    "repeated": [3, 3, 0, 9, 3],
    "negative": [-1, 0, -10],
    "unsigned": np.array([9, 0], np.uint8),
    "of one": [4],
    "of none": [],
    "of two axes": [[0, 5], [9, 1]],
    "a number of numpy": np.int64(7),
    "a negative number": -10,
}


@pytest.mark.parametrize("index", INDICES.values(), ids=INDICES)
def test_rows_by_number(index, opened):
    found = opened[index]
    assert type(found) is np.ndarray
    assert found.flags.writeable  # it is no view of the file
    np.testing.assert_array_equal(found, ROWS[index])
    np.testing.assert_array_equal(opened[1:][np.array([0, 8])], ROWS[1:][[0, 8]])


@pytest.mark.parametrize("index", [10, -11, [0, 10], [-11], np.array([2**40]), 1.0, [0.5], None, (0, 1), [True] * 10])
def test_other_indices_are_refused(index, opened):
    with pytest.raises(IndexError):
        opened[index]
    with pytest.raises(IndexError):
        opened[:0][0]


@pytest.mark.parametrize("dtype", [None, np.float16, np.float32, np.float64])
def test_a_view_becomes_an_array(dtype, opened):
    found = np.asarray(opened[2:9], dtype)
    assert found.dtype == (dtype or np.float16)
    np.testing.assert_array_equal(found, ROWS[2:9])
    np.testing.assert_array_equal(np.stack(list(opened)), ROWS)
    with pytest.raises(ValueError, match="without a copy"):
        np.array(opened, copy=False)


def test_as_the_library_uses_rows(opened):
    np.testing.assert_array_equal(np.isfinite(opened[2:9]).all(axis=1), True)
    np.testing.assert_array_equal(np.mean(opened[:7], axis=0, dtype=float), ROWS[:7].mean(axis=0, dtype=float))
    np.testing.assert_array_equal(np.asarray(opened[::3][:2], np.float32), ROWS[::3][:2])
    np.testing.assert_array_equal(jnp.asarray(opened[-4:], "float32"), ROWS[-4:])
    assert opened[0].nbytes == ROWS[0].nbytes
    data.require_finite(opened, "x")
    for _, mapped, whole in zip(range(5), *(data.batches(rows, 4, seed=0) for rows in (opened, ROWS)), strict=False):
        np.testing.assert_array_equal(mapped, whole)


def test_slices_read_nothing_and_few_shards_are_held_open(tmp_path, monkeypatch):
    monkeypatch.setattr(lazy, "MAX_MAPS", 3)
    found = shards.open_rows(fill(tmp_path, 8).folder)
    held = len(os.listdir("/proc/self/fd")) if Path("/proc/self/fd").exists() else None
    for number in range(8):
        (tmp_path / f"{number:05d}.npy").rename(tmp_path / f"{number}.away")
    view = found[3:30][2:]
    with pytest.raises(InputError, match=r"00001\.npy: cannot be read"):
        view[0]
    for number in range(8):
        (tmp_path / f"{number}.away").rename(tmp_path / f"{number:05d}.npy")
    for _ in range(2):
        np.testing.assert_array_equal(found, np.concatenate([part(number)[0] for number in range(8)]))
    if held is not None:
        assert len(os.listdir("/proc/self/fd")) <= held + 3


# --- data.open_rows


def test_data_opens_a_directory_whether_complete_or_not(tmp_path):
    for finish in (False, True):
        fill(tmp_path, 2, finish)
        found = data.open_rows(tmp_path)
        assert isinstance(found, lazy.LazyRows)
        np.testing.assert_array_equal(found, np.concatenate([part(0)[0], part(1)[0]]))


def test_data_refuses_a_directory_without_rows(tmp_path):
    refused(r"has shape \(0, 6\)", data.open_rows, writer(tmp_path / "x").folder)
    refused("a directory without manifest.json; pass one in it: x", data.open_rows, tmp_path)
    (tmp_path / "y").mkdir()
    refused("a directory without manifest.json or .npy files; expected", data.open_rows, tmp_path / "y")


def test_data_counts_rows_that_are_not_finite(tmp_path):
    into = fill(tmp_path, 2)
    into.append(np.full((1, WIDTH), np.nan), tokens=part(2)[1])
    refused("1 of 11 rows hold NaN or Inf, the first is row 10", data.require_finite, data.open_rows(tmp_path), "x")


# --- what is read from a damaged directory


def test_bfloat16_rows_come_back_and_are_readable_by_others(tmp_path):
    rows = np.asarray(jnp.asarray(ROWS, "bfloat16"))
    writer = shards.Writer(tmp_path, width=ROWS.shape[1], dtype="bfloat16", source=None)
    writer.append(ROWS)
    found = shards.open_rows(tmp_path)
    assert found.dtype == rows.dtype
    np.testing.assert_array_equal(np.asarray(found), rows)
    np.testing.assert_array_equal(np.load(tmp_path / "00000.npy").view(rows.dtype), rows)
    writer.finish()
    np.testing.assert_array_equal(next(data.batches(found, 4, seed=0)), next(data.batches(rows, 4, seed=0)))


DAMAGES = {
    "truncated": lambda content: content[: len(content) // 2],
    "flipped": lambda content: (
        content[: len(content) // 2] + bytes([content[len(content) // 2] ^ 1]) + content[len(content) // 2 + 1 :]
    ),
    "deleted": lambda content: None,
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_no_damaged_file_of_a_directory_is_read(damage, tmp_path):
    whole = fill(tmp_path / "whole", 3).folder
    for name in sorted(os.listdir(whole)):
        folder = tmp_path / name  # one for each: a reader of the one before may still be at it
        shutil.copytree(whole, folder)
        content = DAMAGES[damage]((folder / name).read_bytes())
        (folder / name).unlink() if content is None else (folder / name).write_bytes(content)
        with pytest.raises(InputError) as caught:
            stream = data.batches(data.open_rows(folder), 4, seed=0)
            for _ in range(20):
                next(stream)
            shards.verify(folder)  # columns, which training does not read
        assert str(folder) in str(caught.value)
        assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        (np.full((2, 4), 1e-60), "row 0 and 1 others are too small for float32, and become 0; scale it"),
        (np.ma.masked_array(np.ones((2, 4)), mask=True), "holds masked numbers; expected real numbers"),
        (np.ones((2, 4), "m8[s]"), "holds durations; expected real numbers"),
    ],
    ids=["too small", "masked", "durations"],
)
def test_rows_that_would_be_other_numbers_are_refused(rows, message):
    with pytest.raises(InputError, match=message):
        shards.cast(rows, np.float32, "x.npy", "scale it")
