"""From files of text to contexts of tokens.

Documents are tokenised whole or in overlapping pieces, and cut into contexts, which are kept in a temporary file: texts
of any size take little memory.
"""

import contextlib
import random
import sys
import sysconfig
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from jaxsae._core.files import InputError
from jaxsae.language_model import chat, documents, files as model_files

_PIECE = 1 << 20  # characters tokenised at a time: a tokenizer takes some hundred bytes for each
_OVERLAP = 1 << 14  # characters that two pieces share, at first
_AGREE = 32  # tokens that must be the same in both
_TOGETHER = 1 << 22  # characters of short documents that are tokenised in parallel
_BUFFER = 1 << 20  # tokens held before they are written


class Text(NamedTuple):
    """Tokens of files, packed into contexts.

    Attributes:
      contexts: `[n s]` int32, in a temporary file, which is removed with the array.
      files: those that were read, until `tokens` was reached.
      replaced: number of characters that were not of the encoding.
      empty: number of empty files.
      replaced_at: file and byte of the first character that was not of the encoding; "" if there is none.
      documents: how many were read.
    """

    contexts: np.ndarray
    files: list[str]
    replaced: int
    empty: int
    replaced_at: str = ""
    documents: int = 0


STANDARD_LIBRARY = "the sources of Python's standard library"


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


def pack(
    files: Sequence[Path],
    tokenizer: Any,
    *,
    context: int,
    tokens: int | None = None,
    separator: int | None = None,
    column: str = "text",
    encoding: str = "utf-8",
    weights: Sequence[float] | None = None,
    template: chat.Template | None = None,
) -> Text:
    """Tokenise the documents of files, and cut them into contexts; tokens that do not fill a context are left out.

    Contexts begin with the special tokens that the tokenizer prepends to a text. Special tokens written in a document,
    such as `<|endoftext|>`, are plain text; so they are in the messages of conversations, of which a `template` makes
    text, while those that it writes itself are what they are.

    Args:
      files: plain text, JSON lines or Parquet, as `documents.read` takes them; in this order, unless weighted. Bytes
        that are not UTF-8 become U+FFFD and are counted.
      tokenizer: a `tokenizers.Tokenizer`.
      context: tokens in a context, at least 2.
      tokens: number of tokens to read, rounded up to whole contexts; all by default.
      separator: the token after each document; `<|endoftext|>` by default, if the vocabulary has it.
      column: of the text in JSON lines and Parquet.
      encoding: of plain text, unless a byte-order mark says another.
      weights: shares of the characters that are taken from each file, document by document, until it ends.
      template: of the model, as from `chat.read`, if documents are conversations.

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
    if context < max(2, 1 + len(start)):
        raise InputError(f"got contexts of {context} tokens; pass at least {max(2, 1 + len(start))}.")
    if tokens is not None and tokens < 1:
        raise InputError(f"got {tokens} tokens to read; pass at least 1.")
    if weights is not None and len(weights) != len(files):
        raise InputError(f"got {len(weights)} weights for {len(files)} files of text; pass one for each.")
    separator = tokenizer.token_to_id("<|endoftext|>") if separator is None else separator
    found, names, count = documents.Found(), {}, 0
    render = None if template is None else template.render
    read = [documents.read(file, found, column=column, encoding=encoding, render=render) for file in files]
    most = None if tokens is None else -(-tokens // context)
    with _Contexts(start, context, most) as contexts, _as_text(tokenizer):
        for document, pieces in _tokenised(_mixed(read, weights), tokenizer, contexts, template):
            names[document.file], count = None, count + 1
            written = False
            for ids in pieces:
                contexts.add(ids)
                written = written or bool(len(ids))
            if separator is not None and written:
                contexts.add(np.array([separator], np.int32))
            if contexts.full:
                break
        rows = contexts.finish(str(files[0]) if len(files) == 1 else f"{len(files)} files")
    return Text(rows, list(names), found.replaced, found.empty, found.replaced_at, count)


class _Contexts:
    """Tokens, cut into contexts in a temporary file."""

    def __init__(self, start: list[int], context: int, most: int | None):
        self._start, self._context, self._body = np.asarray(start, np.int32), context, context - len(start)
        self._most = sys.maxsize if most is None else most
        self._file, self._rows, self._held, self._count = tempfile.TemporaryFile(), 0, [], 0  # noqa: SIM115

    def __enter__(self) -> "_Contexts":
        return self

    def __exit__(self, *raised: object) -> None:
        self._file.close()  # an array keeps what it maps

    @property
    def wanted(self) -> int:
        """How many tokens are still needed."""
        return max(0, (self._most - self._rows) * self._body - self._count)

    @property
    def full(self) -> bool:
        return not self.wanted

    def add(self, ids: np.ndarray) -> None:
        self._held.append(ids)
        self._count += len(ids)
        if self._count >= _BUFFER:
            self._write()

    def _write(self) -> None:
        ids = np.concatenate([np.zeros(0, np.int32), *self._held])
        rows = ids[: len(ids) // self._body * self._body].reshape(-1, self._body)[: self._most - self._rows]
        self._held = [ids[rows.size :]]
        self._count, self._rows = len(self._held[0]), self._rows + len(rows)
        before = np.tile(self._start, (len(rows), 1))
        try:
            self._file.write(np.concatenate([before, rows], axis=1).tobytes())
            self._file.flush()
        except OSError as error:
            what = f"cannot write tokens to {tempfile.gettempdir()}: {error.strerror}"
            raise InputError(f"{what}; set TMPDIR to a place with more room.") from error

    def finish(self, files: str) -> np.ndarray:
        """All contexts, `[n s]`."""
        self._write()
        if not self._rows:
            has = f"the text has {self._count} tokens, less than a context of {self._body}"
            raise InputError(
                f"{files}: {has if self._count else 'the text is empty'}; pass more text, or a smaller --context."
            )
        return np.memmap(self._file, np.int32, "r", shape=(self._rows, self._context))


def _mixed(
    read: Sequence[Iterator[documents.Document]], weights: Sequence[float] | None
) -> Iterator[documents.Document]:
    """The documents of several files, in order, or from whichever is behind its share of the characters."""
    if weights is None:
        for each in read:
            yield from each
        return
    taken = dict.fromkeys(range(len(read)), 0.0)  # characters over weight, of files that have not ended
    while taken:
        behind = min(taken, key=taken.__getitem__)
        document = next(read[behind], None)
        if document is None:
            del taken[behind]
            continue
        yield document
        taken[behind] += document.text.reached / weights[behind]  # by now all of it, or as much as was needed


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


def _tokenised(
    read: Iterator[documents.Document], tokenizer, contexts: _Contexts, template: chat.Template | None
) -> Iterator[tuple[documents.Document, Iterator[np.ndarray]]]:
    """The tokens of each document: short ones are tokenised together, in parallel, and long ones in pieces."""
    control = model_files.control_tokens(tokenizer)
    for group in _grouped(read, contexts):
        if template is not None:
            whole = template.tokens(tokenizer, [each.text.whole() for each in group], [each.where for each in group])
            yield from ((document, iter([ids])) for document, ids in zip(group, whole, strict=True))
            continue
        if len(group) == 1:
            pieces = _tokenise(tokenizer, group[0].text, contexts.wanted)
            yield group[0], (_as_letters(piece, group[0], control).ids for piece in pieces)
            continue
        texts = [document.text[0 : document.text.reach(_PIECE)] for document in group]
        for document, encoding in zip(group, tokenizer.encode_batch(texts, add_special_tokens=False), strict=True):
            yield document, iter([_as_letters(_piece(encoding, 0), document, control).ids])


def _grouped(read: Iterator[documents.Document], contexts: _Contexts) -> Iterator[list[documents.Document]]:
    """Short documents in groups, and long ones alone, in their order; not many more than are needed."""
    group, size = [], 0
    for document in read:
        length = document.text.reach(_PIECE + 1)
        if group and (length > _PIECE or size + length > min(_TOGETHER, contexts.wanted)):
            yield group
            group, size = [], 0
        group, size = [*group, document], size + length
        if length > _PIECE:
            yield group
            group, size = [], 0
    if group:
        yield group


def _encode(tokenizer, text: documents.Characters, first: int, last: int) -> _Piece:
    return _piece(tokenizer.encode(text[first:last], add_special_tokens=False), first)


def _piece(found, first: int) -> _Piece:
    """What a tokenizer found in a text from its character `first` on."""
    places = first + np.asarray(found.offsets, np.int64).reshape(-1, 2)
    words = np.array([-1, *(-1 if word is None else word for word in found.word_ids)])
    return _Piece(np.asarray(found.ids, np.int32), places, words[1:] != words[:-1])


def _tokenise(tokenizer, text: documents.Characters, max_tokens: int) -> Iterator[_Piece]:
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
    end, count = text.reach(_PIECE), 0
    piece = _encode(tokenizer, text, 0, end)
    while text.reach(end + 1) > end and count < max_tokens:
        overlap, joint, following = _OVERLAP, None, piece
        while joint is None and 2 * overlap <= _PIECE:
            first = end - overlap
            following = _encode(tokenizer, text, first, text.reach(first + _PIECE))
            joint, overlap = _joint(piece, following, first, end, in_words=in_words), 2 * overlap
        if joint is None:
            whole = text.whole()
            found = tokenizer.encode(whole, add_special_tokens=False)
            end, piece = text.reach(len(whole)), _piece(found, 0).part(count, None)
        else:
            yield piece.part(None, joint[0])
            end, count = text.reach(end - overlap // 2 + _PIECE), count + joint[0]
            piece = following.part(joint[1], None)
            text.forget(end - _PIECE)
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


def _as_letters(piece: _Piece, document: documents.Document, control: dict[int, str]) -> _Piece:
    """The piece; refuse control tokens that are written in a document. Unknown tokens are allowed."""
    for n in np.flatnonzero(np.isin(piece.ids, list(control))):
        (first, last), name = piece.places[n], control[int(piece.ids[n])]
        if name in document.text[first:last]:
            what = f"holds {name!r} after {first} characters, which the tokenizer turns into a control token"
            raise InputError(f"{document.where}: {what}; remove it, or write it in another way.")
    return piece


def pieces(tokenizer: Any, ids: Sequence[int] | np.ndarray) -> list[str]:
    """The text of each token, with its whitespace; U+FFFD for bytes that are no whole character.

    Args:
      tokenizer: a `tokenizers.Tokenizer`.
      ids: tokens.

    Example:
      >>> import tokenizers
      >>> tokenizer = tokenizers.Tokenizer(tokenizers.models.WordLevel({"a": 0, "b": 1, "?": 2}, unk_token="?"))
      >>> pieces(tokenizer, [0, 1])
      [' a', ' b']
    """
    # Behind another token, since many decoders strip the space at the beginning of a text.
    anchor = next(
        (encoding.ids[-1] for encoding in [tokenizer.encode("a", add_special_tokens=False)] if encoding.ids), 0
    )
    before = tokenizer.decode([anchor], skip_special_tokens=False)
    found = {}
    for number in {int(each) for each in ids}:
        both = tokenizer.decode([anchor, number], skip_special_tokens=False)
        alone = tokenizer.decode([number], skip_special_tokens=False)
        found[number] = both.removeprefix(before) if both.startswith(before) else alone
    return [found[int(each)] for each in ids]
