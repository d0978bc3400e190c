"""Directories of plain `.npy` files: rows in the order of the numbers in their names, or one line."""

import gc
import os
from pathlib import Path

import numpy as np
import pytest
from problems import assert_same_bits, cli, refused, rows, sae

from jaxsae import data, pretrained
from jaxsae.data import lazy

ROWS = rows(60, 8)
SIZES = {"acts_1.npy": 20, "acts_2.npy": 5, "acts_10.npy": 30, "acts_010.npy": 5}
IN_ORDER = ("acts_1.npy", "acts_2.npy", "acts_010.npy", "acts_10.npy")


def write(folder, change=lambda name, part: part):
    """The rows over some files, written in another order, beside what is no row."""
    folder.mkdir()
    (folder / "README.txt").write_text("How they were made.")
    (folder / "._acts_1.npy").write_bytes(b"of another system")
    (folder / "deeper.npy").mkdir()
    ends = np.cumsum([SIZES[name] for name in IN_ORDER])
    parts = dict(zip(IN_ORDER, np.split(ROWS, ends[:-1]), strict=True))
    for name in SIZES:
        np.save(folder / name, change(name, parts[name]))
    return folder


@pytest.mark.parametrize("dtype", ["<f2", "<f4", "<f8", ">f4"])
@pytest.mark.parametrize("order", "CF")
def test_rows_come_in_the_order_of_the_numbers_in_names(dtype, order, tmp_path):
    folder = write(tmp_path / "x", lambda name, part: np.asarray(part.astype(dtype), order=order))
    found = data.open_rows(folder)
    assert isinstance(found, lazy.LazyRows)
    assert found.dtype == np.dtype(dtype).newbyteorder("=")
    expected = ROWS.astype(found.dtype)
    np.testing.assert_array_equal(np.asarray(found), expected)
    np.testing.assert_array_equal(found[[59, 0, 24, 25]], expected[[59, 0, 24, 25]])
    np.testing.assert_array_equal(found[::7], expected[::7])


def test_files_of_five_digits_and_files_without_rows_are_ordinary(tmp_path):
    for number, part in enumerate([ROWS[:3], ROWS[:0], ROWS[3:4]]):
        np.save(tmp_path / f"{number:05d}.npy", part)
    np.testing.assert_array_equal(np.asarray(data.open_rows(tmp_path)), ROWS[:4])


def test_few_files_are_open_at_a_time_and_none_before_its_rows_are_read(tmp_path, monkeypatch):
    monkeypatch.setattr(lazy, "MAX_MAPS", 3)
    for number in range(30):
        np.save(tmp_path / f"{number}.npy", ROWS[2 * number : 2 * number + 2])
    descriptors = Path("/proc/self/fd")
    held = len(os.listdir(descriptors)) if descriptors.exists() else None
    found = data.open_rows(tmp_path)
    for _ in range(2):
        np.testing.assert_array_equal(found[20:50:3], ROWS[20:50:3])
    if held is not None:
        assert len(os.listdir(descriptors)) <= held + 3


def test_batches_and_fingerprint_are_those_of_one_file(tmp_path):
    folder = write(tmp_path / "x")
    for _, mine, whole in zip(
        range(9), *(data.batches(x, 8, seed=0) for x in (data.open_rows(folder), ROWS)), strict=False
    ):
        np.testing.assert_array_equal(mine, whole)
    assert data.fingerprint(data.open_rows(folder)) == data.fingerprint(ROWS)


def test_a_file_that_has_changed_since_is_one_line(tmp_path):
    folder = write(tmp_path / "x")
    found = data.open_rows(folder)
    (folder / "acts_2.npy").unlink()
    np.save(folder / "acts_10.npy", ROWS[:1])
    np.testing.assert_array_equal(found[:20], ROWS[:20])
    refused(r"acts_2\.npy: has changed \(.*\); begin again", lambda: found[20])
    refused(r"acts_10\.npy: has changed", lambda: found[59])


OBJECTS = np.array([[{}, None]], dtype=object)
SPOILED = {
    "one axis": ("acts_2.npy", lambda x: x[0], r"acts_2\.npy: has shape \(8,\), expected \(rows, width\)"),
    "three axes": ("acts_10.npy", lambda x: x[None], r"acts_10\.npy: has shape \(1, 30, 8\), expected"),
    "no columns": ("acts_10.npy", lambda x: x[:, :0], r"acts_10\.npy: has shape \(30, 0\), expected"),
    "another width": (
        "acts_10.npy",
        lambda x: x[:, 1:],
        r"acts_10\.npy: has width 7 of float32, acts_1\.npy has width 8",
    ),
    "another dtype": ("acts_1.npy", lambda x: x.astype("f2"), r"acts_2\.npy: has width 8 of float32, acts_1\.npy .*16"),
    "whole numbers": ("acts_10.npy", lambda x: x.astype(int), r"acts_10\.npy: holds int64"),
    "bfloat16's bits": ("acts_2.npy", lambda x: x.astype(np.uint16), r"acts_2\.npy: holds uint16"),
    "objects": ("acts_2.npy", lambda x: OBJECTS, r"acts_2\.npy: holds object"),
}


@pytest.mark.parametrize("case", SPOILED)
def test_a_file_that_does_not_hold_such_rows_is_named(case, tmp_path):
    spoiled, spoil, message = SPOILED[case]
    folder = write(tmp_path / "x", lambda name, part: spoil(part) if name == spoiled else part)
    refused(message, data.open_rows, folder)


@pytest.mark.parametrize("keep", [0, 5, 40, 200, -1])
def test_a_truncated_file_is_named(keep, tmp_path):
    folder = write(tmp_path / "x")
    (folder / "acts_10.npy").write_bytes((folder / "acts_10.npy").read_bytes()[:keep])
    refused(r"acts_10\.npy: (not a \.npy file|has \d+ bytes, too few or too many)", data.open_rows, folder)
    gc.collect()


def test_a_directory_that_may_be_something_else_is_refused(tmp_path):
    refused("a directory without manifest.json or .npy files; expected", data.open_rows, tmp_path)
    np.save(tmp_path / "none.npy", ROWS[:0])
    refused(r"its .npy files have no rows", data.open_rows, tmp_path)
    folder = write(tmp_path / "x")
    np.savez(folder / "more.npz", ROWS)
    refused("holds more.npz; of a directory, only .npy files are read", data.open_rows, folder)
    writer = data.shards.Writer(tmp_path / "harvest", width=8, dtype="float32", source={})
    writer.append(ROWS, tokens=np.arange(60))
    (tmp_path / "harvest" / "manifest.json").unlink()
    refused(r"without manifest.json, and with 00000\.tokens\.npy of a harvest", data.open_rows, tmp_path / "harvest")


def test_commands_take_a_directory_as_they_take_one_file(tmp_path, capsys):
    folder, codes = write(tmp_path / "x"), []
    np.save(tmp_path / "x.npy", ROWS)
    pretrained.save(sae(d=8), tmp_path / "sae")
    for where in (folder, tmp_path / "x.npy"):
        out = tmp_path / f"{where.name} codes.npz"
        assert cli("refine", "--sae", tmp_path / "sae", "--data", where, "--out", out) == 0
        codes.append(dict(np.load(out)))
    assert_same_bits(*codes)
    how = ("--activation", "topk", "--k", 2, "--latents", 16, "--batch", 8, "--heldout", 16, "--out", tmp_path / "z")
    assert cli("train", "--data", folder, "--skip-tokens", 1, *how) == 2
    assert "nothing says the tokens of its rows" in capsys.readouterr().err
