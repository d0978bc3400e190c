"""Where rows come from, and where an autoencoder of them belongs: a site of a language model, and its contexts."""

import os
from typing import Any, NamedTuple

from jaxsae._core.files import InputError, any_path, reached
from jaxsae.data import shards


class Origin(NamedTuple):
    """A site of a language model; None for what is not known.

    Attributes:
      model: its name or path.
      layer: the block, from 0.
      site: where in it, one of `language_model.SITES`.
      context: tokens in a context.
      data: the text that it read.

    Example:
      >>> str(Origin("gpt2", 8, "mlp_out", 256))
      'gpt2, layer 8, mlp_out, contexts of 256 tokens'
    """

    model: str | None = None
    layer: int | None = None
    site: str | None = None
    context: int | None = None
    data: str | None = None

    def __str__(self) -> str:
        """What is known, in words."""
        shown = {"model": "{}", "layer": "layer {}", "site": "{}", "context": "contexts of {} tokens", "data": "on {}"}
        return ", ".join(shown[name].format(value) for name, value in self.known().items())

    def known(self) -> dict[str, Any]:
        """What is known, by name."""
        return {name: value for name, value in self._asdict().items() if value is not None}


def of_rows(path: str | os.PathLike) -> Origin:
    """Where the rows of a file or directory come from, if a manifest says so.

    Args:
      path: as for `open_rows`.

    Example:
      >>> of_rows("x.npy")
      Origin(model=None, layer=None, site=None, context=None, data=None)
    """
    folder = any_path(path)
    with reached(folder):
        if not (folder / shards.MANIFEST).is_file():
            return Origin()
    source = shards.read(folder).source
    source = source if isinstance(source, dict) else {}
    texts = source.get("text")
    data = ", ".join(map(str, texts[:3])) + (", …" if len(texts) > 3 else "") if isinstance(texts, list) else texts
    kinds = {"model": str, "layer": int, "site": str, "context": int}
    found = {name: source[name] for name, kind in kinds.items() if type(source.get(name)) is kind}
    return Origin(**found, data=data if isinstance(data, str) else None)


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
    for name, shown in {"model": "{}", "layer": "layer {}", "site": "site {}"}.items():
        own, other = getattr(sae, name), getattr(rows, name)
        # A model may be a path here, and a name on the hub there.
        differ = _last(own) != _last(other) if name == "model" else own != other
        if own is not None and other is not None and differ:
            both = f"the SAE is of {shown.format(own)}, the {what} of {shown.format(other)}"
            raise InputError(f"{both}; pass {what} of its own site.")


def _last(name: Any) -> str:
    return str(name).rstrip("/").rpartition("/")[2].lower()
