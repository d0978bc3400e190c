"""Activations: from pre-activations to a code, each a small pytree that holds its own parameters.

An activation is called on pre-activations `[*b m]` and gives the dense code `[*b m]`; all else that an SAE may ask of
it has a default in `Activation`, so that a new one is a dataclass with a `__call__`.
"""

import dataclasses
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct
from jaxtyping import Array, Bool, Float

from jaxsae import codes, pytrees
from jaxsae.codes import SparseCode

__all__ = [
    "AbsTopK",
    "Activation",
    "BatchTopK",
    "Gated",
    "GroupMax",
    "JumpReLU",
    "MatchingPursuit",
    "ReLU",
    "TopK",
]


class Activation:
    """What an SAE asks of its activation; subclasses are made by `pytrees.dataclass`.

    Its floating-point fields are trained with the weights; those that are no parameters are made by `pytrees.fixed`.

    Attributes:
      slots: how many slots a row the activation fixes, or None.
      signed: whether values may be negative, so that refining leaves their sign free.
      selects: whether its values are the pre-activations that it selects, as they are, in slots that it fixes: `encode`
        then differentiates these alone. Others are differentiated as they are written.
      pursues: whether it chooses by the dictionary itself, with no encoder: `pursue` then makes the code.

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
    pursues: bool = False

    def __init_subclass__(cls) -> None:
        # A class that says anew what the dense code is may have other units than the one that it is derived from.
        if "__call__" in vars(cls) and "rescale" not in vars(cls):
            cls.rescale = Activation.rescale

    @property
    def slots(self) -> int | None:
        """None: as many latents are active as happen to be."""
        return None

    def __call__(self, pre: Float[Array, "*b m"]) -> Float[Array, "*b m"]:
        """The dense code."""
        raise NotImplementedError(f"{type(self).__name__} has no __call__; define what it does to pre-activations.")

    def pursue(self, y: Float[Array, "*b d"], dictionary: Float[Array, "m d"]) -> Float[Array, "*b m"]:
        """The dense code of rows, if it `pursues`."""
        raise NotImplementedError(f"{type(self).__name__} does not pursue; call it on pre-activations.")

    def code(self, pre: Float[Array, "*b m"], capacity: int) -> SparseCode:
        """The same code in `capacity` slots a row, in descending order of magnitude; `overflow` counts what is left."""
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


def _of_any_units(self: Activation, scale: float | Array) -> Any:
    """Itself: what is scaled before is scaled after."""
    del scale
    return self


@pytrees.dataclass
class ReLU(Activation):
    """Keep what is positive: `z = max(pre, 0)`.

    Trained with an L1 penalty, the sparse autoencoder of Bricken et al. (2023) and Cunningham et al. (2023).

    Example:
      >>> import jax.numpy as jnp, jaxsae
      >>> jaxsae.ReLU()(jnp.array([-1.0, 2.0]))
      Array([0., 2.], dtype=float32)
    """

    rescale = _of_any_units

    def __call__(self, pre: Float[Array, "*b m"]) -> Float[Array, "*b m"]:
        """The dense code."""
        return jax.nn.relu(pre)


class _Selection(Activation):
    """An activation that chooses `k` slots a row: `_chosen` says which, and the rest follows."""

    k: int
    selects = True

    def __init_subclass__(cls) -> None:
        super().__init_subclass__()
        # Nor has it said so of the sparse code, which is made of the dense one then.
        if "__call__" in vars(cls) and "_chosen" not in vars(cls):
            cls.selects = False
            cls._chosen = lambda self, pre: codes.from_dense(self(pre), self.k)

    def __post_init__(self):
        _validate_k(self)

    @property
    def slots(self) -> int:
        """`k`."""
        return self.k

    def _validate(self, m: int) -> None:
        if self.k > m:
            raise ValueError(f"{type(self).__name__} got k = {self.k} for {m} latents; pass k of at most {m}.")

    def _chosen(self, pre: Float[Array, "*b m"]) -> SparseCode:
        """The code in its own `k` slots."""
        raise NotImplementedError

    def code(self, pre: Float[Array, "*b m"], capacity: int) -> SparseCode:
        """The code in its own `k` slots, followed by empty ones up to `capacity`."""
        m = pre.shape[-1]
        self._validate(m)
        if capacity < self.k:
            raise ValueError(
                f"{type(self).__name__} fixes k = {self.k}, but got capacity {capacity}; leave capacity out."
            )
        code = self._chosen(pre)
        spare = [(0, 0)] * (pre.ndim - 1) + [(0, capacity - self.k)]
        # Latents that are not chosen are what the activation leaves out: no overflow.
        return SparseCode(
            values=jnp.pad(code.values, spare),
            indices=jnp.pad(code.indices, spare, constant_values=m),
            num_latents=m,
        )


def _validate_k(activation: Any) -> None:
    k = activation.k
    if isinstance(k, bool) or not isinstance(k, int | np.integer) or k < 1:
        raise ValueError(f"{type(activation).__name__} got k = {k}; pass k of at least 1, a whole number.")


def dropped(pre: Float[Array, "*b m"], k: int, keep: float | Array | None = None) -> Bool[Array, "*b m"]:
    """What is not among the `k` largest of its row, or the first `keep` of these, by comparison with the last."""
    # The barrier keeps all of the top-k in use, without which XLA's CPU backend sorts whole rows instead. (With a third
    # array, as in `codes.top_k`: where the latents are spread, XLA ends the process at a barrier for the pair alone.)
    found = codes.top_k(jax.lax.stop_gradient(pre), k)
    top, indices, _ = jax.lax.optimization_barrier((*found, jnp.zeros(())))
    number = k if keep is None else jnp.sum(_kept(k, keep))
    at = k - 1 if keep is None else jnp.maximum(number - 1, 0)
    least, last = top[..., at, None], indices[..., at, None]
    # Equal values are taken in order of index, here as in `top_k`; NaN stays NaN.
    out = (pre < least) | ((pre == least) & (jnp.arange(pre.shape[-1]) > last))
    return out if keep is None else out | ((number == 0) & ~jnp.isnan(pre))


def _kept(k: int, keep: float | Array) -> Bool[Array, " k"]:
    """Which of `k` slots in descending order are used if only `keep` are: a fraction of a latent is none."""
    return jnp.arange(k) < jnp.floor(keep)


@pytrees.dataclass
class TopK(_Selection):
    """Keep the `k` largest pre-activations of each row, those of them that are positive.

    Attributes:
      k: number of active latents a row; static.
      keep: use only this many of them, rounded down, from 0 to `k`; a float, which may be traced, for sweeps over
        sparsity in one compilation. All by default.

    Raises:
      ValueError: if `k < 1`.

    Example:
      >>> import jax.numpy as jnp, jaxsae
      >>> jaxsae.TopK(1)(jnp.array([1.0, 3.0, 2.0]))
      Array([0., 3., 0.], dtype=float32)

    Source: Gao et al. (2024), Section 2.3; Makhzani & Frey (2013).
    """

    k: int = struct.field(pytree_node=False)
    keep: float | Array | None = pytrees.fixed(default=None)
    rescale = _of_any_units

    def __call__(self, pre: Float[Array, "*b m"]) -> Float[Array, "*b m"]:
        """The dense code, by comparison with the k-th largest: no scatter, forwards or backwards."""
        self._validate(pre.shape[-1])
        return jnp.where(dropped(pre, self.k, self.keep), 0, jax.nn.relu(pre))

    def _chosen(self, pre: Float[Array, "*b m"]) -> SparseCode:
        m = pre.shape[-1]
        values, indices = codes.top_k(pre, self.k)
        kept = values > 0
        if self.keep is not None:
            kept &= _kept(self.k, self.keep)
        # NaN is no reason to leave a latent out: it stays visible.
        kept |= jnp.isnan(values)
        return SparseCode(jnp.where(kept, values, 0), jnp.where(kept, indices, m), m)


@pytrees.dataclass
class AbsTopK(_Selection):
    """Keep the `k` pre-activations of largest magnitude, with their signs: a code that needs no pairs of latents.

    Attributes:
      k: number of active latents a row; static.

    Raises:
      ValueError: if `k < 1`.

    Example:
      >>> import jax.numpy as jnp, jaxsae
      >>> jaxsae.AbsTopK(1)(jnp.array([1.0, -3.0, 2.0]))
      Array([ 0., -3.,  0.], dtype=float32)

    Source: Zhu et al. (2025), "AbsTopK: rethinking sparse autoencoders for bidirectional features".
    """

    k: int = struct.field(pytree_node=False)
    signed = True
    rescale = _of_any_units

    def __call__(self, pre: Float[Array, "*b m"]) -> Float[Array, "*b m"]:
        """The dense code."""
        self._validate(pre.shape[-1])
        return jnp.where(dropped(jnp.abs(pre), self.k), 0, pre)

    def _chosen(self, pre: Float[Array, "*b m"]) -> SparseCode:
        return codes.from_dense(pre, self.k)


@pytrees.dataclass
class GroupMax(_Selection):
    """Split the latents into `k` groups of neighbours and keep the largest of each, if it is positive.

    Cheaper than TopK, without a sort of all latents; the groups decide what may be active together.

    Attributes:
      k: number of groups, and of slots a row; divides `m`; static.

    Raises:
      ValueError: if `k < 1`, or does not divide the number of latents.

    Example:
      >>> import jax.numpy as jnp, jaxsae
      >>> jaxsae.GroupMax(2)(jnp.array([1.0, 3.0, -1.0, 2.0]))
      Array([0., 3., 0., 2.], dtype=float32)

    Source: EleutherAI, sparsify.
    """

    k: int = struct.field(pytree_node=False)
    rescale = _of_any_units

    def _validate(self, m: int) -> None:
        if m % self.k:
            raise ValueError(f"GroupMax got k = {self.k} for {m} latents; pass a k that divides {m}.")

    def __call__(self, pre: Float[Array, "*b m"]) -> Float[Array, "*b m"]:
        """The dense code."""
        self._validate(pre.shape[-1])
        groups = pre.reshape(*pre.shape[:-1], self.k, -1)
        first = jnp.argmax(groups, axis=-1, keepdims=True)
        return jnp.where(jnp.arange(groups.shape[-1]) == first, jax.nn.relu(groups), 0).reshape(pre.shape)

    def _chosen(self, pre: Float[Array, "*b m"]) -> SparseCode:
        groups = pre.reshape(*pre.shape[:-1], self.k, -1)
        first = jnp.argmax(groups, axis=-1)
        values = jax.nn.relu(jnp.take_along_axis(groups, first[..., None], axis=-1)[..., 0])
        indices = first.astype(jnp.int32) + groups.shape[-1] * jnp.arange(self.k, dtype=jnp.int32)
        values, order = jax.lax.top_k(values, self.k)
        indices = jnp.take_along_axis(indices, order, axis=-1)
        kept = (values > 0) | jnp.isnan(values)
        return SparseCode(values, jnp.where(kept, indices, pre.shape[-1]), pre.shape[-1])


def _past(threshold, pre, value):
    """The positive part of a value where `pre > threshold`; NaN in any of them is no reason to leave a latent out."""
    value = jnp.where(jnp.isnan(pre - threshold), jnp.nan, value)
    return jnp.where((pre > threshold) | jnp.isnan(value), jax.nn.relu(value), 0)


@pytrees.dataclass
class BatchTopK(Activation):
    """Train on the `B·k` largest of a batch of `B` rows; infer with the threshold that this amounts to.

        training: the B·k largest positive entries of the batch;   inference: z = pre where pre > threshold

    Rows may then differ in how many latents they need. The threshold follows the smallest value kept, as a running
    mean over some hundred steps that begins at the first one.

    Attributes:
      k: mean number of active latents a row, in training; static.
      threshold: `[]`, of inference; negative until a training step has estimated it, and then nothing but ReLU.

    Raises:
      ValueError: if `k < 1`.

    Example:
      >>> import jax.numpy as jnp, jaxsae
      >>> pre = jnp.array([[4.0, 3.0], [2.0, 1.0]])
      >>> z, activation = jaxsae.BatchTopK(1).train(pre)
      >>> z.tolist(), float(activation.threshold)
      ([[4.0, 3.0], [0.0, 0.0]], 3.0)

    Source: Bussmann, Leask & Nanda (2024), "BatchTopK sparse autoencoders".
    """

    k: int = struct.field(pytree_node=False)
    threshold: float | Float[Array, ""] = pytrees.fixed(default=-1.0)

    def __post_init__(self):
        _validate_k(self)

    def __call__(self, pre: Float[Array, "*b m"]) -> Float[Array, "*b m"]:
        """The dense code of inference: each row by itself."""
        return _past(self.threshold, pre, pre)

    def train(self, pre: Float[Array, "b m"]) -> tuple[Float[Array, "b m"], "BatchTopK"]:
        """The dense code of a training batch, and the activation with its threshold moved towards it."""
        z = jax.nn.relu(pre)
        count = self.k * math.prod(pre.shape[:-1])
        if count > pre.size:
            raise ValueError(f"BatchTopK got k = {self.k} for {pre.shape[-1]} latents; pass k of at most that.")
        flat = z.reshape(-1)
        z = jnp.where(dropped(flat, count), 0, flat).reshape(pre.shape)
        least = jnp.min(jax.lax.stop_gradient(z), where=z > 0, initial=jnp.inf).astype(jnp.float32)
        threshold = jnp.where(self.threshold < 0, least, 0.99 * self.threshold + 0.01 * least)
        return z, dataclasses.replace(self, threshold=jnp.where(jnp.isfinite(least), threshold, self.threshold))

    def margin(self, pre: Float[Array, "*b m"]) -> Float[Array, "*b m"]:
        """How far past a threshold of 0 each latent is, if it is positive: `t` in `at_margin(t)` where it turns off."""
        return pre

    def at_margin(self, t: float | Array) -> "BatchTopK":
        """The activation under which positive latents of a margin beyond `t` are active, and no others."""
        return dataclasses.replace(self, threshold=jnp.asarray(t, jnp.float32))

    def rescale(self, scale: float | Array) -> "BatchTopK":
        """The activation in other units."""
        return dataclasses.replace(self, threshold=self.threshold / scale)


@pytrees.dataclass
class JumpReLU(Activation):
    """Keep what exceeds its latent's threshold: `z = max(pre, 0)` where `pre > θ`, else 0.

    The step has no slope: thresholds learn from the straight-through derivatives

        ∂z/∂θ ≈ −(θ/ε) K((pre − θ)/ε),   ∂‖z‖₀/∂θ ≈ −(1/ε) K((pre − θ)/ε),   K(u) = 1 where |u| < ½

    Attributes:
      threshold: `[m]`, in float32 or better whatever the weights: the steps of a threshold are too fine for bfloat16.
        A latent with a threshold of infinity is never active.
      bandwidth: `ε`, in the units of the pre-activations, or 0 for thresholds without a derivative; static.

    Raises:
      ValueError: if the bandwidth is negative or not finite.

    Example:
      >>> import jax.numpy as jnp, jaxsae
      >>> jaxsae.JumpReLU(jnp.array([0.5, 0.5]))(jnp.array([0.4, 0.6]))
      Array([0. , 0.6], dtype=float32)

    Source: Rajamanoharan et al. (2024), "Jumping ahead: improving reconstruction fidelity with JumpReLU SAEs".
    """

    threshold: Float[Array, " m"]
    bandwidth: float = struct.field(pytree_node=False, default=0.001)

    def __post_init__(self):
        if not 0 <= self.bandwidth < math.inf:
            raise ValueError(f"JumpReLU got a bandwidth of {self.bandwidth}; pass a finite one, of at least 0.")

    def __call__(self, pre: Float[Array, "*b m"]) -> Float[Array, "*b m"]:
        """The dense code."""
        _, slope = self._step(pre)
        still = jax.lax.stop_gradient(self._finite())
        return _past(self.threshold, pre, pre) - (still * slope).astype(pre.dtype)

    def l0(self, pre: Float[Array, "*b m"]) -> Float[Array, "*b"]:
        """`‖z‖₀` of each row, with its straight-through derivative to the thresholds."""
        on, slope = self._step(pre)
        return jnp.sum(on - slope, axis=-1)

    def _step(self, pre):
        """Whether each pre-activation is past its threshold, and 0 with the derivative `K((pre − θ)/ε)/ε` in `θ`."""
        # In the threshold's dtype, not in that of the weights.
        distance = jax.lax.stop_gradient(pre - self.threshold)
        near = jnp.abs(distance) < self.bandwidth / 2
        threshold = self._finite()
        moved = threshold - jax.lax.stop_gradient(threshold)  # 0, with the derivative 1
        height = 1 / self.bandwidth if self.bandwidth else 0.0  # a step of no width has no derivative
        return (distance > 0) & (pre > 0), height * near * moved

    def _finite(self):
        """The thresholds, but for those that are infinite, where nothing is near and 0 does not stay 0."""
        threshold = jnp.asarray(self.threshold)
        return jnp.where(jnp.isfinite(threshold), threshold, 0)

    def margin(self, pre: Float[Array, "*b m"]) -> Float[Array, "*b m"]:
        """How far past its threshold each latent is, if it is positive: `t` in `at_margin(t)` where it turns off."""
        return pre - self.threshold

    def at_margin(self, t: float | Array) -> "JumpReLU":
        """The activation under which positive latents of a margin beyond `t` are active, and no others.

        All thresholds are moved alike: a common factor, tried too, costs more error.
        """
        return dataclasses.replace(self, threshold=jnp.maximum(self.threshold + t, 0))

    def rescale(self, scale: float | Array) -> "JumpReLU":
        """The activation in other units; the bandwidth, which matters in training alone, stays."""
        return dataclasses.replace(self, threshold=self.threshold / scale)


@pytrees.dataclass
class Gated(Activation):
    """Decide with one bias which latents are active, and with another, and a scale, what their values are.

        z = max(exp(r_mag) ∘ pre + b_mag, 0)   where pre + b_gate > 0

    Selection and value share their weights, so only the gate need be sparse, and values need not shrink. The gate has
    no slope here: its derivative comes from the term `objectives.Gate`. `SAE.b_enc` does nothing that the two biases
    do not.

    Attributes:
      r_mag: `[m]`, log scale of the values relative to the gate.
      b_gate: `[m]`, bias of the gate.
      b_mag: `[m]`, bias of the values.

    Example:
      >>> import jax.numpy as jnp, jaxsae
      >>> jaxsae.Gated(jnp.zeros(2), jnp.zeros(2), jnp.ones(2))(jnp.array([-0.5, 0.5]))
      Array([0. , 1.5], dtype=float32)

    Source: Rajamanoharan et al. (2024), "Improving dictionary learning with gated sparse autoencoders".
    """

    r_mag: Float[Array, " m"]
    b_gate: Float[Array, " m"]
    b_mag: Float[Array, " m"]

    def __call__(self, pre: Float[Array, "*b m"]) -> Float[Array, "*b m"]:
        """The dense code."""
        return _past(0, self.gate(pre), jnp.exp(self.r_mag) * pre + self.b_mag)

    def gate(self, pre: Float[Array, "*b m"]) -> Float[Array, "*b m"]:
        """What must be positive for a latent to be active."""
        return pre + self.b_gate

    def rescale(self, scale: float | Array) -> "Gated":
        """The activation in other units."""
        return dataclasses.replace(self, b_gate=self.b_gate / scale, b_mag=self.b_mag / scale)


@pytrees.dataclass
class MatchingPursuit(Activation):
    """No encoder: take the atom that correlates most with what is left, as often as needed.

        j = argmax ⟨a_j, r⟩,   z_j ← z_j + max(⟨a_j, r⟩, 0),   r ← r − max(⟨a_j, r⟩, 0) a_j,   from r = x − b_dec

    Atoms are meant to have norm 1. A row ends when `‖r‖` falls below a threshold, when a step left its support as it
    was, or after `max_steps`. (`pursuit.matching_pursuit` is for dictionaries of any norm.)

    Attributes:
      residual_threshold: `‖r‖` at which a row ends; 0 for never.
      max_steps: most steps of a row; `d` if None; static.
      stop_on_duplicate: whether a row ends when its support did not change; static.

    Example:
      >>> import jax.numpy as jnp, jaxsae
      >>> jaxsae.activations.MatchingPursuit().pursue(jnp.array([3.0, 4.0]), jnp.eye(2))
      Array([3., 4.], dtype=float32)

    Source: Costa et al. (2025), "From flat to hierarchical: extracting sparse representations with matching pursuit";
      SAELens' `matching_pursuit`.
    """

    residual_threshold: float | Float[Array, ""] = pytrees.fixed(default=0.01)
    max_steps: int | None = struct.field(pytree_node=False, default=None)
    stop_on_duplicate: bool = struct.field(pytree_node=False, default=True)
    pursues = True

    def __call__(self, pre: Float[Array, "*b m"]) -> Float[Array, "*b m"]:
        """Not of this: pre-activations do not say what is left."""
        raise NotImplementedError("MatchingPursuit has no pre-activations; call `encode_dense`.")

    def pursue(self, y: Float[Array, "*b d"], dictionary: Float[Array, "m d"]) -> Float[Array, "*b m"]:
        """The dense code of rows `y`."""
        (m, d), batch = dictionary.shape, y.shape[:-1]
        rows = jnp.arange(math.prod(batch))

        def step(state):
            number, z, r, done = state
            chosen = jnp.argmax(jax.nn.relu(r @ dictionary.T), axis=1)
            atoms = dictionary[chosen]
            values = jnp.where(done, 0, jax.nn.relu(jnp.sum(r * atoms, axis=1)))
            after = z.at[rows, chosen].add(values)
            r = r - values[:, None] * atoms
            if self.stop_on_duplicate:
                done |= ((after != 0) == (z != 0)).all(1)
            done |= (self.residual_threshold > 0) & (jnp.linalg.norm(r, axis=1) < self.residual_threshold)
            return number + 1, after, r, done

        y = y.reshape(-1, d)
        start = jnp.int32(0), jnp.zeros((len(y), m), y.dtype), y, jnp.zeros(len(y), bool)
        steps = d if self.max_steps is None else self.max_steps
        _, z, _, _ = jax.lax.while_loop(lambda s: (s[0] < steps) & ~s[3].all(), step, start)
        return z.reshape(*batch, m)

    def rescale(self, scale: float | Array) -> "MatchingPursuit":
        """The activation in other units."""
        return dataclasses.replace(self, residual_threshold=self.residual_threshold / scale)
