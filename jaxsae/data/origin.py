"""Where rows come from, and where an autoencoder of them belongs: a site of a language model, and its contexts."""

import os
from typing import Any, NamedTuple

import numpy as np

from jaxsae._core.files import InputError, any_path, reached, shown
from jaxsae.data import shards


class Origin(NamedTuple):
    """A site of a language model; None for what is not known.

    Attributes:
      model: its name or path.
      layer: the block, from 0.
      site: where in it, one of `language_model.SITES`.
      context: tokens in a context.
      data: the text that it read.
      target_layer: of a transcoder, the block that its target is in.
      target_site: and where in it.

    Example:
      >>> str(Origin("gpt2", 8, "mlp_out", 256))
      'gpt2, layer 8, mlp_out, contexts of 256 tokens'
    """

    model: str | None = None
    layer: int | None = None
    site: str | None = None
    context: int | None = None
    data: str | None = None
    target_layer: int | None = None
    target_site: str | None = None

    def __str__(self) -> str:
        """What is known, in words."""
        texts = {"model": "{}", "layer": "layer {}", "site": "{}", "context": "contexts of {} tokens", "data": "on {}"}
        texts |= {"target_layer": "to layer {}", "target_site": "to {}"}
        return ", ".join(texts[name].format(value) for name, value in self.known().items())

    def known(self) -> dict[str, Any]:
        """What is known, by name."""
        return {name: value for name, value in self._asdict().items() if value is not None}


def of_rows(path: str | os.PathLike) -> Origin:
    """Where the rows of a file or directory come from, if a manifest says so.

    Args:
      path: as for `open_rows`.

    Example:
      >>> of_rows("x.npy").known()
      {}
    """
    return _read(_source(path))


def _source(path: str | os.PathLike) -> dict[str, Any]:
    """What the manifest of a directory says of its rows, if there is one."""
    folder = any_path(path)
    with reached(folder):
        if not (folder / shards.MANIFEST).is_file():
            return {}
    source = shards.read(folder).source
    return source if isinstance(source, dict) else {}


def _read(source: dict[str, Any]) -> Origin:
    texts = source.get("text")
    data = ", ".join(map(str, texts[:3])) + (", …" if len(texts) > 3 else "") if isinstance(texts, list) else texts
    kinds = {"model": str, "layer": int, "site": str, "context": int}
    found = {name: source[name] for name, kind in kinds.items() if type(source.get(name)) is kind}
    return Origin(**found, data=data if isinstance(data, str) else None)


def of_pairs(path: str | os.PathLike, target: str | os.PathLike) -> Origin:
    """Where the inputs and targets of a transcoder come from, if their manifests say so.

    Args:
      path: the inputs, as for `open_rows`.
      target: the targets, likewise.

    Raises:
      InputError: if they are known to be of other texts, or of other models.

    Example:
      >>> of_pairs("x.npy", "y.npy").known()
      {}
    """
    inputs, targets = _source(path), _source(target)
    for name in ("model", "context", "contexts", "tokens_crc32"):
        got, other = inputs.get(name), targets.get(name)
        if None not in (got, other) and got != other:
            what = f"is of {name} {other}, and {shown(path)} of {got}"
            raise InputError(f"{shown(target)}: {what}; pass rows of the same tokens, from one harvest.")
    found = _read(targets)
    return _read(inputs)._replace(target_layer=found.layer, target_site=found.site)


def require_same(sae: Origin, rows: Origin, what: str = "rows") -> None:
    """Raise if rows are known to be of another site than an autoencoder.

    Args:
      sae: where it belongs.
      rows: where they come from.
      what: what they are called in the message.

    Raises:
      InputError: naming what differs.

    Example:
      >>> require_same(Origin("gpt2", 8, "resid_post"), Origin("gpt2", 4, "resid_post"))
      Traceback (most recent call last):
      jaxsae.InputError: the SAE is of layer 8, the rows of layer 4; pass rows of its own site.
    """
    kinds = {"model": "{}", "layer": "layer {}", "site": "site {}"}
    kinds |= {"target_layer": "a target in layer {}", "target_site": "the target {}"}
    for name, text in kinds.items():
        own, other = getattr(sae, name), getattr(rows, name)
        # A model may be a path here, and a name on the hub there.
        differ = _last(own) != _last(other) if name == "model" else own != other
        if own is not None and other is not None and differ:
            both = f"the SAE is of {text.format(own)}, the {what} of {text.format(other)}"
            raise InputError(f"{both}; pass {what} of its own site.")


def require_model(model: str | os.PathLike, known: Origin, what: str) -> None:
    """Raise if a language model is known to be another than the one that something is of.

    Args:
      model: its name or path.
      known: where that comes from.
      what: what it is, in the message.

    Raises:
      InputError: naming both.

    Example:
      >>> require_model("llama", Origin("gpt2"), "the rows are")
      Traceback (most recent call last):
      jaxsae.InputError: got the model llama, and the rows are of gpt2; pass that one.
    """
    if known.model is not None and _last(model) != _last(known.model):
        raise InputError(f"got the model {model}, and {what} of {known.model}; pass that one.")


def contexts(path: str | os.PathLike, rows: int) -> np.ndarray | None:
    """The tokens `[c s]` beside the rows of a harvest; None if there are none.

    Row `r` is of position `1 + r mod (s − 1)` of context `r // (s − 1)`.

    Args:
      path: the directory.
      rows: how many rows it has.

    Raises:
      InputError: if they are not those of so many rows.

    Example:
      >>> contexts("x.npy", 4) is None
      True
    """
    if not has_column(path, "tokens"):
        return None
    tokens = shards.column(path, "tokens")
    if tokens.ndim != 2 or tokens.dtype.kind not in "iu" or tokens.shape[1] < 2:
        return None  # of somebody who wrote other tokens than a harvest does
    if tokens[:, 1:].size != rows:
        what = f"has {tokens[:, 1:].size} tokens for {rows} rows"
        raise InputError(f"{shown(path)}: {what}, expected one for each but the first of a context; harvest it again.")
    return tokens


def has_column(path: str | os.PathLike, column: str) -> bool:
    """Whether shards have a column beside their rows.

    Args:
      path: any file or directory.
      column: name of the column.

    Example:
      >>> has_column("x.npy", "tokens")
      False
    """
    folder = any_path(path)
    with reached(folder):
        if not (folder / shards.MANIFEST).is_file():
            return False
    return any(f".{column}." in name for name in shards.read(folder).files)


def _last(name: Any) -> str:
    return str(name).rstrip("/").rpartition("/")[2].lower()
