"""Conversations as the chat template of a language model writes them, and their tokens.

A template is a program in Jinja, by whoever published the model: it runs in a sandbox. The control tokens that it
writes are control tokens; one that a message spells is marked before the template sees it, and is plain text.
"""

import contextlib
import datetime
import json
import os
import re
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

from jaxsae._core.files import InputError, in_one_line
from jaxsae.language_model import files

_BEGIN, _END = "\ufdd0", "\ufdd1"  # code points that no text may hold, about what is plain text
_TODAY = datetime.date(2024, 7, 26)  # for templates, which else had another text each day; Llama's own choice


class Template:
    """The chat template of a model.

    Example:
      >>> import tokenizers
      >>> tokenizer = tokenizers.Tokenizer(tokenizers.models.WordLevel({"a": 0}, unk_token="a"))
      >>> template = Template("{% for m in messages %}{{ m.role }}: {{ m.content }}{% endfor %}", {}, tokenizer)
      >>> template.render([{"role": "user", "content": "Hi!"}], "a.jsonl, line 1")
      'user: Hi!'
    """

    def __init__(self, source: str, variables: dict[str, str], tokenizer: Any):
        """See `read`.

        Args:
          source: in Jinja.
          variables: special tokens by name.
          tokenizer: of the model.
        """
        self._compiled, self._variables = _environment().from_string(source), variables
        self._control = files.control_tokens(tokenizer)
        longest_first = sorted(self._control.values(), key=len, reverse=True)
        self._spelled = re.compile("|".join(map(re.escape, longest_first)) or "(?!)")
        self._begun = tuple({each[:n] for each in longest_first for n in range(1, len(each))})
        self._marked = re.compile(f"{_BEGIN}({self._spelled.pattern}){_END}|[{_BEGIN}{_END}]")

    def render(self, messages: Any, where: str) -> str:
        """The text of a conversation, with marks about the control tokens that its messages spell.

        Args:
          messages: a list of `{"role": …, "content": …}`.
          where: what holds it, for errors.

        Raises:
          InputError: if it is none, if the template refuses it, or if its parts spell a control token together.
        """
        is_one = isinstance(messages, list) and all(isinstance(each, dict) and "role" in each for each in messages)
        if not is_one or not messages:
            kind = type(messages).__name__
            raise InputError(f"{where}: has a {kind}, expected a list of messages with a role; pass --column.")
        strings = list(_strings(messages))
        if any(mark in each for each in strings for mark in (_BEGIN, _END, "\0")):
            raise InputError(f"{where}: holds NULs, or code points that are no characters; expected text.")
        with in_one_line(f"{where}: the model's chat template cannot write it", "leave it out"):
            text = self._compiled.render(messages=self._mark(messages), **self._variables)
            apart = text
            if any(each.rstrip().endswith(self._begun) for each in strings):  # what follows it may end it
                apart = self._compiled.render(messages=self._mark(messages, break_off=True), **self._variables)
        if self._written(text) != self._written(apart):
            raise InputError(f"{where}: parts of it spell a control token together; leave it out.")
        return text

    def _mark(self, value: Any, *, break_off: bool = False) -> Any:
        """Messages with marks about the control tokens in them, and also behind what begins one."""
        if isinstance(value, str):
            bare = value.rstrip()
            marked = self._spelled.sub(f"{_BEGIN}\\g<0>{_END}", bare)
            return marked + (_END if break_off and bare.endswith(self._begun) else "") + value[len(bare) :]
        if isinstance(value, dict):
            return {key: self._mark(each, break_off=break_off) for key, each in value.items()}
        return [self._mark(each, break_off=break_off) for each in value] if isinstance(value, list) else value

    def _written(self, text: str) -> int:
        """How many control tokens a rendered text has without marks, which a template has written."""
        return len(self._spelled.findall(self._marked.sub(_END, text)))

    def tokens(self, tokenizer: Any, texts: Sequence[str], where: Sequence[str]) -> list[np.ndarray]:
        """The tokens of rendered texts.

        Args:
          tokenizer: of the model, which must read special tokens as letters, and does so again in the end.
          texts: as from `render`.
          where: what holds each, for errors.

        Raises:
          InputError: if the tokenizer cannot read a control token as letters.
        """
        parts = [self._marked.split(text) for text in texts]
        with _as_control(tokenizer):
            begun = tokenizer.encode_batch([first for first, *_ in parts], add_special_tokens=False)
        found = []
        for first, (_, *pieces), place in zip(begun, parts, where, strict=True):
            ids = list(first.ids)
            for number, piece in enumerate(pieces):  # by turns a token that is spelled, or None, and what follows it
                ids += self._continued(tokenizer, piece, number % 2 == 0, place) if piece else []
            found.append(np.asarray(ids, np.int32))
        return found

    def _continued(self, tokenizer: Any, piece: str, spelled: bool, where: str) -> list[int]:
        """The tokens of a piece behind another: behind a newline, so that its tokenizer prepends nothing to it."""
        with contextlib.nullcontext() if spelled else _as_control(tokenizer):
            newline, both = (tokenizer.encode(each, add_special_tokens=False).ids for each in ("\n", "\n" + piece))
            behind = both[: len(newline)] == newline
            ids = both[len(newline) :] if behind else tokenizer.encode(piece, add_special_tokens=False).ids
        if spelled and self._control.keys() & set(ids):
            raise InputError(f"{where}: holds {piece!r}, which the tokenizer turns into a control token; leave it out.")
        return ids


@contextlib.contextmanager
def _as_control(tokenizer: Any) -> Iterator[None]:
    """Make a tokenizer that reads special tokens as letters read them as what they are."""
    tokenizer.encode_special_tokens = False
    try:
        yield
    finally:
        tokenizer.encode_special_tokens = True


def _strings(value: Any) -> Iterator[str]:
    """All text in messages, in order."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict | list):
        for each in value.values() if isinstance(value, dict) else value:
            yield from _strings(each)


def read(path: str | os.PathLike, tokenizer: Any) -> Template:
    """Read the chat template of a language model.

    Args:
      path: as for `language_model.load`.
      tokenizer: of the model.

    Raises:
      InputError: if it has none, if it is no template, or if jinja2 is missing.

    Example:
      >>> read("no-such-place", None)
      Traceback (most recent call last):
      jaxsae.InputError: no-such-place: no such file; expected a GGUF file, a Hugging Face directory, or ...
    """
    source, variables = files.chat_template(path)
    with in_one_line(f"{path}: its chat template is damaged", "get the model again"):
        return Template(source, variables, tokenizer)


def _environment() -> Any:
    """What templates run in, as in transformers, but for the date."""
    try:
        from jinja2 import ext, nodes, sandbox
        from jinja2.exceptions import TemplateError
    except ImportError as error:
        raise InputError("chat templates need jinja2, which is missing; pip install 'jaxsae[text]'.") from error

    class Generation(ext.Extension):
        """`{% generation %}`, about what an assistant wrote, which is of no importance here."""

        tags = {"generation"}  # noqa: RUF012

        def parse(self, parser: Any) -> Any:
            line = next(parser.stream).lineno
            return nodes.Scope(parser.parse_statements(("name:endgeneration",), drop_needle=True)).set_lineno(line)

    def refuse(message: str) -> None:
        raise TemplateError(message)

    def tojson(value: Any, ensure_ascii=False, indent=None, separators=None, sort_keys=False) -> str:
        return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)

    options: dict[str, Any] = {"trim_blocks": True, "lstrip_blocks": True, "extensions": [Generation, ext.loopcontrols]}
    found = sandbox.ImmutableSandboxedEnvironment(**options)
    found.filters["tojson"] = tojson
    found.globals |= {"raise_exception": refuse, "strftime_now": _TODAY.strftime}
    return found
