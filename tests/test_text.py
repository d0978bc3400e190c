"""Text is read as it was written, and its tokens are those of a text that is tokenised whole."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import tokenizers
from problems import refused
from tokenizers import AddedToken, Regex, Tokenizer, models, normalizers, pre_tokenizers, processors, trainers

from jaxsae._core.files import InputError
from jaxsae.app.cli import main
from jaxsae.language_model import files, harvest, text as texts

MODEL = Path(__file__).parent / "language_models" / "llama"
WORDS = ["the", "quick", "brown", "fox", "jumps", "over", "a", "lazy", "dog", "—", "déjà", "vu,", "日本語", "テキスト"]
WORDS += ["🙂", "it's", "3.14159", "don't", "ﬁne", "İ"]
GAPS = [" "] * 6 + ["\n", "\r\n", "  ", "\t", "\n\n\n", " " * 40, "-" * 70, "", "\u00a0"]


def text_of(seed, length=24_000):
    generator = np.random.default_rng(seed)
    parts = [generator.choice(WORDS) + generator.choice(GAPS) for _ in range(length // 4)]
    if seed % 2:
        parts[len(parts) // 2] = generator.choice([" ", "a", "=", "ab"]) * 2500  # longer than an overlap
    return "".join(parts)[:length]


def trained_tokenizer(model, trainer, pre):
    tokenizer = Tokenizer(model)
    tokenizer.pre_tokenizer = pre
    tokenizer.train_from_iterator([text_of(seed, 3000) for seed in range(2, 8, 2)], trainer)
    return tokenizer


def bpe(pre, **options):
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=340, show_progress=False, initial_alphabet=alphabet)
    return trained_tokenizer(models.BPE(unk_token=None, **options), trainer, pre)


def unigram(pre):
    trainer = trainers.UnigramTrainer(vocab_size=150, show_progress=False, special_tokens=["<unk>"], unk_token="<unk>")
    return trained_tokenizer(models.Unigram(), trainer, pre)


def sentencepiece(scheme, split=True):
    return unigram(pre_tokenizers.Metaspace(prepend_scheme=scheme, split=split))


def llama_2():
    """Of the whole text one word, with "▁" before it."""
    tokenizer = bpe(pre_tokenizers.Metaspace(prepend_scheme="always"), fuse_unk=True)
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    tokenizer.pre_tokenizer = None
    return tokenizer


def normalised():
    tokenizer = sentencepiece("always")
    parts = [normalizers.NFKC(), normalizers.Lowercase(), normalizers.Replace(Regex(" {2,}"), " "), normalizers.Strip()]
    tokenizer.normalizer = normalizers.Sequence(parts)
    return tokenizer


TOKENIZERS = {
    "bytes": lambda: bpe(pre_tokenizers.ByteLevel(add_prefix_space=False)),
    "bytes after a space": lambda: bpe(pre_tokenizers.ByteLevel(add_prefix_space=True)),
    "SentencePiece, always": lambda: sentencepiece("always"),
    "SentencePiece, first": lambda: sentencepiece("first"),
    "SentencePiece, never": lambda: sentencepiece("never"),
    "SentencePiece, one word": lambda: sentencepiece("always", split=False),
    "Llama 2": llama_2,
    "normalised": normalised,
    "words": lambda: trained_tokenizer(
        models.WordLevel(unk_token="?"),
        trainers.WordLevelTrainer(show_progress=False, special_tokens=["?"]),
        pre_tokenizers.Whitespace(),
    ),
}


@pytest.fixture(scope="module", params=TOKENIZERS)
def named(request):
    return request.param, TOKENIZERS[request.param]()


@pytest.mark.parametrize("seed", range(3))
def test_the_tokens_of_a_long_text_are_those_of_the_text_as_a_whole(seed, named, monkeypatch, tmp_path):
    (name, tokenizer), text = named, text_of(seed)
    (tmp_path / "a.txt").write_bytes(text.encode())
    ids = tokenizer.encode(text, add_special_tokens=False).ids
    monkeypatch.setattr(texts, "_PIECE", 5000)
    monkeypatch.setattr(texts, "_OVERLAP", 1200)
    lengths, encode = [], texts._encode

    def spied(tokenizer, text, first, last):
        lengths.append(last - first)
        return encode(tokenizer, text, first, last)

    monkeypatch.setattr(texts, "_encode", spied)
    for tokens in (None, len(ids) // 3):
        found = texts.pack([tmp_path / "a.txt"], tokenizer, context=2, tokens=tokens).contexts.ravel()
        assert len(found) == (len(ids) // 2 * 2 if tokens is None else -(-tokens // 2) * 2)
        np.testing.assert_array_equal(found, ids[: len(found)])
    if not seed % 2 and name != "SentencePiece, one word":
        assert max(lengths) <= 5000 and len(lengths) > 6, "it should be read in pieces"


ENCODINGS = ["utf-8", "utf-8-sig", "utf-16", "utf-32", "utf-16-le", "utf-16-be", "utf-32-le", "utf-32-be"]
PLAIN = "The quick — 日本語 🙂 fox\r\n" * 20


def packed(folder, content, tokenizer=None, context=16, **options):
    (folder / "a.txt").write_bytes(content)
    return texts.pack([folder / "a.txt"], tokenizer or files.read_tokenizer(MODEL), context=context, **options)


@pytest.mark.parametrize("marked", [True, False])
@pytest.mark.parametrize("encoding", ENCODINGS)
def test_a_text_has_the_same_tokens_in_every_encoding_or_is_refused(encoding, marked, tmp_path):
    expected = packed(tmp_path, PLAIN.encode())
    own_mark = encoding in ("utf-8-sig", "utf-16", "utf-32")
    content = PLAIN.encode(encoding) if own_mark or not marked else ("\ufeff" + PLAIN).encode(encoding)
    if marked or own_mark or encoding == "utf-8":
        found = packed(tmp_path, content)
        np.testing.assert_array_equal(found.contexts, expected.contexts)
        assert found.replaced == 0
    else:
        with pytest.raises(InputError, match=r"a\.txt: holds NULs, the first after \d+ characters; .* to UTF-8"):
            packed(tmp_path, content)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"some text\0" * 30, "holds NULs, the first after 9 characters"),
        ("\ufeffab".encode("utf-16-le") + b"c", r"a\.txt, byte 6: is not utf-16-le"),
        ("\ufeffab".encode("utf-16-be") + b"\xd8\x00", r"a\.txt, byte 6: is not utf-16-be"),
        ("\ufeffab".encode("utf-32-le") + b"\xff\xff\xff\xff", r"a\.txt, byte 12: is not utf-32-le"),
    ],
)
def test_what_is_no_text_is_refused(content, message, tmp_path):
    with pytest.raises(InputError, match=message):
        packed(tmp_path, content)


def test_what_is_not_utf_8_is_counted_and_said_where(tmp_path):
    assert packed(tmp_path, b"\xef\xbb\xbfab\xffcd\xfe" * 9).replaced_at == f"{tmp_path / 'a.txt'}, byte 5"
    assert packed(tmp_path, PLAIN.encode()).replaced_at == ""


def test_a_directory_is_no_text(tmp_path):
    with pytest.raises(InputError, match="Is a directory; pass files of text"):
        texts.pack([tmp_path], files.read_tokenizer(MODEL), context=4)


@pytest.mark.parametrize("tokens", [0, -5])
def test_no_tokens_are_refused(tokens, tmp_path):
    with pytest.raises(InputError, match=f"got {tokens} tokens"):
        packed(tmp_path, b"abcdefgh", context=2, tokens=tokens)


# --- Control tokens


@pytest.mark.parametrize("name", ["<|endoftext|>", "<|im_start|>"])
def test_a_control_token_that_a_text_spells_is_letters(name, tmp_path):
    tokenizer = files.read_tokenizer(MODEL)
    tokenizer.add_special_tokens(["<|im_start|>"])
    text = f"one {name} two{name}"
    found = packed(tmp_path, text.encode(), tokenizer, context=2).contexts.ravel()
    assert tokenizer.decode(found.tolist(), skip_special_tokens=True).startswith(text)
    assert tokenizer.token_to_id(name) not in found[: len(text)]
    assert tokenizer.token_to_id(name) in tokenizer.encode(text).ids, "the tokenizer is left as it was"


@pytest.mark.parametrize("special", [True, False])
def test_a_control_token_that_cannot_be_letters_is_refused(special, tmp_path):
    """A word of the vocabulary itself; or one that its file does not call special, and harvests put between texts."""
    tokenizer = Tokenizer(models.WordLevel({"a": 0, "?": 1, "<|endoftext|>": 2}, unk_token="?"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    if special:
        tokenizer.add_special_tokens(["<|endoftext|>"])
    else:
        tokenizer.add_tokens([AddedToken("<|endoftext|>", special=False)])
    with pytest.raises(InputError, match=r"holds '<\|endoftext\|>' after 4 characters, .* control token"):
        packed(tmp_path, b"a a <|endoftext|> a a", tokenizer, context=2)


def test_what_is_unknown_may_be_any(tmp_path):
    tokenizer = Tokenizer(models.WordLevel({"a": 0, "<unk>": 1}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.add_special_tokens(["<unk>"])
    assert packed(tmp_path, b"a b a b", tokenizer, context=2).contexts.tolist() == [[0, 1], [0, 1]]


def test_a_tokenizer_that_would_cut_or_fill_texts_does_not(tmp_path):
    tokenizer = files.read_tokenizer(MODEL)
    expected = packed(tmp_path, PLAIN.encode(), tokenizer)
    tokenizer.enable_truncation(8)
    tokenizer.enable_padding(length=4000)
    np.testing.assert_array_equal(packed(tmp_path, PLAIN.encode(), tokenizer).contexts, expected.contexts)
    assert tokenizer.truncation["max_length"] == 8


def test_what_ends_texts_does_not_begin_contexts(tmp_path):
    tokenizer = files.read_tokenizer(MODEL)
    end = tokenizer.token_to_id("<|endoftext|>")
    tokenizer.post_processor = processors.TemplateProcessing(
        "$A <|endoftext|>", special_tokens=[("<|endoftext|>", end)]
    )
    ids = tokenizer.encode("abcd", add_special_tokens=False).ids
    assert packed(tmp_path, b"abcd", tokenizer, context=4).contexts.tolist() == [ids]


# --- BOS


def directory(folder, options, *, begins=False):
    """A model whose tokenizer has a token <s>, and begins texts with it or not."""
    shutil.copytree(MODEL, folder, dirs_exist_ok=True)
    tokenizer = tokenizers.Tokenizer.from_file(str(MODEL / "tokenizer.json"))
    tokenizer.add_special_tokens(["<s>"])
    if begins:
        number = tokenizer.token_to_id("<s>")
        tokenizer.post_processor = processors.TemplateProcessing("<s> $A", special_tokens=[("<s>", number)])
    tokenizer.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(options if isinstance(options, str) else json.dumps(options))
    return folder


BOS = {
    "said": ({"add_bos_token": True, "bos_token": "<s>"}, False, True),
    "said of a token that is told apart": ({"add_bos_token": True, "bos_token": {"content": "<s>"}}, False, True),
    "by the class": ({"tokenizer_class": "LlamaTokenizerFast", "bos_token": "<s>"}, False, True),
    "said twice": ({"add_bos_token": True, "bos_token": "<s>"}, True, True),
    "by tokenizer.json": ({"bos_token": "<s>"}, True, True),
    "none": ({"bos_token": "<s>"}, False, False),
    "none, said": ({"add_bos_token": False, "bos_token": "<s>"}, False, False),
    "none, by the class": ({"tokenizer_class": "GPT2Tokenizer", "bos_token": "<s>"}, False, False),
    "none, unlike the class": (
        {"tokenizer_class": "LlamaTokenizer", "add_bos_token": False, "bos_token": "<s>"},
        False,
        False,
    ),
    "none that could be": ({"add_bos_token": False, "bos_token": None}, False, False),
}


@pytest.mark.parametrize("case", BOS)
def test_texts_and_contexts_begin_with_bos_as_the_files_say(case, tmp_path):
    options, begins, expected = BOS[case]
    tokenizer = files.read_tokenizer(directory(tmp_path / "model", options, begins=begins))
    bos = [tokenizer.token_to_id("<s>")] if expected else []
    plain = tokenizer.encode("abcdefgh", add_special_tokens=False).ids
    assert tokenizer.encode("abcdefgh").ids == bos + plain
    contexts = packed(tmp_path, b"abcdefgh", tokenizer, context=4).contexts.tolist()
    assert contexts[0] == [*bos, *plain][:4]
    assert all(context[: len(bos)] == bos for context in contexts)


BAD_BOS = {
    "no such token": ({"add_bos_token": True, "bos_token": "<bos>"}, False, "adds a BOS, '<bos>', that is not a token"),
    "no token": ({"add_bos_token": True}, False, "adds a BOS, None, that is not a token"),
    "they do not agree": ({"add_bos_token": False, "bos_token": "<s>"}, True, "adds no BOS, and tokenizer.json does"),
    "not JSON": ("{", False, r"tokenizer_config\.json: is damaged"),
    "no object": ("[]", False, r"tokenizer_config\.json: is damaged"),
    "no text": ({"add_bos_token": True, "bos_token": 1}, False, r"tokenizer_config\.json: is damaged"),
}


@pytest.mark.parametrize("case", BAD_BOS)
def test_files_that_do_not_say_how_texts_begin_are_refused(case, tmp_path):
    options, begins, message = BAD_BOS[case]
    refused(message, files.read_tokenizer, directory(tmp_path / "model", options, begins=begins))


# --- Before the work


TRAIN = ["--activation", "topk", "--k", "2", "--latents", "8"]
EARLY = [
    ("harvest", ["--layer", "3"], "got layer 3, the model has 3"),
    ("harvest", ["--layer", "1", "--context", "1"], "got --context 1; pass"),
    ("harvest", ["--layer", "1", "--context", "97"], "the model takes 96"),
    ("harvest", ["--layer", "1", "--dtype", "int8"], "got --dtype 'int8', expected one of"),
    ("harvest", ["--layer", "1", "--out", "full"], "holds files but no manifest.json"),
    ("harvest", ["--layer", "1", "--out", "a.txt"], "cannot write a.txt: something else is there"),
    ("train", [*TRAIN, "--layer", "-1"], "got --layer -1; pass"),
    ("train", [*TRAIN, "--layer", "1", "--context", "97"], "the model takes 96"),
    ("study", ["--layer", "7"], "got layer 7, the model has 3"),
]


@pytest.mark.parametrize(("command", "options", "message"), EARLY)
def test_a_choice_that_the_model_has_not_is_refused_before_the_work(
    command, options, message, tmp_path, monkeypatch, capsys
):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "a").touch()
    (tmp_path / "a.txt").write_text("text " * 100)

    def work(*args, **options):
        raise AssertionError("nothing should be read before it is refused")

    monkeypatch.setattr(texts, "pack", work)
    monkeypatch.setattr("jaxsae.language_model.load", work)
    given = ["--model", str(MODEL), "--text", "a.txt", *options, *([] if "--out" in options else ["--out", "out"])]
    assert main([command, *given]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert message in line
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    "contexts", [np.zeros((0, 4), np.int32), np.zeros((2, 4)), np.zeros(4, np.int32), np.zeros((2, 1), np.int32)]
)
def test_what_are_no_contexts_are_refused(contexts, tmp_path):
    from jaxsae.language_model.models import tiny

    for call in (
        lambda: harvest.run(tmp_path, tiny(), contexts, points=[(1, "resid_post")], source={}),
        lambda: harvest.live(tiny(), contexts, points=[(1, "resid_post")]),
    ):
        with pytest.raises(InputError, match="got contexts of"):
            call()
    with pytest.raises(InputError, match="made token -1"):
        harvest.live(tiny(), np.array([[1, -1, 2]]), points=[(1, "resid_post")])
