"""Activations: from pre-activations to a code, each a small pytree that holds its own parameters.

An activation maps pre-activations `[*b m]` to the dense code `[*b m]`. `Activation` has defaults for everything else
that an SAE uses, so a new one is a dataclass with a `__call__`.
"""

import numbers
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from jaxsae import codes
from jaxsae._core.linalg import promote_dtypes
from jaxsae.codes import SparseCode

__all__ = ["Activation"]


class Activation:
    """Base class of activations; decorate subclasses with `pytrees.dataclass`.

    Floating-point fields are trained with the weights, except those declared with `pytrees.fixed`.

    Attributes:
      slots: number of slots per row, if the activation fixes it, or None.
      signed: whether values may be negative; `refine` then leaves their sign free.
      selects: whether it selects pre-activations and returns them unchanged, in a fixed number of slots; `encode` then
        differentiates through the selected ones only.
      takes_largest: whether it returns the largest positive pre-activations unchanged, so that a threshold can replace
        it (`autoencoder.rethreshold`).
      encoder_free: whether the code is computed from the dictionary by `pursue`, without an encoder.

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
        # A subclass that redefines the dense code may scale differently from its base class, and have other values.
        if "__call__" in vars(cls):
            for name in {"rescale", "takes_largest"} - vars(cls).keys():
                setattr(cls, name, vars(Activation)[name])

    @property
    def slots(self) -> int | None:
        """None: the number of active latents varies by row."""
        return None

    def __call__(self, pre: Float[Array, "*b m"]) -> Float[Array, "*b m"]:
        """The dense code."""
        raise NotImplementedError(f"{type(self).__name__} has no __call__; define what it does to pre-activations.")

    def pursue(self, y: Float[Array, "*b d"], dictionary: Float[Array, "m d"]) -> Float[Array, "*b m"]:
        """The dense code of rows, for activations with `encoder_free`."""
        raise NotImplementedError(f"{type(self).__name__} does not pursue; call it on pre-activations.")

    def code(self, pre: Float[Array, "*b m"], capacity: int) -> SparseCode:
        """The same code in `capacity` slots per row, by descending magnitude; `num_dropped` counts the rest."""
        return codes.from_dense(self(pre), capacity)

    def train(self, pre: Float[Array, "b m"]) -> tuple[Float[Array, "b m"], "Activation"]:
        """The dense code of a training batch, and the updated activation: `self`, unless it estimates something."""
        return self(pre), self

    def margin(self, pre: Float[Array, "*b m"]) -> Float[Array, "*b m"]:
        """How far each pre-activation exceeds its threshold, for activations that have thresholds."""
        raise NotImplementedError(f"{type(self).__name__} has no threshold to move; pass BatchTopK or JumpReLU.")

    def at_margin(self, t: float | Array) -> "Activation":
        """The activation, thresholds moved so that exactly the positive latents with margin above `t` are active."""
        raise NotImplementedError(f"{type(self).__name__} has no threshold to move; pass BatchTopK or JumpReLU.")

    def rescale(self, scale: float | Array) -> "Activation":
        """The activation in other units: `rescale(s)(pre/s) = self(pre)/s`."""
        raise ValueError(f"{type(self).__name__} does not support a change of units; define rescale(self, scale).")


def validate(activation: Any, name: str) -> None:
    """Raise unless `activation` is an instance of `Activation` and a pytree.

    Args:
      activation: the argument to check.
      name: name of the calling function, for the message.

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
            f"`{name}` got an activation of class {type(activation).__name__}, which is not a pytree; "
            "decorate the class with @jaxsae.pytrees.dataclass."
        )


def check_number(activation: Activation, name: str, kind: type, least: int, most: int | float, expected: str) -> None:
    """Raise unless an option is in its range, None, or an array, which may be traced.

    Args:
      activation: the activation that has the option.
      name: name of the option.
      kind: `numbers.Integral` or `numbers.Real`.
      least: smallest allowed value.
      most: largest allowed value.
      expected: the allowed values in words, for the message.

    Example:
      >>> import jaxsae
      >>> check_number(jaxsae.TopK(4, keep=2), "keep", numbers.Real, 0, 4, "a number from 0 to k = 4")
    """
    value = getattr(activation, name)
    in_range = isinstance(value, kind) and not isinstance(value, bool) and least <= value <= most
    if isinstance(value, numbers.Number | str) and not in_range:
        raise ValueError(f"{type(activation).__name__} got {name} = {value}; pass {expected}.")


def _of_any_units(self: Activation, scale: float | Array) -> Any:
    """Return self: the activation is positively homogeneous."""
    del scale
    return self


def _past(threshold, pre, value):
    """The positive part of `value` where `pre > threshold`, else 0; NaN in any of the three gives NaN."""
    pre, threshold = promote_dtypes(pre, threshold)
    value = jnp.where(jnp.isnan(pre - threshold), jnp.nan, value)
    return jnp.where((pre > threshold) | jnp.isnan(value), jax.nn.relu(value), 0)
