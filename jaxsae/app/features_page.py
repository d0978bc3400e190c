"""The page of latents: `features.json` checked, and packed for `features_page.js`, which shows it.

A page is opened from a disk, where a script may not read files, and has to be quick with tens of thousands of latents.
So each latent is compressed by itself, and all are in the page while that is small; else they are in scripts beside it,
half a megabyte each, of which the page loads those it shows. Compressed data are base64: text from outside, such as
tokens, is never part of the markup, and `features_page.js` makes text nodes of it.
"""

import base64
import functools
import hashlib
import json
import math
import operator
import os
import re
import statistics
import zlib
from pathlib import Path
from typing import Any, NamedTuple
from urllib.parse import quote

from jaxsae._core.files import InputError, atomic_file, first_line, in_one_line, local_path
from jaxsae.app import html
from jaxsae.app.html import form

NAME, FORMAT, VERSION = "features.json", "jaxsae-features", 1
_INLINE = 8 << 20  # characters of packed latents that a page holds itself
_PART = 1 << 19  # characters of a script beside it
_SCALARS = ("index", "density", "max", "mean", "shrinkage", "loss_effect")  # of the list
_WORDS = 5  # tokens of a latent that the list shows and searches


def write(directory: str | os.PathLike, out: str | os.PathLike | None = None) -> None:
    """Write the page of what `jaxsae features` wrote; that of many latents has scripts in a folder beside it.

    Args:
      directory: holds features.json.
      out: the page; by default report.html in that directory. Its scripts, if any, are in `NAME_files/`.

    Raises:
      InputError: if features.json is missing, damaged or of another version, or the page cannot be written.

    Example:
      >>> import tempfile
      >>> with tempfile.TemporaryDirectory() as folder:
      ...     write(folder)
      Traceback (most recent call last):
      jaxsae.InputError: ...features.json: no such file; pass a directory that jaxsae features wrote.
    """
    source = local_path(directory) / NAME
    out = local_path(directory) / "report.html" if out is None else local_path(out)
    if out.resolve() == source.resolve():
        raise InputError(f"{out}: holds the features themselves; write the page to another file.")
    found = _read(source)
    with in_one_line(f"{source}: is damaged", "make it again"):
        facts = _facts(found)
    parts, starts = _parts([latent.packed for latent in found["latents"]])
    scripts: dict[str, str] = {}
    if sum(map(len, parts)) > _INLINE:
        texts = [f'part({n},"{part}")' for n, part in enumerate(parts)]
        scripts = {f"{hashlib.sha256(text.encode()).hexdigest()[:16]}.js": text for text in texts}
    beside = out.with_name(f"{out.stem}_files")
    for name, text in scripts.items():
        with atomic_file(beside / name) as temporary:
            temporary.write_text(text, encoding="ascii")
    index = _index(found) | {"starts": starts, "files": [quote(f"{beside.name}/{name}") for name in scripts]}
    data = {"index": _pack(index)} | ({} if scripts else {f"part-{n}": part for n, part in enumerate(parts)})
    with atomic_file(out) as temporary:
        temporary.write_text(_page(found, facts, data), encoding="utf-8")
    _remove_others(beside, set(scripts))


def _remove_others(folder: Path, names: set[str]) -> None:
    """Remove the scripts of an earlier page."""
    if not folder.is_dir():
        return
    for path in folder.iterdir():
        if re.fullmatch(r"[0-9a-f]{16}\.js", path.name) and path.name not in names:
            path.unlink()
    if not any(folder.iterdir()):
        folder.rmdir()


# --- Packing


class _Latent(NamedTuple):
    """A latent as the page needs it: packed for its own view, and what the list and the headline numbers need."""

    packed: str
    scalars: dict[str, Any]
    words: list[str]
    promotes: list[str]
    atom: str | None
    sums: tuple[int, float, float]  # active rows, and the sums of their values: the encoder's, the refined ones
    lengths: dict[str, set[int]]  # of its lists, by what they must agree with


def _pack(value: Any) -> str:
    return base64.b64encode(zlib.compress(_json(value).encode())).decode()


def _json(value: Any) -> str:
    """Without NaN and infinity, which are no JSON, and in ASCII, so that half a surrogate pair is no error."""
    return json.dumps(value, allow_nan=False, separators=(",", ":"))


def _parts(packed: list[str]) -> tuple[list[str], list[int]]:
    """Packed latents, separated by spaces, in parts of about `_PART` characters; and the first latent of each."""
    starts, length = [0], 0
    for n, text in enumerate(packed):
        if length and length + len(text) > _PART:
            starts.append(n)
            length = 0
        length += len(text) + 1
    return [" ".join(packed[a:b]) for a, b in zip(starts, [*starts[1:], len(packed)], strict=True)], starts


def _index(found: dict[str, Any]) -> dict[str, Any]:
    """What the list needs, a list for each of its columns, and what is common to all latents."""
    latents = found["latents"]
    columns = {name: [latent.scalars[name] for latent in latents] for name in _SCALARS}
    columns |= {name: [getattr(latent, name) for latent in latents] for name in ("words", "promotes")}
    columns["atom"] = [latent.atom for latent in latents]
    common = {name: found[name] for name in ("rows_are", "patch", "ablation", "edges", "ratio_edges")}
    return common | {"columns": columns, "rows": _rows(found)}


def _rows(found: dict[str, Any]) -> int:
    """Rows that were counted."""
    return found["data"]["rows"] - found["data"]["nonfinite"]


def _peak(example: dict[str, Any]) -> str | None:
    """The token of an example's own row, if it is shown."""
    if example["tokens"] is None or example["position"] is None or example["first"] is None:
        return None
    place = example["position"] - example["first"]
    return example["tokens"][place] if 0 <= place < len(example["tokens"]) else None


def _latent(found: dict[str, Any]) -> _Latent:
    words = [token for token in map(_peak, found["top"]) if token is not None]
    count, pictures = found["count"], [example["pixels"] for example in _examples(found)] + [found["atom"]]
    return _Latent(
        packed=_pack(found),
        scalars={name: found[name] for name in _SCALARS},
        words=list(dict.fromkeys(words))[:_WORDS],
        promotes=[token["token"] for token in (found["promotes"] or [])[:_WORDS]],
        atom=None if found["atom"] is None else base64.b64encode(bytes(found["atom"])).decode(),
        sums=(count, count * (found["mean"] or 0.0), count * (found["mean_refined"] or 0.0)),
        lengths={
            "edges": {len(found[name]) + 1 for name in ("values", "refined_values")},
            "ratio_edges": {len(found["ratios"]) + 1},
            "patch": {len(bytes(picture)) for picture in pictures if picture is not None},  # each is 0 to 255
        },
    )


# --- The page


def _facts(found: dict[str, Any]) -> dict[str, str]:
    """The headline numbers."""
    latents, of = found["latents"], found["sae"]["latents"]
    counts, before, after = ([latent.sums[n] for latent in latents] for n in range(3))
    total, densities = math.fsum(before), [latent.scalars["density"] for latent in latents]
    return {
        "latents": f"{len(latents):,}" + (f" of {of:,}" if len(latents) < of else ""),
        "rows": f"{_rows(found):,}",
        "dead on these rows": form(counts.count(0) / len(counts) if counts else None, ".3g%"),
        "median density": form(statistics.median(densities) if densities else None, ".2g%"),
        "values, by refinement": form(math.fsum(after) / total - 1 if total else None, "+.1%"),
    }


def _page(found: dict[str, Any], facts: dict[str, str], data: dict[str, str]) -> str:
    nonfinite = found["data"]["nonfinite"]
    warnings = [f"Rows that hold NaN or Inf, and are left out: {nonfinite:,}."] if nonfinite else []
    tables = [html.pairs("Autoencoder", found["sae"]), html.pairs("Data", found["data"] | found["origin"])]
    sections = {"Latents": _file("features_page.html"), "Configuration": html.grid(tables)}
    elements = "".join(f'<script type="text/plain" id="{name}">{text}</script>\n' for name, text in data.items())
    looks = {"style": _file("features_page.css"), "script": _file("features_page.js")}
    return html.document("Features", _subtitle(found), facts, warnings, sections, data=elements, **looks)


def _subtitle(found: dict[str, Any]) -> str:
    origin = found["origin"]
    where = [f"layer {origin['layer']}"] if origin.get("layer") is not None else []
    where += [str(origin[name]) for name in ("site", "model") if origin.get(name)]
    return ", ".join([found["sae"]["path"], *where])


@functools.cache
def _file(name: str) -> str:
    return (Path(__file__).parent / name).read_text(encoding="utf-8")


# --- Reading

_INT, _NUMBER, _TEXT, _NONE = {int}, {int, float}, {str}, {type(None)}
_HEADER = {"sae": {dict}, "origin": {dict}, "data": {dict}, "rows_are": _TEXT, "patch": {dict} | _NONE}
_HEADER |= {"ablation": _TEXT | _NONE, "latents": {list}}
_LATENT = {"index": _INT, "count": _INT, "density": _NUMBER}
_LATENT |= dict.fromkeys(("mean", "mean_refined", "max", "max_refined", "shrinkage", "loss_effect"), _NUMBER | _NONE)
_EXAMPLE = {"row": _INT} | dict.fromkeys(("value", "refined"), _NUMBER | _NONE)
_EXAMPLE |= dict.fromkeys(("context", "position", "document", "first"), _INT | _NONE)
_LISTS = {
    "coactive": {"index": _INT, "given": _NUMBER | _NONE, "lift": _NUMBER | _NONE},
    "nearest": {"index": _INT, "cosine": _NUMBER | _NONE},
    "promotes": {"id": _INT, "token": _TEXT, "logit": _NUMBER | _NONE},
    "suppresses": {"id": _INT, "token": _TEXT, "logit": _NUMBER | _NONE},
}


def _read(path: Path) -> dict[str, Any]:
    """features.json, checked, its latents packed while they are read, since all of them may not fit into memory."""
    damaged: list[str] = []

    def hook(value: dict[str, Any]) -> Any:
        if not {"index", "top", "values"} <= value.keys():
            return value
        try:
            _check_latent(value)
            return _latent(value)
        except (TypeError, ValueError, LookupError, OverflowError) as error:
            damaged.append(f"latent {value['index']!r:.20}: {first_line(error)}")
            return None

    if not path.is_file():
        raise InputError(f"{path}: no such file; pass a directory that jaxsae features wrote.")
    with in_one_line(f"{path}: is not JSON", "make it again"):
        found = json.loads(path.read_bytes(), parse_constant=lambda name: None, object_hook=hook)
    if not isinstance(found, dict) or found.get("format") != FORMAT:
        raise InputError(f"{path}: is not of jaxsae features; pass a directory that it wrote.")
    if found.get("version") != VERSION:
        got = f"{found.get('version')!r:.20}"
        raise InputError(f"{path}: is of version {got}, expected {VERSION}; make it again with this jaxsae.")
    with in_one_line(f"{path}: is damaged", "make it again"):
        if damaged:
            raise ValueError(damaged[0])
        _check_header(found)
    return found


def _check_latent(found: dict[str, Any]) -> None:
    _fields(found, _LATENT)
    for name in ("values", "refined_values", "ratios"):
        _items(found, name, _INT)
    for name, fields in _LISTS.items():
        if found[name] is not None or name in ("coactive", "nearest"):
            _items(found, name, {dict})
            for item in found[name]:
                _fields(item, fields)
    _items(found, "bands", {dict})
    for band in found["bands"]:
        _fields(band, {"low": _NUMBER | _NONE, "high": _NUMBER | _NONE})
    if found["atom"] is not None:
        _items(found, "atom", _INT)
    for example in _examples(found):
        _check_example(example)


def _examples(found: dict[str, Any]) -> list[dict[str, Any]]:
    groups = [found, *found["bands"]]
    for group, name in zip(groups, ["top"] + ["examples"] * len(found["bands"]), strict=True):
        _items(group, name, {dict})
    return [*found["top"], *(example for band in found["bands"] for example in band["examples"])]


def _check_example(found: dict[str, Any]) -> None:
    _fields(found, _EXAMPLE)
    if found["pixels"] is not None:
        _items(found, "pixels", _INT)
    if found["tokens"] is not None:
        _items(found, "tokens", _TEXT)
    for name in ("values", "refined_values"):
        if found[name] is not None:
            _items(found, name, _NUMBER | _NONE)
            _same(f"items of {name}", len(found[name]), len(found["tokens"] or ()))


def _check_header(found: dict[str, Any]) -> None:
    _fields(found, _HEADER)
    _fields(found["sae"], {"path": _TEXT, "latents": _INT, "width": _INT})
    _fields(found["data"], {"rows": _INT, "nonfinite": _INT})
    patch = found["patch"]
    if found["rows_are"] not in ("tokens", "patches", "rows"):
        raise ValueError(f"rows_are is {found['rows_are']!r:.20}, expected tokens, patches or rows")
    _same("patch", patch is not None, found["rows_are"] == "patches")
    if patch is not None:
        _fields(patch, {"height": _INT, "width": _INT, "channels": _INT})
    for name in ("edges", "ratio_edges"):
        _items(found, name, _NUMBER)
        if len(found[name]) < 2 or not all(map(operator.lt, found[name], found[name][1:])):
            raise ValueError(f"{name} do not increase")
    _items(found, "latents", {_Latent})
    pixels = 0 if patch is None else patch["height"] * patch["width"] * patch["channels"]
    lengths = {"edges": len(found["edges"]), "ratio_edges": len(found["ratio_edges"]), "patch": pixels}
    for latent in found["latents"]:
        index = latent.scalars["index"]
        for name, length in lengths.items():
            _same(f"latent {index}: length by {name}", latent.lengths[name] | {length}, {length})
        if not 0 <= index < found["sae"]["latents"]:
            raise ValueError(f"latent {index} of {found['sae']['latents']}")
    indices = {latent.scalars["index"] for latent in found["latents"]}
    _same("different latents", len(indices), len(found["latents"]))


def _fields(found: dict[str, Any], fields: dict[str, set[type]]) -> None:
    for name, types in fields.items():
        if type(found[name]) not in types:
            raise TypeError(f"{name} is {type(found[name]).__name__}")


def _items(found: dict[str, Any], name: str, types: set[type]) -> None:
    _fields(found, {name: {list}})
    if not set(map(type, found[name])) <= types:
        raise TypeError(f"{name} holds {', '.join(sorted({type(item).__name__ for item in found[name]}))}")


def _same(what: str, got: Any, expected: Any) -> None:
    if got != expected:
        raise ValueError(f"{what}: {got}, expected {expected}")
