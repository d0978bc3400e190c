import gc
import io
import itertools
import os
import zipfile

import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy
import sklearn.datasets
import sklearn.utils
from array_record.python import array_record_module
from problems import refused

from jaxsae._core.files import InputError
from jaxsae.data import rows as rows_on_disk, shards
from jaxsae.data.batching import batches
from jaxsae.data.photographs import image_patches
from jaxsae.data.rows import fingerprint, open_rows, require_finite

# --- open_rows


def array(shape=(6, 4), dtype=np.float32):
    return np.arange(np.prod(shape)).reshape(shape).astype(dtype)


@pytest.mark.parametrize("dtype", [np.float16, np.float32, np.float64])
@pytest.mark.parametrize("shape", [(6, 4), (2, 3, 4), (1, 2, 3, 4), (1, 1)])
@pytest.mark.parametrize("name", ["x.npy", "x.npz"])
def test_open_rows_flattens_leading_axes(name, shape, dtype, tmp_path):
    saved = array(shape, dtype)
    (np.save if name.endswith("npy") else np.savez)(tmp_path / name, saved)
    found = open_rows(tmp_path / name)
    assert found.dtype == dtype
    np.testing.assert_array_equal(found, saved.reshape(-1, shape[-1]))


@pytest.mark.parametrize("shape", [(6, 4), (2, 3, 4)])
def test_an_npy_is_mapped_and_not_read(shape, tmp_path):
    np.save(tmp_path / "x.npy", array(shape))
    found = open_rows(tmp_path / "x.npy")
    assert isinstance(found, np.memmap) or isinstance(found.base, np.memmap)
    assert not found.flags.writeable


def test_a_path_may_be_a_string_and_an_npz_compressed(tmp_path):
    np.savez_compressed(tmp_path / "x.npz", activations=array())
    np.testing.assert_array_equal(open_rows(str(tmp_path / "x.npz")), array())


def truncate(path, writer, keep):
    writer(path, array((100, 4)))
    path.write_bytes(path.read_bytes()[:keep])


def flip(path, at):
    """An archive whose directory is right and whose content is not."""
    np.savez(path, array((100, 4)))
    content = bytearray(path.read_bytes())
    content[at] ^= 0xFF
    path.write_bytes(content)


def zipped_text(path):
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("readme.txt", "hello")


def header(text):
    """A .npy file with that text where its shape and dtype should stand."""
    return lambda path: path.write_bytes(b"\x93NUMPY\x01\x00" + len(text).to_bytes(2, "little") + text + b"\0" * 64)


def oversized(path):
    """An archive that announces more content than there is, in its directory and in the array's header."""
    np.savez(path, array((100, 4)))
    content = bytearray(path.read_bytes().replace(b"(100, 4), }", b"(999, 4), }"))
    at = content.index(b"PK\x01\x02")
    content[at + 20 : at + 28] = 2 * (len(content) + 10_000).to_bytes(4, "little")
    path.write_bytes(content)


OBJECTS = np.array([[{"a": 1}, None]], dtype=object)
ANY = "expected a .npy or .npz array of floating-point activations"
BAD_INPUTS = {
    "missing": ("x.npy", lambda path: None, "no such file"),
    "directory": ("x.npy", os.mkdir, "a directory without manifest.json or .npy files; expected"),
    "empty file": ("x.npy", lambda path: path.touch(), "the file is empty"),
    "pickled objects in an npz": ("x.npz", lambda path: np.savez(path, OBJECTS), ANY),
    "empty npz": ("x.npz", lambda path: path.touch(), "the file is empty"),
    "truncated npy": ("x.npy", lambda path: truncate(path, np.save, 1000), ANY),
    "truncated npy header": ("x.npy", lambda path: truncate(path, np.save, 20), ANY),
    "truncated npz": ("x.npz", lambda path: truncate(path, np.savez, 1000), ANY),
    "truncated compressed npz": ("x.npz", lambda path: truncate(path, np.savez_compressed, 300), ANY),
    "corrupt npz": ("x.npz", lambda path: flip(path, 600), ANY),
    "announces more": ("x.npz", oversized, ANY),
    "corrupt header": ("x.npy", header(b"{'descr': ('<f4',\n"), ANY),
    "header that is not a dictionary": ("x.npy", header(b"[[[[\n"), ANY),
    "text": ("x.npy", lambda path: path.write_text("1.0 2.0\n3.0 4.0\n"), ANY),
    "binary": ("x.npy", lambda path: path.write_bytes(bytes(range(256))), ANY),
    "zip of text": ("x.npz", zipped_text, ANY),
    "pickled objects": ("x.npy", lambda path: np.save(path, OBJECTS), ANY),
    "integers": ("x.npy", lambda path: np.save(path, array(dtype=np.int32)), "holds int32"),
    "complex numbers": ("x.npy", lambda path: np.save(path, array(dtype=np.complex64)), "holds complex64"),
    "integers in an npz": ("x.npz", lambda path: np.savez(path, array(dtype=np.int64)), "holds int64"),
    "one axis": ("x.npy", lambda path: np.save(path, array((6,))), r"has shape \(6,\)"),
    "no axis": ("x.npy", lambda path: np.save(path, np.float32(1)), r"has shape \(\)"),
    "no rows": ("x.npy", lambda path: np.save(path, array((0, 4))), r"has shape \(0, 4\)"),
    "no columns": ("x.npy", lambda path: np.save(path, array((4, 0))), r"has shape \(4, 0\)"),
    "two arrays": ("x.npz", lambda path: np.savez(path, a=array(), b=array()), r"holds 2 arrays \(a, b\)"),
    "no array": ("x.npz", lambda path: np.savez(path), "holds 0 arrays"),
}


@pytest.mark.parametrize("case", BAD_INPUTS)
def test_open_rows_refuses(case, tmp_path):
    name, write, message = BAD_INPUTS[case]
    path = tmp_path / name
    write(path)
    with pytest.raises(InputError, match=message) as caught:
        open_rows(path)
    text = str(caught.value)
    assert text.startswith(f"{path}: ")
    assert "\n" not in text
    assert text.endswith(".")
    del caught
    gc.collect()  # a file left open is an error here, not in a later test


class Trap:
    """Makes a directory when it is unpickled."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (self.path,)


@pytest.mark.parametrize("name", ["x.npy", "x.npz"])
def test_a_pickle_is_not_run(name, tmp_path):
    trap = np.array([[Trap(str(tmp_path / "sprung"))]], dtype=object)
    (np.save if name.endswith("npy") else np.savez)(tmp_path / name, trap)
    with pytest.raises(InputError):
        open_rows(tmp_path / name)
    assert os.listdir(tmp_path) == [name]


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_require_finite_counts_the_rows(bad):
    rows = array()
    require_finite(rows, "x.npy")
    rows[[2, 4], [1, 3]] = bad
    with pytest.raises(InputError, match=r"x\.npy: 2 of 6 rows hold NaN or Inf, the first is row 2"):
        require_finite(rows, "x.npy")


# --- batches

PARTS = [slice(0, 10), slice(10, 30)]  # of a batch, for two processes


@pytest.mark.parametrize("dtype", [np.float16, np.float64])
def test_every_pass_covers_every_row_once_in_float32(dtype):
    rows = array((12, 2), dtype)
    stream = batches(rows, 4, seed=0)
    passes = [list(itertools.islice(stream, 3)) for _ in range(3)]
    for blocks in passes:
        assert all(block.dtype == np.float32 and block.shape == (4, 2) for block in blocks)
        np.testing.assert_array_equal(sorted(np.concatenate(blocks)[:, 0]), rows[:, 0])
    # Each pass deals the rows anew.
    assert not np.array_equal(passes[0], passes[1])


def test_a_batch_may_span_two_passes():
    stream = batches(array((11, 1)), 4, seed=0)
    seen = np.concatenate(list(itertools.islice(stream, 33)))[:, 0].reshape(12, 11)  # pass by pass
    np.testing.assert_array_equal(np.sort(seen), np.tile(np.arange(11), (12, 1)))


@pytest.mark.parametrize("weights", [None, [1.0, 2.0]])
def test_batches_go_on_from_any_position_to_the_bit(weights):
    sources = [array((9, 2)), 100 + array((20, 2), np.float16)]
    stream = batches(sources, 4, seed=3, weights=weights)
    first = list(itertools.islice(stream, 12))
    assert stream.position == 12
    for position in (0, 5, 11):
        stream = batches(sources, 4, seed=3, weights=weights)
        stream.position = position
        np.testing.assert_array_equal(list(itertools.islice(stream, 12 - position)), first[position:])
    stream.position = 2  # also backwards
    np.testing.assert_array_equal(next(stream), first[2])


def test_processes_read_parts_of_the_same_batches():
    whole = batches(array((30, 2)), 6, seed=0)
    parts = [batches(array((30, 2)), 6, seed=0, part=slice(at, at + 3)) for at in (0, 3)]
    for _ in range(9):
        np.testing.assert_array_equal(next(whole), np.concatenate([next(part) for part in parts]))


def test_sources_are_mixed_by_weight_or_by_length():
    sources = [np.zeros((10, 1)), np.ones((30, 1))]

    def share(weights):
        return np.mean(list(itertools.islice(batches(sources, 8, seed=0, weights=weights), 50)))

    np.testing.assert_allclose([share(None), share([3.0, 1.0]), share([1.0, 1.0])], [0.75, 0.25, 0.5])


@pytest.mark.parametrize("weights", [None, [1.0, 1.0]])
def test_windows_are_shuffled_one_after_the_other(weights):
    sources = [array((24, 1)), 100 + array((24, 1))]
    taken = batches(sources, 8, seed=2**32 - 1, weights=weights, window=6)
    rows = np.concatenate(list(itertools.islice(taken, 18)))[:, 0]  # three passes
    first = rows[rows < 100]
    windows = first[: len(first) // 6 * 6].reshape(-1, 6)
    expected = np.tile(np.arange(24).reshape(4, 6), (len(windows) // 4 + 1, 1))[: len(windows)]
    np.testing.assert_array_equal(np.sort(windows), expected)
    assert not np.array_equal(windows, expected)
    assert not np.array_equal(windows[:4], windows[4:8])
    taken.position = 5
    np.testing.assert_array_equal(next(taken)[:, 0], rows[40:48])


def test_a_batch_tells_which_rows_it_holds():
    sources = [array((9, 2)), 100 + array((20, 2))]
    stream = batches(sources, 5, seed=0)
    for number in range(8):
        found = np.concatenate([sources[source][rows] for source, rows in stream.rows(number)])
        np.testing.assert_array_equal(np.sort(found[:, 0]), np.sort(next(stream)[:, 0]))


@pytest.mark.parametrize(
    ("sources", "weights", "message"),
    [
        ([array((9, 2)), array((9, 3))], None, r"got sources of widths \[2, 3\]"),
        ([array((9, 2)), array((9, 2))], [1.0], r"got weights \[1.0\] for 2 sources"),
        ([array((9, 2)), array((9, 2))], [1.0, 0.0], r"got weights \[1.0, 0.0\] for 2 sources"),
        ([array((9, 2)), array((9, 2))], [1.0, np.nan], r"got weights \[1.0, nan\] for 2 sources"),
    ],
)
def test_sources_that_cannot_be_mixed(sources, weights, message):
    with pytest.raises(InputError, match=message):
        batches(sources, 4, seed=0, weights=weights)


@pytest.mark.parametrize("seed", [0, 1])
def test_batches_are_reproducible(seed):
    first, second, other = (list(itertools.islice(batches(array((12, 2)), 4, seed=s), 5)) for s in (seed, seed, 9))
    np.testing.assert_array_equal(first, second)
    assert not np.array_equal(first, other)


def test_batches_of_a_mapped_file(tmp_path):
    np.save(tmp_path / "x.npy", array((12, 2)))
    mapped = batches(open_rows(tmp_path / "x.npy"), 4, seed=0)
    np.testing.assert_array_equal(next(mapped), next(batches(array((12, 2)), 4, seed=0)))


def test_too_few_rows_for_a_batch_are_refused_at_once():
    with pytest.raises(InputError, match="got 3 rows for batches of 4; pass more rows or a smaller batch"):
        batches(array((3, 2)), 4, seed=0)
    assert next(batches(array((4, 2)), 4, seed=0)).shape == (4, 2)


@pytest.mark.parametrize("window", [1, 64, 199, 200, 320])  # grain shuffles few rows slowly
@pytest.mark.parametrize("weights", [None, [2.0, 1.0]])
def test_every_row_comes_once_a_pass_whatever_the_window(window, weights):
    sources = [array((130, 1)), 1000 + array((70, 1))]
    stream = batches(sources, 30, seed=5, weights=weights, window=window)
    whole = np.concatenate([stream.source[number] for number in range(24)])[:, 0]
    # Without weights they are as if joined; with them each has passes of its own.
    for rows in sources if weights else [np.concatenate(sources)]:
        mine = whole[np.isin(whole, rows)]
        passes = mine[: len(mine) // len(rows) * len(rows)].reshape(-1, len(rows))
        assert len(passes) >= 3
        for start in range(0, len(rows), window):  # and a window before the next
            some = np.sort(passes[:, start : start + window])
            np.testing.assert_array_equal(some, np.tile(rows[start : start + window, 0], (len(passes), 1)))
        assert len(np.unique(passes, axis=0)) == (1 if window == 1 else len(passes))
    parts = [batches(sources, 30, seed=5, weights=weights, window=window, part=part) for part in PARTS]
    for number in (0, 4, 6):  # within a pass, and from one to the next
        joined = np.concatenate([part.source[number] for part in parts])
        np.testing.assert_array_equal(joined[:, 0], whole[30 * number : 30 * (number + 1)])


@pytest.mark.parametrize("option", [{"window": 0}, {"window": -3}, {"size": 0}])
def test_windows_and_batches_of_nothing_are_refused(option):
    (name,) = option
    with pytest.raises(InputError, match=rf"got {name} {option[name]}; pass at least 1"):
        batches(array((9, 2)), **({"size": 4, "seed": 0} | option))


@pytest.mark.parametrize("rows", [array((6,)), array((6, 0)), array((2, 3, 4)), array((6, 2), complex)])
def test_what_are_no_rows_is_refused(rows):
    with pytest.raises(InputError, match=r"^x\.npy: got .* expected real numbers \(rows, width\)"):
        batches(rows, 2, seed=0, names=["x.npy"])


def test_a_row_that_overflows_is_named_and_none_becomes_infinite():
    rows = array((9, 2), np.float64)
    rows[5, 1] = -1e39
    stream = batches([array((4, 2)), rows], 13, seed=0, names=["a", "b"])
    with pytest.raises(InputError, match=r"^b: row 5 holds -1e\+39, 1 finite values overflow float32; scale it\.$"):
        next(stream)
    rows[5, 1] = -np.inf  # as it is in the data
    assert np.isinf(next(batches(rows, 9, seed=0))).sum() == 1


# --- fingerprints


def test_a_fingerprint_changes_with_any_value_and_not_with_how_it_is_held(tmp_path):
    rows = array((9, 4))
    same = [rows.copy(order="F"), rows.astype(">f4"), np.repeat(rows, 2, axis=0)[::2]]
    np.save(tmp_path / "x.npy", rows)
    safetensors.numpy.save_file({"a": rows}, tmp_path / "x.safetensors")
    records(tmp_path / "x.array_record", rows)
    same += [open_rows(tmp_path / name) for name in ("x.npy", "x.safetensors", "x.array_record")]
    assert {fingerprint(each) for each in same} == {fingerprint(rows)}
    others = [rows[:-1], rows.reshape(12, 3), rows.astype(np.float16), rows[::-1]]
    for place in np.ndindex(*rows.shape):
        others.append(rows.copy())
        others[-1][place] += 1
    assert len({fingerprint(each) for each in [rows, *others]}) == len(others) + 1


def test_a_fingerprint_of_many_rows_reads_some_of_them(monkeypatch):
    monkeypatch.setattr(rows_on_disk, "_SAMPLED", 1 << 10)
    monkeypatch.setattr(rows_on_disk, "_BLOCKS", 4)
    rows = array((10_000, 4))
    found = fingerprint(rows)
    for row, seen in ((0, True), (15, True), (16, False), (5000, False), (9999, True)):
        other = rows.copy()
        other[row] += 1
        assert (fingerprint(other) != found) == seen, row
    assert fingerprint(rows + 1) != found
    assert len({fingerprint(array((n, 4))) for n in range(60, 300)}) == 240


def test_a_fingerprint_of_shards_is_of_their_checksums(tmp_path, monkeypatch):
    found = []
    for name, change in (("a", 0), ("b", 0), ("c", 1)):
        writer = shards.Writer(tmp_path / name, width=4, dtype="float32", source={})
        writer.append(array((6, 4)))
        writer.append(array((6, 4)) + change)
        found.append(fingerprint(shards.open_rows(tmp_path / name)))
    assert found[0] == found[1] != found[2]
    assert fingerprint(shards.open_rows(tmp_path / "a")[:6]) != fingerprint(shards.open_rows(tmp_path / "a"))


# --- image_patches


def test_image_patches():
    train, heldout = image_patches(3001, 100, side=6)
    assert (train.shape, heldout.shape) == ((3001, 108), (100, 108))
    assert train.dtype == heldout.dtype == np.float32
    np.testing.assert_allclose(train.mean(axis=1), 0, atol=1e-6)
    np.testing.assert_allclose(heldout.mean(axis=1), 0, atol=1e-6)
    np.testing.assert_allclose(np.mean(np.sum(train.astype(np.float64) ** 2, axis=1)), 1, rtol=1e-5)
    # The same factor for both: held-out patches are natural images too, and so of a similar size.
    assert 0.2 < np.mean(np.sum(heldout**2, axis=1)) < 5


@pytest.mark.parametrize("count", [1, 2, 3])
def test_a_few_image_patches(count):
    train, heldout = image_patches(count, count, side=4)
    assert train.shape == heldout.shape == (count, 48)


def test_image_patches_are_reproducible():
    first, second, other = (image_patches(50, 10, seed=seed) for seed in (3, 3, 4))
    for a, b, c in zip(first, second, other, strict=True):
        np.testing.assert_array_equal(a, b)
        assert not np.array_equal(a, c)


def where(patches, side):
    """The picture, row and column of the corner of each patch of `pictures_of_places`."""
    # Neither the mean that was taken out nor the common scale changes ratios of differences.
    patches = patches.astype(np.float64).reshape(-1, 3, side, side)
    scale = (patches[:, 0, 0, 2] - 2 * patches[:, 0, 0, 1] + patches[:, 0, 0, 0]) / 2
    column = ((patches[:, 0, 0, 1] - patches[:, 0, 0, 0]) / scale - 1) / 2
    row = ((patches[:, 1, 1, 0] - patches[:, 1, 0, 0]) / scale - 1) / 2
    picture = (patches[:, 2, 0, 1] - patches[:, 2, 0, 0]) / scale
    found = np.stack([picture, row, column], axis=1)
    np.testing.assert_allclose(found, found.round(), atol=0.1)  # it is decoded right
    return found.round().astype(int)


def pictures_of_places(shapes):
    """Pictures whose red is the column's square, green the row's square, and blue number × column."""
    pictures = []
    for number, shape in enumerate(shapes):
        row, column = np.mgrid[: shape[0], : shape[1]]
        pictures.append(np.stack([column**2, row**2, number * column], axis=-1))
    return pictures


def test_no_pixel_is_in_both_training_and_heldout_patches(monkeypatch):
    side, shapes = 5, [(20, 64), (24, 30)]
    bunch = sklearn.utils.Bunch(images=pictures_of_places(shapes))
    monkeypatch.setattr(sklearn.datasets, "load_sample_images", lambda: bunch)
    used = []
    for patches in image_patches(4000, 2000, side=side):
        pixels = [np.zeros(shape, bool) for shape in shapes]
        for picture, row, column in where(patches, side):
            pixels[picture][row : row + side, column : column + side] = True
        used.append(pixels)
    for train, heldout in zip(*used, strict=True):
        assert not (train & heldout).any()
        assert (train | heldout).all()  # and none is wasted
        assert 0.7 < train.mean() < 0.8


# --- other formats


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32"])
def test_a_safetensors_file_is_mapped(dtype, tmp_path):
    saved = np.asarray(jnp.asarray(array((2, 3, 4)), dtype))
    safetensors.numpy.save_file({"activations": saved}, tmp_path / "x.safetensors")
    found = open_rows(tmp_path / "x.safetensors")
    assert found.dtype == saved.dtype
    assert isinstance(found.base, np.memmap)
    np.testing.assert_array_equal(found, saved.reshape(6, 4))
    np.testing.assert_array_equal(next(batches(found, 6, seed=0)).sum(), saved.astype(np.float32).sum())


def records(path, rows):
    writer = array_record_module.ArrayRecordWriter(str(path), "group_size:1")
    for row in rows:
        np.save(buffer := io.BytesIO(), row)
        writer.write(buffer.getvalue())
    writer.close()


def test_an_array_record_file_is_read_by_row(tmp_path):
    saved = array((20, 4), np.float16)
    records(tmp_path / "x.array_record", saved)
    found = open_rows(tmp_path / "x.array_record")
    assert (found.shape, found.dtype) == ((20, 4), np.float16)
    np.testing.assert_array_equal(np.asarray(found), saved)
    np.testing.assert_array_equal(np.asarray(found[5:9]), saved[5:9])
    for a, b in itertools.islice(zip(*(batches(rows, 6, seed=0) for rows in (found, saved)), strict=True), 6):
        np.testing.assert_array_equal(a, b)


OTHERS = {
    "truncated": ("x.safetensors", lambda path: _cut(path, 40)),
    "no safetensors": ("x.safetensors", lambda path: path.write_bytes(bytes(range(200)))),
    "two": ("x.safetensors", lambda path: safetensors.numpy.save_file({"a": array(), "b": array()}, path)),
    "integers": ("x.safetensors", lambda path: safetensors.numpy.save_file({"a": array(dtype=np.int32)}, path)),
    "missing": ("x.safetensors", lambda path: None),
    "no records": ("x.array_record", lambda path: records(path, [])),
    "not a record file": ("x.array_record", lambda path: path.write_bytes(bytes(range(200)))),
    "no rows": ("x.array_record", lambda path: records(path, array((3, 2, 2)))),
}


def _cut(path, size):
    safetensors.numpy.save_file({"a": array((100, 4))}, path)
    path.write_bytes(path.read_bytes()[:-size])


@pytest.mark.parametrize("case", OTHERS)
def test_a_file_of_another_format_that_is_not_what_it_says(case, tmp_path):
    name, write = OTHERS[case]
    write(tmp_path / name)
    assert refused(None, open_rows, tmp_path / name).startswith(f"{tmp_path / name}: ")


# --- however it is written


ORDERS = {
    "big-endian": lambda x: x.astype(x.dtype.newbyteorder(">")),
    "Fortran": np.asfortranarray,
    "both": lambda x: np.asfortranarray(x.astype(x.dtype.newbyteorder(">"))),
}


@pytest.mark.parametrize("dtype", [np.float16, np.float32, np.float64])
@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("name", ["x.npy", "x.npz", "x.array_record"])
def test_values_are_the_same_in_any_order_of_bytes_and_axes(name, order, dtype, tmp_path):
    saved = array((2, 3, 4), dtype) if name != "x.array_record" else array((6, 4), dtype)
    write = {"x.npy": np.save, "x.npz": np.savez, "x.array_record": records}[name]
    write(tmp_path / name, ORDERS[order](saved))
    found = open_rows(tmp_path / name)
    assert (found.shape, found.dtype) == ((6, 4), dtype)
    np.testing.assert_array_equal(np.asarray(found), saved.reshape(6, 4))
    np.testing.assert_array_equal(np.asarray(found[1:5]), saved.reshape(6, 4)[1:5])
    np.testing.assert_array_equal(found[np.array([4, 0])], saved.reshape(6, 4)[[4, 0]])
    jnp.asarray(found[1:5], jnp.float32)
    for a, b in zip(*(itertools.islice(batches(x, 3, seed=0), 4) for x in (found, saved.reshape(6, 4))), strict=True):
        np.testing.assert_array_equal(a, b)


def bytes_of(row):
    np.save(buffer := io.BytesIO(), row)
    return buffer.getvalue()


ROW = array((4,))
RAGGED = {
    "short": (bytes_of(ROW[:3]), "record 7 has width 3, expected 4 as record 0"),
    "long": (bytes_of(np.ones(5, np.float32)), "record 7 has width 5, expected 4 as record 0"),
    "nothing": (bytes_of(ROW[:0]), "record 7 has width 0, expected 4 as record 0"),
    "two axes": (bytes_of(ROW[None]), r"record 7 has shape \(1, 4\) of float32, expected \(4,\) of float32"),
    "no axis": (bytes_of(np.float32(1)), r"record 7 has shape \(\) of float32, expected"),
    "another dtype": (bytes_of(ROW.astype(np.float64)), r"record 7 has shape \(4,\) of float64, expected \(4,\)"),
    "integers": (bytes_of(ROW.astype(np.int64)), r"record 7 has shape \(4,\) of int64"),
    "complex": (bytes_of(ROW.astype(complex)), r"record 7 has shape \(4,\) of complex128"),
    "objects": (None, r"record 7 is not a \.npy file \(Object arrays"),
    "cut off": (bytes_of(ROW)[:-3], r"record 7 is not a \.npy file"),
    "empty": (b"", r"record 7 is not a \.npy file"),
    "text": (b"1.0 2.0 3.0 4.0", r"record 7 is not a \.npy file"),
    "an archive": (b"PK\x03\x04 and so on", r"record 7 is not a \.npy file"),
}


@pytest.mark.parametrize("case", RAGGED)
def test_a_record_that_is_no_row_is_named(case, tmp_path):
    content, message = RAGGED[case]
    if content is None:
        np.save(buffer := io.BytesIO(), OBJECTS[0], allow_pickle=True)
        content = buffer.getvalue()
    path = tmp_path / "x.array_record"
    writer = array_record_module.ArrayRecordWriter(str(path), "group_size:1")
    for number in range(12):
        writer.write(content if number == 7 else bytes_of(ROW + number))
    writer.close()
    rows = open_rows(path)
    np.testing.assert_array_equal(rows[3], ROW + 3)
    for read in (
        lambda: np.asarray(rows),
        lambda: rows[7],
        lambda: rows[5:9][2],
        lambda: next(batches(rows, 12, seed=0)),
    ):
        assert refused(message, read).startswith(f"{path}: ")


def test_a_record_file_with_flipped_bytes_is_refused_or_read_right(tmp_path):
    path, saved = tmp_path / "x.array_record", array((20, 4))
    records(path, saved)
    content, refused = path.read_bytes(), 0
    for at in np.linspace(0, len(content) - 1, 40).astype(int):
        path.write_bytes(content[:at] + bytes([content[at] ^ 0x55]) + content[at + 1 :])
        try:
            found = np.asarray(open_rows(path))
        except InputError as error:
            assert str(error).startswith(f"{path}: ")
            refused += 1
        else:
            np.testing.assert_array_equal(found, saved)
    assert refused > 0
