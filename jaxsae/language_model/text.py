"""From files of text to contexts of tokens."""

import codecs
import contextlib
import random
import sys
import sysconfig
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from jaxsae._core.files import InputError, local_path
from jaxsae.language_model import files as model_files

_PIECE = 1 << 20  # characters tokenised at a time: a tokenizer takes some hundred bytes for each
_OVERLAP = 1 << 14  # characters that two pieces share, at first
_AGREE = 32  # tokens that must be the same in both
_ENCODINGS = {  # by byte-order mark, those of four bytes first
    codecs.BOM_UTF32_LE: "utf-32-le",
    codecs.BOM_UTF32_BE: "utf-32-be",
    codecs.BOM_UTF16_LE: "utf-16-le",
    codecs.BOM_UTF16_BE: "utf-16-be",
    codecs.BOM_UTF8: "utf-8",
}


class Text(NamedTuple):
    """Tokens of files, packed into contexts.

    Attributes:
      contexts: `[n s]` int32.
      files: those that were read, until `tokens` was reached.
      replaced: number of characters that were not UTF-8.
      empty: number of empty files.
      replaced_at: file and byte of the first character that was not UTF-8; "" if there is none.
    """

    contexts: np.ndarray
    files: list[str]
    replaced: int
    empty: int
    replaced_at: str = ""


def standard_library() -> list[Path]:
    """The sources of Python's standard library, without its tests, shuffled: a text available on every machine.

    Example:
      >>> standard_library()[0].suffix
      '.py'
    """
    root = Path(sysconfig.get_path("stdlib"))
    left_out = {"site-packages", "dist-packages", "test", "tests", "idlelib", "__pycache__"}
    files = [file for file in sorted(root.rglob("*.py")) if not left_out & set(file.relative_to(root).parts)]
    random.Random(0).shuffle(files)
    return files


def pack(files: Sequence[Path], tokenizer: Any, *, context: int, tokens: int | None = None) -> Text:
    """Tokenise files in order, and cut them into contexts; tokens that do not fill a context are left out.

    Files are separated by `<|endoftext|>` if the vocabulary has it, and contexts begin with the special tokens that the
    tokenizer prepends to a text. Special tokens written in a file, such as `<|endoftext|>`, are plain text.

    Args:
      files: text, in this order: UTF-8, or UTF-16 or UTF-32 if a byte-order mark, which is dropped, says so.
        Bytes that are not UTF-8 become U+FFFD and are counted.
      tokenizer: a `tokenizers.Tokenizer`.
      context: tokens in a context, at least 2.
      tokens: number of tokens to read, rounded up to whole contexts; all by default.

    Raises:
      InputError: if a file cannot be read, holds NULs or text that the tokenizer turns into a control token, or if the
        files do not fill a context.

    Example:
      >>> import tempfile, tokenizers
      >>> tokenizer = tokenizers.Tokenizer(tokenizers.models.WordLevel({"a": 0, "b": 1, "?": 2}, unk_token="?"))
      >>> tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
      >>> with tempfile.TemporaryDirectory() as folder:
      ...     _ = Path(folder, "x.txt").write_text("a b b a b")
      ...     pack([Path(folder, "x.txt")], tokenizer, context=2).contexts.tolist()
      [[0, 1], [1, 0]]
    """
    start = model_files.start(tokenizer)
    body = context - len(start)
    if body < 1 or context < 2:
        raise InputError(f"got contexts of {context} tokens; pass at least {max(2, 1 + len(start))}.")
    if tokens is not None and tokens < 1:
        raise InputError(f"got {tokens} tokens to read; pass at least 1.")
    control = {id: token.content for id, token in tokenizer.get_added_tokens_decoder().items() if token.special}
    separator = tokenizer.token_to_id("<|endoftext|>")
    control |= {} if separator is None else {separator: "<|endoftext|>"}
    wanted = sys.maxsize if tokens is None else -(-tokens // context) * body
    parts, count, found = [], 0, Text(np.zeros((0, context), np.int32), [], 0, 0)
    with _as_text(tokenizer):
        for file in files:
            if count >= wanted:
                break
            text, bad, at = _read(file)
            found = found._replace(
                files=[*found.files, str(file)],
                replaced=found.replaced + bad,
                empty=found.empty + (not text),
                replaced_at=found.replaced_at or at,
            )
            for piece in _tokenise(tokenizer, text, wanted - count):
                _require_text(piece, text, control, file)
                parts.append(piece.ids)
                count += len(piece.ids)
            if separator is not None and text:
                parts.append(np.array([separator], np.int32))
                count += 1
    ids = np.concatenate([np.zeros(0, np.int32), *parts])[:wanted]
    rows = ids[: len(ids) // body * body].reshape(-1, body)
    if not len(rows):
        what = "the text is empty" if not len(ids) else f"the text has {len(ids)} tokens, less than a context of {body}"
        names = str(files[0]) if len(files) == 1 else f"{len(files)} files"
        raise InputError(f"{names}: {what}; pass more text, or a smaller --context.")
    before = np.tile(np.asarray(start, np.int32), (len(rows), 1))
    return found._replace(contexts=np.concatenate([before, rows], axis=1))


def _read(file: Path) -> tuple[str, int, str]:
    """A file's text, how many of its characters were not UTF-8, and where the first was."""
    try:
        content = local_path(file).read_bytes()
    except OSError as error:
        raise InputError(f"{file}: {error.strerror}; pass files of text.") from error
    mark = next((mark for mark in _ENCODINGS if content.startswith(mark)), b"")
    encoding, content = _ENCODINGS.get(mark, "utf-8"), content[len(mark) :]
    bad, at = 0, ""
    try:
        text = content.decode(encoding)
    except UnicodeDecodeError as error:
        at = f"{file}, byte {len(mark) + error.start}"
        if encoding != "utf-8":
            raise InputError(f"{at}: is not {encoding}, as its byte-order mark says; convert it to UTF-8.") from error
        text = content.decode(errors="replace")
        bad = text.count("\ufffd") - content.count("\ufffd".encode())
    if "\0" in text:
        where = text.index("\0")
        raise InputError(f"{file}: holds NULs, the first after {where} characters; expected text: convert it to UTF-8.")
    return text, bad, at


# --- Tokens


@contextlib.contextmanager
def _as_text(tokenizer) -> Iterator[None]:
    """Make a tokenizer read special tokens as plain text, without truncation or padding.

    The tokenizer itself is changed: copying goes through JSON, which rounds the scores of Unigram.
    """
    before = tokenizer.encode_special_tokens, tokenizer.truncation, tokenizer.padding
    tokenizer.encode_special_tokens = True
    tokenizer.no_truncation()
    tokenizer.no_padding()
    try:
        yield
    finally:
        tokenizer.encode_special_tokens, truncation, padding = before
        if truncation is not None:
            tokenizer.enable_truncation(**truncation)
        if padding is not None:
            tokenizer.enable_padding(**padding)


class _Piece(NamedTuple):
    """Tokens of a part of a text; the characters of each, `[n 2]`, counted from the beginning of the text; and which of
    them begin a word.
    """

    ids: np.ndarray
    places: np.ndarray
    first: np.ndarray

    def part(self, first: int | None, last: int | None) -> "_Piece":
        return _Piece(*(each[first:last] for each in self))


def _encode(tokenizer, text: str, first: int, last: int) -> _Piece:
    found = tokenizer.encode(text[first:last], add_special_tokens=False)
    places = first + np.asarray(found.offsets, np.int64).reshape(-1, 2)
    words = np.array([-1, *(-1 if word is None else word for word in found.word_ids)])
    return _Piece(np.asarray(found.ids, np.int32), places, words[1:] != words[:-1])


def _tokenise(tokenizer, text: str, max_tokens: int) -> Iterator[_Piece]:
    """The tokens of a text as if tokenised whole, or at least the first `max_tokens`; a long text is read in pieces.

    Pieces overlap, and are joined where a word begins in both, among tokens that are the same and far from the ends of
    either. Artefacts at the ends of a piece, such as half a word or the "▁" that SentencePiece prepends, then have no
    effect: a tokenizer splits off words from left to right, and the tokens of a word depend on that word only. For
    byte-pair encoding the whole text may be one word, but its merges are as local. (Unigram's paths are not: equal
    ones differ by the rounding of sums over the word.) If pieces disagree they overlap by more; if they never agree,
    the text is tokenised whole.
    """
    from tokenizers import models

    in_words = isinstance(tokenizer.model, models.BPE)
    end, count = min(_PIECE, len(text)), 0
    piece = _encode(tokenizer, text, 0, end)
    while end < len(text) and count < max_tokens:
        overlap, joint, following = _OVERLAP, None, piece
        while joint is None and 2 * overlap <= _PIECE:
            following = _encode(tokenizer, text, end - overlap, end - overlap + _PIECE)
            joint, overlap = _joint(piece, following, end - overlap, end, in_words=in_words), 2 * overlap
        if joint is None:
            end, piece = len(text), _encode(tokenizer, text, 0, len(text)).part(count, None)
        else:
            yield piece.part(None, joint[0])
            end, count = min(end - overlap // 2 + _PIECE, len(text)), count + joint[0]
            piece = following.part(joint[1], None)
    if count < max_tokens:
        yield piece


def _joint(piece: _Piece, following: _Piece, first: int, last: int, *, in_words: bool) -> tuple[int, int] | None:
    """Indices of one token in two pieces that share the characters from `first` to `last`; None if they disagree.

    The token begins a word; with `in_words` it may be inside one if none begins there.
    """
    margin = (last - first) // 4

    def shared(tokens):
        inside = (tokens.places[:, 0] >= first + margin) & (tokens.places[:, 1] <= last - margin)
        begin, count = int(np.argmax(inside)), int(np.count_nonzero(inside))
        return begin, tokens.part(begin, begin + count)

    (begin, ours), (other, theirs) = shared(piece), shared(following)
    places = np.flatnonzero(ours.first) if ours.first.any() or not in_words else np.arange(len(ours.ids))
    same = len(ours.ids) == len(theirs.ids) and all(map(np.array_equal, ours, theirs))
    if not same or len(ours.ids) < _AGREE or not len(places):
        return None
    middle = int(places[len(places) // 2])
    return begin + middle, other + middle


def _require_text(piece: _Piece, text: str, control: dict[int, str], file: Path) -> None:
    """Refuse control tokens that are written in a text; unknown tokens are allowed."""
    for n in np.flatnonzero(np.isin(piece.ids, list(control))):
        (first, last), name = piece.places[n], control[int(piece.ids[n])]
        if name in text[first:last]:
            what = f"holds {name!r} after {first} characters, which the tokenizer turns into a control token"
            raise InputError(f"{file}: {what}; remove it, or write it in another way.")
