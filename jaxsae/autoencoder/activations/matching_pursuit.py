"""Matching pursuit in place of an encoder."""

import dataclasses
import numbers
import sys

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from jaxsae._core import pytrees
from jaxsae.autoencoder.activations.base import Activation, check_number

_GRAM = 4096  # latents up to which a Gram matrix is computed: 64 MiB in float32


@pytrees.dataclass
class MatchingPursuit(Activation):
    """Matching pursuit without an encoder: repeatedly take the atom that correlates most with the residual.

        j = argmax ⟨a_j, r⟩,   z_j ← z_j + max(⟨a_j, r⟩, 0),   r ← r − max(⟨a_j, r⟩, 0) a_j,   from r = x − b_dec

    Atoms should have norm 1. A row stops when `‖r‖` falls below a threshold, when a step leaves its support unchanged,
    or after `max_steps`. (`pursuit.matching_pursuit` is for dictionaries of any norm.)

    Attributes:
      residual_threshold: `‖r‖` below which a row stops; 0 to disable.
      max_steps: maximum steps per row; `d` if None; static.
      stop_on_duplicate: whether a row stops when a step leaves its support unchanged; static.

    Raises:
      ValueError: if the threshold is negative or not finite, or `max_steps < 1`.

    Example:
      >>> import jax.numpy as jnp, jaxsae
      >>> jaxsae.autoencoder.activations.MatchingPursuit().pursue(jnp.array([3.0, 4.0]), jnp.eye(2))
      Array([3., 4.], dtype=float32)

    Source: Costa et al. (2025), "From flat to hierarchical: extracting sparse representations with matching pursuit";
      SAELens' `matching_pursuit`.
    """

    residual_threshold: float | Float[Array, ""] = pytrees.fixed(default=0.01)
    max_steps: int | None = pytrees.static(default=None)
    stop_on_duplicate: bool = pytrees.static(default=True)
    encoder_free = True

    def __post_init__(self):
        norm, count = "a finite norm of at least 0", "a whole number of at least 1, or None"
        check_number(self, "residual_threshold", numbers.Real, 0, sys.float_info.max, norm)
        check_number(self, "max_steps", numbers.Integral, 1, sys.maxsize, count)

    def __call__(self, pre: Float[Array, "*b m"]) -> Float[Array, "*b m"]:
        """Raise: matching pursuit has no pre-activations; use `pursue`."""
        raise NotImplementedError("MatchingPursuit has no pre-activations; call `encode_dense`.")

    def pursue(self, y: Float[Array, "*b d"], dictionary: Float[Array, "m d"]) -> Float[Array, "*b m"]:
        """The dense code of rows `y`; its derivative holds the atoms chosen fixed."""
        chosen, z = self._choose(*jax.lax.stop_gradient((y.reshape(-1, y.shape[-1]), dictionary)))
        return _values(z.reshape(*y.shape[:-1], -1), chosen, y, dictionary)

    def l0_by_step(self, y: Float[Array, "n d"], dictionary: Float[Array, "m d"]) -> Float[Array, " steps"]:
        """The mean number of active latents per row after each step."""
        chosen, _ = self._choose(y, dictionary)

        def before(number):  # whether an atom was chosen in an earlier step
            earlier = jnp.arange(len(chosen))[:, None] < number
            return jnp.any(earlier & (chosen == chosen[number]), axis=0)

        again = jax.lax.map(before, jnp.arange(len(chosen)))
        new = (chosen < dictionary.shape[0]) & ~again
        return jnp.cumsum(jnp.mean(new.astype(jnp.float32), axis=1))

    def _choose(self, y, dictionary):
        """The atom that each step takes, `[steps n]`, or `m` where a row has stopped, and the code `[n m]`.

        Correlations with the residual are updated by rows of the Gram matrix where that is small, which is
        faster; they only select, so that values are as accurate either way.
        """
        (m, d), rows = dictionary.shape, jnp.arange(len(y))
        steps = d if self.max_steps is None else self.max_steps
        gram = dictionary @ dictionary.T if m <= min(_GRAM, steps * len(y)) else None

        def step(state):
            number, z, r, correlation, done, chosen = state
            if correlation is None:
                at = jnp.argmax(jax.nn.relu(r @ dictionary.T), axis=1)
            else:
                at = jnp.argmax(jax.nn.relu(correlation), axis=1)
            atoms = dictionary[at]
            values = jnp.where(done, 0, jax.nn.relu(jnp.sum(r * atoms, axis=1)))
            chosen = chosen.at[number].set(jnp.where(values > 0, at, m).astype(jnp.int32))
            after = z.at[rows, at].add(values)
            r = r - values[:, None] * atoms
            correlation = None if gram is None else correlation - values[:, None] * gram[at]
            if self.stop_on_duplicate:
                done |= ((after != 0) == (z != 0)).all(1)
            done |= (self.residual_threshold > 0) & (jnp.linalg.norm(r, axis=1) < self.residual_threshold)
            return number + 1, after, r, correlation, done, chosen

        nothing = jnp.full((steps, len(y)), m, jnp.int32)
        correlation = None if gram is None else y @ dictionary.T
        start = jnp.int32(0), jnp.zeros((len(y), m), y.dtype), y, correlation, jnp.zeros(len(y), bool), nothing
        _, z, _, _, _, chosen = jax.lax.while_loop(lambda s: (s[0] < steps) & ~s[4].all(), step, start)
        return chosen, z

    def rescale(self, scale: float | Array) -> "MatchingPursuit":
        """The activation in other units."""
        return dataclasses.replace(self, residual_threshold=self.residual_threshold / scale)


@jax.custom_jvp
def _values(z, chosen, y, dictionary):
    """The code `z` of rows `[*b d]`, already computed, with the derivative for the atoms chosen."""
    return z


@_values.defjvp
def _values_tangent(primals, tangents):
    z, chosen, y, dictionary = primals
    _, _, *dots = tangents
    return z, jax.jvp(lambda y, dictionary: _replay(chosen, y, dictionary), (y, dictionary), tuple(dots))[1]


def _replay(chosen, y, dictionary):
    """The code by the atoms chosen `[steps n]`, in a loop that has a derivative."""
    m, d = dictionary.shape

    def step(r, at):
        atoms = dictionary.at[at].get(mode="fill", fill_value=0)
        value = jax.nn.relu(jnp.sum(r * atoms, axis=1))
        return r - value[:, None] * atoms, value

    _, values = jax.lax.scan(step, y.reshape(-1, d), chosen)
    rows = jnp.arange(chosen.shape[1])
    z = jnp.zeros((chosen.shape[1], m), values.dtype).at[rows, chosen].add(values, mode="drop")
    return z.reshape(*y.shape[:-1], m)
