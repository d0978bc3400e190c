import json
import os
import shutil
import signal
import struct
import warnings
import zipfile
from pathlib import Path

import jax
import ml_dtypes
import numpy as np
import pytest
import safetensors.numpy
from foreign import CASES, NAMED, D, M, X, arrays, fixture, published, write
from problems import assert_same_bits, refused

from jaxsae import pretrained
from jaxsae._core.files import InputError
from jaxsae.formats import tensors

SMALL = {"a": np.arange(6, dtype=np.float32).reshape(2, 3), "b": np.array(2.0), "c": np.ones(3, ml_dtypes.bfloat16)}


# --- reading


def test_safetensors_are_those_of_the_library_and_mapped(tmp_path):
    contents = SMALL | {"d": np.arange(4), "e": np.zeros((0, 2), np.float16), "f": np.array([True, False])}
    safetensors.numpy.save_file(contents, tmp_path / "x.safetensors")
    found = tensors.read_safetensors(tmp_path / "x.safetensors")
    assert found.keys() == contents.keys()
    for name, array in contents.items():
        assert found[name].dtype == array.dtype
        np.testing.assert_array_equal(found[name], array)
        assert not found[name].flags.writeable


def test_shards_are_read_through_their_index(tmp_path):
    w = arrays()
    for number, names in enumerate([("W_enc", "b_enc"), ("W_dec", "b_dec")]):
        safetensors.numpy.save_file({name: w[name] for name in names}, tmp_path / f"{number}.safetensors")
    index = {name: f"{name in ('W_dec', 'b_dec'):d}.safetensors" for name in w if name != "W_skip"}
    (tmp_path / "sae_weights.safetensors.index.json").write_text(json.dumps({"weight_map": index}))
    (tmp_path / "cfg.json").write_text(json.dumps({"d_in": D, "d_sae": M}))
    model = pretrained.load(tmp_path)
    safetensors.numpy.save_file(w, tmp_path / "sae_weights.safetensors")
    with pytest.raises(InputError, match=r"exists beside sae_weights\.safetensors\.index\.json"):
        pretrained.load(tmp_path)
    assert_same_bits(model.W_dec, w["W_dec"])
    assert_same_bits(model.b_enc, w["b_enc"])


def test_an_array_that_is_in_two_shards_is_refused(tmp_path):
    for number in range(2):
        safetensors.numpy.save_file({"W": np.full(2, number, np.float32)}, tmp_path / f"{number}.safetensors")
    safetensors.numpy.save_file({"V": np.ones(2), "W": np.ones(2)}, tmp_path / "1.safetensors")
    path = tmp_path / "x.safetensors.index.json"
    path.write_text(json.dumps({"weight_map": {"W": "0.safetensors", "V": "1.safetensors"}}))
    with pytest.raises(InputError, match="W is in two of its files"):
        tensors.read_safetensors(path)


@pytest.mark.parametrize("name", ["../secret.safetensors", "/etc/passwd", "..", "a/b.safetensors", ""])
def test_an_index_that_leads_elsewhere_is_refused(name, tmp_path):
    folder = tmp_path / "sae"
    folder.mkdir()
    safetensors.numpy.save_file(arrays(), tmp_path / "secret.safetensors")
    (folder / "sae_weights.safetensors.index.json").write_text(json.dumps({"weight_map": {"W_dec": name}}))
    (folder / "cfg.json").write_text(json.dumps({"d_in": D}))
    with pytest.raises(InputError, match="which is not a file beside it; do not trust this file") as caught:
        pretrained.load(folder)
    assert repr(name) in str(caught.value)


@pytest.mark.parametrize("index", [[], {}, {"weight_map": []}, {"weight_map": {"a": 3}}, {"weight_map": {"z": "x"}}])
def test_an_index_that_is_none(index, tmp_path):
    safetensors.numpy.save_file(SMALL, tmp_path / "x")
    path = tmp_path / "x.safetensors.index.json"
    path.write_text(json.dumps(index))
    with pytest.raises(InputError, match=r"index\.json: "):
        tensors.read_safetensors(path)


def header(entries: dict, body=b"") -> bytes:
    text = json.dumps(entries).encode()
    return struct.pack("<Q", len(text)) + text + body


BROKEN_SAFETENSORS = {
    "empty": b"",
    "short": b"abc",
    "an enormous header": struct.pack("<Q", 2**62) + b"{}",
    "no JSON": struct.pack("<Q", 4) + b"\xff\xff\xff\xff",
    "deep JSON": struct.pack("<Q", 20_000) + b"[" * 20_000,
    "beyond the end": header({"W": {"dtype": "F32", "shape": [4], "data_offsets": [0, 16]}}, bytes(8)),
    "an enormous shape": header({"W": {"dtype": "F32", "shape": [2**40, 2**40], "data_offsets": [0, 16]}}, bytes(16)),
    "negative": header({"W": {"dtype": "F32", "shape": [-4], "data_offsets": [0, 16]}}, bytes(16)),
    "overlapping": header({n: {"dtype": "F32", "shape": [4], "data_offsets": [0, 16]} for n in "WV"}, bytes(16)),
    "a dtype of its own": header({"W": {"dtype": "F8_E4M3", "shape": [4], "data_offsets": [0, 4]}}, bytes(4)),
    "no dtype": header({"W": {"shape": [4], "data_offsets": [0, 16]}}, bytes(16)),
}


@pytest.mark.parametrize("case", BROKEN_SAFETENSORS)
def test_broken_safetensors_are_named(case, tmp_path):
    path = tmp_path / "x.safetensors"
    path.write_bytes(BROKEN_SAFETENSORS[case])
    assert refused(None, tensors.read_safetensors, path).startswith(str(path))


def test_npz_stored_compressed_and_in_fortran_order(tmp_path):
    contents = {"a": np.asfortranarray(np.arange(6.0).reshape(2, 3)), "b": np.array(3), "c": np.zeros((0, 2))}
    for save in (np.savez, np.savez_compressed):
        save(tmp_path / "x.npz", **contents)
        found = tensors.read_npz(tmp_path / "x.npz")
        for name, array in contents.items():
            np.testing.assert_array_equal(found[name], array)


def npy(text: str, body=b"") -> bytes:
    text = text.ljust(117) + "\n"
    return b"\x93NUMPY\x01\x00" + struct.pack("<H", len(text)) + text.encode() + body


BROKEN_NPZ = {
    "objects": npy("{'descr': '|O', 'fortran_order': False, 'shape': (1,)}", bytes(8)),
    "an enormous shape": npy("{'descr': '<f4', 'fortran_order': False, 'shape': (1099511627776,)}", bytes(8)),
    "negative": npy("{'descr': '<f4', 'fortran_order': False, 'shape': (-2,)}", bytes(8)),
    "code": npy("__import__('os').system('true')"),
    "another version": b"\x93NUMPY\x09\x00" + bytes(100),
    "nothing": b"",
    "a record": npy("{'descr': [('a', '<f4')], 'fortran_order': False, 'shape': (2,)}", bytes(8)),
}


@pytest.mark.parametrize("case", BROKEN_NPZ)
def test_broken_npz_are_named(case, tmp_path):
    with zipfile.ZipFile(tmp_path / "x.npz", "w") as file:
        file.writestr("W_enc.npy", BROKEN_NPZ[case])
    with pytest.raises(InputError, match=r"x\.npz: W_enc\.npy is not a plain array"):
        tensors.read_npz(tmp_path / "x.npz")


def test_bombs_and_traps_in_zips(tmp_path):
    np.savez_compressed(tmp_path / "bomb.npz", W_enc=np.zeros((4096, 4096), np.float32))
    assert (tmp_path / "bomb.npz").stat().st_size < 1 << 20
    with pytest.raises(InputError, match="would unpack to 67,108,992, and weights do not compress"):
        tensors.read_npz(tmp_path / "bomb.npz")
    with zipfile.ZipFile(tmp_path / "out.npz", "w") as file:
        file.writestr("../W_enc.npy", b"")
    with pytest.raises(InputError, match=r"its member '\.\./W_enc\.npy' points outside it"):
        tensors.read_npz(tmp_path / "out.npz")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        with zipfile.ZipFile(tmp_path / "two.npz", "w") as file:
            file.writestr("a.npy", b"")
            file.writestr("a.npy", b"")
    with pytest.raises(InputError, match="two members of the same name"):
        tensors.read_npz(tmp_path / "two.npz")


@pytest.mark.parametrize("content", [b"", b"[]", b"{", b"\xff\xfe", b"[" * 100_000])
def test_a_configuration_that_is_none(content, tmp_path):
    (tmp_path / "cfg.json").write_bytes(content)
    with pytest.raises(InputError, match=r"cfg\.json: "):
        tensors.read_json(tmp_path / "cfg.json")


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("dtype", [None, np.float16])
def test_placing_copies_piece_by_piece(transposed, dtype, tmp_path, monkeypatch):
    monkeypatch.setattr(tensors, "_CHUNK", 1000)
    matrix = np.random.default_rng(0).normal(size=(300, 70)).astype(np.float32)
    safetensors.numpy.save_file({"W": matrix}, tmp_path / "x.safetensors")
    mapped = tensors.read_safetensors(tmp_path / "x.safetensors")["W"]
    mapped, matrix = (mapped.T, matrix.T) if transposed else (mapped, matrix)
    assert len(list(tensors._pieces(mapped))) > 50
    placed = tensors.place(mapped, dtype)
    assert isinstance(placed, jax.Array)
    np.testing.assert_array_equal(placed, matrix.astype(dtype or np.float32))


# --- damage of any kind: an error or an SAE, never a crash, never a hang


class Hung(Exception):
    pass


def files_of(case: str) -> list[str]:
    names = ("cfg.json", "sae_weights.safetensors", "sae.safetensors", "ae.pt", "params.npz")
    return [name for name in names if (fixture(case) / name).is_file()]


def bend(content: bytearray, rng) -> bytearray:
    """Flip, overwrite, remove, repeat or insert bytes; half of the time near the beginning, where the structure is."""
    for _ in range(rng.integers(1, 4)):
        near = len(content) if rng.random() < 0.5 else min(len(content), 700)
        at = int(rng.integers(near)) if near else 0
        kind = rng.integers(6)
        if kind <= 1 and content:
            content[at] ^= 1 << int(rng.integers(8))
        elif kind == 2 and content:
            content[at] = int(rng.choice([0, 255, 128, 46, 82, 99, 48]))
        elif kind == 3:
            del content[at : at + int(rng.integers(1, 40))]
        elif kind == 4:
            content[at:at] = content[at : at + int(rng.integers(1, 40))]
        else:
            content[at : at + 4] = rng.bytes(4)
    return content


def fuzz(folder: Path, mutations: int, seed: int) -> dict[str, int]:
    """Load bent copies of every fixture; how each ended."""
    rng, ends = np.random.default_rng(seed), {"error": 0, "same": 0, "other": 0}
    originals = {}
    for case in CASES:
        (folder / case).mkdir(parents=True)
        for name in files_of(case):
            shutil.copyfile(fixture(case) / name, folder / case / name)
        originals[case] = published(case)

    def hang(*_):
        raise Hung

    signal.signal(signal.SIGALRM, hang)
    for number in range(mutations):
        case = CASES[number % len(CASES)]
        names = files_of(case)
        name = names[int(rng.integers(len(names)))]
        path = folder / case / name
        whole = path.read_bytes()
        path.write_bytes(bend(bytearray(whole), rng))
        signal.alarm(20)
        try:
            model = pretrained.load(folder / case, format=NAMED.get(case))
        except InputError as error:
            assert "\n" not in str(error), str(error)
            ends["error"] += 1
        else:
            kept = jax.tree.structure(model) == jax.tree.structure(originals[case]) and all(
                np.array_equal(a, b, equal_nan=True)
                for a, b in zip(jax.tree.leaves(model), jax.tree.leaves(originals[case]), strict=True)
            )
            ends["same" if kept else "other"] += 1
            # A zip has checksums: what can be other there is what they do not cover. A safetensors file has none.
            assert kept or name != "ae.pt", (number, case)
            assert model.W_enc.shape[1] == model.W_dec.shape[0] == model.b_enc.size
        finally:
            signal.alarm(0)
            path.write_bytes(whole)
    return ends


def test_a_few_mutations_of_every_fixture(tmp_path):
    ends = fuzz(tmp_path, 340, seed=0)
    assert ends["error"] > 100
    assert ends["same"] + ends["other"] > 20


@pytest.mark.slow
def test_ten_thousand_mutations_of_every_fixture(tmp_path):
    ends = fuzz(tmp_path, 10_000, seed=1)
    assert ends["error"] > 3000
    assert ends["same"] + ends["other"] > 600


# --- as large as they are published


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="memory is read from /proc")
@pytest.mark.slow
def test_loading_takes_hardly_more_memory_than_the_file(tmp_path):
    from benchmarks import load

    measured = load.measure(tmp_path, d=1024, m=16_384)
    assert measured["peak"] <= 1.3 * measured["bytes"]


def test_a_directory_where_a_file_should_be(tmp_path):
    folder = write(tmp_path / "sae", "sae_weights.safetensors", arrays(), {"d_in": D})
    (folder / "cfg.json").unlink()
    (folder / "cfg.json").mkdir()
    with pytest.raises(InputError):
        pretrained.load(folder)
    assert os.listdir(folder)
    assert X.shape[1] == D


def test_numbers_of_python_that_jax_would_change_are_refused():
    for value in (2**40, 1e39, [1.0, 1e39]):
        with pytest.raises(
            InputError, match=r"a leaf holds numbers beyond the range of (int32|float32); pass a numpy array"
        ):
            tensors.writable(value, "a leaf")
    assert tensors.writable(np.int64(2**40)) == 2**40
    assert np.isinf(tensors.writable(float("inf")))


def test_a_threshold_may_be_infinite_and_not_too_large():
    assert np.isinf(tensors.place(np.array([np.inf, 1.0]), np.float32, infinite=True)[0])
    with pytest.raises(InputError, match="holds NaN or too large numbers in float32"):
        tensors.place(np.array([1e300, 1.0]), np.float32, infinite=True)
