"""An autoencoder to go on from: made to fit a training, in its units."""

import dataclasses
from typing import Any

import jax.numpy as jnp

from jaxsae._core.files import InputError
from jaxsae._core.linalg import norms
from jaxsae.app.options import FAMILIES, Options
from jaxsae.app.units import Units
from jaxsae.autoencoder.activations import JumpReLU, ReLU
from jaxsae.autoencoder.sae import SAE

_UNIT = 1e-3  # how far from 1 the norm of an atom may be


def prepared(sae: SAE, options: Options, units: Units) -> SAE:
    """The autoencoder for rows scaled for training, with atoms of norm 1 and the options' sparsity.

    Args:
      sae: for unscaled rows, such as a published one.
      options: of the training.
      units: of the training.

    Raises:
      InputError: if it does not fit the options or the rows, or computes what no training keeps.

    Example:
      >>> import jax, jaxsae
      >>> sae = jaxsae.init(jax.random.key(0), d=4, m=8, activation=jaxsae.TopK(2), b_dec=jax.numpy.ones(4))
      >>> prepared(sae, Options("topk", latents=8, k=3), Units(jnp.zeros(4), 0.5)).activation.k
      3
    """
    expected = FAMILIES[options.activation].activation(options)
    for what, got, wanted in (
        ("latents", sae.m, options.latents),
        ("width", sae.d, units.width),
        ("output width", sae.b_dec.size, len(units.centre)),
        ("kind", _kind(sae.transcoder), _kind(units.inputs is not None)),
        ("skip connection", sae.W_skip is not None, options.skip),
        ("activation", type(sae.activation).__name__, type(expected).__name__),
    ):
        if got != wanted:
            raise InputError(f"got an SAE of {what} {got} to start from, expected {wanted}; pass options that fit it.")
    if sae.apply_b_dec_to_input == sae.transcoder:
        raise InputError("got an SAE that does not subtract b_dec from its input to start from; take another.")
    if sae.normalisation is not None:
        name = type(sae.normalisation).__name__
        raise InputError(f"got an SAE with {name} to start from, whose rows a training scales otherwise; take another.")
    sae = dataclasses.replace(sae, activation=_with_sparsity(sae.activation, expected))
    return units.for_training(_with_unit_atoms(sae))


def _kind(transcoder: bool) -> str:
    return "transcoder" if transcoder else "autoencoder"


def _with_sparsity(found: Any, expected: Any) -> Any:
    """The activation with its own parameters, but the number of active latents of another."""
    static = {field.name for field in dataclasses.fields(expected) if not field.metadata.get("pytree_node", True)}
    changed: Any = {name: getattr(expected, name) for name in static}
    return dataclasses.replace(found, **changed)


def _with_unit_atoms(sae: SAE) -> SAE:
    """The same function with atoms of norm 1, as a training keeps them: their norms are moved into the encoder."""
    length = norms(sae.W_dec)[:, 0]
    if bool(jnp.all(jnp.abs(length - 1) < _UNIT)):
        return sae
    if not isinstance(sae.activation, ReLU | JumpReLU) or bool(jnp.any(length == 0)):
        low, high = float(length.min()), float(length.max())
        what = f"atoms of norm {low:.3g} to {high:.3g}, expected 1, without which {type(sae.activation).__name__}"
        raise InputError(f"got an SAE to start from with {what} selects other latents; take another.")
    activation = sae.activation
    if isinstance(activation, JumpReLU):
        activation = dataclasses.replace(activation, threshold=activation.threshold * length)
    scaled = {"W_enc": sae.W_enc * length, "b_enc": sae.b_enc * length, "W_dec": sae.W_dec / length[:, None]}
    return dataclasses.replace(sae, **scaled, activation=activation)
