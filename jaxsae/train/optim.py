"""Optax transformations for training: unit-norm atoms, the default optimiser, and averages of parameters."""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array

from jaxsae._core import pytrees
from jaxsae._core.linalg import divide, norms, widen
from jaxsae.autoencoder.sae import SAE


def _remembered(f: Callable) -> Callable:
    """Return the same transformation for equal arguments: training steps that share one share their compilation."""
    remembered = functools.lru_cache(f)

    @functools.wraps(f)
    def call(*args, **options):
        try:
            hash((args, tuple(options.values())))
        except TypeError:  # an array
            return f(*args, **options)
        return remembered(*args, **options)

    return call


class _Sound(optax.GradientTransformation):
    """A transformation known to map finite gradients to finite updates: Adam and what is built on it here.

    A learning rate of NaN shows in every array, so checking those that are not matrices is enough.
    """


def _around(tx: optax.GradientTransformation, init: Callable, update: Callable) -> optax.GradientTransformation:
    """Wrap a transformation; the result is `_Sound` if `tx` is."""
    return (_Sound if isinstance(tx, _Sound) else optax.GradientTransformation)(init, update)


@_remembered
def unit_norm_decoder(tx: optax.GradientTransformation) -> optax.GradientTransformation:
    """Keep the atoms on the unit sphere: pass `tx` their tangent gradient, and project its update onto the sphere.

    Computed in float32 or better, so that atoms of a narrower dtype are rounded once: their norms are then within half
    its epsilon of 1 (2⁻⁸ for bfloat16, 2⁻¹¹ for float16). An atom that would become 0 is left unchanged.

    Args:
      tx: any transformation of gradients shaped like an `SAE`.

    Returns:
      A transformation that needs the parameters, as optax passes them.

    Example:
      >>> import jax, jax.numpy as jnp, optax, jaxsae
      >>> sae = jaxsae.init(jax.random.key(0), d=4, m=8, activation=jaxsae.ReLU())
      >>> tx = jaxsae.train.unit_norm_decoder(optax.sgd(1.0))
      >>> updates, _ = tx.update(jax.tree.map(jnp.ones_like, sae), tx.init(sae), sae)
      >>> norms = jnp.linalg.norm(optax.apply_updates(sae, updates).W_dec, axis=1)
      >>> bool(jnp.allclose(norms, 1, atol=1e-6))
      True

    Source: Bricken et al. (2023), "Towards monosemanticity".
    """

    def init(params: Any) -> Any:
        return tx.init(widen(params))

    def update(updates: Any, state: Any, params: Any = None):
        if params is None:
            raise ValueError("`unit_norm_decoder` got no params; pass them, tx.update(grads, state, params).")
        updates, atoms = widen(updates), widen(params.W_dec)
        grad = updates.W_dec
        parallel = divide(jnp.sum(grad * atoms, axis=-1), jnp.sum(atoms**2, axis=-1))[:, None]
        updates, state = tx.update(updates.replace(W_dec=grad - parallel * atoms), state, params)
        moved = atoms + updates.W_dec
        norm = norms(moved)
        norm = jnp.where(jnp.isfinite(norm), norm, jnp.nan)  # else the atom would be 0: finite/∞
        return updates.replace(W_dec=jnp.where(norm == 0, 0, divide(moved, norm) - atoms)), state

    return _around(tx, init, update)


@_remembered
def aligned_encoder(tx: optax.GradientTransformation) -> optax.GradientTransformation:
    """Keep `⟨w_i, a_i⟩ = 1` for each latent's direction `w_i` in the encoder and its atom `a_i`.

        w_i ← w_i + (1 − ⟨w_i, a_i⟩) a_i / ‖a_i‖²

    Then the encoder maps `z a_i` to `z`, biases apart: an L1 penalty cannot be lowered by directions that shrink. `tx`
    gets the gradient of the loss as a function of directions that are aligned, so that an atom which moves takes its
    direction along. A latent whose atom is 0 is left unchanged.

    Args:
      tx: any transformation of gradients shaped like an `SAE` with as many inputs as outputs.

    Returns:
      A transformation that needs the parameters, as optax passes them.

    Example:
      >>> import jax, jax.numpy as jnp, optax, jaxsae
      >>> sae = jaxsae.init(jax.random.key(0), d=4, m=8, activation=jaxsae.ReLU())
      >>> tx = jaxsae.train.aligned_encoder(jaxsae.train.default_optimizer(0.1))
      >>> updates, _ = tx.update(jax.tree.map(jnp.ones_like, sae), tx.init(sae), sae)
      >>> moved = optax.apply_updates(sae, updates)
      >>> bool(jnp.allclose(jnp.sum(moved.W_enc.T * moved.W_dec, axis=1), 1, atol=1e-5))
      True

    Source: arXiv:2605.18629, which calls this aligned training.
    """

    def update(updates: Any, state: Any, params: Any = None):
        if params is None:
            raise ValueError("`aligned_encoder` got no params; pass them, tx.update(grads, state, params).")
        updates, params = widen(updates), widen(params)
        _, pull_back = jax.vjp(_align, params.W_enc, params.W_dec)
        by_enc, by_dec = pull_back(updates.W_enc)
        updates, state = tx.update(updates.replace(W_enc=by_enc, W_dec=updates.W_dec + by_dec), state, params)
        moved = _align(params.W_enc + updates.W_enc, params.W_dec + widen(updates.W_dec))
        return updates.replace(W_enc=moved - params.W_enc), state

    return _around(tx, lambda params: tx.init(widen(params)), update)


def _align(W_enc: Array, W_dec: Array) -> Array:
    """`W_enc` with each direction moved along its atom."""
    missing = divide(1 - jnp.sum(W_enc.T * W_dec, axis=1), jnp.sum(W_dec**2, axis=1))
    return W_enc + (missing[:, None] * W_dec).T


@_remembered
def bfloat16_adam(
    rate: optax.ScalarOrSchedule, *, b1: float = 0.9, b2: float = 0.999, eps: float = 6.25e-10
) -> optax.GradientTransformation:
    """Adam with both moments in bfloat16: half the memory of its state, and of what is saved of it.

        m ← ⌊β₁ m + (1 − β₁) g⌉,   v ← ⌊β₂ v + (1 − β₂) g²⌉,   update = −rate · m̂ / (√v̂ + ε)

    `⌊·⌉` rounds stochastically: up with a probability equal to the distance from below in units of the last place, so
    that it is right on average. Rounded to nearest, `v` would never fall, and rise only where `g²` is three to five
    times as large: half a unit of bfloat16 is 1/512 to 1/256 of a value, and `1 − β₂` is less. The random bits are
    hashed from the number of updates and the place in the array: a training that resumes is bitwise identical.

    Args:
      rate: learning rate, or an optax schedule.
      b1: decay of the first moment, `β₁`.
      b2: decay of the second moment, `β₂`.
      eps: `ε`.

    Example:
      >>> import jax, jax.numpy as jnp, jaxsae
      >>> sae = jaxsae.init(jax.random.key(0), d=4, m=8, activation=jaxsae.ReLU())
      >>> tx = bfloat16_adam(1e-3)
      >>> _, state = tx.update(jax.tree.map(jnp.ones_like, sae), tx.init(sae), sae)
      >>> state[0].nu.W_enc.dtype
      dtype(bfloat16)

    Source: Kingma & Ba (2015), "Adam"; Zamirai et al. (2020), "Revisiting bfloat16 training", for the rounding.
    """

    def init(params: Any) -> optax.ScaleByAdamState:
        zeros = jax.tree.map(lambda p: jnp.zeros_like(p, jnp.bfloat16), params)
        return optax.ScaleByAdamState(jnp.zeros((), jnp.int32), zeros, jax.tree.map(jnp.copy, zeros))

    def update(updates: Any, state: Any, params: Any = None):
        del params
        count: Any = optax.safe_increment(state.count)
        grads, old, seed = widen(updates), widen((state.mu, state.nu)), 2 * count.astype(jnp.uint32)
        # Updates are computed from the rounded moments, so that new ones take the place of the old ones.
        mu = _rounded(jax.tree.map(lambda m, g: b1 * m + (1 - b1) * g, old[0], grads), seed)
        nu = _rounded(jax.tree.map(lambda v, g: b2 * v + (1 - b2) * g**2, old[1], grads), seed + 1)
        of_mean, of_square = (1 - jnp.float32(b) ** count.astype(jnp.float32) for b in (b1, b2))
        direction = lambda m, v: (m / of_mean) / (jnp.sqrt(v / of_square) + eps)  # noqa: E731
        return jax.tree.map(direction, widen(mu), widen(nu)), optax.ScaleByAdamState(count, mu, nu)

    return optax.chain(optax.GradientTransformation(init, update), optax.scale_by_learning_rate(rate))


def _rounded(tree: Any, seed: Array) -> Any:
    """Arrays of a tree in bfloat16, rounded stochastically."""
    leaves, structure = jax.tree.flatten(tree)

    def narrow(number: int, x: Array) -> Array:
        bits = jax.lax.bitcast_convert_type(x.astype(jnp.float32), jnp.uint32)
        noise = _hash(x.shape, _mixed(seed * jnp.uint32(0x9E3779B1) + jnp.uint32(number)))
        moved = jax.lax.bitcast_convert_type((bits + (noise >> 16)) & jnp.uint32(0xFFFF0000), jnp.float32)
        return jnp.where(jnp.isnan(x), jnp.float32(jnp.nan), moved).astype(jnp.bfloat16)  # a carry could make it finite

    return structure.unflatten([narrow(number, jnp.asarray(x)) for number, x in enumerate(leaves)])


def _hash(shape: tuple[int, ...], seed: Array) -> Array:
    """32 random bits for each element, by its place; XLA computes them where they are used, on a mesh too."""
    for axis in range(len(shape)):
        seed = _mixed(seed ^ jax.lax.broadcasted_iota(jnp.uint32, shape, axis))
    return seed


def _mixed(x: Array) -> Array:
    """The finalizer of MurmurHash3."""
    x = (x ^ (x >> 16)) * jnp.uint32(0x85EBCA6B)
    x = (x ^ (x >> 13)) * jnp.uint32(0xC2B2AE35)
    return x ^ (x >> 16)


def learning_rate(m: int, steps: int | None = None) -> float:
    """The learning rate of Gao et al. (2024) for at least 10⁵ steps, and a larger one for fewer.

        2e-4 / √(m / 2¹⁴) · max(1, 10⁵ / steps)^¼,   raised to 4e-3 at most

    The exponent is that of the best rates for 250 to 1,000 steps in `python -m benchmarks rates`, where latents die
    above 4e-3.

    Args:
      m: number of latents.
      steps: number of training steps; at least 10⁵ if None.

    Example:
      >>> learning_rate(2**14), learning_rate(2**16, steps=200_000), learning_rate(2**14, steps=6250)
      (0.0002, 0.0001, 0.0004)

    Source: Gao et al. (2024), Appendix A.
    """
    base = 2e-4 / (m / 2**14) ** 0.5
    shorter = 1.0 if steps is None else max(1.0, 1e5 / steps)
    return max(base, min(base * shorter**0.25, 4e-3))


@_remembered
def default_optimizer(
    rate: optax.ScalarOrSchedule, *, clip: float | None = None, moments: str = "float32"
) -> optax.GradientTransformation:
    """The optimiser of Gao et al. (2024): Adam with `β = (0.9, 0.999)` and `ε = 6.25e-10`, atoms on the unit sphere.

    Args:
      rate: learning rate, such as `learning_rate(m, steps)`, or an optax schedule.
      clip: maximum global norm of the gradient; no clipping by default.
      moments: dtype of Adam's moments, `"float32"`, or `"bfloat16"` as by `bfloat16_adam`.

    Raises:
      ValueError: for another dtype.

    Example:
      >>> import optax
      >>> schedule = optax.warmup_cosine_decay_schedule(0.0, learning_rate(4096), warmup_steps=100, decay_steps=1000)
      >>> tx = default_optimizer(schedule, clip=1.0)

    Source: Gao et al. (2024), Appendix A.
    """
    if moments not in ("float32", "bfloat16"):
        raise ValueError(f"`default_optimizer` got moments {moments!r}; pass 'float32' or 'bfloat16'.")
    kind: Any = optax.adam if moments == "float32" else bfloat16_adam
    adam = kind(rate, b1=0.9, b2=0.999, eps=6.25e-10)
    tx: Any = adam if clip is None else optax.chain(optax.clip_by_global_norm(clip), adam)
    return unit_norm_decoder(_Sound(*tx))


class EmaState(NamedTuple):
    """The inner state, the mean of the parameters so far, in float32 or better, and its weight."""

    inner: Any
    mean: Any
    weight: Array


@_remembered
def ema(tx: optax.GradientTransformation, decay: float) -> optax.GradientTransformation:
    """Keep an exponential moving average of the parameters in the optimiser state; `ema_params` reads it.

        w ← decay·w + (1 − decay),   mean ← mean + (1 − decay)/w · (parameters − mean)

    This is the debiased average; before the first step it equals the parameters.

    Args:
      tx: any transformation.
      decay: weight of the previous mean in each step, for example 0.999.

    Example:
      >>> import jax, jax.numpy as jnp, optax, jaxsae
      >>> sae = jaxsae.init(jax.random.key(0), d=4, m=8, activation=jaxsae.ReLU())
      >>> tx = ema(optax.sgd(1.0), decay=0.9)
      >>> updates, state = tx.update(jax.tree.map(jnp.ones_like, sae), tx.init(sae), sae)
      >>> ema_params(state).b_enc[0], optax.apply_updates(sae, updates).b_enc[0]
      (Array(-1., dtype=float32), Array(-1., dtype=float32))

    Source: Gao et al. (2024), Appendix A; Kingma & Ba (2015), "Adam", Section 3, for the correction of the bias.
    """

    def init(params: Any) -> EmaState:
        return EmaState(tx.init(params), jax.tree.map(jnp.array, widen(params)), jnp.zeros(()))

    def update(updates: Any, state: Any, params: Any = None):
        updates, inner = tx.update(updates, state.inner, params)
        moved = optax.apply_updates(params, updates)
        weight = decay * state.weight + (1 - decay)
        share = divide(1 - decay, weight)

        def follow(mean, p):  # the optimiser sees None for untrained leaves, which the mean keeps
            return mean if p is None else jnp.where(jnp.isinf(mean), mean, mean + share * (p.astype(mean.dtype) - mean))

        return updates, EmaState(inner, jax.tree.map(follow, state.mean, moved), weight)

    return _around(tx, init, update)


def ema_params(opt_state: Any) -> SAE:
    """The averaged parameters, in float32 or better, with the current values of untrained leaves.

    Args:
      opt_state: the state of `ema`, or any pytree that contains one, such as a `TrainState`.

    Raises:
      ValueError: if there is no `EmaState` in it.

    Example:
      >>> import jax, optax, jaxsae
      >>> sae = jaxsae.init(jax.random.key(0), d=4, m=8, activation=jaxsae.ReLU())
      >>> tx = ema(optax.sgd(1.0), decay=0.9)
      >>> bool((ema_params(jaxsae.train.init_state(sae, tx)).W_dec == sae.W_dec).all())
      True

    Source: Gao et al. (2024), Appendix A.
    """
    found = [node for node in jax.tree.leaves(opt_state, is_leaf=_is_ema) if _is_ema(node)]
    if not found:
        raise ValueError("`ema_params` got a state without an `EmaState`; train with `tx = train.ema(tx, decay)`.")
    return found[0].mean


def _is_ema(node: Any) -> bool:
    return isinstance(node, EmaState)


def _complete(opt_state: Any, sae: SAE) -> Any:
    """Copy the untrained leaves of `sae` into each `EmaState`."""
    rest = pytrees.partition(sae)[1]

    def complete(node):
        if not _is_ema(node):
            return node
        return node._replace(mean=jax.tree.map(jnp.array, pytrees.merge(pytrees.partition(node.mean)[0], rest)))

    return jax.tree.map(complete, opt_state, is_leaf=_is_ema)
