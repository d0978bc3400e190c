"""What reconstructions do to the next-token loss of the language model that the rows come from."""

import os
from typing import Any

import numpy as np

from jaxsae import language_model
from jaxsae._core.files import InputError, json_number, shown
from jaxsae.app import sources
from jaxsae.autoencoder import stream
from jaxsae.autoencoder.sae import SAE, reconstruct
from jaxsae.data import origin
from jaxsae.data.rows import Rows
from jaxsae.language_model import files, sites

_CONTEXTS = 16  # of the last rows


def open_probe(model: str, data: str | os.PathLike, rows: Rows, place: origin.Origin) -> sources.Probe:
    """The language model of a harvest, and the last contexts of it.

    Args:
      model: as for `language_model.load`.
      data: the directory of the harvest.
      rows: its rows.
      place: where the reconstructed rows come from.

    Raises:
      InputError: if the directory does not say its tokens or its site, or the model is another one.

    Example:
      >>> open_probe("smollm2", "x.npy", np.zeros((4, 2)), origin.Origin())
      Traceback (most recent call last):
      jaxsae.InputError: x.npy: does not say of which site it is; pass what jaxsae harvest wrote.
    """
    origin.require_model(model, place, f"{shown(data)} is")
    layer, site = place.layer, place.site
    if place.target_site is not None:
        layer, site = place.target_layer, place.target_site
    if layer is None or site is None:
        raise InputError(f"{shown(data)}: does not say of which site it is; pass what jaxsae harvest wrote.")
    tokens = origin.contexts(data, len(rows))
    if tokens is None:
        raise InputError(f"{shown(data)}: nothing says the tokens of its rows; pass what jaxsae harvest wrote.")
    config = files.read_config(model)
    sites.require(config, layer, site)
    if tokens.max() >= config.vocab:
        what = f"holds token {tokens.max()}, the model's vocabulary has {config.vocab}"
        raise InputError(f"{shown(data)}: {what}; pass the model of the harvest.")
    return sources.Probe(language_model.load(model), layer, site, tokens[-_CONTEXTS:])


def measure(sae: SAE, rows: Rows, probe: sources.Probe) -> dict[str, Any]:
    """The loss with reconstructions in place of the last rows, from the encoder's values and from the refined ones.

    Besides the cross-entropies `ce_clean`, `ce_zero` (with zeros in their place), `ce_before` and `ce_after`, the share
    of the difference between the first two that each restores, `recovered_before` and `recovered_after`.

    Args:
      sae: the autoencoder.
      rows: as `stream.chunks` takes them; those of the probe's contexts are the last.
      probe: the language model, and its contexts.
    """
    count = probe.contexts.shape[0] * (probe.contexts.shape[1] - 1)
    replaced = {name: np.zeros((count, sae.W_dec.shape[1]), np.float32) for name in ("zero", "before", "after")}
    for block in stream.refine_blocks(sae, rows[len(rows) - count :]):
        for name, code in {"before": block.code, "after": block.refined}.items():
            replaced[name][block.rows] = reconstruct(sae, block.x, code)
    found = sources.losses(probe, replaced)
    numbers = {f"ce_{name}": json_number(each.cross_entropy) for name, each in found.items()}
    recovered = {
        f"recovered_{name}": json_number(language_model.loss_recovered(found["clean"], found[name], found["zero"]))
        for name in ("before", "after")
    }
    return numbers | recovered | {"ce_contexts": len(probe.contexts)}
