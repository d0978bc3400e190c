import pickle
import re
import struct
import tracemalloc
import zipfile

import ml_dtypes
import numpy as np
import pytest
from foreign import CASES, fixture

from jaxsae import pretrained
from jaxsae._core.files import InputError
from jaxsae.formats import torch_pickle

PT = [case for case in CASES if case.startswith("dictionary_learning")]
OS_SYSTEM = b"cposix\nsystem\n"


def tensor(key=b"0", kind=b"FloatStorage", size=4, offset=0, shape=(4,), strides=(1,)) -> bytes:
    """The instructions for a tensor."""

    def number(n):
        return b"\x8a\x09" + n.to_bytes(9, "little", signed=True)

    def numbers(ns):
        return b"(" + b"".join(map(number, ns)) + b"t"

    storage = b"(X\x07\x00\x00\x00storagectorch\n" + kind + b"\nX" + struct.pack("<I", len(key)) + key
    storage += b"X\x03\x00\x00\x00cpu" + number(size) + b"tQ"
    rest = number(offset) + numbers(shape) + numbers(strides) + b"\x89ccollections\nOrderedDict\n)R"
    return b"ctorch._utils\n_rebuild_tensor_v2\n(" + storage + rest + b"tR"


def state(*items: bytes, name=b"W") -> bytes:
    """A program that makes `{name: item, …}`."""
    pairs = b"".join(b"X\x01\x00\x00\x00" + bytes([name[0] + n]) + item for n, item in enumerate(items))
    return b"\x80\x02}(" + pairs + b"u."


def archive(path, program: bytes, members: dict[str, bytes] | None = None, compression=zipfile.ZIP_STORED):
    with zipfile.ZipFile(path, "w", compression) as file:
        file.writestr("ae/data.pkl", program)
        for name, content in ({"ae/data/0": bytes(16)} if members is None else members).items():
            file.writestr(name, content)
    return path


def legacy(path, program: bytes, storages: dict[str, bytes], magic=0x1950A86A20F9469CFC6C):
    """The layout before torch 1.6: five pickles, then each storage after its size."""
    system = {"protocol_version": 1001, "little_endian": True, "type_sizes": {"short": 2, "int": 4, "long": 4}}
    head = [pickle.dumps(thing, 2) for thing in (magic, 1001, system)]
    content = b"".join([*head, program, pickle.dumps(list(storages), 2)])
    for data in storages.values():
        content += struct.pack("<q", len(data) // 4) + data
    path.write_bytes(content)
    return path


# --- what is read


@pytest.mark.parametrize("case", PT)
def test_a_state_dict_of_torchs_is_read_to_the_bit(case):
    found = torch_pickle.read(fixture(case) / "ae.pt")
    with np.load(fixture(case) / "state_dict.npz") as expected:
        assert found.keys() == set(expected)
        for name, array in found.items():
            assert array.dtype == expected[name].dtype
            np.testing.assert_array_equal(array, expected[name])


@pytest.mark.parametrize("case", PT)
def test_an_sae_in_the_layout_before_is_the_same(case, tmp_path):
    with zipfile.ZipFile(fixture(case) / "ae.pt") as file:
        keys = sorted((name for name in file.namelist() if "/data/" in name), key=lambda name: int(name.split("/")[-1]))
        storages = {name.split("/")[-1]: file.read(name) for name in keys}
        program = file.read("ae/data.pkl")
    # In that layout an identity ends with what the storage is a view of: nothing.
    program = re.sub(rb"t(q.)Q", rb"Nt\1Q", program, flags=re.DOTALL)
    path = legacy(tmp_path / "ae.pt", program, storages)
    found, expected = torch_pickle.read(path), torch_pickle.read(fixture(case) / "ae.pt")
    for name, array in expected.items():
        np.testing.assert_array_equal(found[name], array)
    assert pretrained.detect(path) == "dictionary_learning"


def test_what_is_written_is_read(tmp_path):
    thing = {
        "matrix": np.arange(6, dtype=np.float32).reshape(2, 3),
        "half": np.arange(3, dtype=np.float16),
        "brain": np.arange(3).astype(ml_dtypes.bfloat16),
        "scalar": np.array(7, np.int64),
        "empty": np.zeros((0, 3), np.float32),
        "bool": np.array([True, False]),
        "nested": {"k": 3, "s": "µ", "f": -1.5, "n": None, "t": (1, True), "l": [1, [2]]},
    }
    torch_pickle.write(tmp_path / "a.pt", thing)
    found = torch_pickle.read(tmp_path / "a.pt")
    assert found.keys() == thing.keys()
    assert found["nested"] == thing["nested"]
    for name in thing.keys() - {"nested"}:
        assert found[name].dtype == thing[name].dtype
        np.testing.assert_array_equal(found[name], thing[name])
    with pytest.raises(TypeError, match="does not write"):
        torch_pickle.write(tmp_path / "b.pt", {"a": object()})


@pytest.mark.parametrize("layout", ["zip", "legacy"])
def test_strided_shared_and_repeated_tensors(layout, tmp_path):
    data = np.arange(12, dtype=np.float32)
    program = state(
        tensor(size=12, shape=(4, 3), strides=(1, 4)),
        tensor(size=12, offset=2, shape=(5,), strides=(2,)),
        tensor(size=12, offset=3, shape=(2, 2), strides=(0, 1)),
        tensor(size=12, shape=(), strides=()),
        tensor(size=12, shape=(0,), strides=(1,)),
    )
    path = tmp_path / "a.pt"
    if layout == "zip":
        archive(path, program, {"ae/data/0": data.tobytes()})
    else:
        legacy(path, program, {"0": data.tobytes()})
    W, X, Y, Z, empty = torch_pickle.read(path).values()
    np.testing.assert_array_equal(W, data.reshape(3, 4).T)
    np.testing.assert_array_equal(X, data[2:11:2])
    np.testing.assert_array_equal(Y, [[3, 4], [3, 4]])
    assert Z == 0
    assert Z.shape == ()
    assert empty.size == 0
    with pytest.raises(ValueError, match="read-only"):
        W[0, 0] = 1


def test_parameters_sizes_devices_and_dtypes_are_data(tmp_path):
    parameter = b"ctorch._utils\n_rebuild_parameter\n(" + tensor() + b"\x88ccollections\nOrderedDict\n)RtR"
    device = b"ctorch\ndevice\n(X\x03\x00\x00\x00cputR"
    size = b"ctorch\nSize\n(K\x02K\x03t\x85R"
    found = torch_pickle.read(archive(tmp_path / "a.pt", state(parameter, device, size, b"ctorch\nfloat32\n")))
    assert isinstance(found["W"], np.ndarray)
    assert found["Y"] == (2, 3)


# --- what is refused


class Calls:
    """Pickles as a call."""

    def __init__(self, function, *arguments):
        self.call = function, arguments

    def __reduce__(self):
        return self.call


def calling(function, *arguments, protocol=2) -> bytes:
    return pickle.dumps({"W": Calls(function, *arguments)}, protocol)


RAN = []
METHOD = b"c__builtin__\ngetattr\n(cposix\nsystem\nX\x08\x00\x00\x00__call__tR(X\x04\x00\x00\x00truetR"
MALICIOUS = {
    "os.system": (calling(__import__("os").system, "touch /tmp/jaxsae-was-here"), "calls posix.system"),
    "os.system, protocol 4": (calling(__import__("os").system, "true", protocol=4), "calls posix.system"),
    "builtins.eval": (calling(eval, "RAN.append(1)"), r"calls (__builtin__|builtins)\.eval"),
    "builtins.exec": (calling(exec, "RAN.append(1)"), r"calls (__builtin__|builtins)\.exec"),
    "a reduce in a reduce": (calling(print, Calls(__import__("os").system, "true")), "calls posix.system"),
    "a method of what was called": (state(METHOD), "getattr"),
    "a pickle in a pickle": (
        state(b"ctorch.storage\n_load_from_bytes\n(C\x01.tR"),
        "calls torch.storage._load_from_bytes",
    ),
    "numpy's own": (calling(np.dtype, "f4"), "calls numpy.dtype"),
    "an object": (state(b"csubprocess\nPopen\n)\x81"), "makes subprocess.Popen"),
    "an old object": (state(b"(isubprocess\nPopen\n"), "makes subprocess.Popen"),
    "attributes of a module": (state(OS_SYSTEM + b"}b"), "sets attributes of posix.system"),
    "items of a function": (state(OS_SYSTEM + b"K\x01K\x02s"), "sets items of posix.system"),
    "an extension": (state(b"\x82\x01"), "EXT1"),
    "a tuple as a function": (state(b")(tR"), "calls a tuple"),
    "a tensor of a function": (state(b"ctorch._utils\n_rebuild_tensor_v2\n(" + OS_SYSTEM + b"K\x00))\x89}tR"), "posix"),
    "a tensor of negatives": (
        state(tensor()[:-2] + b"}X\x03\x00\x00\x00neg\x88stR"),
        "makes a tensor whose values are not those in its storage",
    ),
    "storage of another kind": (state(tensor(kind=b"UntypedStorage")), "torch.UntypedStorage"),
    "a storage that is a path": (state(tensor(key=b"../../../etc/passwd")), "names the storage '../../../etc/passwd'"),
    "a key that cannot be hashed": (state()[:-2] + b"]K\x01u.", "has a list as a key"),
    "a key that takes for ever to hash": (b"\x80\x02})" + b"q\x00h\x00\x86" * 60 + b"K\x01s.", "has a tuple as a key"),
}


@pytest.mark.parametrize("layout", ["zip", "legacy"])
@pytest.mark.parametrize("case", MALICIOUS)
def test_a_malicious_pickle_runs_nothing_and_is_named(case, layout, tmp_path, monkeypatch):
    program, message = MALICIOUS[case]
    path = tmp_path / "ae.pt"
    if layout == "zip":
        archive(path, program)
    else:
        legacy(path, program, {"0": bytes(16)})
    for name in ("system", "popen"):
        monkeypatch.setattr(f"os.{name}", lambda *_: RAN.append(1))
    with pytest.raises(InputError, match=message) as caught:
        torch_pickle.read(path)
    assert str(caught.value).startswith(str(path))
    assert "do not trust" in str(caught.value)
    with pytest.raises(InputError):
        pretrained.load(path)
    assert not RAN


HUGE = 2**47
ABSURD = {
    "an enormous storage": tensor(size=HUGE, shape=(HUGE,)),
    "an enormous view of a small one": tensor(size=4, shape=(HUGE,)),
    "repeated a million million times": tensor(size=4, shape=(2**20, 2**20), strides=(0, 0)),
    "beyond its end": tensor(offset=3, shape=(2,)),
    "negative strides": tensor(offset=3, shape=(4,), strides=(-1,)),
    "negative sizes": tensor(shape=(-4,)),
    "shape and strides of other lengths": tensor(shape=(2, 2), strides=(1,)),
    "a string that is longer than the file": b"X\xff\xff\xff\x7fabc",
    "bytes that are longer than the file": b"\x8e" + struct.pack("<Q", 2**60) + b"abc",
    "a memo of an enormous number": b"K\x01r\xff\xff\xff\xffj\xff\xff\xff\xfe",
    "a number of many digits": b"I" + b"9" * 4000 + b"9" * 2000 + b"\n",
}


@pytest.mark.parametrize("case", ABSURD)
def test_absurd_sizes_take_no_memory(case, tmp_path):
    path = archive(tmp_path / "ae.pt", state(ABSURD[case]))
    tracemalloc.start()
    with pytest.raises(InputError, match=r"ae\.pt: ") as caught:
        torch_pickle.read(path)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 8 << 20
    assert len(str(caught.value)) < 400


DAMAGED = {
    "no program": lambda path: zipfile.ZipFile(path, "w").writestr("ae/data/0", b"1234"),
    "two programs": lambda path: archive(path, state(tensor()), {"ae/b/data.pkl": b"."}),
    "TorchScript": lambda path: archive(path, state(), {"ae/constants.pkl": b".", "ae/code/x.py": b"import os"}),
    "big-endian": lambda path: archive(path, state(tensor()), {"ae/byteorder": b"big", "ae/data/0": bytes(16)}),
    "no storage": lambda path: archive(path, state(tensor()), {}),
    "a member that leads elsewhere": lambda path: archive(path, state(), {"ae/../../x": b"1"}),
    "a member at the root": lambda path: archive(path, state(), {"/etc/x": b"1"}),
    "a member with a drive": lambda path: archive(path, state(), {"C:\\x": b"1"}),
    "a bomb": lambda path: archive(path, state(), {"ae/data/0": bytes(1 << 24)}, zipfile.ZIP_DEFLATED),
    "no pickle": lambda path: path.write_bytes(b"\x80\x02abc"),
    "empty": lambda path: path.write_bytes(b""),
    "a tar of torch 0.1": lambda path: path.write_bytes(bytes(257) + b"ustar" + bytes(100)),
    "another magic number": lambda path: legacy(path, state(), {}, magic=7),
    "a legacy file cut off": lambda path: path.write_bytes(
        legacy(path, state(tensor()), {"0": bytes(16)}).read_bytes()[:-4]
    ),
}


@pytest.mark.parametrize("case", DAMAGED)
def test_damage_is_one_sentence_that_names_the_file(case, tmp_path):
    path = tmp_path / "ae.pt"
    DAMAGED[case](path)
    with pytest.raises(InputError) as caught:
        torch_pickle.read(path)
    text = str(caught.value)
    assert text.startswith(str(path))
    assert text.endswith(".")
    assert "\n" not in text


def test_a_checksum_that_fails_is_found(tmp_path):
    path = archive(tmp_path / "ae.pt", state(tensor()), {"ae/data/0": b"0123456789abcdef"})
    path.write_bytes(path.read_bytes().replace(b"0123456789abcdef", b"0123456789abcdeg"))
    with pytest.raises(InputError, match="does not match its checksum"):
        torch_pickle.read(path)
    assert torch_pickle.read(path, check=False)["W"].size == 4
