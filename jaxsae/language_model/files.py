"""Language models on disk: reading their configuration, arrays and tokenizer without torch."""

import contextlib
import itertools
import json
import os
from pathlib import Path
from typing import Any

import numpy as np

from jaxsae._core.files import InputError, in_one_line, local_path
from jaxsae.language_model.config import Arrays, Config, _import
from jaxsae.language_model.download import _EXPECTED, WHEELS, cached
from jaxsae.language_model.gguf import _gguf_config, _gguf_tokenizer, _open_gguf, _read_gguf
from jaxsae.language_model.hugging_face import _directory_config, _read_directory

_TOKENS = tuple(f"{name}_token" for name in ("bos", "eos", "unk", "sep", "pad", "cls", "mask"))
_BOS_CLASSES = {  # of transformers, which begin texts with BOS unless the configuration forbids it
    *("LlamaTokenizer", "LlamaTokenizerFast", "CodeLlamaTokenizer", "CodeLlamaTokenizerFast"),
    *("GemmaTokenizer", "GemmaTokenizerFast"),
}


def read(path: str | os.PathLike, dtype: np.dtype) -> tuple[Config, Arrays]:
    """Read the sizes and the weights of a language model.

    Args:
      path: a GGUF file, a Hugging Face directory, or the name of a fetched model.
      dtype: of the weights.

    Raises:
      InputError: if it is missing, damaged, or of another architecture or quantisation.
    """
    path = _locate(path)
    with _damage_in_one_line(path):
        config, arrays = _read_directory(path, dtype) if path.is_dir() else _read_gguf(path, dtype)
        _require_sizes(config, path)
        return config._replace(dtype=dtype), arrays


def read_config(path: str | os.PathLike) -> Config:
    """Read the sizes of a language model, without its weights.

    Args:
      path: as for `read`.

    Raises:
      InputError: if it is missing, damaged, or of another architecture.
    """
    path = _locate(path)
    with _damage_in_one_line(path):
        config = _directory_config(path) if path.is_dir() else _gguf_config(path)[0]
        _require_sizes(config, path)
        return config


def read_tokenizer(path: str | os.PathLike, *, bos: bool = False) -> Any:
    """The tokenizer of a language model, a `tokenizers.Tokenizer`.

    It prepends the model's BOS to a text if the model's files say so, even if only `tokenizer_config.json` does.

    Args:
      path: as for `language_model.load`.
      bos: prepend it whatever the files say.

    Raises:
      InputError: if there is none, if that of a GGUF file is not byte-level BPE, if two files disagree on whether
        texts begin with BOS, or if there is no BOS to prepend.

    Example:
      >>> read_tokenizer("no-such-place")
      Traceback (most recent call last):
      jaxsae.InputError: no-such-place: no such file; expected a GGUF file, a Hugging Face directory, or ...
    """
    path = _locate(path)
    tokenizers = _import("tokenizers")
    if not path.is_dir():
        with _damage_in_one_line(path):
            return _gguf_tokenizer(path, _open_gguf(path), bos)
    file = path / "tokenizer.json"
    if not file.is_file():
        raise InputError(f"{path}: has no tokenizer.json; save the tokenizer there, as a fast one.")
    with in_one_line(f"{file}: is not a tokenizer", "save it again"):
        tokenizer = tokenizers.Tokenizer.from_file(str(file))
    beside = path / "tokenizer_config.json"
    if bos or beside.is_file():
        with _damage_in_one_line(beside):
            options = json.loads(beside.read_text()) if beside.is_file() else {}
            _begin_with_bos(tokenizer, options | ({"add_bos_token": True} if bos else {}), beside)
    return tokenizer


def end_of_text(path: str | os.PathLike, tokenizer: Any) -> int | None:
    """The token that separates documents, if the model has one.

    That of pretraining if the vocabulary has a known one, since the EOS of a model that was tuned to chat ends a turn.

    Args:
      path: as for `language_model.load`.
      tokenizer: of the model.

    Example:
      >>> end_of_text("no-such-place", None)
      Traceback (most recent call last):
      jaxsae.InputError: no-such-place: no such file; expected a GGUF file, a Hugging Face directory, or ...
    """
    path = _locate(path)
    for name in ("<|endoftext|>", "<|end_of_text|>"):
        if (number := tokenizer.token_to_id(name)) is not None:
            return number
    return _eos(path, tokenizer)


def stops(path: str | os.PathLike, tokenizer: Any) -> list[int]:
    """The tokens after which a model has no more to say: that between documents, and its EOS, which may end a turn.

    Args:
      path: as for `language_model.load`.
      tokenizer: of the model.

    Example:
      >>> stops("no-such-place", None)
      Traceback (most recent call last):
      jaxsae.InputError: no-such-place: no such file; expected a GGUF file, a Hugging Face directory, or ...
    """
    path = _locate(path)
    return sorted({each for each in (end_of_text(path, tokenizer), _eos(path, tokenizer)) if each is not None})


def _eos(path: Path, tokenizer) -> int | None:
    with _damage_in_one_line(path):
        if not path.is_dir():
            field = _open_gguf(path).get_field("tokenizer.ggml.eos_token_id")
            return None if field is None else int(field.contents())
        beside = path / "tokenizer_config.json"
        eos = json.loads(beside.read_text()).get("eos_token") if beside.is_file() else None
        return None if eos is None else tokenizer.token_to_id(eos["content"] if isinstance(eos, dict) else eos)


def special_tokens(path: str | os.PathLike) -> dict[str, list[int]]:
    """The tokens of a language model that have a name: `bos`, `eos`, `pad` and `unk`, those that it has.

    A name may stand for several: that of the tokenizer, and those of `config.json`, where a model that was tuned to
    chat lists all that end a turn or a text.

    Args:
      path: as for `language_model.load`.

    Raises:
      InputError: if it is missing or damaged.

    Example:
      >>> special_tokens("no-such-place")
      Traceback (most recent call last):
      jaxsae.InputError: no-such-place: no such file; expected a GGUF file, a Hugging Face directory, or ...
    """
    path, found = _locate(path), {}
    with _damage_in_one_line(path):
        if not path.is_dir():
            reader = _open_gguf(path)
            for name, written in {"bos": "bos", "eos": "eos", "pad": "padding", "unk": "unknown"}.items():
                if (field := reader.get_field(f"tokenizer.ggml.{written}_token_id")) is not None:
                    found[name] = [int(field.contents())]
            return found
        tokenizer = read_tokenizer(path)
        texts = _options(path, "special_tokens_map.json", "tokenizer_config.json")
        numbers = _options(path, "config.json")
        for name in ("bos", "eos", "pad", "unk"):
            text, listed = texts.get(f"{name}_token"), numbers.get(f"{name}_token_id")
            text = text["content"] if isinstance(text, dict) else text
            each = [None if text is None else tokenizer.token_to_id(text)]
            each += listed if isinstance(listed, list) else [listed]
            if some := [number for number in dict.fromkeys(each) if number is not None]:
                found[name] = some
    return found


def chat_template(path: str | os.PathLike) -> tuple[str, dict[str, str]]:
    """The chat template of a language model, and the special tokens that it may use, by the names it has for them.

    Args:
      path: as for `language_model.load`.

    Raises:
      InputError: if it is missing or damaged, or has no template.

    Example:
      >>> chat_template("no-such-place")
      Traceback (most recent call last):
      jaxsae.InputError: no-such-place: no such file; expected a GGUF file, a Hugging Face directory, or ...
    """
    path = _locate(path)
    with _damage_in_one_line(path):
        if path.is_dir():
            options = _options(path, "special_tokens_map.json", "tokenizer_config.json")
            own, template = path / "chat_template.jinja", options.get("chat_template")
            if isinstance(template, list):  # of several, by name
                template = next((each["template"] for each in template if each["name"] == "default"), None)
            template = own.read_text() if own.is_file() else template
            named = {name: options.get(name) for name in _TOKENS}
        else:
            reader = _open_gguf(path)
            field = reader.get_field("tokenizer.chat_template")
            template, tokens = None if field is None else field.contents(), reader.get_field("tokenizer.ggml.tokens")
            named = {f"{name}_token": tokens.contents(ids[0]) for name, ids in special_tokens(path).items()}
        if not isinstance(template, str):
            raise InputError(f"{path}: has no chat template; leave out --chat, or pass a model that was tuned to chat.")
    named = {name: token["content"] if isinstance(token, dict) else token for name, token in named.items()}
    return template, {name: token for name, token in named.items() if isinstance(token, str)}


def control_tokens(tokenizer: Any) -> dict[int, str]:
    """The tokens that mean something other than their letters: the special ones, and the end of a text.

    Args:
      tokenizer: a `tokenizers.Tokenizer`.
    """
    found = {id: token.content for id, token in tokenizer.get_added_tokens_decoder().items() if token.special}
    end = tokenizer.token_to_id("<|endoftext|>")
    return found if end is None else found | {end: "<|endoftext|>"}


def _options(path: Path, *names: str) -> dict[str, Any]:
    """What files of JSON in a directory say, the later ones first; those that are missing say nothing."""
    parts = [json.loads((path / name).read_text()) for name in names if (path / name).is_file()]
    return {key: value for part in parts for key, value in part.items()}


def start(tokenizer: Any) -> list[int]:
    """The special tokens that a tokenizer prepends to a text.

    Args:
      tokenizer: a `tokenizers.Tokenizer`.
    """
    found = tokenizer.encode("a")
    before = list(itertools.takewhile(lambda pair: pair[1], zip(found.ids, found.special_tokens_mask, strict=True)))
    return [number for number, _ in before] if len(before) < len(found.ids) else tokenizer.encode("").ids


def _begin_with_bos(tokenizer, options: dict[str, Any], path: Path) -> None:
    """Prepend BOS if `tokenizer_config.json` asks for it and `tokenizer.json` does not.

    transformers follows one file or the other, depending on its version and the class, so they must agree.
    """
    from tokenizers import processors

    bos = options.get("bos_token")
    bos = bos["content"] if isinstance(bos, dict) else bos
    usual = True if bos is not None and options.get("tokenizer_class") in _BOS_CLASSES else None
    wanted = options.get("add_bos_token", usual)
    if wanted is None or (bos is None and not wanted):
        return
    number = None if bos is None else tokenizer.token_to_id(bos)
    if number is None:
        raise InputError(
            f"{path}: adds a BOS, {bos!r}, that is not a token of tokenizer.json; save the tokenizer again."
        )
    begins = number in start(tokenizer)
    if begins and not wanted:
        raise InputError(f"{path}: adds no BOS, and tokenizer.json does, {bos!r}; change one of them.")
    if wanted and not begins:
        adds = processors.TemplateProcessing(single=f"{bos} $A", special_tokens=[(bos, number)])
        own = tokenizer.post_processor
        tokenizer.post_processor = adds if own is None else processors.Sequence([own, adds])


def _locate(path) -> Path:
    if str(path) in WHEELS:
        file = cached(str(path))
        if not file.is_file():
            raise InputError(f"{path}: is not at {file}; run: jaxsae fetch {path}")
        return file
    path = local_path(path)
    if not path.exists():
        raise InputError(f"{path}: no such file; {_EXPECTED}.")
    return path


def _damage_in_one_line(path: Path) -> contextlib.AbstractContextManager[None]:
    return in_one_line(f"{path}: is damaged or truncated", "get the file again")


def _require_sizes(c: Config, path: Path) -> None:
    """Refuse sizes that fit the weights and would fail when the model is called."""
    names = ("vocab", "width", "layers", "heads", "kv_heads", "head_width", "hidden", "context")
    sizes = {name: getattr(c, name) for name in names} | {
        "window": min((size for size in c.windows if size is not None), default=1)
    }
    whole = all(type(size) is int and size > 0 for size in sizes.values()) and isinstance(c.eps, int | float)
    if not whole or c.heads % c.kv_heads or len(c.windows) not in (0, c.layers):
        raise InputError(f"{path}: has invalid sizes: {sizes | {'eps': c.eps}}; get the file again.")
