"""The documents of files of text, read as they are needed: plain text, JSON lines and Parquet.

A file of plain text is one document; of the others, each record is. Any of them but Parquet may be compressed, `.gz` or
`.zst`. Characters are kept only as long as a tokenizer may look back at them, so that a file of any size will do.
"""

import codecs
import contextlib
import gzip
import json
import os
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

from jaxsae._core.files import InputError, in_one_line, local_path

_CHUNK = 1 << 20  # bytes read at a time
_RECORDS = 256  # of a Parquet file, read at a time
_MARKS = {  # by byte-order mark, those of four bytes first
    codecs.BOM_UTF32_LE: "utf-32-le",
    codecs.BOM_UTF32_BE: "utf-32-be",
    codecs.BOM_UTF16_LE: "utf-16-le",
    codecs.BOM_UTF16_BE: "utf-16-be",
    codecs.BOM_UTF8: "utf-8",
}
_REPLACEMENT = "\ufffd"

Render = Callable[[Any, str], str]


class Found:
    """What was found in files while they were read.

    Attributes:
      replaced: number of characters that were not of the encoding, and became U+FFFD.
      replaced_at: file and byte of the first of them; "" if there is none.
      empty: number of files without text.
    """

    def __init__(self):
        """Nothing yet."""
        self.replaced, self.replaced_at, self.empty = 0, "", 0


class Characters:
    """The characters of a document, of which only some are held at a time."""

    def __init__(self, chunks: Callable[[], Iterator[str]]):
        """Begin to read.

        Args:
          chunks: reads the document from its beginning.
        """
        self._chunks, self._left = chunks, chunks()
        self._held, self._before = "", 0

    def reach(self, n: int) -> int:
        """Read up to `n` characters from the beginning; the number that there are."""
        parts = [self._held]
        while self._left is not None and sum(map(len, parts)) + self._before < n:
            part = next(self._left, None)
            self._left = None if part is None else self._left
            parts.append(part or "")
        self._held = "".join(parts)
        return min(n, self._before + len(self._held))

    @property
    def reached(self) -> int:
        """How many characters have been read."""
        return self._before + len(self._held)

    def __getitem__(self, span: slice) -> str:
        """Characters that have been reached, and not forgotten."""
        return self._held[span.start - self._before : span.stop - self._before]

    def forget(self, n: int) -> None:
        """Let go of the first `n` characters."""
        drop = max(0, n - self._before)
        self._held, self._before = self._held[drop:], self._before + drop

    def whole(self) -> str:
        """All of the document."""
        return "".join(self._chunks())


class Document(NamedTuple):
    """A document.

    Attributes:
      file: that it is in.
      where: the file, and the record in it, for messages.
      text: its characters.
    """

    file: str
    where: str
    text: Characters


def read(
    file: Path, found: Found, *, column: str = "text", encoding: str = "utf-8", render: Render | None = None
) -> Iterator[Document]:
    """Read the documents of a file.

    Args:
      file: `.jsonl`, `.ndjson`, `.parquet`, or any other name for plain text; before `.gz` or `.zst`, if compressed.
      found: what is found is added to it.
      column: of the text in JSON lines and Parquet.
      encoding: of plain text, unless a byte-order mark says another.
      render: makes text of a record that is not text, given also where it is.

    Raises:
      InputError: if the file cannot be read, is truncated or damaged, has no such column, or holds no text.

    Example:
      >>> import tempfile
      >>> with tempfile.TemporaryDirectory() as folder:
      ...     path = Path(folder, "x.jsonl")
      ...     _ = path.write_text('{"text": "one"}\\n{"text": "two"}\\n')
      ...     [document.text.whole() for document in read(path, Found())]
      ['one', 'two']
    """
    kind = (file.with_suffix("") if file.suffix in (".gz", ".zst") else file).suffix
    with _failures(file):
        if kind in (".jsonl", ".ndjson"):
            yield from _records(file, column, render or _text)
        elif kind == ".parquet":
            yield from _parquet(file, column, render or _text)
        elif render is not None:
            raise InputError(f"{file}: is plain text, expected conversations, in JSON lines or Parquet; pass those.")
        else:
            text = Characters(lambda: _plain(file, encoding, found))
            found.empty += not text.reach(1)
            yield Document(str(file), str(file), text)


@contextlib.contextmanager
def _failures(file: Path) -> Iterator[None]:
    try:
        yield
    except InputError:
        raise
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        raise InputError(f"{file}: is truncated or damaged; get the file again.") from error
    except OSError as error:
        raise InputError(f"{file}: {error.strerror or error}; pass files of text.") from error


def _bytes(file: Path) -> Iterator[bytes]:
    """The bytes of a file, decompressed, in chunks that are not empty."""
    with contextlib.ExitStack() as stack:
        opened: Any = stack.enter_context(local_path(file).open("rb"))
        if file.suffix == ".zst":
            yield from _zstandard(file, opened)
            return
        if file.suffix == ".gz":
            opened = stack.enter_context(gzip.open(opened))
        while chunk := opened.read(_CHUNK):
            yield chunk


def _zstandard(file: Path, opened) -> Iterator[bytes]:
    zstandard = _library("zstandard", file)
    frame = None
    while chunk := opened.read(_CHUNK):
        while chunk:
            frame = zstandard.ZstdDecompressor().decompressobj() if frame is None else frame
            with in_one_line(f"{file}: is damaged", "get the file again"):
                content = frame.decompress(chunk)
            if content:
                yield content
            chunk, frame = (frame.unused_data, None) if frame.eof else (b"", frame)
    if frame is not None:  # its library would not say so
        raise InputError(f"{file}: is truncated or damaged; get the file again.")


def _library(name: str, file: Path) -> Any:
    try:
        return __import__(name)
    except ImportError as error:
        raise InputError(f"{file}: needs {name}, which is missing; pip install 'jaxsae[text]'.") from error


def _plain(file: Path, encoding: str, found: Found) -> Iterator[str]:
    """The characters of plain text."""
    with _failures(file):
        chunks = _bytes(file)
        first = next(chunks, b"")
        while 0 < len(first) < 4 and (more := next(chunks, b"")):
            first += more
        mark = next((mark for mark in _MARKS if first.startswith(mark)), b"")
        encoding, at, count = _MARKS.get(mark, encoding), len(mark), 0
        decoder = _decoder(encoding, file)
        for chunk in _and_end(first[len(mark) :], chunks):
            pending = decoder.getstate()[0]
            try:
                text = decoder.decode(chunk, final=not chunk)
            except UnicodeDecodeError as error:
                where = f"{file}, byte {at - len(pending) + error.start}"
                said = "as its byte-order mark says" if mark else "as --encoding says"
                raise InputError(f"{where}: is not {encoding}, {said}; convert it to UTF-8.") from error
            if decoder.errors == "replace" and _REPLACEMENT in text:
                _count_replaced(pending + chunk, text, found, file, at - len(pending))
            if "\0" in text:
                what = f"holds NULs, the first after {count + text.index(chr(0))} characters"
                raise InputError(f"{file}: {what}; expected text: convert it to UTF-8.")
            at, count = at + len(chunk), count + len(text)
            yield text


def _and_end(first: bytes, chunks: Iterator[bytes]) -> Iterator[bytes]:
    """Chunks, and an empty one at the end."""
    if first:
        yield first
    yield from chunks
    yield b""


def _decoder(encoding: str, file: Path):
    """Of UTF-8, what is wrong is replaced; in others it is an error."""
    try:
        made = codecs.getincrementaldecoder(encoding)
        return made("replace" if codecs.lookup(encoding).name == "utf-8" else "strict")
    except LookupError as error:
        raise InputError(f"{file}: got encoding {encoding!r}; pass one that Python knows, such as latin-1.") from error


def _count_replaced(content: bytes, text: str, found: Found, file: Path, at: int) -> None:
    # A sequence that is cut off at the end is counted once the decoder replaces it.
    bad = text.count(_REPLACEMENT) - content.count(_REPLACEMENT.encode())
    if bad > 0 and not found.replaced_at:
        try:
            content.decode()
        except UnicodeDecodeError as error:
            found.replaced_at = f"{file}, byte {at + error.start}"
    found.replaced += max(0, bad)


def _text(value: Any, where: str) -> str:
    """A record that is text."""
    if not isinstance(value, str):
        raise InputError(f"{where}: has a {type(value).__name__}, expected text; pass --column.")
    if "\0" in value:
        raise InputError(f"{where}: holds NULs; expected text.")
    return value


def _records(file: Path, column: str, render: Render) -> Iterator[Document]:
    """The records of JSON lines."""
    for number, line in enumerate(_lines(file), 1):
        if not line.strip():
            continue
        where = f"{file}, line {number}"
        try:
            record = json.loads(line)
        except ValueError as error:
            raise InputError(f"{where}: is not JSON; get the file again, or name plain text .txt.") from error
        if not isinstance(record, dict) or record.get(column) is None:
            has = f"has {', '.join(map(repr, list(record)[:8]))}" if isinstance(record, dict) else "is no object"
            raise InputError(f"{where}: {has}, expected a text in {column!r}; pass --column.")
        yield _document(file, where, render(record[column], where))


def _lines(file: Path) -> Iterator[bytes]:
    rest = b""
    for chunk in _bytes(file):
        *lines, rest = (rest + chunk).split(b"\n")
        yield from lines
    if rest:
        yield rest


def _parquet(file: Path, column: str, render: Render) -> Iterator[Document]:
    _library("pyarrow", file)
    from pyarrow import ArrowException, parquet

    local, number = local_path(file), 0
    os.stat(local)
    try:
        with parquet.ParquetFile(local) as opened:
            names = opened.schema_arrow.names
            if column not in names:
                has = f"has {', '.join(map(repr, names[:8]))}"
                raise InputError(f"{file}: {has}, and no {column!r}; pass --column.")
            for batch in opened.iter_batches(_RECORDS, columns=[column]):
                for value in batch.column(0).to_pylist():
                    number += 1
                    where = f"{file}, row {number}"
                    yield _document(file, where, render(value, where))
    except (ArrowException, OSError) as error:
        raise InputError(f"{file}: is damaged or no Parquet file; get the file again.") from error


def _document(file: Path, where: str, text: str) -> Document:
    return Document(str(file), where, Characters(lambda: iter([text])))
