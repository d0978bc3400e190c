"""Documents of every kind of file are the same documents, in little memory, and what is damaged is refused."""

import gzip
import io
import json
from pathlib import Path

import numpy as np
import pytest
from problems import cli, refused

from jaxsae._core.files import InputError
from jaxsae.data import open_rows
from jaxsae.language_model import documents, files, text as texts

MODEL = Path(__file__).parent / "language_models" / "llama"
END = 256  # <|endoftext|>; every byte is a token of its own
WRITTEN = ["The quick — 日本語 🙂 fox\n", "", 'two\nlines, "quoted"', "x" * 300, "dog"]


def tokenizer():
    return files.read_tokenizer(MODEL)


def compressed(content, suffix):
    if suffix == ".gz":
        return gzip.compress(content)
    if suffix == ".zst":
        zstandard = pytest.importorskip("zstandard")
        frames = [content[: len(content) // 2], content[len(content) // 2 :]]  # zstd's are often several
        return b"".join(zstandard.ZstdCompressor().compress(frame) for frame in frames)
    return content


def lines(records, column="text"):
    return b"".join(json.dumps({"id": n, column: record}).encode() + b"\n" for n, record in enumerate(records))


def parquet(records, column="text"):
    pyarrow = pytest.importorskip("pyarrow")
    from pyarrow import parquet as library

    library.write_table(pyarrow.table({"id": range(len(records)), column: records}), sink := io.BytesIO())
    return sink.getvalue()


def write(folder, name, content):
    (folder / name).write_bytes(content)
    return folder / name


def read(path, **options):
    return [document.text.whole() for document in documents.read(path, documents.Found(), **options)]


def packed(*paths, context=8, **options):
    return texts.pack(paths, tokenizer(), context=context, **options)


@pytest.mark.parametrize("suffix", ["", ".gz", ".zst"])
@pytest.mark.parametrize("chunk", [1, 7, 1 << 20])
def test_records_are_documents(suffix, chunk, tmp_path, monkeypatch):
    monkeypatch.setattr(documents, "_CHUNK", chunk)
    path = write(tmp_path, f"a.jsonl{suffix}", compressed(lines(WRITTEN), suffix))
    assert read(path) == WRITTEN
    assert (
        read(write(tmp_path, f"b.ndjson{suffix}", compressed(lines(WRITTEN, "body"), suffix)), column="body") == WRITTEN
    )
    plain = "".join(WRITTEN)
    assert read(write(tmp_path, f"c.txt{suffix}", compressed(plain.encode(), suffix))) == [plain]


def test_rows_of_parquet_are_documents(tmp_path, monkeypatch):
    monkeypatch.setattr(documents, "_RECORDS", 2)
    assert read(write(tmp_path, "a.parquet", parquet(WRITTEN))) == WRITTEN
    assert read(write(tmp_path, "a.parquet", parquet(WRITTEN, "body")), column="body") == WRITTEN


@pytest.mark.parametrize("together", [1, 1 << 22])
def test_tokens_are_those_of_each_document_and_a_separator(together, tmp_path, monkeypatch):
    monkeypatch.setattr(texts, "_TOGETHER", together)
    whole = tokenizer()
    ids = [token for text in WRITTEN if text for token in [*whole.encode(text).ids, END]]
    for path in (write(tmp_path, "a.jsonl", lines(WRITTEN)), write(tmp_path, "a.parquet", parquet(WRITTEN))):
        found = packed(path)
        assert found.documents == len(WRITTEN)
        np.testing.assert_array_equal(found.contexts.ravel(), ids[: len(ids) // 8 * 8])
        part = packed(path, tokens=20)
        np.testing.assert_array_equal(part.contexts.ravel(), ids[:24])
    other = packed(write(tmp_path, "a.jsonl", lines(WRITTEN)), separator=7).contexts.ravel()
    np.testing.assert_array_equal(other, [7 if token == END else token for token in ids][: len(other)])


def test_a_long_record_is_tokenised_as_a_whole(tmp_path, monkeypatch):
    monkeypatch.setattr(texts, "_PIECE", 500)
    monkeypatch.setattr(texts, "_OVERLAP", 120)
    long = "".join(f"{n} words, " for n in range(900))
    found = packed(write(tmp_path, "a.jsonl", lines(["ab", long, "cd"])), context=2).contexts.ravel()
    ids = [token for text in ("ab", long, "cd") for token in [*tokenizer().encode(text).ids, END]]
    np.testing.assert_array_equal(found, ids[: len(ids) // 2 * 2])


@pytest.mark.parametrize("chunk", [1, 2, 3, 5, 1 << 20])
def test_bytes_that_are_no_text_are_counted_wherever_they_are_cut(chunk, tmp_path, monkeypatch):
    monkeypatch.setattr(documents, "_CHUNK", chunk)
    content = "日本".encode() + b"\xff\xfe" + "\ufffd語".encode() + b"\xe6\x97" + b"ab" + b"\xe6"
    found = documents.Found()
    (document,) = documents.read(write(tmp_path, "a.txt", content), found)
    assert document.text.reach(1 << 20) == len(content.decode(errors="replace"))
    assert document.text[0:100] == content.decode(errors="replace")
    assert (found.replaced, found.replaced_at) == (4, f"{tmp_path / 'a.txt'}, byte 6")


def test_a_declared_encoding_unless_a_mark_says_another(tmp_path):
    text = "déjà vu"
    assert read(write(tmp_path, "a.txt", text.encode("latin-1")), encoding="latin-1") == [text]
    assert read(write(tmp_path, "a.txt", text.encode("utf-16")), encoding="latin-1") == [text]
    assert read(write(tmp_path, "a.txt", text.encode("cp1252")), encoding="cp1252") == [text]
    assert read(write(tmp_path, "a.txt", text.encode()), encoding="UTF8") == [text]


def test_files_are_mixed_by_their_characters(tmp_path):
    many = write(tmp_path, "a.jsonl", lines(["a" * 40] * 300))
    long = write(tmp_path, "b.parquet", parquet(["b" * 200] * 300))
    found = packed(many, long, weights=(3.0, 1.0), tokens=12_000)
    letters = [tokenizer().encode(letter).ids[0] for letter in "ab"]
    counts = [np.sum(found.contexts == letter) for letter in letters]
    assert abs(counts[0] / counts[1] - 3) < 0.1
    assert set(found.files) == {str(many), str(long)}
    # Where one ends the other goes on; in order, the first would come first.
    everything = packed(many, long, weights=(1.0, 1.0)).contexts
    assert [np.sum(everything == letter) for letter in letters] == [300 * 40, 300 * 200 // 8 * 8]
    assert np.all(packed(many, long, tokens=400).contexts != letters[1])


def test_of_a_file_of_any_size_little_is_held(tmp_path, monkeypatch):
    small = 1 << 12
    for name in ("_CHUNK", "_PIECE", "_TOGETHER", "_BUFFER"):
        monkeypatch.setattr(documents if name == "_CHUNK" else texts, name, small)
    monkeypatch.setattr(texts, "_OVERLAP", small // 16)
    held, reach, add = [], documents.Characters.reach, texts._Contexts.add

    def reached(text, n):
        found = reach(text, n)
        held.append(len(text._held))
        return found

    def added(contexts, ids):
        add(contexts, ids)
        held.append(contexts._count)

    monkeypatch.setattr(documents.Characters, "reach", reached)
    monkeypatch.setattr(texts._Contexts, "add", added)
    words = [f"{n} words, " for n in range(9000)]
    for name in ("a.txt", "a.jsonl", "a.jsonl.gz"):
        content = "".join(words).encode() if name == "a.txt" else lines(words)
        found = packed(write(tmp_path, name, compressed(content, Path(name).suffix)))
        assert found.contexts.size > 20 * small
        assert isinstance(found.contexts, np.memmap)
    assert max(held) < 4 * small


BAD = {
    "no JSON": ("a.jsonl", b'{"text": "a"}\nplain\n', r"a\.jsonl, line 2: is not JSON; get"),
    "no column": (
        "a.jsonl",
        lines(["a"], "body"),
        r"line 1: has 'id', 'body', expected a text in 'text'; pass --column",
    ),
    "no object": ("a.jsonl", b'"a"\n', r"line 1: is no object, expected a text in 'text'"),
    "no text in it": ("a.jsonl", b'{"text": 3}', "line 1: has a int, expected text; pass --column"),
    "not UTF-8": ("a.jsonl", b'{"text": "\xff"}', r"line 1: is not JSON"),
    "NULs in it": ("a.jsonl", b'{"text": "a\\u0000"}', r"line 1: holds NULs; expected text"),
    "cut off": ("a.jsonl.gz", gzip.compress(lines(WRITTEN))[:-9], r"a\.jsonl\.gz: is truncated or damaged"),
    "no gzip": ("a.txt.gz", b"plain", r"a\.txt\.gz: is truncated or damaged"),
    "another encoding": ("a.txt", "ab\xff".encode("latin-1"), r"a\.txt, byte 2: is not ascii, as --encoding says"),
}


@pytest.mark.parametrize("case", BAD)
def test_what_is_damaged_is_refused(case, tmp_path):
    name, content, message = BAD[case]
    refused(message, read, write(tmp_path, name, content), encoding="ascii" if case == "another encoding" else "utf-8")


@pytest.mark.parametrize("keep", [3, 10, 40, -1])
def test_a_zstd_that_is_cut_off_is_refused(keep, tmp_path):
    whole = compressed(lines(WRITTEN * 20), ".zst")
    refused(r"a\.jsonl\.zst: is (truncated or )?damaged", read, write(tmp_path, "a.jsonl.zst", whole[:keep]))


def test_parquet_that_is_damaged_or_has_no_such_column_is_refused(tmp_path):
    whole = parquet(WRITTEN)
    refused("is damaged or no Parquet file", read, write(tmp_path, "a.parquet", whole[:-20]))
    refused("is damaged or no Parquet file", read, write(tmp_path, "a.parquet", b""))
    refused(
        "has 'id', 'body', and no 'text'; pass --column", read, write(tmp_path, "a.parquet", parquet(["a"], "body"))
    )
    refused("row 2: has a NoneType, expected text", read, write(tmp_path, "a.parquet", parquet(["a", None])))
    refused("row 1: has a int, expected text", read, write(tmp_path, "a.parquet", parquet(["a"])), column="id")
    refused("b.parquet: No such file", read, tmp_path / "b.parquet")


def test_an_unknown_encoding_or_a_weight_too_few(tmp_path):
    path = write(tmp_path, "a.txt", b"text " * 9)
    refused("got encoding 'utf-9'; pass one that Python knows", read, path, encoding="utf-9")
    refused("got 1 weights for 2 files of text", packed, path, path, weights=(1.0,))


@pytest.mark.parametrize("missing", ["zstandard", "pyarrow"])
def test_a_library_that_is_missing_is_named(missing, tmp_path, monkeypatch):
    name = {"zstandard": "a.jsonl.zst", "pyarrow": "a.parquet"}[missing]
    write(tmp_path, name, b"something")
    monkeypatch.setitem(__import__("sys").modules, missing, None)
    refused(rf"needs {missing}, which is missing; pip install 'jaxsae\[text\]'", read, tmp_path / name)


def test_the_separator_is_the_models_own(tmp_path):
    assert files.end_of_text(MODEL, tokenizer()) == END
    from tokenizers import Tokenizer, models

    other = Tokenizer(models.WordLevel({"a": 0, "</s>": 1, "<|eot_id|>": 2, "<|end_of_text|>": 3}, unk_token="a"))
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"eos_token": {"content": "<|eot_id|>"}}))
    assert files.end_of_text(tmp_path, other) == 3
    plain = Tokenizer(models.WordLevel({"a": 0, "</s>": 1, "<|eot_id|>": 2}, unk_token="a"))
    assert files.end_of_text(tmp_path, plain) == 2
    (tmp_path / "tokenizer_config.json").unlink()
    assert files.end_of_text(tmp_path, plain) is None


def test_the_command_reads_documents(tmp_path, capsys):
    paths = [write(tmp_path, "a.jsonl", lines(["some text"] * 60, "body")), write(tmp_path, "b.txt", b"caf\xe9 " * 99)]
    where = ["--model", MODEL, "--layer", 1, "--text", *paths, "--context", 16, "--column", "body"]
    more = ["--encoding", "latin-1", "--weights", 2, 1, "--json"]
    assert cli("harvest", *where, *more, "--out", tmp_path / "out") == 0
    out, err = capsys.readouterr()
    summary = json.loads(out)
    assert (summary["replaced"], len(summary["files"])) == (0, 2)
    assert len(open_rows(tmp_path / "out")) == summary["rows"]
    assert "U+FFFD" not in err
    assert cli("harvest", *where, *more, "--out", tmp_path / "bos", "--add-bos") == 2
    assert "adds a BOS, None, that is not a token" in capsys.readouterr().err


def test_contexts_begin_with_bos_if_that_is_asked_for(tmp_path):
    import shutil

    shutil.copytree(MODEL, tmp_path / "model")
    (tmp_path / "model/tokenizer_config.json").write_text(json.dumps({"bos_token": "<|endoftext|>"}))
    path = write(tmp_path, "a.txt", b"abcdefgh")
    for bos, first in ((False, tokenizer().encode("a").ids[0]), (True, END)):
        begun = files.read_tokenizer(tmp_path / "model", bos=bos)
        assert texts.pack([path], begun, context=4).contexts[0, 0] == first


def test_a_full_disk_is_said(tmp_path, monkeypatch):
    class Full(io.BytesIO):
        def write(self, content):
            raise OSError(28, "No space left on device")

    monkeypatch.setattr(texts.tempfile, "TemporaryFile", Full)
    with pytest.raises(InputError, match=r"cannot write tokens to .*: No space left on device; set TMPDIR"):
        packed(write(tmp_path, "a.txt", b"text " * 9))
