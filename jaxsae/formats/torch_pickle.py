"""Files of `torch.save`, read and written without torch, and without executing them.

A pickle is a program. This is an interpreter for the few instructions that plain containers and tensors need; names in
a pickle are compared with those of a few known functions, never imported or called. Storages are mapped into memory,
and a tensor is a view of one whose bounds were checked.
"""

import dataclasses
import math
import pickletools
import struct
import zipfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import ml_dtypes
import numpy as np

from jaxsae._core.files import InputError, in_one_line
from jaxsae.formats.tensors import map_file, read_zip, writable

_DTYPES = {
    "DoubleStorage": np.float64,
    "FloatStorage": np.float32,
    "HalfStorage": np.float16,
    "BFloat16Storage": ml_dtypes.bfloat16,
    "LongStorage": np.int64,
    "IntStorage": np.int32,
    "ShortStorage": np.int16,
    "CharStorage": np.int8,
    "ByteStorage": np.uint8,
    "BoolStorage": np.bool_,
}
_LEGACY_MAGIC = 0x1950A86A20F9469CFC6C
_MAX_REPEATED = 1 << 24  # elements of a tensor that repeats its storage, as `expand` makes them
_KEYS = (str, int, float, bool, type(None))


@dataclasses.dataclass(frozen=True)
class _Name:
    """A name in a pickle, never imported."""

    name: str


class _Storage(NamedTuple):
    dtype: np.dtype
    key: str
    size: int  # elements
    offset: int  # elements, in the storage that it is a view of


class _Mark:
    """Where a container's items begin on the stack."""


def read(path: Path, *, check: bool = True) -> Any:
    """Read what `torch.save` wrote: containers, with memory-mapped numpy arrays in place of tensors.

    Args:
      path: the file, in the zip layout of torch 1.6 or the one before.
      check: compare storages with their checksums, where the layout has them.

    Raises:
      InputError: if it is damaged, or holds anything other than tensors, numbers, strings and plain containers.

    Example:
      >>> import tempfile
      >>> with tempfile.TemporaryDirectory() as folder:
      ...     write(Path(folder, "x.pt"), {"k": 2, "W": np.eye(2)})
      ...     {name: np.shape(thing) for name, thing in read(Path(folder, "x.pt")).items()}
      {'k': (), 'W': (2, 2)}
    """
    data = map_file(path)
    with in_one_line(f"{path}: is damaged or not a file of torch.save", "download it again"):
        try:
            return _read_zip(path, check) if data[:2] == b"PK" else _read_legacy(path, data)
        except _Refused as error:
            raise InputError(f"{path}: {error}; do not trust this file, or save only its tensors.") from error


class _Refused(Exception):
    """A pickle asks for something other than data."""


def _missing(key: str) -> _Refused:
    return _Refused(f"names the storage {key!r}, which it does not hold")


def _read_zip(path: Path, check: bool) -> Any:
    members = read_zip(path, check=check)
    (program,) = [name for name in members if name.endswith("/data.pkl")] or [""]
    if not program:
        raise InputError(f"{path}: has no data.pkl, expected a file of torch.save; export it with torch.save.")
    folder = program.removesuffix("data.pkl")
    if f"{folder}constants.pkl" in members or any(name.startswith(f"{folder}code/") for name in members):
        raise _Refused("is TorchScript, which is code")
    if bytes(members.get(f"{folder}byteorder", memoryview(b"little"))) != b"little":
        raise InputError(f"{path}: is big-endian, expected little-endian; save it on another machine.")

    inside = f"{folder}data/"
    storages = {name.removeprefix(inside): content for name, content in members.items() if name.startswith(inside)}
    return _Interpreter(storages).run(_Bytes(members[program]))


def _read_legacy(path: Path, data: memoryview) -> Any:
    file = _Bytes(data)
    if bytes(data[257:262]) == b"ustar":
        raise InputError(f"{path}: is of torch before 0.4, expected a later one; load and save it with a later one.")
    magic, protocol, system = (_Interpreter().run(file) for _ in range(3))
    if (magic, protocol) != (_LEGACY_MAGIC, 1001) or not isinstance(system, dict):
        raise ValueError("it does not begin like one")
    if system.get("little_endian") is not True:
        raise InputError(f"{path}: is big-endian, expected little-endian; save it on another machine.")
    # Storages come after the program that names them: tensors are made once these are known.
    at, first = file.tell(), _Interpreter()
    first.run(file)
    storages, keys = {}, [str(key) for key in _Interpreter().run(file)]
    if missing := first.widths.keys() - set(keys):
        raise _missing(min(missing))
    for key in keys:
        (count,) = struct.unpack("<q", file.read(8))
        if count < 0:
            raise ValueError(f"storage {key} has {count} elements")
        storages[key] = file.take(count * first.widths[key])
    file.seek(at)
    return _Interpreter(storages).run(file)


class _Bytes:
    """A file over mapped memory, for pickletools; reads stop at its end."""

    def __init__(self, data: memoryview):
        self.data, self.at = data, 0

    def read(self, size: int) -> bytes:
        return bytes(self._next(size))

    def take(self, size: int) -> memoryview:
        """The next bytes, still mapped."""
        taken = self._next(size)
        if len(taken) < size:
            raise EOFError(f"the file ends {size - len(taken)} bytes too soon")
        return taken

    def readline(self) -> bytes:
        # Names and numbers as text are short.
        part = bytes(self.data[self.at : self.at + 4096])
        end = part.find(b"\n") + 1
        return self.read(end or len(part))

    def tell(self) -> int:
        return self.at

    def seek(self, at: int) -> None:
        self.at = at

    def _next(self, size: int) -> memoryview:
        part = self.data[self.at : self.at + size] if size > 0 else memoryview(b"")
        self.at += len(part)
        return part


class _Interpreter:
    """Interpreter of one pickle; without storages, tensors are None, and only the widths of elements are found."""

    def __init__(self, storages: Mapping[str, memoryview] | None = None):
        self.storages = storages
        self.widths: dict[str, int] = {}

    def run(self, file: _Bytes) -> Any:
        """Return the object of a pickle; the file is left at the end of the pickle."""
        stack: list[Any] = []
        memo: dict[int, Any] = {}
        argument: Any
        for opcode, argument, _ in pickletools.genops(file):  # pyright: ignore[reportArgumentType]
            name = opcode.name
            if name == "STOP":
                return stack.pop()
            if name in _CONSTANTS:
                stack.append(_CONSTANTS[name]())
            elif name in _LITERALS:
                stack.append(argument)
            elif name in ("PUT", "BINPUT", "LONG_BINPUT"):
                memo[argument] = stack[-1]
            elif name == "MEMOIZE":
                memo[len(memo)] = stack[-1]
            elif name in ("GET", "BINGET", "LONG_BINGET"):
                stack.append(memo[argument])
            elif name in ("GLOBAL", "STACK_GLOBAL"):
                parts = reversed([stack.pop(), stack.pop()]) if name == "STACK_GLOBAL" else argument.split(" ")
                stack.append(_Name(".".join(parts)))
            elif name in _ACTIONS:
                _ACTIONS[name](stack)
            elif name == "REDUCE":
                arguments = stack.pop()
                stack.append(self._reduce(stack.pop(), arguments))
            elif name == "BINPERSID":
                stack.append(self._persistent(stack.pop()))
            elif name in ("NEWOBJ", "NEWOBJ_EX", "OBJ", "INST"):
                made = argument.replace(" ", ".") if argument else next(n.name for n in stack[::-1] if type(n) is _Name)
                raise _Refused(f"makes {made}")
            elif name not in ("PROTO", "FRAME"):
                raise _Refused(f"uses the pickle instruction {name}, which no tensor needs")
        raise EOFError("the pickle does not end")

    def _persistent(self, identity: Any) -> _Storage:
        if not isinstance(identity, tuple) or len(identity) not in (5, 6):
            raise _Refused(f"refers to {_short(identity)}, which is not a storage")
        kind, storage_type, key, _, size, *view = identity
        name = storage_type.name if isinstance(storage_type, _Name) else ""
        module, _, storage_name = name.rpartition(".")
        if kind != "storage" or module != "torch" or storage_name not in _DTYPES:
            raise _Refused(f"refers to {_short(storage_type)}, which is not a storage of numbers")
        offset = 0
        if view and view[0] is not None:
            _, offset, size = view[0]
        if not (isinstance(size, int) and isinstance(offset, int) and size >= 0 and offset >= 0):
            raise ValueError(f"a storage of {_short(size)} elements at {_short(offset)}")
        if not isinstance(key, str | int):
            raise ValueError(f"a storage named {_short(key)}")
        storage = _Storage(np.dtype(_DTYPES[storage_name]), str(key), size, offset)
        self.widths.setdefault(storage.key, storage.dtype.itemsize)
        return storage

    def _reduce(self, function: Any, arguments: Any) -> Any:
        name = function.name if isinstance(function, _Name) else None
        if name is None or not isinstance(arguments, tuple):
            raise _Refused(f"calls {_short(function)}")
        if name == "collections.OrderedDict" and not arguments:
            return {}
        if name in ("torch._utils._rebuild_tensor", "torch._utils._rebuild_tensor_v2"):
            if len(arguments) > 6 and arguments[6]:  # for example, that its values are negated
                raise _Refused("makes a tensor whose values are not those in its storage")
            return self._tensor(*arguments[:4])
        if name == "torch._utils._rebuild_parameter" and isinstance(arguments[0], np.ndarray | type(None)):
            return arguments[0]
        if name == "torch.Size" and len(arguments) == 1 and isinstance(arguments[0], tuple | list):
            return arguments[0]
        if name == "torch.device":
            return arguments
        raise _Refused(f"calls {name}")

    def _tensor(self, storage: Any, offset: Any, shape: Any, strides: Any) -> np.ndarray | None:
        if not isinstance(storage, _Storage):
            raise _Refused(f"makes a tensor of {_short(storage)}")
        if self.storages is None:
            return None
        if storage.key not in self.storages:
            raise _missing(storage.key)
        content = self.storages[storage.key]
        numbers = [offset, *shape, *strides]
        if len(shape) != len(strides) or not all(type(n) is int and 0 <= n < 2**48 for n in numbers) or len(shape) > 8:
            raise ValueError(f"a tensor of shape {_short(shape)} and strides {_short(strides)} at {_short(offset)}")
        width = storage.dtype.itemsize
        content = content[storage.offset * width : (storage.offset + storage.size) * width]
        if len(content) != storage.size * width:
            raise ValueError(
                f"storage {storage.key} should have {storage.size:,} elements, but has {len(content):,} bytes"
            )
        count = math.prod(shape)
        last = offset + sum((n - 1) * stride for n, stride in zip(shape, strides, strict=True)) if count else 0
        if last >= max(storage.size, 1) or (count and not storage.size):
            raise ValueError(f"a tensor of shape {shape} and strides {strides} in {storage.size:,} elements")
        if count > max(storage.size, _MAX_REPEATED):
            raise ValueError(f"a tensor of {count:,} elements that repeats {storage.size:,}")
        flat = np.frombuffer(content, storage.dtype)[offset:] if count else np.empty(0, storage.dtype)
        steps = tuple(width * stride for stride in strides)
        return np.lib.stride_tricks.as_strided(flat, shape, steps, writeable=False)


def _short(thing: Any) -> str:
    """A short description of an object in a pickle."""
    if isinstance(thing, _Name):
        return thing.name
    # Containers may hold one another: their repr could take forever.
    text = repr(thing) if isinstance(thing, _KEYS) else f"a {type(thing).__name__}"
    return text if len(text) < 60 else f"{text[:57]}..."


def _items(stack: list[Any]) -> list[Any]:
    """Pop everything above the last mark."""
    at = len(stack) - 1
    while not isinstance(stack[at], _Mark):
        at -= 1
        if at < 0:
            raise IndexError("an unmarked container")
    items = stack[at + 1 :]
    del stack[at:]
    return items


def _pop(stack: list[Any], count: int) -> list[Any]:
    return [stack.pop() for _ in range(count)][::-1]


def _update(stack: list[Any], items: list[Any]) -> None:
    """Set items, given as alternating keys and values."""
    if not isinstance(stack[-1], dict):
        raise _Refused(f"sets items of {_short(stack[-1])}")
    for key, value in zip(items[::2], items[1::2], strict=True):
        if not isinstance(key, _KEYS):  # nested tuples can take forever to hash
            raise _Refused(f"has {_short(key)} as a key")
        stack[-1][key] = value


def _extend(stack: list[Any], items: list[Any]) -> None:
    if not isinstance(stack[-1], list):
        raise _Refused(f"appends to {_short(stack[-1])}")
    stack[-1].extend(items)


def _build(stack: list[Any]) -> None:
    """Discard the attributes of an object: those of a state dict are versions of its modules, and are not used."""
    stack.pop()
    if not isinstance(stack[-1], dict):
        raise _Refused(f"sets attributes of {_short(stack[-1])}")


_CONSTANTS: dict[str, Callable[[], Any]] = {
    "NONE": lambda: None,
    "NEWTRUE": lambda: True,
    "NEWFALSE": lambda: False,
    "EMPTY_TUPLE": lambda: (),
    "EMPTY_LIST": list,
    "EMPTY_DICT": dict,
    "MARK": _Mark,
}
_LITERALS = (
    *("INT", "BININT", "BININT1", "BININT2", "LONG", "LONG1", "LONG4", "FLOAT", "BINFLOAT"),
    *("STRING", "BINSTRING", "SHORT_BINSTRING", "BINBYTES", "SHORT_BINBYTES"),
    *("UNICODE", "BINUNICODE", "SHORT_BINUNICODE", "BINUNICODE8"),
)
_ACTIONS: dict[str, Callable[[list[Any]], None]] = {
    "TUPLE": lambda stack: stack.append(tuple(_items(stack))),
    "TUPLE1": lambda stack: stack.append(tuple(_pop(stack, 1))),
    "TUPLE2": lambda stack: stack.append(tuple(_pop(stack, 2))),
    "TUPLE3": lambda stack: stack.append(tuple(_pop(stack, 3))),
    "LIST": lambda stack: stack.append(_items(stack)),
    "SETITEM": lambda stack: _update(stack, _pop(stack, 2)),
    "SETITEMS": lambda stack: _update(stack, _items(stack)),
    "APPEND": lambda stack: _extend(stack, _pop(stack, 1)),
    "APPENDS": lambda stack: _extend(stack, _items(stack)),
    "BUILD": _build,
    "POP": list.pop,
}


# --- writing


def write(path: Path, thing: Any) -> None:
    """Write containers, numbers, strings and numpy arrays so that `torch.load` reads arrays as tensors.

    Args:
      path: the file, in the zip layout.
      thing: dicts, lists, tuples, None, bools, ints, floats, strings, and arrays of a dtype that torch has.

    Raises:
      TypeError: if it holds anything else.

    Example:
      >>> import tempfile
      >>> with tempfile.TemporaryDirectory() as folder:
      ...     write(Path(folder, "x.pt"), {"W": np.zeros((2, 3), np.float32)})
      ...     read(Path(folder, "x.pt"))["W"].dtype
      dtype('float32')
    """
    storages: list[np.ndarray] = []
    program = b"\x80\x02" + _emit(thing, storages) + b"."
    contents = {"data.pkl": program, "byteorder": b"little"}
    contents |= {f"data/{key}": array.data.cast("B") for key, array in enumerate(storages)}
    with zipfile.ZipFile(path, "w", zipfile.ZIP_STORED) as archive:
        for name, content in (contents | {"version": b"3\n"}).items():
            with archive.open(zipfile.ZipInfo(f"archive/{name}"), "w", force_zip64=len(content) >= 2**31) as file:
                file.write(content)


def _emit(thing: Any, storages: list[np.ndarray]) -> bytes:
    """The instructions that build an object."""
    if thing is None or isinstance(thing, bool):
        return {None: b"N", True: b"\x88", False: b"\x89"}[thing]
    if isinstance(thing, int):
        return b"\x8a\x09" + thing.to_bytes(9, "little", signed=True)
    if isinstance(thing, float):
        return b"G" + struct.pack(">d", thing)
    if isinstance(thing, str):
        return b"X" + struct.pack("<I", len(thing.encode())) + thing.encode()
    if isinstance(thing, _Name):
        module, _, name = thing.name.rpartition(".")
        return f"c{module}\n{name}\n".encode()
    if isinstance(thing, tuple):
        return b"(" + _emit_all(thing, storages) + b"t"
    if isinstance(thing, list):
        return b"](" + _emit_all(thing, storages) + b"e"
    if isinstance(thing, dict):
        return b"}(" + _emit_all([each for item in thing.items() for each in item], storages) + b"u"
    if not isinstance(thing, np.ndarray):
        raise TypeError(
            f"got {type(thing).__name__}, which torch_pickle.write does not write; pass arrays and containers."
        )
    return _emit_tensor(writable(thing), storages)


def _emit_all(things: Sequence[Any], storages: list[np.ndarray]) -> bytes:
    return b"".join(_emit(each, storages) for each in things)


def _emit_tensor(array: np.ndarray, storages: list[np.ndarray]) -> bytes:
    kind = next(name for name, dtype in _DTYPES.items() if array.dtype == dtype)
    identity = ("storage", _Name(f"torch.{kind}"), str(len(storages)), "cpu", array.size)
    storages.append(array.reshape(-1).view(np.uint8))
    strides = tuple(stride // array.itemsize for stride in array.strides)
    rebuild = _emit(_Name("torch._utils._rebuild_tensor_v2"), storages)
    hooks = _emit(_Name("collections.OrderedDict"), storages) + b")R"
    rest = _emit_all((0, array.shape, strides, False), storages)
    return rebuild + b"(" + _emit(identity, storages) + b"Q" + rest + hooks + b"tR"
