"""Activations: from pre-activations to a code, each a small pytree that holds its own parameters.

An activation is called on pre-activations `[*b m]` and gives the dense code `[*b m]`; all else that an SAE may ask of
it has a default in `Activation`, so that a new one is a dataclass with a `__call__`.
"""

import numbers
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from jaxsae import codes
from jaxsae._core.linalg import together
from jaxsae.codes import SparseCode

__all__ = ["Activation"]


class Activation:
    """What an SAE asks of its activation; subclasses are made by `pytrees.dataclass`.

    Its floating-point fields are trained with the weights; those that are no parameters are made by `pytrees.fixed`.

    Attributes:
      slots: how many slots a row the activation fixes, or None.
      signed: whether values may be negative, so that refining leaves their sign free.
      selects: whether its values are the pre-activations that it selects, as they are, in slots that it fixes: `encode`
        then differentiates these alone. Others are differentiated as they are written.
      takes_largest: whether its values are the pre-activations that are large enough, unchanged: a threshold can then
        replace it (`autoencoder.rethreshold`).
      encoder_free: whether it chooses by the dictionary itself, with no encoder: `pursue` then makes the code.

    Example:
      >>> import jax.numpy as jnp
      >>> from jaxsae import pytrees
      >>> @pytrees.dataclass
      ... class Square(Activation):
      ...     def __call__(self, pre):
      ...         return jnp.maximum(pre, 0) ** 2
      >>> Square()(jnp.array([-1.0, 3.0]))
      Array([0., 9.], dtype=float32)
    """

    signed: bool = False
    selects: bool = False
    takes_largest: bool = False
    encoder_free: bool = False

    def __init_subclass__(cls) -> None:
        # A class that redefines the dense code may have other units than its base class, and other values.
        if "__call__" in vars(cls):
            for name in {"rescale", "takes_largest"} - vars(cls).keys():
                setattr(cls, name, vars(Activation)[name])

    @property
    def slots(self) -> int | None:
        """None: as many latents are active as happen to be."""
        return None

    def __call__(self, pre: Float[Array, "*b m"]) -> Float[Array, "*b m"]:
        """The dense code."""
        raise NotImplementedError(f"{type(self).__name__} has no __call__; define what it does to pre-activations.")

    def pursue(self, y: Float[Array, "*b d"], dictionary: Float[Array, "m d"]) -> Float[Array, "*b m"]:
        """The dense code of rows, if it `encoder_free`."""
        raise NotImplementedError(f"{type(self).__name__} does not pursue; call it on pre-activations.")

    def code(self, pre: Float[Array, "*b m"], capacity: int) -> SparseCode:
        """The same code in `capacity` slots a row, in descending order of magnitude; `num_dropped` counts the rest."""
        return codes.from_dense(self(pre), capacity)

    def train(self, pre: Float[Array, "b m"]) -> tuple[Float[Array, "b m"], "Activation"]:
        """The dense code of a training batch, and the activation after it: the same, unless it estimates something."""
        return self(pre), self

    def margin(self, pre: Float[Array, "*b m"]) -> Float[Array, "*b m"]:
        """How far each latent is past its threshold, of an activation that has thresholds."""
        raise NotImplementedError(f"{type(self).__name__} has no threshold to move; pass BatchTopK or JumpReLU.")

    def at_margin(self, t: float | Array) -> "Activation":
        """The activation under which positive latents of a margin beyond `t` are active, and no others."""
        raise NotImplementedError(f"{type(self).__name__} has no threshold to move; pass BatchTopK or JumpReLU.")

    def rescale(self, scale: float | Array) -> "Activation":
        """The activation in other units: `rescale(s)(pre/s) = self(pre)/s`."""
        raise ValueError(f"{type(self).__name__} does not say how it changes units; define rescale(self, scale).")


def validate(activation: Any, name: str) -> None:
    """Raise unless it is an activation that JAX can take for a pytree.

    Args:
      activation: what was passed for one.
      name: of the function that it was passed to.

    Example:
      >>> import jax
      >>> validate(jax.nn.relu, "init")
      Traceback (most recent call last):
      TypeError: `init` got the function relu for an activation; pass one of jaxsae's, such as jaxsae.ReLU().
    """
    if isinstance(activation, type) and issubclass(activation, Activation):
        raise TypeError(f"`{name}` got the class {activation.__name__} for an activation; call it.")
    if not isinstance(activation, Activation):
        given = getattr(activation, "__name__", None)
        given = f"a {type(activation).__name__}" if given is None else f"the function {given}"
        raise TypeError(f"`{name}` got {given} for an activation; pass one of jaxsae's, such as jaxsae.ReLU().")
    if jax.tree_util.all_leaves([activation]):
        raise TypeError(
            f"`{name}` got an activation of class {type(activation).__name__}, which is no pytree; put "
            "@jaxsae.pytrees.dataclass above its class."
        )


def check_number(activation: Activation, name: str, kind: type, least: int, most: int | float, expected: str) -> None:
    """Raise unless an option is in its range, None, or an array, which may be traced.

    Args:
      activation: whose option it is.
      name: of the option.
      kind: `numbers.Integral` or `numbers.Real`.
      least: allowed.
      most: allowed.
      expected: both in words.

    Example:
      >>> import jaxsae
      >>> check_number(jaxsae.TopK(4, keep=2), "keep", numbers.Real, 0, 4, "a number from 0 to k = 4")
    """
    value = getattr(activation, name)
    in_range = isinstance(value, kind) and not isinstance(value, bool) and least <= value <= most
    if isinstance(value, numbers.Number | str) and not in_range:
        raise ValueError(f"{type(activation).__name__} got {name} = {value}; pass {expected}.")


def _of_any_units(self: Activation, scale: float | Array) -> Any:
    """Itself: what is scaled before is scaled after."""
    del scale
    return self


def _past(threshold, pre, value):
    """The positive part of a value where `pre > threshold`; NaN in any of them is no reason to leave a latent out."""
    pre, threshold = together(pre, threshold)
    value = jnp.where(jnp.isnan(pre - threshold), jnp.nan, value)
    return jnp.where((pre > threshold) | jnp.isnan(value), jax.nn.relu(value), 0)
