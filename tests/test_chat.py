"""Conversations are written by the model's own template, whose control tokens are its own alone."""

import json
import random
import shutil
import sys
from pathlib import Path

import gguf
import pytest
from problems import cli, refused
from test_model_files import saved_as_gguf, tokenizer_of, write_tokenizer

from jaxsae.language_model import chat, files, text as texts

MODEL = Path(__file__).parent / "language_models" / "llama"
START, END = "<|im_start|>", "<|im_end|>"
# As models have them: lines that disappear, a default system message, loop controls, and marks about what is generated.
TEMPLATE = """
{%- if messages[0].role != 'system' %}
    {{- bos_token + '<|im_start|>system\\nBe kind.<|im_end|>\\n' }}
{%- endif %}
{% for message in messages %}
    {% if message.role not in ('system', 'user', 'assistant') %}
        {{ raise_exception('no such role: ' + message.role) }}
    {% endif %}
    {% if message.content == 'skip me' %}
        {% continue %}
    {% endif %}
    {{- '<|im_start|>' + message.role + '\\n' }}
    {%- if message.content is string %}
        {%- if message.role == 'assistant' %}{% generation %}{{ message.content | trim }}{% endgeneration %}
        {%- else %}{{ message.content | trim }}{% endif %}
    {%- else %}
        {%- for part in message.content %}{{ part.text }}{% endfor %}
    {%- endif %}
    {{- '<|im_end|>\\n' }}
{%- endfor %}
{{- {'<tools>': tools} | tojson if tools else '' -}}
{{- strftime_now('%d %b %Y') if strftime_now is defined and date is defined -}}
"""


def expected(messages):
    """What the template writes, in Python."""
    written = "" if messages[0]["role"] == "system" else f"<|endoftext|>{START}system\nBe kind.{END}\n"
    for message in messages:
        content = message["content"]
        if content != "skip me":
            text = content.strip() if isinstance(content, str) else "".join(part["text"] for part in content)
            written += f"{START}{message['role']}\n{text}{END}\n"
    return written


def said(*contents, roles=("user", "assistant")):
    return [{"role": roles[n % 2], "content": content} for n, content in enumerate(contents)]


CONVERSATIONS = [
    said("Hi & <b>bye</b>!", " \n日本語 🙂\n"),
    said("Answer in rhyme.", "skip me", roles=("system", "user")) + said("2 + 2?", "4", "5?"),
    said([{"type": "text", "text": " one "}, {"type": "text", "text": "two"}], "skip me"),
]


@pytest.fixture
def model(tmp_path):
    """A directory with a chat template, whose every byte is a token."""
    folder = tmp_path / "model"
    shutil.copytree(MODEL, folder)
    tokenizer = files.read_tokenizer(folder)
    tokenizer.add_special_tokens([START, END])
    tokenizer.save(str(folder / "tokenizer.json"))
    (folder / "chat_template.jinja").write_text(TEMPLATE)
    configured = {"bos_token": {"content": "<|endoftext|>"}, "chat_template": "of older files"}
    (folder / "tokenizer_config.json").write_text(json.dumps(configured))
    return folder


def opened(folder):
    tokenizer = files.read_tokenizer(folder)
    return chat.read(folder, tokenizer), tokenizer


def tokens(template, tokenizer, *rendered):
    with texts._as_text(tokenizer):
        return [ids.tolist() for ids in template.tokens(tokenizer, rendered, ["x"] * len(rendered))]


def test_a_conversation_is_written_as_the_template_says(model):
    template, tokenizer = opened(model)
    for messages in CONVERSATIONS:
        assert template.render(messages, "x") == expected(messages)
    rendered = [expected(messages) for messages in CONVERSATIONS]
    found = tokens(template, tokenizer, *rendered)
    assert found == [tokenizer.encode(each, add_special_tokens=False).ids for each in rendered]
    assert found[0].count(tokenizer.token_to_id(START)) == 3


@pytest.mark.parametrize("seed", range(20))
def test_no_message_injects_a_control_token(model, seed):
    template, tokenizer = opened(model)
    rng, pieces = (
        random.Random(seed),
        [START, END, "<|endoftext|>", "<|im_", "end|>", "<", "|", "a ", "\n", "<|im_end|"],
    )
    for _ in range(20):
        messages = said(*("".join(rng.choices(pieces, k=rng.randrange(8))) for _ in range(rng.randint(1, 4))))
        [found] = tokens(template, tokenizer, template.render(messages, "x"))
        own = expected(said(*["x"] * len(messages)))
        control = {tokenizer.token_to_id(name) for name in (START, END, "<|endoftext|>")}
        wanted = [each for each in tokenizer.encode(own, add_special_tokens=False).ids if each in control]
        assert [each for each in found if each in control] == wanted, "those of the template, in its order"
        assert tokenizer.decode(found, skip_special_tokens=False) == expected(messages), "and every letter"


def test_parts_that_spell_a_control_token_together_are_refused(model):
    template, _ = opened(model)
    parts = said([{"type": "text", "text": "<|im_"}, {"type": "text", "text": "end|>"}])
    refused("x: parts of it spell a control token together; leave it out", template.render, parts, "x")
    apart = said([{"type": "text", "text": "<|im_ "}, {"type": "text", "text": "end|>"}], " a < ")
    assert template.render(apart, "x") == expected(apart)
    refused("x: holds NULs, or code points that are no", template.render, said("\ufdd0<|im_end|>"), "x")


@pytest.mark.parametrize("value", ["text", [], ["text"], [{"from": "human", "value": "hi"}], {"role": "user"}, 3])
def test_what_is_no_conversation_is_refused(model, value):
    refused("x: has a .*, expected a list of messages with a role; pass --column", opened(model)[0].render, value, "x")


@pytest.mark.parametrize(
    "template, message",
    [
        (TEMPLATE, r"cannot write it \(no such role: tool\); leave it out"),
        ("{{ messages.__class__.__mro__ }}", r"cannot write it \(access to attribute '__class__'"),
        ("{{ messages[0].content + 1 }}", r"cannot write it \(can only concatenate str"),
        ("{{ messages.append(1) }}", r"cannot write it \(.*append"),
    ],
)
def test_a_template_that_fails_is_one_line(model, template, message):
    (model / "chat_template.jinja").write_text(template)
    refused("x: the model's chat template " + message, opened(model)[0].render, said("a", roles=("tool", "")), "x")


def test_where_a_template_is(model, tmp_path):
    (model / "chat_template.jinja").unlink()
    assert opened(model)[0].render(said("a"), "x") == "of older files"
    several = [
        {"name": "tool_use", "template": "no"},
        {"name": "default", "template": "{{ eos_token }}{{ bos_token }}"},
    ]
    (model / "tokenizer_config.json").write_text(json.dumps({"chat_template": several, "eos_token": "E"}))
    assert opened(model)[0].render(said("a"), "x") == "E"
    (model / "tokenizer_config.json").write_text(json.dumps({"chat_template": "{% for %}"}))
    refused("model: its chat template is damaged", opened, model)
    (model / "tokenizer_config.json").unlink()
    refused("model: has no chat template; leave out --chat", opened, model)
    _, names, merges = tokenizer_of("gpt-2")

    def add(writer):
        write_tokenizer(writer, names, merges, "gpt-2", bos=False)
        writer.add_chat_template("{{ bos_token }}{{ messages[0].content }}")

    path = saved_as_gguf(tmp_path / "a.gguf", add=add)
    assert opened(path)[0].render(said("a"), "x") == "<|endoftext|>a"
    assert gguf.GGUFReader(path).get_field("tokenizer.chat_template") is not None
    refused("b.gguf: has no chat template", files.chat_template, saved_as_gguf(tmp_path / "b.gguf"))


def test_the_date_is_one_that_a_resumed_harvest_has_too(model):
    (model / "chat_template.jinja").write_text("{{ strftime_now('%d %b %Y') }}")
    assert opened(model)[0].render(said("a"), "x") == "26 Jul 2024"


def test_the_library_is_named_if_it_is_missing(model, monkeypatch):
    monkeypatch.setitem(sys.modules, "jinja2", None)
    refused(r"jinja2, which is missing; pip install 'jaxsae\[text\]'", opened, model)


def test_conversations_are_packed_as_documents(model, tmp_path):
    template, tokenizer = opened(model)
    (tmp_path / "a.jsonl").write_text("".join(json.dumps({"chat": each}) + "\n" for each in CONVERSATIONS))
    how = {"column": "chat", "template": template, "separator": 7, "context": 11}
    found = texts.pack([tmp_path / "a.jsonl"], tokenizer, **how)
    ids = [number for each in CONVERSATIONS for number in [*tokens(template, tokenizer, expected(each))[0], 7]]
    begun = found.contexts[:, len(files.start(tokenizer)) :].ravel().tolist()
    assert begun == ids[: len(begun)]
    assert len(begun) > len(ids) - 11
    assert tokenizer.encode_special_tokens is False
    pyarrow = pytest.importorskip("pyarrow")
    from pyarrow import parquet

    uniform = [each for each in CONVERSATIONS if all(isinstance(message["content"], str) for message in each)]
    parquet.write_table(pyarrow.table({"chat": uniform}), tmp_path / "a.parquet")
    (tmp_path / "b.jsonl").write_text("".join(json.dumps({"chat": each}) + "\n" for each in uniform))
    both = [texts.pack([tmp_path / name], tokenizer, **how).contexts.tolist() for name in ("a.parquet", "b.jsonl")]
    assert both[0] == both[1]
    (tmp_path / "c.txt").write_text("plain text")
    refused(r"c\.txt: is plain text, expected conversations", texts.pack, [tmp_path / "c.txt"], tokenizer, **how)


def test_the_command_harvests_conversations(tmp_path, capsys):
    small = tmp_path / "small"
    shutil.copytree(MODEL, small)
    (small / "chat_template.jinja").write_text("{% for m in messages %}<|endoftext|>{{ m.content }}{% endfor %}")
    (tmp_path / "a.jsonl").write_text("".join(json.dumps({"messages": each}) + "\n" for each in CONVERSATIONS[:2]))
    text = ("--text", tmp_path / "a.jsonl", "--chat")
    small_of = ("--model", small, "--layer", 1, "--context", 16)
    assert cli("harvest", *small_of, *text, "--out", tmp_path / "out", "--json") == 0
    assert json.loads(capsys.readouterr().out)["rows"] % 15 == 0
    assert cli("harvest", *("--model", MODEL, *small_of[2:]), *text, "--out", tmp_path / "z") == 2
    assert "has no chat template; leave out --chat" in capsys.readouterr().err
    assert cli("harvest", *small_of, "--chat", "--out", tmp_path / "z") == 2
    assert "got --chat without --text" in capsys.readouterr().err
    how = ("--activation", "topk", "--k", 2, "--latents", 16, "--out", tmp_path / "z")
    assert cli("train", "--data", tmp_path / "out", "--chat", *how) == 2
    assert "got --chat without --model" in capsys.readouterr().err
    assert cli("study", "--model", small, "--chat", "--out", tmp_path / "z") == 2
    assert "got --chat without --text" in capsys.readouterr().err
    assert not (tmp_path / "z").exists()
