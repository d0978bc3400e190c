"""Places in a language model where activations are taken or replaced, and their names in other libraries.

Of block `layer`, in the order of computation:

    resid_pre   the residual before the block
    hook_z      what attention mixed, heads side by side, before its output map
    attn_out    what attention adds to the residual
    resid_mid   the residual between attention and MLP; blocks that run both in parallel have none
    mlp_in      what the MLP reads, behind its norm
    mlp_out     what the MLP adds to the residual
    resid_post  the residual after the block
"""

import re
from collections.abc import Sequence
from typing import NamedTuple

from jaxsae._core.files import InputError
from jaxsae.language_model.config import SITES, Config

_HOOKS = {  # of TransformerLens and SAELens, `blocks.{layer}.…`
    **{f"hook_{site}": site for site in SITES if site not in ("hook_z", "mlp_in")},
    "attn.hook_z": "hook_z",
    "mlp.hook_in": "mlp_in",
    "mlp.hook_out": "mlp_out",
}
_MODULES = {  # of transformers, `model.layers.{layer}.…`, in the configurations of Gemma Scope 2
    "output": "resid_post",
    "mlp.input": "mlp_in",
    "mlp.output": "mlp_out",
    "self_attn.o_proj.input": "hook_z",
    "pre_feedforward_layernorm.output": "mlp_in",
    "post_feedforward_layernorm.output": "mlp_out",
}


class Site(NamedTuple):
    """A place in a language model.

    Attributes:
      layer: the block, from 0.
      site: one of `SITES`.

    Example:
      >>> Site(8).site
      'resid_post'
    """

    layer: int
    site: str = "resid_post"


def parse(name: str) -> tuple[int | None, str]:
    """The layer, if it says so, and the site of a name: ours, or a hook of SAELens, TransformerLens or Gemma Scope.

    Args:
      name: such as `"mlp_out"`, `"blocks.8.hook_mlp_out"` or `"model.layers.8.mlp.output"`.

    Raises:
      InputError: if there is no such site.

    Example:
      >>> parse("blocks.8.attn.hook_z"), parse("mlp_out")
      ((8, 'hook_z'), (None, 'mlp_out'))
    """
    if name in SITES:
        return None, name
    found = re.fullmatch(r"(blocks|model\.layers)\.(\d+)\.(.+)", name)
    table = _HOOKS if found and found[1] == "blocks" else _MODULES
    if found is None or found[3] not in table:
        raise InputError(f"got site {name!r}; pass one of {', '.join(SITES)}, or a hook such as blocks.8.hook_mlp_out.")
    return int(found[2]), table[found[3]]


def hook(layer: int, site: str) -> str:
    """The name of a place in TransformerLens and SAELens.

    Args:
      layer: the block, from 0.
      site: one of `SITES`.

    Example:
      >>> hook(8, "hook_z"), hook(8, "resid_post")
      ('blocks.8.attn.hook_z', 'blocks.8.hook_resid_post')
    """
    return f"blocks.{layer}.{next(name for name, known in _HOOKS.items() if known == site)}"


def module(layer: int, site: str) -> str | None:
    """The name of a place in the configurations of Gemma Scope 2, or None.

    Args:
      layer: the block, from 0.
      site: one of `SITES`.

    Example:
      >>> module(8, "resid_post"), module(8, "resid_mid")
      ('model.layers.8.output', None)
    """
    name = next((name for name, known in reversed(_MODULES.items()) if known == site), None)
    return None if name is None else f"model.layers.{layer}.{name}"


def points(layers: Sequence[int], names: Sequence[str]) -> list[Site]:
    """All sites at all layers; a name that says its layer stands for itself.

    Args:
      layers: blocks, from 0.
      names: as for `parse`.

    Raises:
      InputError: if there is no such site, or no layer, or none of the names needs the layers.

    Example:
      >>> [tuple(point) for point in points([4, 8], ["resid_post", "blocks.6.hook_mlp_out"])]
      [(4, 'resid_post'), (8, 'resid_post'), (6, 'mlp_out')]
    """
    found, parsed = [], [parse(name) for name in names]
    alone = [layer for layer, _ in parsed if layer is None]
    if bool(alone) != bool(layers):
        what = "a site without a layer" if alone else f"layers {list(layers)}, and sites that name their own"
        raise InputError(f"got {what}; pass {'--layer too' if alone else 'one of them'}.")
    for layer, site in parsed:
        found += [Site(each, site) for each in (layers if layer is None else [layer])]
    return found


def require(config: Config, layer: int, site: str) -> None:
    """Raise if a model has no such place.

    Args:
      config: of the model.
      layer: the block, from 0.
      site: one of `SITES`.

    Raises:
      InputError: naming what the model has.

    Example:
      >>> from jaxsae.language_model import tiny
      >>> require(tiny().config, 3, "mlp_out")
      Traceback (most recent call last):
      jaxsae.InputError: got layer 3, the model has 3; pass one from 0 to 2.
    """
    if isinstance(layer, bool) or not hasattr(layer, "__index__") or not 0 <= layer < config.layers:
        raise InputError(f"got layer {layer}, the model has {config.layers}; pass one from 0 to {config.layers - 1}.")
    if site not in SITES:
        raise InputError(f"got site {site!r}; pass one of {', '.join(SITES)}.")
    if site == "resid_mid" and config.parallel:
        what = f"a {config.family} runs attention and MLP in parallel"
        raise InputError(f"got site 'resid_mid', and {what}; pass another site.")


def width(config: Config, site: str) -> int:
    """The width of the activations at a site.

    Args:
      config: of the model.
      site: one of `SITES`.

    Example:
      >>> from jaxsae.language_model import tiny
      >>> width(tiny().config, "hook_z")
      8
    """
    return config.heads * config.head_width if site == "hook_z" else config.width
